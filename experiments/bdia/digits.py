"""Real images: a noise predictor trained on 8x8 digits, and everything the samplers do with it.

Data: scikit-learn's copy of the UCI optical digits (1797 images, BSD licence of scikit-learn; UCI ML repository, CC BY 4.0), bundled with that
package. Pixels x / 8 - 1 in [-1, 1]; 1497 train and 300 test images by the permutation of seed 0.
"""

import functools
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import bdia
from janax.experiments import config as configs
from janax.experiments import plots, training
from janax.experiments.bdia.config import Config, DigitsConfig
from janax.experiments.bdia.mixture import sd_alphas_cumprod
from janax.experiments.session import Session
from janax.jaxlib_ext import aot, sharding
from janax.models import dit, mlp, presets

__all__ = ["Digits", "Network", "batch_fn", "frechet", "load", "loss_fn", "make_network", "study"]

EDIT_STEPS = 50


class Digits(NamedTuple):
    """Images [n 8 8 1] in [-1, 1] and labels [n]."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


class Network(NamedTuple):
    """A network as functions.

    Attributes:
      init: key -> params.
      noise_fn: (params, z, t, cond) -> eps.
      null_class: The label that stands for no label.
      rules: Placement of the parameters.
    """

    init: Callable[[jax.Array], Any]
    noise_fn: Callable[..., jax.Array]
    null_class: int
    rules: Any


@functools.cache
def load() -> Digits:
    """The digits, split."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 8.0 - 1.0).reshape(-1, 8, 8, 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order].astype(np.int32)
    return Digits(images[:1497], labels[:1497], images[1497:], labels[1497:])


def make_network(config: DigitsConfig) -> Network:
    """The configured network for 8x8 digits."""
    if config.network == "dit":
        shape = presets.DIT_DIGITS
        return Network(functools.partial(dit.init, shape), dit.noise_fn(shape), shape.null_class, dit.SHARDING_RULES)
    small = mlp.MlpConfig(shape=(8, 8, 1), num_classes=10)
    return Network(functools.partial(mlp.init, small), mlp.noise_fn(small), small.null_class, ((r".*", jax.P()),))


