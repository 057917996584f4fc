"""The float32 floor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janax.jaxlib_ext import dtypes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8, jnp.int32, jnp.uint8, jnp.bool_])
def test_narrow_types_become_float32(dtype, strict):
    assert dtypes.floor_dtype(dtype) == jnp.float32
    x = dtypes.at_least_float32(jnp.array([0, 1], dtype))
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(x, [0.0, 1.0])


def test_float64_stays(x64, strict):
    assert dtypes.floor_dtype(jnp.float64) == jnp.float64
    assert dtypes.at_least_float32(jnp.ones(2, jnp.float64)).dtype == jnp.float64
    assert dtypes.at_least_float32(jnp.ones(2, jnp.float32)).dtype == jnp.float32


def test_python_numbers_lists_and_gradients():
    assert dtypes.at_least_float32(1).dtype == dtypes.at_least_float32([1.0]).dtype == jnp.float32
    gradient = jax.grad(lambda x: dtypes.at_least_float32(x).sum())(jnp.ones(2, jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    assert jax.jit(dtypes.at_least_float32)(jnp.ones(2, jnp.float16)).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128])
def test_complex_numbers_are_refused(dtype):
    with pytest.raises(ValueError, match="floor_dtype: 'dtype' is complex"):
        dtypes.floor_dtype(dtype)
    with pytest.raises(ValueError, match="floor_dtype: 'dtype' is complex"):
        dtypes.at_least_float32(np.ones(2, dtype))
