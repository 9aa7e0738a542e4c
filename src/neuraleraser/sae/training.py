"""Training an SAE: a function over a stream of activations, resumable to the bit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuraleraser.errors import DataError, FileError, NeuralEraserError, SettingsError
from neuraleraser.io import tensor_file
from neuraleraser.sae.adam import MOMENTS, Adam
from neuraleraser.sae.architectures.architecture import architecture_named
from neuraleraser.sae.batch_checks import (
    Stream,
    Streams,
    TrainingBatch,
    batch_of_source,
    close_stream,
    first_vectors,
    next_batch,
    select_source,
    validate_batch,
)
from neuraleraser.sae.first_weights import first_weights
from neuraleraser.sae.model import SAE
from neuraleraser.sae.sparse_ops import Weights
from neuraleraser.sae.supervised import concept_directions, fisher_features
from neuraleraser.sae.train_settings import StepLog, TrainSettings
from neuraleraser.sae.train_step import State as _State
from neuraleraser.sae.train_step import train_step

_ONLY_RUN = "activations"
_CHECKPOINT = "sae-training"
_NUMBERS = ("scale", "variance", "threshold", "step")
_MAY_CHANGE = ("log_every", "checkpoint_every")  # settings that a resumed run may change


@dataclass(frozen=True)
class Run:
    """One SAE of several that are trained from one stream.

    Examples:
        >>> from neuraleraser.sae import Run, train_together
        >>> settings = TrainSettings(n_features=64, k=4, steps=3, init_vectors=64)
        >>> run = Run(settings, str(site), "small.training")  # stopped and called again, it goes on from that file
        >>> train_together(activation_stream(pipe, prompts, [site], short), {"small": run})
        {'small': SAE(n=64, d=128)}
    """

    settings: TrainSettings
    source: str = ""
    """Whose batches it is trained on; "": those of its own name."""
    checkpoint: str | os.PathLike[str] | None = None
    """File that its state is written to, and from which it goes on if it is there; None: no checkpoint."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What the stream is, in JSON: kept with checkpoint and SAE, and a checkpoint of other data is refused."""

    @property
    def path(self) -> Path | None:
        """The checkpoint as a path, None without one."""
        return None if self.checkpoint is None else Path(self.checkpoint)


def train(
    batches: Stream,
    settings: TrainSettings,
    checkpoint: str | os.PathLike[str] | None = None,
    on_step: Callable[[StepLog], None] | None = None,
) -> SAE:
    """Train an SAE on a stream of activations.

    BatchTopK (Bussmann et al. 2024): of a batch the B * k largest pre-activations fire. The moving average of the
    smallest of them becomes the threshold of every feature, so that after training a feature fires alone. The loss is
    ||x - x_hat||^2 over the variance. Features start out firing about equally often (`first_weights.py`), and the bias
    of one that stops rises until it fires again. Training runs on data scaled to E||x||^2 = d; the scale is folded
    into the weights that are returned. Other architectures (`settings.architecture`) end in the same SAE: JumpReLU has
    learnt its thresholds, TopK's are set last, so that each feature fires as often on the first vectors of the stream,
    which is read again for it.

    With `settings.fisher_features`, `binding_weight` or `contrast_weight` the stream yields (x, labels [M, C]), one row
    of labels for every B / M consecutive vectors (`supervised.py`). With the first two, feature c belongs to concept c,
    for the first C features: its encoder row is set by Fisher's discriminant before the first step and held, or drawn
    there by a loss. `header["concepts"]` is their count, C.

    It runs on the device of the batches and draws nothing from global random state.

    Args:
        batches: The stream: `batches(step)` returns an iterator of raw activations [B, d] from that step on.
        settings: Settings of the training.
        checkpoint: A file that is written every `settings.checkpoint_every` steps and at the end. If it exists already,
            training goes on from it, and on a CPU ends in the bits of a run that was never stopped (equal thread
            count). None: no checkpoint.
        on_step: Called with the numbers of a step every `settings.log_every` steps.

    Returns:
        The SAE.

    Raises:
        DataError: NaN or infinity, a batch that is not [B, d] with one d throughout, labels that are missing or do not
            fit, or a stream that is empty or ends early.
        SettingsError: The checkpoint has other settings, or training diverges.
        FileError: The checkpoint is damaged.

    Examples:
        >>> from neuraleraser.sae import pool_batches, train
        >>> x = activation_matrix(pipe, prompts, [0, 1], [site], sampling=quick)[site]
        >>> train(pool_batches(x, 64), TrainSettings(n_features=64, k=4, steps=5, init_vectors=256))
        SAE(n=64, d=128)
    """

    def named_stream(step: int) -> Iterator[dict[str, TrainingBatch]]:
        stream = batches(step)
        try:
            for item in stream:
                yield {_ONLY_RUN: item}
        finally:
            close_stream(stream)

    on_named_step = None if on_step is None else lambda name, log: on_step(log)
    return train_together(named_stream, {_ONLY_RUN: Run(settings, checkpoint=checkpoint)}, on_named_step)[_ONLY_RUN]


