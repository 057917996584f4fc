"""The paper's three analyses in closed form, and what a loss between sets of rows cannot see. float64; no training.

Mode averaging and collapsing: the best normal student of a teacher with two modes. Underestimation: two normals that move apart, and a class that
the student has nearly lost. Then the properties of the batch-wise loss: order of rows, value at equality, saturation, size of its gradient.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from janax.algorithms import sinkd
from janax.experiments.session import Session
from janax.experiments.sinkd.config import Config
from janax.jaxlib_ext import divergence

__all__ = [
    "DISTANCES",
    "KINDS",
    "LOST",
    "MODE",
    "SHARES",
    "SPREAD",
    "js_at_a_mode",
    "lost_class",
    "modes",
    "moving_apart",
    "saturation",
    "sets",
    "sizes",
    "study",
]

DISTANCES = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0)
MODE, SPREAD = 3.0, 0.5
SHARES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
LOST = (0.6, 0.3, 0.1)
"""The teacher of the lost class; the student has (0.7, 0.3 - e, e)."""

KINDS: dict[str, tuple[str, float | None]] = {
    "KL": ("forward_kl", None),
    "RKL": ("reverse_kl", None),
    "JS": ("js", None),
    "TVD": ("total_variation", None),
    "skew KL .1": ("skew_kl", 0.1),
    "Renyi .5": ("renyi", 0.5),
    "Hellinger": ("squared_hellinger", None),
}
_FAMILY = ("KL", "RKL", "JS", "TVD")
_X = np.linspace(-16.0, 16.0, 1601)  # densities are compared as distributions over these points
# Where the compiler works for seconds and the program for milliseconds, LLVM need not optimise.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
_LEVELS = (np.arange(2000) + 0.5) / 2000  # of quantile functions


def study(config: Config, session: Session) -> dict[str, Any]:
    """The numbers of the chosen analyses."""
    parts: dict[str, Callable[[], Any]] = {
        "moving apart": moving_apart,
        "modes": modes,
        "lost class": lost_class,
        "sets": sets,
        "saturation": saturation,
        "sizes": sizes,
    }
    found = {}
    for name in session.track([name for name in parts if name in config.analyses], "closed forms"):
        found[name] = session.memo(f"analyses-{name.replace(' ', '-')}", lambda name=name: _wide(parts[name]), alone=True)
    return found


def _wide(compute: Callable[[], Any]) -> Any:
    with jax.enable_x64(True):
        return compute()


def _per_token(name: str, student: Any, teacher: Any) -> jax.Array:
    kind, alpha = KINDS[name]
    return divergence.per_token(kind, student, teacher, alpha=alpha)


def _normal(mean: Any, spread: Any) -> jax.Array:
    """Logits over the points."""
    return -0.5 * jnp.square((jnp.asarray(_X) - mean) / spread)


def moving_apart() -> dict[str, dict[str, list[float]]]:
    """Divergences of two unit normals at a distance, and their slopes in it: name -> "value" and "slope", over `DISTANCES`."""
    levels = jnp.asarray(scipy.special.ndtri(_LEVELS))
    functions: dict[str, Callable[[jax.Array], jax.Array]] = {
        name: lambda d, name=name: _per_token(name, _normal(0.5 * d, 1.0), _normal(-0.5 * d, 1.0)) for name in _FAMILY
    }
    functions["W1"] = lambda d: jnp.mean(jnp.abs((levels + 0.5 * d) - (levels - 0.5 * d)))  # both already sorted
    found = jax.jit(lambda d: {name: jax.vmap(jax.value_and_grad(function))(d) for name, function in functions.items()})
    return {name: {"value": v.tolist(), "slope": g.tolist()} for name, (v, g) in found(jnp.asarray(DISTANCES)).items()}


def modes() -> dict[str, dict[str, float]]:
    """The best normal student of 0.5 N(-3, .5^2) + 0.5 N(3, .5^2), by loss: "mean" (taken positive), "spread", "value", and "valley", its mass in
    |x| < 1.5, where the teacher has 0.13 %.
    """
    teacher = jnp.logaddexp(_normal(-MODE, SPREAD), _normal(MODE, SPREAD))
    standard = jnp.asarray(scipy.special.ndtri(_LEVELS))
    quantiles = jnp.asarray(_mixture_quantiles())
    losses: dict[str, Callable[[Any, Any], jax.Array]] = {
        name: lambda mean, spread, name=name: _per_token(name, _normal(mean, spread), teacher) for name in _FAMILY
    }
    losses["W1"] = lambda mean, spread: jnp.mean(jnp.abs(mean + spread * standard - quantiles))  # both already sorted
    losses["W2 squared"] = lambda mean, spread: jnp.mean(jnp.square(mean + spread * standard - quantiles))

    def on_grid(loss: Callable[[Any, Any], jax.Array], means: jax.Array, spreads: jax.Array) -> jax.Array:
        return jax.lax.map(lambda mean: jax.vmap(lambda spread: loss(mean, spread))(spreads), means)

    values_of = jax.jit(lambda grids: {name: on_grid(loss, *grids[name]) for name, loss in losses.items()})
    best = dict.fromkeys(losses, (2.0, 2.1, math.nan))
    width = 2.0
    for _ in range(6):  # ever finer grids around the best points
        steps = width * np.linspace(-1, 1, 31)
        grids = {name: (np.maximum(mean + steps, 0.0), np.maximum(spread + steps, 0.1)) for name, (mean, spread, _) in best.items()}
        for name, values in values_of(grids).items():
            i, j = np.unravel_index(np.argmin(values), values.shape)
            best[name] = float(grids[name][0][i]), float(grids[name][1][j]), float(values[i, j])
        width /= 5
    return {
        name: {"mean": mean, "spread": spread, "value": value, "valley": _mass(mean, spread)}
        for name, (mean, spread, value) in best.items()
    }


def _mass(mean: float, spread: float) -> float:
    """Of a normal in |x| < 1.5."""
    return float(scipy.special.ndtr((1.5 - mean) / spread) - scipy.special.ndtr((-1.5 - mean) / spread))


def _mixture_quantiles() -> np.ndarray:
    """Inverse distribution function of the teacher at the levels, by bisection."""
    low, high = np.full_like(_LEVELS, -10.0), np.full_like(_LEVELS, 10.0)
    for _ in range(60):
        x = 0.5 * (low + high)
        below = 0.5 * (scipy.special.ndtr((x + MODE) / SPREAD) + scipy.special.ndtr((x - MODE) / SPREAD)) < _LEVELS
        low, high = np.where(below, x, low), np.where(below, high, x)
    return 0.5 * (low + high)


def lost_class() -> dict[str, list[float]]:
    """Derivative in the logit of the class of which the student keeps a share e, by loss, over `SHARES`; also of the transport of one row."""
    teacher = jnp.log(jnp.asarray(LOST))
    functions: dict[str, Callable[[jax.Array], jax.Array]] = {
        name: lambda z, name=name: _per_token(name, z, teacher) for name in KINDS if name != "Hellinger"
    }
    functions["SinKD"] = lambda z: _loss(z[None], teacher[None], temperature=1.0)
    students = jnp.log(jnp.asarray([[0.7, 0.3 - e, e] for e in SHARES]))
    found = _jit(lambda z: {name: jax.vmap(jax.grad(function))(z)[:, 2] for name, function in functions.items()})
    return {name: slopes.tolist() for name, slopes in found(students).items()}


def _loss(student: jax.Array, teacher: jax.Array, **options: Any) -> jax.Array:
    return sinkd.loss(student, teacher, scale="paper_sum", domain="log", **options)[0]


def sets() -> dict[str, dict[str, float]]:
    """Losses as sums over 32 rows of three classes, by student: "random", the teacher's rows "permuted", and "equal"; and norms of gradients.

    Means over 16 draws of the logits, normal of spread 3; tau 2.
    """
    losses: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
        "SinKD": _loss,
        "debiased": lambda s, t: _loss(s, t, value="debiased", num_iters=1000, tolerance=1e-10),
        "anchored 3": lambda s, t: _loss(s, t, anchor=3.0),
        "paired L1": lambda s, t: sinkd.sample_loss(s, t, temperature=2.0, scale="paper_sum"),
    }

    @jax.jit
    @jax.vmap
    def measure(student: jax.Array, teacher: jax.Array) -> dict[str, jax.Array]:
        found = {}
        for name, loss in losses.items():
            found[name], gradient = jax.value_and_grad(loss)(student, teacher)
            found[f"gradient of {name}"] = jnp.linalg.norm(gradient)
        return found

    draws = [np.random.default_rng(draw) for draw in range(16)]
    teacher, other = (np.stack([3.0 * rng.normal(size=(32, 3)) for rng in draws]) for _ in range(2))
    permuted = np.stack([rng.permutation(rows) for rng, rows in zip(draws, teacher)])
    found = {}
    for kind, student in (("random", other), ("permuted", permuted), ("equal", teacher)):
        found[kind] = {name: float(jnp.mean(values)) for name, values in measure(student, teacher).items()}
    return found


def saturation() -> dict[str, Any]:
    """Largest derivative in a logit where student and teacher are sure of different classes (logits +-60), by loss; SinKD as a sum over 16 rows.

    "finite" says whether value and gradient are, in float32 with epsilon 0.01: of kernel normalisation as published, and of this library.
    """
    student, teacher = jnp.asarray([[60.0, -60.0]] * 16), jnp.asarray([[-60.0, 60.0]] * 16)
    losses: dict[str, Callable[[jax.Array], jax.Array]] = {
        name: lambda s, name=name: jnp.sum(_per_token(name, s, teacher)) for name in KINDS
    }
    losses["SinKD"] = lambda s: _loss(s, teacher)
    for cost, label in (("logits", "logits"), ("log_probabilities", "log-probabilities")):
        losses[f"SinKD on {label}"] = lambda s, cost=cost: _loss(s, teacher, cost=cost)
    gradients = _jit(lambda s: {name: jnp.max(jnp.abs(jax.grad(loss)(s))) for name, loss in losses.items()})(student)
    single = teacher.astype(jnp.float32)
    forms: dict[str, Callable[[jax.Array], jax.Array]] = {
        "kernel normalisation": lambda s: _published(s, single, 0.01),
        "this library": lambda s: _loss(s, single, epsilon=0.01),
    }
    narrow = _jit(lambda s: {name: jax.value_and_grad(form)(s) for name, form in forms.items()})(student.astype(jnp.float32))
    return {
        "gradients": {name: float(gradient) for name, gradient in gradients.items()},
        "value": float(_jit(_loss)(student, teacher)),
        "finite": {name: bool(jnp.isfinite(value) & jnp.all(jnp.isfinite(slope))) for name, (value, slope) in narrow.items()},
    }


def _published(student: jax.Array, teacher: jax.Array, epsilon: float) -> jax.Array:
    """<P, C> by dividing exp(-C / epsilon) by its row sums and column sums in turn, 20 times."""
    cost = sinkd.cost_matrix(student, teacher)

    def normalise(kernel: jax.Array, _: None) -> tuple[jax.Array, None]:
        kernel = kernel / jnp.sum(kernel, axis=1, keepdims=True)
        return kernel / jnp.sum(kernel, axis=0, keepdims=True), None

    return jnp.sum(jax.lax.scan(normalise, jnp.exp(-cost / epsilon), None, length=20)[0] * cost)


def sizes() -> dict[str, dict[str, float]]:
    """Norm of the gradient of beta w L_SD over that of alpha L_KD, by published recipe: medians over 64 draws of 16 x 3 logits of spread 3.

    "apart": student and teacher drawn independently; "near": the student is the teacher plus normal noise of spread 1.
    """

    @_jit
    def ratio(student: jax.Array, teacher: jax.Array, alpha: jax.Array, temperature: jax.Array) -> jax.Array:
        def one(s: jax.Array, t: jax.Array) -> jax.Array:
            kd = jax.grad(lambda s: alpha * sinkd.distillation_loss(s, t, temperature=temperature))(s)
            return jnp.linalg.norm(jax.grad(_loss)(s, t)) / jnp.linalg.norm(kd)

        return jnp.median(jax.vmap(one)(student, teacher))

    rng = np.random.default_rng(0)
    teacher = 3.0 * rng.normal(size=(64, 16, 3))
    students = {"apart": 3.0 * rng.normal(size=teacher.shape), "near": teacher + rng.normal(size=teacher.shape)}
    found = {}
    for name, recipe in sinkd.GLUE.items():
        plain = {kind: float(ratio(student, teacher, recipe.alpha, recipe.temperature)) for kind, student in students.items()}
        found[name] = {kind: recipe.beta * recipe.weight * value for kind, value in plain.items()}
        found[name] |= {f"{kind}, unweighted": value for kind, value in plain.items()}
    return found


def js_at_a_mode() -> float:
    """The Jensen-Shannon divergence of a student that sits on one of two equal modes: (ln(2/3) / 2 + ln(2) / 2 + ln(4/3)) / 2."""
    return 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2) + math.log(4 / 3))
