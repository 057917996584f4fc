import dataclasses
import functools
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType

from janax.jaxlib_ext import fused, sharding
from janax.models import encoder, loading, presets

GOLDEN = Path(__file__).parents[1] / "golden" / "encoder"  # made by tests/golden/make_encoder.py, which names the versions
FAMILIES = ("bert", "roberta", "esm2")
SIZES = {"vocab_size": 40, "max_length": 16, "width": 32, "depth": 2, "heads": 4, "hidden": 56}
CONFIGS = {
    "bert": encoder.EncoderConfig(**SIZES, token_types=2, pooler=True),
    "roberta": encoder.EncoderConfig(**SIZES, norm_eps=1e-5, position_offset=2, token_types=1),
    "esm2": dataclasses.replace(presets.ESM2_8M, **SIZES, mask_token=4),
}
BERT, ESM2 = CONFIGS["bert"], CONFIGS["esm2"]
MASK = 4  # in every family here, though only ESM-2 treats it apart

# Compile time is what these tests cost: fewer optimisations, and one compiled function per config and shape over all tests.
_jit = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


@_jit
def _both(config, params, *args):
    return encoder.hidden(config, params, *args), encoder.logits(config, params, *args)


def _hidden(*args):
    return _both(*args)[0]


def _logits(*args):
    return _both(*args)[1]


@functools.cache
def _case(family):
    """Config, parameters, and the arrays of the golden file as arguments and results."""
    config, params = loading.load_encoder(GOLDEN / family)
    return config, jax.tree.map(np.asarray, params), dict(np.load(GOLDEN / family / "io.npz"))


def _arguments(data):
    return data["input_ids"], data["attention_mask"], None, data.get("token_type_ids")


@pytest.mark.parametrize(("family", "scan_layers"), [*((family, True) for family in FAMILIES), ("bert", False), ("esm2", False)])
def test_agrees_with_transformers(family, scan_layers):
    config, params, data = _case(family)
    config = dataclasses.replace(config, scan_layers=scan_layers)
    real = data["attention_mask"] == 1
    h, z = _both(config, params, *_arguments(data))
    np.testing.assert_allclose(h[real], data["hidden"][real], rtol=0, atol=1e-5)
    np.testing.assert_allclose(z[real], data["logits"][real], rtol=0, atol=1e-5)
    assert np.all(np.isfinite(h)) and np.all(np.isfinite(z))
    pooled = encoder.pool(config, params, h, data["attention_mask"])
    means = [x[keep].mean(0) for x, keep in zip(data["hidden"], real)]
    np.testing.assert_allclose(pooled.mean, means, rtol=0, atol=1e-5)
    if family == "bert":
        np.testing.assert_allclose(pooled.first, data["pooled"], rtol=0, atol=1e-5)
    else:
        assert pooled.first is None


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_packing_change_nothing(family):
    config, params, data = _case(family)
    tokens, real = data["input_ids"], data["attention_mask"]
    lengths = real.sum(1)
    types = data.get("token_type_ids")
    expected = [z[:n] for z, n in zip(np.asarray(_logits(config, params, *_arguments(data))), lengths)]

    shifted = [np.stack([np.roll(x, n) for x, n in zip(array, 12 - lengths)]) for array in (tokens, real, types) if array is not None]
    left = _logits(config, params, shifted[0], shifted[1], None, *shifted[2:])
    for z, n, one in zip(left, lengths, expected):
        np.testing.assert_allclose(z[12 - n :], one, atol=1e-5)

    order = [1, 3, 2]  # 7 + 3 + 10 tokens in one row, behind one token of padding
    row, segments, kinds = (
        np.concatenate([[0], *(values[i, : lengths[i]] for i in order), [0]])[None]
        for values in (tokens, (1 + np.arange(4))[:, None] * real, tokens * 0 if types is None else types)
    )
    packed = np.asarray(_logits(config, params, row, segments, None, None if types is None else kinds))[0]
    for z, i in zip(np.split(packed[1:], np.cumsum(lengths[order])), order):
        np.testing.assert_allclose(z, expected[i], atol=1e-5)

    for i in order[:1]:
        alone = _logits(config, params, tokens[i : i + 1, : lengths[i]], None, None, None if types is None else types[:1, : lengths[i]])
        np.testing.assert_allclose(alone[0], expected[i], atol=1e-5)


