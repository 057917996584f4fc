"""One generation of CMA-ES in float64, from the equations of Hansen's tutorial (arXiv:1604.00772v2), one sample at a time; values are
to be large."""

import numpy as np


def weights_of(lam):
    raw = np.array([np.log((lam + 1) / 2) - np.log(i) for i in range(1, lam + 1)])
    return raw, lam // 2


class Cma:
    def __init__(self, mean, sigma, lam, *, active=True, diagonal=False):
        n = len(mean)
        self.n, self.lam, self.diagonal = n, lam, diagonal
        self.m, self.sigma, self.C = np.array(mean, float), float(sigma), np.eye(n)
        self.ps, self.pc, self.g = np.zeros(n), np.zeros(n), 0
        raw, self.mu = weights_of(lam)
        self.mueff = sum(raw[: self.mu]) ** 2 / sum(raw[: self.mu] ** 2)
        mueff_minus = sum(raw[self.mu :]) ** 2 / sum(raw[self.mu :] ** 2)
        self.c1 = 2 / ((n + 1.3) ** 2 + self.mueff)
        self.cmu = min(1 - self.c1, 2 * (0.25 + self.mueff + 1 / self.mueff - 2) / ((n + 2) ** 2 + self.mueff))
        if diagonal:  # Ros and Hansen: (n + 2)/3 as fast
            self.c1 = min(1, self.c1 * (n + 2) / 3)
            self.cmu = min(1 - self.c1, self.cmu * (n + 2) / 3)
        self.cc = (4 + self.mueff / n) / (n + 4 + 2 * self.mueff / n)
        self.cs = (self.mueff + 2) / (n + self.mueff + 5)
        self.ds = 1 + 2 * max(0, np.sqrt((self.mueff - 1) / (n + 1)) - 1) + self.cs
        self.chi = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
        self.w = np.zeros(lam)
        self.w[: self.mu] = raw[: self.mu] / sum(raw[: self.mu])
        if active:
            bounds = (1 + self.c1 / self.cmu, 1 + 2 * mueff_minus / (self.mueff + 2), (1 - self.c1 - self.cmu) / (n * self.cmu))
            below = raw < 0
            self.w[below] = min(bounds) * raw[below] / abs(sum(raw[below]))

    def tell(self, samples, values):
        n, order = self.n, sorted(range(self.lam), key=lambda i: -values[i])
        y = [(samples[i] - self.m) / self.sigma for i in order]
        d2, B = np.linalg.eigh(self.C)
        root = B @ np.diag(d2**-0.5) @ B.T
        yw = sum(self.w[i] * y[i] for i in range(self.mu))
        self.m = self.m + self.sigma * yw
        self.ps = (1 - self.cs) * self.ps + np.sqrt(self.cs * (2 - self.cs) * self.mueff) * root @ yw
        norm = np.linalg.norm(self.ps)
        self.sigma *= np.exp(self.cs / self.ds * (norm / self.chi - 1))
        self.g += 1
        h = 1.0 if norm / np.sqrt(1 - (1 - self.cs) ** (2 * self.g)) < (1.4 + 2 / (n + 1)) * self.chi else 0.0
        self.pc = (1 - self.cc) * self.pc + h * np.sqrt(self.cc * (2 - self.cc) * self.mueff) * yw
        delta = (1 - h) * self.cc * (2 - self.cc)
        C = (1 + self.c1 * delta - self.c1 - self.cmu * sum(self.w)) * self.C + self.c1 * np.outer(self.pc, self.pc)
        for i in range(self.lam):
            w = self.w[i] if self.w[i] >= 0 else self.w[i] * n / np.linalg.norm(root @ y[i]) ** 2
            C = C + self.cmu * w * np.outer(y[i], y[i])
        self.C = np.diag(np.diag(C)) if self.diagonal else C
