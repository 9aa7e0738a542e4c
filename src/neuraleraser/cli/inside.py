"""The verbs that look inside a pipeline: sites, activations, SAEs, profiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from neuraleraser.cli.verbs import app, table, verb
from neuraleraser.errors import ConceptError, DataError, FileError, SettingsError
from neuraleraser.settings import Sampling


@verb(app, "sites")
def sites(model: Positional[str] = "canvas", /) -> None:
    """List where a pipeline's activations can be read and edited: blocks, cross-attentions, text encoders.

    Args:
        model: The pipeline: canvas, a folder, or a Hub id.
    """
    from neuraleraser import sampling
    from neuraleraser.models import known_sites, open_pipeline
    from neuraleraser.sites import (
        candidate_sites,
        cross_attention_sites,
        record,
        text_encoder_sites,
        text_streams,
    )

    pipe = open_pipeline(model)
    blocks = candidate_sites(pipe)
    found = (
        dict.fromkeys(blocks, "block")
        | dict.fromkeys(text_streams(pipe), "block, text stream")
        | dict.fromkeys(cross_attention_sites(pipe), "cross-attention")
        | dict.fromkeys(text_encoder_sites(pipe), "text encoder")
    )
    known = {site.path: (site.tap, source) for site, source in known_sites(pipe).items()}
    shapes: dict[Any, tuple[int, int]] = {}
    with record(pipe, found, lambda site, x, call: shapes.update({site: (x.shape[1], x.shape[2])})):
        sampling.generate(pipe, ["a picture"], [0], Sampling(steps=1, guidance=1.0, batch=1))
    rows = [("site", "what", "positions", "width", "blocks after it", "known good")]
    for site, what in found.items():
        positions, width = shapes[site]
        # text encoders run before all blocks, a cross-attention inside its own
        at = max((i for i, block in enumerate(blocks) if f"{site.path}.".startswith(f"{block.path}.")), default=-1)
        tap, source = known.get(site.path, ("", "")) if what == "block" else ("", "")
        good = f"{tap}; {source}" if source else ""
        name = site.path if site.stream == "image" else f"{site.path}:{site.stream}"
        rows.append((name, what, str(positions), str(width), str(len(blocks) - 1 - at), good))
    print(table(rows))


@verb(app, "collect")
def collect(
    sites: tuple[str, ...],
    model: str = "canvas",
    prompts: Path | None = None,
    images: int = 300,
    per_image: int = 256,
    batch: int = 20,
    seed: int = 500,
    out: Path = Path("activations.safetensors"),
) -> None:
    """Draw images and keep a random sample of their activations, to train SAEs on.

    Args:
        sites: Sites such as unet.mid_block.attentions.0 (`neuraleraser sites` lists them).
        model: The pipeline: canvas, a folder, or a Hub id.
        prompts: Text file, one prompt a line; None: captions of the canvas.
        images: How many images to draw; the prompts are repeated if they are fewer.
        per_image: Activation vectors kept of each image and site, over all steps and positions.
        batch: Images drawn together.
        seed: Seed of the first image; the others follow.
        out: The activations' file.
    """
    from neuraleraser import artifact

    vectors, texts = _bank(model, sites, prompts, images, per_image, batch, seed)
    artifact.save(out, "activations", {str(site): x for site, x in vectors.items()}, {"model": model, "prompts": texts})
    for site, x in vectors.items():
        print(f"{out}: {len(x)} vectors, {x.shape[1]} wide, at {site}")


@verb(app, "train")
def train(
    site: Positional[str],
    /,
    model: str = "canvas",
    activations: Path | None = None,
    prompts: Path | None = None,
    images: int = 300,
    features: int = 2048,
    active: int = 16,
    steps: int = 1500,
    batch: int = 4096,
    seed: int = 0,
    out: Path = Path("sae.safetensors"),
) -> None:
    """Train a sparse autoencoder on the activations of one site.

    Args:
        site: The site, such as unet.mid_block.attentions.0.
        model: The pipeline to draw with: canvas, a folder, or a Hub id.
        activations: A file from `collect`, instead of drawing.
        prompts: Text file, one prompt a line; None: captions of the canvas.
        images: How many images to draw.
        features: Features of the SAE.
        active: Features that fire for an activation vector, on average.
        steps: Batches to train on.
        batch: Activation vectors in a batch.
        seed: Decides the initial weights and the order of batches.
        out: The SAE's file; the state of an interrupted training lies beside it.
    """
    from tqdm import tqdm

    from neuraleraser import artifact
    from neuraleraser.sae import StepLog, TrainSettings, measure, pool_batches
    from neuraleraser.sae import train as run
    from neuraleraser.sites import Site

    asked = Site.parse(site)
    kept = activations or out.with_suffix(".activations.safetensors")
    if activations is None and not kept.exists():
        vectors, texts = _bank(model, (site,), prompts, images, 1024, 20, 500)
        artifact.save(kept, "activations", {str(k): x for k, x in vectors.items()}, {"model": model, "prompts": texts})
    held, _ = artifact.load(kept, "activations")
    if str(asked) not in held:
        raise DataError(f"{kept} holds activations of {', '.join(held)}, not of {asked}")
    x = held[str(asked)].float()
    settings = TrainSettings(n=features, k=active, steps=steps, seed=seed)
    checkpoint = out.with_suffix(".training.safetensors")
    with tqdm(total=steps, desc="SAE") as bar:

        def on_step(log: StepLog) -> None:
            bar.update(log.step - bar.n)
            bar.set_postfix(unexplained=f"{log.fvu:.3f}", dead=f"{log.dead:.1%}")

        sae = run(pool_batches(x, min(batch, len(x)), seed), settings, checkpoint, on_step)
    figures = measure(sae, x[: 2**16])
    sae.save(out, {"site": str(asked), "model": model, "measures": figures})
    checkpoint.unlink(missing_ok=True)
    if activations is None:
        kept.unlink(missing_ok=True)
    explained, l0, dead = (figures[name] for name in ("explained_variance", "l0", "dead_share"))
    print(
        f"{out}: {features} features, {l0:.1f} fire for a vector, {dead:.1%} never; "
        f"{explained:.1%} of the variance explained"
    )


@verb(app, "profile")
def profile(
    phrases: Positional[tuple[str, ...]],
    /,
    sae: Path,
    site: str | None = None,
    model: str = "canvas",
    images: int = 20,
    top: int = 8,
    out: Path = Path("profile.safetensors"),
) -> None:
    """Say which features of an SAE carry concepts: statistics by timestep, and the features that tell best.

    Args:
        phrases: Concepts, such as "Van Gogh style" "cat"; each is compared with the others and with itself taken out.
        sae: The SAE's file.
        site: Where the SAE reads; None: what its file says.
        model: The pipeline: canvas, a folder, or a Hub id.
        images: Images drawn of each concept, and as many without it.
        top: Features listed for each concept.
        out: The profile's file.
    """
    import torch

    from neuraleraser import artifact
    from neuraleraser import concepts as c
    from neuraleraser.demo import concept_of
    from neuraleraser.fit.states import conditional, pooled_features
    from neuraleraser.models import open_pipeline
    from neuraleraser.sae import SAE
    from neuraleraser.sites import Site

    if not phrases:
        raise ConceptError("no concept was named: pass phrases such as 'Van Gogh style' cat")
    loaded = SAE.load(sae)
    where = site or loaded.header.get("site")
    if not where:
        raise SettingsError(f"{sae} does not say which site it reads: pass --site")
    pipe = open_pipeline(model)
    asked = [concept_of(pipe, phrase) for phrase in phrases]
    prompts, labels = [], []
    for concept in asked:
        pairs = [concept.pairs[i * len(concept.pairs) // images] for i in range(images)]
        prompts += [p.shows for p in pairs] + [p.without for p in pairs]
        labels += [concept.name] * images + [f"no {concept.name}"] * images
    seeds = [i % (2 * images) % images for i in range(len(prompts))]  # a pair shares its noise
    pooled, _ = pooled_features(pipe, loaded, Site.parse(where), prompts, seeds, Sampling())
    stats = c.profile(conditional(pooled)[:, :, 0], pooled.times, labels)
    tensors = {"mean": stats.mean, "spread": stats.spread, "times": stats.times}
    artifact.save(out, "profile", tensors, {"names": list(stats.names), "site": str(where), "model": model})
    for concept in asked:
        score = c.neighbour_score(stats, concept.name).mean(0)
        share = c.share_score(stats, concept.name).mean(0)
        rows = [("feature", "gap to the worst neighbour", "SAeUron's share score", "")]
        for k in torch.topk(score, min(top, len(score))).indices.tolist():
            rows.append((str(k), f"{score[k]:.2f}", f"{share[k]:.4f}", ""))
        print(f"{concept.name}\n{table(rows)}\n")
    print(out)


@verb(app, "dictionary")
def dictionary(
    sae: Positional[Path],
    site: Positional[str],
    /,
    model: str,
    prompts: Path,
    edits: tuple[str, ...] = (),
    out: Path = Path("runs/imported"),
) -> None:
    """Make a dictionary from another library's SAE, for `erase --dictionary` and `profile --sae OUT/sae.safetensors`.

    Args:
        sae: Folder or weights file of SAeUron, sdxl-unbox, SAELens, sparsify, dictionary_learning or OpenAI.
        site: The site that it reads, such as unet.up_blocks.1.attentions.1 or unet.mid_block.attentions.0:update.
        model: The pipeline: canvas, a folder, or a Hub id.
        prompts: Text file of prompts of many things, one a line: thresholds are calibrated on their images.
        edits: Sites that erasers will edit; none named: the site and the cross-attentions of later blocks.
        out: The dictionary's folder.
    """
    from neuraleraser.fit import import_dictionary
    from neuraleraser.models import open_pipeline
    from neuraleraser.sites import Site

    at, acts = Site.parse(site), [Site.parse(text) for text in edits]
    texts = read_prompts(prompts)
    known = import_dictionary(open_pipeline(model), sae, at, texts, edits=acts)
    known.save(out)
    seen = known.sae.header.get("calibration")
    differs = f"; calibrated thresholds disagree with it on {seen['disagreement']:.1%} of firings" if seen else ""
    print(f"{out}: {known.sae.n} features of {known.sae.header['format']} at {at}, {len(known.edits)} edits{differs}")


def _bank(
    model: str, sites: Sequence[str], prompts: Path | None, images: int, per_image: int, batch: int, seed: int
) -> tuple[dict[Any, Any], list[str]]:
    """A sample of activations at `sites`, and the prompts they come from."""
    from neuraleraser.activations import bank
    from neuraleraser.fit.dictionary import canvas_background
    from neuraleraser.models import open_pipeline, speaks_canvas
    from neuraleraser.sites import Site

    if not sites or images < 1 or per_image < 1:
        raise SettingsError(f"{len(sites)} sites, {images} images, {per_image} vectors each: pass at least one of all")
    where = [Site.parse(text) for text in sites]
    texts = read_prompts(prompts) if prompts else []
    pipe = open_pipeline(model)
    if not texts:
        if not speaks_canvas(pipe):
            raise SettingsError(f"{model!r} is not the canvas, so its prompts are unknown here: pass --prompts FILE")
        texts = [prompt for prompt, _, _ in canvas_background(images, 1)]
    texts = [texts[i % len(texts)] for i in range(images)]
    return bank(pipe, texts, range(seed, seed + images), where, per_image, Sampling(batch=batch)), texts


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises FileError if there are none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"the prompts {str(path)!r} cannot be read ({error}): pass a text file, one a line") from error
    if not any(lines):
        raise FileError(f"{str(path)!r} holds no prompts: write one a line")
    return [line for line in lines if line]
