"""The posterior of one RL curve's sigmoid, summed exactly on a grid and returned as weighted draws (model: fit.py)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from scipy.special import log_ndtr, ndtri, ndtri_exp
from scipy.stats import qmc

DRAWS = 4096  # a power of two, as Sobol points need; with this many a quantile of A varies by less than 0.02 sd
Z = 3.0  # the grid reaches this many prior standard deviations
RHO_MAX = 0.8
COARSE, FINE = (13, 19, 4, 7), (17, 25, 5, 9)  # grid points along B, C, rho, sigma
NEGLIGIBLE = 1e-4  # share of the posterior that the fine grid may omit at an end of an axis

Bounds = tuple[tuple[float, float], ...]  # (low, high) of each axis


@dataclass(frozen=True)
class Priors:
    """The priors. They are the same for every curve and were frozen before new curves were looked at."""

    b_median: float = 1.5
    b_log_sd: float = 0.7
    c_share: float = 0.25  # median of C as a share of the largest x used
    c_log_sd: float = 1.05
    # D is half-normal with one of these scales (points): most RL gains are a few points, a weak start can gain tens.
    d_scales: tuple[float, ...] = (6.0, 20.0)
    d_weights: tuple[float, ...] = (0.85, 0.15)
    eps_zero: float = 0.85  # probability of no jump at the switch point
    eps_mean: float = 1.6  # otherwise the jump is normal, points
    eps_sd: float = 1.2
    noise: float = 0.5  # median of sigma if the standard error of the scores is not given, points
    noise_log_sd: float = 0.5
    # A given standard error is binomial: an upper bound, as the problems stay the same and only the sampling differs.
    noise_given_log_sd: float = 0.4
    p_sft_se: float = 0.5  # if not given, points
    rho_mean: float = 0.3
    rho_sd: float = 0.3


@dataclass(frozen=True)
class Draws:
    """Weighted draws of the parameters, each float64 [DRAWS].

    L, D, eps and sigma are in points, C in EFLOPs. The weights sum to 1.
    """

    l: np.ndarray  # noqa: E741 (the model's letter)
    d: np.ndarray
    b: np.ndarray
    c: np.ndarray
    eps: np.ndarray
    sigma: np.ndarray
    rho: np.ndarray
    noise: np.ndarray  # standard normals, independent of the rest; times sigma they are the noise of a measured score
    weight: np.ndarray

    def quantiles(self, values: np.ndarray, quantiles: tuple[float, ...]) -> np.ndarray:
        """Return quantiles of `values` [DRAWS], interpolated between the midpoints of the cumulative weight."""
        order = np.argsort(values, kind="stable")
        weight = self.weight[order]
        return np.interp(quantiles, np.cumsum(weight) - weight / 2, values[order])

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Return the noiseless scores [n, DRAWS] at `x` [n] EFLOPs."""
        return self.l + self.d * rise(x[:, None], self.b, self.c)


def rise(x: np.ndarray, b: np.ndarray | float, c: np.ndarray | float) -> np.ndarray:
    """Return s(x) = 1 / (1 + (x / C)^-B), broadcast; 0 at x = 0."""
    with np.errstate(divide="ignore"):
        exponent = -b * (np.log(x) - np.log(c))
    return 1.0 / (1.0 + np.exp(np.minimum(exponent, 700.0)))  # exp(710) overflows


@dataclass(frozen=True)
class _Grid:
    """The values and log prior weights of each axis: B, C, rho, sigma, jump (0: eps = 0, 1: eps > 0), scale of D."""

    values: tuple[np.ndarray, ...]
    log_prior: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _Cells:
    """The log posterior weight of each grid cell, and the normal of (u, D) in it before the cuts.

    Each array has the shape of the grid or broadcasts to it.
    """

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
    """Draw from the posterior given the used points `x` and `y` [n]; with n = 0 from the prior around P_sft.

    `x_scale` > 0 sets the prior of C. In each cell of the grid over B, C, rho, sigma, jump and scale of D, the
    posterior of (u, D), u = L - P_sft, is a bivariate normal in closed form, cut to D > 0 and
    u + D <= `max_score` - P_sft. A coarse grid over everything the prior allows finds the region with weight; the draws
    come from a fine grid over that region.
    """
    bounds: Bounds = ((-Z, Z), (-Z, Z), (0.0, RHO_MAX), (-Z, Z))
    p_sft_se, top = p_sft_se or priors.p_sft_se, max_score - p_sft
    for sizes in (COARSE, FINE):
        grid = _grid(bounds, sizes, x_scale, score_se, priors)
        cells = _posterior(grid, x, y - p_sft, top, p_sft_se, priors)
        bounds = _bounds_of_weight(cells.log_weight, bounds)
    return _draw_from(grid, cells, p_sft, top, p_sft_se, priors)


