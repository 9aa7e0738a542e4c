"""`neuraleraser doctor`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from neuraleraser.cli.verbs import AUTOMATIC, Machine, app, verb
from neuraleraser.errors import SettingsError
from neuraleraser.io.tables import text_table
from neuraleraser.settings import check_whole


@verb(app, "doctor")
def doctor(
    erasers: tuple[str, ...],
    model: str = "canvas",
    neighbours: tuple[str, ...] = (),
    lookalikes: Path | None = None,
    clip: str | None = None,
    unlearncanvas: tuple[Path, Path] | None = None,
    nudenet: bool = False,
    num_images: int = 8,
    num_inference_steps: int | None = None,
    calibrate: bool = False,
    machine: Machine = AUTOMATIC,
) -> int:
    """Look whether erasers work on a pipeline, and exit with 1 if one does not.

    Args:
        erasers: Erasers: files, folders or Hub ids.
        model: The pipeline: canvas, a folder, or a Hub id.
        neighbours: Phrases of what they could be mistaken for; none named: on the canvas all others of the kind.
        lookalikes: Text file of prompts without the concepts in which they must not fire, one per line.
        clip: A CLIP checkpoint (folder or Hub id) to judge by; needs neighbours. The canvas has its own judge.
        unlearncanvas: UnlearnCanvas's classifiers to judge by: style50.pth and style50_cls.pth.
        nudenet: Judge by NudeNet's detector, whatever the erasers are called (extra nudenet).
        num_images: Images generated of each kind.
        num_inference_steps: Denoising steps; None: as each eraser was fitted.
        calibrate: Fit the gates to this pipeline's weights first (nothing is written).
    """
    from neuraleraser.concepts import named_concept
    from neuraleraser.diagnosis import diagnose
    from neuraleraser.eraser import Eraser
    from neuraleraser.families.defaults import sampling_for_eraser
    from neuraleraser.fitting import calibrate as run_calibrate
    from neuraleraser.fitting.clip_judge import calibrate_clip_judge
    from neuraleraser.judges import NudeNetJudge, UnlearnCanvasJudge
    from neuraleraser.prompts import read_prompts

    if not erasers:
        raise SettingsError("there are no erasers to look at: pass their files with --erasers")
    check_whole("num_images", num_images, 1, 1000)
    if num_inference_steps is not None:
        check_whole("num_inference_steps", num_inference_steps, 1, 1000)
    if bool(clip) + bool(unlearncanvas) + nudenet > 1:
        raise SettingsError("there is one judge at a time: pass one of --clip, --unlearncanvas and --nudenet")
    loaded = [Eraser.from_pretrained(source) for source in erasers]
    given = [prompt for prompt, _ in read_prompts(lookalikes)] if lookalikes else []
    pipe = machine.open_pipeline(model)
    samplings = [sampling_for_eraser(pipe, e.header.sampling) for e in loaded]
    samplings = [replace(s, batch_size=min(num_images, 8, s.batch_size)) for s in samplings]
    if num_inference_steps is not None:
        samplings = [replace(s, num_inference_steps=num_inference_steps) for s in samplings]
    if calibrate:
        loaded = [
            run_calibrate(pipe, e, neighbours=neighbours, sampling=s) for e, s in zip(loaded, samplings, strict=True)
        ]
    judges: list[Any] = []
    if clip:
        concepts = [named_concept(pipe, e.name, e.header.kind) for e in loaded]
        judges = [
            calibrate_clip_judge(pipe, c, neighbours, clip, sampling=s)
            for c, s in zip(concepts, samplings, strict=True)
        ]
    elif unlearncanvas:
        judges = [UnlearnCanvasJudge.load(*unlearncanvas, device=pipe.device)] * len(loaded)
    elif nudenet:
        judges = [NudeNetJudge(name=e.name) for e in loaded]
    found = diagnose(
        pipe,
        loaded,
        lookalikes=[given] * len(loaded) if given else (),
        judges=judges,
        neighbours=neighbours,
        num_images=num_images,
        samplings=samplings,
    )
    mark = {True: "well", False: "WRONG", None: "?"}
    rows = [(c.eraser, c.what, mark[c.well], c.found) for c in found.checks]
    print(text_table(rows, ("eraser", "check", "", "found"), left=(0, 1, 2, 3)))
    print(f"\n{found.verdict}")
    return 0 if found.well else 1
