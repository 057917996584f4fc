"""Importance sampling, rejection, quasi-rejection, Metropolis-Hastings, best-of-N and text metrics beside sums over all sequences."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import rl_bayes as reference

from janax.algorithms import rl_bayes

PRIOR, PROPOSAL = (reference.sequence_log_probs(table) for table in (reference.PRIOR, reference.PROPOSAL))
TARGET = PRIOR + reference.REWARD / 0.5
LOG_Z = reference.lse(TARGET)
LOG_P = TARGET - LOG_Z
LOG_W = TARGET - PROPOSAL
best_of_n = jax.jit(rl_bayes.best_of_n)
qrs = jax.jit(rl_bayes.qrs)


def draws(size, log_q=PROPOSAL, seed=0):
    return np.random.default_rng(seed).choice(1024, size, p=np.exp(log_q) / np.exp(log_q).sum())


def test_importance(x64, strict):
    """T19, and no weight at all."""
    x = draws(200000)
    found = jax.jit(rl_bayes.importance)(LOG_W[x])
    np.testing.assert_allclose(found.log_z, LOG_Z, atol=0.02)
    chi2 = np.sum(np.exp(2 * LOG_P - PROPOSAL)) - 1
    np.testing.assert_allclose(found.ess / len(x), 1 / (1 + chi2), rtol=0.02)
    w = np.exp(LOG_W[x])
    np.testing.assert_allclose(found.weights, w / w.sum(), rtol=1e-10)
    np.testing.assert_allclose(found.ess, w.sum() ** 2 / (w**2).sum(), rtol=1e-10)
    values = np.stack([reference.REWARD[x], reference.ACCEPTED[x]], axis=1)
    np.testing.assert_allclose(rl_bayes.snis(LOG_W[x], values), w @ values / w.sum(), rtol=1e-10)
    np.testing.assert_allclose(rl_bayes.effective_sample_size(np.zeros((2, 5)) - 1e4), [5, 5], rtol=1e-12)
    nothing = rl_bayes.importance(np.full(4, -np.inf))
    assert nothing.empty and nothing.ess == 0 and np.isneginf(nothing.log_z) and not np.any(nothing.weights)
    assert rl_bayes.snis(np.array([-np.inf, 0.0]), np.array([np.nan, 2.0])) == 2
    assert rl_bayes.snis(np.full(2, -np.inf), np.array([np.nan, 2.0])) == 0
    huge = rl_bayes.importance(np.array([-3000.0, -3000.0, -np.inf]))
    np.testing.assert_allclose((huge.log_z, huge.ess), (-3000 + np.log(2 / 3), 2), rtol=1e-12)
    with pytest.raises(ValueError, match=r"'values' has shape \(3,\), expected \[n ...\] with n=2"):
        rl_bayes.snis(np.zeros(2), np.zeros(3))


def test_quasi_rejection(x64, strict):
    """T23: the published numbers, brute force, the identity of the KL, the bound on the TV, monotone in c, exact from the largest ratio on."""
    weights = np.exp(PROPOSAL)
    for c, printed in reference.QRS.items():
        found = qrs(LOG_W, log_c=np.log(c), weights=weights)
        np.testing.assert_allclose((found.rate, found.tv, found.kl), printed, atol=5.1e-11)
        rate, tv, kl, bound = reference.qrs(PROPOSAL, TARGET, c)
        np.testing.assert_allclose((found.rate, found.tv, found.kl, found.tv_bound), (rate, tv, kl, bound), rtol=1e-10)
        assert found.tv <= found.tv_bound
        p_c = np.minimum(LOG_W, np.log(c)) + PROPOSAL
        p_c = p_c - reference.lse(p_c)
        js = rl_bayes.qrs(LOG_W, log_c=np.log(c), weights=weights, divergence=rl_bayes.JS).divergence
        np.testing.assert_allclose(js, reference.divergence("js", p_c, LOG_P), rtol=1e-9)
    grid = jax.vmap(lambda c: rl_bayes.qrs(LOG_W, log_c=c, weights=weights))(np.linspace(-6, LOG_W.max(), 40))
    assert np.all(np.diff(grid.rate) < 0) and np.all(np.diff(grid.tv) < 1e-12) and np.all(np.diff(grid.kl) < 1e-12)
    np.testing.assert_allclose((grid.tv[-1], grid.kl[-1]), 0, atol=1e-12)
    np.testing.assert_allclose(grid.rate[-1], np.exp(LOG_Z - LOG_W.max()), rtol=1e-10)
    rate = rl_bayes.qrs_plan(LOG_W, target_rate=0.2, weights=weights)
    np.testing.assert_allclose(rate.rate, 0.2, rtol=1e-10)
    tv = rl_bayes.qrs_plan(LOG_W, target_tv=0.1, weights=weights)
    np.testing.assert_allclose(tv.tv, 0.1, rtol=1e-10)
    np.testing.assert_allclose(rl_bayes.qrs_plan(LOG_W, target_rate=1e-9, weights=weights).log_c, LOG_W.max())
    nothing = qrs(np.full(4, -np.inf), log_c=0.0)
    assert (nothing.rate, nothing.tv, nothing.kl) == (0, 0, 0) and np.isneginf(nothing.log_z)
    with pytest.raises(ValueError, match="exactly one of 'target_rate' and 'target_tv'"):
        rl_bayes.qrs_plan(LOG_W)


def test_what_is_accepted(x64, strict):
    """The law of the accepted is p_c, and p under rejection; a batch without any is no error."""
    x = draws(200000, seed=1)
    log_c = np.log(0.3)
    got = jax.jit(rl_bayes.accept)(jax.random.key(0), LOG_W[x], log_c=log_c)
    np.testing.assert_allclose(got.rate, reference.QRS[0.3][0], atol=4 * np.sqrt(0.25 / len(x)))
    counts = np.bincount(x[np.asarray(got.mask)], minlength=1024)
    p_c = np.exp(np.minimum(LOG_W, log_c) + PROPOSAL)
    expected = counts.sum() * p_c / p_c.sum()
    big = expected > 20
    assert np.sum((counts - expected)[big] ** 2 / expected[big]) < big.sum() + 5 * np.sqrt(2 * big.sum())
    np.testing.assert_allclose(got.exceeded, np.mean(LOG_W[x] > log_c), atol=1e-12)
    none = rl_bayes.accept(jax.random.key(1), np.full(5, -np.inf), log_c=0.0)
    assert none.rate == 0 and not none.mask.any() and none.exceeded == 0

    def propose(key):
        x = jax.random.categorical(key, jnp.asarray(PRIOR), shape=(256,))
        return {"x": x}, jnp.log(jnp.asarray(reference.ACCEPTED))[x]

    run = jax.jit(
        lambda key, rounds: rl_bayes.rejection_sample(propose, key, log_c=0.0, num_samples=4000, max_rounds=rounds), static_argnums=1
    )
    out = run(jax.random.key(2), 1000)
    assert out.num_accepted == 4000 and out.exceeded == 0
    np.testing.assert_allclose(out.rate, 0.1816303128, atol=4 * np.sqrt(0.15 / int(out.num_proposed)))
    counts, law = np.bincount(out.samples["x"], minlength=1024), np.exp(PRIOR) * reference.ACCEPTED / 0.1816303128
    big = 4000 * law > 10
    assert counts[reference.ACCEPTED == 0].sum() == 0
    assert np.sum((counts - 4000 * law)[big] ** 2 / (4000 * law)[big]) < big.sum() + 5 * np.sqrt(2 * big.sum())
    short = run(jax.random.key(2), 2)
    assert 0 < short.num_accepted < 4000 and short.num_proposed == 512
    np.testing.assert_array_equal(short.samples["x"][: short.num_accepted], out.samples["x"][: short.num_accepted])
    dead = rl_bayes.rejection_sample(
        lambda key: (jnp.zeros(3), jnp.full(3, -jnp.inf)), jax.random.key(0), log_c=0.0, num_samples=2, max_rounds=3
    )
    assert dead.num_accepted == 0 and dead.num_proposed == 9 and dead.rate == 0
    with pytest.raises(ValueError, match="'max_rounds' is 0, expected at least 1"):
        rl_bayes.rejection_sample(propose, jax.random.key(0), log_c=0.0, num_samples=1, max_rounds=0)


def test_independence_metropolis_hastings(x64, strict):
    x = draws(60000, seed=3)
    chain, rate = jax.jit(rl_bayes.independence_mh)(jax.random.key(0), LOG_W[x])
    visited = x[np.asarray(chain)]
    np.testing.assert_allclose(np.mean(reference.REWARD[visited]), reference.BY_BETA[0.5][2], atol=0.03)
    w = np.exp(LOG_W)
    q = np.exp(PROPOSAL)
    stationary = np.exp(LOG_P)
    wanted = np.sum(stationary[:, None] * q[None] * np.minimum(1, w[None] / w[:, None]))
    np.testing.assert_allclose(rate, wanted, atol=0.02)
    start, rate = rl_bayes.independence_mh(jax.random.key(1), np.array([-np.inf, 0.0, -np.inf]))
    assert list(start) == [0, 1, 1] and rate == 0.5


@pytest.mark.parametrize("n", reference.BEST_OF_N)
def test_best_of_n(n, x64, strict):
    """T24: published numbers, sums over all pairs, binary rewards, the bound."""
    found = best_of_n(PRIOR, reference.REWARD, num_samples=n)
    np.testing.assert_allclose((found.kl, found.bound, found.reward), reference.BEST_OF_N[n], atol=5.1e-11)
    np.testing.assert_allclose(found.kl, reference.kl(np.asarray(found.log_probs), PRIOR), rtol=1e-10)
    np.testing.assert_allclose(np.exp(found.log_probs).sum(), 1, rtol=1e-12)
    assert found.kl <= found.bound and found.win_rate <= n / (n + 1)
    assert found.bound - found.kl <= found.gap_bound
    assert n / (n + 1) - found.win_rate <= (n - 1) / 2 * np.sum(np.exp(2 * PRIOR))
    binary = best_of_n(PRIOR, reference.ACCEPTED, num_samples=n)
    np.testing.assert_allclose(binary.kl, reference.BINARY_BEST_OF_N[n], atol=5.1e-11)
    np.testing.assert_allclose(
        binary.kl, rl_bayes.binary_best_of_n_kl(np.log(np.exp(PRIOR) @ reference.ACCEPTED), num_samples=n), rtol=1e-9
    )
    assert binary.kl < binary.bound


def test_best_of_two_by_all_pairs(x64):
    for reward in (reference.REWARD, reference.ACCEPTED, np.round(reference.REWARD), np.zeros(1024)):
        found = best_of_n(PRIOR, reward, num_samples=2)
        np.testing.assert_allclose(np.exp(found.log_probs), reference.best_of_two(PRIOR, reward), rtol=1e-10)
    np.testing.assert_allclose((found.kl, found.win_rate), (0, 0.5), atol=1e-12)
    tiny = np.log([0.25, 0.25, 0.5])
    reward = np.array([1.0, 1.0, -np.inf])
    for n in (1, 3):
        law = np.zeros(3)
        for tuple_ in itertools.product(range(3), repeat=n):
            best = [i for i in tuple_ if reward[i] == max(reward[i] for i in tuple_)]
            for i in best:
                law[i] += np.exp(tiny[list(tuple_)].sum()) / len(best)
        np.testing.assert_allclose(np.exp(best_of_n(tiny, reward, num_samples=n).log_probs), law, rtol=1e-12)
    missing = best_of_n(np.array([0.0, -np.inf]), np.array([0.0, 1.0]), num_samples=4)
    np.testing.assert_allclose((missing.kl, *np.exp(missing.log_probs)), (0, 1, 0))
    many = best_of_n(PRIOR, reference.REWARD, num_samples=1e9)
    np.testing.assert_allclose(many.kl, -PRIOR[np.argmax(reference.REWARD)], rtol=1e-6)


def test_estimates_of_best_of_n(x64):
    """The plug-in formula, its limits; the tilt in log F(r); which one is kept."""
    n, e = 4, np.array([0.01, 0.3])
    first = (1 - e) ** n * (math.log(n) + (n - 1) * np.log(1 - e) - (n - 1) / n)
    wanted = first + (1 - (1 - e) ** n) * np.log((1 - (1 - e) ** n) / e)
    np.testing.assert_allclose(rl_bayes.best_of_n_kl_estimate(np.log(e), num_samples=n), wanted, rtol=1e-12)
    ends = rl_bayes.best_of_n_kl_estimate(np.array([0.0, -60.0, -1e4]), num_samples=n)
    np.testing.assert_allclose(ends, [0, *[rl_bayes.best_of_n_bound(n)] * 2], rtol=1e-9)
    order = np.argsort(reference.REWARD)
    x = np.argsort(np.argsort(reference.REWARD)).astype(float)  # distinct rewards under a uniform prior
    tilt = rl_bayes.best_of_n_potential(x, x, num_samples=n)
    law = best_of_n(np.full(1024, -np.log(1024)), x, num_samples=n).log_probs
    posterior = rl_bayes.posterior(np.full(1024, -np.log(1024)), tilt).log_probs
    np.testing.assert_allclose(np.exp(posterior)[order][100:], np.exp(law)[order][100:], rtol=0.02)
    assert np.isneginf(rl_bayes.best_of_n_potential(np.array(-1.0), x, num_samples=2))
    keys = jax.random.split(jax.random.key(0), 3000)
    kept, some = jax.jit(jax.vmap(lambda key: rl_bayes.select_best(key, np.array([1.0, 3.0, 2.0, 3.0]))))(keys)
    counts = np.bincount(kept, minlength=4)
    assert counts[0] == counts[2] == 0 and abs(counts[1] - 1500) < 4 * np.sqrt(750) and some.all()
    assert not rl_bayes.select_best(jax.random.key(0), np.full(3, -np.inf))[1]


def test_best_of_n_is_not_better_than_the_posterior(x64):
    """S8: at the same divergence from the prior the posterior earns at least as much."""
    for n in reference.BEST_OF_N:
        found = best_of_n(PRIOR, reference.REWARD, num_samples=n)
        beta = rl_bayes.beta_for_kl(reference.REWARD, found.kl, PRIOR)
        p = np.exp(rl_bayes.posterior(PRIOR, reference.REWARD / beta).log_probs)
        assert p @ reference.REWARD >= found.reward


def test_metrics():
    assert rl_bayes.pass_at_k(10, 3, 1) == pytest.approx(0.3) and rl_bayes.pass_at_k(10, 8, 4) == 1
    assert rl_bayes.pass_at_k(10, 3, 4) == pytest.approx(1 - math.comb(7, 4) / math.comb(10, 4))
    assert rl_bayes.exact_pass_at_k(1e-12, 10) == pytest.approx(1e-11) and rl_bayes.exact_pass_at_k(1.0, 3) == 1
    assert rl_bayes.distinct_n(["aab", "abc"], 1) == pytest.approx((2 / 3 + 1) / 2)
    assert rl_bayes.distinct_n([[1, 1, 1, 1]], 2) == pytest.approx(1 / 4) and rl_bayes.distinct_n([], 1) == 0
    same = ["the", "same", "again"]
    assert rl_bayes.self_bleu([same, same], 3) == pytest.approx(1)
    assert rl_bayes.self_bleu(["ab", "cd"]) == 0
    # by hand: against one other text of the same length, unigrams 3/4, bigrams 2/3
    assert rl_bayes.self_bleu([list("abcd"), list("abcx")], 2) == pytest.approx(math.sqrt(3 / 4 * 2 / 3))
    # counts are cut at the most that one other text has; a shorter text pays
    assert rl_bayes.self_bleu([list("aab"), list("abb"), list("abbbb")], 1) == pytest.approx((2 / 3 + 1 + 3 / 5) / 3)
    with pytest.raises(ValueError, match="got 1 texts, expected at least 2"):
        rl_bayes.self_bleu(["a"])
    with pytest.raises(ValueError, match="k = 11"):
        rl_bayes.pass_at_k(10, 3, 11)
