"""Neural tangent kernels: the infinite-width one in closed form, and a network's own by Jacobian products.

    k = ntk.fully_connected(x, x2)                           # [n m] ReLU network of infinite width
    v = ntk.product(fn, params, x, v)                        # J J^T v, one backward and one forward pass, no Jacobian
    found = ntk.solve(fn, params, x, y, rel_ridge=0.1)       # (J J^T + lambda I)^-1 y by conjugate gradients
    rows = ntk.sketch(fn, params, x, key, num_features=4096) # features whose products are J J^T in expectation

`fn(params, x_i) -> []` is a network with one output, for one input; J has a row d fn(params, x_i) / d params for each.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes
from janax.jaxlib_ext.checks import check_shapes

__all__ = ["Solution", "diagonal", "fully_connected", "fully_connected_diagonal", "linearised", "product", "pull", "sketch", "solve"]

ScalarFn = Callable[[Any, Any], jax.Array]


class Solution(NamedTuple):
    """Coefficients of a kernel system.

    Attributes:
      dual: [n] a = (J J^T + lambda I)^-1 y.
      tangent: J^T a, a tree like the parameters: the fitted change of the parameters.
      ridge: [] lambda.
      residual: [] |y - (J J^T + lambda I) a| / |y|.
      iterations: [] int32 products with J J^T.
      converged: [] whether the residual reached the tolerance.
    """

    dual: jax.Array
    tangent: Any
    ridge: jax.Array
    residual: jax.Array
    iterations: jax.Array
    converged: jax.Array


# --- infinite width


def fully_connected(x: ArrayLike, x2: ArrayLike, *, depth: int = 6, weight_std: ArrayLike = 1.0) -> jax.Array:
    """Tangent kernel of an infinitely wide ReLU network with one output and no biases, in NTK parameterisation.

    q = W^2 x.x' / d, T = q; then for every ReLU, with c = q / sqrt(a b) and t = arccos c,
    T <- W^2 T (pi - t) / (2 pi),   q <- W^2 sqrt(a b) (sqrt(1 - c^2) + (pi - t) c) / (2 pi),   T <- T + q,
    where a and b are q of x with itself and of x' with itself.

    Args:
      x: [n d].
      x2: [m d].
      depth: Dense layers, one more than ReLUs. Static.
      weight_std: [] W. Traced.

    Returns:
      [n m]; gradients are finite where x equals x2 and where either is zero (there the kernel is zero).

    Raises:
      ValueError: on wrong shapes, or `depth` below one.

    Reference: Jacot et al., arXiv:1806.07572; with these constants the kernel of BDI (arXiv:2209.07507, official code).
    """
    d = check_shapes("ntk.fully_connected", x=(x, "n d"), x2=(x2, "m d"), weight_std=(weight_std, ""))["d"]
    _check_depth("ntk.fully_connected", depth)
    x, x2 = dtypes.at_least_float32(x), dtypes.at_least_float32(x2)
    w2 = jnp.asarray(weight_std, x.dtype) ** 2
    q = w2 * jnp.einsum("nd,md->nm", x, x2, precision=jax.lax.Precision.HIGHEST) / d
    a, b = (w2 * jnp.sum(z * z, axis=-1) / d for z in (x, x2))
    square = a[:, None] * b[None, :]
    some = square > 0
    scale = jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)
    bound = 1 - max(1e-15, float(jnp.finfo(x.dtype).eps))
    total = q
    for _ in range(depth - 1):
        c = jnp.clip(q / jnp.where(some, scale, 1), -bound, bound)
        angle = jnp.arccos(c)
        q = w2 * scale * (jnp.sqrt(1 - c * c) + (math.pi - angle) * c) / (2 * math.pi)
        total = w2 * total * (math.pi - angle) / (2 * math.pi) + q
        scale = scale * w2 / 2
    return total


def fully_connected_diagonal(x: ArrayLike, *, depth: int = 6, weight_std: ArrayLike = 1.0) -> jax.Array:
    """[n] the kernel of rows of x [n d] with themselves, in closed form: T <- W^2 T / 2, q <- W^2 q / 2, T <- T + q; see `fully_connected`."""
    d = check_shapes("ntk.fully_connected_diagonal", x=(x, "n d"), weight_std=(weight_std, ""))["d"]
    _check_depth("ntk.fully_connected_diagonal", depth)
    x = dtypes.at_least_float32(x)
    w2 = jnp.asarray(weight_std, x.dtype) ** 2
    return depth * (w2 / 2) ** (depth - 1) * w2 * jnp.sum(x * x, axis=-1) / d


def _check_depth(function: str, depth: int) -> None:
    if depth < 1:
        raise ValueError(f"{function}: 'depth' must be at least 1, got {depth}")


# --- a network's own


def pull(fn: ScalarFn, params: Any, x: ArrayLike, v: ArrayLike) -> Any:
    """J^T v = sum_i v_i d fn(params, x_i) / d params, by one backward pass.

    Args:
      fn: A scalar network for one input.
      params: Its parameters.
      x: [n ...] inputs.
      v: [n] coefficients.

    Returns:
      A tree like `params`.
    """
    values, back = jax.vjp(lambda p: jax.vmap(fn, in_axes=(None, 0))(p, x), params)
    check_shapes("ntk.pull", values=(values, "n"), v=(v, "n"))
    return back(jnp.asarray(v, values.dtype))[0]


def linearised(fn: ScalarFn, params: Any, tangent: Any, x: ArrayLike) -> jax.Array:
    """[n] J u, the change of fn(params, x_i) to first order when `params` moves along `tangent` (a tree like it), by one forward pass."""
    return jax.jvp(lambda p: jax.vmap(fn, in_axes=(None, 0))(p, x), (params,), (tangent,))[1]


def product(fn: ScalarFn, params: Any, x: ArrayLike, v: ArrayLike) -> jax.Array:
    """[n] J J^T v, the empirical tangent kernel times a vector, without kernel or Jacobian; arguments as in `pull`."""
    return linearised(fn, params, pull(fn, params, x, v), x)


def diagonal(fn: ScalarFn, params: Any, x: ArrayLike) -> jax.Array:
    """[n] |d fn(params, x_i) / d params|^2, one input at a time."""

    def length(x_i: Any) -> jax.Array:
        slope = jax.grad(fn)(params, x_i)
        return jnp.asarray(sum(jnp.sum(dtypes.at_least_float32(leaf) ** 2) for leaf in jax.tree.leaves(slope)))

    return jax.lax.map(length, jnp.asarray(x))


def solve(
    fn: ScalarFn,
    params: Any,
    x: ArrayLike,
    targets: ArrayLike,
    *,
    rel_ridge: ArrayLike = 0.1,
    tolerance: ArrayLike = 1e-6,
    max_iters: int = 500,
) -> Solution:
    """Fits the linearised network fn(params, x) + J (theta - params) to targets, matrix-free.

    (J J^T + lambda I) a = y by conjugate gradients, preconditioned by the diagonal; lambda = r tr(J J^T) / n. A ridge of 0.1 to 1 converges in
    tens of products, and is what a trained network wants; at 1e-6 hundreds are not enough, and `converged` says so.

    Args:
      fn: A scalar network for one input.
      params: Its parameters, the point of linearisation.
      x: [n ...] inputs.
      targets: [n] y, what the change is to explain: standardised scores minus fn(params, x_i), if that is not zero.
      rel_ridge: [] r. Traced.
      tolerance: [] relative residual to stop at. Traced.
      max_iters: Products at most. Static.

    Returns:
      Coefficients and fitted tangent. Not differentiable in reverse (a while loop); the prediction for a new input is `linearised`.

    Raises:
      ValueError: on wrong shapes, or `max_iters` below one.
    """
    check_shapes("ntk.solve", targets=(targets, "n"), rel_ridge=(rel_ridge, ""), tolerance=(tolerance, ""))
    if max_iters < 1:
        raise ValueError(f"ntk.solve: 'max_iters' must be at least 1, got {max_iters}")
    y = dtypes.at_least_float32(targets)
    lengths = diagonal(fn, params, x).astype(y.dtype)
    ridge = jnp.asarray(rel_ridge, y.dtype) * jnp.mean(lengths)
    inverse = 1 / (lengths + ridge)
    size = jnp.sqrt(jnp.sum(y * y))
    bound = jnp.asarray(tolerance, y.dtype) * size

    def apply(v: jax.Array) -> jax.Array:
        return product(fn, params, x, v).astype(y.dtype) + ridge * v

    def unfinished(state: tuple) -> jax.Array:
        _, r, _, _, count = state
        return (jnp.sqrt(jnp.sum(r * r)) > bound) & (count < max_iters)

    def advance(state: tuple) -> tuple:
        a, r, p, rho, count = state
        q = apply(p)
        step = rho / jnp.sum(p * q)
        a, r = a + step * p, r - step * q
        z = inverse * r
        new = jnp.sum(r * z)
        return a, r, z + new / rho * p, new, count + 1

    z = inverse * y
    a, _, _, _, count = jax.lax.while_loop(unfinished, advance, (jnp.zeros_like(y), y, z, jnp.sum(y * z), jnp.int32(0)))
    tangent = pull(fn, params, x, a)
    left = y - linearised(fn, params, tangent, x).astype(y.dtype) - ridge * a
    residual = jnp.sqrt(jnp.sum(left * left)) / jnp.where(size > 0, size, 1)
    return Solution(a, tangent, ridge, residual, count, residual <= 10 * jnp.asarray(tolerance, y.dtype))


def sketch(fn: ScalarFn, params: Any, x: ArrayLike, key: jax.Array, *, num_features: int) -> jax.Array:
    """Rows of J folded into few numbers by random signs: every parameter is added, with a random sign, to a random one of the features.

    phi_i.phi_j is an unbiased estimate of the tangent kernel with a standard error of about |J_i| |J_j| / sqrt(num_features).

    Args:
      fn: A scalar network for one input.
      params: Its parameters.
      x: One input [...], not a batch: `jax.vmap` over inputs, with the same key, or `jax.lax.map` where gradients of all do not fit.
      key: PRNG key; the same for all inputs that are to be compared.
      num_features: Length of the result. Static.

    Returns:
      [num_features] features, differentiable in x.

    Raises:
      ValueError: if `num_features` is below one.

    Reference: Charikar, Chen, Farach-Colton 2002 (count sketch).
    """
    if num_features < 1:
        raise ValueError(f"ntk.sketch: 'num_features' must be at least 1, got {num_features}")
    leaves = jax.tree.leaves(jax.grad(fn)(params, x))
    total = jnp.zeros(num_features, jnp.float32)
    for i, leaf in enumerate(leaves):
        key_bucket, key_sign = jax.random.split(jax.random.fold_in(key, i))
        flat = dtypes.at_least_float32(leaf).reshape(-1)
        bucket = jax.random.randint(key_bucket, flat.shape, 0, num_features)
        signs = jax.random.rademacher(key_sign, flat.shape, flat.dtype)
        total = total.astype(flat.dtype) + jax.ops.segment_sum(signs * flat, bucket, num_features)
    return total
