"""Divergences between a student's and a teacher's distributions, from the hidden states and unembeddings of both."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import divergence as exact
from janax.jaxlib_ext.checks import check_shapes, one_of, require_integers
from janax.jaxlib_ext.divergence import Generator, numerics
from janax.jaxlib_ext.fused import online, parts
from janax.jaxlib_ext.kernels import divergence as kernels
from janax.jaxlib_ext.logprobs import TopK

__all__ = ["TokenDivergence", "divergence", "weighted_divergence"]

_KERNELS = {
    "pallas_tpu": kernels.pallas_tpu,
    "pallas_gpu": kernels.pallas_gpu,
    "interpret": functools.partial(kernels.pallas_tpu, interpret=True),
}


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
      token_chunk: Tokens per chunk, of which both logits [token_chunk v] are held: an eighth, between 128 and 1024, if None. Static.
      transposed: `w` is [v d]. Static.
      teacher_transposed: `teacher_w` is [v e]. Static.
      axis_name: Inside `jax.shard_map`, the mesh axis over which the vocabulary of both unembeddings and biases is sharded; numbers per token
        travel, nothing else. Static.
      kernel: "pallas_tpu" or "pallas_gpu" makes all that is as long as the vocabulary, the products apart, in one kernel of
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
        _Options(softcap, teacher_softcap, transposed, teacher_transposed, vocab_chunk, token_chunk, axis_name, kernel),
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
        _Options(softcap, teacher_softcap, transposed, teacher_transposed, vocab_chunk, token_chunk, axis_name, kernel),
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


class _Options(NamedTuple):
    softcap: float | None
    teacher_softcap: float | None
    transposed: bool
    teacher_transposed: bool
    vocab_chunk: int | None
    token_chunk: int | None
    axis_name: str | None
    kernel: str | None

    @property
    def student(self) -> parts.Options:
        return parts.Options(self.softcap, False, False, self.vocab_chunk, self.token_chunk, self.transposed)

    @property
    def teacher(self) -> parts.Options:
        return parts.Options(self.teacher_softcap, False, False, self.vocab_chunk, self.token_chunk, self.teacher_transposed)


class _What(NamedTuple):
    """What is static.

    Attributes:
      options: The static arguments.
      rule: "f" for sum q f(p/q), "renyi", or "adaptive".
      labelled: Whether log-probabilities of labels are wanted.
      tempered: Whether the divergence is at another temperature than the labels.
    """

    options: _Options
    rule: str
    labelled: bool
    tempered: bool


class _Arrays(NamedTuple):
    """Checked: one row a token, n of them, one dtype a side; the teacher's h, w, bias or its top k are None."""

    h: Any
    w: Any
    bias: Any
    teacher_h: Any
    teacher_w: Any
    teacher_bias: Any
    top_k: TopK | None
    labels: jax.Array
    temperature: jax.Array
    generator: Generator
    alpha: Any

    @property
    def dtype(self) -> Any:
        return self.temperature.dtype


def _prepare(
    name: str, kind: Any, h: Any, w: Any, teacher_h: Any, teacher_w: Any, top_k: TopK | None, alpha: Any, beta: Any, temperature: Any,
    labels: Any, bias: Any, teacher_bias: Any, options: _Options,
) -> tuple[_What, _Arrays, tuple[int, ...]]:  # fmt: skip
    whole = (teacher_h is not None, teacher_w is not None)
    if any(whole) != all(whole) or all(whole) == (top_k is not None):
        raise ValueError(f"{name}: expected either 'teacher_h' and 'teacher_w', or 'teacher_top_k'")
    rule, generator, alpha = exact.resolve(name, kind, alpha=alpha, beta=beta)
    if top_k is not None and rule != "f":
        raise ValueError(f"{name}: 'kind' is {kind!r}, expected an f-divergence where the teacher is given by 'teacher_top_k'")
    if rule == "adaptive" and options.axis_name is not None:
        raise ValueError(f"{name}: 'kind' is {kind!r}, which sorts the vocabulary: expected another one where 'axis_name' shards it")
    if options.kernel is not None:
        one_of(name, "kernel", options.kernel, (*_KERNELS, None))
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
    tempered = labels is not None and not (isinstance(temperature, (int, float)) and temperature == 1)
    generator, alpha = jax.tree.map(lambda x: jnp.asarray(x).astype(heat.dtype), (generator, alpha))
    teacher = jax.lax.stop_gradient((teacher_h, teacher_w, teacher_bias, top_k, ids, heat, generator, alpha))
    return _What(options, rule, labels is not None, tempered), _Arrays(h, w, bias, *teacher), leading


