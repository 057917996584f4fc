"""Sequential Monte Carlo: exact where twists are optimal, unbiased otherwise, bounds on both sides; resampling; learned twists; placement."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import rl_bayes as reference

from janax.algorithms import rl_bayes
from janax.jaxlib_ext import sampling, sharding
from janax.models import transformer

SPACE = rl_bayes.Space(vocab_size=reference.V, length=reference.T)
PRIOR = reference.sequence_log_probs(reference.PRIOR)
PHI = reference.REWARD / 0.5
LOG_Z = reference.lse(PRIOR + PHI)
LOG_P = PRIOR + PHI - LOG_Z
DECODE = rl_bayes.table_decode_fn(SPACE)
MODEL = rl_bayes.twisted(DECODE, DECODE)
RUNS = 2500
SCHEMES = ("multinomial", "residual", "stratified", "systematic")


def potential(table, x):
    """phi of the toy's sequences, looked up."""
    return table[SPACE.index(x.tokens)]


@functools.cache
def setup():
    """Rows of the prior, optimal twists, and imperfect ones, float64."""
    with jax.enable_x64(True):
        rows = rl_bayes.log_rows(SPACE, reference.PRIOR.reshape(-1, reference.V)[reference.PREFIX_STATES])
        values = rl_bayes.soft_values(SPACE, rows, PHI)
        optimal = rl_bayes.next_values(SPACE, values)
        noisy = optimal + 0.4 * np.random.default_rng(0).normal(size=optimal.shape)
        return tuple(np.asarray(x) for x in (rows, optimal, noisy, rl_bayes.posterior_rows(SPACE, rows, values)))


@functools.partial(jax.jit, static_argnames=("runs", "particles", "proposal", "scheme"))
def run(key, rows, log_psi, phi, threshold, planted=None, *, runs, particles, proposal="twist", scheme="systematic"):
    """Independent runs, as so many prompts."""
    caches = tuple(rl_bayes.table_cache(runs, 1) for _ in range(2))
    target = rl_bayes.Target(terms=(potential,), params=(phi,))
    prompts, lengths = jnp.zeros((runs, 1), jnp.int32), jnp.ones(runs, jnp.int32)
    return rl_bayes.smc(
        MODEL,
        (rows, log_psi),
        key,
        caches,
        prompts,
        lengths,
        target,
        num_particles=particles,
        max_new_tokens=reference.T,
        proposal=proposal,
        scheme=scheme,
        threshold=threshold,
        planted=planted,
    )


def exact_samples(size, seed=0):
    return rl_bayes.sample_rows(jax.random.key(seed), SPACE, setup()[3], num_samples=size)[0]


def mean_is(values, wanted, errors=4.0):
    values = np.asarray(values, float)
    assert abs(values.mean() - wanted) < errors * values.std() / np.sqrt(len(values)), (values.mean(), wanted)


@pytest.mark.parametrize("particles", [1, 4])
def test_optimal_twists_are_exact(particles, x64, strict):
    """T20: log Z for every number of particles and every key, whether or not resampling happens; the particles are exact samples."""
    rows, optimal, _, _ = setup()
    for seed, threshold in ((0, 0.5), (1, 2.0), (2, 0.0)):
        result = run(jax.random.key(seed), rows, optimal, PHI, threshold, runs=RUNS, particles=particles)
        np.testing.assert_allclose(result.log_z, LOG_Z, rtol=1e-12)
        np.testing.assert_allclose(result.ess, particles, rtol=1e-9)
    counts, expected = np.bincount(SPACE.index(result.tokens[:, 0]), minlength=1024), RUNS * np.exp(LOG_P)
    big = expected > 5
    assert np.sum((counts - expected)[big] ** 2 / expected[big]) < big.sum() + 5 * np.sqrt(2 * big.sum())  # T27


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unbiased(scheme, x64, strict):
    """T21: E[Z_hat] = Z and E[Z_hat sum w g] = Z E_p[g], resampling sometimes or always."""
    rows, _, noisy, _ = setup()
    for threshold in (0.5, 2.0):
        free = run(jax.random.key(3), rows, noisy, PHI, threshold, runs=RUNS, particles=4, proposal="base", scheme=scheme)
        mean_is(np.exp(free.log_z - LOG_Z), 1)
        weights = jax.nn.softmax(free.log_weights, axis=1)
        rewards = np.sum(weights * reference.REWARD[SPACE.index(free.tokens)], axis=1)
        mean_is(np.exp(free.log_z - LOG_Z) * rewards, np.exp(LOG_P) @ reference.REWARD)
    assert free.resampled[:, :-1].all() and not free.resampled[:, -1].any()


