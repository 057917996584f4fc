"""BDI: bidirectional learning with an infinitely wide network (Chen et al., arXiv:2209.07507), the predecessor whose numbers can be reproduced.

    L_f = 1/2 mean_h (K_hl d - y_h)^2                                    d = (K_ll + lambda I)^-1 y_l, once
    L_b = 1/2 sum_i w_i ([K_lh (K_hh + lambda_h I)^-1 y_h]_i - y_i)^2    w = softmax(g y)
    L = L_f + L_b

A design is a free vector: standardised log-odds of its letters (`bib.log_odds`), optimised without a relaxation and read out at the end. All
of it wants float64.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.algorithms.bib import adaptive
from janax.jaxlib_ext import dtypes, ntk, ridge
from janax.jaxlib_ext.checks import check_shapes, one_of

__all__ = ["BdiDesign", "BdiFit", "bdi_backward_loss", "bdi_design", "bdi_fit", "bdi_forward_loss", "bdi_predict", "bdi_residual"]

_MODES = ("forward", "backward", "both")


class BdiFit(NamedTuple):
    """The offline data and the kernel's coefficients on it.

    Attributes:
      x: [n d] standardised vectors.
      y: [n] standardised scores (ddof 0).
      dual: [n] d = (K + lambda I)^-1 y.
      ridge: [] lambda = r tr(K) / n.
    """

    x: jax.Array
    y: jax.Array
    dual: jax.Array
    ridge: jax.Array


class BdiDesign(NamedTuple):
    """Designs as vectors.

    Attributes:
      x: [m d] at the end.
      forward: [steps m] L_f before each step (of one design).
      backward: [steps m] L_b.
    """

    x: jax.Array
    forward: jax.Array
    backward: jax.Array


def bdi_fit(x: ArrayLike, y: ArrayLike, *, rel_ridge: ArrayLike = 1e-6, depth: int = 6, dual: ArrayLike | None = None) -> BdiFit:
    """Solves (K_ll + lambda I) d = y.

    Args:
      x: [n d] vectors of the offline set.
      y: [n] standardised scores.
      rel_ridge: [] r. Traced.
      depth: Dense layers of the network. Static.
      dual: [n] the solution, if it is known: for n = 32,898 the system takes 9 GB and minutes. `bdi_residual` tells whether it is one.

    Returns:
      The fit.

    Raises:
      ValueError: on wrong shapes.
    """
    n = check_shapes("bib.bdi_fit", x=(x, "n d"), y=(y, "n"), dual=(dual, "n"), rel_ridge=(rel_ridge, ""))["n"]
    x, y = dtypes.at_least_float32(x), dtypes.at_least_float32(y)
    own = ntk.fully_connected_diagonal(x, depth=depth)
    lam = jnp.asarray(rel_ridge, own.dtype) * jnp.mean(own)
    if dual is None:
        kernel = ntk.fully_connected(x, x, depth=depth)
        index = jnp.arange(n)
        matrix = kernel.at[index, index].set(own + lam)
        return BdiFit(x, y, ridge.spd_solve(matrix, y), lam)
    return BdiFit(x, y, jnp.asarray(dual, x.dtype), lam)


def bdi_residual(fit: BdiFit, *, depth: int = 6, block_size: int = 256) -> jax.Array:
    """[] |(K + lambda I) d - y| / |y|, by blocks of rows; see `bdi_fit`."""
    own = ntk.fully_connected_diagonal(fit.x, depth=depth)

    def row(args: tuple) -> jax.Array:
        x_i, own_i, dual_i = args
        kernel = ntk.fully_connected(x_i[None], fit.x, depth=depth)[0]
        same = jnp.all(fit.x == x_i[None], axis=1)
        return jnp.sum(jnp.where(same, own_i, kernel) * fit.dual) + fit.ridge * dual_i

    left = jax.lax.map(row, (fit.x, own, fit.dual), batch_size=block_size) - fit.y
    return jnp.linalg.norm(left) / jnp.linalg.norm(fit.y)


def bdi_predict(fit: BdiFit, x: ArrayLike, *, depth: int = 6) -> jax.Array:
    """[m] standardised predictions K_hl d for vectors x [m d]."""
    check_shapes("bib.bdi_predict", fit=(fit.x, "n d"), x=(x, "m d"))
    x = jnp.asarray(x, fit.x.dtype)
    return jnp.einsum("mn,n->m", ntk.fully_connected(x, fit.x, depth=depth), fit.dual, precision=jax.lax.Precision.HIGHEST)


def bdi_forward_loss(fit: BdiFit, x: ArrayLike, target: ArrayLike = 10.0, *, depth: int = 6) -> jax.Array:
    """L_f = 1/2 mean_h (K_hl d - y_h)^2 for proposals x [m d]; the target is [] or [m]."""
    prediction = bdi_predict(fit, x, depth=depth)
    return 0.5 * jnp.mean((prediction - jnp.asarray(target, prediction.dtype)) ** 2)


def bdi_backward_loss(
    fit: BdiFit, x: ArrayLike, target: ArrayLike = 10.0, *, rel_ridge: ArrayLike = 1e-6, weighting: ArrayLike = 0.0, depth: int = 6
) -> jax.Array:
    """L_b = 1/2 sum_i w_i ([K_lh (K_hh + r' tr(K_hh)/M I)^-1 y_h]_i - y_i)^2, w = softmax(g y).

    Args:
      fit: The offline data.
      x: [m d] proposals, which explain the data together.
      target: [] or [m] y_h.
      rel_ridge: [] r'. The public code has 1e-6 where this loss is alone and 0 beside the forward loss. Traced.
      weighting: [] g; 0 weighs all data alike (TFBind8), .001 was used for Ant. Traced.
      depth: Dense layers. Static.

    Returns:
      [] loss.
    """
    m = check_shapes("bib.bdi_backward_loss", fit=(fit.x, "n d"), x=(x, "m d"))["m"]
    x = jnp.asarray(x, fit.x.dtype)
    y = jnp.broadcast_to(jnp.asarray(target, x.dtype), (m,))
    across = ntk.fully_connected(x, fit.x, depth=depth)
    own = ntk.fully_connected_diagonal(x, depth=depth)
    own_ridge = jnp.asarray(rel_ridge, x.dtype) * jnp.mean(own)
    if m == 1:
        dual = y / (own + own_ridge)
    else:
        index = jnp.arange(m)
        dual = ridge.spd_solve(ntk.fully_connected(x, x, depth=depth).at[index, index].set(own + own_ridge), y)
    error = jnp.einsum("mn,m->n", across, dual, precision=jax.lax.Precision.HIGHEST) - fit.y
    return 0.5 * jnp.sum(jax.nn.softmax(weighting * fit.y) * error**2)


def bdi_design(
    fit: BdiFit,
    x: ArrayLike,
    *,
    target: ArrayLike = 10.0,
    mode: str = "both",
    num_steps: int = 200,
    learning_rate: ArrayLike = 0.1,
    rel_ridge: ArrayLike | None = None,
    weighting: ArrayLike = 0.0,
    depth: int = 6,
    compatibility: str | None = None,
) -> BdiDesign:
    """Adam on the proposals, all steps; one design for x [1 d], and M of them jointly for x [m d].

        designs = jax.lax.map(lambda x: bib.bdi_design(fit, x[None]).x[0], starts, batch_size=32)      # one at a time, as published

    Args:
      fit: The offline data.
      x: [m d] where to start.
      target: [] or [m] y_h.
      mode: "forward", "backward" or "both". Static.
      num_steps: Static.
      learning_rate: [] .1 for sequences, 1e-3 for continuous tasks. Traced.
      rel_ridge: [] r' of the map backwards; None is 1e-6 in mode "backward" and 0 in "both", as published. Traced.
      weighting: [] g of the backward loss. Traced.
      depth: Dense layers. Static.
      compatibility: "public_code": Adam's bias correction counts one step too many, so that the first step is .744 of the learning rate; the
        published numbers have it. Static.

    Returns:
      The designs with the losses on the way.

    Raises:
      ValueError: for an unknown mode, on wrong shapes, or if `num_steps` is below one.
    """
    one_of("bib.bdi_design", "mode", mode, _MODES)
    one_of("bib.bdi_design", "compatibility", compatibility, (None, "public_code"))
    if num_steps < 1:
        raise ValueError(f"bib.bdi_design: 'num_steps' must be at least 1, got {num_steps}")
    check_shapes("bib.bdi_design", fit=(fit.x, "n d"), x=(x, "m d"))
    x = jnp.asarray(x, fit.x.dtype)
    r = (1e-6 if mode == "backward" else 0.0) if rel_ridge is None else rel_ridge

    def loss(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        zero = jnp.zeros((), x.dtype)
        forward = zero if mode == "backward" else bdi_forward_loss(fit, x, target, depth=depth)
        backward = zero if mode == "forward" else bdi_backward_loss(fit, x, target, rel_ridge=r, weighting=weighting, depth=depth)
        return forward + backward, (forward, backward)

    def body(carry: tuple, _: None) -> tuple[tuple, tuple]:
        x, adam = carry
        slope, losses = jax.grad(loss, has_aux=True)(x)
        direction, adam = adaptive.adam_direction(adam, slope)
        return (x - learning_rate * direction, adam), losses

    adam = adaptive.adam_init(x, first_count=1 if compatibility == "public_code" else 0)
    (x, _), (forward, backward) = jax.lax.scan(body, (x, adam), length=num_steps)
    return BdiDesign(x, forward, backward)
