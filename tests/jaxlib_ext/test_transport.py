"""Sinkhorn: float64 NumPy, linear programs, every derivative against every other, masks, extremes, batches, meshes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import transport as reference

from janax.jaxlib_ext import sharding, transport

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling takes most of the time here
solve = jax.jit(transport.sinkhorn, static_argnames=("num_iters", "derivative", "reference", "check_every", "domain"))
plan_of = jax.jit(transport.plan)

OPTIONS = {
    "plain": {"num_iters": 9},
    "unbalanced": {"num_iters": 9, "rho": 0.7},
    "counting and relaxed": {"num_iters": 9, "rho": 0.7, "reference": "counting", "relaxation": 1.2},
    "relaxed": {"num_iters": 5, "relaxation": 1.3},
    "epsilon scaling": {"num_iters": 12, "epsilon_start": 1.0},
    "tolerance": {"num_iters": 40, "tolerance": 1e-2, "check_every": 7},
    "all": {"num_iters": 60, "tolerance": 1e-4, "check_every": 4, "epsilon_start": 0.5, "rho": 2.0, "relaxation": 0.9},
}


def problem(n=7, m=5, batch=(3,), masked=True, dtype=np.float64, seed=0):
    """Costs in [0, 2] and random weights; row 2 of the first problem has none."""
    rng = np.random.default_rng(seed)
    cost = rng.uniform(0, 2, (*batch, n, m))
    with np.errstate(divide="ignore"):
        log_a, log_b = (np.log(rng.dirichlet(np.ones(k), batch)) for k in (n, m))
    if masked:
        log_a.reshape(-1, n)[0, 2] = -np.inf
        log_a -= np.log(np.exp(log_a).sum(-1, keepdims=True))
    return cost.astype(dtype), log_a.astype(dtype), log_b.astype(dtype)


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def mixed(cost, log_a, log_b, *, epsilon=0.1, **options):
    """A scalar that feels every differentiable output."""
    out = transport.sinkhorn(cost, log_a, log_b, epsilon=epsilon, **options)
    weights = jnp.arange(1, cost.shape[0] + 1).astype(out.cost.dtype)
    return jnp.sum(out.cost * weights) + 0.3 * jnp.sum(jnp.sin(out.f)) + 0.1 * jnp.sum(out.g) + 0.2 * jnp.sum(out.regularized)


def close(got, expected, tolerance):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape
        assert np.linalg.norm(ours - theirs) <= tolerance * max(np.linalg.norm(theirs), 1e-3)


# --- values


def paper_loss(student, teacher, **options):
    cost = transport.l1(jax.nn.softmax(student / 2), jax.nn.softmax(teacher / 2))
    ones = jnp.zeros_like(cost[:, 0])
    return transport.sinkhorn(cost, ones, ones, epsilon=0.1, num_iters=20, **options).cost


@pytest.mark.parametrize(("rows", "classes", "scale"), [(1, 3, 3), (8, 2, 3), (16, 5, 3), (24, 512, 3), (16, 5, 60)])
def test_unit_masses_are_kernel_normalisation(rows, classes, scale, x64, strict):
    for dtype in ("float64", "float32"):
        check_paper(rows, classes, scale, dtype)


def check_paper(rows, classes, scale, dtype):
    rng = np.random.default_rng(rows + classes)
    student, teacher = (rng.normal(size=(rows, classes)) * scale for _ in range(2))
    if scale == 60:
        student, teacher = (60 * np.sign(x) for x in (student, teacher))
    student, teacher = (x.astype(dtype).astype(np.float64) for x in (student, teacher))
    s, t = softmax(student / 2), softmax(teacher / 2)
    value, to_cost = reference.normalised_kernel_gradient(reference.l1(s, t), 0.1, 20)
    to_s = np.einsum("ij,ijv->iv", to_cost, np.sign(s[:, None] - t[None]))
    expected = 0.5 * s * (to_s - (to_s * s).sum(-1, keepdims=True))
    got = jit(jax.value_and_grad(paper_loss))(student.astype(dtype), teacher.astype(dtype))
    tight = dtype == "float64"
    np.testing.assert_allclose(got[0], value, rtol=1e-9 if tight else 2e-5)
    floor = 1e-12 if tight else 1e-6
    assert np.linalg.norm(np.asarray(got[1]) - expected) <= (1e-9 if tight else 1e-3) * np.linalg.norm(expected) + floor


@pytest.mark.parametrize(
    ("rho", "counting", "domain"), [(np.inf, False, "auto"), (np.inf, True, "log"), (0.5, False, "log"), (0.5, True, "auto")]
)
def test_float64_reference(rho, counting, domain, x64, strict):
    cost, log_a, log_b = problem(masked=False)
    options = {"epsilon": 0.05, "num_iters": 3, "domain": domain, "rho": None if np.isinf(rho) else rho}
    out = solve(cost, log_a, log_b, reference="counting" if counting else "product", **options)
    plans = plan_of(cost, out.f, out.g, log_a, log_b, epsilon=0.05)
    for i in range(len(cost)):
        plan, f, g = reference.scaled(cost[i], np.exp(log_a[i]), np.exp(log_b[i]), 0.05, 3, rho, counting and not np.isinf(rho))
        np.testing.assert_allclose(plans[i], plan, rtol=0, atol=1e-12)
        np.testing.assert_allclose(out.f[i], f, atol=1e-12)
        np.testing.assert_allclose(out.g[i], g, atol=1e-12)
        np.testing.assert_allclose(out.cost[i], (plan * cost[i]).sum(), atol=1e-12)


@pytest.mark.parametrize("rho", [None, 0.5])
def test_converged_values(rho, x64):
    """The dual value is the primal one, marginals hold, and the row error is what it says."""
    cost, log_a, log_b = problem(masked=False)
    out = solve(cost, log_a, log_b, epsilon=0.1, num_iters=5000, tolerance=1e-13, rho=rho)
    plans = np.asarray(plan_of(cost, out.f, out.g, log_a, log_b, epsilon=0.1))
    for i in range(len(cost)):
        a, b = np.exp(log_a[i]), np.exp(log_b[i])
        np.testing.assert_allclose(out.regularized[i], reference.objective(plans[i], cost[i], a, b, 0.1, rho), atol=1e-11)
        plan, _, _ = reference.scaled(cost[i], a, b, 0.1, 5000, np.inf if rho is None else rho)
        np.testing.assert_allclose(plans[i], plan, atol=1e-11)
        if rho is None:
            np.testing.assert_allclose(plans[i].sum(1), a, atol=1e-12)
            np.testing.assert_allclose(plans[i].sum(0), b, atol=1e-12)
    assert np.all(out.converged) and np.all(out.error <= 1e-13)
    few = solve(cost, log_a, log_b, epsilon=0.1, num_iters=4)
    rows = np.asarray(plan_of(cost, few.f, few.g, log_a, log_b, epsilon=0.1)).sum(-1)
    np.testing.assert_allclose(few.error, np.abs(rows - np.exp(log_a)).sum(-1), atol=1e-14)


def test_small_epsilon_is_the_linear_program(x64):
    cost, log_a, log_b = problem(6, 8, masked=False)
    exact = [reference.linear_program(c, np.exp(a), np.exp(b)) for c, a, b in zip(cost, log_a, log_b)]
    gaps = []
    for epsilon in (0.05, 0.01, 0.002):
        out = solve(cost, log_a, log_b, epsilon=epsilon, num_iters=20000, tolerance=1e-9, epsilon_start=2.0)
        assert np.all(out.converged)
        gaps.append(np.max(np.asarray(out.cost) - exact))
    assert gaps[0] > gaps[1] > gaps[2] > -1e-9 and gaps[2] < 2e-3


def test_two_domains_make_the_same_iterates(x64):
    cost, log_a, log_b = problem()
    for name, options in OPTIONS.items():
        if name in ("plain", "counting and relaxed", "tolerance"):
            log, kernel = (solve(cost, log_a, log_b, epsilon=0.05, domain=d, **options) for d in ("log", "kernel"))
            chex.assert_trees_all_close(log, kernel, atol=1e-12)


# --- derivatives


@pytest.mark.parametrize(
    ("name", "domain"), [*((name, "auto") for name in OPTIONS), ("plain", "log"), ("counting and relaxed", "log"), ("tolerance", "log")]
)
def test_exact_is_unrolled(name, domain, x64, strict):
    arguments = problem()
    value = lambda derivative, domain: jit(  # noqa: E731
        jax.value_and_grad(functools.partial(mixed, derivative=derivative, domain=domain, **OPTIONS[name]), argnums=(0, 1, 2))
    )
    close(value("exact", domain)(*arguments), value("unrolled", "log")(*arguments), 1e-11)


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_exact_is_as_near_as_unrolled_in_float32(epsilon, x64):
    """Both miss the float64 gradient by rounding, about equally. At 0.01 the kernel would overflow: logarithms take over, both ways."""
    arguments = problem(20, 16)

    def run(derivative, dtype):
        cost, log_a, log_b = (jnp.asarray(x, dtype) for x in arguments)
        value = lambda c: jnp.sum(transport.sinkhorn(c, log_a, log_b, epsilon=epsilon, num_iters=20, derivative=derivative).cost)  # noqa: E731
        return np.asarray(jit(jax.grad(value))(cost), np.float64)

    truth = run("exact", jnp.float64)
    ours, autodiff = (np.linalg.norm(run(kind, jnp.float32) - truth) / np.linalg.norm(truth) for kind in ("exact", "unrolled"))
    rounding = np.max(arguments[0]) / epsilon * 2.0**-24  # of one exponent; a gradient is made of plans, each off by some of these
    assert ours <= max(2 * autodiff, 8 * rounding) and ours < 1e-3


@pytest.mark.parametrize("name", ["plain", "unbalanced", "counting and relaxed", "epsilon scaling"])
def test_finite_differences(name, x64):
    cost, log_a, log_b = problem(4, 3, (1,), masked=False)
    value = jit(functools.partial(mixed, **OPTIONS[name]))
    got = jit(jax.grad(functools.partial(mixed, **OPTIONS[name]), argnums=(0, 1, 2)))(cost, log_a, log_b)
    for i, gradient in enumerate(got):
        moved = lambda x, i=i: float(value(*[x if j == i else y for j, y in enumerate((cost, log_a, log_b))]))  # noqa: E731
        np.testing.assert_allclose(gradient, reference.differences(moved, (cost, log_a, log_b)[i]), atol=2e-7)


@pytest.mark.parametrize("options", [{}, {"rho": 0.7}, {"rho": 0.7, "reference": "counting"}])
def test_implicit_is_converged_exact(options, x64, strict):
    cost, log_a, log_b = problem()

    def value(cost, log_a, log_b, derivative):
        log_a, log_b = jax.nn.log_softmax(log_a), jax.nn.log_softmax(log_b)  # weights change at constant mass
        out = transport.sinkhorn(cost, log_a, log_b, epsilon=0.1, num_iters=2000, derivative=derivative, **options)
        a, b = jnp.exp(log_a), jnp.exp(log_b)
        shape = jnp.sum(a * out.f**2) - jnp.sum(a * out.f, -1) @ jnp.sum(a * out.f, -1) if not options else jnp.sum(out.f**2)
        return jnp.sum(out.cost * jnp.arange(1.0, 4.0)) + shape + 0 * jnp.sum(b)

    run = lambda derivative: jit(jax.grad(functools.partial(value, derivative=derivative), argnums=(0, 1, 2)))  # noqa: E731
    close(run("implicit")(cost, log_a, log_b), run("exact")(cost, log_a, log_b), 1e-8)


def test_implicit_is_the_reference(x64):
    cost, log_a, log_b = problem(masked=False)
    value = lambda c: jnp.sum(  # noqa: E731
        transport.sinkhorn(c, log_a, log_b, epsilon=0.1, num_iters=5000, tolerance=1e-14, derivative="implicit").cost
    )
    got = jit(jax.grad(value))(cost)
    for i in range(3):
        plan, _, _ = reference.scaled(cost[i], np.exp(log_a[i]), np.exp(log_b[i]), 0.1, 5000)
        close(got[i], reference.fixed_point_gradient(cost[i], plan, 0.1), 1e-9)


@pytest.mark.parametrize("rho", [None, 0.5])
def test_envelope_is_the_plan(rho, x64):
    cost, log_a, log_b = problem()

    def value(cost, log_a, log_b, derivative, part):
        log_a, log_b = jax.nn.log_softmax(log_a), jax.nn.log_softmax(log_b)
        options = {"epsilon": 0.1, "num_iters": 2000, "derivative": derivative, "rho": rho}
        return jnp.sum(getattr(solve(cost, log_a, log_b, **options), part))

    out = solve(cost, log_a, log_b, epsilon=0.1, num_iters=2000, rho=rho)
    plans = plan_of(cost, out.f, out.g, log_a, log_b, epsilon=0.1)
    run = lambda *kind: jit(jax.grad(lambda *x: value(*x, *kind), argnums=(0, 1, 2)))(cost, log_a, log_b)  # noqa: E731
    regularized = run("envelope", "regularized")
    close(regularized, run("exact", "regularized"), 1e-10)
    close(regularized[0], plans, 1e-12)
    close(run("envelope", "cost")[0], plans, 1e-12)


@pytest.mark.parametrize("derivative", transport.DERIVATIVES)
def test_masked_points_get_nothing(derivative):
    """Whatever stands there: nan in the cost, and a problem without any weight. Elsewhere all is as without them."""
    cost, log_a, log_b = problem(6, 5, (4,), masked=False, dtype=np.float32)
    log_a[:, 1], log_b[:, 3], log_a[2], log_b[3] = -np.inf, -np.inf, -np.inf, -np.inf
    cost[:, 1], cost[:, :, 3] = np.nan, np.inf

    def value(cost, log_a, log_b):
        out = transport.sinkhorn(cost, log_a, log_b, epsilon=0.1, num_iters=10, derivative=derivative)
        return jnp.sum(out.cost) + jnp.sum(out.regularized), out

    (_, out), gradients = jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(cost, log_a, log_b)
    plans = np.asarray(plan_of(cost, out.f, out.g, log_a, log_b, epsilon=0.1))
    chex.assert_tree_all_finite((out, gradients, plans))
    for array in (plans, gradients[0]):
        assert not array[:, 1].any() and not array[:, :, 3].any() and not array[2:].any()
    assert not gradients[1][:, 1].any() and not gradients[2][:, 3].any() and not out.cost[2:].any()
    assert not out.f[:, 1].any() and not out.g[:, 3].any()
    keep = np.ix_([0, 2, 3, 4, 5], [0, 1, 2, 4])
    small = solve(cost[0][keep], log_a[0, keep[0][:, 0]], log_b[0, keep[1][0]], epsilon=0.1, num_iters=10)
    np.testing.assert_allclose(out.cost[0], small.cost, rtol=1e-5)


# --- identities


def test_one_row_is_the_l1_distance(x64):
    p, q = np.array([[0.2, 0.3, 0.5]]), np.array([[0.6, 0.3, 0.1]])
    for derivative in transport.DERIVATIVES:
        value = lambda p, d=derivative: transport.sinkhorn(transport.l1(p, q), epsilon=0.1, num_iters=2, derivative=d).cost  # noqa: E731
        total, gradient = jit(jax.value_and_grad(value))(p)
        np.testing.assert_allclose(total, 0.8, atol=1e-14)
        np.testing.assert_allclose(gradient, np.sign(p - q), atol=1e-12)


def test_l1_costs(x64):
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(9), (2, 6)), rng.dirichlet(np.ones(9), (2, 4))
    q[:, 0] = p[:, 0]
    got = np.asarray(jit(transport.l1)(p, q))
    for i in range(2):
        np.testing.assert_allclose(got[i], reference.l1(p[i], q[i]), atol=1e-15)
        np.testing.assert_allclose(got[i], reference.min_identity(p[i], q[i]), atol=1e-15)
    assert not got[:, 0, 0].any()
    c = rng.normal(size=got.shape)
    to_p, to_q = jit(jax.grad(lambda p, q: jnp.sum(c * transport.l1(p, q)), argnums=(0, 1)))(p, q)
    signs = np.sign(p[:, :, None] - q[:, None])
    np.testing.assert_allclose(to_p, np.einsum("bij,bijv->biv", c, signs), atol=1e-13)
    np.testing.assert_allclose(to_q, -np.einsum("bij,bijv->bjv", c, signs), atol=1e-13)
    np.testing.assert_allclose(jit(transport.squared_euclidean)(p, q), ((p[:, :, None] - q[:, None]) ** 2).sum(-1), atol=1e-14)
    np.testing.assert_allclose(jit(transport.hellinger)(p, q), 1 - np.sqrt(p[:, :, None] * q[:, None]).sum(-1), atol=1e-14)


def test_l1_holds_no_array_of_differences():
    n, v = 64, 4096
    points = jax.ShapeDtypeStruct((n, v), jnp.float32)
    program = jax.jit(jax.grad(lambda p, q: jnp.sum(transport.l1(p, q) ** 2), argnums=(0, 1))).lower(points, points).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * 4 * n * n * v


@pytest.mark.parametrize("power", [1.0, 2.0, 1.5])
def test_the_line(power, x64, strict):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 6)), rng.normal(size=(2, 9))
    a, b = rng.dirichlet(np.ones(6), 2), rng.dirichlet(np.ones(9), 2)
    a[0, 1], a[1] = 0, 1 / 6
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(a / a.sum(-1, keepdims=True)), np.log(b)
    got = jit(functools.partial(transport.wasserstein_1d, power=power))(x, y, log_a, log_b)
    for i in range(2):
        expected = reference.linear_program(np.abs(x[i][:, None] - y[i]) ** power, np.exp(log_a[i]), b[i])
        np.testing.assert_allclose(got[i], expected, atol=1e-10)
    value = lambda x: jnp.sum(transport.wasserstein_1d(x, y, log_a, log_b, power=power))  # noqa: E731
    np.testing.assert_allclose(jit(jax.grad(value))(x), reference.differences(jit(value), x), atol=1e-7)
    y = y[:, :6]
    even = jit(functools.partial(transport.wasserstein_1d, power=power))
    zeros = np.zeros((2, 6)) - np.log(6)
    np.testing.assert_allclose(even(x, y), even(x, y, zeros, zeros), atol=1e-14)
    whole = lambda x, *weights: jnp.sum(transport.wasserstein_1d(x, y, *weights, power=power))  # noqa: E731
    close(jit(jax.grad(whole))(x), jit(jax.grad(whole))(x, zeros, zeros), 1e-12)


def test_two_classes_are_sorted(x64):
    """Sum over n of the paper's unit masses, in the limit of small epsilon."""
    rng = np.random.default_rng(5)
    p, q = (softmax(rng.normal(size=(8, 2))) for _ in range(2))
    exact = 2 * np.abs(np.sort(p[:, 0]) - np.sort(q[:, 0])).sum()
    np.testing.assert_allclose(8 * transport.l1_two_classes(p, q), exact, atol=1e-14)
    np.testing.assert_allclose(8 * reference.linear_program(reference.l1(p, q), np.full(8, 1 / 8), np.full(8, 1 / 8)), exact, atol=1e-10)
    out = solve(transport.l1(p, q), epsilon=1e-3, num_iters=20000, tolerance=1e-8, epsilon_start=2.0)
    np.testing.assert_allclose(8 * out.cost, exact, atol=8e-3)
    assert transport.l1_two_classes(p, q[::-1]) == transport.l1_two_classes(p, q)


