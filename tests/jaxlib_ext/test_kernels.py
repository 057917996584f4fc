"""Kernels beside the plain form, interpreted on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janax.jaxlib_ext.kernels import attention

B, T, KV, G, H = 2, 200, 2, 3, 64  # neither length nor width suits the kernels: both are padded


def plain(q, k, v, segment_ids, window, softcap):
    """The definition, all scores at once."""
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    behind = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    seen = (behind >= 0) & (behind < (T if window is None else window))
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    weights = jax.nn.softmax(jnp.where((seen[None] & same)[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v)


@pytest.fixture(scope="module")
def arrays():
    normal = lambda *shape: np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)  # noqa: E731
    (q, weights), (k, v) = normal(2, B, T, KV, G, H), normal(2, B, T, KV, H)
    q, segments = q * np.float32(H**-0.5), np.stack([np.repeat([1, 2, 0], [90, 80, 30]), np.ones(T, int)]).astype(np.int32)
    return q, k, v, segments, weights


KERNELS = [
    ("splash", {"window": None, "softcap": None}),
    ("splash", {"window": 17, "softcap": None}),
    ("splash", {"window": 150, "softcap": 3.0}),
    ("triton", {}),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "options"), KERNELS)
def test_kernels_equal_the_definition(arrays, name, options, packed):
    q, k, v, segments, weights = arrays
    kernel = getattr(attention, name)
    expected = {"window": None, "softcap": None} | options

    def forward_and_backward(attend, segments):
        def run(*qkv):
            out, pull = jax.vjp(lambda *qkv: attend(*qkv, segments), *qkv)
            return out, pull(weights)

        return jax.device_get(jax.jit(run)(q, k, v))

    out, gradients = forward_and_backward(functools.partial(kernel, interpret=True, **options), segments if packed else None)
    wanted, wanted_gradients = forward_and_backward(functools.partial(plain, **expected), segments if packed else jnp.zeros_like(segments))
    assert abs(np.vdot(weights, out.astype(np.float64) - wanted)) <= 1e-4  # a sum of 153 600 products of size one
    for one, other in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_elsewhere_the_plain_form_runs(arrays):
    q, k, v, segments, _ = arrays
    out = jax.jit(lambda *qkv: attention.causal(lambda q, k, v: q + jnp.max(v), *qkv, segments, window=5))(q, k, v)
    np.testing.assert_allclose(out, q + np.max(v), rtol=1e-6)


@pytest.mark.parametrize(
    ("platform", "window", "softcap", "kernel", "count"),
    [
        ("tpu", None, None, "tpu_custom_call", 3),
        ("tpu", 64, 20.0, "tpu_custom_call", 3),
        ("cuda", 64, None, "gpu.triton", 0),
    ],
)
def test_lowers_to_the_kernel(platform, window, softcap, kernel, count):
    """The forward and both backward kernels stand in a program for the platform, split over rows and heads of a mesh.

    (Newer versions of JAX lower Triton kernels only for a named GPU, as `janax compile` does.)
    """
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    q, k = jax.ShapeDtypeStruct((4, 256, 2, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((4, 256, 2, 128), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((4, 256), jnp.int32)

    def loss(q, k, v, segments):
        out = attention.causal(lambda q, k, v: q, q, k, v, segments, window=window, softcap=softcap)
        return jnp.sum(out.astype(jnp.float32))

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, segments).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(kernel) == count
    assert not count or "tensor<1x1x2x256x128" in text or "tensor<1x256x2x128" in text  # rows and heads of one device


def test_one_kernel_per_device_equals_one_device(arrays):
    q, k, v, segments, _ = (np.concatenate([x, x]) for x in arrays)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    alone = jax.jit(lambda *x: attention.triton(*x, interpret=True))(q, k, v, segments)

    def split(*arrays):
        axes = (("batch", None, "heads", None, None), *(("batch", None, "heads", None),) * 2, ("batch", None))
        call = lambda *x: attention.triton(*x, interpret=True)  # noqa: E731
        return attention.sharding.per_device(call, arrays, axes, axes[0])

    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(split)(q, k, v, segments), alone, atol=1e-6)
