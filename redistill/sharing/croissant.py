"""The description of an archive in Croissant 1.1, the metadata format of MLCommons for data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redistill_cache import ArchiveSpec, TeacherSpec
from redistill_cache.journal import FileEntry
from redistill_cache.wording import harmless

from redistill.sharing.terms import data_source, spdx

__all__ = ["croissant"]

# As the specification of Croissant 1.1 lists it, and the vocabulary of provenance.
CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
TYPES = {"json": "application/json", "tar": "application/x-tar", "csv": "text/csv"}
RECORDS = "rows"


def croissant(
    *,
    title: str,
    description: str,
    spec: ArchiveSpec,
    teachers: Mapping[str, TeacherSpec],
    files: Mapping[str, FileEntry],
    preview: str,
    columns: Sequence[str],
) -> dict[str, Any]:
    """The document. `columns` are those of the table `preview`, which is one of the files."""
    document: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": harmless(title),
        "description": harmless(description),
        "isLiveDataset": False,
        "keywords": ["knowledge distillation", "teacher logits"],
        "distribution": [file_object(name, entry) for name, entry in sorted(files.items())],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": RECORDS,
                "name": RECORDS,
                "description": f"Some of the {spec.num_samples:,} images of the archive, with the classes that a "
                "teacher predicts for their first view. All rows are in the Zarr arrays of the archive.",
                "field": [field(name, preview) for name in columns],
            }
        ],
        "prov:wasDerivedFrom": [images(spec), *(teacher(spec, item) for item in teachers.values())],
    }
    if spec.licence:
        document["license"] = licence_url(spec.licence)
    if spec.citation:
        document["citeAs"] = harmless(spec.citation)
    return document


def file_object(name: str, entry: FileEntry) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{entry.size} B",
        "encodingFormat": TYPES.get(name.rpartition(".")[2], "application/octet-stream"),
        "sha256": entry.sha256,
    }


def field(name: str, preview: str) -> dict[str, Any]:
    numbers = {"label": "sc:Integer", "probability": "sc:Float"}
    return {
        "@type": "cr:Field",
        "@id": f"{RECORDS}/{name}",
        "name": name,
        "dataType": numbers.get(name.partition("_")[0], "sc:Text"),
        "source": {"fileObject": {"@id": preview}, "extract": {"column": name}},
    }


def images(spec: ArchiveSpec) -> dict[str, Any]:
    return entity(data_source(spec) or "images of a source that is not stated", spec.data_licence)


def teacher(spec: ArchiveSpec, teacher: TeacherSpec) -> dict[str, Any]:
    network, digest = teacher.model.get("spec", "not stated"), teacher.model.get("weights_digest")
    weights = f", weights with the SHA-256 {digest}" if digest else ""
    return entity(f"teacher {teacher.name}: {network}{weights}", spec.teacher_licence)


def entity(label: str, licence: str) -> dict[str, Any]:
    """What the archive was made from."""
    terms = {"license": licence_url(licence)} if licence else {}
    return {"@type": "prov:Entity", "prov:label": harmless(label), **terms}


def licence_url(licence: str) -> str:
    """The page of a licence that SPDX lists; an expression of several, or another text, as it is."""
    known = spdx(licence)
    is_page = known is not None and " " not in known and not known.startswith("LicenseRef-")
    return f"https://spdx.org/licenses/{known}.html" if is_page else harmless(licence)
