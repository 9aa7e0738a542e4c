"""`neuraleraser evaluate --sealed`: one look at the sealed concepts, on record (docs/explanation/laws.md, law 12)."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from neuraleraser.assessment import evaluate_erasers
from neuraleraser.concepts import Concept, vocabulary_concept
from neuraleraser.eraser import Eraser
from neuraleraser.errors import SettingsError, SplitError
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.report import ErasureReport, Report
from neuraleraser.evaluation.report_files import write_report
from neuraleraser.families import family_of
from neuraleraser.fitting import fit
from neuraleraser.io.atomic import write_bytes
from neuraleraser.judges import Judge
from neuraleraser.settings import EvaluateSettings

CHECKOUT = Path(__file__).parents[2]
"""The source tree that this package runs from."""
RECORD = Path("docs/SEALED.md")
_FIGURES = ("ua", "ua_held_out", "ua_fragments", "ira", "cra", "kept_still", "bystander_still", "artefact_rate_target")


def evaluate_sealed(
    pipe: Any,
    settings: EvaluateSettings | None = None,
    folder: Path | None = None,
    *,
    make: Callable[[Any, Concept], Eraser] | None = None,
    judge: Judge | None = None,
    checkout: Path = CHECKOUT,
    names: tuple[str, ...] = (),
) -> Report:
    """Make erasers of the sealed concepts, measure them, and append one line to docs/SEALED.md.

    `names`: those of the family's vocabulary unless given. `make` makes one eraser, by default as `neuraleraser erase`
    does. Stopped before its end it writes no line, and goes
    on in the same folder when called again at the same commit (runs/sealed-COMMIT unless given).

    Raises SplitError if the working tree has changes, so that no commit names what was measured, or if this commit is
    on record already: a second look would be choosing. SettingsError where there is no git checkout, or no vocabulary.
    """
    vocabulary = family_of(pipe).vocabulary
    if vocabulary is None:
        raise SettingsError(f"no sealed concepts are known for this {type(pipe).__name__}: pass model 'canvas'")
    names = names or tuple(n for n in (*vocabulary.styles, *vocabulary.objects) if n in vocabulary.sealed)
    commit, record = _clean_commit(checkout), checkout / RECORD
    text = record.read_text(encoding="utf-8") if record.exists() else _HEAD
    if commit in text:
        raise SplitError(f"{record} has the sealed figures of commit {commit[:12]} already: read them there")
    folder = folder or Path(f"runs/sealed-{commit[:12]}")
    _claim(folder, commit)
    erasers = []
    for name in names:
        path = folder / "made" / f"{name}.safetensors"
        if not path.exists():
            (make or _make)(pipe, vocabulary_concept(vocabulary, name)).save(path)
        erasers.append(Eraser.load(path))
    report = evaluate_erasers(pipe, erasers, settings, folder, judge=judge, sealed=True)
    write_report(report, folder)
    write_bytes(record, (text + _line(report, commit)).encode())
    return report


def _make(pipe: Any, concept: Concept) -> Eraser:
    return fit(pipe, concept)


def _clean_commit(checkout: Path) -> str:
    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SettingsError(
                f"{checkout} is no git checkout, so no commit can be put on record: run it from a clone"
            ) from error
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    if changes := git("status", "--porcelain"):
        raise SplitError(
            f"the working tree has changes ({changes.splitlines()[0].strip()}), so no commit names what would be "
            "measured: commit or remove them, then run again"
        )
    return commit


def _claim(folder: Path, commit: str) -> None:
    mark = folder / "commit"
    if mark.exists() and mark.read_text().strip() != commit:
        raise SettingsError(f"{folder} holds a run of another commit: pass another folder, or delete this one")
    write_bytes(mark, f"{commit}\n".encode())


def _line(report: Report, commit: str) -> str:
    """Return the line of the record: every figure of every eraser and of its controls, with n."""
    cells = [f"{entry.concept}, {entry.method}: {', '.join(_figures(entry))}" for entry in report.erasures]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"| {date} | {commit} | {'; '.join(cells)} |\n"


def _figures(entry: ErasureReport) -> Iterator[str]:
    for name in _FIGURES:
        if isinstance(m := entry.figures.get(name), Estimate):
            yield f"{name} {m}"
    for route in entry.route_figures if entry.routes else ():  # of the eraser alone: its controls see no picture
        shares = (f"{name} {m}" for name, m in route.figures.items() if m is not None)
        at = f" {route.strength:.1f}" if route.strength else ""
        yield f"{route.group}{at} [{', '.join(shares)}]"


_HEAD = """# Runs on sealed concepts

Styles Bricks, Crayon, Cubism, Ink_Art, Meteor_Shower and Pop_Art, objects Bears, Birds, Butterfly, Frogs, Sandwiches
and Statues, on seeds of their own, are generated and read by `neuraleraser evaluate --sealed` alone, when all is
frozen. Each run adds a line here. A change that is made after reading one was chosen on it, and says so. Figures are
value (95 % interval, n).

| date | commit | figures |
|---|---|---|
"""
