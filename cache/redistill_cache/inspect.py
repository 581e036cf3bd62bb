"""The description of an archive as plain JSON: the output of `redistill inspect --json`; and parts of it in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redistill_cache import layout
from redistill_cache.addresses import is_address
from redistill_cache.codecs.stats import certified_bound, summarise
from redistill_cache.download import Notify, say
from redistill_cache.fetching import fetched_description, locate
from redistill_cache.packed import is_packed
from redistill_cache.reader import Archive, open_archive
from redistill_cache.spec import SignalSpec, TeacherSpec

__all__ = ["describe", "describe_at", "described_recipe", "settings_text"]


def describe_at(location: str, *, notify: Notify = say) -> dict[str, Any]:
    """The description of the archive at a path or an address, of which only the metadata are fetched."""
    if not (is_address(location) or is_packed(location)):
        return describe(open_archive(location, allow_partial=True))
    with fetched_description(location, notify=notify) as state:
        return describe(Archive(state)) | {"path": str(locate(location))}


def describe(archive: Archive) -> dict[str, Any]:
    """Identity, sizes, recipe, provenance, and per teacher and signal: codec, bytes per view, achieved fidelity."""
    state, spec = archive.state, archive.spec
    manifest = archive.path / layout.MANIFEST
    total = sum(entry.size for entry in state.files.values()) + (manifest.stat().st_size if archive.id else 0)
    return {
        "path": str(archive.path),
        "id": archive.id,
        "complete": archive.complete,
        "num_samples": archive.num_samples,
        "num_views": archive.num_views,
        "sealed_views": state.sealed_views or None,
        "lacking": dict(state.lacking),
        "teacher_views": {name: state.views_of(name) for name in archive.teachers},
        "num_classes": archive.num_classes,
        "class_names": None if spec.class_names is None else list(spec.class_names),
        "total_bytes": total,
        "bytes_per_view": total / (archive.num_samples * archive.num_views),
        "committed_blocks": None if state.committed is None else len(state.committed),
        "recipe": spec.recipe,
        "seed": spec.seed,
        "canaries_per_view": spec.canaries_per_view,
        "view_parameters": _bytes_by_array(
            archive, [a.path for a in layout.view_arrays(spec).values()], archive.num_views
        ),
        "teachers": {
            name: {signal: _signal(archive, *archive.part_of(name, signal)) for signal in archive.signals_of(name)}
            for name in archive.teachers
        },
        "models": {name: teacher.model for name, teacher in archive.teachers.items()},
        "subset_of": None if spec.subset_of is None else spec.subset_of.to_json(),
        "source": spec.source,
        "excluded": [dict(item) for item in spec.excluded],
        "licence": spec.licence,
        "citation": spec.citation,
        "data_source": spec.data_source,
        "data_licence": spec.data_licence,
        "teacher_licence": spec.teacher_licence,
        "environment": spec.environment,
    }


def _signal(archive: Archive, part: TeacherSpec, signal: SignalSpec) -> dict[str, Any]:
    folder, views = f"teachers/{part.name}/{signal.name}", archive.state.views_of(part.name)
    paths = [f"{folder}/{array.name}" for array in signal.arrays]
    arrays = _bytes_by_array(archive, paths, views)
    side = sum(entry.size for name, entry in archive.state.files.items() if name.startswith(f"{folder}/side/"))
    return {
        "codec": signal.codec,
        "width": signal.width,
        "views": views,
        "config": signal.config,
        "bytes_per_view": sum(arrays.values()),
        "bytes_per_view_by_array": arrays,
        "side_bytes": side,
        "fidelity": _fidelity(archive, part, signal),
    }


def _bytes_by_array(archive: Archive, paths: list[str], views: int) -> dict[str, float]:
    """Stored bytes per row of each array."""
    rows = archive.num_samples * views
    sizes = dict.fromkeys(paths, 0)
    for name, entry in archive.state.files.items():
        folder, _, shard = name.rpartition("/")
        if folder in sizes and shard.startswith("c."):
            sizes[folder] += entry.size
    return {path.rpartition("/")[2]: size / rows for path, size in sizes.items()}


def _fidelity(archive: Archive, part: TeacherSpec, signal: SignalSpec) -> dict[str, Any] | None:
    """The requested bound, in which measure, and the errors of all rows, where they were measured.

    None where the writer measured nothing; a subset still has the bound that the codec certifies for every row.
    """
    stats = archive.state.stats.get(part.name, {}).get(signal.name)
    if stats is None and (archive.spec.subset_of is None or certified_bound(signal) is None):
        return None
    measured = {} if stats is None else summarise(stats)
    return {"bound": signal.config.get("fidelity"), "metric": signal.config.get("metric")} | measured


def described_recipe(recipe: Mapping[str, Any]) -> str:
    """The operations of a recipe with their settings; what an archive stores may be any JSON."""
    ops = recipe.get("ops", [])
    parts = []
    for op in ops if isinstance(ops, list) else [ops]:
        if not isinstance(op, dict):
            parts.append(str(op))
            continue
        settings = settings_text({name: value for name, value in op.items() if name != "op"})
        parts.append(f"{op.get('op', '?')} ({settings})" if settings else str(op.get("op", "?")))
    return f"{', then '.join(parts) or 'none'}; {recipe.get('size', '?')} pixels"


def settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
