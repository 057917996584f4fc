"""Bidirectional encoders with a masked-language-model head, one network configured as BERT, RoBERTa or ESM-2; a module used functionally.

    config = presets.ESM2_8M
    params = encoder.init(config, jax.random.key(0))                 # or config, params = loading.load_encoder(directory)
    h = encoder.hidden(config, params, tokens, segment_ids)          # [b t d]
    z = encoder.logits(config, params, tokens, segment_ids)          # [b t v], of the token that stands at each place
    pooled = encoder.pool(config, params, h, segment_ids)            # one vector per row
    h = encoder.hidden(config, params, rows)                         # relaxed tokens: probabilities [b t v], differentiable

Where only some logits or log-probabilities are wanted, `jaxlib_ext.fused` takes `head_hidden` with the matrix and bias of `unembed`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks, dtypes, sharding
from janax.models import _layers
from janax.models._layers import Linear

__all__ = [
    "SHARDING_RULES",
    "Encoder",
    "EncoderConfig",
    "Pooled",
    "check_params",
    "head_hidden",
    "hidden",
    "hidden_fn",
    "init",
    "logits",
    "logits_fn",
    "pool",
    "unembed",
]

_NEVER = -1e30  # a logit that softmax takes for no chance, and still finite
_INIT_SCALE = 0.02
_TRAINED_MASK_RATIO = 0.15 * 0.8  # of 15 % of the tokens that ESM-2 learned to predict, 80 % were masked

SHARDING_RULES: sharding.Rules = (
    (r"embed/tokens$", jax.P("model", "data")),  # [v d]
    (r"embed/(positions|types)$", jax.P(None, "data")),
    (r"blocks/qkv/kernel$", jax.P(None, "data", None, "model")),  # [l d 3 heads head_width]
    (r"blocks/out/kernel$", jax.P(None, "model", None, "data")),  # [l heads head_width d]
    (r"blocks/up/kernel$", jax.P(None, "data", "model")),  # [l d hidden]
    (r"blocks/down/kernel$", jax.P(None, "model", "data")),  # [l hidden d]
    (r"(head/dense|pooler)/kernel$", jax.P("data", "model")),  # [d d]
    (r"head/bias$", jax.P("model")),  # [v]
    (r"(scale|bias)$", jax.P()),
)

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes, variant and numerics of an encoder. Hashable, so it can be a static argument of `jax.jit`. The defaults are BERT's.

    Attributes:
      vocab_size: Number of tokens v.
      max_length: Longest text it is made for; with learned positions a hard limit, beyond which the embedding is nan.
      width: Width d of the residual stream.
      depth: Number of blocks l.
      heads: Attention heads; they divide `width`, with rotary positions into even parts.
      hidden: Hidden width of the MLP.
      norm: "post", on the sum of residual stream and branch (BERT, RoBERTa), or "pre", on what enters a branch (ESM-2).
      norm_eps: Epsilon of all norms.
      embedding_norm: A norm on the embeddings.
      final_norm: A norm after the last block.
      activation: Of the MLP: "gelu" (exact), "gelu_tanh" or "relu".
      query_scale: Factor on attention logits; None is (width / heads)^-0.5.
      positions: "learned" or "rope".
      position_offset: Learned positions begin at this row of their table: 0 for BERT, one after the padding token for RoBERTa.
      rope_theta: Longest rotary wavelength over 2 pi.
      token_types: Number of token types, 0 for none.
      mask_token: ESM-2's token dropout: this token's embedding is zero, and the embeddings of a text of n tokens, m of them masked, are
        multiplied by (1 - 0.12) / (1 - m / n). None leaves all embeddings alone.
      head: Whether there is a masked-language-model head.
      head_activation: The head's activation, as `activation`.
      pooler: Whether there is a pooler for a text's first token.
      dtype: Compute dtype, "float32" or "bfloat16"; embeddings, norms, softmax and rotations are computed in float32 always.
      remat: What the backward pass recomputes per block: "none", "dots" (all but the matrix products) or "full".
      scan_layers: Scan over the blocks: compile time does not grow with depth. False unrolls them. Same parameters, same numbers.
    """

    vocab_size: int
    max_length: int
    width: int
    depth: int
    heads: int
    hidden: int
    norm: str = "post"
    norm_eps: float = 1e-12
    embedding_norm: bool = True
    final_norm: bool = False
    activation: str = "gelu"
    query_scale: float | None = None
    positions: str = "learned"
    position_offset: int = 0
    rope_theta: float = 10000.0
    token_types: int = 0
    mask_token: int | None = None
    head: bool = True
    head_activation: str = "gelu"
    pooler: bool = False
    dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True

    def __post_init__(self) -> None:
        for names, least in (
            (("vocab_size", "max_length", "width", "depth", "heads", "hidden"), 1),
            (("position_offset", "token_types"), 0),
        ):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"EncoderConfig: {name!r} must be at least {least}, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"EncoderConfig: 'width' {self.width} must be a multiple of 'heads' {self.heads}")
        for name, options in _OPTIONS.items():
            checks.one_of("EncoderConfig", name, getattr(self, name), options)
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"EncoderConfig: 'width' / 'heads' is {self.head_width}, which must be even for rotary positions")
        if self.positions == "rope" and self.position_offset:
            raise ValueError(
                f"EncoderConfig: 'position_offset' is {self.position_offset}, expected 0 with rotary positions, which are relative"
            )
        for name in ("norm_eps", "rope_theta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"EncoderConfig: {name!r} must be positive, got {getattr(self, name)}")
        if self.mask_token is not None and not 0 <= self.mask_token < self.vocab_size:
            raise ValueError(f"EncoderConfig: 'mask_token' is {self.mask_token}, expected a token below 'vocab_size' {self.vocab_size}")

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.width // self.heads


_OPTIONS = {
    "norm": ("post", "pre"),
    "activation": tuple(_ACTIVATIONS),
    "head_activation": tuple(_ACTIVATIONS),
    "positions": ("learned", "rope"),
    "dtype": ("float32", "bfloat16"),
    "remat": tuple(_layers.REMAT_POLICIES),
}


class Pooled(NamedTuple):
    """One vector per row.

    Attributes:
      mean: [b d] float32, mean of the row's tokens; 0 for a row of padding.
      first: [b d] float32, the pooler's value of the row's first token; None for a network without a pooler.
    """

    mean: jax.Array
    first: jax.Array | None


class _Embedding(nnx.Module):
    """Sum of token, position and type embeddings, with ESM-2's rescaling and perhaps a norm."""

    def __init__(self, config: EncoderConfig, key: jax.Array):
        rows = {
            "tokens": config.vocab_size,
            "positions": config.max_length + config.position_offset if config.positions == "learned" else 0,
            "types": config.token_types,
        }
        tables = [
            nnx.Param(_INIT_SCALE * jax.random.normal(key, (count, config.width), jnp.float32)) if count else None
            for key, count in zip(jax.random.split(key, 3), rows.values())
        ]
        self.tokens, self.positions, self.types = tables
        self.norm = _layers.LayerNorm(config.width, config.norm_eps) if config.embedding_norm else None
        self.config = config

    def __call__(self, tokens: jax.Array, positions: jax.Array, types: jax.Array | None, same: jax.Array | None) -> jax.Array:
        """tokens [b t] or [b t v], positions [b or 1, t] and types [b t] to [b t d] in the compute dtype; one out of range gives nan."""
        x = self._embedded(tokens, same)
        if self.positions is not None:
            x = x + jnp.broadcast_to(_rows(self.positions, positions + self.config.position_offset), x.shape)
        if self.types is not None:
            x = x + _rows(self.types, jnp.zeros(x.shape[:2], jnp.int32) if types is None else types)
        return (x if self.norm is None else self.norm(x)).astype(self.config.dtype)

    def _embedded(self, tokens: jax.Array, same: jax.Array | None) -> jax.Array:
        """Token embeddings [b t d], or their expectation for rows of probabilities, with ESM-2's rescaling."""
        mask, soft = self.config.mask_token, jnp.issubdtype(tokens.dtype, jnp.floating)
        if soft:
            table = dtypes.at_least_float32(self.tokens[...])  # type: ignore[index]
            rows = tokens.astype(table.dtype)
            masked = None if mask is None else rows[..., mask]
            unmasked = rows if mask is None else jnp.where((jnp.arange(rows.shape[-1]) == mask)[None, None], 0, rows)
            x = jnp.einsum("btv,vd->btd", unmasked, table, precision=jax.lax.Precision.HIGHEST)  # as exact as a row that is looked up
        else:
            x = _rows(self.tokens, tokens)
            masked = None if mask is None else (tokens == mask).astype(x.dtype)
            x = x if masked is None else jnp.where((tokens == mask)[..., None], 0, x)
        return x if masked is None else x * _mask_compensation(masked, same)[..., None]


def _rows(table: Any, index: jax.Array) -> jax.Array:
    return dtypes.at_least_float32(jnp.take(table[...], index, axis=0, mode="fill"))


def _mask_compensation(masked: jax.Array, same: jax.Array | None) -> jax.Array:
    """masked [b t], 0 to 1, to [b t or 1]: 0.88 / (1 - share of masked tokens among those of the same text)."""
    others = jnp.ones((1, 1, masked.shape[1]), bool) if same is None else same
    length, kept = (jnp.sum(jnp.where(others, x[:, None, :], 0), axis=-1) for x in (jnp.ones_like(masked), 1 - masked))
    return (1 - _TRAINED_MASK_RATIO) * length / jnp.maximum(kept, 1)  # none kept: all zero anyway


class _Block(nnx.Module):
    """Attention and MLP."""

    def __init__(self, config: EncoderConfig, key: jax.Array):
        d, head = config.width, (config.heads, config.head_width)
        key_qkv, key_out, key_up, key_down = jax.random.split(key, 4)
        self.qkv = Linear((d,), (3, *head), key_qkv, _INIT_SCALE)
        self.out = Linear(head, (d,), key_out, _INIT_SCALE)
        self.up = Linear((d,), (config.hidden,), key_up, _INIT_SCALE)
        self.down = Linear((config.hidden,), (d,), key_down, _INIT_SCALE)
        self.attention_norm, self.mlp_norm = (_layers.LayerNorm(d, config.norm_eps) for _ in range(2))
        self.config = config

    def __call__(self, x: jax.Array, rope: jax.Array | None, same: jax.Array | None) -> jax.Array:
        """x [b t d], cosines and sines [2, b or 1, t, h/2], and which tokens belong together [b t t]."""

        def mlp(x: jax.Array) -> jax.Array:
            return self.down(_ACTIVATIONS[self.config.activation](self.up(x)))

        for branch, norm in ((functools.partial(self._attention, rope=rope, same=same), self.attention_norm), (mlp, self.mlp_norm)):
            x = norm(x + branch(x)) if self.config.norm == "post" else x + branch(norm(x))
        return x

    def _attention(self, x: jax.Array, rope: jax.Array | None, same: jax.Array | None) -> jax.Array:
        scale = self.config.head_width**-0.5 if self.config.query_scale is None else self.config.query_scale
        q, k, v = jnp.moveaxis(self.qkv(x), 2, 0)
        q = q * jnp.asarray(scale, q.dtype)
        if rope is not None:
            q, k = _layers.rotate(q, rope), _layers.rotate(k, rope)
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))  # heads before tokens: faster on CPU
        scores = jnp.einsum("bhqk,bhsk->bhqs", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores if same is None else jnp.where(same[:, None], scores, _NEVER), axis=-1)
        return self.out(jnp.einsum("bhqs,bhsk->bhqk", weights.astype(v.dtype), v).transpose(0, 2, 1, 3))


