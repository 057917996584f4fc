"""Gradients of invertible recurrences in memory that does not grow with their length.

Plain autodiff of a scan keeps every carry (and whatever the step kept inside). If each step can be undone, the backward pass needs only the
last carry: it walks back, rebuilds the carry it came from and differentiates that one step.

    carry = reversible.scan(step, unstep, params, carry, xs)      # same value and gradient as jax.lax.scan, O(1) carries kept
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Step", "StepVjp", "check_amplification", "scan"]

Step = Callable[[Any, Any, Any], Any]
StepVjp = Callable[[Any, Any, Any, Any], tuple[Any, tuple[Any, Any, Any]]]


def scan(
    step: Step,
    unstep: Step,
    params: Any,
    carry: Any,
    xs: Any,
    *,
    unstep_vjp: StepVjp | None = None,
    amplification: float | None = None,
) -> Any:
    """Runs carry <- step(params, carry, x) over the leading axis of `xs`; reverse mode rebuilds the carries instead of storing them.

    Memory of the backward pass: one carry, its cotangent, one gradient of `params` and the residuals of a single step, whatever the length
    (benchmarks/bdia_gradient.py). Time: one more `unstep` per step. If `step` and `unstep` evaluate the same network at the same point, give
    `unstep_vjp`, which may share that evaluation: forward + (forward + backward) instead of forward + (2 forward + backward).

    Args:
      step: (params, carry, x) -> carry, a bijection of the carry for given params and x. Static.
      unstep: (params, carry, x) -> carry, its inverse. Static.
      params: Tree handed to every step; differentiated. Arrays that need a gradient come in here or through `xs`, never by closure.
      carry: Tree of arrays of fixed shapes and dtypes.
      xs: Tree of arrays [t ...]: one slice per step; differentiated as well.
      unstep_vjp: (params, new_carry, x, cotangent of new_carry) -> (carry, cotangents of (params, carry, x)); made of the two functions above
        if None. Static.
      amplification: Factor by which the whole walk back may amplify a rounding error, if known. Static.

    Returns:
      The last carry. Only reverse mode is defined (no `jvp`), once (no second derivative).

    Raises:
      ValueError: if `amplification` times the rounding unit of the carry exceeds 1e-3: the rebuilt carries would not be the true ones.

    Reference: Maclaurin et al., arXiv:1502.03492; Gomez et al., arXiv:1707.04585 (the same idea for layers).
    """
    if amplification is not None:
        check_amplification("reversible.scan", amplification, carry)
    return _scan(step, unstep, unstep_vjp or functools.partial(_rebuild_and_pull, step, unstep), params, carry, xs)


def check_amplification(function: str, amplification: float, carry: Any, *, tolerance: float = 1e-3) -> None:
    """Raises ValueError if undoing a recurrence in the carry's dtype would lose more than `tolerance` (relative); free at run time."""
    unit = max((float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(carry) if jnp.issubdtype(x.dtype, jnp.inexact)), default=0.0)
    if not amplification * unit <= tolerance:
        raise ValueError(
            f"{function}: undoing the recurrence amplifies rounding errors {amplification:.1e} times, more than the carry's dtype bears "
            f"(unit {unit:.1e}, allowed product {tolerance:g}); use float64, fewer steps, a gamma nearer one, or gradient='autodiff'"
        )


def _rebuild_and_pull(step: Step, unstep: Step, params: Any, new_carry: Any, x: Any, cotangent: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    carry = unstep(params, new_carry, x)
    _, pull = jax.vjp(step, params, carry, x)
    return carry, pull(cotangent)


def _differentiable(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _pick(like: Any, tree: Any) -> list[jax.Array]:
    """The leaves of `tree` that stand where `like` has a floating-point array."""
    leaves, structure = jax.tree.flatten(like)
    return [new for leaf, new in zip(leaves, structure.flatten_up_to(tree)) if _differentiable(leaf)]


def _fill(like: Any, chosen: list[jax.Array], zero: Callable[[Any], Any]) -> Any:
    """The inverse of `_pick`: a cotangent tree for `like`, with `zero(leaf)` where no gradient can be."""
    leaves, structure = jax.tree.flatten(like)
    rest = iter(chosen)
    return structure.unflatten([next(rest) if _differentiable(leaf) else zero(leaf) for leaf in leaves])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan(step: Step, unstep: Step, unstep_vjp: StepVjp, params: Any, carry: Any, xs: Any) -> Any:
    del unstep, unstep_vjp
    return jax.lax.scan(lambda carry, x: (step(params, carry, x), None), carry, xs)[0]


def _scan_fwd(step: Step, unstep: Step, unstep_vjp: StepVjp, params: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    last = _scan(step, unstep, unstep_vjp, params, carry, xs)
    return last, (params, last, xs)


def _scan_bwd(step: Step, unstep: Step, unstep_vjp: StepVjp, residuals: Any, cotangent: Any) -> tuple[Any, Any, Any]:
    del step, unstep
    params, last, xs = residuals

    def back(state: Any, x: Any) -> tuple[Any, list[jax.Array]]:
        new_carry, cotangents, sums = state
        full = _fill(new_carry, cotangents, lambda leaf: jnp.zeros(leaf.shape, jax.dtypes.float0))
        carry, (to_params, to_carry, to_x) = unstep_vjp(params, new_carry, x, full)
        sums = [total + new for total, new in zip(sums, _pick(params, to_params))]
        return (carry, _pick(carry, to_carry), sums), _pick(x, to_x)

    sums = [jnp.zeros_like(leaf) for leaf in _pick(params, params)]
    (_, first, sums), per_step = jax.lax.scan(back, (last, _pick(last, cotangent), sums), xs, reverse=True)
    nothing = lambda leaf: None  # noqa: E731 - a symbolic zero
    return _fill(params, sums, nothing), _fill(last, first, nothing), _fill(xs, per_step, nothing)


_scan.defvjp(_scan_fwd, _scan_bwd)
