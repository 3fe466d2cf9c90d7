"""Posterior of the sigmoid of one RL curve, summed exactly on a grid, handed out as weighted draws. The model is in fit.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_ndtr, ndtri_exp
from scipy.stats import qmc

CEILING = 100.0  # percent
DRAWS = 4096  # a power of two, as Sobol points want; a quantile of A then moves by less than 0.02 sd


@dataclass(frozen=True)
class Priors:
    """The same for every curve; never set per curve. Frozen before new curves are looked at."""

    b_median: float = 1.5
    b_log_sd: float = 0.7
    c_share: float = 0.25  # median of C as a share of the largest x used
    c_log_sd: float = 1.0
    # D is half-normal, its scale one of these (points): most RL gains are a few points, a weak start can gain tens.
    d_scales: tuple[float, ...] = (6.0, 20.0)
    d_weights: tuple[float, ...] = (0.85, 0.15)
    eps_zero: float = 0.85  # probability of no jump at the joint
    eps_scale: float = 2.0  # half-normal otherwise, points
    noise: float = 0.5  # median of sigma where the scores' standard error is not given, points
    noise_log_sd: float = 0.5
    # Where it is given it is binomial: an upper bound, as the same problems are asked each time and only the sampling differs.
    noise_given_log_sd: float = 0.4
    p_sft_se: float = 0.5  # where not given, points
    rho_mean: float = 0.2
    rho_sd: float = 0.2


@dataclass(frozen=True)
class Draws:
    """Weighted draws of the parameters, each float64 [DRAWS]. L, D, eps and sigma in points, C in EFLOPs; weights sum to 1."""

    l: np.ndarray  # noqa: E741 (the model's letter)
    d: np.ndarray
    b: np.ndarray
    c: np.ndarray
    eps: np.ndarray
    sigma: np.ndarray
    weight: np.ndarray

    def quantiles(self, values: np.ndarray, quantiles: tuple[float, ...]) -> np.ndarray:
        """Quantiles of `values` [DRAWS], a function of the draws; between the midpoints of the cumulative weight."""
        order = np.argsort(values, kind="stable")
        weight = self.weight[order]
        return np.interp(quantiles, np.cumsum(weight) - weight / 2, values[order])

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Noiseless scores [n, DRAWS] at `x` [n] EFLOPs."""
        return self.l + self.d * rise(x[:, None], self.b, self.c)


