"""What `janax distill` minimises and measures: divergences between both models' distributions, never as a [tokens, vocabulary] array."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from janax.experiments import decoders, text, training
from janax.experiments.decoders import Network
from janax.experiments.distill.config import Config
from janax.experiments.statistics import Estimate, bootstrap
from janax.jaxlib_ext import fused, sampling, sharding
from janax.models import transformer

__all__ = ["Objective", "Scores", "completed", "loss_fn", "score_rows"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What stays fixed.

    The trees called `frozen` below are {"student": where it started, "teacher": the teacher's parameters}.

    Attributes:
      config: The options.
      net: The student.
      teacher: The teacher's network.
      stop_tokens: Tokens that end a sampled completion.
    """

    config: Config
    net: Network
    teacher: transformer.TransformerConfig
    stop_tokens: Sequence[int]

    @property
    def vocab_size(self) -> int:
        """Entries that both models know: one of them may have rows behind the tokenizer's last token, to round the number up."""
        return min(self.net.config.vocab_size, self.teacher.vocab_size)


class _Heads(NamedTuple):
    """Hidden states where something is predicted [b t-1 d] and unembeddings [v d] of both, and what the data say there [b t-1]."""

    h: jax.Array
    w: jax.Array
    teacher_h: jax.Array
    teacher_w: jax.Array
    labels: jax.Array
    counts: jax.Array


def _heads(objective: Objective, params: Any, teacher_params: Any, rows: Mapping[str, jax.Array]) -> _Heads:
    tokens, size = rows["tokens"], objective.vocab_size

    def one(config: transformer.TransformerConfig, params: Any) -> tuple[jax.Array, jax.Array]:
        h = transformer.hidden(config, params, tokens, rows["segment_ids"])[:, :-1]
        return h, transformer.output_embedding(config, params)[:size]

    teacher_h, teacher_w = jax.lax.stop_gradient(one(objective.teacher, teacher_params))
    return _Heads(*one(objective.net.config, params), teacher_h, teacher_w, tokens[:, 1:], rows["mask"][:, 1:].astype(jnp.float32))


def _options(objective: Objective) -> dict[str, Any]:
    config = objective.config
    return {
        "alpha": config.alpha,
        "beta": config.beta,
        "temperature": config.temperature,
        "softcap": objective.net.config.final_softcap,
        "teacher_softcap": objective.teacher.final_softcap,
        "transposed": True,
        "teacher_transposed": True,
    }


