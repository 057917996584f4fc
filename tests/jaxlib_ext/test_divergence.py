"""The divergence family against float64 NumPy, formulas for gradients, identities by enumeration, and what extremes must not do."""

import functools

import jax
import jax.numpy as jnp
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
ONE_EACH = [kind for kind in KINDS if kind[1] in (None, 0.5, 0.1)]
SOME = [("forward_kl", None), ("js", 0.5), ("alpha_divergence", 0.2), ("total_variation", None)]
UNBOUNDED = ("forward_kl", "reverse_kl", "jeffreys", "adaptive_kl", "chi2_forward", "chi2_reverse", "renyi")
BOUNDED = [kind for kind in KINDS if kind[0] not in UNBOUNDED and not (kind[0] == "alpha_divergence" and not 0 < kind[1] < 1)]
each_kind = functools.partial(pytest.mark.parametrize, "kind", ids=lambda kind: "-".join(str(x) for x in kind if x is not None))


def options(kind):
    name, parameter = kind
    return {} if parameter is None else {"beta" if name == "js" else "alpha": parameter}


def function(kind):
    return functools.partial(getattr(divergence, kind[0]), **options(kind))


def generator(kind):
    name, parameter = kind
    if parameter is None:
        return getattr(divergence, name.upper())
    return getattr(divergence, {"alpha_divergence": "alpha"}.get(name, name) + "_generator")(parameter)


def expected(kind, s, t):
    name, parameter = kind
    return getattr(reference, name)(s, t, *(() if parameter is None else (parameter,)))


def problem(v=11, seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=v), scale * rng.normal(size=v)


def naive(name, zs, zt, a, r):
    """Plain JAX from the definitions, no care for extremes: for autodiff. r is adaptive_kl's ratio."""
    s, t = jax.nn.softmax(zs), jax.nn.softmax(zt)
    kl = lambda p, q: jnp.sum(p * (jnp.log(p) - jnp.log(q)))  # noqa: E731
    return {
        "forward_kl": lambda: kl(t, s),
        "reverse_kl": lambda: kl(s, t),
        "jeffreys": lambda: kl(s, t) + kl(t, s),
        "adaptive_kl": lambda: r * kl(t, s) + (1 - r) * kl(s, t),
        "js": lambda: a * kl(t, a * t + (1 - a) * s) + (1 - a) * kl(s, a * t + (1 - a) * s),
        "skew_kl": lambda: kl(t, a * t + (1 - a) * s),
        "skew_reverse_kl": lambda: kl(s, a * s + (1 - a) * t),
        "alpha_divergence": lambda: (jnp.sum(t**a * s ** (1 - a)) - 1) / (a * (a - 1)),
        "renyi": lambda: jnp.log(jnp.sum(t**a * s ** (1 - a))) / (a - 1),
        "total_variation": lambda: jnp.sum(jnp.abs(s - t)) / 2,
        "squared_hellinger": lambda: 1 - jnp.sum(jnp.sqrt(s * t)),
        "chi2_forward": lambda: jnp.sum((t - s) ** 2 / s),
        "chi2_reverse": lambda: jnp.sum((t - s) ** 2 / t),
    }[name]()


def compiled(call):
    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})  # many small programs: compiling them is what takes time


def together(kinds, make):
    """make(kind) called with the arguments, for all kinds."""
    return lambda *arguments: {kind: compiled(make(kind))(*arguments) for kind in kinds}


def with_parameter(name):
    """The divergence as a function of the logits and of its parameter, which is traced; 0 if it has none."""
    key = {"js": "beta", **dict.fromkeys(("skew_kl", "skew_reverse_kl", "alpha_divergence", "renyi"), "alpha")}.get(name)
    return lambda zs, zt, a: getattr(divergence, name)(zs, zt, **({} if key is None else {key: a}))


def value_and_gradient(kind):
    """(sum, values), gradient in the first argument."""
    return jax.value_and_grad(lambda zs, zt: (lambda x: (jnp.sum(x), x))(function(kind)(zs, zt)), has_aux=True)


def rows():
    """Pairs of logits [7], by name."""
    zs, zt = problem(v=7)
    without = lambda z, *ids: np.where(np.isin(np.arange(7), ids), -np.inf, z)  # noqa: E731
    equal = np.array([3.0, -np.inf, 0.1, -60.0, 60.0, 0.1, 1.0])
    only = [without(np.full(7, 2.5), *(j for j in range(7) if j != i)) for i in range(2)]
    nothing = np.full(7, -np.inf)
    return {
        "plain": (zs, zt),
        "near": problem(v=7, seed=1, scale=0.3),
        "wide": problem(v=7, seed=2, scale=5.0),
        "far": (np.array([60.0, -60.0, 0.0, 1.0, -2.0, 0.5, 3.0]), np.array([-60.0, 60.0, 1.0, 0.0, 0.3, -4.0, 3.0])),
        "equal": (equal, equal),
        "one token": (only[0], only[0]),
        "different tokens": tuple(only),
        "both": (without(zs, 2, 4), without(zt, 2, 4)),
        "student": (without(zs, 2), zt),
        "teacher": (zs, without(zt, 2)),
        "nothing": (nothing, nothing),
        "no student": (nothing, zt),
        "no teacher": (zs, nothing),
    }


@functools.cache
def results(dtype):
    """{row: {kind: (value, gradient in p's logits, gradient in q's)}} for all of `rows`."""

    def both(name):
        def call(zs, zt, a):
            values, pull = jax.vjp(lambda zs, zt: with_parameter(name)(zs, zt, a), zs, zt)
            return values, *pull(jnp.ones_like(values))

        return compiled(call)

    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        zs, zt = (jnp.asarray(np.stack(z), dtype) for z in zip(*rows().values()))
        programs = {name: both(name) for name in divergence.NAMES}
        found = {kind: jax.device_get(programs[kind[0]](zs, zt, jnp.asarray(kind[1] or 0.0, dtype))) for kind in KINDS}
    return {name: {kind: tuple(x[i] for x in found[kind]) for kind in KINDS} for i, name in enumerate(rows())}


