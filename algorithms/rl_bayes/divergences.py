"""The f-divergences of f-DPG: D_f(pi || p) = E_p[f(pi / p)] + f'(inf) pi(p = 0), their slopes, and values exact or from samples.

    name    D_f(pi || p)                        f(t)                                    f'(t), with l = log t        f'(inf)
    FKL     KL(p || pi)                         -log t                                  -exp(-l)                     0
    RKL     KL(pi || p)                         t log t                                 l + 1                        inf
    TV      sum |pi - p| / 2                    |1 - t| / 2                             sign(l) / 2                  1/2
    JS      KL(p || m) + KL(pi || m)            t log(2t/(t+1)) + log(2/(t+1))          log 2 - softplus(-l)         log 2
    HELL2   sum (sqrt pi - sqrt p)^2            (sqrt t - 1)^2                          1 - exp(-l/2)                1
    CHI2P   E_pi[(p/pi - 1)^2]                  t (1/t - 1)^2                           1 - exp(-2l)                 1
    CHI2R   E_p[(pi/p - 1)^2]                   (t - 1)^2                               2 expm1(l)                   inf
    alpha   (1 - sum pi^a p^(1-a)) / (a (1-a))  (t^a - a t - (1-a)) / (a (a-1))         expm1((a-1) l) / (a-1)       1/(1-a)

The functions are those of `janax.jaxlib_ext.divergence`, up to a factor and to c (t - 1), which changes neither D_f nor an expected gradient.
JS here is twice the usual Jensen-Shannon divergence, HELL2 twice the library's. FKL covers, RKL forces zeros; TV, JS, HELL2 are bounded and
bear hard constraints. Reference: Go et al., arXiv:2302.08215 (f-DPG); alpha as in arXiv:2512.05962.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import divergence, dtypes
from janax.jaxlib_ext.checks import check_shapes
from janax.jaxlib_ext.divergence.numerics import widest

__all__ = [
    "CHI2P",
    "CHI2R",
    "FAMILY",
    "FKL",
    "HELL2",
    "JEFFREYS",
    "JS",
    "RKL",
    "TV",
    "FDivergence",
    "alpha",
    "divergence_terms",
    "estimate_divergence",
    "exact_divergence",
    "f_prime",
    "f_prime_inf",
    "f_value",
    "js",
    "skew_kl",
    "skew_reverse_kl",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FDivergence:
    """An f-divergence with what a hard constraint needs to know: f'(t) = scale g'(t) + offset for a generator g of the library.

    A pytree whose leaves are numbers: an argument of `jit`, and `vmap` over them gives a family (all values of alpha) at once.

    Attributes:
      generator: g, see `janax.jaxlib_ext.divergence.Generator`.
      scale: [] > 0.
      offset: [] the c of c (t - 1); it shifts pseudo-rewards.
      slope_at_inf: [] f'(inf) = lim f(t) / t, inf where mass off the support of p costs infinitely much.
      value_at_zero: [] g(0), inf where missing support of p costs infinitely much.
    """

    generator: divergence.Generator
    scale: Any = 1.0
    offset: Any = 0.0
    slope_at_inf: Any
    value_at_zero: Any


FKL = FDivergence(generator=divergence.FORWARD_KL, offset=-1.0, slope_at_inf=0.0, value_at_zero=math.inf)
"""KL(p || pi): what DPG and GDC descend."""
RKL = FDivergence(generator=divergence.REVERSE_KL, offset=1.0, slope_at_inf=math.inf, value_at_zero=1.0)
"""KL(pi || p): what KL-regularised RL descends."""
TV = FDivergence(generator=divergence.TOTAL_VARIATION, slope_at_inf=0.5, value_at_zero=0.5)
"""Total variation, at most 1."""
JS = FDivergence(generator=divergence.js_generator(0.5), scale=2.0, slope_at_inf=math.log(2), value_at_zero=0.5 * math.log(2))
"""Twice the Jensen-Shannon divergence, at most 2 log 2."""
HELL2 = FDivergence(generator=divergence.SQUARED_HELLINGER, scale=2.0, slope_at_inf=1.0, value_at_zero=0.5)
"""sum (sqrt pi - sqrt p)^2, at most 2."""
CHI2P = FDivergence(generator=divergence.CHI2_FORWARD, slope_at_inf=1.0, value_at_zero=math.inf)
"""sum (pi - p)^2 / pi."""
CHI2R = FDivergence(generator=divergence.CHI2_REVERSE, slope_at_inf=math.inf, value_at_zero=1.0)
"""sum (pi - p)^2 / p."""
JEFFREYS = FDivergence(generator=divergence.JEFFREYS, slope_at_inf=math.inf, value_at_zero=math.inf)
"""KL(p || pi) + KL(pi || p)."""
FAMILY = (FKL, RKL, TV, JS, HELL2, CHI2P, CHI2R)
"""What an integer, traced, chooses among where a divergence is asked for."""


def alpha(a: ArrayLike) -> FDivergence:
    """(1 - sum pi^a p^(1-a)) / (a (1-a)); a -> 0 is FKL, 1 RKL, 1/2 twice HELL2. `a` [] traced; finite slopes at infinity for a < 1."""
    a = dtypes.at_least_float32(a)
    below, above = a < 1, a > 0
    return FDivergence(
        generator=divergence.alpha_generator(1 - a),
        slope_at_inf=jnp.where(below, 1 / jnp.where(below, 1 - a, jnp.ones_like(a)), jnp.inf),
        value_at_zero=jnp.where(above, 1 / jnp.where(above, a, jnp.ones_like(a)), jnp.inf),
    )


def js(beta: ArrayLike = 0.5) -> FDivergence:
    """beta KL(p || m) + (1 - beta) KL(pi || m), m = beta p + (1 - beta) pi, in (0, 1); `JS` is twice this at 1/2."""
    b = dtypes.at_least_float32(beta)
    return FDivergence(generator=divergence.js_generator(b), slope_at_inf=-(1 - b) * jnp.log1p(-b), value_at_zero=-b * jnp.log(b))


def skew_kl(weight: ArrayLike = 0.1) -> FDivergence:
    """KL(p || weight p + (1 - weight) pi), weight in (0, 1)."""
    a = dtypes.at_least_float32(weight)
    return FDivergence(generator=divergence.skew_kl_generator(a), slope_at_inf=1 - a, value_at_zero=a - 1 - jnp.log(a))


def skew_reverse_kl(weight: ArrayLike = 0.1) -> FDivergence:
    """KL(pi || weight pi + (1 - weight) p), weight in (0, 1)."""
    a = dtypes.at_least_float32(weight)
    return FDivergence(generator=divergence.skew_reverse_kl_generator(a), slope_at_inf=a - 1 - jnp.log(a), value_at_zero=1 - a)


def f_value(kind: FDivergence, log_ratio: ArrayLike) -> jax.Array:
    """f(t) at t = exp(log_ratio) [...], float32 or wider, as in the table at the head of the file; `f_prime` is its derivative in t."""
    l = dtypes.at_least_float32(log_ratio)
    scale, offset = (jnp.asarray(x).astype(l.dtype) for x in (kind.scale, kind.offset))
    return scale * divergence.f(kind.generator, l) + offset * jnp.expm1(l)


def f_prime(kind: FDivergence | ArrayLike, log_ratio: ArrayLike) -> jax.Array:
    """f'(t) at t = exp(log_ratio) [...]; its negative is the pseudo-reward.

    Args:
      kind: A divergence, or an integer [] that chooses from `FAMILY`. Traced.
      log_ratio: [...] l = log pi - log P + log Z, finite. A power of t beyond exp(60) in float32 (exp(680) in float64) goes on as its tangent.

    Returns:
      [...] float32 or wider, as in the table at the head of the file.
    """
    l = dtypes.at_least_float32(log_ratio)
    if isinstance(kind, FDivergence):
        return jnp.asarray(kind.scale).astype(l.dtype) * divergence.f_prime(kind.generator, l) + jnp.asarray(kind.offset).astype(l.dtype)
    return jax.lax.switch(jnp.asarray(kind).astype(jnp.int32), [lambda l, one=one: f_prime(one, l) for one in FAMILY], l)


def f_prime_inf(kind: FDivergence | ArrayLike) -> jax.Array:
    """f'(inf) [], the slope for mass where p is zero; inf for RKL, CHI2R and Jeffreys."""
    if isinstance(kind, FDivergence):
        return dtypes.at_least_float32(kind.slope_at_inf)
    table = jnp.array([one.slope_at_inf for one in FAMILY], dtypes.floor_dtype(jnp.result_type(float)))
    return jnp.sum(jnp.where(jnp.arange(len(FAMILY), dtype=jnp.int32) == jnp.asarray(kind).astype(jnp.int32), table, jnp.zeros_like(table)))


