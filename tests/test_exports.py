"""The public names: sorted, all there, and free until used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import neuraleraser


def test_a_public_name_stands_in_all_three_places():
    """Where it is loaded from, for `import *`, and for type checkers."""
    assert len(set(neuraleraser.__all__)) == len(neuraleraser.__all__)
    assert set(neuraleraser.__all__) == set(neuraleraser._HOME)
    tree = ast.parse(Path(neuraleraser.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.name: str(node.module).removeprefix("neuraleraser.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("neuraleraser.")
        for alias in node.names
    }
    assert imported == neuraleraser._HOME


@pytest.mark.parametrize("name", neuraleraser.__all__)
def test_every_public_name_is_what_its_module_holds(name: str):
    home = importlib.import_module(f"neuraleraser.{neuraleraser._HOME[name]}")
    assert getattr(neuraleraser, name) is getattr(home, name)
    assert name in dir(neuraleraser)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Erasor'"):
        _ = neuraleraser.Erasor


def test_importing_the_package_loads_nothing_heavy():
    heavy = {
        "torch",
        "numpy",
        "PIL",
        "safetensors",
        "diffusers",
        "transformers",
        "huggingface_hub",
        "accelerate",
    }
    code = f"import sys, neuraleraser; print(*sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_laziness_test_can_fail():
    code = "import sys, neuraleraser.io.tensor_file; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
