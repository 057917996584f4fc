"""Twisted sequential Monte Carlo on any decoder: weighted samples of p = pi0 exp(phi) / Z, and bounds on log Z from both sides.

The intermediate targets are pi0(x_<=t) psi_t(x_<=t), psi_t >= 0 the twist, an estimate of E_pi0[exp(phi) | x_<=t]; the last one has the true
exp(phi). The model is a decode_fn, see `janax.jaxlib_ext.sampling`, that tells the twists of all next tokens as well:

    twisted_fn(params, cache, tokens [b t], num_tokens=None [b], prefix=None) -> ((logits [b v], log_psi [b v] or None), cache)
    twisted_fn(...) -> ((logits, log_psi, proposal_logits [b v]), cache)                          # for proposal="given"

`untwisted(decode_fn)` has no twists (log psi = 0); `twisted(decode_fn, twist_decode_fn)` takes them from a second decoder; `table_decode_fn` makes a
decoder of a table; `with_head` puts a twist head on a network's hidden states. A cache may be any tree of `Cache`s with one row per prompt.

    result = smc(twisted(lm, twist), (params, twist_params), key, (cache, twist_cache), prompts, num_tokens, target,
                 num_particles=256, max_new_tokens=64)
    lower = result.log_z                                                    # E[exp(log_z)] = Z, so E[log_z] <= log Z
    upper = smc(..., planted=exact_samples).log_z                           # E[log_z] >= log Z if the planted samples follow p exactly

Prompts are prefilled once; particles share their keys and values as a prefix. Resampling keeps survivors in their slots and copies cache rows
for the others only, a block at a time: no row moves where there was no resampling. Tokens are drawn as `sampling.generate` draws them, so the
particles do not depend on the mesh. No gradients. Reference: Zhao et al., arXiv:2404.17546; Lew et al., arXiv:2306.03081 (given potentials).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.algorithms.rl_bayes.resampling import SCHEMES, arrange, resample
from janax.algorithms.rl_bayes.samplers import effective_sample_size
from janax.algorithms.rl_bayes.target import Sequences, Target, log_potential
from janax.jaxlib_ext import dtypes, logprobs, sampling, sharding
from janax.jaxlib_ext.checks import check_shapes, one_of

__all__ = ["SmcResult", "TwistedFn", "draw_particle", "smc", "twisted", "untwisted", "with_head"]

TwistedFn = Callable[..., tuple[tuple[jax.Array | None, ...], Any]]


class SmcResult(NamedTuple):
    """Weighted particles of g prompts.

    Attributes:
      tokens: [g n m] int32, padding behind a sequence's end.
      num_tokens: [g n] int32, the stop token included.
      finished: [g n] whether a sequence came to a stop token; False if it was cut at its length.
      log_weights: [g n] since the last resampling, with the true potential; -inf for what violates a constraint.
      log_z: [g] log of the unbiased estimate of Z; -inf if no particle has weight.
      log_prior: [g n m] log pi0 of each token, 0 in padding.
      log_q: [g n m] under the proposal.
      log_psi: [g n m] the twist after each token.
      potential: [g n] phi.
      ess: [g m] effective number of particles after each token, before resampling; the last is without the true potential.
      resampled: [g m] whether the particles were resampled after the token.
      empty: [g] whether no particle has weight.
    """

    tokens: jax.Array
    num_tokens: jax.Array
    finished: jax.Array
    log_weights: jax.Array
    log_z: jax.Array
    log_prior: jax.Array
    log_q: jax.Array
    log_psi: jax.Array
    potential: jax.Array
    ess: jax.Array
    resampled: jax.Array
    empty: jax.Array

    @property
    def sequences(self) -> Sequences:
        """The particles as `Sequences` [g n]."""
        return Sequences(self.tokens, self.num_tokens)


class _State(NamedTuple):
    """Particles under way, r = g n rows."""

    cache: Any
    tokens: jax.Array
    num_tokens: jax.Array
    finished: jax.Array
    log_prior: jax.Array
    log_q: jax.Array
    log_psi: jax.Array
    last_psi: jax.Array
    log_weights: jax.Array
    log_z: jax.Array
    ess: jax.Array
    resampled: jax.Array


_ROWS = ("tokens", "num_tokens", "finished", "log_prior", "log_q", "log_psi", "last_psi")


def untwisted(decode_fn: sampling.DecodeFn) -> TwistedFn:
    """A decoder without twists: with proposal "base" and no resampling, importance sampling from the prior."""

    def fn(params: Any, cache: Any, tokens: ArrayLike, num_tokens: ArrayLike | None = None, prefix: Any = None) -> Any:
        logits, cache = decode_fn(params, cache, tokens, num_tokens=num_tokens, prefix=prefix)
        return (logits, None), cache

    return fn


def twisted(decode_fn: sampling.DecodeFn, twist_decode_fn: sampling.DecodeFn) -> TwistedFn:
    """Prior and twists from two decoders: params (params, twist_params), cache (cache, twist_cache); the second's "logits" are log psi."""

    def fn(params: Any, cache: Any, tokens: ArrayLike, num_tokens: ArrayLike | None = None, prefix: Any = None) -> Any:
        prefixes = (None, None) if prefix is None else prefix
        logits, first = decode_fn(params[0], cache[0], tokens, num_tokens=num_tokens, prefix=prefixes[0])
        log_psi, second = twist_decode_fn(params[1], cache[1], tokens, num_tokens=num_tokens, prefix=prefixes[1])
        return (logits, log_psi), (first, second)

    return fn


