"""Set before anything else is imported: no test reaches the network, and property tests repeat themselves."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("helpers")

# No deadline: a machine that trains at the same time is slow now and then. Derandomized: CI repeats what a
# developer saw.
settings.register_profile("neuraleraser", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("neuraleraser")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the tiny Stable Diffusion, as `--model` takes it."""
    from helpers.pipelines import stable_diffusion

    folder = tmp_path_factory.mktemp("model")
    stable_diffusion().save_pretrained(folder, safe_serialization=True)
    return str(folder)
