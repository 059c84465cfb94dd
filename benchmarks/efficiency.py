"""How fast long skips let a model learn: a plain DiT against Skip-DiT, from scratch, on FashionMNIST.

    skipdit encode --data fashion_mnist --path data --image-size 32 \\
        --vae class-to-image/weights/vae --out data/fashion-latents
    python benchmarks/efficiency.py --data data --seeds 0 1 2
    python benchmarks/efficiency.py --data data --seeds 0 1 2 --spectral

Same data in the same order, same noise, timesteps and seeds, same settings, a constant learning rate; nothing differs
but the skips. The averaged weights are measured every so many steps: the loss on test images with noise that is always
the same, Fréchet distance and class of samples without guidance by the judge of scripts/evaluate_fashion.py. Then: at
which step has Skip-DiT what the plain model has at the end? The same question put to the plain model itself tells how
much of the answer is noise.

With --spectral, Skip-DiT without a constraint on its skips, with a penalty and with a cap (skipdit.training.spectral):
their largest singular values, how far the output moves when all weights do, and what caching costs.

Trained by class-to-image's trainer, sampled by its sampler. Writes convergence or spectral .json, .png and .md. The
same command again continues an interrupted run, and with more seeds or train.steps adds to it.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from skipdit.analysis.measure import moved, random_direction, relative
from skipdit.caching.policies import parse_policy
from skipdit.checkpoints.files import saved
from skipdit.class_to_image.model import DiT
from skipdit.class_to_image.sample import build_model
from skipdit.class_to_image.train import Config, train
from skipdit.cli import Parser, friendly_errors, make_parser
from skipdit.config import changed, load_config, to_dict
from skipdit.diffusion.gaussian import Diffusion
from skipdit.encoders.autoencoder import encode, latent_size, load_vae, pixels
from skipdit.evaluation.fashion import CLASSES, EPOCHS, IMAGE_SIZE, Judge, load_images, load_judge
from skipdit.layers.flops import step_flops
from skipdit.metrics import measure_fidelity
from skipdit.sampling.class_conditional import generate
from skipdit.training.spectral import largest_singular, skip_linears
from skipdit.utils.device import process_state
from skipdit.utils.errors import UserError
from skipdit.utils.files import replace_text
from skipdit.utils.pixels import to_float
from skipdit.utils.provenance import fingerprint, versions
from skipdit.utils.seeding import generators

CONFIG = "configs/class-to-image/fashion_plain.yaml"
SETTINGS = [  # over the config's
    *("train.steps=1500", "train.batch_size=32", "train.decay_steps=0", "train.precision=fp32"),
    *("train.log_every=25", "train.save_every=50", "train.keep=1", "train.sample_every=0"),
]
VARIANTS = {
    "plain": ["model.skip=false"],
    "skip": ["model.skip=true"],
    "penalty": ["model.skip=true", "train.spectral=penalty"],
    "cap": ["model.skip=true", "train.spectral=cap"],
}
STUDIES = {"convergence": ["plain", "skip"], "spectral": ["skip", "penalty", "cap"]}
METRICS = {"loss": "loss on test images", "frechet": "Fréchet distance", "accuracy": "class as asked"}
FALLING = ("loss", "frechet")  # the others are better the higher
SAMPLER = {"sampler": "ddim", "steps": 20, "guidance_scale": 1.0}  # of the samples that are judged
CACHED = {"sampler": "ddim", "steps": 50, "guidance_scale": 2.0}  # of those with and without a cache
REUSE, EXTRAPOLATE = (parse_policy(f"N3-1000-20{order}") for order in ("", "-o1"))
CACHED_SAMPLES, MOVED, DIRECTIONS = 32, 0.05, 8  # a perturbation has 5 % of every filter's norm
BATCH = 64  # samples per model call
PAPER = (
    "The paper (arXiv 2411.17616) says 4.4 times sooner, of DiT-XL/2 on ImageNet; its FIDs without guidance, 8.37 "
    "after 2.9M steps and 9.49 after 7M, say at least 2.4 times."
)


@dataclass
class Examiner:
    """What every model is measured with: always the same noise, classes and real images."""

    vae: AutoencoderKL
    judge: Judge
    latents: Tensor  # (N, C, h, w), of test images
    labels: Tensor  # (N,)
    samples: int

    def __post_init__(self):
        count, generator = len(self.latents), torch.Generator().manual_seed(0)
        self.diffusion = Diffusion()
        spread = torch.arange(count) * len(self.diffusion) // count  # every stretch of timesteps alike
        self.t = spread[torch.randperm(count, generator=generator)].to(self.latents.device)
        self.noise = torch.randn(self.latents.shape, generator=generator).to(self.latents.device)
        self.noisy = self.diffusion.q_sample(self.latents, self.t, self.noise)

    @torch.no_grad()
    def loss(self, model: DiT) -> float:
        """Mean training loss on the test images, without label dropout and flips."""
        total = 0.0
        for x0, x, t, y, noise in zip(
            *(part.split(BATCH) for part in (self.latents, self.noisy, self.t, self.labels, self.noise)), strict=True
        ):
            total += self.diffusion.losses(model(x, t, y), x0, x, t, noise)["loss"].sum().item()
        return total / len(self.latents)

    def images(self, model: DiT, count: int, **settings) -> Tensor:
        """Samples 0 .. count - 1, of class i % 10, uint8 (count, 3, H, W)."""
        parts = []
        for indices in torch.arange(count).split(BATCH):
            noise = generators(0, indices.tolist(), model.device)
            latents = generate(model, (indices % CLASSES).to(model.device), noise, **settings, progress=True)
            parts.append(pixels(self.vae, latents))
        return torch.cat(parts)

    def point(self, model: DiT) -> dict[str, float]:
        """A point of the curves."""
        scores = self.judge.scores(self.images(model, self.samples, **SAMPLER), torch.arange(self.samples) % CLASSES)
        return {"loss": self.loss(model), **scores}

    def final(self, model: DiT) -> dict:
        """What is measured at the end only."""
        found = {"output_change": self.output_change(model)}
        if model.n_skips:
            weights = torch.stack([linear.weight for linear in skip_linears(model)])
            found["sigma"] = largest_singular(weights).sigma.tolist()
            uncached = self.images(model, CACHED_SAMPLES, **CACHED)
            for spec in (REUSE, EXTRAPOLATE):
                cached = self.images(model, CACHED_SAMPLES, **CACHED, cache=str(spec))
                found[str(spec)] = measure_fidelity(cached, uncached)
        return found

    @torch.no_grad()
    def output_change(self, model: DiT) -> list[float]:
        """Per random direction: how far the output moves, over its own norm, when the weights move by `MOVED`."""
        inputs = self.noisy[:BATCH], self.t[:BATCH], self.labels[:BATCH]
        before, changes = model(*inputs), []
        directions = [random_direction(model, torch.Generator().manual_seed(seed)) for seed in range(DIRECTIONS)]
        with moved(model) as move:
            for direction in directions:
                move((MOVED, direction))
                changes.append(relative(model(*inputs), before).mean().item())
        return changes


def open_examiner(args: argparse.Namespace, config: Config, kind: Callable[..., Examiner] = Examiner) -> Examiner:
    """An examiner of a kind, with a judge of its own for the folder of the study."""
    device = process_state().device
    if (config.data.image_size, config.model.num_classes) != (IMAGE_SIZE, CLASSES):
        raise UserError(f"{args.config}: FashionMNIST has {CLASSES} classes, here at data.image_size={IMAGE_SIZE}")
    vae = load_vae(config.vae).to(device)
    args.out.mkdir(parents=True, exist_ok=True)
    real, labels = load_images(args.data, train=False)
    judge = load_judge(args.out / "classifier.pt", load_images(args.data, train=True), (real, labels), device)
    some = to_float(real[: args.held_out]).to(device)
    return kind(vae, judge, encode(vae, some)[0], labels[: args.held_out].to(device), args.samples)


def follow(config: Config, every: int, examiner: Examiner, protocol: dict) -> dict:
    """Train a config and measure it on the way. What an earlier call has measured is not measured again.

    Returns `points`, one dict per `every` steps, and `final`.
    """
    file, name = Path(config.out) / "evaluation.json", Path(config.out).name
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"protocol": protocol, "points": []}
    if known["protocol"] != json.loads(json.dumps(protocol)):
        raise UserError(f"{file} was measured in another way, or with another judge: give another folder with --out")
    measured = {point["step"]: point for point in known["points"]}

    def keep(**found) -> None:
        known.update(found)
        replace_text(file, json.dumps(known, indent=2) + "\n")

    model, steps = None, config.train.steps
    for step in range(every, steps + 1, every):
        if step not in measured:
            model = train_to(config, step)
            losses = [line["loss"] for line in log_of(config) if step - every < line["step"] <= step and line["loss"]]
            measured[step] = {"step": step, "train_loss": mean(losses) if losses else None, **examiner.point(model)}
            keep(points=list(measured.values()))
            told = ", ".join(f"{said} {measured[step][key]:.4g}" for key, said in METRICS.items())
            print(f"{name}, step {step}: {told}", flush=True)
    if known.get("final", {}).get("step") != steps:
        keep(final={"step": steps, **examiner.final(train_to(config, steps) if model is None else model)})
    rate = [line["samples_per_second"] for line in log_of(config)]
    points = [measured[step] for step in range(every, steps + 1, every)]
    return {"points": points, "final": known["final"], "seconds_per_step": config.train.batch_size / median(rate)}


def train_to(config: Config, step: int) -> DiT:
    """The averaged model of a run after a step; the run goes on from where it was."""
    done = max((int(file.stem) for file in saved(Path(config.out, "checkpoints"))), default=0)
    if done > step:
        raise UserError(
            f"{config.out} was trained to step {done}, and is to be measured at step {step}: "
            "keep --every, do not lower train.steps, or give another folder with --out"
        )
    return train(changed(config, {"train.steps": step}))


def log_of(config: Config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.out) / "stats.jsonl").read_text(encoding="utf-8").splitlines()]


def reached(points: list[dict], metric: str, goal: float) -> float | None:
    """The first step at which a curve, straight between its points, has come to a value; None if it never does.

    A curve that is there at its first point was so at that step or before.
    """
    sign = 1 if metric in FALLING else -1
    gaps = [sign * (point[metric] - goal) for point in points]  # above 0: not there yet
    steps = [point["step"] for point in points]
    for i, gap in enumerate(gaps):
        if gap <= 0:
            if i == 0:
                return float(steps[0])
            return steps[i - 1] + (steps[i] - steps[i - 1]) * gaps[i - 1] / (gaps[i - 1] - gap)
    return None


def speedups(plain: list[dict], skip: list[dict], metric: str) -> dict[str, float | None]:
    """When each of two curves has what the plain one ends with, in steps, and how many times sooner the other has."""
    goal, steps = plain[-1][metric], plain[-1]["step"]
    at, own = reached(skip, metric, goal), reached(plain, metric, goal)
    return {"goal": goal, "skip_at": at, "plain_at": own, "ratio": at and steps / at, "plain_ratio": steps / own}


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean and deviation over the seeds, and how many have no value."""
    there = [value for value in values if value is not None]
    if not there:
        return "never"
    text = f"{mean(there):.{digits}f}" + (f" ± {stdev(there):.{digits}f}" if len(there) > 1 else "")
    return text + (f" (never in {len(values) - len(there)} of {len(values)})" if len(there) < len(values) else "")