# ------------------------------------------------------------------------------------------------------------------------ exact, on logits


@each_kind(KINDS)
@pytest.mark.parametrize("row", ["plain", "near", "wide", "far", "both"])
def test_values_and_gradients(kind, row):
    logits = rows()[row]
    keep = ~np.isneginf(logits[0])
    s, t = (reference.softmax(z[keep]) for z in logits)
    exact, slope = expected(kind, s, t), reference.gradient(kind[0], s, t, kind[1])
    for dtype in ("float32", "float64"):
        value, gradient, _ = results(dtype)[row][kind]
        assert value.dtype == gradient.dtype == dtype
        assert np.isfinite(value) and np.all(np.isfinite(gradient)) and np.all(gradient[~keep] == 0)
        if dtype == "float32" and abs(exact) > 1e20:  # the powers of u that are continued by their tangent
            continue
        np.testing.assert_allclose(value, exact, **{"float32": {"rtol": 2e-5}, "float64": {"rtol": 1e-10, "atol": 1e-15}}[dtype])
        size = np.abs(slope).max()
        atol = 1e-9 * size if dtype == "float64" else 1e-3 * size + 1e-24  # float32 ends at 1e-38, and so do products there
        np.testing.assert_allclose(gradient[keep], slope, rtol=0, atol=atol)


@pytest.mark.parametrize("name", divergence.NAMES)
def test_gradients_against_autodiff_of_plain_code(name, x64):
    plain = compiled(jax.grad(functools.partial(naive, name), argnums=(0, 1)))
    for kind in KINDS:
        if kind[0] == name:
            for row in ("plain", "wide"):
                s, t = map(reference.softmax, rows()[row])
                theirs = plain(*rows()[row], kind[1] or 0.0, reference.head_ratio(s, t))
                for ours, their in zip(results("float64")[row][kind][1:], theirs):
                    np.testing.assert_allclose(ours, their, rtol=1e-9, atol=1e-10 * np.abs(their).max())
                formula = reference.explicit_gradient(name, s, t, kind[1])
                np.testing.assert_allclose(results("float64")[row][kind][1], formula, rtol=1e-9, atol=1e-12 * np.abs(formula).max())


