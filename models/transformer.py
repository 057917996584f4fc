"""Decoder language models, one network configured as Llama, SmolLM2, Mistral, Qwen, Gemma, GPT-2 or GPT-Neo; a module used functionally.

    config = presets.SMOLLM2_135M
    params = transformer.init(config, jax.random.key(0))             # or config, params = loading.load_transformer(directory)
    h = transformer.hidden(config, params, tokens, segment_ids)      # [b t d]; logits are h @ transformer.unembed(config, params)
    cache = transformer.init_cache(config, batch=4, length=256)
    logits, cache = transformer.decode(config, params, cache, prompts, num_tokens)           # prefill, [b v] after each prompt's last token
    logits, cache = transformer.decode(config, params, cache, tokens)                        # and on, one token or several at a time

Layers differ by data only (attention window, rotary frequencies), so that one program, scanned over the parameters' leading axis, serves all.
A scan copies every layer's weights on CPU; where that counts (decoding), give `unstack_layers(params)`, and the loop is unrolled.

Kernels are stored [*outputs *inputs], as PyTorch does: with few tokens, CPUs multiply fastest from that side (benchmarks/smollm2.py).
Queries, keys and values are one kernel, grouped by key-value head, [kv, queries per kv head + 2, head width, d], and so a split over heads
never cuts a group.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from janax.jaxlib_ext import checks, dtypes, sharding
from janax.jaxlib_ext.sampling import Cache
from janax.models import _attention, _layers

__all__ = [
    "CACHE_RULES",
    "SHARDING_RULES",
    "RopeScaling",
    "Transformer",
    "TransformerConfig",
    "check_params",
    "decode",
    "decode_fn",
    "extend",
    "hidden",
    "hidden_fn",
    "init",
    "init_cache",
    "logits",
    "logits_fn",
    "output_embedding",
    "stack_layers",
    "unembed",
    "unstack_layers",
]

_FEW_TOKENS = 32  # up to so many, kernels go left in a product

# Block parameters start with the layer axis if they are stacked, and have the layer's number in their path if they are not.
SHARDING_RULES: sharding.Rules = (
    (r"embed/table$", jax.P("model", "data")),  # [v d]
    (r"embed/positions$", jax.P(None, "data")),
    (r"unembed/kernel$", jax.P("model", "data")),  # [v d]
    (r"blocks/\d+/qkv/kernel$", jax.P("model", None, None, "data")),  # [kv, queries + 2, head_width, d]
    (r"blocks/\d+/out/kernel$", jax.P("data", "model")),  # [d, kv, queries, head_width]
    (r"blocks/\d+/(gate|up)/kernel$", jax.P("model", "data")),  # [hidden d]
    (r"blocks/\d+/down/kernel$", jax.P("data", "model")),  # [d hidden]
    (r"blocks/\d+/qkv/bias$", jax.P("model")),
    (r"blocks/\d+/(gate|up)/bias$", jax.P("model")),
    (r"blocks/\d+/", jax.P()),
    (r"blocks/qkv/kernel$", jax.P(None, "model", None, None, "data")),
    (r"blocks/out/kernel$", jax.P(None, "data", "model")),
    (r"blocks/(gate|up)/kernel$", jax.P(None, "model", "data")),
    (r"blocks/down/kernel$", jax.P(None, "data", "model")),
    (r"blocks/qkv/bias$", jax.P(None, "model")),
    (r"blocks/(gate|up)/bias$", jax.P(None, "model")),
    (r"(scale|bias)$", jax.P()),
)

CACHE_RULES: sharding.Rules = (
    (r"length$", jax.P("data")),
    (r"[kv]$", jax.P(None, "data", None, "model")),  # [l b s kv h]
)

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are lowered for texts longer than those of the first training.

    Attributes:
      kind: "linear" divides all frequencies by `factor`; "llama3" only the low ones, with a smooth passage.
      factor: The divisor.
      low_frequency: "llama3": waves that fit the original length fewer times than this are divided in full.
      high_frequency: "llama3": waves that fit more often than this are left alone.
      original_length: "llama3": context length of the first training, in tokens.
    """

    kind: str
    factor: float
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        checks.one_of("RopeScaling", "kind", self.kind, ("linear", "llama3"))
        if self.factor < 1:
            raise ValueError(f"RopeScaling: 'factor' must be at least 1, got {self.factor}")
        if self.kind == "llama3" and not (0 < self.low_frequency < self.high_frequency and self.original_length > 0):
            raise ValueError(
                "RopeScaling: expected 0 < 'low_frequency' < 'high_frequency' and a positive 'original_length', "
                f"got {self.low_frequency}, {self.high_frequency} and {self.original_length}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes, variant and numerics of a decoder. Hashable, so it can be a static argument of `jax.jit`. The defaults are Llama's.

    Attributes:
      vocab_size: Number of tokens v.
      max_length: Longest text it is made for; with learned positions a hard limit, beyond which the embedding is nan.
      width: Width d of the residual stream.
      depth: Number of blocks l.
      heads: Query heads; a multiple of `kv_heads`.
      kv_heads: Key-value heads; each serves heads / kv_heads query heads.
      head_width: Width of a head; even with rotary positions.
      hidden: Hidden width of the MLP.
      norm: "rms" or "layer" (with mean and bias).
      norm_eps: Its epsilon.
      norm_offset: Added to the norms' scales: 1 for Gemma, which stores them around zero.
      post_norms: Norms also after attention and MLP, before they join the residual stream (Gemma).
      query_key_norm: Norms on every head's queries and keys, before rotary positions (Qwen3, Gemma 3).
      activation: "silu", "gelu" or "gelu_tanh".
      gated: The MLP multiplies the activation by a second projection.
      qkv_bias: Biases on queries, keys and values.
      out_bias: Bias on the attention's output.
      mlp_bias: Biases in the MLP.
      tied: The embedding is the unembedding too.
      embedding_scale: Factor on embeddings: sqrt(d) for Gemma.
      query_scale: Factor on attention logits; None is head_width^-0.5.
      attention_softcap: Attention logits become c tanh(logits / c) (Gemma 2).
      final_softcap: The same for the final logits.
      positions: "rope" or "learned".
      rope_theta: Longest rotary wavelength over 2 pi.
      rope_scaling: Lower frequencies for long texts, or None.
      rope_local_theta: Sliding layers have this theta, and no scaling (Gemma 3); None if all are alike.
      window: Sliding layers see so many last tokens, the current one included; None if no layer slides.
      sliding: One flag per layer, whether it slides; () means that all do if there is a window.
      dtype: Compute dtype, "float32" or "bfloat16"; norms, softmax and rotations are computed in float32 always.
      remat: What the backward pass recomputes per block: "none", "dots" (all but the matrix products) or "full".
      scan_layers: Scan over stacked blocks: compile time does not grow with depth. False unrolls them. Same parameters, same numbers.
      attention: "xla" takes all queries at once, "flash" 256 at a time: slower for short texts, and memory does not grow with t s.
        "flash" is a kernel (jaxlib_ext/kernels/attention.py) on TPUs and CUDA GPUs, for texts that do not continue a cache.
    """

    vocab_size: int
    max_length: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    post_norms: bool = False
    query_key_norm: bool = False
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    positions: str = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    window: int | None = None
    sliding: tuple[bool, ...] = ()
    dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    attention: str = "xla"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_length", "width", "depth", "heads", "kv_heads", "head_width", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"TransformerConfig: {name!r} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"TransformerConfig: 'heads' {self.heads} must be a multiple of 'kv_heads' {self.kv_heads}")
        for name, options in _OPTIONS.items():
            checks.one_of("TransformerConfig", name, getattr(self, name), options)
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"TransformerConfig: 'head_width' {self.head_width} must be even for rotary positions")
        for name in ("norm_eps", "rope_theta", "rope_local_theta", "attention_softcap", "final_softcap", "window"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"TransformerConfig: {name!r} must be positive, got {value}")
        if self.sliding and len(self.sliding) != self.depth:
            raise ValueError(
                f"TransformerConfig: 'sliding' has {len(self.sliding)} flags, expected one for each of the {self.depth} layers"
            )
        if self.window is None and any(self.sliding):
            raise ValueError("TransformerConfig: 'sliding' layers need a 'window'")

    @property
    def queries(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    def slides(self, layer: int) -> bool:
        """Whether the layer sees a window only."""
        return self.window is not None and (not self.sliding or self.sliding[layer])


_OPTIONS = {
    "norm": ("rms", "layer"),
    "activation": tuple(_ACTIVATIONS),
    "positions": ("rope", "learned"),
    "dtype": ("float32", "bfloat16"),
    "remat": tuple(_layers.REMAT_POLICIES),
    "attention": ("xla", "flash"),
}


class _Kind(NamedTuple):
    """What makes a layer differ from others."""

    window: int
    theta: float
    scaling: RopeScaling | None


def _kinds(config: TransformerConfig) -> tuple[list[_Kind], list[int]]:
    """The kinds of layers, one or two, and every layer's number among them."""
    local = config.rope_local_theta is not None
    kinds = {
        slides: _Kind(
            config.window if slides and config.window is not None else _attention.FAR,
            config.rope_local_theta if slides and config.rope_local_theta is not None else config.rope_theta,
            None if slides and local else config.rope_scaling,
        )
        for slides in dict.fromkeys(config.slides(layer) for layer in range(config.depth))
    }
    order = list(kinds)
    return list(kinds.values()), [order.index(config.slides(layer)) for layer in range(config.depth)]


class _Norm(nnx.Module):
    """Root-mean-square or layer norm over the last axis, in float32."""

    def __init__(self, config: TransformerConfig, width: int):
        self.scale = nnx.Param(jnp.full(width, 1.0 - config.norm_offset, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32)) if config.norm == "layer" else None
        self.offset, self.eps = config.norm_offset, config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = dtypes.at_least_float32(x)
        if self.bias is not None:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        wide = wide * _like(self.offset + self.scale[...].astype(wide.dtype), wide)
        return (wide if self.bias is None else wide + _like(self.bias[...].astype(wide.dtype), wide)).astype(x.dtype)


class _Dense(nnx.Module):
    """x [b t *inputs] to [b t *outputs] by kernel [*outputs *inputs] and perhaps a bias [*outputs]."""

    def __init__(self, outputs: tuple[int, ...], inputs: tuple[int, ...], key: jax.Array, *, bias: bool, gain: float = 1.0):
        scale = gain / math.sqrt(math.prod(inputs))
        self.kernel = nnx.Param(scale * jax.random.normal(key, outputs + inputs, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = _product(x, self.kernel[...])
        return y if self.bias is None else y + _like(self.bias[...].astype(y.dtype), y)


class _Block(nnx.Module):
    """Attention and MLP."""

    def __init__(self, config: TransformerConfig, key: jax.Array):
        d, kv, head = config.width, config.kv_heads, config.head_width
        key_qkv, key_out, key_gate, key_up, key_down = jax.random.split(key, 5)
        gain = (2 * config.depth) ** -0.5  # 2 l branches join the residual stream
        self.config = config
        self.attention_norm = _Norm(config, d)
        self.qkv = _Dense((kv, config.queries + 2, head), (d,), key_qkv, bias=config.qkv_bias)
        self.query_norm, self.key_norm = (_Norm(config, head) if config.query_key_norm else None for _ in range(2))
        self.out = _Dense((d,), (kv, config.queries, head), key_out, bias=config.out_bias, gain=gain)
        self.mlp_norm = _Norm(config, d)
        self.gate = _Dense((config.hidden,), (d,), key_gate, bias=config.mlp_bias) if config.gated else None
        self.up = _Dense((config.hidden,), (d,), key_up, bias=config.mlp_bias)
        self.down = _Dense((d,), (config.hidden,), key_down, bias=config.mlp_bias, gain=gain)
        self.attention_post_norm, self.mlp_post_norm = (_Norm(config, d) if config.post_norms else None for _ in range(2))

    def __call__(self, x: jax.Array, rope: jax.Array | None, attend: Callable[..., tuple[jax.Array, Any]]) -> tuple[jax.Array, Any]:
        """x [b t d]; `attend` takes queries [b t kv g h], keys and values [b t kv h] and returns [b t kv g h] and something to hand on."""
        config = self.config
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = qkv[..., : config.queries, :], qkv[..., -2:-1, :], qkv[..., -1, :]
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rope is not None:
            q, k = _layers.rotate(q, rope), _layers.rotate(k, rope)
        scale = config.head_width**-0.5 if config.query_scale is None else config.query_scale
        y, carried = attend(q if scale == 1 else q * jnp.asarray(scale, q.dtype), k[..., 0, :], v)
        y = self.out(y)
        x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))

        y, activation = self.mlp_norm(x), _ACTIVATIONS[config.activation]
        y = self.down(activation(self.up(y)) if self.gate is None else activation(self.gate(y)) * self.up(y))
        return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y)), carried


