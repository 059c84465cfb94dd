"""The fit: a run of a schedule whose coefficients are chosen step by step, each to end where the target is.

A step's output is combined with earlier ones, and a cached step's feature with earlier ones, by coefficients. Samplers
are linear in the model's output, so a table of numbers, `Sampler.response`, says where any outputs lead. At every step,
least squares over all calibration samples finds the coefficients that bring the latents after it nearest to the
target's. Later steps make up for the errors of earlier ones.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from skipdit.caching.policy import CACHED, FORECAST, FULL
from skipdit.caching.runtime import combined
from skipdit.caching.steps import CacheStep
from skipdit.layers.skip import SkipTransformer, predicted_noise
from skipdit.planning.schedules import common_start
from skipdit.sampling.sampler import Sampler
from skipdit.utils.device import double

RIDGE = 1e-4  # of least squares, relative to the mean of the diagonal
REWEIGHTED = 3  # rounds in which each sample is weighted by its own error
FLOOR = 1e-3  # of a sample's squared error, relative to the mean one: no sample decides alone
SLOPE = 0.3  # by which coefficients of features are moved, to see what they do
TINY = 1e-20


@dataclass
class Recording:
    """What an uncached run of a batch passes through.

    Attributes:
        latents: before every step, and after the last, (N, ...), as the model sees them; float64.
        outputs: guided outputs of every step, (N, ...), float64.
        arguments: of the model in every step, without the latents.
        rows: of the model per sample: 2 with guidance.
        name: of the model's argument for the latents.
    """

    latents: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 1
    name: str = ""


@dataclass
class LeastSquares:
    """The coefficients of one step. Batches add to it.

    Attributes:
        curvatures: (N, M, M) of the samples of each batch.
        slopes: (N, M).
        squares: (N,), of the errors at zero coefficients.
    """

    curvatures: list[Tensor] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)

    def add(self, residual: Tensor, moves: list[Tensor]) -> None:
        """Take the errors (N, ...) of a batch at zero coefficients, and what each coefficient moves them by."""
        rows, start = torch.stack([each.flatten(1) for each in moves], 1), residual.flatten(1)
        self.curvatures.append((rows @ rows.mT).cpu())
        self.slopes.append((rows @ start[..., None])[..., 0].cpu())
        self.squares.append(start.square().sum(1).cpu())

    def solve(self) -> Tensor:
        """The coefficients (M,) with the least mean of logarithms of the samples' errors, as a mean of PSNRs has it."""
        curvature, slope, square = map(torch.cat, (self.curvatures, self.slopes, self.squares))
        weights, solution = torch.ones_like(square), torch.zeros_like(slope[0])
        for _ in range(1 + REWEIGHTED):
            matrix, vector = torch.einsum("n,nij->ij", weights, curvature), torch.einsum("n,ni->i", weights, slope)
            ridge = RIDGE * matrix.diagonal().mean().clamp_min(TINY)
            solution = -torch.linalg.solve(matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype), vector)
            left = square + 2 * slope @ solution + torch.einsum("i,nij,j->n", solution, curvature, solution)
            weights = 1 / (left.clamp_min(0) + FLOOR * left.mean().clamp_min(TINY))
            weights = weights / weights.mean()
        return solution


def differences(stored: list[Tensor], most: int) -> list[Tensor]:
    """Differences of what is stored, newest first: f0 - f1, f1 - f2, ..."""
    return [new - old for new, old in pairwise(stored[: most + 1])]


def extrapolated(stored: list[Tensor], coefficients: Tensor) -> Tensor:
    """`combined` of what is stored, newest first, in float32; returned in its dtype."""
    return combined([x.float() for x in reversed(stored)], coefficients.tolist()).to(stored[0].dtype)


@dataclass
class State:
    """Where the run of a batch is: stored features and outputs, newest first, and what its steps did.

    Attributes:
        used: guided outputs of every step, minus those of the uncached run.
    """

    features: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    used: list[Tensor] = field(default_factory=list)

    def copy(self) -> "State":
        return State(list(self.features), list(self.outputs), list(self.used))


