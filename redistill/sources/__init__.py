"""Sources: indexable image sets, the index that identifies their samples, and the join to an archive."""

from typing import Literal

OnBadImage = Literal["fail", "exclude"]
"""What to do with images that cannot be decoded."""

DEFAULT_STREAM_CACHE = 20
STREAM_CACHE_HELP = (
    "GiB of the cache folder for tars that are streamed. Tars at addresses are streamed if they are larger, or with "
    "?stream=1."
)
