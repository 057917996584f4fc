"""The training loop: one jitted step for any loss, any mesh, and a host loop that can be interrupted at any moment.

    optimizer = training.make_optimizer(config.optimizer, num_steps=config.train.num_steps)
    state = training.fit(
        loss_fn, init_fn, batch_fn, optimizer, config.train, mesh=training.make_mesh(config.mesh), session=session, name="dit"
    )

The state is all there is: parameters, moments, average, step, key and data position. The batch of a step is a pure function of the
position, its noise a pure function of key and step, so a run that was killed and resumed ends in the bits of one that was not.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from janax.experiments import processes
from janax.experiments.checkpoints import Checkpoints
from janax.experiments.config import MeshConfig, OptimizerConfig, TrainConfig
from janax.experiments.errors import NonFiniteError, StoppedError, UserError
from janax.experiments.metrics import MetricsWriter
from janax.experiments.session import Session
from janax.jaxlib_ext import aot, dtypes, sharding

__all__ = [
    "BatchFn",
    "LossFn",
    "TimedBatches",
    "TrainState",
    "checkpoint_dir",
    "ema_or_params",
    "fit",
    "init_state",
    "jit_train_step",
    "make_mesh",
    "make_optimizer",
    "make_train_step",
    "state_shardings",
    "train_program",
    "with_master_weights",
]

LossFn = Callable[..., tuple[jax.Array, Mapping[str, jax.Array]]]
"""(params, batch, key) or, where something is frozen, (params, batch, key, frozen) -> (loss, info)."""
BatchFn = Callable[[int], Any]

_REPLICATED: sharding.Rules = ((r".*", jax.P()),)


class TrainState(NamedTuple):
    """All that the next step depends on.

    Attributes:
      params: Tree of parameters.
      opt_state: Moments and counts.
      ema: Moving average of the parameters in float32 or wider, None if there is none.
      step: [] int32, optimizer steps taken.
      key: [] typed key; the noise of step i comes from `fold_in(key, i)`.
      position: [] int32, batches drawn; the next batch is `batch_fn(position)`.
      bad_step: [] int32, the first step (counted from one) whose loss or gradient was not finite, -1 if all were.
    """

    params: Any
    opt_state: Any
    ema: Any
    step: jax.Array
    key: jax.Array
    position: jax.Array
    bad_step: jax.Array


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """The mesh of a configuration, axes `data` and `model`, over `devices` or all there are.

    Raises:
      UserError: if the lengths do not multiply to the number of devices.
    """
    count = len(jax.devices() if devices is None else devices)
    try:
        return sharding.make_mesh({"data": config.data, "model": config.model}, devices)
    except ValueError as error:
        raise UserError(
            f"mesh.data {config.data} and mesh.model {config.model} do not make a mesh of the {count} devices; "
            f"their product must be {count}, and -1 for mesh.data takes what mesh.model leaves"
        ) from error


def make_optimizer(config: OptimizerConfig, *, num_steps: int, mask: Callable[[Any], Any] | None = None) -> optax.GradientTransformation:
    """Clipping, then Adam or AdamW with the configured schedule.

    Args:
      config: See `OptimizerConfig`.
      num_steps: Length of the schedule, in optimizer steps.
      mask: Parameters -> tree of booleans, true where the weights decay; arrays with two or more axes by default (layers stacked for a
        scan have one more: say so here).

    Returns:
      The optax transformation.

    Raises:
      UserError: if the warmup is as long as the schedule.
    """
    if config.warmup_steps >= num_steps:
        hint = max(0, num_steps // 10)
        raise UserError(f"optimizer.warmup_steps must be below train.num_steps ({num_steps}), got {config.warmup_steps}; try {hint}")
    if config.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0 if config.warmup_steps else config.learning_rate,
            peak_value=config.learning_rate,
            warmup_steps=config.warmup_steps,
            decay_steps=num_steps,
            end_value=config.learning_rate * config.final_fraction,
        )
    else:
        warmup = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1))
        constant = optax.constant_schedule(config.learning_rate)
        schedule = optax.join_schedules([warmup, constant], [config.warmup_steps]) if config.warmup_steps else constant
    moments: dict[str, Any] = {"b1": config.beta1, "b2": config.beta2, "eps": config.epsilon}
    if config.name == "adamw":
        decays = mask if mask is not None else lambda params: jax.tree.map(lambda x: jnp.ndim(x) >= 2, params)
        core = optax.adamw(schedule, **moments, weight_decay=config.weight_decay, mask=decays)
    else:
        core = optax.adam(schedule, **moments)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), core) if config.clip_norm else core


class MasterState(NamedTuple):
    """Optimizer state of `with_master_weights`.

    Attributes:
      master: The parameters in float32.
      inner: The wrapped optimizer's state, in float32.
    """

    master: Any
    inner: Any


def with_master_weights(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer for parameters in bfloat16: it works on a float32 copy, of which the parameters are the rounded image.

    Without the copy an update below 1/256 of a weight would be lost. Memory per parameter: 2 bytes, and 12 for the copy and Adam's moments.
    """

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: dtypes.at_least_float32(x) if _is_float(x) else x, tree)

    def init(params: Any) -> MasterState:
        master = widen(params)
        return MasterState(master=master, inner=optimizer.init(master))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MasterState]:
        updates, inner = optimizer.update(widen(updates), state.inner, state.master)
        master = optax.apply_updates(state.master, updates)
        # As a difference, since that is what the step adds to the parameters; the sum is rounded once, to the parameters' dtype.
        return jax.tree.map(lambda new, old: new - old.astype(new.dtype), master, params), MasterState(master=master, inner=inner)

    return optax.GradientTransformation(init, update)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    ema_decay: float = 0.0,
    example_keys: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The function `state, metrics = step(state, batch)`, or `step(state, batch, frozen)`; not jitted (see `jit_train_step`).

    The gradient is that of the weighted mean over the whole batch, whatever the number of micro-batches: sum_j w_j g_j / sum_j w_j, where
    w_j is micro-batch j's `info["weight"]`, or 1. A masked loss returns its masked mean and, as weight, the number of terms in it.
    The average follows ema <- d ema + (1 - d) params with d = min(ema_decay, (1 + i) / (10 + i)) at step i, so that a short run is not
    dominated by its first parameters.

    Args:
      loss_fn: (params, batch, key) -> (mean loss [], info), info a dictionary of scalars, which are averaged like the loss; "weight" is
        taken out of it. A step with `frozen` hands it on as the fourth argument.
      optimizer: An optax transformation.
      accumulation: Micro-batches; must divide the batch. Micro-batch j takes the rows j, j + accumulation, ..., which keeps every row on
        its device. Static.
      ema_decay: Decay of the average; used where the state holds one.
      example_keys: Give `loss_fn` one key per example, [b], instead of one key: then a random loss, too, does not depend on the number of
        micro-batches. Otherwise micro-batch j gets `fold_in(key, j)`. Static.

    Returns:
      The step. Its metrics: loss, grad_norm, the entries of info, and bad_step (see `TrainState`).

    Raises:
      ValueError: while tracing, if info holds anything but scalars, or a metric of that name.
    """
    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def micro_step(params: Any, batch: Any, key: jax.Array, frozen: Any) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        (loss, info), grads = gradient_fn(params, batch, key, *_extra(frozen))
        info = dict(info)
        weight = dtypes.at_least_float32(jax.lax.stop_gradient(info.pop("weight", 1.0)))
        return weight, _checked_metrics(loss, info), grads

    def step(state: TrainState, batch: Any, frozen: Any = None) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        size = _batch_size(batch)
        if example_keys:
            key = jax.random.split(key, size)
        if accumulation == 1:
            _, metrics, grads = micro_step(state.params, batch, key, frozen)
        else:
            if size % accumulation:
                raise ValueError(f"train step: the batch has {size} rows, which 'accumulation' {accumulation} does not divide")
            keys = (
                _split_rows(key, accumulation) if example_keys else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(accumulation))
            )
            micro_batches = jax.tree.map(lambda x: _split_rows(x, accumulation), batch)
            metrics, grads = _accumulate(micro_step, state.params, micro_batches, keys, frozen)
        metrics["grad_norm"] = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        num_steps = state.step + 1
        bad_step = jnp.where((state.bad_step < 0) & ~finite, num_steps, state.bad_step)
        ema = None if state.ema is None else _update_ema(state.ema, params, ema_decay, state.step)
        new_state = TrainState(params, opt_state, ema, num_steps, state.key, state.position + 1, bad_step)
        return new_state, metrics | {"bad_step": bad_step}

    return step


def _checked_metrics(loss: jax.Array, info: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    for name, value in info.items():
        if jnp.shape(value):
            raise ValueError(f"train step: info[{name!r}] has shape {jnp.shape(value)}, expected []; reduce it in the loss")
        if name in ("loss", "grad_norm", "bad_step", "run", "step"):
            raise ValueError(f"train step: info[{name!r}] would hide the loop's own {name!r}; give it another name")
    return {"loss": dtypes.at_least_float32(loss)} | {name: dtypes.at_least_float32(value) for name, value in info.items()}


def _batch_size(batch: Any) -> int:
    sizes = {x.shape[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
    if len(sizes) != 1:
        raise ValueError(f"train step: the arrays of the batch have {sorted(sizes)} rows, expected one number")
    return sizes.pop()


def _split_rows(x: Any, parts: int) -> Any:
    """[b ...] -> [parts b/parts ...]; scalars are repeated. Row i goes to part i % parts, so no row leaves its device."""
    if not jnp.ndim(x):
        return jnp.broadcast_to(x, (parts,))
    rows = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
    return rows if jnp.issubdtype(rows.dtype, jax.dtypes.prng_key) else sharding.constrain_batch(rows, axis=1)


def _accumulate(
    micro_step: Callable[..., Any], params: Any, batches: Any, keys: jax.Array, frozen: Any
) -> tuple[dict[str, jax.Array], Any]:
    first = jax.tree.map(lambda x: x[0], (batches, keys))
    _, metric_shapes, grad_shapes = jax.eval_shape(micro_step, params, *first, frozen)
    zeros = jax.tree.map(lambda p, g: jnp.zeros_like(p, dtypes.floor_dtype(g.dtype)), params, grad_shapes)

    def body(sums: Any, inputs: Any) -> tuple[Any, None]:
        weight, metrics, grads = micro_step(params, *inputs, frozen)
        *old, total_weight = sums
        new = jax.tree.map(lambda total, x: total + weight * x.astype(total.dtype), tuple(old), (metrics, grads))
        return (*new, total_weight + weight), None

    metric_zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metric_shapes)
    (metrics, grads, weight), _ = jax.lax.scan(body, (metric_zeros, zeros, jnp.zeros((), jnp.float32)), (batches, keys))
    scale = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
    return jax.tree.map(lambda x: x * scale, metrics), jax.tree.map(lambda x, g: (x * scale).astype(g.dtype), grads, grad_shapes)


def _update_ema(ema: Any, params: Any, decay: float, step: jax.Array) -> Any:
    count = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + count) / (10.0 + count))

    def update(old: jax.Array, new: jax.Array) -> jax.Array:
        return d.astype(old.dtype) * old + (1.0 - d).astype(old.dtype) * new.astype(old.dtype) if _is_float(new) else new

    return jax.tree.map(update, ema, params)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def ema_or_params(state: TrainState) -> Any:
    """The parameters to evaluate: the moving average if there is one."""
    return state.params if state.ema is None else state.ema


def state_shardings(state: Any, rules: sharding.Rules, mesh: Mesh) -> Any:
    """Where every array of a `TrainState` lives.

    The rules see the parameters' own paths; an optimizer moment or average is placed like the parameter at the end of its path if the
    shapes agree; everything else is replicated.

    Args:
      state: The state, or its `jax.eval_shape`.
      rules: Ordered (regular expression, spec) pairs, see `sharding.spec_of`.
      mesh: The mesh.

    Returns:
      A tree of `NamedSharding`.
    """
    leaves = jax.tree_util.tree_flatten_with_path(state.params)[0]
    specs = {sharding.path_string(p): (x.shape, sharding.spec_of(sharding.path_string(p), tuple(x.shape), rules, mesh)) for p, x in leaves}

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path) + 1):
            shape, spec = specs.get(sharding.path_string(path[start:]), (None, jax.P()))
            if shape == leaf.shape:
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, jax.P())

    return jax.tree_util.tree_map_with_path(place, state)


def init_state(
    init_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    mesh: Mesh,
    rules: sharding.Rules = _REPLICATED,
    ema: bool = False,
    frozen: Any = None,
) -> tuple[TrainState, Any]:
    """A new state, born in its place: no array is ever whole on one device unless its spec says so.

    Args:
      init_fn: key -> params, or (key, frozen) -> params.
      optimizer: An optax transformation.
      key: Split into the parameters' and the training noise's.
      mesh: The mesh.
      rules: Placement of the parameters, see `state_shardings`.
      ema: Whether to keep a moving average.
      frozen: As for `fit`.

    Returns:
      The state and its tree of shardings.
    """

    def init(key: jax.Array, frozen: Any) -> TrainState:
        return _new_state(init_fn, optimizer, key, frozen, ema=ema)

    where = state_shardings(jax.eval_shape(init, key, frozen), rules, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(init, out_shardings=where)(key, frozen), where


def _extra(frozen: Any) -> tuple[Any, ...]:
    """The last argument of functions that only take it where there is something frozen."""
    return () if frozen is None else (frozen,)


def _new_state(
    init_fn: Callable[..., Any], optimizer: optax.GradientTransformation, key: jax.Array, frozen: Any, *, ema: bool
) -> TrainState:
    key_params, key_train = jax.random.split(key)
    params = init_fn(key_params, *_extra(frozen))
    average = jax.tree.map(lambda x: dtypes.at_least_float32(x) if _is_float(x) else x, params) if ema else None
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(params), average, zero, key_train, zero, zero - 1)


def jit_train_step(
    step: Callable[..., Any], state_placement: Any, batch_placement: Any, mesh: Mesh, *, frozen: bool = False
) -> Callable[..., Any]:
    """Compiles a step with its inputs and outputs pinned and the state donated; call it under `jax.set_mesh(mesh)`.

    If something is `frozen`, it is the step's last argument and stays where it lies.
    """
    replicated = NamedSharding(mesh, jax.P())
    inputs = (state_placement, batch_placement, *((None,) if frozen else ()))
    return jax.jit(step, in_shardings=inputs, out_shardings=(state_placement, replicated), donate_argnums=0)


def _check_batch_size(config: TrainConfig, mesh: Mesh) -> None:
    parts, accumulation = mesh.shape.get("data", 1), config.accumulation
    if config.batch_size % (parts * accumulation):
        larger = -(-config.batch_size // (parts * accumulation)) * parts * accumulation
        raise UserError(
            f"train.batch_size must be a multiple of mesh.data x train.accumulation ({parts} x {accumulation}), "
            f"got {config.batch_size}; try {larger}"
        )


def train_program(
    name: str,
    loss_fn: LossFn,
    init_fn: Callable[[jax.Array], Any],
    batch: Any,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    *,
    mesh: Mesh,
    rules: sharding.Rules = _REPLICATED,
    example_keys: bool = False,
) -> aot.Program:
    """The very step that `fit` runs, as a program to compile ahead of time for the devices of `mesh`.

    Args:
      name: For the report.
      loss_fn: As for `fit`.
      init_fn: As for `fit`.
      batch: Tree of `jax.ShapeDtypeStruct` (or arrays) with `config.batch_size` rows.
      optimizer: As for `fit`.
      config: Its accumulation, average and batch size count.
      mesh: Over a topology's devices: `training.make_mesh(config.mesh, devices)`.
      rules: As for `fit`.
      example_keys: As for `fit`. Static.

    Returns:
      A program for `aot.analyse`; nothing is allocated.

    Raises:
      UserError: if the batch does not divide among devices and micro-batches.
    """
    _check_batch_size(config, mesh)
    ema = config.ema_decay > 0
    state = jax.eval_shape(lambda key: _new_state(init_fn, optimizer, key, None, ema=ema), jax.eval_shape(jax.random.key, 0))
    where, batch_where = state_shardings(state, rules, mesh), _batch_shardings(batch, mesh)
    step = make_train_step(loss_fn, optimizer, accumulation=config.accumulation, ema_decay=config.ema_decay, example_keys=example_keys)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    outputs = (where, NamedSharding(mesh, jax.P()))
    return aot.Program(name, step, (state, shapes), in_shardings=(where, batch_where), out_shardings=outputs, donate_argnums=(0,))


def _batch_shardings(batch: Any, mesh: Mesh) -> Any:
    spec = sharding.batch_spec(mesh)
    return jax.tree.map(lambda x: NamedSharding(mesh, spec if np.ndim(x) else jax.P()), batch)


def _place_batch(batch: Any, where: Any, mesh: Mesh, num_rows: int) -> Any:
    if not mesh.is_multi_process:
        return batch if mesh.size == 1 else jax.device_put(batch, where)

    def put(x: Any, where: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        x = np.asarray(x)
        # Of the whole batch JAX takes the rows of this process's devices; rows that are theirs alone it takes as they are.
        return jax.make_array_from_process_local_data(where, x, (num_rows, *x.shape[1:]) if x.ndim else ())

    return jax.tree.map(put, batch, where)


def _check_rows(batch: Any, mesh: Mesh, num_rows: int) -> None:
    if not mesh.is_multi_process:
        return
    rows = _batch_size(batch)
    share = len(sharding.local_rows(mesh, num_rows))
    if rows not in (num_rows, share):
        raise ValueError(f"fit: the batch of 'batch_fn' has {rows} rows, expected {num_rows} or the {share} of this process's devices")


class TimedBatches:
    """A batch function that remembers when it was called.

    Steps are dispatched ahead of the device, which is waited for once in `window` calls (`train.log_every`): single gaps mean nothing.
    """

    def __init__(self, batch_fn: BatchFn, window: int):
        self._batch_fn, self._window, self._times = batch_fn, window, []

    def __call__(self, position: int) -> Any:
        self._times.append(time.perf_counter())
        return self._batch_fn(position)

    def rate(self) -> float | None:
        """Steps per second, the median over windows without the first two, which hold the compiler's work; None if fewer than two are left."""
        gaps = np.diff(self._times[:: self._window])[2:]
        return float(self._window / np.median(gaps)) if len(gaps) >= 2 else None


