"""Using a language model from the command line: `janax generate`, `janax score`, `janax chat`.

One engine for all three: loaded once, compiled for few shapes (token counts are padded to multiples of 64), keys and values kept from turn to
turn, so that a chat reads only what is new.
"""

import collections
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from janax.experiments.config import check
from janax.experiments.errors import UserError

__all__ = ["ChatOptions", "Engine", "GenerateOptions", "ScoreOptions", "chat", "generate", "score"]

_BUCKET = 64
_PIECE = 8  # tokens between two looks at the text

Model = Annotated[str, tyro.conf.arg(metavar="NAME|DIR")]


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """What the commands that write have in common."""

    model: Model = "smollm2"
    """`smollm2` (after `janax fetch smollm2`), or a directory in Hugging Face layout."""
    max_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.7
    """0 always takes the most probable token."""
    top_p: float = 0.95
    """Smallest set of tokens with this much probability; 1 for all."""
    top_k: int = 0
    """That many most probable tokens; 0 for all."""
    min_p: float = 0.0
    """Tokens with at least this share of the most probable one's probability."""
    stop: tuple[str, ...] = ()
    """Strings at which to stop."""
    seed: int = 0
    """The same seed gives the same text."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in."""

    def __post_init__(self) -> None:
        check(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens, "256")
        check(self.temperature >= 0, "temperature", "at least 0", self.temperature, "0.7")
        check(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p, "0.95")
        check(self.top_k >= 0, "top_k", "at least 0", self.top_k, "0")
        check(0 <= self.min_p < 1, "min_p", "in [0, 1)", self.min_p, "0.05")
        check(all(self.stop), "stop", "strings that are not empty", self.stop, "'.'")


@dataclasses.dataclass(frozen=True)
class GenerateOptions(_Sampling):
    """Continues a prompt."""

    prompt: str = "-"
    """The text to continue; - reads standard input."""
    chat: bool = False
    """The prompt is a question, put into the model's chat template."""
    num_samples: int = 1
    """Continuations; one is shown as it is written, several when all are done."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_samples >= 1, "num_samples", "at least 1", self.num_samples, "4")


@dataclasses.dataclass(frozen=True)
class ChatOptions(_Sampling):
    """A conversation in the terminal."""

    system: str = ""
    """A system message instead of the template's own."""
    context: int = 2048
    """Tokens that the conversation may have in all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.context >= 128, "context", "at least 128", self.context, "2048")


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """Log-probabilities of texts after a context."""

    model: Model = "smollm2"
    """`smollm2` (after `janax fetch smollm2`), or a directory in Hugging Face layout."""
    context: str = ""
    """What stands before every target; read by the model once. Empty: the model's token for the beginning or end of a text."""
    target: tuple[str, ...] = ()
    """Texts to score; a leading space belongs to the target."""
    file: Path | None = None
    """A .jsonl file of lines with "context" and "target", instead of the two options above."""
    json: bool = False
    """One JSON object a line instead of a table."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in."""

    def __post_init__(self) -> None:
        check(bool(self.target) != (self.file is not None), "target", "texts, or a --file, and not both", self.target, "' Paris.'")


