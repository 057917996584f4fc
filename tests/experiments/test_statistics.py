import math

import numpy as np
import pytest

from janax.experiments import statistics


def test_mean_interval_known_value():
    # t_{0.975, 4} = 2.776445 (any table), s = sqrt(2.5), half width = t s / sqrt(5) = 1.963243
    estimate = statistics.mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert estimate.value == 3.0 and estimate.count == 5
    assert estimate.half_width == pytest.approx(1.963243, abs=1e-6)
    assert (estimate.low, estimate.high) == pytest.approx((1.036757, 4.963243), abs=1e-6)


def test_one_seed_has_no_interval():
    estimate = statistics.mean_interval([2.0])
    assert estimate.value == 2.0 and estimate.low == -math.inf and math.isnan(estimate.half_width)


def test_t_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    estimates = [statistics.mean_interval(rng.normal(size=4), level=0.9) for _ in range(2000)]
    share = np.mean([estimate.low <= 0.0 <= estimate.high for estimate in estimates])
    assert abs(share - 0.9) < 4 * math.sqrt(0.9 * 0.1 / 2000)


def test_pairing_removes_what_the_seeds_share():
    seeds = np.array([0.0, 10.0, 20.0])
    estimate = statistics.paired_interval(seeds + np.array([1.0, 1.1, 0.9]), seeds)
    assert estimate.value == pytest.approx(1.0) and estimate.low > 0.7
    with pytest.raises(ValueError, match="'theirs' has 2 values, expected 3"):
        statistics.paired_interval(seeds, seeds[:2])


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    x = np.random.default_rng(1).normal(size=400)
    estimate = statistics.bootstrap(x)
    half = 1.96 * np.std(x, ddof=1) / 20
    assert estimate.value == pytest.approx(np.mean(x))
    assert estimate.half_width == pytest.approx(half, rel=0.1)
    assert estimate == statistics.bootstrap(x)
    assert estimate != statistics.bootstrap(x, seed=1)


@pytest.mark.parametrize("function", [statistics.mean_interval, statistics.bootstrap])
def test_bad_samples(function):
    with pytest.raises(ValueError, match="'values' is empty"):
        function([])
    with pytest.raises(ValueError, match="'level' is 95"):
        function([1.0, 2.0], level=95)