class Fit:
    """Fits a schedule.

    Args:
        own: the uncached run of every batch.
        goals: the target's latents of every batch, after every step.
        kinds: of all steps.
        branch: b.
        memory: how many coefficients a step may have at most: of features, and of outputs.
        correct: whether full and cached steps may correct their output.

    Attributes:
        features: coefficients (M,) per step, None where there are none.
        outputs: coefficients (M,) per step.
        begun: the states of all batches before every step, once it has run, if it kept them.
    """

    def __init__(
        self,
        sampler: Sampler,
        own: list[Recording],
        goals: list[list[Tensor]],
        kinds: str,
        branch: int,
        response: Tensor,
        memory: tuple[int, int],
        correct: bool,
    ):
        self.model: SkipTransformer = sampler.model
        self.guide, self.own, self.goals, self.response = sampler.guide, own, goals, response
        self.kinds, self.branch, self.memory, self.correct = kinds, branch, memory, correct
        self.features: list[Tensor | None] = [torch.zeros(0) if kind == CACHED else None for kind in kinds]
        self.outputs: list[Tensor] = [torch.zeros(0) for _ in kinds]
        self.begun: list[list[State]] = []

    def final(self, batch: int, state: State) -> Tensor:
        """Latents after the last step."""
        return self._latents(batch, state, len(self.kinds))

    @torch.no_grad()
    def run(self, base: "Fit | None" = None, keep: bool = False) -> list[State]:
        """Find the coefficients of each step in turn. Returns the ends of the runs.

        Args:
            base: another fit, which kept its steps. Those until its kinds are others are taken over.
            keep: the states that steps begin with, in `begun`, for fits that take them over.
        """
        states = [State() for _ in self.own]
        same = common_start(self.kinds[:-1], base.kinds) if base and self._stores == base._stores else 0
        if same:
            self.features[:same], self.outputs[:same] = base.features[:same], base.outputs[:same]
            self.begun, states = base.begun[: same if keep else 0], [state.copy() for state in base.begun[same]]
        for k, kind in list(enumerate(self.kinds))[same:]:
            if keep:
                self.begun.append([state.copy() for state in states])
            problem, guess = LeastSquares(), self._guess(k, states[0])
            for batch, state in enumerate(states):
                if kind == FULL:
                    self._compute(batch, state, k)
                moves, output = self._moves(batch, state, k, guess)
                if moves:
                    state.used.append(self._guided(output, batch, k) - self.own[batch].outputs[k])
                    now = self._latents(batch, state, k + 1) - self.goals[batch][k]
                    state.used.pop()
                    gain = self.response[k, k].item()
                    moves = [gain * move for move in moves]
                    problem.add(now - sum(a * move for a, move in zip(guess.tolist(), moves, strict=False)), moves)
            if problem.slopes:
                solution, count = problem.solve(), len(guess)
                self.outputs[k] = solution[count:]
                if kind == CACHED:
                    self.features[k] = solution[:count]
            for batch, state in enumerate(states):
                if kind == CACHED:
                    self._compute(batch, state, k)
                output = extrapolated(state.outputs, self.outputs[k])
                state.used.append(self._guided(output, batch, k) - self.own[batch].outputs[k])
        return states

    @property
    def _stores(self) -> bool:
        """Whether features are stored: some step needs them."""
        return CACHED in self.kinds

    def _latents(self, batch: int, state: State, k: int) -> Tensor:
        """Before step k: those of the uncached run, moved by what the steps before did otherwise."""
        latents = self.own[batch].latents[k]
        if k == 0:
            return latents
        gains = self.response[k - 1, : len(state.used)].tolist()
        return sum((gain * used for gain, used in zip(gains, state.used, strict=True)), start=latents)

    def _call(self, batch: int, state: State, k: int, step: CacheStep) -> Tensor:
        """The model's whole output at step k."""
        own, latents = self.own[batch], self._latents(batch, state, k)
        rows = latents.to(self.model.dtype).repeat(own.rows, *[1] * (latents.ndim - 1))
        output = self.model.forward(**own.arguments[k] | {own.name: rows, "cache": step})
        return output if isinstance(output, Tensor) else output[0]

    def _guided(self, output: Tensor, batch: int, k: int) -> Tensor:
        """The noise of an output, after guidance: (N, ...) float64."""
        latents = self.own[batch].latents[k]
        shape = latents.expand(len(output) // len(latents), *latents.shape).flatten(0, 1)
        return double(self.guide(predicted_noise(output, shape)))

    def _guess(self, k: int, state: State) -> Tensor:
        """Coefficients of a linear extrapolation to the feature of step k; empty if it uses none."""
        if self.kinds[k] != CACHED:
            return torch.zeros(0, dtype=torch.float64)
        count = len(differences(state.features, self.memory[0]))
        full = [j for j in range(k) if self.kinds[j] == FULL][-2:]
        guess = torch.zeros(count, dtype=torch.float64)
        if count:
            guess[0] = (k - full[1]) / (full[1] - full[0])
        return guess

    def _moves(self, batch: int, state: State, k: int, guess: Tensor) -> tuple[list[Tensor], Tensor]:
        """What each coefficient of step k does to its guided output, and the output without corrections."""
        kind, moves = self.kinds[k], []
        if kind == CACHED:
            feature = extrapolated(state.features, guess)
            output = self._call(batch, state, k, CacheStep(self.branch, feature))
            here = self._guided(output, batch, k)
            for change in differences(state.features, len(guess)):
                other = self._call(batch, state, k, CacheStep(self.branch, feature + SLOPE * change))
                moves.append((self._guided(other, batch, k) - here) / SLOPE)
            known = [output, *state.outputs]
        else:
            known, output = state.outputs, state.outputs[0]
        if kind == FORECAST or self.correct:
            moves += [self._guided(change, batch, k) for change in differences(known, self.memory[1])]
        return moves, output

    def _compute(self, batch: int, state: State, k: int) -> None:
        """Run the model at step k, which is full or cached, and store what it gives."""
        if self.kinds[k] == FULL:
            step = CacheStep(self.branch, None)
            state.outputs.insert(0, self._call(batch, state, k, step))
            if self._stores:
                state.features.insert(0, step.kept_feature)
        else:
            feature = extrapolated(state.features, self.features[k])
            state.outputs.insert(0, self._call(batch, state, k, CacheStep(self.branch, feature)))
        del state.outputs[self.memory[1] + 1 :], state.features[self.memory[0] + 1 :]