def debiased(x, y, *, cost_fn=transport.l1, **options):
    y = jax.lax.stop_gradient(y)
    return transport.sinkhorn_divergence(cost_fn(x, y), cost_fn(x, x), cost_fn(y, y), **options)


def test_debiased_divergence(x64, strict):
    rng = np.random.default_rng(2)
    p, q = (softmax(rng.normal(size=(12, 3))) for _ in range(2))
    options = {"epsilon": 0.1, "num_iters": 20000, "tolerance": 1e-12}
    value = jit(lambda x, y: debiased(x, y, **options).value)
    slope = jit(jax.value_and_grad(lambda x, y: debiased(x, y, **options).value))
    for other in (p, p[rng.permutation(12)]):
        total, gradient = slope(p, other)
        assert abs(total) < 1e-10 and np.abs(gradient).max() < 1e-6
    assert value(p, q) > 1e-3
    np.testing.assert_allclose(slope(p, q)[1], reference.differences(lambda x: value(x, q), p), atol=1e-8)
    out = jit(lambda: debiased(p, q, **options))()
    assert out.converged and out.error <= 1e-12

    large = jit(lambda: debiased(p, q, epsilon=1e5, num_iters=50).value)()  # the energy distance
    energy = reference.l1(p, q).mean() - 0.5 * reference.l1(p, p).mean() - 0.5 * reference.l1(q, q).mean()
    np.testing.assert_allclose(large, energy, rtol=1e-4)
    x, y = rng.normal(size=(2, 6, 1))
    options = {"cost_fn": transport.squared_euclidean, "epsilon": 0.01, "num_iters": 20000, "tolerance": 1e-8, "epsilon_start": 4.0}
    tight = jit(lambda: debiased(x, y, **options).value)
    np.testing.assert_allclose(tight(), transport.wasserstein_1d(x[:, 0], y[:, 0], power=2), atol=1e-2)