def loss_fn(objective: Objective) -> training.LossFn:
    """Mean over the tokens that count of the divergence, in nats, plus `label_weight` times the cross-entropy where the tokens are the data's.

    The batch is one of `corpus.Batches`; where it holds prompts, the student as it stands completes them first.
    """
    config, net = objective.config, objective.net

    def loss(trained: Any, batch: Mapping[str, jax.Array], key: jax.Array, frozen: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        params, rows, labelled = net.params_of(trained, frozen["student"]), batch, config.label_weight > 0
        if batch["prompts"].shape[1]:
            rows, labelled = completed(objective, params, batch["prompts"], batch["prompt_lengths"], key), False
        h, w, teacher_h, teacher_w, labels, counts = _heads(objective, params, frozen["teacher"], rows)
        options = _options(objective)
        if labelled:
            options |= {"labels": labels, "label_weights": config.label_weight * counts}
        scale = config.temperature**2 if config.tau_squared else 1.0
        total = fused.weighted_divergence(config.divergence, h, w, teacher_h, teacher_w, scale * counts, **options)
        count = jnp.sum(counts)
        info = {"weight": count}
        if 0 < config.on_policy_share < 1:
            info["on_policy"] = jnp.asarray(batch["prompts"].shape[1] > 0, jnp.float32)
        return total / jnp.maximum(count, 1.0), info

    return loss


def completed(objective: Objective, params: Any, prompts: jax.Array, lengths: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    """Rows like those of the data whose completions the student samples; no gradient goes through the samples.

    Args:
      objective: Says how long, at what temperature, and what ends a completion.
      params: The student's parameters.
      prompts: [b p] prompts, padded on the right.
      lengths: [b] their lengths.
      key: Of the samples.

    Returns:
      tokens, segment_ids and mask [b p + m], m = `max_new_tokens`; what was sampled counts, with the token that ended it.
    """
    config, shape = objective.config, objective.net.config
    params = jax.lax.stop_gradient(params)
    if jax.default_backend() == "cpu":  # a scan over layers copies their weights, for every token
        params = transformer.unstack_layers(params)
    width = prompts.shape[1] + config.max_new_tokens
    done = sampling.generate(
        transformer.decode_fn(shape),
        params,
        key,
        transformer.init_cache(shape, prompts.shape[0], width),
        prompts,
        lengths,
        sampling=sampling.SamplingParams(temperature=config.sampling_temperature),
        max_new_tokens=config.max_new_tokens,
        stop_tokens=objective.stop_tokens,
    )
    place = jnp.arange(width, dtype=jnp.int32)[None]
    of_prompt, behind = place < lengths[:, None], place - lengths[:, None]
    of_sample = ~of_prompt & (behind < done.num_tokens[:, None])

    def at(tokens: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take_along_axis(tokens, jnp.clip(index, 0, tokens.shape[1] - 1), axis=1)

    sampled = jnp.where(of_sample, at(done.tokens, behind), 0)
    tokens = jnp.where(of_prompt, at(prompts, jnp.broadcast_to(place, sampled.shape)), sampled)
    return {"tokens": tokens, "segment_ids": (of_prompt | of_sample).astype(jnp.int32), "mask": of_sample}


class Scores(NamedTuple):
    """Sums over the tokens of each row that count, in nats, and how many tokens those are; each [n].

    Attributes:
      divergence: Between teacher and student, at the temperature of training and without its square.
      nll: Negative log-likelihood of the data under the student.
      teacher_nll: The same under the teacher.
      count: Tokens.
    """

    divergence: Any
    nll: Any
    teacher_nll: Any
    count: Any

    def per_token(self, name: str, before: "Scores | None" = None) -> Estimate:
        """Mean of one of the sums per token, or how far it is from `before`, with a 95 % bootstrap interval over rows."""
        sums = np.asarray(getattr(self, name), np.float64) - (0.0 if before is None else np.asarray(getattr(before, name), np.float64))
        pairs = np.stack([sums, np.asarray(self.count, np.float64)], axis=1)
        return bootstrap(pairs, lambda rows: float(rows[:, 0].sum() / max(rows[:, 1].sum(), 1.0)))


def score_rows(objective: Objective, rows: text.Rows, mesh: Any) -> Callable[[Any, Any], Scores]:
    """(trained tree, frozen) -> the scores of these rows of the data."""

    def sums(trained: Any, batch: Mapping[str, jax.Array], frozen: Any) -> Scores:
        params = objective.net.params_of(trained, frozen["student"])
        h, w, teacher_h, teacher_w, labels, counts = _heads(objective, params, frozen["teacher"], batch)
        options = _options(objective)
        token = fused.divergence(objective.config.divergence, h, w, teacher_h, teacher_w, mask=counts, labels=labels, **options)
        assert token.log_probs is not None, "labels are given"
        theirs = fused.token_log_probs(teacher_h, teacher_w, labels, softcap=options["teacher_softcap"], transposed=True)
        each = (token.values, -token.log_probs, -theirs, jnp.ones_like(counts))
        return Scores(*(jnp.sum(jnp.where(counts > 0, x, jnp.zeros_like(x)), axis=1) for x in each))

    compiled = jax.jit(sums)

    def score(trained: Any, frozen: Any) -> Scores:
        with jax.set_mesh(mesh):
            found = [
                sharding.fetch(compiled(trained, decoders.place_rows(batch, mesh), frozen))
                for batch in text.in_order(rows, max(mesh.shape.get("data", 1), 8))
            ]
        return Scores(*(np.concatenate(parts)[: len(rows.tokens)] for parts in zip(*found)))

    return score