def test_positions_can_be_given():
    places = np.arange(12)[None] + np.zeros((4, 1), np.int32)
    for config, params, data in (_case("roberta"), _case("esm2")):
        tokens, real = data["input_ids"], data["attention_mask"]
        expected = np.asarray(_hidden(config, params, tokens, real))[real == 1]
        here, further = (np.asarray(_hidden(config, params, tokens, real, places + start))[real == 1] for start in (0, 3))
        np.testing.assert_allclose(here, expected, atol=1e-6)
        change = np.max(np.abs(further - expected))
        assert (change < 1e-5) if config.positions == "rope" else (change > 0.1)  # rotary positions are relative
    config, params, _ = _case("bert")
    assert np.all(np.isnan(_hidden(config, params, np.ones((1, 17), np.int32))))  # one more than there are positions
    assert np.all(np.isnan(_hidden(config, params, np.full((1, 17), 40))))  # no such token


def test_mask_tokens_are_compensated():
    """Embeddings without masks have the factor 0.88; masks are zeros, and a text of masks only stays finite."""
    config, params, _ = _case("esm2")
    plain = dataclasses.replace(config, mask_token=None)
    tokens = np.array([[5, 6, 7, 8]])
    scaled = {**params, "embed": {"tokens": params["embed"]["tokens"] * np.float32(0.88)}}
    np.testing.assert_allclose(_hidden(config, params, tokens), _hidden(plain, scaled, tokens), atol=1e-5)
    table = params["embed"]["tokens"] * np.float32(0.88 / 0.75)
    table[MASK] = 0
    tokens = np.array([[5, 6, MASK, 8]])
    np.testing.assert_allclose(_hidden(config, params, tokens), _hidden(plain, {**params, "embed": {"tokens": table}}, tokens), atol=1e-5)
    assert np.all(np.isfinite(_hidden(config, params, np.full((1, 4), MASK))))


def test_head_and_unembedding_give_the_logits():
    config, params, data = _case("bert")
    h = _hidden(config, params, *_arguments(data))
    w, bias = encoder.unembed(config, params)
    z = np.asarray(_logits(config, params, *_arguments(data)))
    below = encoder.head_hidden(config, params, h[:, 2])
    np.testing.assert_allclose(below @ w + bias[None], z[:, 2], atol=1e-5)
    expected = jax.nn.log_softmax(z, axis=-1)[0, :, 7]
    actual = fused.token_log_probs(encoder.head_hidden(config, params, h[0]), w, np.full(12, 7), bias=bias)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_pooling():
    config, params, data = _case("bert")
    h = np.asarray(_hidden(config, params, *_arguments(data)))
    left = encoder.pool(config, params, np.roll(h, 3, axis=1), np.roll(np.pad(np.ones((4, 9), np.int32), ((0, 0), (0, 3))), 3, axis=1))
    right = encoder.pool(config, params, h[:, :9])
    chex.assert_trees_all_close(left, right, atol=1e-6)
    assert left.mean.dtype == jnp.float32
    empty = encoder.pool(config, params, h, np.zeros((4, 12), np.int32))
    np.testing.assert_array_equal(empty.mean, 0.0)
    assert np.all(np.isfinite(empty.first))


def _one_hot(tokens, config):
    return np.eye(config.vocab_size, dtype=np.float32)[tokens]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_probabilities_relax_tokens(family, strict):
    """One-hot rows are their tokens, masks, padding and packing included."""
    config, params, data = _case(family)
    tokens, real, *rest = _arguments(data)
    tokens = np.where(np.arange(12)[None] % 5 == 3, MASK, tokens)
    expected = _both(config, params, tokens, real, *rest)
    for rows, tolerance in ((_one_hot(tokens, config), 2e-6), (_one_hot(tokens, config).astype(jnp.bfloat16), 2e-6)):
        for actual, wanted in zip(_both(config, params, rows, real, *rest), expected):
            np.testing.assert_allclose(actual[real == 1], wanted[real == 1], rtol=0, atol=tolerance)


