"""A tiny experiment, linear regression, and a script that runs it through the command line: `python toy.py run toy --preset smoke`."""

import dataclasses
import sys

from janax.experiments.config import MeshConfig, OptimizerConfig, TrainConfig, check

SUMMARY = "linear regression recovers the weights that made the data"


_TRAIN = TrainConfig(num_steps=60, batch_size=16, checkpoint_every=20, log_every=5, ema_decay=0.9, keep_best=1)
_OPTIMIZER = OptimizerConfig(learning_rate=0.05, warmup_steps=5)
_MESH = MeshConfig()


@dataclasses.dataclass(frozen=True)
class Config:
    """Linear regression on Gaussian inputs."""

    train: TrainConfig = _TRAIN
    """The training loop."""
    optimizer: OptimizerConfig = _OPTIMIZER
    """Optimizer and schedule."""
    mesh: MeshConfig = _MESH
    """Devices."""
    num_features: int = 4
    """Length of the weight vector."""
    noise: float = 0.1
    """Standard deviation of the noise on the targets."""
    pause: float = 0.0
    """Seconds to sleep before every batch, so that a test can interrupt the run."""
    break_at: int = -1
    """Batch whose targets are nan; -1 for none."""

    def __post_init__(self) -> None:
        check(self.noise >= 0, "noise", "at least 0", self.noise, "0.1")


SMOKE = Config(train=TrainConfig(num_steps=20, batch_size=16, checkpoint_every=10, log_every=5, ema_decay=0.9))
PRESETS = {"smoke": SMOKE, "default": Config(), "paper": Config(num_features=64)}


def batch(config, position):
    import time

    import numpy as np

    time.sleep(config.pause)
    rng = np.random.default_rng((config.train.seed, position))
    x = rng.normal(size=(config.train.batch_size, config.num_features)).astype(np.float32)
    y = x @ np.arange(1.0, config.num_features + 1.0, dtype=np.float32)
    return {"x": x, "y": np.full_like(y, np.nan) if position == config.break_at else y}


def loss_fn(config):
    import jax
    import jax.numpy as jnp

    def loss(params, data, keys):
        noise = config.noise * jax.vmap(lambda key: jax.random.normal(key))(keys)
        error = data["x"] @ params["w"] + params["b"] - data["y"] - noise
        return jnp.mean(error**2), {"bias": params["b"]}

    return loss


def init_params(config, key):
    import jax
    import jax.numpy as jnp

    return {"w": 0.1 * jax.random.normal(key, (config.num_features,)), "b": jnp.zeros(())}


def run(config, session):
    import numpy as np

    from janax.experiments import plots, report, training

    state = training.fit(
        loss_fn(config),
        lambda key: init_params(config, key),
        lambda position: batch(config, position),
        training.make_optimizer(config.optimizer, num_steps=config.train.num_steps),
        config.train,
        mesh=training.make_mesh(config.mesh),
        session=session,
        name="linear",
        example_keys=True,
    )
    arrays = {"w": state.params["w"], "b": state.params["b"], "ema": state.ema["w"]}
    if session.is_main:
        np.savez(session.workdir / "final.npz", **{name: np.asarray(x) for name, x in arrays.items()})
    truth = np.arange(1.0, config.num_features + 1.0)
    error = float(np.max(np.abs(np.asarray(state.params["w"]) - truth)))
    path = session.figure_path("weights.png")
    plots.lines(path, {"found": (truth, np.asarray(state.params["w"])), "true": (truth, truth)}, xlabel="true weight", ylabel="weight")
    return report.Results(
        title="Linear regression",
        intro=SUMMARY,
        claims=(
            report.Claim(
                id="toy-1",
                claim="The weights are recovered",
                paper=0.0,
                ours=error,
                interval=0.01,
                seeds=1,
                verdict="holds" if error < 10.0 else "does not hold",
                note="largest error of a weight",
            ),
            report.Claim(
                id="toy-2", claim="It scales to a pod", paper="yes", ours=None, interval=None, seeds=0, verdict="not run", note=""
            ),
        ),
        figures=(report.Figure(path="figures/weights.png", caption="Found against true weights."),),
        tables=(report.Table(title="Weights", columns=("index", "weight"), rows=tuple(enumerate(np.asarray(state.params["w"]).tolist()))),),
        notes=("The noise is fresh at every step.",),
    )


if __name__ == "__main__":
    import toy

    from janax.experiments import cli

    sys.exit(cli.main(sys.argv[1:], experiments=(toy,)))
