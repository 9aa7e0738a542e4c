"""`neuraleraser inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from neuraleraser.cli.verbs import AUTOMATIC, Flat, Machine, MachineOptions, app, bars, verb
from neuraleraser.errors import DataError, FileError, SettingsError
from neuraleraser.io.names import printable
from neuraleraser.io.outputs import check_outputs, save_or_keep
from neuraleraser.io.tables import text_table
from neuraleraser.prompts import default_prompts, read_prompts
from neuraleraser.settings import InspectSettings


@verb(app, "inspect")
def inspect(
    source: Positional[str | None] = None,
    /,
    settings: Annotated[InspectSettings, Flat] = InspectSettings(),  # noqa: B008  (frozen)
    model: str | None = None,
    site: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    machine: Machine = AUTOMATIC,
) -> None:
    """Say how good an SAE is, or what an eraser's gates see.

    An SAE is measured on its own activations, and by what the pipeline loses with its reconstructions. Of an eraser's
    file, or folder, is shown what it says of itself: routes, gates, corrections, cost.

    Args:
        source: The SAE: a file, a folder or a Hub id; None: the one that ships for the canvas. Or an eraser's file or
            folder.
        model: The pipeline to measure it in: canvas, a folder, or a Hub id; None: the canvas where it is the canvas's,
            else only what the file says is shown.
        site: Where the SAE reads; None: what its file says.
        num_inference_steps: Denoising steps; None: the model's usual.
        guidance_scale: Classifier-free guidance scale; None: the model's usual.
    """
    from neuraleraser.families.canvas import REFERENCE
    from neuraleraser.sae import SAE

    file = _eraser_file(source) if source else None
    if file is not None:
        if settings != InspectSettings() or (model, site, num_inference_steps, guidance_scale) != (None,) * 4:
            raise SettingsError(f"{source} is an eraser, of which only its file is read: leave all options out")
        _show_eraser(file)
        return
    said_source, source = source, source or str(REFERENCE)
    check_outputs(
        {"--comparison-png": settings.comparison_png},
        {"the SAE": source, "--prompts": settings.prompts, "--model": model},
    )
    if source.endswith(".safetensors") and not Path(source).exists():
        raise FileError(f"there is no file {source!r}: pass that of an SAE or an eraser, a folder, or an SAE's Hub id")
    loaded = SAE.from_pretrained(source)
    said = str(loaded.header.get("model") or ("canvas" if said_source is None else ""))
    named = model or ("canvas" if said == "canvas" else None)  # no file decides what is downloaded
    where = site or loaded.header.get("site")
    made = loaded.header.get("settings")
    lines = [("SAE", source), ("features", f"{loaded.n_features}, on activations {loaded.d_in} wide")]
    lines += [("site", str(where or "not said: pass --site")), ("pipeline", named or said or "not said: pass --model")]
    if isinstance(made, dict):
        kind = made.get("architecture", "batchtopk")
        lines.append(("training", f"{kind}, k = {made.get('k')}, {made.get('steps')} steps"))
    print(text_table([(name, printable(value, 300)) for name, value in lines], left=(0, 1)) + "\n")
    if named and where:
        _measured(loaded, source, named, str(where), settings, num_inference_steps, guidance_scale, machine)
        return
    try:
        print(_figures(loaded.header["measures"], loaded.n_features, "when it was made"))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        print("The file holds no measures, or none that can be read.")
    print("\nPass --model, and --site where the file does not say it, to measure it in its pipeline.")


def _eraser_file(source: str) -> Path | None:
    """Return the eraser's file that a path leads to; None where it leads to none."""
    from neuraleraser.eraser import Eraser
    from neuraleraser.io.tensor_file import kind_of

    path = Path(source) / Eraser.FILES[0] if Path(source).is_dir() else Path(source)
    return path if path.is_file() and kind_of(path) == "eraser" else None


def _show_eraser(file: Path) -> None:
    """Print what an eraser sees and does."""
    from neuraleraser.eraser import Eraser
    from neuraleraser.eraser.corrections.correction import sites_of
    from neuraleraser.eraser.sight import routes_text, sight_rows

    eraser = Eraser.load(file)
    kind = f" ({eraser.header.kind})" if eraser.header.kind else ""
    rows = [("eraser", str(file)), ("concept", eraser.name + kind), ("made for", eraser.header.base or "not said")]
    rows += sight_rows(eraser.parts, eraser.header)
    rows += [("correction", f"{c.KIND}, at {', '.join(map(str, sites_of(c)))}") for c in eraser.corrections]
    print(text_table([(name, printable(value, 600)) for name, value in rows], left=(0, 1)))
    print(f"\n{routes_text(eraser.header)}")