def test_a_row_has_the_expected_embedding():
    config, params, _ = _case("bert")
    table = np.array(params["embed"]["tokens"])
    rows = _one_hot(np.array([[5, 6, 7, 8]]), config)
    rows[0, 2, [7, 9, MASK]] = 0.5, 0.3, 0.2
    table[39] = 0.5 * table[7] + 0.3 * table[9] + 0.2 * table[MASK]
    same = {**params, "embed": {**params["embed"], "tokens": table}}
    np.testing.assert_allclose(_hidden(config, params, rows), _hidden(config, same, np.array([[5, 6, 39, 8]])), atol=1e-5)


def test_rows_count_masks_by_their_probability():
    """Half a mask in four tokens: half the embedding there, and 0.88 / (1 - 0.5 / 4) everywhere; masks alone stay finite."""
    config, params, _ = _case("esm2")
    plain = dataclasses.replace(config, mask_token=None)
    table = np.array(params["embed"]["tokens"]) * np.float32(0.88 / (1 - 0.5 / 4))
    table[7] *= 0.5
    rows = _one_hot(np.array([[5, 6, 7, 8]]), config)
    rows[0, 2, [7, MASK]] = 0.5
    expected = _hidden(plain, {**params, "embed": {"tokens": table}}, np.array([[5, 6, 7, 8]]))
    np.testing.assert_allclose(_hidden(config, params, rows), expected, atol=1e-5)
    assert np.all(np.isfinite(_hidden(config, params, _one_hot(np.full((1, 4), MASK), config))))


@_jit
def _row_slope(config, params, rows, segment_ids, direction):
    def value(size):
        return jnp.sum(jnp.sin(encoder.hidden(config, params, rows + size * direction, segment_ids)))

    return jax.grad(value)(0.0), (value(1e-3) - value(-1e-3)) / 2e-3


@pytest.mark.parametrize("family", ["bert", "esm2"])
def test_gradient_in_rows_agrees_with_finite_differences(family):
    config, params, data = _case(family)
    rng = np.random.default_rng(0)
    rows, direction = rng.dirichlet(np.ones(40), (4, 12)).astype(np.float32), rng.standard_normal((4, 12, 40), np.float32)
    slope, difference = _row_slope(config, params, rows, data["attention_mask"], direction)
    np.testing.assert_allclose(slope, difference, rtol=1e-2, atol=5e-2)  # 1536 terms, rounding 1e-4 of their sum / 2e-3, plus O(step^2)


def test_initial_parameters():
    with jax.debug_key_reuse(True):
        params = _jit(encoder.init)(BERT, jax.random.key(3))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    kernel = np.asarray(params["blocks"]["up"]["kernel"])
    assert abs(kernel.std() / 0.02 - 1) < 0.05
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.15  # 1792 entries: six standard deviations
    np.testing.assert_array_equal(params["blocks"]["mlp_norm"]["scale"], 1.0)


def _loss(config, params, tokens, real, positions=None, types=None):
    log_probs = jax.nn.log_softmax(encoder.logits(config, params, tokens, real, positions, types))
    chosen = jnp.sum(jnp.where(jnp.arange(config.vocab_size)[None, None] == 7, log_probs, 0.0), axis=-1)
    return -jnp.sum(chosen * real) / jnp.sum(real)


_value_and_grad = _jit(jax.value_and_grad(_loss, argnums=1))


@pytest.mark.parametrize(
    ("family", "change"), [("bert", {"remat": "full", "scan_layers": False}), ("esm2", {"remat": "dots"}), ("esm2", {"scan_layers": False})]
)
def test_scan_and_remat_do_not_change_numbers(family, change):
    config, params, data = _case(family)
    value, grads = _value_and_grad(config, params, *_arguments(data))
    other_value, other_grads = _value_and_grad(dataclasses.replace(config, **change), params, *_arguments(data))
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    chex.assert_trees_all_close(other_grads, grads, atol=1e-6)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.any(np.asarray(leaf)) or "pooler" in jax.tree_util.keystr(path), path
        assert np.all(np.isfinite(leaf)), path


