"""CMA-ES with the standard constants (Hansen, arXiv:1604.00772), full or diagonal, as ask and tell; and a run of it from each start.

x_i = m + sigma y_i ,  y_i ~ N(0, C)           ask
m, sigma and C from the ranks of f(x_i)        tell

state = baselines.cma_init(mean, 0.5)
samples = baselines.cma_ask(state, key, population=12)
state = baselines.cma_tell(state, samples, values)          # maximises
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.algorithms.bib import relaxation as relaxed
from janax.algorithms.bib.baselines import _common
from janax.algorithms.bib.baselines._common import SELECTIONS, ScoreFn
from janax.algorithms.bib.baselines.designs import Archive, Designs, archive, hand_out
from janax.jaxlib_ext import checks, dtypes

__all__ = ["CmaConstants", "CmaState", "cma_ask", "cma_constants", "cma_es", "cma_init", "cma_tell"]


class CmaConstants(NamedTuple):
    """Constants that depend on the dimension n and the population only; host numbers.

    Attributes:
      weights: [population] by rank, the best first; the first mu are positive and sum to 1, the others negative (0 unless active).
      mu_eff: Effective number of the positive ones.
      c_sigma: Rate of the step size's path.
      d_sigma: Damping of the step size.
      c_c: Rate of the covariance's path.
      c_1: Rate of the rank-one update.
      c_mu: Rate of the rank-mu update.
      norm: E |N(0, I)|.
    """

    weights: np.ndarray
    mu_eff: float
    c_sigma: float
    d_sigma: float
    c_c: float
    c_1: float
    c_mu: float
    norm: float


class CmaState(NamedTuple):
    """The search distribution N(mean, sigma^2 C), its paths, and C's factors.

    Attributes:
      mean: [n] m.
      sigma: [] step size.
      covariance: [n n] C, or its diagonal [n].
      path_sigma: [n] evolution path of the step size.
      path_c: [n] evolution path of the covariance.
      basis: [n n] eigenvectors B of C = B diag(scales^2) B^T; [0 n] in the diagonal form, which needs none.
      scales: [n] square roots of the eigenvalues.
      generation: [] int32.
    """

    mean: jax.Array
    sigma: jax.Array
    covariance: jax.Array
    path_sigma: jax.Array
    path_c: jax.Array
    basis: jax.Array
    scales: jax.Array
    generation: jax.Array


def cma_constants(num_dimensions: int, population: int | None = None, *, active: bool = True, diagonal: bool = False) -> CmaConstants:
    """The tutorial's default parameters, its table 1.

    Args:
      num_dimensions: n. Static.
      population: lambda; None is 4 + floor(3 log n). Static.
      active: Whether the worse half has negative weights in the covariance. Static.
      diagonal: Whether C is diagonal: c_1 and c_mu are (n + 2)/3 times as large (Ros and Hansen 2008), at most 1 together. Static.

    Returns:
      `CmaConstants`.

    Raises:
      ValueError: on no dimension or a population below 2.

    Reference: arXiv:1604.00772, the version of 2023 (1/4 in c_mu).
    """
    n = num_dimensions
    size = default_population(n) if population is None else population
    _common.at_least("baselines.cma_constants", 1, num_dimensions=n)
    _common.at_least("baselines.cma_constants", 2, population=size)
    raw = np.log((size + 1) / 2) - np.log(np.arange(1, size + 1))
    mu = size // 2
    up, down = raw[:mu], raw[mu:]
    mu_eff = float(up.sum() ** 2 / np.square(up).sum())
    mu_eff_down = float(down.sum() ** 2 / np.square(down).sum()) if np.any(down) else 0.0
    c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)
    c_mu = min(1 - c_1, 2 * (0.25 + mu_eff + 1 / mu_eff - 2) / ((n + 2) ** 2 + mu_eff))
    if diagonal:
        c_1 = min(1.0, c_1 * (n + 2) / 3)
        c_mu = min(1 - c_1, c_mu * (n + 2) / 3)
    weights = raw / up.sum()
    total_down = -np.minimum(raw, 0).sum()
    if active and total_down > 0 and c_mu > 0:
        bound = min(1 + c_1 / c_mu, 1 + 2 * mu_eff_down / (mu_eff + 2), (1 - c_1 - c_mu) / (n * c_mu))
        weights = np.where(raw < 0, raw * bound / total_down, weights)
    else:
        weights = np.maximum(weights, 0)
    c_sigma = (mu_eff + 2) / (n + mu_eff + 5)
    return CmaConstants(
        weights=weights,
        mu_eff=mu_eff,
        c_sigma=c_sigma,
        d_sigma=1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_sigma,
        c_c=(4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n),
        c_1=c_1,
        c_mu=c_mu,
        norm=math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n)),
    )


def default_population(num_dimensions: int) -> int:
    """4 + floor(3 log n)."""
    return 4 + int(3 * math.log(num_dimensions))


def cma_init(mean: ArrayLike, sigma: ArrayLike, *, diagonal: bool = False) -> CmaState:
    """The distribution N(mean, sigma^2 I).

    Args:
      mean: [n].
      sigma: [] first step size; the optimum should lie within some three of them. Traced.
      diagonal: Keep C's diagonal only: O(n) instead of O(n^3) per generation. Static.

    Returns:
      `CmaState`, float32 or wider.

    Raises:
      ValueError: unless `mean` is a vector.
    """
    mean = dtypes.at_least_float32(mean)
    n = checks.check_shapes("baselines.cma_init", mean=(mean, "n"))["n"]
    one = jnp.ones_like(mean)
    eye = jnp.eye(n, dtype=mean.dtype)
    return CmaState(
        mean=mean,
        sigma=jnp.asarray(sigma).astype(mean.dtype),
        covariance=one if diagonal else eye,
        path_sigma=jnp.zeros_like(mean),
        path_c=jnp.zeros_like(mean),
        basis=eye[:0] if diagonal else eye,
        scales=one,
        generation=jnp.zeros((), jnp.int32),
    )


def cma_ask(state: CmaState, key: jax.Array, *, population: int) -> jax.Array:
    """[population n] samples m + sigma B (scales z), z standard normal.

    Args:
      state: The distribution.
      key: Typed key.
      population: lambda. Static.

    Returns:
      [population n].
    """
    z = jax.random.normal(key, (population, state.mean.shape[0]), state.mean.dtype)
    return state.mean[None] + state.sigma * _to_steps(state, z)


def _to_steps(state: CmaState, z: jax.Array) -> jax.Array:
    """[... n] C^(1/2) z, up to a rotation of z."""
    scaled = z * state.scales[None]
    return scaled if state.covariance.ndim == 1 else jnp.matmul(scaled, state.basis.T, precision="highest")


def _whiten(state: CmaState, y: jax.Array) -> jax.Array:
    """[k n] C^(-1/2) y."""
    if state.covariance.ndim == 1:
        return y / state.scales[None]
    turned = jnp.matmul(y, state.basis, precision="highest") / state.scales[None]
    return jnp.matmul(turned, state.basis.T, precision="highest")


def cma_tell(state: CmaState, samples: ArrayLike, values: ArrayLike, *, active: bool = True) -> CmaState:
    """The next distribution, from samples and their values, which are to be large.

    Args:
      state: The distribution that the samples are from.
      samples: [population n] from `cma_ask`.
      values: [population]; only their order counts, nan is the worst.
      active: See `cma_constants`. Static.

    Returns:
      The next `CmaState`.

    Raises:
      ValueError: on shapes that do not agree.

    Reference: arXiv:1604.00772, figure 6; learning rate of the mean 1.
    """
    axes = checks.check_shapes("baselines.cma_tell", mean=(state.mean, "n"), samples=(samples, "p n"), values=(values, "p"))
    n, dtype = axes["n"], state.mean.dtype
    diagonal = state.covariance.ndim == 1
    weights_host, mu_eff, c_sigma, d_sigma, c_c, c_1, c_mu, norm = cma_constants(n, axes["p"], active=active, diagonal=diagonal)
    weights = jnp.asarray(weights_host, dtype)
    positive = jnp.asarray(np.maximum(weights_host, 0), dtype)
    worth = dtypes.at_least_float32(values)
    order = jnp.argsort(jnp.where(jnp.isnan(worth), jnp.inf, -worth), stable=True)
    y = (jnp.asarray(samples).astype(dtype)[order] - state.mean[None]) / state.sigma

    step = positive @ y
    mean = state.mean + state.sigma * step
    path_sigma = (1 - c_sigma) * state.path_sigma + math.sqrt(c_sigma * (2 - c_sigma) * mu_eff) * _whiten(state, step[None])[0]
    length = jnp.sqrt(jnp.sum(jnp.square(path_sigma)))
    sigma = state.sigma * jnp.exp(c_sigma / d_sigma * (length / norm - 1))

    generation = state.generation + 1
    warm = jnp.sqrt(1 - (1 - c_sigma) ** (2 * generation.astype(dtype)))
    steady = (length / warm < (1.4 + 2 / (n + 1)) * norm).astype(dtype)  # h_sigma: no rank-one update while sigma is rising fast
    path_c = (1 - c_c) * state.path_c + steady * math.sqrt(c_c * (2 - c_c) * mu_eff) * step
    size = jnp.sum(jnp.square(_whiten(state, y)), axis=1)
    each = jnp.where(weights >= 0, weights, weights * n / jnp.where(size > 0, size, 1))
    keep = 1 + c_1 * (1 - steady) * c_c * (2 - c_c) - c_1 - c_mu * float(weights_host.sum())
    if diagonal:
        covariance = keep * state.covariance + c_1 * jnp.square(path_c) + c_mu * (each @ jnp.square(y))
        eigenvalues, basis = covariance, state.basis
    else:
        rank_mu = jnp.matmul(y.T * each[None], y, precision="highest")
        covariance = keep * state.covariance + c_1 * path_c[:, None] * path_c[None] + c_mu * rank_mu
        covariance = (covariance + covariance.T) / 2
        eigenvalues, basis = jnp.linalg.eigh(covariance)
    floor = jnp.finfo(dtype).eps * jnp.max(eigenvalues)
    return CmaState(
        mean=mean,
        sigma=sigma,
        covariance=covariance,
        path_sigma=path_sigma,
        path_c=path_c,
        basis=basis,
        scales=jnp.sqrt(jnp.maximum(eigenvalues, floor)),
        generation=generation,
    )


def cma_es(
    score_fn: ScoreFn,
    params: Any,
    key: jax.Array,
    starts: ArrayLike,
    *,
    num_letters: int,
    num_generations: int = 100,
    population: int | None = None,
    sigma: ArrayLike = 0.5,
    diagonal: bool = False,
    active: bool = True,
    relaxation: str = "soft",
    smoothing: ArrayLike = 0.6,
    select: str = "last",
) -> Designs:
    """One run of CMA-ES on the logits z (n = l v) from each start; the design is the argmax of the best z that the run has seen.

    Args:
      score_fn: (params, x [l v]) -> [].
      params: Its parameters.
      key: Typed key.
      starts: [m l] integers.
      num_letters: v. Static.
      num_generations: Generations of each run. Static.
      population: lambda; None is 4 + floor(3 log n). Static.
      sigma: [] first step size, in units of the logits. Traced.
      diagonal: For n above some hundreds. Static.
      active: See `cma_constants`. Static.
      relaxation: What is maximised: "soft", the score of softmax(z), or "straight_through", that of the argmax, which has plateaus. Static.
      smoothing: [] the runs start at log(w onehot + (1 - w)/v). Traced.
      select: One of `SELECTIONS`; "distinct" and "best" look at all samples of all runs. Static.

    Returns:
      `Designs` with a trajectory [num_generations + 1 m] of predictions for the best design so far, as the relaxation ranks them.

    Raises:
      ValueError: on shapes that do not agree or an unknown option.

    Reference: arXiv:1604.00772; runs from the best offline designs as in design-baselines (arXiv:2202.08450), whose sigma is 0.5.
    """
    name = "baselines.cma_es"
    starts = _common.sequences(name, "starts", starts, num_letters)
    checks.one_of(name, "relaxation", relaxation, relaxed.RELAXATIONS)
    checks.one_of(name, "select", select, SELECTIONS)
    _common.at_least(name, 0, num_generations=num_generations)
    m, l = starts.shape
    dtype = _common.row_dtype(params)
    size = default_population(l * num_letters) if population is None else population
    _common.at_least(name, 2, population=size)
    weight = jnp.asarray(smoothing).astype(dtype)
    z = jnp.log(weight * jax.nn.one_hot(starts, num_letters, dtype=dtype) + (1 - weight) / num_letters).reshape(m, -1)

    def fitness(flat: jax.Array) -> jax.Array:
        return _common.scalar(score_fn, params, relaxed.relax_tokens(flat.reshape(l, num_letters), relaxation=relaxation))

    def letters(flat: jax.Array) -> jax.Array:
        return relaxed.read_out(flat.reshape(*flat.shape[:-1], l, num_letters))

    def predict(tokens: jax.Array) -> jax.Array:
        return _common.predict(score_fn, params, tokens, num_letters)

    def run(state: CmaState, key_run: jax.Array) -> tuple[CmaState, jax.Array, jax.Array]:
        samples = cma_ask(state, key_run, population=size)
        values = jax.vmap(fitness)(samples)
        return cma_tell(state, samples, values, active=active), samples, values

    def generation(carry: tuple, key_generation: jax.Array) -> tuple[tuple, jax.Array]:
        states, best, best_value, visited = carry
        states, samples, values = jax.vmap(run)(states, jax.random.split(key_generation, m))
        if select != "last":
            tokens = letters(samples).reshape(-1, l)
            visited = archive(tokens, predict(tokens), m, visited)
        values = jnp.where(jnp.isnan(values), -jnp.inf, values)
        top = jnp.argmax(values, axis=1)
        better = jnp.max(values, axis=1) > best_value
        candidate = jnp.take_along_axis(samples, top[:, None, None], axis=1)[:, 0]
        best = jnp.where(better[:, None], candidate, best)
        best_value = jnp.where(better, jnp.max(values, axis=1), best_value)
        return (states, best, best_value, visited), predict(letters(best))

    predicted = predict(starts)
    visited: Archive | None = None if select == "last" else archive(starts, predicted, m)
    states = jax.vmap(lambda mean: cma_init(mean, sigma, diagonal=diagonal))(z)
    carry = (states, z, jax.vmap(fitness)(z), visited)
    (_, best, _, visited), path = jax.lax.scan(generation, carry, jax.random.split(key, num_generations))
    tokens = letters(best)
    return hand_out(select, tokens, predict(tokens), visited, jnp.concatenate([predicted[None], path]))
