"""The trace: which rows are which images, whatever the batch, the guidance and the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from handmade import SHUT, make_eraser
from neuraleraser.eraser import Trace, attach
from neuraleraser.eraser.trace import KEPT
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling


def trace(*names: str, batch: int = 0) -> Trace:
    return Trace([make_eraser(name=name) for name in names or ("Cats",)], batch)


def note(t: Trace, *opening: float, time: float = 250.0, eraser: int = 0) -> None:
    t.note((eraser,), torch.tensor([time]), torch.tensor(opening, dtype=torch.float32).unsqueeze(1))


def images(t: Trace) -> list[int]:
    return sorted(t.fired)


def test_guidance_halves_are_one_image() -> None:
    t = trace(batch=3)
    note(t, 0, 0, 0, 0, 1, 0)  # the conditional half
    note(t, 0, 0, 0.1, 0, 0, 0, time=750.0)  # the unconditional half
    note(t, 0, 1, 0, 0, 1, 0, time=750.0)  # both: one time, said once
    assert t.fired == {1: {"Cats": [750.0, 250.0]}, 2: {"Cats": [750.0]}}


def test_rows_are_images_without_guidance_or_in_two_passes() -> None:
    t = trace(batch=3)
    note(t, 0, 0, 1)
    note(t, 1, 0, 0)
    assert images(t) == [0, 2]


def test_rows_that_are_no_whole_halves_are_images() -> None:
    t = trace(batch=2)
    note(t, 0, 0, 1)
    assert images(t) == [2]


def test_padding_belongs_to_no_image() -> None:
    for rows in (4, 8):
        t = trace(batch=4)
        t.begin(0, 4)
        t.begin(4, 3)
        note(t, *[1.0] * rows)
        assert images(t) == [4, 5, 6]


def test_an_unknown_batch_is_the_largest_begun_with() -> None:
    for rows in (4, 8):
        t = trace()
        t.begin(0, 4)
        note(t, *[1.0] * rows)
        t.begin(4, 2)
        note(t, *[1.0, 0.0, 1.0, 1.0] * (rows // 4))  # of the second batch, the last two are padding
        assert images(t) == [0, 1, 2, 3, 4]


def test_without_any_batch_every_row_is_an_image() -> None:
    t = trace()
    note(t, 0, 1, 0, 1)
    assert images(t) == [1, 3]


def test_batches_do_not_mix_and_nothing_is_read_twice() -> None:
    t = trace(batch=2)
    t.begin(0, 2)
    note(t, 1, 0)
    t.begin(2, 2)
    note(t, 0, 0)
    t.begin(4, 1)
    note(t, 1, 1)
    assert images(t) == [0, 4] and images(t) == [0, 4]
    t.finish()
    assert t.fired == {0: {"Cats": [250.0]}, 4: {"Cats": [250.0]}}


def test_erasers_are_told_apart() -> None:
    t = trace("Cats", "Dogs", batch=2)
    note(t, 0, 1)
    note(t, 1, 1, eraser=1, time=750.0)
    assert t.fired == {0: {"Dogs": [750.0]}, 1: {"Cats": [250.0], "Dogs": [750.0]}}


def test_a_gate_that_only_just_opens_has_fired_and_a_shut_one_has_not() -> None:
    t = trace(batch=2)
    note(t, 1e-30, 0.0)
    assert images(t) == [0]


def test_what_is_kept_does_not_grow_with_calls() -> None:
    t = trace(batch=1)
    for k in range(2000):
        note(t, 1.0, time=k % 2)
    assert len(t._notes) < 600 and len(t._opened[0, 1]) == 2 and len(t.fired) == 1
    for k in range(KEPT + 5):
        t.begin(k, 1)
    assert len(t.records()) == KEPT and t.records()[-1]["image"] == KEPT + 4


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_while_generating(guidance: float) -> None:
    """The gate's bounds lie between the evidence of a few images: the trace names those that were edited."""
    pipe: Any = tiny.stable_diffusion()
    s = Sampling(steps=2, guidance=guidance, batch=2)
    prompts, seeds = ["a", "b c", "d", "e", "f"], [1, 2, 3, 4, 5]
    base = generate(pipe, prompts, seeds, s)
    wide = make_eraser()
    evidence: dict[int, float] = {}
    from neuraleraser.activations import collect

    def on(seen: Any) -> None:
        for i, e in zip(seen.images, wide.gate.evidence(seen.x).tolist(), strict=True):
            evidence[i] = max(evidence.get(i, 0.0), e)

    collect(pipe, prompts, seeds, [wide.gate.site], on, s)
    ordered = sorted(evidence.values())
    low = (ordered[2] + ordered[3]) / 2
    some = make_eraser(low=low, high=low * 1.001)
    with attach(pipe, [some, make_eraser(seed=9, name="Dogs", **SHUT)], batch=2) as t:
        out = generate(pipe, prompts, seeds, s, on_batch=t.begin)
    loud = {i for i, e in evidence.items() if e > low}
    assert 0 < len(loud) < 5
    assert t.fired.keys() == loud and all(set(named) == {"Cats"} for named in t.fired.values())
    assert {i for i in range(5) if (out[i] != base[i]).any()} <= loud