def train_together(
    batches: Streams, runs: Mapping[str, Run], on_step: Callable[[str, StepLog], None] | None = None
) -> dict[str, SAE]:
    """Train several SAEs (of other sites, widths, architectures) from one pass of a stream.

    Each ends in the bits that `train` on its own source would end in. With checkpoints, runs go on where each stopped:
    the stream starts at the step of the one that is least far, and the others wait. Each run's progress is written to
    its checkpoint also if the stream fails or is interrupted, or another run diverges.

    For labelled training `header["concepts"]` is the count of concepts; `train_saes` also writes their names, as
    `header["labels"]`.

    Args:
        batches: The stream: `batches(step)` returns an iterator of {source: batch} from that step on.
        runs: The runs by name.
        on_step: Called as `on_step(name, log)` for each run, by its name in `runs`.

    Returns:
        The SAEs, by the names in `runs`.

    Raises:
        DataError: As for `train`, or the stream lacks a run's source.
        SettingsError: As for `train`.
        FileError: As for `train`.

    Examples:
        >>> from neuraleraser.sae import Run, train_together
        >>> runs = {str(n): Run(TrainSettings(n, 4, 3, init_vectors=64), str(site)) for n in (64, 128)}
        >>> train_together(activation_stream(pipe, prompts, [site], short), runs)
        {'64': SAE(n=64, d=128), '128': SAE(n=128, d=128)}
    """
    if not runs:
        raise SettingsError("there are no runs to train: pass at least one")
    states = {name: _first_state(batches, name, run) for name, run in runs.items()}
    first, last = min(state.step for state in states.values()), max(run.settings.steps for run in runs.values())
    stream = batches(first) if first < last else iter(())
    try:
        for step in range(first, last):
            item = next_batch(stream, step, last)
            for name, run in runs.items():
                if states[name].step == step < run.settings.steps:
                    states[name] = _advance(states[name], item, name, run, on_step)
    except (NeuralEraserError, KeyboardInterrupt) as error:
        kept = [str(run.path) for name, run in runs.items() if _save_if_sound(run, states[name])]
        if kept and isinstance(error, NeuralEraserError):
            error.args = (f"{error} (all steps before are kept in {', '.join(kept)})", *error.args[1:])
        raise
    finally:
        close_stream(stream)
    return {name: _finish(batches, states[name], name, run) for name, run in runs.items()}


def _first_state(batches: Streams, name: str, run: Run) -> _State:
    """Return the state that a run starts from, or goes on from."""
    path = run.path
    if path is not None and path.exists():
        return _load_checkpoint(path, run)
    return _untrained_state(select_source(batches, run.source or name), run.settings)


