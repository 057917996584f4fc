"""Ehrlich functions: closed-form oracles for sequence design, with a feasible set, epistasis and a known optimum (Stanton et al., arXiv:2407.00236).

A sequence x of length l over v letters is feasible if a Markov chain with banned transitions can emit it. It is to hold c motifs a_i of k letters
at given distances, anywhere and in any order; the value counts how much of each is there, in steps of 1/q:

    h_i(x) = max_p floor(q/k #{j : x[p + o_ij] = a_ij}) / q                     the best place p of motif i, offsets 0 = o_i1 < o_i2 < ...
    f(x) = prod_i r(h_i(x)) if no transition x[t] -> x[t+1] is banned, else 0           r(h) = h (1 + e h (h - 1)), e = 0 in the paper

    problem = ehrlich.random_instance(key, num_letters=32, length=32, num_motifs=4, motif_length=4)
    start = ehrlich.sample_feasible(key, problem, length=32)            # hardly ever better than 0
    ehrlich.value(problem, ehrlich.optimal_sequence(problem, length=32))          # 1, the maximum

Everything is data: `vmap` over sequences, keys or whole instances. The product makes f zero wherever one motif has less than 1/q of its letters, and
a good part of all single mutations leaves the feasible set, so that first-order models see little: that is the point of the benchmark. `score` and
`relaxed_value` are proxies for `baselines` and its like.

Against the official code (pytorch-holo 0.0.5): an infeasible sequence is worth 0 here and -inf there (`infeasible_value`). If q does not divide k
the code's steps do not reach 1, so that its optimum is below 1; here they do. Where q divides k, the values are the same.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks, dtypes

__all__ = [
    "OPTIMUM",
    "Certificate",
    "Ehrlich",
    "certify",
    "instance",
    "is_feasible",
    "motif_quality",
    "optimal_sequence",
    "random_instance",
    "relaxed_value",
    "sample_feasible",
    "score",
    "stationary_distribution",
    "value",
]

OPTIMUM = 1.0
"""The maximum of every instance whose motifs fit into the length: all of them present in a feasible sequence."""


class Ehrlich(NamedTuple):
    """One instance; arrays only, so that instances of the same shape stack and `vmap`.

    Attributes:
      transition: [v v] probabilities of the chain, rows sum to one; 0 is a banned transition.
      motifs: [c k] int32 letters.
      offsets: [c k] int32 distances from a motif's first letter; column 0 is 0, rows increase.
      quantization: [] int32 q in 1..k.
      epistasis: [] strength e >= 0 of the cubic response; 0 in the paper. Above 4, r is no longer between 0 and 1.
    """

    transition: jax.Array
    motifs: jax.Array
    offsets: jax.Array
    quantization: jax.Array
    epistasis: jax.Array


class Certificate(NamedTuple):
    """Why a sequence has its value.

    Attributes:
      value: [] f, with 0 for an infeasible sequence.
      feasible: [] whether no transition is banned.
      quality: [c] h_i, before the response.
      positions: [c] int32 the first place at which motif i is as complete as anywhere; -1 if it is longer than the sequence.
    """

    value: jax.Array
    feasible: jax.Array
    quality: jax.Array
    positions: jax.Array


# --- instances


def instance(
    transition: ArrayLike, motifs: ArrayLike, spacings: ArrayLike, *, quantization: ArrayLike | None = None, epistasis: ArrayLike = 0.0
) -> Ehrlich:
    """An instance from its parts, for instance from those of another implementation.

    Args:
      transition: [v v] transition probabilities, 0 where banned.
      motifs: [c k] integer letters.
      spacings: [c k-1] distances between neighbouring letters of a motif, each at least 1.
      quantization: [] q; None is k, the finest. Traced.
      epistasis: [] e. Traced.

    Returns:
      `Ehrlich`.

    Raises:
      ValueError: on shapes that do not agree; and where values are at hand, on rows that are not probabilities, letters out of range, distances
        below 1 or a `quantization` outside 1..k.
    """
    name = "ehrlich.instance"
    axes = checks.check_shapes(name, transition=(transition, "v v"), motifs=(motifs, "c k"))
    c, k, v = axes["c"], axes["k"], axes["v"]
    if np.shape(spacings) != (c, k - 1):
        raise ValueError(f"{name}: 'spacings' has shape {np.shape(spacings)}, expected [c k-1] = ({c}, {k - 1})")
    checks.require_integers(name, motifs=motifs, spacings=spacings)
    quantization = k if quantization is None else quantization
    if checks.is_concrete(transition):
        rows = np.asarray(transition, np.float64)
        if rows.min() < 0 or np.abs(rows.sum(1) - 1).max() > 1e-5:
            raise ValueError(f"{name}: rows of 'transition' must be probabilities that sum to 1; divide them by their sums")
    if checks.is_concrete(motifs) and not (np.min(np.asarray(motifs)) >= 0 and np.max(np.asarray(motifs)) < v):
        raise ValueError(f"{name}: 'motifs' holds letters outside 0..{v - 1}")
    if checks.is_concrete(spacings) and np.size(np.asarray(spacings)) and np.min(np.asarray(spacings)) < 1:
        raise ValueError(f"{name}: 'spacings' holds {np.min(np.asarray(spacings))}, expected at least 1")
    if checks.is_concrete(quantization) and not 1 <= int(np.asarray(quantization)) <= k:
        raise ValueError(f"{name}: 'quantization' is {int(np.asarray(quantization))}, expected within 1..k with k={k}")
    gaps = jnp.asarray(spacings).astype(jnp.int32)
    probabilities = dtypes.at_least_float32(transition)
    return Ehrlich(
        transition=probabilities,
        motifs=jnp.asarray(motifs).astype(jnp.int32),
        offsets=jnp.concatenate([jnp.zeros((c, 1), jnp.int32), jnp.cumsum(gaps, axis=1, dtype=jnp.int32)], axis=1),
        quantization=jnp.asarray(quantization).astype(jnp.int32),
        epistasis=jnp.asarray(epistasis).astype(probabilities.dtype),
    )


def random_instance(
    key: jax.Array,
    *,
    num_letters: int,
    length: int,
    num_motifs: int,
    motif_length: int,
    quantization: int | None = None,
    epistasis: ArrayLike = 0.0,
    bandwidth: int | None = None,
    temperature: ArrayLike = 0.5,
    motif_repeats: bool = True,
) -> Ehrlich:
    """A random instance of which `optimal_sequence` is a feasible optimum.

    Transition matrix: rows softmax(N(0, 1)/temperature), kept where a circulant band of half-width `bandwidth`, its rows shuffled, is 1 or on the
    diagonal. 2 bandwidth + 1 > v/2 letters may follow every letter and precede every letter, so two steps lead from anywhere to anywhere
    and the chain is ergodic. Motifs: one path of c k letters of the stationary chain, cut into c pieces; as a letter may always follow itself,
    motifs in their order, gaps filled by repeats, are feasible. Spacings: 1 + floor(S w), S = (l - c k) // c, w uniform numbers over their sum.

    Args:
      key: Typed key.
      num_letters: v, at least 3. Static.
      length: l of the sequences; only the spacings depend on it. Static.
      num_motifs: c. Static.
      motif_length: k. Static.
      quantization: q, a number of 1..k; None is k. Static.
      epistasis: [] e. Traced.
      bandwidth: Half-width of the band; None is floor(0.4 v), which bans about a fifth of the transitions (none for v = 3 and 5). Static.
      temperature: [] of the softmax; small values make the chain's favourites stronger. Traced.
      motif_repeats: Whether a letter may follow itself in the motifs, as in the official code. With few letters such instances can be trivial (a
        letter that hardly ever changes makes 0 0 0 0 of all motifs); False draws each motif letter among the others. Static.

    Returns:
      `Ehrlich` in the default float dtype.

    Raises:
      ValueError: if the motifs do not fit into the length, or sizes are out of range.

    Reference: arXiv:2407.00236 and pytorch-holo 0.0.5 (constants 0.4 and 0.5); its random numbers are its own.
    """
    name = "ehrlich.random_instance"
    for argument, count, least in (
        ("num_letters", num_letters, 3),
        ("num_motifs", num_motifs, 1),
        ("motif_length", motif_length, 1),
    ):
        if count < least:
            raise ValueError(f"{name}: {argument!r} is {count}, expected at least {least}")
    if num_motifs * motif_length > length:
        raise ValueError(f"{name}: {num_motifs} motifs of {motif_length} letters do not fit into 'length' {length}; shorten or drop some")
    width = 2 * (int(0.4 * num_letters) if bandwidth is None else bandwidth) + 1
    if not num_letters < 2 * width:
        raise ValueError(f"{name}: 'bandwidth' {bandwidth} lets {width} of {num_letters} letters follow, expected more than half of them")
    quantization = motif_length if quantization is None else quantization
    if not 1 <= quantization <= motif_length:
        raise ValueError(f"{name}: 'quantization' is {quantization}, expected within 1..motif_length={motif_length}")

    key_normal, key_rows, key_motifs, key_gaps = jax.random.split(key, 4)
    normal = jax.random.normal(key_normal, (num_letters, num_letters))
    letters = np.arange(num_letters)
    band = (letters[None, :] - letters[:, None] + width // 2) % num_letters < width  # row i: i - bandwidth .. i + bandwidth, around the end
    allowed = jnp.asarray(band)[jax.random.permutation(key_rows, num_letters)] | jnp.asarray(np.eye(num_letters, dtype=bool))
    transition = jax.nn.softmax(jnp.where(allowed, normal / jnp.asarray(temperature).astype(normal.dtype), -jnp.inf), axis=1)
    transition = jnp.where(allowed, jnp.maximum(transition, jnp.finfo(normal.dtype).tiny), 0)  # what underflows is not banned

    moves = transition if motif_repeats else jnp.where(jnp.asarray(np.eye(num_letters, dtype=bool)), 0, transition)
    pi = stationary_distribution(transition)
    motifs = _chain(key_motifs, pi, moves, num_motifs * motif_length).reshape(num_motifs, motif_length)
    slack = (length - num_motifs * motif_length) // num_motifs
    weights = jax.random.uniform(key_gaps, (num_motifs, motif_length - 1), minval=1e-6)
    extra = jnp.floor(slack * (weights / jnp.sum(weights, axis=1, keepdims=True))).astype(jnp.int32)
    extra = jnp.minimum(jnp.cumsum(extra, axis=1), slack)  # never beyond the slack, whatever the rounding: the motifs fit
    offsets = jnp.concatenate(
        [jnp.zeros((num_motifs, 1), jnp.int32), extra + jnp.arange(1, motif_length, dtype=jnp.int32)[None, :]], axis=1
    )
    return Ehrlich(
        transition=transition,
        motifs=motifs,
        offsets=offsets,
        quantization=jnp.asarray(quantization, jnp.int32),
        epistasis=jnp.asarray(epistasis).astype(transition.dtype),
    )


def stationary_distribution(transition: ArrayLike) -> jax.Array:
    """pi with pi P = pi and sum 1, of an ergodic chain: the solution of (I - P^T + 1 1^T) pi = 1.

    Args:
      transition: [v v] rows sum to one.

    Returns:
      [v] probabilities, float32 or wider.

    Raises:
      ValueError: unless the matrix is square.
    """
    checks.check_shapes("ehrlich.stationary_distribution", transition=(transition, "v v"))
    p = dtypes.at_least_float32(transition)
    solution = jnp.linalg.solve(jnp.eye(p.shape[0], dtype=p.dtype) - p.T + 1, jnp.ones(p.shape[0], p.dtype))
    solution = jnp.maximum(solution, 0)
    return solution / jnp.sum(solution)


def _chain(key: jax.Array, pi: jax.Array, transition: jax.Array, length: int) -> jax.Array:
    """[length] letters of the chain that starts from pi [v]; rows of the transition matrix need not be normalised."""
    log_p = jnp.where(transition > 0, jnp.log(jnp.where(transition > 0, transition, 1)), -jnp.inf)
    key_first, key_rest = jax.random.split(key)
    first = jax.random.categorical(key_first, jnp.log(pi)).astype(jnp.int32)

    def follow(letter: jax.Array, key_step: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn = jax.random.categorical(key_step, log_p[letter]).astype(jnp.int32)
        return drawn, drawn

    _, rest = jax.lax.scan(follow, first, jax.random.split(key_rest, length - 1))
    return jnp.concatenate([first[None], rest])


def sample_feasible(key: jax.Array, problem: Ehrlich, *, length: int) -> jax.Array:
    """One feasible sequence: a path of the stationary chain. More by `vmap` over keys.

    Args:
      key: Typed key.
      problem: The instance.
      length: l, at least 1. Static.

    Returns:
      [l] int32 tokens.

    Raises:
      ValueError: on a `length` below 1 or shapes that do not agree.

    Reference: arXiv:2407.00236, the initial solutions of its optimisers.
    """
    _check("ehrlich.sample_feasible", problem)
    if length < 1:
        raise ValueError(f"ehrlich.sample_feasible: 'length' is {length}, expected at least 1")
    return _chain(key, stationary_distribution(problem.transition), problem.transition, length)


# --- the oracle


def is_feasible(problem: Ehrlich, tokens: ArrayLike) -> jax.Array:
    """Whether no transition of the sequence is banned; every first letter is allowed.

    Args:
      problem: The instance.
      tokens: [l] integers in 0..v-1.

    Returns:
      [] boolean.

    Raises:
      ValueError: on shapes that do not agree or tokens that are not integers.
    """
    tokens = _tokens("ehrlich.is_feasible", problem, tokens)
    return jnp.all(problem.transition[tokens[:-1], tokens[1:]] > 0)


def _counts(problem: Ehrlich, matches: jax.Array) -> jax.Array:
    """[c l] how much of motif i is there if it starts at p; -inf where it would stick out. `matches` is [c k l]: letter j of motif i at t."""
    length = matches.shape[-1]
    places = jnp.arange(length, dtype=jnp.int32)[None, None, :] + problem.offsets[:, :, None]
    found = jnp.take_along_axis(matches, jnp.minimum(places, length - 1), axis=2)
    inside = problem.offsets[:, -1:] + jnp.arange(length, dtype=jnp.int32)[None, :] < length
    return jnp.where(inside, jnp.sum(found, axis=1), -jnp.inf)


def _quality(problem: Ehrlich, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = problem.transition.dtype
    counts = _counts(problem, (tokens[None, None, :] == problem.motifs[:, :, None]).astype(dtype))
    best = jnp.max(counts, axis=1)
    whole = jnp.maximum(best, 0).astype(jnp.int32)  # exact: counts are small integers
    steps = (whole * problem.quantization) // problem.motifs.shape[1]
    positions = jnp.where(jnp.isneginf(best), -1, jnp.argmax(counts, axis=1).astype(jnp.int32))
    return steps.astype(dtype) / problem.quantization.astype(dtype), positions


def _response(problem: Ehrlich, quality: jax.Array) -> jax.Array:
    return jnp.prod(quality * (1 + problem.epistasis * quality * (quality - 1)))


def motif_quality(problem: Ehrlich, tokens: ArrayLike) -> jax.Array:
    """h_i(x) of every motif, whether or not the sequence is feasible.

    Args:
      problem: The instance.
      tokens: [l] integers.

    Returns:
      [c] multiples of 1/q in [0, 1]; 0 for a motif longer than the sequence.

    Raises:
      ValueError: on shapes that do not agree or tokens that are not integers.

    Reference: arXiv:2407.00236, the quantised motif presence h_q.
    """
    return _quality(problem, _tokens("ehrlich.motif_quality", problem, tokens))[0]


def value(problem: Ehrlich, tokens: ArrayLike, *, infeasible_value: ArrayLike = 0.0) -> jax.Array:
    """f(x) of one sequence, exact. A population by `vmap`: `jax.vmap(ehrlich.value, in_axes=(None, 0))(problem, population)`.

    Args:
      problem: The instance.
      tokens: [l] integers in 0..v-1; l need not be that of the spacings.
      infeasible_value: [] what an infeasible sequence is worth: 0, or -inf as in pytorch-holo. Traced.

    Returns:
      [] in [0, 1], or `infeasible_value`; float32 or wider.

    Raises:
      ValueError: on shapes that do not agree or tokens that are not integers.

    Reference: arXiv:2407.00236; the response r is that of pytorch-holo 0.0.5.
    """
    tokens = _tokens("ehrlich.value", problem, tokens)
    held = _response(problem, _quality(problem, tokens)[0])
    return jnp.where(is_feasible(problem, tokens), held, jnp.asarray(infeasible_value).astype(held.dtype))


def certify(problem: Ehrlich, tokens: ArrayLike) -> Certificate:
    """The value of one sequence and what it rests on: a proof of optimality if the value is `OPTIMUM`.

    Args:
      problem: The instance.
      tokens: [l] integers.

    Returns:
      `Certificate`.

    Raises:
      ValueError: on shapes that do not agree or tokens that are not integers.
    """
    tokens = _tokens("ehrlich.certify", problem, tokens)
    quality, positions = _quality(problem, tokens)
    feasible = is_feasible(problem, tokens)
    held = _response(problem, quality)
    return Certificate(value=jnp.where(feasible, held, jnp.zeros_like(held)), feasible=feasible, quality=quality, positions=positions)


def optimal_sequence(problem: Ehrlich, *, length: int) -> jax.Array:
    """A sequence of value 1, without any search: the motifs one after the other, every gap and the end filled by the letter before.

    Feasible if every letter may follow itself and each motif's first letter the last one of the motif before, as in `random_instance`; for an
    instance of other origin ask `certify`.

    Args:
      problem: The instance.
      length: l. Static.

    Returns:
      [l] int32 tokens.

    Raises:
      ValueError: on shapes that do not agree, and where the spacings are at hand, if the motifs need more than `length` places.
    """
    name = "ehrlich.optimal_sequence"
    _check(name, problem)
    if checks.is_concrete(problem.offsets):
        needed = int(np.sum(np.asarray(problem.offsets)[..., -1] + 1))
        if needed > length:
            raise ValueError(f"{name}: 'length' is {length}, but the spaced motifs need {needed} places")
    spans = problem.offsets[:, -1] + 1
    anchors = (jnp.cumsum(spans, dtype=jnp.int32) - spans)[:, None] + problem.offsets  # increasing from motif to motif
    holder = jnp.searchsorted(anchors.reshape(-1), jnp.arange(length, dtype=jnp.int32), side="right") - 1
    return problem.motifs.reshape(-1)[holder]


def score(problem: Ehrlich, x: ArrayLike) -> jax.Array:
    """The value of the largest letter of each row x [l v]: the oracle as a `score_fn(params, x)`, params = problem; its gradient is 0."""
    checks.check_shapes("ehrlich.score", transition=(problem.transition, "v v"), x=(x, "l v"))
    return value(problem, jnp.argmax(jnp.asarray(x), axis=-1))


def relaxed_value(problem: Ehrlich, x: ArrayLike) -> jax.Array:
    """A differentiable extension to rows of probabilities: P(feasible) prod_i r(max_p mean_j x[p + o_ij, a_ij]).

    P(feasible) is exact for letters drawn independently from the rows. On one-hot rows this is f without quantisation: `value` if q = k. A
    `score_fn(params, x)` with params = problem, for methods that need gradients.

    Args:
      problem: The instance.
      x: [l v] rows of probabilities.

    Returns:
      [] in [0, 1], float32 or wider.

    Raises:
      ValueError: on shapes that do not agree.

    Reference: not in arXiv:2407.00236.
    """
    checks.check_shapes("ehrlich.relaxed_value", transition=(problem.transition, "v v"), x=(x, "l v"))
    _check("ehrlich.relaxed_value", problem)
    x = dtypes.at_least_float32(x)
    allowed = (problem.transition > 0).astype(x.dtype)
    reached, _ = jax.lax.scan(lambda mass, row: ((mass @ allowed) * row, None), x[0], x[1:])
    matches = jnp.moveaxis(x[:, problem.motifs], 0, -1)  # [c k l]
    quality = jnp.max(_counts(problem, matches), axis=1) / problem.motifs.shape[1]
    quality = jnp.where(jnp.isneginf(quality), 0.0, quality).astype(problem.transition.dtype)
    return jnp.sum(reached) * _response(problem, quality).astype(x.dtype)


def _check(name: str, problem: Ehrlich) -> None:
    checks.check_shapes(
        name,
        transition=(problem.transition, "v v"),
        motifs=(problem.motifs, "c k"),
        offsets=(problem.offsets, "c k"),
        quantization=(problem.quantization, ""),
        epistasis=(problem.epistasis, ""),
    )


def _tokens(name: str, problem: Ehrlich, tokens: ArrayLike) -> jax.Array:
    _check(name, problem)
    checks.check_shapes(name, tokens=(tokens, "l"))
    checks.require_integers(name, tokens=tokens)
    return jnp.asarray(tokens).astype(jnp.int32)