def test_unbalanced_divergence_of_equal_and_unequal_masses(x64):
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(5, 2)), rng.normal(size=(4, 2))
    log_a, log_b = np.log(rng.uniform(0.1, 0.4, 5)), np.log(rng.uniform(0.2, 0.6, 4))
    cost = transport.squared_euclidean
    options = {"epsilon": 0.5, "num_iters": 5000, "tolerance": 1e-13, "rho": 1.5}
    run = jit(lambda x, y, a, b: transport.sinkhorn_divergence(cost(x, y), cost(x, x), cost(y, y), a, b, **options).value)
    assert abs(run(x, x, log_a, log_a)) < 1e-11
    assert run(x, y, log_a, log_b) > 1e-3


# --- extremes


@pytest.mark.parametrize("derivative", transport.DERIVATIVES)
def test_extreme_logits_and_small_epsilon(derivative):
    """Outputs of +-60 logits: costs of exactly 0 and 2. The plain kernel exp(-2 / 0.01) is 0 in float32."""
    rng = np.random.default_rng(4)
    student, teacher = (np.float32(60 * np.sign(rng.normal(size=(12, 4)))) for _ in range(2))
    disjoint = np.float32(60 * (2 * np.eye(4)[[0] * 12] - 1)), np.float32(60 * (2 * np.eye(4)[[1] * 12] - 1))

    def value(student, teacher, epsilon):
        cost = transport.l1(jax.nn.softmax(student), jax.nn.softmax(teacher))
        out = transport.sinkhorn(cost, epsilon=epsilon, num_iters=20, derivative=derivative)
        return out.cost, out

    run = jit(jax.value_and_grad(value, has_aux=True))
    for epsilon in (0.01, 0.001):
        chex.assert_tree_all_finite(run(student, teacher, epsilon))
        (total, out), gradient = run(*disjoint, epsilon)
        chex.assert_tree_all_finite((total, out, gradient))
        np.testing.assert_allclose(total, 2.0, rtol=1e-6 / epsilon)


