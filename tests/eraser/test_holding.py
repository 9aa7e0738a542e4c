"""Gates that hold: the step in which one opens is taken again, corrected from the first block on, and all later ones
are from their start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import SHUT, make_correction, make_gate
from helpers.prompted_calls import LOUD, QUIET, hears, prompts
from neuraleraser import ConceptRefusedError, attach
from neuraleraser.eraser import Eraser, EraserHeader, LowRank
from neuraleraser.eraser.decisions import Decisions
from neuraleraser.eraser.gate import SHUT_BOUND
from neuraleraser.errors import EraserNotAppliedError
from neuraleraser.sites import (
    DenoiserCall,
    Rows,
    Site,
    candidate_sites,
    denoiser,
    denoiser_calls,
    edit,
    edit_prediction,
    edits_for,
    record,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::neuraleraser.errors.UnseenRouteWarning"),
]


def holding(
    pipe: Any, *, seed: int = 0, concept: str = "Cats", scale: float = 1.0, guidance: float = 4.0, **gate: Any
) -> Eraser:
    """An eraser with a gate that holds, in the middle of the denoiser, and a correction of the text that all read."""
    blocks = candidate_sites(pipe)
    at = blocks[len(blocks) // 2]
    reads = edits_for(pipe, at)
    widths: dict[Site, int] = {}
    with record(pipe, [at, reads[0]], lambda site, x, context: widths.update({site: x.shape[2]})):
        pipelines.run(pipe, 0, steps=1, guidance=guidance)
    times = [scale * t for t in (250.0, 750.0)]
    made = make_gate(at, widths[at], seed=seed, times=times, **gate)
    correction = make_correction(reads[0], widths[reads[0]], seed=seed, times=times, also=reads[1:])
    return Eraser(replace(made, holds=True), (correction,), EraserHeader(concept))


def corrected(pipe: Any, eraser: Eraser, **rows: Any) -> Any:
    """Context in which the eraser's correction acts always, in the rows whose prompt is drawn."""
    (correction,) = eraser.corrections

    def change(x: Tensor, context: Any) -> Tensor:
        delta = correction.delta(x, context.timestep)
        drawn = context.rows.rows_with_prompt(len(x))
        return delta if drawn is None else delta * torch.tensor(drawn).view(-1, 1, 1)

    return edit(pipe, dict.fromkeys((correction.site, *correction.also), change))


@pytest.fixture(params=list(pipelines.EVERY))
def any_pipe(request: pytest.FixtureRequest) -> Any:
    return request.param, pipelines.EVERY[request.param]()


@pytest.fixture
def sd() -> Any:
    return pipelines.stable_diffusion()


def test_images_are_those_of_a_correction_that_always_acts(any_pipe: Any) -> None:
    """From the first block of the first step on, though the gate lies behind; those in which it stays shut are kept."""
    name, pipe = any_pipe
    usual: dict[str, Any] = {"steps": 1, "guidance": 0.0} if name == "sdxl_turbo" else {"steps": 3}
    eraser = holding(pipe, scale=1e-3 if "flux" in name else 1.0, guidance=usual.get("guidance", 4.0))
    base = pipelines.run(pipe, 3, n=2, **usual)
    with corrected(pipe, eraser):
        want = pipelines.run(pipe, 3, n=2, **usual)
    with attach(pipe, eraser) as trace:
        found = pipelines.run(pipe, 3, n=2, **usual)
    assert set(trace.fired) == {0, 1} and all(len(t["Cats"]) == usual["steps"] for t in trace.fired.values())
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
    assert (want - base).abs().max() > 1e-3
    shut = replace(eraser.gate, low=torch.full((2,), 1e6), high=torch.full((2,), 2e6))
    with attach(pipe, replace(eraser, gate=shut)):
        assert torch.equal(pipelines.run(pipe, 3, n=2, **usual), base)
    with attach(pipe, eraser, 0.0) as trace:
        assert torch.equal(pipelines.run(pipe, 3, n=2, **usual), base)
    with attach(pipe, eraser, action="detect"):
        assert torch.equal(pipelines.run(pipe, 3, n=2, **usual), base)