def exact_divergence(kind: FDivergence | ArrayLike, log_pi: ArrayLike, log_p: ArrayLike) -> jax.Array:
    """D_f(pi || p) of two distributions given by all their log-probabilities.

    Args:
      kind: A divergence, or an integer [] that chooses from `FAMILY`. Traced.
      log_pi: [x] log-probabilities of the policy; -inf is allowed.
      log_p: [x] of the target.

    Returns:
      [] nats, float32 or wider; inf where the divergence is (RKL with mass off the support), the gradient then being that of the finite part.

    Raises:
      ValueError: if the shapes differ.
    """
    check_shapes("rl_bayes.exact_divergence", log_pi=(log_pi, "x"), log_p=(log_p, "x"))
    log_pi, log_p = widest(log_pi, log_p)
    return jnp.sum(divergence_terms(kind, log_pi, log_p))


def estimate_divergence(
    kind: FDivergence | ArrayLike, log_pi: ArrayLike, log_target: ArrayLike, log_q: ArrayLike, *, log_z: ArrayLike
) -> jax.Array:
    """D_f(pi || p) from samples of q: the mean of (p / q) f(pi / p), and of f'(inf) pi / q where the target is zero.

    Args:
      kind: A divergence, or an integer [] that chooses from `FAMILY`. Traced.
      log_pi: [n] log-probabilities of the samples under the policy.
      log_target: [n] log P, unnormalised; -inf is allowed.
      log_q: [n] under the law that drew them.
      log_z: [] log Z. Traced.

    Returns:
      [] nats. Unbiased for the exact Z if q covers both. See `monitor` for the forms that the toolkits report.

    Raises:
      ValueError: if the shapes differ.
    """
    check_shapes("rl_bayes.estimate_divergence", log_pi=(log_pi, "n"), log_target=(log_target, "n"), log_q=(log_q, "n"), log_z=(log_z, ""))
    log_pi, log_target, log_q = widest(log_pi, log_target, log_q)
    shift = jnp.asarray(log_z).astype(log_pi.dtype) + log_q
    return jnp.mean(divergence_terms(kind, log_pi - log_q, log_target - shift))


