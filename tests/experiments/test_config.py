import dataclasses
import json
from pathlib import Path

import pytest

from janax.experiments import config as configs
from janax.experiments.config import MeshConfig, OptimizerConfig, TrainConfig
from janax.experiments.errors import UserError


@dataclasses.dataclass(frozen=True)
class Nested:
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[str, float] = ("a", 1.0)
    data_dir: Path | None = None
    rate: float = 1.0


@pytest.mark.parametrize(
    "config",
    [
        Nested(),
        Nested(OptimizerConfig(learning_rate=0.1, beta2=0.95), (3,), ("b", 0.25), Path("some/where"), 1e-7),
    ],
)
def test_a_config_survives_json(config, tmp_path):
    configs.write_json(tmp_path / "config.json", config)
    again = configs.from_dict(Nested, configs.read_json(tmp_path / "config.json"))
    assert again == config
    assert type(again.sizes) is tuple and type(again.rate) is float


def test_from_dict_checks_values_and_names():
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate must be positive, got -1\.0; try 3e-4"):
        configs.from_dict(Nested, {"optimizer": {"learning_rate": -1.0}})
    with pytest.raises(ValueError, match=r"Nested\.optimizer has no field 'lr'"):
        configs.from_dict(Nested, {"optimizer": {"lr": 1.0}})
    with pytest.raises(ValueError, match=r"Nested\.optimizer must be an object, got 3"):
        configs.from_dict(Nested, {"optimizer": 3})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(learning_rate=float("nan")), "optimizer.learning_rate must be positive, got nan; try 3e-4"),
        (lambda: OptimizerConfig(beta1=1.0), "optimizer.beta1 must be in"),
        (lambda: OptimizerConfig(name="adam", weight_decay=0.1), "optimizer.weight_decay must be 0 with optimizer.name adam, got 0.1"),
        (lambda: TrainConfig(num_steps=0), "train.num_steps must be at least 1, got 0; try 1000"),
        (
            lambda: TrainConfig(batch_size=12, accumulation=5),
            r"train.accumulation must be a divisor of train.batch_size \(12\), got 5; try 4",
        ),
        (lambda: TrainConfig(ema_decay=1.0), "train.ema_decay must be in"),
        (lambda: MeshConfig(data=0), "mesh.data must be positive or -1, got 0"),
        (lambda: MeshConfig(data=-1, model=-1), "mesh.model must be positive when mesh.data is -1"),
    ],
)
def test_bad_values_are_named_with_a_mend(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_differences_name_the_dotted_field():
    old, new = configs.to_dict(Nested()), configs.to_dict(Nested(OptimizerConfig(beta1=0.5)))
    assert configs.differences(old, old) == {}
    assert configs.differences(old, new) == {"optimizer.beta1": (0.9, 0.5)}
    assert configs.differences({"a": 1}, {"b": 1}) == {"b": ("absent", 1), "a": (1, "absent")}


def test_json_on_disk_is_plain_and_written_whole(tmp_path):
    path = tmp_path / "x.json"
    configs.write_json(path, {"bad": float("nan"), "deep": [float("inf"), 1.5]})
    assert json.loads(path.read_text()) == {"bad": None, "deep": [None, 1.5]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]
    path.write_text("{")
    with pytest.raises(UserError, match=r"x\.json is not valid JSON"):
        configs.read_json(path)
    with pytest.raises(UserError, match="cannot read"):
        configs.read_json(tmp_path / "absent.json")


def test_environment_names_versions_and_devices():
    found = configs.environment()
    assert set(found["versions"]) == {"python", "janax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert "not installed" not in found["versions"].values()
    assert found["backend"] == "cpu" and found["num_devices"] == 8
