"""FLOPs and bytes of a program, counted from its jaxpr with the trip counts of its loops."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

__all__ = ["Cost", "count", "count_jaxpr"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a program computes, over all devices.

    Attributes:
      matmul_bf16: FLOPs of matrix products and convolutions of inputs of 16 bits or fewer; a multiplication and an addition are two.
      matmul_f32: The same of float32 inputs at default or "high" precision.
      matmul_f32_highest: The same of float32 inputs at precision "highest", and of wider inputs.
      elementwise: Floating-point operations of everything else that is counted: one per element of the result of arithmetic, one per
        element of the operand of a reduction, 5 n log2 n per Fourier transform, n^3 / 3 per Cholesky and 2 n^3 / 3 per LU factorisation.
      transcendental: Evaluations of exp, log, tanh, erf, sqrt, powers and the like.
      matmul_bytes: Bytes of the operands and results of matrix products, convolutions, gathers, scatters and kernels, once per execution.
      io_bytes: Bytes of the program's arguments and results.
      unknown_loops: Number of `while` loops whose trip count the jaxpr does not tell; their body is counted once.
      uncounted: Names of primitives met whose work is unknown (callbacks, foreign calls, eigenvalues) and counted as nothing.
    """

    matmul_bf16: float = 0.0
    matmul_f32: float = 0.0
    matmul_f32_highest: float = 0.0
    elementwise: float = 0.0
    transcendental: float = 0.0
    matmul_bytes: float = 0.0
    io_bytes: float = 0.0
    unknown_loops: int = 0
    uncounted: tuple[str, ...] = ()

    @property
    def matmul(self) -> float:
        """FLOPs of all matrix products and convolutions."""
        return self.matmul_bf16 + self.matmul_f32 + self.matmul_f32_highest

    @property
    def flops(self) -> float:
        """All FLOPs, a transcendental counted as one."""
        return self.matmul + self.elementwise + self.transcendental

    @property
    def bytes(self) -> float:
        """Memory traffic when everything but matrix products, gathers and kernels is fused away: `matmul_bytes` + `io_bytes`."""
        return self.matmul_bytes + self.io_bytes

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            **{name: getattr(self, name) + getattr(other, name) for name in _SUMS},
            unknown_loops=self.unknown_loops + other.unknown_loops,
            uncounted=tuple(sorted({*self.uncounted, *other.uncounted})),
        )

    def times(self, factor: float) -> "Cost":
        """The cost of `factor` executions."""
        return dataclasses.replace(self, **{name: getattr(self, name) * factor for name in _SUMS})


_SUMS = ("matmul_bf16", "matmul_f32", "matmul_f32_highest", "elementwise", "transcendental", "matmul_bytes", "io_bytes")


def count(fn: Callable[..., Any], *args: Any) -> Cost:
    """Counts what `fn(*args)` computes; neither compiles nor runs it.

    Args:
      fn: Any function of arrays, jitted or not.
      *args: Its arguments: arrays or `jax.ShapeDtypeStruct`s, in any tree.

    Returns:
      The cost over all devices. Recomputation under `jax.checkpoint` is counted, a `cond` costs its dearest branch, dead code is not
      removed, and the multiplications by zero of padded or strided convolutions count as work.
    """
    return count_jaxpr(jax.make_jaxpr(fn)(*args))


def count_jaxpr(closed: core.ClosedJaxpr) -> Cost:
    """As `count`, from a jaxpr."""
    jaxpr = closed.jaxpr
    io_bytes = sum(_num_bytes(v.aval) for v in (*jaxpr.invars, *jaxpr.constvars, *jaxpr.outvars))
    return _jaxpr_cost(jaxpr) + Cost(io_bytes=io_bytes)


def _jaxpr_cost(jaxpr: Any) -> Cost:
    total = Cost()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        total = total + _eqn_cost(eqn)
    return total


def _eqn_cost(eqn: Any) -> Cost:
    name, params = eqn.primitive.name, eqn.params
    if name in _MATMULS:
        return dataclasses.replace(_by_dtype(eqn, _MATMULS[name](eqn)), matmul_bytes=_traffic(eqn))
    if name == "scan":
        return _jaxpr_cost(params["jaxpr"]).times(params["length"])
    if name == "while":
        body = _jaxpr_cost(params["cond_jaxpr"]) + _jaxpr_cost(params["body_jaxpr"])
        return body + Cost(unknown_loops=1)
    if name == "cond":
        return max((_jaxpr_cost(branch) for branch in params["branches"]), key=lambda cost: (cost.flops, cost.bytes))
    if name == "shard_map":
        # The body is written for one device and runs on each of the manual axes; under the others it is an ordinary program.
        manual = params.get("newly_manual_axes", params.get("manual_axes", ()))
        return _jaxpr_cost(params["jaxpr"]).times(math.prod(params["mesh"].shape[axis] for axis in manual))
    if name == "pallas_call":
        return _kernel_cost(eqn)
    if name == "custom_linear_solve":
        return _jaxpr_cost(params["jaxprs"].solve)
    if name in _UNCOUNTED:
        return Cost(uncounted=(name,))
    inner = list(_inner_jaxprs(params))
    if inner and not name.startswith(("reduce", "scatter", "cum", "select_and", "sort", "argm")):
        # A custom derivative carries one jaxpr for the value; its rules are functions, and their products stand in the jaxpr of a gradient.
        return _jaxpr_cost(inner[0])
    if name in _TRANSCENDENTAL:
        return Cost(transcendental=_num_floats(eqn.outvars[0].aval))
    if name in _ARITHMETIC:
        return Cost(elementwise=_num_floats(eqn.outvars[0].aval))
    if name in _REDUCTIONS:
        return Cost(elementwise=_num_floats(eqn.invars[0].aval))
    if name == "gather":
        return Cost(matmul_bytes=2 * _num_bytes(eqn.outvars[0].aval))
    if name.startswith("scatter"):
        updates = eqn.invars[-1].aval  # the operand is updated in place: read (unless overwritten), written, and the update read
        adds = 0.0 if name == "scatter" else _num_floats(updates)
        return Cost(elementwise=adds, matmul_bytes=(2 if name == "scatter" else 3) * _num_bytes(updates))
    if name in _OTHERS:
        return Cost(elementwise=_OTHERS[name](eqn))
    return Cost()


