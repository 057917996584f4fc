"""Sinkhorn, value and gradient, against ott-jax in the same process: time, temporaries, marginal errors.

    batch, equal iterations   64 problems 32 x 32, T = 20 each, exact gradient; ott-jax: vmap, log domain, implicit (bar <= 1/4 of its time)
    batch, kernel             the same against ott-jax's kernel domain (no bar)
    batch, defaults           the same against ott-jax as it comes: threshold 1e-3 (bar <= 1/10)
    large, exact | implicit   one 2048 x 2048 against ott-jax's implicit gradient, ours run until its marginal error is not larger
                              (bar <= 1/2 of its time, <= 1 x its temporaries, <= 1/8 of those of autodiff through plain iterations)

Costs are |softmax - softmax|_1 of random logits over 64 classes, epsilon = 0.1, float32; value and gradient of sum P C with respect to C.
Times are by the clock; `processor_ratio` is of processor seconds, which other programs on the machine disturb less.

    python benchmarks/transport.py [--repeats 11] [--size 2048] [--cases ...]
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from harness import alternate, counted, environment, show

from janax.jaxlib_ext import transport

try:
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import implicit_differentiation
    from ott.solvers.linear import sinkhorn as peer
except ImportError:
    peer = None

EPSILON, NUM_ITERS, CLASSES = 0.1, 20, 64


def costs(*shape: int) -> jax.Array:
    student, teacher = (jax.nn.softmax(2.0 * jax.random.normal(key, (*shape, CLASSES))) for key in jax.random.split(jax.random.key(0)))
    return jax.jit(transport.l1)(student, teacher)


def ours(num_iters: int, derivative: str) -> Callable[[jax.Array], tuple[jax.Array, Any]]:
    def value(cost: jax.Array) -> tuple[jax.Array, Any]:
        out = transport.sinkhorn(cost, epsilon=EPSILON, num_iters=num_iters, derivative=derivative)
        return jnp.sum(out.cost), (out.error, out.iterations)

    return value


def theirs(*, kernel: bool = False, unrolled: bool = False, defaults: bool = False) -> Callable[[jax.Array], tuple[jax.Array, Any]]:
    options = {} if defaults else {"threshold": 0.0, "min_iterations": NUM_ITERS, "max_iterations": NUM_ITERS}
    implicit = None if unrolled else implicit_differentiation.ImplicitDiff()
    solver = peer.Sinkhorn(lse_mode=not kernel, implicit_diff=implicit, **options)

    def one(cost: jax.Array) -> tuple[jax.Array, Any]:
        out = solver(linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=EPSILON)))
        plan = out.matrix
        error = jnp.sum(jnp.abs(jnp.sum(plan, 1) - 1 / cost.shape[0])) + jnp.sum(jnp.abs(jnp.sum(plan, 0) - 1 / cost.shape[1]))
        return jnp.sum(plan * cost), (jax.lax.stop_gradient(error), out.n_iters)

    def value(cost: jax.Array) -> tuple[jax.Array, Any]:
        values, info = (one if cost.ndim == 2 else jax.vmap(one))(cost)
        return jnp.sum(values), info

    return value


def compiled(value: Callable[[jax.Array], tuple[jax.Array, Any]], cost: jax.Array) -> Any:
    return jax.jit(jax.value_and_grad(value, has_aux=True)).lower(cost).compile()


def temporaries(program: Any) -> float:
    return program.memory_analysis().temp_size_in_bytes / 2**20


def compare(mine: Any, other: Any, cost: jax.Array, repeats: int) -> dict[str, Any]:
    ((our_value, (our_error, our_iterations)), our_gradient), ((value, (error, iterations)), gradient) = mine(cost), other(cost)
    spent: tuple[list[float], list[float]] = ([], [])
    times = alternate(counted(lambda: mine(cost), spent[0]), counted(lambda: other(cost), spent[1]), repeats=repeats)
    return times | {
        "processor_ratio": statistics.median(a / b for a, b in zip(spent[0][1:], spent[1][1:])),
        "temporaries_mib": temporaries(mine),
        "temporaries_theirs_mib": temporaries(other),
        "value": float(our_value),
        "value_theirs": float(value),
        "error": float(jnp.max(our_error)),
        "error_theirs": float(jnp.max(error)),
        "iterations": int(jnp.max(our_iterations)),
        "iterations_theirs": int(jnp.max(iterations)),
        "gradient_difference": float(jnp.linalg.norm(our_gradient - gradient) / jnp.linalg.norm(gradient)),
    }


def large(derivative: str, size: int, repeats: int) -> dict[str, Any]:
    cost = costs(size)
    other = compiled(theirs(), cost)
    allowed = float(other(cost)[0][1][0])
    error_of = lambda k: float(jax.jit(ours(k, derivative))(cost)[1][0])  # noqa: E731
    num_iters = next((k for k in range(NUM_ITERS - 2, 2 * NUM_ITERS) if error_of(k) <= allowed), 2 * NUM_ITERS)
    plain = temporaries(compiled(ours(num_iters, "unrolled"), cost))
    mine = compiled(ours(num_iters, derivative), cost)
    return compare(mine, other, cost, repeats) | {
        "temporaries_unrolled_mib": plain,
        "temporaries_theirs_unrolled_mib": temporaries(compiled(theirs(unrolled=True), cost)),
    }


CASES: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "batch, equal iterations": lambda size, n: small(theirs(), n),
    "batch, kernel": lambda size, n: small(theirs(kernel=True), n),
    "batch, defaults": lambda size, n: small(theirs(defaults=True), n),
    "large, exact": lambda size, n: large("exact", size, n),
    "large, implicit": lambda size, n: large("implicit", size, n),
}


def small(other: Callable[[jax.Array], tuple[jax.Array, Any]], repeats: int) -> dict[str, Any]:
    cost = costs(64, 32)
    return compare(compiled(ours(NUM_ITERS, "exact"), cost), compiled(other, cost), cost, repeats)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    if peer is None:
        print("transport: skipped, as ott-jax is not installed (pip install ott-jax)")
        return
    for case in arguments.cases:
        show("transport", {case: {"size": arguments.size} | CASES[case](arguments.size, arguments.repeats)})
    show("transport", {"environment": environment("ott-jax")})


if __name__ == "__main__":
    main()
