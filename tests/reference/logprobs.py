"""Log-probabilities, entropies and their gradients in float64 NumPy, from the definitions."""

import numpy as np


def logits_of(h, w, bias=None, softcap=None, temperature=1.0):
    """(z, dz / dx) with x = h w + b, z = cap(x) / temperature; -inf biases forbid."""
    x = np.asarray(h, np.float64) @ np.asarray(w, np.float64)
    forbidden = np.zeros(x.shape, bool)
    if bias is not None:
        bias = np.asarray(bias, np.float64)
        forbidden |= np.isneginf(bias)
        x = x + np.where(np.isneginf(bias), 0.0, bias)
    slope = np.full(x.shape, 1.0 / temperature)
    if softcap is not None:
        slope = slope / np.cosh(x / softcap) ** 2
        x = softcap * np.tanh(x / softcap)
    return np.where(forbidden, -np.inf, x / temperature), np.where(forbidden, 0.0, slope)


def statistics(logits, tokens):
    """(log-probability of the tokens, entropy, log-normaliser, p), row by row over [n v]."""
    logits = np.asarray(logits, np.float64)
    n, _ = logits.shape
    normalizer, chosen, entropy, p = np.empty(n), np.empty(n), np.empty(n), np.empty(logits.shape)
    for i, row in enumerate(logits):
        top = row.max()
        weight = np.exp(row - top)
        p[i] = weight / weight.sum()
        normalizer[i] = top + np.log(weight.sum())
        chosen[i] = row[tokens[i]] - normalizer[i]
        positive = p[i] > 0
        entropy[i] = -np.sum(p[i, positive] * np.log(p[i, positive]))
    return chosen, entropy, normalizer, p


def gradients(h, w, tokens, to_log_prob, to_entropy=0.0, to_normalizer=0.0, **options):
    """Gradients of sum(to_log_prob log p_y + to_entropy H + to_normalizer log Z) with respect to (h, w, bias, temperature)."""
    h, w = np.asarray(h, np.float64), np.asarray(w, np.float64)
    z, slope = logits_of(h, w, **options)
    _, entropy, normalizer, p = statistics(z, tokens)
    column = lambda x: np.broadcast_to(x, tokens.shape).astype(np.float64)[:, None]  # noqa: E731
    finite = np.where(np.isneginf(z), 0.0, z)
    chosen = np.arange(z.shape[1]) == tokens[:, None]
    log_p = np.where(np.isneginf(z), 0.0, z - normalizer[:, None])
    dz = column(to_log_prob) * (chosen - p) - column(to_entropy) * p * (log_p + entropy[:, None]) + column(to_normalizer) * p
    dz = np.where(np.isneginf(z), 0.0, dz)
    dx = dz * slope
    return dx @ w.T, h.T @ dx, dx.sum(0), -np.sum(dz * finite) / options.get("temperature", 1.0)


def top_k(logits, k):
    order = np.argsort(-np.asarray(logits, np.float64), axis=-1, kind="stable")[..., :k]
    return order


def naive(h, w, tokens, bias=None, softcap=None, temperature=1.0):
    z, _ = logits_of(h, w, bias, softcap, temperature)
    return statistics(z, tokens)[:3]
