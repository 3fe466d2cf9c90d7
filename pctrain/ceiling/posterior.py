"""Posterior of the sigmoid of one RL curve, summed exactly on a grid, handed out as weighted draws. The model is in fit.py."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from scipy.special import log_ndtr, ndtri, ndtri_exp
from scipy.stats import qmc

DRAWS = 4096  # a power of two, as Sobol points want; a quantile of A then moves by less than 0.02 sd
Z = 3.0  # prior standard deviations that the grid reaches to
RHO_MAX = 0.8
COARSE, FINE = (13, 19, 4, 7), (17, 25, 5, 9)  # points of the grid along B, C, rho, sigma
NEGLIGIBLE = 1e-4  # share of the posterior that the fine grid may leave out at an end of an axis


@dataclass(frozen=True)
class Priors:
    """The same for every curve; never set per curve. Frozen before new curves are looked at."""

    b_median: float = 1.5
    b_log_sd: float = 0.7
    c_share: float = 0.25  # median of C as a share of the largest x used
    c_log_sd: float = 1.05
    # D is half-normal, its scale one of these (points): most RL gains are a few points, a weak start can gain tens.
    d_scales: tuple[float, ...] = (6.0, 20.0)
    d_weights: tuple[float, ...] = (0.85, 0.15)
    eps_zero: float = 0.85  # probability of no jump at the joint
    eps_mean: float = 1.6  # otherwise normal, points
    eps_sd: float = 1.2
    noise: float = 0.5  # median of sigma where the scores' standard error is not given, points
    noise_log_sd: float = 0.5
    # Where it is given it is binomial: an upper bound, as the same problems are asked each time and only the sampling differs.
    noise_given_log_sd: float = 0.4
    p_sft_se: float = 0.5  # where not given, points
    rho_mean: float = 0.3
    rho_sd: float = 0.3


@dataclass(frozen=True)
class Draws:
    """Weighted draws of the parameters, each float64 [DRAWS]. L, D, eps and sigma in points, C in EFLOPs; weights sum to 1."""

    l: np.ndarray  # noqa: E741 (the model's letter)
    d: np.ndarray
    b: np.ndarray
    c: np.ndarray
    eps: np.ndarray
    sigma: np.ndarray
    rho: np.ndarray
    noise: np.ndarray  # standard normals, independent of the rest: times sigma, the noise of a score that is measured
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


@dataclass(frozen=True)
class _Grid:
    """Axes B, C, rho, sigma, jump (0: eps = 0, 1: eps > 0), scale of D: values and log prior weights of each."""

    values: tuple[np.ndarray, ...]
    log_prior: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _Cells:
    """Of each cell of a grid (its shape, or one that broadcasts to it): log posterior weight, and the normal of (u, D) before the cuts."""

    log_weight: np.ndarray
    log_inside: np.ndarray
    mean_u: np.ndarray
    mean_d: np.ndarray
    var_u: np.ndarray
    var_d: np.ndarray
    cov: np.ndarray


def draw(
    x: np.ndarray,
    y: np.ndarray,
    p_sft: float,
    x_scale: float,
    max_score: float,
    score_se: float | None,
    p_sft_se: float | None,
    priors: Priors,
) -> Draws:
    """Draws given the points used, `x` and `y` [n], n >= 0 (none: the prior around P_sft); `x_scale` > 0 sets the prior of C.

    For each cell of the grid over B, C, rho, sigma, whether there is a jump, and the scale of D the posterior of (u, D), u = L - P_sft, is
    a bivariate normal in closed form, cut to D > 0 and u + D <= `max_score` - P_sft. A coarse grid over all that the prior allows says
    where the posterior lies; a fine one over that part alone is what is drawn from.
    """
    bounds = ((-Z, Z), (-Z, Z), (0.0, RHO_MAX), (-Z, Z))
    p_sft_se, top = p_sft_se or priors.p_sft_se, max_score - p_sft
    for sizes in (COARSE, FINE):
        grid = _grid(bounds, sizes, x_scale, score_se, priors)
        cells = _posterior(grid, x, y - p_sft, top, p_sft_se, priors)
        bounds = _where_it_lies(cells.log_weight, bounds)
    return _draw_from(grid, cells, p_sft, top, p_sft_se, priors)


def _posterior(grid: _Grid, x: np.ndarray, residual: np.ndarray, top: float, p_sft_se: float, priors: Priors) -> _Cells:
    grid_b, grid_c, grid_rho = grid.values[:3]
    _, _, _, sigma, jump, scale = np.ix_(*grid.values)
    shapes = rise(x, grid_b[:, None, None], grid_c[:, None])  # [B, C, n]
    ss, s1, sr, one1, one_r, rr, log_det = _whitened_products(shapes, residual, grid_rho)

    # u ~ N(eps, p_sft_se^2): P_sft is a reading, not the truth. D ~ N(0, scale^2), its positive half.
    eps, prior_u, prior_d = jump * priors.eps_mean, 1 / (p_sft_se**2 + jump * priors.eps_sd**2), 1 / scale**2
    variance = sigma**2
    precision_u, precision_ud, precision_d = one1 / variance + prior_u, s1 / variance, ss / variance + prior_d
    linear_u, linear_d = one_r / variance + eps * prior_u, sr / variance
    determinant = precision_u * precision_d - precision_ud**2
    var_u, var_d, cov = precision_d / determinant, precision_u / determinant, -precision_ud / determinant
    mean_u, mean_d = var_u * linear_u + cov * linear_d, var_d * linear_d + cov * linear_u

    quadratic = linear_u * mean_u + linear_d * mean_d - rr / variance - eps**2 * prior_u
    log_evidence = 0.5 * (quadratic + (log_det - np.log(determinant) + np.log(prior_u) + np.log(prior_d))) - len(
        x
    ) * np.log(sigma)
    log_inside = log_ndtr(mean_d / np.sqrt(var_d)) + log_ndtr(
        (top - mean_u - mean_d) / np.sqrt(var_u + var_d + 2 * cov)
    )
    log_weight = log_evidence + log_inside + sum(np.ix_(*grid.log_prior))
    return _Cells(log_weight, log_inside, mean_u, mean_d, var_u, var_d, cov)


def _draw_from(grid: _Grid, cells: _Cells, p_sft: float, top: float, p_sft_se: float, priors: Priors) -> Draws:
    """A point of the unit cube is a cell, then D, then u given D by their inverse distribution functions, each cut at its bound; and noise.
    The cell's weight took the two cuts as independent; the draw's weight puts right what that left out."""
    cube = _cube()
    shape = cells.log_weight.shape
    cumulative = np.cumsum(np.exp(cells.log_weight - cells.log_weight.max()))
    cell = np.searchsorted(cumulative, cube[:, 0] * cumulative[-1], side="right").clip(max=len(cumulative) - 1)
    cell = np.unravel_index(cell, shape)

    def at(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values, shape)[cell]

    mean_d, var_d, cov = at(cells.mean_d), at(cells.var_d), at(cells.cov)
    sd_d = np.sqrt(var_d)
    d = mean_d - sd_d * _normal_below(mean_d / sd_d, cube[:, 1])  # D > 0
    u_mean = at(cells.mean_u) + cov / var_d * (d - mean_d)
    u_sd = np.sqrt(np.maximum(at(cells.var_u) - cov**2 / var_d, 1e-12))
    limit = (top - d - u_mean) / u_sd
    u = u_mean + u_sd * _normal_below(limit, cube[:, 2])  # u + D <= top
    log_draw = log_ndtr(mean_d / sd_d) + log_ndtr(limit) - at(cells.log_inside)
    weight = np.exp(log_draw - log_draw.max())
    b, c, rho, sigma, jump, _ = (values[index] for values, index in zip(grid.values, cell, strict=True))
    # What of u is eps and what a misread P_sft: the mean, given u.
    eps = jump * np.maximum(
        priors.eps_mean + (u - priors.eps_mean) * priors.eps_sd**2 / (priors.eps_sd**2 + p_sft_se**2), 0.0
    )
    return Draws(
        l=p_sft + u,
        d=d,
        b=b,
        c=c,
        eps=eps,
        sigma=sigma,
        rho=rho,
        noise=ndtri(np.maximum(cube[:, 3], 1e-12)),
        weight=weight / weight.sum(),
    )


@functools.cache
def _cube() -> np.ndarray:
    return qmc.Sobol(d=4, scramble=True, rng=0).random(DRAWS)


def _grid(
    bounds: tuple[tuple[float, float], ...],
    sizes: tuple[int, ...],
    x_scale: float,
    score_se: float | None,
    priors: Priors,
) -> _Grid:
    """Evenly spaced: B, C and sigma in log (`bounds` in prior standard deviations), rho as it is. Jump and scale of D are always whole."""
    z_b, z_c, rho, z_sigma = (np.linspace(low, high, n) for (low, high), n in zip(bounds, sizes, strict=True))
    noise, noise_log_sd = (
        (priors.noise, priors.noise_log_sd) if score_se is None else (score_se, priors.noise_given_log_sd)
    )
    return _Grid(
        (
            priors.b_median * np.exp(priors.b_log_sd * z_b),
            priors.c_share * x_scale * np.exp(priors.c_log_sd * z_c),
            rho,
            noise * np.exp(noise_log_sd * z_sigma),
            np.array([0.0, 1.0]),
            np.array(priors.d_scales),
        ),
        (
            -0.5 * z_b**2,
            -0.5 * z_c**2,
            -0.5 * ((rho - priors.rho_mean) / priors.rho_sd) ** 2,
            -0.5 * z_sigma**2,
            np.log([priors.eps_zero, 1 - priors.eps_zero]),
            np.log(priors.d_weights),
        ),
    )


def _where_it_lies(log_weight: np.ndarray, bounds: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    """Of the first axes of a grid: the bounds of the values that have any weight to speak of, and one step more at each end."""
    weight = np.exp(log_weight - log_weight.max())
    total = weight.sum()
    found = []
    for axis, (low, high) in enumerate(bounds):
        marginal = weight.sum(tuple(other for other in range(weight.ndim) if other != axis)) / total
        has = np.flatnonzero(marginal > NEGLIGIBLE)
        grid = np.linspace(low, high, len(marginal))
        found.append((float(grid[max(has[0] - 1, 0)]), float(grid[min(has[-1] + 1, len(grid) - 1)])))
    return tuple(found)


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


def _normal_below(limit: np.ndarray, quantile: np.ndarray) -> np.ndarray:
    """Value at `quantile` of standard normals cut to (-inf, limit]; in logarithms, so that far tails keep their digits."""
    return ndtri_exp(np.log(np.maximum(quantile, 1e-12)) + log_ndtr(limit))
