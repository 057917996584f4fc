import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from janax.jaxlib_ext import sharding
from janax.models import dit, presets

TINY = dit.DiTConfig(image_size=8, channels=3, patch_size=2, width=16, depth=2, heads=2, num_classes=5, learn_sigma=True)

# Compile time is what these tests cost: fewer optimisations, and one compiled function per config and shape over all tests.
_jit = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
_apply = _jit(dit.apply)


def _random_params(config):
    """Random everywhere, so that no modulation is zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: dit.init(config, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def params():
    return _random_params(TINY)


@pytest.fixture(scope="module")
def batch():
    z = np.random.default_rng(1).standard_normal((8, 8, 8, 3), np.float32)
    return z, np.linspace(0.0, 999.0, 8, dtype=np.float32), np.arange(8) % 6


def _loss(config, params, z, t, cond):
    return jnp.mean(jnp.square(dit.apply(config, params, z, t, cond) - z))


_value_and_grad = _jit(jax.value_and_grad(_loss, argnums=1))


def test_initial_parameters():
    with jax.debug_key_reuse(True):
        params = _jit(dit.init)(TINY, jax.random.key(3))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(_apply(TINY, params, jnp.ones((8, 8, 8, 3)), 3.0), 0.0)  # adaLN-zero
    kernel = np.asarray(params["blocks"]["expand"]["kernel"])
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.2  # 1024 entries: six standard deviations
    assert np.max(np.abs(kernel)) <= np.sqrt(6 / (16 + 64))


@pytest.mark.parametrize("t", [7, 7.5, np.float32(3.0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shapes_and_dtypes(params, strict, t, dtype):
    z = jnp.ones((2, 8, 8, 3), dtype)
    eps = jax.eval_shape(functools.partial(dit.apply, TINY), params, z, t)
    assert eps.shape == z.shape and eps.dtype == z.dtype
    assert jax.eval_shape(functools.partial(dit.output, TINY), params, z, t, jnp.array([0, 1])).shape == (2, 8, 8, 6)


def test_apply_is_the_first_half_of_output(params, batch):
    np.testing.assert_allclose(_apply(TINY, params, *batch), dit.output(TINY, params, *batch)[..., :3], atol=1e-5)


def test_bfloat16_compute_is_close(params, batch, strict):
    half = dataclasses.replace(TINY, dtype="bfloat16")
    expected, actual = _apply(TINY, params, *batch), _apply(half, params, *batch)
    assert actual.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean(jnp.square(actual - expected)) / jnp.mean(jnp.square(expected)))
    assert error < 0.03  # some ten roundings to 8 bits, 2^-9 each, accumulated over 2 blocks


@pytest.mark.parametrize("change", [{"scan_layers": False}, {"remat": "dots"}, {"remat": "full", "scan_layers": False}])
def test_scan_and_remat_do_not_change_numbers(params, batch, change):
    other = dataclasses.replace(TINY, **change)
    value, grads = _value_and_grad(TINY, params, *batch)
    other_value, other_grads = _value_and_grad(other, params, *batch)
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    chex.assert_trees_all_close(other_grads, grads, atol=1e-6)


def test_all_parameters_receive_a_gradient(batch):
    config = dataclasses.replace(TINY, learn_sigma=False)
    _, grads = _value_and_grad(config, _random_params(config), *batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.any(np.asarray(leaf)), path


def test_gradient_agrees_with_finite_differences(params, batch):
    _, grads = _value_and_grad(TINY, params, *batch)
    direction = jax.tree.map(lambda leaf: np.sin(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape), params)
    slope = sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
    step = 1e-3

    def value(h):
        return _value_and_grad(TINY, jax.tree.map(lambda a, b: a + np.float32(h) * b, params, direction), *batch)[0]

    np.testing.assert_allclose(
        (value(step) - value(-step)) / (2 * step), slope, rtol=1e-2
    )  # float32 loss ~ 1: rounding 1e-7 / 2e-3, plus O(step^2)


def test_scalar_time_and_label_equal_a_batch_of_them(params, batch):
    z, _, _ = batch
    expected = _apply(TINY, params, z, jnp.full(8, 500.0), jnp.full(8, 2))
    for t, cond in [(500.0, 2), (500, jnp.full(8, 2)), (jnp.full(8, 500.0), 2), (jnp.float32(500), jnp.int32(2))]:
        np.testing.assert_allclose(_apply(TINY, params, z, t, cond), expected, atol=1e-5)


def test_no_label_is_the_null_class(params, batch):
    z, t, _ = batch
    np.testing.assert_array_equal(_apply(TINY, params, z, t), _apply(TINY, params, z, t, jnp.full(8, TINY.null_class)))
    assert np.all(np.isnan(_apply(TINY, params, z, t, 6)))


def test_one_example_and_vmap_equal_the_batch(params, batch):
    fn = dit.noise_fn(TINY)
    expected = fn(params, *batch)
    np.testing.assert_allclose(jax.vmap(fn, in_axes=(None, 0, 0, 0))(params, *batch), expected, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(fn, in_axes=(None, 0, None))(params, batch[0], 3.0), fn(params, batch[0], 3.0), atol=1e-5)
    one = fn(params, *(x[3] for x in batch))
    assert one.shape == (8, 8, 3)
    np.testing.assert_allclose(one, expected[3], atol=1e-5)


def test_examples_do_not_mix(params, batch):
    z, t, cond = batch
    first = np.arange(8) == 0
    changed = _apply(
        TINY, params, z + first.astype(np.float32)[:, None, None, None], (t + first).astype(np.float32), np.where(first, 3, cond)
    )
    np.testing.assert_allclose(changed[1:], _apply(TINY, params, z, t, cond)[1:], atol=1e-5)


def test_patches_and_their_inverse_keep_pixels_in_place():
    """With an identity patch matrix, no blocks' effect and an identity output, the network is a norm per patch: pixels stay in place."""
    config = dit.DiTConfig(image_size=4, channels=1, patch_size=2, width=4, depth=1, heads=1, num_classes=1)
    params = jax.tree.map(jnp.zeros_like, _random_params(config))
    params["patch"]["kernel"] = 1e3 * jnp.eye(4).reshape(2, 2, 1, 4)
    params["final"]["kernel"] = jnp.eye(4).reshape(4, 2, 2, 1)
    z = jnp.sin(jnp.arange(16.0) * 1.7).reshape(1, 4, 4, 1)
    blocks = np.asarray(z)[0, :, :, 0].reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
    normed = (blocks - blocks.mean(1, keepdims=True)) / blocks.std(1, keepdims=True)
    expected = normed.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(1, 4, 4, 1)
    np.testing.assert_allclose(_apply(config, params, z, 0), expected, atol=5e-3)  # the position embedding is 1e-3 of the pixels


