"""Every architecture finds what was planted, and ends in an SAE whose features fire alone as they did in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.planted import planted, recovered
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.io import tensor_file
from neuraleraser.sae import (
    ARCHITECTURES,
    SAE,
    StepLog,
    TrainSettings,
    labelled_batches,
    measure_sae,
    pool_batches,
    sparse_ops,
    train,
)
from neuraleraser.sae.architectures.architecture import architecture_named
from neuraleraser.sae.architectures.matryoshka import nested_sizes
from neuraleraser.sae.architectures.topk import mean_smallest, select_rows

OTHERS = [name for name in ARCHITECTURES if name != "batchtopk"]
SMALL = TrainSettings(
    n_features=48,
    k=3,
    steps=12,
    learning_rate=1e-2,
    dead_after=150,
    init_vectors=512,
    checkpoint_every=4,
    bf16=False,
)
_, BANK = planted(48, 16, 1000, active=2, seed=0, strong=3.0)
STREAM = pool_batches(BANK, 96, seed=7)


def chosen(architecture: str, **more: Any) -> TrainSettings:
    return dataclasses.replace(SMALL, architecture=architecture, **more)


Trained = dict[str, tuple[SAE, list[StepLog]]]


@pytest.fixture(scope="module")
def trained() -> tuple[Tensor, Tensor, Trained]:
    """(directions, held out, SAE and logs of each architecture) for 64 planted directions in 32 dimensions."""
    directions, x = planted(64, 32, 8000, active=2, seed=0)
    made: Trained = {}
    for name in sorted(ARCHITECTURES):
        logs: list[StepLog] = []
        settings = TrainSettings(
            n_features=128, k=2, steps=500, dead_after=4000, bf16=False, log_every=500, architecture=name
        )
        made[name] = train(pool_batches(x[:7000], 256), settings, on_step=logs.append), logs
    return directions, x[7000:], made


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_planted_directions_are_recovered(trained, name):
    directions, held_out, made = trained
    sae, logs = made[name]
    found, figures = recovered(directions, sae.W_dec), measure_sae(sae, held_out)
    print(
        f"{name}: recovered {found:.3f}, {figures['l0']:.2f} fire, ev {figures['explained_variance']:.3f}, {logs[-1]}"
    )
    assert found >= 0.9
    assert figures["l0"] == pytest.approx(2, abs=0.3), "features fire as often alone as in training"
    assert logs[-1].l0 == pytest.approx(2, abs=0.3)
    assert sae.header["settings"]["architecture"] == name
    assert bool((sae.threshold > 0).all())
    assert (len(sae.threshold.unique()) == 1) == (name in ("batchtopk", "matryoshka"))


def test_topk_says_how_far_its_thresholds_are_from_the_k_largest(trained):
    """Planted vectors have more or fewer active directions than k, so that here much of the k largest is filling."""
    measured = trained[2]["topk"][0].header["calibration"]
    assert measured["vectors"] > measured["held_out"] > 0
    assert measured["l0"] == pytest.approx(measured["l0_source"], rel=0.1)
    assert 0 < measured["disagreement"] < 0.6
    assert measured["explained_variance"] < measured["explained_variance_source"]


def test_the_first_features_of_a_matryoshka_reconstruct_more_than_those_of_batchtopk(trained):
    _, x, made = trained
    left = {}
    for name in ("batchtopk", "matryoshka"):
        sae = made[name][0]
        z = sae.encode(x)
        z[:, 32:] = 0
        left[name] = float((x - sae.decode(z)).square().sum() / (x - x.mean(0)).square().sum())
    assert left["matryoshka"] < left["batchtopk"] - 0.1


def test_prefixes():
    assert nested_sizes(2048) == (128, 256, 512, 1024, 2048)
    assert nested_sizes(12) == (1, 3, 6, 12)
    assert nested_sizes(1) == (1,)


@pytest.mark.parametrize(("k", "block"), [(1, 2**20), (3, 2**20), (3, 64), (20, 2**20)])
def test_topk_keeps_the_positive_of_the_k_largest(k, block, monkeypatch):
    monkeypatch.setattr(sparse_ops, "PRE_ACTIVATIONS_AT_ONCE", block)
    pre = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)) - 1
    pre[4] = -1
    fired = select_rows(lambda rows: pre[rows], 30, 20, k)
    want = (pre >= pre.sort(1, descending=True).values[:, k - 1 : k]) & (pre > 0)
    rows, cols = want.nonzero().unbind(1)
    assert torch.equal(fired.values, pre[want]) and torch.equal(fired.cols, cols)
    assert torch.equal(rows[fired.order], fired.rows_by_col)
    least = torch.stack([row[on].min() for row, on in zip(pre, want, strict=True) if on.any()])
    assert mean_smallest(fired) == pytest.approx(float(least.mean()))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_bfloat16_learns_as_well(name):
    """With both terms for labels, which are whether a vector points along an axis."""
    stream = labelled_batches(BANK[:, None], BANK[:, :2] > 0, 96)
    fvu = []
    for bf16 in (False, True):
        logs: list[StepLog] = []
        settings = chosen(name, steps=40, log_every=40, bf16=bf16, binding_weight=0.1, contrast_weight=0.01)
        assert train(stream, settings, on_step=logs.append).W_dec.dtype == torch.float32
        assert logs[0].bind > 0 and logs[0].contrast > 0
        fvu.append(logs[0].fvu)
    assert fvu[1] == pytest.approx(fvu[0], rel=0.15)


def test_all_features_may_fire():
    for name in OTHERS:
        sae = train(STREAM, chosen(name, n_features=8, k=8, steps=2))
        assert bool(torch.isfinite(sae.W_dec).all())


class Killed(BaseException):
    """Not an Exception, so that nothing catches it by the way."""


@pytest.mark.parametrize("name", OTHERS)
def test_killed_and_resumed_it_ends_in_the_same_bits(name, tmp_path):
    settings, path = chosen(name), tmp_path / "run.safetensors"
    want = train(STREAM, settings)

    def dying(step: int) -> Iterator[Tensor]:
        for i, x in enumerate(STREAM(step)):
            if step + i == 9:
                raise Killed
            yield x

    with pytest.raises(Killed):
        train(dying, settings, checkpoint=path)
    for _ in range(2):  # the second finds it finished
        got = train(STREAM, settings, checkpoint=path)
        assert all(torch.equal(p, q) for p, q in zip(got.parameters(), want.parameters(), strict=True))
        assert got.header == want.header


def test_a_checkpoint_of_another_architecture_is_refused_and_one_from_before_there_were_others_is_not(tmp_path):
    path = tmp_path / "run.safetensors"
    want = train(STREAM, SMALL, checkpoint=path)
    with pytest.raises(SettingsError, match="architecture = 'batchtopk', not 'topk'"):
        train(STREAM, chosen("topk"), checkpoint=path)
    tensors, header = tensor_file.load(path, "sae-training")
    for name in ("architecture", "binding_weight", "contrast_weight"):
        del header["settings"][name]
    del header["concepts"]
    tensor_file.save(path, "sae-training", tensors, header)
    assert torch.equal(train(STREAM, SMALL, checkpoint=path).W_enc, want.W_enc)


def test_learnt_thresholds_scale_with_the_data():
    one, other = (train(pool_batches(BANK * c, 96), chosen("jumprelu", steps=40)) for c in (1.0, 1e4))
    assert len(one.threshold.unique()) > 1
    torch.testing.assert_close(other.threshold / 1e4, one.threshold, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(other(BANK * 1e4) / 1e4, one(BANK), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("name", OTHERS)
def test_bad_input_is_refused(name):
    with pytest.raises(SettingsError, match="k is 49 but there are only n = 48 features"):
        chosen(name, k=49)
    with pytest.raises(DataError, match="empty"):
        train(lambda step: iter(()), chosen(name))
    bad = BANK[:96].clone()
    bad[3, 2] = float("nan")
    with pytest.raises(DataError, match="batch 1 holds 1 NaN or infinite values of 1536"):
        train(lambda step: iter((BANK[:96], bad)[step:]), chosen(name, init_vectors=96))


def test_the_kernels_train_what_selects_as_they_do():
    kernels = {name: architecture_named(name).kernel for name in ARCHITECTURES}
    assert kernels == {"batchtopk": "batch", "topk": "row", "jumprelu": None, "matryoshka": None}


def test_unknown_architectures_are_refused():
    with pytest.raises(
        SettingsError, match="architecture is 'gated': pass one of batchtopk, topk, jumprelu, matryoshka"
    ):
        chosen("gated")
