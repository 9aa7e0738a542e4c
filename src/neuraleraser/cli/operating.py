"""The verbs of whoever runs a service: look whether erasers work, and fit their gates to other weights."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from neuraleraser.cli.verbs import app, table, verb
from neuraleraser.errors import SettingsError


@verb(app, "doctor")
def doctor(
    model: Positional[str],
    /,
    erasers: tuple[str, ...],
    neighbours: tuple[str, ...] = (),
    lookalikes: Path | None = None,
    clip: str | None = None,
    unlearncanvas: tuple[Path, Path] | None = None,
    nudenet: bool = False,
    num_images: int = 8,
    num_inference_steps: int | None = None,
    calibrate: bool = False,
) -> int:
    """Look whether erasers work on a pipeline, and exit with 1 if one does not.

    Args:
        model: The pipeline: canvas, a folder, or a Hub id.
        erasers: Erasers: files, folders or Hub ids.
        neighbours: Phrases of what they could be mistaken for; none named: on the canvas all others of the kind.
        lookalikes: Text file of prompts without the concepts in which they must not fire, one a line.
        clip: A CLIP checkpoint (folder or Hub id) to judge by; needs neighbours. The canvas has its own judge.
        unlearncanvas: UnlearnCanvas's classifiers to judge by: style50.pth and style50_cls.pth.
        nudenet: Judge by NudeNet's detector, whatever the erasers are called (extra nudenet).
        num_images: Images drawn of each kind.
        num_inference_steps: Denoising steps; None: as each eraser was fitted.
        calibrate: Fit the gates to this pipeline's weights first (nothing is written).
    """
    from neuraleraser.cli.prompts import read_prompts
    from neuraleraser.diagnosis import doctor as look
    from neuraleraser.eraser import Eraser
    from neuraleraser.families import family_of
    from neuraleraser.families.defaults import sampling_of
    from neuraleraser.families.naming import named_concept, neighbours_of
    from neuraleraser.families.opening import open_pipeline
    from neuraleraser.fitting.clip_judge import clip_judge
    from neuraleraser.judges import NudeNetJudge, UnlearnCanvasJudge
    from neuraleraser.settings import check_whole

    if not erasers:
        raise SettingsError("there are no erasers to look at: pass their files with --erasers")
    check_whole("num_images", num_images, 1, 1000)
    if num_inference_steps is not None:
        check_whole("num_inference_steps", num_inference_steps, 1, 1000)
    if bool(clip) + bool(unlearncanvas) + nudenet > 1:
        raise SettingsError("there is one judge at a time: pass one of --clip, --unlearncanvas and --nudenet")
    loaded = [Eraser.from_pretrained(source) for source in erasers]
    given = [prompt for prompt, _ in read_prompts(lookalikes)] if lookalikes else []
    pipe = open_pipeline(model)
    concepts = [named_concept(pipe, e.name, e.header.get("kind")) for e in loaded]
    near = [neighbours_of(pipe, c, neighbours) for c in concepts]
    fitted = [sampling_of(pipe, e.header) for e in loaded]
    ways = [
        replace(
            s,
            num_inference_steps=num_inference_steps or s.num_inference_steps,
            batch_size=min(num_images, 8, s.batch_size),
        )
        for s in fitted
    ]
    if calibrate:
        loaded = [_calibrated(pipe, e, c, n, s) for e, c, n, s in zip(loaded, concepts, near, ways, strict=True)]
    judges: list[Any] = []
    family = family_of(pipe)
    if clip:
        judges = [clip_judge(pipe, c, n, clip, sampling=s) for c, n, s in zip(concepts, near, ways, strict=True)]
    elif unlearncanvas:
        judges = [UnlearnCanvasJudge.load(*unlearncanvas, device=pipe.device)] * len(loaded)
    elif nudenet:
        judges = [NudeNetJudge(name=e.name) for e in loaded]
    elif family.judge is not None:
        judges = [family.judge()] * len(loaded)
    others = [
        given or [p.negative for p in c.pairs[:: max(1, len(c.pairs) // num_images)]] + [o.pairs[0].positive for o in n]
        for c, n in zip(concepts, near, strict=True)
    ]
    found = look(pipe, loaded, concepts, others, judges, num_images=num_images, samplings=ways)
    mark = {True: "well", False: "WRONG", None: "?"}
    print(table([("eraser", "check", "", "found"), *((c.eraser, c.what, mark[c.well], c.found) for c in found.checks)]))
    print(f"\n{found.verdict}")
    return 0 if found.well else 1


@verb(app, "calibrate")
def calibrate(
    eraser: Positional[str],
    /,
    model: str,
    concept: str | None = None,
    neighbours: tuple[str, ...] = (),
    num_pairs: int = 8,
    out: Path | None = None,
) -> None:
    """Fit an eraser's gate to other weights of the same architecture, from a few prompts.

    Args:
        eraser: The eraser: a file, a folder or a Hub id.
        model: The pipeline: canvas, a folder, or a Hub id.
        concept: What it erases, as a phrase or a JSON file of prompts; None: the name in its file.
        neighbours: Phrases of what it could be mistaken for; none named: on the canvas all others of the kind.
        num_pairs: Prompts with the concept, and as many without.
        out: The new file; None: the old one's name with "-calibrated", beside it or, of a folder or Hub id, here.
    """
    from neuraleraser.eraser import Eraser
    from neuraleraser.families.naming import concept_of, named_concept, neighbours_of
    from neuraleraser.families.opening import open_pipeline
    from neuraleraser.io.hub import parse_hub_id
    from neuraleraser.io.outputs import check_outputs, save_or_keep
    from neuraleraser.settings import check_whole

    check_whole("num_pairs", num_pairs, 2, 500)
    source = Path(eraser)
    if os.path.isfile(eraser):
        path = out or source.with_name(f"{source.stem}-calibrated{source.suffix}")
    else:
        asked = None if os.path.isdir(eraser) else parse_hub_id(eraser)
        path = out or Path(f"{Path(asked[0]).name if asked else source.name}-calibrated.safetensors")
    check_outputs({"--out": path}, {"the eraser": eraser, "--concept": concept, "--model": model})
    loaded = Eraser.from_pretrained(eraser)
    pipe = open_pipeline(model)
    kind = loaded.header.get("kind")
    meant = concept_of(pipe, concept, kind) if concept else named_concept(pipe, loaded.name, kind)
    fitted = _calibrated(pipe, loaded, meant, neighbours_of(pipe, meant, neighbours), num_pairs=num_pairs)
    save_or_keep(path, fitted.save)
    seen = fitted.header["calibrated"]
    apart = sum(seen["separation"]) / len(seen["separation"])
    print(
        f"{path}: fitted with {seen['prompts']} prompts; its gate can open at {seen['open_share']:.0%} of its "
        f"timesteps, where {apart:.0%} of the images with the concept stand out"
    )


def _calibrated(pipe: Any, eraser: Any, concept: Any, neighbours: Any, sampling: Any = None, num_pairs: int = 8) -> Any:
    from neuraleraser.fitting import calibrate as run

    return run(pipe, eraser, concept, neighbours, sampling=sampling, num_pairs=num_pairs)


def calibrated(pipe: Any, erasers: Any) -> list[Any]:
    """The erasers with gates fitted to `pipe`, by the names in their files."""
    from neuraleraser.families.naming import named_concept, neighbours_of

    concepts = [named_concept(pipe, e.name, e.header.get("kind")) for e in erasers]
    return [_calibrated(pipe, e, c, neighbours_of(pipe, c)) for e, c in zip(erasers, concepts, strict=True)]
