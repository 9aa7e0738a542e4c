"""Training: its schedule, its order, its losses, and that a kill changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from neuraleraser.canvas import train
from neuraleraser.canvas.data import Renders, render_set
from neuraleraser.canvas.pipeline import WIDTH, build_scheduler
from neuraleraser.canvas.settings import TrainCanvas
from neuraleraser.canvas.train import (
    Trainee,
    batches,
    denoiser_loss,
    draw_captions,
    draw_times,
    learning_rate,
    pixels,
    time_weights,
    train_denoiser,
    train_vae,
    vae_loss,
)
from neuraleraser.errors import ConceptError, DataError, FileError, SettingsError
from neuraleraser.io import artifact


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=64,
        latent_channels=8,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
    )


@pytest.fixture(scope="module")
def renders() -> Renders:
    return render_set(64, 5, workers=1)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainCanvas:
    """Two or three steps of models small enough for a test."""
    monkeypatch.setattr(train, "build_unet", tiny_unet)
    monkeypatch.setattr(train, "build_vae", tiny_vae)
    return TrainCanvas(folder=tmp_path, vae_steps=3, steps=3, batch=16, compile=False)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
    whole = list(islice(batches(50, 8, 0, 3), 20))
    for start in (1, 5, 6, 7, 13):  # within, at and after the end of an epoch of six
        assert all(
            np.array_equal(a, b) for a, b in zip(islice(batches(50, 8, start, 3), 5), whole[start:], strict=False)
        )
    assert not np.array_equal(whole[0], next(batches(50, 8, 0, 4)))


def test_an_epoch_shows_nothing_twice_and_epochs_differ():
    epochs = [np.concatenate(list(islice(batches(50, 8, 6 * e, 3), 6))) for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 48 and epoch.min() >= 0 and epoch.max() < 50
    assert not np.array_equal(epochs[0], epochs[1])


def test_less_than_a_batch_is_refused():
    with pytest.raises(SettingsError, match="render more, or lower batch"):
        next(batches(7, 8, 0, 0))


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
    x = pixels(np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 3))
    assert x.shape == (1, 3, 1, 1) and x.flatten().tolist() == pytest.approx([-1, 1, -0.6], abs=1e-6)


def test_the_autoencoders_loss_falls_and_reaches_every_weight(renders: Renders):
    torch.manual_seed(0)
    vae = tiny_vae()
    x = pixels(renders.images[:2, :32, :32])
    loss = vae_loss(vae, x, torch.zeros(2, 8, 8, 8))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in vae.parameters())


# Kill and go on


def step(run: Trainee) -> None:
    """One step on data that depend on the step alone."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(run.step))
    (run.module(x) - x.sum(1, keepdim=True)).square().mean().backward()
    run.update()


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


def convolutions() -> nn.Module:
    """Weights whose memory is not in the order of their indices, as in training."""
    net = nn.Sequential(
        nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 4, (1, 3)), nn.Flatten()
    )
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def new(path: Path, steps: int = 12, build: Callable[[], nn.Module] = dense) -> Trainee:
    torch.manual_seed(1)
    return Trainee(build(), path, 1e-2, steps, ema=0.9)


@pytest.mark.parametrize("build", [dense, convolutions])
def test_killed_at_any_step_it_ends_in_the_same_bits(tmp_path: Path, build: Callable[[], nn.Module]):
    whole = new(tmp_path / "whole.safetensors", build=build)
    while whole.step < 12:
        step(whole)
    for kill in (1, 2, 5, 10):
        path = tmp_path / f"{kill}.safetensors"
        run = new(path, build=build)
        for _ in range(kill):
            step(run)
        run.save()
        step(run)  # lost with the process
        again = new(path, build=build)
        assert again.step == kill
        while again.step < 12:
            step(again)
        assert same(weights(again.module), weights(whole.module))
        assert same(again.average, whole.average)
        again.use_average()
        assert same(weights(again.module), whole.average)


def test_a_finished_run_is_on_disk_and_not_run_again(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    run = new(path)
    while run.step < 12:
        step(run)
    assert new(path).step == 12
    tensors, header = artifact.load(path, "checkpoint")
    assert header["step"] == 12
    assert {k.split("/")[0] for k in tensors} == {"param", "average", "momentum", "exp_avg", "exp_avg_sq"}


def test_checkpoints_come_with_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.safetensors"
    run = new(path)
    step(run)
    assert not path.exists()
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1.0)
    step(run)
    assert new(path).step == 2