def _advance(
    state: _State,
    item: Mapping[str, TrainingBatch],
    name: str,
    run: Run,
    on_step: Callable[[str, StepLog], None] | None,
) -> _State:
    """Return the state after one step more."""
    settings = run.settings
    x, labels = validate_batch(
        batch_of_source(item, run.source or name), state.step, len(state.weights.b_dec), settings, state.concepts
    )
    if x.device != state.idle.device:  # resumed: the file was read on the CPU
        state = _state_on_device(state, x.device)
    state.whole = False
    log = train_step(state, x * state.scale, labels, settings)
    state.whole = True
    last = state.step == settings.steps
    if last or state.step % settings.log_every == 0:
        numbers = log()  # also where nobody listens: on a GPU divergence is noticed here
        if on_step:
            on_step(name, numbers)
    if run.path and (last or state.step % settings.checkpoint_every == 0):
        _save_checkpoint(run, state)
    return state


def _finish(batches: Streams, state: _State, name: str, run: Run) -> SAE:
    """Return the SAE of a run whose steps are done."""
    sae = _unscaled_sae(state, run.settings, _header(state, run))

    def first() -> Tensor:
        return first_vectors(select_source(batches, run.source or name), run.settings)[0]

    return architecture_named(run.settings.architecture).finish(sae, run.settings, first)


def _untrained_state(batches: Stream, settings: TrainSettings) -> _State:
    """Return the state before the first step: scale and bias from the first vectors, the rest from the seed."""
    sample, labels = first_vectors(batches, settings)
    d = sample.shape[1]
    power = float(sample.double().square().sum(1).mean())
    variance = float((sample.double() - sample.double().mean(0)).square().sum(1).mean())
    if not variance > 1e-12 * power:
        raise DataError(f"the first {len(sample)} activations are all the same vector: nothing to learn")
    scale = math.sqrt(d / power)
    w = first_weights(sample * scale, settings.n_features, settings.seed)
    concepts = 0 if labels is None else labels.shape[1]
    if labels is not None and settings.fisher_features:
        w.W_enc[:concepts], w.b_enc[:concepts], w.W_dec[:concepts] = fisher_features(sample * scale, labels, w)
    elif labels is not None and settings.binding_weight:
        toward = concept_directions(sample, labels, w.W_dec[:concepts])
        w.W_enc[:concepts], w.W_dec[:concepts] = toward, toward
    own = architecture_named(settings.architecture).start(w, sample * scale, settings)
    idle = torch.zeros(settings.n_features, dtype=torch.int64, device=sample.device)
    return _State(
        w, Adam([*w, *own.values()]), idle, scale, variance * scale**2, concepts=concepts, extra_parameters=own
    )


def _unscaled_sae(state: _State, settings: TrainSettings, header: Mapping[str, Any]) -> SAE:
    """Return the SAE for raw activations: with x = x_scaled / s, features fire alike and z = z_scaled / s."""
    w, s = state.weights, state.scale
    each = architecture_named(settings.architecture).threshold(state.extra_parameters, float(state.threshold))
    return SAE(w.W_enc, w.b_enc / s, w.W_dec, w.b_dec / s, torch.zeros_like(w.b_enc) + each / s, header)


def _header(state: _State, run: Run) -> dict[str, Any]:
    """Return the header of a trained SAE."""
    header = {"settings": asdict(run.settings), "data_scale": state.scale, "steps": state.step}
    header |= {"concepts": state.concepts} if run.settings.binding_weight or run.settings.fisher_features else {}
    return header | ({"data": dict(run.data)} if run.data else {})


def _state_tensors(state: _State) -> dict[str, Tensor]:
    """Return every tensor of the state by name."""
    tensors = {"idle": state.idle}
    for name, p in state.parameters().items():
        tensors |= {name: p.detach()} | {f"{name}.{m}": state.optimiser.state[p][m] for m in MOMENTS}
    return tensors


