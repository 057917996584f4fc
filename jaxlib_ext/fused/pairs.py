"""Student and teacher over one vocabulary: what a chunk of tokens gives for a divergence, its value and all that its gradients are made of."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from janax.jaxlib_ext import divergence as exact
from janax.jaxlib_ext.divergence import Generator, numerics
from janax.jaxlib_ext.fused import online, parts
from janax.jaxlib_ext.kernels import divergence as kernels
from janax.jaxlib_ext.logprobs import TopK

__all__ = ["KERNELS", "Arrays", "Block", "Options", "Pair", "Rows", "What", "finite"]

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
      tempered: Whether the divergence may be at another temperature than 1, that of the labels.
    """

    options: Options
    rule: str
    labelled: bool
    tempered: bool

    @property
    def two_temperatures(self) -> bool:
        return self.labelled and self.tempered


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
      x: [m v] the student's h w.
      values: [m] divergence.
      log_probs: [m] of the labels.
      possible: [m] whether the label has a probability.
      base: [m] log-normaliser of the tempered student, 0 where all is forbidden.
      plain_base: [m] the same at temperature 1.
      slopes: [m v] derivative of the divergence with respect to log p_v as if these were free, or None.
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
        """The student's logits over one chunk of the vocabulary, or all of it (None), from x = h w [m v]."""
        return (self.plain if plain else self.student).tile_of(self.what.options.softcap, x, labels, step)

    def teacher_tile(self, y: jax.Array, labels: jax.Array, step: Any) -> parts.Tile:
        assert self.teacher is not None
        return self.teacher.tile_of(self.what.options.teacher_softcap, y, labels, step)

    def normalizers(self, names: tuple[str, ...], x: jax.Array, y: jax.Array | None, labels: jax.Array) -> dict[str, online.Running]:
        """Running sums of the "student", of its "plain" distribution at temperature 1, of the "teacher", and of Renyi's "mixture"."""
        options, zero = self.what.options, jnp.zeros_like(labels, dtype=self.student.temperature.dtype)

        def tile(name: str, step: Any) -> parts.Tile:
            if name == "teacher":
                assert y is not None
                return self.teacher_tile(y, labels, step)
            student = self.tile(x, labels, step, plain=name == "plain")
            return student if name != "mixture" else student._replace(z=self.mixed(student.z, tile("teacher", step).z))

        def running(name: str) -> online.Running:
            side, capped = (self.teacher, options.teacher_softcap) if name == "teacher" else (self.student, options.softcap)
            bare = not self.what.tempered and capped is None and side is not None and side.bias is None and name != "mixture"
            by_chunks = not bare or (self.what.labelled and name == "student")
            return online.over_logits(self.student, functools.partial(tile, name), zero, by_chunks=by_chunks)

        return {name: running(name) for name in names}

    def mixed(self, z_p: jax.Array, z_q: jax.Array) -> jax.Array:
        """alpha log q + (1 - alpha) log p, not normalised; what one side only forbids is at the stand-in."""
        neither = jnp.isneginf(z_p) & jnp.isneginf(z_q)
        mixed = self.alpha * numerics.without_infinities(z_q) + (1 - self.alpha) * numerics.without_infinities(z_p)
        return jnp.where(neither, -jnp.inf, mixed)

    def log_probs(self, z: jax.Array, base: jax.Array) -> jax.Array:
        return numerics.without_infinities(z - parts.beside(base, z))

    def block(self, rows: Rows, *, slopes: bool) -> Block:
        """Values of m tokens, and what their gradients are made of."""
        axis_name = self.what.options.axis_name
        x = self.student.logits(rows.h, self.student.w)
        y = None if self.teacher is None else self.teacher.logits(rows.teacher_h, self.teacher.w).astype(self.student.temperature.dtype)
        plain = "plain" if self.what.two_temperatures else "student"
        inside = self.by_kernel(x, y) if self.what.options.kernel is not None and y is not None else None
        names = ("student", "teacher", "mixture") if self.what.rule == "renyi" else ("student", "teacher")
        names = names if y is not None else ("student",)
        if inside is not None:
            names = ("plain",) if self.what.two_temperatures else ()
        elif self.what.two_temperatures:
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
                values, sloped, kappa = inside.values, inside.slopes if slopes else None, inside.kappa
            else:
                values, sloped, kappa = self.from_logits(x, y, rows.labels, base, slopes=slopes)
            valid = ~(jnp.isneginf(normalizer["student"]) | jnp.isneginf(normalizer["teacher"]))
        zero = jnp.zeros_like(values)
        sloped = None if sloped is None else jnp.where(valid[:, None], sloped, jnp.zeros_like(sloped))
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
            x,
            y,
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
        raw = jnp.take_along_axis(x, index, axis=1)
        offset = jnp.zeros_like(raw) if self.student.bias is None else self.student.bias.reshape(-1)[index].astype(raw.dtype)
        z = self.student.capped(self.what.options.softcap, raw + finite(offset))[0]
        return jnp.where(jnp.isneginf(offset), -jnp.inf, z), found, index

    def from_logits(
        self, x: jax.Array, y: jax.Array, labels: jax.Array, base: dict[str, jax.Array], *, slopes: bool
    ) -> tuple[jax.Array, Any, jax.Array]:
        """(values [m], slopes [m v] or None, their sums [m])."""
        share = self.head_share(x, y, labels, base) if self.what.rule == "adaptive" else None

        def entries(step: Any) -> tuple[jax.Array, jax.Array]:
            z_p, z_q = self.tile(x, labels, step).z, self.teacher_tile(y, labels, step).z
            value, slope = self.terms(self.log_probs(z_p, base["student"]), self.log_probs(z_q, base["teacher"]), share)
            if self.what.rule == "renyi":
                slope = -jnp.exp(self.mixed(z_p, z_q) - parts.beside(base["mixture"], z_p))
            return value, jnp.where(jnp.isneginf(z_p), jnp.zeros_like(slope), slope)  # a forbidden token is a constant

        def body(sums: tuple[jax.Array, jax.Array], step: Any) -> tuple[jax.Array, jax.Array]:
            value, slope = entries(step)
            return sums[0] + jnp.sum(value, axis=(1, 2)), sums[1] + jnp.sum(slope, axis=(1, 2))

        zero = jnp.zeros_like(labels, dtype=y.dtype)
        total, kappa = self.student.chunks.loop(body, (zero, zero))
        if self.what.options.axis_name is not None:
            total, kappa = jax.lax.psum((total, kappa), self.what.options.axis_name)
        if self.what.rule == "renyi":
            total = exact.renyi_value(
                self.alpha, total, base["mixture"] - self.alpha * base["teacher"] - (1 - self.alpha) * base["student"]
            )
        # Made again where they are used, not kept: they cost an exponential or two, and no memory.
        return total, entries(None)[1] if slopes else None, kappa

    def terms(self, log_p: jax.Array, log_q: jax.Array, share: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Summands of the divergence and their derivatives with respect to log p; of KL(q || p) and KL(p || q) in shares if it is adaptive."""
        forward = exact.terms_and_slopes(self.generator, log_p, log_q)
        if share is None:
            return forward
        reverse, share = exact.terms_and_slopes(exact.REVERSE_KL, log_p, log_q), parts.beside(share, log_p)
        return cast(Any, tuple(share * one + (1 - share) * other for one, other in zip(forward, reverse)))

    def head_share(self, x: jax.Array, y: jax.Array, labels: jax.Array, base: dict[str, jax.Array]) -> jax.Array:
        """[m] the share of forward KL in the adaptive one; sorts the vocabulary."""
        p = jnp.exp(self.tile(x, labels, None).z - base["student"][:, None])
        q = jnp.exp(self.teacher_tile(y, labels, None).z - base["teacher"][:, None])
        return exact.head_share(p, q)

    def from_top_k(self, x: jax.Array, base: jax.Array, top_k: TopK, *, slopes: bool) -> tuple[jax.Array, Any, jax.Array]:
        """As `from_logits`, where the teacher is known by some tokens and one bucket for the others."""
        axis_name = self.what.options.axis_name
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
        return values, jax.vmap(lambda row, at, new: row.at[at].add(new))(jnp.zeros_like(x, dtype=mine.dtype), index, mine), kappa
