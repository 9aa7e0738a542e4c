"""Law 8 with real processes: killed by SIGKILL at random moments and run again, the end has the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open


def inside(path: Path) -> Any:
    """All of a file, but for the order in which safetensors writes the fields of a header."""
    if path.suffix in (".jsonl", ".json", ".png"):
        return path.read_bytes()
    if path.suffix == ".parquet":
        return pyarrow.parquet.ParquetFile(path).read().drop_columns(["seconds"]).to_pylist()
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        values = {name: (x.dtype, x.shape, x.flatten().view(torch.uint8).tolist()) for name, x in tensors.items()}
        return values, file.metadata()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
@pytest.mark.parametrize(
    ("job", "kills"),
    [
        ("train", 2),
        ("collect", 2),
        ("evaluate", 2),
        pytest.param("train", 10, marks=pytest.mark.slow),
        pytest.param("collect", 10, marks=pytest.mark.slow),
        pytest.param("evaluate", 5, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(job: str, kills: int, tmp_path: Path):
    argv = [sys.executable, "-m", "helpers.killed", job, str(tmp_path), str(kills), "5"]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    whole, killed = (
        # Files aside are locks, and of writes that were cut off.
        {str(p.relative_to(root)): inside(p) for p in root.rglob("*") if p.is_file() and p.name[0] != "."}
        for root in (tmp_path / "whole", tmp_path / "killed")
    )
    assert killed.keys() == whole.keys() and len(whole) > 3
    for name in whole:
        assert killed[name] == whole[name], name
