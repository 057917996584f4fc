import dataclasses
import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from janax.jaxlib_ext import sharding
from janax.models import _attention, loading, presets, transformer

GOLDEN = Path(__file__).parents[1] / "golden" / "transformer"  # made by make_transformer.py with transformers 5.23.0 and torch 2.13.0
FAMILIES = sorted(path.name for path in GOLDEN.iterdir() if not path.name.endswith("_strong"))
# Everything at once: grouped heads, two kinds of layers with rotary frequencies of their own, norms everywhere, soft-capping.
RICH = transformer.TransformerConfig(
    vocab_size=48,
    max_length=64,
    width=16,
    depth=4,
    heads=4,
    kv_heads=2,
    head_width=8,
    hidden=24,
    norm_offset=1.0,
    post_norms=True,
    query_key_norm=True,
    activation="gelu_tanh",
    attention_softcap=5.0,
    final_softcap=4.0,
    rope_scaling=transformer.RopeScaling(kind="linear", factor=2.0),
    rope_local_theta=100.0,
    window=3,
    sliding=(True, False, True, True),
)

# Compile time is what these tests cost: fewer optimisations, and one compiled function per config and shape over all tests.
_jit = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
_logits, _hidden, _decode, _extend = map(_jit, (transformer.logits, transformer.hidden, transformer.decode, transformer.extend))


