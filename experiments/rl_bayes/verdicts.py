"""Verdicts on figures over seeds, some of which may be infinite."""

import math
from typing import Any

import numpy as np

from janax.experiments.page import Page
from janax.experiments.statistics import mean_interval

__all__ = ["array", "below", "compare"]


def array(values: Any) -> np.ndarray:
    """Numbers as float64; what JSON could not hold (null) is infinite."""
    return np.vectorize(lambda x: math.inf if x is None else float(x), otypes=[float])(np.asarray(values, dtype=object))


def compare(page: Page, number: str, text: str, ours: Any, theirs: Any, *, paper: str, note: str = "") -> None:
    """`Page.compare`, also where a divergence is infinite: then seed by seed, without an interval."""
    a, b = array(ours), array(theirs)
    if np.isfinite(a).all() and np.isfinite(b).all():
        page.compare(number, text, a.tolist(), b.tolist(), paper=paper, note=note)
    else:
        above, mixed = bool(np.all(a > b)), bool(np.any(a > b))
        page.claim(number, text, paper=paper, ours="not finite", seeds=len(a), holds=above, undecided=mixed and not above, note=note)


def below(page: Page, number: str, text: str, values: Any, limit: float, *, paper: str | None, note: str = "") -> None:
    """A claim that the mean over seeds is below a limit: undecided if the interval contains the limit."""
    estimate = mean_interval(array(values))
    undecided = estimate.low < limit <= estimate.high
    page.claim(number, text, paper=paper, ours=estimate, holds=estimate.high < limit, undecided=undecided, note=note)