def test_gradient_agrees_with_finite_differences():
    config, params, data = _case("esm2")
    _, grads = _value_and_grad(config, params, *_arguments(data))
    direction = jax.tree.map(lambda leaf: np.sin(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape), params)
    slope = sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))

    def value(h):
        return _value_and_grad(config, jax.tree.map(lambda a, b: a + np.float32(h) * b, params, direction), *_arguments(data))[0]

    # float32 loss ~ 4: rounding 5e-7 / 2e-3, plus O(step^2)
    np.testing.assert_allclose((value(1e-3) - value(-1e-3)) / 2e-3, slope, rtol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_compute_is_close(family, strict):
    config, params, data = _case(family)
    half, real = dataclasses.replace(config, dtype="bfloat16"), data["attention_mask"] == 1
    h = _hidden(half, params, *_arguments(data))
    assert h.dtype == jnp.bfloat16
    z = _logits(half, params, *_arguments(data))
    assert z.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(z[real] - data["logits"][real])) / np.mean(np.square(data["logits"][real])))
    assert error < 0.03  # some ten roundings to 8 bits, 2^-9 each, accumulated over 2 blocks
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert np.all(np.isfinite(_logits(half, narrow, *_arguments(data))))


def test_traced_once():
    config, params, data = _case("roberta")
    run = jax.jit(chex.assert_max_traces(lambda *args: encoder.logits(config, *args), n=1))
    for i in range(10):
        run(params, (data["input_ids"] + i) % 40, data["attention_mask"])


def test_vmap_equals_the_batch():
    config, params, data = _case("esm2")
    tokens, real = data["input_ids"], data["attention_mask"]
    one_by_one = _jit(lambda config, *args: jax.vmap(encoder.logits_fn(config), in_axes=(None, 0, 0))(*args))
    actual = one_by_one(config, params, tokens[:, None], real[:, None])
    np.testing.assert_allclose(actual[:, 0], _logits(config, params, tokens, real), atol=1e-5)
    ensemble = _jit(lambda config, *args: jax.vmap(encoder.hidden_fn(config), in_axes=(0, None, None))(*args))
    twice = jax.tree.map(lambda x: np.stack([0 * x, x]), params)
    np.testing.assert_allclose(ensemble(config, twice, tokens, real)[1], _hidden(config, params, tokens, real), atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "esm2"])
def test_same_numbers_on_a_mesh(family, mesh):
    config, params, data = _case(family)
    batch = _arguments(data)
    if mesh is not None:
        params = sharding.place(params, sharding.shardings(params, encoder.SHARDING_RULES, mesh))
        assert params["blocks"]["qkv"]["kernel"].sharding.spec == jax.P(None, "data", None, "model")
        batch = jax.tree.map(lambda x: jax.device_put(x, jax.P("data")), batch)
    real = data["attention_mask"] == 1
    z = _logits(config, params, *batch)
    np.testing.assert_allclose(np.asarray(z)[real], data["logits"][real], atol=1e-5)
    h = _hidden(config, params, *batch)
    rows = _one_hot(data["input_ids"], config)
    soft = _hidden(config, params, rows if mesh is None else jax.device_put(rows, jax.P("data")), *batch[1:])
    np.testing.assert_allclose(np.asarray(soft)[real], data["hidden"][real], atol=1e-5)
    pooled = _jit(encoder.pool)(config, params, h, batch[1])
    np.testing.assert_allclose(np.asarray(pooled.mean)[3], data["hidden"][3, :3].mean(0), atol=1e-5)
    below = _jit(encoder.head_hidden)(config, params, h)
    if mesh is not None and mesh.axis_types[0] == AxisType.Explicit:
        for x in (z, h, soft, below, pooled.mean):
            assert jax.typeof(x).sharding.spec == jax.P("data", *(None,) * (x.ndim - 1))


