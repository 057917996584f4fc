"""Enumerable strings, where the posterior is known: what the paper states, collapse, divergences, baselines, log Z both ways, best-of-N, pass@k.

A seed is another prior and another reward. All trainings of a part are one compiled call, vectorised over worlds and weights of the KL; from
samples over objectives, too, while exact gradients, which cost more than what vectorising saves, loop over objectives inside the call.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import rl_bayes
from janax.experiments.rl_bayes import coverage, worlds
from janax.experiments.rl_bayes.config import Config, ExactConfig
from janax.experiments.session import Session

__all__ = ["EXACT", "SAMPLED", "space_of", "study", "train_exact", "train_sampled"]

EXACT = ("RL without KL", "KL-RL", "f-DPG, KL", "f-DPG, JS", "f-DPG, TV", "f-DPG, Hellinger")
"""Objectives whose exact gradients are followed, by number."""
SAMPLED = ("KL", "KL, baseline", "RKL", "RKL, baseline", "JS", "JS, baseline", "VarGrad", "TB")
"""Objectives that are followed from samples, by number; the baseline is leave-one-out."""
_DIVERGENCES = (rl_bayes.FKL, rl_bayes.JS, rl_bayes.TV, rl_bayes.HELL2)
_CURVE = 60
_FASTER = 10.0  # log Z of TB is this times a parameter, and so moves faster under Adam
_RATES = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)


def space_of(config: ExactConfig) -> rl_bayes.Space:
    """The strings."""
    return rl_bayes.Space(vocab_size=config.vocab_size, length=config.length)


def study(config: Config, session: Session) -> dict[str, Any]:
    """Figures by part; lists run over worlds."""
    parts: dict[str, Callable[[ExactConfig], Any]] = {
        "statements": _statements,
        "collapse": _collapse,
        "tradeoff": _tradeoff,
        "sampled": _sampled,
        "sandwich": _sandwich,
        "frontier": _frontier,
        "coverage": lambda config: coverage.study(config, _worlds(config, config.num_worlds)),
    }
    found = {}
    for name in session.track([part for part in parts if part in config.exact.parts], "exact"):
        found[name] = session.memo(f"exact-{name}", functools.partial(parts[name], config.exact), alone=True)
    return found


@functools.cache
def _worlds(config: ExactConfig, count: int) -> worlds.World:
    """With a leading axis of worlds; the same in every part."""
    keys = jax.vmap(jax.random.key)(np.arange(count))
    return jax.jit(jax.vmap(lambda key: worlds.draw_world(key, space_of(config), config.width)))(keys)


# --- what the paper states


def _statements(config: ExactConfig) -> dict[str, float]:
    """Largest errors of the identities, in float64, over random policies of the first world."""
    space, beta = space_of(config), config.beta
    with jax.enable_x64(True):

        @jax.jit
        def everything(key: jax.Array, logits: jax.Array) -> dict[str, jax.Array]:
            world = worlds.draw_world(key, space, config.width)
            prior_rows, reward = rl_bayes.log_rows(space, world.rows.astype(jnp.float64)), world.reward.astype(jnp.float64)
            log_prior = rl_bayes.sequence_log_probs(space, prior_rows)
            post = rl_bayes.posterior(log_prior, reward / beta)

            def errors(logits: jax.Array) -> dict[str, jax.Array]:
                log_pi, pull = jax.vjp(lambda x: rl_bayes.sequence_log_probs(space, rl_bayes.log_rows(space, x)), logits)
                options: dict[str, Any] = {"weights": jnp.exp(log_pi)}

                def gradient(fn: Callable[[jax.Array], jax.Array]) -> jax.Array:
                    return pull(jax.grad(fn)(log_pi))[0]

                up = gradient(lambda x: rl_bayes.kl_rl_objective(x, log_prior, reward, beta=beta))
                down = gradient(lambda x: rl_bayes.kl_divergence(x, post.log_probs))
                score = gradient(lambda x: rl_bayes.kl_rl_loss(x, log_prior, reward, beta=beta, **options)[0])
                half = gradient(lambda x: 0.5 * rl_bayes.vargrad_loss(x, log_prior, reward / beta, **options)[0])
                size = jnp.max(jnp.abs(up))
                objective = rl_bayes.kl_rl_objective(log_pi, log_prior, reward, beta=beta)
                return {
                    "elbo": jnp.abs(objective / beta + rl_bayes.kl_divergence(log_pi, post.log_probs) - post.log_z),
                    "gradient": jnp.max(jnp.abs(up + beta * down)) / size,
                    "score": jnp.max(jnp.abs(up + score)) / size,
                    "vargrad": jnp.max(jnp.abs(beta * half - beta * down)) / size,
                }

            found = {name: jnp.max(x) for name, x in jax.vmap(errors)(logits).items()}
            slope = jax.grad(lambda inverse: rl_bayes.posterior(log_prior, inverse * reward).log_z)
            found["slope"] = jnp.abs(slope(jnp.asarray(1 / beta)) - jnp.sum(jnp.exp(post.log_probs) * reward))
            accepted = reward > jnp.quantile(reward, 0.95)
            hard = rl_bayes.posterior(log_prior, jnp.where(accepted, 0.0, -jnp.inf))
            found["constraint"] = jnp.abs(rl_bayes.kl_divergence(hard.log_probs, log_prior) + hard.log_z)
            rows = rl_bayes.posterior_rows(space, prior_rows, rl_bayes.soft_values(space, prior_rows, reward / beta))
            found["twists"] = jnp.max(jnp.abs(rl_bayes.sequence_log_probs(space, rows) - post.log_probs))
            return found

        logits = np.random.default_rng(1).normal(size=(10, space.num_prefixes, space.vocab_size))
        return {name: float(x) for name, x in everything(jax.random.key(0), jnp.asarray(logits)).items()}


# --- exact gradients


def train_exact(config: ExactConfig, params: Any, world: worlds.World, beta: jax.Array, kind: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One training by exact gradients, to be vmapped over everything.

    Args:
      config: Sizes and steps. Static.
      params: What the policy starts from.
      world: Prior and reward.
      beta: [] weight of the KL.
      kind: [] number of the objective in `EXACT`.

    Returns:
      log pi [x] at the end, and its entropy [num_steps] along the way.
    """
    space = space_of(config)
    log_target = world.log_prior + world.reward / beta
    log_z = jax.nn.logsumexp(log_target)

    def losses(log_pi: jax.Array) -> jax.Array:
        weights = jnp.exp(jax.lax.stop_gradient(log_pi))
        options: dict[str, Any] = {"baseline": "batch_mean", "weights": weights}
        branches = [
            lambda log_pi: rl_bayes.reinforce_loss(log_pi, world.reward, **options),
            lambda log_pi: rl_bayes.kl_rl_loss(log_pi, world.log_prior, world.reward, beta=beta, **options),
            *(
                lambda log_pi, one=one: rl_bayes.fdpg_loss(log_pi, log_target, log_z=log_z, divergence=one, **options)
                for one in _DIVERGENCES
            ),
        ]
        return jax.lax.switch(kind, [lambda x, fn=fn: fn(x)[0] for fn in branches], log_pi)

    def update(params: Any, state: Any, step: jax.Array) -> tuple[Any, Any, jax.Array]:
        del step

        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            log_pi = rl_bayes.sequence_log_probs(space, worlds.policy_rows(space, params))
            return losses(log_pi), rl_bayes.entropy(jax.lax.stop_gradient(log_pi))

        gradients, entropy = jax.grad(loss, has_aux=True)(params)
        return gradients, state, entropy

    params, _, entropies = worlds.fit(update, params, None, num_steps=config.num_steps, learning_rate=config.learning_rate)
    return rl_bayes.sequence_log_probs(space, worlds.policy_rows(space, params)), entropies


