"""Ehrlich functions by loops over places and letters, in exact fractions; and what a relaxation means, by enumerating sequences."""

import itertools
from fractions import Fraction

import numpy as np


def feasible(transition, tokens):
    return all(transition[a][b] > 0 for a, b in itertools.pairwise(tokens))


def presence(motif, offsets, tokens, q):
    best = 0
    for place in range(len(tokens) - offsets[-1]):
        held = sum(tokens[place + offset] == letter for offset, letter in zip(offsets, motif))
        best = max(best, held)
    return Fraction(best * q // len(motif), q)


def value(transition, motifs, spacings, tokens, q, epistasis=0):
    if not feasible(transition, tokens):
        return Fraction(0)
    product = Fraction(1)
    for motif, gaps in zip(motifs, spacings):
        h = presence(motif, np.concatenate([[0], np.cumsum(gaps)]).astype(int), tokens, q)
        product *= h * (1 + Fraction(epistasis) * h * (h - 1))
    return product


def feasible_mass(transition, x):
    """P(feasible) for letters drawn from the rows of x [l v]."""
    return sum(
        np.prod([x[t, letter] for t, letter in enumerate(tokens)])
        for tokens in itertools.product(range(x.shape[1]), repeat=x.shape[0])
        if feasible(transition, tokens)
    )