class _Head(nnx.Module):
    """What stands before the unembedding, and the bias after it."""

    def __init__(self, config: EncoderConfig, key: jax.Array):
        self.dense = Linear((config.width,), (config.width,), key, _INIT_SCALE)
        self.norm = _layers.LayerNorm(config.width, config.norm_eps)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, jnp.float32))
        self.activation = config.head_activation

    def __call__(self, h: jax.Array) -> jax.Array:
        return self.norm(_ACTIVATIONS[self.activation](self.dense(h)))


class Encoder(nnx.Module):
    """The network as a Flax module; `init`, `hidden` and `logits` are the functional face."""

    def __init__(self, config: EncoderConfig, key: jax.Array):
        key_embed, key_blocks, key_head, key_pooler = jax.random.split(key, 4)
        self.config = config
        self.embed = _Embedding(config, key_embed)
        self.blocks = nnx.vmap(_Block, in_axes=(None, 0))(config, jax.random.split(key_blocks, config.depth))
        self.norm = _layers.LayerNorm(config.width, config.norm_eps) if config.final_norm else None
        self.head = _Head(config, key_head) if config.head else None
        self.pooler = Linear((config.width,), (config.width,), key_pooler, _INIT_SCALE) if config.pooler else None

    def __call__(
        self, tokens: jax.Array, segment_ids: jax.Array | None, positions: jax.Array | None, token_types: jax.Array | None
    ) -> jax.Array:
        """All [b t] or None, except that tokens may be [b t v], to [b t d]."""
        config = self.config
        if positions is None:
            index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            positions = index if segment_ids is None else _layers.segment_positions(segment_ids)
        same = None if segment_ids is None else segment_ids[:, :, None] == segment_ids[:, None, :]
        rope = _rope(config, positions) if config.positions == "rope" else None
        block, block_params = nnx.split(self.blocks)

        def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
            x = sharding.constrain_batch(x)  # keep the batch in place, so that fully sharded weights are gathered and not the activations
            return nnx.merge(block, params)(x, rope, same), None

        if config.remat != "none":
            layer = jax.checkpoint(layer, policy=_layers.REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers)
        x = sharding.constrain_batch(self.embed(tokens, positions, token_types, same))
        if config.scan_layers:
            x, _ = jax.lax.scan(layer, x, block_params)
        else:
            for i in range(config.depth):
                x, _ = layer(x, jax.tree.map(lambda leaf: leaf[i], block_params))  # noqa: B023
        return x if self.norm is None else self.norm(x)

    def before_unembedding(self, h: jax.Array) -> jax.Array:
        """h [... d] through the head, if there is one."""
        return h if self.head is None else self.head(h)