def _dot_flops(eqn: Any) -> float:
    (contract, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval
    return 2.0 * eqn.outvars[0].aval.size * math.prod(lhs.shape[axis] for axis in contract)


def _conv_flops(eqn: Any) -> float:
    rhs, spec = eqn.invars[1].aval, eqn.params["dimension_numbers"].rhs_spec  # (features out, features in per group, *window)
    window = math.prod(rhs.shape[axis] for axis in spec[1:])
    return 2.0 * eqn.outvars[0].aval.size * window / math.prod(eqn.params["lhs_dilation"])


def _ragged_dot_flops(eqn: Any) -> float:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, _), _ = numbers.dot_dimension_numbers
    lhs, rhs, out = (v.aval for v in (*eqn.invars[:2], *eqn.outvars))
    flops = 2.0 * out.size * math.prod(lhs.shape[axis] for axis in contract)
    ragged_contraction = not numbers.rhs_group_dimensions and out.ndim > lhs.ndim + rhs.ndim - 2 * len(contract)
    return flops / out.shape[0] if ragged_contraction else flops  # each group contracts only its own rows


_MATMULS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot_flops,
    "conv_general_dilated": _conv_flops,
    "ragged_dot_general": _ragged_dot_flops,
}


def _by_dtype(eqn: Any, flops: float) -> Cost:
    width = max(jnp.dtype(v.aval.dtype).itemsize / (2 if jnp.issubdtype(v.aval.dtype, jnp.complexfloating) else 1) for v in eqn.invars[:2])
    if any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in eqn.invars[:2]):
        flops *= 4
    if width <= 2:
        return Cost(matmul_bf16=flops)
    precision = eqn.params.get("precision")
    precisions = precision if isinstance(precision, tuple) else (precision,)
    if width > 4 or jax.lax.Precision.HIGHEST in precisions:
        return Cost(matmul_f32_highest=flops)
    return Cost(matmul_f32=flops)


def _traffic(eqn: Any) -> int:
    return sum(_num_bytes(v.aval) for v in (*eqn.invars, *eqn.outvars))


def _kernel_cost(eqn: Any) -> Cost:
    """A Pallas kernel: its author's estimate if there is one, otherwise the body once per grid point; operands and results move once."""
    estimate = eqn.params.get("cost_estimate")
    if estimate is not None:
        moved = estimate.bytes_accessed or _traffic(eqn)
        cost = _by_dtype(eqn, float(estimate.flops)) if len(eqn.invars) > 1 else Cost(elementwise=float(estimate.flops))
        return dataclasses.replace(cost, transcendental=float(estimate.transcendentals), matmul_bytes=float(moved))
    grid = [length for length in eqn.params["grid_mapping"].grid if isinstance(length, int)]
    body = _jaxpr_cost(eqn.params["jaxpr"]).times(math.prod(grid))
    return dataclasses.replace(body, matmul_bytes=_traffic(eqn))


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.Jaxpr | core.ClosedJaxpr):
                yield item


def _num_bytes(aval: Any) -> int:
    return int(aval.size * aval.dtype.itemsize) if hasattr(aval, "dtype") and hasattr(aval, "shape") else 0


def _num_floats(aval: Any) -> float:
    return float(aval.size) if jnp.issubdtype(aval.dtype, jnp.inexact) else 0.0


def _fft_flops(eqn: Any) -> float:
    length = math.prod(eqn.params["fft_lengths"])
    real = "RFFT" in getattr(eqn.params["fft_type"], "name", str(eqn.params["fft_type"]))
    batch = max(v.aval.size for v in (eqn.invars[0], eqn.outvars[0])) / length
    return 5.0 * length * math.log2(max(length, 2)) * batch * (0.5 if real else 1.0)


def _cube(factor: float) -> Callable[[Any], float]:
    return lambda eqn: factor * eqn.invars[0].aval.size * eqn.invars[0].aval.shape[-1]


_OTHERS: dict[str, Callable[[Any], float]] = {
    "fft": _fft_flops,
    "cholesky": _cube(1 / 3),
    "lu": _cube(2 / 3),
    "triangular_solve": lambda eqn: float(eqn.outvars[0].aval.size * eqn.invars[0].aval.shape[-1]),
}


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


_UNCOUNTED = _names(
    "pure_callback io_callback ffi_call eigh eig svd qr geqrf householder_product ormqr schur hessenberg tridiagonal tridiagonal_solve"
)
_TRANSCENDENTAL = _names(
    "exp exp2 expm1 log log1p sin cos tan asin acos atan atan2 sinh cosh tanh asinh acosh atanh logistic erf erfc erf_inv "
    "lgamma digamma polygamma igamma igammac regularized_incomplete_beta bessel_i0e bessel_i1e pow sqrt rsqrt cbrt"
)
_ARITHMETIC = _names("add sub mul div rem max min neg abs sign floor ceil round integer_pow square add_any clamp nextafter")
_REDUCTIONS = _names(
    "reduce_sum reduce_max reduce_min reduce_prod reduce argmax argmin cumsum cumprod cummax cummin cumlogsumexp "
    "reduce_window reduce_window_sum reduce_window_max reduce_window_min"
)
