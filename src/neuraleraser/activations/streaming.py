"""An endless stream of activations, drawn while an SAE trains on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from neuraleraser.activations.collecting import CONDITIONAL, sample
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.families.defaults import default_sampling
from neuraleraser.sae.mixing_buffer import ActivationRows, MixingBuffer, Stopped, generator_for
from neuraleraser.settings import STREAM_SEEDS, StreamSettings
from neuraleraser.sites import Site, record


def activation_stream(
    pipe: Any,
    prompts: Sequence[str],
    sites: Sequence[Site],
    settings: StreamSettings | None = None,
    labels: Tensor | None = None,
) -> MixingBuffer:
    """Return an endless stream of a pipeline's activations, for `train_together`.

    They are generated as they are needed, mixed over images, positions and timesteps, and never on disk. A chunk of the
    pool is one batch of images. The prompts are used in random order, again and again, each time with other noise.
    While the stream is open a thread uses `pipe`: leave it alone.

    Args:
        pipe: The diffusers pipeline.
        prompts: Prompts of the images.
        sites: Sites whose activations are wanted.
        settings: Batch sizes, mixing and sampling; None: the defaults. If no sampling is given, `pipe` is sampled as
            usual.
        labels: What each prompt shows, [prompts, C] of 0 and 1; None: no labels.

    Returns:
        A stream that gives batches {str(site): x [batch, d]} from any step on. With labels, the batches are (x,
            labels), with the labels of each row's own prompt, so none if a row is of the unconditional branch.

    Raises:
        SiteError: The pipeline does not have a site.
        SettingsError: There are no sites.
        DataError: There are no prompts, or the labels do not fit. Raised while it runs: NaN or infinity (with site,
            timestep and prompts), or a site with fewer vectors than `vectors_per_image`.

    Examples:
        >>> batches = activation_stream(pipe, prompts, [site], short)(0)  # from step 0 on
        >>> next(batches)[str(site)].shape
        torch.Size([64, 128])
        >>> batches.close()  # the thread that draws stops
    """
    s = settings or StreamSettings()
    sampling = s.sampling or default_sampling(pipe)
    count, size = sampling.batch_size, sampling.batch_size * s.vectors_per_image // s.group_size
    if not prompts:
        raise DataError("there are no prompts, so there are no activations: pass at least one")
    if not sites or count < 1:
        raise SettingsError(f"{len(sites)} sites, {count} images at a time: pass at least one of each")
    if labels is not None and (labels.ndim != 2 or len(labels) != len(prompts)):
        raise DataError(f"labels have shape {tuple(labels.shape)} for {len(prompts)} prompts: pass [prompts, C]")
    with record(pipe, sites, lambda site, x, call: None):
        pass  # a site that is not there is an error now, not once a thread draws
    start = int(torch.randint(len(STREAM_SEEDS), (), generator=generator_for(s.stream_seed, "noise")))

    def chunk(number: int, stopped: Stopped) -> Mapping[str, ActivationRows]:
        numbers = range(number * count, (number + 1) * count)
        shown = [_prompt(i, len(prompts), s.stream_seed) for i in numbers]
        seeds = [STREAM_SEEDS[(start + i) % len(STREAM_SEEDS)] for i in numbers]
        found = sample(
            pipe,
            [prompts[i] for i in shown],
            seeds,
            sites,
            s.vectors_per_image // s.group_size,
            generator_for(s.stream_seed, "positions", number),
            sampling,
            s.group_size,
            stopped,
        )
        out: dict[str, ActivationRows] = {}
        for site, kept in found.items():
            if len(kept.x) != size:
                raise DataError(
                    f"{site} has {len(kept.x) * s.group_size // count} vectors per image, fewer than "
                    f"vectors_per_image = {s.vectors_per_image}: pass at most that"
                )
            x = kept.x[:, 0] if s.group_size == 1 else kept.x
            if labels is None:
                out[str(site)] = (x,)
            else:
                own = labels[torch.tensor(shown)[kept.image].to(labels.device)]
                own = own * (kept.branch == CONDITIONAL).to(own)[:, None]
                out[str(site)] = x, own.to(x.device)
        return out

    return MixingBuffer(
        chunk,
        size,
        s.train_batch_size // s.group_size,
        buffer_chunks=s.buffer_chunks,
        start=None if s.num_images else -(-s.buffer_chunks // 4),
        reuse=s.reuse,
        cycle=-(-s.num_images // count) if s.num_images else None,
        seed=s.stream_seed,
        prefetch=s.prefetch,
    )


def stream_data(model: str, prompts: Sequence[str], settings: StreamSettings) -> dict[str, Any]:
    """Return what a stream is, in JSON, for `Run.data` and shards: a run goes on only with the same.

    Raises SettingsError where the settings leave the sampling to the pipeline, which is not known here.
    """
    if settings.sampling is None:
        raise SettingsError("the stream's settings have no sampling: pass `sampling=default_sampling(pipe)`")
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    plain = {name: value for name, value in asdict(settings).items() if name != "prefetch"}  # it decides nothing
    return {"model": model, "prompts": len(prompts), "prompts_sha256": digest, "stream": plain}


def _prompt(image: int, prompts: int, seed: int) -> int:
    """Number of the prompt that an image shows: all of them in random order, then all in another."""
    epoch, prompt = divmod(image, prompts)
    return int(torch.randperm(prompts, generator=generator_for(seed, "prompts", epoch))[prompt])
