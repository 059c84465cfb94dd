"""The joint fit: weights of all cached steps together, so that their errors cancel."""

import torch
from tqdm import tqdm

from skipdit.planning.calibration import NUDGE, TINY, Bench
from skipdit.planning.errors import Weights
from skipdit.planning.schedules import moved

DAMPING = (0.02, 0.1)  # the same, of the joint fit; what measures better is taken
PIXELS = 2**16  # of every sample, drawn at random, that the joint fit looks at


def fit(bench: Bench, weights: Weights, rounds: int) -> Weights:
    """All weights together, so that the errors of the steps cancel in the images: Gauss-Newton.

    Each round runs the plan once per weight, with that one moved. Every sample counts by its error relative to what it
    is now, which lowers the mean of logarithms. What does not measure better is not taken.
    """
    places = [(k, m) for k, several in enumerate(weights) for m in range(len(several or ()))]
    some = torch.randperm(bench.reference[0][0].numel(), generator=torch.Generator().manual_seed(0))[:PIXELS]

    with tqdm(total=rounds * (1 + len(places)), desc="fitting all weights together", unit="run") as progress:
        for _ in range(rounds if places else 0):
            runs = []
            for changes in bench.nudged(weights, places):
                runs.append(torch.cat([change.flatten(1)[:, some] for change in changes]))
                progress.update()
            now, *others = runs
            scale = now.norm(dim=1, keepdim=True).clamp_min(TINY).reciprocal()
            slopes = [(other - now) / NUDGE * scale for other in others]
            curvature, slope = 0, 0
            for target, columns in zip(now * scale, zip(*slopes, strict=True), strict=True):  # of each sample
                rows = torch.stack(columns).double()
                curvature, slope = curvature + rows @ rows.T, slope + rows @ target.double()
            tries = [weights]
            for damping in DAMPING:
                ridge = damping * curvature.diagonal().mean() * torch.eye(len(places), dtype=curvature.dtype)
                tries.append(moved(weights, places, (-torch.linalg.solve(curvature + ridge, slope)).tolist()))
            best = min(tries, key=lambda tried: bench.error(bench.plan(tried)))
            if best is weights:
                break
            weights = best
    return weights
