"""Checkpoints of any tree of arrays: written in the background, committed atomically, the newest and the best kept (orbax).

    with Checkpoints(workdir / "checkpoints" / "train", keep_last=2) as checkpoints:
        checkpoints.save(step, state)
        state = checkpoints.restore(checkpoints.latest(), like=state)

The tree is stored flat, one array per path, so that named tuples, Flax states and optax states need no registration, and a restore
places every array as its template says: on another mesh than it was saved from, if need be.
"""

import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from janax.experiments import processes
from janax.experiments.errors import UserError
from janax.jaxlib_ext import sharding

__all__ = ["Checkpoints"]

_METRIC = "score"


class Checkpoints:
    """A directory of checkpoints, one per step.

    Args:
      directory: Made if it is not there. What an interrupted write left behind is removed.
      keep_last: How many of the newest stay.
      keep_best: How many of the best, by the metric given to `save`, stay as well.
      best_mode: Whether a small or a large metric is good.
    """

    def __init__(self, directory: Path, *, keep_last: int = 2, keep_best: int = 0, best_mode: Literal["min", "max"] = "min"):
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._keep_best = keep_best
        self._sign = 1.0 if best_mode == "max" else -1.0
        policies: list[Any] = [preservation_policy.LatestN(keep_last)]
        if keep_best:
            best = preservation_policy.BestN(get_metric_fn=lambda m: m[_METRIC], n=keep_best, keep_checkpoints_without_metrics=False)
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            best_fn=(lambda m: m[_METRIC]) if keep_best else None,
            cleanup_tmp_directories=True,
        )
        self.directory = directory
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def latest(self) -> int | None:
        """The newest committed step, None if there is none; of several processes, as process 0 sees the directory."""
        return processes.from_main(self._manager.latest_step)

    def steps(self) -> tuple[int, ...]:
        """The committed steps, ascending."""
        return tuple(sorted(self._manager.all_steps()))

    def best(self) -> int | None:
        """The committed step with the best metric; None if there is none, or none is kept for its metric (`keep_best` is zero)."""
        self.wait()
        return self._manager.best_step() if self._keep_best else None

    def save(self, step: int, state: Any, *, metric: float | None = None) -> None:
        """Starts writing `state`; returns as soon as its arrays may be donated.

        Args:
          step: Name of the checkpoint.
          state: Tree of arrays; typed PRNG keys are stored by their data.
          metric: What `keep_best` compares.
        """
        # The CPU client hands out views of its buffers: a donated state must be copied before the writer sees it.
        leaves = _flat(_copy(state) if jax.default_backend() == "cpu" else state)
        metrics = None if metric is None else {_METRIC: self._sign * float(metric)}
        self._manager.save(step, args=ocp.args.StandardSave(leaves), metrics=metrics, force=True)

    def restore(self, step: int | None, *, like: Any) -> Any:
        """Reads a checkpoint.

        Args:
          step: Which one; None is the newest.
          like: Tree of arrays or `jax.ShapeDtypeStruct`s that gives structure, shapes, dtypes and placement.

        Returns:
          The tree, each leaf placed like its template.

        Raises:
          UserError: if there is no such checkpoint, or it holds other arrays than `like` asks for.
        """
        step = self.latest() if step is None else step
        if step is None or not processes.agreed(step in self._manager.all_steps()):
            raise UserError(f"{self.directory} holds no checkpoint{'' if step is None else f' of step {step}'}; run the experiment first")
        templates = _flat(like)
        abstract = {name: _abstract(leaf) for name, leaf in templates.items()}
        try:
            stored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the checkpoint {self.directory / str(step)} does not fit this model: "
                f"{' '.join(str(error).split())[:160]}; use another --workdir"
            ) from error
        paths, structure = jax.tree_util.tree_flatten_with_path(like)
        leaves = []
        for path, template in paths:
            value = stored[_name(path)]
            if _is_key(template):
                value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(template))
            leaves.append(value)
        return jax.tree.unflatten(structure, leaves)

    def wait(self) -> None:
        """Returns when everything saved is committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and ends the writer."""
        self._manager.wait_until_finished()
        self._manager.close()


def _name(path: tuple[Any, ...]) -> str:
    return sharding.path_string(path).replace("/", ".") or "value"


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _flat(tree: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = _name(path)
        if name in flat:
            raise ValueError(f"Checkpoints: two arrays share the path {name!r}; rename one")
        flat[name] = leaf
    return {name: _data(leaf) if _is_key(leaf) else leaf for name, leaf in flat.items()}


def _data(key: Any) -> Any:
    if isinstance(key, jax.Array):
        return jax.random.key_data(key)
    # Keys are replicated, so the placement of a key is its data's as well.
    data = jax.eval_shape(jax.random.key_data, key)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