def checkpoint_dir(session: Session, name: str) -> Any:
    """Where `fit` keeps the checkpoints of the training run `name`."""
    return session.workdir / "checkpoints" / name


def fit(
    loss_fn: LossFn,
    init_fn: Callable[..., Any],
    batch_fn: BatchFn,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    *,
    mesh: Mesh | None = None,
    rules: sharding.Rules = _REPLICATED,
    session: Session | None = None,
    name: str = "train",
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    best_metric: str = "loss",
    best_mode: Literal["min", "max"] = "min",
    example_keys: bool = False,
    frozen: Any = None,
) -> TrainState:
    """Trains, or goes on training: the newest checkpoint of this name is restored first, and a finished run returns at once.

    Args:
      loss_fn: (params, batch, key) -> (loss [], info of scalars); see `make_train_step`, also for masked losses.
      init_fn: key -> params.
      batch_fn: position -> batch, a tree of host or device arrays with `config.batch_size` rows; a pure function of the position, which
        counts batches from zero. Of several processes each may return the whole batch, the same in all, or only the rows of its own
        devices, `sharding.local_rows(mesh, config.batch_size)`.
      optimizer: See `make_optimizer`.
      config: Lengths, intervals, seed.
      mesh: All devices along `data` by default.
      rules: Placement of the parameters by path; replicated by default.
      session: Where checkpoints, rows and progress go, and who asks to stop; None trains in silence and keeps nothing.
      name: Of this training run within the experiment.
      evaluate: state -> numbers, called at every checkpoint and written into that step's row; must be a pure function of the state.
      best_metric: What `config.keep_best` goes by: a name from `evaluate`, or "loss".
      best_mode: Whether small or large is good.
      example_keys: See `make_train_step`. Static.
      frozen: Tree of arrays that do not train, where they shall lie: loaded weights, the base of adapters, a teacher. If given, it is the
        last argument of `loss_fn` and `init_fn`; as a closure it would be compiled into the program.

    Returns:
      The final state.

    Raises:
      StoppedError: after the session was asked to stop; the state is saved.
      NonFiniteError: when a loss or gradient was not finite. It is noticed when metrics are read, at most two logging intervals late; no
        checkpoint is written from then on.
      UserError: if the batch does not divide among devices and micro-batches.
    """
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    _check_batch_size(config, mesh)
    key, ema = jax.random.key(config.seed), config.ema_decay > 0
    state, where = init_state(init_fn, optimizer, key, mesh=mesh, rules=rules, ema=ema, frozen=frozen)
    step_fn = make_train_step(loss_fn, optimizer, accumulation=config.accumulation, ema_decay=config.ema_decay, example_keys=example_keys)
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if session is not None:
            directory = checkpoint_dir(session, name)
            keep = {"keep_last": config.keep_last, "keep_best": config.keep_best, "best_mode": best_mode}
            checkpoints = stack.enter_context(Checkpoints(directory, **keep))
            if checkpoints.latest() is not None:
                state = checkpoints.restore(None, like=state)
        vote = processes.Vote(mesh) if mesh.is_multi_process else None
        loop = _Loop(config, session, name, checkpoints, evaluate, best_metric, vote, start=int(state.step))
        stack.callback(loop.close)
        if loop.start >= config.num_steps:
            return state
        if session is not None:
            session.say(f"{name}: resuming at step {loop.start} of {config.num_steps}" if loop.start else f"{name}: starting")
        offset = int(state.position) - loop.start
        batch = batch_fn(offset + loop.start)
        _check_rows(batch, mesh, config.batch_size)
        batch_where = _batch_shardings(batch, mesh)
        train = jit_train_step(step_fn, where, batch_where, mesh, frozen=frozen is not None)
        stack.enter_context(jax.set_mesh(mesh))
        line = stack.enter_context(_progress(session, name, config.num_steps, loop.start))
        for done in range(loop.start + 1, config.num_steps + 1):
            state, metrics = train(state, _place_batch(batch, batch_where, mesh, config.batch_size), *_extra(frozen))
            if done < config.num_steps:
                batch = batch_fn(offset + done)  # while the device is busy
            loop.after_step(done, state, metrics)
            line(done, loop.note)
    return state


