"""BIB and BDI in float64 NumPy, written from the equations: N-sized formulas, gradients by hand, loops of Python numbers."""

import numpy as np

# --- the proxy (sections 3.1)


def ridge(phi, y, r):
    n = len(phi)
    lam = r * np.trace(phi @ phi.T) / n
    primal = np.linalg.solve(phi.T @ phi + lam * np.eye(phi.shape[1]), phi.T @ y)
    dual = np.linalg.solve(phi @ phi.T + lam * np.eye(n), y)
    return primal, phi.T @ dual, lam


def forward(phi_h, w, y_h):
    error = phi_h @ w - y_h
    return np.mean(error**2), 2 / len(phi_h) * error[:, None] * w[None]


def backward(phi_h, phi, y, y_h, r):
    """The N-sized loss and its gradient of section 3.1."""
    m, n = len(phi_h), len(phi)
    k = phi_h @ phi_h.T
    a_matrix = k + r * np.trace(k) / m * np.eye(m)
    a = np.linalg.solve(a_matrix, np.broadcast_to(y_h, (m,)))
    u = phi_h.T @ a
    loss = np.sum((phi @ u - y) ** 2) / n
    v = 2 * (phi.T @ (phi @ u - y)) / n
    q = np.linalg.solve(a_matrix, phi_h @ v)
    return loss, np.outer(a, v) - np.outer(q, u) - np.outer(a, phi_h.T @ q) - 2 * r / m * (q @ a) * phi_h


def leave_one_out(phi, y, r):
    """By refitting without each row, at the ridge of all rows."""
    lam = r * np.sum(phi**2) / len(phi)
    out = []
    for i in range(len(phi)):
        rest, targets = np.delete(phi, i, 0), np.delete(y, i)
        w = np.linalg.solve(rest.T @ rest + lam * np.eye(phi.shape[1]), rest.T @ targets)
        out.append(y[i] - phi[i] @ w)
    return np.array(out)


# --- the loop (sections 4 to 7), on the smooth relaxation or through the argmax, features phi = W^T x


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Toy:
    """phi = tanh(x C + e), x the rows of a relaxed sequence in one line; all gradients by hand."""

    def __init__(self, mixing, shift, phi, y, w, y_h, r, aux, aux_bias, aux_scale, hard):
        self.__dict__.update(locals())

    def features(self, z):
        p = softmax(z)
        x = np.eye(z.shape[-1])[np.argmax(p, -1)] if self.hard else p
        return np.tanh(x.reshape(-1) @ self.mixing + self.shift), p

    def pull(self, z, to_phi):
        phi, p = self.features(z)
        to_x = ((1 - phi**2) * to_phi @ self.mixing.T).reshape(z.shape)
        return p * (to_x - np.sum(p * to_x, -1, keepdims=True))

    def gradients(self, z):
        phi, _ = self.features(z)
        f, to_f = forward(phi[None], self.w, self.y_h)
        b, to_b = backward(phi[None], self.phi, self.y, self.y_h, self.r)
        a = self.aux_scale * np.mean(self.aux @ phi + self.aux_bias)
        return (f, b, a), self.pull(z, to_f[0]), self.pull(z, to_b[0]), self.pull(z, self.aux_scale * self.aux.mean(0))

    def value(self, z):
        return self.gradients(z)[0][2]


def adam(m, v, g, t):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return m, v, m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)


def run(toy, z, steps, mode="both", adapt_gamma=False, adapt_eta=False):
    """The public code's loop; returns the logits after every step, gammas and etas."""
    gamma, lr, m, v, gm, gv = 0.5, 0.1, np.zeros_like(z), np.zeros_like(z), 0.0, 0.0
    path, gammas, etas = [], [], []
    for t in range(steps):
        _, g_f, g_b, g_a = toy.gradients(z)
        if adapt_gamma:
            gm, gv, direction = adam(gm, gv, 0.1 * np.sum(g_a * (g_f - g_b)), t)
            gamma = np.clip(gamma - 0.1 * direction, 0, 1)
        g = {"forward": g_f, "backward": g_b, "both": gamma * g_f + (1 - gamma) * g_b}[mode]
        m, v, direction = adam(m, v, g, t)
        if adapt_eta and t >= 1:
            lr = np.clip(0.1 - 0.01 * np.sum(g_a * direction), 1e-4, 0.5)
        z = z - lr * direction
        path.append(z)
        gammas.append(gamma)
        etas.append(lr)
    return np.array(path), np.array(gammas), np.array(etas)


# --- the infinite-width kernel (section 2.2)


def ntk(x, x2, depth=6):
    out = np.empty((len(x), len(x2)))
    for i, one in enumerate(x):
        for j, two in enumerate(x2):
            q, a, b = one @ two / len(one), one @ one / len(one), two @ two / len(one)
            total = q
            for _ in range(depth - 1):
                c = 1.0 if np.array_equal(one, two) else np.clip(q / np.sqrt(a * b), -1, 1)  # the root of its rounding is 1e-8
                t = np.arccos(c)
                total = total * (np.pi - t) / (2 * np.pi)
                q = np.sqrt(a * b) * (np.sqrt(1 - c * c) + (np.pi - t) * c) / (2 * np.pi)
                a, b = a / 2, b / 2
                total += q
            out[i, j] = total
    return out


def bdi_losses(x, y, x_h, y_h, r, r_back, g):
    k, across, own = ntk(x, x), ntk(x_h, x), ntk(x_h, x_h)
    d = np.linalg.solve(k + r * np.trace(k) / len(x) * np.eye(len(x)), y)
    forward = 0.5 * np.mean((across @ d - y_h) ** 2)
    weights = np.exp(g * y) / np.sum(np.exp(g * y))
    m = len(x_h)
    prediction = across.T @ np.linalg.solve(own + r_back * np.trace(own) / m * np.eye(m), np.full(m, y_h))
    return forward, 0.5 * np.sum(weights * (prediction - y) ** 2)
