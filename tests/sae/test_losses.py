"""What is trained, of every architecture and loss term, has the gradients of its formula, in float64.

`compare` holds ours to the formula written out densely, whose own gradients are held to finite differences. Every
check is run once more with one sign turned around inside, and must then fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from neuraleraser.sae import TrainSettings, sparse_ops, supervised
from neuraleraser.sae.architectures import jumprelu, matryoshka
from neuraleraser.sae.architectures.architecture import architecture_named
from neuraleraser.sae.losses import labelled_losses
from neuraleraser.sae.sparse_ops import Weights

B, N, D, K = 8, 12, 5, 3
VARIANCE = 2.0
EPS = jumprelu.KERNEL_WIDTH * math.sqrt(D / K)
LABELS = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 1], [0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights() -> Weights:
    rows = torch.nn.functional.normalize(normal(N, D, seed=1), dim=1)
    return Weights(*(p.requires_grad_() for p in (normal(N, D), normal(N), rows, normal(D))))


X = normal(B, D, seed=7)
LOG_THRESHOLD = 0.3 * normal(N, seed=8)


def compare(ours: Callable[..., Tensor], formula: Callable[..., Tensor], at: tuple[Tensor, ...]) -> None:
    """AssertionError unless the two have one value and the same gradients, which finite differences confirm."""
    torch.testing.assert_close(ours(*at), formula(*at))
    assert torch.autograd.gradcheck(formula, at)
    got, want = (torch.autograd.grad(f(*at), at, allow_unused=True) for f in (ours, formula))
    for a, b in zip(got, want, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, check_dtype=False)


def trained(architecture: str) -> Callable[..., Tensor]:
    settings, own = (
        TrainSettings(n_features=N, k=K, steps=1, architecture=architecture),
        {jumprelu.LOG_THRESHOLD: LOG_THRESHOLD},
    )
    forward = architecture_named(architecture).forward
    return lambda *w: forward(Weights(*w), own, X, VARIANCE, settings, torch.float64).loss


def written_out(architecture: str) -> Callable[..., Tensor]:
    def value(w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor) -> Tensor:
        pre = (X - b_dec) @ w_enc.T + b_enc
        positive, penalty, sizes = pre.relu(), 0.0, [N]
        if architecture == "topk":
            on = positive >= positive.sort(1, descending=True).values[:, K - 1 : K]
        elif architecture == "jumprelu":
            on = pre > LOG_THRESHOLD.exp()
            penalty = (on.sum().double() / B / K - 1) ** 2
        else:
            on = positive >= positive.flatten().sort(descending=True).values[B * K - 1]
        z = positive * on
        if architecture == "matryoshka":
            sizes = [1, 3, 6, 12]
        each = [(X - z[:, :m] @ w_dec[:m] - b_dec).square().sum() / B / VARIANCE for m in sizes]
        return sum(each, torch.zeros(())) / len(each) + penalty

    return value


def check_architecture(name: str) -> None:
    compare(trained(name), written_out(name), tuple(weights()))


def check_thresholds() -> None:
    """The estimators are central differences over the kernel's width: exactly so for L0, and for z where the value
    lost at the threshold is theta."""
    pre, theta, up = normal(40, N, seed=3).mul(0.5).add(1), (0.3 * normal(N, seed=4)).exp(), normal(40, N, seed=5)
    theta.requires_grad_()
    near = ((pre - theta).abs() < EPS / 2).sum(0)
    assert int(near.sum()) > 20
    higher, lower = ((pre > theta + side * EPS / 2).double() for side in (1, -1))
    (to_count,) = torch.autograd.grad(jumprelu.mean_l0(pre, theta, EPS), theta)
    torch.testing.assert_close(to_count, (higher - lower).sum(0) / EPS / 40)
    (to_fire,) = torch.autograd.grad((up * jumprelu.jump_relu(pre, theta, EPS)).sum(), theta)
    torch.testing.assert_close(to_fire, (up * theta * (higher - lower)).sum(0) / EPS)


def check_thresholds_in_the_loss() -> None:
    """log_threshold's gradient of the whole loss: that of steps made smooth, which weigh values at theta."""
    at = (*weights(), LOG_THRESHOLD.clone().requires_grad_())

    def ours(*p: Tensor) -> Tensor:
        residual, penalty, _ = jumprelu.jump_losses(Weights(*p[:4]), p[4], X, K, torch.float64)
        return residual.square().sum() + penalty

    def smooth(w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor, own: Tensor) -> Tensor:
        pre, theta = (X - b_dec) @ w_enc.T + b_enc, own.exp()
        ramp = ((pre.detach() - theta) / EPS + 0.5).clamp(0, 1)
        ramp = ramp - ramp.detach()  # 0, with the gradient of a ramp
        on = (pre > theta).double()
        z = pre * on + theta.detach() * ramp
        penalty = ((on + ramp).sum() / B / K - 1) ** 2
        return (X - z @ w_dec - b_dec).square().sum() + penalty

    got, want = (torch.autograd.grad(f(*at), at) for f in (ours, smooth))
    torch.testing.assert_close(got, want)
    assert bool((got[4] != 0).any())


