"""`neuraleraser erase`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from neuraleraser.cli.verbs import AUTOMATIC, Flat, Machine, app, check_sampling, verb
from neuraleraser.io.outputs import check_outputs, save_or_keep
from neuraleraser.settings import MAX_COUNT, FitSettings, check_whole


@verb(app, "erase")
def erase(
    phrase: Positional[str],
    /,
    settings: Annotated[FitSettings, Flat],
    model: str = "canvas",
    out: Path | None = None,
    kind: Literal["style", "object", "other"] | None = None,
    reference: str | None = None,
    neighbours: tuple[str, ...] = (),
    site: str | None = None,
    num_images: int = 160,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    machine: Machine = AUTOMATIC,
) -> None:
    """Make an eraser for a concept.

    On other models than the canvas, where no reference is given, a published one is fetched if one is known for the
    model and the site. Else one is made first, from the model's own images of the concept and its neighbours; what that
    takes is said before. Interrupted and run again, it goes on.

    Args:
        phrase: What to erase: "Van Gogh style", "a cat", or a JSON file {"name", "kind", "pairs": [[with, without]]}.
        model: The pipeline: canvas, a folder, or a Hub id.
        out: The eraser's file; None: the concept's name, such as van-gogh.safetensors.
        kind: What the phrase names, where it does not say so itself (not needed on the canvas).
        reference: The SAE and its background for this model, a folder or a Hub id; None: the canvas's own; for other
            models a published SAE, which is fetched from the Hub, if one is known, else one made here.
        neighbours: What the concept could be mistaken for, as phrases; none named: those of a list that ships.
        site: Where a reference made here looks; None: the site that is known to be good in the model's family.
        num_images: Images that a reference made here learns from; half as many more show how it fires.
        num_inference_steps: Denoising steps; None: the model's usual.
        guidance_scale: Classifier-free guidance scale; None: the model's usual.
        batch_size: Images generated together; None: 4, on the canvas 20.
    """
    from tqdm import tqdm

    from neuraleraser.concepts import concept_of
    from neuraleraser.demo import progress_bar, separability_warning
    from neuraleraser.evaluation.report import size_text
    from neuraleraser.families.defaults import default_sampling
    from neuraleraser.fitting import from_phrase
    from neuraleraser.fitting.reference import Reference

    check_whole("num_images", num_images, 5, MAX_COUNT)  # hundreds are good
    read = {"the phrase": phrase if phrase.endswith(".json") else None, "--reference": reference, "--model": model}
    check_outputs({"--out": out}, read)
    check_sampling(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, batch_size=batch_size)
    pipe = machine.open_pipeline(model)
    concept = concept_of(pipe, phrase, kind)
    path = out or Path(f"{from_phrase.eraser_file_name(concept.name)}.safetensors")
    check_outputs({"--out": path}, read)
    known = Reference.from_pretrained(reference) if reference else None
    with progress_bar(concept.name) as progress:
        eraser = from_phrase.erase(
            pipe,
            concept,
            neighbours=neighbours,
            reference=known,
            site=site,
            num_images=num_images,
            settings=settings,
            sampling=default_sampling(pipe, num_inference_steps, guidance_scale, batch_size),
            progress=progress,
            announce=tqdm.write,
        )
    save_or_keep(path, eraser.save)
    count = len(eraser.gate.features)
    size = size_text(path.stat().st_size)
    print(f"{path}: erases {concept.name}, {size}, {count} feature{'' if count == 1 else 's'}")
    if said := separability_warning(eraser):
        print(said)
    example = concept.pairs[0].positive
    print(f'Try it: neuraleraser generate "{example}" --model {model} --erasers {path}')
