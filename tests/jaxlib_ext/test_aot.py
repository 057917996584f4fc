"""Counting against closed forms, collectives against programs whose traffic is known, and real compiles for TPU."""

import functools
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from janax.jaxlib_ext import aot, sharding
from janax.jaxlib_ext.aot import topology

M, K, N = 24, 32, 16
X = jax.ShapeDtypeStruct((M, K), jnp.float32)
W = jax.ShapeDtypeStruct((K, N), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((K, K), jnp.float32)


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# Counting.


def test_matmul_is_two_m_n_k_and_moves_its_operands_and_result():
    cost = aot.count(lambda x, w: x @ w, X, W)
    assert cost.matmul == cost.flops == 2 * M * K * N
    assert cost.matmul_bytes == cost.io_bytes == 4 * (M * K + K * N + M * N)
    assert cost.bytes == 2 * cost.io_bytes


@pytest.mark.parametrize(
    ("dtype", "precision", "field"),
    [
        (jnp.bfloat16, None, "matmul_bf16"),
        (jnp.int8, None, "matmul_bf16"),
        (jnp.float32, None, "matmul_f32"),
        (jnp.float32, "high", "matmul_f32"),
        (jnp.float32, "highest", "matmul_f32_highest"),
    ],
)
def test_matmul_is_filed_under_the_rate_it_runs_at(dtype, precision, field):
    x, w = (jax.ShapeDtypeStruct(a.shape, dtype) for a in (X, W))
    cost = aot.count(lambda x, w: jnp.matmul(x, w, precision=precision), x, w)
    assert getattr(cost, field) == cost.matmul == 2 * M * K * N


def test_default_precision_in_context_is_seen():
    with jax.default_matmul_precision("highest"):
        assert aot.count(lambda x, w: x @ w, X, W).matmul_f32_highest == 2 * M * K * N


def test_vmap_and_einsum_multiply_by_the_batch():
    assert aot.count(jax.vmap(lambda x, w: x @ w), f32(5, M, K), f32(5, K, N)).matmul == 5 * 2 * M * K * N
    assert aot.count(jax.vmap(lambda x, w: x @ w, in_axes=(0, None)), f32(5, M, K), W).matmul == 5 * 2 * M * K * N
    assert aot.count(functools.partial(jnp.einsum, "bhqe,bhke->bhqk"), f32(2, 3, M, K), f32(2, 3, N, K)).matmul == 2 * 3 * 2 * M * K * N


@pytest.mark.parametrize("length", [1, 7])
def test_scan_multiplies_by_its_length(length):
    def chain(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    cost = aot.count(chain, X, f32(length, K, K))
    assert cost.matmul == length * 2 * M * K * K
    assert cost.transcendental == length * M * K


def test_nested_scans_multiply():
    def nested(x, w):
        inner = lambda x, _: (jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(inner, x, length=5)[0]

    assert aot.count(nested, X, SQUARE).matmul == 15 * 2 * M * K * K
    assert aot.count(jax.jit(nested), X, SQUARE).matmul == 15 * 2 * M * K * K


def test_loop_of_known_length_counts_as_often_and_an_open_one_once_with_a_flag():
    fori = aot.count(lambda x, w: jax.lax.fori_loop(0, 6, lambda _, x: x @ w, x), X, SQUARE)
    assert (fori.matmul, fori.unknown_loops) == (6 * 2 * M * K * K, 0)
    loop = aot.count(lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w, x), X, SQUARE)
    assert (loop.matmul, loop.unknown_loops) == (2 * M * K * K, 1)


def test_gradient_of_a_matmul_chain():
    def chain(ws, x):
        for w in ws:
            x = x @ w
        return x.sum()

    # One product forward each, two backward each, but none for the cotangent of x.
    ws = [SQUARE] * 4
    assert aot.count(jax.grad(chain), ws, X).matmul == 11 * 2 * M * K * K
    assert aot.count(jax.value_and_grad(chain), ws, X).matmul == 11 * 2 * M * K * K
    assert aot.count(jax.value_and_grad(chain, argnums=(0, 1)), ws, X).matmul == 12 * 2 * M * K * K


def test_recomputation_under_checkpoint_is_counted():
    def loss(ws, x, wrap):
        x, _ = jax.lax.scan(wrap(lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ w), None)), x, ws)
        return x.sum()

    one = 2 * M * K * K
    plain = aot.count(jax.grad(lambda ws, x: loss(ws, x, lambda f: f)), f32(5, K, K), X).matmul
    again = aot.count(jax.grad(lambda ws, x: loss(ws, x, jax.checkpoint)), f32(5, K, K), X).matmul
    assert plain == 5 * (2 + 4) * one
    assert again == 5 * (2 + 2 + 4) * one


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_and_its_gradients(stride):
    batch, size, features_in, features_out, window = 2, 8, 3, 5, 3

    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, w = f32(batch, size, size, features_in), f32(window, window, features_in, features_out)
    forward = 2 * batch * (size // stride) ** 2 * features_out * window**2 * features_in
    assert aot.count(conv, x, w).matmul == forward
    assert aot.count(jax.value_and_grad(lambda x, w: conv(x, w).sum(), argnums=(0, 1)), x, w).matmul == 3 * forward


def test_grouped_convolution_counts_the_channels_of_one_group():
    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=4)

    assert aot.count(conv, f32(2, 10, 8), f32(3, 2, 12)).matmul == 2 * (2 * 10 * 12) * 3 * 2


