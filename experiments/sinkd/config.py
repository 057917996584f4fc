"""Configuration of the SinKD study and its presets. Importing it loads neither JAX nor NumPy."""

import dataclasses
from typing import Literal, get_args

from janax.experiments.config import MeshConfig, OptimizerConfig, TrainConfig, check

__all__ = [
    "DEFAULT",
    "PAPER",
    "PRESETS",
    "SMOKE",
    "AblationsConfig",
    "CheckpointsConfig",
    "Config",
    "DigitsConfig",
    "LanguageConfig",
    "ObjectiveConfig",
    "TextConfig",
]

Section = Literal["analyses", "digits", "ablations", "text", "language", "checkpoints"]
Analysis = Literal["moving apart", "modes", "lost class", "sets", "saturation", "sizes"]
Loss = Literal["KD", "RKL", "JS", "AKL", "skew KL", "TVD", "paired L1", "SinKD", "debiased"]
Package = Literal["flax", "jax", "matplotlib", "numpy", "optax", "orbax", "sklearn"]
Network = Literal["encoder", "decoder"]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The constants of (1 - alpha) CE + alpha D + w X; the defaults are the official script's for SST-2."""

    alpha: float = 0.9
    """Weight of the distillation loss D; the labels have 1 - alpha."""
    temperature: float = 2.0
    """Divides both logits in D."""
    weight: float = 0.0008
    """The paper's weight of the Sinkhorn term, which is a sum over the rows of a batch (beta times w of the official code)."""
    transport_temperature: float = 2.0
    """Divides both logits in the Sinkhorn term and in the paired L1."""
    epsilon: float = 0.1
    """Entropy weight of the transport."""
    num_iters: int = 20
    """Sinkhorn iterations."""

    def __post_init__(self) -> None:
        check(0 <= self.alpha <= 1, "objective.alpha", "in [0, 1]", self.alpha, "0.9")
        for name in ("temperature", "weight", "transport_temperature", "epsilon"):
            check(getattr(self, name) > 0, f"objective.{name}", "above 0", getattr(self, name), str(getattr(type(self), name)))
        check(self.num_iters >= 1, "objective.num_iters", "at least 1", self.num_iters, "20")


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
    """Distillation on scikit-learn's digits: a teacher with one hidden layer, students with a smaller one and few images."""

    losses: tuple[Loss, ...] = get_args(Loss)
    """What to compare; KD and SinKD (with its anchored form) among them."""
    num_train: int = 200
    """Images that a student sees, drawn anew for every seed."""
    batch_size: int = 32
    """Rows of a batch: the points of the transport problem."""
    num_steps: int = 600
    """Steps of a student."""
    teacher_steps: int = 1500
    """Steps of the teacher, on all training images."""
    hidden: int = 12
    """Hidden units of a student."""
    teacher_hidden: int = 128
    """Hidden units of the teacher."""
    learning_rate: float = 3e-3
    """Adam's, for both."""
    num_seeds: int = 24
    """Students of each loss; they are trained in one vectorised call."""
    weights: tuple[float, ...] = (0.0008, 0.01, 0.05)
    """Weights of the term beside KD, as sums over rows, among which the validation images choose."""
    anchors: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """Anchors of the anchored loss alone; 1 is used beside other terms."""

    def __post_init__(self) -> None:
        check({"KD", "SinKD"} <= set(self.losses), "digits.losses", "a list with KD and SinKD", self.losses, "KD JS SinKD")
        check(40 <= self.num_train <= 1000, "digits.num_train", "between 40 and 1000", self.num_train, "200")
        check(1 <= self.batch_size <= self.num_train, "digits.batch_size", "between 1 and digits.num_train", self.batch_size, "32")
        for name in ("num_steps", "teacher_steps", "hidden", "teacher_hidden"):
            check(getattr(self, name) >= 1, f"digits.{name}", "at least 1", getattr(self, name), "100")
        check(self.learning_rate > 0, "digits.learning_rate", "above 0", self.learning_rate, "0.003")
        check(self.num_seeds >= 2, "digits.num_seeds", "at least 2: intervals need them", self.num_seeds, "24")
        check(min(self.weights, default=0) > 0, "digits.weights", "a list of numbers above 0", self.weights, "0.0008 0.01")
        check(1.0 in self.anchors and min(self.anchors) > 0, "digits.anchors", "positive numbers, 1 among them", self.anchors, "0.3 1")


