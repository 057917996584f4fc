"""What the benchmarks share: alternating runs in one process, median ratio and spread, and what they ran on."""

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def seconds(run: Callable[[], Any]) -> float:
    """Wall clock of one call, waiting for the device."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def alternate(ours: Callable[[], Any], theirs: Callable[[], Any], *, repeats: int) -> dict[str, float]:
    """Median seconds of both and of their ratio over alternating warm runs, with the ratio's range."""
    seconds(ours)
    seconds(theirs)
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    ratios = [a / b for a, b in pairs]
    return {
        "ours_seconds": statistics.median(a for a, _ in pairs),
        "theirs_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "repeats": repeats,
    }


def counted(run: Callable[[], Any], spent: list[float]) -> Callable[[], Any]:
    """`run`, adding the processor seconds of each call to `spent`: other programs on the machine disturb those less."""
    import jax

    def call() -> Any:
        start = time.process_time()
        out = jax.block_until_ready(run())
        spent.append(time.process_time() - start)
        return out

    return call


def environment(*packages: str) -> dict[str, Any]:
    """Versions, cores and peak memory so far."""
    versions = {"python": platform.python_version()}
    for package in ("janax", "jax", "jaxlib", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"versions": versions, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "peak_rss_mib": round(peak)}


def show(title: str, rows: Mapping[str, Any]) -> None:
    """One JSON line per result, ready to be kept."""
    for name, value in rows.items():
        print(json.dumps({"benchmark": title, "case": name, **value} if isinstance(value, Mapping) else {"benchmark": title, name: value}))
