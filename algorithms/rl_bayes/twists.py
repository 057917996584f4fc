"""Learning twists psi_t(x_<=t) ~ E_pi0[exp(phi) | x_<=t] for SMC: contrastive (CTL), soft-Q, SIXO, FUDGE, squared error, path consistency.

All losses take log psi at the tokens of n sampled sequences, [n t], entry t belonging to the prefix that ends with token t, and the
sequences' lengths; how psi is made (a head on the frozen prior, a network of its own, a table) is the caller's business. The last entry of a
sequence is its psi_T. Constant shifts of log psi_t per t do not matter to SMC.

    loss    target of log psi_t            samples                                              gradient
    ctl     log psi* + const per t         exact ones or weighted by P / q; q                   E_p[grad log psi] - E_pi_t[grad log psi], negated
    soft_q  log psi*                       any law                                              squared soft Bellman residual, target held constant
    sixo    log psi* - log Z               p, and pi0                                           logistic regression of p against pi0
    fudge   log psi*, for exp(phi) <= 1    x_<=t any, the rest from pi0                         binary cross-entropy with label exp(phi)
    squared log psi*                       as fudge                                             (exp(phi) - psi)^2
    path    log psi* + const, and q        any law                                              variance of the log weights of prefixes
Reference: Zhao et al., arXiv:2404.17546, Table 1; Lawson et al., arXiv:2206.05952 (SIXO); Yang and Klein, arXiv:2104.05218 (FUDGE).
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import logprobs
from janax.jaxlib_ext.checks import check_shapes
from janax.jaxlib_ext.divergence.numerics import widest

__all__ = [
    "ctl_loss",
    "fudge_loss",
    "path_consistency_loss",
    "prefix_log_weights",
    "sixo_loss",
    "soft_q_loss",
    "soft_values_of",
    "squared_loss",
    "token_values",
]


def token_values(log_psi: ArrayLike, tokens: ArrayLike, num_tokens: ArrayLike) -> jax.Array:
    """log psi of the tokens that are there [n t], from log psi of all next tokens [n t v]; 0 in padding."""
    check_shapes("rl_bayes.token_values", log_psi=(log_psi, "n t v"), tokens=(tokens, "n t"), num_tokens=(num_tokens, "n"))
    (log_psi,) = widest(log_psi)
    chosen = jnp.arange(log_psi.shape[2], dtype=jnp.int32)[None, None] == jnp.asarray(tokens).astype(jnp.int32)[..., None]
    here = jnp.sum(jnp.where(chosen, log_psi, jnp.zeros_like(log_psi)), axis=2)
    return jnp.where(_inside(tokens, num_tokens), here, jnp.zeros_like(here))


def soft_values_of(log_prior: ArrayLike, log_psi: ArrayLike) -> jax.Array:
    """log sum_s pi0(s | x_<t) psi_t(x_<t, s) [n t] from [n t v] each: the soft value of the prefix before each token; no gradient."""
    check_shapes("rl_bayes.soft_values_of", log_prior=(log_prior, "... v"), log_psi=(log_psi, "... v"))
    log_prior, log_psi = widest(log_prior, log_psi)
    return jax.lax.stop_gradient(logprobs.log_normalizer(log_prior + log_psi))


def prefix_log_weights(log_prior: ArrayLike, log_q: ArrayLike, log_psi: ArrayLike, num_tokens: ArrayLike) -> jax.Array:
    """log of pi0(x_<=t) psi_t(x_<=t) / q(x_<=t) [n t], the weights of pi_t at every t without resampling; no gradient.

    Args:
      log_prior: [n t] log pi0 of each token.
      log_q: [n t] under the law that drew them.
      log_psi: [n t] the twists.
      num_tokens: [n] lengths; behind its end a sequence keeps its last weight.
    """
    check_shapes(
        "rl_bayes.prefix_log_weights",
        log_prior=(log_prior, "n t"),
        log_q=(log_q, "n t"),
        log_psi=(log_psi, "n t"),
        num_tokens=(num_tokens, "n"),
    )
    log_prior, log_q, log_psi = (jax.lax.stop_gradient(x) for x in widest(log_prior, log_q, log_psi))
    inside = _inside(log_psi, num_tokens)
    ratio = jnp.cumsum(jnp.where(inside, log_prior - jnp.where(inside, log_q, jnp.zeros_like(log_q)), jnp.zeros_like(log_q)), axis=1)
    last = jnp.maximum(jnp.asarray(num_tokens).astype(jnp.int32) - 1, 0)[:, None]
    at = jnp.minimum(jnp.arange(log_psi.shape[1], dtype=jnp.int32)[None], last)
    return ratio + jnp.take_along_axis(log_psi, at, axis=1)


def ctl_loss(
    log_psi_positive: ArrayLike,
    num_tokens_positive: ArrayLike,
    log_psi_negative: ArrayLike,
    num_tokens_negative: ArrayLike,
    log_weights_negative: ArrayLike,
    log_weights_positive: ArrayLike | None = None,
) -> jax.Array:
    """Contrastive twist learning: the gradient of sum_t KL(p(x_<=t) || pi_t), -sum_t (E_p[grad log psi_t] - E_pi_t[grad log psi_t]).

    Args:
      log_psi_positive: [n t] of samples of p, differentiated.
      num_tokens_positive: [n] their lengths.
      log_psi_negative: [k t] of samples of the proposal, differentiated.
      num_tokens_negative: [k] their lengths.
      log_weights_negative: [k t] of pi_t / q, from `prefix_log_weights`; normalised here for every t.
      log_weights_positive: [n] of P / q for the whole sequence, the same for every prefix, if they were drawn from a proposal; None if exact.

    Returns:
      [] whose value means nothing but has this gradient. Finished sequences count in the normalisation and not in the gradient. 0 where
      no sample has weight.

    Raises:
      ValueError: if shapes do not agree.
    """
    name = "rl_bayes.ctl_loss"
    check_shapes(
        name,
        log_psi_positive=(log_psi_positive, "n t"),
        num_tokens_positive=(num_tokens_positive, "n"),
        log_weights_positive=(log_weights_positive, "n"),
        log_psi_negative=(log_psi_negative, "k t"),
        num_tokens_negative=(num_tokens_negative, "k"),
        log_weights_negative=(log_weights_negative, "k t"),
    )
    positive, negative, log_v = widest(log_psi_positive, log_psi_negative, log_weights_negative)
    log_w = jnp.zeros_like(positive[:, 0]) if log_weights_positive is None else jnp.asarray(log_weights_positive).astype(positive.dtype)
    up = _shares(log_w[:, None])
    down = _shares(log_v)
    return _weighted(down, negative, num_tokens_negative) - _weighted(up, positive, num_tokens_positive)


def soft_q_loss(
    log_psi: ArrayLike, soft_values: ArrayLike, phi: ArrayLike, num_tokens: ArrayLike, *, floor: ArrayLike | None = None
) -> jax.Array:
    """sum_{t<T} (lse_s[log pi0(s | .) + log psi_{t+1}] - log psi_t)^2 + (phi - log psi_T)^2, mean over samples of any law; targets are constants.

    Args:
      log_psi: [n t] differentiated.
      soft_values: [n t] from `soft_values_of`: entry t is the value of the prefix BEFORE token t.
      phi: [n] log-potentials.
      num_tokens: [n] lengths.
      floor: [] least target, for hard constraints (log 1e-16 in the paper's code). Traced. Without it, infinite targets are left out.

    Returns:
      [] loss.
    """
    check_shapes(
        "rl_bayes.soft_q_loss", log_psi=(log_psi, "n t"), soft_values=(soft_values, "n t"), phi=(phi, "n"), num_tokens=(num_tokens, "n")
    )
    log_psi, soft_values, phi = widest(log_psi, soft_values, phi)
    inside = _inside(log_psi, num_tokens)
    last = jnp.arange(log_psi.shape[1], dtype=jnp.int32)[None] == jnp.asarray(num_tokens).astype(jnp.int32)[:, None] - 1
    following = jnp.concatenate([soft_values[:, 1:], jnp.zeros_like(soft_values[:, :1])], axis=1)
    wanted = jax.lax.stop_gradient(jnp.where(last, phi[:, None], following))
    wanted = wanted if floor is None else jnp.maximum(wanted, jnp.asarray(floor).astype(wanted.dtype))
    use = inside & jnp.isfinite(wanted)
    gap = jnp.where(use, jnp.where(use, wanted, jnp.zeros_like(wanted)) - jnp.where(use, log_psi, jnp.zeros_like(log_psi)), 0.0)
    return jnp.sum(jnp.square(gap)) / log_psi.shape[0]


def sixo_loss(
    log_psi_positive: ArrayLike,
    num_tokens_positive: ArrayLike,
    log_psi_prior: ArrayLike,
    num_tokens_prior: ArrayLike,
    log_weights_positive: ArrayLike | None = None,
) -> jax.Array:
    """-sum_t (E_p[log sigmoid(log psi_t)] + E_pi0[log sigmoid(-log psi_t)]): log psi_t learns log p(x_<=t) / pi0(x_<=t) = log psi*_t - log Z.

    Args:
      log_psi_positive: [n t] of samples of p, differentiated.
      num_tokens_positive: [n] their lengths.
      log_psi_prior: [k t] of samples of the prior, differentiated.
      num_tokens_prior: [k] their lengths.
      log_weights_positive: [n] as in `ctl_loss`.

    Returns:
      [] loss. At t beyond its end a sequence does not contribute.
    """
    check_shapes(
        "rl_bayes.sixo_loss",
        log_psi_positive=(log_psi_positive, "n t"),
        num_tokens_positive=(num_tokens_positive, "n"),
        log_weights_positive=(log_weights_positive, "n"),
        log_psi_prior=(log_psi_prior, "k t"),
        num_tokens_prior=(num_tokens_prior, "k"),
    )
    positive, prior = widest(log_psi_positive, log_psi_prior)
    log_w = jnp.zeros_like(positive[:, 0]) if log_weights_positive is None else jnp.asarray(log_weights_positive).astype(positive.dtype)
    even = jnp.full_like(prior[:, :1], 1 / prior.shape[0])
    positive = jnp.where(_inside(positive, num_tokens_positive), positive, jnp.zeros_like(positive))
    prior = jnp.where(_inside(prior, num_tokens_prior), prior, jnp.zeros_like(prior))
    up = _weighted(_shares(log_w[:, None]), jax.nn.softplus(-positive), num_tokens_positive)
    return up + _weighted(even, jax.nn.softplus(prior), num_tokens_prior)


def fudge_loss(log_psi: ArrayLike, phi: ArrayLike, num_tokens: ArrayLike) -> jax.Array:
    """Binary cross-entropy of psi_t against the label exp(phi) in [0, 1], summed over prefixes, mean over samples.

    Args:
      log_psi: [n t] below 0, e.g. log sigmoid of a head's output, differentiated.
      phi: [n] at most 0; -inf is the label 0.
      num_tokens: [n] lengths.

    Returns:
      [] loss, whose minimiser for continuations from pi0 is psi*.
    """
    check_shapes("rl_bayes.fudge_loss", log_psi=(log_psi, "n t"), phi=(phi, "n"), num_tokens=(num_tokens, "n"))
    log_psi, phi = widest(log_psi, phi)
    inside = _inside(log_psi, num_tokens)
    label = jax.lax.stop_gradient(jnp.exp(jnp.minimum(phi, 0.0)))[:, None]
    safe = jnp.minimum(jnp.where(inside, log_psi, -1.0), -float(jnp.finfo(log_psi.dtype).tiny))
    near = safe > -0.7
    log_rest = jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, safe, -0.5))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, safe))))
    each = -(label * safe + (1 - label) * log_rest)
    return jnp.sum(jnp.where(inside, each, jnp.zeros_like(each))) / log_psi.shape[0]


def squared_loss(log_psi: ArrayLike, phi: ArrayLike, num_tokens: ArrayLike) -> jax.Array:
    """(exp(phi) - psi_t)^2 summed over prefixes, mean over samples; arguments as in `fudge_loss`, without bounds on phi and log psi."""
    check_shapes("rl_bayes.squared_loss", log_psi=(log_psi, "n t"), phi=(phi, "n"), num_tokens=(num_tokens, "n"))
    log_psi, phi = widest(log_psi, phi)
    inside = _inside(log_psi, num_tokens)
    gap = jax.lax.stop_gradient(jnp.exp(phi))[:, None] - jnp.exp(jnp.where(inside, log_psi, jnp.zeros_like(log_psi)))
    return jnp.sum(jnp.where(inside, jnp.square(gap), jnp.zeros_like(gap))) / log_psi.shape[0]


def path_consistency_loss(
    log_q: ArrayLike, log_prior: ArrayLike, log_psi: ArrayLike, phi: ArrayLike, num_tokens: ArrayLike, *, floor: ArrayLike | None = None
) -> jax.Array:
    """Path consistency, that is log-variance on sub-sequences: log weights of prefixes should not change along a sequence.

    w_t = log psi_t(x_<=t) + sum_{u<=t} (log pi0 - log q)(x_u), with psi_T = exp(phi), is log Z at every t if and only if psi = psi* and q is its
    twist-induced proposal. Mean of (w_t - w_s)^2 over all pairs s < t of a sample, t = 0 standing for the batch's mean of w_1, which couples
    the samples.

    Args:
      log_q: [n t] of the proposal, differentiated.
      log_prior: [n t].
      log_psi: [n t] differentiated; the last entry of a sequence is not used.
      phi: [n].
      num_tokens: [n] lengths.
      floor: [] least phi. Traced. Samples with phi = -inf are left out without it.

    Returns:
      [] loss.
    """
    check_shapes(
        "rl_bayes.path_consistency_loss",
        log_q=(log_q, "n t"),
        log_prior=(log_prior, "n t"),
        log_psi=(log_psi, "n t"),
        phi=(phi, "n"),
        num_tokens=(num_tokens, "n"),
    )
    log_q, log_prior, log_psi, phi = widest(log_q, log_prior, log_psi, phi)
    phi = phi if floor is None else jnp.maximum(phi, jnp.asarray(floor).astype(phi.dtype))
    kept = ~jnp.isneginf(phi)
    inside = _inside(log_psi, num_tokens) & kept[:, None]
    last = jnp.arange(log_psi.shape[1], dtype=jnp.int32)[None] == jnp.asarray(num_tokens).astype(jnp.int32)[:, None] - 1
    value = jnp.where(last, jnp.where(kept, phi, jnp.zeros_like(phi))[:, None], log_psi)
    gap = jnp.where(inside, log_prior - log_q, jnp.zeros_like(log_q))
    weight = jnp.where(inside, value, jnp.zeros_like(value)) + jnp.cumsum(
        gap, axis=1
    )  # log of the prefix's weight: constant at the optimum
    first, ones = weight[:, :1], inside[:, :1].astype(weight.dtype)
    count = jnp.sum(ones)
    start = jnp.sum(jnp.where(ones > 0, first, jnp.zeros_like(first))) / jnp.maximum(count, 1)
    weight = jnp.concatenate([jnp.zeros_like(first) + start, weight], axis=1)
    there = jnp.concatenate([inside[:, :1], inside], axis=1)
    t = weight.shape[1]
    pairs = (
        there[:, :, None] & there[:, None, :] & (jnp.arange(t, dtype=jnp.int32)[:, None] < jnp.arange(t, dtype=jnp.int32)[None, :])[None]
    )
    total = jnp.sum(jnp.where(pairs, jnp.square(weight[:, None, :] - weight[:, :, None]), 0.0))
    return total / jnp.maximum(jnp.sum(pairs), 1).astype(total.dtype)


def _inside(like: ArrayLike, num_tokens: ArrayLike) -> jax.Array:
    return jnp.arange(jnp.shape(like)[1], dtype=jnp.int32)[None] < jnp.asarray(num_tokens).astype(jnp.int32)[:, None]


def _shares(log_weights: jax.Array) -> jax.Array:
    """Normalised over the first axis; zeros where there is no weight. No gradient."""
    log_w = jax.lax.stop_gradient(log_weights)
    total = logprobs.log_normalizer(log_w.T)[None]
    some = ~jnp.isneginf(log_w)
    gap = jnp.where(some, log_w, jnp.zeros_like(log_w)) - jnp.where(jnp.isneginf(total), jnp.zeros_like(total), total)
    return jnp.where(some, jnp.exp(gap), jnp.zeros_like(gap))


def _weighted(shares: jax.Array, values: jax.Array, num_tokens: ArrayLike) -> jax.Array:
    use = _inside(values, num_tokens) & (shares > 0)
    return jnp.sum(jnp.where(use, shares * jnp.where(use, values, jnp.zeros_like(values)), jnp.zeros_like(values)))