def hears_and_holds(pipe: Any, **gate: Any) -> Eraser:
    """An eraser of what is LOUD in a prompt, whose gate holds."""
    heard = hears(pipe, **gate)
    reads = edits_for(pipe, heard.gate.site)
    correction = make_correction(reads[0], pipelines.WIDTH, also=reads[1:])
    return replace(heard, gate=replace(heard.gate, holds=True), corrections=(correction,))


def test_an_image_keeps_its_bits_beside_one_that_fires(sd: Any) -> None:
    base = prompts(sd, QUIET, LOUD, QUIET)
    with attach(sd, hears_and_holds(sd)) as trace:
        found = prompts(sd, QUIET, LOUD, QUIET)
    assert set(trace.fired) == {1}
    assert torch.equal(found[0], base[0]) and torch.equal(found[2], base[2]) and not torch.equal(found[1], base[1])
    with attach(sd, hears_and_holds(sd), [[1.0, 0.0, 1.0]]):
        assert torch.equal(prompts(sd, QUIET, LOUD, QUIET), base), "the one that fires has strength 0"


def test_one_step_more_and_only_where_it_opens(sd: Any) -> None:
    """Where nothing fires the denoiser runs as often as without; where something does, once more in all."""
    count = 0

    def counted(module: Any, args: Any) -> None:
        nonlocal count
        count += 1

    eraser = hears_and_holds(sd)
    handle = sd.unet.conv_in.register_forward_pre_hook(counted)
    for texts, forwards in (((QUIET, QUIET), 2), ((QUIET, LOUD), 3)):
        count = 0
        with attach(sd, eraser):
            prompts(sd, *texts)
        assert count == forwards
    handle.remove()


def test_a_new_text_is_decided_anew(sd: Any) -> None:
    """A loop of one's own, in which nothing says where a drawing begins."""
    eraser, noise = hears_and_holds(sd), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loud, quiet = (sd.encode_prompt([words] * 2, "cpu", 1, False)[0] for words in (LOUD, QUIET))
    mixed = torch.cat([quiet[:1], loud[:1]])

    def predict(text: Tensor) -> Tensor:
        with torch.no_grad():
            return sd.unet(noise, 500, text, return_dict=False)[0]

    base = predict(quiet), predict(mixed), predict(loud)
    with attach(sd, eraser):
        changed = predict(loud)
        assert not torch.equal(changed, base[2])
        assert torch.equal(predict(quiet), base[0]), "what was decided of another text is forgotten"
        some = predict(mixed)
        assert torch.equal(some[0], base[1][0]) and not torch.equal(some[1], base[1][1])
        torch.testing.assert_close(predict(loud.clone()), changed)
        torch.testing.assert_close(predict(loud.clone()), changed)  # held now, and no other than when it opened


@pytest.mark.parametrize("bound", [1e6, SHUT_BOUND])
def test_a_decision_stands_when_the_gate_is_shut_again(sd: Any, bound: float) -> None:
    """Later bounds that nothing reaches do not undo it, and earlier ones leave the step to the base."""
    eraser = hears_and_holds(sd)
    low = eraser.gate.low.clone()
    shut_late = replace(eraser.gate, times=torch.tensor([0.0, 900.0]), low=torch.stack([low[0] * 0 + bound, low[0]]))
    shut_late = replace(shut_late, high=torch.where(shut_late.low > 100, 2 * shut_late.low, shut_late.low + 0.1))
    shut_early = replace(shut_late, low=shut_late.low.flip(0), high=shut_late.high.flip(0))
    with attach(sd, eraser):
        want = prompts(sd, LOUD, num_inference_steps=4)
    with attach(sd, replace(eraser, gate=shut_late)) as trace:
        torch.testing.assert_close(prompts(sd, LOUD, num_inference_steps=4), want, atol=1e-4, rtol=1e-4)
    assert len(trace.fired[0]["Cats"]) == 4
    with attach(sd, replace(eraser, gate=shut_early)) as trace:
        prompts(sd, LOUD, num_inference_steps=4)
    assert 0 < len(trace.fired[0]["Cats"]) < 4


