"""The verbs that record activations, train SAEs, and look at one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from neuraleraser.cli.prompts import prompts_of, read_prompts
from neuraleraser.cli.verbs import Flat, app, bars, table, verb
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.sae.settings import Architecture, StepLog, TrainSettings
from neuraleraser.settings import Sampling, StreamSettings

HELD_OUT = 2**16
"""Vectors that a finished SAE is measured on: those that would have come next."""
CAPTIONS = 4000
"""Captions of the canvas that an endless stream is drawn from; each comes again with other noise."""
INSPECTED = 200_000
"""Seed of the first image that `inspect` draws; erasers are made and tested with others."""


@verb(app, "collect")
def collect(
    sites: tuple[str, ...],
    model: str = "canvas",
    prompts: Path | None = None,
    images: int = 300,
    per_image: int = 256,
    window: int = StreamSettings.window,
    seed: int = 0,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    out: Path = Path("activations"),
) -> None:
    """Draw images and record a random sample of their activations, mixed, to train SAEs on. Run again to go on.

    Args:
        sites: Sites such as unet.mid_block.attentions.0 (`neuraleraser sites` lists them).
        model: The pipeline: canvas, a folder, or a Hub id.
        prompts: Text file, one prompt a line, after a tab what it shows, by commas; None: captions of the canvas.
        images: How many images to draw; the prompts are repeated if they are fewer.
        per_image: Activation vectors kept of each image and site, over all steps and positions.
        window: How many batches of images are mixed at a time, in memory.
        seed: Decides the images' noise, which vectors are kept, and their order.
        sampling: How images are drawn.
        out: Folder for the shards, one a batch of images.
    """
    from tqdm import tqdm

    from neuraleraser.activations import activation_stream, described, write_shards
    from neuraleraser.models import open_pipeline
    from neuraleraser.sites import Site

    where = [Site.parse(text) for text in sites]
    if not where or images < 1:
        raise SettingsError(f"{len(where)} sites, {images} images: pass at least one of each")
    lines = read_prompts(prompts) if prompts else None
    settings = StreamSettings(1, per_image, images, window, reuse=1, seed=seed, sampling=sampling)
    pipe = open_pipeline(model)
    texts, labels, names = prompts_of(pipe, model, lines, images)
    data = described(model, texts, settings) | {"sites": [str(site) for site in where], "labels": names}
    pool = activation_stream(pipe, texts, where, settings, labels)
    count = -(-images // sampling.batch)
    with tqdm(total=count, desc="activations", unit="shard") as bar:

        def on_shard(number: int) -> None:
            bar.update(number + 1 - bar.n)

        shards = write_shards(pool, out, count, data, on_shard)
    print(f"{out}: {shards.count} shards of {shards.rows} vectors at each of {len(where)} sites")


@verb(app, "train")
def train(
    sites: Positional[tuple[str, ...]],
    /,
    stream: Annotated[StreamSettings, Flat],
    model: str = "canvas",
    activations: Path | None = None,
    prompts: Path | None = None,
    features: tuple[int, ...] = (2048,),
    active: int = 16,
    steps: int = 1500,
    architecture: Architecture = "batchtopk",
    bind: float = 0.0,
    contrast: float = 0.0,
    learning_rate: float | None = None,
    checkpoint_every: int = 200,
    out: Path = Path("sae.safetensors"),
    tensorboard: Path | None = None,
) -> None:
    """Train sparse autoencoders while the pipeline draws: of every site named, one of every width. Run again to go on.

    Args:
        sites: Sites such as unet.mid_block.attentions.0; all are trained from the same images.
        model: The pipeline to draw with: canvas, a folder, or a Hub id.
        activations: A folder from `collect`, to train on instead of drawing.
        prompts: Text file, one prompt a line, after a tab what it shows, by commas; None: captions of the canvas.
        features: Features of the SAE; of several widths one SAE each.
        active: Features that fire for an activation vector, on average.
        steps: Batches to train on.
        architecture: Which features fire in training; afterwards each fires by its own threshold.
        bind: Weight of the loss that gives every concept a feature of its own (0: off; start with 0.3, matryoshka and
            --per-map 16).
        contrast: Weight of the loss that draws images of the same concepts together (0: off; start with 0.01).
        learning_rate: Peak learning rate; None: from features, width and steps.
        checkpoint_every: Steps from one checkpoint to the next.
        out: The SAE's file, with its log (.jsonl) beside it; for several SAEs a folder.
        tensorboard: Folder for TensorBoard's files, if TensorBoard is installed.
    """
    from tqdm import tqdm

    from neuraleraser.sae import Run, TrainingLog, measure, train_together
    from neuraleraser.sites import Site

    where = list(dict.fromkeys(str(Site.parse(text)) for text in sites))
    widths = list(dict.fromkeys(features))
    if not where or not widths:
        raise SettingsError(f"{len(where)} sites, {len(widths)} widths: pass at least one of each")
    wanted = [(site, n) for site in where for n in widths]
    paths = _paths(wanted, out)
    fixed: dict[str, Any] = {"architecture": architecture, "bind": bind, "contrast": contrast, "lr": learning_rate}
    fixed |= {"k": active, "steps": steps, "seed": stream.seed, "checkpoint_every": checkpoint_every}
    fixed |= {"log_every": min(50, max(1, steps // 20))}
    chosen = [TrainSettings(n=n, **fixed) for _, n in wanted]
    logs = [TrainingLog(p.with_suffix(".jsonl"), tensorboard and tensorboard / p.stem) for p in paths]
    pool, data, names = _source(where, model, activations, prompts, stream, labelled=bool(bind or contrast))
    runs = {
        str(path): Run(s, site, path.with_suffix(".training.safetensors"), data | {"site": site})
        for path, s, (site, _) in zip(paths, chosen, wanted, strict=True)
    }
    told = dict(zip(runs, logs, strict=True))
    unexplained: dict[str, str] = {}
    drawn, draw = 0, pool.chunk

    with tqdm(total=steps, desc="SAE", unit="step") as bar:

        def chunk(number: int, stopped: Any) -> Any:
            nonlocal drawn
            made = draw(number, stopped)
            drawn += 1
            if not unexplained:
                bar.set_postfix_str(f"filling the pool, {min(drawn, pool.window)} of {pool.window}")
            return made

        def on_step(name: str, log: StepLog) -> None:
            if not unexplained:  # what an earlier run did took this one no time
                bar.initial = bar.n = max(0, log.step - fixed["log_every"])
            told[name](log)
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
        more = {"labels": names} if bind else {}
        saes[name].save(path, {"site": run.source, "model": model, "measures": figures, **more})
        path.with_suffix(".training.safetensors").unlink(missing_ok=True)
        explained, l0, dead = (figures[key] for key in ("explained_variance", "l0", "dead_share"))
        print(
            f"{path}: {saes[name].n} features, {l0:.1f} fire for a vector, {dead:.1%} never; "
            f"{explained:.1%} of the variance explained"
        )


def _paths(wanted: Sequence[tuple[str, int]], out: Path) -> list[Path]:
    """Where the SAEs go: one to `out` itself, several into it as a folder."""
    if len(wanted) == 1:
        return [out]
    if out.suffix == ".safetensors":
        if out.name != "sae.safetensors":  # asked for, not the default
            raise SettingsError(f"{len(wanted)} SAEs do not fit into one file {out}: pass a folder with --out")
        out = out.with_name("saes")
    short = {site: site.removesuffix(":output:image").replace(":", "-") for site, _ in wanted}
    return [out / f"{short[site]}-{n}.safetensors" for site, n in wanted]


def _source(
    where: Sequence[str],
    model: str,
    activations: Path | None,
    prompts: Path | None,
    stream: StreamSettings,
    labelled: bool,
) -> tuple[Any, dict[str, Any], list[str]]:
    """The stream of batches, what it is in words, and the names of its labels."""
    from neuraleraser.activations import Shards, activation_stream, described
    from neuraleraser.models import open_pipeline
    from neuraleraser.sites import Site

    if activations is not None:
        shards = Shards.open(activations)
        if missing := [site for site in where if site not in shards.sources]:
            raise DataError(f"{activations} holds activations of {', '.join(shards.sources)}, not of {missing[0]}")
        data = {"activations": shards.digest, "batch": stream.batch, "stream_seed": stream.seed}
        names = list(shards.data.get("labels", []))
        if labelled and not names:
            raise DataError(f"{activations} has no labels: collect from prompts that say what they show")
        return shards.batches(stream.batch, stream.seed, ahead=stream.ahead), data, names
    lines = read_prompts(prompts) if prompts else None
    pipe = open_pipeline(model)
    texts, labels, names = prompts_of(pipe, model, lines, stream.images or CAPTIONS)
    if labelled and labels is None:
        raise DataError(f"{prompts} says of no prompt what it shows: write it after a tab, by commas")
    data = described(model, texts, stream) | {"labels": names if labelled else []}
    sites = [Site.parse(site) for site in where]
    return activation_stream(pipe, texts, sites, stream, labels if labelled else None), data, names


def _next_vectors(pool: Any, step: int, sources: Sequence[str]) -> dict[str, Any]:
    """The vectors that come from this step on, [up to HELD_OUT, d] of each source, whole batches."""
    import torch

    parts: dict[str, list[Any]] = {source: [] for source in sources}
    stream = pool(step)
    while sum(map(len, parts[sources[0]])) < HELD_OUT:
        item = next(stream)
        for source in sources:
            x = item[source]
            parts[source].append((x[0] if isinstance(x, tuple) else x).float())
    stream.close()
    return {source: torch.cat(part)[:HELD_OUT] for source, part in parts.items()}


@verb(app, "inspect")
def inspect(
    sae: Positional[Path | None] = None,
    /,
    model: str | None = None,
    site: str | None = None,
    prompts: Path | None = None,
    images: int = 20,
    per_image: int = 2048,
    times: int = 6,
    seed: int = INSPECTED,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    sheet: Path | None = None,
) -> None:
    """Say how good an SAE is: on its own activations, and what the pipeline loses with its reconstructions.

    Args:
        sae: The SAE's file; None: the one that ships for the canvas.
        model: The pipeline to measure it in: canvas, a folder, or a Hub id; None: the one its file names, and where
            it names none only what the file says is shown.
        site: Where the SAE reads; None: what its file says.
        prompts: Text file, one prompt a line; None: captions of the canvas.
        images: Images to measure on.
        per_image: Activation vectors of an image, over all steps and positions.
        times: Timesteps at which the denoising loss is measured.
        seed: Seed of the first image; the others follow.
        sampling: How images are drawn; all in one batch.
        sheet: PNG file for the images without (left) and with (right) reconstructions.
    """
    from neuraleraser.fit.dictionary import CANVAS
    from neuraleraser.sae import SAE

    path = sae or CANVAS / "sae.safetensors"
    path = path / "sae.safetensors" if path.is_dir() else path
    loaded = SAE.load(path)
    named = model or loaded.header.get("model") or ("canvas" if sae is None else None)
    where = site or loaded.header.get("site")
    settings = loaded.header.get("settings") or {}
    lines = [("file", str(path)), ("features", f"{loaded.n}, on activations {loaded.d} wide")]
    lines += [("site", str(where or "not said: pass --site")), ("pipeline", str(named or "not said: pass --model"))]
    if isinstance(settings, dict) and settings:
        kind = settings.get("architecture", "batchtopk")
        lines.append(("training", f"{kind}, k = {settings.get('k')}, {settings.get('steps')} steps"))
    print(table([(name, "", value) for name, value in lines]) + "\n")
    if named is None or where is None:
        try:
            print(_figures(loaded.header["measures"], loaded.n, "when it was made") + "\n")
        except (KeyError, TypeError, ValueError):
            print("The file holds no measures.")
        print("Pass --model, and --site where the file does not say it, to measure it in its pipeline.")
        return
    _measured(loaded, path, str(named), str(where), prompts, images, per_image, times, seed, sampling, sheet)


def _measured(
    sae: Any,
    path: Path,
    model: str,
    where: str,
    prompts: Path | None,
    images: int,
    per_image: int,
    times: int,
    seed: int,
    sampling: Sampling,
    sheet: Path | None,
) -> None:
    """Measure `sae` in its pipeline, and print it."""
    from dataclasses import replace

    from neuraleraser.activations import bank, substitution
    from neuraleraser.bench.files import write_bytes
    from neuraleraser.bench.panels import grid_sheet
    from neuraleraser.bench.pictures import png
    from neuraleraser.models import open_pipeline
    from neuraleraser.sae import measure
    from neuraleraser.sites import Site

    if images < 1 or times < 1 or per_image < 1:
        raise SettingsError(f"images is {images}, per_image {per_image}, times {times}: pass at least 1 of each")
    at, lines = Site.parse(where), read_prompts(prompts) if prompts else None
    pipe = open_pipeline(model)
    texts = prompts_of(pipe, model, lines, images)[0]
    texts, seeds = [texts[i % len(texts)] for i in range(images)], range(seed, seed + images)
    together = replace(sampling, batch=images)
    x = bank(pipe, texts, seeds, [at], per_image, together)[at]
    if x.shape[1] != sae.d:
        raise DataError(f"{path}: field W_enc takes activations {sae.d} wide, {at} of {model!r} has {x.shape[1]}")
    print(_figures(measure(sae, x), sae.n, f"on {images} images"))
    found = substitution(pipe, sae, at, texts, seeds, together, times)
    rows = [("timestep", "explained", "fire", "loss", "reconstructed", "mean instead", "kept")]
    for t in found.times:
        losses = [f"{value:.4f}" for value in (t.loss, t.replaced, t.mean)]
        rows.append((f"{t.time:g}", f"{t.explained_variance:.1%}", f"{t.l0:.1f}", *losses, f"{t.recovered:.1%}"))
    print("\nDenoising loss with the reconstructions, or the mean, in place of the activations\n" + table(rows))
    print("kept: of what the activations are worth for the loss; 100 % is as good as the model itself")
    print(f"\nImages differ by {found.difference:.1f} of 255 (root mean square) with the reconstructions in place.")
    if sheet:
        pairs = zip(texts, found.before, found.after, strict=True)
        write_bytes(sheet, png(grid_sheet([(text, [a, b]) for text, a, b in pairs], ["model", "reconstructed"])))
        print(sheet)


def _figures(figures: Mapping[str, Any], n: int, where: str) -> str:
    """Explained variance, L0, dead share and the histogram of firing rates of n features."""
    edges, counts = figures["rates"]["log10_edges"], figures["rates"]["features"]
    dead = round(figures["dead_share"] * n)
    rows = [
        ("variance explained", "", f"{figures['explained_variance']:.2%}"),
        ("features that fire", "", f"{figures['l0']:.2f} for a vector"),
        ("dead features", "", f"{figures['dead_share']:.2%} ({dead:,} of {n:,} never fired)"),
    ]
    ranges = [f"{_percent(low)} to {_percent(high)}" for low, high in pairwise(edges)]
    shown = list(zip(ranges, counts, strict=True))
    while shown and not shown[0][1]:
        shown.pop(0)
    histogram = bars([("never", dead), *shown])
    return (
        f"Measured {where}, {figures['vectors']:,} vectors\n{table(rows)}\n\nFeatures by firing rate, in %\n{histogram}"
    )


def _percent(log10: float) -> str:
    """The rate 10^log10 in percent, in one digit: -3.5 -> 0.03."""
    return f"{float(f'{100 * 10**log10:.1g}'):g}"
