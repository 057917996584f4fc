"""Exact divergences of categorical distributions given by their logits, over the whole vocabulary or over part of it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks, dtypes
from janax.jaxlib_ext.divergence import generators, numerics
from janax.jaxlib_ext.divergence.generators import Generator, terms

__all__ = [
    "NAMES",
    "Kind",
    "adaptive_kl",
    "alpha_divergence",
    "chi2_forward",
    "chi2_reverse",
    "exact",
    "expected_f_prime",
    "forward_kl",
    "from_support",
    "head_share",
    "jeffreys",
    "js",
    "per_token",
    "renyi",
    "renyi_value",
    "resolve",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "squared_hellinger",
    "top_k",
    "total_variation",
]


def exact(generator: Generator, logits_p: ArrayLike, logits_q: ArrayLike) -> jax.Array:
    """D_f(p || q) = sum_v q_v f(p_v / q_v) for any generator.

    Args:
      generator: f.
      logits_p: [... v] unnormalised log-probabilities of what is trained (student, policy); -inf marks a forbidden token.
      logits_q: [... v] the same of what it is compared with (teacher, reference).

    Returns:
      [...] in nats, float32 or wider. See the head of the file for gradients and extremes.

    Raises:
      ValueError: if the shapes differ.
    """
    return _exact("exact", generator, logits_p, logits_q)


def forward_kl(logits_p: ArrayLike, logits_q: ArrayLike) -> jax.Array:
    """KL(q || p) = sum q (log q - log p), the classical distillation loss (q the teacher). Gradient in p's logits: p - q.

    Covers q's modes; the gradient does not vanish for a token that p has lost. Arguments and result as in `exact`.
    """
    return _exact("forward_kl", generators.FORWARD_KL, logits_p, logits_q)


def reverse_kl(logits_p: ArrayLike, logits_q: ArrayLike) -> jax.Array:
    """KL(p || q) = sum p (log p - log q), the penalty of KL-regularised RL. Gradient in p's logits: p (l - KL).

    Seeks a mode of q; the gradient of a token vanishes with its probability under p. Arguments and result as in `exact`.
    """
    return _exact("reverse_kl", generators.REVERSE_KL, logits_p, logits_q)


def jeffreys(logits_p: ArrayLike, logits_q: ArrayLike) -> jax.Array:
    """KL(p || q) + KL(q || p), symmetric; the gradients add up. Arguments and result as in `exact`."""
    return _exact("jeffreys", generators.JEFFREYS, logits_p, logits_q)


def js(logits_p: ArrayLike, logits_q: ArrayLike, *, beta: ArrayLike = 0.5) -> jax.Array:
    """beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p, beta the weight of q (teacher, reference).

    Gradient in p's logits: (1 - beta) p (log(p / m) - KL(p || m)). Between 0 and log 2 at beta = 1/2; 0 at beta = 0 and 1. Divided by
    beta (1 - beta), it tends to `forward_kl` for beta -> 0 and to `reverse_kl` for beta -> 1.

    Args:
      logits_p: [... v] as in `exact`.
      logits_q: [... v] as in `exact`.
      beta: [] in [0, 1]. Traced.

    Returns:
      [...] in nats. The JS "loss" of DPH-RL's code (arXiv:2509.07430) and the f-DPG generator (arXiv:2302.08215) are twice this at 1/2. GKD in
      TRL (arXiv:2306.13649) is this inside (0, 1) and jumps to `forward_kl` at 0 and `reverse_kl` at 1: call those there.
    """
    return _exact("js", generators.js_generator(beta), logits_p, logits_q)


def skew_kl(logits_p: ArrayLike, logits_q: ArrayLike, *, alpha: ArrayLike = 0.1) -> jax.Array:
    """KL(q || alpha q + (1 - alpha) p): forward, with a share alpha of q (the teacher) mixed into p. w = -(1 - alpha) q / m.

    Args:
      logits_p: [... v] as in `exact`.
      logits_q: [... v] as in `exact`.
      alpha: [] in [0, 1]; 0 is `forward_kl`, 1 gives 0. Traced.

    Returns:
      [...] in nats. DistiLLM's code (arXiv:2402.03898) leaves the entropy of q out of the value; the gradient is the same.
    """
    return _exact("skew_kl", generators.skew_kl_generator(alpha), logits_p, logits_q)


def skew_reverse_kl(logits_p: ArrayLike, logits_q: ArrayLike, *, alpha: ArrayLike = 0.1) -> jax.Array:
    """KL(p || alpha p + (1 - alpha) q): reverse, with a share alpha of p (the student) mixed into q. w = log(p / m) - alpha p / m.

    The gradient goes through the mixture, too. `alpha` as in `skew_kl`, 0 is `reverse_kl`. Arguments and result as there (arXiv:2402.03898).
    """
    return _exact("skew_reverse_kl", generators.skew_reverse_kl_generator(alpha), logits_p, logits_q)


def alpha_divergence(logits_p: ArrayLike, logits_q: ArrayLike, *, alpha: ArrayLike) -> jax.Array:
    """(sum q^alpha p^(1 - alpha) - 1) / (alpha (alpha - 1)), the power alpha on q (teacher, reference).

    Gradient in p's logits: -(1 / alpha) (g - p sum g), g = q^alpha p^(1 - alpha).

    Args:
      logits_p: [... v] as in `exact`.
      logits_q: [... v] as in `exact`.
      alpha: [] any number: 0 is `reverse_kl`, 1 `forward_kl`, 1/2 four times `squared_hellinger`, 2 half of `chi2_forward`, -1 half of
        `chi2_reverse`. Values and gradients pass smoothly through 0 and 1. Traced.

    Returns:
      [...] in nats. The convention is that of DPH-RL's code (arXiv:2509.07430); alpha-DPG (arXiv:2512.05962) and Amari write 1 - alpha for alpha.
    """
    return _exact("alpha_divergence", generators.alpha_generator(alpha), logits_p, logits_q)


def total_variation(logits_p: ArrayLike, logits_q: ArrayLike) -> jax.Array:
    """sum |p - q| / 2, between 0 and 1. w = sign(p - q) / 2, 0 at a tie. Arguments and result as in `exact`."""
    return _exact("total_variation", generators.TOTAL_VARIATION, logits_p, logits_q)


def squared_hellinger(logits_p: ArrayLike, logits_q: ArrayLike) -> jax.Array:
    """1 - sum sqrt(p q) = sum (sqrt p - sqrt q)^2 / 2, between 0 and 1. Gradient: -(g - p sum g) / 2, g = sqrt(p q).

    Half of f-DPG's (arXiv:2302.08215), a quarter of `alpha_divergence` at 1/2. Arguments and result as in `exact`.
    """
    return _exact("squared_hellinger", generators.SQUARED_HELLINGER, logits_p, logits_q)


def chi2_forward(logits_p: ArrayLike, logits_q: ArrayLike) -> jax.Array:
    """sum (q - p)^2 / p = E_p[(q / p - 1)^2], mass-covering like `forward_kl`. w = -(q / p)^2. Arguments and result as in `exact`."""
    return _exact("chi2_forward", generators.CHI2_FORWARD, logits_p, logits_q)


def chi2_reverse(logits_p: ArrayLike, logits_q: ArrayLike) -> jax.Array:
    """sum (p - q)^2 / q = E_q[(p / q - 1)^2], mode-seeking like `reverse_kl`. w = 2 p / q. Arguments and result as in `exact`."""
    return _exact("chi2_reverse", generators.CHI2_REVERSE, logits_p, logits_q)


def renyi(logits_p: ArrayLike, logits_q: ArrayLike, *, alpha: ArrayLike) -> jax.Array:
    """Renyi's divergence of q from p, log(sum q^alpha p^(1 - alpha)) / (alpha - 1), in log space throughout.

    Gradient in p's logits: p - softmax(alpha log q + (1 - alpha) log p), which stays of order one where p and q hardly overlap.

    Args:
      logits_p: [... v] as in `exact`.
      logits_q: [... v] as in `exact`.
      alpha: [] > 0; `forward_kl` at 1, through which values and gradients pass smoothly. Traced.

    Returns:
      [...] in nats.

    Raises:
      ValueError: if the shapes differ.
    """
    log_p, log_q, either, valid = _pair("renyi", logits_p, logits_q)
    alpha = jnp.asarray(alpha).astype(log_p.dtype)
    distance = jnp.sum(terms(generators.alpha_generator(alpha), log_p, log_q), axis=-1)
    value = renyi_value(alpha, distance, numerics.log_sum(alpha * log_q + (1 - alpha) * log_p, either))
    return jnp.where(valid, value, jnp.zeros_like(value))


def renyi_value(alpha: jax.Array, distance: jax.Array, log_sum: jax.Array) -> jax.Array:
    """Renyi's divergence from the alpha-divergence and log sum q^alpha p^(1 - alpha) [...], the first where both are small."""
    x = alpha * (1 - alpha) * distance  # 1 - sum q^alpha p^(1 - alpha)
    small = jnp.abs(x) < 0.5
    near = alpha * jnp.where(small, distance, jnp.zeros_like(x)) * numerics.log1p_ratio(-jnp.where(small, x, jnp.zeros_like(x)))
    return jnp.where(small, near, log_sum / jnp.where(small, jnp.ones_like(x), alpha - 1))


