"""Break the product on purpose, one thing at a time, and see whether the tests notice.

    python tools/mutate.py                  # every mutation: the table, and exit code 1 if one survives
    python tools/mutate.py targets seeds    # some of them, by name
    python tools/mutate.py --list           # what there is
    python tools/mutate.py --whole          # where the named tests stay green, the whole suite without slow tests

Each mutation is made alone, in a temporary copy of the tree, and the tests that should notice it are run there. First
they are run unchanged: what is red without a mutation says nothing. A mutation whose old text is not found exactly once
is an error: the code has moved on, and the mutation has to follow.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mutations import MUTATIONS, WEIGHTS, Mutation

ROOT = Path(__file__).parents[1]
COPIED = (
    "src",
    "tests",
    "tools",
    "docs",
    "benchmarks",
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
)
LIMIT = 1200
"""Seconds that a run of tests may take."""


class Stale(Exception):
    """A mutation that does not apply: its old text is not in the file exactly once."""


def apply(mutation: Mutation, tree: Path) -> None:
    """Make the mutation in `tree`. Raises Stale."""
    if callable(mutation.change):
        mutation.change(tree)
        return
    for text in mutation.change:
        path = tree / text.file
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (count := before.count(text.old)) != 1:
            raise Stale(f"{mutation.name}: {text.file} has {text.old[:60]!r} {count} times, and should have it once")
        path.write_text(before.replace(text.old, text.new), encoding="utf-8")


def copy(tree: Path) -> None:
    """Copy what tests need of the project to `tree`; weights are linked, file by file."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "weights", ".hypothesis")
            shutil.copytree(source, tree / name, ignore=ignored)
        elif source.exists():
            shutil.copy2(source, tree / name)
    for path in (ROOT / WEIGHTS).rglob("*"):
        if path.is_file():
            link = tree / path.relative_to(ROOT)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)


def run(tree: Path, tests: Sequence[str]) -> tuple[str, str]:
    """Run tests in a tree -> ("green", "red" or "broken", the line that says which test failed).

    Broken is what says nothing of the product: tests that cannot be collected, none at all, or no end.
    """
    paths = os.pathsep.join(str(tree / name) for name in ("src", "tests"))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "broken", f"no end within {LIMIT} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    said = lines[0] if lines else done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
    return {0: "green", 1: "red"}.get(done.returncode, "broken"), said.split(" - ")[0].removeprefix("FAILED ")


def attempt(mutation: Mutation, whole: bool) -> tuple[str, str]:
    """Make one mutation in a copy of its own -> ("killed", "survived" or "broken", by which test)."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        tree = Path(folder)
        copy(tree)
        apply(mutation, tree)
        result, said = run(tree, mutation.tests)
        if result == "green" and whole:
            result, said = run(tree, ["tests"])
    return {"red": "killed", "green": "survived"}.get(result, result), said


def main(argv: Sequence[str] | None = None) -> int:
    """Try the mutations and print a table; return 1 if one survives or says nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="mutations to try; none: all")
    parser.add_argument("--list", action="store_true", help="print the mutations, and try none")
    parser.add_argument("--whole", action="store_true", help="run the whole suite where the named tests stay green")
    given = parser.parse_args(argv)
    if unknown := set(given.names) - {m.name for m in MUTATIONS}:
        parser.error(f"there is no mutation {sorted(unknown)[0]!r}: --list says which there are")
    chosen = [m for m in MUTATIONS if not given.names or m.name in given.names]
    if given.list:
        for m in chosen:
            print(f"{m.name:26}{m.what}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        copy(Path(folder))
        result, said = run(Path(folder), list(dict.fromkeys(test for m in chosen for test in m.tests)))
    if result != "green":
        print(f"without any mutation the tests are {result}: {said}")
        return 1
    bad = 0
    for m in chosen:
        started = time.monotonic()
        try:
            result, said = attempt(m, given.whole)
        except Stale as error:
            result, said = "stale", str(error)
        bad += result != "killed"
        print(
            f"{m.name:26}{result:10}{time.monotonic() - started:6.0f} s  {said if result != 'survived' else m.what}",
            flush=True,
        )
    print(f"{len(chosen) - bad} of {len(chosen)} killed")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
