"""One scan for all invertible samplers, differentiated by autodiff or by walking back."""

from typing import Any

import jax

from janax.jaxlib_ext import checks, reversible

__all__ = ["GRADIENTS", "run"]

GRADIENTS = ("autodiff", "reversible")


def run(
    function: str,
    step: reversible.Step,
    unstep: reversible.Step,
    params: Any,
    state: Any,
    xs: Any,
    *,
    gradient: str,
    unstep_vjp: reversible.StepVjp | None = None,
    amplification: float | None = None,
) -> Any:
    """state <- step(params, state, x) over xs; see `reversible.scan` for the arguments."""
    checks.one_of(function, "gradient", gradient, GRADIENTS)
    if gradient == "autodiff":
        return jax.lax.scan(lambda carry, x: (step(params, carry, x), None), state, xs)[0]
    if amplification is not None:
        reversible.check_amplification(function, amplification, state)
    return reversible.scan(step, unstep, params, state, xs, unstep_vjp=unstep_vjp)
