"""SinKD beside its equations: values, gradients, special cases, masks, placements."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import sinkd as reference

from janax.algorithms import sinkd
from janax.jaxlib_ext import transport

loss = jax.jit(sinkd.loss, static_argnames=("cost", "num_iters", "derivative", "value", "scale", "group_size", "domain"))
sequence_loss = jax.jit(sinkd.sequence_loss, static_argnames=("layout", "group_size", "scale"))
sample_loss = jax.jit(functools.partial(sinkd.sample_loss, temperature=2.0))
multi_level_loss = jax.jit(sinkd.multi_level_loss, static_argnames=("k", "num_iters"))
SHAPES = [(1, 3), (8, 2), (16, 5), (32, 3)]


def problem(n, v, scale=2.0, seed=0):
    rng = np.random.default_rng([seed, n, v])
    return scale * rng.normal(size=(n, v)), scale * rng.normal(size=(n, v))


def paper(student, teacher, **options):
    return loss(student, teacher, scale="paper_sum", **options)[0]


@pytest.mark.parametrize("domain", ["log", "auto"])
@pytest.mark.parametrize(("n", "v"), SHAPES)
def test_value_and_gradient(n, v, domain, x64, strict):
    student, teacher = problem(n, v)
    value, gradient = jax.jit(jax.value_and_grad(functools.partial(paper, domain=domain)))(student, teacher)
    wanted, wanted_gradient = reference.loss(student, teacher)
    np.testing.assert_allclose(value, wanted, rtol=1e-9)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("n", "v"), [(16, 5), (24, 4096)])
def test_float32(n, v, strict):
    student, teacher = problem(n, v)
    value, gradient = jax.jit(jax.value_and_grad(paper))(*(x.astype(np.float32) for x in (student, teacher)))
    wanted, wanted_gradient = reference.loss(student, teacher)
    np.testing.assert_allclose(value, wanted, rtol=2e-5)
    np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-3 * np.abs(wanted_gradient).max())


def test_the_mean_is_the_sum_over_rows(x64):
    student, teacher = problem(16, 5)
    value, info = loss(student, teacher)
    np.testing.assert_allclose(16 * value, reference.loss(student, teacher)[0], rtol=1e-9)
    plan = reference.plans(reference.cost(*(reference.softmax(x / 2) for x in (student, teacher))), 0.1, 20)[-1]
    np.testing.assert_allclose(info.diagonal, np.trace(plan) / 16, rtol=1e-9)
    np.testing.assert_allclose(info.error, np.abs(plan.sum(1) - 1).sum() / 16, rtol=1e-6, atol=1e-12)
    assert (info.iterations, info.rows) == (20, 16)


def test_one_row_is_not_transported(x64):
    student, teacher = problem(1, 7)
    distance = np.abs(reference.softmax(student / 2) - reference.softmax(teacher / 2)).sum()
    np.testing.assert_allclose(paper(student, teacher), distance, rtol=1e-12)
    np.testing.assert_allclose(sample_loss(student, teacher), distance, rtol=1e-12)


def test_two_classes_tend_to_sorted_order(x64):
    student, teacher = problem(12, 2)
    bias = [
        paper(student, teacher, epsilon=e, num_iters=5000, domain="log") / reference.two_classes(student, teacher) - 1 for e in (0.05, 0.02)
    ]
    assert 0 < bias[1] < 0.3 * bias[0] < 0.01  # falls faster than epsilon
    probabilities = (reference.softmax(x / 2) for x in (student, teacher))
    np.testing.assert_allclose(12 * transport.l1_two_classes(*probabilities), reference.two_classes(student, teacher), rtol=1e-12)


def test_permuted_and_equal_sets(x64):
    """Blind to the order of rows; biased at equality unless debiased; repaired by anchors."""
    _, teacher = problem(32, 3)
    student = np.random.default_rng(1).permutation(teacher)
    away = problem(32, 3, seed=2)[0]
    assert paper(student, teacher) < 0.3 * paper(away, teacher) < 0.3 * 32 * sample_loss(away, teacher)
    np.testing.assert_allclose(paper(student, teacher), paper(teacher, teacher), rtol=1e-3)
    debiased = functools.partial(loss, value="debiased", num_iters=2000, tolerance=1e-13)
    both = jax.jit(jax.value_and_grad(debiased, has_aux=True))
    for rows in (student, teacher):
        (value, _), gradient = both(rows, teacher)
        assert abs(value) < 1e-12 and np.abs(gradient).max() < 1e-12
    value, gradient = jax.jit(jax.value_and_grad(paper))(teacher, teacher)
    assert value > 0.1 and np.linalg.norm(gradient) > 1e-2
    anchored, info = loss(student, teacher, anchor=3.0)
    np.testing.assert_allclose(anchored, sample_loss(student, teacher), rtol=1e-6)
    np.testing.assert_allclose(info.diagonal, 1, atol=1e-6)
    assert loss(student, teacher)[1].diagonal < 0.3


def test_anchored_classes(x64):
    """Mass does not leave its class if both sides have equally many rows of it."""
    student, teacher = problem(8, 4)
    labels = np.arange(8) % 2
    whole = loss(student, teacher, labels=labels, anchor=10.0, num_iters=200)[0]
    apart = [loss(student[labels == k], teacher[labels == k], num_iters=200)[0] for k in (0, 1)]
    np.testing.assert_allclose(whole, np.mean(apart), rtol=1e-9)


@pytest.mark.parametrize(
    ("cost", "value"),
    [*((cost, "transport") for cost in sinkd.COSTS), ("l1", "regularized"), ("hellinger", "debiased"), ("l1", "debiased")],
)
def test_costs_and_values_agree_with_finite_differences(cost, value, x64):
    student, teacher = problem(6, 4)
    options = {"value": value, "cost": cost, "epsilon": 0.3, "num_iters": 200, "tolerance": 1e-13 if value == "debiased" else None}
    f = jax.jit(jax.value_and_grad(lambda s, t: sinkd.loss(s, t, **options)[0], argnums=(0, 1)))
    direction = np.random.default_rng(3).normal(size=student.shape)
    slope = (f(student + 1e-6 * direction, teacher)[0] - f(student - 1e-6 * direction, teacher)[0]) / 2e-6
    gradient, of_teacher = f(student, teacher)[1]
    np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=2e-6, atol=1e-8)
    assert not np.any(of_teacher)  # the teacher is a constant


def test_masked_rows_do_not_matter(x64):
    student, teacher = problem(12, 5)
    mask = np.arange(12) % 3 != 0
    noise = np.where(mask[:, None], 0.0, np.nan)
    masked = jax.jit(jax.value_and_grad(lambda s, t, mask: paper(s, t, mask=mask)))
    value, gradient = masked(student + noise, teacher + noise, mask)
    wanted, wanted_gradient = reference.loss(student[mask], teacher[mask])
    np.testing.assert_allclose(value, wanted, rtol=1e-9)
    np.testing.assert_allclose(gradient[mask], wanted_gradient, rtol=1e-8, atol=1e-12)
    assert not np.any(gradient[~mask])
    value, gradient = masked(student, teacher, np.zeros(12, bool))
    assert value == 0 and not np.any(gradient)


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_saturated_outputs_are_finite(epsilon):
    """Disjoint one-hot outputs: every cost is 2 and nothing pulls; where the kernel form would divide zero by zero."""
    rows = 60 * np.eye(6, dtype=np.float32)
    student, teacher = rows[:3], rows[3:]
    value, gradient = jax.jit(jax.value_and_grad(functools.partial(paper, epsilon=epsilon)))(student, teacher)
    np.testing.assert_allclose(value, 6, rtol=4e-5)  # potentials carry C / epsilon = 200 units of rounding
    assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() < 1e-9


def test_groups_and_sequences(x64):
    b, t, v = 3, 8, 5
    student, teacher = problem(b * t, v)
    mask = np.random.default_rng(0).random((b, t)) < 0.7
    apart = [reference.loss(s[m], z[m])[0] for s, z, m in zip(student.reshape(b, t, v), teacher.reshape(b, t, v), mask)]
    whole = (student.reshape(b, t, v), teacher.reshape(b, t, v), mask)
    np.testing.assert_allclose(sequence_loss(*whole)[0], sum(apart) / mask.sum(), rtol=1e-9)
    flat = reference.loss(student[mask.ravel()], teacher[mask.ravel()])[0]
    np.testing.assert_allclose(sequence_loss(*whole, layout="flat", scale="paper_sum")[0], flat, rtol=1e-9)
    fours = [reference.loss(student[i : i + 4], teacher[i : i + 4])[0] for i in range(0, b * t, 4)]
    everything = (*whole[:2], np.ones((b, t)))
    np.testing.assert_allclose(sequence_loss(*everything, layout="grouped", group_size=4)[0], sum(fours) / (b * t), rtol=1e-9)


def test_legacy_3d(x64):
    student, teacher = (x.reshape(4, 6, 5) for x in problem(24, 5))
    value, plan = reference.legacy_3d(student, teacher)
    np.testing.assert_allclose(jax.jit(sinkd.legacy_3d_loss)(student, teacher), value, rtol=1e-9)
    np.testing.assert_allclose(plan.sum(0), 1, rtol=1e-12)


def test_objective(x64):
    student, teacher = problem(16, 3)
    labels = np.arange(16) % 3
    f = jax.jit(lambda alpha, tau: sinkd.objective(student, teacher, labels, recipe=sinkd.Recipe(alpha=alpha, temperature=tau)))
    assert len(sinkd.GLUE) == 7
    for recipe in sinkd.GLUE.values():
        assert recipe[1:3] == (0.8, 0.001) and recipe[5:] == (2.0, 0.1, 20, None)
        value, info = f(recipe.alpha, recipe.temperature)
        wanted = reference.objective(student, teacher, labels, recipe.alpha, 0.8, 0.001, recipe.temperature)
        np.testing.assert_allclose(value, wanted, rtol=1e-9)
    np.testing.assert_allclose(info.sinkhorn, reference.loss(student, teacher)[0], rtol=1e-9)
    value, info = jax.jit(lambda: sinkd.objective(student, teacher, labels, recipe=sinkd.T0))()
    np.testing.assert_allclose(value, info.cross_entropy + 0.1 * info.distillation + 0.0008 * info.sinkhorn, rtol=1e-12)
    assert sinkd.annealed_temperature(3.0, 0, 10) == 3 and sinkd.annealed_temperature(3.0, 9, 10) == 1 == sinkd.T0.temperature


def test_different_vocabularies(x64):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 6, 9)), rng.normal(size=(2, 6, 7))
    mask = np.ones((2, 6))
    s, t = (np.sort(reference.softmax(x))[..., ::-1] for x in (student, teacher))
    wanted = np.abs(s - np.pad(t, ((0, 0), (0, 0), (0, 2)))).sum(-1)
    np.testing.assert_allclose(jax.jit(sinkd.universal_loss)(student, teacher, mask), wanted.mean(), rtol=1e-12)

    aligned = jax.jit(functools.partial(sinkd.sort_align, k=4))(student[0], teacher[0], mask[0])
    for x, ours in zip((student[0], teacher[0]), aligned):
        p = reference.softmax(x)
        np.testing.assert_allclose(ours, p[:, np.argsort(-p.sum(0))[:4]], rtol=1e-12)
    total, info = multi_level_loss(student, teacher, mask, k=4, num_iters=20)
    pairs = [[p[:, np.argsort(-p.sum(0))[:4]] for p in map(reference.softmax, rows)] for rows in zip(student, teacher)]
    difference = np.mean([np.abs(s - t).sum(-1) for s, t in pairs])
    logarithmic = np.mean([-(t * np.log(s)).sum(-1) for s, t in pairs])
    soft = [[p[:, np.argsort(-p.sum(0))[:4]] for p in (reference.softmax(x / 2) for x in rows)] for rows in zip(student, teacher)]
    moved = []
    for s, t in soft:
        c = reference.cost(s, t)
        moved.append(np.sum(reference.plans(c, 0.1, 20)[-1] * c) / 6)
    np.testing.assert_allclose((info.difference, info.logarithmic, info.sinkhorn), (difference, logarithmic, np.mean(moved)), rtol=1e-9)
    np.testing.assert_allclose(total, 0.15 * (difference + 0.1 * logarithmic + 0.1 * np.mean(moved)), rtol=1e-9)
    same = multi_level_loss(student, teacher[..., ::-1], mask, k=4)[0]  # names of tokens do not matter
    np.testing.assert_allclose(same, total, rtol=1e-12)


def test_vmap_bfloat16_and_one_trace():
    student, teacher = (x.reshape(3, 8, 4).astype(np.float32) for x in problem(24, 4))
    each = [loss(s, t)[0] for s, t in zip(student, teacher)]
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda s, t: loss(s, t)[0]))(student, teacher), each, rtol=1e-5)
    half = [jnp.asarray(x[0], jnp.bfloat16) for x in (student, teacher)]
    value, gradient = jax.jit(jax.value_and_grad(lambda s, t: loss(s, t)[0]))(*half)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, loss(*(x.astype(jnp.float32) for x in half))[0], rtol=1e-6)
    traced = jax.jit(chex.assert_max_traces(lambda s, e, tau: loss(s, teacher[0], epsilon=e, temperature=tau)[0], n=1))
    for number in (0.05, 0.1, 0.5):
        traced(student[0], number, 1 + number)


@pytest.mark.parametrize("value", ["transport", pytest.param("debiased", marks=pytest.mark.slow)])
def test_on_meshes(value, mesh):
    student, teacher = (x.astype(np.float32) for x in problem(16, 6))
    f = jax.jit(jax.value_and_grad(lambda s, t: loss(s, t, value=value, num_iters=50)[0]))
    wanted, wanted_gradient = f(student, teacher)
    if mesh is not None:
        student, teacher = (jax.device_put(x, jax.NamedSharding(mesh, jax.P("data"))) for x in (student, teacher))
    got, gradient = f(student, teacher)
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-6)


def test_messages():
    z = np.zeros((4, 3))
    with pytest.raises(ValueError, match=r"sinkd\.cost_matrix: 'student_logits' has one class, .* squared error for regression"):
        loss(z[:, :1], z[:, :1])
    with pytest.raises(ValueError, match=r"sinkd\.loss: 'teacher_logits' has shape"):
        loss(z, z[:2])
    with pytest.raises(ValueError, match="'group_size' is 3, expected a divisor of the 4 rows"):
        loss(z, z, group_size=3)
    with pytest.raises(ValueError, match="'scale' is 'sum', expected one of 'mean', 'paper_sum'"):
        loss(z, z, scale="sum")
    with pytest.raises(ValueError, match="'cost' is 'l2', expected one of"):
        loss(z, z, cost="l2")
    with pytest.raises(ValueError, match="give 'student_labels' and 'teacher_labels' or neither"):
        sinkd.cost_matrix(z, z, student_labels=np.zeros(4, int))
    with pytest.raises(ValueError, match="give a size with 'grouped', and only there"):
        sinkd.sequence_loss(z[None], z[None], np.ones((1, 4)), layout="flat", group_size=2)
    with pytest.raises(ValueError, match="'k' is 0, expected at least 1"):
        sinkd.sort_align(z, z, np.ones(4), k=0)
