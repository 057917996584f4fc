"""Every public function with its samples spread over devices: the same numbers as on one device, one trace for all hyperparameters; bf16."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janax.algorithms import rl_bayes
from janax.jaxlib_ext import sharding

N, T, SPACE = 16, 6, rl_bayes.Space(vocab_size=4, length=2)


def inputs():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T + 1, N).astype(np.int32)
    return {
        **{name: rng.normal(size=N).astype(np.float32) - 3 for name in ("pi", "prior", "phi", "q", "r")},
        **{name: rng.normal(size=(N, T)).astype(np.float32) - 2 for name in ("a", "b", "c", "d")},
        "stop": rng.normal(size=(N, T + 1)).astype(np.float32),
        "features": rng.normal(size=(N, 2)).astype(np.float32),
        "logits": rng.normal(size=(N, T, 4)).astype(np.float32),
        "tokens": rng.integers(0, 4, (N, T)).astype(np.int32),
        "lengths": lengths,
        "mask": (np.arange(T)[None] < lengths[:, None]).astype(np.float32),
    }


def losses(x, h):
    """Everything with a gradient; h: a hyperparameter."""
    pi, prior, phi, q, r, lengths, mask = (x[name] for name in ("pi", "prior", "phi", "q", "r", "lengths", "mask"))
    a, b, c, d = (x[name] for name in "abcd")
    return {
        "fdpg": rl_bayes.fdpg_loss(pi, phi, q, log_z=h, baseline="leave_one_out", max_reward=h)[0],
        "dpg": rl_bayes.dpg_loss(pi, phi, q, log_z=h, baseline="z")[0],
        "cdpg": rl_bayes.cdpg_loss(pi, phi, q, epsilon=h)[0],
        "alpha_dpg": rl_bayes.alpha_dpg_loss(pi, phi, q, log_z=0.0, alpha=h)[0],
        "kl_rl": rl_bayes.kl_rl_loss(pi, prior, r, q, beta=h, baseline="batch_mean")[0],
        "reinforce": rl_bayes.reinforce_loss(pi, r, q, baseline=h)[0],
        "tb": rl_bayes.tb_loss(pi, prior, phi, h)[0],
        "vargrad": rl_bayes.vargrad_loss(pi, prior, phi, ddof=1, floor=h)[0],
        "subtb": rl_bayes.subtb_loss(a, x["stop"], x["stop"], mask, lam=h)[0],
        "dpo": rl_bayes.dpo_loss(pi, q, prior, phi, beta=h, label=h)[0],
        "ipo": rl_bayes.ipo_loss(pi, q, prior, phi, beta=h)[0],
        "token_kl": jnp.sum(rl_bayes.token_kl(a, b, mask)),
        "token_kl_rl": rl_bayes.token_kl_rl_loss(a, b, r, mask, beta=h, baseline="leave_one_out"),
        "ppo": rl_bayes.ppo_penalty_loss(a, b, c, r, mask, c, d, beta=h, clip=h)[0],
        "ctl": rl_bayes.ctl_loss(a, lengths, b, lengths, rl_bayes.prefix_log_weights(a, b, c, lengths), r),
        "soft_q": rl_bayes.soft_q_loss(a, b, phi, lengths, floor=-h),
        "sixo": rl_bayes.sixo_loss(a, lengths, b, lengths, r),
        "fudge": rl_bayes.fudge_loss(a, phi, lengths),
        "squared": rl_bayes.squared_loss(a, phi, lengths),
        "path": rl_bayes.path_consistency_loss(a, b, c, phi, lengths),
        "objective": rl_bayes.kl_rl_objective(pi, prior, r, beta=h),
        "exact": rl_bayes.exact_divergence(rl_bayes.HELL2, pi, prior),
        "posterior": rl_bayes.posterior(prior, phi / h).log_z,
    }


def numbers(x, h):
    """Everything without."""
    key = jax.random.key(0)
    pi, prior, phi, q, r, lengths = (x[name] for name in ("pi", "prior", "phi", "q", "r", "lengths"))
    return {
        "importance": rl_bayes.importance(phi),
        "snis": rl_bayes.snis(phi, x["features"]),
        "accept": rl_bayes.accept(key, phi, log_c=h),
        "qrs": rl_bayes.qrs(phi, log_c=-h, divergence=rl_bayes.JS),
        "plan": rl_bayes.qrs_plan(phi, target_rate=h),
        "chain": rl_bayes.independence_mh(key, phi),
        "best_of_n": rl_bayes.best_of_n(jax.nn.log_softmax(prior), r, num_samples=10 * h),
        "potential": rl_bayes.best_of_n_potential(r, phi, num_samples=10 * h),
        "select": rl_bayes.select_best(key, r),
        "fit": rl_bayes.fit_lambdas(x["features"], jnp.stack([0.2 * h, 0.1 * h]), phi),
        "beta": rl_bayes.beta_for_kl(r, 0.1 * h, phi),
        "log_z": rl_bayes.update_log_z(rl_bayes.init_log_z(), phi, decay=h),
        "log_zs": rl_bayes.update_log_z(rl_bayes.init_log_z(4), phi, lengths % 4),
        "window": rl_bayes.window_mean(rl_bayes.update_window(rl_bayes.init_window(8), r)),
        "monitor": rl_bayes.monitor(phi, q, pi, log_z=h),
        "estimate": rl_bayes.estimate_divergence(jnp.asarray(3), pi, phi, q, log_z=h),
        "bounds": rl_bayes.exact_bounds(phi, q, num_samples=2),
        "variance": rl_bayes.estimator_variance(q, x["features"]),
        "ancestors": rl_bayes.arrange(rl_bayes.resample(key, phi, scheme="residual")),
        "soft": rl_bayes.soft_values(SPACE, rl_bayes.log_rows(SPACE, jnp.ones((5, 4))), phi),
        "linear": rl_bayes.log_potential(rl_bayes.linear(lambda params, x: x, jnp.stack([h, h])), x["features"]),
        "pairs": rl_bayes.population_preferences(prior, r),
        "tokens": rl_bayes.token_log_probs(x["logits"], x["tokens"], lengths),
        "values": rl_bayes.token_values(x["logits"], x["tokens"], lengths),
        "soft_values": rl_bayes.soft_values_of(x["logits"], x["logits"]),
        "sandwich": rl_bayes.sandwich(phi, r),
    }


@jax.jit
def gradients(x, h):
    floats = {name: value for name, value in x.items() if jnp.issubdtype(value.dtype, jnp.floating)}

    def total(floats):
        each = losses(x | floats, h)
        return sum(each.values()), each

    gradient, each = jax.grad(total, has_aux=True)(floats)
    return each, gradient


@jax.jit
@functools.partial(chex.assert_max_traces, n=3)  # one for each placement
def everything(x, h):
    return *gradients(x, h), numbers(x, h)


@functools.cache
def on_one_device():
    return jax.device_get(everything(inputs(), 0.6))


@pytest.mark.parametrize("explicit", [False, True])
def test_the_same_numbers_on_meshes(explicit):
    wanted = on_one_device()
    with jax.set_mesh(sharding.make_mesh({"data": 4, "model": 2}, explicit=explicit)):
        placed = jax.device_put(inputs(), jax.P("data"))
        got = jax.device_get(everything(placed, 0.6))
    flat, _ = jax.tree_util.tree_flatten_with_path(wanted)
    for (path, theirs), ours in zip(flat, jax.tree.leaves(got)):
        np.testing.assert_allclose(ours, theirs, rtol=3e-5, atol=3e-6, err_msg=jax.tree_util.keystr(path))


def test_hyperparameters_are_traced():
    """New numbers do not trace anew, and are heard."""
    first, second = on_one_device(), jax.device_get(everything(inputs(), 0.7))
    deaf = {name for name in first[0] if np.array_equal(first[0][name], second[0][name])}
    assert deaf == {"token_kl", "ctl", "sixo", "fudge", "squared", "path", "exact", "reinforce"}  # the last hears it in its gradient
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(second[:2]))


def test_bfloat16():
    """Log-probabilities in bf16 are computed with in float32, and gradients come back in bf16."""
    half = {name: jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x for name, x in inputs().items()}
    full = {name: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for name, x in half.items()}
    each, gradient = jax.device_get(gradients(half, 0.6))
    wanted, wanted_gradient, _ = jax.device_get(everything(jax.device_get(full), 0.6))
    for name in each:
        assert each[name].dtype == np.float32, name
        np.testing.assert_allclose(each[name], wanted[name], rtol=2e-2, atol=1e-2, err_msg=name)
    for name, value in gradient.items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            value.astype(np.float32), wanted_gradient[name], rtol=0.1, atol=0.05 * np.abs(wanted_gradient[name]).max()
        )