class _Embedding(nnx.Module):
    """Tokens, and positions if they are learned, to vectors."""

    def __init__(self, config: TransformerConfig, key: jax.Array):
        key_table, key_positions = jax.random.split(key)
        self.table = nnx.Param(0.02 * jax.random.normal(key_table, (config.vocab_size, config.width), jnp.float32))
        learned = config.positions == "learned"
        shape = (config.max_length, config.width)
        self.positions = nnx.Param(0.02 * jax.random.normal(key_positions, shape, jnp.float32)) if learned else None
        self.scale, self.dtype = config.embedding_scale, config.dtype

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """tokens [b t] and positions [b or 1, t] to [b t d]; nan where one is out of range."""
        x = jnp.take(self.table[...], tokens, axis=0, mode="fill").astype(self.dtype)
        x = x if self.scale == 1 else x * jnp.asarray(self.scale, x.dtype)
        if self.positions is None:
            return x
        return x + jnp.broadcast_to(jnp.take(self.positions[...], positions, axis=0, mode="fill").astype(x.dtype), x.shape)


class Transformer(nnx.Module):
    """The parameters as a Flax module; `init`, `hidden` and `extend` are the functional face."""

    def __init__(self, config: TransformerConfig, key: jax.Array):
        key_embed, key_blocks, key_unembed = jax.random.split(key, 3)
        self.embed = _Embedding(config, key_embed)
        self.blocks = nnx.vmap(_Block, in_axes=(None, 0))(config, jax.random.split(key_blocks, config.depth))
        self.norm = _Norm(config, config.width)
        self.unembed = None if config.tied else _Dense((config.vocab_size,), (config.width,), key_unembed, bias=False)


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A view of `vector` with as many axes as x."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - vector.ndim)))


