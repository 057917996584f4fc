"""Meshes, rules that map parameter paths to specs, and placement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from janax.jaxlib_ext import sharding

RULES = (
    (r"attention/.*kernel$", jax.P(None, "model")),
    (r"embed", jax.P("model")),
    (r"expert", jax.P(("data", "model"))),
    (r".*", jax.P()),
)


@pytest.mark.parametrize(
    ("axes", "shape"),
    [({"data": 8}, (8,)), ({"data": 4, "model": 2}, (4, 2)), ({"data": -1, "model": 2}, (4, 2)), ({"data": 8, "model": -1}, (8, 1))],
)
def test_make_mesh(axes, shape):
    mesh = sharding.make_mesh(axes)
    assert mesh.devices.shape == shape and mesh.axis_names == tuple(axes)
    assert mesh.axis_types == (AxisType.Auto,) * len(axes)
    assert set(sharding.make_mesh(axes, explicit=True).axis_types) == {AxisType.Explicit}


def test_make_mesh_of_chosen_devices_and_of_one():
    assert sharding.make_mesh({"data": 2, "model": -1}, jax.devices()[:4]).devices.shape == (2, 2)
    one = sharding.make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    assert jax.jit(lambda x: x + 1, in_shardings=jax.NamedSharding(one, jax.P("data", "model")))(jnp.ones((3, 5))).shape == (3, 5)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, "must multiply to the 8 devices"),
        ({"data": -1, "model": 3}, "must multiply to the 8 devices"),
        ({"data": -1, "model": 16}, "must multiply to the 8 devices"),
        ({"data": -1, "model": -1}, "at most one -1"),
        ({"data": 0, "model": 8}, "expected positive lengths"),
        ({"data": -2, "model": 8}, "expected positive lengths"),
        ({}, "at least one axis"),
    ],
)
def test_make_mesh_refuses_what_does_not_fit(axes, message):
    with pytest.raises(ValueError, match=f"make_mesh: 'axes' is .*{message}"):
        sharding.make_mesh(axes)


def test_paths_of_dictionaries_sequences_and_attributes():
    from typing import NamedTuple

    class State(NamedTuple):
        params: dict
        moments: list

    tree = State(params={"blocks": {"kernel": 0}}, moments=[1, (2,)])
    paths = [sharding.path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert paths == ["params/blocks/kernel", "moments/0", "moments/1/0"]


def test_first_matching_rule_wins():
    assert sharding.spec_of("layers/attention/q/kernel", (4, 8), RULES) == jax.P(None, "model")
    assert sharding.spec_of("layers/attention/q/bias", (8,), RULES) == jax.P()
    assert sharding.spec_of("embed/kernel", (), RULES) == jax.P()  # a scalar is replicated whatever the rules say


def test_rules_that_do_not_match_or_do_not_fit_are_errors():
    with pytest.raises(ValueError, match=r"no rule matches the parameter 'head/kernel' of shape \(4,\); add a rule"):
        sharding.spec_of("head/kernel", (4,), RULES[:2])
    with pytest.raises(ValueError, match=r"gives .* to 'attention/kernel', whose shape \(4,\) has fewer axes"):
        sharding.spec_of("attention/kernel", (4,), RULES)


def test_axes_that_do_not_divide_or_do_not_exist_are_dropped():
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    assert sharding.spec_of("attention/kernel", (3, 8), RULES, mesh) == jax.P(None, "model")
    assert sharding.spec_of("attention/kernel", (3, 7), RULES, mesh) == jax.P(None, None)
    assert sharding.spec_of("expert", (8, 3), RULES, mesh) == jax.P(("data", "model"))
    assert sharding.spec_of("expert", (4, 3), RULES, mesh) == jax.P(None)
    assert sharding.spec_of("expert", (8, 3), RULES, sharding.make_mesh({"data": 8})) == jax.P("data")
    assert sharding.spec_of("embed", (8,), RULES, sharding.make_mesh({"data": 8})) == jax.P(None)


def test_specs_and_shardings_of_a_tree():
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    tree = {"attention": {"kernel": jax.ShapeDtypeStruct((4, 8), jnp.float32)}, "scale": np.float32(1.0), "embed": np.zeros((6, 2))}
    assert sharding.specs(tree, RULES) == {"attention": {"kernel": jax.P(None, "model")}, "scale": jax.P(), "embed": jax.P("model")}
    placed = sharding.shardings(tree, RULES, mesh)
    assert placed["attention"]["kernel"] == jax.NamedSharding(mesh, jax.P(None, "model"))
    assert jax.tree.structure(placed) == jax.tree.structure(tree)
    rules = ((r"embed$", jax.P(("data", "model"), None)), (r"kernel$", jax.P("data", "model")))
    kept = sharding.shardings({"embed": np.zeros((8, 2)), "kernel": np.zeros((4, 2))}, rules, mesh, whole=("data",))
    assert {name: where.spec for name, where in kept.items()} == {"embed": jax.P("model", None), "kernel": jax.P(None, "model")}
    abstract = jax.sharding.AbstractMesh((16, 16), ("data", "model"))
    assert sharding.specs({"embed": np.zeros((6, 2))}, RULES, abstract) == {"embed": jax.P(None)}  # no devices needed


@pytest.mark.parametrize("explicit", [False, True])
def test_place_puts_values_where_they_belong(explicit):
    mesh = sharding.make_mesh({"data": 4, "model": 2}, explicit=explicit)
    tree = {"attention": {"kernel": np.arange(32.0, dtype=np.float32).reshape(4, 8)}, "bias": jnp.arange(3.0)}
    target = sharding.shardings(tree, RULES, mesh)
    placed = sharding.place(tree, target)
    jax.tree.map(lambda x, where: x.sharding.is_equivalent_to(where, x.ndim) or pytest.fail(str(x.sharding)), placed, target)
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
    assert placed["attention"]["kernel"].addressable_shards[0].data.shape == (4, 4)


@pytest.mark.parametrize("explicit", [False, True])
def test_fetch_brings_back_what_place_took(explicit):
    mesh = sharding.make_mesh({"data": 4, "model": 2}, explicit=explicit)
    tree = {"w": np.arange(32.0, dtype=np.float32).reshape(8, 4), "b": np.float32(2.0)}
    split = {"w": jax.NamedSharding(mesh, jax.P("data", "model")), "b": jax.NamedSharding(mesh, jax.P())}
    fetched = sharding.fetch(sharding.place(tree, split))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(fetched))
    jax.tree.map(np.testing.assert_array_equal, fetched, tree)


def test_one_process_holds_all_rows():
    for axes in ({"data": 4, "model": 2}, {"model": 8}):
        np.testing.assert_array_equal(sharding.local_rows(sharding.make_mesh(axes), 16), np.arange(16))


def test_place_takes_numbers_and_python_scalars():
    mesh = sharding.make_mesh({"data": 8})
    placed = sharding.place({"step": 3, "rate": 0.5}, {"step": jax.NamedSharding(mesh, jax.P()), "rate": jax.NamedSharding(mesh, jax.P())})
    assert int(placed["step"]) == 3 and placed["rate"].sharding.is_fully_replicated


def test_batch_spec():
    assert sharding.batch_spec(sharding.make_mesh({"data": 8})) == jax.P("data")
    assert sharding.batch_spec(sharding.make_mesh({"model": 8})) == jax.P()


def test_constrain_batch_pins_the_batch_axis(mesh):
    def f(x):
        return sharding.constrain_batch(x.reshape(8, 2, 3), axis=0) * 2.0

    x = jnp.arange(48.0).reshape(16, 3)
    placed = x if mesh is None else jax.device_put(x, jax.P("data"))
    out = jax.jit(f)(placed)
    np.testing.assert_array_equal(out, f(x))
    if mesh is not None:
        assert out.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P("data")), 3)


def test_constrain_batch_keeps_the_other_axes_and_can_be_differentiated_and_mapped():
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((4, 8)), jax.P("data", "model"))
        out = jax.jit(sharding.constrain_batch)(x)
        assert out.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P("data", "model")), 2)
        np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: sharding.constrain_batch(x).sum()))(x), np.ones((4, 8)))
        np.testing.assert_array_equal(jax.jit(jax.vmap(lambda x: sharding.constrain_batch(x, axis=-1)))(x), np.ones((4, 8)))


def test_constrain_batch_negative_axis_moves_the_batch():
    mesh = sharding.make_mesh({"data": 8})
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: sharding.constrain_batch(x, axis=-1))(jnp.ones((3, 8)))
        assert out.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P(None, "data")), 2)


def test_constrain_batch_is_the_identity_where_it_cannot_apply():
    assert sharding.constrain_batch(jnp.ones((3, 2))).shape == (3, 2)  # no mesh
    with jax.set_mesh(sharding.make_mesh({"model": 8})):
        assert jax.jit(sharding.constrain_batch)(jnp.ones((8, 2))).shape == (8, 2)  # no such axis
    with jax.set_mesh(sharding.make_mesh({"data": 8})):
        assert jax.jit(sharding.constrain_batch)(jnp.ones((3, 2))).shape == (3, 2)  # does not divide
        inside = jax.shard_map(lambda x: sharding.constrain_batch(x), in_specs=jax.P("data"), out_specs=jax.P("data"))
        assert jax.jit(inside)(jnp.ones((64, 2))).shape == (64, 2)  # one device's own code


def test_batch_and_heads_are_kept_on_their_axes():
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    with jax.set_mesh(mesh):
        fix = jax.jit(lambda x: sharding.constrain_batch(2 * x, axis=1, heads=2))
        assert fix(jnp.ones((3, 8, 4, 5))).sharding.shard_shape((3, 8, 4, 5))[1:3] == (2, 2)
        assert fix(jnp.ones((3, 8, 3, 5))).sharding.shard_shape((3, 8, 3, 5))[1:3] == (2, 3)  # 2 does not divide 3 heads
    assert fix(jnp.ones((3, 8, 4, 5))).sharding.is_fully_replicated