def _rope(config: EncoderConfig, positions: jax.Array) -> jax.Array:
    """positions [b t] to [2 b t h/2]: cosines and sines, float32."""
    h = config.head_width
    rates = (config.rope_theta ** -(np.arange(0, h, 2) / h)).astype(np.float32)
    angles = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(rates)[None, None]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


@functools.lru_cache(maxsize=32)
def _template(config: EncoderConfig) -> tuple[Any, Any]:
    """Structure of the module and of its state, without arrays."""
    return nnx.split(nnx.eval_shape(lambda: Encoder(config, jax.random.key(0))))


def _merge(config: EncoderConfig, params: Mapping[str, Any]) -> Encoder:
    return nnx.merge(_template(config)[0], nnx.State(dict(params)))


def init(config: EncoderConfig, key: jax.Array) -> dict[str, Any]:
    """Initial parameters; pure, so it can be jitted with `out_shardings` or evaluated for shapes only.

    Kernels and embeddings normal(0.02), biases 0, norms 1, as BERT begins.

    Args:
      config: Sizes. Static.
      key: PRNG key.

    Returns:
      A nested dict of float32 arrays; the arrays under "blocks" have a leading axis of length `config.depth`.
    """
    return nnx.to_pure_dict(nnx.state(Encoder(config, key), nnx.Param))


