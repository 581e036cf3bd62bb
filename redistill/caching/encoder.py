"""From answers to committed blocks, in a thread: while it encodes and writes, the teacher is at the next batch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from redistill_cache import ArchiveWriter
from redistill_cache.codecs import BlockStats, Codec, Encoded, NotFinite, join_encoded
from redistill_cache.layout import Block
from torch import Tensor

from redistill.caching.pilot import refuse_row
from redistill.caching.plan import Plan
from redistill.signals import LOGITS

__all__ = ["BlockEncoder", "Written"]

# Rows encoded at once. A piece depends on the block alone, as batches do, so the bytes do not depend on the run.
PIECE_ROWS = 1024
# Pieces that may wait for the thread: more would only take memory.
WAITING = 2


@dataclass
class Written:
    """What the thread has done so far."""

    blocks: int = 0
    rows: int = 0
    labelled: int = 0
    right: int = 0

    @property
    def top1(self) -> float | None:
        return self.right / self.labelled if self.labelled else None


@dataclass
class Piece:
    """Consecutive rows of one block, every signal."""

    block: Block
    start: int
    answers: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: int = 0

    def add(self, answers: Mapping[str, Tensor]) -> None:
        for name, rows in answers.items():
            self.answers.setdefault(name, []).append(rows)
        self.rows += len(answers[LOGITS])

    @property
    def stop(self) -> int:
        return self.start + self.rows


class BlockEncoder:
    """Encodes and writes blocks behind the forward pass. Leave the context to have everything whole on disk.

    A block whose rows did not all come is dropped. An error in the thread is raised by the next `add`, or at the end.
    """

    def __init__(self, plan: Plan, writer: ArchiveWriter, codecs: Mapping[str, Codec]) -> None:
        self.written = Written()
        self._plan, self._writer, self._codecs = plan, writer, codecs
        self._piece: Piece | None = None
        self._waiting: queue.Queue[Piece | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="encode and write", daemon=True)

    def __enter__(self) -> BlockEncoder:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._waiting.put(None)
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def add(self, block: Block, rows: range, answers: Mapping[str, Tensor]) -> None:
        """The next rows of a block, in order."""
        if self._error is not None:
            raise self._error
        if self._piece is None:
            self._piece = Piece(block, rows.start)
        piece = self._piece
        assert piece.block == block, f"{block} began before {piece.block} was whole"
        assert piece.stop == rows.start, f"expected row {piece.stop} of {block}, got {rows.start}"
        piece.add(answers)
        if piece.rows >= PIECE_ROWS or piece.stop == block.stop:
            self._waiting.put(piece)
            self._piece = None

    # -- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pieces: list[tuple[Piece, dict[str, Encoded]]] = []
        while (piece := self._waiting.get()) is not None:
            if self._error is not None:
                continue  # keep taking, so that nobody waits for room
            try:
                pieces.append((piece, self._encode(piece)))
                if piece.stop == piece.block.stop:
                    self._write(piece.block, [encoded for _, encoded in pieces])
                    pieces.clear()
            except BaseException as error:  # noqa: BLE001  raised again where the work was handed over
                self._error = error

    def _encode(self, piece: Piece) -> dict[str, Encoded]:
        encoded = {}
        for name, parts in piece.answers.items():
            rows = torch.cat(parts)
            if name == LOGITS:
                self._count(piece, rows)
            try:
                encoded[name] = join_encoded([self._codecs[name].encode(rows)])
            except NotFinite as error:
                raise refuse_row(self._plan, name, piece.block.view, piece.start + error.rows[0]) from error
        return encoded

    def _count(self, piece: Piece, logits: Tensor) -> None:
        labels = self._plan.index.labels[piece.start : piece.stop]
        guesses = logits.argmax(1).cpu().numpy()
        self.written.labelled += int((labels >= 0).sum())
        self.written.right += int(((labels == guesses) & (labels >= 0)).sum())

    def _write(self, block: Block, pieces: list[dict[str, Encoded]]) -> None:
        whole = {name: join_encoded([piece[name] for piece in pieces]) for name in self._codecs}
        arrays = {f"{name}/{key}": np.asarray(a) for name, item in whole.items() for key, a in item.arrays.items()}
        stats = {name: BlockStats.of(item).to_json() for name, item in whole.items()}
        self._writer.write(block, arrays, stats)
        self.written.blocks += 1
        self.written.rows += block.stop - block.start
