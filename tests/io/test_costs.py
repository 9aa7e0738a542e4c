"""Peak memory: what was taken and given back counts, and what was taken before does not."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from neuraleraser.io.costs import CostMeter

MB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the whole process")
def test_the_peak_is_of_the_work_alone():
    def work() -> None:
        assert np.ones(200 * MB, np.uint8).sum() == 200 * MB

    before = CostMeter().read()["peak_bytes"]
    work()
    meter = CostMeter()
    work()
    during = meter.read()
    after = CostMeter().read()["peak_bytes"]
    assert before is not None and during["peak_bytes"] is not None and after is not None
    assert during["peak_bytes"] - before > 150 * MB, "what was given back counts"
    assert during["peak_bytes"] - after > 150 * MB, "what was there before does not"
