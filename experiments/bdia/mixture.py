"""The exact-score studies: errors, orders, inversion, amplification, stability, cost and gradients, without a trained network.

The noise predictor of a Gaussian mixture is known in closed form, so what is measured is the sampler and nothing else. All in float64 unless
the study is about rounding; `t` is sigma-bar, from which alpha and sigma follow exactly.
"""

import functools
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import bdia
from janax.experiments.bdia.config import MixtureConfig
from janax.experiments.session import Session

__all__ = [
    "AMPLIFIED",
    "GAMMAS",
    "STIFF",
    "VE_NOISE",
    "VP_NOISE",
    "Mixture",
    "exact_vp",
    "problems",
    "sd_alphas_cumprod",
    "study",
]

DIM = 8
STDS = (0.3, 0.5)
WEIGHTS = (0.35, 0.65)
GAMMAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.96, 1.0)


def sd_alphas_cumprod() -> np.ndarray:
    """[1000] the "scaled linear" schedule of Stable Diffusion, beta from 0.00085 to 0.012."""
    return np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


class Mixture(NamedTuple):
    """Isotropic Gaussian components.

    Attributes:
      means: [k d].
      stds: [k].
      weights: [k], adding to 1.
    """

    means: Any
    stds: Any
    weights: Any


def noise_fn(alpha_of: Callable[[jax.Array], jax.Array]) -> bdia.NoiseFn:
    """eps(z, sb) = sigma E[(z - alpha mean_k) / var_k], var_k = alpha^2 std_k^2 + sigma^2, over the posterior of the component; z is [d]."""

    def fn(params: Mixture, z: jax.Array, t: jax.Array) -> jax.Array:
        alpha = alpha_of(t)
        sigma = t * alpha
        variance = alpha**2 * params.stds**2 + sigma**2
        delta = z[None, :] - alpha * params.means
        log_r = jnp.log(params.weights) - 0.5 * jnp.sum(delta**2, 1) / variance - 0.5 * z.shape[0] * jnp.log(variance)
        return (sigma * jnp.sum((jax.nn.softmax(log_r) / variance)[:, None] * delta, 0)).astype(z.dtype)

    return jax.vmap(fn, in_axes=(None, 0, None))


VP_NOISE = noise_fn(lambda sb: 1.0 / jnp.sqrt(1.0 + sb**2))
VE_NOISE = noise_fn(jnp.ones_like)


def vp(num_steps: int) -> bdia.Grid:
    """The usual linspace grid with sigma-bar as its time."""
    grid = bdia.vp_grid(sd_alphas_cumprod(), num_steps)
    return grid._replace(time=bdia.sigma_bar(grid))


def problems(config: MixtureConfig, stds: tuple[float, float] = STDS) -> tuple[Mixture, np.ndarray]:
    """Mixtures [seeds ...] and standard normal starts [seeds batch d]."""
    rng = np.random.default_rng(0)
    means = 0.5 * rng.normal(size=(config.num_seeds, 2, DIM))
    tile = lambda x: np.tile(np.asarray(x), (config.num_seeds, 1))  # noqa: E731
    return Mixture(means, tile(stds), tile(WEIGHTS)), rng.normal(size=(config.num_seeds, config.batch_size, DIM))


