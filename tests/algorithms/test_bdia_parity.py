"""Every sampler against the NumPy reference, float64: trajectories to 1e-8, tables to 1e-9."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from reference import bdia as reference

from janax.algorithms import bdia

N = 12


def close(ours, theirs, tolerance=1e-8):
    scale = max(1.0, float(np.abs(theirs).max()))
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance * scale)


def test_table_by_hand(x64):
    """VE: z_{i-1} = g z_{i+1} + (1 - g) z_i - (h_i + g h_{i+1}) eps."""
    grid = bdia.edm_grid(6)
    h = np.diff(grid.sigma)
    table = bdia.coefficients(grid, 0.7, coords="ve")
    np.testing.assert_allclose(table.a, 0.7, rtol=1e-12)
    np.testing.assert_allclose(table.b, 0.3, rtol=1e-12)
    np.testing.assert_allclose(table.c, -(h[:-1] + 0.7 * h[1:]), rtol=1e-9)


@pytest.mark.parametrize("coords", ["vp", "ve", "native"])
def test_table_against_moves(problem, coords, x64):
    """A, B, C read off the Move form applied to unit inputs, in each coordinate system."""
    grid = problem.grid(N)
    scale = {"vp": np.hypot(grid.alpha, grid.sigma), "ve": grid.alpha, "native": np.ones(N + 1)}[coords]
    gamma = np.linspace(0.2, 1.0, N - 1)
    table = bdia.coefficients(grid, gamma, coords=coords)
    for i in range(1, N):

        def below(z_ip1, z_i, e, i=i):
            # gamma acts on the state divided by the scale of its coordinates
            up = z_ip1 - reference.move(z_i, e, i, i + 1, grid.alpha, grid.sigma)
            return gamma[i - 1] * scale[i - 1] * up / scale[i + 1] + reference.move(z_i, e, i, i - 1, grid.alpha, grid.sigma)

        expected = [below(1.0, 0.0, 0.0), below(0.0, 1.0, 0.0), below(0.0, 0.0, 1.0)]
        np.testing.assert_allclose([table.a[i - 1], table.b[i - 1], table.c[i - 1]], expected, rtol=1e-9, atol=1e-12)


def test_belm_table_as_printed(problem, x64):
    grid = problem.grid(N)
    al, sb = grid.alpha, grid.sigma / grid.alpha
    h = np.diff(sb)
    table = bdia.belm_coefficients(grid)
    for i in range(1, N):
        ratio = h[i - 1] / h[i]
        expected = [
            ratio**2 * al[i - 1] / al[i + 1],
            (1 - ratio**2) * al[i - 1] / al[i],
            -h[i - 1] * (h[i - 1] + h[i]) / h[i] * al[i - 1],
        ]
        np.testing.assert_allclose([table.a[i - 1], table.b[i - 1], table.c[i - 1]], expected, rtol=1e-9, atol=1e-12)


def test_known_belm_ratios():
    """h_i / h_{i+1} on the Stable Diffusion linspace grid as published with the specification: .27, 1.71, 1.24, 1.03, 1.09; 22 rows above 1."""
    grid = bdia.vp_grid(reference.SD_ALPHABAR, 50)
    h = np.diff(bdia.sigma_bar(grid))
    np.testing.assert_allclose((h[:-1] / h[1:])[:5], [0.27, 1.71, 1.24, 1.03, 1.09], atol=0.006)
    table = bdia.belm_coefficients(grid)
    np.testing.assert_allclose(table.a[:5], [0.073, 2.97, 1.58, 1.09, 1.23], atol=0.006)
    assert int(np.sum(table.a > 1)) == 22
    assert np.prod(table.a) == pytest.approx(6e-2, rel=0.02)
    offset = bdia.belm_coefficients(bdia.vp_grid(reference.SD_ALPHABAR, 50, "leading", 1, "first"))
    assert offset.a[0] == pytest.approx(0.015, abs=5e-4)
    assert np.prod(offset.a) == pytest.approx(1.1e-2, rel=0.02)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.96, 1.0])
def test_bdia_sample(problem, gamma, x64):
    grid = problem.grid(N)
    z = problem.start(grid)
    pair = bdia.sample(problem.noise_fn, None, jnp.asarray(z), grid, bdia.coefficients(grid, gamma, coords="native"))
    expected = reference.bdia(problem.eps(grid), z, grid.alpha, grid.sigma, np.full(N, gamma))
    close(pair.z_i, expected[0])
    close(pair.z_ip1, expected[1])


def test_obelm_sample_is_bdia_with_its_own_gamma(problem, x64):
    grid = problem.grid(N)
    z = problem.start(grid)
    table = bdia.belm_coefficients(grid)
    pair = bdia.sample(problem.noise_fn, None, jnp.asarray(z), grid, table)
    expected = reference.bdia(problem.eps(grid), z, grid.alpha, grid.sigma, reference.obelm_gamma(grid.alpha, grid.sigma))
    close(pair.z_i, expected[0])
    if np.all(table.a <= 1):
        same = bdia.coefficients(grid, table.a, coords="native")
        for ours, theirs in zip(same, table):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", [N, 8, 2])
def test_bdia_encode_and_decode(problem, levels, x64):
    grid = problem.grid(N)
    z = np.random.default_rng(3).normal(size=(5, 8)) * 0.4
    table = bdia.coefficients(grid, 0.9, coords="native")
    pair = bdia.encode(problem.noise_fn, None, jnp.asarray(z), grid, table, num_levels=levels)
    expected = reference.bdia_encode(problem.eps(grid), z, grid.alpha, grid.sigma, np.full(N, 0.9), levels)
    close(pair.z_i, expected[0])
    close(pair.z_ip1, expected[1])
    other = (np.asarray(expected[0]) + 0.1, np.asarray(expected[1]) - 0.1)
    back = bdia.decode(problem.noise_fn, None, bdia.BdiaState(*map(jnp.asarray, other)), grid, table, num_levels=levels)
    close(back.z_i, reference.bdia_decode(problem.eps(grid), other, grid.alpha, grid.sigma, np.full(N, 0.9), levels)[0])


def test_edit_changes_the_condition(vp, x64):
    grid = vp.grid(N)
    z = np.random.default_rng(3).normal(size=(5, 8)) * 0.4
    table = bdia.coefficients(grid, 0.94)
    edited, info = bdia.edit(vp.noise_fn, None, jnp.asarray(z), grid, table, source=1.0, target=-2.0, strength=0.8)
    gamma, levels = np.full(N, 0.94), int(N * 0.8)
    eps = vp.eps(grid)
    encoded = reference.bdia_encode(lambda z, i: eps(z, i) + 0.05, z, grid.alpha, grid.sigma, gamma, levels)
    expected = reference.bdia_decode(lambda z, i: eps(z, i) - 0.1, encoded, grid.alpha, grid.sigma, gamma, levels)
    close(edited, expected[0])
    close(info.latent_rms, np.sqrt(np.mean(encoded[1] ** 2)))
    assert bool(info.finite)


def test_ddim_both_conventions(problem, x64):
    grid = problem.grid(N)
    z = problem.start(grid)
    close(bdia.ddim_sample(problem.noise_fn, None, jnp.asarray(z), grid), reference.ddim(problem.eps(grid), z, grid.alpha, grid.sigma))
    x = np.random.default_rng(3).normal(size=(5, 8)) * 0.4
    for convention in ("current", "target"):
        ours = bdia.ddim_invert(problem.noise_fn, None, jnp.asarray(x), grid, convention=convention)
        close(ours, reference.ddim_invert(problem.eps(grid), x, grid.alpha, grid.sigma, convention == "target"))


@pytest.mark.parametrize("num_iters", [1, 4])
def test_fixed_point(vp, num_iters, x64):
    grid = vp.grid(N)
    x = np.random.default_rng(3).normal(size=(5, 8)) * 0.4
    ours, info = bdia.fixed_point_invert(vp.noise_fn, None, jnp.asarray(x), grid, num_iters=num_iters)
    close(ours, reference.fixed_point_invert(vp.eps(grid), x, grid.alpha, grid.sigma, num_iters))
    assert info.residual.shape == (N,)
    if num_iters == 1:
        close(ours, np.asarray(bdia.ddim_invert(vp.noise_fn, None, jnp.asarray(x), grid, convention="target")), 1e-12)


@pytest.mark.optimised
@pytest.mark.parametrize("order", ["paper", "alternate"])
@pytest.mark.parametrize("levels", [N, 7])
def test_edict(problem, order, levels, x64):
    grid = problem.grid(N)
    x, y = problem.start(grid), problem.start(grid, seed=2)
    ours = bdia.edict_decode(
        problem.noise_fn, None, bdia.EdictState(jnp.asarray(x), jnp.asarray(y)), grid, p=0.93, order=order, num_levels=levels
    )
    expected = reference.edict_decode(problem.eps(grid), x, y, grid.alpha, grid.sigma, 0.93, order == "alternate", levels)
    close(ours.x, expected[0])
    close(ours.y, expected[1])
    back = bdia.edict_encode(problem.noise_fn, None, ours, grid, p=0.93, order=order, num_levels=levels)
    close(back.x, x, 1e-10)
    close(back.y, y, 1e-10)


def test_heun(problem, x64):
    grid = problem.grid(N)
    z = problem.start(grid)
    close(bdia.heun_sample(problem.noise_fn, None, jnp.asarray(z), grid), reference.heun(problem.eps(grid), z, grid.alpha, grid.sigma))


@pytest.mark.parametrize("variant", ["euler", "heun", "reuse"])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_bdia_heun(edm, variant, gamma, x64):
    grid = edm.grid(N)
    z = edm.start(grid)
    pair = bdia.bdia_heun_sample(edm.noise_fn, None, jnp.asarray(z), grid, gamma=gamma, variant=variant)
    expected = reference.bdia_heun(edm.eps(grid), z, grid.sigma, gamma, variant)
    close(pair.z_i, expected[0])
    close(pair.z_ip1, expected[1])
    if variant != "reuse":
        back = bdia.bdia_heun_encode(edm.noise_fn, None, pair, grid, gamma=gamma, variant=variant)
        tolerance = 1e-10 if gamma == 1.0 else 1e-9  # 2^11 times the rounding of |z| = 80
        close(back.z_ip1, z, tolerance)


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_heun_variants_are_heun_at_gamma_zero(edm, gamma, x64):
    grid = edm.grid(N)
    z = jnp.asarray(edm.start(grid))
    plain = bdia.heun_sample(edm.noise_fn, None, z, grid)
    for variant in ("euler", "heun", "reuse"):
        close(bdia.bdia_heun_sample(edm.noise_fn, None, z, grid, gamma=0.0, variant=variant).z_i, plain, 1e-12)
        mixed = bdia.bdia_heun_sample(edm.noise_fn, None, z, grid, gamma=gamma, variant=variant).z_i
        assert float(jnp.abs(mixed - plain).max()) > 1e-4


def test_dpm_solver(problem, x64):
    grid = problem.grid(N)
    z = problem.start(grid)
    ours = bdia.dpm_solver_2m_sample(problem.noise_fn, None, jnp.asarray(z), grid)
    close(ours, reference.dpm_solver_2m(problem.eps(grid), z, grid.alpha, grid.sigma, True))
    upper = bdia.Grid(*(x[1:] for x in grid))
    for lower in (True, False):
        ours = bdia.dpm_solver_2m_sample(problem.noise_fn, None, jnp.asarray(z), upper, lower_order_final=lower)
        close(ours, reference.dpm_solver_2m(problem.eps(upper), z, upper.alpha, upper.sigma, lower))


def test_reversible_heun(problem, x64):
    grid = problem.grid(N)
    z = problem.start(grid)
    state = bdia.reversible_heun_sample(problem.noise_fn, None, jnp.asarray(z), grid)
    close(state.z, reference.reversible_heun(problem.eps(grid), z, grid.alpha, grid.sigma))
    close(bdia.reversible_heun_encode(problem.noise_fn, None, state, grid).z, z, 1e-11)


def test_coupled_euler_by_hand(problem, x64):
    grid = problem.grid(N)
    z = problem.start(grid)
    state = bdia.coupled_sample(problem.noise_fn, None, jnp.asarray(z), grid, tableau=bdia.EULER, zeta=0.99)
    close(state.x, reference.mccallum_foster_euler(problem.eps(grid), z, grid.alpha, grid.sigma, 0.99))


@pytest.mark.parametrize("name", ["EULER", "MIDPOINT", "HEUN", "RALSTON", "SSPRK3", "RK4", "DOPRI5", "TSIT5"])
def test_tableaus(name, x64):
    """Row sums, weights, and the measured order on dy/ds = -y + cos s (as a velocity, through one long step halved)."""
    tableau = getattr(bdia, name)
    np.testing.assert_allclose([sum(row) for row in tableau.a], tableau.c, atol=1e-12)
    assert sum(tableau.b) == pytest.approx(1.0, abs=1e-12)

    def integrate(steps):
        y, s, h = 1.0, 0.0, 2.0 / steps
        for _ in range(steps):
            k = []
            for row, c in zip(tableau.a, tableau.c):
                k.append(-(y + h * sum(a * q for a, q in zip(row, k))) + np.cos(s + c * h))
            y, s = y + h * sum(b * q for b, q in zip(tableau.b, k)), s + h
        return y

    exact = 0.5 * np.exp(-2.0) + (np.cos(2.0) + np.sin(2.0)) / 2
    order = np.log2(abs(integrate(16) - exact) / abs(integrate(32) - exact))
    assert order == pytest.approx(tableau.order, abs=0.35)


@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_coupled_round_trip_with_stages_between_levels(vp, prediction, x64):
    grid = bdia.vp_grid(reference.SD_ALPHABAR, N, final="first", spacing="trailing")
    grid = grid._replace(time=bdia.sigma_bar(grid))
    levels = lambda sb: (1 / np.sqrt(1 + sb**2), sb)  # noqa: E731
    z = jnp.asarray(vp.start(grid))
    settings = {"tableau": bdia.RK4, "prediction": prediction, "levels": levels}
    state = bdia.coupled_sample(vp.noise_fn, None, z, grid, **settings)
    close(bdia.coupled_encode(vp.noise_fn, None, state, grid, **settings).x, z, 1e-9)


@pytest.mark.parametrize("method", ["euler", "midpoint", "fireflow", "uni"])
def test_flow_methods_by_hand(method, x64):
    """dz/dt = -z^2 over uneven times, two steps written out."""
    f = lambda z, t: -z * z + t  # noqa: E731
    times, z = np.array([0.0, 0.3, 0.5]), 1.2
    slope = f(z, times[0])
    for t, t_next in itertools.pairwise(times):
        d = t_next - t
        if method == "euler":
            step = f(z, t)
        elif method == "midpoint":
            step = f(z + d / 2 * f(z, t), t + d / 2)
        elif method == "fireflow":
            step = slope = f(z + d / 2 * slope, t + d / 2)
        else:
            step = slope = f(z + d * slope, t_next)
        z = z + d * step
    ours = bdia.flow_solve(lambda params, z, t: f(z, t), None, jnp.asarray([1.2]), times, method=method)
    close(ours, np.array([z]), 1e-13)


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
def test_predictions(kind, x64):
    rng = np.random.default_rng(0)
    x, e = rng.normal(size=(2, 3, 4))
    alpha, sigma = (0.6, 0.8) if kind != "flow" else (0.7, 0.3)
    z = alpha * x + sigma * e
    prediction = {"eps": e, "x0": x, "v": alpha * e - sigma * x, "flow": e - x}[kind]
    np.testing.assert_allclose(bdia.to_noise(prediction, z, alpha, sigma, kind=kind), e, atol=1e-12)
    np.testing.assert_allclose(bdia.from_noise(e, z, alpha, sigma, kind=kind), prediction, atol=1e-12)


def test_noise_fn_from_velocity_on_a_flow_grid(x64):
    """Exact Euler for straight paths: one sample moves along a constant velocity whatever gamma is."""
    x, e = np.random.default_rng(0).normal(size=(2, 4))
    noise_fn = bdia.noise_fn_from(lambda params, z, t: jnp.asarray(e - x), bdia.flow_schedule, kind="flow")
    grid = bdia.flow_grid(7, t_max=0.9)
    z = 0.1 * x + 0.9 * e
    for gamma in (0.0, 0.5, 1.0):
        np.testing.assert_allclose(
            bdia.sample(noise_fn, None, jnp.asarray(z), grid, bdia.coefficients(grid, gamma, coords="native")).z_i, x, atol=1e-12
        )


def test_guidance(x64):
    noise_fn = lambda params, z, t, cond: z * cond[..., None]  # noqa: E731
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
    cond = bdia.Guidance(cond=jnp.asarray([1.0, 2.0, 3.0]), null=jnp.zeros(3), weight=3.0)
    expected = 3.0 * np.asarray(z) * np.array([[1.0], [2.0], [3.0]])
    for one_call in (True, False):
        np.testing.assert_allclose(bdia.guided(noise_fn, one_call=one_call)(None, z, 0.0, cond), expected, rtol=1e-12)


def test_vp_grid_conventions():
    table = reference.SD_ALPHABAR
    official = bdia.vp_grid(table, 50, "leading", 0, "first", time_0=-20)
    assert official.time[0] == -20 and official.alpha[0] == official.alpha[1]
    np.testing.assert_array_equal(official.time[1:4], [0, 20, 40])
    text = bdia.vp_grid(table, 10, "leading", 1, "first")
    np.testing.assert_array_equal(text.time[1:], np.arange(10) * 100 + 1)
    line = bdia.vp_grid(table, 50)
    assert line.alpha[0] == 1 and line.sigma[0] == 0 and line.time[-1] == 999
    trailing = bdia.vp_grid(table, 50, "trailing")
    assert trailing.time[-1] == 999 and trailing.time[1] == 19
    np.testing.assert_allclose(line.alpha**2 + line.sigma**2, 1, atol=1e-15)


def test_edm_grid_by_formula():
    grid = bdia.edm_grid(18)
    k = np.arange(18)
    sigma = (80 ** (1 / 7) + k / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(grid.sigma[::-1], np.append(sigma, 0), rtol=1e-12)
    assert grid.num_steps == 18


def test_flow_grid_shift():
    grid = bdia.flow_grid(4, t_max=0.8, shift=3.0)
    t = np.linspace(0, 0.8, 5)
    np.testing.assert_allclose(grid.time, 3 * t / (1 + 2 * t), rtol=1e-12)
    np.testing.assert_allclose(grid.alpha + grid.sigma, 1, rtol=1e-12)
