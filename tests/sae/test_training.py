"""Training finds what was planted, revives what died, and learns a threshold that stands alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from helpers.planted import planted, recovered
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.sae import SAE, StepLog, TrainSettings, measure_sae, pool_batches, train
from neuraleraser.sae.train_step import LIFT, lift_dead, train_step
from neuraleraser.sae.training import _untrained_state

DICTIONARY = TrainSettings(n_features=128, k=2, steps=600, dead_after=8000, bf16=False, log_every=150)
"""Twice the features that are planted: with as many, about a fifth of them is missed."""
SMALL = TrainSettings(n_features=32, k=2, steps=6, init_vectors=256, bf16=False)


@pytest.fixture(scope="module")
def small() -> tuple[Tensor, Tensor, Tensor, SAE, list[StepLog]]:
    """(directions, trained on, held out, SAE, logs) for 128 planted directions in 32 dimensions."""
    directions, x = planted(64, 32, 12_000, active=2, seed=0)
    logs: list[StepLog] = []
    sae = train(pool_batches(x[:10_000], 512), DICTIONARY, on_step=logs.append)
    return directions, x[:10_000], x[10_000:], sae, logs


def test_planted_directions_are_recovered_and_a_shuffled_control_finds_none(small):
    directions, x, _, sae, _ = small
    assert recovered(directions, sae.W_dec) >= 0.95
    g = torch.Generator().manual_seed(1)
    shuffled = torch.stack([column[torch.randperm(len(x), generator=g)] for column in x.T], dim=1)
    control = train(pool_batches(shuffled, 512), DICTIONARY)
    assert recovered(directions, control.W_dec) <= 0.05


@pytest.mark.slow
def test_a_larger_dictionary_is_recovered():
    directions, x = planted(512, 256, 100_000, active=6, seed=3)
    sae = train(pool_batches(x, 1024), TrainSettings(n_features=1024, k=6, steps=1000, dead_after=30_000))
    assert recovered(directions, sae.W_dec) >= 0.95


def test_features_fire_as_often_after_training_as_in_it(small):
    _, _, held_out, sae, logs = small
    assert abs(measure_sae(sae, held_out)["l0"] - 2) <= 0.2
    assert bool((sae.threshold == sae.threshold[0]).all()) and sae.threshold[0] > 0
    assert [log.step for log in logs] == [150, 300, 450, 600]
    assert logs[-1].l0 == pytest.approx(2, abs=0.01)
    assert logs[-1].fvu < logs[0].fvu


def test_bfloat16_learns_as_well(small):
    directions, x, held_out, exact, _ = small
    sae = train(pool_batches(x, 512), dataclasses.replace(DICTIONARY, bf16=True))
    assert recovered(directions, sae.W_dec) >= recovered(directions, exact.W_dec) - 0.05
    assert sae.W_dec.dtype == torch.float32
    assert abs(measure_sae(sae, held_out)["l0"] - 2) <= 0.2


def test_revival_lowers_the_share_of_dead_features():
    """And costs no reconstruction."""
    _, x = planted(64, 32, 10_000, active=2, seed=0)
    measured = {}
    for dead_after in (10**9, 2000):
        settings = dataclasses.replace(DICTIONARY, n_features=64, learning_rate=1e-2, steps=300, dead_after=dead_after)
        measured[dead_after] = measure_sae(train(pool_batches(x[:8000], 512), settings), x[8000:])
    control, ours = measured.values()
    assert control["dead_share"] >= 0.1, "the control must have dead features"
    assert ours["dead_share"] <= control["dead_share"] / 2
    assert ours["explained_variance"] >= control["explained_variance"]


def test_the_dead_are_lifted_and_no_one_else():
    b_enc = torch.zeros(3)
    lift_dead(b_enc, torch.tensor([True, False, True]), torch.tensor(1.5), lr=0.01)
    torch.testing.assert_close(b_enc, torch.tensor([1.0, 0.0, 1.0]) * LIFT * 1.5 * 0.01)


def test_a_feature_is_dead_until_it_fires_again():
    """Lifted step by step until it fires; from then on its bias is the gradient's alone to move."""
    _, x = planted(48, 16, 1000, active=2, seed=0, strong=3.0)
    settings = TrainSettings(n_features=48, k=3, steps=60, learning_rate=1e-2, dead_after=250, bf16=False)
    stream = pool_batches(x, 100, seed=7)
    state = _untrained_state(stream, settings)
    with torch.no_grad():
        state.weights.b_enc[0] = -9.0  # far below whatever fires
    biases, idle = [], []
    for batch, _ in zip(stream(0), range(60), strict=False):
        train_step(state, batch * state.scale, None, settings)
        biases.append(float(state.weights.b_enc[0].detach()))
        idle.append(int(state.idle[0]))
    assert biases[:2] == [-9.0, -9.0] and idle[:3] == [100, 200, 300]
    assert biases[1] < biases[2] < biases[3], "it rises once it is dead"


