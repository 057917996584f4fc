"""Tangent kernels: the infinite-width one against its recursion, a network's own against its Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import bib as reference

from janax.jaxlib_ext import ntk


def points(n=5, d=8, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def test_infinite_width(x64):
    x, x2 = points(), points(4, seed=1)
    found = jax.jit(ntk.fully_connected)(x, x2)
    np.testing.assert_allclose(found, reference.ntk(x, x2), rtol=1e-12)
    np.testing.assert_allclose(jnp.diag(ntk.fully_connected(x, x)), ntk.fully_connected_diagonal(x), rtol=2e-7)  # arccos at the guard
    np.testing.assert_allclose(ntk.fully_connected_diagonal(x), np.diag(reference.ntk(x, x)), rtol=1e-7)


def test_infinite_width_is_symmetric_positive_definite_and_homogeneous(x64):
    x = points(12)
    kernel = np.array(ntk.fully_connected(x, x))
    np.testing.assert_allclose(kernel, kernel.T, rtol=1e-13)
    assert np.linalg.eigvalsh(kernel).min() > 0
    # On the diagonal arccos stands at its guard: the root of the rounding of c there.
    off = ~np.eye(12, dtype=bool)
    np.testing.assert_allclose(ntk.fully_connected(3 * x, x)[off], 3 * kernel[off], rtol=1e-12)
    np.testing.assert_allclose(ntk.fully_connected(x, x, weight_std=np.sqrt(2.0))[off], 64 * kernel[off], rtol=1e-12)


def test_infinite_width_has_finite_gradients(x64):
    x = points()
    np.testing.assert_allclose(
        jax.grad(lambda x: jnp.sum(ntk.fully_connected(x, points(3, seed=1)) ** 2))(x),
        central(lambda x: np.sum(reference.ntk(x, points(3, seed=1)) ** 2), x),
        rtol=1e-6,
        atol=1e-8,
    )
    same = jax.grad(lambda x: jnp.sum(ntk.fully_connected(x, jax.lax.stop_gradient(x))))(x)
    zero = jax.grad(lambda x: jnp.sum(ntk.fully_connected(x, x)))(jnp.zeros((2, 3)))
    assert np.isfinite(same).all() and np.isfinite(zero).all()


def central(f, x, h=1e-6):
    out = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[i] = h
        out[i] = (f(x + step) - f(x - step)) / (2 * h)
    return out


def network(params, x):
    h = jnp.tanh(x @ params["in"] + params["shift"])
    return jnp.tanh(h @ params["middle"]) @ params["out"]


@pytest.fixture
def net(x64):
    rng = np.random.default_rng(3)
    shapes = {"in": (8, 6), "shift": (6,), "middle": (6, 5), "out": (5,)}
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def jacobian(params, x):
    rows = jax.vmap(jax.grad(network), in_axes=(None, 0))(params, x)
    return np.concatenate([np.asarray(leaf).reshape(len(x), -1) for leaf in jax.tree.leaves(rows)], axis=1)


def test_products_are_those_of_the_jacobian(net):
    x, v = points(7), np.random.default_rng(1).normal(size=7)
    j = jacobian(net, x)
    np.testing.assert_allclose(jax.jit(lambda v: ntk.product(network, net, x, v))(v), j @ j.T @ v, rtol=1e-11)
    np.testing.assert_allclose(ntk.diagonal(network, net, x), np.sum(j**2, axis=1), rtol=1e-12)
    tangent = ntk.pull(network, net, x, v)
    np.testing.assert_allclose(np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tangent)]), j.T @ v, rtol=1e-11)
    np.testing.assert_allclose(
        ntk.linearised(network, net, tangent, points(3, seed=2)), jacobian(net, points(3, seed=2)) @ (j.T @ v), rtol=1e-11
    )


def test_solution_is_that_of_the_system(net):
    x, y = points(9), np.random.default_rng(1).normal(size=9)
    j = jacobian(net, x)
    lam = 0.1 * np.sum(j**2) / 9
    found = jax.jit(lambda y: ntk.solve(network, net, x, y, rel_ridge=0.1, tolerance=1e-12))(y)
    np.testing.assert_allclose(found.dual, np.linalg.solve(j @ j.T + lam * np.eye(9), y), rtol=1e-9)
    np.testing.assert_allclose(found.ridge, lam, rtol=1e-12)
    assert found.converged and found.iterations <= 30
    short = ntk.solve(network, net, x, y, rel_ridge=1e-6, tolerance=1e-12, max_iters=2)
    assert not short.converged and short.iterations == 2 and np.isfinite(short.residual)


def test_sketch_keeps_products_on_average(net):
    x = points(3)
    exact = jacobian(net, x) @ jacobian(net, x).T
    rows = jax.jit(jax.vmap(lambda key: jax.vmap(lambda x: ntk.sketch(network, net, x, key, num_features=64))(x)))(
        jax.random.split(jax.random.key(0), 400)
    )
    kernels = np.einsum("snd,smd->snm", rows, rows)
    error = kernels.std(axis=0) / np.sqrt(len(kernels))
    assert (np.abs(kernels.mean(axis=0) - exact) < 4.5 * error + 1e-12).all()  # 9 numbers, 4.5 standard errors: one false alarm in 16,000


def test_errors():
    with pytest.raises(ValueError, match="'x2' has shape"):
        ntk.fully_connected(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="'depth' must be at least 1, got 0"):
        ntk.fully_connected_diagonal(np.zeros((2, 3)), depth=0)
    with pytest.raises(ValueError, match="'max_iters' must be at least 1"):
        ntk.solve(network, {}, np.zeros((2, 3)), np.zeros(2), max_iters=0)
