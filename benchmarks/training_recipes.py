"""Which part of a training recipe lets a model learn sooner: long skips, the objective or the optimizer.

    skipdit encode --data fashion_mnist --path data --image-size 32 \\
        --vae class-to-image/weights/vae --out data/fashion-latents
    python benchmarks/training_recipes.py --data data --seeds 0 1 2

Trains every combination of the factors, or those of --recipes, on FashionMNIST by class-to-image's trainer, with the
same data in the same order, batch size and learning rates, which stay constant after the warm-up. Every so many steps
the averaged weights are measured as in benchmarks/efficiency.py: Fréchet distance and class of samples without
guidance, by DDIM after Gaussian diffusion and by Euler's method after flow matching, at each number of sampling steps;
and the loss on test images. (Losses of two objectives are not comparable.) Then: at which step has a recipe the Fréchet
distance that the plain model of the released recipe, `plain-diffusion-adamw`, has at its end, and after how many FLOPs
and seconds?

Writes recipes.json, .png and .md. The same command again continues an interrupted run, and with more seeds, recipes
or train.steps adds to it.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from efficiency import BATCH, METRICS, Examiner, cost, draw, follow, open_examiner, reached, spread, study_parser

from skipdit.class_to_image.model import DiT
from skipdit.class_to_image.train import Config
from skipdit.cli import friendly_errors
from skipdit.config import load_config, to_dict
from skipdit.evaluation.fashion import CLASSES, EPOCHS
from skipdit.training.objective import make_objective
from skipdit.training.settings import TrainConfig
from skipdit.training.steps import Draw
from skipdit.utils.errors import UserError
from skipdit.utils.provenance import fingerprint, versions

CONFIG = "configs/class-to-image/fashion_deep_recipes.yaml"
FACTORS = {  # name -> choice -> overrides
    "skips": {
        "plain": ["model.skip=false"],
        "skip": ["model.skip=true"],
        "residual": ["model.skip=true", "model.fuse=residual"],
    },
    "objectives": {name: [f"train.objective={name}"] for name in ("diffusion", "flow")},
    "optimizers": {name: [f"train.optimizer={name}"] for name in ("adamw", "muon")},
}
RECIPES = {"-".join(names): names for names in product(*FACTORS.values())}  # name -> a choice of each factor
BASELINE = "plain-diffusion-adamw"
BACKWARD = 2  # FLOPs of a backward pass, over those of the forward pass


@dataclass
class RecipeExaminer(Examiner):
    """Measures a model by the objective that it was trained on.

    Attributes:
        sampling: numbers of sampling steps; the last one counts for `frechet` and `accuracy`.
    """

    sampling: tuple[int, ...] = (20,)

    @torch.no_grad()
    def loss(self, model: DiT) -> float:
        is_flow, total = model.flow_shift is not None, 0.0
        settings = {"objective": "flow", "flow_shift": model.flow_shift} if is_flow else {}
        objective = make_objective(TrainConfig(**settings))
        for n, (x0, y) in enumerate(zip(self.latents.split(BATCH), self.labels.split(BATCH), strict=True)):
            x, t, losses = objective(x0, Draw(0, n, range(len(x0)), len(x0), x0.device))
            total += losses(model(x, t, y)).sum().item()
        return total / len(self.latents)

    def point(self, model: DiT) -> dict[str, float]:
        found, classes = {"loss": self.loss(model)}, torch.arange(self.samples) % CLASSES
        sampler = "ddim" if model.flow_shift is None else "euler"
        for steps in self.sampling:
            images = self.images(model, self.samples, sampler=sampler, steps=steps, guidance_scale=1.0)
            scores = self.judge.scores(images, classes)
            found |= {f"{name}_{steps}": value for name, value in scores.items()}
        return found | scores

    def final(self, model: DiT) -> dict:
        return {}


def summary(name: str, run: dict, baseline: dict, costs: dict[str, dict], batch: int) -> dict[str, float | None]:
    """When a run has the baseline's last Fréchet distance: in steps, PFLOP and minutes, and how many times sooner."""
    points, last = run["points"], baseline["points"][-1]
    at = reached(points, "frechet", last["frechet"])

    def spent(who: str, steps: float, seconds: float) -> dict[str, float]:
        flops = steps * batch * (1 + BACKWARD) * costs[who]["flops"]
        return {"step": steps, "pflop": flops / 1e15, "minutes": steps * seconds / 60}

    whole = spent(BASELINE, last["step"], baseline["seconds_per_step"])
    own = spent(name, at, run["seconds_per_step"]) if at else dict.fromkeys(whole)
    sooner = {f"{key}_ratio": value and whole[key] / value for key, value in own.items()}
    return {key: points[-1][key] for key in METRICS} | own | sooner