@contextlib.contextmanager
def _progress(session: Session | None, name: str, total: int, start: int) -> Iterator[Callable[[int, Callable[[], str]], None]]:
    if session is None:
        yield lambda done, note: None
        return
    with session.progress(name, total, unit="step", start=start) as line:
        yield line.update


class _Loop:
    """What happens between two steps: rows, evaluation, checkpoints, stopping. Holds host values only."""

    def __init__(
        self,
        config: TrainConfig,
        session: Session | None,
        name: str,
        checkpoints: Checkpoints | None,
        evaluate: Callable[[TrainState], Mapping[str, float]] | None,
        best_metric: str,
        vote: processes.Vote | None,
        *,
        start: int,
    ):
        self.start = start
        self._config, self._session, self._name = config, session, name
        self._checkpoints, self._evaluate, self._best_metric, self._vote = checkpoints, evaluate, best_metric, vote
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._latest: dict[str, float] = {}
        self._writer = MetricsWriter(session.workdir, name, start=start) if session is not None and session.is_main else None

    def note(self) -> str:
        return f"loss {self._latest['loss']:.4g}" if "loss" in self._latest else ""

    def after_step(self, done: int, state: TrainState, metrics: dict[str, jax.Array]) -> None:
        config = self._config
        last = done == config.num_steps
        logs = last or done % config.log_every == 0
        saves = last or done % config.checkpoint_every == 0
        stops = self._stop_requested(done)
        if not (logs or saves or stops):
            return
        if not (saves or stops):
            # The row of the interval before is read now, this one next time: the device never waits for the host.
            self._flush()
            for value in metrics.values():
                value.copy_to_host_async()
            self._pending = (done, metrics)
            return
        self._flush()
        values = self._read(metrics)
        extra = {key: float(value) for key, value in self._evaluate(state).items()} if saves and self._evaluate else {}
        if logs or extra:
            self._write(done, (values if logs else {}) | extra)
        if self._checkpoints is not None:
            if self._writer is not None:
                self._writer.sync()
            self._checkpoints.save(done, state, metric=self._score(values | extra, done) if saves else None)
        if self._session is not None:
            self._session.save_status("running", f"{self._name}: step {done} of {config.num_steps}")
            if stops and not last:
                raise StoppedError(f"{self._name} stopped at step {done} of {config.num_steps}; the state is saved")

    def _stop_requested(self, done: int) -> bool:
        if self._session is None:
            return False
        asked = self._session.stop_requested
        return asked if self._vote is None else self._vote(done, asked)

    def _score(self, values: Mapping[str, float], done: int) -> float | None:
        if not self._config.keep_best:
            return None
        if self._best_metric not in values:
            raise ValueError(f"fit: 'best_metric' is {self._best_metric!r}, expected one of {', '.join(values)}")
        return values[self._best_metric]

    def _flush(self) -> None:
        if self._pending is not None:
            (done, metrics), self._pending = self._pending, None
            self._write(done, self._read(metrics))

    def _read(self, metrics: dict[str, jax.Array]) -> dict[str, float]:
        values = jax.device_get(metrics)
        bad_step = int(values.pop("bad_step"))
        if bad_step >= 0:
            raise NonFiniteError(self._bad_news(bad_step))
        first = ("loss", "grad_norm")  # a tree's dictionary comes back sorted
        return {name: float(values[name]) for name in (*first, *(name for name in values if name not in first))}

    def _bad_news(self, bad_step: int) -> str:
        kept = "no checkpoint was written before it"
        if self._checkpoints is not None:
            self._checkpoints.wait()
            latest = self._checkpoints.latest()
            kept = kept if latest is None else f"the last good checkpoint is step {latest} in {self._checkpoints.directory}"
        return (
            f"{self._name}: the loss or its gradient was not finite at step {bad_step}; {kept}; try a lower --optimizer.learning-rate, "
            f"a smaller --optimizer.clip-norm or a longer --optimizer.warmup-steps, in another --workdir"
        )

    def _write(self, done: int, values: dict[str, float]) -> None:
        self._latest = values
        if self._writer is not None:
            self._writer.write(done, values)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