def _posterior(grid: _Grid, x: np.ndarray, residual: np.ndarray, top: float, p_sft_se: float, priors: Priors) -> _Cells:
    grid_b, grid_c, grid_rho = grid.values[:3]
    _, _, _, sigma, jump, scale = np.ix_(*grid.values)
    shapes = rise(x, grid_b[:, None, None], grid_c[:, None])  # [B, C, n]
    ss, s1, sr, one1, one_r, rr, log_det = _whitened_products(shapes, residual, grid_rho)

    # u ~ N(eps, p_sft_se^2), because P_sft is a reading and not the truth. D is the positive half of N(0, scale^2).
    eps = jump * priors.eps_mean
    prior_u = 1 / (p_sft_se**2 + jump * priors.eps_sd**2)
    prior_d = 1 / scale**2
    variance = sigma**2
    precision_u = one1 / variance + prior_u
    precision_ud = s1 / variance
    precision_d = ss / variance + prior_d
    linear_u = one_r / variance + eps * prior_u
    linear_d = sr / variance
    determinant = precision_u * precision_d - precision_ud**2
    var_u = precision_d / determinant
    var_d = precision_u / determinant
    cov = -precision_ud / determinant
    mean_u = var_u * linear_u + cov * linear_d
    mean_d = var_d * linear_d + cov * linear_u

    quadratic = linear_u * mean_u + linear_d * mean_d - rr / variance - eps**2 * prior_u
    log_dets = log_det - np.log(determinant) + np.log(prior_u) + np.log(prior_d)
    log_evidence = 0.5 * (quadratic + log_dets) - len(x) * np.log(sigma)
    log_positive = log_ndtr(mean_d / np.sqrt(var_d))
    log_below_top = log_ndtr((top - mean_u - mean_d) / np.sqrt(var_u + var_d + 2 * cov))
    log_inside = log_positive + log_below_top
    log_weight = log_evidence + log_inside + sum(np.ix_(*grid.log_prior))
    return _Cells(log_weight, log_inside, mean_u, mean_d, var_u, var_d, cov)


def _draw_from(grid: _Grid, cells: _Cells, p_sft: float, top: float, p_sft_se: float, priors: Priors) -> Draws:
    """Map each point of the unit cube to a cell, then D, then u given D, and a noise value.

    D and u come from their inverse distribution functions, each cut at its bound. The weight of a cell treats the two
    cuts as independent; the weight of the draw corrects for that.
    """
    cube = _cube()
    shape = cells.log_weight.shape
    cumulative = np.cumsum(np.exp(cells.log_weight - cells.log_weight.max()))
    flat_cell = np.searchsorted(cumulative, cube[:, 0] * cumulative[-1], side="right").clip(max=len(cumulative) - 1)
    cell = np.unravel_index(flat_cell, shape)

    def at(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values, shape)[cell]

    mean_d = at(cells.mean_d)
    var_d = at(cells.var_d)
    cov = at(cells.cov)
    sd_d = np.sqrt(var_d)
    d = mean_d - sd_d * _normal_below(mean_d / sd_d, cube[:, 1])  # D > 0
    u_mean = at(cells.mean_u) + cov / var_d * (d - mean_d)
    u_sd = np.sqrt(np.maximum(at(cells.var_u) - cov**2 / var_d, 1e-12))
    limit = (top - d - u_mean) / u_sd
    u = u_mean + u_sd * _normal_below(limit, cube[:, 2])  # u + D <= top
    log_draw = log_ndtr(mean_d / sd_d) + log_ndtr(limit) - at(cells.log_inside)
    weight = np.exp(log_draw - log_draw.max())
    b, c, rho, sigma, jump, _ = (values[index] for values, index in zip(grid.values, cell, strict=True))
    # u is the sum of eps and the error of P_sft: take the mean of eps given u.
    eps_given_u = priors.eps_mean + (u - priors.eps_mean) * priors.eps_sd**2 / (priors.eps_sd**2 + p_sft_se**2)
    eps = jump * np.maximum(eps_given_u, 0.0)
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


def _grid(bounds: Bounds, sizes: tuple[int, ...], x_scale: float, score_se: float | None, priors: Priors) -> _Grid:
    """Build the grid: B, C and sigma evenly spaced in log (bounds in prior sd), rho evenly spaced as it is.

    The axes of the jump and of the scale of D always have all their values.
    """
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


def _bounds_of_weight(log_weight: np.ndarray, bounds: Bounds) -> Bounds:
    """Return the range with non-negligible weight for each of the first axes, one grid step wider at each end."""
    weight = np.exp(log_weight - log_weight.max())
    total = weight.sum()
    narrowed = []
    for axis, (low, high) in enumerate(bounds):
        marginal = weight.sum(tuple(other for other in range(weight.ndim) if other != axis)) / total
        weighty = np.flatnonzero(marginal > NEGLIGIBLE)
        grid = np.linspace(low, high, len(marginal))
        first, last = max(weighty[0] - 1, 0), min(weighty[-1] + 1, len(grid) - 1)
        narrowed.append((float(grid[first]), float(grid[last])))
    return tuple(narrowed)


def _whitened_products(shapes: np.ndarray, residual: np.ndarray, grid_rho: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return inner products of s [B, C, n], 1 and the residual [n] after whitening AR(1) noise of unit sd.

    Returns ss, s1, sr, 11, 1r, rr and the log determinant of the noise precision, each broadcastable to
    [B, C, rho, 1, 1, 1].
    """
    per_rho = []
    for rho in grid_rho:
        scale = 1.0 / np.sqrt(1.0 - rho**2)
        s = _whiten(shapes, rho, scale)
        ones = _whiten(np.ones_like(residual), rho, scale)
        r = _whiten(residual, rho, scale)
        log_det = max(len(r) - 1, 0) * 2 * np.log(scale)
        products = ((s * s).sum(-1), s @ ones, s @ r, ones @ ones, ones @ r, r @ r, log_det)
        per_rho.append([np.broadcast_to(product, shapes.shape[:2]) for product in products])
    return tuple(np.stack(values, axis=-1)[..., None, None, None] for values in zip(*per_rho, strict=True))


def _whiten(values: np.ndarray, rho: float, scale: float) -> np.ndarray:
    return np.concatenate([values[..., :1], (values[..., 1:] - rho * values[..., :-1]) * scale], axis=-1)


def _normal_below(limit: np.ndarray, quantile: np.ndarray) -> np.ndarray:
    """Return the `quantile` of standard normals cut to (-inf, limit]. Logarithms keep the digits of far tails."""
    return ndtri_exp(np.log(np.maximum(quantile, 1e-12)) + log_ndtr(limit))
