"""KL-RL as inference in float64 NumPy, written from the equations by brute force over all sequences; and the published check toy."""

import itertools

import numpy as np

V, T = 4, 5
SEQUENCES = np.array(list(itertools.product(range(V), repeat=T)))
_T, _PREV, _V = np.meshgrid(np.arange(T), np.arange(V + 1), np.arange(V), indexing="ij")
PRIOR = 1.3 * np.sin(1 + 2 * _T + 3 * _PREV + 5 * _V)
POLICY = PRIOR + 0.5 * np.cos(2 + _T + 2 * _PREV + 3 * _V)
PROPOSAL = PRIOR + 0.3 * np.sin(3 + 2 * _T + _PREV + 7 * _V)
REWARD = np.sum(0.6 * np.cos(1 + 2 * SEQUENCES + 1.7 * np.arange(T)), axis=1) + (SEQUENCES[:, 0] == SEQUENCES[:, 4]) - 2
ACCEPTED = ((np.sum(SEQUENCES == 2, axis=1) >= 2) & (SEQUENCES[:, 0] != 2)).astype(float)
FEATURES = np.stack([SEQUENCES[:, 4] == 3, np.sum(SEQUENCES == 0, axis=1) >= 2], axis=1).astype(float)
# Row of a Markov table, flattened over (t, previous), for every prefix by depth and in lexicographic order.
PREFIX_STATES = np.array(
    [t * (V + 1) + (prefix[-1] if prefix else V) for t in range(T) for prefix in itertools.product(range(V), repeat=t)], np.int32
)

# Values printed with the toy's definition.
BY_BETA = {  # log Z, H(p*), E_p* r, KL(p*||pi0), KL(pi0||p*), KL(pi||p*) / KL(p*||pi), TV(pi,p*), JSD, hell2, J(pi), ESS/K
    beta: tuple(map(float, numbers.split()))
    for beta, numbers in (
        (0.1, "6.0124726685 0.7872195323 1.3156692680 7.1442200111 21.3638770968 22.3722012941 "
         "7.9980620022 0.9945272042 0.6848978897 1.9372161104 -1.6359728626 0.0006862806"),
        (0.5, "-1.5913694742 4.5927539683 -0.1570541805 1.2772611133 1.4789114114 1.9414741163 "
         "1.6574742110 0.6593994476 0.3113140029 0.7206176551 -1.7664217953 0.1110008888"),
        (1.0, "-1.1431388718 5.1524402281 -0.7683168467 0.3748220251 0.3920015710 0.7863440893 "
         "0.7317078374 0.4590829117 0.1596419043 0.3450904538 -1.9294829611 0.4991202305"),
        (5.0, "-0.2910164554 5.4232629441 -1.3751414589 0.0159881636 0.0160116332 0.3557780022 "
         "0.3664317242 0.3215542654 0.0826008422 0.1723158603 -3.2339722880 0.9686342942"),
    )
}  # fmt: skip
GRADIENTS = {  # norm, entry [0,4,0], entry [2,1,3] of the gradient with respect to POLICY at beta = 0.5
    "J": (0.3152384602, 0.1597000044, -0.0027305136),
    "fkl": (0.5234929357, -0.1439021609, 0.0047629429),
    "rkl": (0.6304769204, -0.3194000089, 0.0054610273),
    "tv": (0.0813492971, -0.0324239947, 0.0007219552),
    "js": (0.1342312543, -0.0609785697, 0.0014119130),
    "hell2": (0.1746248255, -0.0783623048, 0.0017963894),
}
HARD = {  # value, norm of the gradient, entry [2,1,3] for the target pi0 b
    "fkl": (2.4405607850, 0.7691065080, -0.0020649022),
    "tv": (0.8797743837, 0.0706580805, 0.0000882779),
    "js": (1.0366546328, 0.1505496698, -0.0000472644),
    "hell2": (1.3592853233, 0.2055591370, -0.0001641979),
}
SOFT_VALUES = {
    (): -1.5913694742, (0,): -1.6789633203, (2,): -1.5575632032, (0, 1): -1.6909240509,
    (3, 3): -1.8986719605, (1, 2, 3): -4.1179817682, (0, 1, 2, 3): -2.1982571431,
}  # fmt: skip
BEST_OF_N = {  # KL, bound, E r
    2: (0.1930778269, 0.1931471806, -1.0272569362),
    4: (0.6361274316, 0.6362943611, -0.6065188540),
    16: (1.8340106546, 1.8350887222, 0.0023602069),
}
BINARY_BEST_OF_N = {2: 0.0632411723, 4: 0.3427401913, 16: 1.4753999613}
QRS = {  # acceptance, TV, KL at beta = 0.5 with PROPOSAL
    0.1: (0.5285432256, 0.4562881168, 0.6994233546),
    0.3: (0.3248927422, 0.3182738695, 0.3945970138),
    1.0: (0.1567394319, 0.1831518644, 0.1402047275),
}
BOUNDS = {1: (-3.0794106768, -0.3327137797), 2: (-2.5269582438, -0.7471708470)}
MOMENTS = ((0.5, 0.5), (0.9419081802, 0.3033885816), (0.3031987350, 0.5048046908), 0.5285290725, 0.0941193084)
VARIANCE = {"on": (86.0706306896, 81.8357238668), "off": (32.5278368783, 32.1003764388)}  # plain, with the baseline Z pi / q
BINARY_ENTROPY = {0.1: 4.2848807282, 0.5: 5.2661139693, 1.0: 5.4716797356, 5.0: 5.4653784899, 20.0: 5.4524977831}


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def lse(x):
    top = np.max(x)
    return top + np.log(np.sum(np.exp(x - top))) if np.isfinite(top) else -np.inf


