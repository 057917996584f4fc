"""Training a decoder on packed text, and what it has learnt: held-out loss beside simple models, samples, tokens per second."""

import dataclasses
import functools
import lzma
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from janax.experiments import decoders, plots, report, text, training
from janax.experiments.decoders import Network
from janax.experiments.errors import UserError
from janax.experiments.lm.config import Config
from janax.experiments.metrics import read_rows
from janax.experiments.session import Session
from janax.experiments.statistics import mean_interval
from janax.jaxlib_ext import aot, fused, sampling, sharding
from janax.models import lora, presets, transformer

__all__ = ["Corpus", "loss_fn", "network", "prepare", "programs", "run"]

_SHAPES = {
    "small": presets.LM_SMALL,
    "smollm2-135m": presets.SMOLLM2_135M,
    "qwen2.5-7b": presets.QWEN2_5_7B,
    "llama-3.1-8b": presets.LLAMA_3_1_8B,
}
_EVAL_ROWS = 128


class Corpus(NamedTuple):
    """Tokens, and the way back to text.

    Attributes:
      train: Rows to train on.
      held_out: Rows to evaluate on.
      held_out_bytes: UTF-8 bytes of the text behind the counted tokens of `held_out`.
      compressed_bytes: What xz makes of that text; 0 where it was not asked.
      decode: Token ids -> text.
      end: The token between documents.
      vocab_size: Number of tokens.
      fingerprint: Of the text.
    """

    train: text.Rows
    held_out: text.Rows
    held_out_bytes: int
    compressed_bytes: int
    decode: Callable[[Sequence[int]], str]
    end: int
    vocab_size: int
    fingerprint: str


def network(config: Config, vocab_size: int | None = None, base: tuple[transformer.TransformerConfig, Any] | None = None) -> Network:
    """The decoder of a configuration: loaded (`base`) or fresh, trained whole or through adapters."""
    shape, weights = base if base is not None else (_SHAPES[config.model.shape], None)
    shape = dataclasses.replace(shape, dtype=config.model.dtype, remat=config.model.remat, attention=config.model.attention)
    if vocab_size is not None and base is None:
        shape = dataclasses.replace(shape, vocab_size=vocab_size)
    if config.text.sequence_length > shape.max_length:
        raise UserError(
            f"text.sequence_length must be at most {shape.max_length}, the longest text of this model, got {config.text.sequence_length}"
        )
    if config.lora.rank and weights is None:
        raise UserError("lora.rank needs model.weights: adapters change a trained model; set model.weights, or lora.rank 0")
    return decoders.network(shape, weights, config.lora)


def _optimizer(config: Config) -> Any:
    return decoders.make_optimizer(config.optimizer, config.lora, num_steps=config.train.num_steps, dtype=config.model.dtype)


