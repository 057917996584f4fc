"""Configuration of the study of RL as inference and its presets. Importing it loads neither JAX nor NumPy."""

import dataclasses
from typing import Literal, get_args

from janax.experiments.config import MeshConfig, OptimizerConfig, TrainConfig, check

__all__ = ["DEFAULT", "PAPER", "PRESETS", "SMOKE", "Config", "ExactConfig", "PodConfig", "SteeringConfig", "TextConfig", "TwistsConfig"]

Section = Literal["exact", "twists", "text", "steering"]
Part = Literal["statements", "collapse", "tradeoff", "sampled", "sandwich", "frontier", "coverage"]
Task = Literal["constraint", "continuous", "moment"]
Package = Literal["flax", "jax", "matplotlib", "numpy", "optax", "orbax", "sklearn"]


@dataclasses.dataclass(frozen=True)
class ExactConfig:
    """Strings that can be enumerated: a recurrent prior, a reward, the posterior as ground truth. A seed is another prior and reward."""

    parts: tuple[Part, ...] = get_args(Part)
    """What to measure."""
    vocab_size: int = 5
    """Tokens."""
    length: int = 5
    """Tokens of a string: vocab_size ** length strings."""
    width: int = 16
    """Recurrent units of the prior, and of policies that start from it."""
    narrow: int = 3
    """Recurrent units of policies that are too small for the posterior."""
    beta: float = 0.5
    """Weight of the KL."""
    betas: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Weights along the trade-off curve, `beta` among them."""
    num_worlds: int = 5
    """Priors with rewards; all are trained on in one compiled call."""
    num_steps: int = 800
    """Exact gradient steps."""
    learning_rate: float = 0.02
    """Adam's at the start of the cosine, for exact gradients."""
    sampled_steps: int = 800
    """Steps from samples."""
    sampled_rate: float = 0.01
    """Adam's, for gradients from samples."""
    batch_size: int = 128
    """Samples of a step."""
    sampled_seeds: int = 6
    """Seeds of each objective from samples: worlds, too."""
    particles: tuple[int, ...] = (4, 16, 64)
    """Particles of the bounds on log Z; for one, they are known exactly."""
    num_runs: int = 2000
    """Runs of every estimate of log Z."""
    noise: float = 0.4
    """Standard deviation of what is wrong with log psi in the bounds."""
    best_of: tuple[int, ...] = (2, 4, 16, 64, 256)
    """N of best-of-N."""
    num_problems: int = 12
    """Problems that one policy learns at once, for pass@k."""
    coverage_steps: int = 400
    """Exact gradient steps on them."""
    coverage_beta: float = 0.1
    """Weight of the KL there, for a reward of 1 for a right string."""

    def __post_init__(self) -> None:
        check(bool(self.parts), "exact.parts", "one name or more", self.parts, "collapse tradeoff")
        for name in ("length", "width", "narrow", "num_steps", "sampled_steps", "coverage_steps"):
            check(getattr(self, name) >= 1, f"exact.{name}", "at least 1", getattr(self, name), "6")
        check(self.vocab_size >= 2, "exact.vocab_size", "at least 2", self.vocab_size, "5")
        strings = self.vocab_size**self.length
        check(strings <= 1 << 20, "exact.length", f"so that {self.vocab_size}^length is at most 2^20", self.length, "6")
        check(self.num_problems >= 2, "exact.num_problems", "at least 2", self.num_problems, "12")
        for name in ("beta", "learning_rate", "sampled_rate", "noise", "coverage_beta"):
            check(getattr(self, name) > 0, f"exact.{name}", "above 0", getattr(self, name), str(getattr(type(self), name)))
        check(self.beta in self.betas and min(self.betas) > 0, "exact.betas", "positive, with exact.beta among them", self.betas, "0.5 1.0")
        for name in ("num_worlds", "sampled_seeds"):
            check(getattr(self, name) >= 2, f"exact.{name}", "at least 2: intervals need them", getattr(self, name), "5")
        check(self.batch_size >= 2, "exact.batch_size", "at least 2: baselines need them", self.batch_size, "128")
        check(self.num_runs >= 10, "exact.num_runs", "at least 10", self.num_runs, "2000")
        check(min(self.particles, default=0) >= 2, "exact.particles", "a list of numbers from 2 on", self.particles, "4 16")
        check(min(self.best_of, default=0) >= 2, "exact.best_of", "a list of numbers from 2 on", self.best_of, "2 16")


