"""Detected patches become other patches of their own map, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import GATE, SHUT, make_gate, open_eraser, random
from neuraleraser.eraser import Eraser, EraserHeader
from neuraleraser.eraser.corrections import Scaling
from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.method import Method
from neuraleraser.fitting.fit_saeuron import block_features
from neuraleraser.methods import PatchReplacement
from neuraleraser.sae import SAE
from neuraleraser.sae.scores import Profile
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import EditContext, Site, record

S = Sampling(num_inference_steps=3, guidance_scale=3.0, batch_size=2)
N = 6


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


def from_saeuron(often: float = 0.3) -> Eraser:
    """One feature blocked at low timesteps, two others at high ones; `often` is the mean that each has to exceed."""
    w = torch.nn.functional.normalize(random(N, 32, seed=1), dim=1)
    sae = SAE(w, random(N, seed=2) / 4, w, random(32, seed=3) / 4, torch.full((N,), 0.1))
    mean = torch.full((2, 2, N), often)
    chosen = torch.tensor([[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    seen = Profile(("x", "y"), torch.tensor([250.0, 750.0]), mean, torch.zeros(2, 2, N))
    gate, correction = block_features(sae, GATE, seen, "x", chosen, -2.0)
    return Eraser(gate, (correction,), EraserHeader("x", "object", seeds=(0, 9), method="saeuron"))


def before_and_after(pipe: Any, method: Any, prompts: list[str]) -> list[tuple[float, Tensor, Tensor]]:
    """(timestep, activations before, after) of each call of the denoiser."""
    found: list[list[Any]] = [[], []]

    def note(k: int) -> Any:
        def on(site: Site, x: Tensor, context: EditContext[None]) -> None:
            found[k].append((float(context.timestep[0]), x.clone()))

        return on

    with record(pipe, [GATE], note(0)), method.applied(pipe), record(pipe, [GATE], note(1)):
        generate(pipe, prompts, list(range(5, 5 + len(prompts))), S)
    return [(t, x, out) for (t, x), (_, out) in zip(*found, strict=True)]


def test_patches_are_detected_by_the_features_that_the_eraser_scales() -> None:
    eraser, x = from_saeuron(), random(3, 10, 32, seed=7)
    c = eraser.corrections[0]
    assert isinstance(c, Scaling)
    timestep = torch.tensor([100.0, 900.0, 400.0])
    found = PatchReplacement(eraser).detected(x, timestep)
    for row, t in enumerate(timestep.tolist()):
        step = 0 if t < 500 else 1
        for p in range(10):
            z = [float(x[row, p].double() @ c.rows[i].double() + c.bias[i]) for i in range(len(c.rows))]
            fires = [z[i] > float(c.threshold[step, i]) and float(c.factor[step, i]) != 1 for i in range(len(z))]
            assert bool(found[row, p]) is any(fires)
    assert 0 < int(found.sum()) < found.numel()


def test_detected_patches_become_others_of_their_map(pipe: Any) -> None:
    method, acted = PatchReplacement(from_saeuron()), 0
    for t, x, out in before_and_after(pipe, method, ["a", "b"]):
        found = method.detected(x, torch.full((len(x),), t))
        assert torch.equal(out[~found], x[~found])
        for row in range(len(x)):
            free = x[row][~found[row]]
            if not len(free):
                continue
            far = torch.cdist(out[row][found[row]], free).amin(1) if found[row].any() else torch.zeros(1)
            assert float(far.max()) < 1e-4
            own = (x[row][found[row]] - out[row][found[row]]).abs().amax() if found[row].any() else torch.ones(1)
            assert float(own) > 1e-2
            acted += int(found[row].sum())
    assert acted > 10


def test_every_free_patch_may_be_the_source() -> None:
    eraser = from_saeuron()
    x = random(1, 400, 32, seed=8)
    method = PatchReplacement(eraser)
    found = method.detected(x, torch.tensor([900.0]))[0]
    context: Any = EditContext(torch.tensor([900.0]), None, None, None, None)  # type: ignore[arg-type]
    delta = method._replace(x, context)
    assert delta is not None and torch.equal(delta[0].any(1), found)
    sources = torch.cdist((x + delta)[0][found], x[0]).argmin(1)
    assert not found[sources].any()
    free, n = (~found).nonzero()[:, 0], int(found.sum())
    expected = len(free) * (1 - (1 - 1 / len(free)) ** n)  # different sources, of n even draws
    assert abs(len(set(sources.tolist())) - expected) < 0.25 * expected
    assert sources.double().mean() == pytest.approx(float(free.double().mean()), rel=0.15)
    later = replace(context, timestep=torch.tensor([901.0]))
    found_again = [
        m._replace(x, c) for m, c in ((method, context), (replace(method, seed=1), context), (method, later))
    ]
    assert [again is not None and torch.equal(again, delta) for again in found_again] == [True, False, False]


def test_an_image_does_not_depend_on_its_neighbours(pipe: Any) -> None:
    method = PatchReplacement(from_saeuron())
    with method.applied(pipe):
        both = generate(pipe, ["a", "b"], [5, 6], S)
        other = generate(pipe, ["a", "c"], [5, 7], S)
    assert (both[0] == other[0]).all() and (both[1] != other[1]).any()
    assert (both[0] != generate(pipe, ["a", "b"], [5, 6], S)[0]).any()


def test_where_all_or_none_is_detected_nothing_changes(pipe: Any) -> None:
    base = generate(pipe, ["a", "b"], [5, 6], S)
    for often in (-1.0, 1e6):  # thresholds below and above all there is
        eraser = from_saeuron(often)
        c = eraser.corrections[0]
        assert isinstance(c, Scaling)
        all_fire = replace(c, threshold=torch.zeros_like(c.threshold), bias=c.bias + 1e3)
        one = replace(eraser, corrections=(all_fire if often < 0 else c,))
        with PatchReplacement(one).applied(pipe):
            assert (generate(pipe, ["a", "b"], [5, 6], S) == base).all()
    assert bool(PatchReplacement(one).detected(random(1, 4, 32), torch.tensor([900.0])).any()) is False


def test_any_erasers_gate_detects_where_it_is_open(pipe: Any) -> None:
    """A prompt gate, which leaves the negative prompt alone."""
    gate = replace(make_gate(GATE, 32, threshold=3.0), weight=torch.tensor([1.0, -1.0, 0.0]))
    eraser = replace(open_eraser(), gate=gate)
    method, acted = PatchReplacement(eraser), 0
    for t, x, out in before_and_after(pipe, method, ["a", "b"]):
        fires = x @ gate.rows[0] + gate.bias[0] > 3.0
        opened = gate(x, torch.full((4,), t)) > 0
        assert torch.equal(out[:2], x[:2])
        wanted = fires[2:] & opened[2:, None]
        acted += int(wanted.sum())
        assert torch.equal((out[2:] != x[2:]).any(-1), wanted)
    assert acted > 0
    base = generate(pipe, ["a", "b"], [5, 6], S)
    shut = replace(eraser, gate=make_gate(GATE, 32, **SHUT))
    with PatchReplacement(shut).applied(pipe):
        assert (generate(pipe, ["a", "b"], [5, 6], S) == base).all()


def test_gradients_go_through(pipe: Any) -> None:
    method, x = PatchReplacement(from_saeuron()), random(1, 20, 32, seed=9).requires_grad_()
    context: Any = EditContext(torch.tensor([900.0]), None, None, None, None)  # type: ignore[arg-type]
    found = method.detected(x, context.timestep)
    delta = method._replace(x, context)
    assert delta is not None
    gradient = torch.autograd.grad((x + delta).sum(), x)[0]
    assert not gradient[found].any() and float(gradient.sum()) == pytest.approx(20 * 32)


def test_it_is_a_method(pipe: Any) -> None:
    method: Method = PatchReplacement(from_saeuron())
    assert (method.name, method.concept, method.kind) == ("patch-replacement", "x", "object")
    assert method.made_with is not None and method.made_with.seeds == ((0, 9),)
    keys = {PatchReplacement(e, s).key for e, s in ((from_saeuron(), 0), (from_saeuron(), 1), (from_saeuron(0.4), 0))}
    assert len(keys) == 3
    base = generate(pipe, ["a", "b"], [5, 6], S)
    with method.watched(pipe) as trace:
        assert trace is None and (generate(pipe, ["a", "b"], [5, 6], S) == base).all()
    with pytest.raises(ZeroDivisionError), method.applied(pipe):
        assert (generate(pipe, ["a", "b"], [5, 6], S) != base).any()
        _ = 1 / 0
    assert (generate(pipe, ["a", "b"], [5, 6], S) == base).all() and pipelines.left(pipe) == []
    with pytest.raises(SettingsError, match="seed is -1"):
        PatchReplacement(from_saeuron(), -1)
