"""SinKD in float64 NumPy, written from the equations of section 2: kernel normalisation, and its gradient by hand through every division."""

import numpy as np


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def cost(s, t):
    return np.array([[sum(abs(a - b) for a, b in zip(row, column)) for column in t] for row in s])


def plans(c, epsilon, num_iters):
    """All matrices on the way: K^0, then rows and columns divided by their sums in turn."""
    steps = [np.exp(-c / epsilon)]
    for _ in range(num_iters):
        steps.append(steps[-1] / steps[-1].sum(1, keepdims=True))
        steps.append(steps[-1] / steps[-1].sum(0, keepdims=True))
    return steps


def loss(student, teacher, temperature=2.0, epsilon=0.1, num_iters=20):
    """Sum over rows of <P, C>, and its gradient with respect to the student's logits."""
    s, t = softmax(student / temperature), softmax(teacher / temperature)
    c = cost(s, t)
    steps = plans(c, epsilon, num_iters)
    value = np.sum(steps[-1] * c)

    to_plan = c.copy()
    for i in range(len(steps) - 1, 0, -1):
        axis = 0 if i % 2 == 0 else 1  # even steps divided by column sums, odd ones by row sums
        total = steps[i - 1].sum(axis, keepdims=True)
        to_plan = (to_plan - np.sum(to_plan * steps[i], axis, keepdims=True)) / total
    to_cost = steps[-1] - to_plan * steps[0] / epsilon
    to_s = np.einsum("ij,ijv->iv", to_cost, np.sign(s[:, None] - t[None]))
    return value, s * (to_s - np.sum(s * to_s, -1, keepdims=True)) / temperature


def objective(student, teacher, labels, alpha, beta, weight, temperature):
    log_s = log_softmax(student)
    cross_entropy = -np.mean(log_s[np.arange(len(labels)), labels])
    distillation = -np.mean(np.sum(softmax(teacher / temperature) * log_softmax(student / temperature), -1))
    return (1 - alpha) * cross_entropy + alpha * distillation + beta * weight * loss(student, teacher)[0]


def legacy_3d(student, teacher, temperature=2.0, epsilon=0.1, num_iters=20):
    """Softmax over the sequence, costs within a row, division by sums over axis 1, then over the batch."""
    s, t = softmax(student / temperature, 1), softmax(teacher / temperature, 1)
    c = np.stack([cost(a, b) for a, b in zip(s, t)])
    k = np.exp(-c / epsilon)
    for _ in range(num_iters):
        k = k / k.sum(1, keepdims=True)
        k = k / k.sum(0, keepdims=True)
    return np.sum(k * c), k


def two_classes(student, teacher, temperature=2.0):
    """The transport without entropy: 2 sum |sorted s - sorted t| of the first class."""
    s, t = (np.sort(softmax(x / temperature)[:, 0]) for x in (student, teacher))
    return 2 * np.sum(np.abs(s - t))