def adaptive_kl(logits_p: ArrayLike, logits_q: ArrayLike) -> jax.Array:
    """r KL(q || p) + (1 - r) KL(p || q), r the share of sum |p - q| that lies in the head of q (the teacher).

    The head is the likeliest tokens of q with a cumulative probability of at most 1/2, and always the first. r is a constant for the gradient,
    which is r (p - q) + (1 - r) p (l - KL(p || q)). It sorts the vocabulary, which a sharded one would be gathered for.

    Args:
      logits_p: [... v] as in `exact`.
      logits_q: [... v] as in `exact`.

    Returns:
      [...] in nats.

    Raises:
      ValueError: if the shapes differ.

    Reference: Wu et al., arXiv:2404.02657.
    """
    log_p, log_q, _, valid = _pair("adaptive_kl", logits_p, logits_q)
    p, q = (jax.lax.stop_gradient(jnp.exp(x)) for x in (log_p, log_q))
    r = head_share(p, q)
    forward = jnp.sum(terms(generators.FORWARD_KL, log_p, log_q), axis=-1)
    value = r * forward + (1 - r) * jnp.sum(terms(generators.REVERSE_KL, log_p, log_q), axis=-1)
    return jnp.where(valid, value, jnp.zeros_like(value))


def head_share(p: jax.Array, q: jax.Array) -> jax.Array:
    """[...] share of sum |p - q| that lies in the head of q, whose cumulative probability is at most 1/2; of probabilities [... v]."""
    negative_q, p = jax.lax.sort((-q, p), dimension=-1, num_keys=1)
    mass = jnp.cumsum(-negative_q, axis=-1)
    head = (mass <= 0.5) | (jax.lax.broadcasted_iota(jnp.int32, mass.shape, mass.ndim - 1) == 0)
    gap = jnp.abs(p + negative_q)
    total = jnp.sum(gap, axis=-1)
    return jnp.sum(jnp.where(head, gap, jnp.zeros_like(gap)), axis=-1) / jnp.where(total > 0, total, jnp.ones_like(total))


