"""One step: its precision, its log, and what it does where training diverges."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from helpers.planted import planted
from neuraleraser.errors import SettingsError
from neuraleraser.sae import TrainSettings, pool_batches, train, train_step, training

_, BANK = planted(24, 8, 400, active=2, seed=0)
SETTINGS = TrainSettings(n_features=24, k=2, steps=4, learning_rate=1e-2, init_vectors=200, log_every=3)
STREAM = pool_batches(BANK, 40)


def test_bfloat16_only_where_the_processor_has_it(monkeypatch):
    def made(has: bool, bf16: bool) -> Tensor:
        monkeypatch.setattr(train_step, "has_bf16", lambda: has)
        return train(STREAM, dataclasses.replace(SETTINGS, bf16=bf16)).W_enc

    full = made(True, False)
    assert torch.equal(made(False, True), full)
    assert not torch.equal(made(True, True), full)


@pytest.mark.parametrize(("known", "has"), [({}, True), ({"avx512_bf16": True}, True), ({"avx2": True}, False)])
def test_what_the_processor_has(known, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert train_step.has_bf16.__wrapped__() == has


def test_the_log_is_read_later_and_holds_no_batch():
    state = training._untrained_state(STREAM, SETTINGS)
    stream = STREAM(0)
    first = train_step.train_step(state, next(stream) * state.scale, None, SETTINGS)
    train_step.train_step(state, next(stream) * state.scale, None, SETTINGS)
    assert first().step == 1 and first().vectors == 40 and 0 < first().fvu < 2
    held = [cell.cell_contents for cell in first.__closure__ or ()]
    assert not any(isinstance(x, Tensor) and x.numel() > 1 for x in held)


def test_divergence_leaves_the_weights():
    state = training._untrained_state(STREAM, SETTINGS)
    before = state.weights.W_enc.detach().clone()
    with pytest.raises(SettingsError, match="diverged at step 0"):
        train_step.train_step(state, next(STREAM(0)) * 1e30, None, SETTINGS)
    assert torch.equal(state.weights.W_enc, before) and state.step == 0


def test_rows_by_rows_is_the_whole(monkeypatch):
    """The projection and the normalisation, in blocks of one row or of all."""
    made = []
    for cached in (1, 2**18):
        monkeypatch.setattr(train_step, "CACHE_VALUES", cached)
        made.append(train(STREAM, SETTINGS))
    assert torch.allclose(made[0].W_dec, made[1].W_dec, atol=1e-6)
    assert torch.allclose(made[0].W_dec.norm(dim=1), torch.ones(24), atol=1e-5)
