"""Dictionaries that others have published, by the model they were trained on: found by its Hub id, and fetched."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from neuraleraser.concepts import Concept
from neuraleraser.errors import FileError
from neuraleraser.fit.dictionary import Dictionary
from neuraleraser.fit.importing import import_dictionary
from neuraleraser.io.names import printable
from neuraleraser.sae.formats import openai, sparsify
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site

_UNBOX = (openai.UNBOX_CONFIG, openai.UNBOX_WEIGHTS, *openai.STATISTICS.values())
_SD15 = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5")


@dataclass(frozen=True)
class Published:
    """A dictionary on the Hub: for which models (Hub ids) and at which site, in which repository and folder of it, in
    which files, and from where that is known.

    `revision` is the commit that is fetched. None of those known here names one in its paper or code, which read the
    branch "main": where it is None, what was fetched is in the dictionary's header, and can be pinned by it.
    """

    models: tuple[str, ...]
    site: Site
    repo: str
    folder: str
    files: tuple[str, ...]
    source: str
    kind: Literal["model", "space"] = "model"
    revision: str | None = None


def _unbox(path: str) -> Published:
    return Published(
        ("stabilityai/sdxl-turbo",),
        Site(path, "update"),
        "surokpro2/Unboxing_SDXL_with_SAEs",
        f"checkpoints/{path}_k10_hidden5120_auxk256_bs4096_lr0.0001/final",
        _UNBOX,
        "sdxl-unbox (arXiv 2410.22366)",
        "space",
    )


PUBLISHED = (
    Published(
        _SD15,
        Site("unet.up_blocks.1.attentions.1"),
        "bcywinski/SAeUron_coco",
        "unet.up_blocks.1.attentions.1",
        (sparsify.CONFIG, sparsify.WEIGHTS),
        "SAeUron (arXiv 2501.18052), trained on captions of COCO",
    ),
    _unbox("unet.down_blocks.2.attentions.1"),
    _unbox("unet.mid_block.attentions.0"),
    _unbox("unet.up_blocks.0.attentions.0"),
    _unbox("unet.up_blocks.0.attentions.1"),
    Published(
        ("black-forest-labs/FLUX.1-schnell",),
        Site("transformer.transformer_blocks.18"),
        "antoniomari/SAE_flux_18",
        "",
        _UNBOX,
        "sdxl-unbox (utils/loaders.py)",
    ),
)


def published(model: str, site: Site) -> Published | None:
    """The dictionary that is known for a model's Hub id at a site, or None."""
    return next((p for p in PUBLISHED if model in p.models and p.site == site), None)


def fetch(dictionary: Published, revision: str | None = None) -> tuple[Path, str]:
    """Its folder in the Hub's cache, fetched if it is not there yet, and the commit that it is of ("" if not known).

    Only the files that it is known by are fetched, at `revision` or else at its own. Raises FileError, in one sentence,
    where the Hub does not have it or does not answer.
    """
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            dictionary.repo,
            repo_type=dictionary.kind,
            revision=revision or dictionary.revision,
            allow_patterns=[f"{dictionary.folder}/{file}".lstrip("/") for file in dictionary.files],
        )
    except Exception as error:  # the client, its transport and the disk each raise kinds of their own
        reason = printable(error, 200) or type(error).__name__
        raise FileError(f"the dictionary {dictionary.repo!r} could not be fetched from the Hub: {reason}") from error
    folder = Path(found) / dictionary.folder
    if not folder.is_dir():
        raise FileError(f"the repository {dictionary.repo!r} has no folder {dictionary.folder!r}")
    commit = Path(found).name  # the client lays a snapshot out under its commit
    return folder, commit if re.fullmatch("[0-9a-f]{40}", commit) else ""


def published_dictionary(
    pipe: Any,
    known: Published,
    concept: Concept,
    neighbours: Sequence[Concept],
    folder: Path,
    images: int,
    s: Sampling,
    revision: str | None = None,
) -> Dictionary:
    """The published dictionary, read for `pipe` and kept in `folder`; one that is there already is opened.

    Its thresholds are calibrated, and its firing is seen, on `images` images of the neighbours and of what is left
    where the concept is not: a gate is set above those. `sae.header["revision"]` is the commit it was fetched at.

    Raises FileError where it cannot be fetched or read, SiteError where its width is not the site's.
    """
    if (folder / "background.safetensors").exists():
        return Dictionary.load(folder)
    path, commit = fetch(known, revision)
    others = [(p.shows, (n.name,)) for n in neighbours for p in n.pairs] + [(p.without, ()) for p in concept.pairs]
    drawn = random.Random(1).sample(others, min(images, len(others)))
    made = import_dictionary(pipe, path, known.site, [p for p, _ in drawn], [of for _, of in drawn], sampling=s)
    source = f"{known.repo}: {known.source}"
    made.sae.header |= {"source": source, "revision": commit}
    made = replace(made, provenance=replace(made.provenance, sae=source))
    made.save(folder)
    return made