def test_position_embedding_by_hand():
    table = dit.position_embedding(3, 8)
    assert table.shape == (9, 8)
    row, column = 2, 1
    angles = [column, column * 1e-2, row, row * 1e-2]
    expected = [*np.sin(angles[:2]), *np.cos(angles[:2]), *np.sin(angles[2:]), *np.cos(angles[2:])]
    np.testing.assert_allclose(table[3 * row + column], expected, rtol=1e-6)


def test_dropped_labels():
    cond = jnp.zeros(20_000, jnp.int32)
    dropped = dit.drop_labels(jax.random.key(0), cond, rate=0.1, null_class=5)
    assert dropped.dtype == cond.dtype and set(np.unique(dropped)) == {0, 5}
    assert abs(np.mean(np.asarray(dropped) == 5) - 0.1) < 0.01  # five standard deviations
    np.testing.assert_array_equal(dit.drop_labels(jax.random.key(0), cond, rate=0.0, null_class=5), cond)


def test_traced_once(params, batch):
    z, t, cond = batch
    run = jax.jit(chex.assert_max_traces(lambda *args: dit.apply(TINY, *args), n=1))
    for i in range(10):
        run(params, z, t + i, cond)


MESH_CONFIG = dataclasses.replace(TINY, heads=4, learn_sigma=False)


@pytest.fixture(scope="module")
def without_mesh(batch):
    params = _random_params(MESH_CONFIG)
    _, grads = _value_and_grad(MESH_CONFIG, params, *batch)
    return jax.tree.map(np.asarray, (params, batch, _apply(MESH_CONFIG, params, *batch), grads))


