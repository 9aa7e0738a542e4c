"""Training: a kill changes nothing, and both stages go through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from helpers.canvas_models import tiny_unet, tiny_vae
from neuraleraser.canvas import train
from neuraleraser.canvas.data import Renders, render_set
from neuraleraser.canvas.recipe import TrainCanvas
from neuraleraser.canvas.train import (
    TrainState,
    train_denoiser,
    train_vae,
)
from neuraleraser.errors import ConceptError, DataError, FileError, SettingsError
from neuraleraser.io import tensor_file


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


def step(run: TrainState) -> None:
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


def new(path: Path, steps: int = 12, build: Callable[[], nn.Module] = dense) -> TrainState:
    torch.manual_seed(1)
    return TrainState(build(), path, 1e-2, steps, ema=0.9)


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
    tensors, header = tensor_file.load(path, "checkpoint")
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
            TrainState(other, path, 1e-2, 12)


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
    spread = train.encode_renders(vae, renders.images).float().std().item()
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
        assert tensor_file.load(pieces.folder / "denoiser.safetensors", "checkpoint")[1]["step"] == done
    assert same(weights(piece.unet), weights(whole.unet))
    assert same(weights(piece.text_encoder), weights(whole.text_encoder))

    def never(*args: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "denoiser_loss", never)
    monkeypatch.setattr(train, "vae_loss", never)
    done_already = train_denoiser(renders, train_vae(renders, settings), settings)
    assert same(weights(done_already.unet), weights(whole.unet))


def test_objects_are_seen_twice(renders: Renders):
    plain, more = train.training_indices(renders, ()), train.training_indices(renders, ("Cats", "Dogs"))
    assert plain.tolist() == list(range(64))
    twice = [i for i in range(64) if {"Cats", "Dogs"} & set(renders.content(i).objects)]
    assert twice and more.tolist() == [*range(64), *twice]
    empty = [i for i in range(64) if not renders.content(i).objects]
    assert empty and train.training_indices(renders, ("none",)).tolist() == [*range(64), *empty]
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
