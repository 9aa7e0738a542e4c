"""Every kernel gives what plain torch code gives; without a GPU they run through Triton's interpreter."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.planted import planted

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the kernels need triton, which CUDA builds of torch bring along")

from neuraleraser.errors import DataError, SettingsError
from neuraleraser.io import tensor_file
from neuraleraser.sae import TrainSettings, kernels, pool_batches, sparse_ops, train, train_step, training
from neuraleraser.sae.kernels import decode, select, update
from neuraleraser.sae.sparse_ops import Weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def naive_mask(pre: Tensor, k: int, per_row: bool) -> Tensor:
    """[B, n] bool: positive, and at least the k-th largest of the row or the (k * B)-th of all."""
    if per_row:
        cut = pre.sort(1, descending=True).values[:, k - 1 : k]
    else:
        cut = pre.flatten().sort(descending=True).values[k * len(pre) - 1]
    return (pre >= cut) & (pre > 0)


def matrix(kind: str) -> Tensor:
    x = normal(9, 43)
    shapes = {
        "normal": x,
        "large and small": x * torch.logspace(-30, 30, 43, device=DEVICE),
        "few positive": x - 1.6,
        "uneven rows": x + torch.linspace(-4, 2, 9, device=DEVICE)[:, None],
        "none": -x.abs(),
    }
    return shapes[kind]


@pytest.mark.parametrize("per_row", [False, True], ids=["batch", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["normal", "large and small", "few positive", "uneven rows", "none"])
def test_selection(kind, dtype, per_row):
    pre = matrix(kind).to(dtype)
    got = select.select(pre, 5, per_row)
    want = naive_mask(pre, 5, per_row)
    m = int(want.sum())
    rows, cols = want.nonzero().unbind(1)
    assert int(got.total) == m
    assert torch.equal(got.values[:m], pre[want].float())
    assert torch.equal(got.rows[:m].long(), rows)
    assert torch.equal(got.cols[:m].long(), cols)
    assert not got.values[m:].any() and bool((got.rows[m:] == 9).all()) and bool((got.cols[m:] == 43).all())
    assert torch.equal(got.row_start.diff().long(), want.sum(1))
    least = torch.where(want, pre.float(), torch.inf).amin(1)
    least = least[least < torch.inf]
    none = torch.zeros((), device=DEVICE)
    torch.testing.assert_close(got.cut, none if m == 0 else least.mean() if per_row else least.min())

    order = select.by_feature(got, 43)
    assert torch.equal(order.start.diff().long(), want.sum(0))
    assert torch.equal(order.rows[:m].long(), want.T.nonzero()[:, 1])
    assert torch.equal(order.values[:m], pre.T[want.T].float())


def test_more_equal_values_than_there_is_room_for():
    got = select.select(torch.ones(40, 1000, device=DEVICE), 2, per_row=False)
    room = len(got.values)
    assert 80 < room < 40 * 1000
    assert int(got.total) == room and bool((got.values == 1).all())
    assert torch.equal(got.row_start[:3].cpu(), torch.tensor([0, 1000, 1104], dtype=torch.int32))


def case(b: int = 14, n: int = 20, d: int = 13, k: int = 3) -> tuple[Weights, Tensor, select.Pairs, Tensor]:
    """(weights, into = x - b_dec [B, d], the pairs that fire, and as a matrix z [B, n]); feature 0 always fires."""
    rows = torch.nn.functional.normalize(normal(n, d, seed=1), dim=1)
    bias = 0.1 * normal(n, seed=2)
    bias[0] = 9
    w = Weights(normal(n, d, seed=3), bias, rows, 0.1 * normal(d, seed=4))
    into = normal(b, d, seed=5)
    pre = into @ w.W_enc.T + w.b_enc
    return w, into, select.select(pre, k, per_row=False), pre * naive_mask(pre, k, False)


@pytest.mark.parametrize("d", [1, 5, 16, 300])
def test_decoding(d):
    w, into, pairs, z = case(d=d)
    e, squares = decode.residual(into, w.W_dec, pairs)
    torch.testing.assert_close(e, into - z @ w.W_dec)
    torch.testing.assert_close(squares, e.square().sum())


def test_rows_are_held_as_two_powers_of_two():
    assert [update.tiles(d) for d in (1, 2, 3, 5, 128, 320, 1280, 3072)] == [
        (1, 1),
        (1, 1),
        (2, 1),
        (4, 1),
        (64, 64),
        (256, 64),
        (1024, 256),
        (2048, 1024),
    ]


@pytest.mark.parametrize("d", [1, 13])
@pytest.mark.parametrize("segment", [1024, 4], ids=["whole", "segments"])
def test_one_pass_from_residuals_to_weights(d, segment, monkeypatch):
    """Two steps, against gradients by autograd, torch's Adam, and the projection and normalisation written out."""
    monkeypatch.setattr(update, "SEGMENT", segment)
    w, into, pairs, z = case(d=d)
    assert int((z[:, 0] > 0).sum()) == 14, "a feature that is split"
    ours = [update.Moments(p.clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in w[:3]]
    theirs = [p.clone().requires_grad_() for p in w[:3]]
    adam = torch.optim.Adam(theirs, lr=0.03, eps=6.25e-10)
    clip = torch.tensor(0.7, device=DEVICE)
    for i in (1, 2):
        enc, bias, dec = theirs
        pre = into @ enc.T + bias
        value = (pre + (z - pre).detach()) * (z > 0)  # z's values, whatever the weights have become
        e = into - value @ dec
        grads = list(torch.autograd.grad(e.square().sum() * 0.05, theirs))
        to_bias = grads[1].clone()
        grads[2] -= (grads[2] * dec).sum(1, keepdim=True) * dec
        for p, g in zip(theirs, grads, strict=True):
            p.grad = (g * clip).detach()
        got_e, _ = decode.residual(into, ours[2].weight, pairs)
        got = update.update(
            got_e,
            into,
            select.by_feature(pairs, 20),
            -0.1,
            ours[0],
            ours[1],
            ours[2],
            update.Adam(0.03, i),
            clip,
        )
        torch.testing.assert_close(got[0], to_bias, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1], torch.stack([g.square().sum() for g in grads]).sum(), rtol=1e-4, atol=0)
        adam.step()
        with torch.no_grad():
            dec /= dec.norm(dim=1, keepdim=True)
        for o, t in zip(ours, theirs, strict=True):
            # Where a decoder row of one value is all there is, its gradient is rounding, which Adam makes a step.
            if d > 1 or o is not ours[2]:
                torch.testing.assert_close(o.first, adam.state[t]["exp_avg"], rtol=1e-3, atol=1e-6)
                torch.testing.assert_close(o.weight, t.detach(), rtol=1e-3, atol=1e-4)


