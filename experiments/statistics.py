"""Intervals over seeds and over examples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Estimate", "bootstrap", "mean_interval", "paired_interval"]


class Estimate(NamedTuple):
    """A number with its interval.

    Attributes:
      value: The estimate.
      low: Lower end of the interval.
      high: Upper end of the interval.
      count: Seeds or examples behind it.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        """Half the length of the interval, nan where it is unbounded."""
        return (self.high - self.low) / 2 if np.isfinite(self.high - self.low) else float("nan")


def mean_interval(values: Any, *, level: float = 0.95) -> Estimate:
    """Mean and Student's t interval, mean +- t_{n-1} s / sqrt(n), for a few independent seeds.

    Args:
      values: [n] one number per seed.
      level: Coverage.

    Returns:
      The estimate; with one value the interval is infinite, because one seed says nothing about the spread.

    Raises:
      ValueError: if there is no value, or `level` is outside (0, 1).
    """
    import scipy.special

    x = _sample("mean_interval", values, level)
    mean = float(np.mean(x))
    if x.size == 1:
        return Estimate(mean, -float("inf"), float("inf"), 1)
    half = float(scipy.special.stdtrit(x.size - 1, 0.5 + level / 2) * np.std(x, ddof=1) / np.sqrt(x.size))
    return Estimate(mean, mean - half, mean + half, int(x.size))


def paired_interval(ours: Any, theirs: Any, *, level: float = 0.95) -> Estimate:
    """Mean and t interval of the difference `ours - theirs` of runs that share their seeds; both [n], in the same order."""
    a, b = _sample("paired_interval", ours, level), _sample("paired_interval", theirs, level)
    if a.shape != b.shape:
        raise ValueError(f"paired_interval: 'theirs' has {b.size} values, expected {a.size} as in 'ours'")
    return mean_interval(a - b, level=level)


def bootstrap(
    values: Any,
    statistic: Callable[[np.ndarray], float] = lambda x: float(np.mean(x)),
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """A statistic with its percentile bootstrap interval, for many examples or for a statistic without a formula.

    Args:
      values: [n ...] examples along the first axis.
      statistic: Resampled examples -> number.
      level: Coverage.
      resamples: Number of resamples.
      seed: Of the resampling.

    Returns:
      The estimate.

    Raises:
      ValueError: if there is no value, or `level` is outside (0, 1).
    """
    x = np.asarray(values, dtype=np.float64)
    _sample("bootstrap", x.reshape(-1), level)
    rng = np.random.default_rng(seed)
    draws = [statistic(x[rng.integers(0, len(x), len(x))]) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return Estimate(float(statistic(x)), float(low), float(high), len(x))


def _sample(function: str, values: Any, level: float) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64).reshape(-1)
    if not x.size:
        raise ValueError(f"{function}: 'values' is empty, expected at least one number")
    if not 0 < level < 1:
        raise ValueError(f"{function}: 'level' is {level}, expected a number between 0 and 1")
    return x
