"""What the networks share: linear layers, attention, time frequencies, and running a module on a plain parameter tree."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks, sharding


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


def check_params(function: str, state: Any, params: Mapping[str, Any]) -> None:
    """Raises ValueError, naming `function` and the parameter, unless `params` has the structure and shapes of an nnx state."""
    shapes, wanted = (
        {sharding.path_string(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, nnx.to_pure_dict(state))
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
