"""Training an SAE: a function over a stream of activations, resumable to the bit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuraleraser import artifact
from neuraleraser.errors import DataError, FileError, SettingsError
from neuraleraser.sae import kernels
from neuraleraser.sae.jumprelu import first_log_threshold
from neuraleraser.sae.labelled import check_labels, concept_directions
from neuraleraser.sae.model import SAE
from neuraleraser.sae.settings import StepLog, TrainSettings
from neuraleraser.sae.sparse import Weights
from neuraleraser.sae.steps import State as _State
from neuraleraser.sae.steps import step as _step
from neuraleraser.sae.topk import calibrated

Stream = Callable[[int], Iterator[Tensor | tuple[Tensor, Tensor]]]
"""The batches x [B, d], or (x, labels [M, C]), from a step on: a pure function of the step, so that training can
resume anywhere. Labels of 0 and 1 say what M maps of B / M consecutive vectors show."""

_CHECKPOINT = "sae-training"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # Adam's state for each tensor
_NUMBERS = ("scale", "variance", "threshold", "step")
_FREE = ("log_every", "checkpoint_every")  # settings that a resumed run may change


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
    runs on data scaled to E||x||^2 = d; the scale is folded into the weights that are returned. Other
    architectures (`settings.architecture`) end in the same SAE: JumpReLU has learnt its thresholds, TopK's are set
    last, so that each feature fires as often on the first vectors of the stream, which is read again for it.

    With `settings.bind` or `settings.contrast` the stream yields (x, labels [M, C]), one row of labels for every
    B / M consecutive vectors, and their losses (`labelled.py`) are added: feature c then belongs to concept c, for
    the C first features. `header["concepts"]` says how many there are.

    With `checkpoint`, a file is written every `settings.checkpoint_every` steps and at the end; where it
    exists already, training goes on from it, and on a CPU ends in the bits of a run that was never stopped
    (equal thread count). Runs on the device of the batches, draws nothing from global random state.

    Raises DataError for NaN or infinity, a batch that is not [B, d] with one d throughout, labels that are missing
    or do not fit, a stream that is empty or ends early; SettingsError for settings other than the checkpoint's, or
    divergence; FileError for a damaged checkpoint.
    """
    path = None if checkpoint is None else Path(checkpoint)
    state = _resume(path, settings) if path is not None and path.exists() else _start(batches, settings)
    d = len(state.weights.b_dec)
    if state.step < settings.steps:
        stream = batches(state.step)
        while state.step < settings.steps:
            x, labels = _next(stream, state.step, d, settings, state.concepts)
            if x.device != state.idle.device:  # resumed: the file was read on the CPU
                state = _moved(state, x.device)
            log = _step(state, x * state.scale, labels, settings)
            last = state.step == settings.steps
            if last or state.step % settings.log_every == 0:
                told = log()  # also where nobody listens: on a GPU divergence is noticed here
                if on_step:
                    on_step(told)
            if path and (last or state.step % settings.checkpoint_every == 0):
                _write(path, state, settings)
        _close(stream)
    if settings.architecture != "topk":
        return _fold(state, settings)
    sample, _ = _first_vectors(batches, settings)
    return calibrated(_unscaled(_moved(state, sample.device)), settings.k, sample, _header(state, settings))


def _start(batches: Stream, settings: TrainSettings) -> _State:
    """The state before the first step: scale and bias from the first vectors, the rest from the seed."""
    sample, labels = _first_vectors(batches, settings)
    d = sample.shape[1]
    power = float(sample.double().square().sum(1).mean())
    variance = float((sample.double() - sample.double().mean(0)).square().sum(1).mean())
    if not variance > 1e-12 * power:
        raise DataError(f"the first {len(sample)} activations are all the same vector: nothing to learn")
    scale = math.sqrt(d / power)
    g = torch.Generator().manual_seed(settings.seed)
    rows = torch.nn.functional.normalize(torch.randn(settings.n, d, generator=g), dim=1).to(sample.device)
    w = Weights(rows.clone(), rows.new_zeros(settings.n), rows, geometric_median(sample * scale))
    concepts = 0 if labels is None else labels.shape[1]
    if labels is not None and settings.bind:
        toward = concept_directions(sample, labels, rows[:concepts])
        w.W_enc[:concepts], w.W_dec[:concepts] = toward, toward
    own = first_log_threshold(w, sample * scale, settings.k) if settings.architecture == "jumprelu" else None
    idle = torch.zeros(settings.n, dtype=torch.int64, device=sample.device)
    optimiser = _optimiser([*w] if own is None else [*w, own])
    return _State(w, optimiser, idle, scale, variance * scale**2, concepts=concepts, log_threshold=own)


def _optimiser(learnt: Iterable[Tensor]) -> torch.optim.Adam:
    """Adam over what is learnt, which become leaves; the learning rate is set at every step."""
    learnt = [p.requires_grad_() for p in learnt]
    return torch.optim.Adam(learnt, lr=0.0, eps=6.25e-10, fused=True)


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
    own, s = state.log_threshold, state.scale
    threshold = torch.full_like(state.weights.b_enc, float(state.threshold) / s) if own is None else own.exp() / s
    return SAE(*_unscaled(state), threshold, _header(state, settings))


def _unscaled(state: _State) -> Weights:
    """The weights for raw activations."""
    w, s = state.weights, state.scale
    return Weights(w.W_enc, w.b_enc / s, w.W_dec, w.b_dec / s)


def _header(state: _State, settings: TrainSettings) -> dict[str, Any]:
    """What a trained SAE says about itself."""
    header = {"settings": asdict(settings), "data_scale": state.scale, "steps": state.step}
    return header | ({"concepts": state.concepts} if settings.bind else {})


