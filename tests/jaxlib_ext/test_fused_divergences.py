"""Fused divergences beside the exact ones on whole logits, which test_divergence.py compares with NumPy."""

import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janax.jaxlib_ext import aot, divergence, fused, sharding
from janax.jaxlib_ext.kernels import divergence as kernels
from janax.jaxlib_ext.logprobs import TopK

N, D, E, V = 7, 6, 9, 150
PARAMETERS = {
    "js": {"beta": 0.3},
    "skew_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
    "alpha_divergence": {"alpha": 0.3},
    "renyi": {"alpha": 0.7},
}
CAPS = {"softcap": 5.0, "teacher_softcap": 4.0}
CHUNKS = {"vocab_chunk": 64, "token_chunk": 4}  # neither divides its axis


def problem(dtype=np.float64, n=N, d=D, e=E, v=V):
    rng = np.random.default_rng(0)
    arrays = {
        "h": rng.normal(size=(n, d)),
        "w": rng.normal(size=(d, v)),
        "bias": rng.normal(size=v),
        "teacher_h": rng.normal(size=(n, e)),
        "teacher_w": rng.normal(size=(e, v)),
        "teacher_bias": rng.normal(size=v),
    }
    arrays["bias"][[3, 5]] = -np.inf  # 3 is forbidden by both, 5 and 7 by one
    arrays["teacher_bias"][[3, 7]] = -np.inf
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    weights, label_weights = rng.normal(size=(2, n)).astype(dtype)
    return arrays, rng.integers(8, v, size=n).astype(np.int32), weights, label_weights


def logits(h, w, bias, cap):
    x = h @ w + jnp.where(jnp.isneginf(bias), 0, bias)[None]
    return jnp.where(jnp.isneginf(bias)[None], -jnp.inf, cap * jnp.tanh(x / cap))


def plain(kind, arrays, labels, weights, label_weights, *, temperature=1.0, **parameters):
    """The definition: both logits whole."""
    z_p = logits(arrays["h"], arrays["w"], arrays["bias"], CAPS["softcap"])
    z_q = logits(arrays["teacher_h"], arrays["teacher_w"], arrays["teacher_bias"], CAPS["teacher_softcap"])
    values = divergence.per_token(kind, z_p, z_q, temperature=temperature, **parameters)
    log_probs = jax.nn.log_softmax(z_p)[jnp.arange(len(labels)), labels]
    return jnp.sum(weights * values) - jnp.sum(label_weights * log_probs)


def weighted(kind, arrays, labels, weights, label_weights, **options):
    return fused.weighted_divergence(kind, **arrays, weights=weights, labels=labels, label_weights=label_weights, **CAPS, **options)


def per_token(kind, arrays, labels, weights, label_weights, **options):
    out = fused.divergence(kind, **arrays, labels=labels, **CAPS, **options)
    return jnp.sum(weights * out.values) - jnp.sum(label_weights * out.log_probs)


def of_student(f, arrays):
    """(student's arrays) -> f(all), and those arrays."""
    names = ("h", "w", "bias")
    student, teacher = {n: arrays[n] for n in names}, {n: x for n, x in arrays.items() if n not in names}
    return lambda student: f(student | teacher), student


def check(got, expected, rtol, grads):
    np.testing.assert_allclose(got[0], expected[0], rtol=rtol)
    for name, theirs in expected[1].items():
        np.testing.assert_allclose(got[1][name], theirs, rtol=grads, atol=grads * np.abs(theirs).max(), err_msg=name)


@functools.cache
def wanted(kind):
    with jax.enable_x64(True):
        arrays, *rest = problem()
        f, student = of_student(lambda arrays: plain(kind, arrays, *rest, temperature=2.0, **PARAMETERS.get(kind, {})), arrays)
        return jax.device_get(jax.value_and_grad(f)(student))


@pytest.mark.parametrize("kind", divergence.NAMES)
def test_value_and_gradients(kind, x64):
    """All kinds, operation by operation; `test_under_jit` compiles one of each rule."""
    arrays, *rest = problem()
    options = PARAMETERS.get(kind, {}) | {"temperature": 2.0} | CHUNKS
    f, student = of_student(lambda arrays: weighted(kind, arrays, *rest, **options), arrays)
    with jax.disable_jit():
        check(jax.value_and_grad(f)(student), wanted(kind), 1e-12, 1e-11)


