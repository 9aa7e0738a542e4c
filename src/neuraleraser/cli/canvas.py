"""The verbs of the embedded world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from neuraleraser.canvas.recipe import TrainCanvas
from neuraleraser.canvas.words import DEV_OBJECTS, OBJECTS, STYLES, VOCABULARY
from neuraleraser.cli.verbs import Flat, app, canvas, verb
from neuraleraser.errors import ConceptError
from neuraleraser.io.dependencies import import_optional
from neuraleraser.io.outputs import check_outputs
from neuraleraser.settings import MAX_COUNT, check_whole


@verb(canvas, "train")
def canvas_train(settings: Annotated[TrainCanvas, Flat]) -> None:
    """Train the canvas pipeline: autoencoder, then denoiser and text encoder. Run again to go on."""
    from neuraleraser.canvas.train import train as run

    check_outputs({}, folders={"--folder": settings.folder})
    run(settings)
    print(settings.folder / "pipeline")


@verb(canvas, "render")
def canvas_render(out: Path = Path("renders"), seeds: int = 1, first: int = 0, size: int = 64) -> None:
    """Render every style with every object into {style}/{object}/{seed}.png, as UnlearnCanvas lays it out.

    Args:
        out: The folder.
        seeds: Renders of each style and object.
        first: The first of their seeds.
        size: Pixels a side.
    """
    from tqdm import tqdm

    import_optional("cv2", "rendering", "evaluate")
    from neuraleraser.canvas.data import write_folder

    check_whole("seeds", seeds, 1, MAX_COUNT)
    check_whole("first", first, 0, MAX_COUNT)
    check_whole("size", size, 8, 4096)
    check_outputs({}, folders={"--out": out})
    seeds_ = range(first, first + seeds)
    for _ in tqdm(write_folder(out, seeds_, size), total=len(STYLES) * len(OBJECTS) * seeds, desc="render", unit="img"):
        pass
    print(out)


@verb(canvas, "sheet")
def canvas_sheet(
    out: Path = Path("canvas.png"), objects: tuple[str, ...] = ("Cats", *DEV_OBJECTS), seed: int = 0, size: int = 128
) -> None:
    """Write a contact sheet: a row a style, a column an object.

    Args:
        out: The PNG file.
        objects: Objects to show, by name.
        seed: Seed of the renders.
        size: Pixels a side of each render.
    """
    import_optional("cv2", "rendering", "evaluate")
    from neuraleraser.canvas.render import Content, render
    from neuraleraser.evaluation.figures import grid_sheet, png
    from neuraleraser.io.atomic import write_bytes

    check_whole("seed", seed, 0, MAX_COUNT)
    check_whole("size", size, 8, 1024)
    check_outputs({"--out": out})
    if not objects or set(objects) - set(OBJECTS):
        raise ConceptError(f"{list(objects)} are to be shown: pass objects of {', '.join(OBJECTS)}")
    rows = [(style, [render(Content((name,), style), seed, size) for name in objects]) for style in STYLES]
    write_bytes(out, png(grid_sheet(rows, list(objects))))
    print(out)


@verb(canvas, "judge")
def canvas_judge(folder: Path = Path("runs/judges"), renders: int = 60_000, held_out: int = 6_000) -> None:
    """Train and calibrate both judges on renders; the finished ones replace those of the package.

    Args:
        folder: Where renders and checkpoints go; run again with it to go on.
        renders: Renders to train on.
        held_out: Renders to calibrate and to measure on.
    """
    import_optional("cv2", "rendering", "evaluate")
    from neuraleraser.canvas.data import render_set
    from neuraleraser.canvas.judge import train_judges

    check_whole("renders", renders, 1, 100 * MAX_COUNT)
    check_whole("held_out", held_out, 2, 100 * MAX_COUNT)
    check_outputs({}, folders={"--folder": folder})
    train_judges(render_set(renders, 1, folder=folder), render_set(held_out, 2, folder=folder), folder)


@verb(canvas, "reference")
def canvas_reference(model: str = "canvas", out: Path = Path("runs/reference"), num_images: int = 500) -> None:
    """Train the SAE of a canvas pipeline and record how its features fire on everything (for `erase --reference`).

    Args:
        model: canvas, or a folder with another canvas.
        out: The reference's folder.
        num_images: Images to record how features fire on, at most 500.
    """
    from neuraleraser.families.canvas import GATE
    from neuraleraser.families.opening import open_pipeline
    from neuraleraser.fitting.reference import train_reference
    from neuraleraser.precision import fast_dtype

    check_whole("num_images", num_images, 1, 500)
    check_outputs({}, {"--model": model}, folders={"--out": out})
    train_reference(open_pipeline(model, fast_dtype()), VOCABULARY, GATE, out, num_images)
    print(out)


app.command(canvas, name="canvas", help="The embedded world: train it, render it, look at it.")
