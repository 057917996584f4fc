"""What networks predict (noise, data, v, velocity), turned into noise; and classifier-free guidance."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks, dtypes

__all__ = [
    "KINDS",
    "Guidance",
    "NoiseFn",
    "Schedule",
    "edm_schedule",
    "evaluator",
    "flow_schedule",
    "from_noise",
    "guided",
    "noise_fn_from",
    "to_noise",
    "vp_schedule",
]

NoiseFn = Callable[..., jax.Array]
"""noise_fn(params, z, t, cond) -> eps; called without `cond` where the caller gave none. Ready for one example or for a batch: your choice."""

Schedule = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""t -> (alpha, sigma), for arrays of times."""

KINDS = ("eps", "x0", "v", "flow")


def to_noise(prediction: ArrayLike, z: ArrayLike, alpha: ArrayLike, sigma: ArrayLike, *, kind: str) -> jax.Array:
    """The noise estimate eps that a prediction at z = alpha x + sigma eps stands for.

      eps   eps = prediction
      x0    eps = (z - alpha x0) / sigma
      v     eps = (sigma z + alpha v) / (alpha^2 + sigma^2)     v = alpha eps - sigma x; the divisor is 1 if variance preserving
      flow  eps = (z + alpha v) / (alpha + sigma)               v = eps - x;             the divisor is 1 if alpha = 1 - t, sigma = t

    Args:
      prediction: [...] output of the network.
      z: [...] state.
      alpha: Signal scale, broadcastable to z.
      sigma: Noise scale, broadcastable to z; > 0 for `x0`.
      kind: What the network predicts, one of `KINDS`. Static.

    Returns:
      [...] eps in the dtype of z, computed in float32 or wider.

    Raises:
      ValueError: on an unknown kind or unequal shapes.

    Reference: Salimans and Ho, arXiv:2202.00512 (v); Liu et al., arXiv:2209.03003 (flow).
    """
    checks.one_of("to_noise", "kind", kind, KINDS)
    checks.check_shapes("to_noise", z=(z, "..."), prediction=(prediction, "..."))
    dtype, z, out = jnp.result_type(z), dtypes.at_least_float32(z), dtypes.at_least_float32(prediction)
    alpha, sigma = jnp.asarray(alpha).astype(z.dtype), jnp.asarray(sigma).astype(z.dtype)
    out = out.astype(z.dtype)
    if kind == "x0":
        out = (z - alpha * out) / sigma
    elif kind == "v":
        out = (sigma * z + alpha * out) / (alpha * alpha + sigma * sigma)
    elif kind == "flow":
        out = (z + alpha * out) / (alpha + sigma)
    return out.astype(dtype)


def from_noise(eps: ArrayLike, z: ArrayLike, alpha: ArrayLike, sigma: ArrayLike, *, kind: str) -> jax.Array:
    """The inverse of `to_noise`: what a network of the given kind would have predicted for the noise `eps`. Arguments as there."""
    checks.one_of("from_noise", "kind", kind, KINDS)
    checks.check_shapes("from_noise", z=(z, "..."), eps=(eps, "..."))
    dtype, z, eps = jnp.result_type(z), dtypes.at_least_float32(z), dtypes.at_least_float32(eps)
    alpha, sigma = jnp.asarray(alpha).astype(z.dtype), jnp.asarray(sigma).astype(z.dtype)
    eps = eps.astype(z.dtype)
    x0 = (z - sigma * eps) / alpha
    out = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[kind]
    return out.astype(dtype)


