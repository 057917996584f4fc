"""Ridge fits: both systems, derivatives, leave-one-out, sums over blocks and devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import bib as reference

from janax.jaxlib_ext import ridge, sharding


def problem(n=30, d=7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) * np.linspace(0.2, 2, d), rng.normal(size=n)


@pytest.mark.parametrize("rel_ridge", [1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("shape", [(30, 7), (6, 11)])
def test_primal_and_dual_are_the_same_fit(shape, rel_ridge, x64):
    phi, y = problem(*shape)
    primal, dual, _ = reference.ridge(phi, y, rel_ridge)
    fits = {form: jax.jit(functools.partial(ridge.fit, form=form))(phi, y, rel_ridge=rel_ridge) for form in ridge.FORMS}
    # Where the system is singular up to the ridge, weights lose what predictions keep: compare these.
    for name, found in fits.items():
        np.testing.assert_allclose(phi @ found.weights, phi @ primal, rtol=1e-8, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(phi @ fits["dual"].weights, phi @ dual, rtol=1e-8, atol=1e-9)
    assert (fits["auto"].factor is None) == (shape[1] > shape[0])


def test_integer_weights_are_repeated_rows(x64):
    phi, y = problem(12, 4)
    times = np.array([0, 1, 2, 3] * 3)
    for form in ("primal", "dual"):
        weighted = ridge.fit(phi, y, times.astype(float), rel_ridge=1e-2, form=form)
        repeated = ridge.fit(np.repeat(phi, times, axis=0), np.repeat(y, times), rel_ridge=1e-2, form=form)
        np.testing.assert_allclose(weighted.weights, repeated.weights, rtol=1e-10)
        np.testing.assert_allclose(weighted.ridge, repeated.ridge, rtol=1e-12)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_derivatives_of_features_targets_weights_and_ridge(form, x64):
    phi, y = problem(9, 4)
    v = np.random.default_rng(1).uniform(0.5, 2, 9)
    probe = np.random.default_rng(2).normal(size=4)

    def f(phi, y, v, r):
        return jnp.sin(ridge.fit(phi, y, v, rel_ridge=r, form=form).weights @ probe)

    arguments = (jnp.asarray(phi), jnp.asarray(y), jnp.asarray(v), jnp.asarray(0.03))
    # Central differences with a step of eps^(1/3) are good to its square times the third derivative.
    jax.test_util.check_grads(f, arguments, order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)
    slopes = jax.grad(f, argnums=(0, 1, 2, 3))(*arguments)

    def plain(phi, y, v, r):
        lam = r * jnp.sum(v[:, None] * phi**2) / jnp.sum(v)
        return jnp.sin(jnp.linalg.solve((phi * v[:, None]).T @ phi + lam * jnp.eye(4), phi.T @ (v * y)) @ probe)

    chex.assert_trees_all_close(slopes, jax.grad(plain, argnums=(0, 1, 2, 3))(*arguments), rtol=1e-9, atol=1e-10)


def test_the_solve_has_the_derivative_of_the_solution(x64):
    rng = np.random.default_rng(0)
    half = rng.normal(size=(5, 5))
    a, b, to_x = half @ half.T + np.eye(5), rng.normal(size=(5, 2)), rng.normal(size=(5, 2))
    x, back = jax.vjp(lambda a, b: ridge.spd_solve(a, b), jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=1e-12)
    to_a, to_b = back(jnp.asarray(to_x))
    expected = np.linalg.solve(a, to_x)
    np.testing.assert_allclose(to_b, expected, rtol=1e-12)
    np.testing.assert_allclose(to_a, -expected @ x.T, rtol=1e-11)


def test_one_factorisation_serves_value_and_derivative(x64):
    a, b = jnp.eye(4) * 2, jnp.ones(4)
    text = str(jax.make_jaxpr(jax.value_and_grad(lambda a: jnp.sum(ridge.spd_solve(a, b) ** 2)))(a))
    assert text.count(" = cholesky ") == 1


def test_leave_one_out_is_refitting(x64):
    phi, y = problem(14, 5)
    rel_ridges = np.array([1e-6, 1e-2, 1.0])
    found = jax.jit(ridge.leave_one_out)(phi, y, rel_ridges)
    expected = np.stack([reference.leave_one_out(phi, y, r) for r in rel_ridges])
    np.testing.assert_allclose(found.residuals, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found.mean_squared, np.mean(expected**2, axis=1), rtol=1e-9)
    assert found.best == np.argmin(np.mean(expected**2, axis=1))


def test_leverage(x64):
    phi, y = problem(14, 5)
    fit = ridge.fit(phi, y, rel_ridge=1e-2)
    matrix = phi.T @ phi / 14 + fit.ridge * np.eye(5)
    expected = np.einsum("nd,de,ne->n", phi, np.linalg.inv(matrix), phi)
    np.testing.assert_allclose(ridge.leverage(fit, phi), expected, rtol=1e-11)
    np.testing.assert_allclose(ridge.leverage(fit, phi[3]), expected[3], rtol=1e-11)


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_blocks_sum_to_the_same(block_size, x64):
    phi, y = problem(50, 3)
    v = np.random.default_rng(1).uniform(size=50)
    chex.assert_trees_all_close(ridge.gram(phi, y, v, block_size=block_size), ridge.gram(phi, y, v), rtol=1e-13)


def test_compensated_sums_in_float32():
    rng = np.random.default_rng(0)
    phi = (1 + 0.01 * rng.normal(size=(200_000, 2))).astype(np.float32)  # of one sign, so that plain sums drift
    y = np.ones(len(phi), np.float32)
    exact = phi.astype(np.float64).T @ phi.astype(np.float64) / len(phi)
    found = jax.jit(functools.partial(ridge.gram, block_size=64))(phi, y)
    assert found.gram.dtype == jnp.float32
    # A block of 64 rounds by at most 64 eps of itself, the sum over blocks by one eps: on average far below.
    np.testing.assert_allclose(found.gram, exact, rtol=2e-7)


def test_float32_with_a_ridge_that_suits_it():
    phi, y = problem(400, 6)
    expected, _, _ = reference.ridge(phi, y, 1e-3)
    found = ridge.fit(phi.astype(np.float32), y.astype(np.float32), rel_ridge=1e-3)
    np.testing.assert_allclose(found.weights, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("explicit", [False, True])
def test_rows_on_eight_devices(explicit, x64):
    phi, y = problem(48, 5)
    alone = ridge.gram(phi, y)
    mesh = sharding.make_mesh({"data": 8}, explicit=explicit)
    with jax.set_mesh(mesh):
        rows = jax.device_put((jnp.asarray(phi), jnp.asarray(y)), jax.P("data"))
        local = jax.shard_map(functools.partial(ridge.gram, axis_name="data"), in_specs=(jax.P("data"), jax.P("data")), out_specs=jax.P())
        chex.assert_trees_all_close(jax.jit(local)(*rows), alone, rtol=1e-13)
        if not explicit:
            whole = jax.jit(ridge.gram)
            chex.assert_trees_all_close(whole(*rows), alone, rtol=1e-13)
            text = whole.lower(*rows).compile().as_text()
            assert "all-reduce" in text and "all-gather" not in text


def test_vmap_over_tasks_and_one_trace(x64):
    phi, y = problem(20, 4)
    many = np.stack([y, 2 * y, -y])
    fit = jax.jit(chex.assert_max_traces(lambda y, r: ridge.fit(phi, y, rel_ridge=r).weights, n=2))
    batched = jax.vmap(fit, in_axes=(0, None))(many, jnp.asarray(1e-2))
    np.testing.assert_allclose(batched, np.stack([reference.ridge(phi, row, 1e-2)[0] for row in many]), rtol=1e-9)
    fit(y, jnp.asarray(1e-2)), fit(y, jnp.asarray(1e-3))


def test_errors():
    phi, y = problem()
    with pytest.raises(ValueError, match=r"ridge.gram: 'targets' has shape \(29,\), expected \[n\] with n=30 from 'features'"):
        ridge.gram(phi, y[:29])
    with pytest.raises(ValueError, match="'block_size' must be at least 1, got 0"):
        ridge.gram(phi, y, block_size=0)
    with pytest.raises(ValueError, match="'form' is 'both', expected one of 'auto', 'primal', 'dual'"):
        ridge.fit(phi, y, form="both")
    with pytest.raises(ValueError, match="has no factor, expected a fit of the primal form"):
        ridge.leverage(ridge.fit(phi, y, form="dual"), phi)
