"""Bad input: one sentence that names the argument and the mend."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import bdia as reference

from janax.algorithms import bdia

Z = jnp.ones((2, 8))


def zero(params, z, t, cond=None):
    return jnp.zeros_like(z)


def grid_of(n=6):
    return bdia.vp_grid(reference.SD_ALPHABAR, n)


@pytest.mark.parametrize("gamma", [-0.1, 1.5, np.nan, np.linspace(0.5, 1.2, 5)])
def test_gamma_out_of_range(gamma):
    with pytest.raises(ValueError, match=r"coefficients: 'gamma' is .* expected within \[0, 1\]"):
        bdia.coefficients(grid_of(), gamma)


def test_gamma_of_wrong_length():
    with pytest.raises(ValueError, match=r"'gamma' has shape \(6,\), expected \[\] or \[5\]"):
        bdia.coefficients(grid_of(), np.ones(6))


def test_gamma_zero_cannot_be_inverted():
    grid = grid_of()
    with pytest.raises(ValueError, match=r"encode: 'coeffs' has a = 0 at level 1, which cannot be inverted; use gamma in \(0, 1\]"):
        bdia.encode(zero, None, Z, grid, bdia.coefficients(grid, 0.0))
    with pytest.raises(ValueError, match=r"bdia_heun_encode: 'gamma' is 0.0, expected within \(0, 1\]"):
        bdia.bdia_heun_encode(zero, None, Z, grid, gamma=0.0)


def test_repeated_level():
    """The official editing grid repeats level 0: BDIA is safe, O-BELM divides by the step."""
    grid = bdia.vp_grid(reference.SD_ALPHABAR, 10, "leading", 0, "first")
    pair = bdia.encode(zero, None, Z, grid, bdia.coefficients(grid, 0.94))
    assert bool(jnp.all(jnp.isfinite(pair.z_ip1)))
    for method in (
        bdia.belm_coefficients,
        lambda g: bdia.dpm_solver_2m_sample(zero, None, Z, g),
        lambda g: bdia.coupled_sample(zero, None, Z, g),
    ):
        with pytest.raises(ValueError, match=r"repeats a level \(0 and 1\), and this method divides by the step"):
            method(grid)


def test_non_monotone_grid():
    grid = grid_of()
    upside_down = bdia.Grid(*(x[::-1] for x in grid))
    for method in (lambda g: bdia.coefficients(g, 1.0), bdia.belm_coefficients, lambda g: bdia.ddim_sample(zero, None, Z, g)):
        with pytest.raises(ValueError, match="not monotone: sigma/alpha falls from level 0 to 1; order it data to noise"):
            method(upside_down)


def test_broken_grids():
    grid = grid_of()
    with pytest.raises(ValueError, match="holds nan or inf"):
        bdia.coefficients(grid._replace(time=grid.time * np.nan), 1.0)
    with pytest.raises(ValueError, match="'sigma' has shape"):
        bdia.coefficients(grid._replace(sigma=grid.sigma[1:]), 1.0)
    with pytest.raises(ValueError, match="expected Grid"):
        bdia.coefficients(None, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'grid' is traced; close over it"):
        jax.jit(lambda alpha: bdia.coefficients(grid._replace(alpha=alpha), 1.0).a)(jnp.asarray(grid.alpha))
    with pytest.raises(ValueError, match="alpha = 0 at the top level"):
        bdia.ddim_sample(zero, None, Z, bdia.flow_grid(5, t_max=1.0))


def test_missing_second_state():
    grid = grid_of()
    table = bdia.coefficients(grid, 1.0)
    for state in (Z, (Z,), bdia.BdiaState(Z, None)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"decode: 'state' must be the pair .* exact inversion needs both states"):
            bdia.decode(zero, None, state, grid, table)  # type: ignore[arg-type]


def test_nan_in_the_image():
    grid = grid_of()
    bad = Z.at[0, 3].set(jnp.nan)
    table = bdia.coefficients(grid, 1.0)
    with pytest.raises(ValueError, match="encode: 'z_0' holds 1 non-finite values of 16"):
        bdia.encode(zero, None, bad, grid, table)
    edited = jax.jit(lambda z: bdia.edit(zero, None, z, grid, table, source=None, target=None))(bad)
    assert not bool(edited[1].finite)


def test_wrong_shapes():
    grid = grid_of()
    table = bdia.coefficients(grid, 1.0)
    with pytest.raises(ValueError, match=r"sample: 'noise_fn\(params, z, t, cond\)' has shape \(2, 7\)"):
        bdia.sample(lambda params, z, t: z[:, 1:], None, Z, grid, table)
    with pytest.raises(ValueError, match=r"step: 'z_ip1' has shape \(3, 8\)"):
        bdia.step(bdia.BdiaState(Z, jnp.ones((3, 8))), Z, bdia.BdiaCoeffs(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="'coeffs' has 8 rows, expected 5"):
        bdia.sample(zero, None, Z, grid, bdia.coefficients(grid_of(9), 1.0))
    with pytest.raises(ValueError, match="'coeffs' must be BdiaCoeffs"):
        bdia.sample(zero, None, Z, grid, 0.9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'num_levels' is 7, expected between 2 and the 6 steps"):
        bdia.encode(zero, None, Z, grid, table, num_levels=7)


def test_reversible_gradient_refuses_what_the_dtype_does_not_bear():
    grid = grid_of(50)
    with pytest.raises(ValueError, match=r"sample: undoing the recurrence amplifies rounding errors 5\.6e\+14 times"):
        bdia.sample(zero, None, Z, grid, bdia.coefficients(grid, 0.5), gradient="reversible")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bdia.vp_grid(reference.SD_ALPHABAR, 10, "quadratic"), "'spacing' is 'quadratic', expected one of 'linspace', 'leading', 'trailing'"),
        (lambda: bdia.vp_grid(reference.SD_ALPHABAR[::-1], 10), "must decrease strictly"),
        (lambda: bdia.vp_grid(reference.SD_ALPHABAR, 1001), "'num_steps' is 1001"),
        (lambda: bdia.vp_grid(reference.SD_ALPHABAR, 10, "leading", 900), "'offset' 900 moves the times"),
        (lambda: bdia.edm_grid(1), "'num_steps' is 1, expected at least 2"),
        (lambda: bdia.edm_grid(5, sigma_min=90.0), "0 < sigma_min < sigma_max"),
        (lambda: bdia.flow_grid(5, t_max=1.5), "0 <= t_min < t_max <= 1"),
        (lambda: bdia.coefficients(grid_of(), 1.0, coords="x"), "'coords' is 'x'"),
        (lambda: bdia.ddim_invert(zero, None, Z, grid_of(), convention="next"), "'convention' is 'next'"),
        (lambda: bdia.edict_sample(zero, None, Z, grid_of(), p=1.2), r"'p' is 1.2, expected within \(0, 1\]"),
        (lambda: bdia.edict_decode(zero, None, Z, grid_of()), "both chains"),
        (lambda: bdia.bdia_heun_encode(zero, None, Z, grid_of(), variant="reuse"), "use 'heun' or 'euler' to invert"),
        (lambda: bdia.fixed_point_invert(zero, None, Z, grid_of(), num_iters=0), "'num_iters' is 0"),
        (lambda: bdia.coupled_sample(zero, None, Z, grid_of(), zeta=0.0), "'zeta' is 0.0"),
        (lambda: bdia.coupled_sample(zero, None, Z, grid_of(), prediction="data"), "inf at sigma_0 = 0"),
        (lambda: bdia.dpm_solver_2m_sample(zero, None, Z, grid_of(), lower_order_final=False), "'lower_order_final' must not be False"),
        (lambda: bdia.flow_solve(zero, None, Z, [0.0, 0.5, 0.2]), "strictly monotone"),
        (lambda: bdia.integer_sample(zero, None, Z, grid_of(), gamma=2**-0.5), "expected a rational"),
        (lambda: bdia.integer_sample(zero, None, Z, grid_of(), gamma=Fraction(1, 2), bits=31), "'bits' is 31"),
        (lambda: bdia.integer_sample(zero, None, Z, bdia.edm_grid(5), coords="vp"), "use coords='native'"),
        (lambda: bdia.edit(zero, None, Z, grid_of(), bdia.coefficients(grid_of(), 1.0), source=None, target=None, strength=0.1), "'strength' is 0.1"),
        (lambda: bdia.guided(zero)(None, Z, jnp.float32(0), 3), "expected Guidance"),
        (lambda: bdia.to_noise(Z, Z, 1.0, 1.0, kind="score"), "'kind' is 'score'"),
    ],
)  # fmt: skip
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
