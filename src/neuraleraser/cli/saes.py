"""The verbs that record activations and train SAEs on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import AvoidSubcommands, Positional

from neuraleraser.cli.prompts import prompts_of, read_prompts
from neuraleraser.cli.verbs import Flat, app, check_sampling, verb
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.io.names import file_name
from neuraleraser.io.outputs import check_outputs, save_or_keep
from neuraleraser.sae.architectures import ARCHITECTURES
from neuraleraser.sae.train_settings import StepLog, TrainSettings
from neuraleraser.settings import StreamSettings

if TYPE_CHECKING:
    ArchitectureName = str
else:
    ArchitectureName = Literal[tuple(ARCHITECTURES)]  # choices that the help shows

HELD_OUT = 2**16
"""Vectors that a finished SAE is measured on: those that would have come next."""
CAPTIONS = 4000
"""Captions of the canvas that an endless stream is drawn from; each comes again with other noise."""


@verb(app, "collect")
def collect(
    sites: tuple[str, ...],
    model: str = "canvas",
    prompts: Path | None = None,
    num_images: int = 300,
    vectors_per_image: int = 256,
    buffer_chunks: int = 16,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    out: Path = Path("activations"),
) -> None:
    """Draw images and record a random sample of their activations, mixed, to train SAEs on. Run again to go on.

    Args:
        sites: Sites such as unet.mid_block.attentions.0 (`neuraleraser sites` lists them).
        model: The pipeline: canvas, a folder, or a Hub id.
        prompts: Text file, one prompt a line, after a tab what it shows, by commas; None: captions of the canvas.
        num_images: How many images to draw; the prompts are repeated if they are fewer.
        vectors_per_image: Activation vectors kept of each image and site, over all steps and positions.
        buffer_chunks: How many batches of images are mixed at a time, in memory.
        seed: Decides the images' noise, which vectors are kept, and their order.
        num_inference_steps: Denoising steps; None: the model's usual.
        guidance_scale: Classifier-free guidance scale; None: the model's usual.
        batch_size: Images drawn together; None: 4, on the canvas 20.
        out: Folder for the shards, one a batch of images.
    """
    from tqdm import tqdm

    from neuraleraser.activations import activation_stream, described, write_shards
    from neuraleraser.families.defaults import default_sampling
    from neuraleraser.families.opening import open_pipeline
    from neuraleraser.sites import Site

    where = [Site.parse(text) for text in sites]
    if not where or num_images < 1:
        raise SettingsError(f"{len(where)} sites, {num_images} images: pass at least one of each")
    settings = StreamSettings(1, vectors_per_image, num_images, buffer_chunks, reuse=1, seed=seed)
    check_sampling(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, batch_size=batch_size)
    check_outputs({}, folders={"--out": out})
    lines = read_prompts(prompts) if prompts else None
    pipe = open_pipeline(model)
    sampling = default_sampling(pipe, num_inference_steps, guidance_scale, batch_size)
    settings = replace(settings, sampling=sampling)
    texts, labels, names = prompts_of(pipe, model, lines, num_images)
    data = described(model, texts, settings) | {"sites": [str(site) for site in where], "labels": names}
    pool = activation_stream(pipe, texts, where, settings, labels)
    count = -(-num_images // sampling.batch_size)
    with tqdm(total=count, desc="activations", unit="shard") as bar:

        def on_shard(number: int) -> None:
            bar.update(number + 1 - bar.n)

        shards = write_shards(pool, out, count, data, on_shard)
    print(f"{out}: {shards.count} shards of {shards.rows} vectors at each of {len(where)} sites")


@verb(app, "train")
def train(
    sites: Positional[tuple[str, ...]],
    /,
    stream: Annotated[StreamSettings, Flat, AvoidSubcommands],
    model: str = "canvas",
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    activations: Path | None = None,
    prompts: Path | None = None,
    n_features: tuple[int, ...] = (2048,),
    k: int = 16,
    steps: int = 1500,
    architecture: ArchitectureName = "batchtopk",
    discriminant: bool = False,
    bind: float = 0.0,
    contrast: float = 0.0,
    learning_rate: float | None = None,
    checkpoint_every: int = 200,
    out: Path | None = None,
    tensorboard: Path | None = None,
) -> None:
    """Train sparse autoencoders while the pipeline draws: of every site named, one of every width. Run again to go on.

    Args:
        sites: Sites such as unet.mid_block.attentions.0; all are trained from the same images.
        model: The pipeline to draw with: canvas, a folder, or a Hub id.
        num_inference_steps: Denoising steps; None: the model's usual.
        guidance_scale: Classifier-free guidance scale; None: the model's usual.
        batch_size: Images drawn together; None: 4, on the canvas 20.
        activations: A folder from `collect`, to train on instead of drawing.
        prompts: Text file, one prompt a line, after a tab what it shows, by commas; None: captions of the canvas.
        n_features: Features of the SAE; of several widths one SAE each.
        k: Features that fire for an activation vector, on average.
        steps: Batches to train on.
        architecture: Which features fire in training; afterwards each fires by its own threshold.
        discriminant: Give every concept a feature that tells it by Fisher's linear discriminant.
        bind: Weight of the loss that gives every concept a feature of its own (0: off; start with 0.3, matryoshka and
            16 vectors a map).
        contrast: Weight of the loss that draws images of the same concepts together (0: off; start with 0.01).
        learning_rate: Peak learning rate; None: from features, width and steps.
        checkpoint_every: Steps from one checkpoint to the next.
        out: The SAE's file (.safetensors), with its log (.jsonl) beside it, or a folder for one or several; None:
            sae.safetensors, or the folder saes.
        tensorboard: Folder for TensorBoard's files, if TensorBoard is installed.
    """
    from tqdm import tqdm

    from neuraleraser.sae import Run, TrainingLog, measure, train_together
    from neuraleraser.sites import Site

    where = list(dict.fromkeys(str(Site.parse(text)) for text in sites))
    widths = list(dict.fromkeys(n_features))
    if not where or not widths:
        raise SettingsError(f"{len(where)} sites, {len(widths)} widths: pass at least one of each")
    wanted = [(site, n) for site in where for n in widths]
    paths = _paths(wanted, out)
    fixed: dict[str, Any] = {"architecture": architecture, "learning_rate": learning_rate}
    fixed |= {"discriminant": discriminant, "bind": bind, "contrast": contrast}
    fixed |= {"k": k, "steps": steps, "seed": stream.seed, "checkpoint_every": checkpoint_every}
    fixed |= {"log_every": min(50, max(1, steps // 20))}
    chosen = [TrainSettings(n_features=n, **fixed) for _, n in wanted]
    written = {f"--out: {p.name}": p for path in paths for p in (path, *_beside(path))}
    read = {"--activations": activations, "--prompts": prompts, "--model": model}
    check_outputs(written, read, folders={"--tensorboard": tensorboard})
    check_sampling(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, batch_size=batch_size)
    drawn_as = (num_inference_steps, guidance_scale, batch_size)
    logs = [TrainingLog(_beside(p)[0], tensorboard and tensorboard / p.stem) for p in paths]
    pool, data, names = _source(where, model, activations, prompts, stream, drawn_as, labelled=chosen[0].labelled)
    runs = {
        str(path): Run(s, site, _beside(path)[1], data | {"site": site})
        for path, s, (site, _) in zip(paths, chosen, wanted, strict=True)
    }
    log_of = dict(zip(runs, logs, strict=True))
    unexplained: dict[str, str] = {}
    drawn, draw = 0, pool.chunk

    with tqdm(total=steps, desc="SAE", unit="step") as bar:

        def chunk(number: int, stopped: Any) -> Any:
            nonlocal drawn
            made = draw(number, stopped)
            drawn += 1
            if not unexplained:
                bar.set_postfix_str(f"filling the pool, {min(drawn, pool.buffer_chunks)} of {pool.buffer_chunks}")
            return made

        def on_step(name: str, log: StepLog) -> None:
            if not unexplained:  # what an earlier run did took this one no time
                bar.initial = bar.n = max(0, log.step - fixed["log_every"])
            log_of[name](log)
            unexplained[name] = f"{log.fvu:.3f}"
            bar.update(log.step - bar.n)
            bar.set_postfix(unexplained=" ".join(unexplained.values()), dead=f"{log.dead:.1%}")

        pool.chunk = chunk
        saes = train_together(pool, runs, on_step)
    for log in logs:
        log.close()
    held_out = _next_vectors(pool, steps, where)
    for (name, run), path in zip(runs.items(), paths, strict=True):
        figures = measure(saes[name], held_out[run.source])
        more = {"labels": names} if bind or discriminant else {}
        header = {"site": run.source, "model": model, "measures": figures, **more}
        save_or_keep(path, partial(saes[name].save, header=header))
        _beside(path)[1].unlink(missing_ok=True)
        explained, l0, dead = (figures[key] for key in ("explained_variance", "l0", "dead_share"))
        print(
            f"{path}: {saes[name].n_features} features, {l0:.1f} fire for a vector, {dead:.1%} never; "
            f"{explained:.1%} of the variance explained"
        )


def _paths(wanted: Sequence[tuple[str, int]], out: Path | None) -> list[Path]:
    """Return the paths of the SAEs: in a folder, or to a file if there is one of them."""
    out = out or Path("sae.safetensors" if len(wanted) == 1 else "saes")
    if out.suffix == ".safetensors":
        if len(wanted) > 1:
            raise SettingsError(f"{len(wanted)} SAEs do not fit into one file {out}: pass a folder with --out")
        return [out]
    short = {site: file_name(site.removesuffix(":output:image").replace(":", "-")) for site, _ in wanted}
    return [out / f"{short[site]}-{n}.safetensors" for site, n in wanted]


def _beside(path: Path) -> tuple[Path, Path]:
    """The log and the checkpoint of the SAE at `path`."""
    return path.with_suffix(".jsonl"), path.with_suffix(".training.safetensors")


def _source(
    where: Sequence[str],
    model: str,
    activations: Path | None,
    prompts: Path | None,
    stream: StreamSettings,
    drawn_as: tuple[int | None, float | None, int | None],
    labelled: bool,
) -> tuple[Any, dict[str, Any], list[str]]:
    """The stream of batches, what it is in words, and the names of its labels."""
    from neuraleraser.activations import Shards, activation_stream, described
    from neuraleraser.families.defaults import default_sampling
    from neuraleraser.families.opening import open_pipeline
    from neuraleraser.sites import Site

    if activations is not None:
        shards = Shards.open(activations)
        if missing := [site for site in where if site not in shards.sources]:
            raise DataError(f"{activations} holds activations of {', '.join(shards.sources)}, not of {missing[0]}")
        data = {"activations": shards.digest, "train_batch_size": stream.train_batch_size, "stream_seed": stream.seed}
        names = list(shards.data.get("labels", []))
        if labelled and not names:
            raise DataError(f"{activations} has no labels: collect from prompts that say what they show")
        return shards.batches(stream.train_batch_size, stream.seed, prefetch=stream.prefetch), data, names
    lines = read_prompts(prompts) if prompts else None
    pipe = open_pipeline(model)
    stream = replace(stream, sampling=default_sampling(pipe, *drawn_as))
    texts, labels, names = prompts_of(pipe, model, lines, stream.num_images or CAPTIONS)
    if labelled and labels is None:
        raise DataError(f"{prompts} says of no prompt what it shows: write it after a tab, by commas")
    data = described(model, texts, stream) | {"labels": names if labelled else []}
    sites = [Site.parse(site) for site in where]
    return activation_stream(pipe, texts, sites, stream, labels if labelled else None), data, names


def _next_vectors(pool: Any, step: int, sources: Sequence[str]) -> dict[str, Any]:
    """The vectors that come from this step on, [up to HELD_OUT, d] of each source; in no more batches than steps."""
    import torch

    parts: dict[str, list[Any]] = {source: [] for source in sources}
    stream = pool(step)
    for _, item in zip(range(step), stream, strict=False):
        for source in sources:
            x = item[source]
            parts[source].append((x[0] if isinstance(x, tuple) else x).float())
        if sum(map(len, parts[sources[0]])) >= HELD_OUT:
            break
    stream.close()
    return {source: torch.cat(part)[:HELD_OUT] for source, part in parts.items()}
