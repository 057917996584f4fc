import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from janax.experiments import session as sessions
from janax.experiments import training
from janax.experiments.checkpoints import Checkpoints
from janax.experiments.config import MeshConfig, OptimizerConfig, TrainConfig
from janax.experiments.errors import NonFiniteError, StoppedError, UserError
from janax.experiments.metrics import MetricsWriter, read_rows
from janax.jaxlib_ext import aot, sharding

ROWS, FEATURES = 16, 8
REPLICATED = ((r".*", jax.P()),)


def init_fn(key):
    return {"layer": {"w": jax.random.normal(key, (FEATURES, 4)), "b": jnp.zeros((4,))}}


def loss_fn(params, batch, key):
    """Masked mean of squared errors; the weight is the number of rows that count."""
    error = jnp.sum((batch["x"] @ params["layer"]["w"] + params["layer"]["b"][None] - batch["y"]) ** 2, axis=-1)
    count = jnp.sum(batch["mask"])
    loss = jnp.sum(batch["mask"] * error) / jnp.maximum(count, 1.0)
    return loss, {"weight": count, "size": jnp.sum(batch["mask"] * jnp.sum(batch["x"] ** 2, -1)) / jnp.maximum(count, 1.0)}


def noisy_loss_fn(params, batch, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (FEATURES,)))(keys)
    return loss_fn(params, batch | {"x": batch["x"] + noise}, keys)


def batch_fn(position):
    rng = np.random.default_rng(position)
    x = rng.normal(size=(ROWS, FEATURES)).astype(np.float32)
    # Rows of micro-batch 0 (of 4) are all masked out at position 1: a weight of zero.
    mask = (np.arange(ROWS) % 4 != 0) if position == 1 else rng.random(ROWS) < 0.6
    return {"x": x, "y": x[:, :4].copy(), "mask": mask.astype(np.float32)}


def one_device():
    return training.make_mesh(MeshConfig(), jax.devices()[:1])


def train(steps=3, *, loss=loss_fn, accumulation=1, mesh=None, rules=REPLICATED, **options):
    mesh = one_device() if mesh is None else mesh
    config = TrainConfig(num_steps=steps, batch_size=ROWS, accumulation=accumulation, ema_decay=0.9)
    return training.fit(loss, init_fn, batch_fn, optax.adam(1e-2), config, mesh=mesh, rules=rules, **options)


@pytest.fixture(scope="module")
def alone():
    """Trained on one device in one piece."""
    return train(loss=noisy_loss_fn, example_keys=True)


def test_accumulation_does_not_change_the_result(alone):
    whole, parts = alone, train(loss=noisy_loss_fn, example_keys=True, accumulation=4)
    # float32 sums of 16 terms in another order: a few units in the last place, amplified by Adam's division on three steps
    chex.assert_trees_all_close(whole.params, parts.params, rtol=2e-5, atol=2e-6)
    assert float(jnp.max(jnp.abs(whole.params["layer"]["w"] - init_fn(jax.random.key(0))["layer"]["w"]))) > 1e-2


def test_accumulated_gradient_is_that_of_the_whole_batch():
    optimizer = optax.sgd(1.0)
    state, _ = training.init_state(init_fn, optimizer, jax.random.key(1), mesh=one_device())
    batch = jax.tree.map(jnp.asarray, batch_fn(1))
    (expected, info), grads = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, batch, None), has_aux=True))(state.params)
    for accumulation in (1, 4):
        new, metrics = jax.jit(training.make_train_step(loss_fn, optimizer, accumulation=accumulation))(state, batch)
        moved = jax.tree.map(np.subtract, *jax.device_get((state.params, new.params)))
        chex.assert_trees_all_close(moved, jax.device_get(grads), rtol=1e-4, atol=1e-5)
        assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(grads))), rel=1e-5)
        assert float(metrics["size"]) == pytest.approx(float(info["size"]), rel=1e-5)
        assert "weight" not in metrics


def test_an_all_masked_batch_changes_nothing():
    optimizer = optax.sgd(1.0)
    state, _ = training.init_state(init_fn, optimizer, jax.random.key(1), mesh=one_device())
    batch = batch_fn(0) | {"mask": np.zeros(ROWS, np.float32)}
    new, metrics = jax.jit(training.make_train_step(loss_fn, optimizer, accumulation=4))(state, batch)
    chex.assert_trees_all_equal(new.params, state.params)
    assert float(metrics["loss"]) == 0.0 and int(metrics["bad_step"]) == -1


