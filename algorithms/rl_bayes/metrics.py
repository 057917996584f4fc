"""Diversity and coverage: pass@k, distinct n-grams, Self-BLEU. On lists of tokens (or characters) and numbers, on the host, with NumPy."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

__all__ = ["distinct_n", "exact_pass_at_k", "pass_at_k", "self_bleu"]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): unbiased for the probability that one of k samples is right, from c right ones of n.

    Raises:
      ValueError: unless 0 <= c <= n and 1 <= k <= n.

    Reference: Chen et al., arXiv:2107.03374.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"rl_bayes.pass_at_k: got {num_samples} samples, {num_correct} correct, k = {k}; expected 0 <= correct <= samples and 1 <= k <= samples"
        )
    if num_samples - num_correct < k:
        return 1.0
    return -math.expm1(sum(math.log1p(-k / i) for i in range(num_samples - num_correct + 1, num_samples + 1)))


def exact_pass_at_k(success: float, k: int) -> float:
    """1 - (1 - s)^k for the probability s = pi{b = 1} of one sample."""
    return 1.0 if success >= 1 else -math.expm1(k * math.log1p(-success))


def distinct_n(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct-n: different n-grams of a text over its number of tokens, mean over texts (as in naver/gdc); an empty text counts 0."""
    shares = [len(set(_ngrams(text, n))) / len(text) if len(text) else 0.0 for text in texts]
    return float(np.mean(shares)) if shares else 0.0


def self_bleu(texts: Sequence[Sequence[Hashable]], n: int = 5, *, num_texts: int = 500) -> float:
    """Self-BLEU-n: BLEU of each text against all others, uniform weights up to n, smoothing method 1 (0.1 for no match), mean over texts.

    A text given as a string is compared by characters, as naver/gdc does; pass lists of tokens for the usual meaning.

    Args:
      texts: At least two; the first `num_texts` are used.
      n: Longest n-gram.
      num_texts: How many to use.

    Returns:
      Between 0 and 1; 1 if all are the same.

    Raises:
      ValueError: with fewer than two texts.

    Reference: Zhu et al., arXiv:1802.01886; Chen and Cherry, 2014 (smoothing).
    """
    texts = list(texts[:num_texts])
    if len(texts) < 2:
        raise ValueError(f"rl_bayes.self_bleu: got {len(texts)} texts, expected at least 2")
    counts = [[Counter(_ngrams(text, k)) for text in texts] for k in range(1, n + 1)]
    # The greatest count of an n-gram over all OTHER texts: the greatest over all, or the second greatest where the text itself holds it.
    best: list[dict[Hashable, tuple[int, int, int]]] = []
    for of_length in counts:
        table: dict[Hashable, tuple[int, int, int]] = {}
        for i, counter in enumerate(of_length):
            for gram, count in counter.items():
                first, owner, second = table.get(gram, (0, -1, 0))
                table[gram] = (count, i, first) if count > first else (first, owner, max(second, count))
        best.append(table)
    lengths = np.array([len(text) for text in texts])
    scores = []
    for i, text in enumerate(texts):
        others = np.delete(lengths, i)
        reference = int(others[np.lexsort((others, np.abs(others - len(text))))[0]])  # closest length, the shorter of two
        logs = []
        for k in range(n):
            total, matches = max(1, len(text) - k), 0
            for gram, count in counts[k][i].items():
                first, owner, second = best[k][gram]
                matches += min(count, second if owner == i else first)
            logs.append(math.log((matches or 0.1) / total))
        if not counts[0][i] or not sum(min(c, best[0][g][2] if best[0][g][1] == i else best[0][g][0]) for g, c in counts[0][i].items()):
            scores.append(0.0)  # no token in common
            continue
        brevity = 1.0 if len(text) > reference else math.exp(1 - reference / len(text))
        scores.append(brevity * math.exp(sum(logs) / n))
    return float(np.mean(scores))


def _ngrams(text: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
