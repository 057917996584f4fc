"""DiT forward pass and ten DDIM-like steps: janax beside diffusers' `DiTTransformer2DModel`, same weights, same threads, one process.

    python benchmarks/dit_forward.py [--sizes digits small] [--threads 2] [--seconds 20] [--eigen] [--json FILE]

Needs torch and diffusers next to janax. The two are timed alternately after a warm-up; a ratio below 1 means that janax is faster. torch's
threads are told to sleep at barriers (OMP_WAIT_POLICY=PASSIVE, unless set): if they spin, a neighbour on the machine makes torch tens of
times slower, which says nothing about janax. Processor time over all threads is reported beside wall time. Compile time is apart.

What was tried for XLA on CPU (AVX2, jax 0.10.2; processor time of one core, relative to the code as it is; S/2 cut to two layers):
  attention without the explicit transpose to [b heads t k] before its products     3.2 (attention alone, wall time on 2 cores)
  unrolled layers instead of scan                                                   1.2 (S/2), 1.0 (digits); compiles 2 to 6 times as long
  YNNPACK fusions off (`--eigen`: an option of the compiler, not of the code)       0.85 to 0.89 (S/2), 1.06 (digits)
  one-pass variance, norm with folded scale, GELU by sigmoid, late softmax division, queries scaled before the product, optimisation
  barriers around norm, attention and GELU                                          0.97 to 1.05, the noise of the measurement
  kernels stored transposed, tokens merged by hand, precision "highest"             1.0 (the expanding product alone)
Most of S/2 is its products of [4096 384] with [384 1152] and [384 1536]: 66 and 86 ms of one core with XLA's default (YNNPACK), 50 and
66 ms with Eigen, where YNNPACK is the faster one for attention (45 against 71 ms). Whoever runs large models on CPUs of this kind may want
`jax.jit(f, compiler_options={"xla_cpu_experimental_ynn_fusion_type": ""})`, or the same in XLA_FLAGS; measure first.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH, STEPS = 16, 10


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=("digits", "small"), default=["digits", "small"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="time for one comparison; at least three rounds are run")
    parser.add_argument("--eigen", action="store_true", help="also time janax compiled without YNNPACK fusions")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def _measure(contestants: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[tuple[float, float]]]:
    """Alternating rounds of (wall, processor) seconds after two warm-up calls each."""
    start = time.perf_counter()
    for run in contestants.values():
        run()
        run()
    per_round = (time.perf_counter() - start) / 2
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(min(200, max(3, round(seconds / per_round)))):
        for name, run in contestants.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return times


def _spread(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def main() -> None:
    arguments = _arguments()
    if hasattr(os, "sched_setaffinity"):  # before the thread pools are made
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: arguments.threads]))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    import diffusers
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from janax.models import dit, loading, presets

    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    versions = {"jax": jax.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, float32, batch {BATCH}, {versions}")
    rows = []

    for size in arguments.sizes:
        config = {"digits": presets.DIT_DIGITS, "small": presets.DIT_S_2}[size]
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(lambda key, config=config: dit.init(config, key), jax.random.key(0))
        params = jax.tree.map(lambda leaf, rng=rng: jnp.asarray(0.03 * rng.standard_normal(leaf.shape, np.float32)), shapes)
        with tempfile.TemporaryDirectory() as directory:
            loading.save_dit(directory, config, params)
            model = diffusers.DiTTransformer2DModel.from_pretrained(directory).eval()

        z = rng.standard_normal((BATCH, config.image_size, config.image_size, config.channels)).astype(np.float32)
        labels = np.arange(BATCH) % config.num_classes
        torch_z, torch_labels = torch.tensor(z.transpose(0, 3, 1, 2).copy()), torch.tensor(labels)
        grid = np.linspace(0, 999, STEPS + 1)
        alpha = np.cos(grid / 1000 * np.pi / 2)
        sigma = np.sqrt(1 - alpha**2)
        levels = np.arange(STEPS, 0, -1)
        of_z = alpha[levels - 1] / alpha[levels]
        of_eps = sigma[levels - 1] - of_z * sigma[levels]
        schedule = np.stack([grid[levels], of_z, of_eps], axis=1).astype(np.float32)

        def forward(params, z, labels, config=config):
            return dit.apply(config, params, z, 500.0, labels)

        def sample(params, z, labels, schedule, config=config):
            def step(z, level):
                t, of_z, of_eps = level
                return of_z * z + of_eps * dit.apply(config, params, z, t, labels), None

            return jax.lax.scan(step, z, schedule)[0]

        def torch_forward(model=model, z=torch_z, labels=torch_labels, channels=config.channels):
            return model(z, torch.full((BATCH,), 500.0), labels).sample[:, :channels]

        def torch_sample(model=model, z=torch_z, labels=torch_labels, channels=config.channels, schedule=schedule):
            for t, a, b in schedule.tolist():
                z = a * z + b * model(z, torch.full((BATCH,), t), labels).sample[:, :channels]
            return z

        for task, ours, theirs, inputs in (
            ("forward", forward, torch_forward, (params, jnp.asarray(z), jnp.asarray(labels))),
            (f"{STEPS} steps", sample, torch_sample, (params, jnp.asarray(z), jnp.asarray(labels), jnp.asarray(schedule))),
        ):
            contestants: dict[str, Callable[[], Any]] = {"diffusers": theirs}
            compile_seconds, expected = {}, theirs().numpy().transpose(0, 2, 3, 1)
            for name, options in (("janax", {}), ("janax, eigen", {"xla_cpu_experimental_ynn_fusion_type": ""})):
                if options and not arguments.eigen:
                    continue
                start = time.perf_counter()
                compiled = jax.jit(ours).lower(*inputs).compile(options)
                compile_seconds[name] = time.perf_counter() - start
                contestants[name] = lambda compiled=compiled, inputs=inputs: compiled(*inputs).block_until_ready()
                error = float(np.max(np.abs(np.asarray(contestants[name]()) - expected)) / np.max(np.abs(expected)))
                if error > 1e-3:
                    sys.exit(f"{size}, {task}: {name} differs from diffusers by {error:.1e} of the largest value; nothing was timed")
                temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
                rows.append({"size": size, "task": task, "name": name, "error": error, "temporary_mib": temporary})
            times = _measure(contestants, arguments.seconds)
            for row in rows[-len(compile_seconds) :]:
                pairs = list(zip(times[row["name"]], times["diffusers"]))
                ratio = _spread([a[0] / b[0] for a, b in pairs])
                processor = _spread([a[1] / b[1] for a, b in pairs])
                milliseconds = [1e3 * statistics.median(x[0] for x in times[name]) for name in (row["name"], "diffusers")]
                row |= {"ratio": ratio, "processor_ratio": processor, "ms": milliseconds[0], "diffusers_ms": milliseconds[1]}
                row |= {"rounds": len(pairs), "compile_seconds": compile_seconds[row["name"]]}
                print(
                    f"{size:6} {z.shape} {task:8} {row['name']:12} {milliseconds[0]:9.2f} ms, diffusers {milliseconds[1]:9.2f} ms; "
                    f"ratio {ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}], processor time {processor[0]:.3f} "
                    f"[{processor[1]:.3f}, {processor[2]:.3f}]; {len(pairs)} rounds; trace and compile {row['compile_seconds']:.1f} s; "
                    f"temporaries {row['temporary_mib']:.0f} MiB; relative error {row['error']:.0e}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions, "threads": arguments.threads, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
