"""Gradients of a reversible recurrence equal those of the plain scan, in memory that does not grow with its length."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janax.jaxlib_ext import reversible


def step(params, carry, x):
    z, previous = carry
    e = jnp.tanh(z @ params["w"] + x["bias"])
    return 0.9 * previous + 0.1 * z + 0.05 * x["gain"] * e, z


def unstep(params, carry, x):
    below, z = carry
    e = jnp.tanh(z @ params["w"] + x["bias"])
    return z, (below - 0.1 * z - 0.05 * x["gain"] * e) / 0.9


def problem(length=12, dtype=None, rows=5):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    params = {"w": array(4, 4), "label": jnp.arange(3)}  # an integer leaf: no gradient, and no complaint
    xs = {"bias": array(length), "gain": array(length), "index": jnp.arange(length)}
    return params, (array(rows, 4), array(rows, 4)), xs


def loss(scan):
    def value(w, carry, bias, params, xs):
        out = scan({**params, "w": w}, carry, {**xs, "bias": bias})
        return jnp.sum(jnp.sin(out[0])) + jnp.sum(out[1] ** 2)

    return value


def plain(params, carry, xs):
    return jax.lax.scan(lambda c, x: (step(params, c, x), None), carry, xs)[0]


def walked(params, carry, xs):
    return reversible.scan(step, unstep, params, carry, xs)


def gradients(scan, params, carry, xs):
    return jax.jit(jax.grad(loss(scan), argnums=(0, 1, 2)))(params["w"], carry, xs["bias"], params, xs)


def test_value_and_gradients_equal_the_plain_scan(x64):
    params, carry, xs = problem()
    chex.assert_trees_all_close(walked(params, carry, xs), plain(params, carry, xs), rtol=0, atol=0)
    chex.assert_trees_all_close(gradients(walked, params, carry, xs), gradients(plain, params, carry, xs), rtol=1e-11)


def test_gradient_against_finite_differences(x64):
    params, carry, xs = problem(length=4)
    value = loss(walked)
    gradient = jax.grad(value)(params["w"], carry, xs["bias"], params, xs)
    for i in range(4):
        unit = jnp.zeros((4, 4)).at[i, 3 - i].set(1e-6)
        ends = [value(params["w"] + s * unit, carry, xs["bias"], params, xs) for s in (1, -1)]
        assert float(gradient[i, 3 - i]) == pytest.approx(float(ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_vmap_of_the_gradient(x64):
    params, carry, xs = problem()
    batch = jnp.stack([params["w"], 2 * params["w"], -params["w"]])
    one = lambda w: jax.grad(loss(walked))(w, carry, xs["bias"], params, xs)  # noqa: E731
    chex.assert_trees_all_close(jax.vmap(one)(batch), jnp.stack([one(w) for w in batch]), rtol=1e-12)


def test_a_shared_evaluation_is_used(x64):
    """A wrong `unstep_vjp` gives a wrong gradient, so it is really what runs backwards."""
    params, carry, xs = problem()

    def doubled(params, new_carry, x, cotangent):
        old = unstep(params, new_carry, x)
        _, pull = jax.vjp(step, params, old, x)
        to_params, to_carry, to_x = pull(cotangent)
        return old, ({**to_params, "w": 2 * to_params["w"]}, to_carry, to_x)

    scan = lambda p, c, x: reversible.scan(step, unstep, p, c, x, unstep_vjp=doubled)  # noqa: E731
    right, twice = gradients(plain, params, carry, xs), gradients(scan, params, carry, xs)
    chex.assert_trees_all_close(twice[0], 2 * right[0], rtol=1e-11)
    chex.assert_trees_all_close(twice[1:], right[1:], rtol=1e-11)


def test_meshes(mesh):
    params, carry, xs = jax.tree.map(np.asarray, problem(rows=8))
    one = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(one):
        expected = jax.device_get(gradients(plain, *jax.tree.map(jnp.asarray, (params, carry, xs))))
    params, xs = jax.tree.map(jnp.asarray, (params, xs))
    carry = jax.tree.map(jnp.asarray if mesh is None else lambda x: jax.device_put(x, jax.P("data")), carry)
    chex.assert_trees_all_close(jax.device_get(gradients(walked, params, carry, xs)), expected, rtol=2e-4, atol=1e-5)


def test_memory_does_not_grow_with_the_length():
    def temporaries(scan, length):
        params, carry, xs = problem(length, jnp.float32, rows=256)
        compiled = jax.jit(jax.grad(loss(scan))).lower(params["w"], carry, xs["bias"], params, xs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(walked, 200) <= 1.2 * temporaries(walked, 20)
    assert temporaries(plain, 200) > 5 * temporaries(plain, 20)
    assert temporaries(walked, 200) < temporaries(plain, 200) / 10


def test_amplification_is_refused():
    params, carry, xs = problem(dtype=jnp.float32)
    reversible.scan(step, unstep, params, carry, xs, amplification=1e3)
    with pytest.raises(ValueError, match=r"reversible.scan: undoing the recurrence amplifies rounding errors 1.0e\+05 times"):
        reversible.scan(step, unstep, params, carry, xs, amplification=1e5)
    with pytest.raises(ValueError, match="amplifies"):
        reversible.scan(step, unstep, params, carry, xs, amplification=float("nan"))
    with jax.enable_x64(True):
        reversible.scan(step, unstep, *problem(), amplification=1e5)


def test_traced_once():
    params, carry, xs = problem(dtype=jnp.float32)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(w):
        return jax.grad(loss(walked))(w, carry, xs["bias"], params, xs)

    for i in range(3):
        run(params["w"] * i)