def loss_fn(net: Network) -> training.LossFn:
    """Mean negative log-likelihood per counted token, in nats; no [tokens, vocabulary] array is made."""

    def loss(trained: Any, batch: Mapping[str, jax.Array], key: jax.Array, frozen: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        del key
        params = net.params_of(trained, frozen)
        h = transformer.hidden(net.config, params, batch["tokens"], batch["segment_ids"])[:, :-1]
        targets, weights = batch["tokens"][:, 1:], batch["mask"][:, 1:].astype(jnp.float32)
        w, options = transformer.output_embedding(net.config, params), {"softcap": net.config.final_softcap, "transposed": True}
        if jax.sharding.get_abstract_mesh().size > 1:  # one more product than below, but gradients are summed over devices once
            total = -jnp.sum(fused.token_log_probs(h, w, targets, **options) * weights)
        else:
            total = fused.weighted_nll(h, w, targets, weights, **options)
        count = jnp.sum(weights)
        return total / jnp.maximum(count, 1.0), {"weight": count}

    return loss


def prepare(config: Config, session: Session, tokenizer: Any = None) -> Corpus:
    """Reads, tokenises and packs the text once per run directory; a resumed run finds rows and tokenizer where the first left them.

    Args:
      config: See `TextConfig`.
      session: Whose run directory keeps the result.
      tokenizer: The loaded model's tokenizer (transformers); None trains one.
    """
    path, vocabulary = session.workdir / "text" / "rows.npz", session.workdir / "text" / "tokenizer.json"
    own: Any = None
    if not path.exists():
        arrays, own = _read(config, session, tokenizer)
        if session.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            if own is not None:
                own.save(str(vocabulary))
            partial = path.with_name("partial.npz")
            np.savez_compressed(partial, **arrays)
            partial.replace(path)
    else:
        with np.load(path) as stored:
            arrays = dict(stored)
        if tokenizer is None:
            import tokenizers

            own = tokenizers.Tokenizer.from_file(str(vocabulary))
    parts = {part: text.Rows(*(arrays[f"{part}_{field}"] for field in text.Rows._fields)) for part in ("train", "held_out")}
    size, squeezed, end = (int(x) for x in arrays["numbers"])
    mark = str(arrays["fingerprint"])
    if tokenizer is None:
        assert own is not None, "trained above, or read from the run directory"
        return Corpus(parts["train"], parts["held_out"], size, squeezed, own.decode, end, own.get_vocab_size(), mark)
    return Corpus(parts["train"], parts["held_out"], size, squeezed, tokenizer.decode, end, len(tokenizer), mark)


def _read(config: Config, session: Session, tokenizer: Any) -> tuple[dict[str, Any], Any]:
    """The arrays that a run directory keeps, and the tokenizer if one was trained."""
    session.say("lm: reading text")
    train, held_out = _documents(config, tokenizer)
    if tokenizer is None:
        own = text.train_tokenizer([piece for document in train for piece in document.pieces], config.text.vocab_size)
        encode, end = (lambda piece: own.encode(piece).ids), 0
    else:
        own = None
        encode, end = functools.partial(tokenizer.encode, add_special_tokens=False), tokenizer.eos_token_id
    session.say(f"lm: tokenising {len(train)} documents, {len(held_out)} held out")
    length = config.text.sequence_length
    rows = {"train": text.pack(train, encode, end, length), "held_out": text.pack(held_out, encode, end, length)}
    pieces = [piece for document in held_out for piece, trained in zip(document.pieces, document.trained) if trained]
    size = sum(len(piece.encode("utf-8", "surrogatepass")) for piece in pieces)
    squeezed = len(lzma.compress("\0".join(pieces).encode("utf-8", "surrogatepass"), preset=9))
    arrays: dict[str, Any] = {f"{part}_{field}": getattr(rows[part], field) for part in rows for field in text.Rows._fields}
    arrays["numbers"] = np.asarray([size, squeezed, end])
    arrays["fingerprint"] = np.asarray(text.fingerprint([piece for document in (*train, *held_out) for piece in document.pieces]))
    return arrays, own


def _documents(config: Config, tokenizer: Any) -> tuple[list[text.Document], list[text.Document]]:
    limit = config.text.max_documents or None
    if not config.text.path:
        train = [text.Document((t,), (True,)) for package in config.text.packages for t in text.docstrings(package)[:limit]]
        return train, [text.Document((t,), (True,)) for t in text.docstrings(config.text.held_out)[:limit]]
    render = None if tokenizer is None or not tokenizer.chat_template else functools.partial(text.render_chat, tokenizer)
    documents = text.read_documents(Path(config.text.path), render)[:limit]
    return text.hold_out(documents, config.text.held_out_share, f"text.path {config.text.path}")


def run(config: Config, session: Session) -> report.Results:
    """Trains `num_seeds` models and reports on them."""
    mesh = training.make_mesh(config.mesh)
    base, tokenizer = _load(config, session, mesh) if config.model.weights else (None, None)
    corpus = prepare(config, session, tokenizer)
    net = network(config, corpus.vocab_size, base)
    evaluate = _evaluator(net, corpus, mesh)
    found: list[dict[str, Any]] = []
    optimizer = _optimizer(config)
    for seed in range(config.num_seeds):
        settings = dataclasses.replace(config.train, seed=config.train.seed + seed)
        name = f"seed{settings.seed}"
        batches = training.TimedBatches(text.batches(corpus.train, config.train.batch_size, settings.seed), config.train.log_every)
        state = training.fit(
            loss_fn(net),
            net.init,
            batches,
            optimizer,
            settings,
            mesh=mesh,
            rules=net.rules,
            session=session,
            name=name,
            evaluate=lambda state: {"held_out": evaluate(training.ema_or_params(state))},
            frozen=net.frozen,
        )
        trained = training.ema_or_params(state)
        measure = functools.partial(_measure, config, net, corpus, evaluate, trained, mesh, first=seed == 0)
        steps_per_second = batches.rate()
        found.append(session.memo(f"lm-{name}", lambda: measure() | {"steps_per_second": steps_per_second}))  # noqa: B023
        adapters = jax.tree.map(sharding.fetch, trained) if config.lora.rank else None
        if adapters is not None and session.is_main:
            lora.save_peft(session.workdir / f"adapter-{name}", net.config, adapters, alpha=config.lora.alpha, base=config.model.weights)
    return _results(config, net, corpus, found, session)


def _load(config: Config, session: Session, mesh: Any) -> tuple[tuple[transformer.TransformerConfig, Any], Any]:
    session.say(f"lm: loading {config.model.weights}")
    model = decoders.load(config.model.weights, mesh, "model.weights")
    if model.tokenizer is None:
        raise UserError(f"model.weights: {config.model.weights} has no tokenizer; put its tokenizer.json beside the weights")
    return (model.config, model.params), model.tokenizer


def _evaluator(net: Network, corpus: Corpus, mesh: Any) -> Callable[[Any], float]:
    """Trained tree -> nats per counted token over at most 128 held-out rows."""
    rows = text.Rows(*(x[:_EVAL_ROWS] for x in corpus.held_out))
    loss = jax.jit(loss_fn(net))

    def evaluate(trained: Any) -> float:
        total = weight = 0.0
        with jax.set_mesh(mesh):
            for batch in text.in_order(rows, max(mesh.shape.get("data", 1), 8)):
                value, info = loss(trained, decoders.place_rows(batch, mesh), jax.random.key(0), net.frozen)
                total += float(value) * float(info["weight"])
                weight += float(info["weight"])
        return total / max(weight, 1.0)

    return evaluate


def _measure(
    config: Config, net: Network, corpus: Corpus, evaluate: Callable[[Any], float], trained: Any, mesh: Any, *, first: bool
) -> dict[str, Any]:
    nats = evaluate(trained)
    counted = int(corpus.held_out.mask.sum())
    found: dict[str, Any] = {"held_out": nats, "bits_per_byte": nats * counted / math.log(2) / corpus.held_out_bytes}
    if first:
        with jax.set_mesh(mesh):
            found["samples"] = _samples(config, net, corpus, net.params_of(trained, net.frozen))
    return found


def _samples(config: Config, net: Network, corpus: Corpus, params: Any) -> list[list[str]]:
    """Continuations of the first held-out beginnings: (prompt, continuation)."""
    prompt = 16
    starts = [(row, 0) for row in range(len(corpus.held_out.tokens)) if corpus.held_out.segment_ids[row, :prompt].min() == 1]
    prompts = np.stack([corpus.held_out.tokens[row, :prompt] for row, _ in starts[: config.num_samples]])
    cache = transformer.init_cache(net.config, len(prompts), prompt + config.sample_tokens)
    generate = functools.partial(
        sampling.generate,
        transformer.decode_fn(net.config),
        sampling=sampling.SamplingParams(temperature=0.8, top_p=0.95),
        max_new_tokens=config.sample_tokens,
        stop_tokens=[corpus.end],
    )
    done = jax.jit(generate)(params, jax.random.key(0), cache, prompts, np.full(len(prompts), prompt))
    tokens, lengths = np.asarray(sharding.fetch(done.tokens)), np.asarray(sharding.fetch(done.num_tokens))
    return [[corpus.decode(list(map(int, p[1:]))), corpus.decode(list(map(int, t[:n])))] for p, t, n in zip(prompts, tokens, lengths)]


def _entropies(corpus: Corpus) -> dict[str, float]:
    """Nats per held-out token of two models that count: unigrams, and bigrams backed off to them; both smoothed, from the training rows."""
    size = corpus.vocab_size
    pairs: Counter[tuple[int, int]] = Counter()
    unigrams = np.ones(size)
    for tokens, mask in zip(corpus.train.tokens, corpus.train.mask):
        places = np.flatnonzero(mask)
        np.add.at(unigrams, tokens[places], 1)
        pairs.update(zip(tokens[places - 1].tolist(), tokens[places].tolist()))
    unigram = unigrams / unigrams.sum()
    followers: Counter[int] = Counter()
    kinds: Counter[int] = Counter()
    for (first, _), count in pairs.items():
        followers[first] += count
        kinds[first] += 1
    total = {"unigram": 0.0, "bigram": 0.0}
    counted = 0
    for tokens, mask in zip(corpus.held_out.tokens[:_EVAL_ROWS], corpus.held_out.mask[:_EVAL_ROWS]):
        for place in np.flatnonzero(mask):
            first, second = int(tokens[place - 1]), int(tokens[place])
            back = unigram[second]
            # Witten-Bell: the share of the lower order is the number of different followers
            bigram = (pairs[first, second] + kinds[first] * back) / (followers[first] + kinds[first]) if followers[first] else back
            total["unigram"] -= math.log(back)
            total["bigram"] -= math.log(bigram)
            counted += 1
    return {name: value / max(counted, 1) for name, value in total.items()}


def _results(config: Config, net: Network, corpus: Corpus, found: Sequence[Mapping[str, Any]], session: Session) -> report.Results:
    counts = session.memo("lm-counts", lambda: _entropies(corpus))
    held_out, bits = (mean_interval([one[name] for one in found]) for name in ("held_out", "bits_per_byte"))
    squeezed = 8 * corpus.compressed_bytes / max(corpus.held_out_bytes, 1)
    interval = held_out.half_width if held_out.count > 1 else None
    claims = [
        report.Claim(
            id="lm-1",
            claim="held-out text is predicted better than by counting token pairs (nats per token; the count's beside it)",
            paper=counts["bigram"],
            ours=held_out.value,
            interval=interval,
            seeds=held_out.count,
            verdict="holds" if held_out.value + (interval or 0) < counts["bigram"] else "does not hold",
            note=f"not a paper's number but a Witten-Bell bigram model of the same rows; unigrams give {counts['unigram']:.3f}",
        ),
    ]
    rows = read_rows(session.workdir / "metrics.jsonl")
    figures = [_curve(config, rows, counts["bigram"], session)]
    rates = [one["steps_per_second"] for one in found if one["steps_per_second"]]
    speed = float(np.median(rates)) * config.train.batch_size * config.text.sequence_length if rates else None
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0))))
    tables = [
        report.Table(
            title="Run",
            columns=["what", "value"],
            rows=[
                ["trained parameters", f"{size:,}"],
                ["text", f"{corpus.fingerprint}, {len(corpus.train.tokens)} rows of {config.text.sequence_length} tokens to train on"],
                ["share of row positions that count", f"{corpus.train.mask.mean():.3f}"],
                ["held-out rows evaluated", min(_EVAL_ROWS, len(corpus.held_out.tokens))],
                [
                    "bits per byte of held-out text",
                    report.format_interval(bits.value, bits.half_width) if bits.count > 1 else f"{bits.value:.3f}",
                ],
                ["the same of xz -9, which sees all of that text at once and nothing else", f"{squeezed:.3f}"],
                ["tokens per second in training", "not measured" if speed is None else f"{speed:,.0f}"],
                ["devices", jax.device_count()],
            ],
        ),
        report.Table(
            title="Samples",
            columns=["beginning (held out)", "continuation (temperature .8, top-p .95)"],
            rows=[[prompt, continuation] for prompt, continuation in found[0]["samples"]],
        ),
    ]
    return report.Results(
        title="Language model",
        intro=(
            "A decoder trained on packed text: documents share rows and never see each other, the loss is the mean negative log-likelihood "
            "per token, and whole packages (or documents) are held out."
        ),
        claims=claims,
        figures=figures,
        tables=tables,
    )


