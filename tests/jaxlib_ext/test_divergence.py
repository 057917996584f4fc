"""The divergence family against float64 NumPy, formulas for gradients, identities by enumeration, and what extremes must not do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import GENERATED, KINDS, SOME, compiled, each_kind, expected, function, generator, options, problem, together
from reference import divergence as reference

from janax.jaxlib_ext import divergence

UNBOUNDED = ("forward_kl", "reverse_kl", "jeffreys", "adaptive_kl", "chi2_forward", "chi2_reverse", "renyi")
BOUNDED = [kind for kind in KINDS if kind[0] not in UNBOUNDED and not (kind[0] == "alpha_divergence" and not 0 < kind[1] < 1)]


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