@pytest.mark.parametrize(("kind", "call"), [("js", weighted), ("renyi", per_token), ("adaptive_kl", per_token)])
def test_under_jit(kind, call, x64):
    arrays, *rest = problem()
    options = PARAMETERS.get(kind, {}) | {"temperature": 2.0} | CHUNKS
    f, student = of_student(lambda arrays: call(kind, arrays, *rest, **options), arrays)
    check(jax.jit(jax.value_and_grad(f))(student), wanted(kind), 1e-12, 1e-11)


def test_float32_and_bfloat16():
    """float32 within the rounding of sums over 150 entries; bfloat16 arrays give what their rounded values give in float32, products apart."""
    arrays, *rest = problem(np.float32)
    f, student = of_student(lambda arrays: weighted("js", arrays, *rest, beta=0.3, temperature=2.0), arrays)
    check(jax.jit(jax.value_and_grad(f))(student), wanted("js"), 2e-5, 1e-4)
    small = {name: x.astype(jnp.bfloat16) for name, x in arrays.items()}
    f, student = of_student(lambda arrays: weighted("js", arrays, *rest, beta=0.3, temperature=2.0), small)
    value, gradients = jax.jit(jax.value_and_grad(f))(student)
    assert value.dtype == jnp.float32 and {x.dtype for x in gradients.values()} == {jnp.dtype(jnp.bfloat16)}
    rounded = {name: x.astype(jnp.float32) for name, x in small.items()}
    np.testing.assert_allclose(value, plain("js", rounded, *rest, beta=0.3, temperature=2.0), rtol=1e-5)


@pytest.mark.parametrize(("kind", "tokens"), [("js", "likeliest"), ("forward_kl", "some forbidden")])
def test_teacher_by_its_top_k(kind, tokens, x64):
    arrays, _, weights, _ = problem()
    log_q = jax.nn.log_softmax(logits(arrays["teacher_h"], arrays["teacher_w"], arrays["teacher_bias"], 4.0) / 2)
    top = TopK(*jax.lax.top_k(log_q, 7))
    if tokens != "likeliest":
        ids = jnp.asarray(np.tile([3, 5, 7, 20, 149], (N, 1)))
        top = TopK(jnp.take_along_axis(log_q, ids, 1), ids)
    generator = divergence.resolve("", kind, **PARAMETERS.get(kind, {})).generator

    def theirs(student):
        z = logits(student["h"], student["w"], student["bias"], 5.0) / 2
        log_p = jnp.take_along_axis(jax.nn.log_softmax(z), top.tokens, 1)
        return jnp.sum(weights * divergence.from_support(generator, log_p, top.log_probs))

    def ours(student):
        options = {"teacher_top_k": top, "temperature": 2.0, "softcap": 5.0} | CHUNKS | PARAMETERS.get(kind, {})
        return fused.weighted_divergence(kind, student["h"], student["w"], None, None, weights, bias=student["bias"], **options)

    student = {name: arrays[name] for name in ("h", "w", "bias")}
    check(jax.jit(jax.value_and_grad(ours))(student), jax.value_and_grad(theirs)(student), 1e-12, 1e-11)


def test_what_does_not_count_may_be_anything():
    arrays, labels, weights, label_weights = problem(np.float32)
    mask = np.ones(N, bool)
    mask[[2, 5]] = False
    spoilt = arrays | {"h": np.where(mask[:, None], arrays["h"], np.nan), "teacher_h": np.where(mask[:, None], arrays["teacher_h"], np.inf)}

    def masked(arrays):
        out = fused.divergence("js", **arrays, mask=mask, labels=labels, token_chunk=4)
        return jnp.sum(weights * out.values) - jnp.sum(label_weights * out.log_probs)

    def without(arrays):
        return fused.weighted_divergence("js", **arrays, weights=weights * mask, labels=labels, label_weights=label_weights * mask)

    clean = arrays | {"h": arrays["h"][mask], "teacher_h": arrays["teacher_h"][mask]}

    def shorter(arrays):
        few = (weights[mask], labels[mask], label_weights[mask])
        return fused.weighted_divergence("js", **arrays, weights=few[0], labels=few[1], label_weights=few[2])

    g, few = of_student(shorter, clean)
    with jax.disable_jit():
        expected_value, expected = jax.value_and_grad(g)(few)
    for f in (masked, without):
        f, student = of_student(f, spoilt)
        value, gradients = jax.jit(jax.value_and_grad(f))(student)
        np.testing.assert_allclose(value, expected_value, rtol=1e-5)
        np.testing.assert_allclose(gradients["w"], expected["w"], atol=1e-4)
        np.testing.assert_allclose(gradients["h"][mask], expected["h"], atol=1e-4)
        np.testing.assert_array_equal(gradients["h"][~mask], 0)