def _product(x: jax.Array, kernel: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """x [b t *inputs] times kernel [*outputs *inputs], multiplied in x's dtype and returned in that or the given one.

    For 2 to 32 tokens the CPU's matrix product is up to twice as fast as `kernel @ x.T`; the barrier keeps the compiler from turning it round.
    """
    outputs = kernel.shape[: kernel.ndim - x.ndim + 2]
    flat = kernel.astype(x.dtype).reshape(
        math.prod(outputs), -1
    )  # two axes: with more, the compiler may transpose the kernel in every call
    rows = x.reshape(x.shape[0] * x.shape[1], -1)
    if 1 < len(rows) <= _FEW_TOKENS:
        y = jax.lax.dot_general(flat, rows, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
        y = jax.lax.optimization_barrier(y).T
    else:
        y = jax.lax.dot_general(rows, flat, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return y.reshape(*x.shape[:2], *outputs)


# Positions.


def _frequencies(config: TransformerConfig, kind: _Kind) -> np.ndarray:
    """[head_width / 2] rotary frequencies in radians per token."""
    exponents = np.arange(0, config.head_width, 2, dtype=np.float32) / np.float32(config.head_width)
    periods = (np.float64(kind.theta) ** exponents.astype(np.float64)).astype(np.float32)  # rounded where the public code rounds
    rates, scaling = 1 / periods, kind.scaling
    if scaling is not None and scaling.kind == "linear":
        rates = rates / np.float32(scaling.factor)
    elif scaling is not None:
        fits = rates * np.float32(scaling.original_length / (2 * math.pi))
        kept = np.clip((fits - np.float32(scaling.low_frequency)) / np.float32(scaling.high_frequency - scaling.low_frequency), 0, 1)
        rates = (1 - kept) * rates / np.float32(scaling.factor) + kept * rates
    return rates


def _rope(config: TransformerConfig, kinds: Sequence[_Kind], positions: jax.Array) -> jax.Array | None:
    """positions [b t] to [kinds 2 b t h/2]: cosines and sines, float32."""
    if config.positions != "rope":
        return None
    rates = np.stack([_frequencies(config, kind) for kind in kinds])
    angles = positions.astype(jnp.float32)[None, :, :, None] * jnp.asarray(rates)[:, None, None, :]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)


# Layers.


def _form(config: TransformerConfig) -> _attention.Form:
    return _attention.Form(softcap=config.attention_softcap, chunked=config.attention == "flash")


@functools.lru_cache(maxsize=32)
def _template(config: TransformerConfig) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Structure of the modules, and the shapes of all parameters and of one block's, without arrays."""

    def module(kind: Any, *args: Any) -> nnx.Module:
        return nnx.eval_shape(lambda: kind(config, *args))

    graphs = {"embed": _Embedding, "block": _Block}
    modules = {name: module(kind, jax.random.key(0)) for name, kind in graphs.items()} | {"norm": module(_Norm, config.width)}
    whole = nnx.state(nnx.eval_shape(lambda: Transformer(config, jax.random.key(0))), nnx.Param)
    block = nnx.to_pure_dict(nnx.state(modules["block"], nnx.Param))
    return {name: nnx.graphdef(module) for name, module in modules.items()}, whole, block


def _merge(config: TransformerConfig, name: str, params: Mapping[str, Any]) -> Any:
    return nnx.merge(_template(config)[0][name], nnx.State(dict(params)))


def _scanned(config: TransformerConfig, blocks: Any) -> bool:
    return config.scan_layers and isinstance(blocks, Mapping)


def _through(config: TransformerConfig, blocks: Any, numbers: Sequence[int], carry: Any, layer: Callable[..., Any]) -> Any:
    """Carries `carry` through layer(carry, block parameters, kind, number of the layer): by scan, or unrolled where the numbers are ints."""
    if _scanned(config, blocks):
        xs = (dict(blocks), jnp.asarray(numbers, jnp.int32), jnp.arange(config.depth, dtype=jnp.int32))
        return jax.lax.scan(lambda carry, xs: (layer(carry, *xs), None), carry, xs)[0]
    for i, kind in enumerate(numbers):
        params = jax.tree.map(lambda leaf: leaf[i], dict(blocks)) if isinstance(blocks, Mapping) else blocks[i]  # noqa: B023
        carry = layer(carry, params, kind, i)
    return carry


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with one tree of blocks whose leaves have a leading layer axis, as `init` gives them."""
    blocks = params["blocks"]
    return dict(params) if isinstance(blocks, Mapping) else {**params, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with a tuple of blocks, one tree per layer, for loops without a copy of the weights; a copy is made here."""
    blocks = params["blocks"]
    if not isinstance(blocks, Mapping):
        return {**params, "blocks": tuple(blocks)}
    depth = len(jax.tree.leaves(blocks)[0])
    return {**params, "blocks": tuple(jax.tree.map(lambda leaf: leaf[i], dict(blocks)) for i in range(depth))}  # noqa: B023


# The public face.


def init(config: TransformerConfig, key: jax.Array) -> dict[str, Any]:
    """Initial parameters; pure, so it can be jitted with `out_shardings` or evaluated for shapes only.

    Normal kernels of variance 1 / inputs, those that join the residual stream scaled by (2 l)^-0.5, embeddings normal(0.02).

    Args:
      config: Sizes. Static.
      key: PRNG key.

    Returns:
      A nested dict of float32 arrays; the arrays under "blocks" have a leading axis of length `config.depth`.
    """
    return nnx.to_pure_dict(nnx.state(Transformer(config, key), nnx.Param))


def hidden(
    config: TransformerConfig,
    params: Mapping[str, Any],
    tokens: ArrayLike,
    segment_ids: ArrayLike | None = None,
    positions: ArrayLike | None = None,
) -> jax.Array:
    """What the network makes of every token, after the final norm: times `unembed`, the logits of the next token before soft-capping.

    Texts may be padded on either side or packed several to a row, which does not change the numbers of any of them.

    Args:
      config: The network. Static.
      params: As `init` gives them, or with unstacked layers.
      tokens: [b t] integers; one out of range makes its row nan.
      segment_ids: [b t] integers, 0 for padding; tokens see those of their own segment only, which stand together. None is one segment a row.
      positions: [b t] integers; None counts from the beginning of each segment. Windows are measured in them, order is that of the row.

    Returns:
      [b t d] in the compute dtype; anything finite at padding.

    Raises:
      ValueError: on wrong shapes, or if `params` does not belong to the config.
    """
    arrays = _layers.check_tokens("transformer.hidden", tokens, segment_ids=segment_ids, positions=positions)
    check_params("transformer.hidden", config, params)
    return sharding.placed(functools.partial(_hidden, config), lambda spec: jax.P(*spec(arrays[0]), None), params, *arrays)


def _hidden(
    config: TransformerConfig, params: Mapping[str, Any], tokens: jax.Array, segment_ids: jax.Array | None, positions: jax.Array | None
) -> jax.Array:
    kinds, numbers = _kinds(config)
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    counted = positions is None
    if positions is None:
        positions = index if segment_ids is None else _layers.segment_positions(segment_ids)
    rope = _rope(config, kinds, positions)
    side = _attention.Side(index, positions, segment_ids)
    scanned = _scanned(config, params["blocks"])
    attention = _attention.over_itself(_form(config), [kind.window for kind in kinds], side, scanned=scanned, counted=counted)

    def layer(x: jax.Array, params: Any, kind: ArrayLike, _: ArrayLike) -> jax.Array:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            return attention(kind, q, k, v), None

        x = sharding.constrain_batch(x)  # keep the batch in place, so that fully sharded weights are gathered and not the activations
        return _merge(config, "block", params)(x, None if rope is None else _attention.pick(rope, kind), attend)[0]

    if config.remat != "none":
        static = () if scanned else (2, 3)
        layer = jax.checkpoint(layer, policy=_layers.REMAT_POLICIES[config.remat], prevent_cse=not scanned, static_argnums=static)
    x = sharding.constrain_batch(_merge(config, "embed", params["embed"])(tokens, positions))
    return _merge(config, "norm", params["norm"])(_through(config, params["blocks"], numbers, x, layer))


def unembed(config: TransformerConfig, params: Mapping[str, Any]) -> jax.Array:
    """[d v] the matrix that turns `hidden` into logits, in its stored dtype; `config.final_softcap` is not part of it."""
    return jnp.swapaxes(output_embedding(config, params), 0, 1)


def output_embedding(config: TransformerConfig, params: Mapping[str, Any]) -> jax.Array:
    """[v d] the same as it is stored: for `jaxlib_ext.fused` with `transposed=True`, which then copies nothing."""
    return params["embed"]["table"] if config.tied else params["unembed"]["kernel"]


def _to_logits(config: TransformerConfig, params: Mapping[str, Any], h: jax.Array) -> jax.Array:
    return _attention.capped(_product(h, output_embedding(config, params), jnp.float32), config.final_softcap)


def logits(
    config: TransformerConfig,
    params: Mapping[str, Any],
    tokens: ArrayLike,
    segment_ids: ArrayLike | None = None,
    positions: ArrayLike | None = None,
) -> jax.Array:
    """[b t v] logits of every next token, float32, soft-capped if the network does that; arguments as in `hidden`."""
    arrays = _layers.check_tokens("transformer.logits", tokens, segment_ids=segment_ids, positions=positions)
    check_params("transformer.logits", config, params)

    def call(params: Mapping[str, Any], *arrays: Any) -> jax.Array:
        return _to_logits(config, params, _hidden(config, params, *arrays))

    return sharding.placed(call, lambda spec: jax.P(*spec(arrays[0]), None), params, *arrays)


def init_cache(config: TransformerConfig, batch: int, length: int, dtype: DTypeLike | None = None) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens, in the compute dtype if none is given."""
    if batch < 1 or length < 1:
        raise ValueError(f"transformer.init_cache: 'batch' and 'length' must be at least 1, got {batch} and {length}")
    shape = (config.depth, batch, length, config.kv_heads, config.head_width)
    k, v = (jnp.zeros(shape, config.dtype if dtype is None else dtype) for _ in range(2))
    return Cache(k=k, v=v, length=jnp.zeros(batch, jnp.int32))


def extend(
    config: TransformerConfig,
    params: Mapping[str, Any],
    cache: Cache,
    tokens: ArrayLike,
    num_tokens: ArrayLike | None = None,
    prefix: Cache | None = None,
) -> tuple[jax.Array, Cache]:
    """Appends tokens to every row of a cache, each at its own length: prefill, decoding, and scoring behind a shared prefix.

    Args:
      config: The network. Static.
      params: As `init` gives them, or with unstacked layers.
      cache: From `init_cache`, or as an earlier call returned it. Donate it: it is written in place.
      tokens: [b t] integers, in each row first those to append.
      num_tokens: [b] how many there are, 0 to t; None is t.
      prefix: A cache of g rows that the rows continue, b = g n: rows i n, ..., i n + n - 1 follow its row i. It is read where it is, by all
        n rows at once; positions go on from its lengths.

    Returns:
      [b t d] as from `hidden`, anything finite beyond a row's `num_tokens`; and the cache. What does not fit is not written (nothing else is
      overwritten), while the length counts on: a row of which `length` exceeds the cache's capacity is void. The caller checks.

    Raises:
      ValueError: on wrong shapes, a `prefix` of which the rows do not divide the cache's, or if `params` does not belong to the config.
    """
    return _extend("transformer.extend", config, params, cache, tokens, num_tokens, prefix, last=False)


def decode(
    config: TransformerConfig,
    params: Mapping[str, Any],
    cache: Cache,
    tokens: ArrayLike,
    num_tokens: ArrayLike | None = None,
    prefix: Cache | None = None,
) -> tuple[jax.Array, Cache]:
    """As `extend`, but returns the logits [b v], float32, after each row's last new token (anything finite if it has none)."""
    return _extend("transformer.decode", config, params, cache, tokens, num_tokens, prefix, last=True)


def _extend(
    function: str,
    config: TransformerConfig,
    params: Mapping[str, Any],
    cache: Cache,
    tokens: ArrayLike,
    num_tokens: ArrayLike | None,
    prefix: Cache | None,
    *,
    last: bool,
) -> tuple[jax.Array, Cache]:
    (rows,) = _layers.check_tokens(function, tokens)
    b, t = rows.shape
    size = {"l": config.depth, "kv": config.kv_heads, "h": config.head_width}
    for name, one in (("cache", cache), ("prefix", prefix)):
        if one is not None:
            spec = " ".join(str(size.get(axis, axis)) for axis in ("l", "b", "s", "kv", "h"))
            arguments = {f"{name}.k": (one.k, spec), f"{name}.v": (one.v, spec), f"{name}.length": (one.length, "b")}
            held = checks.check_shapes(function, **arguments)["b"]
            if b % held or (name == "cache" and b != held):
                raise ValueError(f"{function}: {name!r} has {held} rows, which does not suit the {b} of 'tokens'")
    checks.check_shapes(function, tokens=(rows, "b t"), num_tokens=(num_tokens, "b"))
    check_params(function, config, params)
    count = jnp.full(b, t, jnp.int32) if num_tokens is None else jnp.asarray(num_tokens, jnp.int32)

    def call(params: Mapping[str, Any], cache: Cache, tokens: jax.Array, count: jax.Array, prefix: Cache | None) -> Any:
        h, cache = _appended(config, params, cache, tokens, count, prefix)
        if not last:
            return h, cache
        if t > 1:
            h = jnp.take_along_axis(h, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
        return _to_logits(config, params, h)[:, 0], cache

    def like(spec: Callable[[Any], jax.P]) -> Any:
        return jax.P(*spec(rows)[:1], *(None,) * (1 if last else 2)), jax.tree.map(spec, cache)

    return sharding.placed(call, like, params, cache, rows, count, prefix)


def _appended(
    config: TransformerConfig, params: Mapping[str, Any], cache: Cache, tokens: jax.Array, count: jax.Array, prefix: Cache | None
) -> tuple[jax.Array, Cache]:
    kinds, numbers = _kinds(config)
    (b, t), capacity, windows = tokens.shape, cache.k.shape[2], [kind.window for kind in kinds]
    places = cache.length[:, None] + jnp.arange(t, dtype=jnp.int32)[None]  # in the cache
    slots = jnp.arange(capacity, dtype=jnp.int32)[None]
    own = _attention.over(_form(config), windows, _attention.Side(places, places), _attention.Side(slots, slots))
    positions, shared = places, None
    if prefix is not None:
        g, slots = prefix.length.shape[0], jnp.arange(prefix.k.shape[2], dtype=jnp.int32)[None]
        positions = places + jnp.repeat(prefix.length, b // g, total_repeat_length=b)[:, None]
        folded = positions.reshape(g, -1)
        valid = jnp.where(slots < prefix.length[:, None], 0, 1)
        shared = _attention.over(_form(config), windows, _attention.Side(jnp.zeros_like(folded), folded), _attention.Side(valid, slots))
    rope = _rope(config, kinds, positions)

    def layer(carry: tuple[jax.Array, jax.Array, jax.Array], params: Any, kind: ArrayLike, number: ArrayLike) -> Any:
        x, keys, values = carry

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            written = (_write(keys, number, k, cache.length, count), _write(values, number, v, cache.length, count))
            parts = [own(kind, q, *(_attention.pick(cached, number) for cached in written))]
            if prefix is not None and shared is not None:
                g = prefix.length.shape[0]
                part = shared(kind, q.reshape(g, -1, *q.shape[2:]), *(_attention.pick(cached, number) for cached in prefix[:2]))
                parts.append(_attention.Part(*(x.reshape(b, t, *x.shape[2:]) for x in part)))
            return _attention.joined(parts, q.dtype), written

        x = sharding.constrain_batch(x)
        x, (keys, values) = _merge(config, "block", params)(x, None if rope is None else _attention.pick(rope, kind), attend)
        return x, keys, values

    x = sharding.constrain_batch(_merge(config, "embed", params["embed"])(tokens, positions))
    x, k, v = _through(config, params["blocks"], numbers, (x, cache.k, cache.v), layer)
    return _merge(config, "norm", params["norm"])(x), Cache(k=k, v=v, length=cache.length + count)


def _write(cached: jax.Array, number: ArrayLike, new: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
    """The first `count` [b] of new [b t kv h] into layer `number` of cached [l b s kv h], from `start` [b] on."""
    (b, t), capacity, new = new.shape[:2], cached.shape[2], new.astype(cached.dtype)
    if t == 1:
        slot = jnp.where(count > 0, start, capacity)
        return cached.at[number, jnp.arange(b), slot].set(new[:, 0], mode="drop", unique_indices=True)
    source = jnp.arange(capacity, dtype=jnp.int32)[None] - start[:, None]
    moved = jax.vmap(lambda rows, index: rows.at[index].get(mode="clip"))(new, source)
    inside = (source >= 0) & (source < count[:, None])
    layer = jnp.where(inside[..., None, None], moved, _attention.pick(cached, number))
    return jax.lax.dynamic_update_index_in_dim(cached, layer, number, 0)


def hidden_fn(config: TransformerConfig) -> Callable[..., jax.Array]:
    """`hidden` as `hidden_fn(params, tokens, segment_ids=None, positions=None) -> [b t d]`."""

    def fn(
        params: Mapping[str, Any], tokens: ArrayLike, segment_ids: ArrayLike | None = None, positions: ArrayLike | None = None
    ) -> jax.Array:
        return hidden(config, params, tokens, segment_ids, positions)

    return fn


def logits_fn(config: TransformerConfig) -> Callable[..., jax.Array]:
    """`logits` as `logits_fn(params, tokens, segment_ids=None, positions=None) -> [b t v]`."""

    def fn(
        params: Mapping[str, Any], tokens: ArrayLike, segment_ids: ArrayLike | None = None, positions: ArrayLike | None = None
    ) -> jax.Array:
        return logits(config, params, tokens, segment_ids, positions)

    return fn


def decode_fn(config: TransformerConfig) -> Callable[..., tuple[jax.Array, Cache]]:
    """`decode` as `decode_fn(params, cache, tokens, num_tokens=None, prefix=None) -> (logits [b v], cache)`."""

    def fn(
        params: Mapping[str, Any], cache: Cache, tokens: ArrayLike, num_tokens: ArrayLike | None = None, prefix: Cache | None = None
    ) -> tuple[jax.Array, Cache]:
        return decode(config, params, cache, tokens, num_tokens, prefix)

    return fn


def check_params(function: str, config: TransformerConfig, params: Mapping[str, Any]) -> None:
    """Raises ValueError, naming `function` and the parameter, unless `params` has the structure and shapes of the config."""
    _, whole, block = _template(config)
    blocks = params.get("blocks")
    if blocks is None or isinstance(blocks, Mapping):
        _layers.check_params(function, whole, params)
        return
    if len(blocks) != config.depth:
        raise ValueError(f"{function}: 'blocks' has {len(blocks)} layers, expected {config.depth}")
    expected = {**nnx.to_pure_dict(whole), "blocks": (block,) * config.depth}
    _layers.check_params(function, expected, params)
