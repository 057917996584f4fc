"""A published model steered without training: text that must do without a letter, by twisted SMC, beside masking every token for itself.

The prior is the model's continuation of a prompt, cut after `max_new_tokens`. The posterior conditions it on tokens that do not contain the letter
and do not end the text. Masking draws from the law of each next token, restricted and renormalised; it runs into dead ends that the posterior
avoids, and its weights, the probability that each step leaves to the allowed tokens, say by how much. SMC resamples by those weights.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import rl_bayes
from janax.experiments.errors import UserError
from janax.experiments.rl_bayes.config import Config, SteeringConfig
from janax.experiments.session import Session
from janax.models import loading, transformer

__all__ = ["forbidden", "run", "study"]

_WAYS = {"decoder": (False, 0.0), "masking": (True, 0.0), "SMC": (True, 0.5)}
"""Name -> whether tokens are masked, and the share of effective particles below which they are resampled."""


def forbidden(model: loading.Model, letter: str) -> np.ndarray:
    """[v] whether a token is special, ends the text, or contains the letter, small or capital."""
    tokenizer: Any = model.tokenizer
    size = model.config.vocab_size
    found = np.ones(size, bool)
    for token in range(min(size, len(tokenizer))):
        found[token] = letter in tokenizer.decode([token]).lower()
    found[[token for token in (*tokenizer.all_special_ids, *model.stop_tokens) if token < size]] = True
    return found


def run(
    shape: transformer.TransformerConfig,
    num_particles: int,
    max_new_tokens: int,
    params: Any,
    key: jax.Array,
    prompts: jax.Array,
    num_tokens: jax.Array,
    log_psi: jax.Array,
    threshold: jax.Array,
) -> rl_bayes.SmcResult:
    """Particles of g prompts [g t] that draw with the twist log psi [v] of the token alone: 0, or -inf for what is forbidden."""
    decode = transformer.decode_fn(shape)

    def twist(params: Any, cache: Any, tokens: Any, num_tokens: Any = None, prefix: Any = None) -> Any:
        logits, cache = decode(params[0], cache, tokens, num_tokens=num_tokens, prefix=prefix)
        return (logits, jnp.broadcast_to(params[1][None], logits.shape)), cache

    target = rl_bayes.Target(terms=(lambda psi, x: jnp.sum(psi[x.tokens], axis=-1),), params=(log_psi,))
    empty = transformer.init_cache(shape, prompts.shape[0], prompts.shape[1])
    options: dict[str, Any] = {"num_particles": num_particles, "max_new_tokens": max_new_tokens, "threshold": threshold}
    return rl_bayes.smc(twist, (params, log_psi), key, empty, prompts, num_tokens, target, **options)


def study(config: Config, session: Session) -> dict[str, Any]:
    """By way: measure -> [runs], means over prompts; "texts" by way; and facts of the constraint."""
    return session.memo("steering", functools.partial(_study, config.steering, session), alone=True)


def _study(config: SteeringConfig, session: Session) -> dict[str, Any]:
    session.say(f"steering: loading {config.weights}")
    try:
        model = loading.load(config.weights)
    except ValueError as error:
        raise UserError(f"steering.weights: {error}") from error
    tokenizer: Any = model.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        raise UserError(f"steering.weights: {config.weights} has no tokenizer with a chat template; take an instruction-tuned model")
    masked = forbidden(model, config.letter)
    if masked.all():
        raise UserError(f"steering.letter: every token of {config.weights} contains {config.letter!r}; take another letter")
    rows = [_prompt(tokenizer, text) for text in config.prompts]
    num_tokens = np.array([len(row) for row in rows], np.int32)
    prompts = np.zeros((len(rows), num_tokens.max()), np.int32)
    for i, row in enumerate(rows):
        prompts[i, : len(row)] = row
    params = transformer.unstack_layers(model.params) if jax.default_backend() == "cpu" else model.params
    compiled = jax.jit(functools.partial(run, model.config, config.num_particles, config.max_new_tokens))
    found: dict[str, Any] = {name: [] for name in _WAYS}
    texts: dict[str, Any] = {}
    for name, (mask, threshold) in session.track(list(_WAYS.items()), "steering"):
        log_psi = jnp.where(mask & masked, -jnp.inf, 0.0)
        for seed in range(config.num_runs):
            result = compiled(params, jax.random.key(800 + seed), prompts, num_tokens, log_psi, jnp.asarray(threshold))
            found[name].append(_measure(result, masked, weighted=threshold > 0))
            if seed == 0:
                chosen = np.asarray(rl_bayes.draw_particle(jax.random.key(0), result)[0].tokens)
                texts[name] = [tokenizer.decode(row) for row in chosen]
    by_measure = {name: {key: [row[key] for row in runs] for key in runs[0]} for name, runs in found.items()}
    return {"ways": by_measure, "texts": texts, "forbidden": int(masked.sum()), "vocabulary": len(masked)}


def _prompt(tokenizer: Any, text: str) -> list[int]:
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(chat, add_special_tokens=False)


def _measure(result: rl_bayes.SmcResult, masked: np.ndarray, *, weighted: bool) -> dict[str, float]:
    """Means over prompts; over particles by their weights, or, if they are drawn independently, equally: the law of the proposal."""
    tokens, log_w = np.asarray(result.tokens), np.asarray(result.log_weights, np.float64)
    log_prior = np.asarray(result.log_prior, np.float64).sum(axis=2)
    weights = np.exp(log_w - log_w.max(axis=1, keepdims=True)) if weighted else np.ones_like(log_w)
    weights /= weights.sum(axis=1, keepdims=True)
    allowed = ~masked[tokens].any(axis=2)
    mean = lambda x: float(np.mean(np.sum(weights * x, axis=1)))  # noqa: E731
    return {
        "allowed": mean(allowed),
        "log_prior": mean(log_prior),
        "log_z": float(np.mean(np.asarray(result.log_z, np.float64))),
        "ess": float(np.mean(np.asarray(result.ess)[:, -1])),
        "distinct": float(np.mean([len(np.unique(rows, axis=0)) for rows in tokens])),
        "resampled": float(np.mean(np.asarray(result.resampled).sum(axis=1))),
    }
