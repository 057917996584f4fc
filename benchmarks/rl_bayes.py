"""RL as inference: 48 trainings in one vectorised call against 48 calls, and twisted SMC against plain sampling.

trainings: 8 objectives x 6 seeds from samples of a small recurrent policy (experiments/rl_bayes/exact.py), all in one compiled call, against the
same one training compiled once and called 48 times, both warm; and once from nothing, compilation included, against 48 jitted runs with the
objective static: one jit per objective that serves its six seeds, or one jit per run. Bars: at most 1/3 of the wall clock, and a step of all 48
in 2 ms.
tables: the same trainings of the simplest policy there is, a table of logits per place and token before it (five letters of four), which is nearer
to the categorical model with which naver/disco's tuner takes 14 ms a step for one training with 128 samples.
smc: 256 particles of 64 tokens on a small decoder, resampled where the effective number falls below one half, against `sampling.generate` of 256
samples of the same prompt. The twists are a table lookup, so that what is timed is SMC and not a second network. Bar: at most 1.3 times as long.

    python benchmarks/rl_bayes.py [--cases trainings tables smc] [--steps 200 --repeats 3]
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, environment, show

from janax.algorithms import rl_bayes
from janax.experiments.rl_bayes import exact, worlds
from janax.experiments.rl_bayes.config import ExactConfig
from janax.jaxlib_ext import sampling
from janax.models import transformer

DECODER = transformer.TransformerConfig(
    vocab_size=4096, max_length=512, width=192, depth=4, heads=6, kv_heads=2, head_width=32, hidden=512, tied=True
)


def markov_world(key: jax.Array, space: rl_bayes.Space) -> worlds.World:
    """A prior of one table of logits per place and token before it, with a reward per place and token."""
    key_prior, key_reward = jax.random.split(key)
    table = 1.3 * jax.random.normal(key_prior, (space.length, space.vocab_size + 1, space.vocab_size))
    values = 0.6 * jax.random.normal(key_reward, (space.length, space.vocab_size))
    tokens = jnp.asarray(space.tokens())
    before = jnp.concatenate([jnp.full_like(tokens[:, :1], space.vocab_size), tokens[:, :-1]], axis=1)
    places = jnp.arange(space.length)[None]
    log_prior = jnp.sum(jax.nn.log_softmax(table)[places, before, tokens], axis=1)
    return worlds.World({"table": table}, jnp.zeros(()), log_prior, jnp.sum(values[places, tokens], axis=1))


def markov_sample(key: jax.Array, space: rl_bayes.Space, params: Any, *, num_samples: int) -> tuple[jax.Array, jax.Array]:
    log_p = jax.nn.log_softmax(params["table"])
    below = jnp.cumsum(jnp.exp(jax.lax.stop_gradient(log_p)), axis=2)
    uniform = jax.random.uniform(key, (space.length, num_samples))
    place, log_pi = jnp.zeros(num_samples, jnp.int32), jnp.zeros(num_samples)
    before = jnp.full(num_samples, space.vocab_size, jnp.int32)
    for t in range(space.length):
        token = jnp.sum(below[t][before, :-1] <= uniform[t][:, None], axis=1, dtype=jnp.int32)
        log_pi, place, before = log_pi + log_p[t][before, token], place * space.vocab_size + token, token
    return place, log_pi


def trainings(steps: int, repeats: int, *, table: bool) -> dict[str, Any]:
    config = ExactConfig(sampled_steps=steps, vocab_size=4 if table else 5)
    space, kinds, seeds = exact.space_of(config), np.arange(len(exact.SAMPLED)), np.arange(config.sampled_seeds)
    draw = (lambda key: markov_world(key, space)) if table else (lambda key: worlds.draw_world(key, space, config.width))
    several = jax.jit(jax.vmap(draw))(jax.vmap(jax.random.key)(seeds))
    keys = jax.vmap(jax.random.key)(200 + seeds)
    single = functools.partial(exact.train_sampled, config, sample=markov_sample if table else worlds.sample)
    together = jax.jit(jax.vmap(jax.vmap(single, in_axes=(0, 0, None)), in_axes=(None, None, 0)))
    apart = jax.jit(single)
    worlds_of = [jax.tree.map(lambda x: x[seed], several) for seed in seeds]  # noqa: B023

    def one_by_one() -> list[Any]:
        return [apart(keys[seed], worlds_of[seed], jnp.asarray(kind)) for kind in kinds for seed in seeds]

    def separately(*, jits: str) -> list[Any]:
        found = []
        for kind in kinds:
            for seed in seeds:
                if jits == "run" or seed == 0:
                    mine = jax.jit(lambda key, world, kind=kind: single(key, world, jnp.asarray(kind)))
                found.append(jax.block_until_ready(mine(keys[seed], worlds_of[seed])))
        return found

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    cold = seconds(lambda: together(keys, several, jnp.asarray(kinds)))
    cold_ratio = {jits: cold / seconds(lambda jits=jits: separately(jits=jits)) for jits in ("objective", "run")}
    row = alternate(lambda: together(keys, several, jnp.asarray(kinds)), one_by_one, repeats=repeats)
    count = len(kinds) * len(seeds)
    step = 1e3 * row["ours_seconds"] / steps
    return row | {
        "cold_seconds": cold,
        "cold_ratio": cold_ratio,
        "trainings": count,
        "steps": steps,
        "step_of_all_ms": step,
        "step_of_one_ms": step / count,
    }


def smc(repeats: int) -> dict[str, Any]:
    params = transformer.unstack_layers(transformer.init(DECODER, jax.random.key(0)))
    prompt, length = jnp.asarray(np.arange(1, 9)[None], jnp.int32), jnp.asarray([8], jnp.int32)
    decode, cache = transformer.decode_fn(DECODER), transformer.init_cache(DECODER, 1, 8)
    weights = 2.0 * jax.random.normal(jax.random.key(1), (DECODER.vocab_size,))

    def twisted(params: Any, cache: Any, tokens: Any, num_tokens: Any = None, prefix: Any = None) -> Any:
        logits, cache = decode(params[0], cache, tokens, num_tokens=num_tokens, prefix=prefix)
        return (logits, jnp.broadcast_to(params[1][None], logits.shape)), cache

    target = rl_bayes.Target(terms=(lambda w, x: w[x.tokens[..., -1]],), params=(weights,))

    @jax.jit
    def ours(params: Any, key: jax.Array, cache: Any) -> Any:
        options: dict[str, Any] = {"num_particles": 256, "max_new_tokens": 64, "proposal": "base"}
        return rl_bayes.smc(twisted, (params, weights), key, cache, prompt, length, target, **options)

    @jax.jit
    def theirs(params: Any, key: jax.Array, cache: Any) -> Any:
        plain = sampling.SamplingParams()
        return sampling.generate(decode, params, key, cache, prompt, length, sampling=plain, max_new_tokens=64, num_samples=256)

    resampled = int(ours(params, jax.random.key(2), cache).resampled.sum())
    row = alternate(lambda: ours(params, jax.random.key(2), cache), lambda: theirs(params, jax.random.key(2), cache), repeats=repeats)
    return row | {"particles": 256, "tokens": 64, "resamplings": resampled}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="+", default=["trainings", "tables", "smc"], choices=["trainings", "tables", "smc"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for case in ("trainings", "tables"):
        if case in arguments.cases:
            show("rl_bayes", {case: trainings(arguments.steps, arguments.repeats, table=case == "tables")})
    if "smc" in arguments.cases:
        show("rl_bayes", {"smc": smc(arguments.repeats)})
    show("rl_bayes", {"environment": environment()})


if __name__ == "__main__":
    main()