def loss_fn(network: Network, alphas_cumprod: np.ndarray, *, label_drop: float) -> training.LossFn:
    """E |eps - eps_theta(alpha_t x + sigma_t eps, t, label)|^2 over uniform t, labels dropped for guidance; one key per example."""
    alpha, sigma = np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod)

    def loss(params: Any, batch: Mapping[str, jax.Array], keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = batch["image"]

        def corrupt(key: jax.Array, x: jax.Array, label: jax.Array) -> tuple[jax.Array, ...]:
            key_t, key_noise, key_drop = jax.random.split(key, 3)
            t = jax.random.randint(key_t, (), 0, len(alpha))
            eps = jax.random.normal(key_noise, x.shape, x.dtype)
            z = jnp.asarray(alpha, x.dtype)[t] * x + jnp.asarray(sigma, x.dtype)[t] * eps
            return t, eps, z, dit.drop_labels(key_drop, label, rate=label_drop, null_class=network.null_class)

        t, eps, z, labels = jax.vmap(corrupt)(keys, x, batch["label"])
        return jnp.mean(jnp.square(network.noise_fn(params, z, t.astype(x.dtype), labels) - eps)), {}

    return loss


def batch_fn(config: configs.TrainConfig, digits: Digits) -> Callable[[int], dict[str, np.ndarray]]:
    """Batch number -> images and labels; epochs in fresh order, a pure function of the number and the seed."""
    count = len(digits.train)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((config.seed, epoch)).permutation(count)

    def batch(position: int) -> dict[str, np.ndarray]:
        index = np.arange(position * config.batch_size, (position + 1) * config.batch_size)
        rows = np.array([order(int(i // count))[i % count] for i in index])
        return {"image": digits.train[rows], "label": digits.train_labels[rows]}

    return batch


def train(config: Config, session: Session, network: Network, seed: int) -> Any:
    """The averaged parameters of one network; resumes, and returns at once if it is trained."""
    import dataclasses

    settings = dataclasses.replace(config.train, seed=config.train.seed + seed)
    state = training.fit(
        loss_fn(network, sd_alphas_cumprod(), label_drop=config.digits.label_drop),
        network.init,
        batch_fn(settings, load()),
        training.make_optimizer(config.optimizer, num_steps=settings.num_steps),
        settings,
        mesh=training.make_mesh(config.mesh),
        rules=network.rules,
        session=session,
        name=f"digits-seed{seed}",
        example_keys=True,
    )
    return sharding.fetch(training.ema_or_params(state))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of two sets of images as Gaussians in pixel space: |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a, b))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def study(config: Config, session: Session) -> dict[str, Any]:
    """Trains the networks and measures sample quality, round trips, edits, gradients and cost; lists over seeds."""
    network = make_network(config.digits)
    found: dict[str, Any] = {"seeds": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for seed in range(config.digits.num_seeds):
            params = train(config, session, network, seed)
            parts = {
                "quality": lambda params=params, seed=seed: _quality(config.digits, network, params, seed),
                "reconstruction": lambda params=params: _reconstruction(config.digits, network, params),
                "edits": lambda params=params: _edits(config.digits, network, params),
            }
            done = {}
            for name in session.track([name for name in parts if name in config.digits.parts], f"digits, seed {seed}"):
                done[name] = session.memo(f"digits-{name}-{seed}", parts[name], alone=True)
            found["seeds"].append(done)
            if seed == 0:
                once = {"gradient": functools.partial(_gradient, network, params), "cost": _cost}
                for name in session.track([name for name in once if name in config.digits.parts], "digits, gradient and cost"):
                    found[name] = session.memo(f"digits-{name}", once[name], alone=True)
                session.memo("digits-pictures", lambda params=params: _pictures(config.digits, network, params, session), alone=True)
    found["floor"] = _floor()
    return found


def _floor() -> dict[str, float]:
    digits = load()
    half = len(digits.train) // 2
    return {"train and test": frechet(digits.train, digits.test), "two halves": frechet(digits.train[:half], digits.train[half:])}


def _start(count: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1000 + seed), (count, 8, 8, 1))


def _samplers(network: Network, grid: bdia.Grid) -> dict[str, Callable[..., jax.Array]]:
    """name -> (params, z, labels) -> images."""
    f = network.noise_fn
    return {
        "O-BELM": lambda p, z, c: bdia.sample(f, p, z, grid, bdia.belm_coefficients(grid), cond=c).z_i,
        "EDICT .93": lambda p, z, c: bdia.edict_sample(f, p, z, grid, cond=c).x,
        "DPM-Solver++ 2M": lambda p, z, c: bdia.dpm_solver_2m_sample(f, p, z, grid, cond=c),
    }


@functools.cache
def _sweep(network: Network, steps: int) -> Callable[..., jax.Array]:
    """Compiled BDIA sampling: (params, z, labels, gamma) -> images; a new gamma does not compile again."""
    grid = bdia.vp_grid(sd_alphas_cumprod(), steps)
    return jax.jit(lambda p, z, c, g: bdia.sample(network.noise_fn, p, z, grid, bdia.coefficients(grid, g), cond=c).z_i)


@functools.cache
def _sampler(network: Network, steps: int, name: str) -> Callable[..., jax.Array]:
    """Compiled sampling by another method: (params, z, labels) -> images."""
    return jax.jit(_samplers(network, bdia.vp_grid(sd_alphas_cumprod(), steps))[name])


SAMPLERS = ("O-BELM", "EDICT .93", "DPM-Solver++ 2M")


def _quality(config: DigitsConfig, network: Network, params: Any, seed: int) -> dict[str, Any]:
    """Frechet distance to the training images, per N: over gamma, and of the other samplers."""
    digits = load()
    labels = jnp.asarray(digits.train_labels[: config.num_samples])
    z = _start(config.num_samples, seed)
    distance = lambda x: frechet(np.clip(np.asarray(x), -1, 1), digits.train)  # noqa: E731
    found: dict[str, Any] = {}
    for steps in config.steps:
        sweep = _sweep(network, steps)
        found[str(steps)] = {
            "gamma": [distance(sweep(params, z, labels, jnp.float32(g))) for g in config.gammas],
            **{name: distance(_sampler(network, steps, name)(params, z, labels)) for name in SAMPLERS},
        }
    return found


def _pairs(network: Network, grid: bdia.Grid, num_levels: int | None = None) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """name -> (encode(params, x, cond), decode(params, state, cond))."""
    f = network.noise_fn

    def two_step(table: bdia.BdiaCoeffs) -> Any:
        return (
            lambda p, x, c: bdia.encode(f, p, x, grid, table, cond=c, unstable="ignore", num_levels=num_levels),
            lambda p, s, c: bdia.decode(f, p, s, grid, table, cond=c, num_levels=num_levels).z_i,
        )

    return {
        "DDIM": (
            lambda p, x, c: bdia.ddim_invert(f, p, x, grid, cond=c, num_levels=num_levels),
            lambda p, s, c: bdia.ddim_sample(f, p, s, grid, cond=c, num_levels=num_levels),
        ),
        "BDIA 0.9": two_step(bdia.coefficients(grid, 0.9)),
        "BDIA 0.96": two_step(bdia.coefficients(grid, 0.96)),
        "BDIA 1": two_step(bdia.coefficients(grid, 1.0)),
        "O-BELM": two_step(bdia.belm_coefficients(grid)),
        "EDICT .93": (
            lambda p, x, c: bdia.edict_encode(f, p, x, grid, cond=c, num_levels=num_levels),
            lambda p, s, c: bdia.edict_decode(f, p, s, grid, cond=c, num_levels=num_levels).x,
        ),
    }


@functools.cache
def _trips(network: Network, steps: int) -> Callable[..., dict[str, jax.Array]]:
    """Compiled round trips: (params, x, labels) -> images by method."""
    pairs = _pairs(network, bdia.vp_grid(sd_alphas_cumprod(), steps))
    return jax.jit(lambda p, x, c: {name: decode(p, encode(p, x, c), c) for name, (encode, decode) in pairs.items()})


def _reconstruction(config: DigitsConfig, network: Network, params: Any) -> dict[str, Any]:
    """Mean squared error of test digits after data -> noise -> data: "float32 50", "float32 10", "float64 50"."""
    digits = load()
    found: dict[str, Any] = {}
    for name, steps, wide in (("float32 50", 50, False), ("float32 10", 10, False), ("float64 50", 50, True)):
        with jax.enable_x64(wide):
            dtype = jnp.float64 if wide else jnp.float32
            weights = jax.tree.map(lambda x, dtype=dtype: jnp.asarray(x, dtype), params)
            x, c = jnp.asarray(digits.test[: config.num_edits], dtype), jnp.asarray(digits.test_labels[: config.num_edits])
            found[name] = {method: float(jnp.mean((image - x) ** 2)) for method, image in _trips(network, steps)(weights, x, c).items()}
    return found


@functools.cache
def _classifier() -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """RBF kernel ridge regression on one-hot labels, and its accuracy on the test digits."""
    from sklearn.kernel_ridge import KernelRidge

    digits = load()
    flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1)  # noqa: E731
    ridge: Any = KernelRidge
    model = ridge(alpha=1e-3, kernel="rbf", gamma=0.05).fit(flat(digits.train), np.eye(10)[digits.train_labels])
    predict = lambda x: np.asarray(model.predict(flat(x))).argmax(1)  # noqa: E731
    return predict, float(np.mean(predict(digits.test) == digits.test_labels))


@functools.cache
def _editor(network: Network) -> Callable[..., dict[str, tuple[jax.Array, jax.Array]]]:
    """Compiled edits at strength 0.8: (params, x, source labels, target labels, weight) -> method -> (images, latent rms)."""
    guided = network._replace(noise_fn=bdia.guided(network.noise_fn, one_call=False))
    pairs = _pairs(guided, bdia.vp_grid(sd_alphas_cumprod(), EDIT_STEPS), num_levels=int(0.8 * EDIT_STEPS))

    def edit(p: Any, x: jax.Array, source: jax.Array, target: jax.Array, w: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        null = jnp.full_like(source, network.null_class)
        out = {}
        for name, (encode, decode) in pairs.items():
            state = encode(p, x, bdia.Guidance(source, null, w))
            latent = state.z_ip1 if isinstance(state, bdia.BdiaState) else jax.tree.leaves(state)[0]
            out[name] = (decode(p, state, bdia.Guidance(target, null, w)), jnp.sqrt(jnp.mean(latent**2)))
        return out

    return jax.jit(edit)


def _edits(config: DigitsConfig, network: Network, params: Any) -> dict[str, Any]:
    """y -> (y + 5) mod 10, guidance 1 and 3: share classified as the target, squared distance to the source, latent rms."""
    digits = load()
    predict, accuracy = _classifier()
    x, labels = digits.test[: config.num_edits], digits.test_labels[: config.num_edits]
    target = (labels + 5) % 10
    found: dict[str, Any] = {"classifier": accuracy}
    for weight in (1.0, 3.0):
        images = _editor(network)(params, jnp.asarray(x), jnp.asarray(labels), jnp.asarray(target), jnp.float32(weight))
        found[f"{weight:g}"] = {
            name: {
                "accuracy": float(np.mean(predict(np.asarray(image)) == target)),
                "distance": float(np.mean((np.asarray(image) - x) ** 2)),
                "latent_rms": float(latent),
            }
            for name, (image, latent) in images.items()
        }
    return found


def _gradient(network: Network, params: Any) -> dict[str, float]:
    """Reversible against stored gradients of a scalar of the sample, gamma 1, 64 images: error, temporaries, time."""
    z, labels = _start(64, 7), jnp.asarray(load().train_labels[:64])

    def gradient(steps: int, mode: str) -> Any:
        grid = bdia.vp_grid(sd_alphas_cumprod(), steps)
        table = bdia.coefficients(grid, 1.0)

        def loss(p: Any, z: jax.Array) -> jax.Array:
            return jnp.mean(jnp.square(bdia.sample(network.noise_fn, p, z, grid, table, cond=labels, gradient=mode).z_i))

        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, z).compile()

    stored, walked = gradient(50, "autodiff"), gradient(50, "reversible")
    a, b = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(g(params, z))]) for g in (stored, walked))
    bytes_of = lambda g: float(g.memory_analysis().temp_size_in_bytes)  # noqa: E731
    ratio = _time_ratio(lambda: walked(params, z), lambda: stored(params, z), repeats=5)
    return {
        "error": float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)),
        "temporaries stored": bytes_of(stored),
        "temporaries reversible": bytes_of(walked),
        "temporaries reversible 20": bytes_of(gradient(20, "reversible")),
        "temporaries reversible 200": bytes_of(gradient(200, "reversible")),
        "time ratio": ratio,
    }