@each_kind(KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extremes(kind, dtype):
    found = results(dtype)
    for row in rows():
        value, *gradients = found[row][kind]
        assert np.isfinite(value) and np.all(np.isfinite(gradients)), row
        for z, gradient in zip(rows()[row], gradients):
            assert np.all(gradient[np.isneginf(z)] == 0), row
    for row in ("equal", "one token", "nothing", "no student", "no teacher"):
        value, *gradients = found[row][kind]
        assert value == 0, row
        np.testing.assert_allclose(gradients, np.zeros((2, 7)), atol=1e-7 if dtype == "float32" else 1e-15)
        if row != "equal":
            assert np.all(np.asarray(gradients) == 0), row
    assert found["different tokens"][kind][0] > 0.1


@each_kind(KINDS)
@pytest.mark.parametrize("row", ["student", "teacher", "different tokens"])
def test_forbidden_by_one(kind, row):
    """The value of the bounded divergences is exact; what would be infinite is large."""
    s, t = map(reference.softmax, rows()[row])
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = expected(kind, s, t)
    value = results("float64")[row][kind][0]
    if kind in BOUNDED or np.isfinite(exact):
        np.testing.assert_allclose(value, exact, rtol=1e-10)
    else:
        assert value > 10


def test_both_directions_agree(x64):
    """D with the arguments exchanged is the dual's D; the named pairs are duals of one another."""
    zs, zt = problem(seed=5)
    for kind in SOME:
        dual = compiled(divergence.exact)(divergence.dual(generator(kind)), zs, zt)
        np.testing.assert_allclose(dual, compiled(function(kind))(zt, zs), rtol=1e-13)
    for one, other in (("forward_kl", "reverse_kl"), ("chi2_forward", "chi2_reverse"), ("skew_kl", "skew_reverse_kl")):
        np.testing.assert_allclose(compiled(getattr(divergence, one))(zs, zt), compiled(getattr(divergence, other))(zt, zs), rtol=1e-13)
    for name in ("alpha_divergence", "js"):
        call = compiled(with_parameter(name))
        for a in (-1.0, 0.2, 0.5) if name == "alpha_divergence" else (0.2, 0.5):
            np.testing.assert_allclose(call(zs, zt, 1 - a), call(zt, zs, a), rtol=1e-12)


def test_limits(x64):
    """alpha and Renyi pass through the KL divergences, in value and in gradient; so do the skewed ones and JS divided by its weights."""
    zs, zt = map(jnp.asarray, problem(seed=1))
    programs, exacts = {}, {}
    for name, at, kl in (
        ("alpha_divergence", 1.0, divergence.forward_kl),
        ("alpha_divergence", 0.0, divergence.reverse_kl),
        ("renyi", 1.0, divergence.forward_kl),
    ):
        both = programs.setdefault(name, compiled(jax.value_and_grad(with_parameter(name), argnums=(0, 2))))
        exact, slope = exacts.setdefault(kl, compiled(jax.value_and_grad(kl))(zs, zt))
        for step in (0.0, 1e-12, 1e-9, 1e-7) if at == 0 else (-1e-7, -1e-9, -1e-14, 0.0, 1e-12, 1e-7):
            value, (gradient, rate) = both(zs, zt, at + step)
            np.testing.assert_allclose(value, exact, atol=1e-6 if step else 1e-13)
            np.testing.assert_allclose(gradient, slope, atol=1e-6 if step else 1e-13)
            assert np.isfinite(rate)
    js = compiled(jax.value_and_grad(with_parameter("js")))
    for b, kl in ((1e-6, divergence.forward_kl), (1 - 1e-6, divergence.reverse_kl)):
        np.testing.assert_allclose(js(zs, zt, b)[0] / (b * (1 - b)), exacts[kl][0], rtol=2e-4)
    for end in (0.0, 1.0):
        value, gradient = js(zs, zt, end)
        assert abs(value) < 1e-15 and np.all(np.abs(gradient) < 1e-15)
    for name, kl in (("skew_kl", divergence.forward_kl), ("skew_reverse_kl", divergence.reverse_kl)):
        skew = compiled(with_parameter(name))
        np.testing.assert_allclose([skew(zs, zt, 0.0), skew(zs, zt, 1e-9), skew(zs, zt, 1.0)], [exacts[kl][0], exacts[kl][0], 0], atol=1e-6)
    d = {kind: found[0] for kind, found in results("float64")["plain"].items()}
    for a, name, factor in ((0.5, "squared_hellinger", 4), (2.0, "chi2_forward", 0.5), (-1.0, "chi2_reverse", 0.5)):
        np.testing.assert_allclose(d["alpha_divergence", a], factor * d[name, None], rtol=1e-13)


def test_limits_in_float32():
    zs, zt = (jnp.asarray(z, jnp.float32) for z in problem(seed=1))
    programs = {name: compiled(with_parameter(name)) for name in ("alpha_divergence", "renyi", "forward_kl", "reverse_kl")}
    for a in (0.999999, 1.0, 1.000001, 1e-7, 0.0, -1e-6):
        kl = programs["forward_kl" if a > 0.5 else "reverse_kl"](zs, zt, a)
        for name in ("alpha_divergence", "renyi") if a > 0.5 else ("alpha_divergence",):
            np.testing.assert_allclose(programs[name](zs, zt, a), kl, rtol=2e-5)


def test_published_numbers(x64):
    """The derivative with respect to a missed class's logit, teacher (.6, .3, .1), student (.7, .3 - e, e), as printed in studies of overlap."""
    teacher = jnp.log(jnp.array([0.6, 0.3, 0.1]))
    disjoint = jnp.array([60.0, -60.0, -np.inf]), jnp.array([-60.0, 60.0, -np.inf])
    kinds = [("forward_kl", None), ("reverse_kl", None), ("js", 0.5), ("total_variation", None), ("skew_kl", 0.1), ("renyi", 0.5)]
    printed = {
        1e-2: (-9.0e-2, -2.4e-2, -8.7e-3, -7.0e-3, -3.9e-2, -2.2e-2),
        1e-4: (-1.0e-1, -7.0e-4, -3.1e-4, -7.0e-5, -8.1e-4, -3.2e-3),
        1e-8: (-1.0e-1, -1.6e-7, -7.7e-8, -7.0e-9, -8.2e-8, -3.3e-5),
    }
    for i, kind in enumerate(kinds):
        slope = compiled(jax.grad(function(kind)))
        for e, row in printed.items():
            np.testing.assert_allclose(slope(jnp.log(jnp.array([0.7, 0.3 - e, e])), teacher)[2], row[i], rtol=0.03, err_msg=str((kind, e)))
        size = np.abs(slope(*disjoint)).max()  # only these two do not starve where supports hardly overlap
        assert abs(size - {"forward_kl": 1, "renyi": 0.5}[kind[0]]) < 1e-12 if kind[0] in ("forward_kl", "renyi") else size < 1e-20


def test_inequalities(x64):
    for row in ("plain", "near", "wide"):
        d = {kind[0]: found[0] for kind, found in results("float64")[row].items() if kind[1] in (None, 0.5)}
        hellinger = 2 * d["squared_hellinger"]
        assert d["total_variation"] ** 2 <= min(d["forward_kl"], d["reverse_kl"]) / 2
        assert hellinger / 2 <= d["total_variation"] <= np.sqrt(hellinger) <= 1.5
        assert hellinger <= min(d["forward_kl"], d["reverse_kl"]) and d["js"] <= d["total_variation"] * np.log(2)
        assert d["forward_kl"] <= np.log1p(d["chi2_forward"])
        assert min(d["forward_kl"], d["reverse_kl"]) <= d["adaptive_kl"] <= max(d["forward_kl"], d["reverse_kl"])


def test_total_variation_has_no_gradient_at_ties(x64):
    zs, zt = np.log([1.0, 1.0, 2.0]), np.log([1.0, 2.0, 1.0])
    s = reference.softmax(zs)
    slope = compiled(jax.grad(divergence.total_variation))
    np.testing.assert_allclose(slope(zs, zt), reference.from_weights(s, np.array([0, -0.5, 0.5])), rtol=1e-12)
    assert np.all(np.asarray(slope(zs, zs)) == 0)


# ------------------------------------------------------------------------------------------------------------------------------- per token


def test_per_token(x64, strict):
    rng = np.random.default_rng(0)
    zs, zt = rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 3, 6))
    mask = np.array([[1, 1, 0], [0, 1, 0]])
    zs[0, 2] = [np.nan, np.inf, -np.inf, 1, 2, 3]  # does not count: must not matter
    zt[1, 0] = -np.inf
    tau = 2.5

    def make(kind):
        call = lambda zs, **more: divergence.per_token(kind[0], zs, zt, temperature=tau, mask=mask, **options(kind), **more)  # noqa: E731
        more = [divergence.per_token(generator(kind), zs, zt, temperature=tau, mask=mask)] if kind in GENERATED else []
        return lambda zs: (call(zs), jax.grad(lambda z: jnp.sum(call(z)))(zs), call(zs, tau_squared=True), *more)

    for kind, (plain, gradient, squared, *again) in together([("js", 0.5), ("renyi", 0.9)], make)(zs).items():
        assert plain.shape == (2, 3) and np.all(np.asarray(plain)[mask == 0] == 0) and np.all(gradient[mask == 0] == 0)
        for i, j in zip(*np.nonzero(mask)):
            s, t = reference.softmax(zs[i, j] / tau), reference.softmax(zt[i, j] / tau)
            np.testing.assert_allclose(plain[i, j], expected(kind, s, t), rtol=1e-10)
            np.testing.assert_allclose(gradient[i, j], reference.gradient(kind[0], s, t, kind[1]) / tau, rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(squared, tau**2 * plain, rtol=1e-14)
        for other in again:
            np.testing.assert_allclose(other, plain, rtol=1e-14)


def test_temperature_has_a_gradient_with_forbidden_tokens(x64):
    zs, zt = np.array([1.0, -np.inf, 0.3]), np.array([0.2, -np.inf, 2.0])
    call = lambda tau: divergence.per_token("reverse_kl", zs, zt, temperature=tau)  # noqa: E731
    tempered, slope = compiled(call), compiled(jax.grad(call))(1.3)
    np.testing.assert_allclose(slope, (tempered(1.3 + 1e-5) - tempered(1.3 - 1e-5)) / 2e-5, rtol=1e-8)


def test_names():
    zs, zt = (x.astype(np.float32) for x in problem())
    needs = {"alpha_divergence": {"alpha": 0.3}, "renyi": {"alpha": 0.3}}
    for name in divergence.NAMES:
        by_name = jax.make_jaxpr(functools.partial(divergence.per_token, name, **needs.get(name, {})))(zs, zt)
        assert by_name.out_avals[0].shape == () and by_name.out_avals[0].dtype == np.float32


# ------------------------------------------------------------------------------------------------------------------------------ transforms


def test_shapes_and_dtypes(strict):
    zs, zt = (jnp.asarray(np.random.default_rng(i).normal(size=(2, 3, 7)), jnp.bfloat16) for i in range(2))
    for kind in [("js", 0.5), ("renyi", 0.5)]:
        (_, value), gradient = compiled(value_and_gradient(kind))(zs, zt)
        assert value.shape == (2, 3) and value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
        pairs = [[reference.softmax(np.asarray(z[i, j], np.float64)) for z in (zs, zt)] for i in range(2) for j in range(3)]
        np.testing.assert_allclose(value.ravel(), [expected(kind, *pair) for pair in pairs], rtol=2e-5)
        slopes = np.stack([reference.gradient(kind[0], *pair, kind[1]) for pair in pairs])
        np.testing.assert_allclose(gradient.astype(jnp.float32).reshape(6, 7), slopes, atol=3e-3)
        np.testing.assert_allclose(compiled(jax.vmap(jax.vmap(function(kind))))(zs, zt), value, rtol=1e-5)
    np.testing.assert_allclose(divergence.js(zs, zt), compiled(divergence.js)(zs, zt), rtol=1e-5)


def test_parameters_are_traced(strict):
    zs, zt = (jnp.asarray(z, jnp.float32) for z in problem())
    sweep = jnp.array([0.0, 0.3, 1.0, 2.0], jnp.float32)
    traces = []

    def one(g, a):
        traces.append(a)
        return divergence.exact(g, zs, zt), divergence.renyi(zs, zt, alpha=a)

    compiled_once = compiled(one)
    values = np.array([compiled_once(divergence.alpha_generator(a), a) for a in sweep])
    assert len(traces) == 1
    family = jax.vmap(divergence.alpha_generator)(sweep)
    np.testing.assert_allclose(np.transpose(compiled(jax.vmap(one))(family, sweep)), values, rtol=1e-6, atol=1e-7)


def test_on_a_mesh(mesh):
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(8, 16)).astype(np.float32) for _ in range(2)]
    sorting = [("adaptive_kl", None)]
    for kinds, spec in (([("js", 0.5), ("renyi", 0.5)], jax.P("data", "model")), (sorting, jax.P("data"))):
        zs, zt = logits if mesh is None else (jax.device_put(z, jax.NamedSharding(mesh, spec)) for z in logits)
        program = jax.jit(lambda zs, zt, kinds=kinds: {k: value_and_gradient(k)(zs, zt) for k in kinds}).lower(zs, zt).compile()
        assert "all-gather" not in program.as_text()
        for kind, ((_, found), gradient) in program(zs, zt).items():
            rows = [(reference.softmax(s), reference.softmax(t)) for s, t in zip(*logits)]
            np.testing.assert_allclose(found, [expected(kind, s, t) for s, t in rows], rtol=2e-5)
            np.testing.assert_allclose(gradient, [reference.gradient(kind[0], s, t, kind[1]) for s, t in rows], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------------------ generators


def test_generators(x64, strict):
    """f, f', f'' against the tables, and convexity with the minimum 0 at 1."""
    l = np.linspace(-4, 4, 80)  # no tie
    u = np.exp(l)
    ties = jnp.array([0.0, 1e-9, -1e-9])

    def make(kind):
        g = generator(kind)
        return lambda l: (
            divergence.f(g, l),
            divergence.f_prime(g, l),
            divergence.f_second(g, l),
            divergence.f(g, ties),
            divergence.f_prime(g, ties),
        )

    for kind, (*found, f_one, f_prime_one) in together([kind for kind in GENERATED if kind in ONE_EACH or kind[1] == -1], make)(l).items():
        for ours, table in zip(found, reference.f(kind[0], u, kind[1])):
            np.testing.assert_allclose(ours, table, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(f_one, 0, atol=1e-9)
        np.testing.assert_allclose(f_prime_one, 0, atol=0.51 if kind[0] == "total_variation" else 1e-8)
        assert np.all(np.asarray(found[0]) >= 0) and np.all(np.diff(found[1]) > -1e-15)


@each_kind(SOME)
def test_one_function_gives_all(kind, x64, strict):
    """From h alone, by autodiff: f', f'', the dual and the exact form."""
    l = np.linspace(-4, 4, 80)
    u, g = np.exp(l), generator(kind)
    bare = divergence.Generator(h=lambda l: divergence.f(g, l))
    both = divergence.dual(bare), divergence.dual(g)
    zs, zt = problem()

    def call(l):
        reflected = [(divergence.f(x, l), divergence.f_prime(x, l)) for x in both]
        return divergence.f_prime(bare, l), divergence.f_second(bare, l), reflected, divergence.exact(bare, zs, zt)

    slope, curvature, reflected, value = compiled(call)(l)
    _, slopes, curvatures = reference.f(kind[0], u, kind[1])
    np.testing.assert_allclose(slope, slopes, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(curvature, curvatures, rtol=1e-7, atol=1e-9)
    values, slopes, _ = reference.f(kind[0], 1 / u, kind[1])
    for f_dual, f_prime_dual in reflected:
        np.testing.assert_allclose(f_dual, u * values, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(f_prime_dual, values - slopes / u, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(value, expected(kind, reference.softmax(zs), reference.softmax(zt)), rtol=1e-10)


def test_curvature_at_one(x64):
    strength = compiled(lambda g: divergence.f_second(g, 0.0))
    for g, expected_strength in (
        (divergence.FORWARD_KL, 1),
        (divergence.REVERSE_KL, 1),
        (divergence.js_generator(), 1 / 4),
        (divergence.js_generator(0.1), 0.09),
        (divergence.alpha_generator(0.3), 1),
        (divergence.SQUARED_HELLINGER, 1 / 4),
        (divergence.CHI2_FORWARD, 2),
        (divergence.CHI2_REVERSE, 2),
        (divergence.JEFFREYS, 2),
        (divergence.skew_kl_generator(0.1), 0.81),
        (divergence.skew_reverse_kl_generator(0.1), 0.81),
    ):
        np.testing.assert_allclose(strength(g), expected_strength, rtol=1e-12)
    z = np.array([0.2, -0.4, 1.0])
    nearby = z + 1e-3 * np.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(divergence.js(nearby, z), divergence.chi2_reverse(nearby, z) / 8, rtol=5e-3)


def test_slope_at_infinity(x64):
    """What a sample outside the support of q counts, at most: f'(inf), here with f'(1) = 0."""
    for g, limit in (
        (divergence.FORWARD_KL, 1),
        (divergence.REVERSE_KL, np.inf),
        (divergence.TOTAL_VARIATION, 1 / 2),
        (divergence.js_generator(), np.log(2) / 2),
        (divergence.SQUARED_HELLINGER, 1 / 2),
        (divergence.CHI2_FORWARD, 1),
        (divergence.alpha_generator(0.25), 4),
        (divergence.skew_kl_generator(0.1), 0.9),
        (divergence.skew_reverse_kl_generator(0.1), np.log(10) - 0.9),
    ):
        np.testing.assert_allclose(divergence.f_prime(g, np.inf), limit, rtol=1e-12)
        if np.isfinite(limit):
            np.testing.assert_allclose(divergence.f_prime(g, 1e4), limit, rtol=1e-12)


def test_conjugate(x64):
    l = jnp.linspace(-3.0, 3.0, 13)

    def make(kind):
        g = generator(kind)

        def call(l):
            y = divergence.f_prime(g, l)
            rates = [
                jax.vmap(jax.grad(functools.partial(function, g)))(y) for function in (divergence.conjugate, divergence.inverse_f_prime)
            ]
            exact = jnp.exp(l) * y - divergence.f(g, l)
            return divergence.inverse_f_prime(g, y), divergence.conjugate(g, y), exact, *rates, divergence.f_second(g, l)

        return call

    kinds = [("reverse_kl", None), *SOME[:3]]
    for inverse, conjugate, exact, u, slope, curvature in together(kinds, make)(l).values():
        np.testing.assert_allclose(inverse, l, atol=1e-9)
        np.testing.assert_allclose(conjugate, exact, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(u, np.exp(l), rtol=1e-8)
        np.testing.assert_allclose(slope * curvature * np.exp(l), 1, rtol=1e-8)


def test_regularised_optima(x64):
    """argmax <p, r> - eta D_f(p || q) in closed form, through the inverse of f'."""
    r, eta = jnp.array([0.0, 0.05, 0.1]), 0.2
    y = r / eta - 0.3
    closed = {
        divergence.REVERSE_KL: jnp.exp(y),
        divergence.FORWARD_KL: 1 / (1 - y),
        divergence.js_generator(): jnp.exp(2 * y) / (2 - jnp.exp(2 * y)),
        divergence.alpha_generator(0.3): (1 - 0.3 * y) ** (-1 / 0.3),
    }
    for g, u in closed.items():
        np.testing.assert_allclose(jnp.exp(compiled(divergence.inverse_f_prime)(g, y)), u, rtol=1e-10)
    a_slope = compiled(jax.grad(lambda a: divergence.inverse_f_prime(divergence.alpha_generator(a), -0.3)))(0.3)
    finite = lambda a: -jnp.log(1 + 0.3 * a) / a  # noqa: E731
    np.testing.assert_allclose(a_slope, jax.grad(finite)(0.3), rtol=1e-9)


def test_own_generator(strict):
    mine = divergence.Generator(h=lambda l: jnp.exp(l) * l - jnp.expm1(l))  # reverse KL again
    zs, zt = (x.astype(np.float32)[:3] for x in problem())
    both = compiled(jax.value_and_grad(functools.partial(divergence.exact, mine)))
    s, t = reference.softmax(zs), reference.softmax(zt)
    value, gradient = both(zs, zt)
    np.testing.assert_allclose(value, reference.reverse_kl(s, t), rtol=1e-5)
    np.testing.assert_allclose(gradient, reference.gradient("reverse_kl", s, t), atol=1e-6)
    value, gradient = both(np.float32([60, -60, -np.inf]), np.float32([-60, 60, 0]))
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


# --------------------------------------------------------------------------------------------------------------------------- part of tokens


@pytest.mark.parametrize("support", ["q", "p"])
def test_top_k(support, x64, strict):
    zs, zt = map(jnp.asarray, problem(v=6))
    s, t = reference.softmax(zs), reference.softmax(zt)
    order = np.argsort(-(t if support == "q" else s))

    def make(kind):
        g = generator(kind)

        def call(zs, zt):
            log_p, log_q = jax.nn.log_softmax(zs), jax.nn.log_softmax(zt)
            values = {k: jax.value_and_grad(lambda z, k=k: divergence.top_k(g, z, zt, k=k, support=support))(zs) for k in (1, 3, 5, 6)}
            few = {k: divergence.from_support(g, log_p[order[:k]], log_q[order[:k]]) for k in (1, 3, 6)}
            return values, few

        return call

    kinds = SOME[1::2] if support == "q" else SOME[:1]
    for kind, (values, few) in together(kinds, make)(zs, zt).items():
        exact, last = expected(kind, s, t), 0.0
        for k, (value, gradient) in values.items():
            inside = np.isin(np.arange(6), order[:k])
            merged = [x[x > 0] for x in reference.merged(s, t, inside)]
            np.testing.assert_allclose(value, expected(kind, *merged), rtol=1e-10, atol=1e-15)
            assert last - 1e-14 <= value <= exact * (1 + 1e-13)
            last = value
            if k >= 5:
                np.testing.assert_allclose(value, exact, rtol=1e-12)
                np.testing.assert_allclose(gradient, reference.gradient(kind[0], s, t, kind[1]), rtol=1e-9, atol=1e-13)
            else:  # tokens outside are pulled in proportion to their probability
                bucket = reference.gradient(kind[0], *merged, kind[1])
                np.testing.assert_allclose(gradient[inside], bucket[np.argsort(np.argsort(np.nonzero(inside)[0]))], rtol=1e-9, atol=1e-13)
                np.testing.assert_allclose(gradient[~inside], bucket[-1] * s[~inside] / s[~inside].sum(), rtol=1e-9, atol=1e-13)
        for k, value in few.items():
            np.testing.assert_allclose(value, values[k][0], rtol=1e-9, atol=1e-13)


def test_top_k_extremes(strict):
    for g in (divergence.CHI2_FORWARD,):
        far = jnp.array([60.0, -60.0, 0.0, -jnp.inf]), jnp.array([-60.0, 60.0, 0.0, -jnp.inf])
        for k in (1, 3):
            value, gradient = compiled(jax.value_and_grad(functools.partial(divergence.top_k, g, k=k)))(*far)
            assert np.isfinite(value) and np.all(np.isfinite(gradient)) and gradient[3] == 0
        nothing = jnp.full(4, -jnp.inf)
        value, gradient = compiled(jax.value_and_grad(functools.partial(divergence.top_k, g, k=2)))(nothing, far[1])
        assert value == 0 and np.all(gradient == 0)
        certain = jnp.array([0.0, -jnp.inf])
        value, gradient = compiled(jax.value_and_grad(functools.partial(divergence.from_support, g)))(certain, certain)
        assert value == 0 and np.all(np.isfinite(gradient))
    ties = jnp.zeros(6)
    np.testing.assert_allclose(
        divergence.top_k(divergence.FORWARD_KL, jnp.arange(6.0), ties, k=2),
        reference.forward_kl(*reference.merged(reference.softmax(np.arange(6.0)), np.full(6, 1 / 6), np.arange(6) < 2)),
        rtol=1e-5,
    )


# ---------------------------------------------------------------------------------------------------------------------------------- sampled


def test_estimators_by_enumeration(x64, strict):
    """Every source of samples gives the value and the gradient of the exact divergence, in expectation."""
    zs, zt = problem(seed=4, scale=1.0)
    log_p, log_q, log_b = map(reference.log_softmax, (zs, zt, problem(seed=6, scale=1.0)[0]))
    p, q, b = map(np.exp, (log_p, log_q, log_b))

    def make(kind):
        g = generator(kind)

        def call(log_p):
            baseline = divergence.expected_f_prime(g, zs, zt)
            estimators = {
                "reference": lambda x: divergence.from_reference(g, x, log_q),
                "policy": lambda x: divergence.from_policy(g, x, log_q, baseline=baseline),
                "behaviour": lambda x: divergence.from_behaviour(g, x, log_q, log_b),
            }
            pulled = {name: jax.vjp(term, log_p) for name, term in estimators.items()}
            return {name: (values, pull(jnp.ones_like(values))[0]) for name, (values, pull) in pulled.items()}, baseline

        return call

    sources = {"reference": q, "policy": p, "behaviour": b}
    for kind, (found, baseline) in together([*SOME, ("reverse_kl", None)], make)(log_p).items():
        value, gradient = expected(kind, p, q), reference.gradient(kind[0], p, q, kind[1])
        np.testing.assert_allclose(baseline, np.sum(p * reference.f(kind[0], p / q, kind[1])[1]), rtol=1e-10, atol=1e-13)
        for name, (values, scores) in found.items():
            estimate, pulls = np.sum(sources[name] * values), sources[name] * np.asarray(scores)
            np.testing.assert_allclose(estimate, value, rtol=1e-12, atol=1e-12, err_msg=f"{kind} {name}")
            np.testing.assert_allclose(pulls - p * pulls.sum(), gradient, rtol=1e-12, atol=1e-12 * max(1, value), err_msg=f"{kind} {name}")


def test_k_estimators_by_enumeration(x64, strict):
    """What each of them estimates, and whose gradient it has as a loss."""
    zs, zt = problem(seed=4, scale=1.0)
    log_p, log_q = reference.log_softmax(zs), reference.log_softmax(zt)
    p, q = np.exp(log_p), np.exp(log_q)
    constant = jax.lax.stop_gradient
    losses = {
        "k1": divergence.k1,
        "k2": divergence.k2,
        "k3": divergence.k3,
        "k3 by ratio": lambda x, y: jnp.exp(x - constant(x)) * divergence.k3(x, y),
        "k1 in the reward": lambda x, y: constant(divergence.k1(x, y)) * x,
        "k2 with the value of k3": lambda x, y: divergence.with_value(divergence.k2(x, y), divergence.k3(x, y)),
        "from_policy": lambda x, y: divergence.from_policy(divergence.REVERSE_KL, x, y),
    }

    def pulled(x, y):
        found = {name: jax.vjp(loss, x, y) for name, loss in losses.items()}
        return {name: (values, *pull(jnp.ones_like(values))) for name, (values, pull) in found.items()}

    found = {name: tuple(map(np.asarray, x)) for name, x in compiled(pulled)(log_p, log_q).items()}
    value = {name: np.sum(p * x[0]) for name, x in found.items()}
    gradient = {name: p * x[1] - p * np.sum(p * x[1]) for name, x in found.items()}
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
    reverse, to_reverse, to_forward = reference.kl(p, q), reference.gradient("reverse_kl", p, q), p - q
    for name in ("k1", "k3", "k2 with the value of k3", "from_policy"):
        close(value[name], reverse)
    assert abs(value["k2"] - reverse) > 0.01
    close(gradient["k1"], np.zeros(11))
    close(gradient["k3"], to_forward)
    for name in ("k2", "k3 by ratio", "k1 in the reward", "k2 with the value of k3", "from_policy"):
        close(gradient[name], to_reverse)
    close(found["from_policy"][0], found["k3"][0])
    assert np.all(found["k3"][0] >= 0) and all(np.all(x[2] == 0) for x in found.values())


def test_weights(x64, strict):
    log_p, log_b = np.log([0.5, 0.25, 0.25]), np.log([0.1, 0.4, 0.5])
    np.testing.assert_allclose(divergence.importance_weights(log_p, log_b), [5, 0.625, 0.5], rtol=1e-14)
    np.testing.assert_allclose(divergence.importance_weights(log_p, log_b, max_weight=2.0), [2, 0.625, 0.5], rtol=1e-14)
    assert np.all(jax.grad(lambda x: jnp.sum(divergence.importance_weights(x, log_b)))(log_p) == 0)
    loss = lambda x: divergence.from_behaviour(divergence.REVERSE_KL, x, jnp.zeros(3), log_b, max_weight=2.0)  # noqa: E731
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(loss(x)))(log_p), np.array([2, 0.625, 0.5]) * log_p, rtol=1e-12)


def test_sampled_extremes(strict):
    """Forgotten, forbidden and certain tokens; the gradient of forward KL is not cut where the policy has forgotten."""
    log_p = jnp.array([-0.1, -100.0, -1e-3, -jnp.inf, -jnp.inf, 0.0, -300.0])
    log_q = jnp.array([-100.0, -0.1, -jnp.inf, -2.0, -jnp.inf, 0.0, -300.0])
    terms = divergence.from_reference, functools.partial(divergence.from_behaviour, log_behaviour=log_q)

    def make(kind):
        g = generator(kind)
        call = lambda term, x: (term(g, x, log_q), jax.grad(lambda x: jnp.sum(term(g, x, log_q)))(x))  # noqa: E731
        return lambda x: [call(term, x) for term in terms]

    for kind, found in together([*SOME, ("reverse_kl", None), ("chi2_forward", None)], make)(log_p).items():
        for values, gradient in found:
            assert np.all(np.isfinite(values)) and np.all(np.isfinite(gradient)) and gradient[3] == gradient[4] == 0
            np.testing.assert_allclose(np.asarray(values)[[5, 6]], 0, atol=1e-6)
        if kind[0] == "forward_kl":
            np.testing.assert_allclose(found[0][1][1], -1)


def test_control_variates(x64, strict):
    rng = np.random.default_rng(0)
    zs, zt = problem(seed=8, scale=0.7)
    log_p, log_q = reference.log_softmax(zs), reference.log_softmax(zt)
    tokens = rng.choice(11, size=4000, p=np.exp(log_q) / np.exp(log_q).sum())
    l = (log_p - log_q)[tokens]
    values, control = -l, np.expm1(l)
    np.testing.assert_allclose(
        divergence.control_variate(values[:40], control[:40]), reference.leave_one_out(values[:40], control[:40]), rtol=1e-10, atol=1e-12
    )
    np.testing.assert_array_equal(divergence.control_variate(values, control, coefficient=-1.0), values + control)
    best = divergence.control_variate(values, control, leave_one_out=False)
    coefficient = np.cov(values, control, ddof=0)[0, 1] / np.var(control)
    np.testing.assert_allclose(best, values - coefficient * control, rtol=1e-10, atol=1e-12)
    exact = reference.forward_kl(np.exp(log_p), np.exp(log_q))
    assert abs(np.mean(best) - exact) < 4 * np.std(best) / np.sqrt(4000) and np.std(best) <= np.std(values + control) < np.std(values)
    mask = np.arange(40) % 3 > 0
    spoiled = np.where(mask, values[:40], np.nan)
    masked = divergence.control_variate(spoiled, control[:40], mask=mask)
    np.testing.assert_allclose(
        np.asarray(masked)[mask], reference.leave_one_out(values[:40][mask], control[:40][mask]), rtol=1e-10, atol=1e-12
    )
    assert np.all(np.asarray(masked)[~mask] == 0)
    for n in (1, 2):
        np.testing.assert_allclose(divergence.control_variate(values[:n], control[:n]), values[:n])
    np.testing.assert_allclose(divergence.control_variate(values[:9], np.zeros(9)), values[:9])


def test_leave_one_out_is_unbiased(x64):
    """Over all samples of size 3 from three tokens: the mean of the corrected values is the divergence; with one shared c it is not."""
    log_p, log_q = np.log([0.2, 0.3, 0.5]), np.log([0.6, 0.3, 0.1])
    l, q = log_p - log_q, np.exp(log_q)
    tokens = np.stack(np.meshgrid(*[range(3)] * 4, indexing="ij"), -1).reshape(-1, 4)
    weight = np.prod(q[tokens], axis=1)
    for shared in (False, True):
        corrected = jax.vmap(functools.partial(divergence.control_variate, leave_one_out=not shared))(-l[tokens], np.expm1(l)[tokens])
        error = abs(np.sum(weight * np.mean(corrected, axis=1)) - reference.kl(np.exp(log_q), np.exp(log_p)))
        assert error > 1e-3 if shared else error < 1e-13


# ----------------------------------------------------------------------------------------------------------------------------- bad arguments


def test_messages():
    zs, zt = problem()
    with pytest.raises(ValueError, match=r"js: 'logits_q' has shape \(10,\), expected \[\.\.\. v\] with v=11 from 'logits_p'"):
        divergence.js(zs, zt[:10])
    with pytest.raises(ValueError, match=r"per_token: 'mask' has shape \(2,\), expected \[\.\.\.\] with \.\.\.=\(\) from 'student_logits'"):
        divergence.per_token("js", zs, zt, mask=np.ones(2))
    with pytest.raises(ValueError, match="per_token: 'kind' is 'kl', expected one of 'forward_kl', 'reverse_kl'"):
        divergence.per_token("kl", zs, zt)
    with pytest.raises(ValueError, match="per_token: 'beta' was given, but skew_kl does not take it"):
        divergence.per_token("skew_kl", zs, zt, beta=0.1)
    with pytest.raises(ValueError, match="per_token: 'alpha' is None, expected a number for renyi"):
        divergence.per_token("renyi", zs, zt)
    with pytest.raises(ValueError, match="top_k: 'k' is 12, expected 1 to v=11"):
        divergence.top_k(divergence.FORWARD_KL, zs, zt, k=12)
    with pytest.raises(ValueError, match="top_k: 'support' is 'teacher', expected one of 'q', 'p'"):
        divergence.top_k(divergence.FORWARD_KL, zs, zt, k=2, support="teacher")
    with pytest.raises(ValueError, match=r"from_policy: 'log_q' has shape \(10,\), expected \[\.\.\.\] with \.\.\.=\(11,\) from 'log_p'"):
        divergence.from_policy(divergence.FORWARD_KL, zs, zt[:10])
    with pytest.raises(ValueError, match="Generator: 'h' and 'summand' are both None"):
        divergence.Generator()


@each_kind([*GENERATED, ("js", 0.0), ("js", 1.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("float64", 1e-13)])
def test_summands_and_slopes_made_together(kind, dtype, tolerance):
    """`terms_and_slopes` is the summand and its derivative, from ratios of 1 + 1e-6 to where one side is forbidden."""
    l = np.array([0.0, 1e-6, -1e-6, 1e-3, -0.3, 0.299, 0.301, -0.7, 2.0, -20.0, 35.0])
    log_q = np.log(np.linspace(0.001, 0.4, len(l)))
    log_p, log_q = np.minimum(log_q + l, -1e-3), log_q
    log_p, log_q = np.append(log_p, [-1e4, -1.0, -1e4, -90.0]), np.append(log_q, [-1.0, -1e4, -1e4, -0.5])
    made = generator(kind)

    def by_autodiff(p, q):
        return jax.jvp(lambda p: divergence.terms(made, p, q), (p,), (jnp.ones_like(p),))

    with jax.enable_x64(dtype == "float64"):
        log_p, log_q = (jnp.asarray(x, dtype) for x in (log_p, log_q))
        value, slope = compiled(lambda p, q: divergence.terms_and_slopes(made, p, q))(log_p, log_q)
        expected_value, expected_slope = compiled(by_autodiff)(log_p, log_q)
        size = np.exp(np.maximum(log_p, log_q)) * (1 + np.abs(np.asarray(log_p - log_q)))  # of what is summed in both
    for made_together, one in ((value, expected_value), (slope, expected_slope)):
        assert np.all(np.abs(made_together - one) <= tolerance * (size + np.abs(one)))