@dataclasses.dataclass(frozen=True)
class AblationsConfig:
    """The digits again with other batches, entropies, iterations and temperatures."""

    num_seeds: int = 12
    """Students of each setting."""
    weight: float = 0.01
    """Weight of the Sinkhorn term beside KD, a sum over rows: large enough to be seen."""
    batch_sizes: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Rows of a batch."""
    epsilons: tuple[float, ...] = (0.01, 0.05, 0.1, 0.5, 1.0)
    """Entropy weights."""
    num_iters: tuple[int, ...] = (1, 5, 10, 20, 50)
    """Sinkhorn iterations."""
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Temperatures of KD and of the Sinkhorn term."""

    def __post_init__(self) -> None:
        check(self.num_seeds >= 2, "ablations.num_seeds", "at least 2: intervals need them", self.num_seeds, "12")
        for name in ("batch_sizes", "epsilons", "num_iters", "temperatures"):
            values = getattr(self, name)
            check(min(values, default=0) > 0, f"ablations.{name}", "a list of numbers above 0", values, "1 2")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Real text: which package a docstring is from. Teachers and students are transformers, encoders and decoders."""

    packages: tuple[Package, ...] = ("flax", "matplotlib", "numpy", "optax", "orbax")
    """The classes. Their docstrings are read from the installed packages; the packages' names are taken out of the text."""
    networks: tuple[Network, ...] = get_args(Network)
    """Kinds of transformers; teacher and student are of the same kind."""
    sequence_length: int = 32
    """Tokens of a text that are read."""
    vocab_size: int = 2048
    """Size of the byte-level BPE vocabulary trained on the training texts."""
    num_train: int = 700
    """Texts that a student sees, drawn anew for every seed; the teacher sees all training texts."""
    batch_size: int = 32
    """Texts of a batch."""
    num_steps: int = 120
    """Steps of a student."""
    teacher_steps: int = 200
    """Steps of a teacher."""
    width: int = 32
    """Width of a student, which has one block."""
    teacher_width: int = 128
    """Width of a teacher, which has two."""
    learning_rate: float = 5e-3
    """Adam's for students; teachers have a fifth."""
    num_seeds: int = 10
    """Students of each loss."""

    def __post_init__(self) -> None:
        check(len(set(self.packages)) >= 2, "text.packages", "two names or more", self.packages, "numpy optax")
        check(bool(self.networks), "text.networks", "one name or more", self.networks, "encoder")
        check(self.sequence_length >= 8, "text.sequence_length", "at least 8", self.sequence_length, "32")
        check(self.vocab_size >= 300, "text.vocab_size", "at least 300: 256 bytes, special tokens and merges", self.vocab_size, "2048")
        check(1 <= self.batch_size <= self.num_train, "text.batch_size", "between 1 and text.num_train", self.batch_size, "32")
        check(self.num_seeds >= 2, "text.num_seeds", "at least 2: intervals need them", self.num_seeds, "10")
        for name in ("width", "teacher_width"):
            check(getattr(self, name) % 16 == 0, f"text.{name}", "a multiple of 16, the width of a head", getattr(self, name), "32")
        for name in ("num_steps", "teacher_steps"):
            check(getattr(self, name) >= 1, f"text.{name}", "at least 1", getattr(self, name), "100")


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """A decoder language model learns from another: one transport problem for all positions, one per sequence, or one per group."""

    packages: tuple[Package, ...] = ("optax", "orbax")
    """Packages whose docstrings are the text."""
    vocab_size: int = 512
    """Size of its vocabulary: all logits are compared."""
    sequence_length: int = 25
    """Tokens of a row."""
    batch_size: int = 8
    """Rows of a batch; all its positions are the points of the flat layout."""
    group_size: int = 16
    """Positions of a problem in the grouped layout."""
    num_train: int = 500
    """Rows that a student sees; the teacher sees all training rows."""
    num_steps: int = 80
    """Steps of a student."""
    teacher_steps: int = 240
    """Steps of the teacher, with four times the batch."""
    width: int = 32
    """Width of a student, which has one block; the teacher has two."""
    teacher_width: int = 96
    """Width of the teacher."""
    learning_rate: float = 3e-3
    """Adam's for both."""
    weight: float = 0.5
    """Weight of the Sinkhorn term, a mean over positions, beside CE + 0.1 KL."""
    num_seeds: int = 10
    """Students of each loss."""

    def __post_init__(self) -> None:
        check(bool(self.packages), "language.packages", "one name or more", self.packages, "numpy")
        check(self.vocab_size >= 300, "language.vocab_size", "at least 300: 256 bytes, special tokens and merges", self.vocab_size, "512")
        positions = self.batch_size * (self.sequence_length - 1)
        check(positions > 0, "language.sequence_length", "at least 2", self.sequence_length, "25")
        check(positions % self.group_size == 0, "language.group_size", f"a divisor of the {positions} predictions", self.group_size, "8")
        check(self.num_seeds >= 2, "language.num_seeds", "at least 2: intervals need them", self.num_seeds, "10")
        check(self.num_train >= self.batch_size, "language.num_train", "at least language.batch_size", self.num_train, "500")
        for name in ("width", "teacher_width"):
            check(getattr(self, name) % 16 == 0, f"language.{name}", "a multiple of 16, the width of a head", getattr(self, name), "32")


