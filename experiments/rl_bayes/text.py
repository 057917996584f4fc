"""Real text: a small character-level decoder trained on docstrings, and every method that samples from its posterior, with the same number of texts.

Three tasks: a hard constraint (the text contains a word), a continuous reward (its share of vowels), and a moment: a given share of the texts
contains the word, whose posterior is that of the reward "contains the word" with lambda = 1 / beta. All methods draw num_steps x batch_size texts
before they are judged; best-of-N and twisted SMC (texts for the twists and all
particles) spend the same number. Exact samples of the posterior come from a large pool of the decoder's own
texts, so that KL(p || pi) is measured and not guessed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import rl_bayes
from janax.experiments import text as texts
from janax.experiments.errors import UserError
from janax.experiments.rl_bayes import worlds
from janax.experiments.rl_bayes.config import Config, TextConfig
from janax.experiments.session import Session
from janax.models import transformer

__all__ = [
    "ALPHABET",
    "ATTEMPTS",
    "METHODS",
    "PPO",
    "Prepared",
    "contains",
    "decode_text",
    "encode_text",
    "measures",
    "network",
    "study",
    "vowels",
]

ALPHABET = " abcdefghijklmnopqrstuvwxyz.,:;()[]_'`=-/*0#"
"""Characters by token, from 1 on; 0 stands before every text. Digits are 0, anything else is #."""
PPO = "PPO with a KL"
METHODS = ("RL without KL", "RL with P(x)", "KL-RL", "GDC", "GDC, baseline", "f-DPG, JS", "TB")
"""What is trained by one step of every batch, by number."""
TASKS = {
    "constraint": (*METHODS, PPO),
    "continuous": ("RL without KL", "KL-RL", PPO, "GDC", "f-DPG, JS", "TB"),
    "moment": ("GDC, baseline", "f-DPG, JS"),
}
"""What is trained for which task."""
_CURVE = 50
_FASTER = 10.0  # log Z of TB is this times a parameter, and so moves faster under Adam
_FEWEST, _PARTICLES = 10, 8
ATTEMPTS = 16
"""k of pass@k."""
_EPOCHS = 4  # steps of PPO on a batch, as in the published code


def encode_text(text: str) -> np.ndarray:
    """Tokens of a text: small letters, runs of white space as one space."""
    table = {character: i + 1 for i, character in enumerate(ALPHABET)}
    unknown = table["#"]
    plain = " ".join(text.lower().split())
    return np.array([table.get("0" if character.isdigit() else character, unknown) for character in plain], np.int32)


def decode_text(tokens: Any) -> str:
    """The text of tokens [t]."""
    return "".join(ALPHABET[int(token) - 1] if token else "^" for token in tokens)


def corpus(config: TextConfig) -> np.ndarray:
    """[n t] pieces of docstrings that begin with a word, in an order that depends on the installation only."""
    pieces = []
    for package in config.packages:
        for document in texts.docstrings(package):
            tokens = encode_text(document)
            starts = np.flatnonzero(np.concatenate([[True], tokens[:-1] == 1])[: max(0, len(tokens) - config.length + 1)])
            pieces += [tokens[start : start + config.length] for start in starts[::2]]
    rows = np.stack(pieces)
    return rows[np.random.default_rng(0).permutation(len(rows))]


def network(config: TextConfig) -> transformer.TransformerConfig:
    """The decoder: all heads read one set of keys, which makes drawing texts fast."""
    return transformer.TransformerConfig(
        vocab_size=len(ALPHABET) + 1,
        max_length=config.length + 1,
        width=config.width,
        depth=config.depth,
        heads=config.width // 16,
        kv_heads=1,
        head_width=16,
        hidden=2 * config.width,
    )


def contains(tokens: jax.Array, word: np.ndarray) -> jax.Array:
    """[... t] -> [...] whether the word stands somewhere in the text."""
    length, size = tokens.shape[-1], len(word)
    here = [functools.reduce(jnp.logical_and, (tokens[..., i + j] == word[j] for j in range(size))) for i in range(length - size + 1)]
    return functools.reduce(jnp.logical_or, here)


