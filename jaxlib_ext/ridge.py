"""Ridge regression from sufficient statistics: the fit, its derivatives and its leave-one-out errors.

    stats = ridge.gram(features, targets)                 # G = Phi^T Phi / N, b = Phi^T y / N, c = y.y / N, N
    solved = ridge.solve(stats, rel_ridge=1e-6)           # w = (Phi^T Phi + lambda I)^-1 Phi^T y, lambda = r tr(Phi Phi^T) / N
    errors = ridge.leave_one_out(features, targets, rel_ridges)

Everything is differentiable in features, targets, weights and ridge, forward and backward: solves are `spd_solve`, which factors once
and uses the factor for its derivatives too.

Precision. With N rows the system's condition number reaches N / r: r = 1e-6 needs float64, which is used whenever it is enabled
(`jax.enable_x64`), whatever the features' dtype. In float32 the sums are compensated and the solve refined, and r should be 1e-3 or more.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes
from janax.jaxlib_ext.checks import check_shapes, one_of

__all__ = ["FORMS", "Fit", "Gram", "LeaveOneOut", "fit", "gram", "leave_one_out", "leverage", "solve", "spd_factor", "spd_solve"]

FORMS = ("auto", "primal", "dual")
_HIGHEST = jax.lax.Precision.HIGHEST


class Gram(NamedTuple):
    """What a linear fit needs to know of N rows phi_i with targets y_i and weights v_i (1 if not given); means with N = sum_i v_i.

    Attributes:
      gram: [d d] G = sum_i v_i phi_i phi_i^T / N.
      cross: [d] b = sum_i v_i y_i phi_i / N.
      const: [] c = sum_i v_i y_i^2 / N.
      count: [] N.
    """

    gram: jax.Array
    cross: jax.Array
    const: jax.Array
    count: jax.Array


class Fit(NamedTuple):
    """A ridge fit.

    Attributes:
      weights: [d] w; the prediction is phi.w.
      ridge: [] lambda / N, what was added to the diagonal of G.
      factor: [d d] lower Cholesky factor of G + ridge I; None from the dual form.
    """

    weights: jax.Array
    ridge: jax.Array
    factor: jax.Array | None


class LeaveOneOut(NamedTuple):
    """Errors of fits that did not see the row they predict.

    Attributes:
      residuals: [k n] y_i minus the prediction by the fit to all other rows, per ridge.
      mean_squared: [k] their mean square.
      best: [] int32, the ridge with the smallest.
    """

    residuals: jax.Array
    mean_squared: jax.Array
    best: jax.Array


def _wide(*arrays: ArrayLike) -> tuple[jax.Array, ...]:
    """As float64 where it is enabled, else float32."""
    return tuple(jnp.asarray(x).astype(dtypes.widest_dtype()) for x in arrays)


# --- sums over rows


def gram(
    features: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    block_size: int | None = None,
    axis_name: str | None = None,
) -> Gram:
    """The sufficient statistics of a linear fit.

    Rows that are sharded stay where they are: each device sums its own, and the sums are added. Integer weights equal repeated rows.

    Args:
      features: [n d] Phi.
      targets: [n] y.
      weights: [n] v >= 0; None is one each.
      block_size: Sum over blocks of so many rows, without a wide copy of all features; in float32 the sums over blocks are compensated, so
        that rounding does not grow with n. None sums all at once. Static.
      axis_name: Inside `jax.shard_map`: add the sums of all devices along this mesh axis. Static.

    Returns:
      The statistics, in float64 where it is enabled, else float32.

    Raises:
      ValueError: on wrong shapes, or `block_size` below one.
    """
    n = check_shapes("ridge.gram", features=(features, "n d"), targets=(targets, "n"), weights=(weights, "n"))["n"]
    if block_size is not None and block_size < 1:
        raise ValueError(f"ridge.gram: 'block_size' must be at least 1, got {block_size}")
    features, targets = jnp.asarray(features), jnp.asarray(targets)
    weights = jnp.ones_like(targets, dtypes.floor_dtype(targets.dtype)) if weights is None else jnp.asarray(weights)
    size = n if block_size is None else block_size
    sums = _sums(features, targets, weights) if size >= n else _block_sums(features, targets, weights, size)
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
    phi_phi, phi_y, y_y, count = sums
    return Gram(phi_phi / count, phi_y / count, y_y / count, count)


def _sums(features: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
    phi, y, v = _wide(features, targets, weights)
    weighted = phi * v[:, None]
    return (
        jnp.einsum("nd,ne->de", weighted, phi, precision=_HIGHEST),
        jnp.einsum("nd,n->d", weighted, y, precision=_HIGHEST),
        jnp.sum(v * y * y),
        jnp.sum(v),
    )


def _block_sums(features: jax.Array, targets: jax.Array, weights: jax.Array, size: int) -> tuple[jax.Array, ...]:
    missing = -features.shape[0] % size
    padded = (jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1)) for x in (features, targets, weights))  # rows of weight 0
    blocks = tuple(x.reshape(-1, size, *x.shape[1:]) for x in padded)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(_sums, *(x[0] for x in blocks)))

    def add(carry: tuple, block: tuple) -> tuple[tuple, None]:
        total, low = carry
        new = _sums(*block)
        high = jax.tree.map(jnp.add, total, new)
        lost = jax.tree.map(_lost, total, new, high)
        return (high, jax.tree.map(jnp.add, low, lost)), None

    (total, low), _ = jax.lax.scan(add, (zeros, zeros), blocks)
    return jax.tree.map(jnp.add, total, low)


def _lost(a: jax.Array, b: jax.Array, total: jax.Array) -> jax.Array:
    """What a + b lost to rounding when it became `total` (Knuth's two-sum); a constant for derivatives, which it is in exact arithmetic."""
    a, b, total = (jax.lax.stop_gradient(x) for x in (a, b, total))
    part = total - a
    return (a - (total - part)) + (b - part)


# --- symmetric positive definite systems


def spd_factor(matrix: ArrayLike) -> jax.Array:
    """[... d d] lower Cholesky factor of a symmetric positive definite matrix, in at least float32; no derivative (see `spd_solve`)."""
    return jnp.linalg.cholesky(jax.lax.stop_gradient(dtypes.at_least_float32(matrix)))


def spd_solve(matrix: ArrayLike, rhs: ArrayLike, *, factor: jax.Array | None = None, refinements: int = 0) -> jax.Array:
    """x = A^-1 b for a symmetric positive definite A.

    The derivative is that of the solution, not of the factorisation: dx = A^-1 (db - dA x), backward db = A^-1 dx, dA = -db x^T, both
    by the same Cholesky factor. Of any order, forward and reverse.

    Args:
      matrix: [d d] A, symmetric.
      rhs: [d] or [d k] b.
      factor: [d d] lower factor of A, if there is one already.
      refinements: Steps of iterative refinement x + A^-1 (b - A x); one or two mend float32 where A is ill conditioned. Static.

    Returns:
      x like `rhs`, in at least float32; nan where A is not positive definite.

    Raises:
      ValueError: on wrong shapes.
    """
    b_spec = "d k" if jnp.ndim(rhs) == 2 else "d"
    check_shapes("ridge.spd_solve", matrix=(matrix, "d d"), rhs=(rhs, b_spec), factor=(factor, "d d"))
    a, b = dtypes.at_least_float32(matrix), dtypes.at_least_float32(rhs)
    dtype = jnp.promote_types(a.dtype, b.dtype)
    a, b = a.astype(dtype), b.astype(dtype)
    lower = jax.lax.stop_gradient((spd_factor(a) if factor is None else factor).astype(dtype))

    def product(x: jax.Array) -> jax.Array:
        return jnp.matmul(a, x, precision=_HIGHEST)

    def by_factor(_, b: jax.Array) -> jax.Array:
        x = jax.scipy.linalg.cho_solve((lower, True), b)
        for _i in range(refinements):
            x = x + jax.scipy.linalg.cho_solve((lower, True), b - jnp.matmul(jax.lax.stop_gradient(a), x, precision=_HIGHEST))
        return x

    return jax.lax.custom_linear_solve(product, b, by_factor, symmetric=True)


# --- fits


def solve(stats: Gram, *, rel_ridge: ArrayLike = 1e-6) -> Fit:
    """The primal fit w = (Phi^T Phi + lambda I)^-1 Phi^T y, lambda = r tr(Phi Phi^T) / N, from the statistics alone.

    Args:
      stats: As `gram` gives them.
      rel_ridge: [] r > 0, relative to the mean squared length of the features. Traced.

    Returns:
      The fit.

    Reference: Chen et al., arXiv:2301.02931, official code.
    """
    d = check_shapes("ridge.solve", gram=(stats.gram, "d d"), cross=(stats.cross, "d"), rel_ridge=(rel_ridge, ""))["d"]
    ridge = jnp.asarray(rel_ridge, stats.gram.dtype) * jnp.trace(stats.gram) / stats.count
    matrix = stats.gram + ridge * jnp.eye(d, dtype=stats.gram.dtype)
    factor = spd_factor(matrix)
    refinements = 0 if matrix.dtype == jnp.float64 else 2
    return Fit(spd_solve(matrix, stats.cross, factor=factor, refinements=refinements), ridge, factor)


def fit(
    features: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None, *, rel_ridge: ArrayLike = 1e-6, form: str = "auto"
) -> Fit:
    """A ridge fit by the d x d or the n x n system, which are the same fit.

    primal  w = (Phi^T V Phi + lambda I)^-1 Phi^T V y          dual  w = Phi^T V (Phi Phi^T V + lambda I)^-1 y

    Args:
      features: [n d] Phi.
      targets: [n] y.
      weights: [n] v, the diagonal of V; None is one each.
      rel_ridge: [] r; lambda = r tr(Phi^T V Phi) / sum(v). Traced.
      form: "primal", "dual" or "auto", the smaller system. Static. The dual coefficients themselves are never returned: the n x n system is
        singular up to the ridge where d < n, and they lose the digits that the predictions keep.

    Returns:
      The fit; without a factor from the dual form.

    Raises:
      ValueError: on wrong shapes or an unknown form.
    """
    lengths = check_shapes(
        "ridge.fit", features=(features, "n d"), targets=(targets, "n"), weights=(weights, "n"), rel_ridge=(rel_ridge, "")
    )
    one_of("ridge.fit", "form", form, FORMS)
    if form == "primal" or (form == "auto" and lengths["d"] <= lengths["n"]):
        return solve(gram(features, targets, weights), rel_ridge=rel_ridge)
    phi, y = _wide(features, targets)
    v = jnp.ones_like(y) if weights is None else _wide(weights)[0]
    count = jnp.sum(v)
    ridge = jnp.asarray(rel_ridge, phi.dtype) * jnp.sum(v[:, None] * phi * phi) / count  # lambda
    kernel = jnp.einsum("nd,md->nm", phi, phi, precision=_HIGHEST)
    diagonal = ridge * jnp.eye(lengths["n"], dtype=phi.dtype)
    dual = spd_solve(kernel + diagonal, y) if weights is None else jnp.linalg.solve(kernel * v[None, :] + diagonal, y)
    return Fit(jnp.einsum("nd,n->d", phi, v * dual, precision=_HIGHEST), ridge / count, None)


def leverage(solved: Fit, features: ArrayLike) -> jax.Array:
    """phi^T (G + lambda/N I)^-1 phi for rows of features; over N it is how far a row can pull its own prediction, and s^2 times that the variance.

    Args:
      solved: A primal fit.
      features: [... d].

    Returns:
      [...].

    Raises:
      ValueError: if the fit is from the dual form, or on wrong shapes.
    """
    if solved.factor is None:
        raise ValueError("ridge.leverage: 'solved' has no factor, expected a fit of the primal form")
    check_shapes("ridge.leverage", features=(features, "... d"), weights=(solved.weights, "d"))
    phi = jnp.asarray(features).astype(solved.factor.dtype)
    rows = phi.reshape(-1, phi.shape[-1])
    half = jax.scipy.linalg.solve_triangular(solved.factor, rows.T, lower=True)
    return jnp.sum(half * half, axis=0).reshape(phi.shape[:-1])


def leave_one_out(features: ArrayLike, targets: ArrayLike, rel_ridges: ArrayLike) -> LeaveOneOut:
    """Leave-one-out errors of all rows for a list of ridges, from one eigendecomposition.

    e_i = (y_i - phi_i.w) / (1 - phi_i^T (Phi^T Phi + lambda I)^-1 phi_i); lambda is that of all rows.

    Args:
      features: [n d].
      targets: [n].
      rel_ridges: [k] relative ridges.

    Returns:
      Residuals and their mean squares.

    Raises:
      ValueError: on wrong shapes.
    """
    check_shapes("ridge.leave_one_out", features=(features, "n d"), targets=(targets, "n"), rel_ridges=(rel_ridges, "k"))
    stats = gram(features, targets)
    phi, y = _wide(features, targets)
    values, vectors = jnp.linalg.eigh(stats.gram)
    rotated = jnp.einsum("nd,de->ne", phi, vectors, precision=_HIGHEST)
    cross = jnp.einsum("d,de->e", stats.cross, vectors, precision=_HIGHEST)
    values = jnp.maximum(values, 0)

    def residuals(rel_ridge: jax.Array) -> jax.Array:
        inverse = 1 / (values + rel_ridge * jnp.sum(values) / stats.count)
        own = jnp.einsum("ne,e->n", rotated * rotated, inverse, precision=_HIGHEST) / stats.count
        error = y - jnp.einsum("ne,e->n", rotated, cross * inverse, precision=_HIGHEST)
        return error / jnp.maximum(1 - own, jnp.finfo(error.dtype).eps)

    errors = jax.lax.map(residuals, jnp.asarray(rel_ridges, phi.dtype))
    squared = jnp.mean(errors**2, axis=1)
    return LeaveOneOut(errors, squared, jnp.argmin(squared))