def noise_fn_from(prediction_fn: NoiseFn, schedule: Schedule, *, kind: str) -> NoiseFn:
    """A noise_fn made of a network of another kind.

    Args:
      prediction_fn: (params, z, t, cond) -> prediction.
      schedule: t -> (alpha, sigma), e.g. `vp_schedule(alphas_cumprod)`, `edm_schedule`, `flow_schedule`; t is a scalar or [b].
      kind: What the network predicts, one of `KINDS`.

    Returns:
      noise_fn(params, z, t, cond=None).
    """
    checks.one_of("noise_fn_from", "kind", kind, KINDS)

    def noise_fn(params: Any, z: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        prediction = prediction_fn(params, z, t) if cond is None else prediction_fn(params, z, t, cond)
        alpha, sigma = (_per_example(x, z) for x in schedule(jnp.asarray(t)))
        return to_noise(prediction, z, alpha, sigma, kind=kind)

    return noise_fn


def _per_example(x: jax.Array, z: jax.Array) -> jax.Array:
    return x.reshape(x.shape + (1,) * (z.ndim - x.ndim))


def vp_schedule(alphas_cumprod: ArrayLike) -> Schedule:
    """t -> (alpha, sigma) of a discrete schedule; between training steps log alphabar is interpolated linearly, outside it is held."""
    log_alphabar = np.log(np.asarray(alphas_cumprod, np.float64))

    def schedule(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        t = dtypes.at_least_float32(t)
        grid = jnp.arange(len(log_alphabar), dtype=t.dtype)
        log_a = jnp.interp(t, grid, jnp.asarray(log_alphabar, t.dtype))
        return jnp.exp(0.5 * log_a), jnp.sqrt(-jnp.expm1(log_a))

    return schedule


def edm_schedule(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """alpha = 1, sigma = t."""
    return jnp.ones_like(t), t


def flow_schedule(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """alpha = 1 - t, sigma = t."""
    return jnp.ones_like(t) - t, t


class Guidance(NamedTuple):
    """The `cond` of a guided noise_fn: all data, so a new weight or condition never recompiles and weights can be batched.

    Attributes:
      cond: Condition, in the network's own form.
      null: The unconditional counterpart, same structure and shapes.
      weight: w in eps = eps_null + w (eps_cond - eps_null); 1 is plain conditional, 0 unconditional. Scalar, or broadcastable to z.
    """

    cond: Any
    null: Any
    weight: ArrayLike


def guided(noise_fn: NoiseFn, *, one_call: bool = True) -> NoiseFn:
    """Classifier-free guidance: the returned noise_fn takes `cond=Guidance(cond, null, weight)`.

    Exact inversion needs the same weight, and the same batching of the two evaluations, in both directions: use one guided function for both.

    Args:
      noise_fn: The conditional network.
      one_call: Evaluate both conditions in one call under `vmap` (an accelerator is then better filled); two calls if False. Static.

    Returns:
      noise_fn(params, z, t, cond).

    Reference: Ho and Salimans, arXiv:2207.12598, in the weight convention of the released diffusion code (w = 1 is no guidance).
    """

    def guided_fn(params: Any, z: jax.Array, t: jax.Array, cond: Guidance) -> jax.Array:
        if not isinstance(cond, Guidance):
            raise ValueError(f"guided: 'cond' is a {type(cond).__name__}, expected Guidance(cond, null, weight)")
        if one_call:
            both = jax.tree.map(lambda a, b: jnp.stack([jnp.asarray(a), jnp.asarray(b)]), cond.cond, cond.null)
            eps_cond, eps_null = jax.vmap(noise_fn, in_axes=(None, None, None, 0))(params, z, t, both)
        else:
            eps_cond, eps_null = noise_fn(params, z, t, cond.cond), noise_fn(params, z, t, cond.null)
        weight = jnp.asarray(cond.weight).astype(eps_null.dtype)
        return eps_null + weight * (eps_cond - eps_null)

    return guided_fn


def evaluator(function: str, noise_fn: NoiseFn) -> Callable[[Any, jax.Array, jax.Array, Any], jax.Array]:
    """noise_fn with the output brought to the state's dtype and its shape checked; `cond=None` is left out of the call."""

    def evaluate(params: Any, z: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        eps = noise_fn(params, z, t) if cond is None else noise_fn(params, z, t, cond)
        checks.check_shapes(function, z=(z, "..."), **{"noise_fn(params, z, t, cond)": (eps, "...")})
        return eps.astype(z.dtype)

    return evaluate
