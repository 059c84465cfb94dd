"""What one model call sees of the cache, and what it leaves."""

from collections.abc import Callable

import torch
from torch import Tensor


class CacheStep:
    """The cache of one model call: a mailbox, so that it compiles.

    Attributes:
        branch: b, how many outer layers a cached pass runs.
        feature: the input of layer L-b to use instead of the middle layers; None makes the pass a full one.
        forecast: the output of the whole model to return without running anything; None on other steps.
        correction: (gain, rest), float32, which make the call return gain * output + rest; None returns the output.
        kept_feature: set by a full pass to its own input of layer L-b.
        kept_output: set by a pass that runs to its output, uncorrected.
        memory: what a full pass leaves for later steps of its stream besides; see `CachePolicy.step`.
    """

    __slots__ = ("branch", "correction", "feature", "forecast", "kept_feature", "kept_output", "memory")

    def __init__(self, branch: int, feature: Tensor | None):
        self.branch = branch
        self.feature = feature
        self.forecast: Tensor | None = None
        self.correction: tuple[Tensor, Tensor] | None = None
        self.kept_feature: Tensor | None = None
        self.kept_output: Tensor | None = None
        self.memory: Tensor | None = None

    @property
    def may_be_full(self) -> bool:
        """Whether the middle layers may run, as far as is known before the call."""
        return self.feature is None and self.forecast is None

    def is_full(self, shallow: Tensor) -> bool:
        """Whether the middle layers run. `shallow` is the output of the first `branch` layers."""
        return self.feature is None

    def finish(self, output: Tensor) -> Tensor:
        """Keep the model's output, and return what the call returns."""
        self.kept_output = output
        if self.correction is None:
            return output
        gain, rest = self.correction
        return torch.addcmul(rest, output.float(), gain).to(output.dtype)


class DriftStep(CacheStep):
    """A call that decides by itself, from how far its shallow feature has moved; it waits for the device.

    Attributes:
        before: the shallow feature of the last full step; `memory` is that of this one.
        threshold: see `DriftSpec`.
        on_full: called if it is a full one.
    """

    __slots__ = ("before", "on_full", "threshold")

    def __init__(
        self,
        branch: int,
        feature: Tensor | None,
        before: Tensor | None,
        threshold: float,
        on_full: Callable[[], None],
    ):
        super().__init__(branch, feature)
        self.before, self.threshold, self.on_full = before, threshold, on_full

    @property
    def may_be_full(self) -> bool:
        return True

    def is_full(self, shallow: Tensor) -> bool:
        full = self.feature is None
        if not full:
            dtype = torch.promote_types(shallow.dtype, torch.float32)  # float16 overflows in a norm
            moved, norm = (torch.linalg.vector_norm(x, dtype=dtype) for x in (shallow - self.before, self.before))
            full = (moved / norm).item() > self.threshold
        if full:
            self.memory = shallow
            self.on_full()
        return full
