"""SAEs from a stream of activations to files: trained together, measured on what would have come next, and saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from neuraleraser.activations import Shards, activation_stream, stream_data
from neuraleraser.errors import DataError
from neuraleraser.families.defaults import default_sampling
from neuraleraser.io.outputs import save_or_keep
from neuraleraser.prompts import LabelledPrompts, default_prompts
from neuraleraser.sae import MixingBuffer, Run, TrainSettings, measure_sae, train_together
from neuraleraser.sae.train_settings import StepLog
from neuraleraser.settings import StreamSettings
from neuraleraser.sites import Site

HELD_OUT_VECTORS = 2**16
"""Vectors that a finished SAE is measured on: those that would have come next."""
CAPTIONS = 4000
"""Captions of a vocabulary that an endless stream is drawn from; each comes again with other noise."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Activations to train on.

    batches: the stream. description: what it is, in JSON: a checkpoint goes on only with the same. names: of the labels
    that come with it; () without.
    """

    batches: MixingBuffer
    description: Mapping[str, Any]
    names: Sequence[str] = ()


def recorded_data(folder: Path, sites: Sequence[Site], stream: StreamSettings, labelled: bool = False) -> TrainingData:
    """Return the activations that `write_shards` kept in a folder.

    Raises DataError where they are of other sites, or have no labels and `labelled` asks for them; FileError for a
    folder that cannot be read.
    """
    shards = Shards.open(folder)
    if missing := [str(site) for site in sites if str(site) not in shards.sources]:
        raise DataError(f"{folder} holds activations of {', '.join(shards.sources)}, not of {missing[0]}")
    names = list(shards.data.get("labels", []))
    if labelled and not names:
        raise DataError(f"{folder} has no labels: collect from prompts that say what they show")
    description = {
        "activations": shards.digest,
        "train_batch_size": stream.train_batch_size,
        "stream_seed": stream.stream_seed,
    }
    return TrainingData(
        shards.batches(stream.train_batch_size, stream.stream_seed, prefetch=stream.prefetch), description, names
    )


def drawn_data(
    pipe: Any,
    model: str,
    sites: Sequence[Site],
    stream: StreamSettings,
    prompts: LabelledPrompts | None = None,
    labelled: bool = False,
) -> TrainingData:
    """Return activations that are drawn while training goes on.

    model: what the SAE's header calls the pipeline. prompts: None: captions of the pipeline's vocabulary. Raises
    DataError where `labelled` asks for labels and no prompt says what it shows, SettingsError where prompts are needed.
    """
    stream = stream if stream.sampling else replace(stream, sampling=default_sampling(pipe))
    prompts = prompts or default_prompts(pipe, stream.num_images or CAPTIONS)
    if labelled and prompts.labels is None:
        raise DataError("no prompt says what it shows, and labels are needed: write it after a tab, by commas")
    names = list(prompts.names) if labelled else []
    description = stream_data(model, prompts.texts, stream) | {"labels": names}
    labels = prompts.labels if labelled else None
    return TrainingData(activation_stream(pipe, prompts.texts, sites, stream, labels), description, names)


def train_saes(
    data: TrainingData,
    wanted: Mapping[Path, tuple[Site, TrainSettings]],
    model: str,
    on_step: Callable[[Path, StepLog], None] | None = None,
) -> dict[Path, Mapping[str, Any]]:
    """Train the SAEs that are wanted, all from the same activations, and save each at its path -> their measures.

    wanted: of each path, the site that its SAE reads and how it is trained. Interrupted and called again, it goes on
    from the checkpoint beside each path, which goes when the SAE is there. Measures are those of `sae.measure_sae`, on
    vectors that would have come next.

    Raises as `train_together` does.
    """
    runs = {
        str(path): Run(settings, str(site), checkpoint_of(path), {**data.description, "site": str(site)})
        for path, (site, settings) in wanted.items()
    }
    saes = train_together(data.batches, runs, on_step and (lambda name, log: on_step(Path(name), log)))
    steps = max(settings.steps for _, settings in wanted.values())
    held_out = _next_vectors(data.batches, steps, sorted({str(site) for site, _ in wanted.values()}))
    found = {}
    for path, (site, settings) in wanted.items():
        sae = saes[str(path)]
        found[path] = measure_sae(sae, held_out[str(site)])
        header = {"site": str(site), "model": model, "measures": found[path]}
        if settings.binding_weight or settings.fisher_features:  # features that are the labels' own
            header["labels"] = list(data.names)
        save_or_keep(path, partial(sae.save, header=header))
        with suppress(FileNotFoundError):
            checkpoint_of(path).unlink()
    return found


def checkpoint_of(path: Path) -> Path:
    """Return the path of the checkpoint of an SAE that is trained into `path`."""
    return path.with_suffix(".training.safetensors")


def _next_vectors(batches: MixingBuffer, step: int, sources: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the vectors that come from this step on, [up to HELD_OUT, d] of each source; of at most `step` batches."""
    parts: dict[str, list[torch.Tensor]] = {source: [] for source in sources}
    stream = batches(step)
    for _, item in zip(range(step), stream, strict=False):
        for source in sources:
            x = item[source]
            parts[source].append((x[0] if isinstance(x, tuple) else x).float())
        if sum(map(len, parts[sources[0]])) >= HELD_OUT_VECTORS:
            break
    stream.close()  # type: ignore[attr-defined]  # a generator
    return {source: torch.cat(part)[:HELD_OUT_VECTORS] for source, part in parts.items()}