RULES = ((r"^layer/w$", jax.P("model", None)), (r"/b$", jax.P("model")), (r".*", jax.P()))


@pytest.mark.parametrize(("data", "model", "accumulation"), [(8, 1, 1), (4, 2, 4)])
def test_a_mesh_does_not_change_the_result(data, model, accumulation, alone):
    mesh = training.make_mesh(MeshConfig(data=data, model=model))
    sharded = train(mesh=mesh, rules=RULES, accumulation=accumulation, loss=noisy_loss_fn, example_keys=True)
    chex.assert_trees_all_close(jax.device_get(sharded.params), jax.device_get(alone.params), rtol=2e-5, atol=2e-6)
    chex.assert_trees_all_close(jax.device_get(sharded.ema), jax.device_get(alone.ema), rtol=2e-5, atol=2e-6)


def test_moments_and_average_live_where_their_parameter_lives():
    mesh = training.make_mesh(MeshConfig(data=2, model=4))
    state, where = training.init_state(init_fn, optax.adamw(1e-3), jax.random.key(0), mesh=mesh, rules=RULES, ema=True)
    trees = (state.params, state.opt_state[0].mu, state.opt_state[0].nu, state.ema)
    for tree in trees:
        assert tree["layer"]["w"].sharding.spec == jax.P("model", None) and tree["layer"]["b"].sharding.spec == jax.P("model")
    assert state.opt_state[0].count.sharding.spec == jax.P() and state.step.sharding.spec == jax.P()
    step = training.make_train_step(loss_fn, optax.adamw(1e-3), ema_decay=0.9)
    batch_where = jax.sharding.NamedSharding(mesh, jax.P("data"))
    with jax.set_mesh(mesh):
        new, _ = training.jit_train_step(step, where, batch_where, mesh)(state, batch_fn(0))
    assert jax.tree.map(lambda x: x.sharding, new) == where
    assert trees[0]["layer"]["w"].is_deleted()  # donated


def test_moving_average_formula():
    optimizer, decay = optax.sgd(0.05), 0.3
    state, _ = training.init_state(init_fn, optimizer, jax.random.key(0), mesh=one_device(), ema=True)
    step = jax.jit(training.make_train_step(loss_fn, optimizer, ema_decay=decay))
    expected = np.asarray(state.params["layer"]["w"], np.float64)
    for i in range(6):
        state, _ = step(state, batch_fn(i))
        d = min(decay, (1 + i) / (10 + i))
        expected = d * expected + (1 - d) * np.asarray(state.params["layer"]["w"], np.float64)
    np.testing.assert_allclose(np.asarray(state.ema["layer"]["w"]), expected, rtol=1e-6, atol=1e-6)
    assert training.ema_or_params(state) is state.ema


def test_the_step_is_traced_once_and_counts():
    state, _ = training.init_state(init_fn, optax.adam(1e-3), jax.random.key(0), mesh=one_device())
    step = jax.jit(chex.assert_max_traces(training.make_train_step(loss_fn, optax.adam(1e-3)), n=1))
    for i in range(3):
        state, _ = step(state, batch_fn(i))
    assert int(state.step) == int(state.position) == 3 and state.ema is None


def test_first_bad_step_is_remembered():
    state, _ = training.init_state(init_fn, optax.adam(1e-3), jax.random.key(0), mesh=one_device())
    step = jax.jit(training.make_train_step(loss_fn, optax.adam(1e-3)))
    for i in range(4):
        batch = batch_fn(i)
        state, metrics = step(state, batch | {"y": np.full_like(batch["y"], np.inf)} if i == 1 else batch)
    assert int(state.bad_step) == int(metrics["bad_step"]) == 2


def test_bad_info_is_named():
    state, _ = training.init_state(init_fn, optax.adam(1e-3), jax.random.key(0), mesh=one_device())

    def with_info(info):
        return training.make_train_step(lambda p, b, k: (loss_fn(p, b, k)[0], info), optax.adam(1e-3))

    with pytest.raises(ValueError, match=r"info\['errors'\] has shape \(3,\), expected \[\]"):
        with_info({"errors": jnp.zeros(3)})(state, batch_fn(0))
    with pytest.raises(ValueError, match=r"info\['loss'\] would hide"):
        with_info({"loss": jnp.zeros(())})(state, batch_fn(0))


