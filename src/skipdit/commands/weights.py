"""Checkpoints from one layout to another; the commands of `skipdit weights`.

    skipdit weights verify IN            # whether every byte is as it was saved, and every weight finite
    skipdit weights convert IN OUT       # a safetensors folder with a model card, for from_pretrained(OUT)
    skipdit weights convert results/mine mine --plan plan.json --license mit --push-to OWNER/mine
    skipdit weights convert results/t2i transformer --model-class diffusers.HunyuanDiT2DModel
    skipdit weights export IN OUT.pt     # the released layout {"ema": ...}, to ship; or OUT.safetensors
    skipdit weights average RUN OUT.pt --length 0.1    # weights averaged over another stretch of the training

IN is anything that `load_weights` reads. Of a training checkpoint the EMA is taken, and all of it is verified. OUT must
not exist yet. Settings of the model and its training go along, and samplers read them there.
"""

import argparse
from pathlib import Path

from skipdit.cli import Parser


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, `argv` or the program's own; ends the program for --help and mistakes."""
    parser = Parser("skipdit weights", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    titles = {"convert": "make a folder for from_pretrained", "export": "make a file to ship"}
    titles["average"] = "of a run with train.average_every: an average of any length"
    for name, help in {"verify": "read all of it, compare with its checksums", **titles}.items():
        command = commands.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", formatter_class=argparse.HelpFormatter
        )
        command.add_argument("source", type=Path, metavar="IN", help="a .pt or .safetensors file, or a folder")
        if name == "verify":
            continue
        command.add_argument("out", type=Path, metavar="OUT", help="must not exist yet")
        command.add_argument(
            "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="on disk [%(default)s]"
        )
        if name == "average":
            continue
        command.add_argument(
            "--skips", choices=["inside-out", "outside-in"], help="how IN numbers its skips, if it does not say so"
        )
    command = commands.choices["average"]
    command.add_argument(
        "--length", type=float, required=True, help="its standard deviation, as a share of the training; up to 0.28"
    )
    command.add_argument("--step", type=int, help="where it ends [the last]")
    command = commands.choices["convert"]
    command.add_argument("--model-class", metavar="CLASS", help="dotted name [that of ours which the weights are of]")
    command.add_argument("--num-heads", type=int, metavar="H", help="attention heads, if the width is no published one")
    command.add_argument("--push-to", metavar="OWNER/NAME", help="upload OUT to this repository of the Hub, too")
    command.add_argument("--private", action="store_true", help="make that repository private, if there is none yet")
    group = command.add_argument_group("the model card, OUT/README.md")
    group.add_argument("--license", default="unknown", help="as the Hub calls it, such as apache-2.0 [%(default)s]")
    group.add_argument("--data", metavar="TEXT", help="what the model was trained on [the name of that folder]")
    group.add_argument("--plan", type=Path, metavar="FILE", help="a cache plan, which goes along as plan.json")
    group.add_argument(
        "--samples", type=Path, metavar="FOLDER", help="a sampler's output: its settings, overview and evaluation"
    )
    return parser.parse_args(argv)