def _collapse(config: ExactConfig) -> dict[str, Any]:
    """Policies that can be the posterior, from the prior: where each objective ends."""
    several = _worlds(config, config.num_worlds)
    kinds = jnp.arange(len(EXACT))

    @jax.jit
    def everything(several: worlds.World) -> Any:
        def one(world: worlds.World, kind: jax.Array) -> Any:
            log_pi, entropies = train_exact(config, world.params, world, jnp.asarray(config.beta), kind)
            log_p = rl_bayes.posterior(world.log_prior, world.reward / config.beta).log_probs
            draws = jax.random.categorical(jax.random.key(7), log_pi, shape=(1000,))
            seen = jnp.zeros(log_pi.shape[0]).at[draws].set(1.0)
            more = {"distinct": jnp.sum(seen), "curve": entropies[:: max(1, config.num_steps // _CURVE)]}
            return worlds.summary(log_pi, world.log_prior, world.reward, log_p) | more

        def truth(world: worlds.World) -> Any:
            post = rl_bayes.posterior(world.log_prior, world.reward / config.beta)
            of_p = worlds.summary(post.log_probs, world.log_prior, world.reward, post.log_probs)
            return {"posterior": of_p, "prior": rl_bayes.entropy(world.log_prior), "log_z": post.log_z}

        found = jax.lax.map(lambda kind: jax.vmap(lambda world: one(world, kind))(several), kinds)
        return found, jax.vmap(truth)(several)

    found, truth = jax.tree.map(np.asarray, everything(several))
    objectives = {name: {key: x[i].tolist() for key, x in found.items()} for i, name in enumerate(EXACT)}
    stride = max(1, config.num_steps // _CURVE)
    return {"objectives": objectives, "truth": jax.tree.map(lambda x: x.tolist(), truth), "stride": stride}


def _tradeoff(config: ExactConfig) -> dict[str, Any]:
    """Policies too small for the posterior: objectives x betas x worlds; and quasi-rejection with one of them as the proposal."""
    several = _worlds(config, config.num_worlds)
    kinds, betas = jnp.arange(1, len(EXACT)), jnp.asarray(config.betas)
    middle, chosen = config.betas.index(config.beta), EXACT.index("f-DPG, JS") - 1

    @jax.jit
    def everything(several: worlds.World) -> Any:
        def one(world: worlds.World, start: Any, beta: jax.Array, kind: jax.Array) -> Any:
            log_pi, _ = train_exact(config, start, world, beta, kind)
            log_p = rl_bayes.posterior(world.log_prior, world.reward / beta).log_probs
            return worlds.summary(log_pi, world.log_prior, world.reward, log_p), log_pi

        def truth(world: worlds.World, beta: jax.Array) -> Any:
            log_p = rl_bayes.posterior(world.log_prior, world.reward / beta).log_probs
            return worlds.summary(log_p, world.log_prior, world.reward, log_p)

        def curve(world: worlds.World, log_q: jax.Array) -> jax.Array:
            log_w = world.log_prior + world.reward / config.beta - log_q
            rates = jnp.asarray(_RATES)
            return jax.vmap(lambda rate: rl_bayes.qrs_plan(log_w, target_rate=rate, weights=jnp.exp(log_q), num_iters=40).tv)(rates)

        keys = jax.vmap(jax.random.key)(100 + np.arange(config.num_worlds))
        starts = jax.vmap(lambda key: worlds.init(key, space_of(config), config.narrow))(keys)
        over_worlds = jax.vmap(one, in_axes=(0, 0, None, None))
        found, log_pi = jax.lax.map(lambda kind: jax.vmap(lambda beta: over_worlds(several, starts, beta, kind))(betas), kinds)
        true = jax.vmap(lambda beta: jax.vmap(lambda world: truth(world, beta))(several))(betas)
        curves = {"prior": jax.vmap(curve)(several, several.log_prior), "tuned": jax.vmap(curve)(several, log_pi[chosen, middle])}
        return found, true, curves

    found, true, curves = jax.tree.map(np.asarray, everything(several))
    return {
        "objectives": {name: {key: x[i].tolist() for key, x in found.items()} for i, name in enumerate(EXACT[1:])},
        "posterior": {key: x.tolist() for key, x in true.items()},
        "qrs": {"rates": list(_RATES)} | {key: x.tolist() for key, x in curves.items()},
    }


# --- gradients from samples


def train_sampled(
    config: ExactConfig, key: jax.Array, world: worlds.World, kind: jax.Array, *, sample: Callable[..., Any] = worlds.sample
) -> tuple[Any, jax.Array]:
    """One training from samples of the policy, from the prior; to be vmapped.

    Args:
      config: Sizes and steps. Static.
      key: [] typed key.
      world: Prior and reward.
      kind: [] number of the objective in `SAMPLED`.
      sample: How to draw from a policy of the kind of `world.params`. Static.

    Returns:
      The policy's parameters, and the log Z that the run ends with [] (learned by TB, the running mean elsewhere).
    """
    space, phi = space_of(config), world.reward / config.beta

    def update(params: Any, state: rl_bayes.LogZState, step: jax.Array) -> tuple[Any, Any, None]:
        def loss(params: Any) -> tuple[jax.Array, rl_bayes.LogZState]:
            place, log_pi = sample(jax.random.fold_in(key, step), space, params["policy"], num_samples=config.batch_size)
            log_prior, here = world.log_prior[place], phi[place]
            log_target = log_prior + here
            seen = rl_bayes.update_log_z(state, log_target - log_pi)
            log_z = rl_bayes.current_log_z(seen)

            def fdpg(one: rl_bayes.FDivergence, baseline: str) -> Callable[..., jax.Array]:
                return lambda log_pi, _: rl_bayes.fdpg_loss(log_pi, log_target, log_z=log_z, divergence=one, baseline=baseline)[0]

            divergences = (rl_bayes.FKL, rl_bayes.RKL, rl_bayes.JS)
            branches = [fdpg(one, baseline) for one in divergences for baseline in ("none", "leave_one_out")]
            branches.append(lambda log_pi, _: 0.5 * rl_bayes.vargrad_loss(log_pi, log_prior, here, ddof=1)[0])
            branches.append(lambda log_pi, learned: 0.5 * rl_bayes.tb_loss(log_pi, log_prior, here, learned)[0])
            return jax.lax.switch(kind, branches, log_pi, _FASTER * params["log_z"]), seen

        gradients, state = jax.grad(loss, has_aux=True)(params)
        return gradients, state, None

    params = {"policy": world.params, "log_z": jnp.zeros(())}
    params, state, _ = worlds.fit(update, params, rl_bayes.init_log_z(), num_steps=config.sampled_steps, learning_rate=config.sampled_rate)
    return params["policy"], jnp.where(kind == SAMPLED.index("TB"), _FASTER * params["log_z"], rl_bayes.current_log_z(state))


def _sampled(config: ExactConfig) -> dict[str, Any]:
    space, several = space_of(config), _worlds(config, config.sampled_seeds)
    keys = jax.vmap(jax.random.key)(200 + np.arange(config.sampled_seeds))

    @jax.jit
    def everything(several: worlds.World, keys: jax.Array) -> Any:
        def one(key: jax.Array, world: worlds.World, kind: jax.Array) -> Any:
            params, log_z = train_sampled(config, key, world, kind)
            log_pi = rl_bayes.sequence_log_probs(space, worlds.policy_rows(space, params))
            post = rl_bayes.posterior(world.log_prior, world.reward / config.beta)
            rkl, fkl = rl_bayes.kl_divergence(log_pi, post.log_probs), rl_bayes.kl_divergence(post.log_probs, log_pi)
            return {"rkl": rkl, "fkl": fkl, "log_z_error": log_z - post.log_z}

        return jax.vmap(lambda kind: jax.vmap(lambda key, world: one(key, world, kind))(keys, several))(jnp.arange(len(SAMPLED)))

    found = jax.tree.map(np.asarray, everything(several, keys))
    return {name: {key: x[i].tolist() for key, x in found.items()} for i, name in enumerate(SAMPLED)}


# --- log Z from both sides


def _sandwich(config: ExactConfig) -> dict[str, Any]:
    """Bounds with imperfect twists, for the prior and the twist-induced proposal, without and with resampling after every token."""
    space = space_of(config)

    @jax.jit
    def prepare(key: jax.Array) -> Any:
        world = worlds.draw_world(key, space, config.width)
        phi = world.reward / config.beta
        values = rl_bayes.soft_values(space, world.rows, phi)
        log_psi = rl_bayes.next_values(space, values)
        log_psi = log_psi + config.noise * jax.random.normal(jax.random.key(3), log_psi.shape)
        post = rl_bayes.posterior(world.log_prior, phi)
        gaps = {}
        for proposal, rows in (("base", world.rows), ("twist", rl_bayes.twisted_rows(world.rows, log_psi))):
            log_q = rl_bayes.sequence_log_probs(space, rows)
            gaps[f"{proposal} exact"] = (-rl_bayes.kl_divergence(log_q, post.log_probs), rl_bayes.kl_divergence(post.log_probs, log_q))
        return world, phi, rl_bayes.posterior_rows(space, world.rows, values), log_psi, post.log_z, gaps

    world, phi, exact_rows, log_psi, log_z, gaps = prepare(jax.random.key(0))
    log_z = float(log_z)
    decode = rl_bayes.table_decode_fn(space)
    target = rl_bayes.Target(terms=(lambda phi, x: phi[space.index(x.tokens)],), params=(phi,))

    @functools.partial(jax.jit, static_argnames=("proposal", "particles", "runs"))
    def runs_of(key: jax.Array, threshold: jax.Array, *, proposal: str, particles: int, runs: int) -> tuple[jax.Array, jax.Array]:
        key_low, key_high, key_exact = jax.random.split(key, 3)
        planted, _ = rl_bayes.sample_rows(key_exact, space, exact_rows, num_samples=runs)
        cache = (rl_bayes.table_cache(runs, 1), rl_bayes.table_cache(runs, 1))

        def call(key: jax.Array, planted: rl_bayes.Sequences | None) -> jax.Array:
            return rl_bayes.smc(
                rl_bayes.twisted(decode, decode),
                (world.rows, log_psi),
                key,
                cache,
                jnp.zeros((runs, 1), jnp.int32),
                jnp.ones(runs, jnp.int32),
                target,
                num_particles=particles,
                max_new_tokens=space.length,
                proposal=proposal,
                threshold=threshold,
                planted=planted,
            ).log_z

        return call(key_low, None), call(key_high, planted)

    found: dict[str, Any] = {"log_z": log_z, "cases": {}} | {name: [float(x) for x in pair] for name, pair in gaps.items()}
    for proposal in ("base", "twist"):
        for resampling in (False, True):
            case = found["cases"][f"{proposal}, {'resampling' if resampling else 'weights only'}"] = {}
            for particles in config.particles:
                chunk = max(10, min(config.num_runs, 8192 // particles))
                lower, upper = [], []
                for i in range(-(-config.num_runs // chunk)):
                    key, threshold = jax.random.fold_in(jax.random.key(11), i), jnp.asarray(1.1 if resampling else 0.0)
                    low, high = runs_of(key, threshold, proposal=proposal, particles=particles, runs=chunk)
                    lower.append(np.asarray(low))
                    upper.append(np.asarray(high))
                low, high = (np.concatenate(x)[: config.num_runs] for x in (lower, upper))
                both = jax.jit(rl_bayes.sandwich)(low - log_z, high - log_z)
                ratio = np.exp(low - log_z)
                case[str(particles)] = {name: float(x) for name, x in both._asdict().items()} | {
                    "ratio": float(ratio.mean()),
                    "ratio_error": float(ratio.std(ddof=1) / np.sqrt(len(ratio))),
                }
    return found


# --- best-of-N


def _frontier(config: ExactConfig) -> dict[str, Any]:
    """Reward at equal KL of the tilt and of best-of-N, and what the bound says for a binary reward; float64."""
    several = _worlds(config, config.num_worlds)
    with jax.enable_x64(True):
        counts = jnp.asarray(config.best_of, jnp.float64)

        @jax.jit
        def one(log_prior: jax.Array, reward: jax.Array) -> Any:
            log_prior = log_prior.astype(jnp.float64)
            log_prior, reward = log_prior - jax.nn.logsumexp(log_prior), reward.astype(jnp.float64)

            def at(count: jax.Array) -> Any:
                best = rl_bayes.best_of_n(log_prior, reward, num_samples=count)
                beta = rl_bayes.beta_for_kl(reward, best.kl, log_prior)
                tilt = rl_bayes.posterior(log_prior, reward / beta).log_probs
                return {
                    "kl": best.kl,
                    "bound": best.bound,
                    "reward": best.reward,
                    "tilt": jnp.sum(jnp.exp(tilt) * reward),
                    "tilt_kl": rl_bayes.kl_divergence(tilt, log_prior),
                    "beta": beta,
                }

            accepted = (reward > jnp.quantile(reward, 0.95)).astype(jnp.float64)
            success = jnp.sum(jnp.exp(log_prior) * accepted)
            binary = jax.vmap(lambda count: rl_bayes.best_of_n(log_prior, accepted, num_samples=count).kl)(counts)
            prior = jnp.sum(jnp.exp(log_prior) * reward)
            return jax.vmap(at)(counts) | {"binary": binary, "success": success, "prior": prior}

        found = [jax.tree.map(np.asarray, one(several.log_prior[i], several.reward[i])) for i in range(config.num_worlds)]
    return {"best_of": list(config.best_of)} | {key: [row[key].tolist() for row in found] for key in found[0]}
