"""Options of `janax design`. Importing this module loads neither JAX nor NumPy."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from janax.experiments.config import check

__all__ = ["Config", "Options"]


@dataclasses.dataclass(frozen=True)
class Config:
    """All that the result depends on."""

    data: Path
    """Scored sequences: a .csv or .tsv file with a header, or a FASTA file whose headers end in the score (`>name 1.23`, `>name score=1.23`)."""
    alphabet: str
    """`dna`, `protein`, or a text file that holds the letters, e.g. `ACGU`."""
    num: int = 128
    """Designs to write, all different, none of them in the data."""
    sequence_column: str = ""
    """Column of the sequences; by default one called sequence, seq or the like, or the only one of text."""
    score_column: str = ""
    """Column of the scores; by default one called score, fitness, y or the like, or the only one of numbers."""
    minimize: bool = False
    """Lower scores are better."""
    unknown: Literal["error", "drop"] = "error"
    """What to do with sequences that hold other letters: say so and stop, or leave them out."""
    encoder: str = ""
    """A directory in Hugging Face layout (ESM-2, ProtBERT, DNABERT class) whose features are tried beside the built-in ones."""
    rel_ridge: float | None = None
    """Ridge of the fit, relative to the features' mean squared length; by default the one with the least leave-one-out error."""
    steps: int = 100
    """Steps of the design."""
    max_mutations: int = 0
    """Furthest that a design may be from the nearest measured sequence, in letters; 0 is no limit."""
    min_distance: int = 1
    """Least number of letters in which two designs differ."""
    caution: float = 1.0
    """Designs are ranked by prediction minus so many standard deviations; 0 trusts the prediction."""
    seed: int = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        check(self.num >= 1, "num", "at least 1", self.num, "128")
        check(self.steps >= 1, "steps", "at least 1", self.steps, "100")
        check(self.max_mutations >= 0, "max_mutations", "at least 0", self.max_mutations, "5")
        check(self.min_distance >= 1, "min_distance", "at least 1", self.min_distance, "1")
        check(self.caution >= 0, "caution", "at least 0", self.caution, "1")
        check(self.rel_ridge is None or self.rel_ridge > 0, "rel_ridge", "above 0", self.rel_ridge, "0.001")


@dataclasses.dataclass(frozen=True)
class Options:
    """Reads scored sequences, fits a proxy, says by leave-one-out how far to trust it, and writes a batch of better sequences."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    """What is done."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Directory of the results: designs.csv, report.html. The same command goes on with one that was interrupted."""
