"""The exact two-Gaussian model as a noise_fn, on three grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import bdia as reference

from janax.algorithms import bdia

MODEL = reference.Mixture()


def with_level_times(grid):
    """The same levels, the network being told sigma-bar, from which it can tell alpha and sigma exactly."""
    return grid._replace(time=bdia.sigma_bar(grid))


GRIDS = {
    "vp": lambda n: with_level_times(bdia.vp_grid(reference.SD_ALPHABAR, n)),
    "edm": lambda n: with_level_times(bdia.edm_grid(n)),
    "flow": lambda n: with_level_times(bdia.flow_grid(n)),
}
ALPHA_OF = {
    "vp": lambda sb: 1 / jnp.sqrt(1 + sb**2),
    "edm": jnp.ones_like,
    "flow": lambda sb: 1 / (1 + sb),
}


class Problem:
    def __init__(self, kind):
        self.kind = kind

    def grid(self, num_steps):
        return GRIDS[self.kind](num_steps)

    def noise_fn(self, params, z, t, cond=None):
        alpha = ALPHA_OF[self.kind](t)
        with jax.numpy_rank_promotion("allow"):  # the reference is plain NumPy
            eps = MODEL.eps(z, alpha, t * alpha, jnp).astype(z.dtype)
        if params is not None:
            eps = eps + params["scale"].astype(z.dtype) * jnp.tanh(z)
        if cond is not None:
            eps = eps + jnp.asarray(cond).astype(z.dtype) * 0.05
        return eps

    def eps(self, grid):
        return lambda z, i: MODEL.eps(z, grid.alpha[i], grid.sigma[i])

    def start(self, grid, batch=16, seed=1):
        return np.hypot(grid.alpha[-1], grid.sigma[-1]) * np.random.default_rng(seed).normal(size=(batch, 8))


@pytest.fixture(params=["vp", "edm", "flow"])
def problem(request):
    return Problem(request.param)


@pytest.fixture
def vp():
    return Problem("vp")


@pytest.fixture
def edm():
    return Problem("edm")
