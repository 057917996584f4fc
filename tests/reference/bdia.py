"""Diffusion samplers and their inversions in float64 NumPy, written in the Move form of the specification, not as a three-term table.

`eps(z, i)` is the network at level i; (alpha, sigma) are [N+1] with index 0 = data.
"""

import numpy as np

SD_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
SD_ALPHABAR = np.cumprod(1.0 - SD_BETAS)


class Mixture:
    """Two isotropic Gaussians: the exact eps of z = alpha x + sigma e."""

    def __init__(self, dim=8, weights=(0.35, 0.65), stds=(0.3, 0.5), seed=0, spread=0.5):
        self.means = spread * np.random.default_rng(seed).normal(size=(2, dim))
        self.weights, self.stds = np.asarray(weights), np.asarray(stds)

    def eps(self, z, alpha, sigma, xp=np):
        variance = alpha**2 * self.stds**2 + sigma**2
        delta = z[..., None, :] - alpha * self.means
        log_r = xp.log(self.weights) - 0.5 * xp.sum(delta**2, -1) / variance - 0.5 * self.means.shape[1] * xp.log(variance)
        # of two: the gradient of xp.max asks which is equal to it, and finds none where the compiler computes them twice
        log_r = log_r - xp.maximum(log_r[..., :1], log_r[..., 1:])
        r = xp.exp(log_r)
        r = r / xp.sum(r, -1, keepdims=True)
        return sigma * xp.sum((r / variance)[..., None] * delta, -2)


def move(z, e, i, j, alpha, sigma):
    return alpha[j] * (z - sigma[i] * e) / alpha[i] + sigma[j] * e


def ddim(eps, z, alpha, sigma):
    for i in range(len(alpha) - 1, 0, -1):
        z = move(z, eps(z, i), i, i - 1, alpha, sigma)
    return z


def ddim_invert(eps, z, alpha, sigma, target):
    for i in range(len(alpha) - 1):
        z = move(z, eps(z, i + 1 if target else i), i, i + 1, alpha, sigma)
    return z


def bdia(eps, z_N, alpha, sigma, gamma):
    """gamma[i] for level i (index 0 unused), native coordinates; returns (z_0, z_1)."""
    N = len(alpha) - 1
    above, here = z_N, move(z_N, eps(z_N, N), N, N - 1, alpha, sigma)
    for i in range(N - 1, 0, -1):
        e = eps(here, i)
        below = gamma[i] * (above - move(here, e, i, i + 1, alpha, sigma)) + move(here, e, i, i - 1, alpha, sigma)
        above, here = here, below
    return here, above


def bdia_encode(eps, z_0, alpha, sigma, gamma, M):
    below, here = z_0, move(z_0, eps(z_0, 0), 0, 1, alpha, sigma)
    for i in range(1, M):
        e = eps(here, i)
        above = (below - move(here, e, i, i - 1, alpha, sigma)) / gamma[i] + move(here, e, i, i + 1, alpha, sigma)
        below, here = here, above
    return below, here


def bdia_decode(eps, pair, alpha, sigma, gamma, M):
    here, above = pair
    for i in range(M - 1, 0, -1):
        e = eps(here, i)
        below = gamma[i] * (above - move(here, e, i, i + 1, alpha, sigma)) + move(here, e, i, i - 1, alpha, sigma)
        above, here = here, below
    return here, above


def obelm_gamma(alpha, sigma):
    sb = sigma / alpha
    h = np.diff(sb, prepend=np.nan)  # h[i] = sb[i] - sb[i-1]
    return np.array([np.nan] + [(h[i] / h[i + 1]) ** 2 * alpha[i - 1] / alpha[i + 1] for i in range(1, len(alpha) - 1)])


def edict_decode(eps, x, y, alpha, sigma, p, alternate, M):
    for k, i in enumerate(range(M, 0, -1)):
        a = alpha[i - 1] / alpha[i]
        b = sigma[i - 1] - a * sigma[i]
        if alternate and k % 2:
            y1 = a * y + b * eps(x, i)
            x1 = a * x + b * eps(y1, i)
        else:
            x1 = a * x + b * eps(y, i)
            y1 = a * y + b * eps(x1, i)
        x = p * x1 + (1 - p) * y1
        y = p * y1 + (1 - p) * x
    return x, y


def heun(eps, z, alpha, sigma):
    sb, zb = sigma / alpha, z / alpha[-1]
    for i in range(len(alpha) - 1, 0, -1):
        d = eps(alpha[i] * zb, i)
        zt = zb + (sb[i - 1] - sb[i]) * d
        if sb[i - 1] > 0:
            d = (d + eps(alpha[i - 1] * zt, i - 1)) / 2
        zb = zb + (sb[i - 1] - sb[i]) * d
    return alpha[0] * zb