def test_extremes():
    """Logits of +-60, rows that forbid everything, and equal distributions: finite, and zero where due."""
    arrays, *_ = problem(np.float32)
    sharp = {
        "h": 60 * np.sign(arrays["h"]),
        "w": np.sign(arrays["w"]),
        "teacher_h": -60 * np.sign(arrays["h"]),
        "teacher_w": np.sign(arrays["w"]),
    }
    nothing = np.full(V, -np.inf, np.float32)

    def run(kind, h, teacher_h, **options):
        f = lambda h: jnp.sum(fused.divergence(kind, h, sharp["w"], teacher_h, sharp["teacher_w"], **options).values)  # noqa: E731
        return jax.value_and_grad(f)(h)

    with jax.disable_jit():
        for kind in ("forward_kl", "js", "chi2_forward", "renyi"):
            value, gradient = run(kind, sharp["h"], sharp["teacher_h"], **PARAMETERS.get(kind, {}))
            assert np.isfinite(value) and np.all(np.isfinite(gradient)), kind
        value, gradient = run("js", sharp["h"], sharp["teacher_h"], bias=nothing)
        assert value == 0 and not np.any(gradient)
        value, gradient = run("reverse_kl", arrays["h"], arrays["h"])
        np.testing.assert_allclose(value, 0, atol=1e-5)


def test_placement_of_the_unembedding_and_leading_axes():
    arrays, *_ = problem(np.float32, n=12)
    call = functools.partial(jax.jit, static_argnames=("transposed", "teacher_transposed"))(
        lambda arrays, t, **static: fused.divergence("skew_kl", **arrays, alpha=0.1, temperature=t, **static).values
    )
    one = call(arrays, 1.0)
    turned = arrays | {name: arrays[name].T for name in ("w", "teacher_w")}
    np.testing.assert_allclose(call(turned, 1.0, transposed=True, teacher_transposed=True), one, rtol=1e-5)
    folded = arrays | {name: arrays[name].reshape(3, 4, -1) for name in ("h", "teacher_h")}
    np.testing.assert_allclose(call(folded, 1.0).reshape(-1), one, rtol=1e-6)
    by_temperature = jax.vmap(call, (None, 0))(arrays, jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(by_temperature[0], one, rtol=1e-6)


def arrays_of(jaxpr):
    for equation in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in equation.outvars)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from arrays_of(inner)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("js", {}),
        ("forward_kl", {"temperature": 2.0}),
        ("reverse_kl", {"softcap": 30.0, "teacher_softcap": 30.0}),
        ("forward_kl", {"temperature": 2.0, "labels": True}),
    ],
)
def test_no_array_of_tokens_by_vocabulary(kind, given):
    n, d, v = 1024, 64, 32768
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    arguments = (shape((n, d)), shape((d, v)), shape((n, d)), shape((d, v)), shape((n,)))
    if "labels" in given:
        given = given | {"labels": jnp.zeros(n, jnp.int32), "label_weights": jnp.ones(n)}
    ours = jax.value_and_grad(functools.partial(fused.weighted_divergence, kind, **given), argnums=(0, 1))
    each = functools.partial(divergence.per_token, kind, temperature=given.get("temperature", 1.0))
    theirs = jax.value_and_grad(lambda h, w, th, tw, c: jnp.sum(c * each(h @ w, th @ tw)), argnums=(0, 1))
    size = lambda f: jax.jit(f).lower(*arguments).compile().memory_analysis().temp_size_in_bytes  # noqa: E731
    assert size(theirs) >= 4 * n * v  # the measure sees the logits
    assert size(ours) <= 0.1 * size(theirs)
    assert max(math.prod(s) for s in arrays_of(jax.make_jaxpr(ours)(*arguments).jaxpr)) <= n * v // 4


