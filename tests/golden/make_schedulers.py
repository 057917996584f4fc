"""Makes tests/golden/schedulers: trajectories of diffusers' schedulers in float32 under a noise network that anyone can evaluate.

Run with torch 2.13.0 and diffusers 0.42.1 (the versions used are stored in every file): python tests/golden/make_schedulers.py
One thread, CPU. The network, in `network.npz` and in `network` below, is written once more in the test that reads these files; it keeps a
state of unit size at unit size, so that errors are neither damped nor amplified much.

Every case NAME has in the file of its scheduler
  NAME_shown     [calls ...] what the network was shown, in order: every state before its step, and the predictor's states of Heun
  NAME_times     [calls] the times it was shown them at
  NAME_result    [...] the end of the trajectory
  NAME_float64   [...] the end when the same step code is given its float32 tables in float64, where it does not force float32 itself
  NAME_sigmas    [N+1] the scheduler's levels sigma / alpha, noise to data, where it keeps them
and `ddim.npz` the alphas_cumprod [1000] of all of them, a cumulative product taken in float32.
"""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

DIRECTORY = Path(__file__).parent / "schedulers"
SHAPE = (2, 2, 2, 4)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
STEPS = (10, 50)


def make_network() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    size = int(np.prod(SHAPE[1:]))
    network = {
        "weight": rng.normal(size=(size, size)) / np.sqrt(size),
        "rate": rng.uniform(0.0, 3.0, size),
        "phase": rng.uniform(0.0, 6.0, size),
        "start": rng.normal(size=SHAPE),
    }
    return {name: value.astype(np.float32) for name, value in network.items()}


