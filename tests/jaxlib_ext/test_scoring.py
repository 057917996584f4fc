"""Scores of sequences: the shift by one, masks, segments, and ragged lists packed into rows, with a one-layer attention model."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import logprobs as reference

from janax.jaxlib_ext import scoring, sharding

VOCABULARY, WIDTH = 96, 16


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = {
        "embed": (VOCABULARY, WIDTH),
        "position": (256, WIDTH),
        "qk": (WIDTH, WIDTH),
        "value": (WIDTH, WIDTH),
        "head": (WIDTH, VOCABULARY),
    }
    return {name: rng.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()}


def hidden_fn(params, tokens, segment_ids=None, positions=None):
    """Causal attention within segments over token and position embeddings."""
    b, t = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(t)[None], (b, t)) if positions is None else positions
    segment_ids = jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids
    x = jnp.asarray(params["embed"])[tokens] + jnp.asarray(params["position"])[positions]
    seen = jnp.tril(jnp.ones((t, t), bool))[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
    attention = jax.nn.softmax(jnp.where(seen, jnp.einsum("bid,de,bje->bij", x, params["qk"], x), -1e30), axis=-1)
    return x + jnp.einsum("bij,bjd->bid", attention, x @ params["value"])


def unembed(params):
    return params["head"]


score_tokens = jax.jit(scoring.score_tokens, static_argnums=(0, 1), static_argnames=("num_segments", "max_scored"))
jitted_hidden_fn = jax.jit(hidden_fn)


def alone(params, tokens):
    """[t] float64 log P(tokens[t] | tokens[<t]) of one sequence, nan first; what follows it, so that one program does, is not seen."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    h = np.asarray(jitted_hidden_fn(params, padded))[0, : len(tokens)]
    log_probs = reference.naive(h[:-1], params["head"], np.asarray(tokens)[1:])[0] if len(tokens) > 1 else []
    return np.concatenate([[np.nan], log_probs])