def test_the_average_follows_the_weights(tmp_path: Path):
    run = new(tmp_path / "x.safetensors", steps=60)
    first = weights(run.module)
    for _ in range(50):
        step(run)
    far = sum((run.average[k] - first[k]).norm() for k in first)
    gap = sum((run.average[k] - p.detach()).norm() for k, p in run.params.items())
    assert 0 < gap < far


def test_another_modules_checkpoint_is_refused(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    run = new(path)
    step(run)
    run.save()
    for other in (nn.Linear(5, 1), nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))):
        with pytest.raises(FileError, match="another module"):
            Trainee(other, path, 1e-2, 12)


def test_a_cut_checkpoint_is_refused(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    run = new(path)
    step(run)
    run.save()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FileError):
        new(path)


def test_both_stages_go_through_resume_and_are_skipped_when_done(
    renders: Renders, settings: TrainCanvas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    vae = train_vae(renders, settings)
    scale = vae.config["scaling_factor"]
    spread = train.encode(vae, renders.images).float().std().item()
    assert scale == pytest.approx(1 / spread, rel=0.02)
    assert not vae.training
    whole = train_denoiser(renders, vae, settings)
    assert all(isinstance(p, AttnProcessor2_0) for p in whole.unet.attn_processors.values())
    assert not whole.unet.training and not whole.text_encoder.training

    # The same in pieces: one step at a time, each with everything made anew.
    pieces = replace(settings, folder=tmp_path / "pieces", minutes=1e-9)
    vae_again = train_vae(renders, pieces)
    assert same(weights(vae_again), weights(vae)) and vae_again.config["scaling_factor"] == scale
    for done in (1, 2, 3):
        piece = train_denoiser(renders, vae_again, pieces)
        assert artifact.load(pieces.folder / "denoiser.safetensors", "checkpoint")[1]["step"] == done
    assert same(weights(piece.unet), weights(whole.unet))
    assert same(weights(piece.text_encoder), weights(whole.text_encoder))

    def never(*args: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "denoiser_loss", never)
    monkeypatch.setattr(train, "vae_loss", never)
    done_already = train_denoiser(renders, train_vae(renders, settings), settings)
    assert same(weights(done_already.unet), weights(whole.unet))


def test_objects_are_seen_twice(renders: Renders):
    plain, more = train.shown(renders, ()), train.shown(renders, ("Cats", "Dogs"))
    assert plain.tolist() == list(range(64))
    twice = [i for i in range(64) if {"Cats", "Dogs"} & set(renders.content(i).objects)]
    assert twice and more.tolist() == [*range(64), *twice]
    empty = [i for i in range(64) if not renders.content(i).objects]
    assert empty and train.shown(renders, ("none",)).tolist() == [*range(64), *empty]
    with pytest.raises(ConceptError, match="Unicorn"):
        TrainCanvas(twice=("Cats", "none", "Unicorn"))


def test_a_warm_start_keeps_the_shipped_autoencoder(
    renders: Renders, settings: TrainCanvas, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = train.build_tokenizer()
    shipped = train.assemble(tiny_unet(), tiny_vae(), train.build_text_encoder(tokenizer), tokenizer)
    monkeypatch.setattr(train, "load_pipeline", lambda: shipped)
    monkeypatch.setattr(train, "render_set", lambda *args, **more: renders)
    # A rate of nothing: what comes out is what it started from.
    pipe = train.train(replace(settings, warm_start=True, learning_rate=0.0))
    for part in ("vae", "unet", "text_encoder"):
        there = weights(getattr(pipe, part))
        assert same(there, {k: v.half().float() for k, v in weights(getattr(shipped, part)).items()}), part
    assert not (settings.folder / "vae.safetensors").exists()
    assert pipe.vae.config["scaling_factor"] == shipped.vae.config["scaling_factor"]
    assert not pipe.vae.config.get("_name_or_path"), "no path of this machine"


def test_what_cannot_be_trained_on_is_refused(renders: Renders, settings: TrainCanvas, monkeypatch: pytest.MonkeyPatch):
    vae = tiny_vae()
    with monkeypatch.context() as patch:
        patch.setattr(train, "denoiser_loss", lambda *args: torch.tensor(float("nan"), requires_grad=True))
        with pytest.raises(SettingsError, match="nan at step 0: lower learning_rate"):
            train_denoiser(renders, vae, settings)
    assert not (settings.folder / "denoiser.safetensors").exists(), "no checkpoint of a run gone wrong"
    fewer = Renders(renders.images[:32], renders.style[:32], renders.objects[:32])
    with pytest.raises(DataError, match="64 latents, expected 32"):
        train_denoiser(fewer, vae, settings)