def with_head(
    extend_fn: Callable[..., tuple[jax.Array, Any]],
    unembed_fn: Callable[[Any, jax.Array], jax.Array],
    twist_fn: Callable[[Any, jax.Array], jax.Array],
) -> TwistedFn:
    """Prior and twists from one network: a twist head on the hidden states of the (frozen) prior; params (params, twist_params).

    Args:
      extend_fn: As a decode_fn, but returns the hidden states [b t d] of all new tokens and the cache. Static.
      unembed_fn: (params, h [b d]) -> logits [b v]. Static.
      twist_fn: (twist_params, h [b d]) -> log psi [b v] of all next tokens. Static.
    """

    def fn(params: Any, cache: Any, tokens: ArrayLike, num_tokens: ArrayLike | None = None, prefix: Any = None) -> Any:
        h, cache = extend_fn(params[0], cache, tokens, num_tokens=num_tokens, prefix=prefix)
        if num_tokens is not None and h.shape[1] > 1:
            last = jnp.maximum(jnp.asarray(num_tokens).astype(jnp.int32) - 1, 0)
            h = jnp.take_along_axis(h, last[:, None, None], axis=1)
        return (unembed_fn(params[0], h[:, -1]), twist_fn(params[1], h[:, -1])), cache

    return fn


def smc(
    twisted_fn: TwistedFn,
    params: Any,
    key: jax.Array,
    cache: Any,
    prompts: ArrayLike,
    num_tokens: ArrayLike,
    target: Target,
    *,
    num_particles: int,
    max_new_tokens: int,
    contexts: Any = None,
    proposal: str = "twist",
    scheme: str = "systematic",
    threshold: ArrayLike = 0.5,
    planted: Sequences | None = None,
    stop_tokens: ArrayLike | Sequence[int] = (),
    pad_token: ArrayLike = 0,
) -> SmcResult:
    """Twisted SMC, importance sampling (threshold 0) and conditional SMC (`planted`), for a batch of prompts.

    log w_t = log pi0(x_t | x_<t) + log psi_t - log psi_{t-1} - log q(x_t | x_<t), log psi_0 = 0; after the last token log psi is replaced by phi.
    Where the effective number of particles falls below threshold n, log Z takes in the mean weight, ancestors are drawn and weights start again
    at 0. A finished sequence stays, with the twist of its stop token, until the end.

    Args:
      twisted_fn: See the head of the file. Static.
      params: Its parameters.
      key: [] typed key.
      cache: Tree of `Cache`s with g rows and room for the prompts.
      prompts: [g t] token ids, right-padded; at least one token each.
      num_tokens: [g] tokens of each prompt.
      target: p; its functions get `Sequences` of [g n m] tokens without the prompt.
      num_particles: n, particles per prompt. Static.
      max_new_tokens: m. Static.
      contexts: Tree of [g ...]; if given, the target's functions are called once per prompt, under `vmap`, with its entry.
      proposal: "base": q = pi0; "twist": q ~ pi0 psi_t, whose weights do not depend on the token drawn; "given": from proposal_logits. Static.
      scheme: "multinomial", "residual", "stratified" or "systematic". Static.
      threshold: [] as a share of n; 0 never resamples, above 1 always does. Traced.
      planted: [g m] tokens and [g] lengths of exact samples of p that fill slot 0 and survive: the estimate is then an upper bound in expectation.
      stop_tokens: [s] ids that end a sequence.
      pad_token: [] what stands behind the end.

    Returns:
      The particles. Nothing is nan if all die: log Z is -inf and `empty` is set.

    Raises:
      ValueError: on inconsistent shapes, unknown options, or a number below one.
    """
    name = "rl_bayes.smc"
    g = check_shapes(name, prompts=(prompts, "g t"), num_tokens=(num_tokens, "g"), stop_tokens=(stop_tokens, "s"))["g"]
    one_of(name, "proposal", proposal, ("base", "twist", "given"))
    one_of(name, "scheme", scheme, SCHEMES)
    for argument, value in (("num_particles", num_particles), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name}: {argument!r} is {value}, expected at least 1")
    if planted is not None:
        check_shapes(
            name, **{"planted.tokens": (planted.tokens, f"{g} {max_new_tokens}"), "planted.num_tokens": (planted.num_tokens, str(g))}
        )
    for one in jax.tree.leaves(cache, is_leaf=_is_cache):
        if not _is_cache(one) or one.length.shape[0] != g:
            raise ValueError(f"{name}: 'cache' must be a tree of Cache with {g} rows, one per prompt, got {jax.tree.map(jnp.shape, one)}")
    numbers = {
        "prompts": jnp.asarray(prompts, jnp.int32),
        "num_tokens": jnp.asarray(num_tokens, jnp.int32),
        "stop_tokens": jnp.asarray(stop_tokens, jnp.int32),
        "threshold": threshold,
        "pad_token": pad_token,
    }

    def call(params: Any, key: jax.Array, cache: Any, numbers: Any, target: Target, contexts: Any, planted: Sequences | None) -> SmcResult:
        key_draw, key_resample = jax.random.split(key)
        static = {"g": g, "n": num_particles, "m": max_new_tokens, "proposal": proposal, "scheme": scheme}
        fixed = _Fixed(twisted_fn, params, key_draw, key_resample, **static, planted=planted, **numbers)
        return _run(fixed, cache, target, contexts)

    everywhere = SmcResult._make([jax.P()] * len(SmcResult._fields))
    return sharding.placed(call, lambda _: everywhere, params, key, cache, numbers, target, contexts, planted)