@dataclasses.dataclass(frozen=True)
class TwistsConfig:
    """Learning twists from equally many samples, on an enumerable space where psi* is known."""

    num_steps: int = 600
    """Steps of each loss."""
    batch_size: int = 128
    """Samples of a step."""
    width: int = 8
    """Recurrent units of the twist network: too few for psi*."""
    learning_rate: float = 0.01
    """Adam's at the start of the cosine."""
    num_seeds: int = 5
    """Worlds and draws."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "width"):
            check(getattr(self, name) >= 1, f"twists.{name}", "at least 1", getattr(self, name), "8")
        check(self.batch_size >= 2, "twists.batch_size", "at least 2", self.batch_size, "128")
        check(self.learning_rate > 0, "twists.learning_rate", "above 0", self.learning_rate, "0.01")
        check(self.num_seeds >= 2, "twists.num_seeds", "at least 2: intervals need them", self.num_seeds, "5")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A character-level decoder trained on docstrings, then bent towards a word, or towards a reward."""

    tasks: tuple[Task, ...] = get_args(Task)
    """"constraint": the text contains `word`; "continuous": the share of vowels is rewarded; "moment": a share `moment` contains `word`."""
    packages: tuple[Package, ...] = ("numpy", "jax", "optax")
    """Packages whose docstrings are the text."""
    word: str = "data"
    """The word that the constraint asks for: small letters."""
    vowel_weight: float = 10.0
    """The continuous reward is this times the share of vowels."""
    beta: float = 1.0
    """Weight of the KL for the continuous reward."""
    moment: float = 0.5
    """Share of the texts that are to contain the word."""
    soft_beta: float = 0.1
    """Weight of the KL for methods that need finite rewards under the constraint: 1 for the word, 0 without."""
    length: int = 24
    """Characters of a text."""
    width: int = 32
    """Width of the decoder, in heads of 16."""
    depth: int = 2
    """Blocks of the decoder."""
    prior_steps: int = 1000
    """Optimizer steps of the decoder's training."""
    prior_batch: int = 64
    """Texts of such a step."""
    num_steps: int = 150
    """Steps of every method; of PPO, batches, each of which serves four steps."""
    batch_size: int = 128
    """Texts drawn in every step: all methods have num_steps x batch_size of them."""
    learning_rate: float = 3e-4
    """Adam's for the methods. At 1e-3, weights P / pi of a rare word are too noisy for GDC."""
    num_seeds: int = 3
    """Seeds of every method; trained in one vectorised call."""
    num_eval: int = 512
    """Texts that a method is judged by."""
    pool: int = 16384
    """Texts of the decoder itself, from which exact samples of the posterior are taken."""

    def __post_init__(self) -> None:
        check(bool(self.tasks), "text.tasks", "one name or more", self.tasks, "constraint")
        check(bool(self.packages), "text.packages", "one name or more", self.packages, "numpy")
        check(self.word.isascii() and self.word.isalpha() and self.word.islower(), "text.word", "small letters a to z", self.word, "data")
        check(len(self.word) <= self.length, "text.length", "at least as long as text.word", self.length, "24")
        for name in ("vowel_weight", "beta", "soft_beta", "learning_rate"):
            check(getattr(self, name) > 0, f"text.{name}", "above 0", getattr(self, name), str(getattr(type(self), name)))
        check(0 < self.moment < 1, "text.moment", "between 0 and 1", self.moment, "0.5")
        check(self.width % 16 == 0, "text.width", "a multiple of 16, the width of a head", self.width, "64")
        for name in ("depth", "prior_steps", "prior_batch", "num_steps"):
            check(getattr(self, name) >= 1, f"text.{name}", "at least 1", getattr(self, name), "2")
        for name in ("batch_size", "num_eval", "pool"):
            check(getattr(self, name) >= 8, f"text.{name}", "at least 8", getattr(self, name), "128")
        check(self.num_seeds >= 2, "text.num_seeds", "at least 2: intervals need them", self.num_seeds, "3")