def cost(config: Config, vae: AutoencoderKL) -> dict[str, float]:
    """Size of a config's model, and FLOPs of one forward pass of one sample."""
    with torch.device("meta"):
        model = build_model(config.model, latent_size(config.data.image_size, vae), vae.config.latent_channels)
    return {"parameters": sum(p.numel() for p in model.parameters()), "flops": step_flops(model, 1)["full"]}


def convergence_table(runs: dict[str, list[dict]], costs: dict[str, dict]) -> str:
    """Markdown: who is how fast, and what the models cost."""
    share = costs["skip"]["flops"] / costs["plain"]["flops"]
    lines = [
        "| | plain at the end | skip at the end | skip has plain's at step | times sooner | in FLOPs | plain itself |",
        "|---|---|---|---|---|---|---|",
    ]
    for metric, name in METRICS.items():
        pairs = [(a["points"], b["points"]) for a, b in zip(runs["plain"], runs["skip"], strict=True)]
        found = [speedups(*pair, metric) for pair in pairs]
        ratios = [row["ratio"] for row in found]
        ends = [spread([points[-1][metric] for points in side]) for side in zip(*pairs, strict=True)]
        cells = [*ends, spread([row["skip_at"] for row in found], 0), spread(ratios, 2)]
        cells += [spread([ratio and ratio / share for ratio in ratios], 2)]
        lines.append(f"| {name} | {' | '.join(cells)} | {spread([row['plain_ratio'] for row in found], 2)} |")
    lines += ["", "| | parameters | GFLOP, a sample | s / training step | output moves |", "|---|---|---|---|---|"]
    for name, of in costs.items():
        seconds = spread([run["seconds_per_step"] for run in runs[name]])
        change = spread([mean(run["final"]["output_change"]) for run in runs[name]])
        lines.append(f"| {name} | {of['parameters']:,} | {of['flops'] / 1e9:.3f} | {seconds} | {change} |")
    return "\n".join([*lines, "", PAPER])


