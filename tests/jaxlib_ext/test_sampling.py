"""Truncated sampling against NumPy; decoding against a model that recomputes everything from the whole sequence."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import sampling as reference

from janax.jaxlib_ext import sampling, sharding
from janax.jaxlib_ext.sampling import Cache, SamplingParams

VOCABULARY, WIDTH = 23, 8
PARAMS = {
    "embed": np.random.default_rng(0).integers(-3, 4, (VOCABULARY, WIDTH)).astype(np.float32),
    "head": np.random.default_rng(1).integers(-3, 4, (WIDTH, VOCABULARY)).astype(np.float32),
}
KEY = 17
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11], [12, 13, 14, 15], [16, 17, 18], [19], [20, 21, 22, 0, 1]]
MAX_NEW = 12
SLOW = pytest.mark.slow
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # half the compile time, which is most of the time
HOT = SamplingParams(temperature=0.8, top_p=0.95)


def toy(params, cache, tokens, num_tokens=None, prefix=None):
    """Every token of the history counts, weighted by its place; all sums are of small integers, hence exact in any order and grouping."""
    rows, width = tokens.shape
    num_tokens = jnp.full(rows, width) if num_tokens is None else num_tokens
    offset = jnp.arange(width)[None]
    where = cache.length[:, None] + offset
    where = jnp.where(offset < num_tokens[:, None], where, cache.k.shape[2])
    new = (jax.nn.one_hot(tokens, VOCABULARY) @ params["embed"])[:, :, None].astype(cache.k.dtype)
    k = jax.vmap(lambda row, at, x: row.at[at].set(x, mode="drop"))(cache.k[0], where, new)[None]
    length = cache.length + num_tokens.astype(cache.length.dtype)

    def history(keys, valid, start):  # [b s h] -> [b h]
        at = jnp.arange(keys.shape[1])[None]
        weight = jnp.where(at < valid[:, None], 1 + (start[:, None] + at) % 5, 0)
        return jnp.einsum("bs,bsh->bh", weight.astype(jnp.float32), keys.astype(jnp.float32))

    if prefix is None:
        summary = history(k[0, :, :, 0], length, jnp.zeros_like(length))
    else:
        groups = rows // prefix.length.shape[0]
        before = history(prefix.k[0, :, :, 0], prefix.length, jnp.zeros_like(prefix.length))
        summary = history(k[0, :, :, 0], length, jnp.repeat(prefix.length, groups)) + jnp.repeat(before, groups, axis=0)
    logits = (jnp.mod(summary @ params["head"], 37.0) - 18.0) / 8.0
    return logits, Cache(k=k, v=cache.v, length=length)


def toy_logits(sequence):
    """What `toy` computes, from scratch."""
    weight = 1 + np.arange(len(sequence)) % 5
    return (np.mod((weight @ PARAMS["embed"][sequence]) @ PARAMS["head"], 37.0) - 18.0) / 8.0


def cache_of(rows, capacity, dtype=jnp.float32):
    k = jnp.zeros((1, rows, capacity, 1, WIDTH), dtype)
    return Cache(k=k, v=jnp.zeros_like(k), length=jnp.zeros(rows, jnp.int32))


def padded(prompts, fill=22):
    width = max(map(len, prompts))
    return np.array([list(p) + [fill] * (width - len(p)) for p in prompts], np.int32), np.array([len(p) for p in prompts], np.int32)


def noise(request, position):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(KEY), request), position)
    return np.asarray(jax.random.gumbel(key, (VOCABULARY,), jnp.float32))


@functools.cache
def compiled(how, **static):
    """One program per set of static arguments and shapes for all tests; everything else is traced."""
    return jit(lambda key, cache, tokens, num_tokens, **traced: how(toy, PARAMS, key, cache, tokens, num_tokens, **static, **traced))


def run(prompts=PROMPTS, *, how=sampling.generate, capacity=5 + MAX_NEW - 1, rows=None, cache=None, get=True, **options):
    options = {"sampling": HOT, "max_new_tokens": MAX_NEW, **options}
    stop_tokens = list(options.pop("stop_tokens", []))
    options["stop_tokens"] = np.array(stop_tokens + [-1] * (2 - len(stop_tokens)), np.int32)
    if "request_ids" in options:
        options["request_ids"] = np.array(options["request_ids"], np.int32)
    static = {name: options.pop(name) for name in ("max_new_tokens", "num_samples", "refill_at", "drain_slots") if name in options}
    cache = cache_of(rows or len(prompts), capacity) if cache is None else cache
    outcome = compiled(how, **static)(jax.random.key(KEY), cache, *padded(prompts), **options)
    return jax.device_get(outcome) if get else outcome


def start(prompts=PROMPTS, **options):
    """The state that `run` starts from, placed on the device, to be taken further by ADVANCE."""
    return run(prompts, how=sampling.init, get=False, **options)


ADVANCE, JITTED_TOY = jit(functools.partial(sampling.advance, toy, PARAMS)), jit(toy)


def expected(prompts=PROMPTS, ids=None, params=HOT, max_new_tokens=MAX_NEW, **options):
    ids = range(len(prompts)) if ids is None else ids
    values = {name: float(x) for name, x in params._asdict().items()} | {"top_k": int(params.top_k)}
    return reference.generate(toy_logits, noise, prompts, ids, max_new_tokens=max_new_tokens, **options, **values)


def assert_matches(generation, rows, max_new_tokens=MAX_NEW, pad=0):
    assert generation.tokens.shape == (len(rows), max_new_tokens)
    for i, row in enumerate(rows):
        n = len(row["tokens"])
        assert generation.num_tokens[i] == n
        assert generation.finished[i] == row["finished"]
        np.testing.assert_array_equal(generation.tokens[i], row["tokens"] + [pad] * (max_new_tokens - n))
        for name in ("log_probs", "sampling_log_probs"):
            value = getattr(generation, name)[i]
            np.testing.assert_allclose(value[:n], row[name], atol=2e-6)  # a few float32 roundings of numbers below 8
            assert not value[n:].any()


def same(a, b):
    """Tokens, counts and flags to the bit; log-probabilities to what another batch size does to the order of float32 sums."""
    integers = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype != np.float32]  # noqa: E731
    chex.assert_trees_all_equal(integers(a), integers(b))
    chex.assert_trees_all_close(a, b, rtol=0, atol=2e-6)


# --- the truncated distribution --------------------------------------------------------------------------------------------------------


JITTED = jit(sampling.truncate)


def check_truncation(logits, **options):
    value = np.asarray(JITTED(logits, **options))
    options["top_k"] = options["top_k"] or 0
    want = reference.truncate(np.asarray(logits, np.float64), **options)
    np.testing.assert_array_equal(np.isneginf(value), np.isneginf(want))
    np.testing.assert_allclose(value[~np.isneginf(want)], want[~np.isneginf(want)], atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("top_k", [None, 0, 1, 7, 500, 10**6])
def test_truncation_agrees_with_numpy(top_k):
    rng = np.random.default_rng(0)
    for temperature in (0.0, 0.3, 1.0, 5.0):
        for top_p, min_p in ((1.0, 0.0), (0.9, 0.0), (0.3, 0.0), (0.0, 0.0), (1.0, 0.05), (1.0, 1.0), (0.8, 0.2)):
            logits = (3 * rng.normal(size=501)).astype(np.float32)
            logits[rng.integers(0, 501, 50)] = -np.inf
            check_truncation(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def test_truncation_by_hand(strict):
    logits = jnp.log(jnp.array([0.2, 0.4, 0.1, 0.3], jnp.float32))
    keep = lambda **options: np.flatnonzero(np.isfinite(JITTED(logits, **options))).tolist()  # noqa: E731
    assert keep(top_k=2) == [1, 3]
    assert keep(top_p=0.7) == [1, 3]  # reached exactly
    assert keep(top_p=0.71) == [0, 1, 3]
    assert keep(top_p=0.39) == [1]
    assert keep(min_p=0.5) == [0, 1, 3]
    assert keep(min_p=0.51) == [1, 3]
    # Each on what the last left: of the two of top-k, .4 / .7 > .55, so top-p keeps one; the other way round it would keep two.
    assert keep(top_k=2, top_p=0.55) == [1]
    # The temperature comes first: at 1/2 the shares are 4, 16, 1, 9 of 30.
    assert keep(temperature=0.5, top_p=0.53) == [1]
    assert keep(temperature=0.5, min_p=0.5) == [1, 3]
    np.testing.assert_allclose(np.exp(sampling.truncate(logits, top_k=2)), [0, 4 / 7, 0, 3 / 7], rtol=1e-6)


def test_ties():
    keep = lambda x, **options: np.flatnonzero(np.isfinite(JITTED(jnp.asarray(x, jnp.float32), **options))).tolist()  # noqa: E731
    assert keep([0.0, 1.0, 0.0, 0.0, -1.0], top_k=2) == [0, 1, 2, 3]  # all that tie with the second
    assert keep([0.0] * 8, top_p=0.5) == [0, 1, 2, 3]  # just enough, lower ids first
    assert keep([0.0] * 8, top_p=0.51) == [0, 1, 2, 3, 4]
    assert keep([0.0, -0.0, 0.0], top_p=0.0) == [0]
    assert keep([-1.0, 2.0, 2.0], temperature=0.0) == [1]


def test_greedy_is_a_value_not_a_branch_and_has_no_nan():
    logits = jnp.array([1.0, -jnp.inf, 3.0, 2.0])

    @jit
    @chex.assert_max_traces(n=1)
    def log_q(temperature, top_k, top_p, min_p):
        return sampling.truncate(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)

    for temperature in (0.0, 1e-30, 1e-6, 1.0, 1e30):
        for top_k in (0, 1, 3):
            assert np.all(~np.isnan(log_q(temperature, top_k, 0.9, 0.1)))
    np.testing.assert_array_equal(log_q(0.0, 0, 1.0, 0.0), [-np.inf, -np.inf, 0.0, -np.inf])
    np.testing.assert_array_equal(np.exp(log_q(1e-30, 0, 1.0, 0.0)), [0.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes(dtype, strict):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=50), dtype)
    value = sampling.truncate(logits, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01)
    assert value.dtype == jnp.float32
    assert np.isclose(np.sum(np.exp(value)), 1.0, atol=1e-6)


def test_float64(x64):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=300))
    value = sampling.truncate(logits, temperature=0.7, top_k=100, top_p=0.9)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(np.exp(value), np.exp(reference.truncate(logits, 0.7, 100, 0.9)), rtol=1e-12, atol=1e-15)


def test_gradient_within_the_kept_set(x64):
    logits = jnp.asarray(np.random.default_rng(3).normal(size=12)).at[4].set(-jnp.inf)

    @jax.jit
    def value(logits, temperature):
        log_q = sampling.truncate(logits, temperature=temperature, top_k=6, top_p=0.9)
        return jnp.sum(jnp.where(jnp.isfinite(log_q), log_q, 0.0) * jnp.arange(12))

    by_logits, by_temperature = jax.grad(value, (0, 1))(logits, 0.7)
    for i in range(12):
        if i != 4:
            step = jnp.zeros(12).at[i].set(1e-6)
            slope = (value(logits + step, 0.7) - value(logits - step, 0.7)) / 2e-6
            assert float(by_logits[i]) == pytest.approx(float(slope), abs=1e-7)
    assert by_logits[4] == 0
    assert float(by_temperature) == pytest.approx(float(value(logits, 0.7 + 1e-6) - value(logits, 0.7 - 1e-6)) / 2e-6, rel=1e-6)
    assert np.all(np.isfinite(jax.grad(value)(logits, 0.0)))


def test_vmap_over_parameters():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 40)), jnp.float32)
    options = {"temperature": [0.0, 0.5, 1.0, 2.0], "top_k": [0, 3, 0, 9], "top_p": [1.0, 1.0, 0.5, 0.9], "min_p": [0.0, 0.1, 0.0, 0.0]}
    one = lambda x, options: sampling.truncate(x, **options)  # noqa: E731
    together = jax.vmap(one)(logits, {name: jnp.asarray(x) for name, x in options.items()})
    for i in range(4):
        np.testing.assert_allclose(together[i], JITTED(logits[i], **{name: x[i] for name, x in options.items()}), atol=1e-6)


def test_truncation_sharded_over_the_vocabulary(mesh):
    logits = (3 * np.random.default_rng(0).normal(size=(8, 64))).astype(np.float32)
    function = jax.vmap(lambda x: sampling.truncate(x, temperature=0.8, top_k=30, top_p=0.9, min_p=0.01))
    placed = logits if mesh is None else jax.device_put(logits, jax.NamedSharding(mesh, jax.P("data", "model")))
    want = np.stack([reference.truncate(row, 0.8, 30, 0.9, 0.01) for row in logits])
    value = np.asarray(jit(function)(placed))
    np.testing.assert_array_equal(np.isneginf(value), np.isneginf(want))
    np.testing.assert_allclose(np.exp(value), np.exp(want), atol=1e-6)


# --- decoding against recomputation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=0.0), SamplingParams(), HOT, SamplingParams(1.3, 5, 0.9, 0.05)],
    ids=["greedy", "plain", "hot", "all"],
)
def test_rows_stop_each_in_its_own_time(params):
    """Tokens, both kinds of log-probability and padding equal a recomputation without a cache."""
    generation = run(sampling=params, stop_tokens=[3, 7], pad_token=9)
    rows = expected(params=params, stop_tokens=(3, 7))
    assert_matches(generation, rows, pad=9)
    if params is HOT:
        assert len({len(row["tokens"]) for row in rows}) > 3 and 0 < sum(row["finished"] for row in rows) < len(rows)


def test_greedy_is_the_argmax_with_sampling_log_prob_zero():
    generation = run([[1, 2, 3]], sampling=SamplingParams(temperature=0.0))
    sequence = [1, 2, 3]
    for token in generation.tokens[0]:
        assert token == np.argmax(toy_logits(sequence))
        sequence.append(int(token))
    assert not generation.sampling_log_probs.any() and np.all(generation.log_probs < 0)


def test_frequencies():
    """2000 samples of one prompt: chi-square of the first token, of the second given the first, at most its mean + 4 standard deviations."""
    generation = run([[1, 2, 3]], num_samples=2000, max_new_tokens=2, capacity=3)
    first = generation.tokens[:, 0]
    favourite = np.bincount(first).argmax()
    for tokens, prompt in ((first, [1, 2, 3]), (generation.tokens[first == favourite, 1], [1, 2, 3, int(favourite)])):
        p = np.exp(reference.truncate(toy_logits(prompt), 0.8, 0, 0.95))
        counts, want = np.bincount(tokens, minlength=VOCABULARY), len(tokens) * p
        assert not counts[p == 0].any()
        rare = want < 5  # joined, as the chi-square law wants
        counts, want = (np.append(x[~rare], x[rare].sum()) for x in (counts, want))
        counts, want = counts[want > 0], want[want > 0]
        freedom = len(want) - 1
        assert freedom >= 3
        assert np.sum((counts - want) ** 2 / want) < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("stop", [[], [3, 7]])
def test_samples_of_a_prompt_share_its_cache(stop):
    """As if every sample had its own copy of the prompt; the prompts' cache needs room for the prompts alone."""
    shared = run(PROMPTS[:4], num_samples=3, capacity=5, stop_tokens=stop)
    copied = run([prompt for prompt in PROMPTS[:4] for _ in range(3)], stop_tokens=stop)
    same(shared, copied)
    assert_matches(shared, expected([prompt for prompt in PROMPTS[:4] for _ in range(3)], stop_tokens=stop))