_KINDS: dict[str, tuple[str, Callable[..., Generator], str | None]] = {
    "forward_kl": ("f", lambda: generators.FORWARD_KL, None),
    "reverse_kl": ("f", lambda: generators.REVERSE_KL, None),
    "jeffreys": ("f", lambda: generators.JEFFREYS, None),
    "js": ("f", generators.js_generator, "beta"),
    "skew_kl": ("f", generators.skew_kl_generator, "alpha"),
    "skew_reverse_kl": ("f", generators.skew_reverse_kl_generator, "alpha"),
    "alpha_divergence": ("f", generators.alpha_generator, "alpha"),
    "renyi": ("renyi", generators.alpha_generator, "alpha"),
    "total_variation": ("f", lambda: generators.TOTAL_VARIATION, None),
    "squared_hellinger": ("f", lambda: generators.SQUARED_HELLINGER, None),
    "chi2_forward": ("f", lambda: generators.CHI2_FORWARD, None),
    "chi2_reverse": ("f", lambda: generators.CHI2_REVERSE, None),
    "adaptive_kl": ("adaptive", lambda: generators.FORWARD_KL, None),
}
NAMES = tuple(_KINDS)
"""The kinds that `per_token` and the fused divergences know by name."""


class Kind(NamedTuple):
    """A divergence by name, resolved: what is summed over the vocabulary, and how the sum becomes the value.

    Attributes:
      rule: "f" for sum q f(p / q); "renyi", of the same sums and a logarithm; "adaptive", two of them in shares.
      generator: f; for "renyi" that of the alpha-divergence.
      alpha: [] Renyi's order, or None.
    """

    rule: str
    generator: Generator
    alpha: ArrayLike | None


