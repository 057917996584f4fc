"""The divergences that tests go through, each with its parameter or None."""

import functools

import jax
import numpy as np
import pytest
from reference import divergence as reference

from janax.jaxlib_ext import divergence

KINDS = [
    ("forward_kl", None),
    ("reverse_kl", None),
    ("jeffreys", None),
    *[("js", b) for b in (0.05, 0.5, 0.9)],
    *[("skew_kl", a) for a in (0.1, 0.7)],
    *[("skew_reverse_kl", a) for a in (0.1, 0.7)],
    *[("alpha_divergence", a) for a in (-1.0, 0.2, 0.5, 0.8, 2.0, 3.5)],
    *[("renyi", a) for a in (0.5, 0.9, 2.0)],
    ("total_variation", None),
    ("squared_hellinger", None),
    ("chi2_forward", None),
    ("chi2_reverse", None),
    ("adaptive_kl", None),
]
GENERATED = [kind for kind in KINDS if kind[0] not in ("renyi", "adaptive_kl")]
SOME = [("forward_kl", None), ("js", 0.5), ("alpha_divergence", 0.2), ("total_variation", None)]
ONE_EACH = [kind for kind in KINDS if kind[1] in (None, 0.5, 0.1)]
each_kind = functools.partial(pytest.mark.parametrize, "kind", ids=lambda kind: "-".join(str(x) for x in kind if x is not None))


def options(kind):
    name, parameter = kind
    return {} if parameter is None else {"beta" if name == "js" else "alpha": parameter}


def function(kind):
    return functools.partial(getattr(divergence, kind[0]), **options(kind))


def expected(kind, s, t):
    name, parameter = kind
    return getattr(reference, name)(s, t, *(() if parameter is None else (parameter,)))


def problem(v=11, seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=v), scale * rng.normal(size=v)


def generator(kind):
    name, parameter = kind
    if parameter is None:
        return getattr(divergence, name.upper())
    return getattr(divergence, {"alpha_divergence": "alpha"}.get(name, name) + "_generator")(parameter)


def compiled(call):
    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})  # many small programs: compiling them is what takes time


def together(kinds, make):
    """make(kind) called with the arguments, for all kinds."""
    return lambda *arguments: {kind: compiled(make(kind))(*arguments) for kind in kinds}
