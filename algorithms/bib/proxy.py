"""The linearised proxy: a ridge fit on features of sequences, its forward and backward losses in closed form, and heads that supervise.

With phi the features of one proposal and G, b, c, w those of the offline data (`Proxy`):

    L_f = (phi.w - y_h)^2                                            forward: the data predict the proposal
    L_b = (1/N) |Phi u - y|^2 = u^T G u - 2 b.u + c                  backward: the proposal predicts the data,
          u = Phi_h^T (Phi_h Phi_h^T + lambda_h I)^-1 y_h            lambda_h = r tr(Phi_h Phi_h^T) / M

Neither loss costs more with more data: N is gone after the fit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes, ridge
from janax.jaxlib_ext.checks import check_shapes, one_of

__all__ = [
    "REDUCTIONS",
    "Heads",
    "Proxy",
    "Scale",
    "backward_loss",
    "backward_model",
    "conservative",
    "fit_heads",
    "fit_proxy",
    "forward_loss",
    "head_value",
    "lower_confidence_bound",
    "predict",
    "standardise",
    "uncertainty",
]

REDUCTIONS = ("mean", "min", "lcb")


class Scale(NamedTuple):
    """y = std standardised + mean.

    Attributes:
      mean: [] mean of the offline scores.
      std: [] their standard deviation.
    """

    mean: jax.Array
    std: jax.Array


class Proxy(NamedTuple):
    """A ridge fit of standardised scores on features; no array is as long as the data.

    Attributes:
      fit: Weights w [d], ridge and Cholesky factor.
      stats: G [d d], b [d], c and N of the data.
      scale: Mean and standard deviation of the scores.
      variance: [] s^2, the residual variance of the standardised scores: RSS / (N - tr(H)).
    """

    fit: ridge.Fit
    stats: ridge.Gram
    scale: Scale
    variance: jax.Array


class Heads(NamedTuple):
    """Linear heads on the same features, whose reduction supervises the weights of the two losses.

    Attributes:
      weights: [k d] one head a row.
      bias: [k].
      scale: Back to scores: std value + mean.
    """

    weights: jax.Array
    bias: jax.Array
    scale: Scale


def standardise(scores: ArrayLike, *, ddof: int = 1) -> tuple[jax.Array, Scale]:
    """(y - m) / (s + 1e-9), and m, s.

    Args:
      scores: [n] offline scores.
      ddof: 1 as in BIB's code, 0 as in BDI's. Static.

    Returns:
      [n] standardised scores and the scale.

    Raises:
      ValueError: with fewer than `ddof` + 1 scores.
    """
    n = check_shapes("bib.standardise", scores=(scores, "n"))["n"]
    if n <= ddof:
        raise ValueError(f"bib.standardise: 'scores' has {n} entries, expected more than ddof = {ddof}")
    y = jnp.asarray(scores).astype(dtypes.widest_dtype())
    mean, std = jnp.mean(y), jnp.std(y, ddof=ddof)
    return (y - mean) / (std + 1e-9), Scale(mean, std)


def fit_proxy(
    features: ArrayLike,
    scores: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    rel_ridge: ArrayLike = 1e-6,
    ddof: int = 1,
    block_size: int | None = None,
    axis_name: str | None = None,
) -> Proxy:
    """Fits w = (Phi^T Phi + lambda I)^-1 Phi^T y, lambda = r tr(Phi Phi^T) / N, on standardised scores; no bias, no centring.

    Args:
      features: [n d] Phi, features of the offline sequences.
      scores: [n] their scores, in any unit.
      weights: [n] weights of the examples; None is one each. They do not enter the standardisation.
      rel_ridge: [] r. The paper's 1e-6 needs float64 (`jax.enable_x64`); `ridge.leave_one_out` tells a better one. Traced.
      ddof: Of the standard deviation; see `standardise`. Static.
      block_size: Rows summed at a time; see `ridge.gram`. Static.
      axis_name: Mesh axis of sharded rows inside `jax.shard_map`; see `ridge.gram`. Static.

    Returns:
      The proxy.

    Raises:
      ValueError: on wrong shapes.

    Reference: arXiv:2301.02931, official code.
    """
    check_shapes("bib.fit_proxy", features=(features, "n d"), scores=(scores, "n"), weights=(weights, "n"))
    if axis_name is None:
        y, scale = standardise(scores, ddof=ddof)
    else:
        y = jnp.asarray(scores).astype(dtypes.widest_dtype())
        count = jax.lax.psum(y.shape[0], axis_name)
        mean = jax.lax.psum(jnp.sum(y), axis_name) / count
        std = jnp.sqrt(jax.lax.psum(jnp.sum((y - mean) ** 2), axis_name) / (count - ddof))
        y, scale = (y - mean) / (std + 1e-9), Scale(mean, std)
    stats = ridge.gram(features, y, weights, block_size=block_size, axis_name=axis_name)
    return _proxy(stats, scale, rel_ridge)


def _proxy(stats: ridge.Gram, scale: Scale, rel_ridge: ArrayLike) -> Proxy:
    fit = ridge.solve(stats, rel_ridge=rel_ridge)
    assert fit.factor is not None
    rss = stats.count * (fit.weights @ stats.gram @ fit.weights - 2 * stats.cross @ fit.weights + stats.const)
    freedom = jnp.trace(jax.scipy.linalg.cho_solve((fit.factor, True), stats.gram))
    variance = jnp.maximum(rss, 0) / jnp.maximum(stats.count - freedom, 1)
    return Proxy(fit, stats, scale, variance)


def conservative(proxy: Proxy, explored: ArrayLike, mean_features: ArrayLike, *, weight: ArrayLike, rel_ridge: ArrayLike = 1e-6) -> Proxy:
    """The fit that also keeps predictions for explored designs below those for the data: a conservative objective model in closed form.

    With the mean squared error, not halved, plus a (E f(explored) - E f(data)), b becomes b - a (mean phi_explored - mean phi_data) / 2.

    Args:
      proxy: The fit without it.
      explored: [m d] features of designs that an optimiser visited.
      mean_features: [d] mean features of the data.
      weight: [] a, in units of squared standardised scores. Traced.
      rel_ridge: [] as in `fit_proxy`. Traced.

    Returns:
      The proxy with other weights; its residual variance is that of the pulled fit.

    Reference: Trabucco et al., arXiv:2107.06882, for linear heads.
    """
    check_shapes("bib.conservative", cross=(proxy.stats.cross, "d"), explored=(explored, "m d"), mean_features=(mean_features, "d"))
    cross = proxy.stats.cross
    excess = jnp.mean(jnp.asarray(explored).astype(cross.dtype), axis=0) - jnp.asarray(mean_features).astype(cross.dtype)
    moved = ridge.solve(proxy.stats._replace(cross=cross - jnp.asarray(weight, cross.dtype) * excess / 2), rel_ridge=rel_ridge)
    w = moved.weights
    rss = proxy.stats.count * (w @ proxy.stats.gram @ w - 2 * cross @ w + proxy.stats.const)
    return proxy._replace(fit=moved, variance=jnp.maximum(rss, 0) / jnp.maximum(proxy.stats.count - 1, 1))


def predict(proxy: Proxy, phi: ArrayLike) -> jax.Array:
    """[...] standardised predictions phi.w for features [... d]."""
    check_shapes("bib.predict", weights=(proxy.fit.weights, "d"), phi=(phi, "... d"))
    w = proxy.fit.weights
    return jnp.einsum("...d,d->...", jnp.asarray(phi).astype(w.dtype), w, precision=jax.lax.Precision.HIGHEST)


def uncertainty(proxy: Proxy, phi: ArrayLike) -> jax.Array:
    """[...] posterior standard deviation s sqrt(phi^T (Phi^T Phi + lambda I)^-1 phi) of the standardised prediction, for features [... d]."""
    variance = proxy.variance * ridge.leverage(proxy.fit, phi) / proxy.stats.count
    some = variance > 0  # a perfect fit, or no features: 0, without the infinite slope of the root
    return jnp.where(some, jnp.sqrt(jnp.where(some, variance, 1)), 0)


def lower_confidence_bound(proxy: Proxy, phi: ArrayLike, *, num_deviations: ArrayLike = 1.0) -> jax.Array:
    """[...] prediction minus `num_deviations` posterior standard deviations, standardised, for features [... d]."""
    return predict(proxy, phi) - num_deviations * uncertainty(proxy, phi)


def forward_loss(proxy: Proxy, phi: ArrayLike, target: ArrayLike = 10.0) -> jax.Array:
    """L_f = mean_h (phi_h.w - y_h)^2; gradient (2/M)(phi_h.w - y_h) w.

    Args:
      proxy: The fit.
      phi: [d] features of one proposal or [m d] of several.
      target: [] or [m] y_h, in standard deviations of the offline scores above their mean.

    Returns:
      [] loss.

    Reference: arXiv:2301.02931, official code (without BDI's factor 1/2).
    """
    rows = _rows("bib.forward_loss", proxy, phi)
    return jnp.mean((predict(proxy, rows) - jnp.asarray(target, rows.dtype)) ** 2)


def backward_model(phi: ArrayLike, target: ArrayLike = 10.0, *, rel_ridge: ArrayLike = 1e-6) -> jax.Array:
    """[d] u = Phi_h^T (Phi_h Phi_h^T + lambda_h I)^-1 y_h, the ridge fit to the proposals alone; for one, phi y_h / ((1 + r) |phi|^2).

    Args:
      phi: [m d] features of the proposals.
      target: [] or [m] y_h.
      rel_ridge: [] r; lambda_h = r tr(Phi_h Phi_h^T) / M, and its derivative is taken. Traced.

    Returns:
      The weights.
    """
    m = check_shapes("bib.backward_model", phi=(phi, "m d"), rel_ridge=(rel_ridge, ""))["m"]
    phi = dtypes.at_least_float32(phi)
    y = jnp.broadcast_to(jnp.asarray(target, phi.dtype), (m,))
    kernel = jnp.einsum("hd,gd->hg", phi, phi, precision=jax.lax.Precision.HIGHEST)
    matrix = kernel + jnp.asarray(rel_ridge, phi.dtype) * jnp.trace(kernel) / m * jnp.eye(m, dtype=phi.dtype)
    dual = y / matrix[0] if m == 1 else ridge.spd_solve(matrix, y)
    return jnp.einsum("hd,h->d", phi, dual, precision=jax.lax.Precision.HIGHEST)


def backward_loss(proxy: Proxy, phi: ArrayLike, target: ArrayLike = 10.0, *, rel_ridge: ArrayLike = 1e-6) -> jax.Array:
    """L_b = (1/N) |Phi u - y|^2 = u^T G u - 2 b.u + c, where u fits the proposals alone.

    Args:
      proxy: The fit, of which G, b and c are used.
      phi: [d] features of one proposal, or [m d] of several that explain the data together.
      target: [] or [m] y_h, standardised.
      rel_ridge: [] r of the map backwards. Traced.

    Returns:
      [] loss.

    Reference: arXiv:2301.02931, official code; its only case is one proposal.
    """
    rows = _rows("bib.backward_loss", proxy, phi)
    u = backward_model(rows, target, rel_ridge=rel_ridge)
    gram, cross, const, _ = proxy.stats
    return u @ gram @ u - 2 * cross @ u + const


def _rows(function: str, proxy: Proxy, phi: ArrayLike) -> jax.Array:
    phi = jnp.asarray(phi)
    check_shapes(function, weights=(proxy.fit.weights, "d"), phi=(phi, "m d" if phi.ndim == 2 else "d"))
    return jnp.atleast_2d(phi).astype(proxy.fit.weights.dtype)


# --- auxiliary heads


def fit_heads(
    key: jax.Array, features: ArrayLike, scores: ArrayLike, *, num_heads: int = 5, rel_ridge: ArrayLike = 1e-3, ddof: int = 1
) -> Heads:
    """Ridge heads with a bias, each on its own bootstrap resample of the offline data.

    The official code's heads are trained by gradient descent from five seeds with settings that were not published; these are their
    closed form.

    Args:
      key: PRNG key of the resampling.
      features: [n d].
      scores: [n].
      num_heads: k. Static.
      rel_ridge: [] ridge relative to the centred features. Traced.
      ddof: Of the standard deviation. Static.

    Returns:
      The heads.

    Raises:
      ValueError: on wrong shapes, or without heads.
    """
    n, _ = check_shapes("bib.fit_heads", features=(features, "n d"), scores=(scores, "n"), rel_ridge=(rel_ridge, "")).values()
    if num_heads < 1:
        raise ValueError(f"bib.fit_heads: 'num_heads' must be at least 1, got {num_heads}")
    y, scale = standardise(scores, ddof=ddof)
    phi = jnp.asarray(features)

    def head(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        times = jnp.zeros(n, y.dtype).at[jax.random.randint(key, (n,), 0, n)].add(1)
        centre = jnp.einsum("n,nd->d", times, phi.astype(y.dtype), precision=jax.lax.Precision.HIGHEST) / n
        middle = jnp.sum(times * y) / n
        stats = ridge.gram(phi.astype(y.dtype) - centre[None], y - middle, times)
        weights = ridge.solve(stats, rel_ridge=rel_ridge).weights
        return weights, middle - centre @ weights

    weights, bias = jax.lax.map(head, jax.random.split(key, num_heads))
    return Heads(weights, bias, scale)


def head_value(
    heads: Heads, phi: ArrayLike, *, reduce: str = "mean", num_deviations: ArrayLike = 1.0, compatibility: str | None = None
) -> jax.Array:
    """What the heads together say of features: the mean, the least, or mean minus deviations between heads; in units of the scores.

    Args:
      heads: From `fit_heads`, or trained elsewhere.
      phi: [... d] features.
      reduce: One of `REDUCTIONS`. Static.
      num_deviations: [] deviations (over heads, ddof 0) that "lcb" subtracts. Traced.
      compatibility: "public_code": the last head alone, which is what the public code evaluates (its five heads are one module that five
        checkpoints overwrite). Static.

    Returns:
      [...] values.

    Raises:
      ValueError: for an unknown reduction or wrong shapes.
    """
    one_of("bib.head_value", "reduce", reduce, REDUCTIONS)
    one_of("bib.head_value", "compatibility", compatibility, (None, "public_code"))
    check_shapes("bib.head_value", weights=(heads.weights, "k d"), bias=(heads.bias, "k"), phi=(phi, "... d"))
    weights, bias = heads.weights, heads.bias
    if compatibility == "public_code":
        weights, bias = weights[-1:], bias[-1:]
    phi = jnp.asarray(phi).astype(weights.dtype)
    values = jnp.einsum("...d,kd->...k", phi, weights, precision=jax.lax.Precision.HIGHEST)
    values = values + bias.reshape((1,) * (values.ndim - 1) + (-1,))
    if reduce == "min":
        value = jnp.min(values, axis=-1)
    else:
        value = jnp.mean(values, axis=-1)
        if reduce == "lcb":
            spread = jnp.mean((values - value[..., None]) ** 2, axis=-1)
            value = value - num_deviations * jnp.where(spread > 0, jnp.sqrt(jnp.where(spread > 0, spread, 1)), 0)
    return heads.scale.std * value + heads.scale.mean