@pytest.mark.parametrize("factor", [1e-4, 3.0, 1e4])
def test_the_data_scale_is_folded_into_the_weights(factor):
    """Training on c * x gives features that fire on the same vectors, and c times the reconstruction."""
    _, x = planted(32, 16, 2000, active=2, seed=2)
    settings = dataclasses.replace(SMALL, steps=60)
    one = train(pool_batches(x, 256), settings)
    other = train(pool_batches(x * factor, 256), settings)
    assert other.header["data_scale"] == pytest.approx(one.header["data_scale"] / factor, rel=1e-4)
    torch.testing.assert_close(other(x * factor) / factor, one(x), rtol=1e-2, atol=1e-2)
    agree = ((one.encode(x) > 0) == (other.encode(x * factor) > 0)).float().mean()
    assert agree > 0.999


def test_folding_is_exact():
    """The SAE on raw x is the trained one on s * x, divided by s."""
    from neuraleraser.sae.adam import Adam
    from neuraleraser.sae.sparse_ops import Weights
    from neuraleraser.sae.training import _State, _unscaled_sae

    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(8, 4, generator=g), dim=1)
    w = Weights(torch.randn(8, 4, generator=g), torch.randn(8, generator=g), rows, torch.randn(4, generator=g))
    s, threshold = 0.25, 0.3  # a power of two: not a bit may differ
    scaled = SAE(*w, torch.full((8,), threshold))
    x = torch.randn(50, 4, generator=g)
    idle = torch.zeros(8, dtype=torch.int64)
    folded = _unscaled_sae(_State(w, Adam(w), idle, s, 1.0, threshold), TrainSettings(n_features=8, k=1, steps=1), {})
    assert torch.equal(folded.encode(x), scaled.encode(x * s) / s)
    assert torch.equal(folded(x), scaled(x * s) / s)


def test_global_random_state_is_left_alone():
    _, x = planted(16, 8, 600, active=1, seed=4)
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    train(pool_batches(x, 128), SMALL)
    assert torch.equal(torch.rand(3), want)


def test_the_seed_decides():
    _, x = planted(16, 8, 600, active=1, seed=4)
    a, b, c = (train(pool_batches(x, 128), dataclasses.replace(SMALL, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(a.W_enc, b.W_enc) and not torch.equal(a.W_enc, c.W_enc)


def _from(*parts: Tensor):
    def stream(step: int) -> Iterator[Tensor]:
        return iter(parts[step:])

    return stream


def test_bad_streams_are_refused_in_one_sentence():
    good = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    bad = good.clone()
    bad[3, 2], bad[5, 1] = float("nan"), float("inf")
    late = dataclasses.replace(SMALL, init_vectors=64)
    for parts, settings, message in [
        ((), SMALL, "empty"),
        ((good[:0],), SMALL, r"batch 0 has shape \(0, 8\)"),
        ((good[0],), SMALL, r"batch 0 has shape \(8,\)"),
        ((bad,), SMALL, "batch 0 holds 2 NaN or infinite values of 512"),
        ((good, good, bad), late, "batch 2 holds 2 NaN or infinite"),
        ((good, good, good[:, :7]), late, r"batch 2 has shape \(64, 7\): expected \[B, 8\]"),
        ((good, good, good), SMALL, "ended after 3 batches"),
        ((torch.ones(64, 8),) * 6, SMALL, "all the same vector"),
        ((torch.zeros(64, 8),) * 6, SMALL, "all the same vector"),
    ]:
        with pytest.raises(DataError, match=message):
            train(_from(*parts), settings)


def test_bad_settings_are_refused():
    for wrong in [
        {"k": 33},
        {"k": 0},
        {"n_features": 0},
        {"steps": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"dead_after": 0},
        {"seed": -1},
        {"steps": 2.5},
    ]:
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            dataclasses.replace(SMALL, **wrong)


def test_the_learning_rate():
    long = TrainSettings(n_features=2**12, k=8, steps=200_000)
    assert long.lr_at(0, 1280) == pytest.approx(4e-4)  # 2e-4 * sqrt(4)
    short = dataclasses.replace(long, steps=3000)
    assert short.lr_at(0, 100) == pytest.approx(1.5e-3)  # 45 / 3000 radians / sqrt(100)
    assert dataclasses.replace(long, steps=100).lr_at(0, 100) == pytest.approx(4.5e-3)  # at most 0.045 radians a step
    short = dataclasses.replace(long, steps=500)
    given = dataclasses.replace(short, learning_rate=1e-3)
    rates = [given.lr_at(step, 100) for step in range(500)]
    assert rates[:401] == [1e-3] * 401 and rates == sorted(rates, reverse=True)
    assert rates[450] == pytest.approx(5e-4) and rates[499] == pytest.approx(1e-5)


def test_divergence_is_an_error_and_not_a_broken_file(tmp_path):
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(SettingsError, match="diverged"):
        train(pool_batches(x, 128), dataclasses.replace(SMALL, learning_rate=1e30), checkpoint=tmp_path / "c")


def test_settings_need_no_torch():
    import subprocess
    import sys

    code = "import sys, neuraleraser.sae.train_settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_the_threshold_is_of_the_weights_as_they_end(architecture: str):
    """And not a moving average that lags behind them: where features are many and alike, it decides how many fire."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16_000, 6, generator=g) @ torch.randn(6, 32, generator=g)
    settings = TrainSettings(n_features=512, k=6, steps=100, architecture=architecture)
    fired = measure_sae(train(pool_batches(x, 1024), settings), x)["l0"]
    assert fired == pytest.approx(6, rel=0.012)
