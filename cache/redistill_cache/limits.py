"""The limits of the format, as in FORMAT.md: they bound what a hostile archive can make a reader allocate or do.

Each is far above what an honest archive needs, and low enough to allocate memory for. Writers enforce them too, so that
nothing is written that cannot be read. Limits of the settings of a single codec are checked by that codec.
"""

from __future__ import annotations

__all__ = [
    "KEY_RATIO",
    "KEY_SLACK",
    "MAX_ARRAYS",
    "MAX_ARRAYS_IN_ALL",
    "MAX_BLOCK_ROWS",
    "MAX_CANARIES",
    "MAX_CHUNKS",
    "MAX_CHUNK_BYTES",
    "MAX_CLASSES",
    "MAX_CLASS_NAMES",
    "MAX_DESCRIPTION_BYTES",
    "MAX_DESCRIPTION_DEPTH",
    "MAX_EXCLUDED",
    "MAX_FILES",
    "MAX_FOLDER_DEPTH",
    "MAX_JSON_DEPTH",
    "MAX_JSON_VALUES",
    "MAX_KEY_BYTES",
    "MAX_MANIFEST_BYTES",
    "MAX_METADATA_BYTES",
    "MAX_RANK",
    "MAX_RECORD_BYTES",
    "MAX_ROOT_BYTES",
    "MAX_ROW_BYTES",
    "MAX_SAMPLES",
    "MAX_SIDE_BYTES",
    "MAX_SIGNALS",
    "MAX_TEACHERS",
    "MAX_TEXT",
    "MAX_VALUE",
    "MAX_VIEWS",
    "MAX_VIEW_ROW_BYTES",
    "MAX_WIDTH",
    "SIDE_RATIO",
    "SIDE_SLACK",
]

MAX_SAMPLES = 2**32 - 1  # a mix partner is a uint32
MAX_VIEWS = 65_535
MAX_CLASSES = 1_000_000
MAX_CLASS_NAMES = 100_000
MAX_WIDTH = 1_000_000
MAX_RANK = 8192  # coefficients per row of codec linear
MAX_BLOCK_ROWS = 2**24
MAX_CANARIES = 4096
MAX_TEACHERS = 64
MAX_SIGNALS = 64
MAX_ARRAYS = 64  # of one signal, and of the view parameters
MAX_ARRAYS_IN_ALL = 4096  # of all teachers together, with side data: each has a zarr.json to generate and compare
MAX_EXCLUDED = 20_000

MAX_ROW_BYTES = 8 << 20
MAX_VIEW_ROW_BYTES = 4096  # all parameters of one view of one sample
MAX_CHUNK_BYTES = 32 << 20  # decoded; above this a fresh allocation costs more than decoding
MAX_CHUNKS = 1 << 16  # of one shard, whose index then takes a mebibyte
MAX_SIDE_BYTES = 256 << 20  # all side data of one signal, decoded
MAX_KEY_BYTES = 4096  # of one sample key, UTF-8
MAX_VALUE = 2.0**100  # of a decoded row, in magnitude: differences and sums of a row still fit float32

# Honest data does not decode to more than SLACK + RATIO times its stored bytes. Keys of 4 KB that differ only in a
# number reach a ratio of 1,000; a basis of small integers rarely exceeds 5.
KEY_SLACK, KEY_RATIO = 16 << 20, 2048
SIDE_SLACK, SIDE_RATIO = 8 << 20, 32

# Parsed JSON takes up to 60 times its size as Python objects, so its values are counted before it is parsed.
MAX_JSON_VALUES = 250_000
MAX_JSON_DEPTH = 32
MAX_ROOT_BYTES = 4 << 20  # zarr.json of the archive: it holds the class names
MAX_METADATA_BYTES = 1 << 20  # every other zarr.json, and the header of the manifest
MAX_RECORD_BYTES = 1 << 20
MAX_DESCRIPTION_BYTES = 1 << 16  # a recipe, source, environment, model or config, as canonical JSON
MAX_DESCRIPTION_DEPTH = 16
MAX_TEXT = 4096  # characters of a class name, licence, citation, key or reason
MAX_FILES = 300_000  # lines of a manifest
MAX_MANIFEST_BYTES = 64 << 20
MAX_FOLDER_DEPTH = 8
