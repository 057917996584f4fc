"""Fused divergences, value and gradients, against the plain form in JAX and in torch and against TRL's fused loss, in the same process.

    plain JAX      `divergence.per_token` of both logits, whole              (bars: time <= 1.1 x, temporaries <= 10 %)
    plain torch    log_softmax of both logits, autograd                      (bar <= 1.0 x)
    TRL            its chunked divergence loss (forward_kl, js)              (bar <= 1/2)
    products       the four matrix products alone, in XLA                    (bar <= 1.3 x)

Two ratios of time: by the clock, and of processor seconds, which other programs on the machine disturb less.

    python benchmarks/fused_divergences.py [--tokens 1024 --width 1024 --vocabulary 32768] [--kinds forward_kl js] [--peers jax torch trl products]
"""

import argparse
import functools
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, counted, environment, show

from janax.jaxlib_ext import divergence, fused

try:
    import torch
except ImportError:
    torch = None

Arrays = tuple[jax.Array, ...]


def problem(n: int, d: int, v: int) -> Arrays:
    keys = jax.random.split(jax.random.key(0), 5)
    h, teacher_h = jax.random.normal(keys[0], (n, d)), jax.random.normal(keys[1], (n, d))
    w, teacher_w = (jax.random.normal(key, (v, d)) * d**-0.5 for key in keys[2:4])  # as PyTorch stores them
    return h, w, teacher_h, teacher_w, jnp.full((n,), 1 / n)


def ours(kind: str, h: jax.Array, w: jax.Array, teacher_h: jax.Array, teacher_w: jax.Array, weights: jax.Array) -> jax.Array:
    return fused.weighted_divergence(kind, h, w, teacher_h, teacher_w, weights, transposed=True, teacher_transposed=True)


def plain(kind: str, h: jax.Array, w: jax.Array, teacher_h: jax.Array, teacher_w: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(weights * divergence.per_token(kind, h @ w.T, teacher_h @ teacher_w.T))


def products(h: jax.Array, w: jax.Array, teacher_h: jax.Array, teacher_w: jax.Array, dz: jax.Array) -> Arrays:
    return h @ w.T, teacher_h @ teacher_w.T, dz @ w, dz.T @ h


def torch_plain(kind: str, h: Any, w: Any, teacher_h: Any, teacher_w: Any) -> Any:
    log_p = torch.log_softmax(h @ w.T, -1)
    with torch.no_grad():
        log_q = torch.log_softmax(teacher_h @ teacher_w.T, -1)
    kl = functools.partial(torch.nn.functional.kl_div, reduction="batchmean", log_target=True)
    if kind == "forward_kl":
        return kl(log_p, log_q)
    if kind == "reverse_kl":
        return kl(log_q, log_p)
    log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) + np.log(0.5)
    return 0.5 * (kl(log_m, log_q) + kl(log_m, log_p))


def trl(kind: str, h: Any, w: Any, teacher_h: Any, teacher_w: Any) -> Any:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, h.shape[0])
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "js": 0.5}[kind]
    return _chunked_divergence_loss(h[None], teacher_h[None], w, teacher_w, mask, beta)[0]


def torch_step(loss: Callable[..., Any], kind: str, arrays: Arrays) -> Callable[[], Any]:
    h, w, teacher_h, teacher_w = (torch.from_numpy(np.array(x)) for x in arrays[:4])
    h.requires_grad_(True)
    w.requires_grad_(True)

    def run() -> Any:
        h.grad = w.grad = None
        value = loss(kind, h, w, teacher_h, teacher_w)
        value.backward()
        return jnp.float32(value.item()), jnp.asarray(h.grad.numpy())

    return run


def against(mine: Callable[[], Any], peer: Callable[[], Any], repeats: int) -> dict[str, float]:
    spent: tuple[list[float], list[float]] = ([], [])
    times = alternate(counted(mine, spent[0]), counted(peer, spent[1]), repeats=repeats)
    processor = [a / b for a, b in zip(spent[0][1:], spent[1][1:])]
    return times | {"processor_ratio": statistics.median(processor), "processor_low": min(processor), "processor_high": max(processor)}


def measure(kind: str, arrays: Arrays, peers: list[str], repeats: int) -> dict[str, dict[str, float]]:
    compiled = jax.jit(jax.value_and_grad(functools.partial(ours, kind), (0, 1))).lower(*arrays).compile()
    value, (to_h, _) = compiled(*arrays)
    mine = lambda: compiled(*arrays)  # noqa: E731
    size = lambda f: f.memory_analysis().temp_size_in_bytes / 2**20  # noqa: E731
    out = {}
    for peer in peers:
        if peer == "jax":
            whole = jax.jit(jax.value_and_grad(functools.partial(plain, kind), (0, 1))).lower(*arrays).compile()
            run, extra = lambda: whole(*arrays), {"temporaries_mib": size(compiled), "temporaries_ratio": size(compiled) / size(whole)}  # noqa: B023
        elif peer == "products":
            dz = jnp.ones((arrays[0].shape[0], arrays[1].shape[0])) / arrays[1].shape[0]
            alone = jax.jit(products)
            run, extra = lambda: alone(*arrays[:4], dz), {"flops": 8.0 * arrays[0].size * arrays[1].shape[0]}  # noqa: B023
        else:
            run, extra = torch_step(trl if peer == "trl" else torch_plain, kind, arrays), {}
        if peer != "products":
            their_value, their_gradients = run()
            their_h = their_gradients[0] if isinstance(their_gradients, tuple) else their_gradients
            extra |= {
                "value_error": float(abs(value - their_value) / abs(their_value)),
                "gradient_error": float(jnp.linalg.norm(to_h - their_h) / jnp.linalg.norm(their_h)),
            }
        out[f"{kind}, {peer}"] = against(mine, run, repeats) | extra
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--kinds", nargs="*", default=["forward_kl", "js"])
    parser.add_argument("--peers", nargs="*", default=["jax", "torch", "trl", "products"])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    arrays = problem(arguments.tokens, arguments.width, arguments.vocabulary)
    shape = {"tokens": arguments.tokens, "width": arguments.width, "vocabulary": arguments.vocabulary}
    needs = {"torch": "torch", "trl": "trl"}
    peers = [peer for peer in arguments.peers if peer not in needs or importlib.util.find_spec(needs[peer])]
    for kind in arguments.kinds:
        for case, row in measure(kind, arrays, peers, arguments.repeats).items():
            show("fused_divergences", {case: shape | row})
    show("fused_divergences", {"environment": environment("torch", "trl")})


if __name__ == "__main__":
    main()