class Engine:
    """A loaded model with its compiled functions.

    Args:
      name: A name or directory for `loading.load`.
      dtype: Compute dtype.
    """

    def __init__(self, name: str, dtype: str):
        import jax

        from janax.models import cache, loading, transformer

        # Compiled programs are kept beside the weights: the same command starts at once the next time.
        jax.config.update("jax_compilation_cache_dir", str(cache.directory() / "compiled"))
        try:
            model = loading.load(name)
        except ValueError as error:
            raise UserError(f"--model {name}: {error}") from error
        if model.tokenizer is None:
            raise UserError(f"--model {name} has no tokenizer; put its tokenizer.json beside the weights")
        self.config = dataclasses.replace(model.config, dtype=dtype)
        # On CPU a loop over separate layers is faster than a scan, which copies every layer's weights.
        self.params = transformer.unstack_layers(model.params) if jax.default_backend() == "cpu" else model.params
        self.tokenizer: Any = model.tokenizer
        self.stop_tokens = list(model.stop_tokens)
        self._score = jax.jit(functools.partial(_scores, self.config))
        self._init, self._advance = None, None

    def encode(self, text: str) -> list[int]:
        """Token ids without special ones; a text that spells a special token gets it."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens without special ones."""
        return self.tokenizer.decode(list(map(int, tokens)), skip_special_tokens=True)

    def messages(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation in the model's template, up to where the assistant speaks."""
        if not self.tokenizer.chat_template:
            raise UserError("this model has no chat template; use janax generate without --chat")
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.encode(text)

    def beginning(self) -> list[int]:
        """The token that stands before a text that nothing precedes."""
        token = self.tokenizer.bos_token_id
        token = self.tokenizer.eos_token_id if token is None else token
        if token is None:
            raise UserError("this model has neither a beginning nor an end token; give a --context")
        return [token]

    def start(self, options: _Sampling, cache: Any, tokens: Sequence[int], num_samples: int, turn: int) -> Any:
        """Prefills and draws the first token: a `sampling.DecodeState`."""
        import jax
        import numpy as np

        from janax.jaxlib_ext import sampling
        from janax.models import transformer

        padded = np.zeros((1, _padded(len(tokens))), np.int32)
        padded[0, : len(tokens)] = tokens
        if self._init is None:
            begin = functools.partial(sampling.init, transformer.decode_fn(self.config), stop_tokens=self.stop_tokens)
            self._init = jax.jit(begin, static_argnames=("max_new_tokens", "num_samples"))
            self._advance = jax.jit(
                functools.partial(sampling.advance, transformer.decode_fn(self.config), num_steps=_PIECE), donate_argnums=1
            )
        params = sampling.SamplingParams(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p)
        key = jax.random.fold_in(jax.random.key(options.seed), turn)
        lengths = np.array([len(tokens)], np.int32)
        return self._init(
            self.params, key, cache, padded, lengths, sampling=params, max_new_tokens=options.max_tokens, num_samples=num_samples
        )

    def score(self, context: Sequence[int], targets: Sequence[Sequence[int]]) -> list[float]:
        """log P(target | context) of every target, in nats; the context is read once and shared."""
        import numpy as np

        longest = max(map(len, targets))
        if len(context) + longest > self.config.max_length:
            raise UserError(
                f"context and target have {len(context) + longest} tokens, and this model was made for {self.config.max_length}; shorten them"
            )
        *before, last = context
        prefix = np.zeros((1, _padded(max(len(before), 1))), np.int32)
        prefix[0, : len(before)] = before
        shape = (len(targets), _padded(longest))
        tokens, wanted, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, target in enumerate(targets):
            tokens[row, : len(target)] = [last, *target[:-1]]
            wanted[row, : len(target)], weights[row, : len(target)] = target, 1
        sums = self._score(self.params, prefix, np.array([len(before)], np.int32), tokens, wanted, weights)
        return np.asarray(sums).tolist()

    def stream(self, options: _Sampling, state: Any) -> Iterator[Any]:
        """The state after every few tokens, until all rows are done."""
        from janax.jaxlib_ext import sampling

        assert self._advance is not None, "start comes first"
        stop = sampling.stop_strings(self.decode, options.stop) if options.stop else None
        return sampling.stream(functools.partial(self._advance, self.params), state, stop_fn=stop)

    def text_of(self, state: Any, row: int, stop: Sequence[str]) -> str:
        """What a row has said, cut before a stop string."""
        import numpy as np

        text = self.decode(np.asarray(state.tokens)[row, : int(state.num_tokens[row])].tolist())
        cuts = [text.index(string) for string in stop if string in text]
        return text[: min(cuts)] if cuts else text


def _padded(count: int) -> int:
    return -(-count // _BUCKET) * _BUCKET


def _scores(config: Any, params: Any, prefix_tokens: Any, prefix_length: Any, tokens: Any, targets: Any, weights: Any) -> Any:
    """[b] sums over the rows of `targets`, each predicted by the row of `tokens` behind the one prefix."""
    from janax.jaxlib_ext import fused, sampling
    from janax.models import transformer

    _, prefix = transformer.extend(config, params, transformer.init_cache(config, *prefix_tokens.shape), prefix_tokens, prefix_length)
    own = sampling.branch(prefix, num_branches=tokens.shape[0], capacity=tokens.shape[1])
    h, _ = transformer.extend(config, params, own, tokens, prefix=prefix)
    w = transformer.output_embedding(config, params)
    values = fused.token_log_probs(h, w, targets, softcap=config.final_softcap, transposed=True)
    return (values * weights).sum(axis=1)


def _print_stream(engine: Engine, options: _Sampling, state: Any, write: Callable[[str], None]) -> tuple[Any, str]:
    """Writes what is certain as it comes: an incomplete character, or the possible beginning of a stop string, waits."""
    shown, text = 0, ""
    longest = max((len(string) for string in options.stop), default=1) - 1
    latest = state
    for latest in engine.stream(options, state):
        text = engine.text_of(latest, 0, options.stop)
        finished = bool(latest.done[0])
        safe = len(text) if finished else len(text.rstrip("�")) - longest
        if safe > shown:
            write(text[shown:safe])
            shown = safe
    return latest, text


def _capacity(engine: Engine, wanted: int) -> int:
    limit = engine.config.max_length
    capacity = _padded(wanted)
    if capacity > limit and wanted > limit:
        raise UserError(f"prompt and answer need {wanted} tokens, and this model was made for {limit}; shorten the prompt or --max-tokens")
    return min(capacity, limit) if engine.config.positions == "learned" else capacity


def generate(options: GenerateOptions) -> None:
    """`janax generate`."""
    from janax.models import transformer

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    engine = Engine(options.model, options.dtype)
    tokens = engine.messages([{"role": "user", "content": prompt}]) if options.chat else engine.encode(prompt)
    tokens = tokens or engine.beginning()
    padded = _padded(len(tokens))
    several = options.num_samples > 1
    cache = transformer.init_cache(engine.config, 1, _capacity(engine, padded + (0 if several else options.max_tokens)))
    state = engine.start(options, cache, tokens, options.num_samples, 0)
    start = time.perf_counter()
    if several:
        state = collections.deque(engine.stream(options, state), maxlen=1)[0]
        for row in range(options.num_samples):
            print(f"--- {row + 1} of {options.num_samples}\n{engine.text_of(state, row, options.stop)}")
    else:
        if not options.chat:
            print(prompt, end="", flush=True)
        state, _ = _print_stream(engine, options, state, lambda text: print(text, end="", flush=True))
        print()
    count, seconds = int(state.num_tokens.sum()), time.perf_counter() - start
    print(f"janax: {count} tokens, {count / max(seconds, 1e-9):.1f} a second with compiling", file=sys.stderr)


def chat(options: ChatOptions) -> None:
    """`janax chat`: one line a turn; an empty line or the end of the input leaves."""
    from janax.models import transformer

    engine = Engine(options.model, options.dtype)
    cache = transformer.init_cache(engine.config, 1, _capacity(engine, options.context))
    capacity = cache.k.shape[2]
    messages = [{"role": "system", "content": options.system}] if options.system else []
    held: list[int] = []  # the tokens whose keys and values the cache holds
    interactive = sys.stdin.isatty()
    print(f"janax: chatting with {options.model}; an empty line ends", file=sys.stderr)
    for turn in range(1 << 30):
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line.strip():
            return
        messages.append({"role": "user", "content": line})
        tokens = engine.messages(messages)
        same = next((i for i, (a, b) in enumerate(zip(held, tokens)) if a != b), min(len(held), len(tokens)))
        same = min(same, len(tokens) - 1)  # something has to be read
        fresh = tokens[same:]
        room = capacity - same - _padded(len(fresh))
        if room < options.max_tokens:
            raise UserError(f"the conversation has outgrown --context {options.context}; start anew or give a larger one")
        cache = cache._replace(length=cache.length.at[0].set(same))
        state = engine.start(options, cache, fresh, 1, turn)
        state, answer = _print_stream(engine, options, state, lambda text: print(text, end="", flush=True))
        print(flush=True)
        cache = state.cache
        said = [int(token) for token in state.tokens[0, : int(state.num_tokens[0])]]
        held = (tokens + said)[: int(cache.length[0])]
        messages.append({"role": "assistant", "content": answer})


def score(options: ScoreOptions) -> None:
    """`janax score`: sums and means of log-probabilities, in nats."""
    pairs = [(options.context, target) for target in options.target] if options.file is None else _pairs(options.file)
    engine = Engine(options.model, options.dtype)
    groups: dict[str, list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        groups.setdefault(context, []).append(index)
    scores: dict[int, tuple[float, int]] = {}
    for context, indices in groups.items():
        targets = [engine.encode(pairs[index][1]) for index in indices]
        for index, target in zip(indices, targets):
            if not target:
                raise UserError(f"target {pairs[index][1]!r} has no tokens; give a text that is not empty")
        sums = engine.score(engine.encode(context) or engine.beginning(), targets)
        scores.update(zip(indices, zip(sums, map(len, targets))))
    for index, (context, target) in enumerate(pairs):
        total, count = scores[index]
        record = {"context": context, "target": target, "sum": total, "mean": total / count, "tokens": count}
        if options.json:
            print(json.dumps(record, ensure_ascii=False))
        elif index == 0:
            print(f"{'sum':>10} {'mean':>9} {'tokens':>6}  target (log-probabilities in nats)")
        if not options.json:
            print(f"{total:10.3f} {total / count:9.4f} {count:6d}  {target!r}")


def _pairs(file: Path) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {file} cannot be read: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
                pairs.append((str(record.get("context", "")), record["target"]))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f'{file}:{number} is not a JSON object with "target" and perhaps "context"') from error
    if not pairs:
        raise UserError(f"--file {file} has no lines to score")
    return pairs