def _first_vectors(batches: Stream, settings: TrainSettings) -> tuple[Tensor, Tensor | None]:
    """Up to `init_vectors` vectors [N, d] float32 from the start of the stream, and their labels [N, C], if any."""
    parts: list[Tensor] = []
    known: list[Tensor] = []
    stream = batches(0)
    while sum(map(len, parts)) < settings.init_vectors and len(parts) < settings.steps:
        d = parts[0].shape[1] if parts else None
        x, labels = _next(stream, len(parts), d, settings, known[0].shape[1] if known else 0, wait=True)
        parts.append(x)
        if labels is not None:
            known.append(labels.repeat_interleave(len(x) // len(labels), 0))
    _close(stream)
    vectors = settings.init_vectors
    return torch.cat(parts)[:vectors], torch.cat(known)[:vectors] if known else None


def _next(
    stream: Iterator[Tensor | tuple[Tensor, Tensor]],
    step: int,
    d: int | None,
    settings: TrainSettings,
    concepts: int,
    wait: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The batch of this step, [B, d] float32, and its labels [M, C] where training is labelled; checked."""
    item, steps = next(stream, None), settings.steps
    if isinstance(item, (tuple, list)) and len(item) != 2:  # a list is what a DataLoader makes of a pair
        raise DataError(f"batch {step} is {len(item)} values: pass activations [B, d], or (x [B, d], labels [M, C])")
    x, labels = item if isinstance(item, (tuple, list)) else (item, None)
    if x is None:
        if step == 0:
            raise DataError("the stream of activations is empty: pass at least one batch [B, d]")
        raise DataError(f"the stream ended after {step} batches: pass a longer one, or fewer steps than {steps}")
    if x.ndim != 2 or 0 in x.shape or (d is not None and x.shape[1] != d):
        raise DataError(f"batch {step} has shape {tuple(x.shape)}: expected [B, {d or 'd'}] with B > 0")
    # A host would wait for a GPU here: there, `steps.step` looks.
    if (wait or not kernels.on_gpu(x)) and (bad := int((~torch.isfinite(x)).sum())):
        raise DataError(f"batch {step} holds {bad} NaN or infinite values of {x.numel()}: mend their source")
    if not (settings.bind or settings.contrast):
        return x.detach().float(), None
    if labels is None:
        raise DataError(f"batch {step} has no labels: labelled training takes a stream of (x [B, d], labels [M, C])")
    check_labels(labels, len(x), settings.n, concepts or None, step)
    return x.detach().float(), labels.to(x.device)


def _close(stream: Iterator[Any]) -> None:
    """Let a generator run its clean-up now; other iterators have none."""
    close = getattr(stream, "close", None)
    if close:
        close()


def _tensors(state: _State) -> dict[str, Tensor]:
    """Every tensor of the state by name."""
    tensors = {"idle": state.idle}
    for name, p in state.parameters().items():
        tensors |= {name: p.detach()} | {f"{name}.{m}": state.optimiser.state[p][m] for m in _MOMENTS}
    return tensors


def _rebuilt(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> _State:
    """The state that these tensors and numbers were taken from."""
    w = Weights(*(tensors[name] for name in Weights._fields))
    own = tensors.get("log_threshold")
    learnt = w._asdict() | ({} if own is None else {"log_threshold": own})
    optimiser = _optimiser(learnt.values())
    for name, p in learnt.items():
        optimiser.state[p] = {m: tensors[f"{name}.{m}"] for m in _MOMENTS}
    plain = {name: numbers[name] for name in _NUMBERS} | {"concepts": numbers.get("concepts", 0)}
    return _State(w, optimiser, tensors["idle"], **plain, log_threshold=own)


def _moved(state: _State, device: torch.device) -> _State:
    """The same state on another device."""
    return _rebuilt({name: x.to(device) for name, x in _tensors(state).items()}, vars(state))


def _write(path: Path, state: _State, settings: TrainSettings) -> None:
    """Write the whole state to `path`, in one piece or not at all. Raises SettingsError where training diverged."""
    if state.log:
        state.log()
    numbers = {name: getattr(state, name) for name in (*_NUMBERS, "concepts")}
    header = {"settings": asdict(settings)} | numbers | {"threshold": float(state.threshold)}
    artifact.save(path, _CHECKPOINT, _tensors(state), header)


def _resume(path: Path, settings: TrainSettings) -> _State:
    """The state that `_write` wrote, on the CPU."""
    tensors, header = artifact.load(path, _CHECKPOINT)
    asked, was = asdict(settings), header.get("settings")
    if not isinstance(was, dict):
        raise FileError(f"{path} names no settings, so it is no checkpoint: delete it to start over")
    was = {f.name: f.default for f in fields(settings) if f.default is not MISSING} | was  # older than some setting
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
        learnt: dict[str, tuple[int, ...]] = dict(zip(Weights._fields, ((n, d), (n,), (n, d), (d,)), strict=True))
        if settings.architecture == "jumprelu":
            learnt["log_threshold"] = (n,)
        for name, shape in learnt.items():
            shapes |= {name: shape, f"{name}.exp_avg": shape, f"{name}.exp_avg_sq": shape, f"{name}.step": ()}
        for name, shape in shapes.items():
            dtype = torch.int64 if name == "idle" else torch.float32
            if tensors[name].shape != shape or tensors[name].dtype != dtype:
                raise ValueError(f"tensor {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}")
    except (KeyError, TypeError, ValueError) as e:
        raise FileError(f"{path} is not a whole checkpoint ({e}): delete it to start over") from e
    return state
