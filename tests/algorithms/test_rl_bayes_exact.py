"""Targets, exact posteriors, soft values and multipliers beside sums over all sequences."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import rl_bayes as reference

from janax.algorithms import rl_bayes

SPACE = rl_bayes.Space(vocab_size=reference.V, length=reference.T)
EOS_SPACE = rl_bayes.Space(vocab_size=3, length=4, eos=2)
fit = jax.jit(rl_bayes.fit_lambdas)


def rows_of(table):
    return rl_bayes.log_rows(SPACE, table.reshape(-1, reference.V)[reference.PREFIX_STATES])


def log_probs_of(table):
    return rl_bayes.sequence_log_probs(SPACE, rows_of(table))


def token_reward(params, x):
    """The toy's reward from tokens."""
    x = x._replace(tokens=jnp.asarray(x.tokens))
    shift = jnp.asarray(1 + 1.7 * np.arange(reference.T), params.dtype).reshape((1,) * (x.tokens.ndim - 1) + (-1,))
    angle = 2 * x.tokens.astype(params.dtype) + shift
    return params * jnp.sum(jnp.cos(angle), -1) + (x.tokens[..., 0] == x.tokens[..., 4]).astype(params.dtype) - 2


def accepts(params, x):
    del params
    return (jnp.sum(x.tokens == 2, axis=-1) >= 2) & (x.tokens[..., 0] != 2)


@jax.jit
def everything(prior, policy, beta):
    """All numbers of one row of the published table, in one program."""
    log_prior, log_pi = log_probs_of(prior), log_probs_of(policy)
    reward = jnp.asarray(reference.REWARD, prior.dtype)
    target = rl_bayes.exp_reward(token_reward, beta=beta, params=jnp.asarray(0.6, prior.dtype))
    phi = rl_bayes.log_potential(target, rl_bayes.sequences(SPACE))
    p = rl_bayes.posterior(log_prior, phi)
    kinds = (rl_bayes.RKL, rl_bayes.FKL, rl_bayes.TV, rl_bayes.JS, rl_bayes.HELL2)
    rkl, fkl, tv, js, hell2 = (rl_bayes.exact_divergence(kind, log_pi, p.log_probs) for kind in kinds)
    gained = jnp.sum(jnp.exp(p.log_probs) * reward)
    weights = 2 * p.log_probs - log_prior
    numbers = (
        p.log_z,
        rl_bayes.entropy(p.log_probs),
        gained,
        rl_bayes.kl_divergence(p.log_probs, log_prior),
        rl_bayes.kl_divergence(log_prior, p.log_probs),
        rkl,
        fkl,
        tv,
        0.5 * js,
        hell2,
        rl_bayes.kl_rl_objective(log_pi, log_prior, reward, beta=beta),
        jnp.exp(-jax.nn.logsumexp(weights)),
    )
    return jnp.stack(numbers), p.log_probs, phi