def _kept(h: Any, keep: jax.Array) -> Any:
    """Zeros for hidden states that do not matter, which may be anything."""
    return None if h is None else jnp.where(keep.reshape(-1, 1), h, jnp.zeros_like(h))


def _agree(name: str, axis_name: str | None, arrays: _Arrays) -> _Arrays:
    leaves, tree = jax.tree.flatten(arrays)
    return jax.tree.unflatten(tree, parts.agree(name, axis_name, tuple(map(jnp.asarray, leaves))))


# --- one chunk of tokens


class _Block(NamedTuple):
    """What one chunk of m tokens gives, over the whole vocabulary.

    Attributes:
      x: [m g r] the student's h w.
      values: [m] divergence.
      log_probs: [m] of the labels.
      possible: [m] whether the label has a probability.
      base: [m] log-normaliser of the tempered student, 0 where all is forbidden.
      plain_base: [m] the same at temperature 1.
      slopes: [m g r] derivative of the divergence with respect to log p_v as if these were free, or None.
      kappa: [m] their sum.
    """

    x: jax.Array
    values: jax.Array
    log_probs: jax.Array
    possible: jax.Array
    base: jax.Array
    plain_base: jax.Array
    slopes: Any
    kappa: jax.Array


def _column(x: jax.Array) -> jax.Array:
    return x[:, None, None]


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isneginf(x), jnp.zeros_like(x), x)


class _Rows(NamedTuple):
    """What belongs to tokens, [n ...] or [m ...]."""

    h: jax.Array
    teacher_h: Any
    top_k: TopK | None
    labels: jax.Array


