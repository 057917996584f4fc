"""Options of `janax distill`. Importing this module loads neither JAX nor NumPy."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from janax.experiments.config import LoraConfig, MeshConfig, OptimizerConfig, TrainConfig, check

__all__ = ["Config", "Options"]

Model = Annotated[str, tyro.conf.arg(metavar="NAME|DIR")]
Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "js",
    "jeffreys",
    "skew_kl",
    "skew_reverse_kl",
    "alpha_divergence",
    "renyi",
    "total_variation",
    "squared_hellinger",
    "adaptive_kl",
    "chi2_forward",
    "chi2_reverse",
]

_TAKES_ALPHA = ("skew_kl", "skew_reverse_kl", "alpha_divergence", "renyi")
_NEEDS_ALPHA = ("alpha_divergence", "renyi")


@dataclasses.dataclass(frozen=True)
class Config:
    """All that the result depends on."""

    teacher: Model
    """`smollm2` (after `janax fetch smollm2`), or a directory in Hugging Face layout. It is never trained."""
    student: Model
    """Where the student starts: the same, with the teacher's vocabulary; other widths and depths are fine."""
    data: Path
    """A .jsonl file whose lines hold "text", or "prompt" and "completion", or chat "messages": of the last two only what the model has to
    write counts."""
    divergence: Divergence = "forward_kl"
    """Between teacher and student, at every token. forward_kl covers all that the teacher does, reverse_kl avoids what it does not do."""
    alpha: float | None = None
    """Of skew_kl and skew_reverse_kl (0.1 if none is given), alpha_divergence and renyi (which need one)."""
    beta: float | None = None
    """Of js: the teacher's weight, in (0, 1); 0.5 if none is given."""
    temperature: float = 1.0
    """Divides the logits of both."""
    tau_squared: bool = False
    """Multiply the divergence by the square of the temperature, which keeps the size of its gradients."""
    label_weight: float = 0.0
    """Weight of the cross-entropy with the data's own tokens, which is added."""
    on_policy_share: float = 0.0
    """Share of the batches whose completions the student samples itself, of the data's prompts: 1 is on-policy (GKD, arXiv:2306.13649)."""
    max_new_tokens: int = 64
    """Longest completion that is sampled."""
    sampling_temperature: float = 1.0
    """Of the student's samples."""
    sequence_length: int = 256
    """Tokens per row; texts are packed into rows and never see each other."""
    held_out_share: float = 0.05
    """Share of the lines that is kept for evaluation."""
    held_out_rows: int = 32
    """Rows that are evaluated, at most."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What both networks compute in."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the student's backward pass computes again instead of keeping it."""
    attention: Literal["xla", "flash"] = "xla"
    """All queries at once, or a few at a time: by a kernel on accelerators. The second for long rows."""
    merge: bool = True
    """With adapters: also save the student with the adapters merged into it, in OUT/merged."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Adapters."""
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(num_steps=200, batch_size=8, checkpoint_every=50, log_every=10)
    )
    """Length, batch, checkpoints."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4, warmup_steps=10))
    """AdamW; norms, biases and embeddings of positions do not decay."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Devices."""

    def __post_init__(self) -> None:
        kind = self.divergence
        check(kind not in _NEEDS_ALPHA or self.alpha is not None, "alpha", f"a number with divergence {kind}", self.alpha, "--alpha 0.5")
        check(
            kind in _TAKES_ALPHA or self.alpha is None,
            "alpha",
            f"left out with divergence {kind}",
            self.alpha,
            f"one of {', '.join(_TAKES_ALPHA)}",
        )
        check(kind == "js" or self.beta is None, "beta", f"left out with divergence {kind}", self.beta, "--divergence js")
        if self.alpha is not None:
            check(not kind.startswith("skew") or 0 <= self.alpha < 1, "alpha", f"in [0, 1) with divergence {kind}", self.alpha, "0.1")
            check(kind != "renyi" or self.alpha > 0, "alpha", "positive with divergence renyi", self.alpha, "0.5")
        check(self.beta is None or 0 < self.beta < 1, "beta", "in (0, 1)", self.beta, "0.5, or --divergence forward_kl or reverse_kl")
        check(self.temperature > 0, "temperature", "positive", self.temperature, "1.0")
        check(self.label_weight >= 0, "label_weight", "at least 0", self.label_weight, "0.5")
        check(0 <= self.on_policy_share <= 1, "on_policy_share", "between 0 and 1", self.on_policy_share, "0.5")
        check(self.sampling_temperature >= 0, "sampling_temperature", "at least 0", self.sampling_temperature, "1.0")
        check(self.sequence_length >= 8, "sequence_length", "at least 8", self.sequence_length, "256")
        check(self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens, "64")
        check(
            self.on_policy_share == 0 or self.max_new_tokens < self.sequence_length,
            "max_new_tokens",
            f"below sequence_length ({self.sequence_length}), as a row holds prompt and completion",
            self.max_new_tokens,
            str(self.sequence_length // 2),
        )
        check(0 < self.held_out_share < 1, "held_out_share", "in (0, 1)", self.held_out_share, "0.05")
        check(self.held_out_rows >= 1, "held_out_rows", "at least 1", self.held_out_rows, "32")


@dataclasses.dataclass(frozen=True)
class Options:
    """Teaches a student language model what a teacher predicts at every token. The same command resumes what was interrupted."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    """What is done."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Where the student goes, in Hugging Face layout (with --lora.rank: the adapters, in PEFT layout), with report and run/."""
    distributed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """This is one of several processes, all started with the same command; they share the directory."""