def _random_params(config):
    """Random everywhere, so that no bias or norm is trivial."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


def _tokens(b, t, seed=1):
    return np.random.default_rng(seed).integers(0, RICH.vocab_size, (b, t), dtype=np.int32)


@pytest.fixture(scope="module")
def params():
    return _random_params(RICH)


def _loss(config, params, tokens, segment_ids=None):
    log_probs = jax.nn.log_softmax(transformer.logits(config, params, tokens, segment_ids)[:, :-1])
    targets = jnp.arange(config.vocab_size)[None, None] == jnp.asarray(tokens)[:, 1:, None]
    return -jnp.mean(jnp.sum(jnp.where(targets, log_probs, 0), axis=-1))


_value_and_grad = _jit(jax.value_and_grad(_loss, argnums=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_public_code(family):
    config, params = loading.load_transformer(GOLDEN / family)
    data = np.load(GOLDEN / family / "io.npz")
    logits = _logits(config, params, data["tokens"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, data["logits"], rtol=0, atol=1e-5)
    h, w = _hidden(config, params, data["tokens"]), transformer.unembed(config, params)
    cap = (lambda x: x) if config.final_softcap is None else lambda x: config.final_softcap * jnp.tanh(x / config.final_softcap)
    np.testing.assert_allclose(cap(h @ w), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama3", "gpt_neo", "qwen2"])
def test_rounds_no_worse_than_the_public_code(family):
    """Strong weights, where float32 itself misses 1e-5: our distance from float64 is at most twice that of the public float32 code.

    Both are maxima over 6144 logits of sums rounded in different orders; over four seeds of all eleven families ours was .6 to 1.8 of theirs.
    """
    config, params = loading.load_transformer(GOLDEN / f"{family}_strong")
    data = np.load(GOLDEN / f"{family}_strong" / "io.npz")
    ours = np.abs(_logits(config, params, data["tokens"]) - data["double"]).max()
    assert ours <= 2 * np.abs(data["logits"] - data["double"]).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuation_with_and_without_cache(family):
    config, params = loading.load_transformer(GOLDEN / family)
    data = np.load(GOLDEN / family / "io.npz")
    prompt, expected = data["tokens"][:, :16], data["continuation"]

    def cached(config, params, prompt):
        def step(carry, _):
            logits, cache = carry
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return transformer.decode(config, params, cache, token[:, None]), token

        start = transformer.decode(config, params, transformer.init_cache(config, 2, 48), prompt)
        return jax.lax.scan(step, start, length=32)[1].T

    np.testing.assert_array_equal(_jit(cached)(config, params, prompt), expected)
    row = np.concatenate([prompt, np.zeros_like(expected)], axis=1)
    for i in range(16, 48):
        row[:, i] = np.argmax(_logits(config, params, row)[:, i - 1], axis=-1)  # later tokens do not matter
    np.testing.assert_array_equal(row[:, 16:], expected)


@pytest.mark.parametrize(("family", "attention"), [("llama3", "xla"), ("gemma3", "xla"), ("gemma3", "flash"), ("gpt2", "xla")])
def test_padding_and_packing_change_nothing(family, attention, monkeypatch):
    monkeypatch.setattr(_attention, "_CHUNK", 8)
    config, params = loading.load_transformer(GOLDEN / family)
    config = dataclasses.replace(config, attention=attention)
    texts = [_tokens(1, t, seed=t)[0] for t in (5, 9, 12)]
    alone = [
        _logits(config, params, np.pad(text, (0, 30 - len(text)))[None])[0, : len(text)] for text in texts
    ]  # later tokens do not matter
    right, left = ([np.pad(text, (0, 30 - len(text)) if side else (30 - len(text), 0)) for text in texts] for side in (True, False))
    ids = [[np.pad(np.ones_like(text), (0, 30 - len(text)) if side else (30 - len(text), 0)) for text in texts] for side in (True, False)]
    packed = np.concatenate([*texts, np.zeros(4, np.int32)])[None]
    packed_ids = np.concatenate([*(np.full_like(text, i + 1) for i, text in enumerate(texts)), np.zeros(4, np.int32)])[None]
    for rows, segments in ((np.stack(right), np.stack(ids[0])), (np.stack(left), np.stack(ids[1])), (packed, packed_ids)):
        logits = _logits(config, params, rows, segments)
        assert np.all(np.isfinite(logits))
        for i, expected in enumerate(alone):
            row, name = (i, 1) if len(rows) > 1 else (0, i + 1)
            np.testing.assert_allclose(logits[row][segments[row] == name], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["xla", "flash"])
def test_groups_and_chunks_of_queries_change_nothing(params, attention, monkeypatch):
    tokens, ids = _tokens(2, 21), np.array([[0] * 3 + [1] * 9 + [2] * 9, [1] * 17 + [0] * 4])
    expected = _value_and_grad(RICH, params, tokens, ids)
    monkeypatch.setattr(_attention, "_GROUP_SIZE", 10 if attention == "flash" else 5)
    monkeypatch.setattr(_attention, "_CHUNK", 4)
    for config in (RICH, dataclasses.replace(RICH, scan_layers=False)):
        config = dataclasses.replace(config, attention=attention)
        actual = jax.jit(jax.value_and_grad(functools.partial(_loss, config)))(params, tokens, ids)
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
        chex.assert_trees_all_close(actual[1], expected[1], atol=1e-6)


@pytest.mark.slow
def test_a_long_text_needs_no_matrix_of_attention():
    config = dataclasses.replace(RICH, attention="flash", remat="full", max_length=4096)
    tokens = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    shapes = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))

    def temporaries(config):
        loss = jax.grad(lambda params, tokens: jnp.sum(transformer.hidden(config, params, tokens)))
        return jax.jit(loss).lower(shapes, tokens).compile().memory_analysis().temp_size_in_bytes

    matrix = config.heads * 4096 * 4096 * 4
    assert temporaries(config) < matrix / 2 < matrix < temporaries(dataclasses.replace(config, attention="xla"))


def test_explicit_positions_are_the_default_ones(params):
    tokens, ids = _tokens(2, 10), np.array([[0, 0, 1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 2, 2, 2, 2]])
    positions = np.array([[0, 1, 0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    expected = _logits(RICH, params, tokens, ids)
    np.testing.assert_allclose(_logits(RICH, params, tokens, ids, positions), expected, atol=1e-6)
    shifted = _logits(RICH, params, tokens, None, np.arange(10)[None] + np.array([[0], [7]]))
    np.testing.assert_allclose(shifted, _logits(RICH, params, tokens), atol=1e-5)  # rotary positions are relative


def test_a_window_sees_its_length():
    """One sliding layer: a token depends on the last `window` tokens and no others."""
    config = dataclasses.replace(RICH, depth=1, sliding=())
    params, tokens = _random_params(config), _tokens(1, 10)
    sensitive = []
    for i in range(10):
        other = tokens.copy()
        other[0, i] = (other[0, i] + 1) % 48
        changed = np.abs(_logits(config, params, other) - _logits(config, params, tokens))[0].max(axis=-1) > 1e-6
        sensitive.append(changed)
    expected = np.array([[0 <= j - i < 3 for j in range(10)] for i in range(10)])
    np.testing.assert_array_equal(np.stack(sensitive), expected)


def test_llama3_frequencies():
    """Waves shorter than original_length / 4 stay, longer than original_length / 1 are stretched by the factor, between is between."""
    config = presets.LLAMA_3_1_8B
    plain, scaled = (
        transformer._frequencies(config, transformer._Kind(1, config.rope_theta, scaling)) for scaling in (None, config.rope_scaling)
    )
    waves = 2 * np.pi / plain
    ratio = plain / scaled
    np.testing.assert_allclose(ratio[waves < 8192 / 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[waves > 8192], 8, rtol=1e-6)
    assert np.all(np.diff(ratio) > -1e-5) and np.any((ratio > 1.1) & (ratio < 7.9))


# The cache.


def test_extend_in_uneven_pieces_equals_hidden(params):
    tokens, lengths = _tokens(3, 12), np.array([12, 7, 10])
    expected, unembed = _hidden(RICH, params, tokens), transformer.unembed(RICH, params)
    cache, done = transformer.init_cache(RICH, 3, 14), np.zeros(3, int)
    for piece in ([4, 0, 5], [1, 1, 0], [5, 5, 5], [1, 1, 0], [1, 0, 0]):
        piece = np.array(piece)
        width = max(piece)
        rows = np.stack([np.pad(tokens[i, d : d + n], (0, width - n), constant_values=3) for i, (d, n) in enumerate(zip(done, piece))])
        h, cache = _extend(RICH, params, cache, rows, piece)
        for i, (d, n) in enumerate(zip(done, piece)):
            np.testing.assert_allclose(h[i, :n], expected[i, d : d + n], rtol=0, atol=2e-5)
        done += piece
        np.testing.assert_array_equal(cache.length, done)
    np.testing.assert_array_equal(done, lengths)
    assert cache.k.shape == (4, 3, 14, 2, 8) and unembed.shape == (16, 48)


def test_decode_gives_the_last_logits(params):
    tokens, count = _tokens(3, 6), np.array([6, 2, 4])
    logits, _ = _decode(RICH, params, transformer.init_cache(RICH, 3, 8), tokens, count)
    every = _logits(RICH, params, tokens)
    np.testing.assert_allclose(logits, np.stack([every[i, n - 1] for i, n in enumerate(count)]), atol=1e-5)


@pytest.mark.parametrize(("family", "unstacked"), [("llama3", False), ("gemma3", True), ("gpt_neo", False)])
def test_a_shared_prefix_equals_copies_of_it(family, unstacked):
    config, params = loading.load_transformer(GOLDEN / family)
    params = transformer.unstack_layers(params) if unstacked else params
    contexts, sizes = _tokens(2, 11, seed=2), np.array([11, 6])
    targets, lengths = _tokens(6, 5, seed=3), np.array([5, 3, 1, 0, 4, 5])
    _, prefix = _extend(config, params, transformer.init_cache(config, 2, 13), contexts, sizes)
    before = jax.tree.map(np.array, prefix)
    cache = transformer.init_cache(config, 6, 7)
    h, cache = _extend(config, params, cache, targets, lengths, prefix)
    again, cache = _extend(config, params, cache, targets[:, :1], np.array([1, 1, 1, 1, 1, 0]), prefix)
    np.testing.assert_array_equal(cache.length, [6, 4, 2, 1, 5, 5])
    chex.assert_trees_all_equal(jax.tree.map(np.array, prefix), before)
    rows = [np.concatenate([contexts[i // 3, : sizes[i // 3]], targets[i, :n], targets[i, :1]]) for i, n in enumerate(lengths)]
    whole = _hidden(config, params, np.stack([np.pad(row, (0, 17 - len(row))) for row in rows]))
    for i, (row, n) in enumerate(zip(rows, lengths)):
        np.testing.assert_allclose(h[i, :n], whole[i, len(row) - 1 - n : len(row) - 1], rtol=0, atol=2e-5)
        if i < 5:
            np.testing.assert_allclose(again[i, 0], whole[i, len(row) - 1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("t", [1, 3])
def test_a_full_cache_drops_and_the_other_rows_go_on(params, t):
    tokens = _tokens(2, 12)
    cache = transformer.init_cache(RICH, 2, 8)
    _, cache = _extend(RICH, params, cache, tokens[:, :8], np.array([8, 4]))
    logits, after = _decode(RICH, params, cache, np.concatenate([tokens[:1, :t], tokens[1:, 4 : 4 + t]]))
    np.testing.assert_array_equal(after.length, [8 + t, 4 + t])
    np.testing.assert_array_equal(after.k[:, 0], cache.k[:, 0])
    np.testing.assert_allclose(logits[1], _logits(RICH, params, tokens[1:, : 4 + t])[0, -1], atol=2e-5)


def test_cache_dtype(params):
    tokens = _tokens(2, 6)
    cache = transformer.init_cache(RICH, 2, 8, "bfloat16")
    logits, cache = _decode(RICH, params, cache, tokens)
    one, cache = _decode(RICH, params, cache, tokens[:, :1])
    assert cache.k.dtype == jnp.bfloat16 and logits.dtype == one.dtype == jnp.float32
    np.testing.assert_allclose(logits, _logits(RICH, params, tokens)[:, -1], atol=0.1)  # keys and values of 8 bits


# Forms of the same computation.


def test_stacked_and_unstacked_layers(params):
    tokens, loose = _tokens(2, 9), transformer.unstack_layers(params)
    assert isinstance(loose["blocks"], tuple) and len(loose["blocks"]) == 4
    chex.assert_trees_all_equal(transformer.stack_layers(loose), params)
    np.testing.assert_allclose(_logits(RICH, loose, tokens), _logits(RICH, params, tokens), atol=1e-6)
    for some in (params, transformer.unstack_layers(loose)):
        logits, _ = _decode(RICH, some, transformer.init_cache(RICH, 2, 9), tokens)
        np.testing.assert_allclose(logits, _logits(RICH, params, tokens)[:, -1], atol=1e-5)
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "model"))
    for path, spec in jax.tree_util.tree_leaves_with_path(
        sharding.specs(loose, transformer.SHARDING_RULES, mesh), is_leaf=lambda x: isinstance(x, jax.P)
    ):
        if path[0].key == "blocks":
            stacked = sharding.specs(params, transformer.SHARDING_RULES, mesh)["blocks"]
            for entry in path[2:]:
                stacked = stacked[entry.key]
            assert tuple(stacked)[1:] == tuple(spec)


@pytest.mark.parametrize(
    "change", [{"scan_layers": False}, {"remat": "dots"}, {"remat": "full"}, {"remat": "full", "scan_layers": False, "attention": "flash"}]
)
def test_scan_and_remat_do_not_change_numbers(params, change):
    tokens = _tokens(2, 9)
    value, grads = _value_and_grad(RICH, params, tokens)
    other_value, other_grads = _value_and_grad(dataclasses.replace(RICH, **change), params, tokens)
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    chex.assert_trees_all_close(other_grads, grads, atol=1e-6)


def test_bfloat16(params, strict):
    half = dataclasses.replace(RICH, dtype="bfloat16")
    tokens = _tokens(2, 9)
    expected = _logits(RICH, params, tokens)
    for some in (params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)):
        actual = _logits(half, some, tokens)
        assert actual.dtype == jnp.float32 and _hidden(half, some, tokens).dtype == jnp.bfloat16
        error = jnp.sqrt(jnp.mean(jnp.square(actual - expected)) / jnp.mean(jnp.square(expected)))
        assert error < 0.1  # some thirty roundings of 2^-9 over four layers, doubled by norms of small vectors
    cache = transformer.init_cache(half, 2, 9)
    logits, cache = _decode(half, params, cache, tokens[:, :8])
    logits, cache = _decode(half, params, cache, tokens[:, 8:])
    assert cache.k.dtype == jnp.bfloat16 and bool(jnp.all(jnp.abs(logits - actual[:, -1]) < 0.5))


def test_gradients(params):
    tokens = _tokens(2, 9)
    ids = np.array([[0, 0, 1, 1, 1, 2, 2, 0, 0], [1] * 9])
    _, grads = _value_and_grad(RICH, params, tokens, ids)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.all(np.isfinite(leaf)) and np.any(np.asarray(leaf)), path
    direction = jax.tree.map(lambda leaf: np.sin(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape), params)
    slope = sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
    step = 1e-3

    def value(h):
        return _value_and_grad(RICH, jax.tree.map(lambda a, b: a + np.float32(h) * b, params, direction), tokens, ids)[0]

    np.testing.assert_allclose((value(step) - value(-step)) / (2 * step), slope, rtol=2e-2)  # float32 loss ~ 4: rounding 4e-7 / 2e-3


def test_initial_parameters():
    with jax.debug_key_reuse(True):
        params = _jit(transformer.init)(presets.LM_SMALL, jax.random.key(3))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    loss = _jit(_loss)(presets.LM_SMALL, params, _tokens(2, 16))
    assert abs(loss - np.log(4096)) < 0.3
    kernel = np.asarray(params["blocks"]["up"]["kernel"])
    assert abs(np.std(kernel) * 192**0.5 - 1) < 0.02 and abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.02


def test_vmap_and_one_trace(params):
    tokens = _tokens(4, 6)
    apply = functools.partial(transformer.logits, RICH, params)
    np.testing.assert_allclose(jax.vmap(lambda row: apply(row[None])[0])(tokens), apply(tokens), atol=1e-5)
    run = jax.jit(chex.assert_max_traces(transformer.decode_fn(RICH), n=1))
    cache = transformer.init_cache(RICH, 4, 12)
    for i in range(10):
        _, cache = run(params, cache, (tokens[:, :1] + i) % 48)


def test_closures(params):
    tokens = _tokens(2, 5)
    np.testing.assert_array_equal(transformer.hidden_fn(RICH)(params, tokens), transformer.hidden(RICH, params, tokens))
    np.testing.assert_array_equal(transformer.logits_fn(RICH)(params, tokens, None), transformer.logits(RICH, params, tokens))
    logits, cache = transformer.decode_fn(RICH)(params, transformer.init_cache(RICH, 2, 5), tokens, num_tokens=None, prefix=None)
    assert logits.shape == (2, 48) and int(cache.length[0]) == 5


@pytest.fixture(scope="module")
def without_mesh(params):
    tokens = _tokens(8, 9)
    _, grads = _value_and_grad(RICH, params, tokens)
    logits, cache = _decode(RICH, params, transformer.init_cache(RICH, 8, 10), tokens[:, :8])
    after, cache = _decode(RICH, params, cache, tokens[:, 8:])
    return jax.tree.map(np.asarray, (params, tokens, _logits(RICH, params, tokens), grads, logits, after, cache))


def test_same_numbers_on_a_mesh(without_mesh, mesh):
    params, tokens, expected, expected_grads, *expected_decoded = without_mesh
    cache = transformer.init_cache(RICH, 8, 10)
    if mesh is not None:
        params = sharding.place(params, sharding.shardings(params, transformer.SHARDING_RULES, mesh))
        assert params["blocks"]["qkv"]["kernel"].sharding.spec == jax.P(None, "model", None, None, "data")
        tokens = jax.device_put(tokens, jax.P("data", None))
        cache = jax.device_put(cache, type(cache)(jax.P(None, "data", None, "model"), jax.P(None, "data", None, "model"), jax.P("data")))
    scale = np.max(np.abs(expected))
    logits = _logits(RICH, params, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6 * scale)
    decoded, cache = _decode(RICH, params, cache, tokens[:, :8])
    after, cache = _decode(RICH, params, cache, tokens[:, 8:])
    chex.assert_trees_all_close(jax.tree.map(np.asarray, [decoded, after, cache]), expected_decoded, atol=1e-5)
    if mesh is not None and mesh.axis_types[0] == AxisType.Explicit:
        assert jax.typeof(logits).sharding.spec == jax.P("data", None, None)
        assert jax.typeof(cache.k).sharding.spec[:4] == (None, "data", None, "model")
        return  # the loss above indexes and compares by hand, which explicit axes do not allow for
    _, grads = _value_and_grad(RICH, params, tokens)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, grads), expected_grads, atol=1e-5)


def test_one_device_is_a_mesh(params):
    with jax.set_mesh(sharding.make_mesh({"data": 1, "model": 1}, jax.devices()[:1])) as _:
        tokens = _tokens(2, 9)
        logits = _logits(RICH, params, tokens)
    np.testing.assert_allclose(logits, _logits(RICH, params, tokens), atol=1e-6)


@pytest.mark.parametrize(
    ("config", "millions"),
    [(presets.SMOLLM2_135M, 134.5), (presets.QWEN2_5_7B, 7616), (presets.LLAMA_3_1_8B, 8030), (presets.LM_SMALL, 2.36)],
)
def test_published_sizes_and_rules(config, millions):
    shapes = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
    assert abs(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 / millions - 1) < 0.01
    mesh = jax.sharding.AbstractMesh((16, config.kv_heads), ("data", "model"))
    specs = sharding.specs(shapes, transformer.SHARDING_RULES, mesh)
    for (path, leaf), spec in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.P))
    ):
        if leaf.size > 2 * 10**6:  # everything large is split over both axes
            assert {"data", "model"} <= set(spec), (path, spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "'depth' must be at least 1, got 0"),
        ({"heads": 3}, "'heads' 3 must be a multiple of 'kv_heads' 2"),
        ({"head_width": 7}, "'head_width' 7 must be even for rotary positions"),
        ({"norm": "batch"}, "'norm' is 'batch', expected one of 'rms', 'layer'"),
        ({"activation": "relu"}, "'activation' is 'relu'"),
        ({"positions": "alibi"}, "'positions' is 'alibi'"),
        ({"dtype": "float16"}, "'dtype' is 'float16'"),
        ({"remat": "some"}, "'remat' is 'some'"),
        ({"attention": "fast"}, "'attention' is 'fast', expected one of 'xla', 'flash'"),
        ({"window": 0}, "'window' must be positive, got 0"),
        ({"window": None}, "'sliding' layers need a 'window'"),
        ({"sliding": (True,)}, "'sliding' has 1 flags, expected one for each of the 4 layers"),
        ({"final_softcap": -1.0}, "'final_softcap' must be positive"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RICH, **change)


def test_rope_scaling_errors():
    with pytest.raises(ValueError, match="'kind' is 'yarn', expected one of 'linear', 'llama3'"):
        transformer.RopeScaling(kind="yarn", factor=2.0)
    with pytest.raises(ValueError, match=r"'factor' must be at least 1, got 0.5"):
        transformer.RopeScaling(kind="linear", factor=0.5)
    with pytest.raises(ValueError, match="expected 0 < 'low_frequency' < 'high_frequency'"):
        transformer.RopeScaling(kind="llama3", factor=2.0, low_frequency=4.0)


def test_argument_errors(params):
    tokens, cache = _tokens(2, 5), transformer.init_cache(RICH, 2, 8)
    with pytest.raises(ValueError, match=r"transformer.hidden: 'tokens' has shape \(5,\), expected \[b t\]"):
        transformer.hidden(RICH, params, tokens[0])
    with pytest.raises(ValueError, match=r"transformer.logits: 'tokens' has dtype float32, expected integers"):
        transformer.logits(RICH, params, tokens.astype(np.float32))
    with pytest.raises(ValueError, match=r"'segment_ids' has shape \(2, 4\), expected \[b t\] with t=5 from 'tokens'"):
        transformer.hidden(RICH, params, tokens, tokens[:, 1:])
    with pytest.raises(ValueError, match=r"'num_tokens' has shape \(3,\), expected \[b\] with b=2"):
        transformer.extend(RICH, params, cache, tokens, np.zeros(3, int))
    with pytest.raises(ValueError, match=r"transformer.decode: 'cache' has 2 rows, which does not suit the 1 of 'tokens'"):
        transformer.decode(RICH, params, cache, tokens[:1])
    with pytest.raises(ValueError, match="'prefix' has 3 rows, which does not suit the 2 of 'tokens'"):
        transformer.decode(RICH, params, cache, tokens, None, transformer.init_cache(RICH, 3, 8))
    with pytest.raises(ValueError, match=r"'cache.k' has shape \(3, 2, 8, 2, 8\), expected \[4 b s 2 8\]"):
        transformer.decode(RICH, params, transformer.init_cache(dataclasses.replace(RICH, depth=3, sliding=()), 2, 8), tokens)
    with pytest.raises(ValueError, match="'batch' and 'length' must be at least 1, got 2 and 0"):
        transformer.init_cache(RICH, 2, 0)
    with pytest.raises(ValueError, match=r"parameter 'blocks/down/kernel' has shape \(4, 16, 24\), expected \(4, 16, 32\)"):
        transformer.hidden(dataclasses.replace(RICH, hidden=32), params, tokens)
    with pytest.raises(ValueError, match="parameter 'unembed/kernel' is missing"):
        transformer.hidden(RICH, {name: tree for name, tree in params.items() if name != "unembed"}, tokens)
    loose = transformer.unstack_layers(params)
    with pytest.raises(ValueError, match="'blocks' has 3 layers, expected 4"):
        transformer.hidden(RICH, {**loose, "blocks": loose["blocks"][:3]}, tokens)
    with pytest.raises(ValueError, match="parameter 'blocks/1/out/kernel' is missing"):
        without = {name: tree for name, tree in loose["blocks"][1].items() if name != "out"}
        transformer.hidden(RICH, {**loose, "blocks": (loose["blocks"][0], without, *loose["blocks"][2:])}, tokens)


def test_tokens_out_of_range(params):
    tokens = _tokens(2, 5)
    tokens[0, 2] = 48
    logits = _logits(RICH, params, tokens)
    assert np.all(np.isnan(logits[0])) and np.all(np.isfinite(logits[1]))
