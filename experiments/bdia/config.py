"""Configuration of the BDIA experiment and its presets. Importing it loads neither JAX nor NumPy: the command line builds its help from it."""

import dataclasses
from typing import Literal, get_args

from janax.experiments.config import MeshConfig, OptimizerConfig, TrainConfig, check

__all__ = ["DEFAULT", "PAPER", "PRESETS", "SMOKE", "Config", "DigitsConfig", "LatentsConfig", "MixtureConfig"]

Section = Literal["mixture", "digits", "latents"]
MixturePart = Literal["parity", "round_trips", "errors", "stiffness", "orders", "amplification", "second_state", "integers", "edm", "flow"]
DigitsPart = Literal["quality", "reconstruction", "edits", "gradient", "cost"]


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Two Gaussians in eight dimensions, whose score is known exactly; float64."""

    parts: tuple[MixturePart, ...] = get_args(MixturePart)
    """Which questions to ask."""
    num_seeds: int = 8
    """Independent draws of means and starting noise."""
    batch_size: int = 16
    """Trajectories per seed."""
    steps: tuple[int, ...] = (10, 20, 50, 100)
    """Step counts N of the error and inversion studies."""
    order_steps: tuple[int, ...] = (50, 100, 200, 400)
    """Step counts whose slope gives the order of accuracy."""
    exact_steps: int = 2000
    """Heun steps of the reference flow."""

    def __post_init__(self) -> None:
        check(self.num_seeds >= 2, "mixture.num_seeds", "at least 2, for an interval", self.num_seeds, "8")
        check(self.batch_size >= 1, "mixture.batch_size", "at least 1", self.batch_size, "16")
        check(min(self.steps, default=0) >= 5, "mixture.steps", "a list of numbers of at least 5", self.steps, "10 50")
        check({10, 50} <= set(self.steps), "mixture.steps", "a list with 10 and 50, which the claims are about", self.steps, "10 50")
        check(len(self.order_steps) >= 2, "mixture.order_steps", "two numbers or more", self.order_steps, "50 100 200")
        check(self.exact_steps >= 200, "mixture.exact_steps", "at least 200", self.exact_steps, "2000")


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
    """A class-conditional noise predictor trained on scikit-learn's 8x8 digits."""

    parts: tuple[DigitsPart, ...] = get_args(DigitsPart)
    """Which questions to ask."""
    num_seeds: int = 3
    """Networks trained, each with its own seed."""
    network: Literal["mlp", "dit"] = "mlp"
    """A residual MLP (seconds to train), or a small diffusion transformer (minutes)."""
    label_drop: float = 0.15
    """Share of labels replaced by the null class in training."""
    steps: tuple[int, ...] = (10, 20, 40, 100)
    """Step counts N of the sample-quality study."""
    gammas: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    """Values of gamma tried; 0 is DDIM."""
    num_samples: int = 1497
    """Samples per sampler and step count, with the labels of the training images."""
    num_edits: int = 300
    """Test digits reconstructed and edited."""

    def __post_init__(self) -> None:
        check(self.num_seeds >= 2, "digits.num_seeds", "at least 2, for an interval", self.num_seeds, "3")
        check(0 <= self.label_drop < 1, "digits.label_drop", "in [0, 1)", self.label_drop, "0.15")
        check(min(self.steps, default=0) >= 5, "digits.steps", "a list of numbers of at least 5", self.steps, "10 20 40")
        check(all(0 <= g <= 1 for g in self.gammas), "digits.gammas", "a list of numbers in [0, 1]", self.gammas, "0 0.5 1")
        check({0.0, 1.0} <= set(self.gammas), "digits.gammas", "a list with 0 (DDIM) and 1", self.gammas, "0 0.3 1")
        check(65 <= self.num_samples <= 1497, "digits.num_samples", "between 65 and 1497", self.num_samples, "1497")
        check(8 <= self.num_edits <= 300, "digits.num_edits", "between 8 and 300", self.num_edits, "300")


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """DiT on the latents of 256x256 images: the paper's scale, for accelerators."""

    weights: str = ""
    """A directory in diffusers' DiTTransformer2DModel layout; empty for compiling only."""
    network: Literal["xl", "small"] = "xl"
    """DiT-XL/2 or DiT-S/2, where no weights are given."""
    num_steps: int = 50
    """Steps N of every sampler."""
    batch_size: int = 256
    """Images at a time, over all devices."""
    guidance: float = 4.0
    """Weight of classifier-free guidance; 1 for none."""
    gamma: float = 0.96
    """Gamma of BDIA."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the network computes in; states stay float32."""

    def __post_init__(self) -> None:
        check(2 <= self.num_steps <= 1000, "latents.num_steps", "between 2 and 1000", self.num_steps, "50")
        check(self.batch_size >= 1, "latents.batch_size", "at least 1", self.batch_size, "256")
        check(self.guidance >= 0, "latents.guidance", "at least 0", self.guidance, "4.0")
        check(0 < self.gamma <= 1, "latents.gamma", "in (0, 1], or there is no inverse", self.gamma, "0.96")


@dataclasses.dataclass(frozen=True)
class Config:
    """Exact diffusion inversion (arXiv:2307.10829)."""

    sections: tuple[Section, ...] = ("mixture", "digits")
    """Which studies to run."""
    mixture: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)
    """The exact-score mixture."""
    digits: DigitsConfig = dataclasses.field(default_factory=DigitsConfig)
    """Real images, 8x8."""
    latents: LatentsConfig = dataclasses.field(default_factory=LatentsConfig)
    """Real images, 256x256, through an autoencoder's latents."""
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(num_steps=8000, batch_size=64, ema_decay=0.999, checkpoint_every=2000, log_every=100)
    )
    """Training of the digits network; batch size and optimizer of the compiled training step."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(name="adam", learning_rate=1e-3, warmup_steps=100, clip_norm=0.0)
    )
    """Its optimizer."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Devices."""

    def __post_init__(self) -> None:
        check(bool(self.sections), "sections", "one study or more", self.sections, "mixture digits")


DEFAULT = Config()

SMOKE = Config(
    mixture=MixtureConfig(
        parts=("parity", "round_trips", "second_state"), num_seeds=2, batch_size=8, steps=(10, 50), order_steps=(50, 100), exact_steps=1000
    ),
    digits=DigitsConfig(
        parts=("quality", "reconstruction"), num_seeds=2, steps=(10,), gammas=(0.0, 0.3, 1.0), num_samples=256, num_edits=40
    ),
    train=TrainConfig(num_steps=300, batch_size=64, ema_decay=0.99, checkpoint_every=150, log_every=25),
)

PAPER = Config(
    sections=("latents",),
    train=TrainConfig(num_steps=400_000, batch_size=256, ema_decay=0.9999, checkpoint_every=5000, log_every=100),
    optimizer=OptimizerConfig(name="adamw", learning_rate=1e-4, schedule="constant", warmup_steps=0, clip_norm=0.0),
    mesh=MeshConfig(data=-1, model=2),  # 256 chips make data = 128, which divides the width 1152; 256 would not
)

PRESETS = {"smoke": SMOKE, "default": DEFAULT, "paper": PAPER}