def test_optimizer_schedule_mask_and_clipping():
    params = {"w": np.ones((2, 2), np.float32), "b": np.ones((2,), np.float32)}
    zero = jax.tree.map(np.zeros_like, params)
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, schedule="constant")
    optimizer = training.make_optimizer(config, num_steps=10)
    updates, _ = jax.jit(optimizer.update)(zero, jax.jit(optimizer.init)(params), params)
    np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-6)  # learning rate x decay x weight
    np.testing.assert_array_equal(updates["b"], 0.0)

    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine", final_fraction=0.1, clip_norm=0.0, name="adam")
    optimizer = training.make_optimizer(config, num_steps=10)
    state, sizes, update = jax.jit(optimizer.init)(params), [], jax.jit(optimizer.update)
    for _ in range(11):
        updates, state = update(jax.tree.map(np.ones_like, params), state, params)
        sizes.append(-float(updates["b"][0]))
    np.testing.assert_allclose(sizes[:5], [0.0, 0.25, 0.5, 0.75, 1.0], atol=1e-5)
    assert sizes[7] == pytest.approx(0.55, abs=1e-5) and sizes[10] == pytest.approx(0.1, abs=1e-5)
    with pytest.raises(UserError, match=r"optimizer.warmup_steps must be below train.num_steps \(4\), got 4; try 0"):
        training.make_optimizer(config, num_steps=4)


def test_batch_and_mesh_that_do_not_divide_are_named():
    with pytest.raises(UserError, match=r"train.batch_size must be a multiple of mesh.data x train.accumulation \(8 x 4\), got 16; try 32"):
        train(mesh=training.make_mesh(MeshConfig()), accumulation=4)
    with pytest.raises(UserError, match=r"mesh.data 3 and mesh.model 1 do not make a mesh of the 8 devices"):
        training.make_mesh(MeshConfig(data=3))


def test_train_program_compiles_to_the_same_placement():
    mesh = training.make_mesh(MeshConfig(data=2, model=4))
    config = TrainConfig(batch_size=ROWS, accumulation=2, ema_decay=0.9)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_fn(0))
    program = training.train_program("step", loss_fn, init_fn, batch, optax.adam(1e-3), config, mesh=mesh, rules=RULES)
    analysis = aot.analyse(program, aot.chip_of("v5e:2x4"), mesh=mesh)
    assert analysis.devices == 8 and analysis.fits and analysis.memory.aliased > 0
    assert program.in_shardings[0].params["layer"]["w"].spec == jax.P("model", None)


def test_checkpoints_keep_the_last_and_the_best(tmp_path):
    scores = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0}
    with Checkpoints(tmp_path / "c", keep_last=2, keep_best=1) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, {"x": jnp.full((3,), step)}, metric=score)
        checkpoints.wait()
        assert checkpoints.steps() == (2, 4, 5) and checkpoints.best() == 2 and checkpoints.latest() == 5
    with Checkpoints(tmp_path / "d", keep_last=1, keep_best=1, best_mode="max") as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, {"x": jnp.full((3,), step)}, metric=score)
        checkpoints.wait()
        assert checkpoints.steps() == (1, 5) and checkpoints.best() == 1


def test_checkpoints_give_back_every_kind_of_leaf_and_another_placement(tmp_path):
    mesh = training.make_mesh(MeshConfig(data=2, model=4))
    state, _ = training.init_state(init_fn, optax.adamw(1e-3), jax.random.key(7), mesh=mesh, rules=RULES, ema=True)
    half = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree))
    state = state._replace(params=half(state.params))
    like, _ = training.init_state(init_fn, optax.adamw(1e-3), jax.random.key(8), mesh=one_device(), ema=True)
    like = like._replace(params=half(like.params))
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(3, state)
        restored = checkpoints.restore(3, like=like)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        plain, expected = restored._replace(key=jax.random.key_data(restored.key)), state._replace(key=jax.random.key_data(state.key))
        chex.assert_trees_all_equal(jax.device_get(plain), jax.device_get(expected))
        assert restored.params["layer"]["w"].devices() == {jax.devices()[0]}
        with pytest.raises(UserError, match="no checkpoint of step 4"):
            checkpoints.restore(4, like=like)
        with pytest.raises(UserError, match="does not fit this model"):
            checkpoints.restore(3, like={"other": jnp.zeros(3)})


