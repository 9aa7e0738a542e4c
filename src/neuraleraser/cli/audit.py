"""`neuraleraser audit`."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from neuraleraser.cli.verbs import AUTOMATIC, Machine, app, verb
from neuraleraser.io.outputs import check_outputs


@verb(app, "audit")
def audit(
    eraser: Positional[str],
    /,
    model: str = "canvas",
    out: Path = Path("audit"),
    quick: bool = False,
    attack_steps: int | None = None,
    key: Path | None = None,
    machine: Machine = AUTOMATIC,
) -> None:
    """Measure one eraser on every kind of image that evaluate knows, and on embeddings learned on the base model;
    attack through it, and the base model at the same budget; write a report and a certificate.

    Args:
        eraser: The eraser: a file, a folder or a Hub id.
        model: The pipeline: canvas, or a folder with another canvas.
        out: Folder for images, results, report and certificate; run again with it to go on.
        quick: Some 800 images instead of 2,000, and attacks of 150 steps instead of 600.
        attack_steps: Gradient steps of each attack, on the base model and through the eraser alike; 0: no attacks.
        key: Private Ed25519 key in PEM to sign the certificate with (openssl genpkey -algorithm ed25519 -out key.pem).
    """
    from dataclasses import replace

    from neuraleraser.auditing import FULL, QUICK, QUICK_ATTACKS
    from neuraleraser.auditing import audit as run
    from neuraleraser.eraser import Eraser
    from neuraleraser.evaluation.terminal import terminal_tables
    from neuraleraser.settings import AttackBudget

    read = {"the eraser": eraser, "--model": model, "--key": key}
    files = ("report.html", "report.json", "figures.csv", "tables.tex", "contact.png", "certificate.json")
    check_outputs({}, folders={"--out": out})
    check_outputs({f"{name} in --out": out / name for name in files}, read)
    budget = QUICK_ATTACKS if quick else AttackBudget()
    if attack_steps is not None:
        budget = replace(budget, steps=attack_steps)
    loaded = Eraser.from_pretrained(eraser)
    report = run(machine.open_pipeline(model), loaded, out, QUICK if quick else FULL, attacks=budget, key=key)
    print("\n" + terminal_tables(report) + "\n")
    print(f"{out / 'report.html'}  pictures, gates and figures\n{out / 'certificate.json'}  {_about(key)}")


def _about(key: Path | None) -> str:
    return "its figures and a hash of every image, " + ("not signed" if key is None else f"signed with {key}")