def test_cond_costs_its_dearest_branch():
    cost = aot.count(lambda p, x, w: jax.lax.cond(p, lambda: x @ w @ w, lambda: x @ w), jnp.array(True), X, SQUARE)
    assert cost.matmul == 2 * 2 * M * K * K


def test_custom_derivatives_are_walked():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))
    assert aot.count(product, X, W).matmul == 2 * M * K * N
    assert aot.count(jax.value_and_grad(lambda x, w: product(x, w).sum(), argnums=(0, 1)), X, W).matmul == 6 * M * K * N

    @jax.custom_jvp
    def square(x):
        return x @ x

    square.defjvp(lambda primals, tangents: (square(*primals), tangents[0] @ primals[0]))
    assert aot.count(square, SQUARE).matmul == 2 * K**3
    assert aot.count(lambda x: jax.jvp(square, (x,), (x,)), SQUARE).matmul == 4 * K**3


def test_shard_map_counts_every_shard():
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    half = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"), check_vma=False)
    # Split four ways, and done twice over, because nothing divides the work over `model`.
    assert aot.count(half, X, W).matmul == 2 * 2 * M * K * N
    full = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(jax.P("data"), jax.P(None, "model")), out_specs=jax.P("data", "model"))
    assert aot.count(full, X, W).matmul == 2 * M * K * N


def test_elementwise_reductions_transforms_and_factorisations():
    x = f32(6, 64)
    cost = aot.count(lambda x: jnp.sum(jnp.exp(x) * x + 1.0), x)
    assert (cost.transcendental, cost.elementwise, cost.matmul) == (6 * 64, 3 * 6 * 64, 0)
    assert aot.count(lambda x: x.astype(jnp.int32) + 1, x).flops == 0  # integers are free
    complex_, real = jax.ShapeDtypeStruct((6, 64), jnp.complex64), x
    assert aot.count(lambda x: jnp.fft.fft(x), complex_).elementwise == 6 * 5 * 64 * 6
    assert aot.count(lambda x: jnp.fft.rfft(x), real).elementwise == pytest.approx(6 * 5 * 64 * 6 / 2)
    assert aot.count(lambda x: jax.lax.linalg.cholesky(x, symmetrize_input=False), f32(3, 9, 9)).elementwise == 3 * 9**3 / 3


