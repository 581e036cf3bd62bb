"""An archive that is written, interrupted, resumed, extended, sealed and given teachers, in any order.

A model tracks the committed blocks; the archive must return exactly those, and once everything is written it must
equal, byte for byte, an archive that was written without interruption.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from redistill_cache import ArchiveWriter, open_archive
from redistill_cache.errors import Incomplete
from redistill_cache.layout import Block, part_blocks
from redistill_cache.storage import LOCAL, Files

from tests.faults.power_cut import PowerCut, PowerCutDisk
from tests.tiny_archive import SPEC, TEACHER, block_data, contents, make, samples, stored_logits

SMALL = replace(SPEC, num_samples=20, num_views=1)
LAST_VIEW = 3
Committed = set[tuple[str, int, int]]


@functools.cache
def uninterrupted(views: int, teachers: tuple[str, ...]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.redistill.zarr"
        make(path, replace(SMALL, num_views=views), teachers)
        return contents(path)


@functools.cache
def data_of(block: Block) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    return block_data(block, SMALL)


class Lifecycle(RuleBasedStateMachine):
    """Operations on one archive, and what must be true after each."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "a.redistill.zarr"
        self.spec = SMALL
        self.teachers: tuple[str, ...] = ()
        self.committed: Committed = set()
        self.writer = ArchiveWriter.create(self.path, SMALL)
        self.writer.write_samples(**samples(SMALL))

    def blocks(self) -> list[Block]:
        return [b for part in self.writer.parts() for b in part_blocks(self.spec, part, self.spec.num_views)]

    def missing(self) -> list[Block]:
        return [block for block in self.blocks() if key(block) not in self.committed]

    def resume(self, files: Files = LOCAL) -> None:
        self.writer = ArchiveWriter.resume(self.path, replace(self.spec, environment={"run": "another"}), files=files)

    def dying_disk(self, last: int) -> Files:
        """A disk whose process dies just before operation number `last`."""
        return PowerCutDisk(Path(self.folder.name), cut_at=last - 1)

    # -- operations ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.missing())
    @rule(data=st.data(), count=st.integers(1, 6))
    def write(self, data: st.DataObject, count: int) -> None:
        for block in data.draw(st.permutations(self.missing()))[:count]:
            assert self.writer.write(block, *data_of(block))
            self.committed.add(key(block))

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def write_again(self, data: st.DataObject) -> None:
        again = data.draw(st.sampled_from([block for block in self.blocks() if key(block) in self.committed]))
        assert not self.writer.write(again, *data_of(again))

    @precondition(lambda self: self.missing())
    @rule(data=st.data(), last=st.integers(1, 30))
    def die_while_writing(self, data: st.DataObject, last: int) -> None:
        block = data.draw(st.sampled_from(self.missing()))
        self.resume()
        writer = ArchiveWriter(self.path, self.writer.spec, self.dying_disk(last))
        writer.teachers = self.writer.teachers
        try:
            writer.write(block, *data_of(block))
        except PowerCut:
            self.resume()
        # The process may have died before or after the record was linked.
        if self.writer.is_committed(block):
            self.committed.add(key(block))

    @rule(last=st.integers(1, 60))
    def die_while_resuming(self, last: int) -> None:
        with contextlib.suppress(PowerCut):
            self.resume(self.dying_disk(last))
        self.resume()

    @precondition(lambda self: len(self.teachers) < 2)
    @rule()
    def add_teacher(self) -> None:
        name = "ab"[len(self.teachers)]
        self.writer.add_teacher(replace(TEACHER, name=name))
        self.teachers += (name,)

    @precondition(lambda self: self.spec.num_views < LAST_VIEW)
    @rule(last=st.integers(1, 20))
    def extend(self, last: int) -> None:
        views = self.spec.num_views + 1
        try:
            ArchiveWriter.extend_views(self.path, views, files=self.dying_disk(last))
        except PowerCut:
            ArchiveWriter.extend_views(self.path, views)
        self.spec = replace(self.spec, num_views=views)
        self.resume()

    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        views = data.draw(st.integers(1, self.spec.num_views))
        missing = [block for block in self.missing() if block.view < views]
        complete = {  # the leading views of every teacher
            name: min([block.view for block in missing if block.part == f"teachers/{name}"], default=views)
            for name in self.teachers
        }
        others = [block for block in missing if not block.part.startswith("teachers/")]
        if others or max(complete.values(), default=views) < views:
            with pytest.raises(Incomplete):
                self.writer.seal(views=views)
            return
        identity = self.writer.seal(views=views)
        archive = open_archive(self.path)
        assert (archive.id, archive.num_views) == (identity, views)
        assert {name: archive.views_of(name) for name in archive.teachers} == {n: v for n, v in complete.items() if v}

    # -- invariants ---------------------------------------------------------------------------------------------------

    @invariant()
    def returns_exactly_the_committed_blocks(self) -> None:
        archive = self.writer.read_back()
        committed = {item for item in archive.state.committed or () if "side" not in item[0]}
        assert committed == self.committed | {("samples", 0, 0)}
        for name in self.teachers:
            for view in range(self.spec.num_views):
                rows = archive.rows_available(view, name)
                assert np.array_equal(archive.logits(view, rows, name), stored_logits(view, SMALL, name)[rows])

    def teardown(self) -> None:
        self.resume()
        for block in self.missing():
            self.writer.write(block, *data_of(block))
        self.writer.seal()
        assert contents(self.path) == uninterrupted(self.spec.num_views, self.teachers)
        self.folder.cleanup()


def key(block: Block) -> tuple[str, int, int]:
    return block.part, block.view, block.index


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(max_examples=6, stateful_step_count=12, deadline=None)
