import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from janax.jaxlib_ext import sharding
from janax.models import presets, unet

GOLDEN = Path(__file__).parents[1] / "golden" / "unet"  # made by tests/golden/make_unet.py with torch 2.13.0
TINY = unet.UNetConfig(
    image_size=4, channels=2, width=8, multipliers=(1, 2), blocks=1, attention_resolutions=(2,), num_classes=3, groups=4, heads=2
)

# Compile time is what these tests cost: fewer optimisations, and one compiled function per config and shape over all tests.
_jit = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
_apply, _denoise = _jit(unet.apply), _jit(unet.denoise)


@_jit
def _noise(config, params, z, sigma, cond=None):
    return unet.noise_fn(config)(params, z, sigma, cond)


def _loss(config, params, z, sigma, cond):
    return jnp.mean(jnp.square(unet.denoise(config, params, z, sigma, cond)))


_value_and_grad = _jit(jax.value_and_grad(_loss, argnums=1))


def _random_params(config):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: unet.init(config, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def params():
    return _random_params(TINY)


@pytest.fixture(scope="module")
def batch():
    z = np.random.default_rng(1).standard_normal((8, 4, 4, 2), np.float32)
    return z, np.geomspace(0.01, 80, 8).astype(np.float32), np.arange(8) % 4


def test_starts_as_the_skip(batch):
    z, sigma, _ = batch
    with jax.debug_key_reuse(True):
        params = _jit(unet.init)(TINY, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    expected = 0.25 / (sigma**2 + 0.25)[:, None, None, None] * z
    np.testing.assert_allclose(_denoise(TINY, params, *batch), expected, atol=1e-3)  # the last layer starts at 1e-5


def test_preconditioning_table():
    """By hand at sigma = 1.2, sigma_data = 0.5: s^2 + s_d^2 = 1.69 = 1.3^2."""
    skip, out, into, noise = unet.preconditioning(1.2, 0.5)
    np.testing.assert_allclose([skip, out, into, noise], [0.25 / 1.69, 0.6 / 1.3, 1 / 1.3, np.log(1.2) / 4], rtol=1e-6)


def test_denoise_and_noise_follow_their_definitions(params, batch):
    z, sigma, cond = batch
    s = sigma[:, None, None, None]
    raw = np.asarray(_apply(TINY, params, z / np.sqrt(s**2 + 0.25), np.log(sigma) / 4, cond))
    expected = 0.25 / (s**2 + 0.25) * z + 0.5 * s / np.sqrt(s**2 + 0.25) * raw
    np.testing.assert_allclose(_denoise(TINY, params, *batch), expected, atol=1e-5)
    np.testing.assert_allclose(s * np.asarray(_noise(TINY, params, *batch)), z - expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["conditional", "three_levels"])
def test_equals_a_second_implementation(name):
    """Against torch in float64, over four noise levels and, with labels, all classes and none.

    Each image is compared relative to its largest entry. Some 40 layers follow one another, each a sum of up to 216 products: as a random
    walk sqrt(40 * 216) roundings of 6e-8 make 5.5e-6, and 1e-5 leaves a factor of two. (The network has no float64 mode.)
    """
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = {key: file[key] for key in file.files}
    sizes: dict[str, Any] = json.loads(golden["config"].item())
    for key in ("multipliers", "attention_resolutions"):
        sizes[key] = tuple(sizes[key])
    config = unet.UNetConfig(**sizes)
    params: dict[str, Any] = {}
    for key in golden:
        if key.startswith("params/"):
            *parents, leaf = key.split("/")[1:]
            functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, params)[leaf] = golden[key]

    z, sigma, cond = golden["z"], golden["sigma"], golden["labels"] if config.num_classes else None
    s = sigma.astype(np.float64)[:, None, None, None]
    for ours, theirs in (
        (_denoise(config, params, z, sigma, cond), golden["denoised"]),  # the network weighs most where sigma is large
        (_noise(config, params, z, sigma, cond), (z - golden["denoised"]) / s),  # and here where it is small
    ):
        assert ours.shape == theirs.shape
        deviation = np.abs(ours - theirs).max((1, 2, 3)) / np.abs(theirs).max((1, 2, 3))
        assert deviation.max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shapes_and_dtypes(params, strict, dtype):
    z = jnp.ones((2, 4, 4, 2), dtype)
    for function in (unet.apply, unet.denoise, lambda config, *args: unet.noise_fn(config)(*args)):
        result = jax.eval_shape(functools.partial(function, TINY), params, z, 1.5)
        assert result.shape == z.shape and result.dtype == z.dtype


def test_bfloat16_compute_is_close(params, batch, strict):
    expected, actual = _apply(TINY, params, *batch), _apply(dataclasses.replace(TINY, dtype="bfloat16"), params, *batch)
    assert actual.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean(jnp.square(actual - expected)) / jnp.mean(jnp.square(expected)))
    assert error < 0.05  # some twenty roundings to 8 bits, 2^-9 each


