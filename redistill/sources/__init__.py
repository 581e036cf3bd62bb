"""Sources: indexable image sets, the index that identifies their samples, and the join to an archive."""

from typing import Literal

OnBadImage = Literal["fail", "exclude"]
"""What to do with images that cannot be decoded."""
