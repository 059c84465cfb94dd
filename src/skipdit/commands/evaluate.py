"""Judge samples: against the uncached run, against real ones, against their prompts.

    skipdit evaluate fidelity samples/demo-cached --reference samples/demo
    skipdit evaluate fid samples/imagenet256-50k --reference VIRTUAL_imagenet256_labeled.npz
    skipdit evaluate fvd samples/ucf101-fvd --reference data/UCF101/videos --i3d i3d_torchscript.pt
    skipdit evaluate clip samples/t2i-coco --model openai/clip-vit-base-patch32
    skipdit evaluate vbench samples/t2v-vbench --prompts data/vbench/prompts_per_dimension

RUN is a sampler's output folder. A plain folder of pictures or clips, or an .npz of pictures, does as well; how they
were made is then reported as unknown. Results go to RUN/evaluation/<metric>.json with the whole protocol. What networks
make of the samples is kept there too: the same command again continues an interrupted evaluation.
"""

import argparse

from skipdit.cli import Parser
from skipdit.utils.text import with_home

FVD_CLIPS = 2_048  # that published figures are of
BACKBONES = ("alex", "vgg")  # of LPIPS
DETAILS = {
    "fidelity": "PSNR, SSIM and LPIPS of every sample against its namesake; of clips the means over frames. "
    "Identical samples are counted and left out of the mean PSNR; an identical frame of another clip is 100 dB.",
    "fid": "FID, KID, precision and recall against a set of pictures, and the inception score.",
    "fvd": "FVD in the protocol of StyleGAN-V: 16 frames, 2,048 clips, covariances divided by N as there.",
    "clip": "How well pictures, or the frames of clips, fit their prompts.",
    "vbench": "Clips that are named otherwise are linked into OUT/vbench. Ends with status 1 if some are missing.",
}


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, `argv` or the program's own; ends the program for --help and mistakes."""
    parser = Parser(prog="skipdit evaluate", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="METRIC")

    def add(metric: str, title: str, batch_size: int | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(
            metric, help=title, description=f"{title}. {DETAILS[metric]}", formatter_class=argparse.HelpFormatter
        )
        command.set_defaults(metric=metric)
        command.add_argument("run", metavar="RUN", help="output folder of a sampler, plain folder, or .npz of pictures")
        command.add_argument("--out", metavar="FOLDER", help="for the result [RUN/evaluation]")
        if batch_size:
            command.add_argument("--batch-size", type=int, default=batch_size, metavar="N", help="[%(default)s]")
            command.add_argument(
                "--features", metavar="FOLDER", help="where features are kept; runs may share one [OUT/features]"
            )
        return command

    command = add("fidelity", "how close a cached run is to the uncached one: PSNR, SSIM, LPIPS", 16)
    command.add_argument("--reference", required=True, metavar="UNCACHED", help="the same samples without a cache")
    command.add_argument(
        "--lpips", nargs="+", choices=BACKBONES, default=[], help="also LPIPS; the paper's is that of alex"
    )
    for name in BACKBONES:
        command.add_argument(f"--{name}-weights", metavar="FILE", help="torchvision's weights [those in torch's cache]")

    command = add("fid", "how close pictures are to real ones: FID, KID, inception score, precision, recall", 32)
    command.add_argument(
        "--reference",
        required=True,
        metavar="FOLDER|NPZ|RUN",
        help="real pictures, ADM's .npz, or another run",
    )
    command.add_argument("--inception", metavar="FILE", help="pytorch-fid's weights [those in torch's cache]")
    command.add_argument(
        "--network", metavar="FILE", help="TorchScript instead: float32 (N, 3, H, W) in [-1, 1] -> features (N, D)"
    )

    command = add("fvd", "how close clips are to real ones: FVD", 8)
    command.add_argument("--reference", required=True, metavar="FOLDER|RUN", help="real clips, or a run")
    command.add_argument("--i3d", required=True, metavar="FILE", help="TorchScript I3D of StyleGAN-V")
    command.add_argument("--frames", type=int, default=16, metavar="N", help="of a clip [%(default)s]")
    command.add_argument(
        "--interval",
        type=int,
        default=1,
        metavar="N",
        help="of real clips every N-th frame, as in training [%(default)s]",
    )
    command.add_argument("--clips", type=int, default=FVD_CLIPS, metavar="N", help="at most, of either [%(default)s]")

    command = add("clip", "how well pictures or clips fit their prompts: CLIP score", 16)
    command.add_argument("--model", required=True, metavar="MODEL", help="CLIP of transformers, folder or Hub name")

    command = add("vbench", "clips under the names that VBench wants, and which of them are missing")
    command.add_argument("--prompts", metavar="FILE", help="wanted ones, as the sampler's prompt_file [the run's]")
    command.add_argument("--each", type=int, default=5, metavar="N", help="clips of a prompt [%(default)s]")
    return with_home(parser.parse_args(argv))