def test_ragged_dot_counts_each_row_once():
    groups = jax.ShapeDtypeStruct((4,), jnp.int32)
    assert aot.count(jax.lax.ragged_dot, X, f32(4, K, N), groups).matmul == 2 * M * K * N


def test_kernels_are_counted_per_grid_point_and_move_their_operands_once():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    call = pl.pallas_call(
        kernel,
        out_shape=f32(M, N),
        grid=(3,),
        in_specs=[pl.BlockSpec((M // 3, K), lambda i: (i, 0)), pl.BlockSpec((K, N), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((M // 3, N), lambda i: (i, 0)),
        interpret=True,
    )
    cost = aot.count(call, X, W)
    assert cost.matmul == 2 * M * K * N
    assert cost.matmul_bytes == 4 * (M * K + K * N + M * N)
    estimate = pl.CostEstimate(flops=123, transcendentals=45, bytes_accessed=678)
    told = aot.count(pl.pallas_call(kernel, out_shape=f32(M, N), cost_estimate=estimate, interpret=True), X, W)
    assert (told.matmul, told.transcendental, told.matmul_bytes) == (123, 45, 678)


def test_what_cannot_be_counted_is_named():
    def callback(x):
        return jax.pure_callback(lambda x: x, x, x) + jnp.linalg.eigvalsh(x)[0]

    assert set(aot.count(callback, SQUARE).uncounted) == {"eigh", "pure_callback"}


def test_gather_scatter_and_random_keys_pass():
    rows = jax.ShapeDtypeStruct((10,), jnp.int32)
    assert aot.count(lambda w, i: w[i], W, rows).matmul_bytes == 2 * 4 * 10 * N
    assert aot.count(lambda w, i, u: w.at[i].add(u), W, rows, f32(10, N)).elementwise == 10 * N
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert aot.count(lambda key: jax.random.normal(key, (5,)), key).io_bytes >= 5 * 4


def test_costs_add_and_scale():
    cost = aot.count(lambda x, w: x @ w, X, W)
    assert cost + cost == cost.times(2)


# Memory.


def test_memory_of_a_scan_grows_with_its_length_unless_states_are_recomputed():
    def loss(w, x, length):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=length)[0].sum()

    def temporaries(length):
        return aot.memory(jax.grad(lambda w, x: loss(w, x, length)), f32(64, 64), f32(256, 64)).temporaries

    state = 4 * 256 * 64
    assert temporaries(40) - temporaries(20) >= 20 * state


def test_memory_of_donated_arguments_is_aliased():
    update = lambda x: x + 1  # noqa: E731
    kept, donated = aot.memory(update, X), aot.memory(jax.jit(update, donate_argnums=0), X)
    assert (kept.aliased, donated.aliased) == (0, 4 * M * K)
    assert kept.peak - donated.peak == 4 * M * K


# Analysis, on the CPU's own compiler.

CHIP = aot.Chip(name="toy", memory=1 << 20, memory_bandwidth=1e9, flops_bf16=4e9, flops_f32=1e9, flops_f32_highest=1e8, interconnect=1e6)


def _step_program(devices=None, *, rows=64):
    mesh = sharding.make_mesh({"data": -1}, devices)

    def step(w, x):
        return w - jax.grad(lambda w: jnp.mean(jnp.square(x @ w)))(w)

    w = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P()))
    x = jax.ShapeDtypeStruct((rows, 32), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("data")))
    return aot.Program("step", step, (w, x), out_shardings=w.sharding, donate_argnums=0), mesh


