"""A residual MLP denoiser for small images: the network of the laptop-scale diffusion studies.

    config = mlp.MlpConfig(shape=(8, 8, 1), num_classes=10)
    params = mlp.init(config, jax.random.key(0))
    eps = mlp.apply(config, params, z, t, labels)       # z [b h w c], t in steps, labels [b] or None for the null class

Tokens and attention buy nothing on 64 pixels; this trains in seconds where a small transformer takes minutes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks

__all__ = ["MlpConfig", "apply", "init", "noise_fn"]

_FREQUENCIES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Sizes of the denoiser. Hashable.

    Attributes:
      shape: Shape of one example, flattened inside.
      num_classes: Number of labels; the label `num_classes` is the null class.
      width: Hidden width.
      depth: Residual blocks.
    """

    shape: tuple[int, ...]
    num_classes: int
    width: int = 192
    depth: int = 2

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"MlpConfig: 'shape' is {self.shape}, expected positive lengths")
        for name in ("num_classes", "width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"MlpConfig: {name!r} must be at least 1, got {getattr(self, name)}")

    @property
    def null_class(self) -> int:
        """The label that stands for no label."""
        return self.num_classes


class _Block(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, width, rngs=rngs)
        self.condition = nnx.Linear(width, width, rngs=rngs)
        self.contract = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, h: jax.Array, condition: jax.Array) -> jax.Array:
        return h + self.contract(jax.nn.silu(self.expand(jax.nn.silu(self.norm(h))) + self.condition(condition)))


class _Mlp(nnx.Module):
    def __init__(self, config: MlpConfig, *, rngs: nnx.Rngs):
        size = math.prod(config.shape)
        self.enter = nnx.Linear(size, config.width, rngs=rngs)
        self.time = nnx.Linear(2 * _FREQUENCIES, config.width, rngs=rngs)
        self.label = nnx.Embed(config.num_classes + 1, config.width, rngs=rngs)
        self.blocks = nnx.List([_Block(config.width, rngs=rngs) for _ in range(config.depth)])
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.leave = nnx.Linear(config.width, size, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, z: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        frequency = jnp.exp(-math.log(10000.0) * jnp.arange(_FREQUENCIES, dtype=z.dtype) / _FREQUENCIES)
        angle = t.astype(z.dtype)[:, None] * frequency[None]
        time = self.time(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1))
        table = self.label.embedding[...].astype(z.dtype)
        one_hot = (labels[:, None] == jnp.arange(table.shape[0])[None]).astype(z.dtype)  # a product, not a lookup: placeable on any mesh
        condition = jax.nn.silu(time + one_hot @ table)
        h = self.enter(z.reshape(z.shape[0], -1))
        for block in self.blocks:
            h = block(h, condition)
        return self.leave(jax.nn.silu(self.norm(h))).reshape(z.shape)


def _graph(config: MlpConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: _Mlp(config, rngs=nnx.Rngs(0))))[0]


@functools.lru_cache
def _cached_graph(config: MlpConfig) -> Any:
    return _graph(config)


def init(config: MlpConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 parameters, a nested dictionary; the last layer is zero, so the first prediction is zero."""
    return nnx.to_pure_dict(nnx.split(_Mlp(config, rngs=nnx.Rngs(key)))[1])


def apply(config: MlpConfig, params: Mapping[str, Any], z: jax.Array, t: ArrayLike, cond: ArrayLike | None = None) -> jax.Array:
    """Predicted noise.

    Args:
      config: Static.
      params: Of `init`; computed in the wider of their dtype and z's.
      z: [b *shape] noisy images.
      t: [] or [b] training step, fractions allowed.
      cond: [] or [b] labels; None is the null class.

    Returns:
      [b *shape] eps in the dtype of z.

    Raises:
      ValueError: if z does not have the config's shape, or t or cond another batch size.
    """
    lengths = checks.check_shapes("mlp.apply", z=(z, " ".join(("b", *map(str, config.shape)))))
    batch = lengths["b"]
    labels = jnp.broadcast_to(jnp.asarray(config.null_class if cond is None else cond, jnp.int32), (batch,))
    dtype = jnp.promote_types(z.dtype, jax.tree.leaves(params)[0].dtype)
    cast = jax.tree.map(lambda x: x.astype(dtype), dict(params))
    graph = _cached_graph(config)
    state = nnx.State(cast)
    model = nnx.merge(graph, state)
    out = model(z.astype(dtype), jnp.broadcast_to(jnp.asarray(t, dtype), (batch,)), labels)
    return out.astype(z.dtype)


def noise_fn(config: MlpConfig) -> Callable[..., jax.Array]:
    """The network as `noise_fn(params, z, t, cond=None) -> eps`; takes a batch, or one example for `jax.vmap` at the edge."""

    def fn(params: Mapping[str, Any], z: jax.Array, t: ArrayLike, cond: ArrayLike | None = None) -> jax.Array:
        if jnp.ndim(z) == len(config.shape):
            return apply(config, params, z[None], t, cond)[0]
        return apply(config, params, z, t, cond)

    return fn
