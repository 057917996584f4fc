"""Many problems, one small network, exactly: the first attempt against many. pass@1 is a rate, pass@k what k attempts at each problem solve.

A problem is a set of right strings; how likely the prior is to hit it differs a hundredfold. The policy is the prior's recurrent network with a
learned first state for each problem: they share all other weights. Every objective follows its exact gradient, the mean over problems.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import rl_bayes
from janax.experiments.rl_bayes import worlds
from janax.experiments.rl_bayes.config import ExactConfig

__all__ = ["ATTEMPTS", "OBJECTIVES", "problems", "study", "train"]

OBJECTIVES = ("RL without KL", "KL-RL", "f-DPG, KL", "f-DPG, alpha 1/4", "f-DPG, JS")
"""What is followed, by number."""
ATTEMPTS = (1, 4, 16, 64, 256)
"""k of pass@k."""
_EASIEST, _HARDEST = 0.5, 0.001


def problems(key: jax.Array, space: rl_bayes.Space, log_prior: jax.Array, count: int) -> jax.Array:
    """[c x] whether a string is right: the best ones of a random score, so many that the prior hits them with a given probability.

    A score is one number per place and token; probabilities are spread evenly, in logarithms, from easiest to hardest.
    """
    tokens = jnp.asarray(space.tokens())
    values = jax.random.normal(key, (count, space.length, space.vocab_size))
    scores = jnp.sum(jnp.stack([values[:, t][:, tokens[:, t]] for t in range(space.length)]), axis=0)
    order = jnp.argsort(-scores, axis=1)
    mass = jnp.cumsum(jnp.exp(log_prior)[order], axis=1)
    wanted = jnp.geomspace(_EASIEST, _HARDEST, count)[:, None]
    before = jnp.concatenate([jnp.zeros_like(mass[:, :1]), mass[:, :-1]], axis=1)
    return jnp.zeros(scores.shape, bool).at[jnp.arange(count)[:, None], order].set(before < wanted)


def train(config: ExactConfig, world: worlds.World, right: jax.Array, kind: jax.Array) -> jax.Array:
    """One training, to be vmapped over worlds: rates [c] at which the policy is right at the end.

    Args:
      config: Sizes and steps. Static.
      world: The prior; its reward is not used.
      right: [c x] the problems.
      kind: [] number of the objective in `OBJECTIVES`.
    """
    space = rl_bayes.Space(vocab_size=config.vocab_size, length=config.length)
    log_target = jnp.where(right, world.log_prior[None], -jnp.inf)
    log_z = jax.nn.logsumexp(log_target, axis=1)
    reward = right.astype(world.log_prior.dtype)

    def laws(params: Any) -> jax.Array:
        def one(problem: jax.Array) -> jax.Array:
            policy = params["policy"] | {"start": params["policy"]["start"] + problem}
            return rl_bayes.sequence_log_probs(space, worlds.policy_rows(space, policy))

        return jax.vmap(one)(params["problems"])

    def of_problem(log_pi: jax.Array, log_target: jax.Array, log_z: jax.Array, reward: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"baseline": "batch_mean", "weights": jnp.exp(jax.lax.stop_gradient(log_pi))}
        branches = [
            lambda log_pi: rl_bayes.reinforce_loss(log_pi, reward, **options)[0],
            lambda log_pi: rl_bayes.kl_rl_loss(log_pi, world.log_prior, reward, beta=config.coverage_beta, **options)[0],
            *(
                lambda log_pi, one=one: rl_bayes.fdpg_loss(log_pi, log_target, log_z=log_z, divergence=one, **options)[0]
                for one in (rl_bayes.FKL, rl_bayes.alpha(0.25), rl_bayes.JS)
            ),
        ]
        return jax.lax.switch(kind, branches, log_pi)

    def update(params: Any, state: Any, step: jax.Array) -> tuple[Any, Any, None]:
        del step
        return jax.grad(lambda params: jnp.mean(jax.vmap(of_problem)(laws(params), log_target, log_z, reward)))(params), state, None

    start = {"policy": dict(world.params), "problems": jnp.zeros((right.shape[0], config.width))}
    params, _, _ = worlds.fit(update, start, None, num_steps=config.coverage_steps, learning_rate=config.learning_rate)
    return jnp.sum(jnp.exp(laws(params)) * reward, axis=1)


def study(config: ExactConfig, several: worlds.World) -> dict[str, Any]:
    """ "objectives": name -> pass@k by world [w k]; "rates": name -> first world's rates [c]; "prior" likewise."""
    space = rl_bayes.Space(vocab_size=config.vocab_size, length=config.length)
    keys = jax.vmap(jax.random.key)(400 + np.arange(several.log_prior.shape[0]))

    @jax.jit
    def everything(several: worlds.World) -> Any:
        right = jax.vmap(lambda key, log_prior: problems(key, space, log_prior, config.num_problems))(keys, several.log_prior)
        before = jnp.sum(jnp.where(right, jnp.exp(several.log_prior)[:, None], 0.0), axis=2)
        kinds = jnp.arange(len(OBJECTIVES))
        return before, jax.lax.map(lambda kind: jax.vmap(lambda world, right: train(config, world, right, kind))(several, right), kinds)

    before, after = (np.asarray(x, np.float64) for x in everything(several))
    rates = dict(zip(("prior", *OBJECTIVES), (before, *after)))
    passes = {name: _passes(x).tolist() for name, x in rates.items()}
    return {"passes": passes, "rates": {name: x[0].tolist() for name, x in rates.items()}, "attempts": list(ATTEMPTS)}


def _passes(rates: np.ndarray) -> np.ndarray:
    """[w c] -> [w k] mean over problems of the exact pass@k."""
    each = np.vectorize(rl_bayes.exact_pass_at_k, otypes=[float])
    return np.stack([each(np.clip(rates, 0, 1), k).mean(axis=1) for k in ATTEMPTS], axis=1)
