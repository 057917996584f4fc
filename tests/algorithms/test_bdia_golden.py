"""The base samplers against the schedulers of diffusers, from files made by tests/golden/make_schedulers.py (its docstring has the versions).

What is compared is every state that a sampler shows the network, which for Heun includes the predictor's, and the end. The grids are made of
the scheduler's own float32 tables, since a float32 cumulative product is off by 1e-6 relative, which would hide the samplers' rounding.

Tolerances, relative to the largest entry of each state. The public code rounds some 8 terms of the size of the state per step, to u = 6e-8;
the network neither damps nor amplifies. Over 50 steps of one sign that would be 400 u = 2.4e-5, as a random walk sqrt(400) u = 1.2e-6, and
its largest over 32 entries three times as much: 1e-5 lies between the two, for janax in float32 and in float64 alike. Where the public step
code also ran in float64, u = 1.1e-16 and the count of one sign gives 4e-14, on either side: 1e-13.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janax.algorithms import bdia

GOLDEN = Path(__file__).parents[1] / "golden" / "schedulers"
FLOAT32, FLOAT64 = 1e-5, 1e-13


@functools.cache
def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def features(params, z, t):
    """tanh(z weight + cos(rate t + phase)) over the flattened example."""
    weight, rate, phase = (jnp.asarray(params[name], z.dtype) for name in ("weight", "rate", "phase"))
    mixed = jnp.matmul(z.reshape(z.shape[0], -1), weight, precision="highest") + jnp.cos(rate * t + phase)[None]
    return jnp.tanh(mixed).reshape(z.shape)


def noise_fn(params, z, t):
    tau = t / 1000
    sigma = jnp.sqrt(-jnp.expm1(-tau * (0.85 + tau * (2.34 + tau * 2.15))))
    return sigma * z + 0.3 * features(params, z, tau)


class Shown:
    """A network that remembers the states and times it is shown, in the order of execution."""

    def __init__(self, fn=noise_fn):
        self.fn, self.states, self.times = fn, [], []

    def __call__(self, params, z, t):
        jax.debug.callback(self.keep, z, t, ordered=True)
        return self.fn(params, z, t)

    def keep(self, z, t):
        self.states.append(np.array(z))
        self.times.append(float(t))


def compare(case, network, result, dtype):
    """Every state the network saw, and the result, against one case."""
    jax.effects_barrier()
    assert result.dtype == dtype
    ours, theirs = [*network.states, np.asarray(result)], [*case["shown"], case["result"]]
    assert len(ours) == len(theirs)
    np.testing.assert_allclose(network.times, case["times"], rtol=1e-6)
    assert max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs)) < FLOAT32
    if dtype == "float64" and "float64" in case:
        assert np.abs(result - case["float64"]).max() / np.abs(case["float64"]).max() < FLOAT64


def case_of(file, name):
    return {key.removeprefix(f"{name}_"): value for key, value in golden(file).items() if key.startswith(f"{name}_")}


def start(dtype):
    return jnp.asarray(golden("network")["start"], dtype)


def grid_of_moves(source, target, time):
    """The grid whose downward moves are those between the given alphabars, [N] each, noise to data; `time` [N] goes with `source`.

    A scheduler that steps to another level than the one it goes on from has no variance-preserving grid. Its moves z -> m z + k eps still
    have one: alpha_i = alpha_{i-1} / m and sigma_i = (sigma_{i-1} - k) / m, up from alpha_0 = 1, sigma_0 = 0.
    """
    alpha, sigma = [1.0], [0.0]
    for a_i, a_im1 in zip(source[::-1], target[::-1]):
        m = np.sqrt(a_im1 / a_i)
        k = np.sqrt(1 - a_im1) - m * np.sqrt(1 - a_i)
        alpha.append(alpha[-1] / m)
        sigma.append((sigma[-1] - k) / m)
    return bdia.Grid(np.array(alpha), np.array(sigma), np.append(0.0, time[::-1]))


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("final", ["one", "first"])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
def test_ddim(spacing, offset, final, steps, dtype):
    table, case = golden("ddim")["alphas_cumprod"], case_of("ddim", f"{spacing}{offset}_{final}_{steps}")
    if spacing == "linspace":  # diffusers steps from t to t - T // N, and then goes on from the next listed time as if it were there
        below = case["times"].astype(int) - 1000 // steps
        alphabar = table.astype(np.float64)
        last = 1.0 if final == "one" else alphabar[0]
        grid = grid_of_moves(alphabar[case["times"].astype(int)], np.where(below < 0, last, alphabar[np.maximum(below, 0)]), case["times"])
    else:
        grid = bdia.vp_grid(table, steps, spacing, offset, final)
    network = Shown()
    result = bdia.ddim_sample(network, golden("network"), start(dtype), grid)
    compare(case, network, result, dtype)


def test_linspace_goes_to_the_next_listed_time(x64):
    """Where janax departs from diffusers on purpose: its linspace grid joins up. The gap is what the wrong level costs at N = 10, 50."""
    for steps, least in ((10, 0.05), (50, 0.01)):
        grid = bdia.vp_grid(golden("ddim")["alphas_cumprod"], steps, "linspace")
        result = bdia.ddim_sample(noise_fn, golden("network"), start("float64"), grid)
        assert np.abs(result - case_of("ddim", f"linspace0_one_{steps}")["result"]).max() > least


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 1), ("trailing", 0)])
def test_bdia_with_gamma_zero_is_public_ddim(spacing, offset, steps, dtype):
    grid = bdia.vp_grid(golden("ddim")["alphas_cumprod"], steps, spacing, offset, "first")
    network = Shown()
    result = bdia.sample(network, golden("network"), start(dtype), grid, bdia.coefficients(grid, 0.0))
    compare(case_of("ddim", f"{spacing}{offset}_first_{steps}"), network, result.z_i, dtype)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("final", ["one", "first"])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0)])
def test_ddim_inversion_with_target_times(spacing, offset, final, steps, dtype):
    grid = bdia.vp_grid(golden("ddim_inverse")["alphas_cumprod"], steps, spacing, offset, final)
    network = Shown()
    result = bdia.ddim_invert(network, golden("network"), start(dtype), grid, convention="target")
    compare(case_of("ddim_inverse", f"{spacing}{offset}_{final}_{steps}"), network, result, dtype)


def vp_grid_of(sigmas, times):
    """Levels told by sigma / alpha, noise to data, as variance-preserving states."""
    sb = sigmas[::-1].astype(np.float64)
    alpha = 1 / np.sqrt(1 + sb**2)
    return bdia.Grid(alpha, sb * alpha, np.append(0.0, times[::-1]))


@pytest.mark.parametrize(
    ("name", "lower_order_final"),
    [
        ("zero_lower_10", None),
        ("zero_lower_50", None),
        ("sigma_min_lower_10", True),  # diffusers lowers the order at the end for fewer than 15 steps
        ("sigma_min_full_10", False),
        ("sigma_min_lower_50", None),  # and not for more
    ],
)
def test_dpm_solver(name, lower_order_final, dtype):
    case = case_of("dpm_solver", name)
    network = Shown()
    result = bdia.dpm_solver_2m_sample(
        network, golden("network"), start(dtype), vp_grid_of(case["sigmas"], case["times"]), lower_order_final=lower_order_final
    )
    compare(case, network, result, dtype)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("coords", ["vp", "ve"])
def test_heun(coords, steps, dtype):
    """The scheduler's state is z / alpha, and it shows the network alpha times it: once as a grid with alpha, once by hand on alpha = 1."""
    case = case_of("heun", f"karras_{steps}")
    sigmas, times = case["sigmas"], np.append(case["times"][:1], case["times"][1::2])  # a time for each level: inner ones are asked twice
    np.testing.assert_allclose(bdia.edm_grid(steps, sigmas[-2], sigmas[0]).sigma[:0:-1], sigmas[:-1], rtol=1e-6)  # Karras et al., rho = 7
    grid = vp_grid_of(sigmas, times)
    network = Shown()
    if coords == "vp":
        result = bdia.heun_sample(network, golden("network"), start(dtype), grid)
    else:
        own = bdia.Grid(np.ones(steps + 1), bdia.sigma_bar(grid), np.arange(steps + 1.0))

        def scaled(params, zb, level):
            alpha, time = (jnp.asarray(x, zb.dtype)[level.astype(int)] for x in (grid.alpha, grid.time))
            return network(params, alpha * zb, time)

        result = bdia.heun_sample(scaled, golden("network"), start(dtype) / jnp.asarray(grid.alpha[-1], dtype), own)
    compare(case, network, result, dtype)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("kind", ["euler", "dpm"])
def test_edm(kind, steps, dtype):
    """A network inside EDM's preconditioning, sigma_data = 0.5, through the data prediction D = skip z + out F(into z; log(sigma) / 4)."""
    case = case_of("edm", f"{kind}_{steps}")
    grid = bdia.edm_grid(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0)
    np.testing.assert_allclose(grid.sigma[::-1], case["sigmas"], rtol=2e-6)  # their seventh power in float32: 2 x 7 roundings and its table
    levels = case["sigmas"][::-1].astype(np.float64)
    grid = bdia.Grid(grid.alpha, levels, levels)
    network = Shown(features)

    def denoise(params, z, sigma):
        total = sigma**2 + 0.25
        return 0.25 / total * z + 0.5 * sigma / jnp.sqrt(total) * network(params, z / jnp.sqrt(total), jnp.log(sigma) / 4)

    sampler = bdia.ddim_sample if kind == "euler" else bdia.dpm_solver_2m_sample
    top = jnp.asarray(levels[-1], dtype)
    result = sampler(bdia.noise_fn_from(denoise, bdia.edm_schedule, kind="x0"), golden("network"), top * start(dtype), grid)
    compare(case, network, result, dtype)