def hidden(
    config: EncoderConfig,
    params: Mapping[str, Any],
    tokens: ArrayLike,
    segment_ids: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    token_types: ArrayLike | None = None,
) -> jax.Array:
    """What the network makes of every token, seeing the whole text.

    Texts may be padded on either side or packed several to a row, which does not change the numbers of any of them.

    Tokens may be relaxed to rows of probabilities: a place then has the expectation of its token's embedding, sum_v p_v E_v, differentiable in
    the row; a one-hot row gives what its id gives. Under `config.mask_token` the mask token adds p_mask times zero to that sum, and the number m
    of masks in (1 - 0.12) / (1 - m / n) is the expected one, the sum of p_mask over the text, with n - m held to at least 1.

    Args:
      config: The network. Static.
      params: As `init` gives them.
      tokens: [b t] integers, of which one out of range gives nan; or [b t v] floating, a row of probabilities at each place (any weights will
        do: nothing is normalised), used in the embeddings' dtype, at least float32.
      segment_ids: [b t] integers, 0 for padding; tokens see those of their own segment only, which stand together. None is one segment a
        row: no token is padding then, whatever its number.
      positions: [b t] integers from 0; None counts from the beginning of each segment.
      token_types: [b t] integers below `config.token_types`; None is 0 everywhere.

    Returns:
      [b t d] in the compute dtype; anything finite at padding.

    Raises:
      ValueError: on wrong shapes, token types for a network that has none, or if `params` does not belong to the config.

    Reference: straight-through and soft tokens as in arXiv:2301.02931, whose code multiplies such rows by the embedding matrix.
    """
    return _run("encoder.hidden", config, params, tokens, segment_ids, positions, token_types, unembedded=False)


