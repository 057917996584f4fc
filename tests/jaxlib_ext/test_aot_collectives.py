"""Collectives in the text of compiled programs: how they are written, how often they run, what they send."""

import functools

import jax
import jax.numpy as jnp
import pytest

from janax.jaxlib_ext import aot, sharding


def _compiled(fn, *shapes, mesh, spec):
    where = jax.NamedSharding(mesh, spec)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where) for shape in shapes]
    return jax.jit(fn).lower(*args).compile().as_text()


def _by_kind(text, **options):
    return {c.kind: c for c in aot.collectives(text, **options)}


BODIES = {
    "all-reduce": (lambda x: jax.lax.psum(x, "model"), 1.0, 1.0, 2),
    "all-gather": (lambda x: jax.lax.all_gather(x, "data", tiled=True)[: x.shape[0]] * 2.0, 4.0, 3 / 4, 4),
    "reduce-scatter": (lambda x: jnp.tile(jax.lax.psum_scatter(x, "data", tiled=True), (4, 1)), 1.0, 3 / 4, 4),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True), 1.0, 3 / 4, 4),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]), 1.0, 1.0, 8),
}


@pytest.mark.parametrize("length", [None, 5])
@pytest.mark.parametrize("kind", BODIES)
def test_collectives_of_a_real_program(kind, length):
    body, payload, share, group = BODIES[kind]
    mesh = sharding.make_mesh({"data": 4, "model": 2})

    def shard(x):
        # x + 1 depends on the carry, so that nothing is moved out of the loop.
        return body(x + 1.0) if length is None else jax.lax.scan(lambda x, _: (body(x + 1.0), None), x, length=length)[0]

    mapped = jax.shard_map(shard, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"), check_vma=False)
    found = _by_kind(_compiled(mapped, (64, 32), mesh=mesh, spec=jax.P("data")))
    assert set(found) == {kind}
    times, size = length or 1, 4 * 16 * 32
    collective = found[kind]
    assert (collective.count, collective.executed, collective.unknown_loops) == (1, times, 0)
    assert collective.payload == times * payload * size
    assert collective.sent == times * payload * size * share
    assert collective.group_sizes == (group,)


def test_collectives_in_nested_loops_and_in_loops_of_unknown_length():
    mesh = sharding.make_mesh({"data": 8})

    def shard(x, open_ended):
        inner = lambda x, _: (jax.lax.psum(x, "data") * 0.1, None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, length=3)[0], None)  # noqa: E731
        if open_ended:
            return jax.lax.while_loop(lambda x: x[0, 0] < 9.0, lambda x: outer(x, None)[0], x)
        return jax.lax.scan(outer, x, length=4)[0]

    for open_ended, executed, unknown in ((False, 12, 0), (True, 3, 1)):
        body = functools.partial(shard, open_ended=open_ended)
        mapped = jax.shard_map(body, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"), check_vma=False)
        (found,) = aot.collectives(_compiled(mapped, (64, 32), mesh=mesh, spec=jax.P("data")))
        assert (found.kind, found.count, found.executed, found.unknown_loops) == ("all-reduce", 1, executed, unknown)


def test_of_a_conditional_the_dearest_branch_counts():
    mesh = sharding.make_mesh({"data": 8})

    def shard(x):
        dear = lambda x: jax.lax.psum(x, "data") + jax.lax.psum(x * x, "data")  # noqa: E731
        return jax.lax.cond(jax.lax.psum(x, "data")[0, 0] > 0, dear, lambda x: x, x)

    mapped = jax.shard_map(shard, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"), check_vma=False)
    found = _by_kind(_compiled(mapped, (64, 32), mesh=mesh, spec=jax.P("data")))["all-reduce"]
    assert found.payload == 3 * 4 * 8 * 32 or found.payload == 2 * 4 * 8 * 32 + 4  # the first may be narrowed to the element it needs


def test_contraction_over_a_sharded_axis_is_one_all_reduce():
    mesh = sharding.make_mesh({"data": 8})
    text = _compiled(lambda x: x.T @ x, (64, 32), mesh=mesh, spec=jax.P("data"))
    (found,) = aot.collectives(text)
    assert (found.kind, found.payload, found.sent) == ("all-reduce", 4 * 32 * 32, 2 * 7 * 4 * 32 * 32 // 8)


def test_groups_that_leave_a_domain_use_the_network():
    mesh = sharding.make_mesh({"data": 2, "model": 4})

    def reduce(axis):
        mapped = jax.shard_map(lambda x: jax.lax.psum(x, axis), mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
        (found,) = aot.collectives(_compiled(mapped, (8, 8), mesh=mesh, spec=jax.P()), domain=4)
        return found

    assert reduce("model").sent_between_domains == 0
    assert reduce("data").sent_between_domains == reduce("data").sent == 4 * 64


def test_all_to_all_over_domains_sends_to_those_elsewhere():
    text = _module("  %a = f32[64]{0} all-to-all(%p), replica_groups={{0,1,2,3,4,5,6,7}}")
    (found,) = aot.collectives(text, domain=4)
    assert (found.sent, found.sent_between_domains) == (256 * 7 // 8, 256 * 4 // 8)


def _module(body, *others):
    computations = "\n\n".join(others)
    return f"HloModule m, is_scheduled=true, num_partitions=8\n\n{computations}\n\nENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("line", "kind", "payload", "group"),
    [
        ("%a = f32[8,4]{1,0} all-reduce-start(%p), replica_groups=[4,2]<=[8], to_apply=%add", "all-reduce", 128, 2),
        ("%a = (f32[8]{0}, bf16[4,2]{1,0}) all-reduce(%p, %q), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", "all-reduce", 48, 4),
        ("%a = (f32[8]{0:T(128)}, f32[32]{0:T(128)S(1)}) all-gather-start(%p), replica_groups=[2,4]<=[4,2]T(1,0)", "all-gather", 128, 4),
        (
            "%a = ((f32[8]{0}, s8[8]{0}), (f32[32]{0}, s8[32]{0}), /*index=2*/u32[]{:S(2)}) all-gather-start(%p, %q), replica_groups={}",
            "all-gather",
            160,
            8,
        ),
        (
            "%a = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            32,
            8,
        ),
        ("%a = ((f32[8]), f32[8], s32[]) all-to-all-start(%p), replica_groups=mesh['x'=2,'y'=4] {'y'}", "all-to-all", 32, 4),
        ("%a = f8e4m3fn[8]{0} all-to-all(%p), replica_groups=mesh['x'=2,'y'=4] {'x','y':(1)2}", "all-to-all", 8, 4),
        ("%a = pred[8]{0} collective-broadcast(%p), replica_groups={{0,1}}", "collective-broadcast", 8, 2),
    ],
)
def test_every_way_in_which_a_collective_is_written(line, kind, payload, group):
    done = f"  %d = f32[8]{{0}} {kind}-done(%a)"
    (found,) = aot.collectives(_module(f'  {line}, metadata={{op_name="jit(f)/while/x"}}\n{done}'))
    assert (found.kind, found.count, found.executed, found.payload, found.group_sizes) == (kind, 1, 1, payload, (group,))


def _computation(header, *lines):
    return "\n".join([f"%{header} {{", *(f"  {line}" for line in lines), "}"])


def test_generic_asynchronous_wrapper_counts_once():
    inner = _computation(
        "wrapped (q: f32[8]) -> f32[2]",
        "%q = f32[8]{0} parameter(0)",
        "ROOT %r = f32[2]{0} reduce-scatter(%q), replica_groups=[2,4]<=[8]",
    )
    body = "  %s = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%p), calls=%wrapped\n  ROOT %d = f32[2]{0} async-done(%s)"
    (found,) = aot.collectives(_module(body, inner))
    assert (found.kind, found.count, found.payload, found.sent) == ("reduce-scatter", 1, 32, 24)


def test_collective_spread_over_tpu_fusions_counts_once_and_loops_are_read_from_their_condition():
    gather = "%g = f32[32]{0} all-gather(%q), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}"
    start = 'ROOT %c = (f32[8], f32[32]) custom-call(%g), custom_call_target="AsyncCollectiveStart"'
    end = 'ROOT %c = f32[32] custom-call(%g), custom_call_target="AsyncCollectiveDone"'
    fusions = [
        _computation("f1 (q: f32[8]) -> f32[32]", gather, start),
        _computation("async_collective_fusion.3 (q: f32[8]) -> f32[32]", gather),
        _computation("f2 (q: f32[8]) -> f32[32]", gather, end),
        _computation(
            "all-reduce-scatter.1 (q: f32[8]) -> f32[2]",
            "%a = f32[8]{0} all-reduce(%q), replica_groups=[2,4]<=[8], to_apply=%add",
            "ROOT %s = f32[2]{0} dynamic-slice(%a)",
        ),
    ]
    loop = _computation(
        "body (t: (s32[], f32[8])) -> (s32[], f32[8])",
        "%x = (f32[8]{0}, f32[32]{0}) fusion(%t), kind=kCustom, calls=%f1",
        "%y = f32[32]{0} fusion(%x), kind=kOutput, calls=%async_collective_fusion.3",
        "%z = f32[32]{0} fusion(%y), kind=kCustom, calls=%f2",
        "ROOT %w = f32[2]{0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1",
    )
    condition = _computation(
        "condition (t: (s32[], f32[8])) -> pred[]",
        "%n = s32[]{:T(128)} constant(6)",
        "%i = s32[]{:T(128)} get-tuple-element(%t), index=0",
        "ROOT %l = pred[]{:T(512)} compare(%i, %n), direction=LT",
    )
    main = [
        "  %two = s32[]{:T(128)} constant(2)",
        "  %begin = s32[]{:T(128)} copy(%two)",
        "  %t = (s32[]{:T(128)}, f32[8]{0}) tuple(%begin, %p)",
        "  ROOT %while = (s32[]{:T(128)}, f32[8]{0}) while(%t), condition=%condition, body=%body",
    ]
    found = _by_kind(_module("\n".join(main), *fusions, loop, condition))
    assert {kind: (c.count, c.executed, c.payload) for kind, c in found.items()} == {
        "all-gather": (1, 4, 4 * 128),
        "reduce-scatter": (1, 4, 4 * 32),
    }


def test_a_constant_factor_in_a_condition_is_not_its_bound():
    body = _computation("body (t: (s32[], f32[8])) -> (s32[], f32[8])", "ROOT %a = f32[8]{0} all-reduce(%q), replica_groups=[2,4]<=[8]")
    condition = _computation(
        "condition (t: (s32[], f32[8])) -> pred[]",
        "%n = s32[]{:T(128)} constant(128)",
        "%i = s32[]{:T(128)} get-tuple-element(%t), index=0",
        "%m = s32[]{:T(128)} multiply(%i, %n)",
        "ROOT %l = pred[]{:T(512)} compare(%m, %count), direction=LT",
    )
    (found,) = aot.collectives(_module("  ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body", body, condition))
    assert (found.executed, found.unknown_loops) == (1, 1)


def test_text_without_collectives():
    assert aot.collectives(jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((16, 16), jnp.float32)).compile().as_text()) == ()
    assert aot.collectives("") == ()
