"""What every baseline is: a context in which a model's calls are the steps of a run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

from torch import Tensor

from skipdit.layers.inspect import replaced
from skipdit.layers.skip import SkipTransformer
from skipdit.utils.errors import UserError


class Run:
    """What a baseline does while its context lasts.

    Attributes:
        timesteps: of a run, in sampling order.
        step: index of the model call that runs now, or ran last.
        full, partial: calls so far that computed everything, and those that left something out.
        kept: tensors from earlier steps of this run.
        state: numbers from earlier steps of this run.
        setup: what the baseline prepared for all runs.
        peak_bytes: the most memory that what was kept took.
    """

    def __init__(self, timesteps: Sequence[float]):
        self.timesteps = list(timesteps)
        self.step, self.full, self.partial, self.peak_bytes = -1, 0, 0, 0
        self.kept: dict[Any, Tensor] = {}
        self.state: dict[str, Any] = {}
        self.setup: dict[str, Any] = {}
        self._left_out, self._rows = False, 0

    def left_out(self) -> None:
        """This call does not compute everything."""
        self._left_out = True

    def _begin(self, rows: int) -> None:
        self.step = (self.step + 1) % len(self.timesteps)
        if self.step == 0:
            self._forget()
            self._rows = rows
        if rows != self._rows:
            raise UserError(
                f"the model is called with {rows} rows at step {self.step}, and was with {self._rows} before: "
                "baselines need guidance at all steps or none (guidance_low=0, guidance_high=1000)"
            )

    def _end(self, bytes_elsewhere: int) -> None:
        self.full, self.partial = self.full + (not self._left_out), self.partial + self._left_out
        self._left_out = False
        self.peak_bytes = max(self.peak_bytes, sum(tensor.nbytes for tensor in self.kept.values()) + bytes_elsewhere)
        if self.step == len(self.timesteps) - 1:
            self._forget()

    def _forget(self) -> None:
        self.kept.clear()
        self.state.clear()

    def _abandon(self) -> None:
        """A call broke off: the next one begins a new run."""
        self.step, self._left_out = -1, False
        self._forget()


@dataclass(frozen=True)
class Baseline(ABC):
    """A caching method with its settings.

    Attributes:
        static: whether what a step leaves out is known before the run; the others measure, and decide per batch.
    """

    static: ClassVar[bool] = True

    @contextmanager
    def on(self, model: SkipTransformer, timesteps: Sequence[float]) -> Iterator[Run]:
        """Sample with this method while the context lasts.

        Args:
            model: in eval mode, not compiled; called once per step.
            timesteps: of every run, in sampling order.

        Raises ValueError if the model is compiled or does not fit the settings; in its calls, if Skip-Cache is on, too.
        """
        if model._compiled_call_impl is not None:
            raise UserError("baselines replace parts of the model, and this one is compiled: set compile=none")
        run, original = Run(timesteps), model.forward

        @wraps(original)
        def forward(*args, **kwargs):
            if kwargs.get("cache") is not None:
                raise UserError(f"{self} is on, and so is Skip-Cache: set cache=none")
            try:
                run._begin(len(args[0] if args else kwargs.get("x", kwargs.get("hidden_states"))))
                out = self._call(run, original, args, kwargs)
                run._end(self._bytes_elsewhere(run))
            except BaseException:
                run._abandon()
                raise
            return out

        with ExitStack() as stack:
            for replacement in (*self._replacements(model, run), replaced(model, "forward", forward)):
                stack.enter_context(replacement)
            stack.callback(run._forget)
            yield run

    @abstractmethod
    def _replacements(self, model: SkipTransformer, run: Run) -> list[AbstractContextManager]:
        """Contexts in which parts of the model do something else."""

    def _call(self, run: Run, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """The model call of a step."""
        return forward(*args, **kwargs)

    def _bytes_elsewhere(self, run: Run) -> int:
        """Memory of what is kept, but not in `run.kept`."""
        return 0
