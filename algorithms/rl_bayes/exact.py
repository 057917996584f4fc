"""Ground truth where all sequences can be enumerated: posterior, log Z, divergences, soft values and optimal twists by dynamic programming.

    space = Space(vocab_size=4, length=5)                          # 1024 sequences, 341 prefixes
    log_prior = log_rows(space, logits)                            # [prefixes v], one row per prefix, whatever gave the logits
    log_p0 = sequence_log_probs(space, log_prior)                  # [x], x = v^t sequences in lexicographic order
    p = posterior(log_p0, phi)                                     # log p(x), log Z
    values = soft_values(space, log_prior, phi)                    # log psi*_t of every prefix, values[0][0] = log Z
    rows = posterior_rows(space, log_prior, values)                # the posterior as a policy: sampling from it is exact

A prefix of depth t is an integer below v^t, its child parent v + token; depths follow each other at offsets (v^t - 1) / (v - 1). With an
end-of-sequence token, what follows it is that token again with probability 1, so that each finished string has one place among the x and
all others have log-probability -inf. A string cut at the length without it counts as it is. Everything is differentiable and can be vmapped.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.algorithms.rl_bayes.target import Sequences
from janax.jaxlib_ext import dtypes, logprobs, sharding
from janax.jaxlib_ext.checks import check_shapes
from janax.jaxlib_ext.divergence.numerics import widest

__all__ = [
    "Posterior",
    "Space",
    "entropy",
    "estimator_variance",
    "exact_bounds",
    "expected_values",
    "kl_divergence",
    "kl_rl_objective",
    "log_rows",
    "next_values",
    "posterior",
    "posterior_rows",
    "prefix_log_probs",
    "rows_from_network",
    "sequence_log_probs",
    "sequences",
    "soft_values",
    "twisted_log_probs",
    "twisted_rows",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """All strings over v tokens of length t, or up to it where a token ends them. Static, hashable.

    Attributes:
      vocab_size: v.
      length: t.
      eos: The token that ends a string, or None.
    """

    vocab_size: int
    length: int
    eos: int | None = None

    def __post_init__(self) -> None:
        if self.vocab_size < 1 or self.length < 1:
            raise ValueError(f"Space: 'vocab_size' and 'length' must be at least 1, got {self.vocab_size} and {self.length}")
        if self.eos is not None and not 0 <= self.eos < self.vocab_size:
            raise ValueError(f"Space: 'eos' is {self.eos}, expected a token below {self.vocab_size}")
        if self.vocab_size**self.length > 1 << 24:
            raise ValueError(f"Space: {self.vocab_size}^{self.length} sequences are too many to enumerate, expected at most 2^24")

    @property
    def num_sequences(self) -> int:
        """x = v^t."""
        return self.vocab_size**self.length

    @property
    def num_prefixes(self) -> int:
        """Prefixes of depth 0 to t - 1, the rows of a policy."""
        return self.offset(self.length)

    def offset(self, depth: int) -> int:
        """Where the prefixes of a depth begin among all."""
        return sum(self.vocab_size**t for t in range(depth))

    def tokens(self, depth: int | None = None) -> np.ndarray:
        """[v^depth depth] int32, all prefixes of a depth, whole sequences by default, in lexicographic order. Host."""
        depth = self.length if depth is None else depth
        index = np.arange(self.vocab_size**depth)[:, None]
        return (index // self.vocab_size ** np.arange(depth)[::-1][None] % self.vocab_size).astype(np.int32)

    def ended(self, depth: int) -> np.ndarray:
        """[v^depth] whether a prefix holds the end-of-sequence token. Host."""
        return np.zeros(self.vocab_size**depth, bool) if self.eos is None else np.any(self.tokens(depth) == self.eos, axis=1)

    def index(self, tokens: ArrayLike, num_tokens: ArrayLike | None = None) -> jax.Array:
        """[...] the places of sequences [... t] among the x, whatever stands behind their ends."""
        tokens = jnp.asarray(tokens).astype(jnp.int32)
        check_shapes("Space.index", tokens=(tokens, f"... {self.length}"))
        if num_tokens is not None and self.eos is not None:
            tokens = jnp.where(Sequences(tokens, jnp.asarray(num_tokens)).mask, tokens, self.eos)
        if self.eos is not None:
            is_eos = (tokens == self.eos).astype(jnp.int32)
            after = jnp.cumsum(is_eos, axis=-1) - is_eos > 0
            tokens = jnp.where(after, self.eos, tokens)
        weights = jnp.asarray(self.vocab_size ** np.arange(self.length)[::-1], jnp.int32)
        return jnp.tensordot(tokens, weights, axes=1)


class Posterior(NamedTuple):
    """p = pi0 exp(phi) / Z.

    Attributes:
      log_probs: [x] log p; -inf everywhere if the support is empty.
      log_z: [] log Z; -inf if the support is empty.
      empty: [] whether it is: no x has pi0(x) > 0 and phi(x) > -inf.
    """

    log_probs: jax.Array
    log_z: jax.Array
    empty: jax.Array


def sequences(space: Space) -> Sequences:
    """All x of the space as [x t] tokens with their lengths, for the functions of a `Target`. Host arrays."""
    tokens = space.tokens()
    num_tokens = np.full(len(tokens), space.length, np.int32)
    if space.eos is not None:
        ends = tokens == space.eos
        num_tokens = np.where(ends.any(1), ends.argmax(1) + 1, space.length).astype(np.int32)
    return Sequences(tokens, num_tokens)  # type: ignore[arg-type]


def log_rows(space: Space, logits: ArrayLike) -> jax.Array:
    """The next-token log-probabilities of every prefix; behind the end-of-sequence token only that token.

    Args:
      space: The space. Static.
      logits: [p v] unnormalised, -inf for forbidden tokens, one row per prefix.

    Returns:
      [p v] float32 or wider; a row that forbids everything is -inf.

    Raises:
      ValueError: on another shape.
    """
    check_shapes("rl_bayes.log_rows", logits=(logits, f"{space.num_prefixes} {space.vocab_size}"))
    logits = dtypes.at_least_float32(logits)
    if space.eos is not None:
        ended = np.concatenate([space.ended(t) for t in range(space.length)])[:, None]
        only = np.where(np.arange(space.vocab_size) == space.eos, 0.0, -np.inf)[None]
        logits = jnp.where(ended, jnp.asarray(only, logits.dtype), logits)
    return _minus(logits, logprobs.log_normalizer(logits)[:, None])


def rows_from_network(
    logits_fn: Callable[..., jax.Array],
    params: Any,
    space: Space,
    prompt: ArrayLike,
    *,
    token_ids: Sequence[int] | np.ndarray | None = None,
) -> jax.Array:
    """The rows of a causal network: one forward pass over the longest prefixes, which contain all shorter ones.

    Args:
      logits_fn: (params, tokens [b t]) -> logits [b t v]. Static.
      params: Its parameters; differentiable.
      space: The space. Static.
      prompt: [c] ids before the first token, at least one (a beginning-of-text token will do).
      token_ids: [v] ids of the space's tokens in the network's vocabulary, 0..v-1 by default; all others are excluded and the rest renormalised.
        Static.

    Returns:
      [p v] as from `log_rows`.

    Raises:
      ValueError: if the prompt is empty or the ids do not suit the space.
    """
    name = "rl_bayes.rows_from_network"
    ids = np.arange(space.vocab_size) if token_ids is None else np.asarray(token_ids)
    length = check_shapes(name, prompt=(prompt, "c"), token_ids=(ids, str(space.vocab_size)))["c"]
    if length < 1:
        raise ValueError(f"{name}: 'prompt' is empty, expected at least one token")
    deepest = ids[space.tokens(space.length - 1)].astype(np.int32)
    before = jnp.broadcast_to(jnp.asarray(prompt).astype(jnp.int32)[None], (len(deepest), length))
    logits = logits_fn(params, jnp.concatenate([before, deepest], axis=1))
    if not np.array_equal(ids, np.arange(logits.shape[-1])):
        logits = logits[..., ids]
    stride = [space.vocab_size ** (space.length - 1 - t) for t in range(space.length)]
    return log_rows(space, jnp.concatenate([logits[:: stride[t], length - 1 + t] for t in range(space.length)]))


def prefix_log_probs(space: Space, rows: ArrayLike) -> tuple[jax.Array, ...]:
    """log pi(x_<=t) of all prefixes, one array [v^t] per depth t = 0..length; `rows` [p v] from `log_rows`."""
    rows = _rows("rl_bayes.prefix_log_probs", space, rows)
    total = [jnp.zeros_like(rows[0, :1])]
    for t in range(space.length):
        total.append((total[-1][:, None] + _depth(space, rows, t)).reshape(-1))
    return tuple(total)


def sequence_log_probs(space: Space, rows: ArrayLike) -> jax.Array:
    """log pi(x) [x] of all sequences; the last of `prefix_log_probs`."""
    return prefix_log_probs(space, rows)[-1]


def posterior(log_prior: ArrayLike, phi: ArrayLike) -> Posterior:
    """The target of all methods: log p = log pi0 + phi - log Z.

    Args:
      log_prior: [x] log pi0.
      phi: [x] log-potential, r / beta or log b or lambda . features; -inf is allowed.

    Returns:
      The posterior.

    Raises:
      ValueError: if the shapes differ.

    Reference: Korbak et al., arXiv:2205.11275, eq. 5-6.
    """
    check_shapes("rl_bayes.posterior", log_prior=(log_prior, "x"), phi=(phi, "x"))
    log_target = jnp.add(*widest(log_prior, phi))
    log_z = logprobs.log_normalizer(log_target)
    return Posterior(log_probs=_minus(log_target, log_z[None]), log_z=log_z, empty=jnp.isneginf(log_z))


def soft_values(space: Space, rows: ArrayLike, phi: ArrayLike) -> tuple[jax.Array, ...]:
    """log psi*_t(x_<=t) = log E_pi0[exp(phi(x)) | x_<=t], the optimal twists, by the recursion psi*_t = sum_s pi0(s | .) psi*_{t+1}(., s).

    Args:
      space: The space. Static.
      rows: [p v] the prior's rows.
      phi: [x] log-potential.

    Returns:
      One array [v^t] per depth t = 0..length; the first is [log Z]. -inf for prefixes from which nothing with positive potential is reached,
      and for those that an end-of-sequence token makes impossible. beta times this is the soft value.

    Raises:
      ValueError: if shapes do not suit the space.

    Reference: Zhao et al., arXiv:2404.17546, section 3.
    """
    rows = _rows("rl_bayes.soft_values", space, rows)
    check_shapes("rl_bayes.soft_values", phi=(phi, str(space.num_sequences)))
    rows, phi = widest(rows, phi)
    values = [_possible(space, space.length, phi)]
    for t in reversed(range(space.length)):
        value = logprobs.log_normalizer(_depth(space, rows, t) + values[0].reshape(-1, space.vocab_size))
        values.insert(0, _possible(space, t, value))
    return tuple(values)


def expected_values(space: Space, rows: ArrayLike, reward: ArrayLike) -> tuple[jax.Array, ...]:
    """V_t(x_<=t) = E_pi[r(x) | x_<=t], what controlled decoding learns: below beta log psi*_t unless the prefix decides the reward.

    Args:
      space: The space. Static.
      rows: [p v] a policy's rows.
      reward: [x] finite.

    Returns:
      One array [v^t] per depth t = 0..length.
    """
    rows = _rows("rl_bayes.expected_values", space, rows)
    rows, reward = widest(rows, reward)
    values = [reward]
    for t in reversed(range(space.length)):
        values.insert(0, jnp.sum(jnp.exp(_depth(space, rows, t)) * values[0].reshape(-1, space.vocab_size), axis=1))
    return tuple(values)


def next_values(space: Space, values: Sequence[ArrayLike]) -> jax.Array:
    """[p v] log psi of every child of every prefix, from values per depth: the form in which twists are given to `smc`."""
    return jnp.concatenate([jnp.asarray(values[t + 1]).reshape(-1, space.vocab_size) for t in range(space.length)])


def posterior_rows(space: Space, rows: ArrayLike, values: Sequence[ArrayLike]) -> jax.Array:
    """The posterior as a policy: log pi*(s | x_<t) = log pi0(s | x_<t) + log psi*_t(x_<t, s) - log psi*_{t-1}(x_<t).

    Args:
      space: The space. Static.
      rows: [p v] the prior's rows.
      values: From `soft_values`.

    Returns:
      [p v]; drawing token by token gives exact samples of p. Rows of dead prefixes, which are never reached, are -inf throughout.
    """
    rows = _rows("rl_bayes.posterior_rows", space, rows)
    return twisted_rows(rows, next_values(space, values))


def twisted_rows(rows: ArrayLike, log_psi: ArrayLike) -> jax.Array:
    """The twist-induced proposal q(s | x_<t) ~ pi0(s | x_<t) psi_t(x_<t, s) [p v], of FUDGE and controlled decoding; `log_psi` [p v]."""
    check_shapes("rl_bayes.twisted_rows", rows=(rows, "p v"), log_psi=(log_psi, "p v"))
    logits = jnp.add(*widest(rows, log_psi))
    return _minus(logits, logprobs.log_normalizer(logits)[:, None])


def twisted_log_probs(space: Space, rows: ArrayLike, log_psi: ArrayLike) -> tuple[jax.Array, ...]:
    """log pi_t(x_<=t), the normalised intermediate targets pi0(x_<=t) psi_t(x_<=t) / Z_t of SMC.

    Args:
      space: The space. Static.
      rows: [p v] the prior's rows.
      log_psi: [p v] log psi of every child of every prefix, as from `next_values`.

    Returns:
      One array [v^t] per depth t = 1..length.
    """
    rows, log_psi = widest(_rows("rl_bayes.twisted_log_probs", space, rows), _rows("rl_bayes.twisted_log_probs", space, log_psi))
    prefixes = prefix_log_probs(space, rows)
    out = []
    for t in range(space.length):
        logits = prefixes[t + 1] + _depth(space, log_psi, t).reshape(-1)
        out.append(_minus(logits, logprobs.log_normalizer(logits)[None]))
    return tuple(out)


def entropy(log_p: ArrayLike) -> jax.Array:
    """-E_p[log p] [] of log-probabilities [x], nats; an impossible x contributes nothing, to the value or to a gradient."""
    log_p = dtypes.at_least_float32(log_p)
    possible = ~jnp.isneginf(log_p)
    safe = jnp.where(possible, log_p, jnp.zeros_like(log_p))
    return -jnp.sum(jnp.where(possible, jnp.exp(safe) * safe, jnp.zeros_like(safe)))


def kl_divergence(log_a: ArrayLike, log_b: ArrayLike) -> jax.Array:
    """KL(a || b) [] = E_a[log a - log b] of log-probabilities [x], nats; inf if b forbids what a allows, the gradient then of the rest."""
    check_shapes("rl_bayes.kl_divergence", log_a=(log_a, "x"), log_b=(log_b, "x"))
    log_a, log_b = widest(log_a, log_b)
    there, finite = ~jnp.isneginf(log_a), ~jnp.isneginf(log_b)
    both = there & finite
    a, b = (jnp.where(both, x, jnp.zeros_like(x)) for x in (log_a, log_b))
    total = jnp.sum(jnp.where(both, jnp.exp(a) * (a - b), jnp.zeros_like(a)))
    return jnp.where(jnp.any(there & ~finite), jnp.inf, total)


def kl_rl_objective(log_pi: ArrayLike, log_prior: ArrayLike, reward: ArrayLike, *, beta: ArrayLike) -> jax.Array:
    """J = E_pi[r] - beta KL(pi || pi0) = beta (log Z - KL(pi || p*)), exactly, to be maximised; autodiff gives its exact gradient.

    Args:
      log_pi: [x] log-probabilities of the policy, differentiated.
      log_prior: [x] of the prior.
      reward: [x] finite where pi has mass, else J is -inf.
      beta: [] >= 0. Traced. At 0 this is plain RL, whose maximum is a point mass.

    Returns:
      [] in units of the reward.

    Reference: Korbak et al., arXiv:2205.11275, section 3 and eq. 7, which leaves out beta log Z.
    """
    check_shapes("rl_bayes.kl_rl_objective", log_pi=(log_pi, "x"), log_prior=(log_prior, "x"), reward=(reward, "x"))
    log_pi, log_prior, reward = widest(log_pi, log_prior, reward)
    weight = jnp.asarray(beta).astype(log_pi.dtype)
    there, finite = ~jnp.isneginf(log_pi), ~jnp.isneginf(reward)
    safe = there & finite
    pi = jnp.where(safe, jnp.exp(jnp.where(safe, log_pi, jnp.zeros_like(log_pi))), jnp.zeros_like(log_pi))
    gain = jnp.sum(pi * jnp.where(safe, reward, jnp.zeros_like(reward)))
    gain = jnp.where(jnp.any(there & ~finite), -jnp.inf, gain)
    kl = kl_divergence(log_pi, log_prior)
    return gain - jnp.where(weight > 0, weight * jnp.where(weight > 0, kl, jnp.zeros_like(kl)), jnp.zeros_like(kl))


def exact_bounds(log_target: ArrayLike, log_q: ArrayLike, *, num_samples: int) -> tuple[jax.Array, jax.Array]:
    """The expectations of the importance-sampling bounds on log Z, for one or two samples, by summing over all of them.

    lower = E_q[log mean_k P(x_k) / q(x_k)]; upper is the same with x_1 from p. For one sample, log Z - KL(q || p) and log Z + KL(p || q).

    Args:
      log_target: [x] log P, unnormalised.
      log_q: [x] the proposal; covers the target.
      num_samples: 1 or 2; 2 takes x^2 operations. Static.

    Returns:
      (lower, upper), each [].

    Raises:
      ValueError: on shapes that differ or another number of samples.

    Reference: Zhao et al., arXiv:2404.17546, Prop. 5.1.
    """
    check_shapes("rl_bayes.exact_bounds", log_target=(log_target, "x"), log_q=(log_q, "x"))
    if num_samples not in (1, 2):
        raise ValueError(f"rl_bayes.exact_bounds: 'num_samples' is {num_samples}, expected 1 or 2")
    return sharding.placed(functools.partial(_bounds, num_samples), lambda _: jax.P(), log_target, log_q)


def _bounds(num_samples: int, log_target: ArrayLike, log_q: ArrayLike) -> tuple[jax.Array, jax.Array]:
    log_target, log_q = widest(log_target, log_q)
    drawn = ~jnp.isneginf(log_q)
    log_w = jnp.where(drawn, log_target - jnp.where(drawn, log_q, jnp.zeros_like(log_q)), -jnp.inf)
    q, p = jnp.exp(log_q), jnp.exp(_minus(log_target, logprobs.log_normalizer(log_target)[None]))

    def expectation(weights: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(weights > 0, weights * jnp.where(weights > 0, values, jnp.zeros_like(values)), jnp.zeros_like(values)))

    if num_samples == 1:
        return expectation(q, log_w), expectation(p, log_w)
    rows = jax.lax.map(lambda one: expectation(q, jnp.logaddexp(one, log_w) - jnp.log(jnp.asarray(2.0, q.dtype))), log_w)
    return expectation(q, rows), expectation(p, rows)


def estimator_variance(log_q: ArrayLike, gradients: ArrayLike) -> jax.Array:
    """Trace of the covariance of a one-sample gradient estimator, sum_x q(x) |g(x)|^2 - |sum_x q(x) g(x)|^2.

    Args:
      log_q: [x] the law that draws the sample.
      gradients: [x d] the estimate that each x gives.

    Returns:
      [] float32 or wider.
    """
    check_shapes("rl_bayes.estimator_variance", log_q=(log_q, "x"), gradients=(gradients, "x d"))
    return sharding.placed(_variance, lambda _: jax.P(), log_q, gradients)


def _variance(log_q: ArrayLike, gradients: ArrayLike) -> jax.Array:
    log_q, gradients = widest(log_q, gradients)
    q = jnp.exp(log_q)
    centred = gradients - jnp.matmul(q, gradients, precision="highest")[None]
    return jnp.sum(q * jnp.sum(jnp.square(centred), axis=1))


def _rows(function: str, space: Space, rows: ArrayLike) -> jax.Array:
    check_shapes(function, rows=(rows, f"{space.num_prefixes} {space.vocab_size}"))
    return dtypes.at_least_float32(rows)


def _depth(space: Space, rows: jax.Array, depth: int) -> jax.Array:
    """[v^depth v] the rows of one depth."""
    return rows[space.offset(depth) : space.offset(depth + 1)]


def _possible(space: Space, depth: int, value: jax.Array) -> jax.Array:
    """-inf for prefixes with anything but the end-of-sequence token behind it."""
    if space.eos is None:
        return value
    tokens = space.tokens(depth)
    after = np.cumsum(tokens == space.eos, axis=1) - (tokens == space.eos) > 0
    return jnp.where(np.any(after & (tokens != space.eos), axis=1), -jnp.inf, value)


def _minus(x: jax.Array, normalizer: jax.Array) -> jax.Array:
    """x - normalizer with -inf where x is, and no nan where both are."""
    possible = ~jnp.isneginf(x)
    base = jnp.where(jnp.isneginf(normalizer), jnp.zeros_like(normalizer), normalizer)
    return jnp.where(possible, jnp.where(possible, x, jnp.zeros_like(x)) - base, -jnp.inf)
