"""The trace: the image of each row, whatever the batch, the guidance and the padding."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser
from neuraleraser.eraser import Trace, attach
from neuraleraser.eraser.trace import MAX_IMAGES, Opening, unique_names
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import Batch, Call, Rows, Series

GUIDED = (True, False), (False, True)


def trace(*names: str) -> Trace:
    return Trace([make_eraser(name=name) for name in names or ("Cats",)])


def note(t: Trace, rows: Rows, *opening: float, call: Any = None, time: float = 250.0, eraser: int = 0) -> None:
    call = call or t.start_call(Call(None, rows.images, None))
    table = torch.tensor(opening, dtype=torch.float32).unsqueeze(1)
    t.add(call, rows, [Opening((eraser,), torch.tensor([time]), table)])


def images(t: Trace) -> list[int]:
    return sorted(t.fired)


def test_guidance_halves_are_one_image() -> None:
    t, rows = trace(), Rows(3, *GUIDED)
    call = t.start_call(Call(None, 3, None))
    note(t, rows, 0, 0, 0, 0, 1, 0, call=call)
    note(t, rows, 0, 0, 0.1, 0, 0, 0, call=call, time=750.0)  # an unconditional half that counts
    note(t, rows, 0, 1, 0, 0, 1, 0, call=call, time=750.0)  # both: one time, said once
    assert t.fired == {1: {"Cats": [750.0, 250.0]}, 2: {"Cats": [750.0]}}


def test_rows_are_images_without_guidance() -> None:
    t = trace()
    note(t, Rows(3), 0, 0, 1)
    assert images(t) == [2]


def test_frames_of_a_video_are_one_image() -> None:
    t = trace()
    note(t, Rows(2, *GUIDED), *[0, 0, 0], *[0, 0, 0], *[0, 0, 0], *[0, 1, 0])
    assert images(t) == [1]


def test_padding_belongs_to_no_image() -> None:
    for rows in (Rows(4), Rows(4, *GUIDED)):
        t, series = trace(), Series(7)
        t.start_call(Call(None, 4, Batch(series, 0, 4, 4)))
        last = t.start_call(Call(None, 4, Batch(series, 4, 3, 4)))
        note(t, rows, *[1.0] * rows.size, call=last)
        assert images(t) == [4, 5, 6] and len(t.records()) == 7


def test_calls_do_not_mix_and_series_follow_one_another() -> None:
    t, one, other = trace(), Series(3), Series(2)
    note(t, Rows(2), 1, 0, call=t.start_call(Call(None, 2, Batch(one, 0, 2, 2))))
    note(t, Rows(2), 0, 1, call=t.start_call(Call(None, 2, Batch(other, 0, 2, 2))))  # begun before the first is done
    note(t, Rows(2), 1, 1, call=t.start_call(Call(None, 2, Batch(one, 2, 1, 2))))
    note(t, Rows(1), 1)
    assert t.fired == {image: {"Cats": [250.0]} for image in (0, 2, 4, 5)}
    assert images(t) == [0, 2, 4, 5]  # read twice, it is the same


def test_erasers_are_told_apart_also_where_they_share_a_name() -> None:
    t = trace("Cats", "Dogs", "Cats")
    call = t.start_call(Call(None, 2, None))
    note(t, Rows(2), 0, 1, call=call)
    note(t, Rows(2), 1, 1, call=call, eraser=1, time=750.0)
    note(t, Rows(2), 1, 0, call=call, eraser=2)
    assert t.fired == {0: {"Dogs": [750.0], "Cats (2)": [250.0]}, 1: {"Cats": [250.0], "Dogs": [750.0]}}
    assert unique_names(["a", "a (2)", "a", "a"]) == ["a", "a (2)", "a (3)", "a (4)"]


def test_a_gate_that_only_just_opens_has_fired_and_a_shut_one_has_not() -> None:
    t = trace()
    note(t, Rows(2), 1e-30, 0.0)
    assert images(t) == [0]


def test_what_is_kept_does_not_grow_with_calls() -> None:
    t = trace()
    call = t.start_call(Call(None, 1, None))
    for k in range(2000):
        note(t, Rows(1), 1.0, call=call, time=k % 2)
    assert len(t._pending) < 600 and t.fired == {0: {"Cats": [1.0, 0.0]}}
    for _ in range(MAX_IMAGES + 5):
        t.start_call(Call(None, 1, None))
    assert len(t.records()) == MAX_IMAGES and t.records()[-1]["image"] == MAX_IMAGES + 5


def test_threads_lose_no_image() -> None:
    t = trace()

    def work() -> None:
        for _ in range(200):
            note(t, Rows(2), 1.0, 0.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert images(t) == list(range(0, 1600, 2)) and len(t.records()) == 1600


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_while_generating(guidance: float) -> None:
    """The gate's bounds lie between the evidence of a few images: the trace names those that were edited."""
    pipe: Any = pipelines.stable_diffusion()
    s = Sampling(num_inference_steps=2, guidance_scale=guidance, batch_size=2)
    prompts, seeds = ["a", "b c", "d", "e", "f"], [1, 2, 3, 4, 5]
    base = generate(pipe, prompts, seeds, s)
    wide = make_eraser()
    evidence: dict[int, float] = {}
    from neuraleraser.activations import CONDITIONAL, collect

    def on(seen: Any) -> None:
        if seen.branch == CONDITIONAL:
            for i, e in zip(seen.images, wide.gate.evidence(seen.x).tolist(), strict=True):
                evidence[i] = max(evidence.get(i, 0.0), e)

    collect(pipe, prompts, seeds, [wide.gate.site], on, s)
    ordered = sorted(evidence.values())
    low = (ordered[2] + ordered[3]) / 2
    some = make_eraser(low=low, high=low * 1.001)
    with attach(pipe, [some, make_eraser(seed=9, name="Dogs", **SHUT)]) as t:
        out = generate(pipe, prompts, seeds, s)
        generate(pipe, prompts, seeds, s)  # a second series is counted on
    loud = {i for i, e in evidence.items() if e > low}
    assert 0 < len(loud) < 5
    assert t.fired.keys() == {*loud, *(i + 5 for i in loud)}
    assert all(set(named) == {"Cats"} for named in t.fired.values())
    assert {i for i in range(5) if (out[i] != base[i]).any()} <= loud
