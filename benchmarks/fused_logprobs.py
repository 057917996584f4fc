"""Log-probabilities and gradients from hidden states and an unembedding, fused against the plain form that holds the logits: time (bar <= 1.15 x),
temporaries (bar <= 10 %), relative error. The plain form is the lean one, logits of the tokens minus logsumexp.

Two ratios of time: by the clock, and of processor seconds, which other programs on the machine disturb less.

    python benchmarks/fused_logprobs.py [--tokens 4096 --width 1024 --vocabulary 131072] [--repeats 3] [--dtype float32]
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from harness import alternate, counted, environment, show

from janax.jaxlib_ext import fused


def problem(n: int, d: int, v: int, dtype: str) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    h, w = jax.random.normal(keys[0], (n, d), dtype), jax.random.normal(keys[1], (d, v), dtype) * d**-0.5
    return h, w, jax.random.randint(keys[2], (n,), 0, v), jax.random.normal(keys[3], (n,))


def plain(h, w, tokens, weights):
    logits = jnp.matmul(h, w, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return -jnp.sum(weights * (chosen - jax.nn.logsumexp(logits, axis=1)))


def per_token(h, w, tokens, weights):
    return -jnp.sum(weights * fused.token_log_probs(h, w, tokens))


def per_token_kept(h, w, tokens, weights):
    return -jnp.sum(weights * fused.token_log_probs(h, w, tokens, keep_expectation=True))


CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "token_log_probs": (per_token, (0, 1)),
    "weighted_nll": (fused.weighted_nll, (0, 1)),
    "token_log_probs, w frozen": (per_token, (0,)),
    "token_log_probs, w frozen, keep_expectation": (per_token_kept, (0,)),
}


def measure(case: str, arrays: tuple[jax.Array, ...], repeats: int) -> dict[str, float]:
    function, argnums = CASES[case]
    ours, theirs = (jax.jit(jax.value_and_grad(f, argnums)).lower(*arrays).compile() for f in (function, plain))
    flat = lambda out: [x.astype(jnp.float32).ravel() for x in jax.tree.leaves(out)]  # noqa: E731
    error = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(flat(ours(*arrays)), flat(theirs(*arrays))))
    spent: tuple[list[float], list[float]] = ([], [])
    times = alternate(counted(lambda: ours(*arrays), spent[0]), counted(lambda: theirs(*arrays), spent[1]), repeats=repeats)
    processor = [a / b for a, b in zip(spent[0][1:], spent[1][1:])]
    size = lambda f: f.memory_analysis().temp_size_in_bytes / 2**20  # noqa: E731
    return times | {
        "processor_ratio": statistics.median(processor),
        "processor_ratio_low": min(processor),
        "processor_ratio_high": max(processor),
        "temporaries_mib": size(ours),
        "temporaries_plain_mib": size(theirs),
        "temporaries_ratio": size(ours) / size(theirs),
        "relative_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    shape = {"tokens": arguments.tokens, "width": arguments.width, "vocabulary": arguments.vocabulary, "dtype": arguments.dtype}
    arrays = problem(arguments.tokens, arguments.width, arguments.vocabulary, arguments.dtype)
    for case in arguments.cases:
        show("fused_logprobs", {case: shape | measure(case, arrays, arguments.repeats)})
    show("fused_logprobs", {"environment": environment()})


if __name__ == "__main__":
    main()
