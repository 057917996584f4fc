"""What the networks share: linear layers, attention, time frequencies, and running a module on a plain parameter tree."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks, dtypes, sharding

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Linear(nnx.Module):
    """x [... *inputs] times kernel [*inputs *outputs] plus bias [*outputs]; zero without a key, Glorot uniform without a scale."""

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], key: jax.Array | None = None, scale: float | None = None):
        shape = inputs + outputs
        if key is None:
            kernel = jnp.zeros(shape, jnp.float32)
        elif scale is None:
            kernel = glorot_uniform(key, shape, math.prod(inputs), math.prod(outputs))
        else:
            kernel = scale * jax.random.normal(key, shape, jnp.float32)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return project(x, self.kernel[...], self.bias[...])


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, with scale and bias, in float32."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = dtypes.at_least_float32(x)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale, bias = (jnp.expand_dims(p[...].astype(wide.dtype), tuple(range(x.ndim - 1))) for p in (self.scale, self.bias))
        return (wide * scale + bias).astype(x.dtype)


def glorot_uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
    """Uniform with variance 2 / (fan_in + fan_out), float32."""
    limit = math.sqrt(6 / (fan_in + fan_out))
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit)


def project(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x [... *inputs] times kernel [*inputs *outputs] plus bias [*outputs], in x's dtype."""
    y = jnp.tensordot(x, kernel.astype(x.dtype), axes=kernel.ndim - bias.ndim)
    return y + jnp.expand_dims(bias.astype(x.dtype), tuple(range(y.ndim - bias.ndim)))


def attention(qkv: jax.Array) -> jax.Array:
    """Softmax attention of qkv [b t 3 heads head_width], no mask, softmax in float32; returns [b t heads head_width]."""
    q, k, v = jnp.transpose(qkv, (2, 0, 3, 1, 4))  # heads before tokens: three times as fast on CPU as letting XLA place the copies
    logits = jnp.einsum("bhqk,bhsk->bhqs", q, k, preferred_element_type=jnp.float32) * (q.shape[-1] ** -0.5)
    return jnp.einsum("bhqs,bhsk->bhqk", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v).transpose(0, 2, 1, 3)


def frequencies(t: jax.Array, size: int, *, shift: int) -> jax.Array:
    """t [b] to [b size]: cosines, then sines, of t at the geometric frequencies 10000^(-i / (size/2 - shift))."""
    half = size // 2
    exponents = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    rates = np.exp(exponents.astype(np.float64)).astype(np.float32)  # float32 exponents, as in the public code: at t = 999 it shows
    angles = t.astype(jnp.float32)[:, None] * jnp.asarray(rates)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotate(x: jax.Array, rope: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + h/2) of x [b t ... h] by the angles whose cosines and sines are rope [2, b or 1, t, h/2], in float32."""
    cos, sin = jnp.expand_dims(rope, tuple(range(3, x.ndim)))
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """[b t] index of every token within its run of equal ids."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def check_tokens(function: str, tokens: ArrayLike, **others: ArrayLike | None) -> tuple[Any, ...]:
    """As arrays, once they are known to be [b t] integers; None stays None."""
    arrays = {name: None if x is None else jnp.asarray(x) for name, x in {"tokens": tokens, **others}.items()}
    checks.check_shapes(function, **{name: (x, "b t") for name, x in arrays.items()})
    for name, x in arrays.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{function}: {name!r} has dtype {x.dtype}, expected integers")
    return tuple(arrays.values())


def check_params(function: str, state: Any, params: Mapping[str, Any]) -> None:
    """Raises ValueError, naming `function` and the parameter, unless `params` has the structure and shapes of an nnx state or tree."""
    shapes, wanted = (
        {sharding.path_string(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state)
    )
    for path in sorted(wanted.keys() | shapes.keys()):
        if path not in shapes:
            raise ValueError(f"{function}: parameter {path!r} is missing, expected shape {wanted[path]}")
        if path not in wanted:
            raise ValueError(f"{function}: parameter {path!r} does not belong to this config")
        if shapes[path] != wanted[path]:
            raise ValueError(f"{function}: parameter {path!r} has shape {shapes[path]}, expected {wanted[path]}")


def check_labels(function: str, cond: jax.Array) -> None:
    """Raises ValueError unless the labels are integers."""
    if not jnp.issubdtype(cond.dtype, jnp.integer):
        raise ValueError(f"{function}: 'cond' has dtype {cond.dtype}, expected integer labels")


def check_inputs(function: str, spec: str, z: ArrayLike, t: jax.Array, cond: jax.Array) -> None:
    """Raises ValueError unless z is as the spec says and `t` and `cond` are scalars or have its batch length."""
    checks.check_shapes(function, z=(z, spec), t=(t if t.ndim else None, "b"), cond=(cond if cond.ndim else None, "b"))
    check_labels(function, cond)


def run(graph: Any, params: Mapping[str, Any], z: jax.Array, t: jax.Array, cond: jax.Array, **static: Any) -> jax.Array:
    """Calls the module on z and on `t` and `cond` with a batch axis (of length 1 for scalars); the result has z's dtype and placement."""

    def call(params: dict[str, Any], z: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
        return nnx.merge(graph, nnx.State(params))(z, t, cond, **static).astype(z.dtype)

    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:  # inside, the compiler places; the output goes where z is
        placed: Any = jax.sharding.auto_axes(call, out_sharding=jax.typeof(z).sharding.spec)
        return placed(dict(params), z, jnp.atleast_1d(t), jnp.atleast_1d(cond))
    return call(dict(params), z, jnp.atleast_1d(t), jnp.atleast_1d(cond))
