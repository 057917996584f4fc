"""DDPM++ U-Net with attention, preconditioned as in EDM, as a Flax module used functionally.

    config = presets.UNET_DIGITS
    params = unet.init(config, jax.random.key(0))
    x0 = unet.denoise(config, params, z, sigma, labels)  # z = x + sigma noise, the variance-exploding scale
    noise_fn = unet.noise_fn(config)                     # noise_fn(params, z, sigma, cond=None) -> (z - denoised) / sigma

Data are assumed to have standard deviation `config.sigma_data`. No dropout.

Reference: the network is DDPM++ of Song et al., arXiv:2011.13456, in the form and with the preconditioning of Karras et al.,
arXiv:2206.00364 (table 1, column "Ours").
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks, dtypes, sharding
from janax.models import _layers
from janax.models._layers import Linear

__all__ = ["SHARDING_RULES", "Preconditioning", "UNet", "UNetConfig", "apply", "denoise", "init", "noise_fn", "preconditioning"]

_NORM_EPS = 1e-6
_SMALL = 1e-5  # the layers that end a residual branch start at almost zero

# Output channels go over `model`, input channels over `data` (fully sharded); an axis that is not divisible stays whole.
SHARDING_RULES: sharding.Rules = (
    (r"(conv_in|conv_out|conv_[01]|skip)/kernel$", jax.P(None, None, "data", "model")),  # [kh kw c_in c_out]
    (r"qkv/kernel$", jax.P("data", None, "model")),  # [c 3 heads head_width]
    (r"projection/kernel$", jax.P("model", None, "data")),  # [heads head_width c]
    (r"kernel$", jax.P("data", "model")),  # embeddings and their projections
    (r"(bias|scale)$", jax.P()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes and numerics of a U-Net. Hashable, so it can be a static argument of `jax.jit`.

    Attributes:
      image_size: Height and width of the input; divisible by 2 as often as there are levels after the first.
      channels: Channels of the input.
      width: Channels at the highest resolution, before its multiplier.
      multipliers: Channels of each level over `width`, highest resolution first.
      blocks: Residual blocks per level going down; one more going up.
      attention_resolutions: Sides of the feature maps that get self-attention; the lowest always does, between down and up.
      num_classes: Number of labels, 0 for none; the label `num_classes` is the null class.
      heads: Attention heads.
      groups: Groups of the group norms; must divide the channels of every level.
      sigma_data: Standard deviation of the data.
      dtype: Compute dtype, "float32" or "bfloat16". Parameters are float32; norms and softmax are computed in float32 always.
      remat: Recompute each residual block in the backward pass instead of storing it.
    """

    image_size: int
    channels: int
    width: int
    multipliers: tuple[int, ...]
    blocks: int
    attention_resolutions: tuple[int, ...] = ()
    num_classes: int = 0
    heads: int = 1
    groups: int = 32
    sigma_data: float = 0.5
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "width", "blocks", "heads", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"UNetConfig: {name!r} must be at least 1, got {getattr(self, name)}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"UNetConfig: 'multipliers' must be one or more positive integers, got {self.multipliers}")
        halvings = len(self.multipliers) - 1
        if self.image_size % 2**halvings:
            raise ValueError(f"UNetConfig: 'image_size' {self.image_size} must be divisible by {2**halvings} for {halvings + 1} levels")
        if self.width % 2:
            raise ValueError(f"UNetConfig: 'width' {self.width} must be even for the time frequencies")
        for channels in (self.width, *(self.width * multiplier for multiplier in self.multipliers)):
            if channels % self.groups:
                raise ValueError(f"UNetConfig: {channels} channels are not divisible by 'groups' {self.groups}")
            if channels % self.heads:
                raise ValueError(f"UNetConfig: {channels} channels are not divisible by 'heads' {self.heads}")
        for side in self.attention_resolutions:
            if side not in self.sides:
                raise ValueError(f"UNetConfig: 'attention_resolutions' has {side}, but the levels have sides {self.sides}")
        if self.num_classes < 0:
            raise ValueError(f"UNetConfig: 'num_classes' must be at least 0, got {self.num_classes}")
        if not self.sigma_data > 0:
            raise ValueError(f"UNetConfig: 'sigma_data' must be positive, got {self.sigma_data}")
        checks.one_of("UNetConfig", "dtype", self.dtype, ("float32", "bfloat16"))

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the feature maps of every level."""
        return tuple(self.image_size // 2**level for level in range(len(self.multipliers)))

    @property
    def null_class(self) -> int:
        """The label that stands for no label."""
        return self.num_classes


class Preconditioning(NamedTuple):
    """Coefficients of D(z; sigma) = skip z + out F(into z; noise), in the shape of sigma, float32 or wider."""

    skip: jax.Array
    out: jax.Array
    into: jax.Array
    noise: jax.Array


def preconditioning(sigma: ArrayLike, sigma_data: float) -> Preconditioning:
    """EDM's coefficients: inputs and targets of F have unit variance at every noise level.

    skip = s_d^2 / (s^2 + s_d^2), out = s s_d / sqrt(s^2 + s_d^2), into = 1 / sqrt(s^2 + s_d^2), noise = log(s) / 4.

    Args:
      sigma: [...] noise levels s > 0.
      sigma_data: Standard deviation s_d of the data.

    Returns:
      The four coefficients, each [...].

    Reference: Karras et al., arXiv:2206.00364, table 1.
    """
    sigma = dtypes.at_least_float32(sigma)
    total = jnp.square(sigma) + sigma_data**2
    return Preconditioning(
        skip=sigma_data**2 / total, out=sigma * sigma_data / jnp.sqrt(total), into=jax.lax.rsqrt(total), noise=jnp.log(sigma) / 4
    )


class _Conv(nnx.Module):
    """Convolution without stride, zero padding to the same size; kernel [side side c_in c_out]."""

    def __init__(self, side: int, inputs: int, outputs: int, key: jax.Array, scale: float = 1.0):
        self.kernel = nnx.Param(scale * _layers.glorot_uniform(key, (side, side, inputs, outputs), side**2 * inputs, side**2 * outputs))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + self.bias[...].astype(x.dtype)[None, None, None]


class _GroupNorm(nnx.Module):
    """Normalisation over pixels and the channels of a group, in float32, then scale and bias per channel."""

    def __init__(self, channels: int, groups: int):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        wide = dtypes.at_least_float32(x).reshape(b, h, w, self.groups, c // self.groups)
        centred = wide - jnp.mean(wide, axis=(1, 2, 4), keepdims=True)
        rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=(1, 2, 4), keepdims=True) + _NORM_EPS)
        normed = (centred * rstd).reshape(x.shape)
        return (normed * self.scale[...][None, None, None] + self.bias[...][None, None, None]).astype(x.dtype)


class _Attention(nnx.Module):
    """Self-attention over the pixels of a feature map, without the residual sum."""

    def __init__(self, channels: int, config: UNetConfig, key: jax.Array):
        key_qkv, key_projection = jax.random.split(key)
        head = (config.heads, channels // config.heads)
        self.norm = _GroupNorm(channels, config.groups)
        self.qkv = Linear((channels,), (3, *head), key_qkv)
        self.qkv.kernel[...] *= math.sqrt(0.2)  # as EDM draws them
        self.projection = Linear(head, (channels,), key_projection, _SMALL)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        return self.projection(_layers.attention(self.qkv(self.norm(x).reshape(b, h * w, c)))).reshape(x.shape)


class _Block(nnx.Module):
    """Residual block: norm, SiLU, convolution, twice, with the embedding added in between; every sum is divided by sqrt(2)."""

    def __init__(self, inputs: int, outputs: int, config: UNetConfig, key: jax.Array, *, resample: str = "none", attention: bool = False):
        key_0, key_1, key_embedding, key_skip, key_attention = jax.random.split(key, 5)
        self.resample = resample
        self.norm_0 = _GroupNorm(inputs, config.groups)
        self.conv_0 = _Conv(3, inputs, outputs, key_0)
        self.embedding = Linear((4 * config.width,), (outputs,), key_embedding)
        self.norm_1 = _GroupNorm(outputs, config.groups)
        self.conv_1 = _Conv(3, outputs, outputs, key_1, _SMALL)
        self.skip = _Conv(1, inputs, outputs, key_skip) if inputs != outputs or resample != "none" else None
        self.attention = _Attention(outputs, config, key_attention) if attention else None

    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """x [b h w c], embedding [b or 1, e] to [b h' w' c']."""
        h = self.conv_0(_resample(jax.nn.silu(self.norm_0(x)), self.resample))
        h = self.conv_1(jax.nn.silu(self.norm_1(h + self.embedding(embedding)[:, None, None])))
        x = _resample(x, self.resample)
        x = ((x if self.skip is None else self.skip(x)) + h) * math.sqrt(0.5)
        return x if self.attention is None else (x + self.attention(x)) * math.sqrt(0.5)


def _resample(x: jax.Array, kind: str) -> jax.Array:
    """Mean over 2 x 2 pixels ("down"), or each pixel four times ("up")."""
    b, h, w, c = x.shape
    if kind == "down":
        return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
    if kind == "up":
        return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return x


class UNet(nnx.Module):
    """The raw network F as a Flax module; `init`, `apply` and `denoise` are the functional face."""

    def __init__(self, config: UNetConfig, key: jax.Array):
        key_in, key_out, key_time, key_time_1, key_label, key_down, key_up = jax.random.split(key, 7)
        widths = [config.width * multiplier for multiplier in config.multipliers]
        self.config = config
        self.time_0 = Linear((config.width,), (4 * config.width,), key_time)
        self.time_1 = Linear((4 * config.width,), (4 * config.width,), key_time_1)
        self.label = Linear((config.num_classes,), (config.width,), key_label) if config.num_classes else None

        self.conv_in = _Conv(3, config.channels, config.width, key_in)
        keys_down = iter(jax.random.split(key_down, len(widths) * (config.blocks + 1)))
        down: dict[str, _Block] = {}
        current, skips = config.width, [config.width]
        for level, (width, side) in enumerate(zip(widths, config.sides)):
            if level:
                down[f"level_{level}_down"] = _Block(current, current, config, next(keys_down), resample="down")
                skips.append(current)
            for block in range(config.blocks):
                attention = side in config.attention_resolutions
                down[f"level_{level}_block_{block}"] = _Block(current, width, config, next(keys_down), attention=attention)
                current = width
                skips.append(current)
        self.down = nnx.Dict(down)

        keys_up = iter(jax.random.split(key_up, len(widths) * (config.blocks + 2) + 1))
        self.middle_0 = _Block(current, current, config, next(keys_up), attention=True)
        self.middle_1 = _Block(current, current, config, next(keys_up))
        up: dict[str, _Block] = {}
        for level, (width, side) in reversed(list(enumerate(zip(widths, config.sides)))):
            if level < len(widths) - 1:
                up[f"level_{level}_up"] = _Block(current, current, config, next(keys_up), resample="up")
            for block in range(config.blocks + 1):
                attention = block == config.blocks and side in config.attention_resolutions
                up[f"level_{level}_block_{block}"] = _Block(current + skips.pop(), width, config, next(keys_up), attention=attention)
                current = width
        self.up = nnx.Dict(up)
        self.norm_out = _GroupNorm(current, config.groups)
        self.conv_out = _Conv(3, current, config.channels, key_out, _SMALL)

    def __call__(self, z: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
        """z [b h w c], t [b or 1], cond [b or 1] to [b h w c]."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        embedding = _layers.frequencies(t, config.width, shift=1)
        if self.label is not None:  # one-hot times sqrt(classes), all zero for the null class
            one_hot = jax.nn.one_hot(cond, config.num_classes, dtype=jnp.float32) * math.sqrt(config.num_classes)
            embedding = embedding + self.label(one_hot)
        embedding = jax.nn.silu(self.time_1(jax.nn.silu(self.time_0(embedding.astype(dtype)))))

        def run(block: _Block, x: jax.Array) -> jax.Array:
            if not config.remat:
                return block(x, embedding)
            graph, params = nnx.split(block)
            return jax.checkpoint(lambda params, x, embedding: nnx.merge(graph, params)(x, embedding))(params, x, embedding)

        x = self.conv_in(z.astype(dtype))
        skips = [x]
        for level in range(len(config.multipliers)):
            names = [f"level_{level}_down"] * (level > 0) + [f"level_{level}_block_{block}" for block in range(config.blocks)]
            for name in names:
                x = run(self.down[name], x)
                skips.append(x)
        x = run(self.middle_1, run(self.middle_0, x))
        for level in reversed(range(len(config.multipliers))):
            if level < len(config.multipliers) - 1:
                x = run(self.up[f"level_{level}_up"], x)
            for block in range(config.blocks + 1):
                x = run(self.up[f"level_{level}_block_{block}"], jnp.concatenate([x, skips.pop()], axis=-1))
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


@functools.lru_cache(maxsize=32)
def _template(config: UNetConfig) -> tuple[Any, Any]:
    """Structure of the module and of its state, without arrays."""
    return nnx.split(nnx.eval_shape(lambda: UNet(config, jax.random.key(0))))


def init(config: UNetConfig, key: jax.Array) -> dict[str, Any]:
    """Initial parameters; pure, so it can be jitted with `out_shardings` or evaluated for shapes only.

    Glorot uniform; what ends a residual branch, and the output, is almost zero, so that D(z; sigma) starts as skip(sigma) z.

    Args:
      config: Sizes. Static.
      key: PRNG key.

    Returns:
      A nested dict of float32 arrays.
    """
    return nnx.to_pure_dict(nnx.state(UNet(config, key), nnx.Param))


def apply(config: UNetConfig, params: Mapping[str, Any], z: jax.Array, t: ArrayLike, cond: ArrayLike | None = None) -> jax.Array:
    """The raw network F, without preconditioning.

    Args:
      config: The network's sizes. Static.
      params: As `init` gives them.
      z: [b h w c] scaled input.
      t: [b] or [] time embedding's argument; log(sigma) / 4 under EDM.
      cond: [b] or [] integer labels; `config.null_class`, or None for all, is no label, and so is any other label out of range.

    Returns:
      [b h w c] in z's dtype.

    Raises:
      ValueError: on wrong shapes, labels for a network without classes, or if `params` does not belong to the config.
    """
    return _run("unet.apply", config, params, z, t, cond)


def denoise(config: UNetConfig, params: Mapping[str, Any], z: jax.Array, sigma: ArrayLike, cond: ArrayLike | None = None) -> jax.Array:
    """The denoised image D(z; sigma) = skip z + out F(into z; noise), see `preconditioning`.

    Args:
      config: The network's sizes. Static.
      params: As `init` gives them.
      z: [b h w c] noisy images x + sigma noise.
      sigma: [b] or [] noise level, positive.
      cond: As in `apply`.

    Returns:
      [b h w c] in z's dtype.

    Raises:
      ValueError: as `apply`.
    """
    return _preconditioned("unet.denoise", config, params, z, sigma, cond, lambda s, d, c: (c.skip, c.out))


def noise_fn(config: UNetConfig) -> Callable[..., jax.Array]:
    """The network as `noise_fn(params, z, sigma, cond=None) -> eps`, the callable that samplers take; the time is sigma.

    eps = (z - D(z; sigma)) / sigma, computed as sigma into^2 z - sigma_data into F, which does not cancel where sigma is small.
    It accepts a batch, z [b h w c], or one example, z [h w c] with scalar `sigma` and `cond`, for `jax.vmap` at the edge.
    """

    def fn(params: Mapping[str, Any], z: jax.Array, sigma: ArrayLike, cond: ArrayLike | None = None) -> jax.Array:
        single = jnp.ndim(z) == 3
        if single:
            checks.check_shapes("unet.noise_fn", sigma=(sigma, ""), cond=(cond, ""))
        eps = _preconditioned(
            "unet.noise_fn",
            config,
            params,
            z[None] if single else z,
            sigma,
            cond,
            lambda s, d, c: (s * jnp.square(c.into), -d * c.into),
        )
        return eps[0] if single else eps

    return fn


def _preconditioned(
    function: str,
    config: UNetConfig,
    params: Mapping[str, Any],
    z: jax.Array,
    sigma: ArrayLike,
    cond: ArrayLike | None,
    weights: Callable[[jax.Array, float, Preconditioning], tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """of_z z + of_network F(into z; noise), in at least float32, where `weights` gives the two coefficients."""
    sigma = dtypes.at_least_float32(sigma)
    coefficients = preconditioning(sigma, config.sigma_data)
    wide = dtypes.at_least_float32(z)
    checks.check_shapes(function, z=(z, "b h w c"), sigma=(sigma if sigma.ndim else None, "b"))

    def like_z(x: jax.Array) -> jax.Array:
        return x.reshape(-1, 1, 1, 1).astype(wide.dtype)

    of_z, of_network = weights(sigma, config.sigma_data, coefficients)
    raw = _run(function, config, params, like_z(coefficients.into) * wide, coefficients.noise, cond)
    return (like_z(of_z) * wide + like_z(of_network) * raw).astype(z.dtype)


def _run(function: str, config: UNetConfig, params: Mapping[str, Any], z: jax.Array, t: ArrayLike, cond: ArrayLike | None) -> jax.Array:
    if cond is not None and not config.num_classes:
        raise ValueError(f"{function}: 'cond' is given, but the network has no classes")
    t, cond = jnp.asarray(t), jnp.asarray(config.null_class if cond is None else cond)
    _layers.check_inputs(function, f"b {config.image_size} {config.image_size} {config.channels}", z, t, cond)
    graph, state = _template(config)
    _layers.check_params(function, state, params)
    return _layers.run(graph, params, z, t, cond)