def _time_ratio(ours: Callable[[], Any], theirs: Callable[[], Any], *, repeats: int) -> float:
    """Median over alternating runs of time(ours) / time(theirs), both warm."""

    def seconds(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    seconds(ours)
    seconds(theirs)
    return float(np.median([seconds(ours) / seconds(theirs) for _ in range(repeats)]))


def _cost() -> dict[str, float]:
    """Network FLOPs of each sampler over DDIM's, counted, and wall clock over DDIM's, for a transformer, 16 images, N = 50."""
    shape = presets.DIT_DIGITS
    params, f = dit.init(shape, jax.random.key(0)), dit.noise_fn(shape)
    z, c = _start(16, 0), jnp.arange(16) % 10
    grid = bdia.vp_grid(sd_alphas_cumprod(), 50)
    runs = {
        "DDIM": lambda p, z: bdia.ddim_sample(f, p, z, grid, cond=c),
        "BDIA": lambda p, z: bdia.sample(f, p, z, grid, bdia.coefficients(grid, 0.96), cond=c).z_i,
        "O-BELM": lambda p, z: bdia.sample(f, p, z, grid, bdia.belm_coefficients(grid), cond=c).z_i,
        "EDICT": lambda p, z: bdia.edict_sample(f, p, z, grid, cond=c).x,
        "Heun": lambda p, z: bdia.heun_sample(f, p, z, grid, cond=c),
    }
    compiled = {name: jax.jit(run).lower(params, z).compile() for name, run in runs.items()}
    flops = {name: aot.count(run, params, z).flops for name, run in runs.items()}
    found = {}
    for name in ("BDIA", "O-BELM", "EDICT", "Heun"):
        found[f"flops {name}"] = flops[name] / flops["DDIM"]
        found[f"time {name}"] = _time_ratio(lambda name=name: compiled[name](params, z), lambda: compiled["DDIM"](params, z), repeats=7)
    return found


def _pictures(config: DigitsConfig, network: Network, params: Any, session: Session) -> list[str]:
    """Samples, round trips and edits as pictures, from the first network, through the functions that the studies have compiled."""
    digits = load()
    labels = digits.train_labels[: config.num_samples]
    z, first = _start(config.num_samples, 0), [int(np.argmax(labels == label)) for label in range(10)]
    rows, names = [], []
    for steps in sorted({config.steps[0], config.steps[-1]}):
        runs = {
            f"BDIA {g:g}" if g else "DDIM": functools.partial(_sweep(network, steps), params, z, labels, jnp.float32(g))
            for g in config.gammas
        }
        runs |= {name: functools.partial(_sampler(network, steps, name), params, z, labels) for name in SAMPLERS}
        rows += [np.asarray(run())[first] for run in runs.values()]
        names += [f"{name}, N = {steps}" for name in runs]
    plots.image_grid(session.figure_path("samples.png"), np.concatenate(rows), columns=10, row_labels=names, limits=(-1, 1))

    test, test_labels = digits.test[: config.num_edits], digits.test_labels[: config.num_edits]
    pick = [int(np.argmax(test_labels == label)) for label in range(10)]
    x, labels = test[pick], test_labels[pick]
    trips = _trips(network, 10)(params, jnp.asarray(test), jnp.asarray(test_labels))
    trips = {name: np.asarray(image)[pick] for name, image in trips.items()}
    shown = {name: trips[name] for name in ("DDIM", "BDIA 1", "EDICT .93", "O-BELM")}
    rows = [x, *shown.values(), *(np.abs(image - x) * 4 - 1 for image in shown.values())]
    names = ["original", *shown, *(f"{name}: 4 x |error|" for name in shown)]
    plots.image_grid(session.figure_path("round-trips.png"), np.concatenate(rows), columns=10, row_labels=names, limits=(-1, 1))

    if "edits" in config.parts:
        edits = _editor(network)(params, jnp.asarray(x), jnp.asarray(labels), jnp.asarray((labels + 5) % 10), jnp.float32(1.0))
        rows = [x, *(np.asarray(edits[name][0]) for name in ("DDIM", "BDIA 0.96", "O-BELM", "EDICT .93"))]
        plots.image_grid(
            session.figure_path("edits.png"),
            np.concatenate(rows),
            columns=10,
            row_labels=("source", "DDIM", "BDIA 0.96", "O-BELM", "EDICT .93"),
            column_labels=[f"{label} to {(label + 5) % 10}" for label in labels],
            limits=(-1, 1),
        )
    return sorted(path.name for path in session.figure_path("samples.png").parent.glob("*.png"))