def spectral_table(runs: dict[str, list[dict]], config: Config) -> str:
    """Markdown: what the constraints do."""
    names = {"skip": "none", "penalty": f"penalty {config.train.spectral_weight:g}"}
    names["cap"] = f"cap {config.train.spectral_cap:g}"
    lines = [
        "| constraint | largest singular value | loss | Fréchet distance | class as asked | output moves "
        "| PSNR, reuse N=3 | PSNR, extrapolate N=3 | s / training step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for variant, name in names.items():
        last, final = ([run["points"][-1] for run in runs[variant]], [run["final"] for run in runs[variant]])
        cells = [spread([max(of["sigma"]) for of in final], 2)]
        cells += [spread([point[metric] for point in last]) for metric in METRICS]
        cells += [spread([mean(of["output_change"]) for of in final])]
        cells += [spread([of[str(spec)]["psnr"] for of in final], 1) for spec in (REUSE, EXTRAPOLATE)]
        cells += [spread([run["seconds_per_step"] for run in runs[variant]])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: dict[str, list[dict]], path: Path, metrics: Sequence[str] = FALLING, baseline: str = "plain") -> None:
    """Curves over steps: means over the seeds, the range of all of them shaded; a line where the baseline ends."""
    figure, panels = plt.subplots(1, len(metrics), figsize=(9, 3.4), layout="constrained")
    for axes, metric in zip(panels, metrics, strict=True):
        for color, (variant, several) in enumerate(runs.items()):
            steps = [point["step"] for point in several[0]["points"]]
            values = torch.tensor([[point[metric] for point in run["points"]] for run in several])
            axes.plot(steps, values.mean(0), ".-", color=f"C{color}", label=variant)
            axes.fill_between(steps, values.amin(0), values.amax(0), color=f"C{color}", alpha=0.2, linewidth=0)
            if variant == baseline:
                axes.axhline(values.mean(0)[-1].item(), color="grey", linestyle="--", linewidth=0.8)
        axes.set(xlabel="step", ylabel=METRICS[metric], yscale="log" if metric in FALLING else "linear")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def run(args: argparse.Namespace) -> None:
    """Train and measure all models of a study, then write what came out."""
    study = "spectral" if args.spectral else "convergence"

    def config_of(variant: str, seed: int) -> Config:
        place = [f"out={(args.out / 'runs' / f'{variant}-seed{seed}').as_posix()}", f"train.seed={seed}"]
        return load_config(Config, args.config, [*SETTINGS, *args.overrides, *VARIANTS[variant], *place])

    some = config_of("skip", 0)
    if not 0 < args.every <= some.train.steps or some.train.steps % args.every:
        raise UserError(f"--every {args.every} has to divide train.steps={some.train.steps}")
    if some.train.decay_steps:
        raise UserError("train.decay_steps has to be 0: a run is stopped on the way, to be measured")
    if args.samples < 2 or args.held_out < BATCH:
        raise UserError(f"--samples has to be at least 2 and --held-out at least {BATCH}")
    examiner = open_examiner(args, some)
    protocol = {
        "samples": args.samples,
        "sampling": SAMPLER,
        "held_out": f"the first {args.held_out} test images",
        "weights": "averaged",
        "perturbation": {"filter_norms": MOVED, "directions": DIRECTIONS, "inputs": BATCH},
        "cached": CACHED | {"samples": CACHED_SAMPLES, "specs": [str(REUSE), str(EXTRAPOLATE)]},
        "vae": fingerprint(examiner.vae),
        "classifier": {
            "test_accuracy": examiner.judge.test_accuracy,
            "epochs": EPOCHS,
            "weights": fingerprint(examiner.judge.classifier.head),
        },
        "frechet_reference": f"{len(examiner.judge.real)} real test images",
    }
    runs = {variant: [] for variant in STUDIES[study]}
    for seed in args.seeds:  # all variants of a seed first: an unfinished study can be read as one of fewer seeds
        for variant, several in runs.items():
            several.append(follow(config_of(variant, seed), args.every, examiner, protocol))

    costs = {variant: cost(config_of(variant, 0), examiner.vae) for variant in runs}
    result = {"seeds": args.seeds, "protocol": protocol, "config": to_dict(some), "costs": costs, "runs": runs}
    if study == "convergence":
        pairs = list(zip(runs["plain"], runs["skip"], strict=True))
        result["speedups"] = {m: [speedups(a["points"], b["points"], m) for a, b in pairs] for m in METRICS}
    table = convergence_table(runs, costs) if study == "convergence" else spectral_table(runs, some)
    (args.out / f"{study}.json").write_text(json.dumps(result | versions(), indent=2) + "\n", encoding="utf-8")
    (args.out / f"{study}.md").write_text(f"{table}\n", encoding="utf-8")
    draw(runs, args.out / f"{study}.png")
    seeds, of = ", ".join(map(str, args.seeds)), some.train
    print(
        f"\nseeds {seeds}; {of.steps} steps of {of.batch_size}; {args.samples} samples by DDIM-{SAMPLER['steps']}\n\n"
        f"{table}\n\n{args.out / study}.json, .md, .png"
    )


def study_parser(description: str, config: str, out: str) -> Parser:
    """Arguments of a study of trainings: a config with overrides, where the data is, what is measured and when."""
    parser = make_parser(Config, description, default=config)
    parser.set_defaults(config=config)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of FashionMNIST/ [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path(out), help="[%(default)s]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings [0]")
    parser.add_argument("--every", type=int, default=250, help="steps between measurements [%(default)s]")
    parser.add_argument("--samples", type=int, default=500, help="per measurement [%(default)s]")
    parser.add_argument("--held-out", type=int, default=1024, help="test images for the loss [%(default)s]")
    return parser


@friendly_errors()
def main() -> None:
    parser = study_parser(__doc__, CONFIG, "results/efficiency")
    parser.add_argument("--spectral", action="store_true", help="compare constraints on the skips instead")
    args = parser.parse_intermixed_args()
    run(args)


if __name__ == "__main__":
    main()