@pytest.mark.parametrize("beta", reference.BY_BETA)
def test_published_table(beta, x64, strict):
    numbers, log_p, phi = everything(reference.PRIOR, reference.POLICY, beta)
    np.testing.assert_allclose(numbers, reference.BY_BETA[beta], rtol=0, atol=5.1e-11)  # ten digits behind the point are printed
    log_prior = reference.sequence_log_probs(reference.PRIOR)
    wanted = log_prior + reference.REWARD / beta
    np.testing.assert_allclose(log_p, wanted - reference.lse(wanted), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(phi, reference.REWARD / beta, rtol=1e-12)
    np.testing.assert_allclose(np.exp(log_p).sum(), 1, rtol=1e-12)  # T1


def test_float32_and_one_trace():
    traced = jax.jit(chex.assert_max_traces(everything.__wrapped__, n=1))
    tables = [reference.PRIOR.astype(np.float32), reference.POLICY.astype(np.float32)]
    for beta in (0.5, 1.0, 5.0):
        np.testing.assert_allclose(traced(*tables, beta)[0], reference.BY_BETA[beta], rtol=2e-5, atol=2e-6)
    half = rl_bayes.posterior(jnp.log(jnp.full(4, 0.25, jnp.bfloat16)), jnp.zeros(4, jnp.bfloat16))
    assert half.log_z.dtype == jnp.float32
    np.testing.assert_allclose(
        half.log_z, np.log(4 * float(jnp.exp(jnp.log(jnp.asarray(0.25, jnp.bfloat16)).astype(jnp.float32)))), atol=1e-6
    )


def test_identities_of_the_objective(x64):
    """T2-T4, T7, T11, T12: J / beta + KL(pi || p*) = log Z, and the gradients."""
    rng = np.random.default_rng(0)
    log_prior, beta = reference.sequence_log_probs(reference.PRIOR), 0.7
    reward = reference.REWARD

    @jax.jit
    def both(logits, reward, beta):
        log_pi = jax.nn.log_softmax(logits)
        objective = lambda z: rl_bayes.kl_rl_objective(jax.nn.log_softmax(z), log_prior, reward, beta=beta)  # noqa: E731
        p = rl_bayes.posterior(log_prior, reward / beta)
        kl = lambda z: rl_bayes.kl_divergence(jax.nn.log_softmax(z), p.log_probs)  # noqa: E731
        log_z = lambda s: rl_bayes.posterior(log_prior, reward * s).log_z  # noqa: E731
        moments = jax.grad(log_z)(1 / beta), jax.grad(jax.grad(log_z))(1 / beta)
        return objective(logits), kl(logits), p, jax.grad(objective)(logits), jax.grad(kl)(logits), moments, log_pi

    for _ in range(3):
        j, kl, p, grad_j, grad_kl, moments, _ = both(rng.normal(size=1024), reward, beta)
        np.testing.assert_allclose(j / beta + kl, p.log_z, rtol=1e-12)
        np.testing.assert_allclose(grad_j, -beta * grad_kl, atol=1e-14)
        assert j < beta * p.log_z
    mean = np.sum(np.exp(p.log_probs) * reward)
    np.testing.assert_allclose(moments, (mean, np.sum(np.exp(p.log_probs) * (reward - mean) ** 2)), rtol=1e-10)
    j, _, shifted, again, _, _, _ = both(np.asarray(p.log_probs), reward + 3, beta)
    np.testing.assert_allclose(j, beta * shifted.log_z, rtol=1e-12)
    np.testing.assert_allclose(shifted.log_z, p.log_z + 3 / beta, rtol=1e-12)
    np.testing.assert_allclose(shifted.log_probs, p.log_probs, atol=1e-11)
    np.testing.assert_allclose(again, 0, atol=1e-14)
    scaled = both(np.asarray(p.log_probs), reward * 5, beta * 5)[2]
    np.testing.assert_allclose(scaled.log_probs, p.log_probs, atol=1e-11)


def test_entropy_need_not_be_monotone(x64):
    log_prior = reference.sequence_log_probs(reference.PRIOR)
    of_beta = jax.jit(jax.vmap(lambda beta: rl_bayes.entropy(rl_bayes.posterior(log_prior, reference.ACCEPTED / beta).log_probs)))
    betas = np.array(list(reference.BINARY_ENTROPY))
    np.testing.assert_allclose(of_beta(betas), list(reference.BINARY_ENTROPY.values()), atol=5.1e-11)


@functools.cache
def soft():
    """Soft values, the posterior as a policy, its law."""

    def run(rows, phi, space):
        values = rl_bayes.soft_values(space, rows, phi)
        policy = rl_bayes.posterior_rows(space, rows, values)
        return (
            values,
            policy,
            rl_bayes.sequence_log_probs(space, policy),
            rl_bayes.expected_values(space, rows, jnp.where(jnp.isneginf(phi), 0, phi)),
        )

    return jax.jit(run, static_argnums=2)


def test_soft_values(x64, strict):
    """T26: dynamic programming and sums over completions; the posterior as a policy."""
    log_prior, phi = reference.sequence_log_probs(reference.PRIOR), reference.REWARD / 0.5
    rows = rows_of(jnp.asarray(reference.PRIOR))
    values, policy, log_p, expected = soft()(rows, phi, SPACE)
    for prefix, value in reference.SOFT_VALUES.items():
        place = int("".join(map(str, prefix)) or "0", reference.V)
        np.testing.assert_allclose(values[len(prefix)][place], value, atol=5.1e-11)
        np.testing.assert_allclose(values[len(prefix)][place], reference.soft_value(prefix, log_prior, phi), rtol=1e-12)
    np.testing.assert_allclose(np.exp(policy).sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(log_p, log_prior + phi - reference.lse(log_prior + phi), rtol=1e-11, atol=1e-11)
    assert all(np.all(v <= s + 1e-12) for v, s in zip(expected, values))  # Jensen: the soft value is above the mean
    assert np.max(values[2] - expected[2]) > 0.01
    np.testing.assert_allclose(expected[-1], values[-1])


def test_hard_constraints_and_dead_prefixes(x64):
    """T8, T26: log psi = -inf where nothing acceptable can follow; no nan in values, policy or gradients."""
    log_prior = reference.sequence_log_probs(reference.PRIOR)
    with np.errstate(divide="ignore"):
        phi = np.log(reference.ACCEPTED)
    rows = rows_of(jnp.asarray(reference.PRIOR))
    values, policy, log_p, _ = soft()(rows, phi, SPACE)
    for t in range(reference.T + 1):
        wanted = [reference.soft_value(prefix, log_prior, phi) for prefix in itertools.product(range(reference.V), repeat=t)]
        np.testing.assert_allclose(values[t], wanted, rtol=1e-12, atol=1e-15)
    assert np.isneginf(values[1][2]) and np.all(np.isneginf(policy[1 + 2])) and not np.any(np.isnan(policy))
    np.testing.assert_allclose(values[0][0], np.log(0.1816303128), atol=3e-10)
    np.testing.assert_allclose(np.exp(log_p), np.exp(log_prior) * reference.ACCEPTED / 0.1816303128, atol=1e-11)
    np.testing.assert_allclose(reference.kl(np.asarray(log_p), log_prior), -values[0][0], rtol=1e-12)

    def some(table):
        values = rl_bayes.soft_values(SPACE, rows_of(table), phi)
        policy = rl_bayes.posterior_rows(SPACE, rows_of(table), values)
        return values[0][0] + jnp.sum(jnp.where(jnp.isneginf(policy), 0.0, policy)[:5])

    gradient = jax.jit(jax.grad(some))(jnp.asarray(reference.PRIOR))
    assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 1e-3
    empty = soft()(rows, np.full(1024, -np.inf), SPACE)
    assert np.isneginf(empty[0][0][0]) and not any(np.any(np.isnan(x)) for x in (*empty[0], empty[1], empty[2]))
    nothing = jax.jit(rl_bayes.posterior)(log_prior, np.full(1024, -np.inf))
    assert nothing.empty and np.isneginf(nothing.log_z) and np.all(np.isneginf(nothing.log_probs))


def test_end_of_sequence(x64, strict):
    """Finished strings have one place each; what follows an end has no mass; cut strings count."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(EOS_SPACE.num_prefixes, 3))
    rows = jax.jit(rl_bayes.log_rows, static_argnums=0)(EOS_SPACE, logits)
    strings = reference.eos_space(3, 4, 2)
    everything = rl_bayes.sequences(EOS_SPACE)
    log_soft = reference.log_softmax(logits)
    log_prior, places = [], []
    for x in strings:
        total, prefix = 0.0, 0
        for t, token in enumerate(x):
            total += log_soft[EOS_SPACE.offset(t) + prefix, token]
            prefix = prefix * 3 + token
        log_prior.append(total)
        padded = np.array([*x, *[7] * (4 - len(x))])
        places.append(int(EOS_SPACE.index(padded, len(x))))
        assert everything.num_tokens[places[-1]] == len(x)
        np.testing.assert_array_equal(everything.tokens[places[-1]][: len(x)], x)
    ours = np.asarray(rl_bayes.sequence_log_probs(EOS_SPACE, rows))
    np.testing.assert_allclose(ours[places], log_prior, rtol=1e-12)
    np.testing.assert_allclose(np.exp(ours).sum(), 1, rtol=1e-12)
    assert np.isneginf(np.delete(ours, places)).all() and len(set(places)) == len(strings)
    phi = rng.normal(size=81)
    phi[places[3]] = -np.inf
    values, policy, log_p, _ = soft()(rows, phi, EOS_SPACE)
    target = np.array(log_prior) + phi[places]
    np.testing.assert_allclose(values[0][0], reference.lse(target), rtol=1e-12)
    for i, x in enumerate(strings):  # a finished string's value is its own potential, however many steps are left
        prefix = int("".join(map(str, x)), 3)
        np.testing.assert_allclose(values[len(x)][prefix], phi[places[i]])
    assert np.isneginf(values[2][3 * 2 + 1]) and not np.any(np.isnan(policy))
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(np.asarray(log_p)[places], target - reference.lse(target), rtol=1e-11)


def test_chain_rule_of_the_divergence(x64):
    """T9: KL of sequences is the expected sum of the tokens' KLs."""
    rows, prior = rows_of(jnp.asarray(reference.POLICY)), rows_of(jnp.asarray(reference.PRIOR))
    prefixes = rl_bayes.prefix_log_probs(SPACE, rows)[:-1]
    per_row = np.sum(np.exp(rows) * (rows - prior), axis=1)
    np.testing.assert_allclose(np.sum(np.exp(np.concatenate(prefixes)) * per_row), 0.3261223317, atol=5.1e-11)


def test_a_network_gives_the_rows(x64):
    """One pass over the longest prefixes; other tokens excluded; prompt in front."""
    rng = np.random.default_rng(2)
    weights = rng.normal(size=(6, 6))
    seen = []

    def logits_fn(params, tokens):
        seen.append(tokens.shape)
        once = jax.nn.one_hot(tokens, 6, dtype=params.dtype)
        decay = 0.5 ** jnp.maximum(jnp.arange(tokens.shape[1])[:, None] - jnp.arange(tokens.shape[1])[None], 0).astype(params.dtype)
        return jnp.einsum("ts,bsv,vw->btw", jnp.tril(decay), once, params)

    space, ids = rl_bayes.Space(vocab_size=3, length=3), np.array([5, 0, 2])
    rows = jax.jit(lambda w: rl_bayes.rows_from_network(logits_fn, w, space, np.array([1, 4]), token_ids=ids))(weights)
    assert seen == [(9, 4)]
    for t in range(3):
        for i, prefix in enumerate(space.tokens(t)):
            text = np.array([1, 4, *ids[prefix]])
            logits = (0.5 ** np.arange(len(text))[::-1] @ np.eye(6)[text] @ weights)[ids]
            np.testing.assert_allclose(rows[space.offset(t) + i], reference.log_softmax(logits), rtol=1e-11)


def test_targets(x64):
    x, log_prior = rl_bayes.sequences(SPACE), reference.sequence_log_probs(reference.PRIOR)
    soft_target = rl_bayes.exp_reward(token_reward, beta=0.5, params=jnp.asarray(0.6))
    with np.errstate(divide="ignore"):
        hard = np.log(reference.ACCEPTED)
    both = rl_bayes.product(rl_bayes.constraint(accepts), soft_target)
    np.testing.assert_allclose(rl_bayes.log_unnormalised(both, log_prior, x), log_prior + hard + reference.REWARD / 0.5, rtol=1e-12)
    sharp = rl_bayes.product(rl_bayes.tempered(2.0), soft_target)
    np.testing.assert_allclose(rl_bayes.log_unnormalised(sharp, log_prior, x), 2 * log_prior + reference.REWARD / 0.5, rtol=1e-12)
    np.testing.assert_allclose(rl_bayes.log_unnormalised(rl_bayes.tempered(0.3), log_prior, x), 0.3 * log_prior, rtol=1e-12)
    features = lambda params, x: jnp.asarray(reference.FEATURES)  # noqa: E731
    tilted = rl_bayes.linear(features, np.array([0.3, -2.0]))
    np.testing.assert_allclose(rl_bayes.log_potential(tilted, x), reference.FEATURES @ [0.3, -2.0], atol=1e-12)
    colder = rl_bayes.classifier(lambda params, x: params * x, inverse_temperature=3.0, params=2.0)
    np.testing.assert_allclose(rl_bayes.log_potential(colder, jnp.array([-1.0, -0.5])), [-6, -3])
    np.testing.assert_allclose(rl_bayes.log_potential(rl_bayes.infilling(lambda params, x, c: x * c), jnp.array([1.0]), -2.0), [-2])
    r = np.array([[1.0, 2.0, 4.5], [0.0, 0.0, 0.0]])
    lower, evidence = (rl_bayes.uncertain_reward(lambda params, x: x, beta=0.5, kind=kind) for kind in ("lower", "evidence"))
    np.testing.assert_allclose(rl_bayes.log_potential(lower, r), r.mean(1) / 0.5 - r.var(1) / (2 * 0.25), rtol=1e-12)
    np.testing.assert_allclose(rl_bayes.log_potential(evidence, r), np.log(np.exp(r / 0.5).mean(1)), rtol=1e-12, atol=1e-15)
    betas = jax.vmap(lambda beta: rl_bayes.log_potential(rl_bayes.exp_reward(lambda params, x: x, beta=beta), jnp.array([1.0])))
    np.testing.assert_allclose(betas(jnp.array([0.5, 2.0]))[:, 0], [2, 0.5])
    with pytest.raises(ValueError, match="expected at least one"):
        rl_bayes.product()
    with pytest.raises(ValueError, match=r"'kind' is 'mean', expected one of 'lower', 'evidence'"):
        rl_bayes.uncertain_reward(lambda params, x: x, beta=1.0, kind="mean")
    with pytest.raises(ValueError, match="tempered and has no terms"):
        rl_bayes.log_potential(rl_bayes.tempered(2.0), x)


def test_moments(x64, strict):
    """T13, T14: the toy's multipliers, a closed form, and Pythagoras."""
    wanted, lambdas, prior, log_z, kl = reference.MOMENTS
    log_prior = reference.sequence_log_probs(reference.PRIOR)
    found = fit(reference.FEATURES, np.array(wanted), log_prior)
    np.testing.assert_allclose(found.lambdas, lambdas, atol=6e-11)
    np.testing.assert_allclose((found.log_z, found.kl), (log_z, kl), atol=6e-11)
    np.testing.assert_allclose(found.prior_moments, prior, atol=6e-11)
    np.testing.assert_allclose(found.moments, wanted, rtol=1e-11)
    assert found.feasible and found.iterations < 12 and found.occurs.all()
    log_p = log_prior + reference.FEATURES @ found.lambdas - found.log_z
    other = np.exp(log_p) * (1 + 0.5 * np.sign(np.sin(np.arange(1024))))
    basis = np.stack([np.ones(1024), *reference.FEATURES.T])
    other -= np.exp(log_p) * (basis.T @ np.linalg.solve(basis * np.exp(log_p) @ basis.T, basis @ other - [1, *wanted]))
    assert other.min() > 0
    np.testing.assert_allclose(basis @ other, [1, *wanted], rtol=1e-12)
    c = np.log(other)
    np.testing.assert_allclose(reference.kl(c, log_prior), reference.kl(c, log_p) + found.kl, rtol=1e-10)

    for mu0, mu in ((0.3, 0.5), (1e-9, 0.7), (0.9, 1e-6), (0.2, 1 - 1e-9)):
        one = fit(np.array([[0.0], [1.0]]), np.array([mu]), np.log([1 - mu0, mu0]))
        np.testing.assert_allclose(one.lambdas, [np.log(mu / (1 - mu)) - np.log(mu0 / (1 - mu0))], rtol=1e-7 if mu > 0.999 else 1e-10)
        np.testing.assert_allclose(one.log_z, np.log((1 - mu0) / (1 - mu)), rtol=1e-7 if mu > 0.999 else 1e-10)
        np.testing.assert_allclose(one.kl, mu * np.log(mu / mu0) + (1 - mu) * np.log((1 - mu) / (1 - mu0)), rtol=1e-9)
        assert one.feasible


def test_moments_that_cannot_be(x64, strict):
    log_prior = reference.sequence_log_probs(reference.PRIOR)
    for wanted in ((1.2, 0.5), (0.5, -0.1), (1.0, 0.5), (0.5, 0.0)):
        found = fit(reference.FEATURES, np.array(wanted), log_prior)
        assert not found.feasible and all(np.all(np.isfinite(x)) for x in (found.lambdas, found.log_z, found.moments))
    square = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # inside the box, outside the hull; and on its edge
    for wanted, feasible in (((0.3, 0.3), True), ((0.7, 0.7), False), ((0.5, 0.5), False)):
        assert bool(fit(square, np.array(wanted)).feasible) is feasible
    never = fit(np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([0.5, 0.1]))
    assert not never.feasible and list(never.occurs) == [True, False]
    twice = fit(np.array([[0.0, 0.0], [1.0, 2.0]]), np.array([0.25, 0.5]))  # dependent, and consistent
    assert twice.feasible
    np.testing.assert_allclose(np.asarray(twice.lambdas) @ [1, 2], np.log(1 / 3), rtol=1e-10)
    assert not fit(np.array([[0.0, 0.0], [1.0, 2.0]]), np.array([0.25, 0.6])).feasible
    nothing = fit(square, np.array([0.3, 0.3]), np.full(3, -np.inf))
    assert not nothing.feasible and np.all(np.isfinite(nothing.lambdas)) and nothing.ess == 0


def test_moments_in_batches_and_their_derivatives(x64):
    log_prior = reference.sequence_log_probs(reference.PRIOR)
    wanted = np.array([[0.5, 0.5], [0.2, 0.9], [2.0, 0.5]])
    many = jax.jit(jax.vmap(lambda mu: rl_bayes.fit_lambdas(reference.FEATURES, mu, log_prior)))(wanted)
    assert list(many.feasible) == [True, True, False]
    np.testing.assert_allclose(many.lambdas[0], reference.MOMENTS[1], atol=6e-11)
    slope = jax.jit(jax.jacobian(lambda mu: rl_bayes.fit_lambdas(reference.FEATURES, mu, log_prior).lambdas))(wanted[0])
    p = np.exp(log_prior + reference.FEATURES @ many.lambdas[0] - many.log_z[0])
    centred = reference.FEATURES - wanted[0]
    np.testing.assert_allclose(slope, np.linalg.inv(centred.T * p @ centred), rtol=1e-8)
    single = fit(reference.FEATURES.astype(np.float32), np.array([0.5, 0.5], np.float32), log_prior.astype(np.float32))
    assert single.feasible and single.lambdas.dtype == jnp.float32
    np.testing.assert_allclose(single.lambdas, reference.MOMENTS[1], rtol=1e-4)


def test_beta_for_a_divergence(x64, strict):
    log_prior = reference.sequence_log_probs(reference.PRIOR)
    solve = jax.jit(rl_bayes.beta_for_kl)
    for beta, row in reference.BY_BETA.items():
        np.testing.assert_allclose(solve(reference.REWARD, row[3], log_prior), beta, rtol=1e-7)


def test_bounds_by_summation(x64):
    log_q = reference.sequence_log_probs(reference.PROPOSAL)
    log_target = reference.sequence_log_probs(reference.PRIOR) + reference.REWARD / 0.5
    for k, wanted in reference.BOUNDS.items():
        bounds = jax.jit(rl_bayes.exact_bounds, static_argnames="num_samples")(log_target, log_q, num_samples=k)
        np.testing.assert_allclose(bounds, wanted, atol=5.1e-11)


def test_limits_of_beta(x64, strict):
    """T6: the prior and no cost for large beta; the best sequence and its reward for small."""
    log_prior = reference.sequence_log_probs(reference.PRIOR)
    of_beta = jax.jit(lambda beta: rl_bayes.posterior(log_prior, reference.REWARD / beta))
    warm, cold = of_beta(1e6), of_beta(1e-3)
    np.testing.assert_allclose(warm.log_probs, log_prior, atol=1e-5)
    np.testing.assert_allclose(1e6 * warm.log_z, np.exp(log_prior) @ reference.REWARD, rtol=1e-5)
    np.testing.assert_allclose(np.exp(cold.log_probs)[np.argmax(reference.REWARD)], 1, rtol=1e-9)
    best = np.argmax(reference.REWARD)
    np.testing.assert_allclose(1e-3 * cold.log_z, reference.REWARD[best] + 1e-3 * log_prior[best], rtol=1e-12)


def test_messages():
    with pytest.raises(ValueError, match=r"Space: 'eos' is 4, expected a token below 4"):
        rl_bayes.Space(vocab_size=4, length=2, eos=4)
    with pytest.raises(ValueError, match=r"too many to enumerate"):
        rl_bayes.Space(vocab_size=50000, length=2)
    with pytest.raises(ValueError, match=r"rl_bayes.log_rows: 'logits' has shape \(4, 4\), expected \[341 4\]"):
        rl_bayes.log_rows(SPACE, np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"rl_bayes.posterior: 'phi' has shape \(3,\), expected \[x\] with x=4 from 'log_prior'"):
        rl_bayes.posterior(np.zeros(4), np.zeros(3))
    with pytest.raises(ValueError, match="'prompt' is empty"):
        rl_bayes.rows_from_network(lambda params, tokens: tokens, None, SPACE, np.zeros(0, int))
    with pytest.raises(ValueError, match="'num_samples' is 3, expected 1 or 2"):
        rl_bayes.exact_bounds(np.zeros(4), np.zeros(4), num_samples=3)
    with pytest.raises(ValueError, match=r"'moments' has shape \(3,\)"):
        rl_bayes.fit_lambdas(np.zeros((5, 2)), np.zeros(3))