class Networks:
    """The two kinds of networks, in the dtype of the state; they remember what they are shown."""

    def __init__(self, parameters: dict[str, np.ndarray]):
        self.parameters = parameters
        self.shown: list[np.ndarray] = []
        self.times: list[float] = []

    def features(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """tanh(z weight + cos(rate t + phase)) over the flattened example."""
        weight, rate, phase = (torch.from_numpy(self.parameters[name]).to(z.dtype) for name in ("weight", "rate", "phase"))
        return torch.tanh(z.flatten(1) @ weight + torch.cos(rate * t + phase)).reshape(z.shape)

    def noise(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Told a training step: about sigma(t) z, which is right for unit Gaussian data, and a bounded rest."""
        self.remember(z, t)
        tau = t.to(z.dtype) / 1000
        sigma = torch.sqrt(-torch.expm1(-tau * (0.85 + tau * (2.34 + tau * 2.15))))
        return sigma * z + 0.3 * self.features(z, tau)

    def raw(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Told log(sigma) / 4: the network inside EDM's preconditioning."""
        self.remember(z, t)
        return self.features(z, t.to(z.dtype))

    def remember(self, z: torch.Tensor, t: torch.Tensor) -> None:
        self.shown.append(z.numpy().copy())
        self.times.append(float(t))


def run(scheduler: Any, parameters: dict[str, np.ndarray], sample: torch.Tensor, kind: str) -> tuple[Networks, np.ndarray]:
    """The usual loop around a scheduler."""
    networks = Networks(parameters)
    for t in scheduler.timesteps:
        sample = scheduler.step(getattr(networks, kind)(scheduler.scale_model_input(sample, t), t), t, sample).prev_sample
    return networks, sample.numpy()


def record(into: dict[str, np.ndarray], name: str, outcome: tuple[Networks, np.ndarray]) -> None:
    networks, result = outcome
    assert result.dtype == np.float32 and np.isfinite(result).all()
    into |= {f"{name}_shown": np.stack(networks.shown), f"{name}_times": np.array(networks.times), f"{name}_result": result}


def make_ddim(parameters: dict[str, np.ndarray], *, inverse: bool) -> dict[str, np.ndarray]:
    start = torch.from_numpy(parameters["start"])
    files: dict[str, np.ndarray] = {}
    kinds = [("leading", 0), ("leading", 1), ("trailing", 0)] + [("linspace", 0)] * (not inverse)  # the inverse scheduler has no linspace
    for spacing, offset in kinds:
        for to_one in (True, False):
            for steps in STEPS:
                settings = SCHEDULE | {
                    "timestep_spacing": spacing,
                    "steps_offset": offset,
                    "set_alpha_to_one": to_one,
                    "clip_sample": False,
                }
                scheduler = (diffusers.DDIMInverseScheduler if inverse else diffusers.DDIMScheduler)(**settings)
                scheduler.set_timesteps(steps)
                name = f"{spacing}{offset}_{'one' if to_one else 'first'}_{steps}"
                record(files, name, run(scheduler, parameters, start, "noise"))
                files["alphas_cumprod"] = scheduler.alphas_cumprod.numpy()
                for table in ("alphas_cumprod", "initial_alpha_cumprod" if inverse else "final_alpha_cumprod"):
                    setattr(scheduler, table, getattr(scheduler, table).double())
                files[f"{name}_float64"] = run(scheduler, parameters, start.double(), "noise")[1]
    return files


def make_dpm_solver(parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    files: dict[str, np.ndarray] = {}
    for final, steps, lower in (
        ("zero", 10, True),
        ("zero", 50, True),
        ("sigma_min", 10, True),
        ("sigma_min", 10, False),
        ("sigma_min", 50, True),
    ):
        scheduler = diffusers.DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            final_sigmas_type=final,
            lower_order_final=lower,
            **SCHEDULE,
        )
        scheduler.set_timesteps(steps)
        name = f"{final}_{'lower' if lower else 'full'}_{steps}"
        files[f"{name}_sigmas"] = scheduler.sigmas.numpy()
        record(files, name, run(scheduler, parameters, torch.from_numpy(parameters["start"]), "noise"))
    return files


def make_heun(parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    files: dict[str, np.ndarray] = {}
    for steps in STEPS:
        for double in (False, True):
            scheduler = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True, **SCHEDULE)
            scheduler.set_timesteps(steps)
            dtype = torch.float64 if double else torch.float32
            scheduler.sigmas = scheduler.sigmas.to(dtype)
            start = torch.from_numpy(parameters["start"]).to(dtype) * torch.sqrt(1 + scheduler.sigmas[0] ** 2)
            outcome = run(scheduler, parameters, start, "noise")
            if double:
                files[f"karras_{steps}_float64"] = outcome[1]
            else:
                files[f"karras_{steps}_sigmas"] = torch.unique_consecutive(scheduler.sigmas).numpy()  # inner ones are listed twice
                record(files, f"karras_{steps}", outcome)
    return files


def make_edm(parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    files: dict[str, np.ndarray] = {}
    for kind, make in (("euler", diffusers.EDMEulerScheduler), ("dpm", diffusers.EDMDPMSolverMultistepScheduler)):
        for steps in STEPS:
            scheduler = make(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
            scheduler.set_timesteps(steps)
            files[f"{kind}_{steps}_sigmas"] = scheduler.sigmas.numpy()
            record(files, f"{kind}_{steps}", run(scheduler, parameters, scheduler.sigmas[0] * torch.from_numpy(parameters["start"]), "raw"))
    return files


def main() -> None:
    torch.set_num_threads(1)
    network = make_network()
    files = {
        "network": network,
        "ddim": make_ddim(network, inverse=False),
        "ddim_inverse": make_ddim(network, inverse=True),
        "dpm_solver": make_dpm_solver(network),
        "heun": make_heun(network),
        "edm": make_edm(network),
    }
    DIRECTORY.mkdir(exist_ok=True)
    versions = np.array([f"diffusers {diffusers.__version__}", f"torch {torch.__version__}"])
    for name, arrays in files.items():
        path = DIRECTORY / f"{name}.npz"
        np.savez_compressed(path, allow_pickle=False, **arrays, versions=versions)
        results = [np.abs(value).max() for key, value in arrays.items() if key.endswith("_result")]
        print(
            f"{path.name}: {len(results)} cases, {path.stat().st_size / 1024:.0f} KB, largest entry of a result {max(results, default=0):.2f}"
        )


if __name__ == "__main__":
    main()
