"""SAeUron as its code applies it: the error term's sign, the count of calls, features that compete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import make_eraser, random
from neuraleraser.eraser import Eraser, EraserHeader, attach
from neuraleraser.eraser.corrections import Scaling
from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.method import Method
from neuraleraser.fitting.fit_saeuron import block_features
from neuraleraser.methods import EraserMethod, SAeUronAsPublished
from neuraleraser.sae import SAE
from neuraleraser.sae.scores import Profile
from neuraleraser.sites import EditContext, Site, record

SITE = Site("unet.up_blocks.0.attentions.1")  # 32 wide, 8 x 8 positions
STEPS, N, K = 4, 20, 3


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def sae() -> SAE:
    """One that reconstructs badly."""
    w = torch.nn.functional.normalize(random(N, 32, seed=1), dim=1)
    parts = (w.clone(), random(N, seed=2) / 4, w, random(32, seed=3) / 4, torch.zeros(N))
    return SAE(*parts, {"settings": {"k": K}})


def made(sae: SAE, times: list[float], multiplier: float = -2.0) -> Eraser:
    """One feature blocked at each timestep, another at each."""
    seen = Profile(("x", "y"), torch.tensor(times), torch.full((2, len(times), N), 0.1), torch.zeros(2, len(times), N))
    chosen = torch.eye(len(times), N, dtype=torch.bool)
    gate, correction = block_features(sae, SITE, seen, "x", chosen, multiplier)
    header = EraserHeader("x", "style", seeds=(0, 9), prompts=("a",), method="saeuron")
    return Eraser(gate, (correction,), header)


@pytest.fixture(scope="module")
def times(pipe: Any) -> list[float]:
    found: list[float] = []
    with noting(pipe, lambda x, t: found.append(t)):
        pipelines.run(pipe, 0, steps=STEPS)
    return sorted(found)


@contextmanager
def noting(pipe: Any, note: Any) -> Iterator[None]:
    def on(site: Site, x: Tensor, context: EditContext[None]) -> None:
        note(x.clone(), float(context.timestep[0]))

    with record(pipe, [SITE], on):
        yield


def before_and_after(pipe: Any, method: Any, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Activations of each call of the denoiser before and after the method's edit."""
    found: list[list[Tensor]] = [[], []]
    with (
        noting(pipe, lambda x, t: found[0].append(x)),
        method.applied(pipe),
        noting(pipe, lambda x, t: found[1].append(x)),
    ):
        pipelines.run(pipe, 0, steps=steps)
    return list(zip(*found, strict=True))


def test_where_nothing_is_blocked_the_error_counts_twice(pipe: Any, sae: SAE, times: list[float]) -> None:
    """x - 2 (x - x_hat), as the public code adds x_hat - x, not x - x_hat. The corrected form is x, bit for bit."""
    none = made(sae, times)
    c = none.corrections[0]
    assert isinstance(c, Scaling)
    none = replace(none, corrections=(replace(c, factor=torch.ones_like(c.factor)),))
    method = SAeUronAsPublished(none, sae)
    for x, out in before_and_after(pipe, method):
        error = x - sae.decode(method.competing_features(x))
        assert float(error.norm() / x.norm()) > 0.3
        torch.testing.assert_close(out, x - 2 * error, atol=1e-4, rtol=1e-4)
    for x, out in before_and_after(pipe, EraserMethod(none)):
        assert torch.equal(x, out)


def test_both_forms_block_the_same_and_differ_by_the_error(pipe: Any, sae: SAE, times: list[float]) -> None:
    eraser = made(sae, times)
    published = SAeUronAsPublished(eraser, replace_k(sae, N))  # all compete, so none loses
    (first, out), *_ = before_and_after(pipe, published)
    blocked = eraser.corrections[0].delta(first, torch.full((len(first),), times[-1]))
    assert blocked.any()
    error = first - sae(first)
    torch.testing.assert_close(out, first - 2 * error + blocked, atol=1e-4, rtol=1e-4)
    (again, corrected), *_ = before_and_after(pipe, EraserMethod(eraser))
    torch.testing.assert_close(corrected, again + blocked, atol=1e-4, rtol=1e-4)


def replace_k(sae: SAE, k: int) -> SAE:
    return SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold, {"settings": {"k": k}})


def test_features_compete_for_k_places(sae: SAE) -> None:
    method, x = SAeUronAsPublished(made(sae, [1.0, 2.0]), sae), random(2, 5, 32, seed=9)
    z = method.competing_features(x)
    assert ((z > 0).sum(-1) <= K).all()
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    lost = (pre > 0) & (z == 0)
    assert lost.any() and (pre.masked_fill(~lost, 0).amax(-1) <= z.masked_fill(z == 0, 1e9).amin(-1)).all()


def test_calls_are_counted_and_timesteps_are_not_read(pipe: Any, sae: SAE, times: list[float]) -> None:
    method = SAeUronAsPublished(made(sae, times), sae)
    with method.applied(pipe):
        pipelines.run(pipe, 0, steps=STEPS)
        with pytest.raises(SettingsError, match="counts calls of the denoiser"):
            pipelines.run(pipe, 0, steps=1)
    # With half the steps the second call has the features of the second of all, at another timestep.
    (_, _), (x, out) = before_and_after(pipe, method, steps=2)
    z = method.competing_features(x)
    for step, same in ((STEPS - 2, True), (STEPS - 3, False)):
        wanted = sae.decode(method._blocked(z, step)) + (sae.decode(z) - x)
        assert torch.allclose(out, wanted, atol=1e-4) is same


def test_it_is_a_method(pipe: Any, sae: SAE, times: list[float]) -> None:
    eraser = made(sae, times)
    method: Method = SAeUronAsPublished(eraser, sae)
    assert (method.name, method.concept, method.kind) == ("saeuron-published", "x", "style")
    assert EraserMethod(eraser).name == "saeuron" and EraserMethod(eraser, 0.5).name == "saeuron x0.5"
    other = SAE(2 * sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold, sae.header)
    keys = {SAeUronAsPublished(e, s).key for e, s in ((eraser, sae), (made(sae, times, -3.0), sae), (eraser, other))}
    assert len(keys) == 3
    assert method.made_with is not None and method.made_with.seeds[0] == (0, 9) and method.made_with.prompts == ("a",)
    base = pipelines.run(pipe, 0, steps=STEPS)
    with method.watched(pipe) as trace:
        assert trace is None and torch.equal(pipelines.run(pipe, 0, steps=STEPS), base)
    with method.applied(pipe):
        assert not torch.equal(pipelines.run(pipe, 0, steps=STEPS), base)
    assert torch.equal(pipelines.run(pipe, 0, steps=STEPS), base)
    with attach(pipe, eraser):
        assert not torch.equal(pipelines.run(pipe, 0, steps=STEPS), base)


def test_parts_that_do_not_fit(sae: SAE) -> None:
    with pytest.raises(SettingsError, match="corrections of kind low_rank"):
        SAeUronAsPublished(make_eraser(), sae)
    small = SAE(sae.W_enc[:2], sae.b_enc[:2], sae.W_dec[:2], sae.b_dec, sae.threshold[:2])
    with pytest.raises(SettingsError, match="made with another"):
        SAeUronAsPublished(made(sae, [1.0, 2.0, 3.0]), small)
    silent = SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold)
    with pytest.raises(SettingsError, match="how many features fire"):
        SAeUronAsPublished(made(sae, [1.0]), silent).competing_features(random(1, 32))