def test_gradients_on_a_mesh():
    config, params, data = _case("esm2")
    _, expected = _value_and_grad(config, params, *_arguments(data))
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    with jax.set_mesh(mesh):
        placed = sharding.place(params, sharding.shardings(params, encoder.SHARDING_RULES, mesh))
        batch = jax.tree.map(lambda x: jax.device_put(x, jax.P("data")), _arguments(data))
        _, grads = _value_and_grad(config, placed, *batch)
        chex.assert_trees_all_close(jax.tree.map(np.asarray, grads), jax.tree.map(np.asarray, expected), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "millions"),
    [(presets.BERT_BASE, 110), (presets.ROBERTA_BASE, 125), (presets.ESM2_8M, 7.5), (presets.ESM2_650M, 651)],
)
def test_published_sizes_and_rules(config, millions):
    shapes = jax.eval_shape(lambda key: encoder.init(config, key), jax.random.key(0))
    assert abs(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 / millions - 1) < 0.01
    mesh = jax.sharding.AbstractMesh((16, 2), ("data", "model"))
    specs = sharding.specs(shapes, encoder.SHARDING_RULES, mesh)
    for (path, leaf), spec in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.P))
    ):
        if leaf.ndim > 2 or (leaf.size > 10**6 and leaf.shape[0] % 2 == 0):  # everything large is split over both axes
            assert {"data", "model"} <= set(spec) or "bias" in jax.tree_util.keystr(path), (path, spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "'depth' must be at least 1, got 0"),
        ({"token_types": -1}, "'token_types' must be at least 0, got -1"),
        ({"heads": 3}, "'width' 32 must be a multiple of 'heads' 3"),
        ({"positions": "rope", "heads": 32}, "'width' / 'heads' is 1, which must be even"),
        ({"norm": "none"}, "'norm' is 'none', expected one of 'post', 'pre'"),
        ({"activation": "silu"}, "'activation' is 'silu', expected one of 'gelu', 'gelu_tanh', 'relu'"),
        ({"norm_eps": 0.0}, "'norm_eps' must be positive, got 0.0"),
        ({"mask_token": 40}, "'mask_token' is 40, expected a token below 'vocab_size' 40"),
        ({"dtype": "float16"}, "'dtype' is 'float16', expected one of 'float32', 'bfloat16'"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BERT, **change)


def test_argument_errors():
    config, params, data = _case("bert")
    tokens = data["input_ids"]
    with pytest.raises(ValueError, match=r"encoder.hidden: 'tokens' has shape \(12,\), expected \[b t\]"):
        encoder.hidden(config, params, tokens[0])
    with pytest.raises(ValueError, match=r"encoder.logits: 'segment_ids' has shape \(4, 11\), expected \[b t\] with t=12 from 'tokens'"):
        encoder.logits(config, params, tokens, tokens[:, :11])
    with pytest.raises(
        ValueError, match=r"encoder.hidden: 'tokens' has dtype float32 and shape \(4, 12\), expected integers \[b t\] or rows"
    ):
        encoder.hidden(config, params, tokens.astype(np.float32))
    with pytest.raises(ValueError, match=r"'segment_ids' has shape \(4, 11\), expected \[b t\] with t=12 from 'tokens'"):
        encoder.hidden(config, params, _one_hot(tokens, config), tokens[:, :11])
    with pytest.raises(ValueError, match="'positions' has dtype float32, expected integers"):
        encoder.hidden(config, params, tokens, None, tokens.astype(np.float32))
    with pytest.raises(ValueError, match=r"encoder.hidden: parameter 'blocks/attention_norm/bias' has shape \(2, 32\), expected \(3, 32\)"):
        encoder.hidden(dataclasses.replace(config, depth=3), params, tokens)
    with pytest.raises(ValueError, match=r"encoder.head_hidden: 'h' has shape \(4, 12\), expected \[... 32\]"):
        encoder.head_hidden(config, params, tokens)
    with pytest.raises(ValueError, match=r"encoder.pool: 'segment_ids' has shape \(4,\)"):
        encoder.pool(config, params, jnp.ones((4, 12, 32)), jnp.ones(4, jnp.int32))
    headless = {name: x for name, x in params.items() if name != "head"}
    with pytest.raises(ValueError, match=r"encoder.logits: the network has no masked-language-model head"):
        encoder.logits(dataclasses.replace(config, head=False), headless, tokens)
    config, params, _ = _case("esm2")
    with pytest.raises(ValueError, match=r"encoder.hidden: 'token_types' is given, but the network has none"):
        encoder.hidden(config, params, tokens, token_types=tokens)


