"""redistill_cache: the archive of teacher outputs. numpy and zarr only; no torch."""
