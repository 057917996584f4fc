"""Truncated distributions by sorting, one token at a time; decoding that recomputes everything from the whole sequence."""

import numpy as np


def truncate(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Log-probabilities in float64; -inf outside the kept set."""
    logits = np.asarray(logits, np.float64)
    kept = np.full(logits.shape, False)
    if temperature == 0:
        kept[np.argmax(logits)] = True
        return np.where(kept, 0.0, -np.inf)
    with np.errstate(over="ignore"):
        p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    if top_k > 0:
        p = np.where(p >= p[order[min(top_k, len(p)) - 1]], p, 0.0)
    p = p / p.sum()
    if top_p < 1:
        mass = 0.0
        for token in order:
            if mass < top_p * (1 - 1e-7) or mass == 0:
                kept[token] = True
            mass += p[token]
        p = np.where(kept, p, 0.0)
    p = np.where(p >= min_p * p.max() * (1 - 1e-7), p, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(p / p.sum())


def log_softmax(logits):
    shifted = np.asarray(logits, np.float64) - np.max(logits)
    return shifted - np.log(np.sum(np.exp(shifted)))


def generate(logits_of, noise_of, prompts, request_ids, *, max_new_tokens, stop_tokens=(), stop_sequences=(), offset=0, **sampling):
    """A list of dicts, one per prompt (a list of ids).

    logits_of(sequence) -> [v] logits of the next token; noise_of(request id, position) -> [v] Gumbel noise.
    """
    outcome = []
    for prompt, request in zip(prompts, request_ids):
        tokens, log_probs, sampling_log_probs, finished = [], [], [], False
        while len(tokens) < max_new_tokens and not finished:
            logits = logits_of(list(prompt) + tokens)
            log_q = truncate(logits, **sampling)
            token = int(np.argmax(log_q + noise_of(request, offset + len(prompt) + len(tokens))))
            tokens.append(token)
            log_probs.append(log_softmax(logits)[token])
            sampling_log_probs.append(log_q[token])
            finished = token in stop_tokens or any(tokens[-len(sequence) :] == list(sequence) for sequence in stop_sequences)
        outcome.append({"tokens": tokens, "log_probs": log_probs, "sampling_log_probs": sampling_log_probs, "finished": finished})
    return outcome
