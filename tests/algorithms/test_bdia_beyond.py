"""Relatives of BDIA beyond the paper: k-step BELM, BDIA on DPM-Solver++, the reverse diffusion, adaptive levels, helped fixed points."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import bdia as reference
from reference.bdia import Mixture

from janax.algorithms import bdia

MODEL = Mixture()


def rms(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


def test_two_steps_are_o_belm(problem, x64):
    grid = problem.grid(12)
    table, many = bdia.belm_coefficients(grid), bdia.multistep_coefficients(grid, 2)
    expected = np.stack([table.b, table.a], axis=1)
    np.testing.assert_allclose(many.a, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    np.testing.assert_allclose(many.c[:, 0], table.c, rtol=1e-9)
    z = jnp.asarray(problem.start(grid))
    ours, theirs = jax.jit(
        lambda z: (bdia.multistep_sample(problem.noise_fn, None, z, grid, k=2), bdia.sample(problem.noise_fn, None, z, grid, table))
    )(z)
    np.testing.assert_allclose(ours.z, jnp.stack(theirs), rtol=0, atol=1e-9 * float(jnp.abs(z).max()))


def test_three_steps_on_even_steps_by_hand():
    """y_{n+1} = -9 y_n + 9 y_{n-1} + y_{n-2} + 6 h (f_n + f_{n-1}), with roots 1, -.101 and -9.9: why k = 2 is what one samples with."""
    grid = bdia.Grid(alpha=np.ones(8), sigma=np.arange(8.0), time=np.arange(8.0))
    table = bdia.multistep_coefficients(grid, 3)
    np.testing.assert_allclose(table.a, np.tile([-9.0, 9.0, 1.0], (5, 1)), atol=1e-9)
    np.testing.assert_allclose(table.c, np.tile([-6.0, -6.0], (5, 1)), atol=1e-9)
    np.testing.assert_allclose(bdia.multistep_roots(table, grid), 5 + np.sqrt(24), rtol=1e-9)
    np.testing.assert_allclose(bdia.multistep_roots(bdia.multistep_coefficients(grid, 2), grid), 1.0, rtol=1e-9)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_rule_is_exact_for_polynomials(problem, k, x64):
    """zb = sb^l with eps = l sb^(l-1), for l up to 2 k - 2, in the grid's own scaling."""
    grid = problem.grid(12)
    table, sb = bdia.multistep_coefficients(grid, k), bdia.sigma_bar(problem.grid(12))
    unit = sb / sb[-1]
    for degree in range(2 * k - 1):
        zb, eps = unit**degree, degree * unit ** max(degree - 1, 0) / sb[-1]
        for i in range(1, 14 - k):
            value = table.a[i - 1] @ (grid.alpha * zb)[i : i + k] + table.c[i - 1] @ eps[i : i + k - 1]
            # the weights of uneven neighbours are large and cancel: rounding is relative to their sum
            scale = np.abs(table.a[i - 1]) @ (grid.alpha * zb)[i : i + k] + np.abs(table.c[i - 1]) @ eps[i : i + k - 1]
            assert abs(value - grid.alpha[i - 1] * zb[i - 1]) <= 1e-10 * max(scale, 1.0)


@pytest.mark.parametrize("k", [3, 4])
def test_multistep_round_trips(vp, k, x64):
    """Both ways round, partly and wholly. Rounding grows by the largest root per step (k = 3: about 10), hence few steps and this bar."""
    grid = vp.grid(9)
    z = jnp.asarray(vp.start(grid, batch=4))
    f = vp.noise_fn

    @jax.jit
    def both_ways(z):
        data = bdia.multistep_sample(f, None, z, grid, k=k)
        parts = [bdia.multistep_encode(f, None, data.z[0], grid, k=k, num_levels=levels) for levels in (6, 9)]
        backs = [bdia.multistep_decode(f, None, state, grid, k=k, num_levels=levels).z[0] for levels, state in zip((6, 9), parts)]
        return data, bdia.multistep_encode(f, None, data, grid, k=k), parts, backs

    data, again, parts, backs = both_ways(z)
    table = bdia.multistep_coefficients(grid, k)
    growth = np.prod(np.maximum(bdia.multistep_roots(table, grid), 1.0)) * np.prod(np.maximum(1 / np.abs(table.a[:, -1]), 1.0))
    scale = float(jnp.abs(data.z).max())
    assert float(jnp.abs(again.z[-1] - z).max()) <= 1e-16 * growth * max(scale, 1.0) * 100
    for state, back in zip(parts, backs):
        assert rms(back - data.z[0]) <= 1e-16 * growth * max(float(jnp.abs(state.z).max()), 1.0) * 100


