"""Causal attention of texts over themselves that never holds the scores: splash attention on TPU, a Triton kernel on CUDA GPUs.

    y = attention.causal(plain, q, k, v, segment_ids, window=None, softcap=None)     # the kernel of the platform, else plain(q, k, v)

Both kernels come with JAX (`jax.experimental.pallas.ops`); here they get shapes that they take, and run on each device's rows and heads.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from janax.jaxlib_ext import sharding

__all__ = ["causal", "splash", "triton"]

_LANES = 128  # TPU: width of a head and lengths of blocks are multiples
_BLOCKS = (512, 256, 128)
_TRITON_BLOCK = 128

_Q, _KV, _SEGMENTS = ("batch", None, "heads", None, None), ("batch", None, "heads", None), ("batch", None)


def causal(
    plain: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(q k^T) v over keys that are not later, of the same segment and inside the window, by the platform's kernel if it has one.

    Args:
      plain: What computes the same from (q, k, v) elsewhere, and on GPUs where there is a window or a cap, which that kernel lacks.
      q: [b t kv g h] queries, scaled: g heads to each of the kv key-value heads.
      k: [b t kv h] keys.
      v: [b t kv h] values.
      segment_ids: [b t] integers, or None for one text a row.
      window: A token sees so many last ones, itself included, counted along the row; None is all. Static.
      softcap: Scores become c tanh(score / c). Static.

    Returns:
      [b t kv g h] in q's dtype (float32, bfloat16 or float16; sums are float32). Differentiable once, in reverse mode, where a kernel runs.

    Reference: Dao et al., arXiv:2205.14135 (exact attention by tiles).
    """
    arrays, axes = ((q, k, v), (_Q, _KV, _KV)) if segment_ids is None else ((q, k, v, segment_ids), (_Q, _KV, _KV, _SEGMENTS))

    def on_tpu(*arrays: jax.Array) -> jax.Array:
        return sharding.per_device(functools.partial(splash, window=window, softcap=softcap), arrays, axes, _Q)

    def on_gpu(*arrays: jax.Array) -> jax.Array:
        return sharding.per_device(triton, arrays, axes, _Q)

    def elsewhere(q: jax.Array, k: jax.Array, v: jax.Array, *_: jax.Array) -> jax.Array:
        return plain(q, k, v)

    platforms: dict[str, Callable[..., jax.Array]] = {"tpu": on_tpu}
    if window is None and softcap is None:
        platforms["cuda"] = on_gpu
    return jax.lax.platform_dependent(*arrays, **platforms, default=elsewhere)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`causal` on one TPU chip; `interpret` runs the kernel on CPU. Widths and lengths are padded to what the kernel takes."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels  # a quarter of a second
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    t, g, h = q.shape[1], q.shape[3], q.shape[4]
    size = -(-t // _LANES) * _LANES
    block = next(block for block in _BLOCKS if size % block == 0)
    q, k, v = (_padded(x, {1: size, x.ndim - 1: -(-h // _LANES) * _LANES}) for x in (q, k, v))
    mask = masks.CausalMask((size, size)) if window is None else masks.LocalMask((size, size), (window - 1, 0), 0)
    blocks = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=False,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = kernels.make_splash_mqa(
        masks.MultiHeadMask([mask] * g),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    ids = None if segment_ids is None else _padded(segment_ids, {1: size})

    def row(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> Any:
        segments = None if ids is None else kernels.SegmentIds(ids, ids)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q, k, v)

    out = jax.vmap(row)(q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), ids)
    return out.transpose(0, 3, 1, 2, 4)[:, :t, ..., :h].astype(q.dtype)


def triton(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None, *, interpret: bool = False) -> jax.Array:
    """`causal` on one CUDA GPU, without window and cap; `interpret` runs the kernel on CPU. Keys and values are repeated for every query head."""
    from jax.experimental.pallas.ops.gpu import attention  # imports Triton's dialect, which TPU installations may lack

    b, t, kv, g, h = q.shape
    size = -(-t // _TRITON_BLOCK) * _TRITON_BLOCK
    q = _padded(q, {1: size}).reshape(b, size, kv * g, h)
    k, v = (jnp.repeat(_padded(x, {1: size}), g, axis=2) for x in (k, v))
    ids = None if segment_ids is None else _padded(segment_ids, {1: size})
    out = attention.mha(q, k, v, ids, sm_scale=1.0, causal=True, interpret=interpret)
    return jnp.asarray(out)[:, :t].reshape(b, t, kv, g, h)


def _padded(x: jax.Array, lengths: dict[int, int]) -> jax.Array:
    """x with zeros after its end along some axes."""
    return jnp.pad(x, [(0, lengths.get(axis, length) - length) for axis, length in enumerate(x.shape)])
