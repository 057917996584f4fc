"""The three ways a run ends early, each with the exit code that the command line gives it."""

__all__ = ["NonFiniteError", "StoppedError", "UserError"]


class UserError(Exception):
    """A mistake of the user's, told in one sentence that names the field and the mend. Exit code 2."""


class NonFiniteError(Exception):
    """A loss or gradient that is nan or infinite; the message names the step, the last good checkpoint and what to try. Exit code 3."""


class StoppedError(Exception):
    """Ctrl-C or SIGTERM: the state is saved and the same command resumes. Exit code 0."""
