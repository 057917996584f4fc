"""`janax design`: from a table of scored sequences to a batch of better ones, with what speaks for and against each.

    config    the options                          table      the user's rows, checked
    proxy     features, fit, leave-one-out         command    the run from reading to the report

Importing this package is cheap; JAX is loaded when the work begins.
"""

from typing import TYPE_CHECKING

from janax.experiments.design.config import Config, Options

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Config", "Options", "design"]


def design(options: Options, console: "Console") -> None:
    """Reads, fits, designs, and writes designs.csv and report.html; goes on where an interrupted run stopped."""
    from janax.experiments.design import command

    command.run(options, console)
