"""Enumerable worlds: a recurrent prior over short strings, a reward, and policies of the same kind evaluated once per prefix."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from janax.algorithms import rl_bayes

__all__ = ["World", "draw_world", "fit", "init", "network_logits", "policy_rows", "sample", "summary"]

Params = Mapping[str, jax.Array]


class World(NamedTuple):
    """A prior with a reward.

    Attributes:
      params: The recurrent network of the prior.
      rows: [p v] its rows.
      log_prior: [x] log pi0.
      reward: [x].
    """

    params: dict[str, jax.Array]
    rows: jax.Array
    log_prior: jax.Array
    reward: jax.Array


def init(key: jax.Array, space: rl_bayes.Space, width: int, *, gain: float = 0.3) -> dict[str, jax.Array]:
    """An Elman network; `gain` scales its logits, 0.3 for a policy near the uniform one."""
    key_start, key_embed, key_recur, key_out = jax.random.split(key, 4)
    return {
        "start": jax.random.normal(key_start, (width,)),
        "embed": jax.random.normal(key_embed, (space.vocab_size, width)),
        "recur": 0.7 * width**-0.5 * jax.random.normal(key_recur, (width, width)),
        "out": gain * width**-0.5 * jax.random.normal(key_out, (width, space.vocab_size)),
        "bias": jnp.zeros(space.vocab_size),
    }


def network_logits(space: rl_bayes.Space, params: Params) -> jax.Array:
    """[p v] what a network makes of every prefix: one state per prefix, each from its parent's."""
    states = [jnp.tanh(params["start"])[None]]
    for _ in range(space.length - 1):
        following = (states[-1] @ params["recur"])[:, None] + params["embed"][None]
        states.append(jnp.tanh(following).reshape(-1, params["start"].shape[0]))
    return jnp.concatenate(states) @ params["out"] + params["bias"][None]


def policy_rows(space: rl_bayes.Space, params: Params) -> jax.Array:
    """[p v] the rows of a network as a policy."""
    return rl_bayes.log_rows(space, network_logits(space, params))


def sample(key: jax.Array, space: rl_bayes.Space, params: Params, *, num_samples: int) -> tuple[jax.Array, jax.Array]:
    """Strings drawn from a network: their places [n] among all, and log pi [n], differentiable; the network runs once for both."""
    h = jnp.broadcast_to(jnp.tanh(params["start"])[None], (num_samples, params["start"].shape[0]))
    uniform = jax.random.uniform(key, (space.length, num_samples))
    place, log_pi = jnp.zeros(num_samples, jnp.int32), jnp.zeros(num_samples)
    for t in range(space.length):
        log_p = jax.nn.log_softmax(h @ params["out"] + params["bias"][None])
        below = jnp.cumsum(jnp.exp(jax.lax.stop_gradient(log_p)), axis=1)[:, :-1]  # one random number a token, not one a letter
        token = jnp.sum(below <= uniform[t][:, None], axis=1, dtype=jnp.int32)
        chosen = jax.nn.one_hot(token, space.vocab_size)
        log_pi = log_pi + jnp.sum(chosen * log_p, axis=1)
        place = place * space.vocab_size + token
        h = jnp.tanh(h @ params["recur"] + chosen @ params["embed"])
    return place, log_pi


def draw_world(key: jax.Array, space: rl_bayes.Space, width: int) -> World:
    """A prior of uneven rows and a reward: one number per place and token, normal(0, 0.5), and 1 if the last token is the first."""
    key_prior, key_reward = jax.random.split(key)
    params = init(key_prior, space, width, gain=1.6)
    rows = policy_rows(space, params)
    tokens = jnp.asarray(space.tokens())
    values = 0.5 * jax.random.normal(key_reward, (space.length, space.vocab_size))
    reward = sum(values[t][tokens[:, t]] for t in range(space.length)) + (tokens[:, 0] == tokens[:, -1])
    return World(params, rows, rl_bayes.sequence_log_probs(space, rows), jnp.asarray(reward))


def fit(update: Any, params: Any, state: Any, *, num_steps: int, learning_rate: float) -> tuple[Any, Any, Any]:
    """Adam with half a cosine: `update(params, state, step) -> (gradients, state, report)`; returns (params, state, reports [num_steps ...])."""
    import optax

    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def step(carry: Any, number: jax.Array) -> tuple[Any, Any]:
        params, state, moments = carry
        gradients, state, report = update(params, state, number)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), state, moments), report

    (params, state, _), reports = jax.lax.scan(step, (params, state, optimizer.init(params)), jnp.arange(num_steps))
    return params, state, reports


def summary(log_pi: jax.Array, log_prior: jax.Array, reward: jax.Array, log_p: jax.Array) -> dict[str, jax.Array]:
    """What is reported of a policy [x] beside the posterior log_p [x]; JSD is the usual one, at most log 2."""
    exact = functools.partial(rl_bayes.exact_divergence, log_pi=log_pi, log_p=log_p)
    return {
        "entropy": rl_bayes.entropy(log_pi),
        "reward": jnp.sum(jnp.exp(log_pi) * reward),
        "kl_prior": rl_bayes.kl_divergence(log_pi, log_prior),
        "rkl": exact(rl_bayes.RKL),
        "fkl": exact(rl_bayes.FKL),
        "tv": exact(rl_bayes.TV),
        "jsd": 0.5 * exact(rl_bayes.JS),
        "hell2": exact(rl_bayes.HELL2),
        "most": jnp.exp(jnp.max(log_pi)),
    }
