"""Law 8 with real processes: killed by SIGKILL at random moments and run again, the end has the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(job: str, folder: Path, kills: int, seed: int) -> dict[str, bytes]:
    """Every file that the job leaves."""
    folder.mkdir()
    script = Path(__file__).with_name("killed.py")
    argv = [sys.executable, str(script), job, str(folder), str(kills), str(seed)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == kills, "it was done before it was killed often enough"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
@pytest.mark.parametrize(
    ("job", "kills"),
    [
        ("train", 2),
        ("collect", 2),
        pytest.param("train", 10, marks=pytest.mark.slow),
        pytest.param("collect", 10, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(job: str, kills: int, tmp_path: Path):
    whole, killed = run(job, tmp_path / "whole", 0, 0), run(job, tmp_path / "killed", kills, 5)
    left = {name for name in killed if name.startswith(".")}  # files aside, of writes that were cut off
    assert killed.keys() - left == whole.keys() and len(whole) > 3
    for name in whole:
        assert killed[name] == whole[name], name
