"""Masked reductions against NumPy, and what an empty mask or a nan under the mask must not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janax.jaxlib_ext import masking

X = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
MASK = np.array([[1, 0, 1], [0, 0, 0]], np.int32)
FUNCTIONS = [masking.masked_sum, masking.masked_mean, masking.masked_variance]


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.float32, jnp.bfloat16])
def test_values_by_hand(dtype, strict):
    mask = jnp.asarray(MASK, dtype)
    np.testing.assert_allclose(masking.masked_sum(X, mask), 4.0)
    np.testing.assert_allclose(masking.masked_mean(X, mask), 2.0)
    np.testing.assert_allclose(masking.masked_variance(X, mask), 1.0)
    np.testing.assert_allclose(masking.masked_mean(X, mask, axis=1), [2.0, 0.0])
    np.testing.assert_allclose(masking.masked_variance(X, mask, axis=1), [1.0, 0.0])
    np.testing.assert_allclose(masking.masked_sum(X, mask, axis=0), [1.0, 0.0, 3.0])


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1), -1])
def test_weights_agree_with_numpy(axis):
    x = np.random.default_rng(0).normal(size=(4, 5))
    weight = np.random.default_rng(1).uniform(0.1, 2.0, size=(4, 5))
    mean = np.average(x, weights=weight, axis=axis, keepdims=True)
    np.testing.assert_allclose(masking.masked_sum(x, weight, axis), np.sum(x * weight, axis), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masking.masked_mean(x, weight, axis), np.average(x, weights=weight, axis=axis), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masking.masked_variance(x, weight, axis), np.average((x - mean) ** 2, weights=weight, axis=axis), rtol=1e-5)


def test_masks_broadcast():
    assert masking.masked_sum(X, np.float32(1.0)) == X.sum()
    np.testing.assert_allclose(masking.masked_mean(X, np.array([[1.0], [0.0]], np.float32)), 2.0)
    np.testing.assert_allclose(masking.masked_mean(X, np.array([[0.0, 1.0, 0.0]], np.float32), axis=1), [2.0, 5.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_masked_does_not_matter_nor_does_its_gradient(function, bad):
    x = np.where(MASK == 1, X, np.float32(bad))
    value, gradient = jax.value_and_grad(function)(x, MASK)
    clean_value, clean_gradient = jax.value_and_grad(function)(X, MASK)
    np.testing.assert_allclose(value, clean_value)
    np.testing.assert_allclose(gradient, clean_gradient)
    assert np.all(np.asarray(gradient)[MASK == 0] == 0)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty_mask_gives_zero_with_zero_gradients(function, axis):
    for x in (X, np.full_like(X, np.nan)):
        value, pullback = jax.vjp(lambda x: function(x, np.zeros_like(MASK), axis), x)
        np.testing.assert_array_equal(value, np.zeros_like(value))
        np.testing.assert_array_equal(pullback(jnp.ones_like(value))[0], np.zeros_like(X))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtype_jit_and_vmap(function, strict):
    half = jnp.asarray(X, jnp.bfloat16)
    assert function(half, MASK).dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(function)(X, MASK), function(X, MASK), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(function)(X, MASK), function(X, MASK, 1), rtol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float64_and_gradients_agree_with_finite_differences(function, x64):
    x, weight = X.astype(np.float64), np.abs(np.sin(X.astype(np.float64)))
    assert function(x, weight).dtype == jnp.float64
    from jax.test_util import check_grads

    check_grads(lambda x: function(x, weight), (x,), order=1, modes=("rev", "fwd"), rtol=1e-6)


def test_one_entry_has_no_variance():
    assert masking.masked_variance(np.array([3.0], np.float32), np.array([1.0], np.float32)) == 0


def test_same_numbers_under_a_mesh(mesh):
    x, mask = np.arange(64, dtype=np.float32).reshape(8, 8), np.tril(np.ones((8, 8), np.float32))
    expected = np.average(x, weights=mask)
    placed = (x, mask) if mesh is None else jax.device_put((x, mask), jax.NamedSharding(mesh, jax.P("data", "model")))
    np.testing.assert_allclose(jax.jit(masking.masked_mean)(*placed), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(masking.masked_variance)(*placed), np.average((x - expected) ** 2, weights=mask), rtol=1e-5)
