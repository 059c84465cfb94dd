"""Set of images against set of images: the Fréchet distance between Gaussians fitted to their features.

With the features of the Inception network this is the FID (Heusel et al., arXiv 1706.08500).
"""

import torch
from torch import Tensor

from skipdit.utils.errors import UserError


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features.

    The fit makes it larger for few samples, by about 1/N, so compare only numbers of the same N; with N <= D the
    covariances are singular, which is allowed, and the bias is large.

    Args:
        features_a: (N, D), a tensor or array of any float type.
        features_b: (M, D), likewise; N and M may differ.

    Raises ValueError if a set has fewer than two samples or non-finite features, or if the D differ.
    """
    return gaussian_frechet_distance(*moments(features_a), *moments(features_b))


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), float64. Raises ValueError as `frechet_distance`."""
    features = torch.as_tensor(features, dtype=torch.float64)
    if features.ndim != 2:
        raise ValueError(f"features are {tuple(features.shape)}; they must be (samples, dimensions)")
    if len(features) < 2:
        raise UserError(f"a covariance needs at least 2 samples; there are {len(features)}")
    if not torch.isfinite(features).all():
        raise UserError("features are not finite")
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def gaussian_frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians: |mean_a - mean_b|^2 + tr(A + B - 2 (AB)^(1/2)).

    The product AB is not symmetric and its matrix root is ill-conditioned where a covariance is singular, so no matrix
    root is taken. With A = F F' and B = G G', the eigenvalues of AB are those of the symmetric F' B F = (F'G)(F'G)', so
    the trace of the root is the sum of the singular values of F'G: real and non-negative for any covariances.
    (Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982.)

    Args:
        mean_a: (D,).
        cov_a: (D, D), symmetric, possibly singular.
        mean_b: as mean_a.
        cov_b: as cov_a.

    Raises ValueError if the shapes do not fit each other.
    """
    mean_a, cov_a, mean_b, cov_b = (torch.as_tensor(x, dtype=torch.float64) for x in (mean_a, cov_a, mean_b, cov_b))
    size = mean_a.numel()
    if mean_a.shape != (size,) or mean_b.shape != (size,) or cov_a.shape != (size, size) or cov_b.shape != (size, size):
        raise UserError(
            f"means {tuple(mean_a.shape)}, {tuple(mean_b.shape)} and covariances {tuple(cov_a.shape)}, "
            f"{tuple(cov_b.shape)} do not fit each other; they must be (D,) and (D, D) of one D"
        )
    overlap = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return max(distance.item(), 0.0)  # rounding may leave equal Gaussians just below zero


def _factor(covariance: Tensor) -> Tensor:
    """F (D, D) with covariance = F F'. Eigenvalues that are rounding noise, of either sign, count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return vectors * torch.where(values > noise, values, 0.0).sqrt()
