"""GFlowNet objectives: with d(x) = log pi(x) - log pi0(x) - phi(x), d = -log Z everywhere if and only if pi = p.

Any law that covers the support may draw the samples (off-policy, replay, tempered). On-policy, half the gradient of each is that of KL(pi || p);
half the variance over a batch IS the REINFORCE update with the batch mean as baseline. A hard constraint makes d infinite: give a `floor`.
Reference: Malkin et al., arXiv:2201.13259 (trajectory balance); Hu et al., arXiv:2310.04363 (language models).
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.algorithms.rl_bayes.objectives import ObjectiveInfo
from janax.jaxlib_ext.checks import check_shapes
from janax.jaxlib_ext.divergence.numerics import widest

__all__ = ["subtb_loss", "tb_loss", "vargrad_loss"]


def tb_loss(
    log_pi: ArrayLike,
    log_prior: ArrayLike,
    phi: ArrayLike,
    log_z: ArrayLike,
    *,
    floor: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, ObjectiveInfo]:
    """Trajectory balance: mean (log Z + d(x))^2, with log Z learned.

    Args:
      log_pi: [n] log pi(x), differentiated.
      log_prior: [n] log pi0(x).
      phi: [n] log-potential.
      log_z: [] differentiated: a parameter of its own (with a larger learning rate), or a network's output for the context.
      floor: [] least phi. Traced. Without it, samples with phi = -inf are left out and counted.
      weights: [n] summing to 1, for exact expectations.

    Returns:
      The loss [], float32 or wider, and `ObjectiveInfo`, whose value is the loss.

    Raises:
      ValueError: if shapes do not agree.
    """
    name = "rl_bayes.tb_loss"
    check_shapes(name, log_z=(log_z, ""))
    log_pi, d, counted, share, dead = _discrepancies(name, log_pi, log_prior, phi, floor, weights)
    gap = jnp.where(counted, d + jnp.asarray(log_z).astype(d.dtype), jnp.zeros_like(d))
    loss = jnp.sum(share * jnp.square(gap))
    return loss, _info(loss, jnp.asarray(log_z).astype(d.dtype), d, counted, share, dead)


def vargrad_loss(
    log_pi: ArrayLike,
    log_prior: ArrayLike,
    phi: ArrayLike,
    *,
    ddof: int = 0,
    floor: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, ObjectiveInfo]:
    """Log-variance: Var[d(x)] over the batch, that is trajectory balance with the best log Z, -mean d, for each batch. Couples the samples.

    Half its gradient, on-policy, is exactly that of `fdpg_loss` with RKL and the batch mean as baseline; with ddof 1, leave-one-out.

    Args:
      log_pi: [n] log pi(x), differentiated.
      log_prior: [n] log pi0(x).
      phi: [n] log-potential.
      ddof: 0, or 1 to divide by n - 1; with weights, 0. Static.
      floor: As in `tb_loss`.
      weights: As there.

    Returns:
      The loss [] and `ObjectiveInfo`, whose log_z is -mean d.

    Raises:
      ValueError: if shapes do not agree, or on another ddof.
    """
    name = "rl_bayes.vargrad_loss"
    if ddof not in (0, 1) or (ddof and weights is not None):
        raise ValueError(f"{name}: 'ddof' is {ddof}, expected 0 or 1, and 0 with 'weights'")
    _, d, counted, share, dead = _discrepancies(name, log_pi, log_prior, phi, floor, weights)
    mass = jnp.sum(share)
    mean = jnp.sum(share * d) / jnp.where(mass > 0, mass, jnp.ones_like(mass))
    loss = jnp.sum(share * jnp.square(jnp.where(counted, d - mean, jnp.zeros_like(d))))
    if ddof:
        n = jnp.sum(counted).astype(d.dtype)
        loss = loss * n / jnp.maximum(n - 1, 1)
    return loss, _info(loss, -mean, d, counted, share, dead)


def subtb_loss(
    log_pi: ArrayLike, log_reward: ArrayLike, log_stop: ArrayLike, mask: ArrayLike, *, lam: ArrayLike = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Modified sub-trajectory balance, where every prefix may stop: all differences of u_t = log R(x_<=t) - log pi(x_<=t) - log pi(stop | x_<=t).

    sum_{i<j} lam^(j-i-1) (u_j - u_i)^2 / sum of the same weights, over all pairs of prefixes of all sequences; u is constant, log Z, where
    pi(x_<=t, stop) is R / Z for every prefix.

    Args:
      log_pi: [n t] log pi(x_s | x_<s) of the tokens that go on, differentiated.
      log_reward: [n t+1] log R of the prefixes of length 0..t, each as if it stopped there; finite under the mask.
      log_stop: [n t+1] log pi(stop | prefix), differentiated.
      mask: [n t] non-zero where the token belongs to the sequence and is not the stop: pairs with a later prefix beyond the stop are dropped.
      lam: [] weight of longer pairs. Traced.

    Returns:
      The loss [], 0 if there is no pair, and the mean over prefixes of u [], an estimate of log Z, without gradient.

    Raises:
      ValueError: if shapes do not agree.

    Reference: Hu et al., arXiv:2310.04363, eq. 3, and the released code.
    """
    t = check_shapes("rl_bayes.subtb_loss", log_pi=(log_pi, "n t"), mask=(mask, "n t"))["t"]
    check_shapes("rl_bayes.subtb_loss", log_pi=(log_pi, f"n {t}"), log_reward=(log_reward, f"n {t + 1}"), log_stop=(log_stop, f"n {t + 1}"))
    log_pi, log_reward, log_stop = widest(log_pi, log_reward, log_stop)
    inside = jnp.cumprod(jnp.asarray(mask).astype(bool).astype(jnp.int32), axis=1) > 0
    there = jnp.concatenate([jnp.ones_like(inside[:, :1]), inside], axis=1)
    so_far = jnp.cumsum(jnp.where(inside, log_pi, jnp.zeros_like(log_pi)), axis=1)
    so_far = jnp.concatenate([jnp.zeros_like(so_far[:, :1]), so_far], axis=1)
    u = jnp.where(there, jnp.where(there, log_reward, 0.0) - so_far - jnp.where(there, log_stop, 0.0), jnp.zeros_like(so_far))
    length = jnp.arange(t + 1, dtype=jnp.int32)[None, :] - jnp.arange(t + 1, dtype=jnp.int32)[:, None]
    powers = jnp.where(length > 0, jnp.asarray(lam).astype(u.dtype) ** jnp.maximum(length - 1, 0).astype(u.dtype), 0.0)
    pairs = jnp.where(there[:, None, :], powers[None], 0.0)
    total = jnp.sum(pairs)
    loss = jnp.sum(pairs * jnp.square(u[:, None, :] - u[:, :, None])) / jnp.where(total > 0, total, jnp.ones_like(total))
    return loss, jax.lax.stop_gradient(jnp.sum(u) / jnp.sum(there).astype(u.dtype))