def resolve(caller: str, kind: str | Generator, *, alpha: ArrayLike | None = None, beta: ArrayLike | None = None) -> Kind:
    """What a name, or a generator, and its parameter mean.

    Args:
      caller: Whose arguments these are, for the message.
      kind: One of `NAMES`, or a generator.
      alpha: [] for the kinds that take it: skew_kl and skew_reverse_kl (0.1 if None), alpha_divergence and renyi (required).
      beta: [] for js, 1/2 if None.

    Returns:
      The rule, the generator and, for "renyi", alpha.

    Raises:
      ValueError: if the kind is unknown, does not take the parameter given, or lacks one.
    """
    given = {key: value for key, value in (("alpha", alpha), ("beta", beta)) if value is not None}
    if isinstance(kind, Generator):
        rule, make, takes = "f", lambda: kind, None
    else:
        checks.one_of(caller, "kind", kind, NAMES)
        rule, make, takes = _KINDS[kind]
    for key in given:
        if key != takes:
            raise ValueError(f"{caller}: {key!r} was given, but {kind if isinstance(kind, str) else 'a generator'} does not take it")
    if kind in ("alpha_divergence", "renyi") and not given:
        raise ValueError(f"{caller}: 'alpha' is None, expected a number for {kind}")
    return Kind(rule, make(**given), alpha if rule == "renyi" else None)


