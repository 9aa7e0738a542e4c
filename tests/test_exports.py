"""The public names: sorted, all there, and free until used."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import neuraleraser


def test_the_public_names_are_sorted_and_single():
    assert neuraleraser.__all__ == sorted(set(neuraleraser.__all__))


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
    code = "import sys, neuraleraser.io.artifact; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