def divergence_terms(kind: FDivergence | ArrayLike, log_pi: ArrayLike, log_p: ArrayLike) -> jax.Array:
    """p f(pi / p) by entries [...], and its limits f'(inf) pi and p f(0) where one of the two is zero; arguments as in `exact_divergence`."""
    check_shapes("rl_bayes.divergence_terms", log_pi=(log_pi, "..."), log_p=(log_p, "..."))
    log_pi, log_p = widest(log_pi, log_p)
    if not isinstance(kind, FDivergence):
        branches = [lambda a, b, one=one: divergence_terms(one, a, b) for one in FAMILY]
        return jax.lax.switch(jnp.asarray(kind).astype(jnp.int32), branches, log_pi, log_p)
    no_pi, no_p, dtype = jnp.isneginf(log_pi), jnp.isneginf(log_p), log_pi.dtype
    scale, offset, slope, zero = (jnp.asarray(x).astype(dtype) for x in (kind.scale, kind.offset, kind.slope_at_inf, kind.value_at_zero))
    both, finite = ~(no_pi | no_p), [jnp.where(gone, jnp.zeros_like(x), x) for gone, x in ((no_pi, log_pi), (no_p, log_p))]
    inside = divergence.terms(kind.generator, *(jnp.where(both, x, jnp.zeros_like(x)) for x in finite))
    total = jnp.where(both, scale * inside, jnp.zeros_like(log_pi))
    for where, limit, log_mass in ((no_p & ~no_pi, slope - offset, finite[0]), (no_pi & ~no_p, scale * zero, finite[1])):
        bounded = jnp.isfinite(limit)
        mass = jnp.exp(jnp.where(where, log_mass, jnp.zeros_like(log_mass)))
        total = total + jnp.where(where, jnp.where(bounded, limit, jnp.zeros_like(limit)) * mass, jnp.zeros_like(mass))
        total = total + jnp.where(where & ~bounded, jnp.inf, jnp.zeros_like(mass))
    return total