def test_analysis_agrees_with_the_closed_form():
    program, _ = _step_program()
    analysis = aot.analyse(program, CHIP)
    assert (analysis.devices, analysis.platform, analysis.fits, analysis.error) == (8, "cpu", True, None)
    assert analysis.memory.arguments == 4 * (32 * 32 + 64 // 8 * 32)
    assert analysis.memory.outputs == analysis.memory.aliased == 4 * 32 * 32
    flops = 2 * 2 * 64 * 32 * 32
    assert analysis.cost.matmul_f32 == flops
    (reduce,) = analysis.collectives
    assert reduce.payload == 4 * 32 * 32
    assert analysis.roofline["compute"] == pytest.approx(flops / 8 / 1e9)
    assert analysis.roofline["interconnect"] == pytest.approx(2 * 7 / 8 * 4 * 32 * 32 / 1e6)
    assert analysis.limit == "interconnect"
    assert analysis.step_seconds == analysis.roofline["interconnect"]
    assert min(analysis.trace_seconds, analysis.lower_seconds, analysis.compile_seconds) > 0


def test_network_between_domains_limits():
    program, _ = _step_program()
    near = aot.analyse(program, aot.Chip(**{**CHIP.__dict__, "domain": 8, "network": 1e3}))
    far = aot.analyse(program, aot.Chip(**{**CHIP.__dict__, "domain": 4, "network": 1e3}))
    # Four members in each of two domains: a quarter of the bytes of each goes over a network a thousand times slower.
    assert far.roofline["interconnect"] == pytest.approx((3 / 4 + 1000 / 4) * near.roofline["interconnect"])


def test_analysis_speaks_to_people_and_machines():
    program, _ = _step_program()
    analysis = aot.analyse(program, CHIP)
    text = analysis.text()
    assert "8 x toy (cpu), fits" in text and "all-reduce" in text and "limited by interconnect" in text
    assert max(len(line) for line in text.splitlines()) < 140
    again = json.loads(json.dumps(analysis.as_dict()))
    assert again["memory"]["peak"] == analysis.memory.peak
    assert again["roofline"]["limit"] == "interconnect"
    assert again["collectives"][0]["kind"] == "all-reduce"


def test_program_larger_than_the_chip_does_not_fit():
    program, _ = _step_program(rows=1 << 15)
    analysis = aot.analyse(program, CHIP)
    assert not analysis.fits and analysis.share > 0.5 and "DOES NOT FIT" in analysis.text()


def test_shardings_may_come_from_the_program_or_the_mesh():
    program, mesh = _step_program()
    bare = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.args)
    whole, split = (x.sharding for x in program.args)
    given = aot.analyse(program._replace(args=bare, in_shardings=(whole, split)), CHIP)
    assert given.memory == aot.analyse(program, CHIP).memory
    named = aot.analyse(program._replace(args=bare, in_shardings=(jax.P(), jax.P("data")), out_shardings=jax.P()), CHIP, mesh=mesh)
    assert named.memory == given.memory
    replicated = aot.analyse(program._replace(args=bare, out_shardings=None), CHIP, mesh=mesh)
    assert replicated.devices == 8 and replicated.memory.arguments == 4 * (32 * 32 + 64 * 32)
    alone = aot.analyse(program._replace(args=bare, out_shardings=None), CHIP)
    assert alone.devices == 1 and alone.collectives == ()


def test_other_errors_are_not_hidden():
    with pytest.raises(TypeError, match="incompatible shapes"):
        aot.analyse(aot.Program("wrong", lambda x, y: x + y, (f32(3), f32(4))), CHIP)


# Topologies.


@pytest.mark.parametrize("name", ["v5e", "v5e:16", "v5e:4x4x4", "v4:2x2", "v5e:0x2", "h100:8", "h100:1x9", "a100:1x8", "cpu", ""])
def test_unknown_topologies_are_refused_with_examples(name):
    for function in (aot.topology_devices, aot.chip_of):
        with pytest.raises(ValueError, match=r"unknown topology .* expected a chip and a shape such as 'v4:2x2x4'"):
            function(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "tpu"), ("h100:1x8", "aot-gpu")])
