"""Training an SAE: a function over a stream of activations, resumable to the bit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuraleraser import artifact
from neuraleraser.errors import DataError, FileError, SettingsError
from neuraleraser.sae.model import SAE
from neuraleraser.sae.settings import StepLog, TrainSettings
from neuraleraser.sae.sparse import Fired, Weights, reconstruct, select

Stream = Callable[[int], Iterator[Tensor]]
"""The batches [B, d] from a step on: a pure function of the step, so that training can resume anywhere."""

AUX_WEIGHT = 1 / 32  # Gao et al. 2024, Scaling and evaluating sparse autoencoders, appendix A.2
THRESHOLD_RATE = 0.01  # of the moving average of the cut
_CHECKPOINT = "sae-training"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # Adam's state for each tensor
_NUMBERS = ("scale", "variance", "threshold", "step")
_FREE = ("log_every", "checkpoint_every")  # settings that a resumed run may change


@dataclass
class _State:
    """All that a training run is at a step: what a checkpoint holds."""

    weights: Weights  # for scaled data
    optimiser: torch.optim.Adam
    idle: Tensor  # [n] int64, vectors since each feature last fired
    scale: float  # raw activations are multiplied by this
    variance: float  # mean ||x - mean||^2 of the first vectors, scaled
    threshold: float = 0.0
    step: int = 0


def train(
    batches: Stream,
    settings: TrainSettings,
    checkpoint: str | os.PathLike[str] | None = None,
    on_step: Callable[[StepLog], None] | None = None,
) -> SAE:
    """Train an SAE on the stream `batches(step) -> iterator of [B, d] raw activations, from that step on`.

    BatchTopK (Bussmann et al. 2024): of a batch the B * k largest pre-activations fire. The moving average of
    the smallest of them becomes the threshold of every feature, so that after training a feature fires alone.
    The loss is ||x - x_hat||^2 over the variance, plus 1/32 of the revival loss for dead features. Training
    runs on data scaled to E||x||^2 = d; the scale is folded into the weights that are returned.

    With `checkpoint`, a file is written every `settings.checkpoint_every` steps and at the end; where it
    exists already, training goes on from it, and on a CPU ends in the bits of a run that was never stopped
    (equal thread count). Runs on the device of the batches, draws nothing from global random state.

    Raises DataError for NaN or infinity, a batch that is not [B, d] with one d throughout, a stream that is
    empty or ends early; SettingsError for settings other than the checkpoint's, or divergence; FileError
    for a damaged checkpoint.
    """
    path = None if checkpoint is None else Path(checkpoint)
    state = _resume(path, settings) if path is not None and path.exists() else _start(batches, settings)
    d = len(state.weights.b_dec)
    if state.step < settings.steps:
        stream = batches(state.step)
        while state.step < settings.steps:
            x = _next(stream, state.step, d, settings.steps)
            if x.device != state.idle.device:  # resumed: the file was read on the CPU
                state = _moved(state, x.device)
            log = _step(state, x * state.scale, settings)
            if on_step and (state.step % settings.log_every == 0 or state.step == settings.steps):
                on_step(log)
            if path and (state.step % settings.checkpoint_every == 0 or state.step == settings.steps):
                _write(path, state, settings)
        _close(stream)
    return _fold(state, settings)


def revival_loss(w: Weights, x: Tensor, residual: Tensor, dead: Tensor, k_aux: int, low: torch.dtype) -> Tensor:
    """||e - e_hat||^2 / ||e||^2 (scalar), where e = `residual` [B, d] = x - x_hat, held fixed, and e_hat is
    what the k_aux largest pre-activations of each vector among the `dead` features [m] decode to, without
    b_dec. Large products are made in dtype `low`.

    AuxK of Gao et al. 2024. It teaches dead features, and only them, to add what is missing. Values are taken
    with their sign: after a ReLU, a feature that is negative everywhere would have no gradient to return by.
    """
    e = residual.detach()
    into = (x - w.b_dec.detach()).to(low)
    pre = (into @ w.W_enc[dead].to(low).T).to(x.dtype) + w.b_enc[dead]
    if k_aux < len(dead):
        values, cols = pre.topk(k_aux, dim=1, sorted=False)
        pre = torch.zeros_like(pre).scatter(1, cols, values)
    e_hat = (pre.to(low) @ w.W_dec[dead].to(low)).to(x.dtype)
    return (e - e_hat).square().sum() / e.square().sum().clamp_min(torch.finfo(x.dtype).tiny)


def losses(
    w: Weights, x: Tensor, fired: Fired, variance: float, dead: Tensor, k_aux: int, low: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(mean ||x - x_hat||^2 / variance, revival loss or 0) of scaled activations x [B, d], both scalars."""
    residual = x - reconstruct(w, x, fired)
    main = residual.square().sum() / (len(x) * variance)
    if len(dead) == 0 or k_aux == 0:
        return main, main.new_zeros(())
    # All dead features at once would be a linear autoencoder, and learn mixtures of what is missing. In a trial
    # (64 planted directions) 14 % stayed dead with up to d / 2 of them, 3 % with at most an eighth.
    return main, revival_loss(w, x, residual, dead, min(k_aux, max(1, len(dead) // 8)), low)


def _step(state: _State, x: Tensor, settings: TrainSettings) -> StepLog:
    """One step on scaled activations x [B, d]; alters `state` in place."""
    w, b, n = state.weights, len(x), settings.n
    low = torch.bfloat16 if settings.bf16 else x.dtype
    with torch.no_grad():
        into, w_enc, b_enc = (x - w.b_dec).to(low), w.W_enc.to(low).T, w.b_enc.to(low)
        fired = select(lambda rows: torch.addmm(b_enc, into[rows], w_enc), b, n, b * settings.k)
        state.idle = torch.where(fired.counts > 0, 0, state.idle + b)
        dead = (state.idle >= settings.dead_after).nonzero().squeeze(1)

    k_aux = x.shape[1] // 2 if settings.k_aux is None else settings.k_aux
    main, aux = losses(w, x, fired, state.variance, dead, k_aux, low)
    grads = torch.autograd.grad(main + AUX_WEIGHT * aux, w)
    main, aux = main.detach(), aux.detach()
    for p, grad in zip(w, grads, strict=True):
        p.grad = grad
    with torch.no_grad():
        # What only lengthens a decoder row is undone by the normalisation below, but would mislead Adam.
        grads[2].sub_((grads[2] * w.W_dec).sum(1, keepdim=True) * w.W_dec)
        norm = float(torch.nn.utils.clip_grad_norm_(w, 1.0))
        if not math.isfinite(norm):
            raise SettingsError(f"training diverged at step {state.step} (gradient {norm}): lower lr")
        lr = settings.lr_at(state.step, x.shape[1])
        state.optimiser.param_groups[0]["lr"] = lr
        state.optimiser.step()
        w.W_dec.div_(w.W_dec.norm(dim=1, keepdim=True))

    if len(fired.values):
        rate = min(1.0, max(THRESHOLD_RATE, 10 / (state.step + 1)))  # faster at first, when the cut moves
        state.threshold += rate * (float(fired.values.min()) - state.threshold)
    state.step += 1
    return StepLog(
        step=state.step,
        vectors=b,
        fvu=float(main),
        aux=float(aux),
        l0=len(fired.values) / b,
        dead=len(dead) / n,
        threshold=state.threshold,
        lr=lr,
        grad_norm=norm,
    )


def _start(batches: Stream, settings: TrainSettings) -> _State:
    """The state before the first step: scale and bias from the first vectors, the rest from the seed."""
    sample = _first_vectors(batches, settings)
    d = sample.shape[1]
    power = float(sample.double().square().sum(1).mean())
    variance = float((sample.double() - sample.double().mean(0)).square().sum(1).mean())
    if not variance > 1e-12 * power:
        raise DataError(f"the first {len(sample)} activations are all the same vector: nothing to learn")
    scale = math.sqrt(d / power)
    g = torch.Generator().manual_seed(settings.seed)
    rows = torch.nn.functional.normalize(torch.randn(settings.n, d, generator=g), dim=1).to(sample.device)
    w = Weights(rows.clone(), rows.new_zeros(settings.n), rows, geometric_median(sample * scale))
    idle = torch.zeros(settings.n, dtype=torch.int64, device=sample.device)
    return _State(w, _optimiser(w), idle, scale, variance * scale**2)


def _optimiser(w: Weights) -> torch.optim.Adam:
    """Adam over the weights, which become leaves; the learning rate is set at every step."""
    for p in w:
        p.requires_grad_()
    return torch.optim.Adam(list(w), lr=0.0, eps=6.25e-10, fused=True)


def geometric_median(x: Tensor, rounds: int = 50) -> Tensor:
    """The point [d] of least summed distance to the rows of x [N, d] (Weiszfeld's iteration)."""
    at = x.mean(0)
    for _ in range(rounds):
        weight = 1 / (x - at).norm(dim=1).clamp_min(1e-8 * float(x.abs().max()) + 1e-30)
        new = (weight @ x) / weight.sum()
        done = float((new - at).norm()) <= 1e-6 * float(at.norm())
        at = new
        if done:
            break
    return at


def _fold(state: _State, settings: TrainSettings) -> SAE:
    """The SAE for raw activations: with x = x_scaled / s, features fire alike and z = z_scaled / s."""
    w, s = state.weights, state.scale
    header = {"settings": asdict(settings), "data_scale": s, "steps": state.step}
    threshold = torch.full_like(w.b_enc, state.threshold / s)
    return SAE(w.W_enc, w.b_enc / s, w.W_dec, w.b_dec / s, threshold, header)


def _first_vectors(batches: Stream, settings: TrainSettings) -> Tensor:
    """Up to `init_vectors` vectors [N, d] float32 from the start of the stream."""
    parts: list[Tensor] = []
    stream = batches(0)
    while sum(map(len, parts)) < settings.init_vectors and len(parts) < settings.steps:
        d = parts[0].shape[1] if parts else None
        parts.append(_next(stream, len(parts), d, settings.steps))
    _close(stream)
    return torch.cat(parts)[: settings.init_vectors]


def _next(stream: Iterator[Tensor], step: int, d: int | None, steps: int) -> Tensor:
    """The batch of this step, [B, d] float32, checked."""
    x = next(stream, None)
    if x is None:
        if step == 0:
            raise DataError("the stream of activations is empty: pass at least one batch [B, d]")
        raise DataError(f"the stream ended after {step} batches: pass a longer one, or fewer steps than {steps}")
    if x.ndim != 2 or 0 in x.shape or (d is not None and x.shape[1] != d):
        raise DataError(f"batch {step} has shape {tuple(x.shape)}: expected [B, {d or 'd'}] with B > 0")
    if bad := int((~torch.isfinite(x)).sum()):
        raise DataError(f"batch {step} holds {bad} NaN or infinite values of {x.numel()}: mend their source")
    return x.detach().float()


def _close(stream: Iterator[Tensor]) -> None:
    """Let a generator run its clean-up now; other iterators have none."""
    close = getattr(stream, "close", None)
    if close:
        close()


def _tensors(state: _State) -> dict[str, Tensor]:
    """Every tensor of the state by name."""
    tensors = {"idle": state.idle}
    for name, p in state.weights._asdict().items():
        tensors |= {name: p.detach()} | {f"{name}.{m}": state.optimiser.state[p][m] for m in _MOMENTS}
    return tensors


def _rebuilt(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> _State:
    """The state that these tensors and numbers were taken from."""
    w = Weights(*(tensors[name] for name in Weights._fields))
    optimiser = _optimiser(w)
    for name, p in w._asdict().items():
        optimiser.state[p] = {m: tensors[f"{name}.{m}"] for m in _MOMENTS}
    return _State(w, optimiser, tensors["idle"], **{name: numbers[name] for name in _NUMBERS})


def _moved(state: _State, device: torch.device) -> _State:
    """The same state on another device."""
    return _rebuilt({name: x.to(device) for name, x in _tensors(state).items()}, vars(state))


def _write(path: Path, state: _State, settings: TrainSettings) -> None:
    """Write the whole state to `path`, in one piece or not at all."""
    header = {"settings": asdict(settings)} | {name: getattr(state, name) for name in _NUMBERS}
    artifact.save(path, _CHECKPOINT, _tensors(state), header)


def _resume(path: Path, settings: TrainSettings) -> _State:
    """The state that `_write` wrote, on the CPU."""
    tensors, header = artifact.load(path, _CHECKPOINT)
    asked, was = asdict(settings), header.get("settings")
    if not isinstance(was, dict):
        raise FileError(f"{path} names no settings, so it is no checkpoint: delete it to start over")
    changed = [key for key in asked if key not in _FREE and was.get(key) != asked[key]]
    other = [f"{key} = {was.get(key)!r}, not {asked[key]!r}" for key in changed]
    if other:
        raise SettingsError(f"{path} was made with {'; '.join(other)}: pass those, or another checkpoint")
    try:
        state = _rebuilt(tensors, header)
        if not 0 < state.step <= settings.steps:
            raise ValueError(f"step {state.step}")
        # Checked to the last tensor: the fused optimiser trusts shapes.
        n, d = settings.n, len(state.weights.b_dec)
        shapes = {"idle": (n,)}
        for name, shape in zip(Weights._fields, ((n, d), (n,), (n, d), (d,)), strict=True):
            shapes |= {name: shape, f"{name}.exp_avg": shape, f"{name}.exp_avg_sq": shape, f"{name}.step": ()}
        for name, shape in shapes.items():
            dtype = torch.int64 if name == "idle" else torch.float32
            if tensors[name].shape != shape or tensors[name].dtype != dtype:
                raise ValueError(f"tensor {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}")
    except (KeyError, TypeError, ValueError) as e:
        raise FileError(f"{path} is not a whole checkpoint ({e}): delete it to start over") from e
    return state