def rise(x: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """s(x) = 1 / (1 + (x / C)^-B), broadcast; 0 at x = 0."""
    with np.errstate(divide="ignore"):
        exponent = -b * (np.log(x) - np.log(c))
    return 1.0 / (1.0 + np.exp(np.minimum(exponent, 700.0)))  # exp(710) overflows


def draw(x: np.ndarray, y: np.ndarray, p_sft: float, x_scale: float, score_se: float | None, p_sft_se: float | None,
         priors: Priors) -> Draws:
    """Draws given the points used, `x` and `y` [n], n >= 0 (none: the prior around P_sft); `x_scale` > 0 sets the prior of C.

    For each cell of the grid over B, C, rho, sigma, eps and the scale of D the posterior of (u, D), u = L - P_sft, is a bivariate normal
    in closed form, cut to D > 0 and u + D <= 100 - P_sft.
    """
    grid_b, log_b = _log_normal_grid(priors.b_median, priors.b_log_sd, 19)
    grid_c, log_c = _log_normal_grid(priors.c_share * x_scale, priors.c_log_sd, 31)
    grid_rho = np.array([0.0, 0.15, 0.3, 0.45, 0.6])
    noise, noise_log_sd = (priors.noise, priors.noise_log_sd) if score_se is None else (score_se, priors.noise_given_log_sd)
    grid_sigma, log_sigma = _log_normal_grid(noise, noise_log_sd, 12)
    grid_eps, log_eps = _eps_grid(priors)
    log_rho = -0.5 * ((grid_rho - priors.rho_mean) / priors.rho_sd) ** 2
    # Axes of all that follows: B, C, rho, sigma, eps, scale of D.
    b, c, rho, sigma, eps, scale = np.ix_(grid_b, grid_c, grid_rho, grid_sigma, grid_eps, np.array(priors.d_scales))
    log_prior = sum(np.ix_(log_b, log_c, log_rho, log_sigma, log_eps, np.log(priors.d_weights)))

    shapes = rise(x, grid_b[:, None, None], grid_c[:, None])  # [B, C, n]
    ss, s1, sr, one1, one_r, rr, log_det = _whitened_products(shapes, y - p_sft, grid_rho)

    # u ~ N(eps, p_sft_se^2): P_sft is a reading, not the truth. D ~ N(0, scale^2), its positive half.
    prior_u, prior_d = 1 / (p_sft_se or priors.p_sft_se) ** 2, 1 / scale**2
    variance = sigma**2
    precision_u, precision_ud, precision_d = one1 / variance + prior_u, s1 / variance, ss / variance + prior_d
    linear_u, linear_d = one_r / variance + eps * prior_u, sr / variance
    determinant = precision_u * precision_d - precision_ud**2
    mean_u = (precision_d * linear_u - precision_ud * linear_d) / determinant
    mean_d = (precision_u * linear_d - precision_ud * linear_u) / determinant
    var_u, var_d, cov = precision_d / determinant, precision_u / determinant, -precision_ud / determinant

    quadratic = linear_u * mean_u + linear_d * mean_d - rr / variance - eps**2 * prior_u
    log_evidence = 0.5 * (quadratic + log_det - np.log(determinant) + np.log(prior_d)) - len(x) * np.log(sigma)
    top = CEILING - p_sft
    log_inside = log_ndtr(mean_d / np.sqrt(var_d)) + log_ndtr((top - mean_u - mean_d) / np.sqrt(var_u + var_d + 2 * cov))
    log_weight = log_evidence + log_inside + log_prior

    # A point of the unit cube is a cell, then D, then u given D by their inverse distribution functions, each cut at its bound. The
    # cell's weight took the two cuts as independent; the draw's weight puts right what that left out.
    cube = qmc.Sobol(d=3, scramble=True, rng=0).random(DRAWS)
    cumulative = np.cumsum(np.exp(log_weight - log_weight.max()))
    cell = np.searchsorted(cumulative, cube[:, 0] * cumulative[-1], side="right").clip(max=len(cumulative) - 1)
    cell = np.unravel_index(cell, log_weight.shape)

    def at(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values, log_weight.shape)[cell]

    sd_d = np.sqrt(at(var_d))
    d = at(mean_d) - sd_d * _normal_below(at(mean_d) / sd_d, cube[:, 1])  # D > 0
    u_mean = at(mean_u) + at(cov) / at(var_d) * (d - at(mean_d))
    u_sd = np.sqrt(np.maximum(at(var_u) - at(cov) ** 2 / at(var_d), 1e-12))
    limit = (top - d - u_mean) / u_sd
    u = u_mean + u_sd * _normal_below(limit, cube[:, 2])  # u + D <= top
    log_draw = log_ndtr(at(mean_d) / sd_d) + log_ndtr(limit) - at(log_inside)
    weight = np.exp(log_draw - log_draw.max())
    return Draws(l=p_sft + u, d=d, b=at(b), c=at(c), eps=at(eps), sigma=at(sigma), weight=weight / weight.sum())


def _whitened_products(shapes: np.ndarray, residual: np.ndarray, grid_rho: np.ndarray) -> tuple[np.ndarray, ...]:
    """Inner products of s [B, C, n], 1 and the residual [n], after whitening AR(1) noise of unit sd with each rho.

    Returns ss, s1, sr, 11, 1r, rr and the log determinant of the noise precision, each broadcastable to [B, C, rho, 1, 1, 1].
    """
    per_rho = []
    for rho in grid_rho:
        scale = 1.0 / np.sqrt(1.0 - rho**2)

        def whiten(values: np.ndarray) -> np.ndarray:
            return np.concatenate([values[..., :1], (values[..., 1:] - rho * values[..., :-1]) * scale], axis=-1)

        s, one, r = whiten(shapes), whiten(np.ones_like(residual)), whiten(residual)
        log_det = max(len(r) - 1, 0) * 2 * np.log(scale)
        products = ((s * s).sum(-1), s @ one, s @ r, one @ one, one @ r, r @ r, log_det)
        per_rho.append([np.broadcast_to(product, shapes.shape[:2]) for product in products])
    return tuple(np.stack(values, axis=-1)[..., None, None, None] for values in zip(*per_rho))


def _log_normal_grid(median: float, log_sd: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Values [n] evenly spaced in log over +-3 sd, and their log prior weights."""
    z = np.linspace(-3, 3, n)
    return median * np.exp(log_sd * z), -0.5 * z**2


def _eps_grid(priors: Priors) -> tuple[np.ndarray, np.ndarray]:
    """0 with its own probability, then a half-normal, and their log prior weights."""
    z = np.array([0.25, 0.75, 1.25, 1.75, 2.5])
    tail = np.exp(-0.5 * z**2)
    weights = np.concatenate([[priors.eps_zero], (1 - priors.eps_zero) * tail / tail.sum()])
    return np.concatenate([[0.0], priors.eps_scale * z]), np.log(weights)


def _normal_below(limit: np.ndarray, quantile: np.ndarray) -> np.ndarray:
    """Value at `quantile` of standard normals cut to (-inf, limit]; in logarithms, so that far tails keep their digits."""
    return ndtri_exp(np.log(np.maximum(quantile, 1e-12)) + log_ndtr(limit))