_, BANK = planted(12, 6, 200, active=1, seed=0, strong=3.0)
SETTINGS = TrainSettings(
    n_features=12,
    k=1,
    steps=6,
    learning_rate=1e-3,
    dead_after=30,
    init_vectors=128,
    log_every=1,
    checkpoint_every=2,
    bf16=False,
)
STREAM = pool_batches(BANK.to(DEVICE), 15, seed=7)


@pytest.fixture
def on_kernels(monkeypatch):
    """The kernels take over on a CPU too."""
    monkeypatch.setattr(kernels, "usable", lambda x, settings, labelled: True)


@pytest.mark.parametrize("architecture", ["batchtopk", "topk"])
def test_training_is_that_of_the_cpu(architecture, on_kernels, monkeypatch):
    """Of a few steps, some with dead features."""
    chosen = dataclasses.replace(SETTINGS, architecture=architecture, steps=30)
    logs, want = [], []
    state = training._untrained_state(STREAM, chosen)
    twin = training._untrained_state(STREAM, chosen)
    first = [p.detach().clone() for p in twin.weights]
    for x, _ in zip(STREAM(0), range(5), strict=False):
        logs.append(train_step.train_step(state, x * state.scale, None, chosen)())
        with monkeypatch.context() as m:
            m.setattr(kernels, "usable", lambda x, settings, labelled: False)
            want.append(train_step.train_step(twin, x * twin.scale, None, chosen)())
    assert all(log.grad_norm < 1 for log in want), "clipping is not by the same norm"
    assert any(log.dead > 0 for log in want), "the revival must take part"
    for a, b in zip(logs, want, strict=True):  # Adam makes steps of what is rounding, where a gradient is next to 0
        assert dataclasses.asdict(a) == pytest.approx(dataclasses.asdict(b), rel=1e-2)
    for a, b, start in zip(state.weights, twin.weights, first, strict=True):
        moved, wanted = (a - start).detach().flatten(), (b - start).detach().flatten()
        assert float(torch.cosine_similarity(moved, wanted, 0)) > 0.9
    assert torch.equal(state.idle, twin.idle)


def test_low_products_are_near(on_kernels, monkeypatch):
    chosen = dataclasses.replace(SETTINGS, bf16=True)
    monkeypatch.setattr(train_step, "has_bf16", lambda: True)
    state, twin = (training._untrained_state(STREAM, chosen) for _ in range(2))
    x = next(STREAM(0)) * state.scale
    low = train_step.train_step(state, x, None, chosen)()
    monkeypatch.setattr(kernels, "usable", lambda x, settings, labelled: False)
    want = train_step.train_step(twin, x, None, chosen)()
    assert low.fvu == pytest.approx(want.fvu, rel=0.02) and low.grad_norm == pytest.approx(want.grad_norm, rel=0.05)
    assert low.l0 == want.l0