# --- kernels


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_kernel_changes_nothing(temperature):
    """The TPU kernel, interpreted, with tiles that overhang both rows and vocabulary."""
    arrays, *rest = problem(np.float32)

    def run(kernel):
        options = {"beta": 0.3, "temperature": temperature, "vocab_chunk": 64, "token_chunk": 4, "kernel": kernel}
        f, student = of_student(lambda arrays: weighted("js", arrays, *rest, **options), arrays)
        return jax.jit(jax.value_and_grad(f))(student)

    check(run("interpret"), run(None), 1e-6, 1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "alpha_divergence"])
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_both_kernels_equal_the_definition(platform, kind):
    rng = np.random.default_rng(1)
    x, y = (3 * rng.normal(size=(2, 70, 1500))).astype(np.float32)
    bias, teacher_bias = rng.normal(size=(2, 1500)).astype(np.float32)
    bias[[3, 5]], teacher_bias[[3, 7]] = -np.inf, -np.inf
    generator = divergence.resolve("", kind, **PARAMETERS.get(kind, {})).generator
    options = {"bias": bias, "teacher_bias": teacher_bias, "temperature": 2.0, **CAPS}

    def capped(x, bias, cap):
        x = x + jnp.where(jnp.isneginf(bias), 0, bias)[None]
        return jnp.where(jnp.isneginf(bias)[None], -jnp.inf, cap * jnp.tanh(x / cap) / 2)

    def expected(x, y):
        z_p, z_q = capped(x, bias, 5.0), capped(y, teacher_bias, 4.0)
        values, pull = jax.vjp(lambda z: divergence.exact(generator, z, z_q), z_p)
        return values, *pull(jnp.ones_like(values)), jax.nn.logsumexp(z_p, -1)

    @jax.jit
    def run(x, y):
        out, z_p = kernels.block(generator, x, y, platform=platform, interpret=True, **options), capped(x, bias, 5.0)
        slopes = out.slopes - jax.nn.softmax(z_p) * out.kappa[:, None]
        return out.values, jnp.where(jnp.isneginf(z_p), 0, slopes), out.logsumexp

    with jax.enable_x64(True):
        theirs = jax.device_get(jax.jit(expected)(x.astype(np.float64), y.astype(np.float64)))
    for mine, other in zip(run(x, y), theirs):
        np.testing.assert_allclose(mine, other, rtol=5e-6, atol=5e-6 * np.abs(other).max())


def kernel_step(kernel):
    """A value and gradient in bfloat16, whose shapes no tile divides."""
    shapes = {"h": (1000, 256), "w": (256, 5000), "teacher_h": (1000, 128), "teacher_w": (128, 5000)}
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    arrays["bias"] = jax.ShapeDtypeStruct((5000,), jnp.float32)
    f = lambda w, arrays: jnp.sum(fused.divergence("js", w=w, **arrays, temperature=2.0, softcap=30.0, kernel=kernel).values)  # noqa: E731
    w = arrays.pop("w")
    return jax.jit(jax.grad(f)), (w, arrays)


def test_lowers_to_the_kernel():
    step, arguments = kernel_step("tpu")
    assert step.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "kernel", "needs"),
    [("v5e:2x2", "tpu", "libtpu"), ("v6e:2x2", "tpu", "libtpu"), ("h100:1x1", "gpu", "jax_cuda12_plugin")],
)
def test_compiles_ahead_of_time(topology, kernel, needs):
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"needs {needs}")
    step, arguments = kernel_step(kernel)
    placement = jax.sharding.SingleDeviceSharding(np.ravel(aot.topology_devices(topology))[0])
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), arguments)
    compiled = step.lower(*arguments).compile()
    assert ("tpu_custom_call" if kernel == "tpu" else "triton") in compiled.as_text()


# --- meshes

SPECS = {
    "h": jax.P("data"),
    "w": jax.P(None, "model"),
    "bias": jax.P("model"),
    "teacher_h": jax.P("data"),
    "teacher_w": jax.P(None, "model"),
    "teacher_bias": jax.P("model"),
}


@functools.cache
def mesh_problem():
    arrays, labels, weights, label_weights = problem(np.float32, n=64, d=8, e=6, v=4096)
    arrays = arrays | {"w": arrays["w"] / 2, "teacher_w": arrays["teacher_w"] / 2}
    f, student = of_student(lambda arrays: plain("js", arrays, labels, weights, label_weights, temperature=2.0), arrays)
    with jax.enable_x64(True), jax.default_device(jax.devices()[0]):
        expected = jax.device_get(jax.jit(jax.value_and_grad(f))({name: x.astype(np.float64) for name, x in student.items()}))
    return arrays, (labels, weights, label_weights), expected