@dataclasses.dataclass(frozen=True)
class SteeringConfig:
    """A published model that must write without a letter: twisted SMC beside masking."""

    weights: str = "smollm2"
    """`smollm2` (after `janax fetch smollm2`), or a directory of an instruction-tuned model in Hugging Face layout."""
    letter: str = "e"
    """No token may contain it."""
    prompts: tuple[str, ...] = ("Describe the sea in winter.", "How do I bake a good loaf?", "Tell me about a famous composer.")
    """What is asked."""
    num_particles: int = 32
    """Particles of a prompt."""
    max_new_tokens: int = 24
    """Tokens of every text."""
    num_runs: int = 6
    """Runs of each way, with keys of their own."""

    def __post_init__(self) -> None:
        check(
            len(self.letter) == 1 and self.letter.isalpha() and self.letter.islower(), "steering.letter", "a small letter", self.letter, "e"
        )
        check(bool(self.prompts), "steering.prompts", "one question or more", self.prompts, "'Describe the sea.'")
        check(self.num_particles >= 2, "steering.num_particles", "at least 2", self.num_particles, "32")
        check(self.max_new_tokens >= 1, "steering.max_new_tokens", "at least 1", self.max_new_tokens, "24")
        check(self.num_runs >= 2, "steering.num_runs", "at least 2: intervals need them", self.num_runs, "6")


@dataclasses.dataclass(frozen=True)
class PodConfig:
    """What `janax compile rl-bayes` compiles: a decoder, particles of its prompts, and texts of a training step."""

    shape: Literal["smollm2-135m", "qwen2.5-7b", "llama-3.1-8b"] = "qwen2.5-7b"
    """A published architecture, from its shape alone."""
    num_prompts: int = 8
    """Prompts that are steered together."""
    num_particles: int = 256
    """Particles of each."""
    prompt_length: int = 128
    """Tokens of a prompt, at most."""
    max_new_tokens: int = 64
    """Tokens of every text."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_particles", "prompt_length", "max_new_tokens"):
            check(getattr(self, name) >= 1, f"pod.{name}", "at least 1", getattr(self, name), "64")


@dataclasses.dataclass(frozen=True)
class Config:
    """RL with KL penalties as inference: one posterior, many ways to sample from it."""

    sections: tuple[Section, ...] = ("exact", "twists", "text")
    """What to run; "steering" needs the weights of a model."""
    exact: ExactConfig = dataclasses.field(default_factory=ExactConfig)
    """Enumerable strings."""
    twists: TwistsConfig = dataclasses.field(default_factory=TwistsConfig)
    """Learned twists."""
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    """Real text."""
    steering: SteeringConfig = dataclasses.field(default_factory=SteeringConfig)
    """A published model."""
    pod: PodConfig = dataclasses.field(default_factory=PodConfig)
    """For `janax compile`."""
    train: TrainConfig = dataclasses.field(default_factory=lambda: TrainConfig(num_steps=1000, batch_size=512))
    """The compiled training step: texts a step, and micro-batches."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(name="adamw", learning_rate=1e-6))
    """Its optimizer."""
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=-1, model=4))
    """Its devices."""

    def __post_init__(self) -> None:
        check(bool(self.sections), "sections", "one name or more", self.sections, "exact text")


DEFAULT = Config()

SMOKE = Config(
    sections=("exact",),
    exact=ExactConfig(
        parts=("statements", "collapse"),
        vocab_size=4,
        length=4,
        width=8,
        num_worlds=2,
        num_steps=150,
        best_of=(2, 16),
    ),
)

PAPER = Config(
    sections=get_args(Section),
    exact=ExactConfig(length=6, num_worlds=10, num_steps=1500, sampled_seeds=20, num_runs=10_000),
    twists=TwistsConfig(num_steps=5000, num_seeds=10),
    text=TextConfig(
        packages=("flax", "jax", "matplotlib", "numpy", "optax", "orbax", "sklearn"),
        length=40,
        width=256,
        depth=6,
        prior_steps=20_000,
        prior_batch=256,
        num_steps=5000,
        batch_size=2048,
        learning_rate=1e-4,
        num_seeds=5,
        num_eval=2048,
        pool=1 << 20,
    ),
)

PRESETS = {"smoke": SMOKE, "default": DEFAULT, "paper": PAPER}