def _curve(config: Config, rows: Sequence[Mapping[str, Any]], bigram: float, session: Session) -> report.Figure:
    path = session.figure_path("loss.png")
    if session.is_main:
        curves: dict[str, tuple[list[float], list[float]]] = {}
        for row in rows:
            for name, label in (("loss", "training"), ("held_out", "held out")):
                if name in row and row.get("run", "").startswith("seed"):
                    xs, ys = curves.setdefault(f"{label}, {row['run']}", ([], []))
                    xs.append(row["step"])
                    ys.append(row[name])
        plots.lines(path, curves, xlabel="step", ylabel="nats per token", reference={"bigrams": bigram})
    caption = f"Loss over {config.train.num_steps} steps of {config.train.batch_size} x {config.text.sequence_length} tokens."
    return report.Figure(path="figures/loss.png", caption=caption, alt="training and held-out loss over steps, one curve per seed")


def programs(config: Config, devices: Any) -> Iterable[aot.Program]:
    """The training step of the configured shape, and prefill and decode with a cache, each sharded over the configured mesh."""
    mesh = training.make_mesh(config.mesh, devices)
    net = network(config)
    label = config.model.shape
    if "train" in config.programs:
        size = (config.train.batch_size, config.text.sequence_length)
        batch = {
            "tokens": jax.ShapeDtypeStruct(size, jnp.int32),
            "segment_ids": jax.ShapeDtypeStruct(size, jnp.int32),
            "mask": jax.ShapeDtypeStruct(size, jnp.bool_),
        }
        name = f"training step ({label}, {size[0]} x {size[1]} tokens)"
        yield training.train_program(name, loss_fn(net), net.init, batch, _optimizer(config), config.train, mesh=mesh, rules=net.rules)
    serve = config.serve
    shape = dataclasses.replace(net.config, remat="none", attention="flash")  # queries in chunks: no [t s] matrix of a whole prompt
    params = jax.eval_shape(lambda key: _half(transformer.init(shape, key)), jax.random.key(0))
    where = sharding.shardings(params, transformer.SHARDING_RULES, mesh)
    cache = jax.eval_shape(lambda: transformer.init_cache(shape, serve.batch_size, serve.cache_length))
    cache_where = sharding.shardings(cache._asdict(), transformer.CACHE_RULES, mesh)
    cache_where = sampling.Cache(**cache_where)
    rows = jax.sharding.NamedSharding(mesh, sharding.batch_spec(mesh))
    for name, length in (("prefill", serve.prompt_length), ("decode", 1)):
        if name in config.programs:
            tokens = jax.ShapeDtypeStruct((serve.batch_size, length), jnp.int32)
            yield aot.Program(
                f"{name} ({label}, {serve.batch_size} x {length} tokens, cache of {serve.cache_length})",
                functools.partial(transformer.decode, shape),
                (params, cache, tokens),
                in_shardings=(where, cache_where, rows),
                out_shardings=(rows, cache_where),
                donate_argnums=(1,),
            )


def _half(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
