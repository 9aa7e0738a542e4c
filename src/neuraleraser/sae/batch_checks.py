"""Reading a stream of activations, checked batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from neuraleraser.errors import DataError
from neuraleraser.sae import kernels
from neuraleraser.sae.supervised import check_labels
from neuraleraser.sae.train_settings import TrainSettings

TrainingBatch = Tensor | tuple[Tensor, Tensor]
"""x [B, d], or (x, labels [M, C]): labels of 0 and 1 say what M maps of B / M consecutive vectors show."""
Stream = Callable[[int], Iterator[TrainingBatch]]
"""The batches from a step on: a pure function of the step, so that training can resume anywhere."""
Streams = Callable[[int], Iterator[Mapping[str, TrainingBatch]]]
"""The same for several sources at a time, by name."""


def select_source(batches: Streams, source: str) -> Stream:
    """Return the stream of one source; it raises DataError where a batch lacks it."""

    def stream(step: int) -> Iterator[TrainingBatch]:
        items = batches(step)
        try:
            for item in items:
                yield batch_of_source(item, source)
        finally:
            close_stream(items)

    return stream


def batch_of_source(item: Mapping[str, TrainingBatch], source: str) -> TrainingBatch:
    """Return the batch of one source. Raises DataError if there is none."""
    if source not in item:
        raise DataError(f"the stream has no source {source!r}, only {', '.join(map(repr, item))}")
    return item[source]


def next_batch(stream: Iterator[Any], step: int, steps: int) -> Any:
    """Return the next item, that of `step`. Raises DataError where the stream has ended."""
    item = next(stream, None)
    if item is None:
        if step == 0:
            raise DataError("the stream of activations is empty: pass at least one batch [B, d]")
        raise DataError(f"the stream ended after {step} batches: pass a longer one, or fewer steps than {steps}")
    return item


def validate_batch(
    item: TrainingBatch, step: int, d: int | None, settings: TrainSettings, concepts: int, wait: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the batch of this step, [B, d] float32, and its labels [M, C] where training is labelled.

    With `wait`, NaN and infinity are looked for on a GPU, too, for which the host has to wait there; without,
    `train_step` looks for them.

    Raises DataError for another shape or width, NaN or infinity, labels that are missing or do not fit.
    """
    if isinstance(item, (tuple, list)) and len(item) != 2:  # a list is what a DataLoader makes of a pair
        raise DataError(f"batch {step} is {len(item)} values: pass activations [B, d], or (x [B, d], labels [M, C])")
    x, labels = item if isinstance(item, (tuple, list)) else (item, None)
    if x.ndim != 2 or 0 in x.shape or (d is not None and x.shape[1] != d):
        raise DataError(f"batch {step} has shape {tuple(x.shape)}: expected [B, {d or 'd'}] with B > 0")
    # One sum tells in nearly all cases; where it overflows each value is asked.
    check_values = (wait or not kernels.on_gpu(x)) and not math.isfinite(x.sum())
    if check_values and (bad := int((~torch.isfinite(x)).sum())):
        raise DataError(f"batch {step} holds {bad} NaN or infinite values of {x.numel()}: mend their source")
    if not settings.labelled:
        return x.detach().float(), None
    if labels is None:
        raise DataError(f"batch {step} has no labels: labelled training takes a stream of (x [B, d], labels [M, C])")
    check_labels(labels, len(x), settings.n_features, concepts or None, step)
    return x.detach().float(), labels.to(x.device)


def first_vectors(batches: Stream, settings: TrainSettings) -> tuple[Tensor, Tensor | None]:
    """Return the first `init_vectors` vectors of the stream, [N, d] float32, and their labels [N, C], if any."""
    parts: list[Tensor] = []
    known: list[Tensor] = []
    stream = batches(0)
    try:
        while sum(map(len, parts)) < settings.init_vectors and len(parts) < settings.steps:
            d, concepts = parts[0].shape[1] if parts else None, known[0].shape[1] if known else 0
            step = len(parts)
            x, labels = validate_batch(next_batch(stream, step, settings.steps), step, d, settings, concepts, wait=True)
            parts.append(x)
            if labels is not None:
                known.append(labels.repeat_interleave(len(x) // len(labels), 0))
    finally:
        close_stream(stream)
    vectors = settings.init_vectors
    return torch.cat(parts)[:vectors], torch.cat(known)[:vectors] if known else None


def close_stream(stream: Iterator[Any]) -> None:
    """Close the stream if it is a generator, so that its clean-up runs now; other iterators have none."""
    end = getattr(stream, "close", None)
    if end:
        end()
