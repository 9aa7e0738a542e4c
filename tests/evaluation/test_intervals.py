"""Intervals: the bootstrap against drawing images, the exact ones against the binomial itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuraleraser.evaluation.intervals import Estimate, proportion, ratio, unanimous_bound


def test_the_bootstrap_is_that_of_drawing_images_with_their_twins():
    rng = np.random.default_rng(5)
    base = rng.random(300) < 0.8
    after = base & (rng.random(300) < 0.9) | (rng.random(300) < 0.05)
    rows = np.ones(300, dtype=bool)
    estimate = ratio(after, base, rows, "images", 0)
    draws = rng.integers(0, 300, size=(4000, 300))
    plain = np.quantile(after[draws].sum(1) / base[draws].sum(1), [0.025, 0.975])
    assert [estimate.low, estimate.high] == pytest.approx(plain, abs=0.012)
    # Drawn apart, images and twins would give a much wider interval.
    apart = after[draws].sum(1) / base[rng.permuted(draws)].sum(1)
    assert np.ptp(np.quantile(apart, [0.025, 0.975])) > 1.2 * (estimate.high - estimate.low)
    assert ratio(after, base, rows, "images", 0) == estimate != ratio(after, base, rows, "images", 1)
    assert str(Estimate(0.966, 60, 0.9, 1)) == "0.97 (0.90\u20131.00, n = 60)"


@pytest.mark.parametrize("n", [1, 2, 20, 40, 500])
def test_all_or_none_has_the_exact_binomial_interval(n):
    """At the bound, seeing no deviation in n images has the probability alpha / 2."""
    rows = np.ones(n, dtype=bool)
    every, none = proportion(rows, rows, "images", 0), proportion(~rows, rows, "images", 0)
    assert (every.value, every.high, none.value, none.low) == (1, 1, 0, 0)
    assert math.isclose(every.low**n, 0.025) and math.isclose((1 - none.high) ** n, 0.025)
    assert unanimous_bound(40) == pytest.approx(0.0881, abs=1e-4)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 2**31))
def test_a_ratio_from_which_no_image_deviates_is_no_certainty_either(right, wrong, seed):
    base = np.random.default_rng(seed).permutation(np.r_[np.ones(right, bool), np.zeros(wrong, bool)])
    rows = np.ones(len(base), dtype=bool)
    estimate = ratio(base, base, rows, "images", 0)
    assert estimate.value == 1 and estimate.low < 1
    assert (estimate.high > 1) == (wrong > 0), "what was wrong in the base might have become right"
    assert estimate.low >= proportion(base[base], base[base], "images", 0).low - wrong / right


def test_few_rows_chosen_out_of_many_count_alone():
    good, rows = np.array([1, 1, 0, 0, 0], bool), np.array([1, 1, 0, 0, 0], bool)
    assert proportion(good, rows, "images", 0).n == 2 and proportion(good, rows, "images", 0).value == 1
