"""Divergences, their gradients in the student's logits and sampled estimators in float64 NumPy, from the definitions, one row at a time.

s is the student (first argument of the library), t the teacher. Sums run over the support only: 0 log 0 = 0.
"""

import numpy as np


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    weight = np.exp(logits - logits.max())
    return weight / weight.sum()


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def kl(a, b):
    """KL(a || b); inf where a is not absolutely continuous."""
    total = 0.0
    for x, y in zip(a, b):
        if x > 0:
            total += x * (np.log(x) - np.log(y)) if y > 0 else np.inf
    return total


def forward_kl(s, t):
    return kl(t, s)


def reverse_kl(s, t):
    return kl(s, t)


def jeffreys(s, t):
    return kl(s, t) + kl(t, s)


def js(s, t, beta=0.5):
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def skew_kl(s, t, alpha=0.1):
    return kl(t, alpha * t + (1 - alpha) * s)


def skew_reverse_kl(s, t, alpha=0.1):
    return kl(s, alpha * s + (1 - alpha) * t)


def power_sum(s, t, alpha):
    both = (s > 0) & (t > 0)
    if (alpha > 1 and np.any(t[s == 0] > 0)) or (alpha < 0 and np.any(s[t == 0] > 0)):
        return np.inf
    return np.sum(t[both] ** alpha * s[both] ** (1 - alpha))


def alpha_divergence(s, t, alpha):
    if alpha == 0:
        return kl(s, t)
    if alpha == 1:
        return kl(t, s)
    return (power_sum(s, t, alpha) - 1) / (alpha * (alpha - 1))


def renyi(s, t, alpha):
    return kl(t, s) if alpha == 1 else np.log(power_sum(s, t, alpha)) / (alpha - 1)


def total_variation(s, t):
    return np.abs(s - t).sum() / 2


def squared_hellinger(s, t):
    return 1 - np.sqrt(s * t).sum()


def chi2_forward(s, t):
    return np.sum((t - s) ** 2 / s)


def chi2_reverse(s, t):
    return np.sum((t - s) ** 2 / t)


def head_ratio(s, t):
    order = sorted(range(len(t)), key=lambda v: (-t[v], v))
    head, tail, mass = 0.0, 0.0, 0.0
    for place, v in enumerate(order):
        mass += t[v]
        if place == 0 or mass <= 0.5:
            head += abs(t[v] - s[v])
        else:
            tail += abs(t[v] - s[v])
    return head / (head + tail)


def adaptive_kl(s, t):
    r = head_ratio(s, t)
    return r * kl(t, s) + (1 - r) * kl(s, t)


def from_weights(s, w):
    """dD/dz = s (w - sum s w) with w = dD/ds, as a sum of differences: nothing cancels where s is nearly one-hot."""
    return np.array([s[k] * np.sum(s * (w[k] - w)) for k in range(len(s))])


def gradient(name, s, t, parameter=None):
    """dD/dz for the student's logits z (positive s and t)."""
    l = np.log(s) - np.log(t)
    a = parameter
    if name == "forward_kl":
        return s - t
    if name == "renyi":
        g = t**a * s ** (1 - a)
        return s - g / g.sum()
    if name == "adaptive_kl":
        r = head_ratio(s, t)
        return r * (s - t) + (1 - r) * from_weights(s, l)
    m = None if a is None else (a * s + (1 - a) * t if name == "skew_reverse_kl" else a * t + (1 - a) * s)
    weights = {
        "reverse_kl": lambda: l,
        "jeffreys": lambda: l - t / s,
        "js": lambda: (1 - a) * np.log(s / m),
        "skew_kl": lambda: -(1 - a) * t / m,
        "skew_reverse_kl": lambda: np.log(s / m) - a * s / m,
        "total_variation": lambda: np.sign(s - t) / 2,
        "alpha_divergence": lambda: -((t / s) ** a) / a,
        "squared_hellinger": lambda: -np.sqrt(t / s) / 2,
        "chi2_forward": lambda: -((t / s) ** 2),
        "chi2_reverse": lambda: 2 * s / t,
    }
    return from_weights(s, weights[name]())


def explicit_gradient(name, s, t, parameter=None):
    """The same where a formula without w is known."""
    a, l = parameter, np.log(s) - np.log(t)
    if name == "reverse_kl":
        return s * (l - kl(s, t))
    if name == "js":
        m = a * t + (1 - a) * s
        return (1 - a) * s * (np.log(s / m) - kl(s, m))
    if name == "alpha_divergence":
        g = t**a * s ** (1 - a)
        return -(g - s * g.sum()) / a
    if name == "squared_hellinger":
        g = np.sqrt(s * t)
        return -(g - s * g.sum()) / 2
    return gradient(name, s, t, parameter)


def f(name, u, parameter=None):
    """(f, f', f'') at u > 0, from the tables; f >= 0 and f'(1) = 0."""
    a, one = parameter, np.ones_like(u)
    log = np.log(u)
    if name == "alpha_divergence":
        return (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)), (1 - u**-a) / a, u ** (-a - 1)
    if name == "js":
        m = a + (1 - a) * u
        return -a * np.log(m) + (1 - a) * u * np.log(u / m), (1 - a) * np.log(u / m), (1 - a) * a / (u * m)
    if name == "skew_kl":
        m = a + (1 - a) * u
        return (1 - a) * (u - 1) - np.log(m), (1 - a) * (1 - 1 / m), ((1 - a) / m) ** 2
    if name == "skew_reverse_kl":
        m = a * u + 1 - a
        slope = np.log(u / m) + (1 - a) / m - (1 - a)
        return u * np.log(u / m) + (1 - a) * (1 - u), slope, 1 / u - a / m - a * (1 - a) / m**2
    return {
        "forward_kl": (u - 1 - log, 1 - 1 / u, u**-2),
        "reverse_kl": (u * log - u + 1, log, 1 / u),
        "jeffreys": ((u - 1) * log, log + 1 - 1 / u, 1 / u + u**-2),
        "total_variation": (np.abs(u - 1) / 2, np.sign(u - 1) / 2, 0 * one),
        "squared_hellinger": ((np.sqrt(u) - 1) ** 2 / 2, (1 - u**-0.5) / 2, u**-1.5 / 4),
        "chi2_forward": ((1 - u) ** 2 / u, 1 - u**-2.0, 2 * u**-3.0),
        "chi2_reverse": ((u - 1) ** 2, 2 * (u - 1), 2 * one),
    }[name]


def merged(s, t, inside):
    """Both distributions with the tokens outside put into one bucket."""
    return tuple(np.append(x[inside], x[~inside].sum()) for x in (s, t))


def leave_one_out(values, control):
    """values - c_i control with c_i the regression coefficient over all samples but i."""
    result = np.empty(len(values))
    for i in range(len(values)):
        y, x = np.delete(values, i), np.delete(control, i)
        result[i] = values[i] - np.mean((y - y.mean()) * (x - x.mean())) / np.var(x) * control[i]
    return result
