"""`janax distill`: teaches a student language model what a teacher predicts, token by token.

    config     the options                      corpus     the data as rows and prompts
    objective  loss, samples, evaluation        command    the run from reading to saving

Importing this package is cheap; JAX is loaded when the work begins.
"""

from typing import TYPE_CHECKING

from janax.experiments.distill.config import Config, Options

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Config", "Options", "distill"]


def distill(options: Options, console: "Console") -> None:
    """Trains, evaluates, saves the student and says on `console` what became of it; goes on where an interrupted run stopped."""
    from janax.experiments.distill import command

    command.run(options, console)
