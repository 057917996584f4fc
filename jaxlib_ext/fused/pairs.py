"""Student and teacher over one vocabulary: what a chunk of tokens gives for a divergence, its value and all that its gradients are made of."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from janax.jaxlib_ext import divergence as exact
from janax.jaxlib_ext.divergence import Generator, numerics
from janax.jaxlib_ext.fused import online, parts
from janax.jaxlib_ext.kernels import divergence as kernels
from janax.jaxlib_ext.logprobs import TopK

__all__ = ["KERNELS", "Arrays", "Block", "Options", "Pair", "Rows", "What", "column", "finite"]

KERNELS = {
    "tpu": functools.partial(kernels.block, platform="tpu"),
    "gpu": functools.partial(kernels.block, platform="gpu"),
    "interpret": functools.partial(kernels.block, platform="tpu", interpret=True),
}
"""What makes all that is as long as the vocabulary, the products apart, on one device."""


class Options(NamedTuple):
    """The static arguments of the fused divergences."""

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


class What(NamedTuple):
    """What is static.

    Attributes:
      options: The static arguments.
      rule: "f" for sum q f(p/q), "renyi", or "adaptive".
      labelled: Whether log-probabilities of labels are wanted.
      tempered: Whether the divergence is at another temperature than the labels.
    """

    options: Options
    rule: str
    labelled: bool
    tempered: bool


class Arrays(NamedTuple):
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


class Block(NamedTuple):
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


def column(x: jax.Array) -> jax.Array:
    """Numbers of tokens beside [m g r]."""
    return x[:, None, None]


def finite(x: jax.Array) -> jax.Array:
    """0 for -inf."""
    return jnp.where(jnp.isneginf(x), jnp.zeros_like(x), x)


class Rows(NamedTuple):
    """What belongs to tokens, [n ...] or [m ...]."""

    h: jax.Array
    teacher_h: Any
    top_k: TopK | None
    labels: jax.Array


class Pair(NamedTuple):
    """Both vocabularies in the form in which chunks are taken; the teacher's is None if only its top k are known."""

    what: What
    student: parts.Vocabulary
    plain: parts.Vocabulary
    teacher: parts.Vocabulary | None
    generator: Generator
    alpha: Any

    @classmethod
    def of(cls, what: What, w: Any, bias: Any, arrays: Arrays) -> "Pair":
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
        return numerics.without_infinities(z - column(base))

    def block(self, rows: Rows, *, slopes: bool) -> Block:
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
        base = {name: finite(x) for name, x in normalizer.items()}
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
            sloped = jnp.where(column(valid), sloped, jnp.zeros_like(sloped))
        return Block(
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
        return KERNELS[options.kernel](
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
        z = self.student.capped(self.what.options.softcap, raw + finite(offset))[0]
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
                slope = -jnp.exp(self.mixed(z_p, z_q) - column(base["mixture"]))
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
        return column(share) * forward + column(1 - share) * exact.terms(exact.REVERSE_KL, log_p, log_q)

    def head_share(self, x: jax.Array, y: jax.Array, labels: jax.Array, base: dict[str, jax.Array]) -> jax.Array:
        """[m] the share of forward KL in the adaptive one; sorts the vocabulary."""
        vocab = self.student.chunks

        def body(carry: tuple[jax.Array, jax.Array], step: Any) -> tuple[jax.Array, jax.Array]:
            tiles = self.tile(x, labels, step).z, self.teacher_tile(y, labels, step).z
            new = [jnp.exp(tile - column(base[name])) for tile, name in zip(tiles, ("student", "teacher"))]
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
        found = found & ~jnp.isneginf(z)  # a forbidden token is a constant
        log_p = jnp.where(found, z - base[:, None], jnp.zeros_like(z))
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
