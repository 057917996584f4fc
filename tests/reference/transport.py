"""Entropic transport in float64 NumPy: kernels and scalings, matrices normalised in place, dense linear algebra; one problem at a time."""

import numpy as np
from scipy import optimize, sparse


def l1(x, y):
    return np.array([[np.abs(p - q).sum() for q in np.asarray(y, np.float64)] for p in np.asarray(x, np.float64)])


def min_identity(x, y):
    return np.array([[2 - 2 * np.minimum(p, q).sum() for q in np.asarray(y, np.float64)] for p in np.asarray(x, np.float64)])


def normalised_kernel(cost, epsilon, num_iters):
    """Rows, then columns, of exp(-C / epsilon) divided by their sums, again and again: the plan, and every matrix on the way."""
    k = np.exp(-np.asarray(cost, np.float64) / epsilon)
    path = [k]
    for _ in range(num_iters):
        for axis in (1, 0):
            k = k / k.sum(axis, keepdims=True)
            path.append(k)
    return k, path


def normalised_kernel_gradient(cost, epsilon, num_iters):
    """(<K, C>, d<K, C> / dC), back through every division."""
    cost = np.asarray(cost, np.float64)
    k, path = normalised_kernel(cost, epsilon, num_iters)
    bar = cost.copy()
    for step in reversed(range(2 * num_iters)):
        axis = (1, 0)[step % 2]
        total = path[step].sum(axis, keepdims=True)
        bar = (bar - (bar * path[step + 1]).sum(axis, keepdims=True)) / total
    return (k * cost).sum(), k - path[0] * bar / epsilon


def scaled(cost, a, b, epsilon, num_iters, rho=np.inf, counting=False):
    """Vector scalings u, v from v = 1 (times b, if counting, so that g starts at 0): (plan, f, g) of P = a b exp((f + g - C) / epsilon)."""
    cost, a, b = (np.asarray(x, np.longdouble) for x in (cost, a, b))
    power = 1.0 if np.isinf(rho) else rho / (rho + epsilon)
    k = np.exp(-cost / epsilon)
    if counting:
        v = b.copy()
        for _ in range(num_iters):
            u = (a / (k @ v)) ** power
            v = (b / (k.T @ u)) ** power
        return (u[:, None] * k * v).astype(float), epsilon * np.log(u / a).astype(float), epsilon * np.log(v / b).astype(float)
    v = np.ones_like(b)
    for _ in range(num_iters):
        u = (k @ (b * v)) ** -power
        v = (k.T @ (a * u)) ** -power
    plan = (a * u)[:, None] * k * (b * v)
    return plan.astype(float), epsilon * np.log(u).astype(float), epsilon * np.log(v).astype(float)


def kl(p, q):
    on = p > 0
    return np.sum(p[on] * np.log(p[on] / q[on])) - p.sum() + q.sum()


def objective(plan, cost, a, b, epsilon, rho=None):
    """<P, C> + epsilon KL(P | a b^T) and, if unbalanced, the two penalties."""
    value = np.sum(plan * cost) + epsilon * kl(plan, np.outer(a, b))
    return value if rho is None else value + rho * kl(plan.sum(1), a) + rho * kl(plan.sum(0), b)


def fixed_point_gradient(cost, plan, epsilon):
    """d<P, C> / dC of a converged balanced plan, marginals held: least squares for the multipliers."""
    cost, plan = np.asarray(cost, np.float64), np.asarray(plan, np.float64)
    system = np.block([[np.diag(plan.sum(1)), plan], [plan.T, np.diag(plan.sum(0))]])
    right = np.concatenate([(plan * cost).sum(1), (plan * cost).sum(0)])
    multipliers = np.linalg.lstsq(system, right, rcond=1e-13)[0]
    u, v = multipliers[: len(plan)], multipliers[len(plan) :]
    return plan + plan * (u[:, None] + v[None] - cost) / epsilon


def linear_program(cost, a, b):
    """min <P, C> over plans with the marginals a and b."""
    n, m = np.shape(cost)
    rows = sparse.kron(sparse.eye(n), np.ones((1, m)))
    cols = sparse.kron(np.ones((1, n)), sparse.eye(m))
    found = optimize.linprog(np.ravel(cost), A_eq=sparse.vstack([rows, cols]), b_eq=np.concatenate([a, b]), bounds=(0, None))
    assert found.success
    return found.fun


def differences(function, x, step=1e-6):
    """Central differences of a scalar function, entry by entry."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        plus, minus = x.copy(), x.copy()
        plus[index] += step
        minus[index] -= step
        out[index] = (function(plus) - function(minus)) / (2 * step)
    return out
