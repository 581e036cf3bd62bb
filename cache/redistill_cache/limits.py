"""Every limit of the format, in one place. They bound what a hostile archive can make a reader do.

Each is far above what an honest archive needs and low enough that the number can be trusted with an allocation.
"""

from __future__ import annotations

__all__ = [
    "MAX_ARRAYS",
    "MAX_BLOCK_ROWS",
    "MAX_CANARIES",
    "MAX_CHUNK_BYTES",
    "MAX_CLASSES",
    "MAX_EXCLUDED",
    "MAX_FILES",
    "MAX_KEY_BYTES",
    "MAX_MANIFEST_BYTES",
    "MAX_METADATA_BYTES",
    "MAX_RECORD_BYTES",
    "MAX_ROOT_BYTES",
    "MAX_ROW_BYTES",
    "MAX_SAMPLES",
    "MAX_SIDE_BYTES",
    "MAX_SIGNALS",
    "MAX_TEACHERS",
    "MAX_TEXT",
    "MAX_VIEWS",
    "MAX_WIDTH",
]

MAX_SAMPLES = 2**32 - 1  # a mix partner is a uint32
MAX_VIEWS = 65_535
MAX_CLASSES = 1_000_000
MAX_WIDTH = 1_000_000
MAX_BLOCK_ROWS = 2**24
MAX_CANARIES = 4096
MAX_TEACHERS = 64
MAX_SIGNALS = 64
MAX_ARRAYS = 64  # of one signal, and of the view parameters
MAX_EXCLUDED = 100_000

MAX_ROW_BYTES = 8 << 20
MAX_CHUNK_BYTES = 32 << 20  # decoded; above this a fresh allocation costs more than decoding
MAX_SIDE_BYTES = 256 << 20  # all side data of one signal, decoded
MAX_KEY_BYTES = 4096  # of one sample key, UTF-8
MAX_TEXT = 4096  # characters of a free text in the specification

# JSON is parsed into Python objects of up to 30 times its size: these caps keep that below 150 MB.
MAX_ROOT_BYTES = 4 << 20  # zarr.json of the archive: it holds the class names
MAX_METADATA_BYTES = 1 << 20  # every other zarr.json
MAX_RECORD_BYTES = 1 << 20
MAX_FILES = 300_000  # lines of a manifest
MAX_MANIFEST_BYTES = 64 << 20