class _Fixed(NamedTuple):
    """What does not change during a call; arrays, and static numbers and names."""

    twisted_fn: TwistedFn
    params: Any
    key_draw: jax.Array
    key_resample: jax.Array
    g: int
    n: int
    m: int
    proposal: str
    scheme: str
    planted: Sequences | None
    prompts: jax.Array
    num_tokens: jax.Array
    stop_tokens: jax.Array
    threshold: ArrayLike
    pad_token: ArrayLike

    @property
    def rows(self) -> int:
        """r = g n."""
        return self.g * self.n

    @property
    def slot_zero(self) -> jax.Array:
        """[r] whether a row is the first particle of its prompt."""
        return jnp.arange(self.rows, dtype=jnp.int32) % self.n == 0

    def per_particle(self, x: jax.Array) -> jax.Array:
        """[g ...] -> [r ...]."""
        return jnp.repeat(x, self.n, axis=0, total_repeat_length=self.rows)


def _run(fixed: _Fixed, cache: Any, target: Target, contexts: Any) -> SmcResult:
    outputs, prefix = fixed.twisted_fn(fixed.params, cache, fixed.prompts, num_tokens=fixed.num_tokens)
    capacity = max(1, fixed.m - 1)
    branch = lambda one: _placed(sampling.branch(one, num_branches=fixed.n, capacity=capacity))  # noqa: E731
    own = jax.tree.map(branch, prefix, is_leaf=_is_cache)
    outputs = tuple(None if x is None else sharding.constrain_batch(fixed.per_particle(x)) for x in outputs)
    state = _emit(fixed, _blank(fixed, own, outputs), outputs, jnp.zeros((), jnp.int32))

    def go_on(carry: tuple[jax.Array, _State]) -> jax.Array:
        step, state = carry
        return (step < fixed.m) & ~jnp.all(_done(fixed, state, step))

    def body(carry: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
        step, state = carry
        state = _select(fixed, state, step - 1)
        active = ~_done(fixed, state, step)
        last = jnp.take_along_axis(state.tokens, jnp.maximum(state.num_tokens - 1, 0)[:, None], axis=1)
        last, count = sharding.constrain_batch(last), sharding.constrain_batch(active.astype(jnp.int32))
        outputs, cache = fixed.twisted_fn(fixed.params, state.cache, last, num_tokens=count, prefix=prefix)
        return step + 1, _emit(fixed, state._replace(cache=cache), outputs, step)

    _, state = jax.lax.while_loop(go_on, body, (jnp.ones((), jnp.int32), state))
    return _close(fixed, state, target, contexts)


def _blank(fixed: _Fixed, cache: Any, outputs: tuple[jax.Array | None, ...]) -> _State:
    rows, g, n, m = fixed.rows, fixed.g, fixed.n, fixed.m
    assert outputs[0] is not None
    dtype = dtypes.floor_dtype(outputs[0].dtype)
    zeros = jnp.zeros((rows, m), dtype)
    return _State(
        cache=cache,
        tokens=jnp.zeros((rows, m), jnp.int32) + jnp.asarray(fixed.pad_token, jnp.int32),
        num_tokens=jnp.zeros(rows, jnp.int32),
        finished=jnp.zeros(rows, bool),
        log_prior=zeros,
        log_q=zeros,
        log_psi=zeros,
        last_psi=jnp.zeros(rows, dtype),
        log_weights=jnp.zeros((g, n), dtype),
        log_z=jnp.zeros(g, dtype),
        ess=jnp.full((g, m), n, dtype),
        resampled=jnp.zeros((g, m), bool),
    )


def _done(fixed: _Fixed, state: _State, step: jax.Array) -> jax.Array:
    """[r] rows that get no token at this step."""
    if fixed.planted is None:
        return state.finished
    lengths = fixed.per_particle(jnp.asarray(fixed.planted.num_tokens).astype(jnp.int32))
    return state.finished | (fixed.slot_zero & (step >= lengths))


def _emit(fixed: _Fixed, state: _State, outputs: tuple[jax.Array | None, ...], step: jax.Array) -> _State:
    """Draws the token of this step for every row that is not done and takes its incremental weight in."""
    rows, dtype = fixed.rows, state.last_psi.dtype
    logits, twists = outputs[:2]
    assert logits is not None
    log_prior = _log_softmax(logits, dtype)
    log_psi = jnp.zeros_like(log_prior) if twists is None else dtypes.at_least_float32(twists).astype(dtype)
    if fixed.proposal == "base":
        log_q, log_total = log_prior, None
    elif fixed.proposal == "twist":
        joint = log_prior + log_psi
        log_q, log_total = _log_softmax(joint, dtype), logprobs.log_normalizer(joint)
    else:
        if len(outputs) < 3 or outputs[2] is None:
            raise ValueError("rl_bayes.smc: 'twisted_fn' gives no proposal_logits, expected a third output with proposal='given'")
        log_q, log_total = _log_softmax(outputs[2], dtype), None

    positions = fixed.per_particle(fixed.num_tokens) + step
    number = jnp.arange(rows, dtype=jnp.int32)
    keys = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(fixed.key_draw, row), at))(number, positions)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    token = jnp.argmax(log_q + noise.astype(dtype), axis=1).astype(jnp.int32)
    active = ~_done(fixed, state, step)
    if fixed.planted is not None:
        wanted = jax.lax.dynamic_index_in_dim(jnp.asarray(fixed.planted.tokens).astype(jnp.int32), step, axis=1, keepdims=False)
        token = jnp.where(fixed.slot_zero, fixed.per_particle(wanted), token)
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    pick = lambda x: jnp.sum(jnp.where(ids == token[:, None], x, jnp.zeros_like(x)), axis=1)  # noqa: E731
    prior_here, psi_here, q_here = pick(log_prior), pick(log_psi), pick(log_q)
    alive = ~(jnp.isneginf(psi_here) | jnp.isneginf(q_here) | jnp.isneginf(prior_here))
    clean = lambda x: jnp.where(alive, x, jnp.zeros_like(x))  # noqa: E731
    if log_total is not None:
        step_weight = clean(log_total) - state.last_psi
    else:
        step_weight = clean(psi_here) - state.last_psi
        if fixed.proposal == "given":
            step_weight = step_weight + clean(prior_here) - clean(q_here)
    step_weight = jnp.where(active, jnp.where(alive, step_weight, -jnp.inf), jnp.zeros_like(step_weight))

    here = (jnp.arange(fixed.m, dtype=jnp.int32)[None] == step) & active[:, None]
    put = lambda whole, x: jnp.where(here, x[:, None], whole)  # noqa: E731
    stops = jnp.any(token[:, None] == fixed.stop_tokens[None], axis=1)
    log_weights = state.log_weights + step_weight.reshape(fixed.g, fixed.n)
    now = jnp.arange(fixed.m, dtype=jnp.int32)[None] == step
    return state._replace(
        tokens=put(state.tokens, token),
        num_tokens=state.num_tokens + active.astype(jnp.int32),
        finished=state.finished | (active & stops),
        log_prior=put(state.log_prior, prior_here),
        log_q=put(state.log_q, q_here),
        log_psi=put(state.log_psi, psi_here),
        last_psi=jnp.where(active, clean(psi_here), state.last_psi),
        log_weights=log_weights,
        ess=jnp.where(now, effective_sample_size(log_weights)[:, None], state.ess),
    )


