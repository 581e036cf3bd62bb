"""Encode signals and commit blocks in threads, while the teacher computes the next batches.

One thread takes pieces from a queue; on a CPU it shares their rows among more threads. Another compresses and commits
complete blocks, since that takes a core for about as long as encoding does.
"""

from __future__ import annotations

import datetime
import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from redistill_cache import ArchiveWriter
from redistill_cache.codecs import BlockStats, Encoded, NotFinite, join_encoded
from redistill_cache.layout import Block
from redistill_cache.machine import usable_cores
from redistill_cache.rows import open_signal
from torch import Tensor

from redistill.caching.encode_rows import encode_rows, max_piece_rows, refuse_full_device
from redistill.caching.open_archive import write_view_params
from redistill.caching.pilot import not_finite_error
from redistill.caching.plan import Plan
from redistill.signals import LOGITS
from redistill.teachers import TeacherCheck

__all__ = ["BlockEncoder", "RunStats"]

# Pieces waiting for the thread: more would only take memory.
QUEUE_SIZE = 2


@dataclass
class RunStats:
    """What this process has done so far."""

    began: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    start: float = field(default_factory=time.perf_counter)
    check: TeacherCheck | None = None
    fit_seconds: float | None = None
    """To fit and to choose the codecs; None if they were read from the archive."""
    blocks: int = 0
    """Blocks committed by this process; the counts below are of these blocks."""
    rows: int = 0
    bytes: int = 0
    labelled: int = 0
    correct: int = 0
    """Labelled rows whose largest logit is that of the label."""

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def top1(self) -> float | None:
        return self.correct / self.labelled if self.labelled else None


@dataclass
class Piece:
    """Consecutive rows of one block: the batches of every signal."""

    block: Block
    start: int
    signals: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: int = 0
    computed: torch.cuda.Event | None = None
    """Recorded on the teacher's stream after the last batch."""

    def add(self, signals: Mapping[str, Tensor]) -> None:
        for name, rows in signals.items():
            self.signals.setdefault(name, []).append(rows)
        self.rows += len(signals[LOGITS])

    @property
    def stop(self) -> int:
        return self.start + self.rows


class BlockEncoder:
    """Encodes and commits blocks behind the forward pass. When the context ends, all complete blocks are on disk.

    A block with missing rows is dropped. An error in the thread is raised by the next `add`, or when the context ends.
    """

    def __init__(self, plan: Plan, writer: ArchiveWriter, stats: RunStats) -> None:
        self._plan, self._writer, self._stats = plan, writer, stats
        self._device = plan.teacher.device
        # The stored codecs, not the fitted ones: every rank and every resumed run must encode with the same.
        state = writer.read_back().state
        part = state.teachers[plan.part.name]
        self._codecs = {signal.name: open_signal(state, part, signal).codec for signal in part.signals}
        self._views_with_params: set[int] = set()
        self._max_rows = max_piece_rows(self._device, max(codec.width for codec in self._codecs.values()))
        # A stream of its own: on the teacher's, every copy to the host would wait for the batches queued before it.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._piece: Piece | None = None
        self._queue: queue.Queue[Piece | None] = queue.Queue(QUEUE_SIZE)
        self._error: BaseException | None = None
        # Half of the cores: the teacher's forward pass, or the workers that render for a GPU, need the others.
        self._threads = max(1, usable_cores() // plan.share.local_count // 2) if self._device.type != "cuda" else 1
        self._thread = threading.Thread(target=self._run, name="encode and write", daemon=True)

    def __enter__(self) -> BlockEncoder:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def add(self, block: Block, rows: range, signals: Mapping[str, Tensor]) -> None:
        """The next rows of a block, in order."""
        if self._error is not None:
            raise self._error
        piece = self._piece = self._piece or Piece(block, rows.start)
        assert piece.block == block, f"{block} began before {piece.block} was complete"
        assert piece.stop == rows.start, f"expected row {piece.stop} of {block}, found {rows.start}"
        piece.add(signals)
        if piece.rows >= self._max_rows or piece.stop == block.stop:
            if self._stream is not None:
                piece.computed = torch.cuda.current_stream(self._device).record_event()
            self._queue.put(piece)
            self._piece = None

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        encoded: list[dict[str, Encoded]] = []
        predictions: list[np.ndarray] = []
        written: Future[None] | None = None
        with ThreadPoolExecutor(self._threads, "encode") as encoders, ThreadPoolExecutor(1, "write") as writers:
            while (piece := self._queue.get()) is not None:
                if self._error is not None:
                    continue  # drain the queue, so that `add` never blocks
                try:
                    with (
                        self._on_own_stream(piece),
                        refuse_full_device(piece.rows, self._device, self._plan.options.batch_size),
                    ):
                        largest = torch.cat([rows.argmax(1) for rows in piece.signals[LOGITS]])
                        predicted = largest.to("cpu", non_blocking=True)
                        encoded.append(self._encode(piece, encoders))
                        predictions.append(predicted.numpy())  # there, since the encoder has waited for its stream
                    if piece.stop == piece.block.stop:
                        if written is not None:
                            written.result()  # at most one block is encoded and waits to be written
                        written = writers.submit(self._write, piece.block, encoded, np.concatenate(predictions))
                        encoded, predictions = [], []
                except BaseException as error:  # noqa: BLE001  raised in the main thread
                    self._error = error
            try:
                if written is not None:
                    written.result()
            except BaseException as error:  # noqa: BLE001  as above
                self._error = self._error or error

    def _on_own_stream(self, piece: Piece) -> AbstractContextManager[object]:
        """The encoder's stream, once the teacher's stream has computed the piece; nothing to do on a CPU."""
        if self._stream is None or piece.computed is None:
            return nullcontext()
        self._stream.wait_event(piece.computed)
        return torch.cuda.stream(self._stream)

    def _encode(self, piece: Piece, encoders: ThreadPoolExecutor) -> dict[str, Encoded]:
        encoded = {}
        for name, codec in self._codecs.items():
            try:
                parts = encode_rows(codec, torch.cat(piece.signals[name]), encoders)
            except NotFinite as error:
                row = piece.start + error.rows[0]
                raise not_finite_error(self._plan, name, piece.block.view, row) from error
            encoded[name] = join_encoded(parts)  # moves it to the host, so all work on the device is done
        return encoded

    def _write(self, block: Block, pieces: list[dict[str, Encoded]], predictions: np.ndarray) -> None:
        if block.view not in self._views_with_params:
            write_view_params(self._plan, self._writer, block.view)
            self._views_with_params.add(block.view)
        whole = {name: join_encoded([piece[name] for piece in pieces]) for name in self._codecs}
        arrays = {f"{name}/{key}": np.asarray(a) for name, item in whole.items() for key, a in item.arrays.items()}
        block_stats = {name: BlockStats.of(item).to_json() for name, item in whole.items()}
        record = self._writer.write(block, arrays, block_stats)
        if record is None:
            return  # another process committed it first, and counts it
        labels, stats = self._plan.index.labels[block.start : block.stop], self._stats
        stats.bytes += sum(entry.size for entry in record.files.values())
        stats.rows += len(labels)
        stats.labelled += int((labels >= 0).sum())
        stats.correct += int(((labels == predictions) & (labels >= 0)).sum())
        stats.blocks += 1
