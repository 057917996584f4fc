"""Fused log-probabilities: values and gradients of float64 NumPy, on meshes, in little memory."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from reference import logprobs as reference

from janax.jaxlib_ext import fused, masking, sharding
from janax.jaxlib_ext.fused import parts

KINDS = ["token_log_probs", "keep_expectation", "entropy", "logsumexp", "weighted_nll"]


def problem(n=13, d=6, v=300, dtype=np.float64, forbid=(3, 77)):
    """v = 300 gives 4 groups of 75, so that windows repeat entries; two tokens are forbidden."""
    rng = np.random.default_rng(n + v)
    h, w, bias, c = rng.normal(size=(n, d)), rng.normal(size=(d, v)), rng.normal(size=v), rng.normal(size=n)
    bias[list(forbid)] = -np.inf
    tokens = rng.integers(0, v, n)
    tokens[np.isin(tokens, forbid)] = 5
    return h.astype(dtype), w.astype(dtype), bias.astype(dtype), tokens.astype(np.int32), c.astype(dtype)


def loss(kind, **static):
    """sum_n c_n f_n of one of the outputs, as a function of (h, w, bias, temperature, c, tokens)."""

    def value(h, w, bias, temperature, c, tokens):
        options = {"bias": bias, "temperature": temperature} | static
        if kind == "weighted_nll":
            return -fused.weighted_nll(h, w, tokens, c, **options)
        if kind in ("entropy", "logsumexp"):
            return jnp.sum(c * getattr(fused.statistics(h, w, tokens, **options), kind))
        return masking.masked_sum(fused.token_log_probs(h, w, tokens, keep_expectation=kind == "keep_expectation", **options), c)

    return value


def expected(kind, h, w, bias, temperature, c, tokens, softcap=None):
    options = {"bias": bias, "softcap": softcap, "temperature": temperature}
    chosen, entropy, normalizer = reference.naive(h, w, tokens, **options)
    to = {"entropy": (0, c, 0), "logsumexp": (0, 0, c)}.get(kind, (c, 0, 0))
    per_token = {"entropy": entropy, "logsumexp": normalizer}.get(kind, chosen)
    return np.sum(c * per_token), (*reference.gradients(h, w, tokens, *to, **options), per_token)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("softcap", "temperature", "vocab_chunk", "token_chunk"),
    [(None, 1.0, None, None), (2.0, 0.7, 64, None), (None, 1.3, 7, 4), (5.0, 1.0, 299, 100)],
)
def test_values_and_gradients(kind, softcap, temperature, vocab_chunk, token_chunk, x64, strict):
    h, w, bias, tokens, c = problem()
    value = loss(kind, softcap=softcap, vocab_chunk=vocab_chunk, token_chunk=token_chunk)
    got = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3, 4)))(h, w, bias, temperature, c, tokens)
    total, gradients = expected(kind, h, w, bias, temperature, c, tokens, softcap)
    np.testing.assert_allclose(got[0], total, rtol=1e-12)
    np.testing.assert_allclose(value(h, w, bias, temperature, c, tokens), total, rtol=1e-12)  # not differentiated: another path
    for ours, theirs in zip(got[1], gradients):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_transposed(kind, vocab_chunk, x64, strict):
    """The same numbers from w as embeddings are stored."""
    h, w, bias, tokens, c = problem()
    plain, turned = (loss(kind, softcap=3.0, vocab_chunk=vocab_chunk, transposed=transposed) for transposed in (False, True))
    got = jax.jit(jax.value_and_grad(turned, argnums=(0, 1, 2, 3, 4)))(h, w.T, bias, 0.7, c, tokens)
    wanted = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2, 3, 4)))(h, w, bias, 0.7, c, tokens)
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-12)
    for i, (ours, theirs) in enumerate(zip(got[1], wanted[1])):
        np.testing.assert_allclose(ours.T if i == 1 else ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences(kind, x64):
    h, w, bias, tokens, c = problem(n=3, d=2, v=9, forbid=())
    value = functools.partial(loss(kind, softcap=3.0, vocab_chunk=4, token_chunk=2), tokens=tokens)
    check_grads(value, (h, w, bias, 0.8, c), order=1, modes=("rev",), rtol=1e-6)


@pytest.mark.parametrize(("n", "tokens_at_once"), [(1, 1), (5, 1), (5, 3), (5, 10**6)])
@pytest.mark.parametrize(("v", "chunk"), [(1, 1), (2, 1), (17, 1), (17, 5), (301, 130), (2080, 130), (2080, 700)])
def test_all_shapes(n, v, chunk, tokens_at_once):
    """The chunks cover every token of every vocabulary once, whatever divides what."""
    for size, target, groups, multiple in ((v, min(chunk, v), 16, 128), (n, min(tokens_at_once, n), 256, 1)):
        chunks = parts.Chunks.of(size, target, groups, multiple)
        seen = np.concatenate([np.asarray(chunks.ids(i))[np.asarray(chunks.fresh(i))] for i in range(chunks.count)])
        np.testing.assert_array_equal(np.sort(seen), np.arange(size))
    h, w, bias, tokens, _ = problem(n=n, v=v, d=2, dtype=np.float32, forbid=())
    got = jax.jit(functools.partial(fused.token_log_probs, vocab_chunk=chunk, token_chunk=tokens_at_once))(h, w, tokens, bias=bias)
    np.testing.assert_allclose(got, reference.naive(h, w, tokens, bias=bias)[0], atol=2e-6)


def test_leading_axes_vmap_and_one_vector(x64):
    h, w, bias, tokens, _ = problem(n=12)
    plain = fused.token_log_probs(h, w, tokens, bias=bias)
    np.testing.assert_allclose(
        fused.token_log_probs(h.reshape(3, 4, 6), w, tokens.reshape(3, 4), bias=bias), plain.reshape(3, 4), rtol=1e-12
    )
    np.testing.assert_allclose(fused.token_log_probs(h[0], w, tokens[0], bias=bias), plain[0], rtol=1e-12)
    assert fused.token_log_probs(h[:0], w, tokens[:0]).shape == (0,)
    one = lambda h, tokens: jax.grad(lambda w: jnp.sum(fused.token_log_probs(h, w, tokens, vocab_chunk=64)))(w)  # noqa: E731
    batched = jax.vmap(one)(h.reshape(3, 4, 6), tokens.reshape(3, 4))
    np.testing.assert_allclose(batched[1], one(h[4:8], tokens[4:8]), rtol=1e-10, atol=1e-12)
    sweep = jax.vmap(lambda t: fused.weighted_nll(h, w, tokens, np.ones(12), temperature=t))(jnp.array([0.5, 2.0]))
    np.testing.assert_allclose(sweep[1], fused.weighted_nll(h, w, tokens, np.ones(12), temperature=2.0), rtol=1e-12)


@pytest.mark.parametrize("kind", ["token_log_probs", "keep_expectation", "weighted_nll"])
def test_bfloat16(kind):
    h, w, _, tokens, c = problem(n=32, d=16, v=512, dtype=np.float32, forbid=())
    h, w = jnp.asarray(h, jnp.bfloat16), jnp.asarray(w / 4, jnp.bfloat16)
    value = loss(kind, vocab_chunk=128)
    total, gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(h, w, None, 1.0, c, tokens)
    wide = [np.asarray(x, np.float64) for x in (h, w)]
    log_probs = fused.token_log_probs(h, w, tokens)
    assert log_probs.dtype == jnp.float32 and total.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, reference.naive(*wide, tokens)[0], rtol=1e-5, atol=1e-5)  # products of bf16 are exact in float32
    for ours, theirs, like in zip(gradients, reference.gradients(*wide, tokens, c), (h, w)):
        assert ours.dtype == like.dtype
        assert np.linalg.norm(np.asarray(ours, np.float64) - theirs) < 2**-7 * np.linalg.norm(theirs)
    assert jax.eval_shape(value, h, w.astype(jnp.float32), None, 1.0, c, tokens).dtype == jnp.float32


@pytest.mark.parametrize("kind", ["token_log_probs", "keep_expectation", "weighted_nll"])
def test_impossible_tokens(kind):
    """-inf for forbidden tokens and ids outside; under a weight of 0 they leave value and gradients alone."""
    h, w, bias, tokens, c = problem(dtype=np.float32)
    odd = tokens.copy()
    odd[[1, 4, 7]] = [3, -100, 300]  # forbidden, padding, past the end
    np.testing.assert_array_equal(np.isneginf(fused.token_log_probs(h, w, odd, bias=bias)), np.isin(np.arange(13), (1, 4, 7)))
    value = jax.jit(jax.value_and_grad(loss(kind, vocab_chunk=64), argnums=(0, 1, 2)))
    silent = np.where(np.isin(np.arange(13), (1, 4, 7)), 0, c).astype(np.float32)
    chex.assert_trees_all_close(value(h, w, bias, 1.0, silent, odd), value(h, w, bias, 1.0, silent, tokens), rtol=1e-6, atol=1e-6)
    total, gradients = value(h, w, bias, 1.0, np.ones(13, np.float32), odd)
    assert total == -np.inf
    assert all(np.all(np.isfinite(x)) for x in gradients)


def test_everything_forbidden():
    h, w, _, tokens, c = problem(dtype=np.float32)
    bias = np.full(300, -np.inf, np.float32)
    out = fused.statistics(h, w, tokens, bias=bias, softcap=2.0)
    assert np.all(np.isneginf(out.log_probs)) and np.all(np.isneginf(out.logsumexp)) and np.all(out.entropy == 0)
    for kind in ("token_log_probs", "entropy", "weighted_nll"):
        gradients = jax.jit(jax.grad(loss(kind), argnums=(0, 1)))(h, w, bias, 1.0, c, tokens)
        assert all(np.all(x == 0) for x in gradients)


def test_large_logits():
    h, w, _, tokens, _ = problem(dtype=np.float32)
    out = fused.statistics(1e4 * h, w, tokens)
    chosen, entropy, normalizer = reference.naive(1e4 * h, w, tokens)
    np.testing.assert_allclose(out.log_probs, chosen, rtol=1e-5, atol=0.05)  # logits of 1e5 are known to 0.01
    np.testing.assert_allclose(out.logsumexp, normalizer, rtol=1e-6)
    assert np.all(np.abs(out.entropy - entropy) < 0.05)


@pytest.mark.parametrize(("k", "chunk", "tokens_at_once"), [(1, None, None), (9, 64, None), (40, 7, 4), (300, 50, None)])
def test_top_k(k, chunk, tokens_at_once, x64):
    h, w, bias, _, _ = problem(forbid=())
    best = jax.jit(functools.partial(fused.top_k, k=k, vocab_chunk=chunk, token_chunk=tokens_at_once, softcap=4.0))(h, w, bias=bias)
    logits = reference.logits_of(h, w, bias, 4.0)[0]
    order = reference.top_k(logits, k)
    np.testing.assert_array_equal(best.tokens, order)
    normalizer = np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    np.testing.assert_allclose(best.log_probs, np.take_along_axis(logits, order, axis=1) - normalizer, rtol=1e-10)
    np.testing.assert_allclose(fused.token_log_probs(h, w, best.tokens[:, 0], bias=bias, softcap=4.0), best.log_probs[:, 0], rtol=1e-10)


def test_top_k_of_equal_and_of_forbidden_tokens():
    best = fused.top_k(np.ones((2, 3, 4), np.float32), np.zeros((4, 320), np.float32), 5, vocab_chunk=32)
    np.testing.assert_array_equal(best.tokens, np.broadcast_to(np.arange(5), (2, 3, 5)))
    np.testing.assert_allclose(best.log_probs, -math.log(320), rtol=1e-6)
    bias = np.where(np.arange(320) % 100 == 7, 0, -np.inf).astype(np.float32)
    best = fused.top_k(np.ones((1, 4), np.float32), np.zeros((4, 320), np.float32), 5, bias=bias, vocab_chunk=32)
    np.testing.assert_array_equal(best.tokens[0, :4], [7, 107, 207, 307])
    np.testing.assert_allclose(best.log_probs[0], [-math.log(4)] * 4 + [-np.inf], rtol=1e-6)


# --- memory


def arrays_of(jaxpr):
    """Shapes of everything a jaxpr computes, loops and branches included."""
    for equation in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in equation.outvars)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from arrays_of(inner)


@pytest.mark.parametrize("kind", ["token_log_probs", "keep_expectation", "entropy", "weighted_nll"])
def test_no_array_of_tokens_by_vocabulary(kind):
    n, d, v = 2048, 64, 32768
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tokens = jax.ShapeDtypeStruct((n,), jnp.int32)

    def plain(h, w, c, tokens):
        logits = h @ w
        return jnp.sum(c * (jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, axis=1)))

    ours = jax.value_and_grad(lambda h, w, c, tokens: loss(kind)(h, w, None, 1.0, c, tokens), argnums=(0, 1))
    theirs = jax.value_and_grad(plain, argnums=(0, 1))
    arguments = (shape((n, d)), shape((d, v)), shape((n,)), tokens)
    size = lambda f: jax.jit(f).lower(*arguments).compile().memory_analysis().temp_size_in_bytes  # noqa: E731
    assert size(theirs) >= 4 * n * v  # the measure sees the logits
    assert size(ours) <= 0.1 * size(theirs)
    largest = max(math.prod(s) for s in arrays_of(jax.make_jaxpr(ours)(*arguments).jaxpr))
    assert max(math.prod(s) for s in arrays_of(jax.make_jaxpr(theirs)(*arguments).jaxpr)) >= n * v
    assert largest <= n * v // 8


def test_what_is_not_needed_is_not_computed():
    """Products in the compiled value and gradient: with `w` frozen, and with the expectation kept, some fall away."""
    h, w, _, tokens, c = problem(n=64, d=16, v=4096, dtype=np.float32, forbid=())

    def products(kind, argnums):
        f = jax.jit(jax.value_and_grad(loss(kind, vocab_chunk=512), argnums)).lower(h, w, None, 1.0, c, tokens).compile()
        return len(re.findall(r" dot\(", f.as_text()))

    assert products("token_log_probs", (0, 1)) == 4
    assert products("token_log_probs", (0,)) == 3
    assert products("keep_expectation", (0, 1)) == 4
    assert products("keep_expectation", (0,)) == 2
    assert products("weighted_nll", (0, 1)) == 3


# --- meshes


def mesh_problem():
    h, w, bias, tokens, c = problem(n=32, d=8, v=4096, dtype=np.float32)
    tokens[[2, 9]] = [3, -1]
    c[[2, 9]] = 0
    return h.reshape(8, 4, 8), w / 2, bias, np.float32(0.8), c.reshape(8, 4), tokens.reshape(8, 4)


SPECS = (jax.P("data"), jax.P(None, "model"), jax.P("model"), jax.P(), jax.P("data"), jax.P("data"))
DIFFERENTIATED = (0, 1, 2, 3, 4)


def unsharded(f, *arrays):
    with jax.default_device(jax.devices()[0]):
        return jax.device_get(jax.jit(f)(*arrays))


@functools.cache
def expected_on_meshes(kind):
    h, w, bias, temperature, c, tokens = mesh_problem()
    seen = c.ravel() != 0
    flat = (h.reshape(-1, 8)[seen], w, bias, float(temperature), c.ravel()[seen], tokens.ravel()[seen])
    total, (to_h, to_w, to_bias, to_temperature, _) = expected(kind, *flat, softcap=6.0)
    full = np.zeros((32, 8))
    full[seen] = to_h
    return total, (full.reshape(8, 4, 8), to_w, to_bias, to_temperature)


def collectives(compiled):
    return re.findall(
        r"= (\(?[^=]*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", compiled.as_text()
    )


def check_on_mesh(kind, got):
    total, gradients = expected_on_meshes(kind)
    np.testing.assert_allclose(got[0], total, rtol=1e-5)
    for ours, theirs in zip(got[1], gradients):
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=2e-4, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["token_log_probs", "keep_expectation", "weighted_nll"])
def test_sharded_under_jit(kind, transposed, mesh):
    arrays, specs = list(mesh_problem()), list(SPECS)
    static = {"softcap": 6.0, "vocab_chunk": 512, "token_chunk": 10 if kind == "weighted_nll" else None, "transposed": transposed}
    if transposed:
        arrays[1], specs[1] = arrays[1].T, jax.P("model", None)
    f = jax.value_and_grad(loss(kind, **static), argnums=DIFFERENTIATED[:4])

    def check(got):
        total, (to_h, to_w, *rest) = got
        check_on_mesh(kind, (total, (to_h, to_w.T if transposed else to_w, *rest)))

    if mesh is None:
        check(jax.jit(f)(*arrays))
        return
    arrays = tuple(jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs))
    compiled = jax.jit(f, out_shardings=(None, tuple(jax.NamedSharding(mesh, s) for s in specs[:4]))).lower(*arrays).compile()
    check(compiled(*arrays))
    assert {name for _, name in collectives(compiled)} == {"all-reduce"}  # nothing is gathered, least of all `w`


@pytest.mark.parametrize("kind", ["token_log_probs", "keep_expectation", "weighted_nll"])
@pytest.mark.parametrize("inside", [True, False])
def test_shard_map(kind, inside):
    """The gradient taken inside or outside `shard_map`; the loops do not communicate, and what is summed is summed once."""
    built = sharding.make_mesh({"data": 4, "model": 2})
    static = {"softcap": 6.0, "vocab_chunk": 500, "axis_name": "model"}
    local = lambda *x: jax.lax.psum(loss(kind, **static)(*x), "data")  # noqa: E731
    if inside:
        f = jax.shard_map(
            jax.value_and_grad(local, DIFFERENTIATED),
            mesh=built,
            in_specs=SPECS,
            out_specs=(jax.P(), tuple(SPECS[i] for i in DIFFERENTIATED)),
        )
    else:
        f = jax.value_and_grad(jax.shard_map(local, mesh=built, in_specs=SPECS, out_specs=jax.P()), DIFFERENTIATED)
    compiled = jax.jit(f).lower(*mesh_problem()).compile()
    got = compiled(*mesh_problem())
    check_on_mesh(kind, (got[0], got[1][:4]))
    log_probs = unsharded(lambda h, w, b, t, c, y: fused.token_log_probs(h, w, y, bias=b, softcap=6.0, temperature=t), *mesh_problem())
    np.testing.assert_allclose(got[1][4], np.where(np.isinf(log_probs), 0, log_probs), rtol=1e-4)
    found = collectives(compiled)
    assert {name for _, name in found} == {"all-reduce"}
    assert sum("f32[8,8]" in shape or "f32[32,8]" in shape or "f32[2,4,8]" in shape for shape, _ in found) == 1  # the gradient of h
    assert sum("f32[8,2048]" in shape for shape, _ in found) == 1  # and that of this device's part of w


def test_statistics_and_top_k_in_shard_map():
    built = sharding.make_mesh({"data": 4, "model": 2})
    h, w, bias, _, _, tokens = mesh_problem()

    def both(axis_name, h, w, bias, tokens):
        options = {"bias": bias, "vocab_chunk": 500, "axis_name": axis_name}
        return fused.statistics(h, w, tokens, **options), fused.top_k(h, w, 6, token_chunk=3, **options)

    specs = (SPECS[0], SPECS[1], SPECS[2], SPECS[5])
    sharded = jax.jit(jax.shard_map(functools.partial(both, "model"), mesh=built, in_specs=specs, out_specs=jax.P("data")))
    chex.assert_trees_all_close(
        jax.device_get(sharded(h, w, bias, tokens)), unsharded(functools.partial(both, None), h, w, bias, tokens), rtol=1e-5, atol=1e-5
    )


def test_top_k_under_jit(mesh):
    h, w, bias, _, _, _ = mesh_problem()
    plain = unsharded(lambda h, w, b: fused.top_k(h, w, 6, bias=b, vocab_chunk=512), h, w, bias)
    if mesh is not None:
        h, w, bias = (jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip((h, w, bias), SPECS))
    f = jax.jit(lambda h, w, b: fused.top_k(h, w, 6, bias=b, vocab_chunk=512))
    chex.assert_trees_all_close(jax.device_get(f(h, w, bias)), plain, rtol=1e-5)
    assert not any("[8,4096" in shape or "[8,16,256" in shape for shape, _ in collectives(f.lower(h, w, bias).compile()))  # `w`, whole


# --- interface


def test_traced_once():
    h, w, _, tokens, c = problem(dtype=np.float32)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(w, temperature):
        return jax.grad(lambda w: fused.weighted_nll(h, w, tokens, c, temperature=temperature))(w)

    for i in range(3):
        run(w * i, 1.0 + i)


def test_messages():
    h, w, bias, tokens, c = problem(dtype=np.float32)
    cases = [
        (
            lambda: fused.token_log_probs(h[:, :5], w, tokens),
            r"token_log_probs: 'w' has shape \(6, 300\), expected \[d v\] with d=5 from 'h'",
        ),
        (lambda: fused.token_log_probs(h, w, tokens[:4]), r"token_log_probs: 'tokens' has shape \(4,\), expected \[\.\.\.\] with"),
        (lambda: fused.token_log_probs(h, w, c), "token_log_probs: 'tokens' has dtype float32, expected integers"),
        (lambda: fused.statistics(h, w, tokens, bias=bias[:7]), r"statistics: 'bias' has shape \(7,\), expected \[v\] with v=300 from 'w'"),
        (lambda: fused.statistics(h, w, tokens, softcap=0.0), "statistics: 'softcap' is 0.0, expected a positive number or None"),
        (lambda: fused.statistics(h, w, tokens, vocab_chunk=0), "statistics: 'vocab_chunk' is 0, expected at least 1"),
        (lambda: fused.weighted_nll(h, w, tokens, c[:3]), r"weighted_nll: 'weights' has shape \(3,\)"),
        (lambda: fused.weighted_nll(h, w[:, :0], tokens, c), r"weighted_nll: 'w' has shape \(6, 0\), expected at least one token"),
        (lambda: fused.top_k(h, w, 301), "top_k: 'k' is 301, expected 1 to v=300"),
        (lambda: fused.top_k(h.astype(int), w, 3), "top_k: 'h' and 'w' have dtypes int32 and float32, expected floating-point arrays"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    built = sharding.make_mesh({"model": 2}, jax.devices()[:2])
    untracked = jax.shard_map(
        lambda h, w, y: fused.token_log_probs(h, w, y, axis_name="model"),
        mesh=built,
        in_specs=(jax.P(), jax.P(None, "model"), jax.P()),
        out_specs=jax.P(),
        check_vma=False,
    )
    with pytest.raises(ValueError, match=r"'axis_name' is 'model', expected an axis of a surrounding jax\.shard_map with check_vma=True"):
        untracked(h, w, tokens)
