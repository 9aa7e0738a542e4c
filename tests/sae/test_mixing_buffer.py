"""The pool: what a step sees depends on (seed, step) alone, every row is used as often as asked, and chunks mix."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from neuraleraser.errors import DataError, SettingsError
from neuraleraser.sae.mixing_buffer import MixingBuffer, Unwanted

SIZE = 12


def numbered(number: int, stopped: Any = None) -> dict[str, tuple[Tensor, ...]]:
    """Rows (chunk, row)."""
    return {"a": (torch.stack([torch.full((SIZE,), float(number)), torch.arange(float(SIZE))], 1),)}


def some(pool: MixingBuffer, step: int, count: int) -> list[Tensor]:
    stream = pool(step)
    found = [item["a"] for item in itertools.islice(stream, count)]
    stream.close()  # type: ignore[attr-defined]
    return found


def test_any_step_can_be_the_first_and_a_slow_thread_changes_nothing():
    def late(number: int, stopped: Any) -> Any:
        time.sleep(0.003 * (number % 3))
        return numbered(number)

    want = some(MixingBuffer(numbered, SIZE, 5, buffer_chunks=4, reuse=2, seed=3, prefetch=0), 0, 30)
    for step in (0, 1, 4, 17):
        for prefetch in (0, 1, 3):
            pool = MixingBuffer(late, SIZE, 5, buffer_chunks=4, reuse=2, seed=3, prefetch=prefetch)
            assert torch.equal(torch.stack(some(pool, step, 12)), torch.stack(want[step : step + 12]))
            assert torch.equal(some(pool, 2, 1)[0], want[2])  # and going back
    other = some(MixingBuffer(numbered, SIZE, 5, buffer_chunks=4, reuse=2, seed=4), 0, 1)
    assert not torch.equal(other[0], want[0])


def test_two_iterations_at_a_time_do_not_meet():
    pool = MixingBuffer(numbered, SIZE, 6, buffer_chunks=3)
    want = some(pool, 0, 20)
    one, other = pool(0), pool(9)
    for i in range(10):
        assert torch.equal(next(one)["a"], want[i]) and torch.equal(next(other)["a"], want[9 + i])


@pytest.mark.parametrize(("buffer_chunks", "reuse"), [(1, 1), (4, 1), (4, 3), (5, 2), (3, 7)])
def test_every_row_is_used_as_often_as_asked(buffer_chunks: int, reuse: int):
    pool = MixingBuffer(numbered, SIZE, 1, buffer_chunks=buffer_chunks, reuse=reuse)
    rows = torch.cat([block["a"][0] for block in itertools.islice(pool.blocks(0), 3 * buffer_chunks)])
    used = Counter(map(tuple, rows.tolist()))
    for chunk in range(buffer_chunks - 1, 3 * buffer_chunks):  # those before had no window of their own
        assert [used[chunk, row] for row in range(SIZE)] == [reuse] * SIZE


def test_a_block_mixes_all_chunks_of_the_pool():
    pool = MixingBuffer(numbered, SIZE, SIZE, buffer_chunks=4, seed=1)
    for number, block in enumerate(itertools.islice(pool.blocks(0), 5)):
        chunks = block["a"][0][:, 0]
        assert Counter(chunks.tolist()) == {float(number + i): SIZE // 4 for i in range(4)}
        assert int((chunks.diff() != 0).sum()) > 4  # not one after the other


def test_a_pool_grows_until_it_is_full():
    calls: list[int] = []

    def counted(number: int, stopped: Any) -> Any:
        calls.append(number)
        return numbered(number)

    pool = MixingBuffer(counted, SIZE, SIZE, buffer_chunks=4, start=2, reuse=3, prefetch=0)
    blocks = [block["a"][0] for block in itertools.islice(pool.blocks(0), 9)]
    for number, block in enumerate(blocks):
        held = range(max(0, number - 2), number + 2)
        assert Counter(block[:, 0].tolist()) == {float(chunk): 3 * SIZE // len(held) for chunk in held}
    used = Counter(map(tuple, torch.cat(blocks).tolist()))
    for chunk in range(3, 7):  # that came once it was full, and have left
        assert [used[chunk, row] for row in range(SIZE)] == [3] * SIZE
    assert calls == list(range(10))
    later = MixingBuffer(counted, SIZE, SIZE, buffer_chunks=4, start=2, reuse=3, prefetch=0).blocks(6)
    assert torch.equal(next(later)["a"][0], blocks[6]) and calls[10:] == [4, 5, 6, 7]


@pytest.mark.parametrize(("buffer_chunks", "drawn"), [(16, 3), (3, 3), (2, 11)])
def test_a_cycle_that_fits_into_memory_is_drawn_once(buffer_chunks: int, drawn: int):
    calls: list[int] = []

    def counted(number: int, stopped: Any) -> Any:
        calls.append(number)
        return numbered(number)

    pool = MixingBuffer(counted, SIZE, SIZE, buffer_chunks=buffer_chunks, cycle=3, prefetch=0)
    blocks = [block["a"][0] for block in itertools.islice(pool.blocks(0), 10)]
    assert set(calls) == {0, 1, 2} and len(calls) == drawn
    assert not torch.equal(blocks[0], blocks[3])
    full = Counter({(float(chunk), float(row)): 1 for chunk in range(3) for row in range(SIZE)})
    for epoch in (0, 3, 6):
        assert Counter(map(tuple, torch.cat(blocks[epoch : epoch + 3]).tolist())) == full


def test_maps_stay_together_with_their_labels():
    def maps(number: int, stopped: Any) -> Any:
        x = torch.arange(SIZE)[:, None, None] + 100.0 * number + torch.tensor([0.0, 0.25])[:, None].expand(2, 3)
        return {"a": (x, torch.arange(SIZE)[:, None] % 2)}

    x, labels = next(MixingBuffer(maps, SIZE, 4, buffer_chunks=3)(0))["a"]
    assert x.shape == (8, 3) and labels.shape == (4, 1)
    pairs = x.unflatten(0, (4, 2))[..., 0]
    assert (pairs[:, 1] - pairs[:, 0] == 0.25).all() and (pairs[:, 0] % 2 == labels[:, 0]).all()


def test_an_error_in_the_thread_comes_when_its_chunk_is_needed():
    def failing(number: int, stopped: Any) -> Any:
        if number == 3:
            raise DataError("chunk 3 is bad")
        return numbered(number)

    stream: Iterator[Any] = MixingBuffer(failing, SIZE, SIZE, buffer_chunks=2, prefetch=5)(0)
    next(stream), next(stream)  # chunks 0 to 2
    with pytest.raises(DataError, match="chunk 3"):
        next(stream)


def test_closing_stops_the_thread():
    started, ended = threading.Event(), threading.Event()

    def endless(number: int, stopped: Any) -> Any:
        if number < 2:
            return numbered(number)
        started.set()
        while not stopped():
            time.sleep(0.001)
        ended.set()
        raise Unwanted

    before = threading.active_count()
    stream = MixingBuffer(endless, SIZE, SIZE, buffer_chunks=2)(0)
    next(stream)
    assert started.wait(5)
    stream.close()  # type: ignore[attr-defined]
    assert ended.is_set() and threading.active_count() == before


def test_what_is_wrong_is_said():
    for settings, message in (
        ({"buffer_chunks": 0}, "buffer_chunks is 0"),
        ({"start": 0}, "start is 0"),
        ({"reuse": 0}, "reuse is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"cycle": 0}, "cycle is 0"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"batch": 25, "reuse": 2}, "a batch of 25 rows is larger than what a refill gives, 24"),
    ):
        with pytest.raises(SettingsError, match=message):
            MixingBuffer(numbered, SIZE, **{"batch": 4, **settings})

    def shrinking(number: int, stopped: Any) -> Any:
        return {"a": (torch.zeros(SIZE, 3 - number),)}

    with pytest.raises(DataError, match=r"chunk 1 .*\(12, 2\).*expected .*\(12, 3\)"):
        next(MixingBuffer(shrinking, SIZE, 4, buffer_chunks=2)(0))
    with pytest.raises(DataError, match=r"chunk 0 has shapes .*expected .*13"):
        next(MixingBuffer(numbered, SIZE + 1, 4)(0))