class _Pair(NamedTuple):
    """Both vocabularies in the form in which chunks are taken; the teacher's is None if only its top k are known."""

    what: _What
    student: parts.Vocabulary
    plain: parts.Vocabulary
    teacher: parts.Vocabulary | None
    generator: Generator
    alpha: Any

    @classmethod
    def of(cls, what: _What, w: Any, bias: Any, arrays: _Arrays) -> "_Pair":
        student = parts.Vocabulary.of(what.options.student, w, bias, arrays.temperature)
        teacher = None
        if arrays.top_k is None:
            teacher = parts.Vocabulary.of(what.options.teacher, arrays.teacher_w, arrays.teacher_bias, arrays.temperature)
        plain = student._replace(temperature=jnp.ones_like(arrays.temperature))
        return cls(what, student, plain, teacher, arrays.generator, arrays.alpha)

    @property
    def v(self) -> int:
        return self.student.chunks.groups * self.student.chunks.inner

    def tile(self, x: jax.Array, labels: jax.Array, step: Any, *, plain: bool = False) -> parts.Tile:
        """The student's logits over one chunk of the vocabulary, from x = h w [m g r]."""
        vocabulary = self.plain if plain else self.student
        window = vocabulary.chunks.window(x, step, 1)
        return vocabulary.tile_of(self.what.options.softcap, window, labels, vocabulary.window(step)[1], step)

    def teacher_tile(self, y: jax.Array, labels: jax.Array, step: Any) -> parts.Tile:
        assert self.teacher is not None
        window = self.teacher.chunks.window(y, step, 1)
        return self.teacher.tile_of(self.what.options.teacher_softcap, window, labels, self.teacher.window(step)[1], step)

    def normalizers(self, names: tuple[str, ...], x: jax.Array, y: jax.Array | None, labels: jax.Array) -> dict[str, online.Running]:
        """Running sums of the "student", of its "plain" distribution at temperature 1, of the "teacher", and of Renyi's "mixture"."""
        zero = jnp.zeros_like(labels, dtype=self.student.temperature.dtype)

        def tile(name: str, step: Any) -> parts.Tile:
            if name == "teacher":
                assert y is not None
                return self.teacher_tile(y, labels, step)
            student = self.tile(x, labels, step, plain=name == "plain")
            return student if name != "mixture" else student._replace(z=self.mixed(student.z, tile("teacher", step).z))

        def body(sums: dict[str, online.Running], step: Any) -> dict[str, online.Running]:
            return {name: online.fold(sums[name], tile(name, step), self.student, zero) for name in names}

        return self.student.chunks.loop(body, {name: online.start(zero) for name in names})

    def mixed(self, z_p: jax.Array, z_q: jax.Array) -> jax.Array:
        """alpha log q + (1 - alpha) log p, not normalised; what one side only forbids is at the stand-in."""
        neither = jnp.isneginf(z_p) & jnp.isneginf(z_q)
        mixed = self.alpha * numerics.without_infinities(z_q) + (1 - self.alpha) * numerics.without_infinities(z_p)
        return jnp.where(neither, -jnp.inf, mixed)

    def log_probs(self, z: jax.Array, base: jax.Array) -> jax.Array:
        return numerics.without_infinities(z - _column(base))

    def block(self, rows: _Rows, *, slopes: bool) -> _Block:
        """Values of m tokens, and what their gradients are made of."""
        axis_name = self.what.options.axis_name
        x = self.student.logits(rows.h, self.student.w)
        y = None if self.teacher is None else self.teacher.logits(rows.teacher_h, self.teacher.w).astype(self.student.temperature.dtype)
        plain = "plain" if self.what.tempered else "student"
        inside = self.by_kernel(x, y) if self.what.options.kernel is not None and y is not None else None
        names = ("student", "teacher", "mixture") if self.what.rule == "renyi" else ("student", "teacher")
        names = names if y is not None else ("student",)
        if inside is not None:
            names = ("plain",) if self.what.tempered else ()
        elif self.what.tempered:
            names = (*names, "plain")
        running = self.normalizers(names, x, y, rows.labels) if names else {}
        normalizer = {name: sums.logsumexp for name, sums in running.items()}
        if inside is not None:
            normalizer |= {"student": inside.logsumexp, "teacher": inside.teacher_logsumexp}
        target = running[plain].target if plain in running else self.chosen(x, rows.labels[:, None])[0][:, 0]
        log_probs, whole, _, possible = online.finish(axis_name, self.v, rows.labels, target, normalizer[plain])
        normalizer = {
            name: whole if name == plain else x if axis_name is None else online.over_shards(axis_name, x)[0]
            for name, x in normalizer.items()
        }
        base = {name: _finite(x) for name, x in normalizer.items()}
        if rows.top_k is not None:
            values, sloped, kappa = self.from_top_k(x, base["student"], rows.top_k, slopes=slopes)
            valid = ~jnp.isneginf(normalizer["student"])
        else:
            assert y is not None
            if inside is not None:
                values, sloped, kappa = inside.values, inside.slopes.reshape(x.shape) if slopes else None, inside.kappa
            else:
                values, sloped, kappa = self.from_logits(x, y, rows.labels, base, slopes=slopes)
            valid = ~(jnp.isneginf(normalizer["student"]) | jnp.isneginf(normalizer["teacher"]))
        zero = jnp.zeros_like(values)
        if sloped is not None:
            sloped = jnp.where(_column(valid), sloped, jnp.zeros_like(sloped))
        return _Block(
            x=x,
            values=jnp.where(valid, values, zero),
            log_probs=log_probs,
            possible=possible,
            base=base["student"],
            plain_base=base[plain],
            slopes=sloped,
            kappa=jnp.where(valid, kappa, zero),
        )

    def by_kernel(self, x: jax.Array, y: jax.Array) -> kernels.BlockSums:
        """Normalisers, values and slopes by the platform's kernel."""
        options = self.what.options
        assert self.teacher is not None and options.kernel is not None
        biases = [None if side.bias is None else side.bias.reshape(-1) for side in (self.student, self.teacher)]
        return _KERNELS[options.kernel](
            self.generator,
            x.reshape(x.shape[0], -1),
            y.reshape(y.shape[0], -1),
            bias=biases[0],
            teacher_bias=biases[1],
            temperature=self.student.temperature,
            softcap=options.softcap,
            teacher_softcap=options.teacher_softcap,
        )

    def chosen(self, x: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(the student's logits of some tokens [m k], -inf if forbidden; which of them are here [m k]; their places here [m k])."""
        found = (ids >= 0) & (ids < self.v)
        index = jnp.where(found, ids, jnp.zeros_like(ids))
        raw = jnp.take_along_axis(x.reshape(x.shape[0], -1), index, axis=1)
        offset = jnp.zeros_like(raw) if self.student.bias is None else self.student.bias.reshape(-1)[index].astype(raw.dtype)
        z = self.student.capped(self.what.options.softcap, raw + _finite(offset))[0]
        return jnp.where(jnp.isneginf(offset), -jnp.inf, z), found, index

    def from_logits(
        self, x: jax.Array, y: jax.Array, labels: jax.Array, base: dict[str, jax.Array], *, slopes: bool
    ) -> tuple[jax.Array, Any, jax.Array]:
        """(values [m], slopes [m g r] in the place of y, or None, their sums [m])."""
        vocab = self.student.chunks
        share = self.head_share(x, y, labels, base) if self.what.rule == "adaptive" else None

        def entries(step: Any, y: jax.Array) -> tuple[jax.Array, jax.Array]:
            z_p, z_q = self.tile(x, labels, step).z, self.teacher_tile(y, labels, step).z
            log_p, log_q = self.log_probs(z_p, base["student"]), self.log_probs(z_q, base["teacher"])
            value, slope = jax.jvp(lambda log_p: self.terms(log_p, log_q, share), (log_p,), (jnp.ones_like(log_p),))
            if self.what.rule == "renyi":
                slope = -jnp.exp(self.mixed(z_p, z_q) - _column(base["mixture"]))
            return value, jnp.where(jnp.isneginf(z_p), jnp.zeros_like(slope), slope)  # a forbidden token is a constant

        def body(carry: tuple[Any, ...], step: Any) -> tuple[Any, ...]:
            total, kappa, kept = carry
            value, slope = entries(step, y if kept is None else kept)
            if kept is not None:
                new = slope
                if vocab.overlaps:
                    new = jnp.where(vocab.fresh(step)[None], slope, vocab.window(kept, step, 1))
                kept = vocab.put(kept, new.astype(kept.dtype), step, 1)
            return total + jnp.sum(value, axis=(1, 2)), kappa + jnp.sum(slope, axis=(1, 2)), kept

        zero = jnp.zeros_like(labels, dtype=y.dtype)
        total, kappa, kept = vocab.loop(body, (zero, zero, y if slopes else None))
        if self.what.options.axis_name is not None:
            total, kappa = jax.lax.psum((total, kappa), self.what.options.axis_name)
        if self.what.rule == "renyi":
            total = exact.renyi_value(
                self.alpha, total, base["mixture"] - self.alpha * base["teacher"] - (1 - self.alpha) * base["student"]
            )
        return total, kept, kappa

    def terms(self, log_p: jax.Array, log_q: jax.Array, share: jax.Array | None) -> jax.Array:
        """Summands of the divergence, those of KL(q || p) and KL(p || q) in shares if it is adaptive."""
        forward = exact.terms(self.generator, log_p, log_q)
        if share is None:
            return forward
        return _column(share) * forward + _column(1 - share) * exact.terms(exact.REVERSE_KL, log_p, log_q)

    def head_share(self, x: jax.Array, y: jax.Array, labels: jax.Array, base: dict[str, jax.Array]) -> jax.Array:
        """[m] the share of forward KL in the adaptive one; sorts the vocabulary."""
        vocab = self.student.chunks

        def body(carry: tuple[jax.Array, jax.Array], step: Any) -> tuple[jax.Array, jax.Array]:
            tiles = self.tile(x, labels, step).z, self.teacher_tile(y, labels, step).z
            new = [jnp.exp(tile - _column(base[name])) for tile, name in zip(tiles, ("student", "teacher"))]
            if vocab.overlaps:
                new = [jnp.where(vocab.fresh(step)[None], one, vocab.window(old, step, 1)) for one, old in zip(new, carry)]
            p, q = (vocab.put(old, one, step, 1) for one, old in zip(new, carry))
            return p, q

        empty = jnp.zeros_like(y)
        p, q = (z.reshape(z.shape[0], -1) for z in vocab.loop(body, (empty, empty)))
        return exact.head_share(p, q)

    def from_top_k(self, x: jax.Array, base: jax.Array, top_k: TopK, *, slopes: bool) -> tuple[jax.Array, Any, jax.Array]:
        """As `from_logits`, where the teacher is known by some tokens and one bucket for the others."""
        axis_name, vocab = self.what.options.axis_name, self.student.chunks
        ids = parts.localise(top_k.tokens, self.v, axis_name)
        z, found, index = self.chosen(x, ids)
        log_p = jnp.where(found, numerics.without_infinities(z - base[:, None]), jnp.zeros_like(z))
        known = found
        if axis_name is not None:
            log_p, known = jax.lax.psum(log_p, axis_name), jax.lax.psum(found.astype(jnp.int32), axis_name) > 0
        log_p = jnp.where(known, log_p, numerics.FORBIDDEN)
        values, pull = jax.vjp(lambda log_p: exact.from_support(self.generator, log_p, top_k.log_probs), log_p)
        (slope,) = pull(jnp.ones_like(values))
        slope = jnp.where(known, slope, jnp.zeros_like(slope))
        kappa = jnp.sum(slope, axis=1)
        if not slopes:
            return values, None, kappa
        mine = jnp.where(found, slope, jnp.zeros_like(slope))
        flat = jnp.zeros_like(x, dtype=mine.dtype).reshape(x.shape[0], -1)
        flat = jax.vmap(lambda row, at, new: row.at[at].add(new))(flat, index, mine)
        return values, flat.reshape(x.shape[0], vocab.groups, vocab.inner), kappa


# --- all tokens


class _Sums(NamedTuple):
    """Gradients being summed: h [n d] or of one chunk, w as the vocabulary holds it, bias or None."""

    h: jax.Array
    w: jax.Array
    bias: Any


def _chunks(what: _What, n: int) -> parts.Chunks:
    return parts.token_chunks(n, what.options.token_chunk or min(max(n // 8, 128), 1024))


def _rows_of(h: Any, arrays: _Arrays, w: Any, what: _What) -> _Rows:
    labels = parts.localise(arrays.labels, w.shape[what.options.student.axis], what.options.axis_name)
    return _Rows(h, arrays.teacher_h, arrays.top_k, labels)


def _values(what: _What, h: Any, w: Any, bias: Any, arrays: _Arrays) -> tuple[jax.Array, jax.Array]:
    """Divergences and log-probabilities of labels [n]."""
    pair, rows = _Pair.of(what, w, bias, arrays), _rows_of(h, arrays, w, what)
    chunks = _chunks(what, h.shape[0])

    def body(out: Any, step: Any) -> Any:
        block = pair.block(parts.rows(chunks, rows, step), slopes=False)
        return parts.put_rows(chunks, out, (block.values, block.log_probs), step)

    return chunks.loop(body, _empty(what, arrays))


def _empty(what: _What, arrays: _Arrays) -> tuple[jax.Array, jax.Array]:
    """Room for values and log-probabilities, the same on all shards of the vocabulary."""
    zero = jnp.zeros_like(arrays.labels, dtype=arrays.dtype)
    if what.options.axis_name is not None:
        zero = jax.lax.pmax(zero, what.options.axis_name)
    return zero, zero


def _gradients(
    what: _What, h: Any, w: Any, bias: Any, arrays: _Arrays, weights: jax.Array, label_weights: Any
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array, Any]]:
    """Values and log-probabilities [n], and the gradients of sum(weights D - label_weights log p) with respect to h, w and bias."""
    pair, rows = _Pair.of(what, w, bias, arrays), _rows_of(h, arrays, w, what)
    vocabulary, vocab, dtype = pair.student, pair.student.chunks, arrays.dtype
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

        def columns(sums: _Sums, vocab_step: Any) -> _Sums:
            tile = pair.tile(block.x, part.labels, vocab_step)
            p = jnp.exp(tile.z - _column(block.base))
            dz = _column(weight) * (vocab.window(block.slopes, vocab_step, 1) - p * _column(block.kappa))
            if label_weight is not None:
                likely = (
                    jnp.exp(pair.tile(block.x, part.labels, vocab_step, plain=True).z - _column(block.plain_base)) if what.tempered else p
                )
                heat = vocabulary.temperature if what.tempered else 1
                dz = dz + _column(label_weight) * (likely - tile.chosen.astype(dtype)) * heat
            dx = jnp.where(jnp.isneginf(tile.z), jnp.zeros_like(dz), dz) * tile.slope
            window: Any = vocabulary.window(vocab_step)[0]
            to_w = parts.dot(dx.astype(w.dtype), part.h, ((0,), (0,)), like=vocabulary.rows(window))
            return _Sums(
                h=sums.h + vocabulary.back(dx, window, sums.h),
                w=vocabulary.add(sums.w, to_w, vocab_step, add=True),
                bias=None if sums.bias is None else parts.accumulate(vocab, sums.bias, jnp.sum(dx, axis=0), vocab_step, 0, add=True),
            )

        old = parts.rows(chunks, sums.h, step)
        new = vocab.loop(columns, sums._replace(h=jnp.zeros_like(old)))
        out = parts.put_rows(chunks, out, (block.values, block.log_probs), step)
        # Rows met before have weight 0 now: their gradient is added, not written over.
        return new._replace(h=parts.put_rows(chunks, sums.h, old + new.h, step)), out

    start = _Sums(
        h=jnp.zeros_like(h, dtype=dtype),
        w=jnp.zeros_like(vocabulary.w, dtype=dtype),
        bias=None if vocabulary.bias is None else jnp.zeros_like(vocabulary.bias, dtype=dtype),
    )
    sums, out = chunks.loop(body, (start, _empty(what, arrays)))
    to_bias = None if bias is None or sums.bias is None else sums.bias.reshape(-1).astype(bias.dtype)
    return out, (sums.h.astype(h.dtype), sums.w.reshape(w.shape).astype(w.dtype), to_bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(what: _What, h: Any, w: Any, bias: Any, arrays: _Arrays) -> tuple[jax.Array, jax.Array]:
    return _values(what, h, w, bias, arrays)


def _divergence_fwd(what: _What, h: Any, w: Any, bias: Any, arrays: _Arrays) -> tuple[Any, Any]:
    return _values(what, h, w, bias, arrays), (h, w, bias, arrays)


def _divergence_bwd(what: _What, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    h, w, bias, arrays = residuals
    to_values, to_log_probs = cotangents
    gradients = _gradients(what, h, w, bias, arrays, to_values, -to_log_probs if what.labelled else None)[1]
    return *gradients, None


_divergence.defvjp(_divergence_fwd, _divergence_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(what: _What, h: Any, w: Any, bias: Any, weights: jax.Array, label_weights: Any, arrays: _Arrays) -> jax.Array:
    return _loss(_values(what, h, w, bias, arrays), weights, label_weights)


def _loss(out: tuple[jax.Array, jax.Array], weights: jax.Array, label_weights: Any) -> jax.Array:
    def weigh(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(weights * jnp.where(weights != 0, x, jnp.zeros_like(x)))

    loss = weigh(weights, out[0])
    return loss if label_weights is None else loss - weigh(label_weights, out[1])


def _weighted_fwd(what: _What, h: Any, w: Any, bias: Any, weights: jax.Array, label_weights: Any, arrays: _Arrays) -> tuple[jax.Array, Any]:
    out, gradients = _gradients(what, h, w, bias, arrays, weights, label_weights)
    return _loss(out, weights, label_weights), (gradients, out)


def _weighted_bwd(what: _What, residuals: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    gradients, (values, log_probs) = residuals
    scaled = jax.tree.map(lambda x: (cotangent * x.astype(cotangent.dtype)).astype(x.dtype), gradients)
    to_labels = -cotangent * _finite(log_probs) if what.labelled else None
    return *scaled, cotangent * values, to_labels, None


_weighted.defvjp(_weighted_fwd, _weighted_bwd)
