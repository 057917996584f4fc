"""jit, vmap, grad, meshes, dtypes, retraces and memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janax.algorithms import bdia

N = 10
PARAMS = {"scale": np.float32(0.1)}


def samplers(problem, grid, params=None):
    """z to one output, for every public sampler by name."""
    noise = functools.partial(problem.noise_fn, params)
    f = lambda params, z, t, cond=None: noise(z, t, cond)  # noqa: E731
    table = bdia.coefficients(grid, 0.96)
    coupled = {"tableau": bdia.MIDPOINT}
    return {
        "sample": lambda z: bdia.sample(f, None, z, grid, table).z_i,
        "encode": lambda z: bdia.encode(f, None, z, grid, table).z_ip1,
        "decode": lambda z: bdia.decode(f, None, bdia.BdiaState(z, z), grid, table).z_i,
        "ddim_sample": lambda z: bdia.ddim_sample(f, None, z, grid),
        "ddim_invert": lambda z: bdia.ddim_invert(f, None, z, grid),
        "fixed_point": lambda z: bdia.fixed_point_invert(f, None, z, grid, num_iters=2)[0],
        "fixed_point_average": lambda z: bdia.fixed_point_invert(f, None, z, grid, num_iters=3, average_last=2)[0],
        "edict": lambda z: bdia.edict_sample(f, None, z, grid, order="alternate").x,
        "edict_encode": lambda z: bdia.edict_encode(f, None, z, grid).y,
        "heun": lambda z: bdia.heun_sample(f, None, z, grid),
        "bdia_heun": lambda z: bdia.bdia_heun_sample(f, None, z, grid, gamma=0.7).z_i,
        "bdia_heun_encode": lambda z: bdia.bdia_heun_encode(f, None, z, grid).z_i,
        "dpm": lambda z: bdia.dpm_solver_2m_sample(f, None, z, grid),
        "bdia_dpm": lambda z: bdia.bdia_dpm_solver_2m_sample(f, None, z, grid, gamma=0.5).z_i,
        "multistep": lambda z: bdia.multistep_sample(f, None, z, grid, k=2).z[0],
        "reversible_heun": lambda z: bdia.reversible_heun_sample(f, None, z, grid).z,
        "coupled": lambda z: bdia.coupled_sample(f, None, z, grid, **coupled).x,
        "coupled_encode": lambda z: bdia.coupled_encode(f, None, z, grid, **coupled).x,
        "integer": lambda z: bdia.dequantize(bdia.integer_sample(f, None, z, grid, gamma=0.5).n_i, bits=16),
        "edit": lambda z: bdia.edit(f, None, z, grid, table, source=1.0, target=0.0)[0],
        "flow": lambda z: bdia.flow_solve(f, None, z, np.linspace(1.0, 0.1, 5)),
    }


def test_jit_and_vmap_agree_with_the_plain_call(vp, x64):
    grid = vp.grid(4)
    z = jnp.asarray(vp.start(grid, batch=4))
    run_all = lambda z: {name: run(z) for name, run in samplers(vp, grid).items()}  # noqa: E731
    with jax.disable_jit():  # operation by operation, most of which the samplers share
        plain = run_all(z)
    jitted, mapped = jax.jit(lambda z: (run_all(z), jax.vmap(run_all)(z)))(z)
    for name, value in plain.items():
        tolerance = 5e-4 if name == "integer" else 1e-10  # integers move by whole units of 2^-16
        np.testing.assert_allclose(jitted[name], value, rtol=0, atol=tolerance, err_msg=name)
        np.testing.assert_allclose(mapped[name], value, rtol=0, atol=tolerance, err_msg=name)


def test_every_sampler_is_differentiable(vp):
    grid = vp.grid(4)
    z = jnp.asarray(vp.start(grid, batch=2), jnp.float32)

    def total(z_of):
        return sum(jnp.sum(jnp.square(run(z_of[name]))) for name, run in samplers(vp, grid).items() if name in z_of)

    gradients = jax.jit(jax.grad(total))({name: z for name in samplers(vp, grid) if name != "integer"})
    for name, gradient in gradients.items():
        assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 0, name


def test_loss_and_gradient_on_meshes(vp, mesh):
    grid = vp.grid(N)
    z = np.asarray(vp.start(grid, batch=8), np.float32)
    table = bdia.coefficients(grid, 0.96)

    def both(params, z):
        loss = lambda params: jnp.mean(jnp.square(bdia.sample(vp.noise_fn, params, z, grid, table, gradient="reversible").z_i))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    with jax.set_mesh(device_mesh(1)):
        expected = jax.device_get(both(PARAMS, jnp.asarray(z)))
    if mesh is None:
        value, gradient = both(PARAMS, jnp.asarray(z))
    else:
        value, gradient = both(PARAMS, jax.device_put(z, jax.P("data")))
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradient["scale"], expected[1]["scale"], rtol=1e-5)


def device_mesh(count):
    return jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])


def test_samples_do_not_depend_on_the_number_of_devices(vp):
    grid = vp.grid(N)
    z = np.asarray(vp.start(grid, batch=8), np.float32)
    table = bdia.belm_coefficients(grid)
    # unoptimised, the program of one row a device rounds exponentials differently from that of eight
    run = jax.jit(lambda z: bdia.sample(vp.noise_fn, PARAMS, z, grid, table).z_i, compiler_options={"xla_backend_optimization_level": 3})
    results = []
    for count in (1, 2, 4, 8):
        with jax.set_mesh(device_mesh(count)):
            results.append(np.asarray(run(jax.device_put(z, jax.P("data")))))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-6, atol=1e-6)


def test_no_retrace_on_new_hyperparameters(vp):
    grid = vp.grid(N)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(z, gamma, weight, p):
        guided = bdia.guided(lambda params, z, t, cond: vp.noise_fn(None, z, t, cond))
        cond = bdia.Guidance(jnp.ones(()), jnp.zeros(()), weight)
        first = bdia.sample(guided, None, z, grid, bdia.coefficients(grid, gamma), cond=cond).z_i
        return first + bdia.edict_sample(guided, None, z, grid, p=p, cond=cond).x

    results = [
        run(jax.random.normal(jax.random.key(i), (2, 8)), jnp.float32(0.5 + 0.04 * i), jnp.float32(i), jnp.float32(0.9 + 0.005 * i))
        for i in range(10)
    ]
    assert len({float(r[0, 0]) for r in results}) == 10


def test_vmap_over_gamma(vp):
    grid = vp.grid(N)
    z = jnp.asarray(vp.start(grid, batch=2), jnp.float32)
    gammas = jnp.asarray([0.0, 0.5, 1.0])
    run = lambda g: bdia.sample(vp.noise_fn, None, z, grid, bdia.coefficients(grid, g)).z_i  # noqa: E731
    for row, alone in zip(*jax.jit(lambda gammas: (jax.vmap(run)(gammas), [run(g) for g in (0.0, 0.5, 1.0)]))(gammas)):
        np.testing.assert_allclose(row, alone, atol=2e-5)


def test_gradient_with_respect_to_gamma(vp, x64):
    grid = vp.grid(N)
    z = jnp.asarray(vp.start(grid, batch=2))

    def loss(g, gradient):
        return jnp.sum(bdia.sample(vp.noise_fn, PARAMS, z, grid, bdia.coefficients(grid, g), gradient=gradient).z_i ** 2)

    step = 1e-6
    plain, walked = (jax.jit(jax.value_and_grad(functools.partial(loss, gradient=gradient))) for gradient in ("autodiff", "reversible"))
    numeric = (plain(0.8 + step)[0] - plain(0.8 - step)[0]) / (2 * step)
    for function in (plain, walked):
        np.testing.assert_allclose(function(0.8)[1], numeric, rtol=1e-6)


@pytest.mark.parametrize("name", ["sample", "encode", "decode", "edict", "reversible_heun", "coupled"])
def test_reversible_gradient_equals_autodiff(vp, name, x64):
    grid = vp.grid(N)
    z = jnp.asarray(vp.start(grid, batch=3)) * 0.5
    table = bdia.coefficients(grid, 0.9)
    f = vp.noise_fn

    def loss(params, z, cond, gradient):
        outcome = {
            "sample": lambda: bdia.sample(f, params, z, grid, table, cond=cond, gradient=gradient),
            "encode": lambda: bdia.encode(f, params, z, grid, table, cond=cond, gradient=gradient),
            "decode": lambda: bdia.decode(f, params, bdia.BdiaState(z, 0.9 * z), grid, table, cond=cond, gradient=gradient),
            "edict": lambda: bdia.edict_sample(f, params, z, grid, cond=cond, gradient=gradient),
            "reversible_heun": lambda: bdia.reversible_heun_sample(f, params, z, grid, cond=cond, gradient=gradient),
            "coupled": lambda: bdia.coupled_sample(f, params, z, grid, tableau=bdia.MIDPOINT, cond=cond, gradient=gradient),
        }[name]()
        return sum(jnp.sum(jnp.sin(x)) for x in outcome)

    params, cond = {"scale": jnp.asarray(0.1)}, jnp.asarray(0.3)
    both = lambda *x: tuple(jax.grad(loss, argnums=(0, 1, 2))(*x, gradient) for gradient in ("autodiff", "reversible"))  # noqa: E731
    plain, walked = jax.device_get(jax.jit(both)(params, z, cond))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(walked), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-9 * np.abs(a).max())


def _mlp_problem(num_steps):
    grid = bdia.vp_grid(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2), num_steps)
    keys = jax.random.split(jax.random.key(0), 3)
    params = [jax.random.normal(k, s) * s[0] ** -0.5 for k, s in zip(keys, ((8, 128), (128, 128), (128, 8)))]

    def noise_fn(params, z, t):
        h = jnp.tanh(z @ params[0] + t * 1e-3)
        return 0.3 * jnp.tanh(h @ params[1]) @ params[2]

    def gradient(mode):
        table = bdia.coefficients(grid, 1.0)
        return jax.jit(jax.grad(lambda p, z: jnp.mean(jnp.square(bdia.sample(noise_fn, p, z, grid, table, gradient=mode).z_i))))

    return params, jax.random.normal(jax.random.key(1), (256, 8)), gradient


def test_reversible_gradient_memory_is_constant_in_the_number_of_steps():
    """256 x 8 states, three layers: relative error <= 1e-5, temporaries <= 1/10 at N = 50, and N = 200 within 1.2 x of N = 20."""
    temporaries = {}
    for num_steps in (20, 50, 200):
        params, z, gradient = _mlp_problem(num_steps)
        compiled = gradient("reversible").lower(params, z).compile()
        temporaries[num_steps] = compiled.memory_analysis().temp_size_in_bytes
        if num_steps == 50:
            plain = gradient("autodiff").lower(params, z).compile()
            assert temporaries[50] <= plain.memory_analysis().temp_size_in_bytes / 10
            a, b = jnp.concatenate([x.ravel() for x in plain(params, z)]), jnp.concatenate([x.ravel() for x in compiled(params, z)])
            assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) <= 1e-5
    assert temporaries[200] <= 1.2 * temporaries[20]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes(vp, dtype):
    """Samplers return the input's dtype; an encoded pair is never narrower than float32; a bf16 network is fine."""
    grid = vp.grid(N)
    z = jnp.asarray(vp.start(grid, batch=2), dtype)
    table = bdia.coefficients(grid, 0.96)
    half = lambda params, z, t: vp.noise_fn(None, z.astype(jnp.bfloat16), t.astype(jnp.bfloat16))  # noqa: E731
    assert bdia.sample(half, None, z, grid, table).z_i.dtype == dtype
    assert bdia.ddim_sample(half, None, z, grid).dtype == dtype
    pair = bdia.encode(half, None, z, grid, table)
    assert pair.z_i.dtype == jnp.float32
    back = bdia.decode(half, None, pair, grid, table)
    np.testing.assert_allclose(back.z_i, z.astype(jnp.float32), atol=1e-5)


def test_strict_promotion(vp, strict):
    grid = vp.grid(N)
    z = jnp.asarray(vp.start(grid, batch=2), jnp.float32)
    noise_fn = lambda params, z, t: z * t.astype(z.dtype) * jnp.float32(0.01)  # noqa: E731
    table = bdia.coefficients(grid, jnp.float32(0.9))
    pair = bdia.encode(noise_fn, None, z, grid, table)
    np.testing.assert_allclose(bdia.decode(noise_fn, None, pair, grid, table).z_i, z, atol=1e-5)
    for out in (
        bdia.edict_sample(noise_fn, None, z, grid).x,
        bdia.heun_sample(noise_fn, None, z, grid),
        bdia.bdia_heun_sample(noise_fn, None, z, grid).z_i,
        bdia.coupled_sample(noise_fn, None, z, grid).x,
        bdia.dpm_solver_2m_sample(noise_fn, None, z, grid),
        bdia.reversible_heun_sample(noise_fn, None, z, grid).z,
        bdia.to_noise(z, z, 0.6, 0.8, kind="v"),
    ):
        assert out.dtype == jnp.float32 and bool(jnp.all(jnp.isfinite(out)))