def test_same_numbers_on_a_mesh(without_mesh, mesh):
    params, batch, expected, expected_grads = without_mesh
    if mesh is not None:
        params = sharding.place(params, sharding.shardings(params, dit.SHARDING_RULES, mesh))
        assert params["blocks"]["qkv"]["kernel"].sharding.spec == jax.P(None, "data", None, "model", None)
        batch = jax.device_put(batch, jax.P("data"))
    eps = _apply(MESH_CONFIG, params, *batch)
    np.testing.assert_allclose(eps, expected, atol=1e-5)
    if mesh is not None and mesh.axis_types[0] == AxisType.Explicit:
        assert jax.typeof(eps).sharding.spec == jax.P("data", None, None, None)
    _, grads = _value_and_grad(MESH_CONFIG, params, *batch)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, grads), expected_grads, atol=1e-5)


@pytest.mark.parametrize(("config", "millions"), [(presets.DIT_XL_2, 675), (presets.DIT_S_2, 33)])
def test_published_sizes_and_rules(config, millions):
    shapes = jax.eval_shape(lambda key: dit.init(config, key), jax.random.key(0))
    assert abs(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 / millions - 1) < 0.01
    mesh = jax.sharding.AbstractMesh((16, 2), ("data", "model"))
    specs = sharding.specs(shapes, dit.SHARDING_RULES, mesh)
    for (path, leaf), spec in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.P))
    ):
        if leaf.size > 2 * 10**6:  # everything large is split over both axes
            assert {"data", "model"} <= set(spec), (path, spec)


@pytest.mark.slow
def test_digits_preset_learns():
    """Twenty Adam steps on one batch take a third off the loss."""
    config, optimizer = presets.DIT_DIGITS, optax.adam(3e-3)
    z = np.random.default_rng(0).standard_normal((4, 8, 8, 1), np.float32)

    def step(config, params, state):
        loss, grads = jax.value_and_grad(_loss, argnums=1)(config, params, z, 10.0, None)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    run = _jit(step)
    params = _jit(dit.init)(config, jax.random.key(0))
    state, losses = optimizer.init(params), []
    for _ in range(20):
        params, state, loss = run(config, params, state)
        losses.append(loss)
    assert losses[-1] < 0.67 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 9}, "'image_size' 9 must be a multiple of 'patch_size' 2"),
        ({"width": 18}, "'width' 18 must be a multiple of 4"),
        ({"heads": 3}, "'width' 16 must be a multiple of 'heads' 3"),
        ({"depth": 0}, "'depth' must be at least 1, got 0"),
        ({"dtype": "float16"}, "'dtype' is 'float16', expected one of 'float32', 'bfloat16'"),
        ({"remat": "some"}, "'remat' is 'some'"),
        ({"frequency_shift": 2}, "'frequency_shift' is 2"),
        ({"mlp_ratio": 0.01}, "leaves no hidden units"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_argument_errors(params):
    z = jnp.ones((2, 8, 8, 3))
    with pytest.raises(ValueError, match=r"dit.apply: 'z' has shape \(2, 4, 8, 3\), expected \[b 8 8 3\]"):
        dit.apply(TINY, params, z[:, :4], 0)
    with pytest.raises(ValueError, match=r"'t' has shape \(3,\), expected \[b\] with b=2 from 'z'"):
        dit.apply(TINY, params, z, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"'cond' has shape \(1,\)"):
        dit.apply(TINY, params, z, 0, jnp.array([1]))
    with pytest.raises(ValueError, match="'cond' has dtype float32, expected integer labels"):
        dit.apply(TINY, params, z, 0, jnp.ones(2))
    with pytest.raises(ValueError, match=r"dit.noise_fn: 't' has shape \(2,\)"):
        dit.noise_fn(TINY)(params, z[0], jnp.zeros(2))
    with pytest.raises(ValueError, match=r"parameter 'blocks/contract/bias' has shape \(2, 16\), expected \(3, 16\)"):
        dit.apply(dataclasses.replace(TINY, depth=3), params, z, 0)
    with pytest.raises(ValueError, match="parameter 'patch/bias' is missing"):
        dit.apply(TINY, {**params, "patch": {"kernel": params["patch"]["kernel"]}}, z, 0)
    with pytest.raises(ValueError, match="parameter 'extra' does not belong"):
        dit.apply(TINY, {**params, "extra": z}, z, 0)