def test_weights_of_all_sizes(x64):
    """Log weights down to -200 beside others: float32 takes the logarithms and agrees with float64."""
    cost, log_a, log_b = problem(6, 5, (1,), masked=False)
    log_a[0, 0], log_b[0, 1] = -200, -80
    log_a, log_b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_a, log_b))
    run = jit(lambda *x: jax.grad(lambda c: jnp.sum(transport.sinkhorn(c, *x[1:], epsilon=0.1, num_iters=10).cost))(x[0]))
    close(run(*(np.float32(x) for x in (cost, log_a, log_b))), run(cost, log_a, log_b), 1e-4)


def test_unequal_masses_drift_but_stay_finite():
    cost = problem(6, 3, (1,), dtype=np.float32)[0]
    out = solve(cost, jnp.zeros((1, 6)), jnp.zeros((1, 3)), epsilon=0.1, num_iters=300)
    chex.assert_tree_all_finite(out)
    assert not out.converged.any()


def test_dtypes(strict):
    cost, _, _ = problem(dtype=np.float32)
    low = solve(jnp.asarray(cost, jnp.bfloat16), epsilon=0.1, num_iters=5)
    assert all(x.dtype == jnp.float32 for x in (low.f, low.g, low.cost, low.regularized, low.error))
    assert low.iterations.dtype == jnp.int32 and low.converged.dtype == bool
    gradient = jit(jax.grad(lambda c: jnp.sum(solve(c, epsilon=0.1, num_iters=5).cost)))(jnp.asarray(cost, jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    high = solve(jnp.asarray(cost, jnp.bfloat16).astype(jnp.float32), epsilon=0.1, num_iters=5)
    np.testing.assert_array_equal(low.cost, high.cost)


# --- many problems


def test_each_problem_stops_for_itself(x64):
    """Converged problems keep what they had, whatever the others do; gradients too."""
    rng = np.random.default_rng(8)
    easy, hard = rng.uniform(0, 0.1, (6, 6)), rng.uniform(0, 2, (6, 6))
    options = {"epsilon": 0.2, "num_iters": 3000, "tolerance": 1e-7, "check_every": 5}
    value = lambda c: jnp.sum(solve(c, **options).cost)  # noqa: E731
    both = solve(np.stack([easy, hard]), **options)
    assert both.iterations[0] < both.iterations[1] < 3000 and both.iterations[0] % 5 == 0
    gradients = jit(jax.grad(value))(np.stack([easy, hard]))
    for i, cost in enumerate((easy, hard)):
        alone = solve(cost, **options)
        assert alone.iterations == both.iterations[i]
        chex.assert_trees_all_close(alone, jax.tree.map(lambda x, i=i: x[i], both), atol=1e-14)
        np.testing.assert_allclose(gradients[i], jit(jax.grad(value))(cost), atol=1e-13)
        fixed = solve(cost, epsilon=0.2, num_iters=int(alone.iterations))
        np.testing.assert_allclose(alone.cost, fixed.cost, atol=1e-14)


def test_the_limit_of_iterations_is_kept(x64):
    cost, log_a, log_b = problem()
    out = solve(cost, log_a, log_b, epsilon=0.02, num_iters=13, tolerance=0.0, check_every=5)
    assert list(out.iterations) == [13] * 3 and not out.converged.any()
    chex.assert_trees_all_close(out.f, solve(cost, log_a, log_b, epsilon=0.02, num_iters=13).f, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("derivative", ["exact", "implicit"])
def test_vmap_is_a_leading_axis(derivative, x64):
    cost, log_a, log_b = problem()
    epsilon = np.array([0.05, 0.1, 0.3])

    def value(c, a, b, e):
        return transport.sinkhorn(c, a, b, epsilon=e, num_iters=200, tolerance=1e-6, derivative=derivative).cost

    together = jit(jax.value_and_grad(lambda *x: jnp.sum(value(*x)), argnums=(0, 1, 2)))(cost, log_a, log_b, epsilon)
    mapped = jit(jax.vmap(jax.value_and_grad(value, argnums=(0, 1, 2))))(cost, log_a, log_b, epsilon)
    close(mapped[0].sum(), together[0], 1e-13)
    close(mapped[1], together[1], 1e-11)
    swept = jit(jax.vmap(value, in_axes=(None, None, None, 0)))(cost[1], log_a[1], log_b[1], epsilon)
    single = jit(value)
    alone = [single(cost[1], log_a[1], log_b[1], e) for e in epsilon]
    np.testing.assert_allclose(swept, alone, atol=1e-12)
    twice = jit(jax.vmap(jax.vmap(value, in_axes=(0, 0, 0, None)), in_axes=(None, None, None, 0)))(cost, log_a, log_b, epsilon)
    np.testing.assert_allclose(twice[:, 1], alone, atol=1e-12)


def test_vmap_makes_no_second_way():
    """The choice of the kernel stays a branch under `vmap`: a select would take both."""
    cost = jnp.zeros((2, 4, 4))
    text = str(jax.make_jaxpr(jax.vmap(lambda c: transport.sinkhorn(c, epsilon=0.1, num_iters=3).cost))(cost))
    assert "cond" in text or "custom_vmap" in text
    lowered = jax.jit(jax.vmap(lambda c: transport.sinkhorn(c, epsilon=0.1, num_iters=3).cost)).lower(cost).as_text()
    assert "stablehlo.case" in lowered or "stablehlo.if" in lowered


def test_traced_once():
    cost, log_a, log_b = problem(dtype=np.float32)

    @jit
    @chex.assert_max_traces(n=1)
    def run(cost, epsilon, rho, relaxation, tolerance, start):
        options = {"rho": rho, "relaxation": relaxation, "tolerance": tolerance, "epsilon_start": start, "num_iters": 20}
        value = lambda c: jnp.sum(transport.sinkhorn(c, log_a, log_b, epsilon=epsilon, **options).cost)  # noqa: E731
        return jax.value_and_grad(value)(cost)

    for k in range(4):
        run(cost, 0.1 + k, 1.0 + k, 1.0 + 0.1 * k, 1e-3 * k, 2.0 + k)


@pytest.mark.slow
def test_relaxation_helps(x64):
    """A slow problem, a noisy permutation: the rate of the plain iterations gives the relaxation."""
    rng = np.random.default_rng(9)
    x = np.sort(rng.uniform(size=(20, 1)), axis=0)
    cost = np.abs(x - (x + 0.01 * rng.normal(size=(20, 1))).T)
    run = functools.partial(solve, cost, epsilon=0.05, num_iters=20000, tolerance=1e-8)
    plain = run()
    errors = [solve(cost, epsilon=0.05, num_iters=k).error for k in (100, 120)]
    w = transport.best_relaxation((errors[1] / errors[0]) ** (1 / 20))
    fast = run(relaxation=w)
    assert plain.converged and fast.converged and fast.iterations < 0.5 * plain.iterations
    np.testing.assert_allclose(fast.cost, plain.cost, atol=1e-7)
    np.testing.assert_allclose(run(epsilon_start=1.0).cost, plain.cost, atol=1e-7)


# --- large supports


@pytest.mark.parametrize(
    ("derivative", "cost_fn", "options"),
    [
        ("exact", transport.l1, {"num_iters": 100, "rho": 0.5}),
        ("exact", transport.squared_euclidean, {"num_iters": 500, "tolerance": 1e-8}),
        ("implicit", transport.l1, {"num_iters": 500, "tolerance": 1e-8}),
        ("envelope", transport.hellinger, {"num_iters": 300}),
        ("unrolled", transport.squared_euclidean, {"num_iters": 20}),
    ],
)
def test_points_are_the_matrix(derivative, cost_fn, options, x64, strict):
    rng = np.random.default_rng(7)
    x, y = rng.uniform(size=(2, 11, 3)), rng.uniform(size=(2, 9, 3))
    _, log_a, log_b = problem(11, 9, (2,))

    def value(x, y, online, **options):
        options |= {"epsilon": 0.1, "derivative": derivative}
        if online:
            out = transport.sinkhorn_points(x, y, log_a, log_b, cost_fn=cost_fn, block=4, **options)
        else:
            out = transport.sinkhorn(cost_fn(x, y), log_a, log_b, domain="log", **options)
        return jnp.sum(out.cost) + 0.5 * jnp.sum(out.regularized), out

    run = lambda online: jit(  # noqa: E731
        jax.value_and_grad(lambda x, y: value(x, y, online, **options), argnums=(0, 1), has_aux=True)
    )
    (ours, out), gradients = run(True)(x, y)
    (theirs, dense), expected = run(False)(x, y)
    close((ours, gradients), (theirs, expected), 1e-9)
    chex.assert_trees_all_close(out, dense, atol=1e-10)


@pytest.mark.parametrize("derivative", ["exact", "implicit", "envelope"])
def test_points_never_hold_the_matrix(derivative):
    n, block = 1536, 64
    points = jax.ShapeDtypeStruct((n, 2), jnp.float32)

    def value(x, y):
        return transport.sinkhorn_points(x, y, epsilon=0.1, num_iters=10, derivative=derivative, block=block).regularized

    program = jax.jit(jax.grad(value, argnums=(0, 1))).lower(points, points).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.4 * 4 * n * n


@pytest.mark.slow
def test_memory_of_the_exact_derivative():
    """Potentials of each step, not matrices: twice the iterations cost next to nothing; by autodiff they cost all."""
    n = 256
    cost = jax.ShapeDtypeStruct((n, n), jnp.float32)

    def temporaries(num_iters, derivative):
        value = lambda c: transport.sinkhorn(c, epsilon=0.1, num_iters=num_iters, derivative=derivative).cost  # noqa: E731
        return jax.jit(jax.grad(value)).lower(cost).compile().memory_analysis().temp_size_in_bytes / (4 * n * n)

    assert temporaries(40, "exact") - temporaries(20, "exact") < 2
    assert temporaries(20, "exact") < temporaries(20, "unrolled") / 4


# --- meshes


@pytest.mark.parametrize(("derivative", "dtype"), [("exact", "float32"), ("exact", "float64"), ("implicit", "float64")])
def test_sharded_rows(derivative, dtype, mesh, x64):
    cost, log_a, log_b = problem(16, 12, (), masked=False, dtype=dtype)
    log_a[3] = -np.inf
    log_a -= np.log(np.exp(log_a).sum())

    def value(cost, log_a, log_b):
        out = transport.sinkhorn(cost, log_a, log_b, epsilon=0.2, num_iters=60, derivative=derivative)
        return out.cost + out.regularized, out

    run = jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))
    expected = _unplaced(value, cost, log_a, log_b)
    if mesh is None:
        got = run(cost, log_a, log_b)
    else:
        specs = (jax.P(("data", "model"), None), jax.P(("data", "model")), jax.P())
        got = run(*(jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip((cost, log_a, log_b), specs)))
    # Sums over devices are made in another order: some units of rounding of the potentials, which are at most the cost's size.
    unit = np.max(cost) * np.finfo(dtype).eps
    chex.assert_trees_all_close(got, expected, atol=max(8 * unit, 1e-12), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("derivative", ["exact", "implicit"])
def test_sharded_problems(derivative, mesh):
    cost, log_a, log_b = problem(6, 5, (8,), dtype=np.float32)
    options = {"epsilon": 0.2, "num_iters": 200, "tolerance": 1e-3, "derivative": derivative}
    value = lambda *x: (jnp.sum((out := transport.sinkhorn(*x, **options)).cost), out)  # noqa: E731
    expected = _unplaced(value, cost, log_a, log_b)
    arguments = (cost, log_a, log_b)
    if mesh is not None:
        arguments = tuple(jax.device_put(x, jax.NamedSharding(mesh, jax.P(("data", "model")))) for x in arguments)
    got = jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(*arguments)
    np.testing.assert_array_equal(got[0][1].iterations, expected[0][1].iterations)
    close(got[1], expected[1], 3e-5)


def _unplaced(value, *arguments):
    """The same on one device, out of the mesh in context."""
    single = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    with jax.set_mesh(single):
        return jax.device_get(jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(*arguments))


# --- messages


def test_messages():
    cost = np.zeros((4, 3))
    run = functools.partial(transport.sinkhorn, epsilon=0.1, num_iters=5)
    with pytest.raises(ValueError, match=r"sinkhorn: 'log_a' has shape \(3,\), expected \[\.\.\. n\] with n=4 from 'cost'"):
        run(cost, np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match="sinkhorn: 'num_iters' is 0, expected at least 1"):
        run(cost, num_iters=0)
    with pytest.raises(ValueError, match="sinkhorn: 'check_every' is 0"):
        run(cost, tolerance=0.1, check_every=0)
    with pytest.raises(ValueError, match="sinkhorn: 'derivative' is 'danskin', expected one of 'exact'"):
        run(cost, derivative="danskin")
    with pytest.raises(ValueError, match="sinkhorn: 'reference' is 'lebesgue'"):
        run(cost, reference="lebesgue")
    with pytest.raises(ValueError, match="sinkhorn: 'domain' is 'kernel', expected 'auto' or 'log'"):
        run(cost, domain="kernel", epsilon_start=1.0)
    with pytest.raises(ValueError, match=r"sinkhorn: 'epsilon' has shape \(2,\), expected \[\] or the leading axes \(\)"):
        run(cost, epsilon=np.ones(2))
    with pytest.raises(ValueError, match="sinkhorn: 'cost' has shape"):
        run(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="sinkhorn_points: 'block' is 0"):
        transport.sinkhorn_points(np.zeros((4, 2)), np.zeros((3, 2)), epsilon=0.1, num_iters=5, block=0)
    with pytest.raises(ValueError, match="sinkhorn_divergence: 'cost_xx' has shape"):
        transport.sinkhorn_divergence(cost, np.zeros((4, 5)), np.zeros((3, 3)), epsilon=0.1, num_iters=5)
    with pytest.raises(ValueError, match=r"wasserstein_1d: 'power' is 0\.5"):
        transport.wasserstein_1d(np.zeros(3), np.zeros(3), power=0.5)
    with pytest.raises(ValueError, match="l1_two_classes: 'p' has shape"):
        transport.l1_two_classes(np.zeros((3, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="plan: 'g' has shape"):
        transport.plan(cost, np.zeros(4), np.zeros(4), epsilon=0.1)
