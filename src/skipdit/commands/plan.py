"""Plan a sampling run: which steps are full, which cached, which forecasts; fitted on a few runs of the model itself.

    skipdit plan --config configs/class-to-image/demo.yaml --speedup 3 --out plan.json
    skipdit plan --config configs/text-to-video/demo.yaml --budget 20 --out plan.json steps=50
    skipdit plan --config configs/class-to-image/demo.yaml --speedup 3 --cost time --out plan.json
    skipdit plan --config configs/class-to-image/demo.yaml --max-error 0.01 --out plan.json
    skipdit plan --config configs/class-to-image/demo.yaml --like plan.json --out plan-30.json steps=30
    skipdit plan --pipeline black-forest-labs/FLUX.1-dev --prompts prompts.txt --speedup 2 guidance_scale=3.5

Take samples for it that are judged nowhere else: the seed is not that of the config, and prompts should be others, too.
The plan is for this model, sampler, number of steps and guidance, and is refused on other timesteps.
"""

import argparse

from skipdit.cli import Parser, at_least, friendly_errors
from skipdit.tasks import read_settings
from skipdit.utils.errors import UserError
from skipdit.utils.shipped import found

SEED = 10_000  # of calibration samples; no config has it
SETTINGS = {  # of a config, in place of these options of a pipeline
    "prompts": "prompt_file=FILE",
    "scheduler": "scheduler=ddim",
    "dtype": "dtype=float32",
    "offload": "offload=model",
}


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, `argv` or the program's own; ends the program for --help and mistakes."""
    parser = Parser("skipdit plan", description=__doc__)
    planned = parser.add_mutually_exclusive_group(required=True)
    planned.add_argument("--config", metavar="FILE", help="a sampler's config")
    planned.add_argument("--pipeline", metavar="NAME", help="any diffusers pipeline, a folder or Hub name")
    parser.add_argument("--prompts", metavar="FILE", help="what the pipeline shows, one prompt per line")
    parser.add_argument(
        "--scheduler", metavar="NAME", help="class in diffusers, with the settings of the pipeline's [the pipeline's]"
    )
    parser.add_argument("--dtype", default="auto", help="of the pipeline: float32, float16, bfloat16 [%(default)s]")
    parser.add_argument(
        "--offload",
        choices=["none", "model", "sequential"],
        default="none",
        help="bring the pipeline's models, or their layers, to the GPU when they run [%(default)s]",
    )
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--speedup", type=float, metavar="X", help="in --cost, against all steps full")
    wanted.add_argument("--budget", type=float, metavar="N", help="the same, as the number of full steps that it costs")
    wanted.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="root mean square of the pixels' range, on the calibration samples: others may have some dB more; 0.01 is "
        "a PSNR of 40 dB. Finds the smallest cost",
    )
    wanted.add_argument(
        "--like",
        metavar="PLAN",
        help="the schedule of this plan, stretched to the number of steps and fitted anew: no search, so some dB less",
    )
    parser.add_argument(
        "--cost",
        choices=["flops", "time"],
        default="flops",
        help="what costs are: FLOPs of the model, or seconds of its steps on this device with this batch, which are "
        "measured first [%(default)s]",
    )
    parser.add_argument(
        "--target",
        choices=["converged", "sampler"],
        help="what the images should be: those that ever more steps tend to, or those of the uncached run [converged, "
        "where the sampler is deterministic]",
    )
    parser.add_argument(
        "--exchanges",
        type=at_least(0),
        default=30,
        metavar="N",
        help="how long to search: exchanges of neighbouring steps that are tried per start, each of about half a run "
        "[%(default)s]",
    )
    parser.add_argument("--steps", type=at_least(1), metavar="T", help="of a run [the config's]")
    parser.add_argument(
        "--branch",
        type=at_least(0),
        default=1,
        metavar="B",
        help="outer layers of cached steps; 0: no cached steps [%(default)s]",
    )
    parser.add_argument("--task", help="class-to-image ... [the name of the config's folder]")
    parser.add_argument("--out", default="plan.json", metavar="FILE", help="[%(default)s]")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help=f"settings that override the config's, or arguments of the pipeline's call; the seed is {SEED} unless you "
        "say another",
    )
    args = parser.parse_intermixed_args(argv)
    args.overrides, args.like = [f"seed={SEED}", *args.overrides], args.like and found(args.like)
    with friendly_errors():
        if args.config:
            for name, setting in SETTINGS.items():
                if getattr(args, name) != parser.get_default(name):
                    raise UserError(f"--{name} is for --pipeline; a config has a setting: {setting}")
            read_settings(args)
        elif not args.pipeline:
            raise UserError("--config and --pipeline are both empty: name one of them")
    return args