def test_three_steps_in_one_call_are_three_calls(vp, x64):
    """The scan against the recurrence written out, k = 3."""
    grid = vp.grid(6)
    z = np.asarray(vp.start(grid, batch=3))
    eps, table = vp.eps(grid), bdia.multistep_coefficients(grid, 3)
    low = bdia.belm_coefficients(grid)
    levels = {6: z, 5: reference.move(z, eps(z, 6), 6, 5, grid.alpha, grid.sigma)}
    noise = {5: eps(levels[5], 5)}
    levels[4] = low.a[4] * levels[6] + low.b[4] * levels[5] + low.c[4] * noise[5]
    for i in range(4, 0, -1):
        noise[i] = eps(levels[i], i)
        a, c = table.a[i - 1], table.c[i - 1]
        levels[i - 1] = a[0] * levels[i] + a[1] * levels[i + 1] + a[2] * levels[i + 2] + c[0] * noise[i] + c[1] * noise[i + 1]
    ours = jax.jit(lambda z: bdia.multistep_sample(vp.noise_fn, None, z, grid, k=3))(z)
    scale = max(np.abs(levels[i]).max() for i in range(3))
    np.testing.assert_allclose(ours.z, np.stack([levels[0], levels[1], levels[2]]), rtol=0, atol=1e-9 * scale)


def test_multistep_gradients_agree(vp, x64):
    grid = vp.grid(6)
    z = jnp.asarray(vp.start(grid, batch=3))

    def loss(params, gradient):
        return jnp.mean(jnp.square(bdia.multistep_sample(vp.noise_fn, params, z, grid, k=3, gradient=gradient).z[0]))

    plain, walked = (
        jax.jit(jax.grad(functools.partial(loss, gradient=g)))({"scale": jnp.asarray(0.1)})["scale"] for g in ("autodiff", "reversible")
    )
    np.testing.assert_allclose(walked, plain, rtol=1e-6)


def test_bdia_on_dpm_solver(problem, x64):
    grid = problem.grid(12)
    z = problem.start(grid)
    gammas = (0.0, 0.5, 1.0)
    plain, sampled = jax.jit(
        lambda z: (
            bdia.dpm_solver_2m_sample(problem.noise_fn, None, z, grid),
            [bdia.bdia_dpm_solver_2m_sample(problem.noise_fn, None, z, grid, gamma=gamma) for gamma in gammas],
        )
    )(z)
    for gamma, ours in zip(gammas, sampled):
        a = np.concatenate([[np.nan], bdia.coefficients(grid, gamma).a])
        theirs = reference.bdia_dpm_solver_2m(problem.eps(grid), z, grid.alpha, grid.sigma, a)
        scale = max(1.0, np.abs(theirs[1]).max())
        np.testing.assert_allclose(ours.z_i, theirs[0], rtol=0, atol=1e-8 * scale)
        np.testing.assert_allclose(ours.z_ip1, theirs[1], rtol=0, atol=1e-8 * scale)
    np.testing.assert_allclose(sampled[0].z_i, plain, rtol=0, atol=1e-12 * max(1.0, float(jnp.abs(plain).max())))


def test_anderson_against_least_squares(vp, x64):
    grid = vp.grid(8)
    z = reference.ddim(vp.eps(grid), vp.start(grid, batch=4), grid.alpha, grid.sigma)
    for K, memory in ((3, 1), (4, 2)):
        invert = functools.partial(bdia.fixed_point_invert, vp.noise_fn, None, grid=grid, num_iters=K, memory=memory)
        ours, _ = jax.jit(invert)(z)
        theirs = reference.anderson_invert(vp.eps(grid), z, grid.alpha, grid.sigma, K, memory)
        # the ridge moves the weights by 10 units times the condition of a 3 x 3 system whose residuals differ by 1e-2 to 1e-4 in size
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_anderson_needs_fewer_iterations(vp, x64):
    grid = vp.grid(10)
    start = jnp.asarray(vp.start(grid))
    z = jax.jit(lambda z: bdia.ddim_sample(vp.noise_fn, None, z, grid))(start)
    error = {}
    for memory in (0, 3):
        found, info = jax.jit(functools.partial(bdia.fixed_point_invert, vp.noise_fn, None, grid=grid, num_iters=8, memory=memory))(z)
        error[memory] = rms(found - start)
        assert bool(jnp.all(jnp.isfinite(info.residual)))
    assert error[3] < 0.1 * error[0]


