"""Set before anything else is imported: no test reaches the network, and property tests repeat themselves."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from hypothesis import settings

# No deadline: a machine that trains at the same time is slow now and then. Derandomized: CI repeats what a
# developer saw.
settings.register_profile("neuraleraser", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("neuraleraser")