def _run(
    function: str,
    config: EncoderConfig,
    params: Mapping[str, Any],
    tokens: ArrayLike,
    segment_ids: ArrayLike | None,
    positions: ArrayLike | None,
    token_types: ArrayLike | None,
    *,
    unembedded: bool,
) -> jax.Array:
    given = {"segment_ids": segment_ids, "positions": positions, "token_types": token_types}
    tokens, *rest = _check_inputs(function, config, tokens, given)
    if token_types is not None and not config.token_types:
        raise ValueError(f"{function}: 'token_types' is given, but the network has none")
    check_params(function, config, params)

    def call(tokens: jax.Array, params: Mapping[str, Any], *rest: jax.Array | None) -> jax.Array:
        encoder = _merge(config, params)
        h = encoder(tokens, *rest)
        if not unembedded:
            return h
        kernel, bias = unembed(config, params)
        h = encoder.before_unembedding(h)
        z = jnp.einsum("btd,dv->btv", h, kernel.astype(h.dtype), preferred_element_type=jnp.float32)
        return z + bias.astype(z.dtype)[None, None]

    return sharding.placed(call, lambda spec: jax.P(*spec(tokens)[:2], None), tokens, params, *rest)


def _check_inputs(function: str, config: EncoderConfig, tokens: ArrayLike, others: Mapping[str, ArrayLike | None]) -> tuple[Any, ...]:
    """As arrays, tokens [b t] integers or [b t v] floating, the others [b t] integers or None."""
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.floating):
        return _layers.check_tokens(function, tokens, **others)
    if tokens.ndim != 3 or tokens.shape[2] != config.vocab_size:
        wanted = f"integers [b t] or rows of probabilities [b t v] with v={config.vocab_size}"
        raise ValueError(f"{function}: 'tokens' has dtype {tokens.dtype} and shape {tokens.shape}, expected {wanted}")
    return tokens, *_layers.check_tokens(function, np.zeros(tokens.shape[:2], np.int32), **others)[1:]


