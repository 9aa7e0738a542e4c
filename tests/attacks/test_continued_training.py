"""Continued training: a LoRA that learns through a method, is added as peft adds it, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser, with_picture
from neuraleraser import attach
from neuraleraser.attacks import lora_added, train_lora
from neuraleraser.attacks.denoising import denoising_target
from neuraleraser.attacks.latents import latents_of
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
S = Sampling(num_inference_steps=2, batch_size=2)


@pytest.fixture
def pipe() -> Any:
    return pipelines.stable_diffusion()


def train(pipe: Any, images: Any = IMAGES, prompts: Any = ("a", "b"), **settings: Any) -> dict[str, torch.Tensor]:
    return train_lora(pipe, images, prompts, **{"rank": 2, "steps": 3, "batch_size": 2, **settings})


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def drawn(pipe: Any, lora: dict[str, torch.Tensor]) -> np.ndarray:
    with lora_added(pipe, lora):
        return generate(pipe, ["a", "b c"], [0, 1], S)


def test_the_loss_falls(pipe: Any) -> None:
    losses: list[float] = []
    train(pipe, steps=80, batch_size=4, rate=1e-2, on_step=lambda step, loss: losses.append(loss))
    assert len(losses) == 80
    assert np.mean(losses[-15:]) < 0.97 * np.mean(losses[:15])


def test_it_is_added_as_peft_adds_it(pipe: Any) -> None:
    """It is a file that diffusers loads, and all projections of all attentions have a pair."""
    pytest.importorskip("peft")
    lora = train(pipe, rate=0.1)
    plain, here = generate(pipe, ["a", "b c"], [0, 1], S), drawn(pipe, lora)
    pipe.load_lora_weights(dict(lora))
    wrapped = {name for name, module in pipe.unet.named_modules() if hasattr(module, "lora_A")}
    assert len(wrapped) == len(lora) / 2 == 7 * 2 * 4  # blocks, attentions of each, projections
    there = generate(pipe, ["a", "b c"], [0, 1], S)
    assert np.abs(here.astype(int) - there).max() <= 1 < np.abs(plain.astype(int) - there).max()


def test_a_first_step_goes_down_the_denoiser_s_own_loss(pipe: Any) -> None:
    """Written out with the matrices' product in the weights, in float64: Adam's first step goes by its rate against the
    gradient's sign. The matrices that begin at 0 keep the others still in this step."""
    start, found = train(pipe, steps=0), train(pipe, steps=1, rate=0.01)
    g = torch.Generator().manual_seed(0)
    names = [name for name in start if "lora_A" in name]
    for name in names:
        first = torch.randn(*start[name].shape, generator=g) / 2
        assert torch.equal(start[name], first) and torch.equal(found[name], first)
        assert not start[name.replace("lora_A", "lora_B")].any()
    some, times = torch.randint(2, (2,), generator=g), torch.randint(1000, (2,), generator=g)
    latents = latents_of(pipe, IMAGES)[some]
    noise = torch.randn(latents.shape, generator=g)
    for module in (pipe.unet, pipe.text_encoder):
        module.double()
    noisy, target = denoising_target(pipe, latents.double(), noise.double(), times)
    with torch.no_grad():
        text = pipe.encode_prompt([["a", "b"][i] for i in some.tolist()], "cpu", 1, False)[0]
    F.mse_loss(pipe.unet(noisy, times, encoder_hidden_states=text).sample, target).backward()
    for name in names:
        weight = dict(pipe.unet.named_parameters())[name.removeprefix("unet.").replace("lora_A.", "")]
        gradient = weight.grad @ start[name].double().T
        moved = found[name.replace("lora_A", "lora_B")]
        clear = gradient.abs() > 1e-4  # elsewhere Adam's own epsilon, and rounding, may show
        assert torch.allclose(moved[clear], (-0.01 * gradient.sign()).float()[clear], atol=1e-3)


def test_a_shorter_training_is_the_beginning_of_a_longer_one(pipe: Any) -> None:
    losses: dict[int, list[float]] = {4: [], 6: []}
    for steps, some in losses.items():
        train(pipe, steps=steps, on_step=lambda step, loss, some=some: some.append(loss))
    assert losses[6][:4] == losses[4] and len(losses[6]) == 6


def test_it_is_deterministic_goes_through_the_eraser_and_leaves_nothing(pipe: Any) -> None:
    before, hooks = generate(pipe, ["a", "b"], [0, 1], S), pipelines.left(pipe)
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    base, opened, shut = train(pipe), make_eraser(), make_eraser(**SHUT)
    pictured = with_picture(make_eraser(**SHUT), pipe)  # its prompt gate is shut, its image gate open
    assert equal(base, train(pipe)) and not equal(base, train(pipe, seed=7))
    assert equal(base, train(pipe, applied=lambda using: attach(using, shut)))
    for eraser in (opened, pictured):
        assert not equal(base, train(pipe, applied=lambda using, eraser=eraser: attach(using, eraser)))
    with pytest.raises(ZeroDivisionError), lora_added(pipe, base):
        assert not np.array_equal(generate(pipe, ["a", "b"], [0, 1], S), before)
        _ = 1 / 0
    assert np.array_equal(generate(pipe, ["a", "b"], [0, 1], S), before) and pipelines.left(pipe) == hooks
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags
    assert all(p.grad is None for p in (*pipe.unet.parameters(), *pipe.text_encoder.parameters()))


def test_a_method_acts_on_what_it_adds(pipe: Any) -> None:
    """Its hooks come first, so a method that reads a projection reads it with the LoRA."""
    lora, seen = train(pipe, rate=0.1), dict[bool, torch.Tensor]()

    @contextmanager
    def applied(added: bool) -> Iterator[None]:
        last = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q
        handle = last.register_forward_hook(lambda module, args, output: seen.setdefault(added, output))
        yield
        handle.remove()

    with lora_added(pipe, lora), applied(True):
        generate(pipe, ["a"], [0], S)
    with lora_added(pipe, {name: 0 * x for name, x in lora.items()}), applied(False):
        generate(pipe, ["a"], [0], S)
    assert not torch.equal(seen[True], seen[False])


def test_what_does_not_fit_is_refused(pipe: Any) -> None:
    with pytest.raises(SettingsError, match="2 images, 1 prompts"):
        train(pipe, prompts=["a"])
    for prompts in ("ab", [1, 2]):
        with pytest.raises(SettingsError, match="prompts are no list of texts: pass one for each of the 2 images"):
            train(pipe, prompts=prompts)
    with pytest.raises(SettingsError, match="there are no images"):
        train(pipe, IMAGES[:0], [])
    with pytest.raises(SettingsError, match="rank is 0"):
        train(pipe, rank=0)
    with pytest.raises(DataError, match="uint8"):
        train(pipe, IMAGES.astype(np.float32))
    with pytest.raises(SettingsError, match="several text encoders or none"):
        train(pipelines.stable_diffusion_xl())
    lora = train(pipe, steps=0)
    wider = {name: x.repeat(1, 2) if "lora_A" in name else x for name, x in lora.items()}
    for other in (wider, dict(list(lora.items())[1:]), {name: x[0] for name, x in lora.items()}):
        with pytest.raises(SettingsError, match="does not fit the 56 attention projections"), lora_added(pipe, other):
            pass