def _select(fixed: _Fixed, state: _State, step: jax.Array) -> _State:
    """Resamples the prompts whose particles have become too unequal."""
    g, n = fixed.g, fixed.n
    total = logprobs.log_normalizer(state.log_weights)
    now = jnp.arange(fixed.m, dtype=jnp.int32)[None] == step
    ess = jnp.sum(jnp.where(now, state.ess, jnp.zeros_like(state.ess)), axis=1)
    go = (ess < jnp.asarray(fixed.threshold).astype(ess.dtype) * n) & ~jnp.isneginf(total)
    keys = jax.vmap(lambda group: jax.random.fold_in(jax.random.fold_in(fixed.key_resample, group), step))(jnp.arange(g, dtype=jnp.int32))
    planted = fixed.planted is not None
    ancestors = jax.vmap(lambda key, lw: arrange(resample(key, lw, scheme=fixed.scheme, planted=planted)))(keys, state.log_weights)
    ancestors = jnp.where(go[:, None], ancestors, jnp.arange(n, dtype=jnp.int32)[None])
    rows = (ancestors + n * jnp.arange(g, dtype=jnp.int32)[:, None]).reshape(-1)
    moved = {name: getattr(state, name)[rows] for name in _ROWS}
    return state._replace(
        cache=_move(state.cache, rows),
        log_z=state.log_z + jnp.where(go, jnp.where(go, total, jnp.zeros_like(total)) - jnp.log(jnp.asarray(n, total.dtype)), 0.0),
        log_weights=jnp.where(go[:, None], jnp.zeros_like(state.log_weights), state.log_weights),
        resampled=state.resampled | (now & go[:, None]),
        **moved,
    )