def sequence_log_probs(table):
    """Token by token for every sequence."""
    rows = log_softmax(table)
    out = np.zeros(len(SEQUENCES))
    for i, x in enumerate(SEQUENCES):
        previous = V
        for t, token in enumerate(x):
            out[i] += rows[t, previous, token]
            previous = token
    return out


def scores(table):
    """d log pi(x) / d table, [x T V+1 V]: indicator of the token less the probabilities, at the states that x visits."""
    probabilities = np.exp(log_softmax(table))
    out = np.zeros((len(SEQUENCES), *table.shape))
    for i, x in enumerate(SEQUENCES):
        previous = V
        for t, token in enumerate(x):
            out[i, t, previous] -= probabilities[t, previous]
            out[i, t, previous, token] += 1
            previous = token
    return out


def f(name, t, a=0.3):
    """The generators of the table, at t > 0."""
    return {
        "fkl": lambda: -np.log(t),
        "rkl": lambda: t * np.log(t),
        "tv": lambda: 0.5 * np.abs(1 - t),
        "js": lambda: t * np.log(2 * t / (t + 1)) + np.log(2 / (t + 1)),
        "hell2": lambda: (np.sqrt(t) - 1) ** 2,
        "chi2p": lambda: t * (1 / t - 1) ** 2,
        "chi2r": lambda: (t - 1) ** 2,
        "alpha": lambda: (t**a - a * t - (1 - a)) / (a * (a - 1)),
    }[name]()


def f_prime(name, t, a=0.3):
    return {
        "fkl": lambda: -1 / t,
        "rkl": lambda: np.log(t) + 1,
        "tv": lambda: 0.5 * np.sign(t - 1),
        "js": lambda: np.log(2 * t / (1 + t)),
        "hell2": lambda: 1 - t**-0.5,
        "chi2p": lambda: 1 - t**-2.0,
        "chi2r": lambda: 2 * (t - 1),
        "alpha": lambda: (t ** (a - 1) - 1) / (a - 1),
    }[name]()


F_PRIME_INF = {"fkl": 0.0, "rkl": np.inf, "tv": 0.5, "js": np.log(2), "hell2": 1.0, "chi2p": 1.0, "chi2r": np.inf, "alpha": 1 / 0.7}


def divergence(name, log_pi, log_p):
    """sum over the support of p f(pi / p), and f'(inf) pi off it."""
    inside = np.isfinite(log_p)
    off = np.exp(log_pi[~inside]).sum()
    return np.sum(np.exp(log_p[inside]) * f(name, np.exp(log_pi - log_p)[inside])) + (F_PRIME_INF[name] * off if off else 0.0)


def divergence_gradient(name, log_pi, log_p, score):
    """sum pi f'(pi / p) grad log pi."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        slope = np.where(np.isfinite(log_p), f_prime(name, np.exp(log_pi - log_p)), F_PRIME_INF[name])
    return np.einsum("x,x...->...", np.exp(log_pi) * slope, score)


def kl(log_a, log_b):
    inside = np.isfinite(log_a)
    return np.sum(np.exp(log_a[inside]) * (log_a[inside] - log_b[inside]))


def entropy(log_p):
    inside = np.isfinite(log_p)
    return -np.sum(np.exp(log_p[inside]) * log_p[inside])


def soft_value(prefix, log_prior, phi):
    """log E_pi0[exp(phi) | prefix] over the completions of the prefix, one by one."""
    inside = np.all(SEQUENCES[:, : len(prefix)] == np.array(prefix, int), axis=1)
    return lse((log_prior + phi)[inside]) - lse(log_prior[inside])


def best_of_two(log_prior, reward):
    """All pairs: the better one, or either with probability 1/2."""
    p = np.exp(log_prior)
    better = (reward[:, None] > reward[None, :]) + 0.5 * (reward[:, None] == reward[None, :])
    return 2 * p * (better @ p)


def qrs(log_q, log_target, c):
    """Acceptance, law of the accepted, and its KL and TV from p."""
    q, target = np.exp(log_q), np.exp(log_target)
    accepted = q * np.minimum(1, target / (c * q))
    rate, p = accepted.sum(), target / target.sum()
    p_c = accepted / rate
    inside = p > 0
    return rate, 0.5 * np.abs(p - p_c).sum(), np.sum(p[inside] * np.log(p[inside] / p_c[inside])), p[target > c * q].sum()


def eos_space(vocab_size, length, eos):
    """All strings that end with `eos`, or are cut at the length, as tuples."""
    out = []
    for n in range(1, length + 1):
        for x in itertools.product(range(vocab_size), repeat=n):
            if eos not in x[:-1] and (x[-1] == eos or n == length):
                out.append(x)
    return out


def subtb(log_pi, log_reward, log_stop, lengths, lam):
    """Every pair of prefixes i < j of every sequence, j at most its length."""
    total = weight = 0.0
    for row, n in enumerate(lengths):
        for i in range(n + 1):
            for j in range(i + 1, n + 1):
                start, end = (log_reward[row, k] - log_stop[row, k] for k in (i, j))
                total += lam ** (j - i - 1) * (start + log_pi[row, i:j].sum() - end) ** 2
                weight += lam ** (j - i - 1)
    return total / weight


def gae(rewards, values, gamma, lam):
    out = np.zeros(len(rewards))
    for t in range(len(rewards)):
        for s in range(t, len(rewards)):
            following = values[s + 1] if s + 1 < len(rewards) else 0.0
            out[t] += (gamma * lam) ** (s - t) * (rewards[s] + gamma * following - values[s])
    return out
