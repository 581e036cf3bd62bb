"""Joining reports every difference between a data set and an archive, in any order of either."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
from redistill_cache.errors import Refused
from redistill_cache.keys import pack_keys

from redistill.sources.index import SourceIndex
from redistill.sources.join import Join, join

CLASSES = ("ant", "bee", "cat")


@dataclass(frozen=True)
class Item:
    key: str
    text: str
    label: int


def make_items(n: int, start: int = 0) -> list[Item]:
    return [Item(f"{CLASSES[i % 3]}/{i}.jpg", f"bytes {i}", i % 3) for i in range(start, start + n)]


def digests(items: list[Item]) -> np.ndarray:
    whole = b"".join(hashlib.sha256(item.text.encode()).digest() for item in items)
    return np.frombuffer(whole, np.uint8).reshape(-1, 32)


def index_of(items: list[Item], class_names: tuple[str, ...] | None = CLASSES) -> SourceIndex:
    return SourceIndex(
        keys=pack_keys(item.key for item in items),
        labels=np.array([item.label for item in items], np.int64),
        digests=digests(items),
        sizes=np.ones((len(items), 2), np.uint32),
        rows=np.arange(len(items)),
        class_names=class_names,
    )


def join_items(
    items: list[Item],
    archive: list[Item],
    names: tuple[str, ...] | None = CLASSES,
    archive_names: tuple[str, ...] | None = CLASSES,
    **allow: bool,
) -> Join:
    return join(
        index_of(items, names),
        keys=[item.key for item in archive],
        labels=np.array([item.label for item in archive]),
        digests=digests(archive),
        class_names=archive_names,
        **allow,
    )


def counts(joined: Join) -> dict[str, int]:
    return {kind: count for kind, count in joined.counts.items() if count}


def test_order_never_matters():
    archive = make_items(200)
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(200)
        joined = join_items([archive[i] for i in order], archive)
        assert counts(joined) == {"matched": 200}
        assert joined.exact
        assert (order[joined.source_row_of_archive_row] == np.arange(200)).all()


# Each mutation of the items at a position, and the counts that joining must report.
MUTATIONS = {
    "add": lambda items, i: ([*items[:i], *make_items(1, 900), *items[i:]], {"extra": 1}),
    "delete": lambda items, i: (items[:i] + items[i + 1 :], {"missing": 1}),
    "rename": lambda items, i: ([*items[:i], replace(items[i], key="new.jpg"), *items[i + 1 :]], {"renamed": 1}),
    "edit": lambda items, i: ([*items[:i], replace(items[i], text="edited"), *items[i + 1 :]], {"changed": 1}),
    "edit and rename": lambda items, i: (
        [*items[:i], Item("new.jpg", "edited", 0), *items[i + 1 :]],
        {"missing": 1, "extra": 1},
    ),
    "label edit": lambda items, i: (
        [*items[:i], replace(items[i], label=(items[i].label + 1) % 3), *items[i + 1 :]],
        {"relabelled": 1},
    ),
    "copy": lambda items, i: ([*items, replace(items[i], key="copy.jpg")], {"extra": 1, "duplicate": 1}),
    "swap two names": lambda items, i: (
        [
            *items[:i],
            replace(items[i], key=items[i + 3].key),
            *items[i + 1 : i + 3],
            replace(items[i + 3], key=items[i].key),
            *items[i + 4 :],
        ],
        {"renamed": 2},
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_reported(mutation: str):
    archive = make_items(60)
    rng = np.random.default_rng(1)
    for i in rng.permutation(56)[:25].tolist():
        items, expected = MUTATIONS[mutation](archive, i)
        items = [items[k] for k in rng.permutation(len(items))]
        if "relabelled" in expected:
            with pytest.raises(Refused, match="60 matched, 1 relabelled"):
                join_items(items, archive, allow_missing=True)
            continue
        joined = join_items(items, archive, allow_missing=True)
        whole = {"matched": 60 - sum(expected.get(kind, 0) for kind in ("renamed", "changed", "missing"))} | expected
        assert counts(joined) == whole
        assert len(joined.rows) == whole["matched"] + whole.get("renamed", 0)
        for row in joined.rows:
            assert items[joined.source_row_of_archive_row[row]].text == archive[row].text
        if expected.keys() & {"missing", "changed"}:
            with pytest.raises(Refused):
                join_items(items, archive)
        else:
            join_items(items, archive)


def test_a_refusal_has_the_counts_and_the_first_keys():
    archive = make_items(30)
    items = [*archive[:10], *(replace(item, text="x" + item.text) for item in archive[10:12]), *archive[20:]]
    with pytest.raises(Refused) as error:
        join_items(items, archive)
    line = str(error.value)
    assert "\n" not in line
    for part in (
        "20 matched",
        "2 changed ('bee/10.jpg', 'cat/11.jpg')",
        "8 missing ('ant/12.jpg', ",
        ", ...)",
        "redistill train --allow-missing",
    ):
        assert part in line
    with pytest.raises(Refused, match="found none of them"):
        join_items(make_items(5, 500), archive, allow_missing=True)


def test_keys_from_an_archive_cannot_control_a_terminal():
    with pytest.raises(Refused) as error:
        join_items(make_items(3), [*make_items(3), Item("\x1b[2J\u202efoo\n", "?", 0)])
    assert error.value.args[0].isprintable()


@pytest.mark.parametrize("seed", range(50))
def test_class_order_is_matched_by_name(seed: int):
    archive = make_items(30)
    order = np.random.default_rng(seed).permutation(3)  # label k of the data is label order[k] of the archive
    items = [replace(item, label=int(np.flatnonzero(order == item.label)[0])) for item in archive]
    joined = join_items(items, archive, tuple(CLASSES[i] for i in order))
    assert counts(joined) == {"matched": 30}
    if (order != np.arange(3)).any():
        with pytest.raises(Refused, match="relabelled"):
            join_items(archive, archive, tuple(CLASSES[i] for i in order))


def test_other_classes_are_refused_by_name():
    archive = make_items(30)
    with pytest.raises(
        Refused, match=r"20 relabelled.*only in the data: \['dog', 'emu'\].*in the archive: \['bee', 'cat'\]"
    ):
        join_items(archive, archive, ("ant", "dog", "emu"))
    wider = [replace(item, label=item.label + 1) for item in archive]  # one more class in the data is accepted
    assert counts(join_items(wider, archive, ("aardvark", *CLASSES))) == {"matched": 30}
    assert counts(join_items(archive, archive, None)) == {"matched": 30}
    with pytest.raises(Refused, match="the data has no class names"):
        join_items(wider, archive, None)
    with pytest.raises(Refused, match="'ant' occurs twice"):
        join_items(archive, archive, ("ant", "ant", "bee"))
    assert counts(join_items(archive, archive, ("ant", "ant", "bee"), ("ant", "ant", "bee"))) == {"matched": 30}


@pytest.mark.parametrize("allow_missing", [False, True])
def test_relabelled_images_are_refused_with_what_to_do(allow_missing: bool):
    """Not with advice to allow missing images, which would only lead to this refusal."""
    archive = make_items(30)
    moved = [replace(archive[1], key="ant/1.jpg", label=0), *archive[2:]]
    cases: dict[str, tuple[list[Item], tuple[str, ...] | None]] = {
        "put each image into the class that it has in the archive": (moved, CLASSES),
        "give the classes of the data the names that they have in the archive": (archive[1:], ("ant", "dog", "cat")),
        "number the classes of the data as the archive does": (moved, None),
    }
    for advice, (items, names) in cases.items():
        with pytest.raises(Refused, match=r"1 missing.*relabelled") as error:
            join_items(items, archive, names, allow_missing=allow_missing)
        assert str(error.value).endswith(advice)
        assert "allow" not in str(error.value)


def test_samples_without_labels_match_any():
    archive = make_items(9)
    unlabelled = [replace(item, label=-1) for item in archive]
    assert counts(join_items(unlabelled, archive, None)) == {"matched": 9}
    assert counts(join_items(archive, unlabelled)) == {"matched": 9}


def test_equal_bytes_keep_their_own_key_and_label():
    twins = [Item(f"{CLASSES[k]}/{i}.jpg", f"twin {i}", k) for i in range(10) for k in range(3)]
    order = np.random.default_rng(0).permutation(30)
    joined = join_items([twins[i] for i in order], twins)
    assert counts(joined) == {"matched": 30, "duplicate": 20}
    assert (order[joined.source_row_of_archive_row] == np.arange(30)).all()
    moved = [replace(twins[i], key=f"moved/{i}") for i in order]  # distinguished by label alone
    joined = join_items(moved, twins)
    assert counts(joined) == {"renamed": 30, "duplicate": 20}
    fewer = join_items(twins[1:], twins, allow_missing=True)
    assert counts(fewer) == {"matched": 29, "missing": 1, "duplicate": 19}


def test_excluded_samples_do_not_shift_the_indices_of_the_others():
    archive = make_items(20)
    index = index_of(archive[5:])
    index = replace(index, rows=np.arange(5, 20))
    joined = join(
        index,
        keys=[item.key for item in archive],
        labels=np.array([item.label for item in archive]),
        digests=digests(archive),
        class_names=CLASSES,
        allow_missing=True,
    )
    assert joined.source_row_of_archive_row.tolist() == [-1] * 5 + list(range(5, 20))
