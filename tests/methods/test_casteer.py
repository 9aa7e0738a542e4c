"""CASteer's vectors and reflections are those of hooks by hand, on the prompt's half alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from neuraleraser.concepts import Pair
from neuraleraser.errors import SettingsError
from neuraleraser.methods import CASteer
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling

S = Sampling(num_inference_steps=3, guidance_scale=3.0, batch_size=2)
PAIRS = [Pair("x a", "a"), Pair("x b", "b"), Pair("x c", "c")]


def attentions(pipe: Any) -> dict[str, Any]:
    return {name: m for name, m in pipe.unet.named_modules() if name.endswith(".attn2")}


def test_it_is_what_hooks_do_by_hand():
    pipe = pipelines.stable_diffusion()
    method = CASteer.measure(pipe, "x", "style", PAIRS, [0, 1, 2], S)
    assert len(method.vectors) == len(attentions(pipe)) > 1 and len(method.times) == 3

    # Vectors: means by step, of the second half of each guided batch.
    seen: dict[tuple[str, int, bool], Tensor] = {}
    steps: dict[str, int] = {}
    for shown in (True, False):
        for i, pair in enumerate(PAIRS):
            steps.clear()

            def read(name: str, out: Tensor, shown: bool = shown) -> None:
                step = steps.get(name, 0)
                steps[name] = step + 1
                key = (name, step, shown)
                seen[key] = seen.get(key, torch.tensor(0.0)) + out[1].mean(0)

            hooks = [
                m.register_forward_hook(lambda m, a, out, name=name: read(name, out))
                for name, m in attentions(pipe).items()
            ]
            generate(pipe, [pair.positive if shown else pair.negative], [i], replace(S, batch_size=1))
            for hook in hooks:
                hook.remove()
    for site, vectors in method.vectors.items():
        name = site.path.removeprefix("unet.")
        for step in range(3):
            s = seen[name, step, True] - seen[name, step, False]
            torch.testing.assert_close(vectors[2 - step], s / s.norm(), atol=1e-4, rtol=1e-3)

    # Reflections.
    by_name = {site.path.removeprefix("unet."): x for site, x in method.vectors.items()}
    steps.clear()

    def reflect(name: str, out: Tensor) -> Tensor:
        step = steps.get(name, 0)
        steps[name] = step + 1
        s = by_name[name][2 - step]
        along = (out @ s).clamp(min=0)[..., None]
        return torch.cat([out[:1], (out - 2 * along * s)[1:]])

    base = generate(pipe, ["x a b"], [5], replace(S, batch_size=1))
    hooks = [
        m.register_forward_hook(lambda m, a, out, name=name: reflect(name, out)) for name, m in attentions(pipe).items()
    ]
    expected = generate(pipe, ["x a b"], [5], replace(S, batch_size=1))
    for hook in hooks:
        hook.remove()
    with method.applied(pipe):
        found = generate(pipe, ["x a b"], [5], replace(S, batch_size=1))
    assert abs(found.astype(int) - expected.astype(int)).max() <= 1 and (found != base).any()
    assert (generate(pipe, ["x a b"], [5], replace(S, batch_size=1)) == base).all() and pipelines.left(pipe) == []


def test_a_reflection_keeps_the_length_and_its_strength_counts():
    pipe = pipelines.stable_diffusion()
    method = CASteer.measure(pipe, "x", "style", PAIRS, [0, 1, 2], S)
    others = (replace(method, strength=2.0000001), replace(method, times=method.times + 1))
    assert len({method.key, *(other.key for other in others)}) == 3
    assert method.made_with.seeds == ((0, 2),) and method.made_with.prompts[:2] == ("x a", "a")
    base = generate(pipe, ["x a"], [5], S)
    with replace(method, strength=0).applied(pipe):
        assert (generate(pipe, ["x a"], [5], S) == base).all()
    with pytest.raises(SettingsError, match="strength is -1"):
        replace(method, strength=-1)
    with pytest.raises(SettingsError, match="no cross-attentions called attn2"):
        CASteer.measure(pipelines.flux(), "x", "style", PAIRS, [0, 1, 2], S)
