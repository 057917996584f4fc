"""Several processes as one run: how they find each other, agree, and end together.

Every process runs the same program; arrays are global, and what happens next must be the same everywhere. `agreed`, `anyone`, `from_main`
and `together` are therefore called by all processes, in the same order. In a run of one process nothing is sent and nothing waits.
Importing this module does not load JAX, and neither do these functions in a process that has not loaded it.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from janax.experiments.errors import NonFiniteError, StoppedError, UserError

if TYPE_CHECKING:
    import jax

__all__ = ["Vote", "agreed", "all_are_here", "anyone", "count", "from_main", "index", "start", "started", "together"]

T = TypeVar("T")

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JANAX_NUM_PROCESSES", "JANAX_PROCESS_ID"
_BY_HAND = f"{_ADDRESS}=HOST:PORT of process 0, {_COUNT} and {_INDEX}"
_GRACE_SECONDS = 10
_SECONDS_BETWEEN_VOTES = 1.0
_TEXT_BYTES = 2048
_TOLD = {kind.__name__: kind for kind in (UserError, NonFiniteError, StoppedError)}


def start(say: Callable[[str], None]) -> None:
    """Joins this process to the others of the run by `jax.distributed`; call it before anything is computed.

    On Cloud TPU, GKE, SLURM and Open MPI, JAX finds the others by itself. Elsewhere every process is given JAX_COORDINATOR_ADDRESS, which
    JAX reads, and JANAX_NUM_PROCESSES and JANAX_PROCESS_ID, for which it has no variables.

    Args:
      say: Is told whom this process waits for, where that is known beforehand.

    Raises:
      UserError: if the variables are incomplete or contradict each other, no cluster is found, or the coordinator cannot be started.
    """
    options = _by_hand()
    import jax

    if options:
        say(
            f"process {options['process_id']} of {options['num_processes']}, "
            f"meeting the others at {options['coordinator_address']} (for up to five minutes)"
        )
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        raise UserError(
            f"--distributed finds no cluster that JAX knows (Cloud TPU, GKE, SLURM, Open MPI); give every process {_BY_HAND}"
        ) from error
    except RuntimeError as error:
        raise UserError(f"--distributed could not start: {' '.join(str(error).split())[:200]}; is the coordinator's port free?") from error
    # jax.distributed has put a handler of its own in the place of Python's; until a session sets another, SIGTERM ends the process.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _by_hand() -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize` from our variables; none if they are not set, and JAX looks for a cluster."""
    given = {name: os.environ.get(name, "") for name in (_ADDRESS, _COUNT, _INDEX)}
    if not given[_COUNT] and not given[_INDEX]:
        return {}
    for name, value in given.items():
        if not value:
            there = next(other for other in (_COUNT, _INDEX) if given[other])
            raise UserError(f"{there} is set and {name} is not; give every process {_BY_HAND}")
    for name in (_COUNT, _INDEX):
        if not given[name].isascii() or not given[name].isdigit():
            raise UserError(f"{name} must be a number, got {given[name]!r}")
    num_processes, process_id = int(given[_COUNT]), int(given[_INDEX])
    if not num_processes:
        raise UserError(f"{_COUNT} must be at least 1, got 0")
    if process_id >= num_processes:
        raise UserError(f"{_INDEX} must be between 0 and {num_processes - 1}, as {_COUNT} is {num_processes}; got {process_id}")
    host, _, port = given[_ADDRESS].rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{_ADDRESS} must be HOST:PORT, got {given[_ADDRESS]!r}")
    return {
        "coordinator_address": given[_ADDRESS],
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }


def started() -> bool:
    """Whether this process is one of those that `jax.distributed` joined, be it the only one."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def count() -> int:
    """The number of processes; one where JAX has not been loaded."""
    return sys.modules["jax"].process_count() if "jax" in sys.modules else 1


def index() -> int:
    """This process's number; process 0 writes files and speaks."""
    return sys.modules["jax"].process_index() if "jax" in sys.modules else 0


def agreed(flag: bool) -> bool:
    """The flag of process 0, in every process: what they do next must not depend on when each of them looked."""
    if count() == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


