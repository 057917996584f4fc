"""SinKD: distillation by entropic optimal transport between the batch's student outputs and its teacher outputs (Cui et al., arXiv:2402.17110).

The n rows of class probabilities of a batch are two sets of points; what is small is the cost of moving one onto the other:

    s_i = softmax(zS_i / tau),  t_j = softmax(zT_j / tau)            C_ij = |s_i - t_j|_1                        section 2.1, `cost_matrix`
    P = argmin <P, C> - epsilon H(P), unit row and column sums       rows and columns of exp(-C / epsilon) normalised in turn, `num_iters` times
    L_SD = <P, C>                                                                                                `loss`
    L = (1 - alpha) L_CE + alpha L_KD + beta w L_SD                                                              `objective`

    value, info = sinkd.loss(student_logits, teacher_logits)                                       # the library's unit: a mean per row
    value, info = sinkd.loss(student_logits, teacher_logits, scale="paper_sum")                    # the official code's: a sum over rows
    value, info = sinkd.objective(student_logits, teacher_logits, labels, recipe=sinkd.GLUE["sst2"])

What the loss cannot see. It depends on the two sets of rows only: a student whose rows are the teacher's in another order has a small loss
(and none, with a zero gradient, when debiased); `anchor` makes a row prefer its own teacher. At s = t it is not zero, and its gradient shrinks
the student towards the plan's barycentres: value="debiased" mends that. And L1 between probabilities saturates: with disjoint outputs
every cost is 2 and the gradient is gone.

Where paper and official code differ, the code's intent is followed: the student's rows first, P's columns normalised last, the
gradient through all iterations, the teacher always a constant. The published three-dimensional form for T0, which normalises over the sequence and
the batch, is `legacy_3d_loss`, for comparison only.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import divergence, dtypes, masking, sharding, transport
from janax.jaxlib_ext.checks import check_shapes, one_of, require_integers

__all__ = [
    "COSTS",
    "GLUE",
    "T0",
    "Cost",
    "MultiLevelInfo",
    "ObjectiveInfo",
    "Recipe",
    "SinkdInfo",
    "annealed_temperature",
    "cost_matrix",
    "distillation_loss",
    "legacy_3d_loss",
    "loss",
    "multi_level_loss",
    "objective",
    "sample_loss",
    "sequence_loss",
    "sort_align",
    "universal_loss",
]

Cost = Callable[[jax.Array, jax.Array], jax.Array]
"""(student logits [... n v], teacher logits [... m v]), both divided by the temperature -> C [... n m]."""


class SinkdInfo(NamedTuple):
    """How the transport came out; no gradients.

    Attributes:
      error: [] l1 violation of the row marginals, in shares of the mass; the largest over groups.
      iterations: [] int32, the largest over groups.
      converged: [] whether all groups have.
      diagonal: [] share of the mass that stays with its own row: 1 for paired samples, 1/n for a uniform plan. 0 when debiased (not computed).
      rows: [] how many rows count.
    """

    error: jax.Array
    iterations: jax.Array
    converged: jax.Array
    diagonal: jax.Array
    rows: jax.Array


# --- costs


def _probabilities(x: jax.Array) -> jax.Array:
    return jax.nn.softmax(x, axis=-1)


def _l1(student: jax.Array, teacher: jax.Array) -> jax.Array:
    return transport.l1(_probabilities(student), _probabilities(teacher))


def _squared(student: jax.Array, teacher: jax.Array) -> jax.Array:
    return transport.squared_euclidean(_probabilities(student), _probabilities(teacher))


def _hellinger(student: jax.Array, teacher: jax.Array) -> jax.Array:
    return transport.hellinger(_probabilities(student), _probabilities(teacher))


def _logits(student: jax.Array, teacher: jax.Array) -> jax.Array:
    student, teacher = (x - jnp.mean(x, axis=-1, keepdims=True) for x in (student, teacher))
    return transport.squared_euclidean(student, teacher) / student.shape[-1]


def _log_probabilities(student: jax.Array, teacher: jax.Array) -> jax.Array:
    student, teacher = (jnp.maximum(jax.nn.log_softmax(x, axis=-1), -20.0) for x in (student, teacher))
    return transport.l1(student, teacher) / student.shape[-1]


_COSTS: dict[str, Cost] = {
    "l1": _l1,
    "squared": _squared,
    "hellinger": _hellinger,
    "logits": _logits,
    "log_probabilities": _log_probabilities,
}
COSTS = tuple(_COSTS)
"""l1 (the paper's), squared: |s - t|^2, hellinger: 1 - sum sqrt(s t), logits: mean squared difference of centred logits, log_probabilities: mean
|log s - log t|, each at least -20. Where outputs do not overlap "logits" still varies, "log_probabilities" until both are at their bounds."""


def cost_matrix(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    cost: str | Cost = "l1",
    anchor: ArrayLike = 0.0,
    student_labels: ArrayLike | None = None,
    teacher_labels: ArrayLike | None = None,
) -> jax.Array:
    """C_ij between student rows i and teacher rows j, plus `anchor` where they are not the same sample (or class).

    Args:
      student_logits: [... n v] student logits.
      teacher_logits: [... m v] teacher logits.
      temperature: [] tau > 0, divides both. Traced.
      cost: A name among `COSTS`, or a function of the tempered logits. Static.
      anchor: [] gamma >= 0 added where i != j; from about 3 on, the L1 plan is the identity. Traced.
      student_labels: [... n] if given with `teacher_labels`, gamma is added where labels differ instead.
      teacher_labels: [... m].

    Returns:
      [... n m] float32 or wider.

    Raises:
      ValueError: on shapes that do not agree, one class, or an unknown cost.

    Reference: arXiv:2402.17110, the cost of the batch-wise reformulation; anchors are not in the paper.
    """
    name = "sinkd.cost_matrix"
    axes = check_shapes(
        name,
        student_logits=(student_logits, "... n v"),
        teacher_logits=(teacher_logits, "... m v"),
        student_labels=(student_labels, "... n"),
        teacher_labels=(teacher_labels, "... m"),
    )
    if axes["v"] == 1:
        raise ValueError(f"{name}: 'student_logits' has one class, whose softmax is always 1; use a squared error for regression")
    if (student_labels is None) != (teacher_labels is None):
        raise ValueError(f"{name}: give 'student_labels' and 'teacher_labels' or neither")
    if isinstance(cost, str):
        one_of(name, "cost", cost, COSTS)
        cost = _COSTS[cost]
    student, teacher = _common(student_logits, teacher_logits)
    tau = jnp.asarray(temperature).astype(student.dtype)
    matrix = cost(student / tau, teacher / tau)
    if student_labels is not None and teacher_labels is not None:
        apart = jnp.asarray(student_labels)[..., :, None] != jnp.asarray(teacher_labels)[..., None, :]
    else:
        apart = jnp.arange(axes["n"])[:, None] != jnp.arange(axes["m"])[None, :]
        apart = jnp.broadcast_to(apart, matrix.shape)
    return matrix + jnp.asarray(anchor).astype(matrix.dtype) * apart.astype(matrix.dtype)


# --- the loss


def loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    temperature: ArrayLike = 2.0,
    cost: str | Cost = "l1",
    epsilon: ArrayLike = 0.1,
    num_iters: int = 20,
    tolerance: ArrayLike | None = None,
    derivative: str = "exact",
    value: str = "transport",
    anchor: ArrayLike = 0.0,
    scale: str = "mean",
    group_size: int | None = None,
    domain: str = "auto",
) -> tuple[jax.Array, SinkdInfo]:
    """The batch-wise Sinkhorn distance between student and teacher; couples the rows of a batch. The teacher is a constant.

    Args:
      student_logits: [n v] student logits.
      teacher_logits: [n v] teacher logits of the same samples.
      mask: [n] non-zero where a row counts. Others have no mass and exactly zero gradients, whatever their logits.
      labels: [n] integers; with them, `anchor` separates classes instead of samples.
      temperature: [] tau > 0. Traced.
      cost: See `cost_matrix`. Static.
      epsilon: [] entropy weight, in units of the cost. Traced.
      num_iters: Iterations; the most, if there is a tolerance. Static.
      tolerance: [] marginal error at which to stop; None for exactly `num_iters`, as in the paper. Traced.
      derivative: "exact" is the paper's, through all iterations, without storing them; "implicit", "envelope", "unrolled": see `transport`.
        Static.
      value: "transport" is <P, C>, the paper's; "regularized" adds epsilon KL(P | uniform); "debiased" is the Sinkhorn divergence, 0 for equal
        sets (its derivative is always the envelope's: give it iterations enough). Static.
      anchor: [] see `cost_matrix`. Traced.
      scale: "mean" per row; "paper_sum" a sum over rows, which grows with the batch. Static.
      group_size: Solve separate problems of so many neighbouring rows, so that the loss does not depend on how many devices share a batch; None
        is one problem. Static.
      domain: "auto", "log" or "kernel": see `transport.sinkhorn`. Static.

    Returns:
      The loss [], float32 or wider, 0 if no row counts; and `SinkdInfo`.

    Raises:
      ValueError: on shapes that do not agree, one class, an unknown option, or a `group_size` that does not divide n.

    Reference: arXiv:2402.17110; constants tau 2, epsilon 0.1, 20 iterations as in the official code.
    """
    name = "sinkd.loss"
    axes = check_shapes(
        name, student_logits=(student_logits, "n v"), teacher_logits=(teacher_logits, "n v"), mask=(mask, "n"), labels=(labels, "n")
    )
    one_of(name, "value", value, ("transport", "regularized", "debiased"))
    one_of(name, "scale", scale, ("mean", "paper_sum"))
    n = axes["n"]
    size = n if group_size is None else group_size
    if size < 1 or n % size:
        raise ValueError(f"{name}: 'group_size' is {group_size}, expected a divisor of the {n} rows")
    solve = functools.partial(_loss, n // size, cost, num_iters, derivative, value, scale, domain)
    numbers = (temperature, epsilon, tolerance, anchor)
    everywhere = SinkdInfo._make([jax.P()] * len(SinkdInfo._fields))
    return sharding.placed(solve, lambda _: (jax.P(), everywhere), student_logits, teacher_logits, mask, labels, numbers)


def _loss(
    groups: int,
    cost: str | Cost,
    num_iters: int,
    derivative: str,
    value: str,
    scale: str,
    domain: str,
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    mask: ArrayLike | None,
    labels: ArrayLike | None,
    numbers: tuple[ArrayLike, ArrayLike, ArrayLike | None, ArrayLike],
) -> tuple[jax.Array, SinkdInfo]:
    temperature, epsilon, tolerance, anchor = numbers
    student, teacher = _common(student_logits, teacher_logits)
    keep = jnp.ones_like(student[:, 0], dtype=bool) if mask is None else jnp.asarray(mask) != 0

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(groups, -1, *x.shape[1:])

    keep = grouped(keep)
    student, teacher = (jnp.where(keep[..., None], grouped(x), 0.0) for x in (student, jax.lax.stop_gradient(teacher)))
    kinds = None if labels is None else grouped(jnp.asarray(labels))

    def costs(x: jax.Array, y: jax.Array) -> jax.Array:
        return cost_matrix(x, y, temperature=temperature, cost=cost, anchor=anchor, student_labels=kinds, teacher_labels=kinds)

    counts = jnp.sum(keep, axis=-1).astype(student.dtype)
    log_weights = jnp.where(keep, -jnp.log(jnp.maximum(counts, 1.0))[:, None], -jnp.inf)
    between = costs(student, teacher)
    if value == "debiased":
        within = costs(student, student), jax.lax.stop_gradient(costs(teacher, teacher))
        options = {"epsilon": epsilon, "num_iters": num_iters, "tolerance": tolerance}
        solved = transport.sinkhorn_divergence(between, *within, log_weights, log_weights, **options)
        each, diagonal = solved.value, jnp.zeros_like(counts)
    else:
        solved = transport.sinkhorn(
            between,
            log_weights,
            log_weights,
            epsilon=epsilon,
            num_iters=num_iters,
            tolerance=tolerance,
            derivative=derivative,
            domain=domain,
        )
        each = solved.cost if value == "transport" else solved.regularized
        moved = transport.plan(between, solved.f, solved.g, log_weights, log_weights, epsilon=epsilon)
        diagonal = jnp.trace(moved, axis1=-2, axis2=-1)
    total, rows = jnp.sum(counts * each), jnp.sum(counts)
    info = SinkdInfo(
        error=jnp.max(solved.error),
        iterations=jnp.max(solved.iterations),
        converged=jnp.all(solved.converged),
        diagonal=jnp.sum(counts * diagonal) / jnp.maximum(rows, 1.0),
        rows=rows,
    )
    return (total if scale == "paper_sum" else total / jnp.maximum(rows, 1.0)), jax.lax.stop_gradient(info)


def sequence_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    mask: ArrayLike,
    *,
    layout: str = "per_sequence",
    group_size: int | None = None,
    temperature: ArrayLike = 2.0,
    cost: str | Cost = "l1",
    epsilon: ArrayLike = 0.1,
    num_iters: int = 20,
    tolerance: ArrayLike | None = None,
    derivative: str = "exact",
    value: str = "transport",
    anchor: ArrayLike = 0.0,
    scale: str = "mean",
) -> tuple[jax.Array, SinkdInfo]:
    """The loss over the target positions of an encoder-decoder or a decoder: positions are the points, padding has no mass.

    Args:
      student_logits: [b t v] student logits at every position.
      teacher_logits: [b t v] teacher logits.
      mask: [b t] non-zero at target positions.
      layout: "flat": one problem over all positions of the batch; "per_sequence": one per row; "grouped": one per `group_size` neighbouring
        positions of the flattened batch. Static.
      group_size: For "grouped". Static.
      temperature: As in `loss`, like all that follow.
      cost: As there. Static.
      epsilon: As there.
      num_iters: As there. Static.
      tolerance: As there.
      derivative: As there. Static.
      value: As there. Static.
      anchor: As there.
      scale: As there. Static.

    Returns:
      As `loss`, per target position.

    Raises:
      ValueError: as `loss`, and if `group_size` and `layout` do not suit each other.

    Reference: the paper does not say how sequences are treated; "per_sequence" is that of its successor (arXiv:2412.14528).
    """
    name = "sinkd.sequence_loss"
    axes = check_shapes(name, student_logits=(student_logits, "b t v"), teacher_logits=(teacher_logits, "b t v"), mask=(mask, "b t"))
    one_of(name, "layout", layout, ("flat", "per_sequence", "grouped"))
    if (layout == "grouped") != (group_size is not None):
        raise ValueError(f"{name}: 'group_size' is {group_size} and 'layout' is {layout!r}; give a size with 'grouped', and only there")
    size = {"flat": None, "per_sequence": axes["t"], "grouped": group_size}[layout]
    student, teacher = (jnp.asarray(x).reshape(-1, axes["v"]) for x in (student_logits, teacher_logits))
    return loss(
        student,
        teacher,
        mask=jnp.asarray(mask).reshape(-1),
        temperature=temperature,
        cost=cost,
        epsilon=epsilon,
        num_iters=num_iters,
        tolerance=tolerance,
        derivative=derivative,
        value=value,
        anchor=anchor,
        scale=scale,
        group_size=size,
    )


def legacy_3d_loss(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, temperature: ArrayLike = 2.0, epsilon: ArrayLike = 0.1, num_iters: int = 20
) -> jax.Array:
    """What the published T0 code computes from logits [b t v]: not the paper's method, for comparison only.

    Its softmax runs over the sequence, the cost is between positions of one row, and normalisation divides by sums over the student's positions,
    then over the batch: batch sums are 1, sums over positions t / b.

    Args:
      student_logits: [b t v] student logits.
      teacher_logits: [b t v] teacher logits, a constant.
      temperature: [] tau. Traced.
      epsilon: [] entropy weight. Traced.
      num_iters: Iterations. Static.

    Returns:
      [] the sum of P C.

    Raises:
      ValueError: if the shapes differ.
    """
    check_shapes("sinkd.legacy_3d_loss", student_logits=(student_logits, "b t v"), teacher_logits=(teacher_logits, "b t v"))
    student, teacher = _common(student_logits, teacher_logits)
    tau = jnp.asarray(temperature).astype(student.dtype)
    cost = transport.l1(jax.nn.softmax(student / tau, axis=1), jax.nn.softmax(jax.lax.stop_gradient(teacher) / tau, axis=1))
    kernel = jnp.exp(-cost / jnp.asarray(epsilon).astype(cost.dtype))

    def normalise(kernel: jax.Array, _: None) -> tuple[jax.Array, None]:
        kernel = kernel / jnp.sum(kernel, axis=1, keepdims=True)
        return kernel / jnp.sum(kernel, axis=0, keepdims=True), None

    return jnp.sum(jax.lax.scan(normalise, kernel, None, length=num_iters)[0] * cost)


def sample_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    scale: str = "mean",
) -> jax.Array:
    """The sample-wise form, sum_i |s_i - t_i|_1: a problem of one row and one column has only one plan, so nothing is transported.

    Twice the total variation of each row. Arguments as in `loss`; the official history has temperature 1 and a sum.
    """
    name = "sinkd.sample_loss"
    check_shapes(name, student_logits=(student_logits, "n v"), teacher_logits=(teacher_logits, "n v"), mask=(mask, "n"))
    one_of(name, "scale", scale, ("mean", "paper_sum"))
    teacher = jax.lax.stop_gradient(jnp.asarray(teacher_logits))
    each = 2 * divergence.per_token("total_variation", student_logits, teacher, temperature=temperature, mask=mask)
    return jnp.sum(each) if scale == "paper_sum" else masking.masked_mean(each, jnp.ones_like(each) if mask is None else mask)


# --- the objective around it


class Recipe(NamedTuple):
    """Constants of an objective.

    Attributes:
      alpha: Factor of the distillation loss L_KD.
      beta: Factor of the Sinkhorn term.
      weight: Another factor of it, w.
      temperature: T of L_KD; with `anneal` at the first epoch.
      anneal: Whether T falls linearly to 1 over the epochs; see `annealed_temperature`.
      transport_temperature: tau of the Sinkhorn term.
      epsilon: Its entropy weight.
      num_iters: Its iterations.
      label_weight: Factor of the labels' cross-entropy; None is 1 - alpha.
    """

    alpha: float
    beta: float = 0.8
    weight: float = 0.001
    temperature: float = 1.0
    anneal: bool = False
    transport_temperature: float = 2.0
    epsilon: float = 0.1
    num_iters: int = 20
    label_weight: float | None = None


GLUE = {
    "cola": Recipe(alpha=0.9, temperature=1.0),
    "mnli": Recipe(alpha=0.8, temperature=3.0, anneal=True),
    "sst2": Recipe(alpha=0.9, temperature=2.0),
    "qnli": Recipe(alpha=0.8, temperature=3.0),
    "mrpc": Recipe(alpha=1.0, temperature=4.0, anneal=True),
    "qqp": Recipe(alpha=1.0, temperature=4.0, anneal=True),
    "rte": Recipe(alpha=0.9, temperature=3.5),
}
"""The published scripts of BERT-base to a BERT of six layers, by task."""

T0 = Recipe(alpha=0.1, beta=1.0, weight=0.0008, temperature=1.0, label_weight=1.0)
"""SuperGLUE with T0: L_CE + 0.1 L_KD + 0.0008 L_SD (its KL is L_KD less the teacher's entropy; the gradient is the same)."""


class ObjectiveInfo(NamedTuple):
    """The parts of the objective, unweighted: cross-entropy, distillation, Sinkhorn (a sum over rows), and how the transport came out."""

    cross_entropy: jax.Array
    distillation: jax.Array
    sinkhorn: jax.Array
    transport: SinkdInfo


def distillation_loss(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, mask: ArrayLike | None = None, temperature: ArrayLike = 1.0
) -> jax.Array:
    """L_KD = -(1/n) sum_i sum_v softmax(zT_i / T)_v log softmax(zS_i / T)_v: soft cross-entropy, without the factor T^2.

    KL(t || s) plus the teacher's entropy; same gradient.

    Args:
      student_logits: [... v] student logits.
      teacher_logits: [... v] teacher logits, a constant.
      mask: [...] non-zero where a row counts.
      temperature: [] T > 0. Traced.

    Returns:
      [] the mean over rows that count, in nats.

    Raises:
      ValueError: on shapes that do not agree.
    """
    check_shapes(
        "sinkd.distillation_loss", student_logits=(student_logits, "... v"), teacher_logits=(teacher_logits, "... v"), mask=(mask, "...")
    )
    student, teacher = _common(student_logits, teacher_logits)
    tau = jnp.asarray(temperature).astype(student.dtype)
    log_s, t = jax.nn.log_softmax(student / tau, axis=-1), jax.nn.softmax(jax.lax.stop_gradient(teacher) / tau, axis=-1)
    each = -jnp.sum(jnp.where(t > 0, t * jnp.where(t > 0, log_s, 0.0), 0.0), axis=-1)
    return masking.masked_mean(each, jnp.ones_like(each) if mask is None else mask)


def annealed_temperature(temperature: ArrayLike, epoch: ArrayLike, num_epochs: int) -> jax.Array:
    """T_e = T + (1 - T) e / (E - 1): linear from T in epoch 0 to 1 in the last; T if there is one epoch only."""
    temperature = dtypes.at_least_float32(temperature)
    return temperature + (1 - temperature) * jnp.asarray(epoch).astype(temperature.dtype) / max(num_epochs - 1, 1)


def objective(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    recipe: Recipe,
    mask: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
) -> tuple[jax.Array, ObjectiveInfo]:
    """(1 - alpha) L_CE + alpha L_KD + beta w L_SD, L_SD summed over rows as in the official code.

    Args:
      student_logits: [n v] student logits.
      teacher_logits: [n v] teacher logits, a constant.
      labels: [n] integer classes.
      recipe: Constants, `GLUE["sst2"]`, `T0` or your own. Static, but for its floats, which may be traced.
      mask: [n] non-zero where a row counts.
      temperature: [] T of L_KD, if not the recipe's: see `annealed_temperature`. Traced.

    Returns:
      The loss [] and `ObjectiveInfo`.

    Raises:
      ValueError: as `loss`.

    Reference: arXiv:2402.17110 and its GLUE training script.
    """
    name = "sinkd.objective"
    check_shapes(
        name, student_logits=(student_logits, "n v"), teacher_logits=(teacher_logits, "n v"), labels=(labels, "n"), mask=(mask, "n")
    )
    require_integers(name, labels=labels)
    student, _ = _common(student_logits, teacher_logits)
    each = -jnp.take_along_axis(jax.nn.log_softmax(student, axis=-1), jnp.asarray(labels)[:, None], axis=-1)[:, 0]
    cross_entropy = masking.masked_mean(each, jnp.ones_like(each) if mask is None else mask)
    heat = recipe.temperature if temperature is None else temperature
    distillation = distillation_loss(student_logits, teacher_logits, mask=mask, temperature=heat)
    moved, info = loss(
        student_logits,
        teacher_logits,
        mask=mask,
        temperature=recipe.transport_temperature,
        epsilon=recipe.epsilon,
        num_iters=recipe.num_iters,
        scale="paper_sum",
    )
    label_weight = 1 - recipe.alpha if recipe.label_weight is None else recipe.label_weight
    total = label_weight * cross_entropy + recipe.alpha * distillation + recipe.beta * recipe.weight * moved
    return total, ObjectiveInfo(*jax.lax.stop_gradient((cross_entropy, distillation, moved)), info)


# --- different vocabularies


def sort_align(
    student_logits: ArrayLike, teacher_logits: ArrayLike, mask: ArrayLike, *, k: int, scope: str = "sequence", temperature: ArrayLike = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Probabilities of the k likeliest entries of each vocabulary, in falling order: columns that can be compared though tokens cannot.

    Args:
      student_logits: [t v] student logits of one sequence.
      teacher_logits: [t w] teacher logits at the same places, another vocabulary.
      mask: [t] non-zero where a position counts.
      k: Entries kept; the smaller vocabulary if it has fewer. Static.
      scope: "sequence": one order for all positions, by the probability summed over them; "token": each position's own. Static.
      temperature: [] tau > 0. Traced.

    Returns:
      Student and teacher probabilities [t k], not renormalised, 0 where the mask is. The teacher's is a constant; no gradient goes to the order.

    Raises:
      ValueError: on shapes that do not agree or a `k` below one.

    Reference: arXiv:2412.14528 (sequence), arXiv:2402.12030 (token).
    """
    name = "sinkd.sort_align"
    axes = check_shapes(name, student_logits=(student_logits, "t v"), teacher_logits=(teacher_logits, "t w"), mask=(mask, "t"))
    one_of(name, "scope", scope, ("sequence", "token"))
    if k < 1:
        raise ValueError(f"{name}: 'k' is {k}, expected at least 1")
    k = min(k, axes["v"], axes["w"])
    keep = jnp.asarray(mask) != 0
    aligned = []
    for x in _common(student_logits, jax.lax.stop_gradient(jnp.asarray(teacher_logits))):
        p = jnp.where(keep[:, None], jax.nn.softmax(x / jnp.asarray(temperature).astype(x.dtype), axis=-1), 0.0)
        if scope == "token":
            aligned.append(jax.lax.top_k(p, k)[0])
        else:
            aligned.append(p[:, jax.lax.top_k(jax.lax.stop_gradient(jnp.sum(p, axis=0)), k)[1]])
    return aligned[0], aligned[1]


def universal_loss(student_logits: ArrayLike, teacher_logits: ArrayLike, mask: ArrayLike, *, temperature: ArrayLike = 1.0) -> jax.Array:
    """ULD: sum over ranks of |sorted s - sorted t| at each position, the smaller vocabulary padded with zeros; a mean over positions.

    Args:
      student_logits: [... v] student logits.
      teacher_logits: [... w] teacher logits, a constant.
      mask: [...] non-zero where a position counts.
      temperature: [] tau > 0. Traced.

    Returns:
      [] between 0 and 2.

    Raises:
      ValueError: on shapes that do not agree.

    Reference: Boizard et al., arXiv:2402.12030.
    """
    check_shapes(
        "sinkd.universal_loss", student_logits=(student_logits, "... v"), teacher_logits=(teacher_logits, "... w"), mask=(mask, "...")
    )
    probabilities = [
        jnp.sort(jax.nn.softmax(x / jnp.asarray(temperature).astype(x.dtype), axis=-1), axis=-1)[..., ::-1]
        for x in _common(student_logits, jax.lax.stop_gradient(jnp.asarray(teacher_logits)))
    ]
    width = max(p.shape[-1] for p in probabilities)
    s, t = (jnp.pad(p, ((0, 0),) * (p.ndim - 1) + ((0, width - p.shape[-1]),)) for p in probabilities)
    return masking.masked_mean(jnp.sum(_absolute(s - t), axis=-1), mask)


class MultiLevelInfo(NamedTuple):
    """The three terms of `multi_level_loss`, unweighted, and the transport's record."""

    difference: jax.Array
    logarithmic: jax.Array
    sinkhorn: jax.Array
    transport: SinkdInfo


def multi_level_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    mask: ArrayLike,
    *,
    k: int = 50,
    alpha: ArrayLike = 0.15,
    beta: ArrayLike = 0.1,
    gamma: ArrayLike = 0.1,
    logarithmic_temperature: ArrayLike = 1.0,
    transport_temperature: ArrayLike = 2.0,
    epsilon: ArrayLike = 0.1,
    num_iters: int = 20,
) -> tuple[jax.Array, MultiLevelInfo]:
    """Multi-level optimal transport between models with different tokenizers: alpha (L_HAD + beta L_SL + gamma L_SD), to be added to L_CE.

    With each vocabulary ordered by its probability summed over the sequence, and the first k entries kept: L_HAD = sum_tl |t_tl - s_tl| and
    L_SL = -sum_tl t_tl log s_tl per position, L_SD = the Sinkhorn distance between positions with C_ij = sum_l |s_il - t_jl|.

    Args:
      student_logits: [b t v] student logits.
      teacher_logits: [b t w] teacher logits at aligned positions, a constant.
      mask: [b t] non-zero where a position counts in both.
      k: Entries kept. Static.
      alpha: [] weight of the whole. Traced.
      beta: [] weight of the logarithmic term. Traced.
      gamma: [] weight of the Sinkhorn term. Traced.
      logarithmic_temperature: [] temperature of L_HAD and L_SL. Traced.
      transport_temperature: [] temperature of L_SD. Traced.
      epsilon: [] entropy weight. Traced.
      num_iters: Iterations. Static.

    Returns:
      The loss [], a mean over positions, and `MultiLevelInfo`.

    Raises:
      ValueError: on shapes that do not agree.

    Reference: arXiv:2412.14528, with the paper's constants (its code has 10 iterations and exchanges student and teacher in two terms).
    """
    name = "sinkd.multi_level_loss"
    check_shapes(name, student_logits=(student_logits, "b t v"), teacher_logits=(teacher_logits, "b t w"), mask=(mask, "b t"))
    keep = jnp.asarray(mask) != 0

    def aligned(temperature: ArrayLike) -> tuple[jax.Array, jax.Array]:
        one = lambda s, t, m: sort_align(s, t, m, k=k, temperature=temperature)  # noqa: E731
        return jax.vmap(one)(jnp.asarray(student_logits), jnp.asarray(teacher_logits), keep)

    s, t = aligned(logarithmic_temperature)
    tiny = jnp.finfo(s.dtype).tiny
    difference = masking.masked_mean(jnp.sum(_absolute(s - t), axis=-1), keep)
    logarithmic = masking.masked_mean(-jnp.sum(t * jnp.log(jnp.maximum(s, tiny)), axis=-1), keep)
    s, t = aligned(transport_temperature)
    counts = jnp.sum(keep, axis=-1).astype(s.dtype)
    log_weights = jnp.where(keep, -jnp.log(jnp.maximum(counts, 1.0))[:, None], -jnp.inf)
    solved = transport.sinkhorn(transport.l1(s, t), log_weights, log_weights, epsilon=epsilon, num_iters=num_iters)
    rows = jnp.sum(counts)
    moved = jnp.sum(counts * solved.cost) / jnp.maximum(rows, 1.0)
    info = SinkdInfo(jnp.max(solved.error), jnp.max(solved.iterations), jnp.all(solved.converged), jnp.zeros_like(rows), rows)
    a, b, c = (jnp.asarray(x).astype(s.dtype) for x in (alpha, beta, gamma))
    total = a * (difference + b * logarithmic + c * moved)
    return total, MultiLevelInfo(*jax.lax.stop_gradient((difference, logarithmic, moved)), jax.lax.stop_gradient(info))


def _absolute(x: jax.Array) -> jax.Array:
    """|x| with derivative 0 at 0."""
    return x * jax.lax.stop_gradient(jnp.sign(x))


def _common(*arrays: ArrayLike) -> list[jax.Array]:
    """All in the widest of their floored dtypes."""
    floored = [dtypes.at_least_float32(x) for x in arrays]
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in floored) else jnp.float32
    return [x.astype(dtype) for x in floored]
