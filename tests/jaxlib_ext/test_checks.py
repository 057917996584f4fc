"""Messages must name the function, the argument, what came and what was expected."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janax.jaxlib_ext import checks


def test_lengths_of_named_axes_are_returned():
    lengths = checks.check_shapes("f", x=(np.zeros((2, 3, 5)), "b t v"), mask=(np.zeros((2, 3)), "b t"), scale=(1.0, ""))
    assert lengths == {"b": 2, "t": 3, "v": 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": ((4,), "v"), "q": ((5,), "v")}, "f: 'q' has shape (5,), expected [v] with v=4 from 'p'"),
        ({"p": ((4, 4), "v")}, "f: 'p' has shape (4, 4), expected [v]"),
        ({"p": ((), "v")}, "f: 'p' has shape (), expected [v]"),
        ({"p": ((4,), "")}, "f: 'p' has shape (4,), expected []"),
        ({"p": ((4, 3), "n 2")}, "f: 'p' has shape (4, 3), expected [n 2]"),
        ({"p": ((4, 3), "n n")}, "f: 'p' has shape (4, 3), expected [n n] with n=4 from 'p'"),
        ({"p": ((2, 4), "... v"), "q": ((3, 4), "... v")}, "f: 'q' has shape (3, 4), expected [... v] with ...=(2,) from 'p'"),
        ({"p": ((), "... v")}, "f: 'p' has shape (), expected [... v]"),
        ({"p": ((2,), "..."), "q": ((2, 2), "...")}, "f: 'q' has shape (2, 2), expected [...] with ...=(2,) from 'p'"),
    ],
)
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checks.check_shapes("f", **{name: (np.zeros(shape), spec) for name, (shape, spec) in arguments.items()})


def test_leading_axes_numbers_absent_arguments_and_plain_lists():
    assert checks.check_shapes("f", x=(np.zeros((7, 8, 3)), "... v"), y=(np.zeros((7, 8)), "...")) == {"v": 3}
    assert checks.check_shapes("f", x=(np.zeros((5, 2)), "n 2"), y=(None, "n 9"), z=([1.0] * 5, "n")) == {"n": 5}
    assert checks.check_shapes("f", x=(np.zeros((0, 2)), "n d")) == {"n": 0, "d": 2}


def test_tracers_and_abstract_arrays_have_shapes():
    def f(x):
        checks.check_shapes("f", x=(x, "n d"))
        return x

    assert jax.jit(jax.grad(lambda x: f(x).sum()))(jnp.ones((2, 3))).shape == (2, 3)
    assert jax.vmap(f)(jnp.ones((4, 2, 3))).shape == (4, 2, 3)  # one example inside
    assert checks.check_shapes("f", x=(jax.ShapeDtypeStruct((2, 3), jnp.float32), "n d")) == {"n": 2, "d": 3}
    with pytest.raises(ValueError, match="'x' has shape"):
        jax.jit(f)(jnp.ones(3))


def test_one_of_lists_the_options():
    checks.one_of("f", "kind", "a", ("a", "b"))
    with pytest.raises(ValueError, match="f: 'kind' is 'c', expected one of 'a', 'b'"):
        checks.one_of("f", "kind", "c", ("a", "b"))


def test_is_concrete():
    assert checks.is_concrete(jnp.ones(2)) and checks.is_concrete(np.ones(2)) and checks.is_concrete(1.0)
    assert not checks.is_concrete(jax.ShapeDtypeStruct((2,), jnp.float32))
    seen = []
    jax.jit(lambda x: seen.append(checks.is_concrete(x)))(jnp.ones(2))
    jax.vmap(lambda x: seen.append(checks.is_concrete(x)))(jnp.ones(2))
    assert seen == [False, False]


@pytest.mark.parametrize("make", [jnp.array, np.array])
def test_require_finite_counts_what_is_wrong(make):
    checks.require_finite("f", x=make([1.0, 2.0]), n=make([1, 2]), flag=make([True]), absent=None)
    with pytest.raises(ValueError, match="f: 'x' holds 2 non-finite values of 3"):
        checks.require_finite("f", x=make([np.nan, 1.0, -np.inf]))


def test_require_finite_is_silent_under_jit():
    def f(x):
        checks.require_finite("f", x=x)
        return x

    assert not np.isfinite(jax.jit(f)(jnp.array(jnp.nan)))
    checks.require_finite("f", x=jnp.array([], jnp.float32))
    with pytest.raises(ValueError, match="1 non-finite"):
        checks.require_finite("f", x=jnp.array([jnp.inf, 0.0], jnp.bfloat16))