def test_a_checkpoint_of_the_kernels_is_resumed(on_kernels, tmp_path):
    path = tmp_path / "run.safetensors"
    whole = train(STREAM, SETTINGS)

    def dying(start: int):
        for i, x in enumerate(STREAM(start)):
            if start + i == 5:
                raise KeyboardInterrupt
            yield x

    with pytest.raises(KeyboardInterrupt):
        train(dying, SETTINGS, checkpoint=path)
    again = train(STREAM, SETTINGS, checkpoint=path)
    # What a run may forget, the norm that it clips by, it forgot.
    assert float(torch.cosine_similarity(again.W_dec, whole.W_dec).mean()) > 0.999
    assert float(again.threshold[0]) == pytest.approx(float(whole.threshold[0]), rel=0.05)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes in numpy, which warns of infinities
def test_divergence_is_told_when_the_log_is_read(on_kernels, tmp_path):
    opened = []

    def bad(start: int):
        opened.append(start)  # first to learn the data's scale
        for i, x in enumerate(STREAM(start)):
            yield x * (1e30 if len(opened) == 2 and start + i == 3 else 1)

    path = tmp_path / "run.safetensors"
    with pytest.raises(SettingsError, match="diverged at step 3"):
        train(bad, SETTINGS, checkpoint=path)
    assert bool(torch.isfinite(tensor_file.load(path, "sae-training")[0]["W_enc"]).all())


def test_bad_input_is_told_when_the_log_is_read(on_kernels, tmp_path, monkeypatch):
    """It does no harm until then, and names its batch."""
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    state = training._untrained_state(STREAM, SETTINGS)
    for i, x in zip(range(3), STREAM(0), strict=False):
        if i == 1:
            x = x.clone()
            x[3, 1] = torch.nan
        log = train_step.train_step(state, x * state.scale, None, SETTINGS)
    assert bool(torch.isfinite(state.weights.W_enc).all())
    with pytest.raises(DataError, match="batch 1 holds NaN"):
        log()

    opened = []

    def bad(start: int):
        opened.append(start)
        for i, x in enumerate(STREAM(start)):
            yield x + (torch.inf if len(opened) == 2 and start + i == 3 else 0)

    path = tmp_path / "run.safetensors"
    with pytest.raises(DataError, match="batch 3 holds NaN or infinite"):
        train(bad, dataclasses.replace(SETTINGS, log_every=100), checkpoint=path)
    tensors, header = tensor_file.load(path, "sae-training")
    assert header["step"] == 2 and bool(torch.isfinite(tensors["W_enc"]).all())


class Waits(TorchDispatchMode):
    """Names the operations for which a host has to wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        booleans = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if booleans or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "bincount"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_wait(on_kernels, monkeypatch):
    state = training._untrained_state(STREAM, SETTINGS)
    state.threshold = torch.zeros((), device=DEVICE)
    waited = []
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    for x, _ in zip(STREAM(0), range(5), strict=False):
        with Waits() as waits:
            log = train_step.train_step(state, x * state.scale, None, SETTINGS)
        waited.append(waits.seen)
        with Waits() as waits:
            log()
        assert waits.seen, "the log has to"
        assert waited[-1] == []
    assert bool((state.idle >= SETTINGS.dead_after).any()), "the revival must take part"
    monkeypatch.setattr(kernels, "usable", lambda x, settings, labelled: False)
    with Waits() as waits:
        train_step.train_step(state, next(STREAM(0)) * state.scale, None, SETTINGS)
    assert waits.seen, "the plain step does wait, and that is seen"


def test_what_the_kernels_are_for():
    x = torch.zeros(2, 3)
    assert not kernels.usable(x, SETTINGS, labelled=False), "not on a CPU"
    if torch.cuda.is_available():
        assert kernels.usable(x.cuda(), SETTINGS, labelled=False)
        assert not kernels.usable(x.cuda(), SETTINGS, labelled=True)
        assert not kernels.usable(x.cuda(), dataclasses.replace(SETTINGS, architecture="jumprelu"), labelled=False)


def test_the_plain_gradients_are_what_the_kernels_give():
    """The CPU's own sparse gradients, before projection and Adam, through one step of lr 0: moments are gradients."""
    w, into, pairs, _ = case()
    leaves = Weights(*(p.clone().requires_grad_() for p in w))
    m = int(pairs.total)
    flat = pairs.rows[:m].long() * 20 + pairs.cols[:m]
    squares, _ = sparse_ops.unexplained_at(
        leaves, into + w.b_dec, sparse_ops.fired_pairs(flat, pairs.values[:m], 14, 20), torch.float32
    )
    want = torch.autograd.grad(squares, leaves[:2])
    ours = [update.Moments(p.clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in w[:3]]
    e, _ = decode.residual(into, w.W_dec, pairs)
    one = torch.ones((), device=DEVICE)
    update.update(e, into, select.by_feature(pairs, 20), -2.0, ours[0], ours[1], ours[2], update.Adam(0.0, 1), one)
    for o, g in zip(ours[:2], want, strict=True):
        torch.testing.assert_close(o.first / 0.1, g, rtol=1e-4, atol=1e-4)