@pytest.mark.parametrize("scheme", ["multinomial", "systematic"])  # the conditional law of all four: test_resampling
def test_bounds(scheme, x64, strict):
    """T22: E[1 / Z_hat] = 1 / Z with an exact sample planted, so the means of log Z_hat bracket log Z."""
    rows, _, noisy, _ = setup()
    planted = exact_samples(RUNS)
    for threshold in (0.5, 2.0):
        arguments = (rows, noisy, PHI, threshold)
        free = run(jax.random.key(3), *arguments, runs=RUNS, particles=4, proposal="base", scheme=scheme)
        bound = run(jax.random.key(4), *arguments, planted, runs=RUNS, particles=4, proposal="base", scheme=scheme)
        np.testing.assert_array_equal(bound.tokens[:, 0], planted.tokens)
        mean_is(np.exp(LOG_Z - bound.log_z), 1)
        both = rl_bayes.sandwich(free.log_z, bound.log_z)
        assert both.lower < LOG_Z - 4 * both.lower_error and both.upper > LOG_Z + 4 * both.upper_error
        np.testing.assert_allclose((both.midpoint, both.gap), ((both.lower + both.upper) / 2, both.upper - both.lower))


@pytest.mark.slow
def test_proposals(x64, strict):
    """One particle gives the exact divergences; bounds tighten with particles; resampling helps the base proposal (S4)."""
    rows, _, noisy, _ = setup()
    log_q = np.asarray(rl_bayes.sequence_log_probs(SPACE, rl_bayes.twisted_rows(rows, noisy)))
    one = run(jax.random.key(5), rows, noisy, PHI, 0.5, runs=RUNS, particles=1)
    mean_is(one.log_z, LOG_Z - reference.kl(log_q, LOG_P))
    bound = run(jax.random.key(6), rows, noisy, PHI, 0.5, exact_samples(RUNS, seed=1), runs=RUNS, particles=1)
    mean_is(bound.log_z, LOG_Z + reference.kl(LOG_P, log_q))
    place, exact = SPACE.index(one.tokens[:, 0]), SPACE.index(exact_samples(RUNS, seed=1).tokens)
    target = PRIOR + PHI
    found = jax.jit(rl_bayes.kl_from_samples)(target[place], log_q[place], target[exact], log_q[exact], log_z=LOG_Z)
    assert abs(found.q_p - reference.kl(log_q, LOG_P)) < 4 * found.q_p_error and found.q_p_error < 0.05
    assert abs(found.p_q - reference.kl(LOG_P, log_q)) < 4 * found.p_q_error and found.p_q_error < 0.05
    np.testing.assert_allclose(np.sum(one.log_q[:, 0], axis=1), log_q[place], rtol=1e-10)
    np.testing.assert_allclose(np.sum(one.log_prior[:, 0], axis=1), PRIOR[place], rtol=1e-10)
    np.testing.assert_allclose(one.log_z, (PRIOR + PHI)[place] - log_q[place], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(one.log_psi[:, 0, -1], noisy[-256:].reshape(-1)[place], rtol=1e-12)
    gaps = {}
    for proposal in ("base", "twist"):
        for threshold in (0.0, 0.5):
            low = run(jax.random.key(7), rows, noisy, PHI, threshold, runs=RUNS, particles=4, proposal=proposal).log_z
            mean_is(np.exp(low - LOG_Z), 1)
            gaps[proposal, threshold] = LOG_Z - low.mean()
    assert gaps["base", 0.5] < gaps["base", 0.0] < reference.kl(PRIOR, LOG_P)
    assert gaps["twist", 0.0] < min(0.2 * gaps["base", 0.0], reference.kl(log_q, LOG_P))


@pytest.mark.slow
def test_a_given_proposal(x64, strict):
    """A third output of the model is what tokens are drawn from; weights take it into account."""
    rows, _, noisy, _ = setup()
    model = rl_bayes.twisted(DECODE, DECODE)
    q_rows = rl_bayes.log_rows(SPACE, reference.PROPOSAL.reshape(-1, reference.V)[reference.PREFIX_STATES])

    def three(params, cache, tokens, num_tokens=None, prefix=None):
        prefixes = (None, None, None) if prefix is None else prefix
        outputs, first = model(params[:2], cache[:2], tokens, num_tokens=num_tokens, prefix=None if prefix is None else prefixes[:2])
        logits, third = DECODE(params[2], cache[2], tokens, num_tokens=num_tokens, prefix=prefixes[2])
        return (*outputs, logits), (*first, third)

    target = rl_bayes.Target(terms=(potential,), params=(PHI,))
    options = {"num_particles": 4, "max_new_tokens": reference.T, "proposal": "given"}
    caches = tuple(rl_bayes.table_cache(3000, 1) for _ in range(3))
    arguments = (jax.random.key(8), caches, np.zeros((3000, 1), int), np.ones(3000, int), target)
    result = jax.jit(lambda key, *rest: rl_bayes.smc(three, (rows, noisy, q_rows), key, *rest, **options))(*arguments)
    mean_is(np.exp(result.log_z - LOG_Z), 1)
    place = SPACE.index(result.tokens)
    np.testing.assert_allclose(np.sum(result.log_q, axis=2), reference.sequence_log_probs(reference.PROPOSAL)[place], rtol=1e-10)
    with pytest.raises(ValueError, match="gives no proposal_logits"):
        rl_bayes.smc(model, (rows, noisy), arguments[0], caches[:2], *arguments[2:], **options)


def test_hard_constraints(x64, strict):
    """Dead particles, and all of them: no nan, a flag, and Z unbiased all the same."""
    rows, _, _, _ = setup()
    with np.errstate(divide="ignore"):
        phi = np.log(reference.ACCEPTED)
    log_z = reference.lse(PRIOR + phi)
    zero = np.zeros_like(rows)
    result = run(jax.random.key(9), rows, zero, phi, 0.5, runs=RUNS, particles=4, proposal="base")
    mean_is(np.exp(result.log_z - log_z), 1)
    assert result.empty.any() and not result.empty.all() and not np.any(np.isnan(result.log_z))
    assert np.all(np.isneginf(result.log_z[result.empty]))
    optimal = rl_bayes.next_values(SPACE, rl_bayes.soft_values(SPACE, rows, phi))
    result = run(jax.random.key(10), rows, np.asarray(optimal), phi, 0.5, runs=RUNS, particles=4)
    np.testing.assert_allclose(result.log_z, log_z, rtol=1e-11)
    assert reference.ACCEPTED[SPACE.index(result.tokens)].all()
    dead = run(jax.random.key(11), rows, np.full_like(rows, -np.inf), phi, 0.5, runs=RUNS, particles=4)
    assert dead.empty.all() and np.all(np.isneginf(dead.log_z))
    assert not any(np.any(np.isnan(x)) for x in jax.tree.leaves(dead))
    chosen, index = rl_bayes.draw_particle(jax.random.key(0), dead)
    assert chosen.tokens.shape == (RUNS, reference.T) and not index.any()


@pytest.mark.slow
def test_end_of_sequence_and_contexts(x64, strict):
    """Strings that end early, a table and a potential per context: exact with optimal twists, unbiased without."""
    space, rng = rl_bayes.Space(vocab_size=3, length=4, eos=2), np.random.default_rng(1)
    phi = rng.normal(size=(2, 81))

    @jax.jit
    @jax.vmap
    def exactly(logits, phi):
        rows = rl_bayes.log_rows(space, logits)
        values = rl_bayes.soft_values(space, rows, phi)
        policy = rl_bayes.posterior_rows(space, rows, values)
        samples = rl_bayes.sample_rows(jax.random.key(0), space, policy, num_samples=2000)[0]
        return rows, rl_bayes.next_values(space, values), values[0][0], rl_bayes.sequence_log_probs(space, rows), samples

    rows, twists, exact, log_prior, samples = jax.tree.map(np.asarray, exactly(rng.normal(size=(2, 40, 3)), phi))
    decode = rl_bayes.table_decode_fn(space)
    target = rl_bayes.Target(
        terms=(lambda params, x, context: params[context][space.index(x.tokens, x.num_tokens)],), params=(jnp.asarray(phi),)
    )
    contexts = np.arange(2000) % 2

    @jax.jit
    def go(key, twists, threshold, planted=None):
        caches = tuple(rl_bayes.table_cache(2000, 1) for _ in range(2))
        return rl_bayes.smc(
            rl_bayes.twisted(decode, decode), (rows, twists), key, caches, contexts[:, None], np.ones(2000, int), target,
            num_particles=3, max_new_tokens=4, contexts=contexts, stop_tokens=[2], threshold=threshold, planted=planted,
        )  # fmt: skip

    result = go(jax.random.key(0), twists, 0.5)
    np.testing.assert_allclose(result.log_z, exact[contexts], rtol=1e-11)
    lengths = np.asarray(result.num_tokens)
    assert set(np.unique(lengths)) == {1, 2, 3, 4} and np.array_equal(result.finished, np.any(result.tokens == 2, axis=2))
    places = space.index(result.tokens, result.num_tokens)
    np.testing.assert_allclose(np.sum(result.log_prior, axis=2), log_prior[contexts[:, None], places], rtol=1e-10)
    noisy = twists + 0.5 * rng.normal(size=(2, 40, 3))
    planted = jax.tree.map(lambda x: x[contexts, np.arange(2000)], samples)
    free, bound = go(jax.random.key(1), noisy, 2.0), go(jax.random.key(2), noisy, 2.0, planted)
    np.testing.assert_array_equal(bound.num_tokens[:, 0], planted.num_tokens)
    for c in range(2):
        mean_is(np.exp(free.log_z - exact[c])[contexts == c], 1)
        mean_is(np.exp(exact[c] - bound.log_z)[contexts == c], 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resampling(scheme, x64, strict):
    """Expected descendants, plain and conditional (brute force: keep the draws in which a random slot descends from the first); arrangement."""
    weights = np.array([0.05, 0.4, 0.0, 0.3, 0.25])
    with np.errstate(divide="ignore"):
        log_w = np.log(weights) + 7
    keys = jax.random.split(jax.random.key(0), 40000)
    free = np.asarray(jax.jit(jax.vmap(lambda key: rl_bayes.resample(key, log_w, scheme=scheme)))(keys))
    counts = np.stack([(free == j).sum(1) for j in range(5)], axis=1)
    np.testing.assert_allclose(counts.mean(0), 5 * weights, atol=4 * np.sqrt(5 * 0.25 / 40000))
    assert not np.any(free == 2)
    if scheme in ("systematic", "residual"):
        assert np.all(counts >= np.floor(5 * weights - 1e-9))
    for heavy in (False, True):
        order = np.array([1, 0, 2, 3, 4]) if heavy else np.arange(5)
        of = log_w[order]
        plain = free if not heavy else np.asarray(jax.jit(jax.vmap(lambda key: rl_bayes.resample(key, of, scheme=scheme)))(keys))  # noqa: B023
        slot = np.random.default_rng(1).integers(0, 5, len(plain))
        kept = plain[plain[np.arange(len(plain)), slot] == 0]
        given = np.asarray(jax.jit(jax.vmap(lambda key: rl_bayes.resample(key, of, scheme=scheme, planted=True)))(keys))  # noqa: B023
        assert np.all((given == 0).any(1))
        for j in range(5):
            for power in (1, 2):
                a, b = ((kept == j).sum(1) ** power, (given == j).sum(1) ** power)
                assert abs(a.mean() - b.mean()) < 4 * np.sqrt(a.var() / len(a) + b.var() / len(b)) + 1e-12, (j, power)
    arranged = np.asarray(jax.jit(jax.vmap(rl_bayes.arrange))(free[:2000]))
    np.testing.assert_array_equal(np.sort(arranged, axis=1), np.sort(free[:2000], axis=1))
    for row in arranged:
        assert all(row[j] == j for j in set(row))
    level = rl_bayes.resample(jax.random.key(0), np.full(6, -np.inf), scheme=scheme)
    assert level.dtype == jnp.int32 and np.all((level >= 0) & (level < 6))


def paths():
    """[x t] which prefix comes before each token of each sequence."""
    tokens = reference.SEQUENCES
    before = [sum((tokens[:, s] * 4 ** (t - 1 - s) for s in range(t)), np.zeros(1024, int)) for t in range(reference.T)]
    return np.stack([SPACE.offset(t) + number for t, number in enumerate(before)], axis=1)


@pytest.mark.slow
def test_twists_are_learned(x64, strict):
    """T25 and the others' optima on a table: exact expectations over all sequences; gradients vanish where the table says."""
    rows, optimal, noisy, _ = setup()
    tokens = reference.SEQUENCES
    at = paths()
    lengths = np.full(1024, reference.T)
    here = lambda table: jnp.asarray(table)[at, tokens]  # noqa: E731
    log_prior = rows[at, tokens]
    prefixes = rl_bayes.prefix_log_probs(SPACE, rl_bayes.posterior_rows(SPACE, rows, rl_bayes.soft_values(SPACE, rows, PHI)))

    def ctl(table):
        log_v = rl_bayes.prefix_log_weights(log_prior, np.zeros_like(log_prior), here(table), lengths)
        # all x, weighted by the whole sequence, so prefixes appear with their marginal: weights of pi_t times the law of the completion
        rest = np.cumsum(log_prior[:, ::-1], axis=1)[:, ::-1]
        rest = np.concatenate([rest[:, 1:], np.zeros((1024, 1))], axis=1)
        return rl_bayes.ctl_loss(here(table), lengths, here(table), lengths, log_v + rest, LOG_P)

    gradient = jax.jit(jax.grad(ctl))
    intermediate = rl_bayes.twisted_log_probs(SPACE, rows, noisy)
    wanted = np.concatenate([(np.exp(q) - np.exp(p)).reshape(-1, 4) for p, q in zip(prefixes[1:], intermediate)])
    np.testing.assert_allclose(gradient(noisy), wanted, atol=1e-13)
    np.testing.assert_allclose(gradient(optimal), 0, atol=1e-13)

    flat = np.exp(PRIOR)

    def expectation(loss):
        return lambda table: jnp.sum(flat * jax.vmap(lambda i: loss(here(table)[i][None], i))(jnp.arange(1024)))

    def soft_q(log_psi, i):
        return rl_bayes.soft_q_loss(log_psi, soft[i][None], jnp.asarray(PHI)[i][None], lengths[:1])

    shifted = np.minimum(PHI - PHI.max() - 0.1, -0.1)  # exp(phi) < 1
    below = rl_bayes.next_values(SPACE, rl_bayes.soft_values(SPACE, rows, shifted))
    soft = rl_bayes.soft_values_of(rows[at], optimal[at])
    np.testing.assert_allclose(soft[:, 0], LOG_Z, rtol=1e-11)
    np.testing.assert_allclose(jax.jit(expectation(soft_q))(optimal), 0, atol=1e-20)
    fudge = expectation(lambda log_psi, i: rl_bayes.fudge_loss(log_psi, jnp.asarray(shifted)[i][None], lengths[:1]))
    squared = expectation(lambda log_psi, i: rl_bayes.squared_loss(log_psi, jnp.asarray(shifted)[i][None], lengths[:1]))
    for loss in (fudge, squared):
        slope = jax.jit(jax.grad(loss))
        np.testing.assert_allclose(slope(np.asarray(below)), 0, atol=1e-13)
        assert np.abs(slope(np.asarray(below) - 0.3)).max() > 1e-5

    def sixo(table):
        # samples of the prior are all x alike: what they say is exchanged for the expectation
        ours = rl_bayes.sixo_loss(here(table), lengths, here(table), lengths, LOG_P)
        each = jnp.sum(jax.nn.softplus(here(table)), axis=1)
        return ours - jnp.mean(each) + flat @ each

    np.testing.assert_allclose(jax.jit(jax.grad(sixo))(optimal - LOG_Z), 0, atol=1e-13)
    q = rl_bayes.twisted_rows(rows, optimal)[at, tokens]
    path = jax.jit(lambda log_q, log_psi: rl_bayes.path_consistency_loss(log_q, log_prior, log_psi, PHI, lengths))
    np.testing.assert_allclose(path(q, here(optimal)), 0, atol=1e-20)
    assert path(q, here(noisy)) > 1e-2
    np.testing.assert_allclose(rl_bayes.token_values(jnp.asarray(noisy)[at], tokens, lengths), here(noisy))


def test_contrastive_training(x64, strict):
    """From samples of the proposal alone, weighted by P / q and by pi_t / q: the proposal comes close to p."""
    rows, _, _, _ = setup()
    at, log_prior = paths(), jnp.asarray(PRIOR)
    lengths = jnp.full(256, reference.T, jnp.int32)

    @jax.jit
    def train(table):
        def step(table, key):
            q_rows = rl_bayes.twisted_rows(rows, table)
            x = rl_bayes.sample_rows(key, SPACE, q_rows, num_samples=256)[1]
            place, tokens = jnp.asarray(at)[x], jnp.asarray(reference.SEQUENCES)[x]
            log_q, prior = q_rows[place, tokens], jnp.asarray(rows)[place, tokens]

            def loss(table):
                log_psi = table[place, tokens]
                weights = rl_bayes.prefix_log_weights(prior, log_q, log_psi, lengths)
                return rl_bayes.ctl_loss(log_psi, lengths, log_psi, lengths, weights, (log_prior + PHI)[x] - jnp.sum(log_q, axis=1))

            return table - 4.0 * jax.grad(loss)(table), None

        table = jax.lax.scan(step, table, jax.random.split(jax.random.key(0), 300))[0]
        return rl_bayes.sequence_log_probs(SPACE, rl_bayes.twisted_rows(rows, table))

    log_q = np.asarray(train(np.zeros_like(rows)))
    start = reference.kl(LOG_P, PRIOR)
    assert reference.kl(LOG_P, log_q) < 0.35 * start, (reference.kl(LOG_P, log_q), start)


def test_losses_of_twists_in_padding_and_without_weight(x64, strict):
    rng = np.random.default_rng(2)
    log_psi, phi, lengths = -rng.random((4, 3)), -rng.random(4), np.array([3, 1, 2, 3])
    junk = np.where(np.arange(3)[None] < lengths[:, None], 0.0, np.nan)
    losses = {
        "ctl": lambda a: rl_bayes.ctl_loss(a, lengths, a, lengths, rl_bayes.prefix_log_weights(a, a, a, lengths), phi),
        "soft_q": lambda a: rl_bayes.soft_q_loss(a, -jnp.ones((4, 3)), phi, lengths),
        "sixo": lambda a: rl_bayes.sixo_loss(a, lengths, a, lengths, phi),
        "fudge": lambda a: rl_bayes.fudge_loss(a, phi, lengths),
        "squared": lambda a: rl_bayes.squared_loss(a, phi, lengths),
        "path": lambda a: rl_bayes.path_consistency_loss(a, a, a, phi, lengths),
    }

    @jax.jit
    def both(a):
        return {name: jax.value_and_grad(loss)(a) for name, loss in losses.items()}

    noisy, clean = both(log_psi + junk), both(log_psi)
    for name in losses:
        np.testing.assert_allclose(noisy[name][0], clean[name][0], rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(noisy[name][1], np.where(np.isnan(junk), 0, clean[name][1]), atol=1e-13, err_msg=name)
    none = np.full(4, -np.inf)
    lost = [
        lambda a: rl_bayes.ctl_loss(a, lengths, a, lengths, jnp.full((4, 3), -jnp.inf), none),
        lambda a: rl_bayes.soft_q_loss(a, jnp.full((4, 3), -jnp.inf), none, lengths),
        lambda a: rl_bayes.fudge_loss(a, none, lengths),
        lambda a: rl_bayes.fudge_loss(0 * a, np.zeros(4), lengths),
        lambda a: rl_bayes.path_consistency_loss(a, a, a, none, lengths),
    ]
    for value, gradient in jax.jit(lambda a: [jax.value_and_grad(loss)(a) for loss in lost])(log_psi):
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


CONFIG = transformer.TransformerConfig(
    vocab_size=19, max_length=32, width=16, depth=2, heads=2, kv_heads=1, head_width=8, hidden=32, tied=True
)


def lm_potential(params, x):
    return params * jnp.sum(jnp.where(x.mask, (x.tokens % 3 == 0).astype(jnp.float32), 0.0), axis=-1)


def unembed(params, h):
    return h @ transformer.unembed(CONFIG, params)


LM = rl_bayes.with_head(functools.partial(transformer.extend, CONFIG), unembed, lambda head, h: 1.0 + h @ head)


def lm_params():
    """A network and a twist head, imperfect on purpose."""
    seen = jnp.asarray(np.arange(CONFIG.vocab_size) % 3 == 0, jnp.float32)
    head = 0.2 * jax.random.normal(jax.random.key(3), (CONFIG.width, CONFIG.vocab_size))
    return transformer.init(CONFIG, jax.random.key(0)), head + 0.2 * seen[None]


def lm_run(params, key, threshold, prompts, lengths, *, particles=16, new=6, scheme="systematic"):
    target = rl_bayes.Target(terms=(lm_potential,), params=(jnp.asarray(1.5),))
    cache = transformer.init_cache(CONFIG, prompts.shape[0], prompts.shape[1])
    return rl_bayes.smc(
        LM, params, key, cache, prompts, lengths, target,
        num_particles=particles, max_new_tokens=new, threshold=threshold, stop_tokens=[1], scheme=scheme,
    )  # fmt: skip


def test_on_a_transformer():
    """Plain sampling is the special case without twists and resampling; after resampling a particle's cache is its ancestor's."""
    params, head = lm_params()
    prompts, lengths = np.array([[3, 4, 5], [6, 7, 0]]), np.array([3, 2])
    decode = transformer.decode_fn(CONFIG)
    go, score = jax.jit(chex.assert_max_traces(lm_run, n=1)), jax.jit(transformer.logits_fn(CONFIG))
    for threshold in (2.0, 0.5):
        result = go((params, head), jax.random.key(1), threshold, prompts, lengths)
        assert result.resampled[:, :-1].all() or threshold < 1
        for row in range(2):  # log-probabilities of the surviving texts, from whole texts at once
            texts = np.concatenate([np.tile(prompts[row, : lengths[row]], (16, 1)), result.tokens[row]], axis=1)
            logits = score(params, jnp.asarray(np.pad(texts, ((0, 0), (0, 9 - texts.shape[1])))))
            steps = logits[:, lengths[row] - 1 : lengths[row] + 5]
            wanted = rl_bayes.token_log_probs(steps, result.tokens[row], result.num_tokens[row])
            np.testing.assert_allclose(result.log_prior[row], wanted, atol=2e-5)
    key = jax.random.key(2)

    @jax.jit
    def plain(key):
        cache = transformer.init_cache(CONFIG, 2, 3)
        target = rl_bayes.Target(terms=(lm_potential,), params=(jnp.asarray(1.5),))
        ours = rl_bayes.smc(
            rl_bayes.untwisted(decode), params, key, cache, prompts, lengths, target,
            num_particles=16, max_new_tokens=6, threshold=0.0, stop_tokens=[1], proposal="base",
        )  # fmt: skip
        options = {"sampling": sampling.SamplingParams(), "max_new_tokens": 6, "stop_tokens": [1], "num_samples": 16}
        return ours, sampling.generate(decode, params, jax.random.split(key)[0], cache, prompts, lengths, **options)

    ours, theirs = plain(key)
    np.testing.assert_array_equal(ours.tokens.reshape(32, 6), theirs.tokens)
    np.testing.assert_array_equal(ours.num_tokens.reshape(32), theirs.num_tokens)
    np.testing.assert_allclose(ours.log_prior.reshape(32, 6), theirs.log_probs, atol=1e-5)
    np.testing.assert_allclose(ours.log_weights, ours.potential, atol=1e-6)


@functools.cache
def on_one_device():
    go = jax.jit(functools.partial(lm_run, particles=64))
    return jax.device_get(go(lm_params(), jax.random.key(1), 0.9, np.array([[3, 4, 5]]), np.array([3])))


@pytest.mark.parametrize("explicit", [False, True])
def test_particles_over_eight_devices(explicit):
    """The same particles as on one device, and what crosses devices is a block of ancestors' rows, not the cache."""
    params, prompts, lengths = lm_params(), np.array([[3, 4, 5]]), np.array([3])
    go = functools.partial(lm_run, particles=64)
    wanted = on_one_device()
    assert wanted.resampled.any()
    with jax.set_mesh(sharding.make_mesh({"data": 8}, explicit=explicit)):
        placed = jax.device_put((params, jax.random.key(1), jnp.asarray(0.9), jnp.asarray(prompts), jnp.asarray(lengths)), jax.P())
        compiled = jax.jit(go).lower(*placed).compile()
        result = compiled(*placed)
    np.testing.assert_array_equal(result.tokens, wanted.tokens)
    np.testing.assert_allclose(result.log_weights, wanted.log_weights, atol=1e-5)
    np.testing.assert_allclose(result.log_z, wanted.log_z, atol=1e-5)
    text = compiled.as_text()
    assert re.search(r"f32\[2,8,5,1,8\]", text)  # an eighth of the particles' keys on each device
    gathered = re.findall(r"= f32\[2,64,5,1,8\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)", text)
    assert not gathered
    assert re.search(r"f32\[2,4,5,1,8\]\S* all-reduce", text)  # 64 / 16 rows at a time


def test_messages():
    target = rl_bayes.Target(terms=(potential,), params=(PHI,))
    cache = (rl_bayes.table_cache(1, 1), rl_bayes.table_cache(1, 1))
    arguments = (MODEL, setup()[:2], jax.random.key(0), cache, np.zeros((1, 1), int), np.ones(1, int), target)
    options = {"num_particles": 2, "max_new_tokens": 5}
    with pytest.raises(ValueError, match=r"rl_bayes\.smc: 'proposal' is 'prior', expected one of 'base', 'twist', 'given'"):
        rl_bayes.smc(*arguments, **options, proposal="prior")
    with pytest.raises(ValueError, match="'scheme' is 'killing', expected one of 'multinomial'"):
        rl_bayes.smc(*arguments, **options, scheme="killing")
    with pytest.raises(ValueError, match="'num_particles' is 0, expected at least 1"):
        rl_bayes.smc(*arguments, num_particles=0, max_new_tokens=5)
    with pytest.raises(ValueError, match=r"planted.tokens' has shape \(1, 3\), expected \[1 5\]"):
        rl_bayes.smc(*arguments, **options, planted=rl_bayes.Sequences(jnp.zeros((1, 3), int), jnp.ones(1, int)))
    with pytest.raises(ValueError, match="'cache' must be a tree of Cache with 1 rows, one per prompt"):
        rl_bayes.smc(*arguments[:3], (rl_bayes.table_cache(2, 1),) * 2, *arguments[4:], **options)
    with pytest.raises(ValueError, match="'scheme' is 'x'"):
        rl_bayes.resample(jax.random.key(0), np.zeros(3), scheme="x")
