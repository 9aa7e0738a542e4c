"""GLoCE's replacements and gates are those of hooks and loops by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import random
from neuraleraser.concepts import Pair
from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.method import Method
from neuraleraser.methods import GLoCE
from neuraleraser.methods.gated_low_rank import GatedReplacement
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling

S = Sampling(num_inference_steps=3, guidance_scale=3.0, batch_size=2)
ONE = replace(S, batch_size=1)
PAIRS = [Pair("x a", "a"), Pair("x b", "b"), Pair("x c", "c")]
STAYS, GENERAL = ["y a", "z b"], ["d", "e"]
SEEDS = [11, 12, 13]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def method(pipe: Any) -> GLoCE:
    return GLoCE.measure(
        pipe, "x", "style", PAIRS, STAYS, SEEDS, S, general=GENERAL, rank=2, gate_rank=3, untouched=0.0
    )


def outputs(pipe: Any, prompts: list[str]) -> dict[str, list[Tensor]]:
    """Maps [P, d] of each cross-attention on the conditional half, one for each image and step."""
    found: dict[str, list[Tensor]] = {}
    hooks = [
        m.register_forward_hook(lambda m, a, out, name=name: found.setdefault(name, []).append(out[1].double()))
        for name, m in pipe.unet.named_modules()
        if name.endswith(".attn2")
    ]
    for prompt, seed in zip(prompts, SEEDS, strict=False):
        generate(pipe, [prompt], [seed], ONE)
    for hook in hooks:
        hook.remove()
    return found


def axes(x: Tensor, about: Tensor, rank: int) -> Tensor:
    """Projector [d, d] on the leading axes of vectors [N, d] about a point."""
    v = torch.linalg.svd(x - about, full_matrices=False).Vh[:rank]
    return v.T @ v


def test_replacements_and_gates_are_those_by_hand(pipe: Any, method: GLoCE) -> None:
    shown, instead, stays, general = (
        outputs(pipe, p) for p in ([p.positive for p in PAIRS], [p.negative for p in PAIRS], STAYS, GENERAL)
    )
    assert {site.path.removeprefix("unet.") for site in method.layers} == shown.keys() and len(shown) > 1
    for site, layer in method.layers.items():
        name = site.path.removeprefix("unet.")
        t, s, g = (torch.cat(maps[name]) for maps in (shown, instead, general))
        d = t.shape[1]
        onto, out = axes(s, s.mean(0), 2), axes(t, t.mean(0), 2)
        for found, wanted in ((layer.instead, s.mean(0)), (layer.shown, t.mean(0)), (layer.origin, g.mean(0))):
            torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)
        mapped = (layer.down @ layer.up).double().T  # of columns: V_s V_s' (I - V_t V_t')
        torch.testing.assert_close(mapped, onto @ (torch.eye(d) - out), atol=2e-3, rtol=1e-3)
        looks = axes(t, g.mean(0), 3)
        torch.testing.assert_close((layer.axes @ layer.axes.T).double(), looks, atol=2e-3, rtol=1e-3)
        peaks = []
        for x in stays[name]:
            away = x - g.mean(0)
            away = away / away.norm(dim=1, keepdim=True)
            peaks.append(float((away @ looks @ away.T).diagonal().max()))
        assert len(peaks) == 2 * 3  # images and steps
        spread = float(torch.tensor(peaks).std())
        assert layer.centre == pytest.approx(sum(peaks) / 6 + 2.5 * spread, rel=2e-3)
        assert layer.slope == pytest.approx(math.log(99) / (0.25 * spread), rel=2e-2)


def test_a_position_becomes_a_mixture() -> None:
    d = 6
    basis = torch.linalg.qr(random(d, 3, seed=2)).Q
    layer = GatedReplacement(
        *(random(d, seed=3), random(d, seed=4), random(d, 2, seed=5), random(2, d, seed=6), random(d, seed=7), basis),
        centre=0.5,
        slope=8.0,
    )
    x = random(2, 5, d, seed=8)
    delta, seen = layer.delta(x), []
    for row in range(2):
        for p in range(5):
            v = x[row, p].double()
            away = (v - layer.origin) / (v - layer.origin).norm()
            evidence = sum(float(away @ basis[:, i].double()) ** 2 for i in range(3))
            s = 1 / (1 + math.exp(-8.0 * (evidence - 0.5)))
            new = layer.instead.double() + (v - layer.shown) @ layer.down.double() @ layer.up.double()
            torch.testing.assert_close(v + delta[row, p], (1 - s) * v + s * new, atol=1e-5, rtol=1e-5)
            seen.append(s)
    assert max(seen) - min(seen) > 0.3
    assert layer.delta(x.bfloat16()).dtype == torch.float32


def test_the_gate_is_steep_beside_what_stays(method: GLoCE) -> None:
    """0.01 and 0.99 a tenth of the margin beside the centre, as the code has it."""
    layer = next(iter(method.layers.values()))
    spread = math.log(99) / (0.25 * layer.slope)
    for side, wanted in ((-1, 0.01), (1, 0.99)):
        assert torch.sigmoid(torch.tensor(layer.slope * side * 0.25 * spread)) == pytest.approx(wanted, abs=1e-4)


def acted(pipe: Any, method: GLoCE) -> list[bool]:
    """In which steps of a drawing the method changes what its first layer gives."""
    found: list[bool] = []
    plain: list[Tensor] = []
    module = pipe.unet.get_submodule(next(iter(method.layers)).path.removeprefix("unet."))

    def keep(m: Any, a: Any, out: Tensor) -> None:
        plain.append(out.clone())

    def compare(m: Any, a: Any, out: Tensor) -> None:
        found.append(not torch.equal(out, plain[-1]))

    before = module.register_forward_hook(keep)
    with method.applied(pipe):
        after = module.register_forward_hook(compare)
        generate(pipe, ["x a"], [5], ONE)
    for hook in (before, after):
        hook.remove()
    return found


def test_it_acts_from_a_timestep_on_and_leaves_nothing(pipe: Any, method: GLoCE) -> None:
    base = generate(pipe, ["x a", "b"], [5, 6], S)
    with method.applied(pipe):
        found = generate(pipe, ["x a", "b"], [5, 6], S)
    assert (found != base).any()
    site, layer = next(iter(method.layers.items()))
    open_wide = replace(method, layers={site: replace(layer, slope=1.0)})
    later = replace(open_wide, last_timestep=method.last_timestep - 1)
    assert acted(pipe, open_wide) == [True, True, True] and acted(pipe, later) == [False, True, True]
    with replace(method, last_timestep=-1.0).applied(pipe):
        assert (generate(pipe, ["x a", "b"], [5, 6], S) == base).all()
    with pytest.raises(ZeroDivisionError), method.applied(pipe):
        _ = 1 / 0
    with method.watched(pipe) as trace:
        assert trace is None and (generate(pipe, ["x a", "b"], [5, 6], S) == base).all()
    assert pipelines.left(pipe) == []


def test_it_is_a_method(pipe: Any, method: GLoCE) -> None:
    known: Method = method
    assert (known.name, known.concept, known.kind) == ("gloce", "x", "style")
    assert known.made_with is not None and known.made_with.seeds == ((11, 13),)
    assert {"x a", "a", "y a", "e"} <= set(known.made_with.prompts)
    site, layer = next(iter(method.layers.items()))
    changed = [
        replace(layer, slope=1.01 * layer.slope),
        replace(layer, centre=layer.centre + 1e-3),
        *(replace(layer, **{name: getattr(layer, name) * 1.01}) for name in ("instead", "shown", "down", "axes")),
    ]
    keys = {replace(method, layers={**method.layers, site: other}).key for other in changed}
    assert len(keys | {method.key, replace(method, last_timestep=1.0).key}) == len(changed) + 2
    plain = GLoCE.measure(pipe, "x", "style", PAIRS, STAYS, SEEDS, S)
    assert plain.last_timestep == pytest.approx(0.8 * method.last_timestep)
    for one in plain.layers.values():  # without general prompts the gate looks from what stands in its place
        assert torch.equal(one.origin, one.instead) and one.axes.shape[1] == one.down.shape[1] == 1


def test_what_cannot_be_is_refused(pipe: Any) -> None:
    def measure(pipe: Any = pipe, pairs: Any = PAIRS, stays: Any = STAYS, seeds: Any = SEEDS, **more: Any) -> GLoCE:
        return GLoCE.measure(pipe, "x", "style", pairs, stays, seeds, S, **more)

    with pytest.raises(SettingsError, match="no cross-attentions called attn2"):
        measure(pipelines.flux())
    with pytest.raises(SettingsError, match="0 pairs, 2 prompts that stay"):
        measure(pairs=[])
    with pytest.raises(SettingsError, match="3 pairs, 0 prompts that stay"):
        measure(stays=[])
    with pytest.raises(SettingsError, match=r"2 seeds: .* at least 3 seeds"):
        measure(seeds=[1, 2])
    for more in ({"rank": 0}, {"gate_rank": 0}, {"threshold": 0.0}, {"untouched": 1.5}):
        with pytest.raises(SettingsError, match=next(iter(more))):
            measure(**more)
