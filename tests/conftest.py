"""Eight CPU devices in one process, so that every mesh test runs on a laptop."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Compiling takes nearly all of the time, and the programs are tiny: compile them quickly, here and in the processes that tests start.
# With XLA_FLAGS= in the environment, as in the gate, everything is compiled as users' programs are.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """Skips what is marked `optimised` where programs are compiled quickly."""
    if "optimization_level=0" in os.environ["XLA_FLAGS"]:
        skip = pytest.mark.skip(reason="a bar at the edge of rounding, for optimised programs: XLA_FLAGS= make test")
        for item in items:
            if "optimised" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped():
    """Frees a file's compiled programs: each is mapped into memory piece by piece, and Linux gives a process 65,530 such pieces."""
    yield
    jax.clear_caches()
    gc.collect()


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
