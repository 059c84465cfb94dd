"""Plans: policies made by measurement, for the timesteps of one kind of run."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skipdit.caching.policy import CACHED, FORECAST, FULL, CachePolicy, known_outputs, linear_coefficients
from skipdit.utils.errors import UserError


@dataclass(frozen=True)
class CachePlan(CachePolicy):
    """A policy for the timesteps of one kind of run, made by `skipdit plan`.

    With the coefficients u, v, ... a step uses f0 + u (f0 - f1) + v (f1 - f2) + ... in place of f0, where f0, f1, ...
    are what is stored, newest first. None reuse f0; one that is the number of steps since f0 over the distance of f0
    and f1 is a linear extrapolation.

    Attributes:
        timesteps: of the run, in sampling order.
        features: per step, the coefficients by which a cached step combines the features of full steps, and None
            for steps that use none.
        branch: b, as in `CacheSpec`.
        kinds: per step F (full), S (cached) or O (forecast), see `CachePolicy`; empty: every step without
            `features` is full.
        outputs: per step, the coefficients by which it combines outputs of the model: a forecast those of earlier
            steps that were full or cached, others their own and those. Empty: none at any step.
        about: what it was made from, and what was measured: `model` has the fingerprint of the weights.
        source: the file.
    """

    timesteps: tuple[float, ...]
    features: tuple[tuple[float, ...] | None, ...]
    branch: int = 1
    kinds: str = ""
    outputs: tuple[tuple[float, ...], ...] = ()
    about: dict[str, Any] = field(default_factory=dict, compare=False)
    source: str = field(default="a plan", compare=False)

    def __post_init__(self):
        steps = len(self.timesteps)
        if not self.kinds:
            object.__setattr__(self, "kinds", "".join(FULL if ws is None else CACHED for ws in self.features))
        if not self.outputs:
            object.__setattr__(self, "outputs", ((),) * steps)
        for name in ("features", "kinds", "outputs"):
            if len(getattr(self, name)) != steps or not steps:
                raise UserError(f"{self.source} has {len(getattr(self, name))} {name} for {steps} timesteps")
        if self.branch < 0:
            raise UserError(f"{self.source}: branch is {self.branch}; it must be 0, which runs no layer, or more")
        if bad := set(self.kinds) - {FULL, CACHED, FORECAST}:
            raise UserError(
                f"{self.source}: a step is of kind {min(bad)!r}; it is F (full), S (cached) or O (forecast)"
            )
        if CACHED in self.kinds and not self.branch:
            raise UserError(f"{self.source}: branch is 0; cached steps need one of at least 1")
        numbers = [w for ws in (*self.features, *self.outputs) for w in ws or ()]
        if self.kinds[0] != FULL or not all(map(math.isfinite, numbers)):
            raise UserError(f"{self.source}: the first step must be full, and all coefficients finite numbers")
        for i, (kind, features) in enumerate(zip(self.kinds, self.features, strict=True)):
            if (kind == CACHED) != (features is not None):
                raise UserError(f"{self.source}: step {i} is of kind {kind}; cached steps alone have features")
            full, known = self._full(i), known_outputs(self.kinds, i)
            for name, own, stored in (("features", features or (), full), ("outputs", self.outputs[i], known)):
                if len(own) >= max(len(stored), 1):
                    raise UserError(f"{self.source}: step {i} has {len(own)} coefficients for {len(stored)} {name}")

    def _full(self, i: int) -> tuple[int, ...]:
        """The full steps before step i, whose features it may use."""
        return tuple(j for j in range(i) if self.kinds[j] == FULL)

    @classmethod
    def load(cls, file: str | Path) -> CachePlan:
        """Read a plan. Raises FileNotFoundError, or ValueError for a file that is none; both name it."""
        if not Path(file).is_file():
            raise FileNotFoundError(f"no plan {file}; `skipdit plan --help` tells how to make one")
        try:
            about = json.loads(Path(file).read_text(encoding="utf-8"))
            if "weights" in about:  # of version 0.1, without forecast steps
                about |= {"features": about.pop("weights"), "kinds": "", "outputs": []}
            names = ("timesteps", "features", "branch", "kinds", "outputs")
            timesteps, features, branch, kinds, outputs = (about.pop(key) for key in names)
            per_step = tuple(None if ws is None else _numbers(ws) for ws in _listed(features))
            about.get("calibration", {}).get("seed")
            read = _numbers(timesteps), per_step, _whole(branch), _text(kinds), tuple(map(_numbers, _listed(outputs)))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UserError(f"{file} is not a plan of `skipdit plan`: {error!r}") from error
        return cls(*read, about, str(file))

    def save(self, file: str | Path) -> None:
        """Write it as JSON, a line per entry."""
        own = {"branch": self.branch, "timesteps": self.timesteps, "kinds": self.kinds}
        own |= {"features": self.features, "outputs": self.outputs}
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in (self.about | own).items())
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    def check_pipeline(self, sketch: Callable[[], str | None]) -> None:
        made_for = self.about.get("pipeline_models")
        if made_for is not None and (own := sketch()) is not None and own != made_for:
            warnings.warn(
                f"{self.source} was made for other weights than this pipeline has: skipdit plan --pipeline makes a "
                "plan for these",
                stacklevel=3,
            )

    def check(self, model: str, sampler: str, guidance_scale: float) -> None:
        """Warn if it was made for something else.

        Args:
            model: fingerprint of the weights.
        """
        now = {"model": model, "sampler": sampler, "guidance_scale": guidance_scale}
        differ = [
            f"{key} {self.about[key]}, not {now[key]}" for key in now if self.about.get(key, now[key]) != now[key]
        ]
        if differ:
            warnings.warn(
                f"{self.source} was made for {'; '.join(differ)} (a model in float16 counts as another one); "
                "skipdit plan makes a plan for this run",
                stacklevel=3,
            )

    @property
    def label(self) -> str:
        return Path(self.source).stem

    @property
    def target(self) -> str | None:
        return self.about.get("target", "sampler")

    @property
    def calibration_seed(self) -> int | None:
        return self.about.get("calibration", {}).get("seed")

    def __str__(self) -> str:
        own: list = [self.timesteps, self.features, self.branch]
        if any(self.outputs) or FORECAST in self.kinds:  # plans of version 0.1 keep their names
            own += [self.kinds, self.outputs]
        digest = hashlib.sha256(json.dumps(own).encode()).hexdigest()[:12]
        return f"plan of {self.kinds.count(FULL)}/{len(self.timesteps)} full steps {digest}"

    @property
    def order(self) -> int:
        """The most coefficients of a step."""
        return max(len(ws or ()) for ws in (*self.features, *self.outputs))

    @property
    def feature_order(self) -> int:
        return max(len(ws or ()) for ws in self.features)

    @property
    def caches(self) -> bool:
        """Whether any step is not full."""
        return self.kinds.count(FULL) < len(self.timesteps)

    def full_mask(self, timesteps: Sequence[float]) -> list[bool]:
        """True where a step is full. Raises ValueError for other timesteps than the plan's own."""
        return [kind == FULL for kind in self.step_kinds(timesteps)]

    def step_kinds(self, timesteps: Sequence[float]) -> str:
        """The kind of each step. Raises ValueError for other timesteps than the plan's own."""
        if list(timesteps) != list(self.timesteps):
            told = (f"{len(ts)} steps from {ts[0]:g} to {ts[-1]:g}" for ts in (self.timesteps, list(timesteps)))
            raise UserError(
                "{} is for {}; this run has {}: make one for it with skipdit plan".format(self.source, *told)
            )
        return self.kinds

    def coefficients(self, i: int, known: tuple[int, ...]) -> Sequence[float]:
        """Those of step i; if a stream sat out one of the plan's full steps, those of a linear extrapolation."""
        used = 1 + len(self.features[i])
        return self.features[i] if self._full(i)[-used:] == known[-used:] else linear_coefficients(i, known)

    def output_coefficients(self, i: int, known: tuple[int, ...]) -> Sequence[float]:
        """Those of step i; if a stream sat out one that it needs, those of a linear extrapolation, or none."""
        used = 1 + len(self.outputs[i])
        if known_outputs(self.kinds, i)[-used:] == known[-used:]:
            return self.outputs[i]
        return linear_coefficients(i, known) if self.kinds[i] == FORECAST else ()


def _listed(value: Any) -> list:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.60} is no list")
    return value


def _numbers(values: Any) -> tuple[float, ...]:
    """Of JSON. A text of digits would pass as several numbers."""
    if bad := [value for value in _listed(values) if type(value) not in (int, float)]:
        raise TypeError(f"{bad[0]!r:.60} is no number")
    return tuple(map(float, values))


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r:.60} is no whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    return value
