"""Whether the two halves of guidance should be planned apart, as FasterCache and cache-dit do it.

    python benchmarks/guidance_halves.py num_samples=20 batch_size=10

Plans of full and forecast steps, evenly spaced, are fitted as `skipdit plan` fits them, to the first batch of samples,
and measured on the others. In a row "apart", forecasts combine stored outputs of the conditional and the unconditional
half with coefficients of their own. In the further rows some steps run the conditional half only, and forecast the
other: two of these cost as much as one full step, so that all rows have one cost.
"""

import torch
from torch import Tensor

from skipdit.caching.policy import FORECAST, FULL
from skipdit.cli import Parser, friendly_errors
from skipdit.commands.plan import SEED
from skipdit.config import changed, load_config
from skipdit.layers.adaln import Conditioning
from skipdit.layers.skip import predicted_noise
from skipdit.planning.calibration import MEMORY, TARGETS, Bench
from skipdit.planning.fitting import Fit, LeastSquares, State, differences
from skipdit.planning.schedules import even_full_steps, schedule
from skipdit.planning.search import budget_of
from skipdit.planning.tables import distance, psnr_of
from skipdit.tasks import find_task
from skipdit.utils.device import double
from skipdit.utils.errors import UserError

HALF = "C"  # of a schedule: the conditional half runs, the other is a forecast
CONFIG = "configs/class-to-image/demo.yaml"


class Halves(Fit):
    """A fit that keeps the noise that each half predicts.

    Args:
        scale: of guidance.
        apart: whether the halves have coefficients of their own.
    """

    def __init__(self, *args, scale: float, apart: bool):
        super().__init__(*args)
        self.scale, self.apart = scale, apart

    @torch.no_grad()
    def run(self) -> list[State]:
        states = [State() for _ in self.own]
        stored: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in self.own]  # per half, newest first
        for k, kind in enumerate(self.kinds):
            problem, parts = LeastSquares(), []
            for batch, state in enumerate(states):
                if kind != FORECAST:
                    for half, noise in zip(stored[batch], self._predict(batch, state, k, kind), strict=False):
                        half.insert(0, noise)
                output, moves = self._moves_of(kind, *stored[batch])
                parts.append((output, moves))
                if moves and batch == 0:  # the others are held out
                    state.used.append(output - self.own[batch].outputs[k])
                    now = self._latents(batch, state, k + 1) - self.goals[batch][k]
                    state.used.pop()
                    problem.add(now, [self.response[k, k].item() * move for move in moves])
            solution = problem.solve().tolist() if problem.slopes else []
            for batch, (state, (output, moves)) in enumerate(zip(states, parts, strict=True)):
                used = output + sum(a * move for a, move in zip(solution, moves, strict=True))
                state.used.append(used - self.own[batch].outputs[k])
                for half in stored[batch]:
                    del half[self.memory[1] + 1 :]
        return states

    def _predict(self, batch: int, state: State, k: int, kind: str) -> list[Tensor]:
        """The noise of the halves that run."""
        own, latents = self.own[batch], self._latents(batch, state, k)
        arguments, count = own.arguments[k], len(latents)
        if kind == HALF:
            arguments = {name: _first(value, count) for name, value in arguments.items()}
        rows = latents if kind == HALF else torch.cat([latents, latents])
        output = self.model.forward(**arguments | {own.name: rows.to(self.model.dtype), "cache": None})
        return list(double(predicted_noise(output, rows)).split(count))

    def _moves_of(self, kind: str, conditional: list[Tensor], other: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The guided output of what is stored, and what each coefficient does to it."""
        output = other[0] + self.scale * (conditional[0] - other[0])
        ahead = [self.scale * change for change in differences(conditional, self.memory[1])]
        behind = [(1 - self.scale) * change for change in differences(other, self.memory[1])]
        if not self.correct and kind == FULL:
            return output, []
        if not self.correct and kind == HALF:
            return output, behind
        return output, ahead + behind if self.apart else [a + b for a, b in zip(ahead, behind, strict=True)]


def _first(value, count: int):
    """The rows of the conditional half."""
    if isinstance(value, Conditioning):
        return Conditioning(value.blocks[:, :count], value.final[:count])
    return value[:count] if isinstance(value, Tensor) and value.ndim and len(value) == 2 * count else value


def kinds_of(steps: int, full: int, half: int) -> str:
    """An even schedule, its half steps spread evenly over the steps that run, but the first two."""
    even = even_full_steps(steps - 1, full + half - 1)
    kinds = list(schedule(steps, [0, *(1 + k for k in even)], 0))
    ran = [i for i, kind in enumerate(kinds) if kind == FULL][2:]
    for j in range(half):
        kinds[ran[round(j * (len(ran) - 1) / max(half - 1, 1))]] = HALF
    return "".join(kinds)


def measure(bench: Bench, kinds: str, scale: float, apart: bool) -> list[float]:
    """PSNR per batch; the first batch is the one of the fit."""
    memory, correct = MEMORY[bench.target], bench.target == "converged"
    arguments = bench.sampler, bench.own, bench.goals, kinds, bench.branch, bench.response, memory, correct
    fit = Halves(*arguments, scale=scale, apart=apart)
    found = []
    for batch, state in enumerate(fit.run()):
        images = bench._images(fit.final(batch, state)), bench.references[bench.target][batch]
        found.append(psnr_of(distance(*(each.numpy() / 2 for each in images))))
    return found


@friendly_errors("starts anew")
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", default=CONFIG, help="of class-to-image [%(default)s]")
    parser.add_argument("--target", choices=TARGETS, default="sampler", help="[%(default)s]")
    parser.add_argument("--budget", type=int, default=16, help="full steps' worth of each plan [%(default)s]")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the config's")
    args = parser.parse_intermixed_args()
    task = find_task(args.config, "class-to-image")
    config = changed(load_config(task.schema, args.config, args.overrides), {"seed": SEED})
    budget_of(config.steps, args.budget, None)
    if config.guidance_scale == 1 or config.guidance_channels:
        raise UserError("this is about guidance of all channels: set guidance_scale above 1, guidance_channels=null")
    bench = Bench(task.open_sampler(config, 1), config.steps, 1, args.target)
    if len(bench.batches) < 2:
        raise UserError(
            f"num_samples={config.num_samples} is one batch: set batch_size to half of it, to hold some out"
        )
    bench.calibrate()
    print(f"\n| {args.budget} full steps' worth, target {args.target} | PSNR, fitted | PSNR, held out |\n|---|---|---|")
    for half, apart in [(0, False), (0, True), *((n, True) for n in (4, 8, 12) if args.budget - n // 2 > 3)]:
        full = args.budget - half // 2
        fitted, *others = measure(bench, kinds_of(config.steps, full, half), config.guidance_scale, apart)
        name = f"{full} full + {half} half steps" + (", apart" if apart else "")
        print(f"| {name} | {fitted:.1f} | {sum(others) / len(others):.1f} |", flush=True)


if __name__ == "__main__":
    main()