def ragged(count=9, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda low, high: [rng.integers(0, VOCABULARY, rng.integers(low, high)) for _ in range(count)]  # noqa: E731
    return draw(1, 40), draw(0, 20)


def test_shift_mask_sum_and_mean(params):
    rng = np.random.default_rng(1)
    tokens, mask = rng.integers(0, VOCABULARY, (3, 12)), rng.integers(0, 2, (3, 12))
    mask[:, 0] = 1  # has nothing before it: does not count
    mask[2] = 0
    scores = score_tokens(hidden_fn, unembed, params, tokens, mask)
    for row in range(3):
        expected, counts = alone(params, tokens[row]), mask[row].astype(bool)
        counts[0] = False
        np.testing.assert_allclose(scores.per_token[row], np.where(counts, expected, 0), atol=1e-5)
        np.testing.assert_allclose(scores.sum[row], expected[counts].sum(), rtol=1e-5)
        assert scores.count[row] == counts.sum()
        np.testing.assert_allclose(scores.mean[row], expected[counts].mean() if counts.any() else 0.0, rtol=1e-5)
    assert scores.sum.dtype == jnp.float32 and scores.count.dtype == jnp.int32
    by_array = jax.jit(functools.partial(scoring.score_tokens, hidden_fn))(params["head"], params, tokens, mask.astype(bool))
    chex.assert_trees_all_equal(by_array, scores)


def test_a_later_token_does_not_matter(params):
    """An off-by-one in the shift would let a token see itself, or what follows it."""
    tokens, mask = np.arange(10)[None] % 7, np.ones((1, 10), np.int32)
    changed = tokens.copy()
    changed[0, 6] = 80
    a, b = (np.asarray(score_tokens(hidden_fn, unembed, params, x, mask).per_token[0]) for x in (tokens, changed))
    np.testing.assert_allclose(a[:6], b[:6], rtol=1e-6)
    assert np.all(np.abs(a[6:8] - b[6:8]) > 1e-4)


@pytest.mark.parametrize("row_length", [64, 128])
@pytest.mark.parametrize("project_few", [False, True])
def test_packed_pairs_score_as_if_alone(row_length, project_few, params):
    contexts, targets = ragged()
    packed = scoring.pack(contexts, targets, row_length)
    score = functools.partial(
        score_tokens,
        hidden_fn,
        unembed,
        num_segments=packed.num_segments,
        max_scored=packed.max_scored if project_few else None,
    )
    rows = score(params, packed.tokens, packed.mask, segment_ids=packed.segment_ids, positions=packed.positions)
    scores = scoring.unpack(packed, rows)
    for i, (context, target) in enumerate(zip(contexts, targets)):
        expected = alone(params, np.concatenate([context, target]))[len(context) :]
        np.testing.assert_allclose(scores.per_token[i, : len(target)], expected, atol=1e-4)
        assert np.all(scores.per_token[i, len(target) :] == 0)
        np.testing.assert_allclose(scores.sum[i], expected.sum(), atol=1e-4)
        np.testing.assert_allclose(scores.mean[i], expected.sum() / max(len(target), 1), atol=1e-4)
        assert scores.count[i] == len(target)
    np.testing.assert_allclose(np.sum(rows.sum), np.sum(rows.per_token), rtol=1e-5)


def test_max_scored_that_is_too_small_is_nan(params):
    tokens, mask = np.arange(24).reshape(2, 12), np.zeros((2, 12), np.int32)
    mask[0, 3:6], mask[1, 2:7] = 1, 1
    full = score_tokens(hidden_fn, unembed, params, tokens, mask)
    few = score_tokens(hidden_fn, unembed, params, tokens, mask, max_scored=3)
    np.testing.assert_allclose(few.per_token[0], full.per_token[0], rtol=1e-5)
    assert np.isnan(few.sum[1]) and np.isnan(few.mean[1])
    enough = score_tokens(hidden_fn, unembed, params, tokens, mask, max_scored=5)
    chex.assert_trees_all_close(enough, full, rtol=1e-5)


def test_packing():
    lengths = [50, 10, 30, 30, 64, 1]
    packed = scoring.pack([[1] * (n - n // 2) for n in lengths], [[2] * (n // 2) for n in lengths], 60, row_multiple=4)
    assert packed.tokens.shape == (4, 64)  # 64 | 50 + 10 + 1 | 30 + 30 | padding
    np.testing.assert_array_equal(packed.row, [1, 1, 2, 2, 0, 1])
    np.testing.assert_array_equal(packed.segment, [1, 2, 1, 2, 1, 3])
    np.testing.assert_array_equal(packed.start, [0, 50, 0, 30, 0, 60])
    np.testing.assert_array_equal(packed.mask.sum(axis=1), [32, 30, 30, 0])
    np.testing.assert_array_equal(packed.segment_ids[1], [1] * 50 + [2] * 10 + [3] + [0] * 3)
    np.testing.assert_array_equal(packed.positions[1], [*range(50), *range(10), 0, 0, 0, 0])
    np.testing.assert_array_equal(packed.tokens == 2, packed.mask == 1)
    assert packed.num_segments == 4 and packed.max_scored == 64
    assert scoring.pack([[1, 2]], [[3]], 1024).tokens.shape == (1, 64)
    shapes = {scoring.pack(*ragged(30, seed), 256, row_multiple=4).tokens.shape for seed in range(8)}
    assert shapes <= {(4, 256), (8, 256)}


def test_gradient_and_empty_mask(params):
    tokens = np.arange(20).reshape(2, 10)
    mask = np.zeros((2, 10), np.int32)
    mask[0, 4:] = 1
    mean = lambda params, mask: jnp.sum(scoring.score_tokens(hidden_fn, unembed, params, tokens, mask).mean)  # noqa: E731

    def plain(params, mask):
        log_p = jax.nn.log_softmax(hidden_fn(params, tokens) @ params["head"])[:, :-1]
        chosen = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=2)[..., 0]
        return jnp.sum(jnp.sum(chosen * mask[:, 1:], axis=1) / jnp.maximum(mask[:, 1:].sum(axis=1), 1))

    ours = jax.jit(jax.value_and_grad(mean))
    chex.assert_trees_all_close(ours(params, mask)[1], jax.jit(jax.grad(plain))(params, mask), rtol=1e-3, atol=1e-5)
    value, gradient = ours(params, np.zeros_like(mask))
    assert value == 0
    assert all(np.all(x == 0) for x in jax.tree.leaves(gradient))


def test_one_token_and_padding(params):
    scores = score_tokens(hidden_fn, unembed, params, np.array([[5]]), np.array([[1]]))
    assert scores.sum[0] == 0 and scores.mean[0] == 0 and scores.count[0] == 0
    padding = np.zeros((2, 8), np.int32)
    scores = score_tokens(hidden_fn, unembed, params, padding, padding + 1, segment_ids=padding, num_segments=2)
    assert scores.sum.shape == (2, 2) and np.all(scores.count == 0) and np.all(scores.per_token == 0)


def test_on_an_automatic_mesh(params):
    contexts, targets = ragged(12)
    packed = scoring.pack(contexts, targets, 64, row_multiple=4)
    score = functools.partial(scoring.score_tokens, hidden_fn, unembed, num_segments=packed.num_segments, max_scored=packed.max_scored - 1)
    options = {"segment_ids": packed.segment_ids, "positions": packed.positions}
    plain = jax.jit(score)(params, packed.tokens, packed.mask, **options)
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))  # noqa: E731
    placed = {name: place(x, jax.P(None, "model") if name == "head" else jax.P()) for name, x in params.items()}
    rows = [place(x, jax.P("data")) for x in (packed.tokens, packed.mask, packed.segment_ids, packed.positions)]
    sharded = jax.jit(score)(placed, rows[0], rows[1], segment_ids=rows[2], positions=rows[3])
    chex.assert_trees_all_close(jax.device_get(sharded), jax.device_get(plain), rtol=1e-4, atol=1e-4)


def test_messages(params):
    tokens = np.zeros((2, 8), np.int32)
    score = functools.partial(scoring.score_tokens, hidden_fn, unembed, params)
    cases = [
        (lambda: score(tokens, tokens[:1]), r"score_tokens: 'mask' has shape \(1, 8\), expected \[b t\] with b=2 from 'tokens'"),
        (
            lambda: score(tokens, tokens, num_segments=2),
            "score_tokens: 'num_segments' is given without 'segment_ids', expected both or neither",
        ),
        (lambda: score(tokens, tokens, segment_ids=tokens), "score_tokens: 'segment_ids' is given without 'num_segments'"),
        (lambda: score(tokens * 1.0, tokens), "score_tokens: 'tokens' has dtype float"),
        (lambda: score(tokens, tokens, max_scored=0), "score_tokens: 'max_scored' is 0, expected at least 1"),
        (lambda: scoring.pack([[1]], [], 64), "pack: 'contexts' has 1 entries and 'targets' 0, expected the same number, at least 1"),
        (lambda: scoring.pack([[1], []], [[1], [2]], 64), r"pack: 'contexts'\[1\] is empty, expected at least one token"),
        (lambda: scoring.pack([[1] * 60], [[1] * 5], 64), "pack: pair 0 has 65 tokens, expected at most 64, from 'row_length' = 64"),
        (
            lambda: scoring.pack([[1.5]], [[1]], 64),
            r"pack: 'contexts'\[0\] has shape \(1,\) and dtype float64, expected a list of integer ids",
        ),
        (lambda: scoring.pack([[1]], [[1]], 0), "pack: 'row_length' is 0, expected at least 1"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    wrong = lambda params, tokens, segment_ids=None, positions=None: jnp.zeros((2, 7, 4))  # noqa: E731
    with pytest.raises(ValueError, match=r"score_tokens: 'hidden_fn' has shape \(2, 7, 4\), expected \[b t d\] with t=8 from 'tokens'"):
        scoring.score_tokens(wrong, np.zeros((4, 5)), params, tokens, tokens)
