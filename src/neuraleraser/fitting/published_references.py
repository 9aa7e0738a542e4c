"""SAEs that others have published: fetched from the Hub, and made references."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuraleraser.concepts import Concept
from neuraleraser.errors import FileError
from neuraleraser.families import FAMILIES, PublishedSAE
from neuraleraser.fitting.import_reference import import_reference
from neuraleraser.fitting.reference import Reference
from neuraleraser.io.names import printable
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site


def published_sae(model: str, site: Site) -> PublishedSAE | None:
    """Return the SAE that is known to be published for a model's Hub id at a site, or None."""
    every = (sae for family in FAMILIES for sae in family.published)
    return next((sae for sae in every if model in sae.models and sae.site == site), None)


def fetch_sae(sae: PublishedSAE, revision: str | None = None) -> tuple[Path, str]:
    """Return an SAE's folder in the Hub's cache, and the commit that it is of ("" if not known).

    Only the files that it is known by are fetched, at `revision` or else at its own. Raises FileError, in one sentence,
    where the Hub does not have it or does not answer.
    """
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            sae.repo,
            repo_type=sae.kind,
            revision=revision or sae.revision,
            allow_patterns=[f"{sae.folder}/{file}".lstrip("/") for file in sae.files],
        )
    except Exception as error:  # the client, its transport and the disk each raise kinds of their own
        reason = printable(error, 200) or type(error).__name__
        raise FileError(f"the SAE {sae.repo!r} could not be fetched from the Hub: {reason}") from error
    folder = Path(found) / sae.folder
    if not folder.is_dir():
        raise FileError(f"the repository {sae.repo!r} has no folder {sae.folder!r}")
    commit = Path(found).name  # the client lays a snapshot out under its commit
    return folder, commit if re.fullmatch("[0-9a-f]{40}", commit) else ""


def fetch_reference(
    pipe: Any,
    known: PublishedSAE,
    concept: Concept,
    neighbours: Sequence[Concept],
    folder: Path,
    images: int,
    s: Sampling,
    revision: str | None = None,
) -> Reference:
    """Return the published SAE as a reference, read for `pipe` and kept in `folder`.

    One that is there already is opened.

    Its thresholds are calibrated, and its firing is seen, on `images` images of the neighbours and of what is left
    where the concept is not: a gate is set above those. `sae.header["revision"]` is the commit it was fetched at.

    Raises FileError where it cannot be fetched or read, SiteError where its width is not the site's.
    """
    if (folder / "background.safetensors").exists():
        return Reference.load(folder)
    path, commit = fetch_sae(known, revision)
    others = [(p.positive, (n.name,)) for n in neighbours for p in n.pairs] + [(p.negative, ()) for p in concept.pairs]
    drawn = random.Random(1).sample(others, min(images, len(others)))
    made = import_reference(pipe, path, known.site, [p for p, _ in drawn], [of for _, of in drawn], sampling=s)
    source = f"{known.repo}: {known.source}"
    made.sae.header |= {"source": source, "revision": commit}
    made = replace(made, provenance=replace(made.provenance, sae=source))
    made.save(folder)
    return made
