"""Configuration of the language-model experiment and its presets. Importing it loads neither JAX nor NumPy."""

import dataclasses
from typing import Literal

from janax.experiments.config import LoraConfig, MeshConfig, OptimizerConfig, TrainConfig, check

__all__ = ["DEFAULT", "PAPER", "PRESETS", "SMOKE", "Config", "LoraConfig", "ModelConfig", "ServeConfig", "TextConfig"]

Package = Literal["flax", "jax", "matplotlib", "numpy", "optax", "orbax", "sklearn"]
Shape = Literal["small", "smollm2-135m", "qwen2.5-7b", "llama-3.1-8b"]
Program = Literal["train", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """What is read, and how it becomes rows of tokens."""

    path: str = ""
    """A .txt or .jsonl file, or a directory of them; empty for the docstrings of installed packages. A .jsonl line holds "text", or
    "prompt" and "completion", or chat "messages": of the last two only what the model has to write is trained on."""
    packages: tuple[Package, ...] = ("flax", "jax", "matplotlib", "numpy", "orbax", "sklearn")
    """Packages whose docstrings are read where no path is given."""
    held_out: Package = "optax"
    """The package whose docstrings are kept for evaluation."""
    held_out_share: float = 0.05
    """Share of the documents of `path` kept for evaluation."""
    vocab_size: int = 4096
    """Size of the byte-level BPE vocabulary trained on the text; a model's own tokenizer is used where weights are loaded."""
    sequence_length: int = 128
    """Tokens per row; documents are packed into rows and never see each other."""
    max_documents: int = 0
    """Read at most this many documents; 0 for all."""

    def __post_init__(self) -> None:
        check(self.sequence_length >= 8, "text.sequence_length", "at least 8", self.sequence_length, "128")
        check(self.vocab_size >= 300, "text.vocab_size", "at least 300: 256 bytes, special tokens and merges", self.vocab_size, "4096")
        check(0 < self.held_out_share < 1, "text.held_out_share", "in (0, 1)", self.held_out_share, "0.05")
        check(self.held_out not in self.packages, "text.held_out", "a package that is not trained on", self.held_out, "optax")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder."""

    shape: Shape = "small"
    """A published architecture, or a small one for a laptop; ignored where `weights` says it."""
    weights: str = ""
    """Where to start: `smollm2`, or a directory in Hugging Face layout; empty for random weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again instead of keeping it."""
    attention: Literal["xla", "flash"] = "xla"
    """All queries at once, or a few at a time: by a kernel on accelerators. The second for long texts."""


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Prefill and decode, for `janax compile`."""

    batch_size: int = 64
    """Rows that decode together."""
    cache_length: int = 8192
    """Positions of the cache."""
    prompt_length: int = 1024
    """Tokens of the prompts that are prefilled together."""

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "serve.batch_size", "at least 1", self.batch_size, "64")
        check(
            1 <= self.prompt_length <= self.cache_length,
            "serve.prompt_length",
            "between 1 and serve.cache_length",
            self.prompt_length,
            "512",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Training and using a decoder language model."""

    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    """Text and tokens."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """Network."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Adapters."""
    serve: ServeConfig = dataclasses.field(default_factory=ServeConfig)
    """Inference programs."""
    num_seeds: int = 2
    """Training runs, each with its own seed."""
    num_samples: int = 4
    """Continuations shown in the report."""
    sample_tokens: int = 96
    """Their length."""
    programs: tuple[Program, ...] = ("train",)
    """What `janax compile lm` compiles."""
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(num_steps=400, batch_size=16, checkpoint_every=100, log_every=10)
    )
    """Length, batch, checkpoints."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(name="adamw", learning_rate=2e-3, warmup_steps=40, clip_norm=1.0)
    )
    """AdamW; norms, biases and embeddings of positions do not decay."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Devices."""

    def __post_init__(self) -> None:
        check(self.num_seeds >= 1, "num_seeds", "at least 1", self.num_seeds, "2")
        check(self.num_samples >= 1, "num_samples", "at least 1", self.num_samples, "4")
        check(self.sample_tokens >= 1, "sample_tokens", "at least 1", self.sample_tokens, "96")
        check(bool(self.programs), "programs", "one program or more", self.programs, "train")


DEFAULT = Config()

SMOKE = Config(
    text=TextConfig(packages=("numpy",), max_documents=400, vocab_size=1024, sequence_length=64),
    num_seeds=1,
    num_samples=2,
    sample_tokens=24,
    train=TrainConfig(num_steps=30, batch_size=8, checkpoint_every=15, log_every=5),
    optimizer=OptimizerConfig(name="adamw", learning_rate=3e-3, warmup_steps=5, clip_norm=1.0),
)

PAPER = Config(
    text=TextConfig(sequence_length=4096),
    model=ModelConfig(shape="qwen2.5-7b", dtype="bfloat16", remat="full", attention="flash"),
    num_seeds=1,
    train=TrainConfig(num_steps=2000, batch_size=64, checkpoint_every=250, log_every=10),
    optimizer=OptimizerConfig(name="adamw", learning_rate=1e-5, warmup_steps=100, clip_norm=1.0),
    mesh=MeshConfig(data=-1, model=4),
)

PRESETS = {"smoke": SMOKE, "default": DEFAULT, "paper": PAPER}
