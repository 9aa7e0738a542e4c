"""What a type checker tells a user of the public names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import neuraleraser as ne

pipe = ne.open_pipeline("canvas")
eraser = ne.erase(pipe, "Van Gogh style")
reveal_type(eraser)
with ne.attach(pipe, eraser) as trace:
    reveal_type(trace)
reveal_type(ne.Eraser.from_pretrained("a.safetensors"))
reveal_type(ne.evaluate(pipe, [ne.EraserMethod(eraser)]))
reveal_type(ne.SAE.load("b.safetensors"))
reveal_type(ne.Reference.from_pretrained("owner/name"))
ne.attach(pipe, 3)
"""
EXPECTED = ["Eraser", "Trace", "Eraser", "Report", "SAE", "Reference"]


@pytest.mark.slow
def test_public_names_have_their_types(tmp_path: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    source = Path(__file__).parents[1] / "src"
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(source)]}))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "-p", str(tmp_path), "--pythonpath", sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    revealed = [line for line in done.stdout.splitlines() if "Type of" in line]
    assert [line.split(" is ")[1].strip("'\"") for line in revealed] == EXPECTED, done.stdout
    assert "script.py:13" in done.stdout and "reportArgumentType" in done.stdout, "a wrong argument is an error"
