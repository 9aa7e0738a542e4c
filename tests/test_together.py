"""Several processes that evaluate in one folder: each image is drawn once, and the end is that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from helpers.together import KILLED_IN

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    argv = [sys.executable, "-m", "helpers.together", str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


def rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All rows of each method, in a fixed order, without the time they took."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in folder.rglob("*.parquet"):
        part = pyarrow.parquet.ParquetFile(path).read().drop_columns(["seconds"]).to_pylist()
        found.setdefault(str(path.parent.relative_to(folder)), []).extend(part)
    return {
        place: sorted(some, key=lambda row: (row["group"], row["prompt"], row["seed"])) for place, some in found.items()
    }


def judged(folder: Path) -> list[int]:
    return [int(line) for line in folder.with_suffix(".judged").read_text().split()]


@pytest.mark.parametrize("name", ["shared", "killed"])
def test_the_end_is_that_of_one_process(folder: Path, name: str) -> None:
    alone, other = folder / "alone", folder / name
    assert rows(alone) == rows(other) and len(rows(alone)) == 4
    pictures = [{p.relative_to(root): p.read_bytes() for p in root.rglob("*.png")} for root in (alone, other)]
    assert pictures[0] == pictures[1] and len(pictures[0]) > 40
    records = [json.loads((root / "run.json").read_text()) for root in (alone, other)]
    assert records[0] == records[1]


def test_each_image_is_drawn_once_by_one_of_them(folder: Path) -> None:
    assert len(judged(folder / "shared")) == len(judged(folder / "alone")) > 40  # one image a batch
    assert min(judged(folder / "shared").count(i) for i in range(2)) > len(judged(folder / "alone")) / 10


def test_what_a_process_that_was_killed_left_is_drawn_by_the_other(folder: Path) -> None:
    found = judged(folder / "killed")
    assert len(found) == len(judged(folder / "alone")) and found.count(0) == KILLED_IN - 1


def test_no_claim_is_left(folder: Path) -> None:
    assert not list(folder.rglob(".*.claim"))