def _close(fixed: _Fixed, state: _State, target: Target, contexts: Any) -> SmcResult:
    """The true potential in place of the last twist."""
    g, n = fixed.g, fixed.n
    each = lambda x: x.reshape(g, n, *x.shape[1:])  # noqa: E731
    sequences = Sequences(each(state.tokens), each(state.num_tokens))
    log_prior = each(state.log_prior)
    prior = jnp.sum(log_prior, axis=2)
    if contexts is None:
        phi = log_potential(target, sequences, log_prior=prior)
    else:
        phi = jax.vmap(lambda x, context, prior: log_potential(target, x, context, log_prior=prior))(sequences, contexts, prior)
    check_shapes("rl_bayes.smc", **{"potential of 'target'": (phi, f"{g} {n}")})
    phi = phi.astype(prior.dtype)
    alive = ~jnp.isneginf(phi) & ~jnp.isneginf(state.log_weights)
    log_w = state.log_weights + jnp.where(alive, phi, jnp.zeros_like(phi)) - each(state.last_psi)
    log_w = jnp.where(alive, log_w, -jnp.inf)
    total = logprobs.log_normalizer(log_w)
    return SmcResult(
        tokens=sequences.tokens,
        num_tokens=sequences.num_tokens,
        finished=each(state.finished),
        log_weights=log_w,
        log_z=state.log_z + total - jnp.log(jnp.asarray(n, total.dtype)),
        log_prior=log_prior,
        log_q=each(state.log_q),
        log_psi=each(state.log_psi),
        potential=phi,
        ess=state.ess,
        resampled=state.resampled,
        empty=jnp.isneginf(total),
    )