def collectives(compiled):
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= (\(?[^=]*?) ({names})(?:-start)?\(", compiled.as_text())


def entries(shapes):
    return sum(math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w\d+\[([\d,]*)\]", shapes))


@pytest.mark.parametrize(("call", "shape"), [(weighted, (1, 4)), (weighted, (2, 1)), (weighted, (4, 2)), (per_token, (4, 2))])
def test_sharded_by_tokens_and_vocabulary(call, shape):
    """The same loss and gradients, and what travels inside the loops and out of them is numbers per token."""
    arrays, (labels, weights, label_weights), expected = mesh_problem()
    built = sharding.make_mesh({"data": shape[0], "model": shape[1]}, devices=jax.devices()[: math.prod(shape)])
    options = {"temperature": 2.0, "vocab_chunk": 500, "axis_name": "model"}

    def local(arrays, *rest):
        f, student = of_student(lambda arrays: call("js", arrays, *rest, **options), arrays)
        value, gradients = jax.value_and_grad(f)(student)
        return jax.lax.psum(value, "data"), gradients

    specs = (SPECS, jax.P("data"), jax.P("data"), jax.P("data"))
    outs = (jax.P(), {name: SPECS[name] for name in ("h", "w", "bias")})
    compiled = (
        jax.jit(jax.shard_map(local, mesh=built, in_specs=specs, out_specs=outs)).lower(arrays, labels, weights, label_weights).compile()
    )
    got = compiled(arrays, labels, weights, label_weights)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6 * 5)
    for name, theirs in expected[1].items():
        np.testing.assert_allclose(got[1][name], theirs, atol=1e-6 * 5 * np.abs(theirs).max())
    n, width, part = 64 // shape[0], 8, 4096 // shape[1]
    assert {kind for _, kind in collectives(compiled)} <= {"all-reduce"}
    # The gradients of h (over the vocabulary), of w and of the bias (over the tokens) travel once; the rest is numbers per token.
    assert sum(entries(shapes) for shapes, _ in collectives(compiled)) <= n * width + (width + 1) * part + 64 * n < n * part


def test_sharded_under_jit(mesh):
    arrays, rest, expected = mesh_problem()
    if mesh is not None:
        arrays = {name: jax.device_put(x, jax.NamedSharding(mesh, SPECS[name])) for name, x in arrays.items()}
        rest = tuple(jax.device_put(x, jax.NamedSharding(mesh, jax.P("data"))) for x in rest)

    def run(arrays, *rest):
        f, student = of_student(lambda arrays: weighted("js", arrays, *rest, temperature=2.0, vocab_chunk=512), arrays)
        return jax.value_and_grad(f)(student)

    got = jax.jit(run)(arrays, *rest)
    np.testing.assert_allclose(got[0], expected[0], rtol=5e-6)
    np.testing.assert_allclose(np.asarray(got[1]["w"]), expected[1]["w"], atol=5e-6 * np.abs(expected[1]["w"]).max())


# --- interface


def test_messages():
    arrays, labels, weights, _ = problem(np.float32)
    h, w, teacher_h, teacher_w = (arrays[name] for name in ("h", "w", "teacher_h", "teacher_w"))
    top = TopK(np.zeros((N, 3), np.float32), np.zeros((N, 3), int))
    cases = [
        (lambda: fused.divergence("kl", h, w, teacher_h, teacher_w), "divergence: 'kind' is 'kl', expected"),
        (lambda: fused.divergence("js", h, w), "divergence: expected either 'teacher_h' and 'teacher_w', or 'teacher_top_k'"),
        (lambda: fused.divergence("js", h, w, teacher_h, teacher_w, teacher_top_k=top), "expected either 'teacher_h' and"),
        (lambda: fused.divergence("js", h, w, teacher_h, teacher_w[:, :9]), r"'teacher_w' has shape \(9, 9\), expected .* from 'w'"),
        (lambda: fused.divergence("js", h, w, teacher_h[:4], teacher_w), r"'teacher_h' has shape \(4, 9\)"),
        (lambda: fused.divergence("renyi", h, w, teacher_h, teacher_w), "divergence: 'alpha' is None, expected a number for renyi"),
        (lambda: fused.divergence("renyi", h, w, teacher_top_k=top, alpha=0.5), "expected an f-divergence where the teacher"),
        (lambda: fused.divergence("adaptive_kl", h, w, teacher_h, teacher_w, axis_name="x"), "sorts the vocabulary"),
        (lambda: fused.divergence("renyi", h, w, teacher_h, teacher_w, alpha=0.5, kernel="tpu"), "expected None for this kind"),
        (lambda: fused.divergence("js", h, w, teacher_h, teacher_w, kernel="cpu"), "'kernel' is 'cpu', expected"),
        (lambda: fused.divergence("js", h, w, teacher_h, teacher_w, teacher_softcap=-1.0), "'teacher_softcap' is -1.0"),
        (
            lambda: fused.weighted_divergence("js", h, w, teacher_h, teacher_w, weights, labels=labels),
            "'labels' and 'label_weights' belong together",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
