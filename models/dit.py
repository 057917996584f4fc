"""Diffusion transformer with adaLN-zero conditioning, as a Flax module used functionally.

    config = presets.DIT_DIGITS
    params = dit.init(config, jax.random.key(0))        # a nested dict of float32 arrays; block parameters carry a leading layer axis
    eps = dit.apply(config, params, z, t, labels)       # z [b h w c], t in steps, labels [b] or None for the null class
    noise_fn = dit.noise_fn(config)                     # noise_fn(params, z, t, cond=None): what the samplers take

Time is counted in training steps, 0 to 1000 in the published checkpoints; fractions are allowed. A scalar `t` (sampling) is embedded once,
and with a shared label the modulation of every layer is computed once, not per example.

Reference: Peebles & Xie, arXiv:2212.09748.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks, dtypes, sharding
from janax.models import _layers
from janax.models._layers import Linear, attention, frequencies, project

__all__ = ["SHARDING_RULES", "DiT", "DiTConfig", "apply", "check_params", "drop_labels", "init", "noise_fn", "output", "position_embedding"]

_FREQUENCIES = 256
_NORM_EPS = 1e-6

# Block kernels start with the layer axis. Heads and hidden units go over `model`, the other large axis over `data` (fully sharded).
SHARDING_RULES: sharding.Rules = (
    (r"blocks/qkv/kernel$", jax.P(None, "data", None, "model", None)),  # [l d 3 heads head_width]
    (r"blocks/qkv/bias$", jax.P(None, None, "model", None)),
    (r"blocks/projection/kernel$", jax.P(None, "model", None, "data")),  # [l heads head_width d]
    (r"blocks/expand/kernel$", jax.P(None, "data", "model")),  # [l d hidden]
    (r"blocks/expand/bias$", jax.P(None, "model")),
    (r"blocks/contract/kernel$", jax.P(None, "model", "data")),  # [l hidden d]
    (r"blocks/modulation/kernel$", jax.P(None, "data", None, "model")),  # [l d 6 d]
    (r"blocks/modulation/bias$", jax.P(None, None, "model")),
    (r"embedders/.*table$", jax.P(None, "data", "model")),  # [l or 1, classes + 1, d]
    (r"embedders/.*kernel$", jax.P(None, "data", "model")),  # [l or 1, d, d]
    (r"final_modulation/kernel$", jax.P("data", None, "model")),  # [d 2 d]
    (r"patch/kernel$", jax.P(None, None, None, "data")),  # [p p c d]
    (r"final/kernel$", jax.P("data")),  # [d p p c]
    (r"bias$", jax.P()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes and numerics of a DiT. Hashable, so it can be a static argument of `jax.jit`.

    Attributes:
      image_size: Height and width of the input, in (latent) pixels.
      channels: Channels of the input.
      patch_size: Side of a square patch; must divide `image_size`.
      width: Width d of a token; a multiple of 4 (position embedding) and of `heads`.
      depth: Number of blocks.
      heads: Attention heads.
      num_classes: Number of labels; the label `num_classes` is the null class.
      mlp_ratio: Hidden width of the MLP over d.
      learn_sigma: The network also predicts `channels` variances; `apply` leaves them out, `output` returns them.
      dtype: Compute dtype, "float32" or "bfloat16". Parameters are float32; norms and softmax are computed in float32 always.
      remat: What the backward pass recomputes per block: "none", "dots" (all but the matrix products) or "full".
      scan_layers: Scan over the blocks: compile time does not grow with depth. False unrolls them. Same parameters, same numbers.
      mlp_norm_eps: Epsilon of the norm before the MLP (1e-6 in the paper's code, 1e-5 in diffusers' default); other norms use 1e-6.
      frequency_shift: Time frequencies are 10000^(-i / (128 - shift)): 0 in the paper's code, 1 in diffusers.
      block_embedders: Each block has its own time and label embedders, as diffusers allows; the paper shares one.
    """

    image_size: int
    channels: int
    patch_size: int
    width: int
    depth: int
    heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    learn_sigma: bool = False
    dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    mlp_norm_eps: float = 1e-6
    frequency_shift: int = 1
    block_embedders: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "patch_size", "width", "depth", "heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"DiTConfig: {name!r} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"DiTConfig: 'image_size' {self.image_size} must be a multiple of 'patch_size' {self.patch_size}")
        if self.width % 4:
            raise ValueError(f"DiTConfig: 'width' {self.width} must be a multiple of 4 for the 2D position embedding")
        if self.width % self.heads:
            raise ValueError(f"DiTConfig: 'width' {self.width} must be a multiple of 'heads' {self.heads}")
        if self.hidden < 1:
            raise ValueError(f"DiTConfig: 'mlp_ratio' {self.mlp_ratio} leaves no hidden units")
        checks.one_of("DiTConfig", "dtype", self.dtype, ("float32", "bfloat16"))
        checks.one_of("DiTConfig", "remat", self.remat, tuple(_layers.REMAT_POLICIES))
        checks.one_of("DiTConfig", "frequency_shift", self.frequency_shift, (0, 1))

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def num_tokens(self) -> int:
        """Number of patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def null_class(self) -> int:
        """The label that stands for no label."""
        return self.num_classes

    @property
    def out_channels(self) -> int:
        """Channels of `output`: twice the input's with a learned sigma."""
        return self.channels * (2 if self.learn_sigma else 1)