def per_token(
    kind: str | Generator,
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    tau_squared: bool = False,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Any of the exact divergences of tempered distributions, token by token; p is the student (policy), q the teacher (reference).

    Args:
      kind: One of `NAMES`, or a generator. Static (a generator's parameters are traced).
      student_logits: [... v] what is trained.
      teacher_logits: [... v] what it is compared with. Not detached: pass it through `stop_gradient` if it depends on parameters.
      alpha: [] for the kinds that take it: skew_kl and skew_reverse_kl (0.1 if None), alpha_divergence and renyi (required). Traced.
      beta: [] for js, 1/2 if None. Traced.
      temperature: [] > 0, divides both logits. Traced.
      tau_squared: Multiply by temperature^2, which keeps the size of gradients (Hinton's factor; most code has none). Static.
      mask: [...] non-zero where a token counts. Elsewhere the value is exactly 0, with zero gradients, whatever the logits are.

    Returns:
      [...] in nats, float32 or wider, not reduced: see `masking.masked_mean`.

    Raises:
      ValueError: if the shapes do not agree, the kind is unknown, or it does not take the parameter given, or lacks one.
    """
    name = "per_token"
    checks.check_shapes(name, student_logits=(student_logits, "... v"), teacher_logits=(teacher_logits, "... v"), mask=(mask, "..."))
    what = resolve(name, kind, alpha=alpha, beta=beta)
    keep = None if mask is None else jnp.asarray(mask).astype(bool)
    logits_p, logits_q = (_tempered(x, temperature, keep) for x in (student_logits, teacher_logits))
    if what.rule == "adaptive":
        value = adaptive_kl(logits_p, logits_q)
    elif what.rule == "renyi":
        assert what.alpha is not None
        value = renyi(logits_p, logits_q, alpha=what.alpha)
    else:
        value = exact(what.generator, logits_p, logits_q)
    if tau_squared:
        value = value * jnp.square(jnp.asarray(temperature).astype(value.dtype))
    return value if keep is None else jnp.where(keep, value, jnp.zeros_like(value))


def expected_f_prime(generator: Generator, logits_p: ArrayLike, logits_q: ArrayLike) -> jax.Array:
    """sum_v p_v f'(p_v / q_v) [...], the exact baseline of `from_policy`; not differentiated. Arguments as in `exact`."""
    log_p, log_q, _, valid = _pair("expected_f_prime", logits_p, logits_q)
    log_p, log_q, generator = jax.tree.map(jax.lax.stop_gradient, (log_p, log_q, generator))
    slopes = jax.jvp(lambda x: terms(generator, x, log_q), (log_p,), (jnp.ones_like(log_p),))[1]  # d(q f(p/q)) / d log p = p f'
    return jnp.where(valid, jnp.sum(slopes, axis=-1), 0.0)


def top_k(generator: Generator, logits_p: ArrayLike, logits_q: ArrayLike, *, k: int, support: str = "q") -> jax.Array:
    """D_f between the distributions over the k likeliest tokens and one bucket for all others.

    Nothing is renormalised: merging tokens can only lower D_f (data processing), so this is a lower bound, exact for k = v (and for k = v - 1).

    Args:
      generator: f.
      logits_p: [... v] as in `exact`.
      logits_q: [... v] as in `exact`.
      k: Number of tokens, between 1 and v. Static.
      support: Whose k likeliest tokens, "q" (teacher) or "p" (student); of equal ones the lower id first. Static.

    Returns:
      [...] in nats, with the gradient of this value: the tail bucket pulls on all tokens outside.

    Raises:
      ValueError: if the shapes differ, or k or `support` is out of range.
    """
    lengths = checks.check_shapes("top_k", logits_p=(logits_p, "... v"), logits_q=(logits_q, "... v"))
    checks.one_of("top_k", "support", support, ("q", "p"))
    if not 1 <= k <= lengths["v"]:
        raise ValueError(f"top_k: 'k' is {k}, expected 1 to v={lengths['v']}")
    log_p, log_q, _, valid = _pair("top_k", logits_p, logits_q)
    ranked = jax.lax.stop_gradient(log_q if support == "q" else log_p)
    last = jax.lax.top_k(ranked, k)[0][..., -1:]
    above, equal = ranked > last, ranked == last
    room = k - jnp.sum(above, axis=-1, keepdims=True)
    inside = above | (equal & (jnp.cumsum(equal, axis=-1) <= room))
    each = terms(generator, log_p, log_q)
    value = jnp.sum(jnp.where(inside, each, jnp.zeros_like(each)), axis=-1)
    value = value + terms(generator, numerics.log_sum(log_p, ~inside), numerics.log_sum(log_q, ~inside))
    return jnp.where(valid, value, jnp.zeros_like(value))


def from_support(generator: Generator, log_p: ArrayLike, log_q: ArrayLike) -> jax.Array:
    """D_f from log-probabilities of some tokens under both, and one bucket for the rest: for a teacher of whom only the top k are kept.

    Args:
      generator: f.
      log_p: [... k] log-probabilities of k different tokens under p, normalised over the whole vocabulary.
      log_q: [... k] of the same tokens under q.

    Returns:
      [...] in nats: a lower bound of D_f as in `top_k`. The rest has probability 1 - sum exp(...), at least four units of rounding.

    Raises:
      ValueError: if the shapes differ.
    """
    checks.check_shapes("from_support", log_p=(log_p, "... k"), log_q=(log_q, "... k"))
    log_p, log_q = (numerics.without_infinities(x) for x in numerics.widest(log_p, log_q))
    return jnp.sum(terms(generator, log_p, log_q), axis=-1) + terms(generator, _rest(log_p), _rest(log_q))


def _log_softmax(logits: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities, forbidden ones at their stand-in and without gradient; which are allowed). Uniform where the row is not valid.

    Logits are taken relative to the likeliest token's, differentiably. Its log-probability is then -log(1 + rest), and its logit's gradient
    minus the sum of the others, so that neither is lost in rounding where it has nearly all the probability.
    """
    logits = jnp.where(valid[..., None], logits, jnp.zeros_like(logits))
    allowed = ~jnp.isneginf(logits)
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    ids = jnp.zeros_like(logits, dtype=jnp.int32) + index  # placed as the logits
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    first = jnp.min(jnp.where(logits == largest, ids, logits.shape[-1]), axis=-1, keepdims=True)
    others = allowed & (ids != first)
    zero = jnp.zeros_like(logits)
    base = jnp.sum(jnp.where(ids == first, logits, zero), axis=-1, keepdims=True)
    relative = jnp.where(others, jnp.where(others, logits, zero) - base, zero)
    rest = jnp.sum(jnp.where(others, jnp.exp(relative), zero), axis=-1, keepdims=True)
    return jnp.where(allowed, relative - jnp.log1p(rest), numerics.FORBIDDEN), allowed


def _pair(name: str, logits_p: ArrayLike, logits_q: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(log p, log q, where either allows the token [... v]; where both allow something [...])."""
    checks.check_shapes(name, logits_p=(logits_p, "... v"), logits_q=(logits_q, "... v"))
    logits_p, logits_q = numerics.widest(logits_p, logits_q)
    valid = jnp.any(~jnp.isneginf(logits_p), axis=-1) & jnp.any(~jnp.isneginf(logits_q), axis=-1)
    log_p, allowed_p = _log_softmax(logits_p, valid)
    log_q, allowed_q = _log_softmax(logits_q, valid)
    return log_p, log_q, allowed_p | allowed_q, valid


def _exact(name: str, generator: Generator, logits_p: ArrayLike, logits_q: ArrayLike) -> jax.Array:
    log_p, log_q, _, valid = _pair(name, logits_p, logits_q)
    value = jnp.sum(terms(generator, log_p, log_q), axis=-1)
    return jnp.where(valid, value, jnp.zeros_like(value))


def _tempered(logits: ArrayLike, temperature: ArrayLike, keep: jax.Array | None) -> jax.Array:
    x = dtypes.at_least_float32(logits)
    if keep is not None:
        x = jnp.where(keep[..., None], x, jnp.zeros_like(x))
    forbidden = jnp.isneginf(x)
    x = jnp.where(forbidden, jnp.zeros_like(x), x) / jnp.asarray(temperature).astype(x.dtype)
    return jnp.where(forbidden, -jnp.inf, x)


def _rest(log_p: jax.Array) -> jax.Array:
    """log(1 - sum exp(log_p))."""
    rest = 1 - jnp.sum(jnp.exp(log_p), axis=-1)
    least = 4 * float(jnp.finfo(rest.dtype).eps)
    return jnp.log(jnp.where(rest > least, rest, jnp.full_like(rest, least)))