def anyone(flag: bool) -> bool:
    """Whether the flag is true in any process, in every process."""
    if count() == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def from_main(compute: Callable[[], T]) -> T:
    """What `compute` returns in process 0, in every process; only process 0 calls it.

    Args:
      compute: Returns JSON values, which the other processes get as JSON gives them back. Local work: no array of several processes.

    Returns:
      The value.

    Raises:
      UserError, NonFiniteError, StoppedError: in every process, if `compute` raises it.
      RuntimeError: in the other processes, if `compute` raises anything else.
    """
    if count() == 1:
        return compute()
    if index() == 0:
        try:
            value = compute()
            data = json.dumps({"value": value}).encode()
        except Exception as error:
            _broadcast(json.dumps({"error": type(error).__name__, "text": str(error)}).encode())
            raise
        _broadcast(data)
        return value
    outcome = json.loads(_broadcast(b""))
    if "error" not in outcome:
        return outcome["value"]
    kind = _TOLD.get(outcome["error"])
    raise RuntimeError(f"process 0 failed with {outcome['error']}: {outcome['text']}") if kind is None else kind(outcome["text"])


def _broadcast(data: bytes) -> bytes:
    """The bytes of process 0, in every process."""
    import numpy as np
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(data), np.int32)))
    buffer = np.zeros(1 << (length - 1).bit_length(), np.uint8)  # a power of two: few lengths, few compilations
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    return multihost_utils.broadcast_one_to_all(buffer)[:length].tobytes()


def together(check: Callable[[], None]) -> None:
    """Calls `check` in every process; if it raises UserError in any, all raise that of the first.

    Raises:
      UserError: in all processes or in none.
    """
    if count() == 1:
        check()
        return
    import numpy as np
    from jax.experimental import multihost_utils

    text = b""
    try:
        check()
    except UserError as error:
        text = str(error).encode()[:_TEXT_BYTES]
    buffer = np.zeros(_TEXT_BYTES, np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    for row in multihost_utils.process_allgather(buffer):
        if row.any():
            raise UserError(row.tobytes().rstrip(b"\0").decode(errors="ignore"))


def all_are_here() -> bool:
    """Whether all processes call this within a few seconds; to be asked once, by a process that is about to end with an error.

    Yes: all have the same error, process 0 tells it for them, and they part in good order. No: the others do not know and may be waiting
    for this one; it tells its error itself and must end without the farewell of `jax.distributed`, which would wait for them.
    """
    if not started():
        return True
    from orbax.checkpoint import multihost

    try:
        multihost.get_barrier_sync_fn()(key="janax:end", timeout_ms=1000 * _GRACE_SECONDS)
    except Exception:  # a deadline, or a coordinator that is gone: either way not all are here
        return False
    return True


class Vote:
    """Whether any process raised its flag, learnt by all at the same step, without waiting for the devices.

    At a vote the flags of all processes are joined on the devices, in line with the steps; what is read is the vote before, which has
    been there for long. The slowest process's clock travels with the flags, so all know the same number of steps until the next
    vote: about a second's worth. A flag is thus heard after two seconds, or two steps if they are longer.

    Args:
      mesh: The devices of the processes that vote.
    """

    def __init__(self, mesh: "jax.sharding.Mesh"):
        import jax
        from jax.sharding import NamedSharding

        self._size = mesh.size
        self._where = NamedSharding(mesh, jax.P(mesh.axis_names))
        self._join = jax.jit(lambda ballots: ballots.max(axis=0), out_shardings=NamedSharding(mesh, jax.P()))
        self._before: tuple[Any, int] | None = None  # the vote that is on its way, and the steps since the one before it
        self._interval, self._next, self._time = 1, 0, time.monotonic()

    def __call__(self, step: int, flag: bool) -> bool:
        """To be called by every process after every step, with growing numbers."""
        if step < self._next:
            return False
        import jax
        import numpy as np

        now = time.monotonic()
        mine = np.tile(np.asarray([flag, now - self._time], np.float32), (len(self._where.addressable_devices), 1))
        joined = self._join(jax.make_array_from_process_local_data(self._where, mine, (self._size, 2)))
        stop, steps = False, self._interval
        if self._before is not None:
            (any_flag, seconds), measured = np.asarray(self._before[0]), self._before[1]
            stop = bool(any_flag)
            self._interval = max(1, min(int(measured * _SECONDS_BETWEEN_VOTES / max(float(seconds), 1e-3)), 4 * steps, 1000))
        self._before, self._time, self._next = (joined, steps), now, step + self._interval
        return stop
