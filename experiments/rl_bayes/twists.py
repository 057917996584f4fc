"""Learning twists from equally many samples where the optimal ones are known: contrastive, soft-Q, SIXO and FUDGE, judged by both KLs exactly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import rl_bayes
from janax.experiments.rl_bayes import worlds
from janax.experiments.rl_bayes.config import Config
from janax.experiments.rl_bayes.exact import space_of
from janax.experiments.session import Session

__all__ = ["LOSSES", "log_psi_of", "study", "train"]

LOSSES = ("CTL", "soft-Q", "SIXO", "FUDGE")
"""By number. CTL and soft-Q draw from the twist-induced proposal, FUDGE from the prior, SIXO half and half."""


def log_psi_of(space: rl_bayes.Space, params: Any, kind: jax.Array) -> jax.Array:
    """[p v] log psi of every child of every prefix: a recurrent network of its own; below 0 for FUDGE."""
    raw = worlds.network_logits(space, params)
    return jnp.where(kind == LOSSES.index("FUDGE"), jax.nn.log_sigmoid(raw), raw)


def train(config: Config, key: jax.Array, world: worlds.World, kind: jax.Array) -> jax.Array:
    """One training, to be vmapped over keys and worlds: [p v] log psi at the end."""
    space, settings = space_of(config.exact), config.twists
    n, length = settings.batch_size, space.length
    phi = world.reward / config.exact.beta
    phi = phi - jnp.max(phi)  # FUDGE's label is at most 1; a constant does not change p
    tokens_of = jnp.asarray(space.tokens())
    offsets = jnp.asarray([space.offset(t) for t in range(length)])

    def places(tokens: jax.Array) -> jax.Array:
        """[n t] the row of the prefix before each token."""
        number, rows = jnp.zeros(tokens.shape[0], jnp.int32), []
        for t in range(length):
            rows.append(offsets[t] + number)
            number = number * space.vocab_size + tokens[:, t]
        return jnp.stack(rows, axis=1)

    def update(params: Any, state: Any, step: jax.Array) -> tuple[Any, Any, None]:
        key_q, key_prior = jax.random.split(jax.random.fold_in(key, step))
        log_psi = jax.lax.stop_gradient(log_psi_of(space, params, kind))
        proposal = rl_bayes.twisted_rows(world.rows, log_psi)
        _, from_q = rl_bayes.sample_rows(key_q, space, proposal, num_samples=n)
        _, from_prior = rl_bayes.sample_rows(key_prior, space, world.rows, num_samples=n)
        lengths = jnp.full(n, length, jnp.int32)

        def seen(index: jax.Array, table: jax.Array) -> jax.Array:
            """[n t] entries of a table [p v] at the tokens of the strings."""
            tokens = tokens_of[index]
            return table[places(tokens), tokens]

        prior_q, law_q = seen(from_q, world.rows), seen(from_q, proposal)
        log_w = phi[from_q] + jnp.sum(prior_q - law_q, axis=1)

        def ctl(table: jax.Array) -> jax.Array:
            here = seen(from_q, table)
            return rl_bayes.ctl_loss(here, lengths, here, lengths, rl_bayes.prefix_log_weights(prior_q, law_q, here, lengths), log_w)

        def soft_q(table: jax.Array) -> jax.Array:
            row = places(tokens_of[from_q])
            return rl_bayes.soft_q_loss(seen(from_q, table), rl_bayes.soft_values_of(world.rows[row], table[row]), phi[from_q], lengths)

        def sixo(table: jax.Array) -> jax.Array:
            half = n // 2
            positive, negative = seen(from_q[:half], table), seen(from_prior[:half], table)
            return rl_bayes.sixo_loss(positive, lengths[:half], negative, lengths[:half], log_w[:half])

        def fudge(table: jax.Array) -> jax.Array:
            return rl_bayes.fudge_loss(seen(from_prior, table), phi[from_prior], lengths)

        def loss(params: Any) -> jax.Array:
            return jax.lax.switch(kind, [ctl, soft_q, sixo, fudge], log_psi_of(space, params, kind))

        return jax.grad(loss)(params), state, None

    start = worlds.init(jax.random.fold_in(key, 1 << 20), space, settings.width, gain=0.03)
    params, _, _ = worlds.fit(update, start, None, num_steps=settings.num_steps, learning_rate=settings.learning_rate)
    return log_psi_of(space, params, kind)


def study(config: Config, session: Session) -> dict[str, Any]:
    """KLs [seeds] of the twist-induced proposal and the posterior, by loss, and of the prior."""
    return session.memo("twists", lambda: _measure(config), alone=True)


def _measure(config: Config) -> dict[str, Any]:
    space, count = space_of(config.exact), config.twists.num_seeds
    keys = jax.vmap(jax.random.key)(400 + np.arange(count))

    @jax.jit
    def everything(world_keys: jax.Array, keys: jax.Array) -> Any:
        several = jax.vmap(lambda key: worlds.draw_world(key, space, config.exact.width))(world_keys)

        def judged(world: worlds.World, rows: jax.Array) -> dict[str, jax.Array]:
            log_p = rl_bayes.posterior(world.log_prior, world.reward / config.exact.beta).log_probs
            log_q = rl_bayes.sequence_log_probs(space, rows)
            return {"rkl": rl_bayes.kl_divergence(log_q, log_p), "fkl": rl_bayes.kl_divergence(log_p, log_q)}

        def one(key: jax.Array, world: worlds.World, kind: jax.Array) -> dict[str, jax.Array]:
            return judged(world, rl_bayes.twisted_rows(world.rows, train(config, key, world, kind)))

        found = jax.lax.map(lambda kind: jax.vmap(lambda key, world: one(key, world, kind))(keys, several), jnp.arange(len(LOSSES)))
        return found, jax.vmap(lambda world: judged(world, world.rows))(several)

    found, prior = jax.tree.map(np.asarray, everything(jax.vmap(jax.random.key)(np.arange(count)), keys))
    losses = {name: {key: x[i].tolist() for key, x in found.items()} for i, name in enumerate(LOSSES)}
    return {"losses": losses, "prior": {key: x.tolist() for key, x in prior.items()}}
