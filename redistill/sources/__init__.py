"""Sources: indexable image sets, the index that identifies their samples, and the join to an archive."""
