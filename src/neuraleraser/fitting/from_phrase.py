"""From words to an eraser: what `neuraleraser erase` does, no more and no less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neuraleraser.concepts import Concept, add_context_pairs, concept_of, default_neighbours, neighbours_of
from neuraleraser.eraser import Eraser, check_nothing_acts
from neuraleraser.errors import FileError, SettingsError
from neuraleraser.families import family_of
from neuraleraser.families.defaults import default_sampling, model_name
from neuraleraser.fitting.fit import fit
from neuraleraser.fitting.make_reference import estimate_cost, make_reference
from neuraleraser.fitting.published_references import fetch_reference, published_sae
from neuraleraser.fitting.reference import Reference, shipped_reference
from neuraleraser.io.names import file_name, printable
from neuraleraser.io.outputs import check_outputs
from neuraleraser.settings import FitSettings, Sampling
from neuraleraser.sites import Site, default_gate_site

REFERENCES_FOLDER = Path("runs/references")
"""Folder in which references are made and kept."""
Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done."""


def erase(
    pipe: Any,
    concept: str | Path | Concept,
    *,
    kind: str | None = None,
    neighbours: Sequence[str | Concept] = (),
    reference: str | Path | Reference | None = None,
    site: str | Site | None = None,
    num_images: int = 160,
    settings: FitSettings | None = None,
    sampling: Sampling | None = None,
    folder: str | Path = REFERENCES_FOLDER,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Eraser:
    """Make an eraser of a concept for a pipeline.

    `pipe` is not changed: pass the result to `attach` or `load_eraser`. With a reference at hand some 50 to 110 images
    are generated, some hundred texts read, and an image gate learnt from pictures: one to three minutes for the canvas
    on two CPU cores. It is silent unless `progress` is given.

    Args:
        pipe: The diffusers pipeline.
        concept: A phrase, the path of a JSON file of prompts, or a `Concept`.
        kind: "style" or "object"; None: read from the phrase.
        neighbours: Concepts that it could be mistaken for, as phrases or concepts; none: taken from a list that ships.
        reference: An SAE together with how its features fire on other prompts; or its folder, or its Hub id. None: the
            one that ships for the pipeline's family (the canvas alone has one), else one that is published for this
            model, else one made from the pipeline's own images and kept in `folder`. That takes a while; if it is
            interrupted, the same call goes on.
        site: Site that the reference reads, or that one made here is to read; None: for one made here, where the
            family's features were found good.
        num_images: Images that a reference made here learns from.
        settings: Settings of the fit; None: the defaults.
        sampling: How images are generated; None: as `default_sampling` says.
        folder: Folder in which references are made and kept.
        progress: Called as `progress(what, share)` as the work goes on.
        announce: Called as `announce(sentence)`; before images are generated for a reference it says how long that
            takes.

    Returns:
        The eraser.

    Raises:
        ConceptError: The phrase means nothing on this pipeline, it is of another kind there, or no feature detects it.
        FileError: The reference cannot be read.
        SettingsError: An eraser acts on the pipeline, the settings do not fit, or `site` is not the reference's.
        SiteError: The pipeline does not have the site.

    Examples:
        >>> eraser = erase(pipe, "Van Gogh style", settings=few, sampling=quick)  # with neither: minutes, and well
        >>> eraser.save("van-gogh.safetensors")
        >>> eraser.name
        'Van_Gogh'
    """
    check_nothing_acts(pipe, "making an eraser")
    meant = concept if isinstance(concept, Concept) else concept_of(pipe, str(concept), kind)
    near = neighbours_of(pipe, meant, neighbours) if neighbours else list(default_neighbours(meant))
    meant = add_context_pairs(meant, near)
    sampling = sampling or default_sampling(pipe)
    tell, say = progress or (lambda what, share: None), announce or (lambda sentence: None)
    if isinstance(reference, Reference):
        known = reference
    elif reference is not None:
        known = Reference.from_pretrained(reference)
    elif family_of(pipe).reference is not None:
        known = shipped_reference(pipe)
    else:
        where = Site.parse(str(site)) if site else default_gate_site(pipe, meant.kind)
        first, tell = _part(tell, 0.0, 0.6), _part(tell, 0.6, 0.4)
        known = find_or_make_reference(pipe, meant, near, where, num_images, sampling, Path(folder), first, say)
    if site is not None and Site.parse(str(site)) != known.site:
        raise SettingsError(
            f"site is {site}, and the reference reads {known.site}: leave the site out, or pass one of that site"
        )
    return fit(pipe, meant, settings, tell, reference=known, sampling=sampling)


def _part(progress: Progress, start: float, length: float) -> Progress:
    """Return the progress of a part of the work."""
    return lambda what, share: progress(what, start + length * share)


def eraser_file_name(name: str) -> str:
    """Return what a concept's name is in names of files: "van-gogh-style"."""
    return file_name(name.replace("_", "-").replace(" ", "-").lower())


def find_or_make_reference(
    pipe: Any,
    concept: Concept,
    neighbours: Sequence[Concept],
    site: Site,
    images: int,
    sampling: Sampling,
    root: Path,
    progress: Progress,
    announce: Callable[[str], None],
) -> Reference:
    """Return the reference that is published for this model and site, or else one made of the pipeline's own images.

    Raises as `make_reference` does.
    """
    # A Hub id keeps its owner: two models may share a last name. Of a folder the last name is enough to tell.
    model = model_name(pipe)
    owner, name = file_name(model.replace("/", "--")), eraser_file_name(concept.name)
    check_outputs({}, folders={"the references' folder": root})
    if theirs := published_sae(model, site):
        announce(f"An SAE for {model} at {site} is published: {theirs.repo}, of {theirs.source}.")
        try:
            folder = root / f"{owner}-{name}-published"
            found = fetch_reference(pipe, theirs, concept, neighbours, folder, images, sampling)
            if not theirs.revision and (commit := found.sae.header.get("revision")):
                announce(f"No commit of it is pinned here; this is {printable(commit)}.")
            return found
        except FileError as error:
            announce(f"It cannot be had: {error}.")
    folder = root / f"{owner}-{name}"
    if not (folder / "background.safetensors").exists():
        cost = estimate_cost(pipe, site, images, sampling)
        announce(
            f"Making a reference for {model} at {site} from {images + images // 2} of its own images, of "
            f"{concept.name} and {', '.join(n.name for n in neighbours) or 'no neighbours'}.\n"
            f"About {cost.seconds / 60:.0f} minutes of generating, and {cost.bytes / 1e6:.0f} MB in {folder} until it "
            "is made. Ctrl-C stops; the same call goes on."
        )
    return make_reference(
        pipe, concept, neighbours, site, folder, num_images=images, sampling=sampling, progress=progress
    )