def head_hidden(config: EncoderConfig, params: Mapping[str, Any], h: jax.Array) -> jax.Array:
    """The head before its unembedding: dense layer, activation and norm. Times `unembed`'s matrix plus its bias, these are the logits.

    Args:
      config: The network. Static.
      params: As `init` gives them.
      h: [... d] from `hidden`, any of its tokens.

    Returns:
      [... d] in h's dtype.

    Raises:
      ValueError: if the network has no head, the last axis is not d, or `params` does not belong to the config.
    """
    _check_head("encoder.head_hidden", config)
    checks.check_shapes("encoder.head_hidden", h=(h, f"... {config.width}"))
    check_params("encoder.head_hidden", config, params)
    return sharding.placed(lambda h, params: _merge(config, params).before_unembedding(h), lambda spec: spec(h), h, params)


def unembed(config: EncoderConfig, params: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The matrix [d v] and the bias [v] that turn `head_hidden` into logits, in their stored dtype; the matrix is the embedding's."""
    _check_head("encoder.unembed", config)
    return jnp.swapaxes(params["embed"]["tokens"], 0, 1), params["head"]["bias"]


def logits(
    config: EncoderConfig,
    params: Mapping[str, Any],
    tokens: ArrayLike,
    segment_ids: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    token_types: ArrayLike | None = None,
) -> jax.Array:
    """[b t v] logits, float32, of the token at each place (not of the next one); arguments as in `hidden`."""
    _check_head("encoder.logits", config)
    return _run("encoder.logits", config, params, tokens, segment_ids, positions, token_types, unembedded=True)


def pool(config: EncoderConfig, params: Mapping[str, Any], h: jax.Array, segment_ids: ArrayLike | None = None) -> Pooled:
    """One vector per row, for rows of one text each: the mean over its tokens and, where there is a pooler, tanh(W h_first + b).

    Args:
      config: The network. Static.
      params: As `init` gives them.
      h: [b t d] from `hidden`.
      segment_ids: [b t] integers, 0 for padding; None is no padding.

    Returns:
      Both vectors; the first token is that after the padding on the left, if there is any.

    Raises:
      ValueError: on wrong shapes, or if `params` does not belong to the config.
    """
    checks.check_shapes("encoder.pool", h=(h, f"b t {config.width}"), segment_ids=(segment_ids, "b t"))
    check_params("encoder.pool", config, params)
    real = jnp.ones(h.shape[:2], bool) if segment_ids is None else jnp.asarray(segment_ids) != 0

    def call(h: jax.Array, real: jax.Array, params: Mapping[str, Any]) -> Pooled:
        pooler = _merge(config, params).pooler
        weights = real[..., None].astype(jnp.float32)
        mean = jnp.sum(jnp.where(real[..., None], dtypes.at_least_float32(h), 0), axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)
        if pooler is None:
            return Pooled(mean, None)
        first = jnp.take_along_axis(h, jnp.argmax(real, axis=1)[:, None, None], axis=1)[:, 0]
        return Pooled(mean, jnp.tanh(dtypes.at_least_float32(pooler(first))))

    def like(spec: Callable[[Any], jax.P]) -> Pooled:
        rows = jax.P(*spec(h)[:1], None)
        return Pooled(rows, rows if config.pooler else None)  # type: ignore[arg-type]

    return sharding.placed(call, like, h, real, params)


def hidden_fn(config: EncoderConfig) -> Callable[..., jax.Array]:
    """`hidden` as `hidden_fn(params, tokens, segment_ids=None, positions=None, token_types=None) -> [b t d]`."""
    return functools.partial(hidden, config)


def logits_fn(config: EncoderConfig) -> Callable[..., jax.Array]:
    """`logits` as `logits_fn(params, tokens, segment_ids=None, positions=None, token_types=None) -> [b t v]`."""
    return functools.partial(logits, config)


def check_params(function: str, config: EncoderConfig, params: Mapping[str, Any]) -> None:
    """Raises ValueError, naming `function` and the parameter, unless `params` has the structure and shapes of the config."""
    _layers.check_params(function, _template(config)[1], params)


def _check_head(function: str, config: EncoderConfig) -> None:
    if not config.head:
        raise ValueError(f"{function}: the network has no masked-language-model head")
