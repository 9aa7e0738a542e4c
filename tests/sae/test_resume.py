"""Law 8: training that was killed at any moment goes on and ends in the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.planted import planted
from neuraleraser.errors import DataError, FileError, SettingsError
from neuraleraser.io import atomic, tensor_file
from neuraleraser.sae import SAE, TrainSettings, pool_batches, train

_, BANK = planted(48, 16, 1000, active=2, seed=0, strong=3.0)
SETTINGS = TrainSettings(
    n_features=48,
    k=3,
    steps=30,
    learning_rate=1e-2,
    dead_after=150,
    init_vectors=512,
    checkpoint_every=4,
    bf16=False,
)
STREAM = pool_batches(BANK, 96, seed=7)  # ten steps an epoch
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


class Killed(BaseException):
    """Not an Exception, so that nothing catches it by the way."""


def same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS) and a.header == b.header


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "bfloat16"])
def whole(request) -> tuple[TrainSettings, SAE]:
    """Settings and the SAE of a run that was never stopped."""
    logs = []
    chosen = dataclasses.replace(SETTINGS, bf16=request.param, log_every=1)
    sae = train(STREAM, chosen, on_step=logs.append)
    assert any(0 < log.dead < 1 for log in logs), "the revival must take part in what is tested here"
    return chosen, sae


@settings(max_examples=8)
@given(kills=st.lists(st.integers(1, 29), min_size=1, max_size=3))
def test_killed_between_steps(whole, kills):
    """Once to three times; kills below 6 fall into the first sample."""
    chosen, want = whole
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.safetensors"
        for kill in kills:

            def dying(step: int, kill: int = kill) -> Iterator[Tensor]:
                for i, x in enumerate(STREAM(step)):
                    if step + i == kill:
                        raise Killed
                    yield x

            try:
                train(dying, chosen, checkpoint=path)
            except Killed:
                pass
        assert same(train(STREAM, chosen, checkpoint=path), want)


@pytest.mark.parametrize("write", [1, 3])
def test_killed_while_a_checkpoint_is_written(whole, write, tmp_path, monkeypatch):
    chosen, want = whole
    path, count = tmp_path / "run.safetensors", 0
    rename = atomic.os.replace

    def dying(*args):
        nonlocal count
        count += 1
        if count == write:
            raise Killed
        rename(*args)

    monkeypatch.setattr(atomic.os, "replace", dying)
    with pytest.raises(Killed):
        train(STREAM, chosen, checkpoint=path)
    monkeypatch.undo()
    assert path.exists() == (write > 1)
    assert same(train(STREAM, chosen, checkpoint=path), want)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_finished_run_is_not_run_again(tmp_path):
    path = tmp_path / "run.safetensors"
    done = train(STREAM, SETTINGS, checkpoint=path)

    def never(step: int) -> Iterator[Tensor]:
        raise AssertionError("the stream was opened")

    assert same(train(never, SETTINGS, checkpoint=path), done)


def test_resuming_needs_the_same_settings(tmp_path):
    path = tmp_path / "run.safetensors"
    done = train(STREAM, SETTINGS, checkpoint=path)
    with pytest.raises(SettingsError, match="k = 3, not 4"):
        train(STREAM, dataclasses.replace(SETTINGS, k=4), checkpoint=path)
    often = dataclasses.replace(SETTINGS, checkpoint_every=1, log_every=1)  # these decide nothing
    assert torch.equal(train(STREAM, often, checkpoint=path).W_enc, done.W_enc)


def test_resuming_needs_the_same_width(tmp_path):
    path = tmp_path / "run.safetensors"
    half(path)
    with pytest.raises(DataError, match=r"shape \(96, 8\): expected \[B, 16\]"):
        train(pool_batches(BANK[:, :8], 96), SETTINGS, checkpoint=path)


def half(path: Path) -> None:
    """Leave a checkpoint from the middle of the run: where a stream fails, what was learnt is kept."""

    def short(step: int) -> Iterator[Tensor]:
        yield from (x for _, x in zip(range(step, 18), STREAM(step), strict=False))

    with pytest.raises(DataError, match=r"ended after 18 .*all steps before are kept in .*run\.safetensors"):
        train(short, SETTINGS, checkpoint=path)
    assert tensor_file.load(path, "sae-training")[1]["step"] == 18


def test_a_damaged_checkpoint_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "run.safetensors"
    half(path)
    tensors, header = tensor_file.load(path, "sae-training")
    for damage in (
        lambda t, h: t.pop("W_enc"),
        lambda t, h: t.pop("b_dec.exp_avg"),
        lambda t, h: h.pop("scale"),
        lambda t, h: h.pop("settings"),
        lambda t, h: h.update(step=31),
        lambda t, h: h.update(step="16"),
        lambda t, h: t.update(W_dec=t["W_dec"][:, :4]),
        lambda t, h: t.update({"W_dec.exp_avg": t["W_dec.exp_avg"][:4]}),
        lambda t, h: t.update(idle=t["idle"][:4]),
    ):
        t, h = dict(tensors), dict(header)
        damage(t, h)
        tensor_file.save(path, "sae-training", t, h)
        with pytest.raises(FileError, match="delete it to start over"):
            train(STREAM, SETTINGS, checkpoint=path)
