"""Metrics rows on disk: one JSON object a line, and the same numbers for TensorBoard.

A row is {"run": name, "step": step, metric: value, ...}. It holds no clock, so that an interrupted run that was resumed writes the very
rows of one that was not.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["MetricsWriter", "read_rows"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut off by a crash is passed over, a missing file has no rows."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


class MetricsWriter:
    """Appends the rows of one training run to a file that several runs may share.

    Args:
      workdir: Holds metrics.jsonl and tensorboard/.
      run: Name of the training run within the experiment.
      start: Step that was restored; rows of this run beyond it are dropped first, so the file continues where the state does.
      tensorboard: Write event files, too.
    """

    def __init__(self, workdir: Path, run: str, *, start: int = 0, tensorboard: bool = True):
        self._run = run
        path = workdir / "metrics.jsonl"
        kept = [row for row in read_rows(path) if row.get("run") != run or row["step"] <= start]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")
        self._events = None
        if tensorboard:
            import tensorboardX

            self._events = tensorboardX.SummaryWriter(str(workdir / "tensorboard" / run), purge_step=start + 1 if start else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row; nan and infinity are written as null."""
        self._file.write(_line({"run": self._run, "step": step} | {name: _number(value) for name, value in values.items()}))
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def sync(self) -> None:
        """Puts the rows on the disk; called before a checkpoint, whose rows must not be missing after a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def _number(value: float) -> float | int | None:
    return value if math.isfinite(value) else None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