# Loading and saving.

WEIGHTS = "model.safetensors"
UNUSED = ("cls.seq_relationship.", "esm.contact_head.", "esm.rotary_embeddings.")  # in the golden files


@pytest.fixture
def copied(tmp_path):
    """Copies a family's golden directory, with changes to its tensors and settings."""

    def copy(family, edit=lambda tensors: None, **changes):
        directory = Path(shutil.copytree(GOLDEN / family, tmp_path / family, dirs_exist_ok=True))
        tensors = safetensors.numpy.load_file(directory / WEIGHTS)
        tensors = edit(tensors) or tensors
        safetensors.numpy.save_file(tensors, directory / WEIGHTS)
        content = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(content))
        return directory

    return copy


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(family, tmp_path):
    config, params, _ = _case(family)
    assert config == CONFIGS[family]
    loading.save_encoder(tmp_path / "new", config, params)
    theirs, ours = (safetensors.numpy.load_file(directory / WEIGHTS) for directory in (GOLDEN / family, tmp_path / "new"))
    assert ours.keys() == {name for name in theirs if not name.startswith(UNUSED)}
    chex.assert_trees_all_equal(ours, {name: theirs[name] for name in ours})
    again, loaded = loading.load_encoder(tmp_path / "new")
    assert again == config
    chex.assert_trees_all_equal(loaded, params)


