"""Token log-probabilities, entropy and top-k of logits against float64 NumPy, and what -inf must not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from reference import logprobs as reference

from janax.jaxlib_ext import logprobs


def problem(n=7, v=11, seed=0, forbid=True):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(n, v))
    if forbid:
        logits[:, 4] = -np.inf
    tokens = rng.integers(0, v, n)
    tokens[tokens == 4] = 5
    return logits, tokens


def test_against_numpy(x64, strict):
    logits, tokens = problem()
    chosen, entropy, normalizer, p = reference.statistics(logits, tokens)
    np.testing.assert_allclose(logprobs.token_log_probs(logits, tokens), chosen, rtol=1e-14)
    np.testing.assert_allclose(logprobs.entropy(logits), entropy, rtol=1e-13)
    np.testing.assert_allclose(logprobs.log_normalizer(logits), normalizer, rtol=1e-14)
    best = jax.jit(logprobs.top_k, static_argnums=1)(logits, 3)
    order = reference.top_k(logits, 3)
    np.testing.assert_array_equal(best.tokens, order)
    np.testing.assert_allclose(np.exp(best.log_probs), np.take_along_axis(p, order, axis=1), rtol=1e-13)


def test_values_by_hand():
    logits = np.log(np.array([0.5, 0.25, 0.25, 0.0], np.float32), where=np.array([1, 1, 1, 0], bool), out=np.full(4, -np.inf, np.float32))
    np.testing.assert_allclose(logprobs.token_log_probs(logits + 7, np.int32(1)), np.log(0.25), rtol=1e-6)
    np.testing.assert_allclose(logprobs.entropy(logits - 3), 1.5 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(logprobs.entropy(np.zeros(8, np.float32)), np.log(8), rtol=1e-6)
    np.testing.assert_array_equal(logprobs.top_k(logits, 4).tokens, [0, 1, 2, 3])  # equal ones: the lower id first
    assert logprobs.token_log_probs(logits, 3) == -np.inf


@pytest.mark.parametrize("forbid", [False, True])
def test_gradients(forbid, x64):
    logits, tokens = problem(forbid=forbid)
    c = np.random.default_rng(1).normal(size=len(tokens))
    _, entropy, _, p = reference.statistics(logits, tokens)
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(c * logprobs.token_log_probs(z, tokens))))(logits)
    np.testing.assert_allclose(gradient, c[:, None] * (np.eye(logits.shape[1])[tokens] - p), atol=1e-14)
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(c * logprobs.entropy(z))))(logits)
    log_p = np.log(np.where(p > 0, p, 1))
    np.testing.assert_allclose(gradient, -c[:, None] * p * (log_p + entropy[:, None]), atol=1e-14)
    if not forbid:
        both = jax.jit(lambda z: (logprobs.token_log_probs(z, tokens), logprobs.entropy(z)))
        check_grads(both, (logits,), order=2, modes=("rev", "fwd"))


def test_nothing_allowed_and_ids_outside():
    nothing = np.full((2, 3), -np.inf, np.float32)
    assert np.all(logprobs.token_log_probs(nothing, np.array([0, 2])) == -np.inf)
    np.testing.assert_array_equal(logprobs.entropy(nothing), [0, 0])
    for function in (lambda z: jnp.sum(logprobs.entropy(z)), lambda z: jnp.sum(jnp.where(jnp.isinf(logprobs.log_normalizer(z)), 0.0, 1.0))):
        np.testing.assert_array_equal(jax.jit(jax.grad(function))(nothing), np.zeros((2, 3)))
    logits, _ = problem(n=3)
    outside = np.array([-1, 11, -100])
    np.testing.assert_array_equal(logprobs.token_log_probs(logits, outside), [-np.inf] * 3)
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(logprobs.token_log_probs(z, outside))))(logits)
    np.testing.assert_array_equal(gradient, np.zeros_like(logits))


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, 0.0, -1e4], [-3e38, -3e38, -3e38]], np.float32)
    np.testing.assert_allclose(logprobs.token_log_probs(logits, np.array([1, 2])), [-1e4, -np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(logprobs.entropy(logits), [0, np.log(3)], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_shapes_jit_and_vmap(dtype, strict):
    logits, tokens = problem(n=6)
    logits = jnp.asarray(logits, dtype).reshape(2, 3, 11)
    tokens = tokens.reshape(2, 3).astype(np.uint8)
    expected = reference.statistics(np.asarray(logits, np.float64).reshape(6, 11), tokens.ravel())
    for transform in (lambda f: f, jax.jit, lambda f: jax.jit(jax.vmap(jax.vmap(f)))):
        out = transform(logprobs.token_log_probs)(logits, tokens)
        assert out.dtype == jnp.float32 and out.shape == (2, 3)
        np.testing.assert_allclose(np.ravel(out), expected[0], rtol=1e-5)
        np.testing.assert_allclose(np.ravel(transform(logprobs.entropy)(logits)), expected[1], rtol=1e-5)
    assert logprobs.top_k(logits, 2).log_probs.dtype == jnp.float32


def test_sharded_vocabulary(mesh):
    logits, tokens = problem(n=8, v=16)
    expected = reference.statistics(logits, tokens)
    logits, tokens = logits.astype(np.float32), tokens.astype(np.int32)
    c = np.arange(8, dtype=np.float32)
    if mesh is not None:
        logits = jax.device_put(logits, jax.NamedSharding(mesh, jax.P("data", "model")))
        tokens, c = (jax.device_put(x, jax.NamedSharding(mesh, jax.P("data"))) for x in (tokens, c))
    both = jax.jit(lambda z, tokens: (logprobs.token_log_probs(z, tokens), logprobs.entropy(z)))
    chosen, entropy = both(logits, tokens)
    np.testing.assert_allclose(chosen, expected[0], rtol=1e-5)
    np.testing.assert_allclose(entropy, expected[1], rtol=1e-5)
    assert "all-gather" not in both.lower(logits, tokens).compile().as_text()
    gradient = jax.jit(jax.grad(lambda z, tokens, c: jnp.sum(c * logprobs.token_log_probs(z, tokens))))(logits, tokens, c)
    np.testing.assert_allclose(gradient, np.arange(8)[:, None] * (np.eye(16)[np.asarray(tokens)] - expected[3]), atol=1e-5)


def test_messages():
    logits, tokens = problem()
    with pytest.raises(
        ValueError, match=r"token_log_probs: 'tokens' has shape \(6,\), expected \[\.\.\.\] with \.\.\.=\(7,\) from 'logits'"
    ):
        logprobs.token_log_probs(logits, tokens[:6])
    with pytest.raises(ValueError, match="token_log_probs: 'tokens' has dtype float32, expected integers"):
        logprobs.token_log_probs(logits, tokens.astype(np.float32))
    with pytest.raises(ValueError, match="top_k: 'k' is 12, expected 1 to v=11"):
        logprobs.top_k(logits, 12)
    with pytest.raises(ValueError, match=r"entropy: 'logits' has shape \(\), expected \[\.\.\. v\]"):
        logprobs.entropy(np.float32(1))