def _state_from_tensors(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], learns: Iterable[str]) -> _State:
    """Return the state that these tensors and numbers were taken from, of an architecture that learns these beside the
    weights."""
    w, own = Weights(*(tensors[name] for name in Weights._fields)), {name: tensors[name] for name in learns}
    learnt = w._asdict() | own
    optimiser = Adam(learnt.values())
    for name, p in learnt.items():
        optimiser.state[p] = {m: tensors[f"{name}.{m}"] for m in MOMENTS}
    plain = {name: numbers[name] for name in _NUMBERS} | {"concepts": numbers.get("concepts", 0)}
    return _State(w, optimiser, tensors["idle"], **plain, extra_parameters=own)


def _state_on_device(state: _State, device: torch.device) -> _State:
    """Return the same state on another device."""
    return _state_from_tensors(
        {name: x.to(device) for name, x in _state_tensors(state).items()}, vars(state), state.extra_parameters
    )


def _save_if_sound(run: Run, state: _State) -> bool:
    """Save a state where training ends early, unless it is half done, diverged, or a finished run's, which was saved.

    Returns True if it was saved.
    """
    if run.path is None or not state.whole or not 0 < state.step < run.settings.steps:
        return False
    try:
        _save_checkpoint(run, state)
    except (DataError, SettingsError):  # on a GPU the log, and what is wrong, is read only now
        return False
    return True


def _save_checkpoint(run: Run, state: _State) -> None:
    """Write the whole state to the run's checkpoint, in one piece or not at all. Raises SettingsError where training
    diverged."""
    assert run.path is not None
    if state.log:
        state.log()
    header = {"settings": asdict(run.settings), "data": dict(run.data)}
    header |= {name: getattr(state, name) for name in (*_NUMBERS, "concepts")} | {"threshold": float(state.threshold)}
    tensor_file.save(run.path, _CHECKPOINT, _state_tensors(state), header)


def _load_checkpoint(path: Path, run: Run) -> _State:
    """Return the state that `_save_checkpoint` wrote, on the CPU."""
    settings = run.settings
    tensors, header = tensor_file.load(path, _CHECKPOINT)
    asked, was, data = asdict(settings), header.get("settings"), header.get("data", {})
    if not isinstance(was, dict) or not isinstance(data, dict):
        raise FileError(f"{path} names no settings, so it is no checkpoint: delete it to start over")
    was = {f.name: f.default for f in fields(settings) if f.default is not MISSING} | was  # older than some setting
    given = json.loads(json.dumps(dict(run.data)))  # as it is read back: tuples become lists
    pairs = [(key, was.get(key), asked[key]) for key in asked if key not in _MAY_CHANGE]
    pairs += [(key, data.get(key), given.get(key)) for key in {**data, **given}]
    other = [f"{key} = {old!r}, not {new!r}" for key, old, new in pairs if old != new]
    if other:
        raise SettingsError(f"{path} was made with {'; '.join(other)}: pass those, or another checkpoint")
    try:
        learns = architecture_named(settings.architecture).learns
        state = _state_from_tensors(tensors, header, learns)
        if not 0 < state.step <= settings.steps:
            raise ValueError(f"step {state.step}")
        # Checked to the last tensor: the fused optimiser trusts shapes.
        n, d = settings.n_features, len(state.weights.b_dec)
        shapes = {"idle": (n,)}
        learnt: dict[str, tuple[int, ...]] = dict(zip(Weights._fields, ((n, d), (n,), (n, d), (d,)), strict=True))
        learnt |= dict.fromkeys(learns, (n,))
        for name, shape in learnt.items():
            shapes |= {name: shape, f"{name}.exp_avg": shape, f"{name}.exp_avg_sq": shape, f"{name}.step": ()}
        for name, shape in shapes.items():
            dtype = torch.int64 if name == "idle" else torch.float32
            if tensors[name].shape != shape or tensors[name].dtype != dtype:
                raise ValueError(f"tensor {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}")
    except (KeyError, TypeError, ValueError) as e:
        raise FileError(f"{path} is not a whole checkpoint ({e}): delete it to start over") from e
    return state