def _discrepancies(
    name: str, log_pi: ArrayLike, log_prior: ArrayLike, phi: ArrayLike, floor: ArrayLike | None, weights: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    check_shapes(name, log_pi=(log_pi, "n"), log_prior=(log_prior, "n"), phi=(phi, "n"), weights=(weights, "n"), floor=(floor, ""))
    log_pi, log_prior, phi = widest(log_pi, log_prior, phi)
    log_prior, phi = jax.lax.stop_gradient((log_prior, phi))
    dead = jnp.isneginf(phi) | jnp.isneginf(log_prior)
    phi = phi if floor is None else jnp.maximum(phi, jnp.asarray(floor).astype(phi.dtype))
    share = jnp.full_like(phi, 1 / phi.shape[0]) if weights is None else jax.lax.stop_gradient(jnp.asarray(weights).astype(phi.dtype))
    counted = ~(jnp.isneginf(phi) | jnp.isneginf(log_prior) | jnp.isneginf(log_pi)) & (share > 0)
    a, b, c = (jnp.where(counted, x, jnp.zeros_like(x)) for x in (log_pi, log_prior, phi))
    share = jnp.where(counted, share, jnp.zeros_like(share))
    return log_pi, a - b - c, counted, share, dead


def _info(loss: jax.Array, log_z: jax.Array, d: jax.Array, counted: jax.Array, share: jax.Array, dead: jax.Array) -> ObjectiveInfo:
    mass = jnp.sum(share)
    some = jnp.where(mass > 0, mass, jnp.ones_like(mass))
    info = ObjectiveInfo(
        value=loss,
        log_z=log_z,
        reward=-jnp.sum(share * d) / some,
        ess=jnp.sum(counted).astype(d.dtype),
        dead=jnp.mean(dead.astype(d.dtype)),
        dropped=jnp.sum(~counted, dtype=jnp.int32),
        clipped=jnp.zeros_like(loss),
        skipped=mass <= 0,
    )
    return jax.lax.stop_gradient(info)
