"""`neuraleraser audit`: one eraser on every kind of image that `evaluate` knows, with a report and a certificate."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from neuraleraser.assessment import evaluate_erasers
from neuraleraser.eraser import Eraser
from neuraleraser.evaluation.certificate import certify
from neuraleraser.evaluation.report import Report
from neuraleraser.evaluation.report_files import write_report
from neuraleraser.io.signatures import sign
from neuraleraser.judges import Judge
from neuraleraser.settings import EvaluateSettings

FULL = EvaluateSettings(embedding_steps=300)
"""A full audit: some 2,000 images."""
QUICK = EvaluateSettings(
    grid_rounds=1,
    target_rounds=1,
    two_object_rounds=1,
    held_out_rounds=1,
    start_image_rounds=1,
    fragment_prompts=20,
    embedding_steps=100,
    held_out_grid_rounds=0,
    unhooked_checks=20,
    idle_checks=20,
    timings=3,
)
"""A quick one: some 800 images of the same kinds, with wider intervals."""


def audit(
    pipe: Any,
    eraser: Eraser,
    folder: str | os.PathLike[str] = "audit",
    settings: EvaluateSettings | None = None,
    *,
    key: str | os.PathLike[str] | None = None,
    judge: Judge | None = None,
) -> Report:
    """Measure an eraser beside its controls: named prompts, fragments, start images, inpainting, inverted latents and
    learned embeddings; write the report's files and certificate.json into the folder.

    Called again with the same settings it goes on where it was stopped.

    Args:
        pipe: The diffusers pipeline.
        eraser: The eraser.
        folder: Folder of images, results, report and certificate.
        settings: Numbers of images; None: a full audit. `neuraleraser.auditing.QUICK` is a quick one.
        key: Private Ed25519 key in PEM to sign the certificate with.
        judge: Judge of the images; None: that of the pipeline's family.

    Returns:
        The report.

    Raises:
        SplitError, ConceptError, SettingsError: As `evaluate`.
        FileError: The key is none; before anything is generated.
        MissingDependencyError: There is a key, and the package `cryptography` is not installed.

    Examples:
        >>> report = audit(pipe, eraser, "audit", brief)
        >>> sorted(path.name for path in Path("audit").glob("*.json"))
        ['certificate.json', 'report.json', 'run.json']
    """
    folder = Path(folder)
    if key is not None:
        sign(b"", key)  # an error now, and not after all the rest
    with tempfile.TemporaryDirectory() as place:  # a file holds half precision, and is what others can check
        eraser.save(path := Path(place) / "eraser.safetensors")
        eraser = Eraser.load(path)
    report = evaluate_erasers(pipe, [eraser], settings or FULL, folder, judge=judge)
    write_report(report, folder)
    certify(folder, folder / "certificate.json", key)
    return report
