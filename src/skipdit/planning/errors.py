"""What a cached step costs: errors measured in uncached runs, and the weights that make them least."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import numpy as np
from torch import Tensor

RIDGE = 1e-3  # of least squares, relative to the mean of the diagonal

T = TypeVar("T", float, Tensor)
Weights = tuple[tuple[float, ...] | None, ...]  # as a `CachePlan` has them


@dataclass
class Errors:
    """What uncached runs tell of every step that could be cached.

    Attributes:
        steps: T.
        reach: the largest distance of two full steps, and of the last one from the end of the run.
        grams: of every step but the first, inner products (F, F) of the errors that it has with the features of the F
            steps before it, times how much they move the images: a sample's squared error counts in units of its own
            under the even linear forecast, and their mean is taken.
        sensitivity: of every step, mean squared error of the images over that of the noise, the geometric mean over
            samples.
        memory: stored features that a cached step may use; schedules are chosen as if there were two at most.
    """

    steps: int
    reach: int
    grams: dict[int, np.ndarray] = field(default_factory=dict)
    sensitivity: list[float] = field(default_factory=list)
    memory: int = 2

    def __post_init__(self):
        self.cost = cache(self.cost)  # the same few are asked for again and again

    def best(self, full: Sequence[int], k: int) -> tuple[tuple[float, ...], float]:
        """The weights with which the features of these full steps, newest last, predict step k best, and what squared
        error is left."""
        gram, changes = self._seen(full, k)
        curvature = changes @ gram @ changes.T
        curvature += RIDGE * np.trace(curvature) / max(len(changes), 1) * np.eye(len(changes))
        weights = -np.linalg.pinv(curvature) @ (changes @ gram[0])
        return tuple(weights.tolist()), self.left(full, k, weights)

    def left(self, full: Sequence[int], k: int, weights: Sequence[float]) -> float:
        """The squared error at step k that is left with these weights."""
        gram, changes = self._seen(full, k)
        error = np.eye(len(gram))[0] + np.asarray(weights) @ changes[: len(weights)]
        return max(float(error @ gram @ error), 0.0)

    def _seen(self, full: Sequence[int], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Inner products of the errors that step k has with features, newest first, and the features' differences."""
        known = [j - k for j in reversed(full) if k - j <= len(self.grams[k])]
        each = np.eye(len(known))
        return self.grams[k][np.ix_(known, known)], each[:-1] - each[1:]

    def cost(self, full: tuple[int, ...], end: int) -> float:
        """Squared error of the images, in units as of `grams`, by the cached steps after these full ones, up to `end`.

        The errors of one feature are alike from step to step and add up; those of different features do not.
        """
        return sum(math.sqrt(self.best(full[-self.memory :], k)[1]) for k in range(full[-1] + 1, end)) ** 2

    def total(self, full: Sequence[int]) -> float:
        """The expected cost of a plan; infinite if it goes beyond the reach."""
        ends = [*full[1:], self.steps]
        if max(end - j for j, end in zip(full, ends, strict=True)) > self.reach:
            return math.inf
        return sum(self.cost(tuple(full[max(n - 1, 0) : n + 1]), end) for n, end in enumerate(ends))

    def weights(self, full: Sequence[int]) -> Weights:
        """The best ones for each step by itself."""
        return tuple(
            None if k in full else self.best([j for j in full if j < k][-self.memory :], k)[0]
            for k in range(self.steps)
        )

    def curve(self, weights: Weights) -> list[float]:
        """What each step of a plan adds by itself to the error of the images; 1 is that of the even forecast."""
        full = [k for k, several in enumerate(weights) if several is None]
        return [
            0.0 if several is None else math.sqrt(self.left([j for j in full if j < k], k, several))
            for k, several in enumerate(weights)
        ]
