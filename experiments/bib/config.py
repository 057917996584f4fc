"""Configuration of the sequence design study and its presets. Importing it loads neither JAX nor NumPy."""

import dataclasses
from typing import Literal, get_args

from janax.experiments.config import MeshConfig, check

__all__ = [
    "DEFAULT",
    "PAPER",
    "PRESETS",
    "SMOKE",
    "BaselinesConfig",
    "BdiConfig",
    "Config",
    "EhrlichConfig",
    "EncoderConfig",
    "KernelsConfig",
    "MethodsConfig",
    "PaperConfig",
    "ProteinsConfig",
]

Section = Literal["bdi", "methods", "baselines", "kernels", "ehrlich", "proteins", "paper"]
Split = Literal["half", "lowest5000"]
Factor = Literal["SIX6_REF_R1", "PAX4_REF_R1", "POU3F4_REF_R1"]
Mode = Literal["both", "forward", "backward"]
Variant = Literal[
    "forward",
    "backward",
    "both, fixed",
    "Adaptive-gamma",
    "Adaptive-gamma + Adaptive-eta",
    "forward + Adaptive-eta",
    "Adaptive-gamma, through Adam",
]
Baseline = Literal[
    "random",
    "best offline",
    "gradient ascent, mean",
    "gradient ascent, min",
    "genetic algorithm",
    "AdaLead",
    "COMs",
    "CbAS",
    "CMA-ES",
]
Protein = Literal["aav", "e4b", "avgfp"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The DNA encoder: pre-trained on the binding tables of other proteins; no table of a design task, in any replicate."""

    num_steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 512
    """Sequences of a step."""
    learning_rate: float = 2e-3
    """AdamW's at the start of the cosine."""
    both_strands: bool = False
    """Average features over a sequence and its reverse complement."""

    def __post_init__(self) -> None:
        check(self.num_steps >= 1, "encoder.num_steps", "at least 1", self.num_steps, "2000")
        check(self.batch_size >= 1, "encoder.batch_size", "at least 1", self.batch_size, "512")
        check(self.learning_rate > 0, "encoder.learning_rate", "above 0", self.learning_rate, "0.002")


@dataclasses.dataclass(frozen=True)
class BdiConfig:
    """The infinite-width predecessor on TFBind8."""

    split: Split = "lowest5000"
    """Offline rows. "half" is the published one: 32,898 rows, whose system takes 17 GB and ten minutes unless `data_dir` holds the authors'
    solution (tfbind8/bdi_published_dual.npz)."""
    modes: tuple[Mode, ...] = ("both",)
    """Losses: both (what was published), forward, backward."""
    num_steps: int = 200
    """Steps of Adam."""
    num_designs: int = 128
    """Best offline designs to start from."""
    chunk: int = 16
    """Designs computed at a time; memory is chunk x rows."""

    def __post_init__(self) -> None:
        check(bool(self.modes), "bdi.modes", "one name or more", self.modes, "both")
        for name in ("num_steps", "num_designs", "chunk"):
            check(getattr(self, name) >= 1, f"bdi.{name}", "at least 1", getattr(self, name), "16")


@dataclasses.dataclass(frozen=True)
class MethodsConfig:
    """BIB with the encoder, on the exact oracle."""

    splits: tuple[Split, ...] = get_args(Split)
    """Offline rows: Design-Bench's half, and the 5,000 lowest."""
    variants: tuple[Variant, ...] = ("forward", "both, fixed", "Adaptive-gamma + Adaptive-eta")
    """What is compared on SIX6."""
    hard_variants: tuple[Variant, ...] = ("backward", "Adaptive-gamma")
    """What is compared on its 5,000 lowest rows as well; "forward + Adaptive-eta" and "Adaptive-gamma, through Adam" are there, for who asks."""
    others: tuple[Variant, ...] = ("Adaptive-gamma + Adaptive-eta",)
    """What is also run on PAX4 and POU3F4, in one vectorised call with each other."""
    num_seeds: int = 8
    """Seeds: initial noise and bootstrap of the auxiliary heads. The encoder is one."""
    num_designs: int = 128
    """Designs, from as many best offline ones."""
    num_steps: int = 100
    """Steps."""
    rel_ridge: float = 1e-6
    """Ridge of the proxy, relative to the features' mean squared length."""
    kept: int = 512
    """Sequences kept per round of the discrete refinement."""
    rounds: int = 4
    """Rounds: every single substitution of the kept ones is scored by the proxy."""

    def __post_init__(self) -> None:
        check(bool(self.splits), "methods.splits", "one name or more", self.splits, "half")
        check(bool(self.variants), "methods.variants", "one name or more", self.variants, "forward")
        check(self.num_seeds >= 2, "methods.num_seeds", "at least 2: intervals need them", self.num_seeds, "8")
        check(self.kept >= self.num_designs, "methods.kept", "at least methods.num_designs", self.kept, "512")
        for name in ("num_designs", "num_steps", "rounds"):
            check(getattr(self, name) >= 1, f"methods.{name}", "at least 1", getattr(self, name), "100")
        check(self.rel_ridge > 0, "methods.rel_ridge", "above 0", self.rel_ridge, "1e-6")


@dataclasses.dataclass(frozen=True)
class BaselinesConfig:
    """What BIB is compared with: perceptrons on the sequences, and ways to search them."""

    methods: tuple[Baseline, ...] = get_args(Baseline)
    """Which ones."""
    splits: tuple[Split, ...] = ("lowest5000",)
    """Offline rows."""
    num_seeds: int = 8
    """Seeds of perceptrons and search together."""
    num_designs: int = 128
    """Designs."""
    fit_steps: int = 800
    """Steps of the perceptrons, batches of 256."""

    def __post_init__(self) -> None:
        check(self.num_seeds >= 2, "baselines.num_seeds", "at least 2: intervals need them", self.num_seeds, "8")
        for name in ("num_designs", "fit_steps"):
            check(getattr(self, name) >= 1, f"baselines.{name}", "at least 1", getattr(self, name), "128")


@dataclasses.dataclass(frozen=True)
class KernelsConfig:
    """What features are worth: last layer, sketched tangent kernel, random network, one-hot; by ridge."""

    num_rows: int = 1000
    """Offline rows that are fitted."""
    num_features: int = 512
    """Length of the sketch."""
    ridges: tuple[float, ...] = (1e-6, 1e-3, 1e-1, 1.0)
    """Relative ridges, among which leave-one-out chooses as well."""
    split: Split = "half"
    """Offline rows they are drawn from."""

    def __post_init__(self) -> None:
        check(self.num_rows >= 10, "kernels.num_rows", "at least 10", self.num_rows, "1000")
        check(self.num_features >= 1, "kernels.num_features", "at least 1", self.num_features, "1024")
        check(min(self.ridges, default=0) > 0, "kernels.ridges", "a list of numbers above 0", self.ridges, "1e-6 0.1")


@dataclasses.dataclass(frozen=True)
class EhrlichConfig:
    """A second exact oracle: Ehrlich functions, products of quantised motifs on a feasible set."""

    num_letters: int = 8
    """Alphabet."""
    length: int = 24
    """Letters of a sequence."""
    num_motifs: int = 3
    """Motifs."""
    motif_length: int = 4
    """Letters of a motif."""
    num_rows: int = 2000
    """Offline rows: feasible sequences and their mutants."""
    num_seeds: int = 8
    """Instances of the function, each with its own data."""
    num_designs: int = 64
    """Designs."""

    def __post_init__(self) -> None:
        room = self.num_motifs * self.motif_length
        check(self.length >= room, "ehrlich.length", f"at least motifs x letters ({room})", self.length, str(room))
        check(self.num_seeds >= 2, "ehrlich.num_seeds", "at least 2: intervals need them", self.num_seeds, "8")
        check(self.num_rows >= self.num_designs, "ehrlich.num_rows", "at least ehrlich.num_designs", self.num_rows, "2000")


@dataclasses.dataclass(frozen=True)
class ProteinsConfig:
    """Measured protein variants, read from `data_dir`: no exact oracle, so ranking and a stand-in oracle only."""

    names: tuple[Protein, ...] = get_args(Protein)
    """Which sets."""
    num_train: int = 800
    """Rows that a ridge is fitted to."""
    num_test: int = 500
    """Rows that it is tested on."""
    num_seeds: int = 8
    """Draws of both."""
    encoder_steps: int = 300
    """Steps of the masked language model."""

    def __post_init__(self) -> None:
        check(self.num_seeds >= 2, "proteins.num_seeds", "at least 2: intervals need them", self.num_seeds, "8")
        check(min(self.num_train, self.num_test) >= 10, "proteins.num_train", "at least 10, as proteins.num_test", self.num_train, "800")


@dataclasses.dataclass(frozen=True)
class PaperConfig:
    """The paper's scale: features of many proteins by a large encoder, and designs through it; compiled from shapes, run from weights."""

    weights: str = ""
    """A directory of the encoder in Hugging Face layout, to run; compiling needs none."""
    protein: Protein = "avgfp"
    """Whose variants in `data_dir` are designed."""
    encoder: Literal["esm2-650m", "protbert"] = "esm2-650m"
    """Shape of the network that is compiled."""
    num_rows: int = 50_000
    """Offline sequences, at most."""
    length: int = 237
    """Residues of a sequence that is compiled for; avGFP's."""
    batch_size: int = 512
    """Sequences whose features are computed at a time."""
    num_designs: int = 128
    """Designs."""
    num_steps: int = 25
    """Steps of the design."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the network computes in."""

    def __post_init__(self) -> None:
        for name in ("num_rows", "length", "batch_size", "num_designs", "num_steps"):
            check(getattr(self, name) >= 1, f"paper.{name}", "at least 1", getattr(self, name), "128")


@dataclasses.dataclass(frozen=True)
class Config:
    """Offline design of biological sequences: forward and backward through a proxy, against exact oracles."""

    sections: tuple[Section, ...] = ("bdi", "methods", "baselines", "kernels", "ehrlich")
    """What to run; "proteins" needs `data_dir`."""
    data_dir: str = ""
    """A directory with the sets that are not shipped: aav/, e4b/, avgfp/, tfbind8/bdi_published_dual.npz."""
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    """Pre-training."""
    bdi: BdiConfig = dataclasses.field(default_factory=BdiConfig)
    """The infinite-width predecessor."""
    methods: MethodsConfig = dataclasses.field(default_factory=MethodsConfig)
    """BIB."""
    baselines: BaselinesConfig = dataclasses.field(default_factory=BaselinesConfig)
    """Others."""
    kernels: KernelsConfig = dataclasses.field(default_factory=KernelsConfig)
    """Features."""
    ehrlich: EhrlichConfig = dataclasses.field(default_factory=EhrlichConfig)
    """Another oracle."""
    proteins: ProteinsConfig = dataclasses.field(default_factory=ProteinsConfig)
    """Measured proteins."""
    paper: PaperConfig = dataclasses.field(default_factory=PaperConfig)
    """The paper's scale."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Devices at the paper's scale."""

    def __post_init__(self) -> None:
        check(bool(self.sections), "sections", "one name or more", self.sections, "bdi methods")
        needs = "proteins" in self.sections and not self.data_dir
        check(not needs, "data_dir", "a directory for the section proteins", self.data_dir, "../data")
        check(not self.paper.weights or bool(self.data_dir), "data_dir", "a directory with paper.weights", self.data_dir, "../data")


DEFAULT = Config()

SMOKE = Config(
    sections=("methods",),
    encoder=EncoderConfig(num_steps=60, batch_size=128),
    methods=MethodsConfig(
        splits=("lowest5000",),
        variants=("forward", "Adaptive-gamma + Adaptive-eta"),
        hard_variants=(),
        others=(),
        num_seeds=2,
        num_designs=32,
        num_steps=20,
        kept=64,
        rounds=1,
    ),
)

PAPER = Config(sections=("paper",))

PRESETS = {"smoke": SMOKE, "default": DEFAULT, "paper": PAPER}