def vowels(tokens: jax.Array) -> jax.Array:
    """[... t] -> [...] the share of a, e, i, o, u among the characters."""
    return jnp.mean(jnp.isin(tokens, encode_text("aeiou")).astype(jnp.float32), axis=-1)


def _shifted(tokens: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros_like(tokens[:, :1]), tokens[:, :-1]], axis=1)


def log_probs(shape: transformer.TransformerConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """log pi(x) [n] of texts [n t]; nothing ends a text but its length."""
    return jnp.sum(_of_tokens(transformer.logits(shape, params, _shifted(tokens)), tokens), axis=1)


def _of_tokens(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """[n t] log-probabilities of the tokens of a text; its beginning is no character."""
    return rl_bayes.token_log_probs(logits.at[:, :, 0].set(-jnp.inf), tokens, jnp.full(tokens.shape[0], tokens.shape[1]))


def draw(shape: transformer.TransformerConfig, params: Any, key: jax.Array, count: int, length: int) -> jax.Array:
    """[n t] texts drawn from the decoder."""
    cache = transformer.init_cache(shape, count, length)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        cache, last = carry
        logits, cache = transformer.decode(shape, params, cache, last[:, None])
        token = jax.random.categorical(key, logits.at[:, 0].set(-jnp.inf)).astype(jnp.int32)
        return (cache, token), token

    _, tokens = jax.lax.scan(step, (cache, jnp.zeros(count, jnp.int32)), jax.random.split(key, length))
    return tokens.T


class _Task(NamedTuple):
    """What changes between tasks, traced, so that one program serves all.

    Attributes:
      word: [] whether the reward is 1 for the word; else the weighted share of vowels.
      hard: [] whether texts without reward are excluded.
      beta: [] weight of the KL of methods that take a finite reward.
      shift: [] log of the largest P among texts of the decoder, which scales the reward P(x).
    """

    word: jax.Array
    hard: jax.Array
    beta: jax.Array
    shift: jax.Array


class _Batch(NamedTuple):
    """What PPO keeps of the texts that it drew.

    Attributes:
      tokens: [n t].
      reward: [n].
      log_prior: [n t] under the decoder.
      log_pi: [n t] under the policy that drew them.
      values: [n t] of its critic before each token.
    """

    tokens: jax.Array
    reward: jax.Array
    log_prior: jax.Array
    log_pi: jax.Array
    values: jax.Array


class Prepared:
    """The decoder and what is known of its posteriors, made when first asked for: a resumed run may not ask."""

    def __init__(self, config: TextConfig):
        self.config, self.shape, self.word = config, network(config), encode_text(config.word)

    @functools.cached_property
    def prior(self) -> tuple[Any, dict[str, Any]]:
        """Parameters of the decoder, and its loss on held-out pieces (nats per character)."""
        config, shape, rows = self.config, self.shape, corpus(self.config)
        held, train = rows[:1024], jnp.asarray(rows[1024:])

        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            return -jnp.mean(log_probs(shape, params, tokens)) / config.length

        def update(params: Any, state: Any, step: jax.Array) -> tuple[Any, Any, jax.Array]:
            chosen = jax.random.randint(jax.random.fold_in(jax.random.key(1), step), (config.prior_batch,), 0, train.shape[0])
            value, gradients = jax.value_and_grad(loss)(params, train[chosen])
            return gradients, state, value

        @jax.jit
        def fit(key: jax.Array) -> Any:
            return worlds.fit(
                update, transformer.unstack_layers(transformer.init(shape, key)), None, num_steps=config.prior_steps, learning_rate=3e-3
            )[0]

        params = fit(jax.random.key(0))
        facts = {
            "held_out": float(jax.jit(loss)(params, jnp.asarray(held))),
            "pieces": len(rows),
            "characters": int(rows.size),
            "share": float(jnp.mean(jax.jit(lambda x: contains(x, self.word))(jnp.asarray(rows)))),
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
        }
        return params, facts

    @functools.cached_property
    def pool(self) -> dict[str, np.ndarray]:
        """Texts of the decoder with log pi0 and both rewards."""
        params = self.prior[0]
        size = min(self.config.pool, 4096)

        @jax.jit
        def some(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            tokens = draw(self.shape, params, key, size, self.config.length)
            return tokens, log_probs(self.shape, params, tokens)

        parts = [some(jax.random.fold_in(jax.random.key(2), i)) for i in range(-(-self.config.pool // size))]
        tokens, log_prior = (np.concatenate([np.asarray(part[i]) for part in parts])[: self.config.pool] for i in range(2))
        word = np.asarray(contains(jnp.asarray(tokens), self.word))
        if {"constraint", "moment"} & set(self.config.tasks) and word.sum() < _FEWEST:
            raise UserError(
                f"text.word {self.config.word!r} stands in {word.sum()} of {len(word)} texts of the decoder, too few to measure anything; "
                "take a more frequent word, or raise text.prior_steps or text.pool"
            )
        return {"tokens": tokens, "log_prior": log_prior, "constraint": word.astype(np.float32), "continuous": self._vowels(tokens)}

    def _vowels(self, tokens: np.ndarray) -> np.ndarray:
        return self.config.vowel_weight * np.asarray(vowels(jnp.asarray(tokens)))

    def reward(self, tokens: jax.Array, word: jax.Array | bool) -> jax.Array:
        """[n] 1 for the word, or the weighted share of vowels."""
        return jnp.where(word, contains(tokens, self.word).astype(jnp.float32), self.config.vowel_weight * vowels(tokens))

    def rewards(self, task: str) -> np.ndarray:
        """[n] the task's reward of the pool."""
        return self.pool["continuous" if task == "continuous" else "constraint"]

    @functools.cached_property
    def multiplier(self) -> float:
        """The multiplier with which a given share of the texts contains the word; float64."""
        with jax.enable_x64(True):
            features = jnp.asarray(self.rewards("moment"), jnp.float64)[:, None]
            fit = jax.jit(rl_bayes.fit_lambdas)(features, jnp.asarray([self.config.moment], jnp.float64))
            return float(fit.lambdas[0])

    def beta(self, task: str) -> float:
        """Weight of the KL for methods that take a finite reward."""
        if task == "moment":
            return 1 / self.multiplier
        return self.config.soft_beta if task == "constraint" else self.config.beta

    def task(self, name: str) -> _Task:
        """A task's numbers."""
        reward, beta, hard = self.rewards(name), self.beta(name), name == "constraint"
        log_target = self.pool["log_prior"] + (np.where(reward > 0, 0.0, -np.inf) if hard else reward / beta)
        flags = (jnp.asarray(name != "continuous"), jnp.asarray(hard))
        return _Task(*flags, jnp.asarray(beta), jnp.asarray(np.max(log_target), jnp.float32))

    @functools.cached_property
    def train(self) -> Any:
        """(kind, task, keys [s]) -> parameters of s seeds and curves [s ...]; one compiled program for all methods and tasks."""
        config, shape, prior = self.config, self.shape, self.prior[0]

        def update(kind: jax.Array, task: _Task, key: jax.Array, params: Any, state: rl_bayes.LogZState, step: jax.Array) -> Any:
            fixed = jax.lax.stop_gradient(params["policy"])
            tokens = draw(shape, fixed, jax.random.fold_in(key, step), config.batch_size, config.length)
            reward, log_prior = self.reward(tokens, task.word), log_probs(shape, prior, tokens)
            soft = reward / task.beta
            log_target = log_prior + jnp.where(task.hard, jnp.where(reward > 0, 0.0, -jnp.inf), soft)

            def loss(params: Any) -> Any:
                log_pi = log_probs(shape, params["policy"], tokens)
                seen = rl_bayes.update_log_z(state, log_target - log_pi)
                log_z, loo = rl_bayes.current_log_z(seen), "leave_one_out"
                values = (
                    lambda log_pi, _: rl_bayes.reinforce_loss(log_pi, reward, baseline=loo),
                    lambda log_pi, _: rl_bayes.reinforce_loss(log_pi, jnp.exp(log_target - task.shift), baseline=loo),
                    lambda log_pi, _: rl_bayes.kl_rl_loss(log_pi, log_prior, reward, beta=task.beta, baseline=loo),
                    lambda log_pi, _: rl_bayes.dpg_loss(log_pi, log_target, log_z=log_z),
                    lambda log_pi, _: rl_bayes.dpg_loss(log_pi, log_target, log_z=log_z, baseline="z"),
                    lambda log_pi, _: rl_bayes.fdpg_loss(log_pi, log_target, log_z=log_z, divergence=rl_bayes.JS, baseline=loo),
                    lambda log_pi, learned: rl_bayes.tb_loss(log_pi, log_prior, soft, learned),
                )
                value = jax.lax.switch(kind, [lambda *x, fn=fn: fn(*x)[0] for fn in values], log_pi, _FASTER * params["log_z"])
                return value, (seen, {"reward": jnp.mean(reward), "kl_prior": jnp.mean(log_pi - log_prior)})

            gradients, (seen, report) = jax.grad(loss, has_aux=True)(params)
            return gradients, seen, report

        def one(kind: jax.Array, task: _Task, key: jax.Array) -> Any:
            step = functools.partial(update, kind, task, key)
            start = {"policy": prior, "log_z": jnp.zeros(())}
            steps = {"num_steps": config.num_steps, "learning_rate": config.learning_rate}
            params, _, curves = worlds.fit(step, start, rl_bayes.init_log_z(), **steps)
            return params["policy"], curves

        return jax.jit(jax.vmap(one, in_axes=(None, None, 0)))

    @functools.cached_property
    def train_ppo(self) -> Any:
        """(task, keys [s]) -> parameters and curves as of `train`, by PPO with a critic on the hidden states: every batch serves several steps."""
        config, shape, prior = self.config, self.shape, self.prior[0]
        every = jnp.ones((config.batch_size, config.length), bool)

        def seen(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = transformer.hidden(shape, params["policy"], _shifted(tokens))
            log_pi = _of_tokens(h @ transformer.unembed(shape, params["policy"]), tokens)
            return log_pi, h @ params["critic"]

        def one(task: _Task, key: jax.Array) -> Any:
            def fresh(params: Any, step: jax.Array) -> _Batch:
                params = jax.lax.stop_gradient(params)
                tokens = draw(shape, params["policy"], jax.random.fold_in(key, step), config.batch_size, config.length)
                log_prior = _of_tokens(transformer.logits(shape, prior, _shifted(tokens)), tokens)
                return _Batch(tokens, self.reward(tokens, task.word), log_prior, *seen(params, tokens))

            def update(params: Any, batch: _Batch, step: jax.Array) -> tuple[Any, _Batch, dict[str, jax.Array]]:
                batch = jax.lax.cond(step % _EPOCHS == 0, lambda: fresh(params, step), lambda: batch)

                def loss(params: Any) -> jax.Array:
                    log_pi, values = seen(params, batch.tokens)
                    rest = (batch.log_prior, batch.reward, every, values, batch.values)
                    return rl_bayes.ppo_penalty_loss(log_pi, batch.log_pi, *rest, beta=task.beta)[0]

                gap = jnp.mean(jnp.sum(batch.log_pi - batch.log_prior, axis=1))
                return jax.grad(loss)(params), batch, {"reward": jnp.mean(batch.reward), "kl_prior": gap}

            start = {"policy": prior, "critic": jnp.zeros(shape.width)}
            steps = {"num_steps": _EPOCHS * config.num_steps, "learning_rate": config.learning_rate}
            params, _, curves = worlds.fit(update, start, fresh(start, jnp.asarray(0)), **steps)
            return params["policy"], jax.tree.map(lambda x: x[::_EPOCHS], curves)

        return jax.jit(jax.vmap(one, in_axes=(None, 0)))

    @functools.cached_property
    def judge(self) -> Any:
        """(params, key) -> texts [n t], log pi [n], log pi0 [n]; and log pi of the pool's chosen texts: (params, tokens) -> [n]."""
        config, shape, prior = self.config, self.shape, self.prior[0]

        @jax.jit
        def texts_of(params: Any, key: jax.Array) -> Any:
            tokens = draw(shape, params, key, config.num_eval, config.length)
            return tokens, log_probs(shape, params, tokens), log_probs(shape, prior, tokens)

        return texts_of, jax.jit(functools.partial(log_probs, shape))


def measures(tokens: np.ndarray, reward: np.ndarray, *, binary: bool) -> dict[str, float]:
    """Of the texts alone: reward and variety, by characters; for a reward of 0 or 1, how often one of a few attempts has it."""
    strings = [decode_text(row) for row in tokens]
    found = {f"distinct_{n}": rl_bayes.distinct_n(strings, n) for n in (1, 2, 3)}
    return {
        "reward": float(np.mean(reward)),
        "self_bleu": rl_bayes.self_bleu(strings, 5, num_texts=256),
        "unique": len(set(strings)),
        **({"pass": rl_bayes.pass_at_k(len(reward), int(np.sum(reward > 0)), min(ATTEMPTS, len(reward)))} if binary else {}),
    } | found


def study(config: Config, session: Session) -> dict[str, Any]:
    """By task: "facts" and "methods": name -> measure -> [seeds]; and "prior", facts of the decoder."""
    prepared = Prepared(config.text)
    found: dict[str, Any] = {"prior": session.memo("text-prior", lambda: prepared.prior[1], alone=True), "tasks": {}}
    for task in config.text.tasks:
        facts = session.memo(f"text-{task}-facts", functools.partial(_facts, prepared, task), alone=True)
        done: dict[str, Any] = {}
        for name in session.track(TASKS[task], f"text, {task}"):
            done[name] = session.memo(f"text-{task}-{name}", functools.partial(_method, prepared, task, name), alone=True)
        extra = (("best-of-N", _best_of), ("twisted SMC", _twisted)) if task != "moment" else ()
        for name, compute in (*extra, ("decoder", _decoder)):
            done[name] = session.memo(f"text-{task}-{name}", functools.partial(compute, prepared, task), alone=True)
        stride = max(1, config.text.num_steps // _CURVE)
        found["tasks"][task] = {"facts": facts, "methods": done, "stride": stride}
    return found


class _Posterior(NamedTuple):
    """Texts of the pool that stand for p.

    Attributes:
      index: [n] which: the accepted ones, exact samples, or all.
      shares: [n] their weights under p, which sum to about one.
      phi: [n] log-potentials.
      log_z: log Z.
    """

    index: np.ndarray
    shares: np.ndarray
    phi: np.ndarray
    log_z: float


def _posterior(prepared: Prepared, task: str) -> _Posterior:
    reward = prepared.rewards(task).astype(np.float64)
    if task == "constraint":
        kept = np.flatnonzero(reward > 0)[:1024]
        return _Posterior(kept, np.full(len(kept), 1 / len(kept)), np.zeros(len(kept)), float(np.log(np.mean(reward))))
    phi = reward / prepared.beta(task)
    log_z = float(np.log(np.mean(np.exp(phi - phi.max()))) + phi.max())
    return _Posterior(np.arange(len(phi)), np.exp(phi - log_z) / len(phi), phi, log_z)


def _facts(prepared: Prepared, task: str) -> dict[str, Any]:
    p, pool = _posterior(prepared, task), prepared.pool
    found = {
        "log_z": p.log_z,
        "effective": float(1 / np.sum(p.shares**2)),
        "reward": float(np.sum(p.shares * prepared.rewards(task)[p.index])),
        "kl_prior": float(np.sum(p.shares * p.phi) - p.log_z),
        "entropy": float(-np.sum(p.shares * (pool["log_prior"][p.index] + p.phi)) + p.log_z),
    }
    if task == "moment":
        share, wanted = float(prepared.rewards(task).mean(dtype=np.float64)), prepared.config.moment
        closed = np.log(wanted / (1 - wanted)) - np.log(share / (1 - share))
        found |= {
            "lambda": prepared.multiplier,
            "lambda_error": float(abs(prepared.multiplier - closed)),
            "prior": share,
        }
    return found


def _method(prepared: Prepared, task: str, name: str) -> dict[str, Any]:
    config, pool = prepared.config, prepared.pool
    numbers, keys = prepared.task(task), jax.vmap(jax.random.key)(300 + np.arange(config.num_seeds))
    if name == PPO:
        params, curves = prepared.train_ppo(numbers, keys)
    else:
        params, curves = prepared.train(jnp.asarray(METHODS.index(name)), numbers, keys)
    texts_of, log_prob = prepared.judge
    p = _posterior(prepared, task)
    rows = []
    for seed in range(config.num_seeds):
        mine = jax.tree.map(lambda x: x[seed], params)  # noqa: B023
        tokens, log_pi, log_prior = (np.asarray(x) for x in texts_of(mine, jax.random.fold_in(jax.random.key(4), seed)))
        reward = np.asarray(prepared.reward(jnp.asarray(tokens), numbers.word))
        pieces = [np.asarray(log_prob(mine, pool["tokens"][p.index[i : i + 1024]])) for i in range(0, len(p.index), 1024)]
        row = measures(tokens, reward, binary=task != "continuous") | {
            "entropy": float(-log_pi.mean()),
            "kl_prior": float(np.mean(log_pi - log_prior)),
            "fkl": float(np.sum(p.shares * (pool["log_prior"][p.index] + p.phi - np.concatenate(pieces))) - p.log_z),
        }
        rows.append(row | {"texts": [decode_text(t) for t in tokens[:3]]})
    stride = max(1, config.num_steps // _CURVE)
    return _by_measure(rows) | {"curves": {key: np.asarray(x)[:, ::stride].tolist() for key, x in curves.items()}}


def _by_measure(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def _decoder(prepared: Prepared, task: str) -> dict[str, Any]:
    """The decoder itself, batches of the pool for seeds."""
    config, pool, p = prepared.config, prepared.pool, _posterior(prepared, task)
    rows = []
    for seed in range(config.num_seeds):
        mine = slice(seed * config.num_eval, (seed + 1) * config.num_eval)
        more = {"entropy": float(-pool["log_prior"][mine].mean()), "kl_prior": 0.0, "fkl": float(np.sum(p.shares * p.phi) - p.log_z)}
        rows.append(measures(pool["tokens"][mine], prepared.rewards(task)[mine], binary=task != "continuous") | more)
    return _by_measure(rows)


def _best_of(prepared: Prepared, task: str) -> dict[str, Any]:
    """Best-of-N with fresh texts, N such that as many are drawn as the other methods draw; its KLs by the law of best-of-N over the pool."""
    config, params, p = prepared.config, prepared.prior[0], _posterior(prepared, task)
    count = 1 + config.num_steps * config.batch_size // config.num_eval
    size = max(1, 4096 // count)

    @jax.jit
    def some(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_draw, key_pick = jax.random.split(key)
        tokens = draw(prepared.shape, params, key_draw, size * count, config.length)
        reward = prepared.reward(tokens, task != "continuous").reshape(size, count)
        chosen = jax.vmap(rl_bayes.select_best)(jax.random.split(key_pick, size), reward)[0]
        return tokens.reshape(size, count, -1)[jnp.arange(size), chosen], reward[jnp.arange(size), chosen]

    rewards = prepared.rewards(task)
    uniform = jnp.full(len(rewards), -np.log(len(rewards)), jnp.float32)
    law = jax.jit(functools.partial(rl_bayes.best_of_n, num_samples=count))(uniform, jnp.asarray(rewards))
    gain = np.asarray(law.log_probs - uniform, np.float64)[p.index]
    rows = []
    for seed in range(config.num_seeds):
        parts = [some(jax.random.fold_in(jax.random.key(500 + seed), i)) for i in range(-(-config.num_eval // size))]
        tokens, reward = (np.concatenate([np.asarray(part[i]) for part in parts])[: config.num_eval] for i in range(2))
        more = {"kl_prior": float(law.kl), "fkl": float(np.sum(p.shares * (p.phi - gain)) - p.log_z)}
        rows.append(measures(tokens, reward, binary=task != "continuous") | more | {"texts": [decode_text(t) for t in tokens[:3]]})
    return _by_measure(rows) | {"count": count, "bound": float(law.bound)}


def _twisted(prepared: Prepared, task: str) -> dict[str, Any]:
    """Twists learned from the decoder's texts (FUDGE for the constraint, contrastive for the reward), then one text per run of a few particles."""
    config, shape, prior, hard = prepared.config, prepared.shape, prepared.prior[0], task == "constraint"
    beta = prepared.beta(task)
    steps = max(1, config.num_steps - _PARTICLES * config.num_eval // config.batch_size)
    lengths = jnp.full(config.batch_size, config.length)

    def log_psi_of(raw: jax.Array) -> jax.Array:
        return jax.nn.log_sigmoid(raw - 4.0) if hard else raw

    def potential(tokens: jax.Array) -> jax.Array:
        reward = prepared.reward(tokens, hard)
        return jnp.where(reward > 0, 0.0, -jnp.inf) if hard else reward / beta

    def update(key: jax.Array, params: Any, state: Any, step: jax.Array) -> tuple[Any, Any, None]:
        tokens = draw(shape, prior, jax.random.fold_in(key, step), config.batch_size, config.length)
        phi = potential(tokens)

        def loss(params: Any) -> jax.Array:
            here = rl_bayes.token_values(log_psi_of(transformer.logits(shape, params, _shifted(tokens))), tokens, lengths)
            if hard:
                return rl_bayes.fudge_loss(here, phi, lengths)
            return rl_bayes.ctl_loss(here, lengths, here, lengths, jax.lax.stop_gradient(here), phi)

        return jax.grad(loss)(params), state, None

    @jax.jit
    @jax.vmap
    def learned(key: jax.Array) -> Any:
        start = {**prior, "unembed": jax.tree.map(jnp.zeros_like, prior["unembed"])}
        return worlds.fit(functools.partial(update, key), start, None, num_steps=steps, learning_rate=3 * config.learning_rate)[0]

    decode = transformer.decode_fn(shape)

    def twist(params: Any, cache: Any, tokens: Any, num_tokens: Any = None, prefix: Any = None) -> Any:
        first, second = (None, None) if prefix is None else prefix
        logits, cache_prior = decode(params[0], cache[0], tokens, num_tokens=num_tokens, prefix=first)
        raw, cache_twist = decode(params[1], cache[1], tokens, num_tokens=num_tokens, prefix=second)
        return (logits.at[:, 0].set(-jnp.inf), log_psi_of(raw)), (cache_prior, cache_twist)

    target = rl_bayes.Target(terms=(lambda _, x: potential(x.tokens),), params=((),))
    size = min(128, config.num_eval)

    @jax.jit
    def some(params: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_smc, key_pick = jax.random.split(key)
        caches = tuple(transformer.init_cache(shape, size, 1) for _ in range(2))
        result = rl_bayes.smc(
            twist,
            (prior, params),
            key_smc,
            caches,
            jnp.zeros((size, 1), jnp.int32),
            jnp.ones(size, jnp.int32),
            target,
            num_particles=_PARTICLES,
            max_new_tokens=config.length,
        )
        return rl_bayes.draw_particle(key_pick, result)[0].tokens, result.log_z

    twists = learned(jax.vmap(jax.random.key)(600 + np.arange(config.num_seeds)))
    rows = []
    for seed in range(config.num_seeds):
        mine = jax.tree.map(lambda x: x[seed], twists)  # noqa: B023
        parts = [some(mine, jax.random.fold_in(jax.random.key(700 + seed), i)) for i in range(-(-config.num_eval // size))]
        tokens, log_z = (np.concatenate([np.asarray(part[i]) for part in parts])[: config.num_eval] for i in range(2))
        reward = np.asarray(prepared.reward(jnp.asarray(tokens), hard))
        more = {"log_z": float(np.log(np.mean(np.exp(log_z)))), "texts": [decode_text(t) for t in tokens[:3]]}
        rows.append(measures(tokens, reward, binary=task != "continuous") | more)
    return _by_measure(rows) | {"particles": _PARTICLES, "steps": steps}