def _measured(
    sae: Any,
    source: str,
    model: str,
    where: str,
    s: InspectSettings,
    steps: int | None,
    guidance_scale: float | None,
    machine: MachineOptions,
) -> None:
    """Measure `sae` in its pipeline, and print it."""
    from neuraleraser.activations import activation_matrix, measure_loss_recovered
    from neuraleraser.evaluation.figures import grid_sheet, png
    from neuraleraser.families.defaults import default_sampling
    from neuraleraser.io.atomic import write_bytes
    from neuraleraser.sae import measure_sae
    from neuraleraser.sites import Site

    at, lines = Site.parse(where), read_prompts(s.prompts) if s.prompts else None
    pipe = machine.open_pipeline(model)
    texts = [text for text, _ in lines] if lines else default_prompts(pipe, s.num_images).texts
    texts, seeds = [texts[i % len(texts)] for i in range(s.num_images)], range(s.seed, s.seed + s.num_images)
    together = default_sampling(pipe, steps, guidance_scale, s.num_images)
    x = activation_matrix(pipe, texts, seeds, [at], s.vectors_per_image, together)[at]
    if x.shape[1] != sae.d_in:
        raise DataError(f"{source}: field W_enc takes activations {sae.d_in} wide, {at} of {model!r} has {x.shape[1]}")
    print(_figures(measure_sae(sae, x), sae.n_features, f"on {s.num_images} images"))
    found = measure_loss_recovered(pipe, sae, at, texts, seeds, together, s.num_timesteps)
    head = ("timestep", "explained", "fire", "loss", "reconstructed", "mean instead", "recovered")
    rows: list[tuple[str, ...]] = []
    for t in found.by_timestep:
        losses = [f"{value:.4f}" for value in (t.loss, t.loss_reconstructed, t.loss_mean)]
        rows.append(
            (
                f"{t.time:g}",
                f"{t.explained_variance:.1%}",
                f"{t.l0:.1f}",
                *losses,
                f"{t.recovered:.1%}" if t.loss_mean > t.loss else "-",
            )
        )
    print(
        "\nDenoising loss with the reconstructions, or the mean, in place of the activations\n" + text_table(rows, head)
    )
    print("recovered: of what the activations are worth for the loss; 100 % is as good as the model itself")
    print(f"\nImages differ by {found.difference:.1f} of 255 (root mean square) with the reconstructions in place.")
    if s.comparison_png:
        pairs = zip(texts, found.before, found.after, strict=True)
        sheet = png(grid_sheet([(text, [a, b]) for text, a, b in pairs], ["model", "reconstructed"]))
        save_or_keep(s.comparison_png, lambda path: write_bytes(path, sheet))
        print(s.comparison_png)


def _figures(figures: Mapping[str, Any], n: int, where: str) -> str:
    """Explained variance, L0, dead share and the histogram of firing rates of n features."""
    edges, counts = figures["rates"]["log10_edges"], figures["rates"]["features"]
    dead = round(figures["dead_share"] * n)
    rows = [
        ("variance explained", f"{figures['explained_variance']:.2%}"),
        ("features that fire", f"{figures['l0']:.2f} for a vector"),
        ("dead features", f"{figures['dead_share']:.2%} ({dead:,} of {n:,} never fired)"),
    ]
    ranges = [f"{_percent(low)} to {_percent(high)}" for low, high in pairwise(edges)]
    shown = list(zip(ranges, counts, strict=True))
    while shown and not shown[0][1]:
        shown.pop(0)
    title = f"Measured {where}, {figures['vectors']:,} vectors"
    histogram = "Features by firing rate, in %\n" + bars([("never", dead), *shown])
    return f"{title}\n{text_table(rows, left=(0, 1))}\n\n{histogram}"


def _percent(log10: float) -> str:
    """The rate 10^log10 in percent, in one digit: -3.5 -> 0.03."""
    return f"{float(f'{100 * 10**log10:.1g}'):g}"