def test_averaging_takes_the_mean_of_the_last_iterates(vp, x64):
    grid = vp.grid(6)
    z = jnp.asarray(vp.start(grid, batch=2))
    invert = functools.partial(bdia.fixed_point_invert, vp.noise_fn, None, grid=grid, num_levels=1)
    first, mean = jax.jit(lambda z: ([invert(z, num_iters=k)[0] for k in (2, 3, 4)], invert(z, num_iters=4, average_last=3)[0]))(z)
    np.testing.assert_allclose(mean, sum(first) / 3, rtol=1e-12)


def test_fixed_point_refuses_what_cannot_be(vp):
    z = jnp.zeros((1, 8))
    with pytest.raises(ValueError, match="'memory' is 5"):
        bdia.fixed_point_invert(vp.noise_fn, None, z, vp.grid(4), memory=5)
    with pytest.raises(ValueError, match="'average_last' is 0"):
        bdia.fixed_point_invert(vp.noise_fn, None, z, vp.grid(4), average_last=0)


@pytest.mark.optimised
@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("tableau", [bdia.EULER, bdia.MIDPOINT, bdia.RK4])
def test_diffusion_round_trips_with_the_same_key(vp, tableau, prediction, x64):
    grid = vp.grid(12)
    if prediction == "data":
        grid = bdia.Grid(*(x[1:] for x in grid))  # without sigma_0 = 0
    z, key = jnp.asarray(vp.start(grid)), jax.random.key(3)
    options = {"tableau": tableau, "prediction": prediction, "churn": 0.7, "key": key, "zeta": 0.9}
    data = bdia.coupled_sample(vp.noise_fn, None, z, grid, **options)
    back = bdia.coupled_encode(vp.noise_fn, None, data, grid, **options)
    # rounding grows by 1/zeta per step, and by the steps of a stiff clock in data prediction
    assert float(jnp.abs(back.x - z).max()) <= (1e-12 if prediction == "noise" else 1e-9)
    other = bdia.coupled_sample(vp.noise_fn, None, z, grid, **(options | {"key": jax.random.key(4)}))
    assert float(jnp.abs(other.x - data.x).max()) > 1e-3


def test_diffusion_against_its_recurrence(vp, x64):
    """The Euler form, with the noise of every level drawn from the key and the level as documented."""
    grid, key, churn = vp.grid(8), jax.random.key(5), 0.6
    z, sb = vp.start(grid, batch=4), bdia.sigma_bar(vp.grid(8))
    noise = [None] + [
        churn * np.sqrt(sb[i] ** 2 - sb[i - 1] ** 2) * np.asarray(jax.random.normal(jax.random.fold_in(key, i), z.shape, jnp.float64))
        for i in range(1, 9)
    ]
    sample = functools.partial(bdia.coupled_sample, vp.noise_fn, None, grid=grid, tableau=bdia.EULER, churn=churn, zeta=0.9)
    ours = jax.jit(lambda z, key: sample(z, key=key))(z, key).x
    theirs = reference.coupled_diffusion_euler(vp.eps(grid), z, grid.alpha, grid.sigma, 0.9, churn, noise)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_diffusion_keeps_the_marginals(prediction):
    """Gaussian data of deviation .5: the reverse diffusion ends in its law whatever the churn; 8192 draws, five standard errors + O(1/N)."""
    grid = bdia.vp_grid(reference.SD_ALPHABAR, 101)
    grid = bdia.Grid(*(x[1:] for x in grid._replace(time=bdia.sigma_bar(grid))))

    def noise_fn(params, z, t):
        alpha = 1 / jnp.sqrt(1 + t**2)
        sigma = t * alpha
        return sigma * z / (alpha**2 * 0.25 + sigma**2)

    top = np.hypot(0.5 * grid.alpha[-1], grid.sigma[-1])
    z = jnp.asarray(top * np.random.default_rng(0).normal(size=8192), jnp.float32)
    for churn in (0.0, 1.0):
        options = {"churn": churn, "key": jax.random.key(1)} if churn else {}
        run = functools.partial(
            bdia.coupled_sample, noise_fn, None, grid=grid, tableau=bdia.HEUN, prediction=prediction, zeta=0.9, **options
        )
        x = jax.jit(run)(z).x
        expected = np.hypot(0.5 * grid.alpha[0], grid.sigma[0])
        assert abs(float(jnp.std(x)) / expected - 1) < 5 / np.sqrt(2 * 8192) + 0.02


