"""`neuraleraser erase`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from neuraleraser.cli.verbs import AUTOMATIC, Flat, Machine, app, check_sampling, verb
from neuraleraser.errors import SettingsError
from neuraleraser.io.outputs import check_outputs, save_or_keep
from neuraleraser.settings import MAX_COUNT, FitSettings, SAeUronSettings, check_whole


@verb(app, "erase")
def erase(
    phrase: Positional[str],
    /,
    settings: Annotated[FitSettings, Flat],
    model: str = "canvas",
    out: Path | None = None,
    kind: Literal["style", "object", "other"] | None = None,
    method: Literal["neuraleraser", "saeuron"] = "neuraleraser",
    reference: str | None = None,
    neighbours: tuple[str, ...] = (),
    site: str | None = None,
    num_images: int = 160,
    sae: str | None = None,
    saeuron: Annotated[SAeUronSettings, arg(name="saeuron")] = SAeUronSettings(),  # noqa: B008  (frozen)
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
        method: How. saeuron: as SAeUron does (arXiv 2501.18052, with its sign error put right): features of an SAE in
            the image stream are blocked wherever they fire. It reads --sae and --saeuron.*, not --reference or the
            settings of the fit.
        reference: The SAE and its background for this model, a folder or a Hub id; None: the canvas's own; for other
            models a published SAE, which is fetched from the Hub, if one is known, else one made here.
        neighbours: What the concept could be mistaken for, as phrases; none named: those of a list that ships.
        site: Where a reference made here looks; None: the site that is known to be good in the model's family.
        num_images: Images that a reference made here learns from; half as many more show how it fires.
        sae: For saeuron: an SAE of the site, a file, a folder or a Hub id; None: one made here, kept in runs/saes.
        saeuron: Settings of saeuron.
        num_inference_steps: Denoising steps; None: the model's usual.
        guidance_scale: Classifier-free guidance scale; None: the model's usual.
        batch_size: Images generated together; None: 4, on the canvas 20.
    """
    from tqdm import tqdm

    from neuraleraser.concepts import concept_of
    from neuraleraser.demo import progress_bar, separability_warning
    from neuraleraser.evaluation.report import size_text
    from neuraleraser.families.defaults import default_sampling
    from neuraleraser.fitting import fit_saeuron, from_phrase
    from neuraleraser.fitting.reference import Reference
    from neuraleraser.sae import SAE

    check_whole("num_images", num_images, 5, MAX_COUNT)  # hundreds are good
    _check_method(method, reference, num_images, settings, sae, saeuron)
    read = {"the phrase": phrase if phrase.endswith(".json") else None, "--model": model}
    read |= {"--reference": reference, "--sae": sae}
    check_outputs({"--out": out}, read)
    check_sampling(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, batch_size=batch_size)
    pipe = machine.open_pipeline(model)
    concept = concept_of(pipe, phrase, kind)
    path = out or Path(f"{from_phrase.eraser_file_name(concept.name)}.safetensors")
    check_outputs({"--out": path}, read)
    known = Reference.from_pretrained(reference) if reference else None
    theirs = SAE.from_pretrained(sae) if sae else None
    sampling = default_sampling(pipe, num_inference_steps, guidance_scale, batch_size)
    with progress_bar(concept.name) as progress:
        if method == "saeuron":
            eraser = fit_saeuron(
                pipe,
                concept,
                neighbours=neighbours,
                sae=theirs,
                site=site,
                settings=saeuron,
                sampling=sampling,
                progress=progress,
                announce=tqdm.write,
            )
        else:
            eraser = from_phrase.erase(
                pipe,
                concept,
                neighbours=neighbours,
                reference=known,
                site=site,
                num_images=num_images,
                settings=settings,
                sampling=sampling,
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
    print(f'Try it: neuraleraser generate "{example}" --model {quote(model)} --erasers {quote(str(path))}')


def _check_method(
    method: str,
    reference: str | None,
    num_images: int,
    settings: FitSettings,
    sae: str | None,
    saeuron: SAeUronSettings,
) -> None:
    """Raise SettingsError for options that another method reads than the one that is asked for."""
    if method == "saeuron" and (reference or num_images != 160 or settings != FitSettings()):
        raise SettingsError(
            "saeuron reads no reference, no --num-images and no settings of the fit: pass --sae and --saeuron.*, or "
            "leave --method out"
        )
    if method != "saeuron" and (sae or saeuron != SAeUronSettings()):
        raise SettingsError(
            "--sae and --saeuron.* are for saeuron alone: pass --method saeuron, too, or leave them out"
        )