def test_a_saved_state_is_safe_from_donation(tmp_path):
    increment = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = increment({"x": jnp.zeros((512, 512))})
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state)
        for _ in range(20):
            state = increment(state)
        jax.block_until_ready(state)
        restored = checkpoints.restore(1, like=state)
    np.testing.assert_array_equal(restored["x"], 1.0)


def test_metrics_rows_beyond_the_restored_step_are_dropped(tmp_path):
    for run in ("a", "b"):
        writer = MetricsWriter(tmp_path, run)
        for step in (1, 2, 3):
            writer.write(step, {"loss": step / 10, "nothing": float("nan")})
        writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"run": "a", "step": 4, "lo')  # cut off by a crash
    writer = MetricsWriter(tmp_path, "a", start=2)
    writer.write(3, {"loss": 9.0})
    writer.close()
    rows = [(row["run"], row["step"], row["loss"], row.get("nothing")) for row in read_rows(tmp_path / "metrics.jsonl")]
    assert rows == [
        ("a", 1, 0.1, None),
        ("a", 2, 0.2, None),
        ("b", 1, 0.1, None),
        ("b", 2, 0.2, None),
        ("b", 3, 0.3, None),
        ("a", 3, 9.0, None),
    ]
    assert list((tmp_path / "tensorboard" / "a").iterdir())


def fit_in(workdir, *, stop_at=None, num_steps=12, bad_at=None, name="train"):
    config = TrainConfig(num_steps=num_steps, batch_size=ROWS, log_every=2, checkpoint_every=5, keep_best=1, ema_decay=0.9)

    def batches(position):
        if position == stop_at:
            session.request_stop()
        batch = batch_fn(position)
        return batch | {"y": np.full_like(batch["y"], np.nan)} if position == bad_at else batch

    def evaluate(state):
        return {"eval_size": float(optax.tree.norm(training.ema_or_params(state)))}

    with sessions.open_session("toy", config, workdir, signals=False) as session:
        options = {"mesh": one_device(), "session": session, "evaluate": evaluate, "best_metric": "eval_size", "example_keys": True}
        return training.fit(noisy_loss_fn, init_fn, batches, optax.adam(1e-2), config, name=name, **options)


def test_stop_saves_and_resume_is_bit_exact(tmp_path):
    reference = fit_in(tmp_path / "a")
    with pytest.raises(StoppedError, match="train stopped at step 7 of 12"):
        fit_in(tmp_path / "b", stop_at=7)
    assert '"stopped"' in (tmp_path / "b" / "status.json").read_text()
    resumed = fit_in(tmp_path / "b")
    chex.assert_trees_all_equal(jax.random.key_data(resumed.key), jax.random.key_data(reference.key))
    chex.assert_trees_all_equal(resumed._replace(key=None), reference._replace(key=None))
    text = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert (tmp_path / "b" / "metrics.jsonl").read_text() == text
    rows = read_rows(tmp_path / "a" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8, 10, 12]
    assert ["eval_size" in row for row in rows] == [False, False, True, False, False, True, True]
    assert ["loss" in row for row in rows] == [True, True, False, True, True, True, True]
    # Once more: finished, so nothing is computed and nothing changes.
    chex.assert_trees_all_equal(fit_in(tmp_path / "b").params, reference.params)
    assert (tmp_path / "b" / "metrics.jsonl").read_text() == text


def test_a_bad_step_stops_and_leaves_good_checkpoints_alone(tmp_path):
    with pytest.raises(NonFiniteError, match=r"not finite at step 9; the last good checkpoint is step 5 .*--optimizer.learning-rate"):
        fit_in(tmp_path, bad_at=8)
    with Checkpoints(training.checkpoint_dir(sessions.Session("", "", None, tmp_path, None), "train")) as checkpoints:
        assert checkpoints.steps() == (5,)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [2, 4, 5, 6, 8]
    assert '"failed"' in (tmp_path / "status.json").read_text()