@pytest.mark.slow
def test_diffusion_gradient_and_vmap(vp):
    grid = vp.grid(8)
    z = jnp.asarray(vp.start(grid, batch=4), jnp.float32)

    def run(params, key, z, gradient):
        return bdia.coupled_sample(vp.noise_fn, params, z, grid, churn=0.5, key=key, zeta=0.95, gradient=gradient).x

    loss = lambda params, gradient: jnp.mean(jnp.square(run(params, jax.random.key(0), z, gradient)))  # noqa: E731
    plain, walked = (jax.jit(jax.grad(functools.partial(loss, gradient=g)))({"scale": 0.1})["scale"] for g in ("autodiff", "reversible"))
    np.testing.assert_allclose(walked, plain, rtol=1e-4)  # float32 states, rebuilt with amplification .95^-8 = 1.5
    keys = jax.random.split(jax.random.key(1), 4)
    mapped = jax.vmap(lambda key, z: run(None, key, z, "autodiff"))(keys, z)
    alone = run(None, keys[2], z[2], "autodiff")
    # y = z / alpha reaches 60 at the top: one rounding is 7e-6, and there are eight steps
    np.testing.assert_allclose(mapped[2], alone, rtol=0, atol=6e-5)
    with pytest.raises(ValueError, match=r"'churn' is 0\.5, expected 0, or above 0 together with a 'key'"):
        bdia.coupled_sample(vp.noise_fn, None, z, grid, churn=0.5)


def test_adaptive_levels(problem, x64):
    """A tighter tolerance gives more levels and a smaller error; the grid it returns round-trips like any other."""
    levels = {"vp": lambda s: (1 / np.sqrt(1 + s**2), s), "edm": bdia.edm_levels, "flow": lambda s: (1 / (1 + s), s)}[problem.kind]
    top = float(bdia.sigma_bar(problem.grid(10))[-1])
    alpha = float(levels(np.asarray(top))[0])
    z = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)) * np.hypot(alpha, top * alpha))
    solve = functools.partial(bdia.adaptive_grid, jax.jit(problem.noise_fn), None, z, levels, sb_max=top)
    exact = solve(rtol=1e-6, atol=1e-6)[1].z_0
    lengths, errors = [], []
    for tolerance in (1e-2, 1e-4):
        grid, info = solve(rtol=tolerance, atol=tolerance)
        assert info.num_evaluations == 3 * (grid.num_steps + info.num_rejected) + 1
        lengths.append(grid.num_steps)
        errors.append(rms(info.z_0 - exact))
        assert grid.sigma[0] == 0 and bdia.sigma_bar(grid)[-1] == pytest.approx(top)
    assert lengths[1] > lengths[0] and errors[1] < errors[0] < 0.1
    table = bdia.coefficients(grid, 1.0)
    there = lambda z: bdia.sample(problem.noise_fn, None, z, grid, table)  # noqa: E731
    back = jax.jit(lambda z: bdia.encode(problem.noise_fn, None, there(z), grid, table).z_ip1)(z)
    assert float(jnp.abs(back - z).max()) <= 1e-10 * float(jnp.abs(z).max())


def test_adaptive_refuses():
    z = jnp.ones((2, 8))
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda z: bdia.adaptive_grid(lambda p, z, t: z, None, z, bdia.edm_levels, sb_max=1.0)[1].z_0)(z)
    with pytest.raises(ValueError, match="not finite"):
        bdia.adaptive_grid(lambda p, z, t: z * jnp.nan, None, z, bdia.edm_levels, sb_max=1.0)
    with pytest.raises(ValueError, match="raise rtol"):
        bdia.adaptive_grid(lambda p, z, t: jnp.sin(50 * z), None, z, bdia.edm_levels, sb_max=80.0, rtol=1e-8, atol=1e-8, max_steps=5)
