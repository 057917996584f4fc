"""A report as studies fill it: claims with verdicts from intervals, tables, pictures and notes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from janax.experiments import report
from janax.experiments.session import Session
from janax.experiments.statistics import Estimate, mean_interval, paired_interval

__all__ = ["Page", "estimate_text"]


class Page:
    """Collects what one experiment found.

    Args:
      name: The experiment, with which the names of its claims begin.
      config: Its configuration, for those who write on the page.
      session: Where pictures lie.
    """

    def __init__(self, name: str, config: Any, session: Session):
        self.name, self.config, self.session = name, config, session
        self.claims: list[report.Claim] = []
        self.figures: list[report.Figure] = []
        self.tables: list[report.Table] = []
        self.notes: list[str] = []

    def claim(
        self,
        number: str,
        text: str,
        *,
        holds: bool | None,
        undecided: bool = False,
        paper: float | str | None = None,
        ours: Estimate | float | str | None = None,
        seeds: int | None = None,
        note: str = "",
    ) -> None:
        """Adds a claim.

        Args:
          number: Its number, "2a".
          text: The statement, one sentence, with the unit.
          holds: The verdict; None if it was not run.
          undecided: The interval allows both verdicts; `holds` does not matter then.
          paper: The paper's number or word.
          ours: Our number or word; of an estimate also interval and seeds.
          seeds: Seeds behind it, if it is no estimate.
          note: What a reader must know to judge.
        """
        interval = None
        if isinstance(ours, Estimate):
            seeds, ours, half = ours.count, ours.value, ours.half_width
            interval = None if math.isnan(half) else half
        verdict: Any = "not run" if holds is None else "undecided" if undecided else "holds" if holds else "does not hold"
        name = f"{self.name}-{number}"
        self.claims.append(
            report.Claim(id=name, claim=text, paper=paper, ours=ours, interval=interval, seeds=seeds, verdict=verdict, note=note)
        )

    def compare(
        self, number: str, text: str, ours: Sequence[float], theirs: Sequence[float], *, paper: float | str | None, note: str = ""
    ) -> None:
        """A claim that `ours` is above `theirs`, seed by seed; undecided where the interval of the difference contains zero."""
        difference = paired_interval(ours, theirs)
        undecided = difference.low <= 0 <= difference.high
        self.claim(number, text, holds=difference.low > 0, undecided=undecided, paper=paper, ours=difference, note=note)

    def picture(self, name: str, draw: Callable[[Any], Any] | None, caption: str, alt: str = "") -> None:
        """A figure that `draw(path)` makes, on the first process; with None one that the study has made, if it has."""
        path = self.session.figure_path(name)
        if draw is not None and self.session.is_main:
            draw(path)
        if draw is not None or path.exists():
            self.figures.append(report.Figure(path=f"figures/{name}", caption=caption, alt=alt or caption))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
        """A table of words and numbers."""
        self.tables.append(report.Table(title=title, columns=columns, rows=rows, caption=caption))

    def results(self, title: str, intro: str) -> report.Results:
        """All that was collected."""
        return report.Results(title=title, intro=intro, claims=self.claims, figures=self.figures, tables=self.tables, notes=self.notes)


def estimate_text(values: Any, digits: str = ".3g") -> str:
    """Mean and 95 % interval over seeds as text; a single value without."""
    estimate = mean_interval(values)
    return report.format_interval(estimate.value, estimate.half_width) if estimate.count > 1 else format(estimate.value, digits)
