"""Divergences between a student's and a teacher's distributions, from the hidden states and unembeddings of both."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import divergence as exact
from janax.jaxlib_ext.checks import check_shapes, one_of, require_integers
from janax.jaxlib_ext.divergence import Generator
from janax.jaxlib_ext.fused import pairs, parts
from janax.jaxlib_ext.logprobs import TopK

__all__ = ["TokenDivergence", "divergence", "weighted_divergence"]


class TokenDivergence(NamedTuple):
    """How far the student is from the teacher at each position, and what it says about the token there.

    Attributes:
      values: [...] divergence in nats.
      log_probs: [...] log-probability of the label under the student at temperature 1; None without labels.
    """

    values: jax.Array
    log_probs: jax.Array | None


def divergence(
    kind: str | Generator,
    h: ArrayLike,
    w: ArrayLike,
    teacher_h: ArrayLike | None = None,
    teacher_w: ArrayLike | None = None,
    *,
    teacher_top_k: TopK | None = None,
    alpha: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    mask: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    transposed: bool = False,
    teacher_transposed: bool = False,
    axis_name: str | None = None,
    kernel: str | None = None,
) -> TokenDivergence:
    """Any of the exact divergences, token by token: `divergence.per_token` of z = cap(h w + bias) and the teacher's, without [tokens, vocabulary].

    Differentiable in h, w and bias (reverse mode, once) with any cotangent per token; with respect to a logit of the student the gradient is
    p_v (f'(u_v) - sum p f'(u)) / temperature. All else, the teacher first of all, is a constant. Costs 2 products of tokens x width x
    vocabulary forward and 4 backward: where the cotangents are known beforehand `weighted_divergence` needs 4 in all.

    Args:
      kind: One of `divergence.NAMES`, or a generator. Static (a generator's parameters are traced). With `teacher_top_k`, one that is an
        f-divergence: all names but "renyi" and "adaptive_kl".
      h: [... d] the student's hidden states.
      w: [d v] its unembedding; [v d] if `transposed`.
      teacher_h: [... e] the teacher's hidden states at the same positions; another width is welcome.
      teacher_w: [e v] its unembedding, over the same vocabulary; [v e] if `teacher_transposed`.
      teacher_top_k: Instead of the two above, log-probabilities [... k] of k different tokens [... k] under the teacher, normalised over the
        whole vocabulary at the temperature that is used here; the rest is one bucket, see `divergence.from_support`.
      alpha: [] for the kinds that take it, as in `divergence.per_token`. Traced.
      beta: [] for js, 1/2 if None. Traced.
      temperature: [] > 0, divides the capped logits of both in the divergence. Traced.
      mask: [...] non-zero where a token counts. Elsewhere values are 0, with zero gradients, whatever the hidden states are.
      labels: [...] ids of tokens whose log-probabilities are wanted too.
      bias: [v] added to h w; -inf forbids a token.
      teacher_bias: [v] the same for the teacher.
      softcap: c in cap(x) = c tanh(x / c); None for none. Static.
      teacher_softcap: The same for the teacher. Static.
      vocab_chunk: Vocabulary entries handled at a time, about; chosen from the shapes if None. Static.
      token_chunk: Tokens per chunk, of which both logits [token_chunk v] are held: an eighth, between 256 and 1024, if None. Static.
      transposed: `w` is [v d]. Static.
      teacher_transposed: `teacher_w` is [v e]. Static.
      axis_name: Inside `jax.shard_map`, the mesh axis over which the vocabulary of both unembeddings and biases is sharded; numbers per token
        travel, nothing else. Static.
      kernel: "tpu" or "gpu" makes all that is as long as the vocabulary, the products apart, in one kernel of
        `kernels.divergence` on each device: for f-divergences in float32, on one device or inside `jax.shard_map`, without `axis_name`.
        None leaves it to the compiler; "interpret" runs the TPU kernel on CPU. Static.

    Returns:
      Values, and log-probabilities of the labels, float32 or wider. Extremes as in `divergence`.

    Raises:
      ValueError: if shapes disagree, a static argument is out of range, the kind is unknown or lacks its parameter, the teacher is given
        twice or not at all, the kind is "adaptive_kl", which sorts the vocabulary, and the vocabulary is sharded, or `kernel` is used
        where there is none.

    Reference: chunks of tokens as in Hsu et al., arXiv:2410.10989 (Liger kernels), here for the whole family, exact, and sharded.
    """
    name = "divergence"
    what, arrays, leading = _prepare(
        name, kind, h, w, teacher_h, teacher_w, teacher_top_k, alpha, beta, temperature, labels, bias, teacher_bias,
        pairs.Options(softcap, teacher_softcap, transposed, teacher_transposed, vocab_chunk, token_chunk, axis_name, kernel),
    )  # fmt: skip
    check_shapes(name, h=(h, "... d"), mask=(mask, "..."))
    keep = jnp.ones(leading, bool) if mask is None else jnp.asarray(mask).astype(bool)
    arrays = _agree(name, axis_name, arrays._replace(h=_kept(arrays.h, keep), teacher_h=_kept(arrays.teacher_h, keep)))
    out: Any = _divergence(what, arrays.h, arrays.w, arrays.bias, arrays._replace(h=None, w=None, bias=None))
    values, log_probs = (jnp.where(keep, x.reshape(leading), jnp.zeros_like(x, shape=leading)) for x in out)
    return TokenDivergence(values, None if labels is None else log_probs)


def weighted_divergence(
    kind: str | Generator,
    h: ArrayLike,
    w: ArrayLike,
    teacher_h: ArrayLike | None,
    teacher_w: ArrayLike | None,
    weights: ArrayLike,
    *,
    teacher_top_k: TopK | None = None,
    alpha: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    labels: ArrayLike | None = None,
    label_weights: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    transposed: bool = False,
    teacher_transposed: bool = False,
    axis_name: str | None = None,
    kernel: str | None = None,
) -> jax.Array:
    """sum_n weights_n D_n - sum_n label_weights_n log p(labels_n), whose gradients are made along with the value, in 4 products.

    Each chunk of tokens is differentiated while its logits are there. The price: the gradients of h and w wait, in memory, for the backward
    pass. Without differentiation nothing but the value is computed (2 products).

    Args:
      kind: As in `divergence`.
      h: [... d] the student's hidden states.
      w: [d v] its unembedding; [v d] if `transposed`.
      teacher_h: [... e] the teacher's hidden states, or None.
      teacher_w: [e v] its unembedding; [v e] if `teacher_transposed`; or None.
      weights: [...] one per token; where it is 0 (and the label's, too) the token does not matter. For a mean over a mask:
        mask / max(sum(mask), 1). The factor temperature^2 that keeps the size of gradients belongs here.
      teacher_top_k: As in `divergence`.
      alpha: As in `divergence`.
      beta: As in `divergence`.
      temperature: [] > 0, in the divergence; the labels are at temperature 1.
      labels: [...] ids, already shifted; with `label_weights`.
      label_weights: [...] one per token.
      bias: [v] or None.
      teacher_bias: [v] or None.
      softcap: Final soft-capping, or None. Static.
      teacher_softcap: The teacher's. Static.
      vocab_chunk: As in `divergence`. Static.
      token_chunk: As in `divergence`. Static.
      transposed: As in `divergence`. Static.
      teacher_transposed: As in `divergence`. Static.
      axis_name: As in `divergence`. Static.
      kernel: As in `divergence`. Static.

    Returns:
      [] in nats, float32 or wider; inf if a label of non-zero weight is forbidden or outside the vocabulary (such labels give no gradient).
      Differentiable in h, w, bias and both weights.

    Raises:
      ValueError: as `divergence`, and if one of `labels` and `label_weights` is given without the other.
    """
    name = "weighted_divergence"
    if (labels is None) != (label_weights is None):
        raise ValueError(f"{name}: 'labels' and 'label_weights' belong together, expected both or none")
    what, arrays, _ = _prepare(
        name, kind, h, w, teacher_h, teacher_w, teacher_top_k, alpha, beta, temperature, labels, bias, teacher_bias,
        pairs.Options(softcap, teacher_softcap, transposed, teacher_transposed, vocab_chunk, token_chunk, axis_name, kernel),
    )  # fmt: skip
    check_shapes(name, h=(h, "... d"), weights=(weights, "..."), label_weights=(label_weights, "..."))
    each, of_label = (None if x is None else jnp.asarray(x).astype(arrays.dtype).reshape(-1) for x in (weights, label_weights))
    assert each is not None
    keep = each != 0 if of_label is None else (each != 0) | (of_label != 0)
    arrays = arrays._replace(h=_kept(arrays.h, keep), teacher_h=_kept(arrays.teacher_h, keep))
    # What belongs to a token is the same on all shards of the vocabulary, and so is the gradient with respect to its weight.
    axes = frozenset[str]().union(*map(parts.varying, jax.tree.leaves(arrays))) - {axis_name}
    each, of_label = (None if x is None else parts.vary(x, axes) for x in (each, of_label))
    arrays = _agree(name, axis_name, arrays)
    return _weighted(what, arrays.h, arrays.w, arrays.bias, each, of_label, arrays._replace(h=None, w=None, bias=None))


# --- arguments


def _prepare(
    name: str, kind: Any, h: Any, w: Any, teacher_h: Any, teacher_w: Any, top_k: TopK | None, alpha: Any, beta: Any, temperature: Any,
    labels: Any, bias: Any, teacher_bias: Any, options: pairs.Options,
) -> tuple[pairs.What, pairs.Arrays, tuple[int, ...]]:  # fmt: skip
    whole = (teacher_h is not None, teacher_w is not None)
    if any(whole) != all(whole) or all(whole) == (top_k is not None):
        raise ValueError(f"{name}: expected either 'teacher_h' and 'teacher_w', or 'teacher_top_k'")
    rule, generator, alpha = exact.resolve(name, kind, alpha=alpha, beta=beta)
    if top_k is not None and rule != "f":
        raise ValueError(f"{name}: 'kind' is {kind!r}, expected an f-divergence where the teacher is given by 'teacher_top_k'")
    if rule == "adaptive" and options.axis_name is not None:
        raise ValueError(f"{name}: 'kind' is {kind!r}, which sorts the vocabulary: expected another one where 'axis_name' shards it")
    if options.kernel is not None:
        one_of(name, "kernel", options.kernel, (*pairs.KERNELS, None))
        if rule != "f" or top_k is not None or options.axis_name is not None:
            raise ValueError(
                f"{name}: 'kernel' is {options.kernel!r}, expected None for this kind, for 'teacher_top_k' and with 'axis_name'"
            )
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and not mesh.are_all_axes_manual:
            raise ValueError(
                f"{name}: 'kernel' is {options.kernel!r}, expected None on a mesh outside jax.shard_map: kernels are not partitioned"
            )
    check_shapes(
        name,
        h=(h, "... d"),
        w=(w, "v d" if options.transposed else "d v"),
        teacher_h=(teacher_h, "... e"),
        teacher_w=(teacher_w, "v e" if options.teacher_transposed else "e v"),
        teacher_top_k=(None if top_k is None else top_k.log_probs, "... k"),
        teacher_tokens=(None if top_k is None else top_k.tokens, "... k"),
        labels=(labels, "..."),
        bias=(bias, "v"),
        teacher_bias=(teacher_bias, "v"),
        temperature=(temperature, ""),
    )
    h, w, bias, ids, heat, leading = parts.prepare(name, options.student, h, w, bias, labels, temperature)
    if top_k is None:
        teacher_h, teacher_w, teacher_bias, _, other, _ = parts.prepare(
            name, options.teacher, teacher_h, teacher_w, teacher_bias, None, temperature, prefix="teacher_"
        )
        heat = heat.astype(jnp.promote_types(heat.dtype, other.dtype))
    else:
        require_integers(name, teacher_tokens=top_k.tokens)
        k = jnp.shape(top_k.tokens)[-1]
        top_k = TopK(jnp.asarray(top_k.log_probs).astype(heat.dtype).reshape(-1, k), jnp.asarray(top_k.tokens, jnp.int32).reshape(-1, k))
    if options.kernel is not None and heat.dtype != jnp.float32:
        raise ValueError(f"{name}: 'kernel' is {options.kernel!r}, expected None for {heat.dtype.name}")
    if ids is None:
        ids = jnp.full_like(h[:, 0], -1, dtype=jnp.int32)
    tempered = not (isinstance(temperature, (int, float)) and temperature == 1)
    generator, alpha = jax.tree.map(lambda x: jnp.asarray(x).astype(heat.dtype), (generator, alpha))
    teacher = jax.lax.stop_gradient((teacher_h, teacher_w, teacher_bias, top_k, ids, heat, generator, alpha))
    return pairs.What(options, rule, labels is not None, tempered), pairs.Arrays(h, w, bias, *teacher), leading


def _kept(h: Any, keep: jax.Array) -> Any:
    """Zeros for hidden states that do not matter, which may be anything."""
    return None if h is None else jnp.where(keep.reshape(-1, 1), h, jnp.zeros_like(h))


def _agree(name: str, axis_name: str | None, arrays: pairs.Arrays) -> pairs.Arrays:
    leaves, tree = jax.tree.flatten(arrays)
    return jax.tree.unflatten(tree, parts.agree(name, axis_name, tuple(map(jnp.asarray, leaves))))


# --- all tokens


class _Sums(NamedTuple):
    """Gradients being summed: h [n d] or of one chunk, w as the vocabulary holds it, bias or None."""

    h: jax.Array
    w: jax.Array
    bias: Any


def _chunks(what: pairs.What, n: int) -> parts.Chunks:
    return parts.token_chunks(n, what.options.token_chunk or min(max(n // 8, 256), 1024))


def _rows_of(h: Any, arrays: pairs.Arrays, w: Any, what: pairs.What) -> pairs.Rows:
    labels = parts.localise(arrays.labels, w.shape[what.options.student.axis], what.options.axis_name)
    return pairs.Rows(h, arrays.teacher_h, arrays.top_k, labels)


def _values(what: pairs.What, h: Any, w: Any, bias: Any, arrays: pairs.Arrays) -> tuple[jax.Array, jax.Array]:
    """Divergences and log-probabilities of labels [n]."""
    pair, rows = pairs.Pair.of(what, w, bias, arrays), _rows_of(h, arrays, w, what)
    chunks = _chunks(what, h.shape[0])

    def body(out: Any, step: Any) -> Any:
        block = pair.block(parts.rows(chunks, rows, step), slopes=False)
        return parts.put_rows(chunks, out, (block.values, block.log_probs), step)

    return chunks.loop(body, _empty(what, arrays))


def _empty(what: pairs.What, arrays: pairs.Arrays) -> tuple[jax.Array, jax.Array]:
    """Room for values and log-probabilities, the same on all shards of the vocabulary."""
    zero = jnp.zeros_like(arrays.labels, dtype=arrays.dtype)
    if what.options.axis_name is not None:
        zero = jax.lax.pmax(zero, what.options.axis_name)
    return zero, zero


def _gradients(
    what: pairs.What, h: Any, w: Any, bias: Any, arrays: pairs.Arrays, weights: jax.Array, label_weights: Any
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array, Any]]:
    """Values and log-probabilities [n], and the gradients of sum(weights D - label_weights log p) with respect to h, w and bias."""
    pair, rows = pairs.Pair.of(what, w, bias, arrays), _rows_of(h, arrays, w, what)
    vocabulary, dtype = pair.student, arrays.dtype
    chunks = _chunks(what, h.shape[0])

    def body(carry: tuple[_Sums, Any], step: Any) -> tuple[_Sums, Any]:
        sums, out = carry
        part, weight, label_weight = cast(tuple[Any, Any, Any], parts.rows(chunks, (rows, weights, label_weights), step))
        if chunks.overlaps:  # rows met before have had their say
            fresh = chunks.fresh(step).reshape(-1).astype(dtype)
            weight, label_weight = weight * fresh, None if label_weight is None else label_weight * fresh
        block = pair.block(part, slopes=True)
        if label_weight is not None:
            label_weight = jnp.where(block.possible, label_weight, jnp.zeros_like(label_weight))

        tile = pair.tile(block.x, part.labels, None)
        likely = (-weight * block.kappa)[:, None]  # what the probabilities are multiplied by
        dz = weight[:, None] * block.slopes
        if label_weight is not None:
            label_weight = label_weight[:, None] * (vocabulary.temperature if what.two_temperatures else 1)
            dz = dz - label_weight * tile.chosen.astype(dtype)
            if what.two_temperatures:
                plain = pair.tile(block.x, part.labels, None, plain=True)
                dz = dz + label_weight * jnp.exp(plain.z - block.plain_base[:, None])
            else:
                likely = likely + label_weight
        dz = dz + likely * jnp.exp(tile.z - block.base[:, None])
        dx = jnp.where(jnp.isneginf(tile.z), jnp.zeros_like(dz), dz * tile.slope)

        to_h, to_w, to_bias = vocabulary.gradients(dx, part.h, sums.w, sums.bias)
        # Rows met before have weight 0 now: their gradient is added, not written over.
        to_h = parts.put_rows(chunks, sums.h, parts.rows(chunks, sums.h, step) + to_h, step)
        return _Sums(to_h, to_w, to_bias), parts.put_rows(chunks, out, (block.values, block.log_probs), step)

    start = _Sums(
        h=jnp.zeros_like(h, dtype=dtype),
        w=jnp.zeros_like(vocabulary.w, dtype=dtype),
        bias=None if vocabulary.bias is None else jnp.zeros_like(vocabulary.bias, dtype=dtype),
    )
    sums, out = chunks.loop(body, (start, _empty(what, arrays)))
    to_bias = None if bias is None or sums.bias is None else sums.bias.reshape(-1).astype(bias.dtype)
    return out, (sums.h.astype(h.dtype), sums.w.reshape(w.shape).astype(w.dtype), to_bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(what: pairs.What, h: Any, w: Any, bias: Any, arrays: pairs.Arrays) -> tuple[jax.Array, jax.Array]:
    return _values(what, h, w, bias, arrays)


def _divergence_fwd(what: pairs.What, h: Any, w: Any, bias: Any, arrays: pairs.Arrays) -> tuple[Any, Any]:
    return _values(what, h, w, bias, arrays), (h, w, bias, arrays)


def _divergence_bwd(what: pairs.What, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    h, w, bias, arrays = residuals
    to_values, to_log_probs = cotangents
    gradients = _gradients(what, h, w, bias, arrays, to_values, -to_log_probs if what.labelled else None)[1]
    return *gradients, None


_divergence.defvjp(_divergence_fwd, _divergence_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(what: pairs.What, h: Any, w: Any, bias: Any, weights: jax.Array, label_weights: Any, arrays: pairs.Arrays) -> jax.Array:
    return _loss(_values(what, h, w, bias, arrays), weights, label_weights)


def _loss(out: tuple[jax.Array, jax.Array], weights: jax.Array, label_weights: Any) -> jax.Array:
    def weigh(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(weights * jnp.where(weights != 0, x, jnp.zeros_like(x)))

    loss = weigh(weights, out[0])
    return loss if label_weights is None else loss - weigh(label_weights, out[1])


def _weighted_fwd(
    what: pairs.What, h: Any, w: Any, bias: Any, weights: jax.Array, label_weights: Any, arrays: pairs.Arrays
) -> tuple[jax.Array, Any]:
    out, gradients = _gradients(what, h, w, bias, arrays, weights, label_weights)
    return _loss(out, weights, label_weights), (gradients, out)


def _weighted_bwd(what: pairs.What, residuals: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    gradients, (values, log_probs) = residuals
    scaled = jax.tree.map(lambda x: (cotangent * x.astype(cotangent.dtype)).astype(x.dtype), gradients)
    to_labels = -cotangent * pairs.finite(log_probs) if what.labelled else None
    return *scaled, cotangent * values, to_labels, None


_weighted.defvjp(_weighted_fwd, _weighted_bwd)
