"""Set of samples against set of samples, in the features of a network: KID, inception score, precision and recall.

The Fréchet distance is in `skipdit.metrics.frechet`.
"""

import torch
from torch import Tensor

from skipdit.utils.device import double
from skipdit.utils.errors import UserError

ROWS = 1024  # of a matrix of distances at once


def kid(
    features_a: Tensor, features_b: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance: the unbiased squared MMD under the kernel (x.y / D + 1)^3; below zero by chance only.

    Binkowski et al., arXiv 1801.01401, equation 4. Mean and standard deviation over random subsets, as it is usually
    reported; where a subset would be all of both sets, over that one.

    Args:
        features_a: (N, D).
        features_b: (M, D).
        subsets: how many subsets of each set.
        size: samples of a subset; smaller sets are taken whole.
        seed: of the choice of the subsets.

    Raises ValueError if a set has fewer than two samples, or if the D differ.
    """
    from torchmetrics.image.kid import poly_mmd  # here: it takes a second to import

    a, b = _pair(features_a, features_b)
    size = min(size, len(a), len(b))
    if size < 2:
        raise UserError(f"KID needs at least 2 samples of each set; there are {len(a)} and {len(b)}")
    subsets = 1 if size == len(a) == len(b) else subsets
    generator = torch.Generator().manual_seed(seed)
    values = [poly_mmd(_some(a, size, generator), _some(b, size, generator)) for _ in range(subsets)]
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


def _some(features: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return features[torch.randperm(len(features), generator=generator)[:size].to(features.device)]


def inception_score(logits: Tensor, split: int = 5000) -> tuple[float, float]:
    """exp E KL(p(y|x) || p(y)): 1 for predictions that are all alike, the number of classes at most.

    Salimans et al., arXiv 1606.03498. Mean and standard deviation over parts of 5,000 samples in order, as ADM's
    evaluation suite takes it; a set that is smaller is one part.

    Args:
        logits: (N, classes), any float type.
    """
    # Ours: that of torchmetrics draws its parts at random, and has the deviation of one part as NaN.
    log_p = double(torch.as_tensor(logits)).log_softmax(1)
    scores = []
    for part in log_p.split(split):
        marginal = part.logsumexp(0) - torch.tensor(float(len(part)), dtype=part.dtype).log()
        scores.append((part.exp() * (part - marginal).nan_to_num()).sum(1).mean().exp())  # 0 log 0 is 0
    values = torch.stack(scores)
    return values.mean().item(), values.std(correction=0).item()


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of samples that lie in the reference's manifold, and share of the reference that lies in the samples'.

    Kynkäänniemi et al., arXiv 1904.06991: a set's manifold is the union of balls around its members, each as large as
    the distance to the k-th nearest other one.

    Args:
        samples: features (N, D), N larger than k.
        reference: features (M, D), M larger than k.
        k: which of the nearest other members bounds a ball.

    Raises ValueError if a set is too small, or if the D differ.
    """
    a, b = _pair(samples, reference)
    if min(len(a), len(b)) <= k:
        raise UserError(f"precision and recall need more than {k} samples of each set; there are {len(a)}, {len(b)}")
    return _share_within(a, b, k), _share_within(b, a, k)


def _share_within(points: Tensor, members: Tensor, k: int) -> float:
    """Share of points (N, D) in the manifold of members (M, D)."""
    # The nearest one is the member itself, at distance zero.
    radii = torch.cat([_distances(rows, members).kthvalue(k + 1).values for rows in members.split(ROWS)])
    within = [(_distances(rows, members) <= radii).any(1) for rows in points.split(ROWS)]
    return torch.cat(within).double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, (n, D) and (m, D) -> (n, m)."""
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in float64."""
    a, b = (double(torch.as_tensor(x)) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features are {tuple(a.shape)} and {tuple(b.shape)}; they must be (N, D) and (M, D)")
    return a, b
