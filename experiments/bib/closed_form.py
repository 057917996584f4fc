"""A second exact oracle: Ehrlich functions, whose optimum is known to be 1; random instances, offline samples of the feasible set."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import bib
from janax.algorithms.bib import baselines, ehrlich
from janax.experiments.bib import pretraining, rivals, tasks
from janax.experiments.bib.config import Config, EhrlichConfig
from janax.experiments.session import Session
from janax.models import sequence

__all__ = ["METHODS", "study"]

METHODS = (
    "best offline",
    "random feasible",
    "gradient ascent, mean",
    "genetic algorithm",
    "BIB, forward",
    "BIB, Adaptive-gamma + Adaptive-eta",
)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class _Data(NamedTuple):
    """An instance with its offline rows: tokens [n l], scores [n], and the best m of them [m l]."""

    problem: ehrlich.Ehrlich
    tokens: jax.Array
    scores: jax.Array
    starts: jax.Array


def study(config: Config, session: Session) -> dict[str, Any]:
    """method -> report dictionaries, one an instance; "best offline value" among them."""
    return session.memo("ehrlich", functools.partial(_study, config.ehrlich, session), alone=True)


def _study(config: EhrlichConfig, session: Session) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), (config.num_seeds, 4))
    data = jax.jit(jax.vmap(functools.partial(_draw, config)))(keys[:, 0])
    standardised = jax.vmap(lambda y: (y - y.mean()) / (y.std() + 1e-9))(data.scores)
    letters = config.num_letters
    fit = functools.partial(baselines.fit_ensemble, num_letters=letters, num_steps=400, widths=(128, 128))
    ensembles = jax.jit(jax.vmap(lambda key, t, y: fit(key, t, y).params))(keys[:, 1], data.tokens, standardised)
    model = _network(config)
    params = pretraining.initial_params(model, jax.random.key(1))

    def search(name: str, args: tuple) -> jax.Array:
        one, scores, ensemble, key = args
        if name == "random feasible":
            draw = functools.partial(ehrlich.sample_feasible, problem=one.problem, length=config.length)
            return jax.vmap(lambda key: draw(key))(jax.random.split(key, config.num_designs))
        if name.startswith("BIB"):
            return _bib(model, params, one, key, letters, {"mode": "forward"} if "forward" in name else {"eta_rule": "frozen"})
        runs = rivals.searches(config.num_designs, one.tokens, scores, letters)
        return runs[name](ensemble, key).tokens

    found: dict[str, Any] = {}
    values = jax.jit(jax.vmap(lambda problem, t: jax.vmap(lambda t: ehrlich.value(problem, t))(t)))
    feasible = jax.jit(jax.vmap(lambda problem, t: jax.vmap(lambda t: ehrlich.is_feasible(problem, t))(t)))
    for name in session.track(METHODS, "Ehrlich functions"):
        with jax.enable_x64(name.startswith("BIB")):
            run = jax.jit(lambda args, name=name: jax.lax.map(functools.partial(search, name), args))
            designs = run((data, standardised, ensembles, keys[:, 2]))
        scores, inside = np.asarray(values(data.problem, designs)), np.asarray(feasible(data.problem, designs))
        found[name] = []
        for batch, score, ok in zip(np.asarray(designs), scores, inside):
            report = tasks.offline_report(score, batch, y_min=0.0, y_max=ehrlich.OPTIMUM)._asdict()
            found[name].append({k: report[k] for k in ("max", "median", "mean", "distinct")} | {"feasible": float(ok.mean())})
    return found


def _draw(config: EhrlichConfig, key: jax.Array) -> _Data:
    """Half of the rows are paths of the chain, half are such paths with three letters changed."""
    key_problem, key_rows, key_places = jax.random.split(key, 3)
    problem = ehrlich.random_instance(
        key_problem,
        num_letters=config.num_letters,
        length=config.length,
        num_motifs=config.num_motifs,
        motif_length=config.motif_length,
        motif_repeats=False,  # with few letters, repeats make motifs that a constant sequence satisfies
    )
    rows = jax.vmap(lambda key: ehrlich.sample_feasible(key, problem, length=config.length))(jax.random.split(key_rows, config.num_rows))
    changed = baselines.mutate(key_places, rows, 3 / config.length, num_letters=config.num_letters)
    rows = jnp.where((jnp.arange(config.num_rows) % 2 == 0)[:, None], rows, changed)
    scores = jax.vmap(lambda t: ehrlich.value(problem, t))(rows)
    _, best = jax.lax.top_k(scores, config.num_designs)
    return _Data(problem, rows, scores, rows[best])


def _network(config: EhrlichConfig) -> sequence.SequenceModel:
    """A random encoder: there is nothing to pre-train it on."""
    letters = _LETTERS[: config.num_letters]
    vocabulary = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters)
    made = sequence.alphabet(vocabulary, letters, framed=False)
    small = dataclasses.replace(sequence.DNA_KMERS.config, vocab_size=len(vocabulary), max_length=max(config.length, 8))
    return sequence.SequenceModel(config=small, alphabet=made)


def _bib(model: sequence.SequenceModel, params: Any, one: _Data, key: jax.Array, letters: int, settings: dict[str, Any]) -> jax.Array:
    phi = jax.lax.map(lambda t: sequence.features(model, params, t), one.tokens, batch_size=1000)
    proxy = bib.fit_proxy(phi, one.scores, rel_ridge=1e-3)
    key_heads, key_start = jax.random.split(key)
    heads = bib.fit_heads(key_heads, phi, one.scores)
    objectives = bib.Objectives(
        functools.partial(bib.forward_loss, proxy),
        functools.partial(bib.backward_loss, proxy),
        functools.partial(bib.head_value, heads),
    )

    def features(z: jax.Array) -> jax.Array:
        return sequence.features(model, params, bib.relax_tokens(z))

    z = jax.vmap(lambda key, t: bib.init_logits(key, t, num_letters=letters).astype(jnp.float32))(
        jax.random.split(key_start, len(one.starts)), one.starts
    )
    return jax.vmap(lambda z: bib.design(z, features, objectives, **settings).tokens)(z)