def test_two_training_runs_share_a_directory(tmp_path):
    config = TrainConfig(num_steps=2, batch_size=ROWS, log_every=1)
    with sessions.open_session("toy", config, tmp_path, signals=False) as session:
        for name in ("model-seed0", "model-seed1"):
            training.fit(loss_fn, init_fn, batch_fn, optax.adam(1e-2), config, mesh=one_device(), session=session, name=name)
    assert [(row["run"], row["step"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [
        ("model-seed0", 1), ("model-seed0", 2), ("model-seed1", 1), ("model-seed1", 2),
    ]  # fmt: skip


def test_memo_computes_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"pair": (1, 2.5)}

    for _ in range(2):
        with sessions.open_session("toy", TrainConfig(), tmp_path, signals=False) as session:
            assert session.memo("value/0", compute) == {"pair": [1, 2.5]}
    assert len(calls) == 1
    session.request_stop()
    with pytest.raises(StoppedError):
        session.memo("other", compute)
    with pytest.raises(StoppedError):
        list(session.track(range(3), "items"))


def test_a_directory_serves_one_process_and_one_configuration(tmp_path):
    first, second = (sessions.open_session("toy", TrainConfig(), tmp_path, signals=False) for _ in range(2))
    with first, pytest.raises(UserError, match="another janax process is writing"), second:
        pass
    with pytest.raises(UserError, match=r"holds a run with seed 0, not 1"), sessions.open_session("toy", TrainConfig(seed=1), tmp_path):
        pass
    with pytest.raises(UserError, match="holds a run of 'toy', not of 'other'"), sessions.open_session("other", TrainConfig(), tmp_path):
        pass


def test_rows_stay_on_their_device_when_a_batch_is_split():
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(16.0), jax.P("data"))
        text = jax.jit(lambda x: training._split_rows(x, 2)).lower(x).compile().as_text()
    assert not any(name in text for name in ("all-to-all", "all-gather", "collective-permute"))


def test_master_weights_keep_what_bfloat16_would_lose():
    """Two hundred steps of 1e-4 move a weight of 1 by .02 through the float32 copy, and not at all in bfloat16 alone."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    gradient = {"w": jnp.ones(3, jnp.bfloat16)}
    ends = {}
    for name, optimizer in {"copy": training.with_master_weights(optax.sgd(1e-4)), "none": optax.sgd(1e-4)}.items():

        @jax.jit
        def step(state, now, optimizer=optimizer):
            updates, state = optimizer.update(gradient, state, now)
            return state, optax.apply_updates(now, updates)

        state, now = optimizer.init(params), params
        for _ in range(200):
            state, now = step(state, now)
        assert now["w"].dtype == jnp.bfloat16
        ends[name] = float(now["w"][0])
    assert ends["none"] == 1.0
    assert ends["copy"] == float(jnp.asarray(0.98, jnp.bfloat16))


def test_master_weights_and_moments_are_float32():
    state = training.with_master_weights(optax.adamw(1e-3)).init({"w": jnp.ones((2, 2), jnp.bfloat16)})
    assert {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)} == {jnp.dtype("float32")}


def test_what_is_frozen_is_an_argument_of_the_step():
    """Other values of frozen arrays are the same program, with and without micro-batches."""
    optimizer = training.make_optimizer(OptimizerConfig(warmup_steps=0), num_steps=20)
    mesh = training.make_mesh(MeshConfig(), jax.devices()[:1])
    batch = {"x": np.ones(4, np.float32)}

    def loss(params, batch, key, frozen):
        return jnp.mean((batch["x"] * frozen["scale"] - params["w"]) ** 2), {}

    for accumulation in (1, 2):
        step = jax.jit(training.make_train_step(loss, optimizer, accumulation=accumulation))
        for scale in (1.0, 3.0):
            frozen = {"scale": jnp.full((), scale)}
            init = lambda key, frozen: {"w": 2 * frozen["scale"]}  # noqa: E731
            state, _ = training.init_state(init, optimizer, jax.random.key(0), mesh=mesh, frozen=frozen)
            assert float(state.params["w"]) == 2 * scale
            assert float(step(state, batch, frozen)[1]["loss"]) == scale**2
        assert step._cache_size() == 1