def binding(pre: Tensor, labels: Tensor, cut: float) -> Tensor:
    """The formula, one map and one concept at a time."""
    size, terms = len(pre) // len(labels), []
    for c in range(labels.shape[1]):
        hit, miss = [], []
        for m, row in enumerate(labels):
            v = pre[m * size : (m + 1) * size, c].max() - cut
            (hit if row[c] else miss).append(-logsigmoid(v if row[c] else -v))
        terms.append((torch.stack(hit).mean() + torch.stack(miss).mean()) / 2)
    return torch.stack(terms).mean()


def contrast(pre: Tensor, labels: Tensor) -> Tensor:
    """The formula, one pair at a time."""
    size, rows = len(pre) // len(labels), [tuple(row) for row in labels.tolist()]
    r = [pre[i * size : (i + 1) * size].relu().mean(0) for i in range(len(rows))]
    r = [v / v.norm() for v in r]

    def weight(a: tuple[int, ...], b: tuple[int, ...]) -> float:
        return 4.0 if a != b and any(p and q for p, q in zip(a, b, strict=True)) else 1.0

    terms = []
    for i, mine in enumerate(rows):
        others = [a for a in range(len(rows)) if a != i]
        partners = [p for p in others if rows[p] == mine and any(mine)]
        below = torch.stack([weight(mine, rows[a]) * (r[i] @ r[a] / 0.07).exp() for a in others]).sum()
        if partners:
            terms.append(-torch.stack([((r[i] @ r[p] / 0.07).exp() / below).log() for p in partners]).mean())
    return torch.stack(terms).mean()


def check_label_term(name: str, size: int) -> None:
    """Both terms for maps of `size` vectors, by the pre-activations and through the weights."""
    terms = {"binding_weight": float(name == "bind"), "contrast_weight": float(name == "contrast")}
    settings = TrainSettings(n_features=N, k=K, steps=1, **terms)
    x, w = normal(len(LABELS) * size, D, seed=9), weights()
    at = (w.W_enc, w.b_enc)

    def formula(w_enc: Tensor, b_enc: Tensor) -> Tensor:
        pre = (x - w.b_dec.detach()) @ w_enc.T + b_enc
        return binding(pre, LABELS, 0.4) if name == "bind" else contrast(pre, LABELS)

    def ours(w_enc: Tensor, b_enc: Tensor) -> Tensor:
        return sum(labelled_losses(Weights(w_enc, b_enc, *w[2:]), x, LABELS, 0.4, settings, torch.float64))  # pyright: ignore

    compare(ours, formula, at)
    assert torch.autograd.grad(ours(*at), w[2:], allow_unused=True) == (None, None), "not the decoder's to learn"


CHECKS: dict[str, Callable[[], None]] = {
    "batchtopk": lambda: check_architecture("batchtopk"),
    "topk": lambda: check_architecture("topk"),
    "jumprelu": lambda: check_architecture("jumprelu"),
    "matryoshka": lambda: check_architecture("matryoshka"),
    "thresholds": check_thresholds,
    "thresholds in the loss": check_thresholds_in_the_loss,
    "bind": lambda: check_label_term("bind", 1),
    "bind maps": lambda: check_label_term("bind", 3),
    "contrast": lambda: check_label_term("contrast", 1),
    "contrast maps": lambda: check_label_term("contrast", 3),
}


@pytest.mark.parametrize("name", CHECKS)
def test_gradients(name):
    CHECKS[name]()


FLIPS = [
    ("batchtopk", sparse_ops._Unexplained, "backward"),
    ("topk", sparse_ops._Unexplained, "backward"),
    ("matryoshka", sparse_ops._EncodeAt, "backward"),
    ("matryoshka", sparse_ops._Decode, "backward"),
    ("matryoshka", matryoshka, "decode_at"),
    ("jumprelu", jumprelu._Fire, "backward"),
    ("thresholds", jumprelu._Fire, "backward"),
    ("thresholds", jumprelu._Count, "backward"),
    ("thresholds in the loss", jumprelu._Count, "backward"),
    ("bind", supervised, "softplus"),
    ("bind maps", supervised, "softplus"),
    ("contrast", supervised, "TEMPERATURE"),
    ("contrast maps", supervised, "normalize"),
]


@pytest.mark.parametrize(("name", "where", "what"), FLIPS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_flipped_sign_is_found(name, where, what, monkeypatch):
    """Backward functions return the opposite; softplus gets it; a decoded part, or a pooled vector, is subtracted."""
    right = getattr(where, what)

    def negated(*args, **kwargs):
        if what == "softplus":
            return right(-args[0])
        out = right(*args, **kwargs)
        if what == "normalize":  # r_i r_p stays the same for -r: turn one of them
            return torch.cat([-out[:1], out[1:]])
        return tuple(None if g is None else -g for g in out) if isinstance(out, tuple) else -out

    wrong = -right if isinstance(right, float) else staticmethod(negated) if isinstance(where, type) else negated
    monkeypatch.setattr(where, what, wrong)
    with pytest.raises(AssertionError):
        CHECKS[name]()