def test_of_gates_with_the_same_features_the_larger_acts(sd: Any) -> None:
    """Law 11, in all steps: what a gate decided is no reason to add both."""
    one = holding(sd)
    other = replace(one, header=EraserHeader("Dogs"), corrections=(replace_bias(one),))
    with attach(sd, other):
        want = pipelines.run(sd, 3, n=2, steps=3)
    with attach(sd, [one, other], [0.5, 1.0]):
        assert torch.equal(pipelines.run(sd, 3, n=2, steps=3), want)


def test_a_gate_that_holds_leaves_room_for_one_that_does_not(sd: Any) -> None:
    """Of the same features: they act at different times, and both do."""
    holds = holding(sd)
    anew = replace(holds, gate=replace(holds.gate, holds=False), header=EraserHeader("Dogs"))
    anew = replace(anew, corrections=(make_correction(candidate_sites(sd)[-1], 16),))
    alone = []
    for eraser in (holds, anew):
        with attach(sd, eraser):
            alone.append(pipelines.run(sd, 3, n=2, steps=1))
    with attach(sd, [holds, anew]):
        found = pipelines.run(sd, 3, n=2, steps=1)
    assert not any(torch.allclose(found, image, atol=1e-3) for image in alone)


def test_another_number_of_images_is_decided_anew() -> None:
    """Though nothing is known of the text."""
    decisions, rows = Decisions(), Rows(2)
    acting = torch.ones(1, 1, dtype=torch.bool)
    assert decisions.add(rows, {0: torch.tensor([0.5, 0.0])}, acting).tolist() == [True, False]  # type: ignore[union-attr]
    decisions.follow(rows, None)
    assert decisions.by_row(rows, [0], torch.device("cpu")).tolist() == [[0.5], [0.0]]
    decisions.follow(Rows(3), None)
    assert decisions.by_row(Rows(3), [0], torch.device("cpu")).tolist() == [[0.0]] * 3


def test_erasers_of_two_attachments_act_together(sd: Any) -> None:
    """In a step that one of them takes again, too: with one step there is no other."""
    one, other = holding(sd, concept="Cats"), holding(sd, seed=30, concept="Dogs")
    for first, second in ((one, other), (other, one)):
        with both(corrected(sd, first), corrected(sd, second)):
            want = pipelines.run(sd, 3, n=2, steps=1)
        with both(attach(sd, first), attach(sd, second)):
            torch.testing.assert_close(pipelines.run(sd, 3, n=2, steps=1), want, atol=1e-4, rtol=1e-4)
        with attach(sd, first):
            assert not torch.allclose(pipelines.run(sd, 3, n=2, steps=1), want, atol=1e-3)


@contextmanager
def both(first: Any, second: Any) -> Iterator[None]:
    with first, second:
        yield


def test_an_edit_beside_it_acts_in_the_step_that_is_taken_again(sd: Any) -> None:
    eraser = holding(sd)
    site = candidate_sites(sd)[-1]

    def strange() -> Any:
        return edit(sd, {site: lambda x, context: torch.linspace(-2, 2, x.shape[2]).expand_as(x)})

    with both(corrected(sd, eraser), strange()):
        want = pipelines.run(sd, 3, steps=1)
    with both(strange(), attach(sd, eraser)):
        torch.testing.assert_close(pipelines.run(sd, 3, steps=1), want, atol=1e-4, rtol=1e-4)