@dataclasses.dataclass(frozen=True)
class CheckpointsConfig:
    """Distilling published decoders: GPT-Neo's sizes for compiling, directories for running."""

    teacher: str = ""
    """A directory in Hugging Face layout; empty for the shape of GPT-Neo-2.7B, for compiling only."""
    student: str = ""
    """The same, with the teacher's tokenizer; empty for the shape of GPT-Neo-125M."""
    path: str = ""
    """A .jsonl file of "prompt" and "completion", or of "text", to distil on."""
    sequence_length: int = 512
    """Tokens of a row."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the networks compute in."""
    layout: Literal["flat", "per_sequence"] = "per_sequence"
    """One transport problem for all positions of a batch, or one per row."""
    kl_weight: float = 0.1
    """Weight of the KL, at temperature 1, beside the labels' 1."""

    def __post_init__(self) -> None:
        check(2 <= self.sequence_length <= 2048, "checkpoints.sequence_length", "between 2 and 2048", self.sequence_length, "512")
        check(self.kl_weight >= 0, "checkpoints.kl_weight", "at least 0", self.kl_weight, "0.1")


@dataclasses.dataclass(frozen=True)
class Config:
    """Distillation by optimal transport between the rows of a batch, beside the divergences it is compared with."""

    sections: tuple[Section, ...] = ("analyses", "digits", "ablations", "text", "language")
    """What to run."""
    analyses: tuple[Analysis, ...] = get_args(Analysis)
    """Which closed forms."""
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    """Constants of the losses."""
    digits: DigitsConfig = dataclasses.field(default_factory=DigitsConfig)
    """Real images."""
    ablations: AblationsConfig = dataclasses.field(default_factory=AblationsConfig)
    """Other constants, on the images."""
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    """Real text."""
    language: LanguageConfig = dataclasses.field(default_factory=LanguageConfig)
    """Layouts of sequences."""
    checkpoints: CheckpointsConfig = dataclasses.field(default_factory=CheckpointsConfig)
    """The paper's scale."""
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(num_steps=1000, batch_size=64, checkpoint_every=200, log_every=10)
    )
    """Length, batch and checkpoints at the paper's scale."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(name="adamw", learning_rate=1e-4, warmup_steps=0, weight_decay=0.01, clip_norm=1.0)
    )
    """AdamW at the paper's scale."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Devices at the paper's scale."""

    def __post_init__(self) -> None:
        check(bool(self.sections), "sections", "one name or more", self.sections, "analyses digits")
        largest = max(self.ablations.batch_sizes)
        fits = "ablations" not in self.sections or largest <= self.digits.num_train
        check(fits, "ablations.batch_sizes", f"at most digits.num_train ({self.digits.num_train})", largest, "4 8 16 32")


DEFAULT = Config()

SMOKE = Config(
    sections=("analyses", "digits"),
    analyses=("moving apart", "modes"),
    digits=DigitsConfig(losses=("KD", "SinKD"), num_steps=100, teacher_steps=200, num_seeds=3, weights=(0.0008, 0.05), anchors=(1.0,)),
)

PAPER = Config(sections=("checkpoints",))

PRESETS = {"smoke": SMOKE, "default": DEFAULT, "paper": PAPER}