class _Embedder(nnx.Module):
    """Time (frequencies through an MLP) plus label."""

    def __init__(self, config: DiTConfig, key: jax.Array):
        key_in, key_out, key_table = jax.random.split(key, 3)
        self.time_in = Linear((_FREQUENCIES,), (config.width,), key_in, 0.02)
        self.time_out = Linear((config.width,), (config.width,), key_out, 0.02)
        self.table = nnx.Param(0.02 * jax.random.normal(key_table, (config.num_classes + 1, config.width), jnp.float32))

    def __call__(self, waves: jax.Array, labels: jax.Array) -> jax.Array:
        """waves [b 256] and labels [b], either of them with b = 1, to SiLU(embedding) [b d]."""
        time = self.time_out(jax.nn.silu(self.time_in(waves)))
        return jax.nn.silu(time + jnp.take(self.table[...], labels, axis=0).astype(time.dtype))


class _Block(nnx.Module):
    """Attention and MLP, each shifted, scaled and gated by the conditioning."""

    def __init__(self, config: DiTConfig, key: jax.Array):
        d, head = config.width, (config.heads, config.width // config.heads)
        key_qkv, key_projection, key_expand, key_contract = jax.random.split(key, 4)
        self.modulation = Linear((d,), (6, d))
        self.qkv = Linear((d,), (3, *head), key_qkv)
        self.projection = Linear(head, (d,), key_projection)
        self.expand = Linear((d,), (config.hidden,), key_expand)
        self.contract = Linear((config.hidden,), (d,), key_contract)
        self.mlp_norm_eps = config.mlp_norm_eps

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """x [b t d] and condition [b or 1, d], after SiLU, to [b t d]."""
        modulation = self.modulation(condition)[:, :, None, :]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (modulation[:, i] for i in range(6))
        x = x + gate_1 * self.projection(attention(self.qkv(_modulated_norm(x, shift_1, scale_1, _NORM_EPS))))
        hidden = self.expand(_modulated_norm(x, shift_2, scale_2, self.mlp_norm_eps))
        return x + gate_2 * self.contract(jax.nn.gelu(hidden, approximate=True))


class DiT(nnx.Module):
    """The network as a Flax module; `init` and `apply` are the functional face."""

    def __init__(self, config: DiTConfig, key: jax.Array):
        d, p = config.width, config.patch_size
        key_patch, key_embedders, key_blocks = jax.random.split(key, 3)
        stack = nnx.vmap(lambda kind, key: kind(config, key), in_axes=(None, 0))
        self.config = config
        self.patch = Linear((p, p, config.channels), (d,), key_patch)
        self.embedders = stack(_Embedder, jax.random.split(key_embedders, config.depth if config.block_embedders else 1))
        self.blocks = stack(_Block, jax.random.split(key_blocks, config.depth))
        self.final_modulation = Linear((d,), (2, d))
        self.final = Linear((d,), (p, p, config.out_channels))

    def __call__(self, z: jax.Array, t: jax.Array, cond: jax.Array, *, channels: int) -> jax.Array:
        """z [b h w c], t [b or 1], cond [b or 1] to the first `channels` of [b h w out_channels]."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        b, p, side = z.shape[0], config.patch_size, config.image_size // config.patch_size

        patches = z.astype(dtype).reshape(b, side, p, side, p, config.channels).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch(patches.reshape(b, side * side, p, p, config.channels))
        x = x + jnp.asarray(position_embedding(side, config.width), dtype)[None]

        waves = frequencies(t, _FREQUENCIES, shift=config.frequency_shift).astype(dtype)
        embedder, embedder_params = nnx.split(self.embedders)
        block, block_params = nnx.split(self.blocks)
        conditions = jax.vmap(lambda params: nnx.merge(embedder, params)(waves, cond))(embedder_params)  # [depth or 1, b or 1, d]

        def layer(x: jax.Array, xs: tuple[Any, jax.Array | None]) -> tuple[jax.Array, None]:
            params, condition = xs
            x = sharding.constrain_batch(x)  # keep the batch in place, so that fully sharded weights are gathered and not the activations
            return nnx.merge(block, params)(x, conditions[0] if condition is None else condition), None

        if config.remat != "none":
            layer = jax.checkpoint(layer, policy=_layers.REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers)
        xs = (block_params, conditions if config.block_embedders else None)
        if config.scan_layers:
            x, _ = jax.lax.scan(layer, x, xs)
        else:
            for i in range(config.depth):
                x, _ = layer(x, jax.tree.map(lambda leaf: leaf[i], xs))  # noqa: B023

        shift, scale = jnp.moveaxis(self.final_modulation(conditions[0])[:, :, None, :], 1, 0)
        x = _modulated_norm(x, shift, scale, _NORM_EPS)
        y = project(x, self.final.kernel[..., :channels], self.final.bias[..., :channels])
        y = y.reshape(b, side, side, p, p, channels).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(b, config.image_size, config.image_size, channels)


def _modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """norm(x) (1 + scale) + shift over the last axis of x [b t d], in float32; shift and scale [b or 1, 1, d]."""
    wide, shift, scale = (dtypes.at_least_float32(v) for v in (x, shift, scale))
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (centred * rstd * (1 + scale) + shift).astype(x.dtype)


@functools.lru_cache(maxsize=8)
def position_embedding(side: int, width: int) -> np.ndarray:
    """[side^2 width] fixed embedding of the patch grid, rows first: sines and cosines of the column, then of the row."""
    rates = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, column = (axis.reshape(-1, 1) * rates for axis in np.meshgrid(np.arange(side), np.arange(side), indexing="ij"))
    table = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1).astype(np.float32)
    table.flags.writeable = False  # cached
    return table


@functools.lru_cache(maxsize=32)
def _template(config: DiTConfig) -> tuple[Any, Any]:
    """Structure of the module and of its state, without arrays."""
    return nnx.split(nnx.eval_shape(lambda: DiT(config, jax.random.key(0))))


def init(config: DiTConfig, key: jax.Array) -> dict[str, Any]:
    """Initial parameters; pure, so it can be jitted with `out_shardings` or evaluated for shapes only.

    Glorot uniform matrices, normal(0.02) embeddings, zero modulations and zero output layer: the network starts as the constant 0.

    Args:
      config: Sizes. Static.
      key: PRNG key.

    Returns:
      A nested dict of float32 arrays; the arrays under "blocks" have a leading axis of length `config.depth`.
    """
    return nnx.to_pure_dict(nnx.state(DiT(config, key), nnx.Param))


def output(config: DiTConfig, params: Mapping[str, Any], z: jax.Array, t: ArrayLike, cond: ArrayLike | None = None) -> jax.Array:
    """All output channels: the noise and, with `config.learn_sigma`, the raw variance parameters after it.

    Args:
      config: The network's sizes. Static.
      params: As `init` gives them.
      z: [b h w c] noisy images.
      t: [b] or [] time in steps.
      cond: [b] or [] integer labels; `config.null_class`, or None for all, is no label. A label beyond that gives nan.

    Returns:
      [b h w out_channels] in z's dtype.

    Raises:
      ValueError: on wrong shapes, or if `params` does not belong to the config.
    """
    return _run("dit.output", config, params, z, t, cond, config.out_channels)


def apply(config: DiTConfig, params: Mapping[str, Any], z: jax.Array, t: ArrayLike, cond: ArrayLike | None = None) -> jax.Array:
    """Predicted noise, [b h w c] in z's dtype; arguments as in `output`, whose variance channels are not computed here."""
    return _run("dit.apply", config, params, z, t, cond, config.channels)


def noise_fn(config: DiTConfig) -> Callable[..., jax.Array]:
    """The network as `noise_fn(params, z, t, cond=None) -> eps`, the callable that samplers take.

    It accepts a batch, z [b h w c], or one example, z [h w c] with scalar `t` and `cond`, for `jax.vmap` at the edge.
    """

    def fn(params: Mapping[str, Any], z: jax.Array, t: ArrayLike, cond: ArrayLike | None = None) -> jax.Array:
        if jnp.ndim(z) != 3:
            return apply(config, params, z, t, cond)
        checks.check_shapes("dit.noise_fn", t=(t, ""), cond=(cond, ""))
        return apply(config, params, z[None], t, cond)[0]

    return fn


def drop_labels(key: jax.Array, cond: jax.Array, *, rate: ArrayLike, null_class: int) -> jax.Array:
    """Labels of which each is replaced by the null class with probability `rate`: training for classifier-free guidance.

    Args:
      key: PRNG key.
      cond: [...] integer labels.
      rate: Probability, 0.1 in the paper. Traced.
      null_class: `config.null_class`.

    Returns:
      [...] labels.
    """
    return jnp.where(jax.random.bernoulli(key, rate, cond.shape), jnp.asarray(null_class, cond.dtype), cond)


def check_params(function: str, config: DiTConfig, params: Mapping[str, Any]) -> None:
    """Raises ValueError, naming `function` and the parameter, unless `params` has the structure and shapes of the config."""
    _layers.check_params(function, _template(config)[1], params)


def _run(
    function: str, config: DiTConfig, params: Mapping[str, Any], z: jax.Array, t: ArrayLike, cond: ArrayLike | None, channels: int
) -> jax.Array:
    t, cond = jnp.asarray(t), jnp.asarray(config.null_class if cond is None else cond)
    _layers.check_inputs(function, f"b {config.image_size} {config.image_size} {config.channels}", z, t, cond)
    check_params(function, config, params)
    return _layers.run(_template(config)[0], params, z, t, cond, channels=channels)