def test_a_change_of_the_prediction_beside_it_stays(sd: Any) -> None:
    eraser = holding(sd)

    def shifted() -> Any:
        return edit_prediction(sd, lambda call: lambda finished, rows: torch.full_like(finished.call.prediction, 0.25))

    with both(corrected(sd, eraser), shifted()):
        want = pipelines.run(sd, 3, steps=1)
    orders: list[Callable[[], Any]] = [
        lambda: both(shifted(), attach(sd, eraser)),
        lambda: both(attach(sd, eraser), shifted()),
    ]
    for order in orders:
        with order():
            torch.testing.assert_close(pipelines.run(sd, 3, steps=1), want, atol=1e-4, rtol=1e-4)


def test_a_record_sees_each_step_once(sd: Any) -> None:
    seen: list[Tensor] = []
    site = candidate_sites(sd)[-1]
    with attach(sd, holding(sd)), record(sd, [site], lambda site, x, context: seen.append(x.clone())):
        pipelines.run(sd, 3, steps=3)
    assert len(seen) == 3


def test_gradients_go_through_the_gate_and_the_correction(sd: Any) -> None:
    """Law 5, in float64: the derivative along a direction is the difference of two predictions."""
    eraser = hears_and_holds(sd)
    wide = replace(eraser.gate, high=eraser.gate.low + 1e3)  # partly open, so that its evidence counts
    eraser = replace(eraser, gate=wide)
    unet = denoiser(sd).double()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    text = sd.encode_prompt([LOUD], "cpu", 1, False)[0].detach().double()
    along = torch.randn(text.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(t: Tensor) -> Tensor:
        with attach(sd, eraser):
            return unet(noise, 500, t, return_dict=False)[0].square().sum()

    given = text.clone().requires_grad_()
    loss(given).backward()
    assert given.grad is not None
    with torch.no_grad():
        step = 1e-5
        difference = (loss(text + step * along) - loss(text - step * along)) / (2 * step)
    torch.testing.assert_close((given.grad * along).sum(), difference, rtol=1e-6, atol=1e-9)


def test_a_refusing_eraser_sees_what_another_one_corrects(sd: Any) -> None:
    erases = hears_and_holds(sd)
    refuses = replace(hears_and_holds(sd), header=EraserHeader("Dogs"))
    refuses = replace(refuses, corrections=(replace_bias(refuses),))
    with pytest.raises(ConceptRefusedError, match="Dogs"), attach(sd, [erases, refuses], action=["erase", "refuse"]):
        prompts(sd, LOUD)


def replace_bias(eraser: Eraser) -> LowRank:
    (correction,) = eraser.corrections
    assert isinstance(correction, LowRank)
    return replace(correction, bias=correction.bias + 1)


def test_a_step_that_is_taken_again_is_checked(sd: Any) -> None:
    """NaN that only the correction brings is an error (law 10)."""
    eraser = holding(sd)
    huge = replace_bias(eraser)
    huge = replace(huge, bias=torch.full_like(huge.bias, 3e38))
    with (
        pytest.raises(EraserNotAppliedError, match="NaN or infinity"),
        attach(sd, replace(eraser, corrections=(huge,)), 2.0),
    ):
        pipelines.run(sd, 3, steps=1)


def test_a_file_says_that_its_gate_holds(sd: Any, tmp_path: Any) -> None:
    eraser = holding(sd)
    eraser.save(tmp_path / "x.safetensors")
    assert Eraser.load(tmp_path / "x.safetensors").gate.holds
    assert eraser.content_hash != replace(eraser, gate=replace(eraser.gate, holds=False)).content_hash
    both_kinds = replace(eraser.gate, picture=True)
    assert "holds" in (replace(eraser, gate=both_kinds).validation_error() or "")


def test_calls_of_the_denoiser_are_what_is_returned(sd: Any) -> None:
    """Who watches the denoiser sees the prediction that the pipeline gets, once a step."""
    calls: list[DenoiserCall] = []
    with attach(sd, holding(sd)), denoiser_calls(sd, calls.append):
        pipelines.run(sd, 3, steps=2)
    with attach(sd, holding(sd, **SHUT)):
        pipelines.run(sd, 3, steps=2)
    assert len(calls) == 2
