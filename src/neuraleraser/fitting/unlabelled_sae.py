"""An SAE of one site without labels, learnt from the pipeline's own images and kept for the next time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neuraleraser.activations import activation_stream, stream_data, write_shards
from neuraleraser.eraser import Provenance
from neuraleraser.errors import FileError, SiteError
from neuraleraser.families.defaults import model_name
from neuraleraser.fitting.import_reference import shapes_of
from neuraleraser.io.names import printable
from neuraleraser.io.outputs import save_or_keep
from neuraleraser.sae import SAE, Run, TrainSettings, measure_sae, train_together
from neuraleraser.sae.train_settings import StepLog
from neuraleraser.settings import STREAM_SEEDS, Sampling, StreamSettings
from neuraleraser.sites import Site

EXPANSION = 16
"""Features for each number of an activation, as SAeUron has them."""
TRAINING_STEPS = 1000
"""Training steps, of up to 2,048 vectors."""
VECTORS_PER_IMAGE = 1024
"""Activation vectors kept of an image, at most."""


def active_features(width: int) -> int:
    """Return k for activations of this width: SAeUron's 32 of 1,280, and at least 8, as with fewer the canvas's are
    explained much worse than SAeUron's."""
    return max(8, width // 40)


def train_unlabelled_sae(
    pipe: Any,
    site: Site,
    prompts: Sequence[str],
    path: Path,
    num_images: int,
    sampling: Sampling,
    phrasings: tuple[int, ...] = (),
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> SAE:
    """Train an SAE on activations of `num_images` images of the prompts, and save it at `path`.

    It has 16 features for each number of an activation, of which BatchTopK lets `active_features` fire. Interrupted
    and called again, it goes on; what it keeps meanwhile, beside the path, goes when the SAE is there.

    Raises SettingsError where an interrupted training was of other data, SiteError for a site that the pipeline has
    not.
    """
    positions, width = shapes_of(pipe, [site], sampling)[site]
    kept = min(VECTORS_PER_IMAGE, positions * sampling.num_inference_steps)
    batch = min(2048, kept * sampling.batch_size)
    stream = StreamSettings(batch, kept, num_images, buffer_chunks=16, reuse=1, sampling=sampling)
    data = stream_data(model_name(pipe), prompts, stream) | {"site": str(site)}
    count = -(-num_images // sampling.batch_size)
    pool = activation_stream(pipe, prompts, [site], stream)
    folder = path.with_suffix("")
    shards = write_shards(
        pool,
        folder / "activations",
        count,
        data,
        lambda k: progress("drawing to learn features from", 0.8 * (k + 1) / count),
    )
    settings = TrainSettings(EXPANSION * width, active_features(width), TRAINING_STEPS, log_every=10)

    def on_step(_: str, log: StepLog) -> None:
        progress("learning features", 0.8 + 0.2 * log.step / TRAINING_STEPS)

    run = Run(settings, str(site), folder / "training.safetensors", data)
    sae = train_together(shards.batches(batch), {"sae": run}, on_step)["sae"]
    made = Provenance(((STREAM_SEEDS[0], STREAM_SEEDS[-1]),), tuple(dict.fromkeys(prompts)), phrasings)
    measures = measure_sae(sae, shards.load(0)[str(site)][0].float())
    sae.header |= {
        "site": str(site),
        "model": model_name(pipe),
        "measures": measures,
        "provenance": made.in_short().as_json(),
    }
    save_or_keep(path, sae.save)
    shutil.rmtree(folder)
    return sae


def sae_provenance(sae: SAE) -> Provenance:
    """Return the data that an SAE was made with; of one that does not say, that it is not known. FileError where what
    it says cannot be read."""
    said = sae.header.get("provenance")
    if said is None:
        return Provenance(sae=printable(sae.header.get("source") or sae.header.get("model") or "a file", 200))
    try:
        return Provenance.parse(said)
    except (AttributeError, TypeError, ValueError) as error:
        raise FileError(
            f"the SAE's field provenance cannot be read ({printable(error, 200)}): make it again"
        ) from error


def check_sae(sae: SAE, pipe: Any, site: Site, sampling: Sampling) -> SAE:
    """Return the SAE. Raises SiteError where it is of another site or width."""
    said = sae.header.get("site")
    if said is not None and Site.parse(said) != site:
        raise SiteError(f"the SAE reads {said}, and {site} is asked for: pass that site, or an SAE of this one")
    width = shapes_of(pipe, [site], sampling)[site][1]
    if width != sae.d_in:
        raise SiteError(f"{site} is {width} wide, and the SAE takes {sae.d_in}: pass one that was made for this site")
    return sae