def test_missing_compiler_names_the_extra(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    topology._tpus.cache_clear()
    topology._gpus.cache_clear()
    with pytest.raises(RuntimeError, match=rf"install the extra `janax\[{extra}\]`"):
        aot.topology_devices(name)


def test_chips():
    assert aot.chip_of("v5e:16x16").memory == 16 << 30
    assert aot.chip_of("V5P:4x4x4").name == "v5p"
    assert aot.chip_of("h100:4x8").domain == 8 and aot.chip_of("h100:1x2").domain == 2
    for name in ("v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "h100:1x1"):
        chip = aot.chip_of(name)
        assert chip.flops_bf16 >= chip.flops_f32 >= chip.flops_f32_highest > chip.memory_bandwidth > chip.interconnect


# Real compiles for TPU.

tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler (the extra `tpu`)")


@tpu
@pytest.mark.parametrize("kind", ["v4", "v5e", "v5p", "v6e"])
def test_tpu_topologies_from_one_chip_to_256(kind):
    flat = [(1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    deep = [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8)]
    for lengths in flat if kind in ("v5e", "v6e") else deep:
        name = f"{kind}:{'x'.join(map(str, lengths))}"
        assert len(aot.topology_devices(name)) == math.prod(lengths), name
        assert aot.topology_devices(name) == aot.topology_devices(name)


def _mlp(name, *, batch_per_device=512, width=2048, layers=4):
    """A training step of residual layers, parameters replicated, batch over `data`, compiled for a topology."""
    mesh = sharding.make_mesh({"data": -1}, aot.topology_devices(name))
    whole, split = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))

    def loss(w, x):
        x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, w)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    def step(w, x):
        return w - jax.grad(loss)(w, x)

    w = jax.ShapeDtypeStruct((layers, width, width), jnp.bfloat16, sharding=whole)
    x = jax.ShapeDtypeStruct((batch_per_device * mesh.size, width), jnp.bfloat16, sharding=split)
    return aot.Program("mlp", step, (w, x), out_shardings=whole, donate_argnums=0)


@tpu
def test_tpu_program_has_the_memory_and_the_collectives_it_should():
    analysis = aot.analyse(_mlp("v5e:2x2"), aot.chip_of("v5e:2x2"))
    weights, batch = 2 * 4 * 2048 * 2048, 2 * 512 * 2048
    assert (analysis.devices, analysis.platform, analysis.fits) == (4, "TPU v5 lite", True)
    assert analysis.memory.arguments == weights + batch
    assert analysis.memory.aliased == weights
    assert analysis.cost.matmul_bf16 == pytest.approx(4 * 3 * 2 * (4 * 512) * 2048 * 2048, rel=0.1)  # no cotangent for the first input
    sent = {c.kind: c.sent for c in analysis.collectives}
    # Whether as an all-reduce or as its two halves, every weight's gradient goes once around the ring.
    assert sum(sent.values()) == pytest.approx(2 * 3 / 4 * weights, rel=0.01)


@tpu
def test_tpu_temporaries_do_not_depend_on_the_number_of_chips():
    options = {"batch_per_device": 32768, "width": 512, "layers": 8}  # too much for on-chip memory, so that temporaries are in HBM
    small, large = (aot.analyse(_mlp(name, **options), aot.chip_of(name)).memory for name in ("v5e:2x2", "v5e:8x8"))
    assert small.temporaries > 8 * 2 * 32768 * 512
    assert large.temporaries == pytest.approx(small.temporaries, rel=0.05)
    assert large.arguments == small.arguments


@tpu
def test_tpu_program_that_does_not_fit_is_an_answer():
    analysis = aot.analyse(_mlp("v5e:1x1", batch_per_device=1 << 20, layers=8), aot.chip_of("v5e:1x1"))
    assert not analysis.fits
    assert "exceeds available HBM" in (analysis.error or "")
    assert analysis.share > 1 and analysis.memory.arguments == 2 * (8 * 2048**2 + (1 << 20) * 2048)
    assert "DOES NOT FIT" in analysis.text()
    assert np.isfinite(analysis.step_seconds)
    json.dumps(analysis.as_dict())
