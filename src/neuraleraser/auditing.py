"""`neuraleraser audit`: one eraser on every kind of image that `evaluate` knows, and under attacks through it, with a
report and a certificate."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from neuraleraser.assessment import evaluate_erasers
from neuraleraser.attacking import check_attacked, run_attacks
from neuraleraser.eraser import Eraser
from neuraleraser.evaluation.attack_metrics import AttackFigures
from neuraleraser.evaluation.certificate import certify
from neuraleraser.evaluation.evaluate import default_judge
from neuraleraser.evaluation.measure import Finding
from neuraleraser.evaluation.method import Method
from neuraleraser.evaluation.report import Report
from neuraleraser.evaluation.report_files import write_report
from neuraleraser.evaluation.run_folder import check_attacks
from neuraleraser.io.signatures import sign
from neuraleraser.judges import Judge
from neuraleraser.methods import EraserMethod
from neuraleraser.settings import AttackBudget, EvaluateSettings

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
QUICK_ATTACKS = AttackBudget(steps=150, images=20)
"""The attacks of a quick audit."""


def audit(
    pipe: Any,
    eraser: Eraser,
    folder: str | os.PathLike[str] = "audit",
    settings: EvaluateSettings | None = None,
    *,
    attacks: AttackBudget | None = None,
    key: str | os.PathLike[str] | None = None,
    judge: Judge | None = None,
) -> Report:
    """Measure an eraser beside its controls: named prompts, fragments, start images, inpainting, inverted latents and
    learned embeddings; attack it, with gradients through all that it does; write the report's files and
    certificate.json into the folder.

    Each attack has the same budget on the base model, where it has to succeed if it is to prove anything. One that does
    not take the pipeline (with several text encoders) is left out, and the report says so.

    Called again with the same settings it goes on where it was stopped.

    Args:
        pipe: The diffusers pipeline.
        eraser: The eraser.
        folder: Folder of images, results, report and certificate.
        settings: Numbers of images; None: a full audit. `neuraleraser.auditing.QUICK` is a quick one.
        attacks: Steps and images of each attack; None: those of a full audit, 600 and 40. With 0 steps there are none;
            `neuraleraser.auditing.QUICK_ATTACKS` are those of a quick one.
        key: Private Ed25519 key in PEM to sign the certificate with.
        judge: Judge of the images; None: that of the pipeline's family.

    Returns:
        The report.

    Raises:
        SplitError, ConceptError, SettingsError: As `evaluate`; or the folder holds attacks of another budget.
        FileError: The key is none; before anything is generated.
        MissingDependencyError: There is a key, and the package `cryptography` is not installed.

    Examples:
        >>> report = audit(pipe, eraser, "audit", brief, attacks=AttackBudget(steps=2, images=4))
        >>> [a.attack for a in report.of("neuraleraser", "Van_Gogh").attacks]
        ['learned embeddings', 'searched tokens', 'perturbed encodings']
        >>> sorted(path.name for path in Path("audit").glob("*.json"))
        ['certificate.json', 'report.json', 'run.json']
    """
    folder = Path(folder)
    if key is not None:
        sign(b"", key)  # an error now, and not after all the rest
    with tempfile.TemporaryDirectory() as place:  # a file holds half precision, and is what others can check
        eraser.save(path := Path(place) / "eraser.safetensors")
        eraser = Eraser.load(path)
    m, settings, budget = EraserMethod(eraser), settings or FULL, attacks or AttackBudget()
    check_attacks(folder, asdict(budget) if budget.steps else None)
    if budget.steps:
        check_attacked(pipe, m, settings, budget)
    report = evaluate_erasers(pipe, [eraser], settings, folder, judge=judge)
    if budget.steps:
        found = run_attacks(pipe, m, settings, budget, folder, judge or default_judge(pipe))
        report = _with_attacks(report, m, *found)
    write_report(report, folder)
    certify(folder, folder / "certificate.json", key)
    return report


def _with_attacks(report: Report, m: Method, figures: Sequence[AttackFigures], findings: Sequence[Finding]) -> Report:
    """Return the report with the attacks through a method."""
    entry = report.of(m.name, m.concept)
    erasures = [replace(e, attacks=figures) if e is entry else e for e in report.erasures]
    return replace(report, erasures=erasures, findings=[*report.findings, *findings])