def bdia_heun(eps, z, sigma, gamma, variant):
    """EDM grid (alpha = 1)."""
    N = len(sigma) - 1

    def up_or_down(z, i, j):
        d = eps(z, i)
        if sigma[j] == 0:
            return (sigma[j] - sigma[i]) * d, d
        return (sigma[j] - sigma[i]) * (d + eps(z + (sigma[j] - sigma[i]) * d, j)) / 2, d

    forward, d_above = up_or_down(z, N, N - 1)
    above, here = z, z + forward
    for i in range(N - 1, 0, -1):
        forward, d = up_or_down(here, i, i - 1)
        if variant == "euler":
            back = (sigma[i + 1] - sigma[i]) * d
        elif variant == "heun":
            back, _ = up_or_down(here, i, i + 1)
        else:
            back = (sigma[i + 1] - sigma[i]) * (d + d_above) / 2
        below = above - (1 - gamma) * (above - here) - gamma * back + forward
        above, here, d_above = here, below, d
    return here, above


def dpm_solver_2m(eps, z, alpha, sigma, lower_order_final):
    with np.errstate(divide="ignore"):
        lam = np.log(alpha / sigma)
    N, previous = len(alpha) - 1, None
    for i in range(N, 0, -1):
        x0 = (z - sigma[i] * eps(z, i)) / alpha[i]
        hh = lam[i - 1] - lam[i]
        if i == N or (i == 1 and lower_order_final):
            data = x0
        else:
            r = (lam[i] - lam[i + 1]) / hh
            data = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        z = sigma[i - 1] / sigma[i] * z - alpha[i - 1] * (np.exp(-hh) - 1) * data
        previous = x0
    return z


def reversible_heun(eps, z, alpha, sigma):
    sb = sigma / alpha
    N = len(sb) - 1
    y = yh = z / alpha[N]
    f = eps(z, N)
    for i in range(N, 0, -1):
        d = sb[i - 1] - sb[i]
        yh = 2 * y - yh + d * f
        f_new = eps(alpha[i - 1] * yh, i - 1)
        y = y + d * (f + f_new) / 2
        f = f_new
    return alpha[0] * y


def mccallum_foster_euler(eps, z, alpha, sigma, zeta):
    sb = sigma / alpha
    N = len(sb) - 1
    x = xh = z / alpha[N]
    for i in range(N, 0, -1):
        h = sb[i - 1] - sb[i]
        x = zeta * x + (1 - zeta) * xh + h * eps(alpha[i] * xh, i)
        xh = xh + h * eps(alpha[i - 1] * x, i - 1)
    return alpha[0] * x


def fixed_point_invert(eps, z, alpha, sigma, K):
    for i in range(1, len(alpha)):
        a = alpha[i - 1] / alpha[i]
        b = sigma[i - 1] - a * sigma[i]
        below = z
        for _ in range(K):
            z = (below - b * eps(z, i)) / a
    return z


def bdia_dpm_solver_2m(eps, z, alpha, sigma, a):
    """a[i] for level i (index 0 unused): both increments along the line through the last two data predictions; (z_0, z_1)."""
    with np.errstate(divide="ignore"):
        lam = np.log(alpha / sigma)

    def along(z, i, j, x0, slope):
        hh = lam[j] - lam[i]
        return sigma[j] / sigma[i] * z - alpha[j] * (np.exp(-hh) - 1) * (x0 + (hh / 2 * slope if np.isfinite(hh) else 0))

    N = len(alpha) - 1
    x0_above = (z - sigma[N] * eps(z, N)) / alpha[N]
    above, here = z, along(z, N, N - 1, x0_above, 0)
    for i in range(N - 1, 0, -1):
        x0 = (here - sigma[i] * eps(here, i)) / alpha[i]
        slope = (x0 - x0_above) / (lam[i] - lam[i + 1])
        below = a[i] * (above - along(here, i, i + 1, x0, slope)) + along(here, i, i - 1, x0, slope)
        above, here, x0_above = here, below, x0
    return here, above


def anderson_invert(eps, z, alpha, sigma, K, memory):
    """Fixed-point inversion whose next iterate mixes the last memory + 1 images so that the mixed residual is smallest (least squares)."""
    for i in range(1, len(alpha)):
        a = alpha[i - 1] / alpha[i]
        b = sigma[i - 1] - a * sigma[i]
        below, images, residuals = z, [], []
        for _ in range(K):
            image = (below - b * eps(z, i)) / a
            images, residuals = [*images, image][-memory - 1 :], [*residuals, image - z][-memory - 1 :]
            differences = [(r - residuals[-1]).ravel() for r in residuals[:-1]]
            mix = np.linalg.lstsq(np.stack(differences, 1), -residuals[-1].ravel(), rcond=None)[0] if differences else []
            z = images[-1] + sum(w * (image - images[-1]) for w, image in zip(mix, images[:-1]))
    return z


def coupled_diffusion_euler(eps, z, alpha, sigma, zeta, churn, noise):
    """McCallum-Foster on Euler steps of d zb = (1 + churn^2) eps d sb + dM; noise[i] is M's increment on the way down from level i."""
    sb = sigma / alpha
    N = len(sb) - 1
    x = xh = z / alpha[N]
    for i in range(N, 0, -1):
        h = sb[i - 1] - sb[i]
        x = zeta * x + (1 - zeta) * xh + h * (1 + churn**2) * eps(alpha[i] * xh, i) + noise[i]
        xh = xh + h * (1 + churn**2) * eps(alpha[i - 1] * x, i - 1) + noise[i]
    return alpha[0] * x
