"""`neuraleraser generate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from neuraleraser.cli.verbs import AUTOMATIC, Machine, app, check_sampling, verb
from neuraleraser.errors import SettingsError
from neuraleraser.io.atomic import write_bytes
from neuraleraser.io.names import prompt_error
from neuraleraser.io.outputs import check_outputs, save_or_keep
from neuraleraser.settings import check_seed


@verb(app, "generate")
def generate(
    prompt: Positional[str],
    /,
    model: str = "canvas",
    seed: int = 0,
    erasers: tuple[str, ...] = (),
    out: Path = Path("image.png"),
    image: Path | None = None,
    strength: float | None = None,
    action: Literal["erase", "erase_or_refuse", "detect", "refuse"] = "erase",
    calibrate: bool = False,
    record: Path | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    machine: Machine = AUTOMATIC,
) -> None:
    """Generate one image, with any erasers attached.

    Args:
        prompt: What to generate; may be empty ("") beside a picture.
        model: The pipeline: canvas, a folder, or a Hub id.
        seed: Seed of the noise that the image starts from.
        erasers: Erasers: files, folders or Hub ids, each with its strength after a colon if not 1:
            van-gogh.safetensors:0.5, owner/name:0.5, owner/name@revision:0.5 (0 to 2).
        out: Where the image goes (PNG).
        image: Picture to start from (PNG, JPEG or WebP), scaled to the model's size.
        strength: How much of the way back to noise the picture is taken, above 0 and up to 1; None: 0.8.
        action: What erasers do. erase; erase_or_refuse, the same, but refuse a picture from which too little can be
            taken out at this strength; detect, change nothing and say what would have fired; refuse, end with an error
            and write no image where one would have.
        calibrate: Fit the erasers' gates to this pipeline's weights first (nothing is written).
        record: Write what fired, at which timesteps and where, to this file, as JSON Lines.
        num_inference_steps: Denoising steps; None: the model's usual (canvas: 25).
        guidance_scale: Classifier-free guidance scale, 1 for none; None: the model's usual (canvas: 3).
    """
    from neuraleraser import sampling
    from neuraleraser.eraser import Eraser, attach
    from neuraleraser.evaluation.figures import png
    from neuraleraser.families.defaults import default_sampling
    from neuraleraser.families.opening import image_to_image, native_side
    from neuraleraser.fitting import calibrate as run_calibrate
    from neuraleraser.io.picture_files import read_picture

    if strength is not None and image is None:
        raise SettingsError("--strength says how much of a start image is drawn anew: pass --image with it")
    if not prompt.strip() and image is None:
        raise SettingsError("the prompt is empty: say what to generate, such as 'a cat in Van Gogh style'")
    if error := prompt_error(prompt):
        raise SettingsError(f"{error}: pass another prompt")
    check_seed(seed)
    check_sampling(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, strength=strength)
    named = [parse_eraser(text) for text in erasers]
    read = {f"--erasers {source}": source for source, _ in named} | {"--model": model, "--image": image}
    check_outputs({"--out": out, "--record": record}, read)
    if out.suffix.lower() not in ("", ".png"):
        raise SettingsError(f"--out is {out}, and images are written as PNG: pass a name that ends in .png")
    loaded = [Eraser.from_pretrained(source) for source, _ in named]
    if image is not None:
        read_picture(image, 64, 8)  # before the model is loaded
    pipe = machine.open_pipeline(model)
    chosen = default_sampling(pipe, num_inference_steps, guidance_scale, batch_size=1)
    if calibrate:
        loaded = [run_calibrate(pipe, e) for e in loaded]
    start = None
    if image is not None:
        pipe = image_to_image(pipe)
        start = read_picture(image, native_side(pipe), 2 * pipe.vae_scale_factor)[None]
        chosen = replace(chosen, strength=chosen.strength if strength is None else strength)
    strengths = [strength for _, strength in named]
    labels = _labels([e.name for e in loaded], [source for source, _ in named])
    with attach(pipe, loaded, strengths, action=action, heat=record is not None) as trace:
        trace.names = labels  # so that two erasers of one concept are two in what it says
        try:
            images = sampling.generate(pipe, [prompt], [seed], chosen, image=start)
        finally:
            if record:
                write_bytes(record, trace.jsonl().encode())
    data = png(images[0])
    save_or_keep(out, lambda path: write_bytes(path, data))
    fired = trace.fired.get(0, {})
    steps = chosen.num_inference_steps
    steps = steps if image is None else int(steps * chosen.strength)
    for label, strength in zip(labels, strengths, strict=True):
        print(f"{label}: {_what_happened(fired.get(label, []), strength, action, steps)}")
    begun = f", from {image} at strength {chosen.strength:g}" if image is not None else ""
    print(f"{out}: {prompt!r}, seed {seed}{begun}")


def _labels(names: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Names to tell erasers apart by: those of one concept get their source beside it, and one source that is given
    twice a number."""
    both = zip(names, sources, strict=True)
    labels = [name if names.count(name) == 1 else f"{name} ({source})" for name, source in both]
    return [
        label if labels.count(label) == 1 else f"{label} {labels[: i + 1].count(label)}"
        for i, label in enumerate(labels)
    ]


def _what_happened(times: Sequence[float], strength: float, action: str, steps: int) -> str:
    """Say what an eraser did to an image whose gate opened at timesteps `times`."""
    if not times:
        return "did not fire, so nothing was refused" if action == "refuse" else "did not fire"
    # Schedulers of higher order call the denoiser more than once a step.
    count = f"{len(times)} of {steps} steps" if len(times) <= steps else f"{len(times)} timesteps"
    when = f"at {count} (t = {times[0]:g} to {times[-1]:g})"
    if strength == 0:
        done = {"detect": "would not have acted", "refuse": "did not refuse"}.get(action, "did not act")
        return f"{done} (strength 0); its gate opened {when}"
    return f"would have acted {when}" if action == "detect" else f"acted {when}"


def parse_eraser(text: str) -> tuple[str, float]:
    """ "a.safetensors:0.5" -> ("a.safetensors", 0.5), and so of folders and Hub ids.

    Without a number after the last colon ("C:\\a.safetensors"), and where a file or folder has the whole text as its
    name, the strength is 1. Raises SettingsError for a strength out of range.
    """
    source, colon, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        return text, 1.0
    if not colon or os.path.exists(text):
        return text, 1.0
    if not 0 <= strength <= 2:
        raise SettingsError(f"{text!r} asks for strength {number}: pass a strength from 0 (nothing) to 2")
    return source, strength