def table(rows: dict[str, list[dict]]) -> str:
    """Markdown: means and deviations over the seeds."""
    lines = [
        f"| recipe | Fréchet distance | class as asked | has that of {BASELINE} at step | times sooner in steps "
        "| in FLOPs | in time |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of in rows.items():
        digits = {"frechet": 3, "accuracy": 3, "step": 0, "step_ratio": 2, "pflop_ratio": 2, "minutes_ratio": 2}
        cells = [spread([row[key] for row in of], count) for key, count in digits.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Train and measure the recipes, then write what came out."""
    recipes = [recipe for recipe in RECIPES if recipe in args.recipes or recipe == BASELINE]

    def config_of(recipe: str, seed: int) -> Config:
        chosen = zip(FACTORS.values(), RECIPES[recipe], strict=True)
        parts = [text for choices, name in chosen for text in choices[name]]
        place = [f"out={(args.out / 'runs' / f'{recipe}-seed{seed}').as_posix()}", f"train.seed={seed}"]
        return load_config(Config, args.config, [*args.overrides, *parts, *place])

    some = config_of(BASELINE, 0)
    if not 0 < args.every <= some.train.steps or some.train.steps % args.every:
        raise UserError(f"--every {args.every} has to divide train.steps={some.train.steps}")
    if some.train.decay_steps:
        raise UserError("train.decay_steps has to be 0: a run is stopped on the way, to be measured")
    sampling = tuple(args.sampling_steps)
    examiner = open_examiner(args, some, partial(RecipeExaminer, sampling=sampling))
    protocol = {
        "samples": args.samples,
        "sampling": {"steps": args.sampling_steps, "diffusion": "ddim", "flow": "euler", "guidance_scale": 1.0},
        "held_out": f"the first {args.held_out} test images",
        "weights": "averaged",
        "vae": fingerprint(examiner.vae),
        "classifier": {"epochs": EPOCHS, "weights": fingerprint(examiner.judge.classifier.head)},
        "frechet_reference": f"{len(examiner.judge.real)} real test images",
    }
    runs = {recipe: [] for recipe in recipes}
    for seed in args.seeds:  # all recipes of a seed first: an unfinished study can be read as one of fewer seeds
        for recipe, several in runs.items():
            several.append(follow(config_of(recipe, seed), args.every, examiner, protocol))
    costs = {recipe: cost(config_of(recipe, 0), examiner.vae) for recipe in recipes}
    rows = {
        recipe: [
            summary(recipe, each, plain, costs, some.train.batch_size)
            for each, plain in zip(several, runs[BASELINE], strict=True)
        ]
        for recipe, several in runs.items()
    }
    result = {"seeds": args.seeds, "protocol": protocol, "config": to_dict(some), "costs": costs}
    result |= {"rows": rows, "runs": runs, **versions()}
    (args.out / "recipes.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (args.out / "recipes.md").write_text(f"{table(rows)}\n", encoding="utf-8")
    draw(runs, args.out / "recipes.png", ("frechet", "accuracy"), BASELINE)
    print(
        f"\nseeds {', '.join(map(str, args.seeds))}; {some.train.steps} steps of {some.train.batch_size}; "
        f"{args.samples} samples of {sampling[-1]} steps\n\n{table(rows)}\n\n{args.out / 'recipes'}.json, .md, .png"
    )


@friendly_errors()
def main() -> None:
    parser = study_parser(__doc__, CONFIG, "results/recipes")
    said = f"{', '.join(RECIPES)}; {BASELINE} always is [all]"
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=[*RECIPES], metavar="RECIPE", help=said)
    parser.add_argument("--sampling-steps", type=int, nargs="+", default=[10, 20], help="the last is judged [10 20]")
    args = parser.parse_intermixed_args()
    run(args)


if __name__ == "__main__":
    main()