def per_seed(fn: Callable[..., Any], *args: Any) -> Any:
    """fn mapped over the seeds and compiled; float64 NumPy out."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(fn))(*args))


def rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def exact_vp(config: MixtureConfig, mixtures: Mixture, noise: np.ndarray) -> np.ndarray:
    """The probability-flow solution from z_N at the top of the VP grid: many Heun steps, dense near data."""
    coarse = bdia.sigma_bar(vp(10))
    u = np.linspace(0.0, 1.0, config.exact_steps + 1)
    sb = coarse[-1] * np.sinh(6.0 * u) / np.sinh(6.0)
    alpha = 1.0 / np.sqrt(1.0 + sb**2)
    grid = bdia.Grid(alpha=alpha, sigma=sb * alpha, time=sb)
    return per_seed(lambda m, z: bdia.heun_sample(VP_NOISE, m, z, grid), mixtures, noise)


def study(config: MixtureConfig, session: Session) -> dict[str, Any]:
    """All studies, each kept on disk as it is done; lists over seeds."""
    parts: dict[str, Callable[[MixtureConfig], Any]] = {
        "parity": _parity,
        "round_trips": _round_trips,
        "errors": _errors,
        "stiffness": _stiffness,
        "orders": _orders,
        "amplification": _amplification,
        "second_state": _second_state,
        "integers": _integers,
        "edm": _edm,
        "flow": _flow,
    }
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # gammas that are too small are the subject here
        for name in session.track([name for name in parts if name in config.parts], "mixture"):
            found[name] = session.memo(f"mixture-{name}", functools.partial(parts[name], config), alone=True)
    return found


def _parity(config: MixtureConfig) -> dict[str, float]:
    mixtures, noise = problems(config)
    grid = vp(50)
    table = bdia.belm_coefficients(grid)

    def differences(m: Mixture, z: jax.Array) -> dict[str, jax.Array]:
        zero = bdia.sample(VP_NOISE, m, z, grid, bdia.coefficients(grid, 0.0)).z_i
        # O-BELM's per-step gamma may exceed one, which `coefficients` refuses as a constant and takes as an array
        same = bdia.coefficients(grid, jnp.asarray(table.a), coords="native")
        return {
            "gamma 0 is DDIM": jnp.max(jnp.abs(zero - bdia.ddim_sample(VP_NOISE, m, z, grid))),
            "O-BELM is BDIA": jnp.max(jnp.abs(bdia.sample(VP_NOISE, m, z, grid, same).z_i - bdia.sample(VP_NOISE, m, z, grid, table).z_i)),
        }

    return {name: float(value.max()) for name, value in per_seed(differences, mixtures, noise).items()}


def _methods(grid: bdia.Grid) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]]:
    """name -> (sample from noise, encode from data or a state, decode from a state)."""

    def two_step(table: bdia.BdiaCoeffs) -> Any:
        return (
            lambda m, z: bdia.sample(VP_NOISE, m, z, grid, table),
            lambda m, x: bdia.encode(VP_NOISE, m, x, grid, table, unstable="ignore"),
            lambda m, s: bdia.decode(VP_NOISE, m, s, grid, table),
        )

    coupled: dict[str, Any] = {"levels": lambda sb: (1.0 / np.sqrt(1.0 + sb**2), sb)}
    methods: dict[str, Any] = {
        "DDIM": (
            lambda m, z: bdia.ddim_sample(VP_NOISE, m, z, grid),
            lambda m, x: bdia.ddim_invert(VP_NOISE, m, x, grid),
            lambda m, s: bdia.ddim_sample(VP_NOISE, m, s, grid),
        ),
        "DDIM (target)": (
            lambda m, z: bdia.ddim_sample(VP_NOISE, m, z, grid),
            lambda m, x: bdia.ddim_invert(VP_NOISE, m, x, grid, convention="target"),
            lambda m, s: bdia.ddim_sample(VP_NOISE, m, s, grid),
        ),
    }
    for gamma in (1.0, 0.96, 0.94, 0.9, 0.5):
        methods[f"BDIA {gamma:g}"] = two_step(bdia.coefficients(grid, gamma))
    methods["O-BELM"] = two_step(bdia.belm_coefficients(grid))
    methods["EDICT .93"] = (
        lambda m, z: bdia.edict_sample(VP_NOISE, m, z, grid),
        lambda m, x: bdia.edict_encode(VP_NOISE, m, x, grid),
        lambda m, s: bdia.edict_decode(VP_NOISE, m, s, grid),
    )
    methods["reversible Heun"] = (
        lambda m, z: bdia.reversible_heun_sample(VP_NOISE, m, z, grid),
        lambda m, x: bdia.reversible_heun_encode(VP_NOISE, m, x, grid),
        lambda m, s: bdia.reversible_heun_decode(VP_NOISE, m, s, grid),
    )
    methods["coupled midpoint"] = (
        lambda m, z: bdia.coupled_sample(VP_NOISE, m, z, grid, **coupled),
        lambda m, x: bdia.coupled_encode(VP_NOISE, m, x, grid, **coupled),
        lambda m, s: bdia.coupled_decode(VP_NOISE, m, s, grid, **coupled),
    )
    return methods


def _end(state: Any, *, noisy: bool) -> jax.Array:
    """The state to look at: of a BDIA pair the outer one, of others the first chain."""
    if isinstance(state, bdia.BdiaState):
        return state.z_ip1 if noisy else state.z_i
    return state[0] if isinstance(state, tuple) else state


def _round_trips(config: MixtureConfig) -> dict[str, Any]:
    """Tables over methods: A noise -> data -> noise and B data -> noise -> data (largest error), L rms and E error of the encoded latent."""
    mixtures, noise = problems(config)
    data = exact_vp(config, mixtures, noise)
    found: dict[str, Any] = {}
    for steps in config.steps:
        grid = vp(steps)

        def trips(m: Mixture, z: jax.Array, x: jax.Array, grid: bdia.Grid = grid) -> dict[str, Any]:
            out = {}
            for name, (sample, encode, decode) in _methods(grid).items():
                encoded = encode(m, x)
                latent = _end(encoded, noisy=True)
                out[name] = {
                    "A": jnp.max(jnp.abs(_end(encode(m, sample(m, z)), noisy=True) - z)),
                    "B": jnp.max(jnp.abs(_end(decode(m, encoded), noisy=False) - x)),
                    "L": rms(latent),
                    "E": rms(latent - z),
                }
            return out

        found[f"float64 {steps}"] = jax.tree.map(lambda v: v.tolist(), per_seed(trips, mixtures, noise, data))
        if steps == 50:
            single = jax.tree.map(lambda v: np.asarray(v, np.float32), (mixtures, noise, data))
            out = jax.jit(jax.vmap(trips))(*single)
            found["float32 50"] = jax.tree.map(lambda v: np.asarray(v, np.float64).tolist(), out)
    return found


def _errors(config: MixtureConfig) -> dict[str, Any]:
    """RMS error of a sample against the exact flow, per method and N, and over gamma."""
    mixtures, noise = problems(config)
    data = exact_vp(config, mixtures, noise)
    found: dict[str, Any] = {}
    for steps in config.steps:
        grid = vp(steps)

        def errors(m: Mixture, z: jax.Array, x: jax.Array, grid: bdia.Grid = grid) -> dict[str, Any]:
            gammas = jnp.asarray(GAMMAS)
            sweep = jax.vmap(lambda g: rms(bdia.sample(VP_NOISE, m, z, grid, bdia.coefficients(grid, g)).z_i - x))(gammas)
            levels = lambda sb: (1.0 / np.sqrt(1.0 + sb**2), sb)  # noqa: E731
            return {
                "gamma": sweep,
                "DDIM": rms(bdia.ddim_sample(VP_NOISE, m, z, grid) - x),
                "O-BELM": rms(bdia.sample(VP_NOISE, m, z, grid, bdia.belm_coefficients(grid)).z_i - x),
                "EDICT .93": rms(bdia.edict_sample(VP_NOISE, m, z, grid).x - x),
                "DPM-Solver++ 2M": rms(bdia.dpm_solver_2m_sample(VP_NOISE, m, z, grid) - x),
                "Heun": rms(bdia.heun_sample(VP_NOISE, m, z, grid) - x),
                "reversible Heun": rms(bdia.reversible_heun_sample(VP_NOISE, m, z, grid).z - x),
                "coupled Euler": rms(bdia.coupled_sample(VP_NOISE, m, z, grid, tableau=bdia.EULER, levels=levels).x - x),
                "coupled midpoint": rms(bdia.coupled_sample(VP_NOISE, m, z, grid, levels=levels).x - x),
            }

        found[str(steps)] = jax.tree.map(lambda v: v.tolist(), per_seed(errors, mixtures, noise, data))
    return found


STIFF = (0.5, 0.1, 0.05, 0.02)


def _stiffness(config: MixtureConfig) -> dict[str, Any]:
    """RMS error over gamma for data of standard deviation s: [s][N] -> [seeds gammas]."""
    found: dict[str, Any] = {}
    for s in STIFF:
        mixtures, noise = problems(config, (s, s))
        data = exact_vp(config, mixtures, noise)
        for steps in (10, 50):
            grid = vp(steps)

            def sweep(m: Mixture, z: jax.Array, x: jax.Array, grid: bdia.Grid = grid) -> jax.Array:
                one = lambda g: rms(bdia.sample(VP_NOISE, m, z, grid, bdia.coefficients(grid, g)).z_i - x)  # noqa: E731
                return jax.vmap(one)(jnp.asarray(GAMMAS))

            found[f"{s:g} {steps}"] = per_seed(sweep, mixtures, noise, data).tolist()
    return found


def _edm_exact(config: MixtureConfig, mixtures: Mixture, noise: np.ndarray) -> np.ndarray:
    return per_seed(lambda m, z: bdia.heun_sample(VE_NOISE, m, z, bdia.edm_grid(2 * config.exact_steps)), mixtures, noise)


def _orders(config: MixtureConfig) -> dict[str, Any]:
    """Errors on EDM grids: method -> [steps][seeds]."""
    mixtures, noise = problems(config)
    noise = 80.0 * noise
    data = _edm_exact(config, mixtures, noise)
    found: dict[str, Any] = {}
    for steps in config.order_steps:
        grid = bdia.edm_grid(steps)

        def errors(m: Mixture, z: jax.Array, x: jax.Array, grid: bdia.Grid = grid) -> dict[str, jax.Array]:
            return {
                "DDIM": rms(bdia.ddim_sample(VE_NOISE, m, z, grid) - x),
                "BDIA 0.5": rms(bdia.sample(VE_NOISE, m, z, grid, bdia.coefficients(grid, 0.5)).z_i - x),
                "BDIA 1": rms(bdia.sample(VE_NOISE, m, z, grid, bdia.coefficients(grid, 1.0)).z_i - x),
                "O-BELM": rms(bdia.sample(VE_NOISE, m, z, grid, bdia.belm_coefficients(grid)).z_i - x),
                "Heun": rms(bdia.heun_sample(VE_NOISE, m, z, grid) - x),
                "reversible Heun": rms(bdia.reversible_heun_sample(VE_NOISE, m, z, grid).z - x),
            }

        for name, value in per_seed(errors, mixtures, noise, data).items():
            found.setdefault(name, []).append(value.tolist())
    return found


AMPLIFIED = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)


def _amplification(config: MixtureConfig) -> dict[str, Any]:
    """Noise -> data -> noise error (largest) and latent rms at N = 50 over gamma: "float32", "float64" -> [seeds gammas]."""
    mixtures, noise = problems(config)
    data = exact_vp(config, mixtures, noise)
    grid = vp(50)

    def sweep(m: Mixture, z: jax.Array, x: jax.Array) -> Any:
        def one(gamma: jax.Array) -> Any:
            table = bdia.coefficients(grid, gamma)
            back = bdia.encode(VP_NOISE, m, bdia.sample(VP_NOISE, m, z, grid, table), grid, table).z_ip1
            return jnp.max(jnp.abs(back - z)), rms(bdia.encode(VP_NOISE, m, x, grid, table).z_ip1)

        return jax.vmap(one)(jnp.asarray(AMPLIFIED, z.dtype))

    double = per_seed(sweep, mixtures, noise, data)
    single = jax.jit(jax.vmap(sweep))(*jax.tree.map(lambda v: np.asarray(v, np.float32), (mixtures, noise, data)))
    return {
        "predicted": [float(bdia.amplification(bdia.coefficients(grid, g)).total) for g in AMPLIFIED],
        "float64": double[0].tolist(),
        "float32": np.asarray(single[0], np.float64).tolist(),
        "latent_rms": double[1].tolist(),
    }


def _second_state(config: MixtureConfig) -> dict[str, list[float]]:
    """Mean squared reconstruction error at N = 50 from the pair, and from z_N alone with a DDIM restart."""
    mixtures, noise = problems(config)
    data = exact_vp(config, mixtures, noise)
    grid = vp(50)

    def drop(m: Mixture, x: jax.Array) -> dict[str, jax.Array]:
        out = {"DDIM": jnp.mean((bdia.ddim_sample(VP_NOISE, m, bdia.ddim_invert(VP_NOISE, m, x, grid), grid) - x) ** 2)}
        for gamma in (1.0, 0.96, 0.94, 0.9):
            table = bdia.coefficients(grid, gamma)
            pair = bdia.encode(VP_NOISE, m, x, grid, table)
            out[f"pair {gamma:g}"] = jnp.mean((bdia.decode(VP_NOISE, m, pair, grid, table).z_i - x) ** 2)
            out[f"restart {gamma:g}"] = jnp.mean((bdia.sample(VP_NOISE, m, pair.z_ip1, grid, table).z_i - x) ** 2)
        return out

    return {name: value.tolist() for name, value in per_seed(drop, mixtures, data).items()}


def _integers(config: MixtureConfig) -> dict[str, Any]:
    """Largest difference in units of 2^-16 after noise -> data -> noise, and the side information used, at N = 50."""
    mixtures, noise = problems(config)
    grid = vp(50)
    found: dict[str, Any] = {}
    for gamma in (Fraction(1), Fraction(24, 25), Fraction(9, 10), Fraction(1, 2)):

        def trip(m: Mixture, z: jax.Array, gamma: Fraction = gamma) -> Any:
            sampled = bdia.integer_sample(VP_NOISE, m, z, grid, gamma=gamma)
            back = bdia.integer_encode(VP_NOISE, m, sampled, grid, gamma=gamma)
            error = jnp.max(jnp.abs(back.n_ip1 - bdia.quantize(z, bits=16)))
            floats = bdia.sample(VP_NOISE, m, z, grid, bdia.coefficients(grid, float(gamma))).z_i
            shift = jnp.max(jnp.abs(bdia.dequantize(sampled.n_i, bits=16, dtype=z.dtype) - floats))
            limbs = sampled.side.astype(jnp.float64) * (65536.0 ** jnp.arange(sampled.side.shape[0]))[:, None, None]
            used = jnp.max(jnp.log2(1.0 + jnp.sum(limbs, 0))) if sampled.side.shape[0] else jnp.zeros(())
            return error, jnp.sum(back.side), shift, used, sampled.overflow

        error, left, shift, used, overflow = per_seed(trip, mixtures, noise)
        found[str(gamma)] = {
            "error": int(error.max()),
            "left": int(left.max()),
            "shift": float(shift.max()),
            "bits_used": float(used.max()),
            "bits_predicted": bdia.side_bits(50, gamma),
            "overflow": bool(overflow.any()),
        }
    return found


def _edm(config: MixtureConfig) -> dict[str, Any]:
    """Errors on EDM grids of 18, 25 and 50 steps, all seeds: Heun, BDIA on Heun in three variants, BDIA in two coordinate systems."""
    mixtures, noise = problems(config)
    noise = 80.0 * noise
    data = _edm_exact(config, mixtures, noise)
    found: dict[str, Any] = {}
    for steps in (18, 25, 50):
        grid = bdia.edm_grid(steps)

        def errors(m: Mixture, z: jax.Array, x: jax.Array, grid: bdia.Grid = grid) -> dict[str, Any]:
            gammas = jnp.asarray([0.5, 0.8, 1.0])
            out: dict[str, Any] = {"Heun": rms(bdia.heun_sample(VE_NOISE, m, z, grid) - x)}
            for variant in ("euler", "heun", "reuse"):
                heun = lambda g, v=variant: bdia.bdia_heun_sample(VE_NOISE, m, z, grid, gamma=g, variant=v)  # noqa: E731
                out[variant] = jax.vmap(lambda g, heun=heun: rms(heun(g).z_i - x))(gammas)
            for coords in ("vp", "ve"):
                out[coords] = rms(bdia.sample(VE_NOISE, m, z, grid, bdia.coefficients(grid, 1.0, coords=coords)).z_i - x)
            return out

        found[str(steps)] = jax.tree.map(lambda v: v.tolist(), per_seed(errors, mixtures, noise, data))
    return found


def _flow(config: MixtureConfig) -> dict[str, Any]:
    """Data -> noise -> data rms in the clock sigma-bar of the midpoint-type solvers and of fixed-point inversion, N = 10 and 50."""
    mixtures, noise = problems(config)
    data = exact_vp(config, mixtures, noise)
    velocity = bdia.sigma_bar_velocity(VP_NOISE, lambda sb: (1.0 / jnp.sqrt(1.0 + sb**2), sb))  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for steps in (10, 50):
        grid = vp(steps)
        times = bdia.sigma_bar(grid)

        def trips(m: Mixture, x: jax.Array, grid: bdia.Grid = grid, times: np.ndarray = times) -> dict[str, jax.Array]:
            out = {}
            for method in ("midpoint", "fireflow", "uni", "euler"):
                up = bdia.flow_solve(velocity, m, x, times, method=method)
                out[method] = rms(bdia.flow_solve(velocity, m, up, times[::-1], method=method) - x)
            for count in (1, 2, 3, 5, 10):
                up, _ = bdia.fixed_point_invert(VP_NOISE, m, x, grid, num_iters=count)
                out[f"fixed point {count}"] = rms(bdia.ddim_sample(VP_NOISE, m, up, grid) - x)
            return out

        found[str(steps)] = {name: value.tolist() for name, value in per_seed(trips, mixtures, data).items()}
    return found