def test_shared_memory_is_not_copied():
    calls = []

    def spy(params, cache, tokens, num_tokens=None, prefix=None):
        calls.append((cache.k.shape, tokens.shape, None if prefix is None else prefix.k.shape))
        return toy(params, cache, tokens, num_tokens, prefix)

    jax.eval_shape(
        lambda: sampling.generate(
            spy,
            PARAMS,
            jax.random.key(0),
            cache_of(2, 400),
            np.ones((2, 400), np.int32),
            np.array([400, 7], np.int32),
            sampling=HOT,
            max_new_tokens=10,
            num_samples=8,
        )
    )
    assert calls[0] == ((1, 2, 400, 1, WIDTH), (2, 400), None)
    assert set(calls[1:]) == {((1, 16, 9, 1, WIDTH), (16, 1), (1, 2, 400, 1, WIDTH))}


def test_a_prefix_is_continued_by_many():
    """Two contexts, prefilled once, each continued by two prompts of two samples; equals prompts that hold their context."""
    contexts = [[5, 6, 7, 8], [2, 2]]
    tokens, num_tokens = padded(contexts)
    _, prefix = JITTED_TOY(PARAMS, cache_of(2, 4), tokens, num_tokens)
    prompts = [[1, 2], [3], [4, 5, 6], [7]]
    whole = [contexts[i // 2] + prompt for i, prompt in enumerate(prompts)]
    ids = [10, 11, 12, 13]
    options = {"capacity": 3 + MAX_NEW - 1, "prefix": prefix, "stop_tokens": [3]}
    assert_matches(run(prompts, request_ids=ids, **options), expected(whole, ids, stop_tokens=[3]))
    twice = expected([prompt for prompt in whole for _ in range(2)], stop_tokens=[3])
    assert_matches(run(prompts, rows=8, num_samples=2, **options), twice)


def test_branches_score_targets_after_one_prefix():
    _, prefix = JITTED_TOY(PARAMS, cache_of(2, 4), np.array([[5, 6, 7, 8], [2, 3, 0, 0]]), np.array([4, 2]))
    branches = sampling.branch(prefix, num_branches=3, capacity=2)
    assert branches.k.shape == (1, 6, 2, 1, WIDTH) and branches.k.dtype == prefix.k.dtype and not branches.length.any()
    targets = np.arange(12).reshape(6, 2)
    logits, after = toy(PARAMS, branches, targets, None, prefix)
    for row in range(6):
        np.testing.assert_array_equal(logits[row], toy_logits([[5, 6, 7, 8], [2, 3]][row // 3] + list(targets[row])))
    assert after.length.tolist() == [2] * 6


def test_the_cache_may_hold_an_earlier_turn():
    """A second turn with the last token in front equals the two turns as one prompt; positions go on, so noise is not used twice."""
    tokens, num_tokens = padded([[1, 2, 3], [4]])

    def turns(key):
        state = sampling.init(toy, PARAMS, key, cache_of(2, 30), tokens, num_tokens, sampling=HOT, max_new_tokens=4)
        state = sampling.advance(toy, PARAMS, state, num_steps=4)
        follow = jnp.concatenate([state.tokens[:, -1:], jnp.full((2, 1), 9)], axis=1)
        return state.tokens, sampling.generate(
            toy, PARAMS, key, state.cache, follow, jnp.full(2, 2), sampling=HOT, max_new_tokens=5, request_ids=[0, 1]
        )

    said, second = jax.device_get(jit(turns)(jax.random.key(KEY)))
    whole = [[1, 2, 3, *said[0].tolist(), 9], [4, *said[1].tolist(), 9]]
    assert_matches(second, expected(whole, max_new_tokens=5), max_new_tokens=5)


def test_a_full_cache_ends_a_row():
    held = Cache(*cache_of(2, 14)[:2], length=jnp.array([0, 8]))
    generation = run([[1, 2], [3, 4]], cache=held, max_new_tokens=MAX_NEW)
    assert generation.num_tokens.tolist() == [12, 5] and not generation.finished.any()  # 8 + 2 + 4 stored, and one that is not
    generation = run([[1, 2], [3, 4]], cache=held._replace(length=jnp.array([0, 13])))
    assert generation.num_tokens.tolist() == [12, 0]


def test_an_empty_prompt_under_jit_says_nothing():
    prompts = [[1, 2, 3], [], [9]]
    generation, info = run(prompts, how=sampling.generate_many, rows=2)
    same(generation, run(prompts))
    assert generation.num_tokens.tolist() == [12, 0, 12] and not generation.tokens[1].any() and not generation.finished[1]
    assert info.busy_steps == 22


def test_cache_dtype_is_kept():
    state = start(PROMPTS[:2], cache=cache_of(2, 16, jnp.bfloat16))
    assert state.cache.k.dtype == state.cache.v.dtype == jnp.bfloat16
    whole = run(PROMPTS[:2], cache=cache_of(2, 16, jnp.bfloat16))
    assert_matches(whole, expected(PROMPTS[:2]))  # small integers are exact in bf16


# --- same key, same tokens -------------------------------------------------------------------------------------------------------------


def test_grouping_does_not_matter():
    whole = run(stop_tokens=[3])
    parts = [run(PROMPTS[i : i + 4], request_ids=range(i, i + 4), stop_tokens=[3]) for i in (0, 4)]
    same(whole, jax.tree.map(lambda *x: np.concatenate(x), *parts))
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    shuffled = run([PROMPTS[i] for i in order], request_ids=order, stop_tokens=[3])
    same(jax.tree.map(lambda x: x[order], whole), shuffled)
    assert not np.array_equal(whole.tokens[:4], run(PROMPTS[:4], request_ids=range(4, 8), stop_tokens=[3]).tokens)


@pytest.mark.slow
@pytest.mark.parametrize("slots,refill_at,drain", [(1, None, None), (3, 1, (2, 1)), (3, 3, ()), (11, 4, None)])
def test_refill_order_does_not_matter(slots, refill_at, drain):
    options = {"stop_tokens": [3, 7], "stop_sequences": sampling.pad_sequences([[20, 4], [1]]), "pad_token": 5}
    many, info = run(how=sampling.generate_many, rows=slots, refill_at=refill_at, drain_slots=drain, **options)
    same(many, run(**options))
    assert_matches(many, expected(stop_tokens=(3, 7), stop_sequences=([20, 4], [1])), pad=5)
    assert info.busy_steps == np.sum(many.num_tokens - 1)
    assert info.num_refills == -(-8 // (refill_at or 1))


def test_refill_after_a_prefix_and_over_a_used_cache():
    _, prefix = JITTED_TOY(PARAMS, cache_of(1, 6), np.array([[5, 6, 7, 8]]))
    used = Cache(k=jnp.full((1, 3, 16, 1, WIDTH), 3.0), v=cache_of(3, 16).v, length=jnp.array([3, 0, 16]))
    many, _ = run(how=sampling.generate_many, cache=used, prefix=prefix, stop_tokens=[3])
    assert_matches(many, expected([[5, 6, 7, 8, *prompt] for prompt in PROMPTS], stop_tokens=[3]))


def test_pieces_equal_one_go():
    whole = run(stop_tokens=[3])
    for pieces in ((1,) * 11, (4, 4, 4), (2, 90)):
        state = start(stop_tokens=[3])
        for num_steps in pieces:
            state = ADVANCE(state, num_steps=num_steps)
        assert np.all(state.done)
        same(jax.device_get(sampling.result(state)), whole)


@pytest.mark.parametrize("explicit", [False, True])
def test_same_tokens_on_eight_devices(explicit):
    """Rows over `data`. Explicit axes: `generate` without branches, whose rows stay where they are."""

    def go(params, key, cache, tokens, num_tokens):
        options = {"sampling": HOT, "max_new_tokens": MAX_NEW, "stop_tokens": [3]}
        if explicit:
            return sampling.generate(toy, params, key, cache, tokens, num_tokens, **options)
        several = sampling.generate(toy, params, key, cache, tokens, num_tokens, num_samples=2, **options)
        return several, sampling.generate_many(toy, params, key, cache, tokens, num_tokens, **options)[0]

    with jax.set_mesh(sharding.make_mesh({"data": 8}, explicit=explicit)):
        places = (Cache(jax.P(None, "data"), jax.P(None, "data"), jax.P("data")), jax.P("data"), jax.P("data"))
        placed = jax.device_put((cache_of(8, 16), *padded(PROMPTS)), places)
        meshed = jax.device_get(jit(go)(jax.device_put(PARAMS, jax.P()), jax.random.key(KEY), *placed))
    one = run(stop_tokens=[3])
    same(meshed, one if explicit else (run([prompt for prompt in PROMPTS for _ in range(2)], stop_tokens=[3]), one))


def test_traced_once():
    tokens, num_tokens = padded(PROMPTS)

    @jit
    @chex.assert_max_traces(n=1)
    def go(key, params, stop_tokens):
        options = {"sampling": params, "max_new_tokens": 4, "stop_tokens": stop_tokens}
        one = sampling.generate(toy, PARAMS, key, cache_of(8, 16), tokens, num_tokens, **options)
        return one, sampling.generate_many(toy, PARAMS, key, cache_of(3, 16), tokens, num_tokens, **options)[0]

    seen = set()
    for i, temperature in enumerate((0.0, 0.5, 1.0, 2.0)):
        one, many = go(jax.random.key(i), SamplingParams(temperature, i, 1.0 - 0.1 * i, 0.01 * i), np.array([i, 9]))
        same(one, many)
        seen.add(np.asarray(one.tokens).tobytes())
    assert len(seen) == 4


def test_no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        run(PROMPTS[:3], how=sampling.generate_many, rows=2, max_new_tokens=3, drain_slots=())


def test_keys_and_rows_differ():
    two = [run([[1, 2, 3]] * 2, request_ids=ids).tokens for ids in ([0, 1], [0, 0])]
    assert not np.array_equal(two[0][0], two[0][1])
    np.testing.assert_array_equal(two[1][0], two[1][1])


# --- stopping --------------------------------------------------------------------------------------------------------------------------


def test_stop_sequences_are_suffixes_of_what_was_sampled():
    free = run()
    said = free.tokens.tolist()
    sequences = [said[0][2:5], said[3][4:6], said[5][0:1], [22, 22, 22, 22]]
    generation = run(stop_sequences=sampling.pad_sequences(sequences))
    rows = expected(stop_sequences=sequences)
    assert_matches(generation, rows)
    assert len(rows[0]["tokens"]) <= 5 and len(rows[3]["tokens"]) <= 6 and len(rows[5]["tokens"]) == 1
    # The prompt's end does not count: row 0's first token after the last of its prompt is not found.
    across = run(stop_sequences=sampling.pad_sequences([[3, said[0][0]]]))
    assert across.num_tokens[0] == len(expected(stop_sequences=[[3, said[0][0]]])[0]["tokens"]) > 1


def test_pad_sequences():
    np.testing.assert_array_equal(sampling.pad_sequences([[1, 2, 3], [4]]), [[1, 2, 3], [-1, -1, 4]])
    assert sampling.pad_sequences([]).shape == (0, 1)
    with pytest.raises(ValueError, match=r"sampling.pad_sequences: sequence 1 is \[\], expected at least one token id"):
        sampling.pad_sequences([[1], []])


PIECES = ["a", "b", "ab", "c", "bc", "d", "\n", "x", "y", "z"]


def to_text(ids):
    return "".join(PIECES[i % len(PIECES)] for i in ids)


@pytest.mark.parametrize("num_steps", [1, 3, 50])
def test_stop_strings_cross_tokens(num_steps):
    """A string spelt by any tokens ends the row with the token that completes it, whatever the length of the pieces."""
    options = {"sampling": SamplingParams(temperature=1.5), "max_new_tokens": 40}
    free = run(capacity=5 + 39, **options)
    strings = ["abc", "d\n", "yz"]

    stop_fn = sampling.stop_strings(to_text, strings)
    states = sampling.stream(functools.partial(ADVANCE, num_steps=num_steps), start(capacity=5 + 39, **options), stop_fn=stop_fn)
    lengths = []
    for last in states:
        lengths.append(np.asarray(last.num_tokens))
        final = jax.device_get(last._replace(key=None))
    assert np.all(np.diff(lengths, axis=0) >= 0) or num_steps > 1
    for row, prompt in enumerate(PROMPTS):
        said = free.tokens[row].tolist()
        ends = [n for n in range(1, 41) if any(string in to_text(said[:n]) for string in strings)]
        n = ends[0] if ends else 40
        assert final.num_tokens[row] == n and final.finished[row] == bool(ends) and final.done[row]
        assert final.tokens[row].tolist() == said[:n] + [0] * (40 - n)
        np.testing.assert_array_equal(final.log_probs[row, :n], free.log_probs[row, :n])
        assert not final.log_probs[row, n:].any() and not final.sampling_log_probs[row, n:].any()
        assert final.cache.length[row] == len(prompt) + n - 1 and final.positions[row] == len(prompt) + n
    assert final.finished.any() and any(len(set(x)) > 1 for x in lengths)
    if num_steps == 1:
        assert len(lengths) <= 40


def test_streaming_without_a_stop_function():
    states = list(sampling.stream(functools.partial(ADVANCE, num_steps=5), start(stop_tokens=[3])))
    same(jax.device_get(sampling.result(states[-1])), run(stop_tokens=[3]))
    assert states[0].num_tokens.tolist() == [1] * 8 and 2 <= len(states) <= 4


def test_halt():
    state = ADVANCE(start(), num_steps=5)
    halted = sampling.halt(state, [-1, 0, 3, 6, 99, -1, 1, -1])
    assert halted.num_tokens.tolist() == [6, 0, 3, 6, 6, 6, 1, 6]
    assert (halted.cache.length - state.cache.length).tolist() == [0, -5, -3, 0, 0, 0, -5, 0]  # the last token is not stored
    last = jax.device_get(sampling.result(ADVANCE(halted, num_steps=50)))
    assert last.num_tokens.tolist() == [12, 0, 3, 6, 6, 12, 1, 12]
    assert last.finished.tolist() == [False, True, True, True, True, False, True, False]
    free = run()
    np.testing.assert_array_equal(last.tokens, np.where(np.arange(12) < last.num_tokens[:, None], free.tokens, 0))


# --- how full the batch is -------------------------------------------------------------------------------------------------------------


def counting(params, cache, tokens, num_tokens=None, prefix=None):
    """Says token 1, and token 0 as number n of the answer, where the prompt is the two digits of n in base 32."""
    del params, prefix
    num_tokens = jnp.full(tokens.shape[0], tokens.shape[1]) if num_tokens is None else num_tokens
    offset = jnp.arange(tokens.shape[1])[None]
    where = cache.length[:, None] + offset
    where = jnp.where(offset < num_tokens[:, None], where, cache.k.shape[2])
    k = jax.vmap(lambda row, at, x: row.at[at].set(x, mode="drop"))(cache.k[0, :, :, 0, 0], where, tokens.astype(cache.k.dtype))
    length = cache.length + num_tokens.astype(jnp.int32)
    target = 32 * k[:, 0] + k[:, 1]
    stop = (length - 1).astype(jnp.float32) >= target
    logits = 60.0 * jnp.stack([stop, ~stop], axis=1)
    return logits, Cache(k=k[None, :, :, None, None], v=cache.v, length=length)


@pytest.mark.parametrize(
    "slots,requests,drain,bar",
    [
        (16, 128, None, 0.9),
        (16, 128, (), 0.85),
        pytest.param(8, 64, None, 0.9, marks=SLOW),
        pytest.param(16, 256, (8, 4), 0.95, marks=SLOW),
    ],
)
def test_refill_keeps_the_slots_busy(slots, requests, drain, bar):
    """Answers of 8 to 512 tokens, uniformly: the bar of 85 % and what a plain batch would reach."""
    lengths = np.random.default_rng(0).integers(8, 513, requests)
    prompts = np.stack([lengths // 32, lengths % 32], axis=1).astype(np.int32)
    cache = Cache(k=jnp.zeros((1, slots, 513, 1, 1)), v=jnp.zeros((1, slots, 513, 1, 1)), length=jnp.zeros(slots, jnp.int32))

    @jit
    def go(key):
        return sampling.generate_many(
            counting,
            {},
            key,
            cache,
            prompts,
            np.full(requests, 2, np.int32),
            sampling=SamplingParams(),
            max_new_tokens=512,
            stop_tokens=[0],
            drain_slots=drain,
        )

    generation, info = jax.device_get(go(jax.random.key(0)))
    np.testing.assert_array_equal(generation.num_tokens, lengths)
    assert generation.finished.all()
    assert info.busy_steps == np.sum(lengths - 1)
    assert info.utilisation == pytest.approx(info.busy_steps / info.slot_steps)
    assert info.slot_steps <= slots * info.num_steps
    assert info.utilisation >= bar
    plain = np.sum(lengths - 1) / sum(slots * (max(lengths[i : i + slots]) - 1) for i in range(0, requests, slots))
    assert plain < 0.65
    print(
        f"slots {slots}, requests {requests}, drain {drain}: utilisation {info.utilisation:.3f} in {info.num_steps} steps; plain {plain:.3f}"
    )


def test_refill_holds_no_second_cache():
    """The temporaries of the refill loop: one copy of the cache that came in and little else (1.16 of its size when written)."""
    cache = cache_of(32, 4096)

    def go(key, cache):
        tokens, num_tokens = jnp.ones((64, 8), jnp.int32), jnp.full(64, 8)
        return sampling.generate_many(toy, PARAMS, key, cache, tokens, num_tokens, sampling=HOT, max_new_tokens=16)

    compiled = jax.jit(go).lower(jax.random.key(0), cache).compile()
    size = cache.k.nbytes + cache.v.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * size


# --- errors ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how,name", [(sampling.generate, "sampling.init"), (sampling.generate_many, "sampling.generate_many")])
def test_errors(how, name):
    def go(cache=None, prompts=None, num_tokens=None, **options):
        cache = cache_of(8, 16) if cache is None else cache
        tokens, lengths = padded(PROMPTS)
        tokens, lengths = tokens if prompts is None else prompts, lengths if num_tokens is None else num_tokens
        options = {"sampling": HOT, "max_new_tokens": MAX_NEW, **options}
        how(toy, PARAMS, jax.random.key(0), cache, tokens, lengths, **options)

    fails = lambda match: pytest.raises(ValueError, match=match)  # noqa: E731
    with fails(f"{name}: 'prompts' are 5 tokens long, but 'cache' has 4 positions per row"):
        go(cache_of(8, 4))
    with fails(f"{name}: 'cache' has 15 positions per row, expected at least 16: prompts of 5 tokens and 'max_new_tokens'=12"):
        go(cache_of(8, 15))
    with fails(f"{name}: 'max_new_tokens' is 0, expected at least 1"):
        go(max_new_tokens=0)
    with fails(f"{name}: 'num_tokens' is 0 in row 2, expected 1 to 5: a prompt cannot be empty"):
        go(num_tokens=np.array([1, 2, 0, 4, 5, 1, 1, 1]))
    with fails(f"{name}: 'num_tokens' is 6 in row 0"):
        go(num_tokens=np.full(8, 6))
    with fails(f"{name}: 'prompts' has shape \\(5,\\), expected \\[b t\\]"):
        go(prompts=np.ones(5, np.int32))
    with fails(f"{name}: 'prompts' has shape \\(8, 0\\), expected at least one prompt of one token"):
        go(prompts=np.ones((8, 0), np.int32))
    with fails(f"{name}: 'num_tokens' has shape \\(7,\\), expected \\[b\\] with b=8 from 'prompts'"):
        go(num_tokens=np.ones(7, np.int32))
    with fails(f"{name}: 'stop_tokens' has shape \\(\\), expected \\[s\\]"):
        go(stop_tokens=3)
    with fails(f"{name}: 'stop_sequences' has shape \\(2,\\), expected \\[q w\\]"):
        go(stop_sequences=np.array([1, 2]))
    with fails(f"{name}: 'request_ids' has shape \\(3,\\), expected \\[8\\]"):
        go(request_ids=[1, 2, 3])
    with fails("'cache.v' has shape"):
        go(cache_of(8, 16)._replace(v=jnp.zeros((1, 8, 15, 1, 1))))


def test_errors_of_one_function():
    tokens, num_tokens = padded(PROMPTS)
    many = functools.partial(
        sampling.generate_many, toy, PARAMS, jax.random.key(0), cache_of(4, 16), tokens, num_tokens, sampling=HOT, max_new_tokens=MAX_NEW
    )
    one = functools.partial(sampling.generate, toy, PARAMS, jax.random.key(0), sampling=HOT, max_new_tokens=MAX_NEW)
    with pytest.raises(ValueError, match=r"sampling.generate_many: 'refill_at' is 5, expected 1 to 4, the cache's rows"):
        many(refill_at=5)
    with pytest.raises(ValueError, match=r"sampling.generate_many: 'drain_slots' is \(2, 3\), expected falling sizes"):
        many(drain_slots=(2, 3))
    with pytest.raises(ValueError, match=r"sampling.generate_many: 'prefix' has 2 rows, expected 1"):
        many(prefix=cache_of(2, 3))
    with pytest.raises(ValueError, match=r"sampling.init: 'cache' has 4 rows, expected 8"):
        one(cache_of(4, 16), tokens, num_tokens)
    with pytest.raises(ValueError, match=r"sampling.init: 'num_samples' is 0, expected at least 1"):
        one(cache_of(8, 16), tokens, num_tokens, num_samples=0)
    with pytest.raises(ValueError, match=r"sampling.init: 'prefix' has 3 rows, expected a divisor of the cache's 8"):
        one(cache_of(8, 16), tokens, num_tokens, prefix=cache_of(3, 4))
    with pytest.raises(ValueError, match=r"sampling.init: decode_fn returned cache.k as bfloat16\[1, 8, 16, 1, 8\], expected float32"):
        halved = lambda *args, **kwargs: (lambda y, c: (y, c._replace(k=c.k.astype(jnp.bfloat16))))(*toy(*args, **kwargs))  # noqa: E731
        sampling.init(halved, PARAMS, jax.random.key(0), cache_of(8, 16), tokens, num_tokens, sampling=HOT, max_new_tokens=MAX_NEW)
    with pytest.raises(ValueError, match=r"sampling.branch: 'num_branches' is 0"):
        sampling.branch(cache_of(2, 3), num_branches=0, capacity=1)
    with pytest.raises(ValueError, match=r"sampling.truncate: 'logits' has shape \(2, 3\), expected \[v\]"):
        sampling.truncate(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"sampling.truncate: 'top_p' has shape \(2,\), expected \[\]"):
        sampling.truncate(jnp.zeros(3), top_p=jnp.ones(2))
    with pytest.raises(ValueError, match=r"sampling.stop_strings: 'strings' is"):
        sampling.stop_strings(to_text, ["a", ""])