@pytest.mark.parametrize(
    "change",
    [
        {"head": False, "pooler": False},
        {"activation": "gelu_tanh", "head_activation": "gelu_tanh"},
        {"norm": "pre", "final_norm": True, "position_offset": 2, "token_types": 0, "mask_token": 4, "pooler": False},  # ESM-1b
        {"position_offset": 2, "activation": "relu"},
    ],
)
def test_other_networks_make_the_round_trip(change, tmp_path):
    config = dataclasses.replace(BERT, **change)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(lambda key: encoder.init(config, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for given in (params, half):
        loading.save_encoder(tmp_path, config, given)
        again, loaded = loading.load_encoder(tmp_path)
        assert again == config
        chex.assert_trees_all_equal(loaded, given)
    chex.assert_trees_all_equal(loading.load_encoder(tmp_path, dtype="float32")[1], jax.tree.map(lambda x: x.astype(jnp.float32), half))


def _older(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def test_published_variants_are_accepted(copied):
    def old_bert(tensors):
        copies = {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"]}
        copies["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
        return {_older(name): x for name, x in tensors.items()} | copies | {"bert.embeddings.position_ids": np.arange(16)[None]}

    config, params = loading.load_encoder(copied("bert", old_bert, architectures=["BertForMaskedLM"]))
    chex.assert_trees_all_equal((config, params), _case("bert")[:2])

    def bare(tensors):
        return {name.removeprefix("bert."): x for name, x in tensors.items() if name.startswith("bert.")}

    config, params = loading.load_encoder(copied("bert", bare, architectures=["BertModel"]))
    assert config == dataclasses.replace(BERT, head=False)
    expected = {name: x for name, x in _case("bert")[1].items() if name != "head"}
    chex.assert_trees_all_equal(params, expected)

    def old_esm(tensors):
        rates = tensors.pop("esm.rotary_embeddings.inv_freq")
        places = {f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq": rates for i in range(2)}
        table = {
            "esm.embeddings.position_embeddings.weight": np.ones((16, 32), np.float32),
            "esm.embeddings.position_ids": np.arange(16)[None],
        }
        return tensors | places | table

    chex.assert_trees_all_equal(loading.load_encoder(copied("esm2", old_esm)), _case("esm2")[:2])


def test_placed_as_read(mesh):
    if mesh is None:
        pytest.skip("needs a mesh")
    _, params = loading.load_encoder(GOLDEN / "bert", shardings=lambda tree: sharding.shardings(tree, encoder.SHARDING_RULES, mesh))
    assert params["blocks"]["up"]["kernel"].sharding.spec == jax.P(None, "data", "model")
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, params), _case("bert")[1])


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bert", {"model_type": "t5"}, "'model_type' is 't5', expected one of 'bert', 'roberta', 'esm'"),
        ("bert", {"hidden_act": "silu"}, "'hidden_act' is 'silu', expected one of 'gelu', "),
        ("bert", {"is_decoder": True}, "'is_decoder' is True, only False is supported"),
        ("bert", {"tie_word_embeddings": False}, "'tie_word_embeddings' is False"),
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "'position_embedding_type' is 'relative_key', which is not supported for 'bert'",
        ),
        ("bert", {"hidden_size": "32"}, "'hidden_size' is '32', expected an integer"),
        ("bert", {"num_attention_heads": 5}, "config.json: EncoderConfig: 'width' 32 must be a multiple of 'heads' 5"),
        (
            "bert",
            {"num_hidden_layers": 3},
            r"tensor 'bert.encoder.layer.2.attention.self.query.weight' is missing, expected shape \(32, 32\)",
        ),
        ("bert", {"num_hidden_layers": 1}, r"tensor 'bert.encoder.layer.1.attention.output.LayerNorm.bias' \(and 15 more\) is not part of"),
        ("bert", {"vocab_size": 41}, r"tensor 'bert.embeddings.word_embeddings.weight' has shape \(40, 32\), expected \(41, 32\)"),
        ("roberta", {"pad_token_id": None}, "'pad_token_id' is None, expected an integer"),
        ("esm2", {"mask_token_id": None}, "'mask_token_id' is None, expected an integer"),
        ("esm2", {"is_folding_model": True}, "'is_folding_model' is True"),
    ],
)
def test_loading_errors_in_the_settings(family, changes, message, copied):
    with pytest.raises(ValueError, match=message):
        loading.load_encoder(copied(family, **changes))


def test_loading_errors_in_the_tensors(copied):
    def other_decoder(tensors):
        tensors["lm_head.decoder.weight"] = tensors["roberta.embeddings.word_embeddings.weight"] + 1

    with pytest.raises(ValueError, match=r"'lm_head.decoder.weight' differs from 'roberta.embeddings.word_embeddings.weight', only tied"):
        loading.load_encoder(copied("roberta", other_decoder))
    with pytest.raises(ValueError, match=r"tensor 'lm_head.dense.weight' is missing"):  # config.json says that there is a head
        loading.load_encoder(copied("roberta", lambda tensors: {k: x for k, x in tensors.items() if not k.startswith("lm_head.")}))
    with pytest.raises(ValueError, match=r"tensor 'classifier.weight' is not part of the architecture"):
        loading.load_encoder(copied("esm2", lambda tensors: tensors.update({"classifier.weight": np.ones(3, np.float32)})))
    directory = copied("bert")
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        loading.load_encoder(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_scale": 1.0}, "the layout 'bert' has 'query_scale' None, got 1.0"),
        ({"final_norm": True}, "the layout 'bert' has 'final_norm' False, got True"),
        ({"activation": "relu"}, "the layout 'bert' has 'head_activation' 'relu', got 'gelu'"),
        ({"mask_token": 4}, "the layout 'bert' has 'mask_token' None, got 4"),
        ({"norm": "pre", "position_offset": 2}, "the layout 'esm' has 'final_norm' True, got False"),
        (
            {"position_offset": 2, "token_types": 0, "activation": "gelu_tanh", "head_activation": "relu"},
            "'head_activation' 'gelu', got 'relu'",
        ),
    ],
)
def test_saving_errors(change, message, tmp_path):
    with pytest.raises(ValueError, match=f"save_encoder: the layout .*{message.removeprefix('the layout ')}"):
        loading.save_encoder(tmp_path / "new", dataclasses.replace(BERT, **change), {})
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="save_encoder: parameter 'blocks/attention_norm/bias' is missing"):
        loading.save_encoder(tmp_path, BERT, {})