def _log_softmax(logits: jax.Array, dtype: Any) -> jax.Array:
    """[r v]; -inf, not nan, where a row forbids everything."""
    logits = logits.astype(dtype)
    total = logprobs.log_normalizer(logits)
    return logits - jnp.where(jnp.isneginf(total), jnp.zeros_like(total), total)[:, None]


def _is_cache(x: Any) -> bool:
    return isinstance(x, sampling.Cache)


def _placed(cache: sampling.Cache) -> sampling.Cache:
    """Particles over the mesh axis of the batch, heads over that of the model: what resampling moves is a share of a row."""
    k, v = (sharding.constrain_batch(x, axis=1, heads=3) for x in (cache.k, cache.v))
    return sampling.Cache(k=k, v=v, length=cache.length)


def _move(cache: Any, ancestors: jax.Array) -> Any:
    """Copies cache rows into the slots whose ancestor is another one, a block of rows at a time; ancestors stay where they are."""
    rows = ancestors.shape[0]
    size = max(1, rows // 16)
    vacant = ancestors != jnp.arange(rows, dtype=jnp.int32)
    num_blocks = -(-jnp.sum(vacant, dtype=jnp.int32) // size)
    slots = jnp.nonzero(vacant, size=-(-rows // size) * size, fill_value=rows)[0].astype(jnp.int32)

    def body(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        block, cache = carry
        into = jax.lax.dynamic_slice_in_dim(slots, block * size, size)
        source = ancestors[jnp.minimum(into, rows - 1)]

        def copy(one: sampling.Cache) -> sampling.Cache:
            return _placed(
                sampling.Cache(
                    k=one.k.at[:, into].set(one.k[:, source], mode="drop"),
                    v=one.v.at[:, into].set(one.v[:, source], mode="drop"),
                    length=one.length.at[into].set(one.length[source], mode="drop"),
                )
            )

        return block + 1, jax.tree.map(copy, cache, is_leaf=_is_cache)

    return jax.lax.while_loop(lambda carry: carry[0] < num_blocks, body, (jnp.zeros((), jnp.int32), cache))[1]


def draw_particle(key: jax.Array, result: SmcResult) -> tuple[Sequences, jax.Array]:
    """One particle per prompt, with probability proportional to its weight.

    Args:
      key: [] typed key.
      result: From `smc`.

    Returns:
      The sequences [g], which tend to samples of p as particles grow in number, and which particles they are [g] int32 (0 if `empty`).
    """
    noise = jax.random.gumbel(key, result.log_weights.shape, result.log_weights.dtype)
    index = jnp.argmax(result.log_weights + noise, axis=1).astype(jnp.int32)
    tokens = jnp.take_along_axis(result.tokens, index[:, None, None], axis=1)[:, 0]
    return Sequences(tokens, jnp.take_along_axis(result.num_tokens, index[:, None], axis=1)[:, 0]), index
