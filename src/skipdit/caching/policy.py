"""The base class of caching policies: which sampling steps run every layer, and what the others use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds, and a policy can be read without it
    from torch import Tensor

    from skipdit.caching.steps import CacheStep

FULL, CACHED, FORECAST = "F", "S", "O"  # kinds of steps, as a plan's file has them
NAMES = {FULL: "full", CACHED: "cached", FORECAST: "forecast"}


class CachePolicy(ABC):
    """Which steps of a sampling run are full, and what the others use instead.

    A full step (F) runs every layer. A cached step (S, for shallow) runs the outer ones, on a stored feature in place
    of what the middle would compute. A forecast step (O, for output) runs none: the model's output is extrapolated from
    earlier ones.

    A policy of your own needs `full_mask`, and works wherever a cache is asked for:

        class FirstAndLast(CachePolicy):
            def full_mask(self, timesteps):
                return [i in (0, len(timesteps) - 1) for i in range(len(timesteps))]

        cache = SkipCache(FirstAndLast(), timesteps)
        enable_cache(pipe, FirstAndLast())

    Attributes:
        branch: b, the number of outer layers on each side that a cached step runs; with 0, there are forecast steps
            instead.
        order: how many differences of stored features, or outputs, may be added to the last one; 0 reuses that.
        adaptive: whether steps decide at run time. Such a policy cannot be compiled, and its cost is not known before.
    """

    branch: int = 1
    order: int = 0
    adaptive: bool = False

    @abstractmethod
    def full_mask(self, timesteps: Sequence[float]) -> list[bool]:
        """Return True for each step that is full, the first one at least.

        Args:
            timesteps: of the run, in sampling order.

        Raises ValueError for timesteps that it is not for.
        """

    @property
    def caches(self) -> bool:
        """Whether any step may be cached."""
        return True

    @property
    def feature_order(self) -> int:
        """`order`, of features alone."""
        return self.order

    @property
    def label(self) -> str:
        """A short name for tables."""
        return str(self)

    @property
    def window(self) -> str:
        """The timesteps between which steps are cached, where the policy has some."""
        return ""

    @property
    def calibration_seed(self) -> int | None:
        """The seed of the samples that the policy was fitted on; None if it was not."""
        return None

    def step_kinds(self, timesteps: Sequence[float]) -> str:
        """Return the kind of each step: F, S or O. Arguments and errors as of `full_mask`."""
        other = CACHED if self.branch else FORECAST
        return "".join(FULL if full else other for full in self.full_mask(timesteps))

    @property
    def target(self) -> str | None:
        """What the images of a fitted policy should be: "sampler", those of the uncached run, or "converged"."""
        return None

    def coefficients(self, i: int, known: tuple[int, ...]) -> Sequence[float]:
        """Return the coefficients u, v, ... of cached step i, at most `order`: it uses f0 + u (f0 - f1) + v (f1 - f2)
        + ... of the last features, f0 the newest. By default those of a linear extrapolation.

        Args:
            known: the steps whose features are stored, newest last, at most `order` + 1.
        """
        return linear_coefficients(i, known) if self.order else ()

    def output_coefficients(self, i: int, known: tuple[int, ...]) -> Sequence[float]:
        """Return the coefficients by which step i combines outputs of the model as `coefficients` does features: those
        of earlier steps if it is a forecast, else its own and theirs. By default a forecast extrapolates linearly, and
        every other step returns its own output.

        Args:
            known: the steps whose outputs are there, i among them unless it is a forecast, newest last.
        """
        return linear_coefficients(i, known) if self.order and i not in known else ()

    def oldest(self, i: int, full_mask: Sequence[bool]) -> int:
        """Return the oldest step whose feature step i may use; by default the last full one."""
        return max(j for j in range(i + 1) if full_mask[j])

    def step(self, feature: Tensor | None, memory: Tensor | None, on_full: Callable[[], None]) -> CacheStep:
        """Return the cache of one model call.

        Args:
            feature: what a cached step uses; None if nothing is stored, or the step is to be full.
            memory: `CacheStep.memory` of the stream's last full step.
            on_full: an adaptive step calls it if it decides to be full.
        """
        from skipdit.caching.steps import CacheStep

        return CacheStep(self.branch, feature)

    def check_pipeline(self, sketch: Callable[[], str | None]) -> None:  # noqa: B027 (most are for anything)
        """Warn if the policy was made for another pipeline's models.

        Args:
            sketch: returns `utils.provenance.sketch` of these models.
        """

    def check(self, model: str, sampler: str, guidance_scale: float) -> None:  # noqa: B027 (most are for anything)
        """Warn if the policy was made for something else.

        Args:
            model: fingerprint of the weights.
        """


def known_outputs(kinds: str, i: int) -> tuple[int, ...]:
    """The steps whose outputs step i may use: its own, unless it is a forecast, and those before it."""
    return tuple(j for j in range(i + 1) if kinds[j] != FORECAST)


def linear_coefficients(i: int, known: Sequence[int]) -> tuple[float, ...]:
    """How far step i lies ahead of the last two of these steps, in units of their distance; none of one step."""
    return ((i - known[-1]) / (known[-1] - known[-2]),) if len(known) > 1 else ()
