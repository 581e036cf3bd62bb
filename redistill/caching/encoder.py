"""From answers to committed blocks, in a thread: while it encodes and writes, the teacher is at the next batch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from redistill_cache.codecs import BlockStats, Encoded, NotFinite, join_encoded
from redistill_cache.layout import Block
from torch import Tensor

from redistill.caching.open_archive import OpenedArchive, write_parameters
from redistill.caching.pilot import refuse_row
from redistill.devices import refuse_out_of_memory
from redistill.signals import LOGITS

__all__ = ["BlockEncoder", "WrittenBlocks"]

# Rows encoded at once, and their values at most. A device is only busy with many; on a host more would be a longer
# wait for the last of them. A piece depends on the block alone, as batches do, so that bytes do not depend on the run.
PIECE_ROWS = {"cpu": 4096, "cuda": 16384}
PIECE_VALUES = 1 << 24
# Pieces that may wait for the thread: more would only take memory.
WAITING = 2


@dataclass
class WrittenBlocks:
    """What this process has committed so far."""

    blocks: int = 0
    rows: int = 0
    bytes: int = 0
    labelled: int = 0
    right: int = 0
    """Labelled rows of which the teacher's first guess is the label."""

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
    ready: torch.cuda.Event | None = None
    """When the answers are there, for work on another stream."""

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

    def __init__(self, there: OpenedArchive, written: WrittenBlocks) -> None:
        self.written = written
        self._plan, self._writer, self._codecs = there.plan, there.writer, there.codecs
        self._device = there.plan.teacher.device
        self._drawn: set[int] = set()  # views whose parameters are written
        self._most = piece_rows(self._device, max(codec.width for codec in there.codecs.values()))
        # Of its own: on the teacher's stream every look at a result would wait for the batches queued before it.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
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
        piece = self._piece = self._piece or Piece(block, rows.start)
        assert piece.block == block, f"{block} began before {piece.block} was whole"
        assert piece.stop == rows.start, f"expected row {piece.stop} of {block}, got {rows.start}"
        piece.add(answers)
        if piece.rows >= self._most or piece.stop == block.stop:
            if self._stream is not None:
                piece.ready = torch.cuda.current_stream(self._device).record_event()
            self._waiting.put(piece)
            self._piece = None

    # -- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pieces: list[dict[str, Encoded]] = []
        guesses: list[np.ndarray] = []
        while (piece := self._waiting.get()) is not None:
            if self._error is not None:
                continue  # keep taking, so that nobody waits for room
            try:
                with self._beside(piece):
                    guesses.append(torch.cat([rows.argmax(1) for rows in piece.answers[LOGITS]]).cpu().numpy())
                    pieces.append(self._encode(piece))
                if piece.stop == piece.block.stop:
                    self._write(piece.block, pieces, np.concatenate(guesses))
                    pieces, guesses = [], []
            except BaseException as error:  # noqa: BLE001  raised again where the work was handed over
                self._error = error

    def _beside(self, piece: Piece) -> AbstractContextManager[object]:
        """Work on the encoder's own stream, once the teacher has answered; on a CPU there is nothing to arrange."""
        if self._stream is None or piece.ready is None:
            return nullcontext()
        self._stream.wait_event(piece.ready)
        return torch.cuda.stream(self._stream)

    def _encode(self, piece: Piece) -> dict[str, Encoded]:
        encoded = {}
        for name, parts in piece.answers.items():
            with refuse_out_of_memory(self._plan.options.batch_size, self._device):
                rows = torch.cat(parts)
                try:
                    # numpy is several times faster than torch at the many small products of a row.
                    part = self._codecs[name].encode(rows.numpy() if rows.device.type == "cpu" else rows)
                except NotFinite as error:
                    raise refuse_row(self._plan, name, piece.block.view, piece.start + error.rows[0]) from error
                encoded[name] = join_encoded([part])  # on the host: all work on the device is done
        return encoded

    def _write(self, block: Block, pieces: list[dict[str, Encoded]], guesses: np.ndarray) -> None:
        if block.view not in self._drawn:
            write_parameters(self._plan, self._writer, block.view)
            self._drawn.add(block.view)
        whole = {name: join_encoded([piece[name] for piece in pieces]) for name in self._codecs}
        arrays = {f"{name}/{key}": np.asarray(a) for name, item in whole.items() for key, a in item.arrays.items()}
        stats = {name: BlockStats.of(item).to_json() for name, item in whole.items()}
        record = self._writer.write(block, arrays, stats)
        if record is None:
            return  # another process committed it first, and counts it
        labels, written = self._plan.index.labels[block.start : block.stop], self.written
        written.bytes += sum(entry.size for entry in record.files.values())
        written.rows += len(labels)
        written.labelled += int((labels >= 0).sum())
        written.right += int(((labels == guesses) & (labels >= 0)).sum())
        written.blocks += 1


def piece_rows(device: torch.device, width: int) -> int:
    return max(1024, min(PIECE_ROWS.get(device.type, 1024), PIECE_VALUES // width))
