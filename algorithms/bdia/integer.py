"""Bit-exact inversion: the BDIA recurrence on integers.

A state is an int32 array n with value z = n 2^-l. The increment inc_i(n_i) = round(2^l (B_i z_i + C_i eps(z_i, t_i))) depends on n_i alone, so

    n_{i-1} = gamma * n_{i+1} + inc_i(n_i)

is undone exactly if the multiplication by gamma = p/q is. Reversible multiplication keeps the remainders of its divisions in an integer buffer:
(N - 1) log2(1/gamma) bits per element, just the precision that floating point loses. gamma = 1 needs none.
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms.bdia.grid import Grid, checked, climbed, move_coefficients
from janax.algorithms.bdia.prediction import NoiseFn, evaluator
from janax.algorithms.bdia.two_step import coefficients
from janax.jaxlib_ext import checks, dtypes

__all__ = ["IntegerState", "dequantize", "integer_decode", "integer_encode", "integer_sample", "quantize", "side_bits"]

_LIMB = 16  # bits per limb: limb * q + carry stays below 2^32


class IntegerState(NamedTuple):
    """Two neighbouring levels in fixed point, and what the divisions left over.

    Attributes:
      n_i: [...] int32, level i.
      n_ip1: [...] int32, level i + 1.
      side: [limbs ...] uint32 holding 16 bits each, little end first: the remainder buffer; all zero at the end of a full return trip (a
        checksum). No limbs for gamma = 1.
      overflow: [] bool, whether a state ever left the int32 range (then nothing is guaranteed; use fewer bits).
    """

    n_i: jax.Array
    n_ip1: jax.Array
    side: jax.Array
    overflow: jax.Array


def quantize(z: jax.Array, *, bits: int) -> jax.Array:
    """[...] int32 round(z 2^bits)."""
    return jnp.round(dtypes.at_least_float32(z) * (2.0**bits)).astype(jnp.int32)


def dequantize(n: jax.Array, *, bits: int, dtype: Any = jnp.float32) -> jax.Array:
    """[...] n 2^-bits; exact in float64, and in float32 while |n| <= 2^24."""
    return n.astype(dtype) * jnp.asarray(2.0**-bits, dtype)


def side_bits(num_steps: int, gamma: Fraction | float) -> float:
    """Information per element that a run of N steps has to keep beside the states: (N - 1) log2(1 / gamma) bits."""
    return (num_steps - 1) * math.log2(1 / Fraction(gamma)) if gamma != 1 else 0.0


def integer_sample(
    noise_fn: NoiseFn,
    params: Any,
    z_N: jax.Array,
    grid: Grid,
    *,
    gamma: Fraction | float = 1,
    bits: int = 16,
    coords: str = "native",
    cond: Any = None,
) -> IntegerState:
    """Noise to data on integers; quantises z_N, takes a DDIM step, then `integer_decode`.

    Args:
      noise_fn: (params, z, t, cond) -> eps, given the dequantised state. Static.
      params: Its parameters.
      z_N: [...] noise.
      grid: N + 1 levels.
      gamma: A rational in (0, 1], e.g. Fraction(24, 25) or 0.5; numerator and denominator below 2^15. Static.
      bits: l, fractional bits; |z| must stay below 2^(31 - l). The result differs from floating point by about 2^(5 - l). Static.
      coords: Must make every A_i equal to gamma: "native", or "vp" on a VP grid. Static.
      cond: Passed on to the network.

    Returns:
      The state at levels (0, 1) with the side buffer.

    Raises:
      ValueError: on a gamma that is not such a rational, or bits outside 1..30.
    """
    grid = checked("integer_sample", grid)
    rule = _Rule("integer_sample", noise_fn, params, grid, gamma, bits, coords, cond)
    top = grid.num_steps
    scale, slope = move_coefficients(grid, np.array(top), np.array(top - 1))
    n_N = quantize(z_N, bits=bits)
    n_Nm1, overflow = rule.increment(n_N, *(jnp.asarray(x, rule.dtype) for x in (grid.time[top], scale, slope)))
    state = IntegerState(n_i=n_Nm1, n_ip1=n_N, side=rule.empty_side(n_N, top), overflow=overflow)
    return rule.run(state, top, down=True)


def integer_encode(
    noise_fn: NoiseFn,
    params: Any,
    z_0: jax.Array | IntegerState,
    grid: Grid,
    *,
    gamma: Fraction | float = 1,
    bits: int = 16,
    coords: str = "native",
    cond: Any = None,
    num_levels: int | None = None,
) -> IntegerState:
    """Data to noise on integers, the bit-exact inverse of `integer_decode` and, from its result, of `integer_sample`.

    Args:
      noise_fn: As in `integer_sample`; the same compiled network in both directions, since other fusions may change the last bit. Static.
      params: Its parameters.
      z_0: [...] data (quantised here), or the state at levels (0, 1).
      grid: N + 1 levels.
      gamma: As in `integer_sample`. Static.
      bits: As in `integer_sample`. Static.
      coords: As in `integer_sample`. Static.
      cond: Passed on to the network.
      num_levels: M in 2..N, N by default. Static.

    Returns:
      The state at levels (M - 1, M).

    Raises:
      ValueError: as `integer_sample`; nan in a concrete z_0.
    """
    grid = checked("integer_encode", grid, invertible_top=False)
    rule = _Rule("integer_encode", noise_fn, params, grid, gamma, bits, coords, cond)
    if isinstance(z_0, tuple):
        state = z_0
    else:
        checks.require_finite("integer_encode", z_0=z_0)
        scale, slope = move_coefficients(grid, np.array(0), np.array(1))
        n_0 = quantize(z_0, bits=bits)
        n_1, overflow = rule.increment(n_0, *(jnp.asarray(x, rule.dtype) for x in (grid.time[0], scale, slope)))
        state = IntegerState(n_i=n_0, n_ip1=n_1, side=rule.empty_side(n_0, grid.num_steps), overflow=overflow)
    return rule.run(state, num_levels, down=False)


def integer_decode(
    noise_fn: NoiseFn,
    params: Any,
    state: IntegerState,
    grid: Grid,
    *,
    gamma: Fraction | float = 1,
    bits: int = 16,
    coords: str = "native",
    cond: Any = None,
    num_levels: int | None = None,
) -> IntegerState:
    """Levels (M - 1, M) to (0, 1) on integers; arguments as in `integer_encode`. A return trip gives every bit back and an empty side buffer."""
    grid = checked("integer_decode", grid, invertible_top=False)
    if not isinstance(state, tuple) or len(state) != 4:
        raise ValueError(f"integer_decode: 'state' must be IntegerState(n_i, n_ip1, side, overflow), got {type(state).__name__}")
    rule = _Rule("integer_decode", noise_fn, params, grid, gamma, bits, coords, cond)
    return rule.run(state, num_levels, down=True)


class _Rule:
    """One increment function, shared by both directions."""

    def __init__(
        self,
        function: str,
        noise_fn: NoiseFn,
        params: Any,
        grid: Grid,
        gamma: Fraction | float,
        bits: int,
        coords: str,
        cond: Any,
    ):
        self.function, self.grid, self.bits = function, grid, bits
        ratio = Fraction(gamma).limit_denominator(2**15 - 1)
        if not 0 < ratio <= 1 or abs(float(ratio) - float(gamma)) > 1e-12:
            raise ValueError(
                f"{function}: 'gamma' is {gamma}, expected a rational in (0, 1] with a denominator below 2^15, e.g. Fraction(24, 25)"
            )
        if not 1 <= bits <= 30:
            raise ValueError(f"{function}: 'bits' is {bits}, expected 1 to 30; 16 to 20 is usual")
        self.p, self.q = ratio.numerator, ratio.denominator
        table = coefficients(grid, float(ratio), coords=coords)
        if not np.allclose(table.a, float(ratio), rtol=1e-12):
            raise ValueError(
                f"{function}: coords={coords!r} makes A_i vary over this grid, which integers cannot follow; use coords='native'"
            )
        self.dtype = jnp.result_type(float)  # float64 where it is enabled
        self.table = table
        evaluate = evaluator(function, noise_fn)
        self.network = lambda z, t: evaluate(params, z, t, cond)

    def increment(self, n: jax.Array, t: jax.Array, b: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = dequantize(n, bits=self.bits, dtype=self.dtype)
        value = jnp.round((b * z + c * self.network(z, t)) * (2.0**self.bits))
        return value.astype(jnp.int32), jnp.any(~(jnp.abs(value) < 2.0**30))

    def empty_side(self, n: jax.Array, num_steps: int) -> jax.Array:
        """Room for sum_k (q/p)^k (q-1)/p < (q/p)^(N-1) q, times q while multiplying."""
        if self.p == self.q:
            return jnp.zeros((0, *n.shape), jnp.uint32)
        bits = (num_steps - 1) * math.log2(self.q / self.p) + 2 * math.log2(self.q) + 1
        return jnp.zeros((math.ceil(bits / _LIMB), *n.shape), jnp.uint32)

    def run(self, state: IntegerState, num_levels: int | None, *, down: bool) -> IntegerState:
        levels = climbed(self.function, num_levels, self.grid, lowest=2)
        checks.check_shapes(self.function, n_i=(state.n_i, "..."), n_ip1=(state.n_ip1, "..."))
        order = slice(None, None, -1) if down else slice(None)
        rows = (self.grid.time[1:levels], self.table.b[: levels - 1], self.table.c[: levels - 1])  # type: ignore[index]
        xs = tuple(jnp.asarray(np.asarray(row)[order], self.dtype) for row in rows)

        def body(state: IntegerState, x: Any) -> tuple[IntegerState, None]:
            pivot = state.n_i if down else state.n_ip1
            increment, bad = self.increment(pivot, *x)
            if down:
                scaled, side = self._scale(state.n_ip1, state.side, self.p, self.q)
                new = IntegerState(n_i=scaled + increment, n_ip1=pivot, side=side, overflow=state.overflow)
                out = new.n_i
            else:
                scaled, side = self._scale(state.n_i - increment, state.side, self.q, self.p)
                new = IntegerState(n_i=pivot, n_ip1=scaled, side=side, overflow=state.overflow)
                out = scaled
            bad = bad | jnp.any(jnp.abs(out) >= 2**30)
            return new._replace(overflow=new.overflow | bad), None

        return jax.lax.scan(body, state, xs)[0]

    def _scale(self, c: jax.Array, side: jax.Array, p: int, q: int) -> tuple[jax.Array, jax.Array]:
        """c -> about c p / q, reversibly: swapping p and q undoes it (Maclaurin et al., arXiv:1502.03492, section 3.1)."""
        if p == q:
            return c, side
        side = _multiply_add(side, q, jnp.mod(c, q).astype(jnp.uint32))
        c = jnp.floor_divide(c, q)
        side, remainder = _divide(side, p)
        return c * p + remainder.astype(jnp.int32), side


def _multiply_add(limbs: jax.Array, factor: int, addend: jax.Array) -> jax.Array:
    """limbs * factor + addend, in base 2^16."""

    def body(carry: jax.Array, limb: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = limb * jnp.uint32(factor) + carry
        return total >> _LIMB, total & jnp.uint32(2**_LIMB - 1)

    return jax.lax.scan(body, addend, limbs)[1]


def _divide(limbs: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
    """(limbs // divisor, limbs % divisor), in base 2^16."""

    def body(remainder: jax.Array, limb: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = (remainder << _LIMB) + limb
        return total % jnp.uint32(divisor), total // jnp.uint32(divisor)

    remainder, quotient = jax.lax.scan(body, jnp.zeros_like(limbs[0]), limbs, reverse=True)
    return quotient, remainder
