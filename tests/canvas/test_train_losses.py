"""The parts of a training: its schedule, its order, its timesteps and its losses."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.canvas_models import tiny_vae
from neuraleraser.canvas.data import Renders, render_set
from neuraleraser.canvas.pipeline import build_scheduler
from neuraleraser.canvas.train import (
    denoiser_loss,
    draw_captions,
    draw_times,
    index_batches,
    learning_rate,
    time_weights,
    to_tensor,
    vae_loss,
)
from neuraleraser.errors import SettingsError


@pytest.fixture(scope="module")
def renders() -> Renders:
    return render_set(64, 5, workers=1)


# The schedule


def test_the_learning_rate_warms_up_holds_and_falls_to_nothing():
    rates = np.array([learning_rate(s, 1000, 2.0) for s in range(1001)])
    assert rates[0] == pytest.approx(0.02) and (np.diff(rates[:100]) > 0).all()
    assert (rates[99:701] == 2.0).all()
    assert (np.diff(rates[700:]) < 0).all() and rates[850] == pytest.approx(1.0)
    assert rates[1000] == 0.0 and learning_rate(1001, 1000, 2.0) == 0.0


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_shortest_runs_have_a_rate_too(steps: int):
    assert all(0 < learning_rate(s, steps, 1.0) <= 1 for s in range(steps))


# The order


def test_batches_are_a_function_of_seed_and_step():
    whole = list(islice(index_batches(50, 8, 0, 3), 20))
    for start in (1, 5, 6, 7, 13):  # within, at and after the end of an epoch of six
        assert all(
            np.array_equal(a, b) for a, b in zip(islice(index_batches(50, 8, start, 3), 5), whole[start:], strict=False)
        )
    assert not np.array_equal(whole[0], next(index_batches(50, 8, 0, 4)))


def test_an_epoch_shows_nothing_twice_and_epochs_differ():
    epochs = [np.concatenate(list(islice(index_batches(50, 8, 6 * e, 3), 6))) for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 48 and epoch.min() >= 0 and epoch.max() < 50
    assert not np.array_equal(epochs[0], epochs[1])


def test_less_than_a_batch_is_refused():
    with pytest.raises(SettingsError, match="render more, or lower batch"):
        next(index_batches(7, 8, 0, 0))


def test_captions_are_a_function_of_their_generator_and_one_in_ten_is_empty(renders: Renders):
    index = np.arange(64)
    texts = [t for seed in range(20) for t in draw_captions(renders, index, random.Random(seed))]
    assert texts[:64] == draw_captions(renders, index, random.Random(0))
    empty = texts.count("") / len(texts)
    assert abs(empty - 0.1) < 4 * np.sqrt(0.1 * 0.9 / len(texts))


# Timesteps


def test_time_weights_are_a_distribution_that_spares_the_clean_end():
    w = time_weights()
    assert w.shape == (1000,) and w.dtype == torch.float64
    assert w.sum().item() == pytest.approx(1, abs=1e-12) and (w > 0).all()
    a = build_scheduler().alphas_cumprod.double()
    # min(snr, 5) + 1 over snr + 1, up to the factor that makes the sum 1
    assert torch.allclose(w / w[-1], ((a / (1 - a)).clamp(max=5) + 1) * (1 - a), rtol=1e-4)


def test_times_are_stratified():
    cumulative = np.cumsum(time_weights().numpy())
    t = draw_times(64, cumulative, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    assert (t.diff() >= 0).all()
    upper = torch.from_numpy(cumulative)[t]
    share = torch.arange(64) / 64
    assert (upper >= share - 1e-6).all() and (upper < share + 1 / 64 + 2e-3).all()
    assert torch.equal(t, draw_times(64, cumulative, torch.Generator().manual_seed(0)))


def test_the_drawn_times_follow_the_weights():
    w = time_weights().numpy()
    generator = torch.Generator().manual_seed(1)
    t = torch.cat([draw_times(100, np.cumsum(w), generator) for _ in range(200)]).numpy()
    drawn = np.histogram(t, bins=20, range=(0, 1000))[0] / len(t)
    assert np.abs(drawn - w.reshape(20, 50).sum(1)).max() < 0.002


# Losses


class Given(nn.Module):
    """Stands for a UNet: answers with a given value, and remembers what it saw."""

    class Out:
        def __init__(self, sample: Tensor) -> None:
            self.sample = sample

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, noisy: Tensor, t: Tensor, text: Tensor) -> Given.Out:
        self.seen = noisy, t, text
        return Given.Out(self.answer)


class Text(nn.Module):
    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (ids[..., None].float(),)


def test_the_denoisers_loss_against_a_naive_one():
    generator = torch.Generator().manual_seed(0)
    z, noise, answer = (torch.randn(4, 8, 3, 5, generator=generator) for _ in range(3))
    t = torch.tensor([0, 10, 500, 999])
    alphas = build_scheduler().alphas_cumprod
    unet = Given(answer)
    net = nn.ModuleDict({"unet": unet, "text_encoder": Text()})
    loss = denoiser_loss(net, z, torch.ones(4, 6, dtype=torch.long), noise, t, alphas)
    errors, clean = [], []
    for b in range(4):
        signal, sigma = float(alphas[t[b]]) ** 0.5, (1 - float(alphas[t[b]])) ** 0.5
        noisy = signal * z[b] + sigma * noise[b]
        assert torch.allclose(unet.seen[0][b], noisy, atol=1e-5)
        v = signal * noise[b] - sigma * z[b]
        clean.append(signal * noisy - sigma * v)  # what the sampler makes of a perfect answer
        errors += (answer[b] - v).square().flatten().tolist()
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert torch.allclose(torch.stack(clean), z, atol=1e-5)
    assert torch.equal(unet.seen[1], t) and unet.seen[2].shape == (4, 6, 1)


def test_the_target_is_diffusers_own_velocity():
    z, noise = torch.randn(2, 3, 8, 4, 4, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([3, 400, 990])
    scheduler = build_scheduler()
    net = nn.ModuleDict({"unet": Given(scheduler.get_velocity(z, noise, t)), "text_encoder": Text()})
    loss = denoiser_loss(net, z, torch.ones(3, 2, dtype=torch.long), noise, t, scheduler.alphas_cumprod)
    assert loss.item() < 1e-10
    assert torch.allclose(net["unet"].seen[0], scheduler.add_noise(z, noise, t), atol=1e-6)  # type: ignore[index]


def test_pixels_span_minus_one_to_one():
    x = to_tensor(np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 3))
    assert x.shape == (1, 3, 1, 1) and x.flatten().tolist() == pytest.approx([-1, 1, -0.6], abs=1e-6)


def test_the_autoencoders_loss_falls_and_reaches_every_weight(renders: Renders):
    torch.manual_seed(0)
    vae = tiny_vae()
    x = to_tensor(renders.images[:2, :32, :32])
    loss = vae_loss(vae, x, torch.zeros(2, 8, 8, 8))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in vae.parameters())
