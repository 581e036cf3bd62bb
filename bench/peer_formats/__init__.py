"""Other formats for teacher logits, one file each, written from their published layouts; and the archive."""

from __future__ import annotations

from peer_formats.archive_rows import ArchiveRows
from peer_formats.base import BATCH, Format, Reader, Rows, Values, Written
from peer_formats.batch_files import BatchFiles
from peer_formats.hdf5_rows import Hdf5Rows
from peer_formats.image_pickles import ImagePickles
from peer_formats.litdata_rows import LitdataRows
from peer_formats.lmdb_rows import LmdbRows
from peer_formats.mds_rows import MdsRows
from peer_formats.memmap_rows import MemmapRows
from peer_formats.tar_rows import TarRows
from peer_formats.view_records import ViewRecords

__all__ = ["BATCH", "LIMIT", "PEERS", "ArchiveRows", "Format", "Reader", "Rows", "Values", "Written"]

LIMIT = MemmapRows()
PEERS: tuple[Format, ...] = (
    ImagePickles(k=10),
    ViewRecords(k=10),
    ViewRecords(k=100),
    BatchFiles(),
    LmdbRows(),
    Hdf5Rows(),
    TarRows(),
    LitdataRows(),
    MdsRows(),
)
