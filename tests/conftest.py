"""Eight CPU devices in one process, so that every mesh test runs on a laptop."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """float64 enabled for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict():
    """Dtype promotion must be explicit."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(params=["none", "auto", "explicit"])
def mesh(request):
    """No mesh, and an 8-device (4, 2) mesh with automatic and with explicit axes."""
    from janax.jaxlib_ext import sharding

    if request.param == "none":
        yield None
        return
    built = sharding.make_mesh({"data": 4, "model": 2}, explicit=request.param == "explicit")
    with jax.set_mesh(built):
        yield built
