"""Indexable image sets: where samples come from, what identifies them, and how they meet an archive."""
