"""Log-probabilities from hidden states and an unembedding, without the [tokens, vocabulary] array, forward or backward.

    log_probs = fused.token_log_probs(h, w, tokens)                 # h [... d], w [d v]; differentiable, any cotangent per token
    loss = fused.weighted_nll(h, w, tokens, weights)                # -sum(weights log_probs), one matrix product fewer
    values, ids = fused.top_k(h, w, 20)

The vocabulary is walked in chunks, with a running maximum and sum; the backward pass makes each chunk of logits again. In units of the
product h w (2 n d v FLOPs), value and gradients cost

    the plain form          1 forward, 2 backward
    token_log_probs         1 forward, 3 backward       (1 and 2 if `w` needs no gradient: the compiler drops the unused product)
      keep_expectation      2 forward, 2 backward       (2 and 0 if `w` needs no gradient)
    weighted_nll            3 forward, 0 backward       (the cotangents are known in advance)

and no temporary of the size of the logits: benchmarks/fused_logprobs.py.

Placement. Under `jit` the arrays may lie on a mesh. A chunk is not a run of neighbouring columns but the same window of each of 16 equal
parts of the vocabulary, so a sharded `w` is never gathered when the mesh axis divides 16 (and the vocabulary). What the compiler cannot do
is to keep a sum over devices pending through the loop: it adds the gradient of `h` up over vocabulary shards once per chunk. Inside
`jax.shard_map` (with its default check_vma=True), `axis_name` names the axis that shards the vocabulary, and there is one sum in the end.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes
from janax.jaxlib_ext.checks import check_shapes, require_integers
from janax.jaxlib_ext.logprobs import TopK

__all__ = ["TokenStatistics", "statistics", "token_log_probs", "top_k", "weighted_nll"]

_GROUPS = 16  # equal parts of the vocabulary in a chunk: the lengths of a mesh axis that may shard it divide this
_LANES = 128  # windows are multiples of a TPU's vector width
_TOKEN_GROUPS = 256


class TokenStatistics(NamedTuple):
    """What the distribution at each position says about a token and about itself; all differentiable.

    Attributes:
      log_probs: [...] log-probability of the given token, in nats.
      entropy: [...] entropy of the distribution, in nats.
      logsumexp: [...] log-normaliser of the logits.
    """

    log_probs: jax.Array
    entropy: jax.Array
    logsumexp: jax.Array


def token_log_probs(
    h: ArrayLike,
    w: ArrayLike,
    tokens: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    keep_expectation: bool = False,
    transposed: bool = False,
    axis_name: str | None = None,
) -> jax.Array:
    """Log-probability of given tokens: z_y - log sum_v exp(z_v) with z = cap(h w + bias) / temperature.

    Differentiable in h, w, bias and temperature, reverse mode, once. The gradient with respect to a logit is c_n (1[v = y_n] - p_nv), c the
    cotangent of the result.

    Args:
      h: [... d] hidden states, one per token. Batches come as leading axes; `jax.vmap` would make one gradient of `w` per example.
      w: [d v] unembedding; [v d] if `transposed`.
      tokens: [...] integer ids, already shifted: `tokens` at a position is what the hidden state there predicts.
      bias: [v] added to h w; -inf forbids a token, also under a soft cap.
      softcap: c in cap(x) = c tanh(x / c), Gemma 2's final soft-capping; None for none. Static.
      temperature: [] > 0, divides the capped logits. Traced.
      vocab_chunk: Vocabulary entries handled at a time, about; chosen from the shapes if None. Static.
      token_chunk: Tokens handled at a time, about. If None, 1024 for up to 8192 tokens, and all for more: they may lie on a mesh, where each
        step sums w's gradient over devices, and a chunk of logits is not much larger than `h`. Static.
      keep_expectation: Under differentiation, compute sum_v p_v w_v [n d] with the forward pass and keep it: h then needs nothing backward.
        Worth it where `w` is frozen. Static.
      transposed: `w` is [v d], as embeddings and PyTorch's layers are stored: no chunk is then copied on the way to the product with its
        gradient, on CPU a tenth of the whole time. Static.
      axis_name: Inside `jax.shard_map`, the mesh axis over which the vocabulary of `w` and `bias` is sharded. Static.

    Returns:
      [...] in nats, float32 or wider; -inf, with zero gradients, for a forbidden token and for an id outside the vocabulary. Gradients have
      the dtypes of their arguments and are summed in at least float32; the gradient's chunk of logits takes part in the matrix products in
      the dtype of h and w.

    Raises:
      ValueError: if shapes disagree, ids are not integers, a static argument is out of range, or `axis_name` is used where the mesh axis
        is not tracked (check_vma=False).

    Reference: the chunked loss with recomputation is that of Wijmans et al., arXiv:2411.09009, here exact (no block is skipped).
    """
    options = _Options(softcap, False, keep_expectation, vocab_chunk, token_chunk, transposed)
    return _token_statistics("token_log_probs", options, h, w, tokens, bias, temperature, axis_name)[0]


def statistics(
    h: ArrayLike,
    w: ArrayLike,
    tokens: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    transposed: bool = False,
    axis_name: str | None = None,
) -> TokenStatistics:
    """As `token_log_probs`, with the entropy and the log-normaliser from the same pass; all three are differentiable, in the same products.

    H = log Z - sum_v p_v z_v; its gradient with respect to a logit is -p_v (log p_v + H).

    Args:
      h: [... d] hidden states.
      w: [d v] unembedding; [v d] if `transposed`.
      tokens: [...] integer ids.
      bias: [v] or None.
      softcap: Final soft-capping, or None. Static.
      temperature: [] > 0. Traced. Entropy and log-normaliser are those of the tempered distribution.
      vocab_chunk: As in `token_log_probs`. Static.
      token_chunk: As in `token_log_probs`. Static.
      transposed: As in `token_log_probs`. Static.
      axis_name: As in `token_log_probs`. Static.

    Returns:
      Log-probabilities, entropies and log-normalisers [...], float32 or wider. Where every token is forbidden: -inf, 0 and -inf.

    Raises:
      ValueError: as `token_log_probs`.
    """
    options = _Options(softcap, True, False, vocab_chunk, token_chunk, transposed)
    log_probs, normalizer, mean = _token_statistics("statistics", options, h, w, tokens, bias, temperature, axis_name)
    assert mean is not None
    nothing = jnp.isneginf(normalizer)
    entropy = jnp.where(nothing, jnp.zeros_like(mean), jnp.where(nothing, jnp.zeros_like(mean), normalizer) - mean)
    return TokenStatistics(log_probs=log_probs, entropy=entropy, logsumexp=normalizer)


def weighted_nll(
    h: ArrayLike,
    w: ArrayLike,
    tokens: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    transposed: bool = False,
    axis_name: str | None = None,
) -> jax.Array:
    """The weighted negative log-likelihood -sum_n weights_n log p(y_n), whose gradients are made along with the value.

    As the weights are known beforehand, each chunk of tokens is differentiated at once, while its logits are there: 3 products instead of
    the 4 of `token_log_probs`. The price: the gradients of h and w wait, in memory, for the backward pass (w's in float32 at least while it
    is summed), and w's is read and written once per chunk of tokens. With tokens sharded under `jit` it is also summed over devices once
    per chunk: there `token_log_probs`, or this function inside `jax.shard_map`, communicates less.

    Without differentiation nothing but the value is computed.

    Args:
      h: [... d] hidden states.
      w: [d v] unembedding; [v d] if `transposed`.
      tokens: [...] integer ids, already shifted.
      weights: [...] one per token; where it is 0 the token does not matter. For a mean over a mask: mask / max(sum(mask), 1).
      bias: [v] or None.
      softcap: Final soft-capping, or None. Static.
      temperature: [] > 0. Traced.
      vocab_chunk: Columns of w's gradient added at a time. Static.
      token_chunk: Tokens per chunk, whose logits [token_chunk v] are held: an eighth, between 256 and 1024, if None. Static.
      transposed: As in `token_log_probs`. Static.
      axis_name: As in `token_log_probs`. Static.

    Returns:
      [] in nats, float32 or wider; inf if a token of non-zero weight is forbidden or outside the vocabulary (such tokens give no gradient).

    Raises:
      ValueError: as `token_log_probs`.

    Reference: gradients within the forward pass as in Hsu et al., arXiv:2410.10989 (Liger kernels).
    """
    name = "weighted_nll"
    options = _Options(softcap, False, False, vocab_chunk, token_chunk, transposed)
    check_shapes(name, tokens=(tokens, "..."), weights=(weights, "..."))
    *arrays, _ = _prepare(name, options, h, w, bias, tokens, temperature)
    each = jnp.asarray(weights).astype(_float(*arrays[:2])).reshape(-1)
    # What belongs to a token is the same on all shards of the vocabulary, and so is the gradient with respect to its weight.
    each = _vary(each, frozenset[str]().union(*map(_varying, jax.tree.leaves(arrays))) - {axis_name})
    hidden, head, offsets, ids, heat, _ = _agree(name, axis_name, (*arrays, each))
    return _nll(options, axis_name, hidden, head, offsets, _localise(ids, head.shape[options.axis], axis_name), each, heat)


def top_k(
    h: ArrayLike,
    w: ArrayLike,
    k: int,
    *,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    transposed: bool = False,
    axis_name: str | None = None,
) -> TopK:
    """The k likeliest tokens at each position, merged over chunks of the vocabulary. Not differentiated: see `token_log_probs` for that.

    On a mesh under `jit`, a backend whose compiler does not partition top-k (the CPU's) gathers each chunk of logits, though never `w`; inside
    `jax.shard_map` with `axis_name` only the candidates travel.

    Args:
      h: [... d] hidden states.
      w: [d v] unembedding; [v d] if `transposed`; with `axis_name`, this device's part.
      k: Number of tokens, between 1 and v. Static.
      bias: [v] or None.
      softcap: Final soft-capping, or None. Static.
      temperature: [] > 0. Traced.
      vocab_chunk: As in `token_log_probs`. Static.
      token_chunk: As in `token_log_probs`. Static.
      transposed: As in `token_log_probs`. Static.
      axis_name: As in `token_log_probs`. Static.

    Returns:
      Log-probabilities (float32 or wider) and ids (int32) [... k], in order; of equal ones the lower id first.

    Raises:
      ValueError: as `token_log_probs`, and if k is not between 1 and v.
    """
    options = _Options(softcap, False, False, vocab_chunk, token_chunk, transposed)
    *arrays, leading = _prepare("top_k", options, h, w, bias, None, temperature)
    v = jnp.shape(w)[options.axis] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    if not 1 <= k <= v:
        raise ValueError(f"top_k: 'k' is {k}, expected 1 to v={v}")
    hidden, head, offsets, _, heat = jax.lax.stop_gradient(_agree("top_k", axis_name, tuple(arrays)))
    log_probs, tokens = _top_k(options, k, axis_name, hidden, head, offsets, heat)
    return TopK(log_probs=log_probs.reshape(*leading, k), tokens=tokens.reshape(*leading, k))


# --- arguments


class _Options(NamedTuple):
    """The static arguments. `with_mean`: also sum_v p_v z_v, for the entropy."""

    softcap: float | None
    with_mean: bool
    keep_expectation: bool
    vocab_chunk: int | None
    token_chunk: int | None
    transposed: bool

    @property
    def axis(self) -> int:
        """Which axis of w is the vocabulary."""
        return 0 if self.transposed else 1


def _float(*arrays: jax.Array) -> Any:
    """The dtype to accumulate in: float64 if any is, else float32."""
    wide = any(dtypes.floor_dtype(x.dtype) == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def _prepare(name: str, options: _Options, h: Any, w: Any, bias: Any, tokens: Any, temperature: Any) -> tuple[Any, ...]:
    """Checked: h [n d] and w [d v] or [v d] of one dtype, bias [v] or None, int32 tokens [n] or None, temperature [], and the leading axes of h."""
    axes = check_shapes(
        name,
        h=(h, "... d"),
        w=(w, "v d" if options.transposed else "d v"),
        tokens=(tokens, "..."),
        bias=(bias, "v"),
        temperature=(temperature, ""),
    )
    for argument, value in (("vocab_chunk", options.vocab_chunk), ("token_chunk", options.token_chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {argument!r} is {value}, expected at least 1")
    if options.softcap is not None and not options.softcap > 0:
        raise ValueError(f"{name}: 'softcap' is {options.softcap}, expected a positive number or None")
    if axes["v"] == 0:
        raise ValueError(f"{name}: 'w' has shape {jnp.shape(w)}, expected at least one token")
    h, w = jnp.asarray(h), jnp.asarray(w)
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (h, w)):
        raise ValueError(f"{name}: 'h' and 'w' have dtypes {h.dtype.name} and {w.dtype.name}, expected floating-point arrays")
    if h.dtype != w.dtype:
        h, w = h.astype(_float(h, w)), w.astype(_float(h, w))
    if bias is not None and not jnp.issubdtype(jnp.result_type(bias), jnp.floating):
        bias = dtypes.at_least_float32(bias)
    bias = None if bias is None else jnp.asarray(bias)
    if tokens is not None:
        require_integers(name, tokens=tokens)
        tokens = jnp.asarray(tokens).astype(jnp.int32).reshape(-1)
    return h.reshape(-1, axes["d"]), w, bias, tokens, jnp.asarray(temperature).astype(_float(h, w)), h.shape[:-1]


def _varying(x: Any) -> frozenset[str]:
    """The mesh axes over which a value inside `jax.shard_map` differs between devices (the attribute's place depends on the version)."""
    kind = jax.typeof(x)
    return frozenset(getattr(getattr(kind, "mat", None), "varying", None) or getattr(kind, "vma", ()))


def _agree(name: str, axis_name: str | None, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inside `shard_map`, makes all arrays differ over the same mesh axes; the transpose of that is the sum over devices of a gradient."""
    axes = frozenset[str]().union(*(_varying(x) for x in jax.tree.leaves(arrays)))
    arrays = jax.tree.map(lambda x: _vary(x, axes | ({axis_name} if axis_name else set())), arrays)
    if axis_name is not None and axis_name not in _varying(arrays[0]):
        raise ValueError(f"{name}: 'axis_name' is {axis_name!r}, expected an axis of a surrounding jax.shard_map with check_vma=True")
    return arrays


def _vary(x: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - _varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _localise(tokens: jax.Array, v: int, axis_name: str | None) -> jax.Array:
    """Ids counted from the first token of this device's part of the vocabulary, of length v."""
    return tokens if axis_name is None else tokens - jax.lax.axis_index(axis_name).astype(jnp.int32) * v


# --- chunks


class _Chunks(NamedTuple):
    """An axis of groups x inner entries, walked in `count` steps; a step takes one window of the inner axis in every group.

    The last window is moved back to end with the axis, so it may repeat entries (`fresh` tells). A mesh axis whose length divides `groups`
    shards every step evenly.
    """

    groups: int
    inner: int
    width: int
    count: int

    @classmethod
    def of(cls, size: int, target: int, groups: int, multiple: int) -> "_Chunks":
        groups, target = math.gcd(size, groups) if size else 1, max(target, 1)
        while groups > target:
            groups = groups // next(p for p in range(2, groups + 1) if groups % p == 0)
        inner = size // groups
        width = max(target // groups, 1)
        width = min(-(-width // multiple) * multiple if width >= multiple else width, inner)
        return cls(groups, inner, width, max(-(-inner // width), 1) if width else 1)

    @property
    def overlaps(self) -> bool:
        return self.count * self.width != self.inner

    def start(self, step: Any) -> jax.Array:
        return jnp.minimum(step * self.width, self.inner - self.width)

    def split(self, x: jax.Array, axis: int) -> jax.Array:
        """[... size ...] as [... groups inner ...]."""
        return x.reshape(*x.shape[:axis], self.groups, self.inner, *x.shape[axis + 1 :])

    def window(self, x: jax.Array, step: Any, axis: int) -> jax.Array:
        """[... groups inner ...] -> [... groups width ...]; `axis` is that of the groups."""
        return x if self.count == 1 else jax.lax.dynamic_slice_in_dim(x, self.start(step), self.width, axis + 1)

    def put(self, x: jax.Array, new: jax.Array, step: Any, axis: int) -> jax.Array:
        return new if self.count == 1 else jax.lax.dynamic_update_slice_in_dim(x, new, self.start(step), axis + 1)

    def ids(self, step: Any) -> jax.Array:
        """[groups width] positions on the whole axis."""
        grid = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (self.groups, self.width))
        return grid(0) * self.inner + grid(1) + self.start(step)

    def fresh(self, step: Any) -> jax.Array:
        """[groups width] whether no earlier step had the entry."""
        return jax.lax.broadcasted_iota(jnp.int32, (self.groups, self.width), 1) + self.start(step) >= step * self.width

    def loop(self, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """carry <- body(carry, step) over all steps."""
        if self.count == 1:
            return body(carry, jnp.int32(0))
        return jax.lax.scan(lambda carry, step: (body(carry, step), None), carry, jnp.arange(self.count, dtype=jnp.int32))[0]


def _vocab_chunks(options: _Options, v: int) -> _Chunks:
    target = options.vocab_chunk or min(max(v // 32, 1024), 2048)
    return _Chunks.of(v, min(target, v), _GROUPS, _LANES)


def _token_chunks(n: int, target: int | None) -> _Chunks:
    target = target or (1024 if n <= 8192 else n)
    return _Chunks.of(n, min(target, n), _TOKEN_GROUPS, 1)


def _rows(chunks: _Chunks, arrays: Any, step: Any) -> Any:
    """The tokens of a step, [n ...] -> [m ...]."""
    if chunks.count == 1:
        return arrays

    def pick(x: jax.Array) -> jax.Array:
        window = chunks.window(chunks.split(x, 0), step, 0)
        return window.reshape(-1, *x.shape[1:])

    return jax.tree.map(pick, arrays)


def _put_rows(chunks: _Chunks, arrays: Any, new: Any, step: Any) -> Any:
    if chunks.count == 1:
        return new

    def put(x: jax.Array, y: jax.Array) -> jax.Array:
        y = y.reshape(chunks.groups, chunks.width, *x.shape[1:])
        return chunks.put(chunks.split(x, 0), y, step, 0).reshape(x.shape)

    return jax.tree.map(put, arrays, new)


def _dot(a: jax.Array, b: jax.Array, axes: Sequence[Sequence[int]], like: jax.Array | None = None) -> jax.Array:
    """Contraction accumulated in float32 or wider. `like`: where axes are explicit, the result is placed as this array."""
    placement = None if like is None else jax.typeof(like).sharding
    if placement is not None and AxisType.Explicit not in placement.mesh.axis_types:
        placement = None
    dimensions = ((tuple(axes[0]), tuple(axes[1])), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=_float(a, b), out_sharding=placement)


def _placed(x: jax.Array, like: jax.Array) -> jax.Array:
    """Where axes are explicit, gives the axes of `x` that have the lengths of those of `like` their placement."""
    placement = jax.typeof(like).sharding
    if AxisType.Explicit not in placement.mesh.axis_types:
        return x
    return jax.sharding.reshard(x, jax.P(*(axis if n == m else None for axis, n, m in zip(placement.spec, x.shape, like.shape))))


# --- one chunk of logits


class _Tile(NamedTuple):
    """The logits of some tokens over one chunk of the vocabulary.

    Attributes:
      z: [m g c] logits; -inf where forbidden or already seen in an earlier chunk.
      slope: [m g c] or [], dz / d(h w).
      chosen: [m g c] where the token given is.
    """

    z: jax.Array
    slope: jax.Array
    chosen: jax.Array

    @property
    def finite(self) -> jax.Array:
        """z with 0 for -inf, to be multiplied by a probability of 0."""
        return jnp.where(jnp.isneginf(self.z), jnp.zeros_like(self.z), self.z)


class _Vocabulary(NamedTuple):
    """The unembedding in the form in which chunks are taken: w [d g r], or [g r d], bias [g r] or None, temperature []."""

    chunks: _Chunks
    axis: int
    w: jax.Array
    bias: jax.Array | None
    temperature: jax.Array

    @classmethod
    def of(cls, options: _Options, w: jax.Array, bias: jax.Array | None, temperature: jax.Array) -> "_Vocabulary":
        chunks = _vocab_chunks(options, w.shape[options.axis])
        return cls(chunks, options.axis, chunks.split(w, options.axis), None if bias is None else chunks.split(bias, 0), temperature)

    def window(self, step: Any) -> tuple[jax.Array, jax.Array | None]:
        """w [d g c] or [g c d] and bias [g c] of a step."""
        return self.chunks.window(self.w, step, self.axis), None if self.bias is None else self.chunks.window(self.bias, step, 0)

    def logits(self, h: jax.Array, w: jax.Array) -> jax.Array:
        """h w [m g c] of a window, or of all of w."""
        return _dot(h, w, ((1,), (0 if self.axis else 2,)))

    def back(self, dx: jax.Array, w: jax.Array, like: jax.Array) -> jax.Array:
        """sum_v dx_v w_v [m d] over a window."""
        return _dot(dx.astype(w.dtype), w, ((1, 2), (1, 2) if self.axis else (0, 1)), like=like)

    def rows(self, w: jax.Array) -> jax.Array:
        """A window as [g c d]."""
        return jnp.transpose(w, (1, 2, 0)) if self.axis else w

    def add(self, sums: jax.Array, rows: jax.Array, step: Any, *, add: bool) -> jax.Array:
        """Writes or adds the gradient of a window [g c d] to that of w."""
        return _accumulate(self.chunks, sums, jnp.transpose(rows, (2, 0, 1)) if self.axis else rows, step, self.axis, add=add)

    def tile(self, softcap: float | None, h: jax.Array, tokens: jax.Array, window: tuple[jax.Array, jax.Array | None], step: Any) -> _Tile:
        return self.tile_of(softcap, self.logits(h, window[0]), tokens, window[1], step)

    def tile_of(self, softcap: float | None, x: jax.Array, tokens: jax.Array, bias: jax.Array | None, step: Any) -> _Tile:
        """The tile with h w = x [m g c] and bias [g c]."""
        barrier = None  # [g c] -inf where there is nothing to be counted, else 0: added, so that its placement need not be that of x
        if bias is not None:
            bias = bias.astype(x.dtype)
            barrier = jnp.where(jnp.isneginf(bias), bias, jnp.zeros_like(bias))
            x = x + jnp.where(jnp.isneginf(bias), jnp.zeros_like(bias), bias)[None]
        slope = 1 / self.temperature
        if softcap is not None:
            bounded = jnp.tanh(x / softcap)
            x, slope = softcap * bounded, (1 - bounded * bounded) * slope
        z = x / self.temperature
        ids = self.chunks.ids(step)
        if self.chunks.overlaps:
            fresh = self.chunks.fresh(step)
            ids = jnp.where(fresh, ids, jnp.full_like(ids, jnp.iinfo(ids.dtype).min))
            seen = jnp.where(fresh, jnp.zeros_like(ids, dtype=z.dtype), -jnp.inf)
            barrier = seen if barrier is None else barrier + seen
        if barrier is not None:
            z = z + barrier[None]
        return _Tile(z, slope, _placed(ids[None], z) == tokens[:, None, None])


class _Running(NamedTuple):
    """Sums over the chunks so far, relative to the largest logit: what a fused function folds over the vocabulary.

    Attributes:
      largest: [m] maximum of the logits, -inf at first.
      total: [m] sum exp(z - largest).
      target: [m] logit of the token given, 0 until it is met.
      first: [m] sum exp(z - largest) z, or None.
      expectation: [m d] sum exp(z - largest) slope w, or None.
    """

    largest: jax.Array
    total: jax.Array
    target: jax.Array
    first: jax.Array | None
    expectation: jax.Array | None

    @property
    def logsumexp(self) -> jax.Array:
        nothing = self.total == 0
        return jnp.where(nothing, -jnp.inf, self.largest + jnp.log(jnp.where(nothing, jnp.ones_like(self.total), self.total)))

    def mean(self, sums: jax.Array) -> jax.Array:
        """A weighted sum divided by the total; 0 where everything is forbidden."""
        total = jnp.where(self.total == 0, jnp.ones_like(self.total), self.total)
        return sums / total.reshape(-1, *(1,) * (sums.ndim - 1))


def _start(zero: jax.Array, *, first: bool = False, expectation: jax.Array | None = None) -> _Running:
    return _Running(jnp.full_like(zero, -jnp.inf), zero, zero, zero if first else None, expectation)


def _fold(running: _Running, tile: _Tile, vocabulary: _Vocabulary, w: jax.Array) -> _Running:
    largest = jnp.maximum(running.largest, jnp.max(tile.z, axis=(1, 2)))
    base = jnp.where(jnp.isneginf(largest), jnp.zeros_like(largest), largest)
    scale, weight = jnp.exp(running.largest - base), jnp.exp(tile.z - base[:, None, None])
    first, expectation = running.first, running.expectation
    if first is not None:
        first = first * scale + jnp.sum(weight * tile.finite, axis=(1, 2))
    if expectation is not None:
        expectation = expectation * scale[:, None] + vocabulary.back(weight * tile.slope, w, expectation)
    return _Running(
        largest=largest,
        total=running.total * scale + jnp.sum(weight, axis=(1, 2)),
        target=running.target + jnp.sum(jnp.where(tile.chosen, tile.z, jnp.zeros_like(tile.z)), axis=(1, 2)),
        first=first,
        expectation=expectation,
    )


def _walk(options: _Options, h: jax.Array, tokens: jax.Array, vocabulary: _Vocabulary, *, expectation: bool = False) -> _Running:
    """Folds all chunks of the vocabulary for some tokens, h [m d]."""
    zero = jnp.zeros_like(tokens, dtype=_float(h, vocabulary.w))
    start = _start(zero, first=options.with_mean, expectation=jnp.zeros_like(h, dtype=zero.dtype) if expectation else None)

    def body(running: _Running, step: Any) -> _Running:
        window = vocabulary.window(step)
        return _fold(running, vocabulary.tile(options.softcap, h, tokens, window, step), vocabulary, window[0])

    return vocabulary.chunks.loop(body, start)


# --- any cotangent per token


def _token_statistics(
    name: str, options: _Options, h: Any, w: Any, tokens: Any, bias: Any, temperature: Any, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Log-probabilities, log-normalisers and mean logits (None without `with_mean`), [...]."""
    *arrays, leading = _prepare(name, options, h, w, bias, tokens, temperature)
    h, w, bias, tokens, temperature = _agree(name, axis_name, tuple(arrays))
    local = _localise(tokens, w.shape[options.axis], axis_name)
    target, normalizer, mean = cast(tuple[Any, Any, Any], _statistics(options, h, w, bias, local, temperature))
    log_probs, normalizer, mean, _ = _finish(axis_name, w.shape[options.axis], local, target, normalizer, mean)
    return log_probs.reshape(leading), normalizer.reshape(leading), None if mean is None else mean.reshape(leading)


def _over_shards(axis_name: str, normalizer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log-normaliser of the whole vocabulary, and the probability of this device's part. Plain operations, with their derivatives."""
    largest = jax.lax.pmax(jax.lax.stop_gradient(normalizer), axis_name)
    base = jnp.where(jnp.isneginf(largest), jnp.zeros_like(largest), largest)
    empty = jnp.isneginf(normalizer)
    share = jnp.exp(jnp.where(empty, jnp.zeros_like(normalizer), normalizer - base))
    share = jnp.where(empty, jnp.zeros_like(share), share)
    total = jax.lax.psum(share, axis_name)
    nothing = total == 0
    total = jnp.where(nothing, jnp.ones_like(total), total)
    return jnp.where(nothing, -jnp.inf, base + jnp.log(total)), share / total


def _finish(
    axis_name: str | None, v: int, tokens: jax.Array, target: jax.Array, normalizer: jax.Array, mean: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """(log-probabilities, log-normaliser, mean logit, whether the token is possible) [m] of the whole vocabulary from the v tokens at hand."""
    found = (tokens >= 0) & (tokens < v)
    zero = jnp.zeros_like(target)
    if axis_name is not None:
        target = jax.lax.psum(jnp.where(found, target, zero), axis_name)
        found = jax.lax.psum(found.astype(jnp.int32), axis_name) > 0
        normalizer, share = _over_shards(axis_name, normalizer)
        mean = None if mean is None else jax.lax.psum(share * mean, axis_name)
        zero = jnp.zeros_like(target)
    possible = found & ~jnp.isneginf(target)
    log_probs = jnp.where(possible, target, zero) - jnp.where(possible, normalizer, zero)
    return jnp.where(possible, log_probs, -jnp.inf), normalizer, mean, possible


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(options: _Options, h: Any, w: Any, bias: Any, tokens: Any, temperature: Any) -> tuple[Any, Any, Any]:
    """(target, logsumexp, mean) [n] of the vocabulary at hand; h [n d], w [d v] or [v d], tokens [n] (ids elsewhere give target 0)."""
    return _statistics_forward(options, h, w, bias, tokens, temperature)[0]


def _statistics_forward(
    options: _Options, h: Any, w: Any, bias: Any, tokens: Any, temperature: Any, *, expectation: bool = False
) -> tuple[tuple[Any, Any, Any], Any]:
    vocabulary = _Vocabulary.of(options, w, bias, temperature)
    chunks = _token_chunks(h.shape[0], options.token_chunk)

    def some(h: jax.Array, tokens: jax.Array) -> tuple[Any, ...]:
        running = _walk(options, h, tokens, vocabulary, expectation=expectation)
        mean, expected = (None if x is None else running.mean(x) for x in (running.first, running.expectation))
        return running.target, running.logsumexp, mean, expected

    zero = jnp.zeros_like(tokens, dtype=_float(h, w))
    out = (zero, zero, zero if options.with_mean else None, jnp.zeros_like(h, dtype=zero.dtype) if expectation else None)
    out = chunks.loop(lambda out, step: _put_rows(chunks, out, some(*_rows(chunks, (h, tokens), step)), step), out)
    return out[:3], out[3]


def _statistics_fwd(options: _Options, h: Any, w: Any, bias: Any, tokens: Any, temperature: Any) -> tuple[Any, Any]:
    keep = options.keep_expectation and not options.with_mean
    out, expected = _statistics_forward(options, h, w, bias, tokens, temperature, expectation=keep)
    return out, (h, w, bias, tokens, temperature, out, expected)


class _Sums(NamedTuple):
    """Gradients being summed: h [n d] or None, w as the vocabulary holds it, or [g c d] of one chunk, bias [g r] or None, temperature []."""

    h: Any
    w: jax.Array
    bias: Any
    temperature: jax.Array


def _statistics_bwd(options: _Options, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    h, w, bias, tokens, temperature, (target, normalizer, mean), expected = residuals
    to_target, to_normalizer, _ = cotangents
    dtype = normalizer.dtype
    vocabulary = _Vocabulary.of(options, w, bias, temperature)
    vocab = vocabulary.chunks
    chunks = _token_chunks(h.shape[0], options.token_chunk)
    base = jnp.where(jnp.isneginf(normalizer), jnp.zeros_like(normalizer), normalizer)

    def column(x: jax.Array) -> jax.Array:
        return x[:, None, None]

    def pull(rows: Any, window: Any, step: Any) -> tuple[jax.Array, jax.Array]:
        """(gradient of the tile's h w [m g c], its part of -temperature times the temperature's gradient [])."""
        h, tokens, base, mean, to_target, to_normalizer, to_mean = rows
        tile = vocabulary.tile(options.softcap, h, tokens, window, step)
        p = jnp.exp(tile.z - column(base))
        factor = column(to_normalizer)
        if mean is not None:
            factor = factor + column(to_mean) * (1 + tile.finite - column(mean))
        dz = p * factor + tile.chosen.astype(dtype) * column(to_target)
        return jnp.where(jnp.isneginf(tile.z), jnp.zeros_like(dz), dz) * tile.slope, jnp.sum(dz * tile.finite)

    def body(sums: _Sums, step: Any) -> _Sums:
        window: Any = vocabulary.window(step)

        def some(inner: _Sums, token_step: Any) -> _Sums:
            part, ids, row_base, row_mean, row_cotangents = _rows(chunks, (h, tokens, base, mean, cotangents), token_step)
            if chunks.overlaps:  # rows met before have had their say
                fresh = chunks.fresh(token_step).reshape(-1).astype(dtype)
                row_cotangents = jax.tree.map(lambda x: x * fresh, row_cotangents)
            dx, temper = pull((part, ids, row_base, row_mean, *row_cotangents), window, step)
            to_h = inner.h
            if to_h is not None:
                old = _rows(chunks, to_h, token_step)
                to_h = _put_rows(chunks, to_h, old + vocabulary.back(dx, window[0], old), token_step)
            return _Sums(
                h=to_h,
                w=inner.w + _dot(dx.astype(h.dtype), part, ((0,), (0,)), like=inner.w),
                bias=None if inner.bias is None else inner.bias + jnp.sum(dx, axis=0),
                temperature=inner.temperature + temper,
            )

        wide = functools.partial(jnp.zeros_like, dtype=dtype)
        to_bias = None if bias is None else wide(window[1])
        chunk = chunks.loop(some, _Sums(sums.h, wide(vocabulary.rows(window[0])), to_bias, sums.temperature))
        return _Sums(
            h=chunk.h,
            w=vocabulary.add(sums.w, chunk.w, step, add=vocab.overlaps),
            bias=None if sums.bias is None else _accumulate(vocab, sums.bias, chunk.bias, step, 0, add=vocab.overlaps),
            temperature=chunk.temperature,
        )

    start = _Sums(
        h=jnp.zeros_like(h, dtype=dtype) if expected is None else None,
        w=jnp.zeros_like(vocabulary.w),
        bias=None if vocabulary.bias is None else jnp.zeros_like(vocabulary.bias),
        temperature=jnp.zeros_like(temperature),
    )
    sums = vocab.loop(body, start)
    to_h = sums.h
    if to_h is None:
        to_h = to_normalizer[:, None] * expected + to_target[:, None] * _chosen_rows(options, w, tokens, target, temperature)
    to_bias = None if sums.bias is None else sums.bias.reshape(-1)
    return to_h.astype(h.dtype), sums.w.reshape(w.shape), to_bias, None, -sums.temperature / temperature


def _accumulate(chunks: _Chunks, sums: jax.Array, new: Any, step: Any, axis: int, *, add: bool) -> jax.Array:
    """Writes the window of a step, or adds to it where windows overlap or are met more than once."""
    new = new.astype(sums.dtype)
    return chunks.put(sums, chunks.window(sums, step, axis) + new if add else new, step, axis)


def _chosen_rows(options: _Options, w: jax.Array, tokens: jax.Array, target: jax.Array, temperature: jax.Array) -> jax.Array:
    """[n d] derivative of the target logit with respect to h; 0 where the token is elsewhere."""
    found = (tokens >= 0) & (tokens < w.shape[options.axis])
    slope = 1 / temperature
    if options.softcap is not None:
        finite = jnp.where(jnp.isneginf(target), jnp.zeros_like(target), target)
        slope = (1 - jnp.square(finite * temperature / options.softcap)) * slope
    slope = jnp.where(found & ~jnp.isneginf(target), slope, jnp.zeros_like(target))
    placement = None
    if AxisType.Explicit in jax.typeof(w).sharding.mesh.axis_types:
        spec = jax.typeof(tokens).sharding.spec[0]
        placement = jax.P(spec, None) if options.transposed else jax.P(None, spec)
    index = jnp.where(found, tokens, jnp.zeros_like(tokens))
    rows = (w.at[index] if options.transposed else w.at[:, index]).get(mode="clip", out_sharding=placement)
    rows = rows if options.transposed else rows.T
    return slope[:, None] * rows.astype(target.dtype)


_statistics.defvjp(_statistics_fwd, _statistics_bwd)


# --- weights known beforehand


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nll(options: _Options, axis_name: str | None, h: Any, w: Any, bias: Any, tokens: Any, weights: Any, temperature: Any) -> jax.Array:
    (target, normalizer, _), _ = _statistics_forward(options, h, w, bias, tokens, temperature)
    return _loss(weights, _finish(axis_name, w.shape[options.axis], tokens, target, normalizer)[0])


def _loss(weights: jax.Array, log_probs: jax.Array) -> jax.Array:
    return -jnp.sum(weights * jnp.where(weights != 0, log_probs, jnp.zeros_like(log_probs)))


def _nll_fwd(
    options: _Options, axis_name: str | None, h: Any, w: Any, bias: Any, tokens: Any, weights: Any, temperature: Any
) -> tuple[jax.Array, Any]:
    n, dtype = h.shape[0], weights.dtype
    vocabulary = _Vocabulary.of(options, w, bias, temperature)
    vocab = vocabulary.chunks
    chunks = _token_chunks(n, options.token_chunk or min(max(n // 8, 256), 1024))

    def body(carry: tuple[_Sums, jax.Array], step: Any) -> tuple[_Sums, jax.Array]:
        sums, log_probs = carry
        part, ids, weight = _rows(chunks, (h, tokens, weights), step)
        if chunks.overlaps:
            weight = weight * chunks.fresh(step).reshape(-1).astype(dtype)
        x = vocabulary.logits(part, vocabulary.w)  # all that is as long as the vocabulary

        def tile_of(vocab_step: Any) -> tuple[_Tile, jax.Array]:
            window, bias_window = vocabulary.window(vocab_step)
            return vocabulary.tile_of(options.softcap, vocab.window(x, vocab_step, 1), ids, bias_window, vocab_step), window

        fold = lambda sums, tile, window: _fold(sums, tile, vocabulary, window)  # noqa: E731
        running = vocab.loop(lambda sums, vocab_step: fold(sums, *tile_of(vocab_step)), _start(jnp.zeros_like(ids, dtype=dtype)))
        log_p, normalizer, _, possible = _finish(axis_name, w.shape[options.axis], ids, running.target, running.logsumexp)
        weight = jnp.where(possible, weight, jnp.zeros_like(weight))[:, None, None]
        base = jnp.where(jnp.isneginf(normalizer), jnp.zeros_like(normalizer), normalizer)[:, None, None]

        def columns(sums: _Sums, vocab_step: Any) -> _Sums:
            tile, window = tile_of(vocab_step)
            dz = weight * (jnp.exp(tile.z - base) - tile.chosen.astype(dtype))
            dx = jnp.where(jnp.isneginf(tile.z), jnp.zeros_like(dz), dz * tile.slope)
            to_w = _dot(dx.astype(w.dtype), part, ((0,), (0,)), like=vocabulary.rows(window))
            return _Sums(
                h=sums.h + vocabulary.back(dx, window, sums.h),
                w=vocabulary.add(sums.w, to_w, vocab_step, add=True),
                bias=None if sums.bias is None else _accumulate(vocab, sums.bias, jnp.sum(dx, axis=0), vocab_step, 0, add=True),
                temperature=sums.temperature - jnp.sum(dz * tile.finite) / temperature,
            )

        old = _rows(chunks, sums.h, step)
        new = vocab.loop(columns, sums._replace(h=jnp.zeros_like(old)))
        # Rows met before have weight 0 now: their gradient is added, not written over.
        return new._replace(h=_put_rows(chunks, sums.h, old + new.h, step)), _put_rows(chunks, log_probs, log_p, step)

    start = _Sums(
        h=jnp.zeros_like(h, dtype=dtype),
        w=jnp.zeros_like(vocabulary.w, dtype=dtype),
        bias=None if vocabulary.bias is None else jnp.zeros_like(vocabulary.bias, dtype=dtype),
        temperature=jnp.zeros_like(temperature),
    )
    sums, log_probs = chunks.loop(body, (start, jnp.zeros_like(weights)))
    to_bias = None if bias is None or sums.bias is None else sums.bias.reshape(-1).astype(bias.dtype)
    gradients = (sums.h.astype(h.dtype), sums.w.reshape(w.shape).astype(w.dtype), to_bias, sums.temperature)
    return _loss(weights, log_probs), (gradients, log_probs)


def _nll_bwd(options: _Options, axis_name: str | None, residuals: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    del options, axis_name
    (to_h, to_w, to_bias, to_temperature), log_probs = residuals
    scale = lambda x: None if x is None else (cotangent * x.astype(cotangent.dtype)).astype(x.dtype)  # noqa: E731
    possible = ~jnp.isneginf(log_probs)
    to_weights = -cotangent * jnp.where(possible, log_probs, jnp.zeros_like(log_probs))
    return scale(to_h), scale(to_w), scale(to_bias), None, to_weights, scale(to_temperature)


_nll.defvjp(_nll_fwd, _nll_bwd)


# --- the likeliest tokens


class _Candidates(NamedTuple):
    """The best k' entries of each of the g groups so far, [m g k'], and the running normaliser."""

    values: jax.Array
    ids: jax.Array
    running: _Running


def _best(k: int, values: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The k largest along the last axis; of equal ones the earlier."""
    values, order = jax.lax.top_k(values, min(k, values.shape[-1]))
    return values, jnp.take_along_axis(ids, order, axis=-1)


def _top_k(options: _Options, k: int, axis_name: str | None, h: Any, w: Any, bias: Any, temperature: Any) -> tuple[jax.Array, jax.Array]:
    vocabulary = _Vocabulary.of(options, w, bias, temperature)
    vocab = vocabulary.chunks
    chunks = _token_chunks(h.shape[0], options.token_chunk)
    v = w.shape[options.axis]
    kept = min(k, vocab.inner)
    offset = jnp.int32(0) if axis_name is None else jax.lax.axis_index(axis_name).astype(jnp.int32) * v

    def some(h: jax.Array, nowhere: jax.Array) -> tuple[jax.Array, jax.Array]:
        def body(state: _Candidates, step: Any) -> _Candidates:
            window = vocabulary.window(step)
            tile = vocabulary.tile(options.softcap, h, nowhere, window, step)
            ids = _placed(jnp.broadcast_to(vocab.ids(step)[None], tile.z.shape), tile.z)
            values, ids = _best(kept, tile.z, ids)
            values, ids = (jnp.concatenate(pair, axis=-1) for pair in ((state.values, values), (state.ids, ids)))
            return _Candidates(*_best(kept, values, ids), _fold(state.running, tile, vocabulary, window[0]))

        zero = jnp.zeros_like(nowhere, dtype=_float(h, w))
        first = vocabulary.tile(options.softcap, h, nowhere, vocabulary.window(jnp.int32(0)), jnp.int32(0)).z[..., :1]
        empty = jnp.broadcast_to(jnp.full_like(first, -jnp.inf), (*first.shape[:-1], kept))
        state = vocab.loop(body, _Candidates(empty, jnp.full_like(empty, v, dtype=jnp.int32), _start(zero)))
        values, ids = (_whole(x, h) for x in (state.values, state.ids))
        values, ids = _best(k, values, ids + offset)
        normalizer = state.running.logsumexp
        if axis_name is not None:
            values, ids = (_gather(axis_name, x) for x in (values, ids))
            values, ids = _best(k, values, ids)
            normalizer, _ = _over_shards(axis_name, normalizer)
        base = jnp.where(jnp.isneginf(normalizer), jnp.zeros_like(normalizer), normalizer)
        return values - base[:, None], ids

    nowhere = jnp.full_like(h[:, 0], -1, dtype=jnp.int32)
    if chunks.count == 1:
        return some(h, nowhere)
    empty = jnp.broadcast_to(nowhere[:, None], (h.shape[0], k))
    out = (jnp.zeros_like(empty, dtype=_float(h, w)), jnp.zeros_like(empty))
    if axis_name is not None:  # the result is the same on all shards, and its buffer has to say so
        out = jax.tree.map(lambda x: jax.lax.pmax(x, axis_name), out)
    return chunks.loop(lambda out, step: _put_rows(chunks, out, some(*_rows(chunks, (h, nowhere), step)), step), out)


def _whole(x: jax.Array, like: jax.Array) -> jax.Array:
    """[m g k] -> [m (g k)], with the groups of all devices at hand."""
    placement = jax.typeof(x).sharding
    if AxisType.Explicit in placement.mesh.axis_types:
        x = jax.sharding.reshard(x, jax.P(jax.typeof(like).sharding.spec[0], None, None))
    return x.reshape(x.shape[0], -1)


def _gather(axis_name: str, x: jax.Array) -> jax.Array:
    """[m k] on each shard -> [m (shards k)] on all, known to be equal there."""
    mine = jnp.arange(jax.lax.axis_size(axis_name)) == jax.lax.axis_index(axis_name)
    spread = jnp.where(mine[None, :, None], x[:, None, :], jnp.zeros_like(x[:, None, :]))
    return jax.lax.psum(spread, axis_name).reshape(x.shape[0], -1)
