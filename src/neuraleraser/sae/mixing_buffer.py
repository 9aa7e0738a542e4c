"""A pool of activations that is refilled while training goes on, and still gives the same batches every time.

Vectors of one image, or of neighbouring positions, are alike; batches have to mix many images. The pool holds the
`buffer_chunks` newest chunks. A refill takes in one more chunk, and the oldest goes. Between two refills lies a block,
in which each of the m chunks of the pool gives one of m slices, drawn at random: so a block mixes all chunks of the
pool. In a full pool m = `buffer_chunks`: a chunk lasts for so many blocks, and each of its rows is used exactly `reuse`
times. A pool that starts with fewer chunks grows until it is full, and uses the first ones more often.

What a step sees is a pure function of (seed, step) and of the chunks: a killed run that is resumed draws the chunks
of its block again, and goes on with the same bits. A thread may draw the next chunks meanwhile; what it draws
depends on their numbers alone, never on when it draws.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from neuraleraser.errors import DataError, SettingsError

Stopped = Callable[[], bool]
ActivationRows = tuple[Tensor, ...]
"""Of one source: x [C, d], or maps x [C, P, d] of P vectors that stay together; then, maybe, labels [C, K]."""
Chunks = Callable[[int, Stopped], Mapping[str, ActivationRows]]
"""The chunk of a number, from 0 on: for each source C rows. A pure function of the number; where `stopped()` turns
true, nobody waits for the chunk any more, and the function may raise `Unwanted`."""


class Unwanted(Exception):
    """Raised by a chunk function that was stopped."""


def generator_for(*what: int | str) -> torch.Generator:
    """A generator on the CPU whose seed is a hash of what it is for: streams of other purposes never meet."""
    digest = hashlib.blake2b("/".join(map(str, what)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


class MixingBuffer:
    """The stream of batches that a pool of chunks gives: `pool(step)` iterates from any step on.

    Each item is {source: x [batch, d]}, or {source: (x, labels)} where chunks have labels; `batch` counts rows, of
    which a map of P vectors is one. A refill gives `per_block` batches; rows that fill no batch are left out, others
    in every block. The pool lies on `device` (None: where the chunks are).

    chunk: the chunks, `size` rows each. buffer_chunks: how many of them the pool holds; start: how many there are in
    the first block (None: as many). reuse: how often a row is used. cycle: after so many chunks the first comes again;
    as many blocks use each row `reuse` times, and the next ones do so in a new order. With a buffer as large, chunks
    stay in the pool and are generated once. prefetch: chunks that a thread generates while batches are used; 0:
    generated between batches. Raises SettingsError for settings out of range, or a batch larger than a block.
    """

    def __init__(
        self,
        chunk: Chunks,
        size: int,
        batch: int,
        *,
        buffer_chunks: int = 16,
        start: int | None = None,
        reuse: int = 1,
        cycle: int | None = None,
        seed: int = 0,
        prefetch: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        numbers = {"size": size, "batch": batch, "buffer_chunks": buffer_chunks}
        numbers |= {"start": start, "reuse": reuse, "cycle": cycle}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise SettingsError(f"{name} is {value}: pass at least 1")
        if prefetch < 0:
            raise SettingsError(f"prefetch is {prefetch}: pass 0 (no thread) or more")
        self.chunk, self.size, self.batch = chunk, size, batch
        self.buffer_chunks, self.reuse, self.seed = min(buffer_chunks, cycle or buffer_chunks), reuse, seed
        self.cycle, self.prefetch, self.device = cycle, prefetch, device
        self.on_chunk: Callable[[int], None] | None = None
        self.start = min(start or buffer_chunks, self.buffer_chunks)
        if batch > size * reuse:
            raise SettingsError(
                f"a batch of {batch} rows is larger than what a refill gives, {size * reuse}: pass at most that, "
                "or larger chunks (more vectors per image, more images at a time)"
            )
        self.per_block = size * reuse // batch
        self._ring: _Ring | None = None  # kept from one iteration for the next

    def __call__(self, step: int) -> Iterator[dict[str, Any]]:
        """Batches from this step on, without end."""
        block, first = divmod(step, self.per_block)
        stream = self._filled_pools(block)
        try:
            for ring, order in stream:
                for i in range(first, self.per_block):
                    yield {
                        name: _as_batch(rows) for name, rows in ring.take(order[i * self.batch :][: self.batch]).items()
                    }
                first = 0
        finally:
            stream.close()  # type: ignore[attr-defined]

    def blocks(self, first: int) -> Iterator[dict[str, ActivationRows]]:
        """Whole blocks from this one on, without end: all `size * reuse` rows between two refills, mixed."""
        stream = self._filled_pools(first)
        try:
            for ring, order in stream:
                yield ring.take(order)
        finally:
            stream.close()  # type: ignore[attr-defined]

    def _filled_pools(self, block: int) -> Iterator[tuple[_Ring, Tensor]]:
        """For this block and those after it: the pool, filled, and the places of the block's rows in it."""
        ring, self._ring = self._ring or _Ring(self.buffer_chunks, self.size, self.device), None
        stop = threading.Event()
        coming: dict[int, Future[Mapping[str, ActivationRows]]] = {}
        with ThreadPoolExecutor(1, "activations") as thread:
            try:
                while True:
                    held = self._chunks_held(block)
                    for number in range(held.start, held.stop + self.prefetch):
                        name = self._chunk_name(number)
                        if self.prefetch and name not in coming and not ring.has(number, name):
                            coming[name] = thread.submit(self.chunk, name, stop.is_set)
                    for number in held:
                        name = self._chunk_name(number)
                        if not ring.has(number, name):
                            made = coming.pop(name).result() if self.prefetch else self.chunk(name, stop.is_set)
                            ring.put(number, name, made)
                            if self.on_chunk:
                                self.on_chunk(number + 1)
                    yield ring, self._row_places(block)
                    block += 1
            finally:
                stop.set()
                for future in coming.values():
                    future.cancel()
                wait(coming.values())
                self._ring = ring

    def _chunks_held(self, block: int) -> range:
        """The chunks that are in the pool during a block."""
        newest = block + self.start
        return range(max(0, newest - self.buffer_chunks), newest)

    def _chunk_name(self, number: int) -> int:
        return number if self.cycle is None else number % self.cycle

    def _row_places(self, block: int) -> Tensor:
        """Places [size * reuse] in the ring of the block's rows, mixed."""
        parts, epoch, held = [], block // self.cycle if self.cycle else 0, self._chunks_held(block)
        for i, number in enumerate(reversed(held)):  # the newest gives its first slice
            low, high = (j * self.size * self.reuse // len(held) for j in (i, i + 1))
            which = self.seed, "slices", self._chunk_name(number), epoch, len(held)
            rows = torch.randperm(self.size, generator=generator_for(*which))
            parts.append(rows[torch.arange(low, high) % self.size] + number % self.buffer_chunks * self.size)
        places = torch.cat(parts)
        return places[torch.randperm(len(places), generator=generator_for(self.seed, "block", block))]


class _Ring:
    """The last `buffer_chunks` chunks of `size` rows, in one tensor for each source; a new one replaces the oldest."""

    def __init__(self, buffer_chunks: int, size: int, device: torch.device | str | None) -> None:
        self.buffer_chunks, self.size, self.device = buffer_chunks, size, device
        self.held: list[int | None] = [None] * buffer_chunks
        self.tensors: dict[str, ActivationRows] = {}

    def has(self, number: int, name: int) -> bool:
        return self.held[number % self.buffer_chunks] == name

    def put(self, number: int, name: int, chunk: Mapping[str, ActivationRows]) -> None:
        """Take in a chunk. Raises DataError unless it is like those before."""
        if not self.tensors:
            places = self.buffer_chunks * self.size
            self.tensors = {
                source: tuple(x.new_empty(places, *x.shape[1:], device=self.device) for x in rows)
                for source, rows in chunk.items()
            }
        found = {source: [(len(x), *x.shape[1:]) for x in rows] for source, rows in chunk.items()}
        expected = {source: [(self.size, *x.shape[1:]) for x in rows] for source, rows in self.tensors.items()}
        if found != expected:
            raise DataError(f"chunk {name} has shapes {found}: expected {expected}, as in the chunks before")
        slot = number % self.buffer_chunks
        self.held[slot] = None  # should the copy fail, it holds neither
        for source, rows in chunk.items():
            for kept, x in zip(self.tensors[source], rows, strict=True):
                kept[slot * self.size : (slot + 1) * self.size].copy_(x)
        self.held[slot] = name

    def take(self, places: Tensor) -> dict[str, ActivationRows]:
        """Copies of the rows at these places."""
        return {
            source: tuple(x.index_select(0, places.to(x.device)) for x in rows) for source, rows in self.tensors.items()
        }


def _as_batch(rows: ActivationRows) -> Tensor | ActivationRows:
    """x [B, d] alone, or with its labels; the vectors of maps in a row."""
    x = rows[0].flatten(0, 1) if rows[0].ndim == 3 else rows[0]
    return x if len(rows) == 1 else (x, *rows[1:])