@pytest.mark.slow
def test_remat_does_not_change_numbers_and_all_parameters_matter(batch):
    z, sigma, cond = batch
    batch = z[:, :2, :2], sigma, cond
    config = dataclasses.replace(TINY, image_size=2, multipliers=(1,))
    params = _random_params(config)
    value, grads = _value_and_grad(config, params, *batch)
    again, other_grads = _value_and_grad(dataclasses.replace(config, remat=True), params, *batch)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    chex.assert_trees_all_close(other_grads, grads, rtol=1e-3, atol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.any(np.asarray(leaf)), path


def test_scalars_one_example_and_vmap_equal_the_batch(params, batch):
    z, sigma, cond = batch
    expected = _noise(TINY, params, *batch)
    np.testing.assert_allclose(_noise(TINY, params, z[3], sigma[3], cond[3]), expected[3], rtol=1e-4, atol=1e-5)
    vmapped = jax.jit(jax.vmap(unet.noise_fn(TINY), in_axes=(None, 0, 0, 0)))(params, *batch)
    np.testing.assert_allclose(vmapped, expected, rtol=1e-4, atol=1e-5)
    same = _noise(TINY, params, z, np.full(8, 2, np.float32), np.full(8, 1))
    np.testing.assert_allclose(_noise(TINY, params, z, np.float32(2), 1), same, rtol=1e-4, atol=1e-5)


def test_no_label_is_the_null_class(params, batch):
    z, sigma, _ = batch
    null = _denoise(TINY, params, z, sigma, np.full(8, TINY.null_class))
    np.testing.assert_allclose(_denoise(TINY, params, z, sigma), null, atol=1e-5)
    assert np.max(np.abs(null - _denoise(TINY, params, z, sigma, np.full(8, 0)))) > 1e-3


def test_resampling_is_the_mean_and_the_copy():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(unet._resample(x, "down")[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    up = unet._resample(x, "up")
    np.testing.assert_array_equal(up[0, :, :, 0], np.kron(np.asarray(x)[0, :, :, 0], np.ones((2, 2))))


@pytest.fixture(scope="module")
def without_mesh(params, batch):
    return params, batch, np.asarray(_noise(TINY, params, *batch))


def test_same_numbers_on_a_mesh(without_mesh, mesh):
    params, batch, expected = without_mesh
    if mesh is not None:
        params = sharding.place(params, sharding.shardings(params, unet.SHARDING_RULES, mesh))
        assert params["middle_0"]["conv_0"]["kernel"].sharding.spec == jax.P(None, None, "data", "model")
        batch = jax.device_put(batch, jax.P("data"))
    eps = _noise(TINY, params, *batch)
    np.testing.assert_allclose(eps, expected, rtol=1e-5, atol=1e-5)
    if mesh is not None and mesh.axis_types[0] == AxisType.Explicit:
        assert jax.typeof(eps).sharding.spec == jax.P("data", None, None, None)


def test_published_size_and_rules():
    """EDM's unconditional CIFAR-10 network has 55,733,891 parameters, 9 * 128 of them for augmentation labels that are not here."""
    config = dataclasses.replace(presets.UNET_CIFAR10, num_classes=0)
    shapes = jax.eval_shape(lambda key: unet.init(config, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 55_733_891 - 9 * 128
    specs = sharding.specs(shapes, unet.SHARDING_RULES, jax.sharding.AbstractMesh((16, 2), ("data", "model")))
    for (path, leaf), spec in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.P))
    ):
        if leaf.size > 10**5:  # everything large is split
            assert "data" in spec, (path, spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 5}, "'image_size' 5 must be divisible by 2 for 2 levels"),
        ({"width": 12, "groups": 8}, "12 channels are not divisible by 'groups' 8"),
        ({"heads": 3}, "8 channels are not divisible by 'heads' 3"),
        ({"attention_resolutions": (3,)}, r"'attention_resolutions' has 3, but the levels have sides \(4, 2\)"),
        ({"multipliers": ()}, r"'multipliers' must be one or more positive integers, got \(\)"),
        ({"width": 7}, "'width' 7 must be even"),
        ({"blocks": 0}, "'blocks' must be at least 1, got 0"),
        ({"sigma_data": 0.0}, "'sigma_data' must be positive"),
        ({"num_classes": -1}, "'num_classes' must be at least 0"),
        ({"dtype": "float64"}, "'dtype' is 'float64'"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_argument_errors(params, batch):
    z, sigma, cond = batch
    with pytest.raises(ValueError, match=r"unet.apply: 'z' has shape \(8, 2, 4, 2\), expected \[b 4 4 2\]"):
        unet.apply(TINY, params, z[:, :2], sigma, cond)
    with pytest.raises(ValueError, match=r"unet.denoise: 'sigma' has shape \(3,\), expected \[b\] with b=8"):
        unet.denoise(TINY, params, z, sigma[:3], cond)
    with pytest.raises(ValueError, match=r"unet.denoise: 'sigma' has shape \(8, 1\)"):
        unet.denoise(TINY, params, z, sigma[:, None], cond)
    with pytest.raises(ValueError, match=r"unet.noise_fn: 'sigma' has shape \(8,\)"):
        unet.noise_fn(TINY)(params, z[0], sigma)
    with pytest.raises(ValueError, match="'cond' is given, but the network has no classes"):
        unet.apply(dataclasses.replace(TINY, num_classes=0), params, z, sigma, cond)
    with pytest.raises(ValueError, match="parameter 'label/bias' does not belong"):
        unet.apply(dataclasses.replace(TINY, num_classes=0), params, z, sigma)
