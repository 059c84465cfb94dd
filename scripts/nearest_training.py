"""How near the embedded models' samples are to the emoji they were trained on: did they learn, did they memorise?

    python class-to-video/sample.py --config configs/class-to-video/demo.yaml num_samples=32 out=samples/video-32
    python scripts/nearest_training.py samples/video-32 --data data/emoji-anim/videos --out samples/video-32/nearest.png

Samples of prompts that are captions of the training clips, or of the training pictures, or other wordings of them:
    python scripts/nearest_training.py samples/captions --data data/emoji-anim
    python scripts/nearest_training.py samples/wordings --data data/emoji-anim \\
        --wordings configs/text-to-video/emoji_wordings.jsonl
    python scripts/nearest_training.py samples/picture-captions --data data/emoji-3d
    python scripts/nearest_training.py samples/held-out --data data/emoji-3d --pictures all \\
        --wordings configs/text-to-image/emoji_held_out.jsonl    # among all pictures: is it the one that was left out?

For every sample, the training picture, or the stretch of a training clip (any clip, any start), with the least squared
error over all pixels. Prints the PSNR to it, how often it is of the class or caption that was asked for, and how many
different ones were met; the picture shows samples with the nearest below each.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, read_image, write_png
from tqdm import tqdm

from skipdit.cli import Parser, friendly_errors
from skipdit.data.captions import read_rows
from skipdit.data.clip_folder import ClipFolder
from skipdit.data.pictures import PictureFolder
from skipdit.data.settings import ClipData, PictureData
from skipdit.data.video import read_mp4
from skipdit.utils.errors import UserError
from skipdit.utils.video import contact_sheet

EMOJI = ["face-smiling", "face-affection", "face-tongue", "face-negative", "face-costume", "cat-face", "heart", "hands"]
EMOJI += ["face-concerned", "face-neutral-skeptical", "face-unwell", "sky-weather"]  # the model of eight pairs has 8
CONFIGS = Path(__file__).parents[1] / "configs"


class Training(NamedTuple):
    """What a model was trained on."""

    kind: str  # video or image, as a file of captions calls it
    clips: list[Tensor]  # uint8 (F, 3, H, W); a picture is a clip of one frame
    labels: list[int]
    interval: int  # frames from one that a sample shows to the next
    meant: dict[str, int]  # label by caption
    names: dict[str, int]  # label by file

    def __getitem__(self, place: tuple[int, int, int]) -> Tensor:
        """The stretch of (clip, start, frames)."""
        number, start, frames = place
        return self.clips[number][start : start + (frames - 1) * self.interval + 1 : self.interval]


def read_training(data: str, config: dict, size: int, pictures: str) -> Training:
    """The files in `data` that the model of a sampling run has seen, `size` pixels along a side; of images, those of
    the list `pictures`, or all.
    """
    if "num_frames" not in config:
        listed = None if pictures == "all" else pictures
        dataset = PictureFolder(
            PictureData(path=data, captions=f"{data}/captions.jsonl", picture_list=listed, image_size=size)
        )
        clips, labels = [sample["image"][None] for sample in bar(dataset, "reading", "picture")], dataset.labels
        return Training("image", clips, labels, 1, *named(dataset))
    if "prompts" in config:
        chosen = {"captions": f"{data}/captions.jsonl", "clip_list": str(CONFIGS / "text-to-video/emoji_clips.txt")}
    else:
        chosen = {"classes": EMOJI[: config["model"]["num_classes"]]}
        if chosen["classes"] == EMOJI:  # the model of eight pairs saw all clips of its eight classes
            chosen["clip_list"] = str(CONFIGS / "class-to-video/emoji_deep_clips.txt")
    dataset = ClipFolder(ClipData(path=data, **chosen, num_frames=config["num_frames"], image_size=size))
    samples = [sample for sample in bar(dataset, "reading", "clip") if len(sample["image"]) >= dataset.span]
    clips, labels = [sample["image"] for sample in samples], [sample["label"] for sample in samples]
    return Training("video", clips, labels, dataset.frame_interval, *named(dataset))


def named(dataset: ClipFolder | PictureFolder) -> tuple[dict[str, int], dict[str, int]]:
    """Labels by caption and by file."""
    by_caption = {caption: label for label, caption in enumerate(getattr(dataset, "captions", None) or ())}
    return by_caption, dict(zip(dataset.names, dataset.labels, strict=True))


def bar(dataset, what: str, unit: str) -> tqdm:
    return tqdm((dataset[i] for i in range(len(dataset))), what, len(dataset), unit=unit)


def read_sample(file: Path) -> Tensor:
    """uint8 (F, 3, H, W)."""
    return read_image(str(file), ImageReadMode.RGB)[None] if file.suffix == ".png" else read_mp4(file)


def nearest(sample: Tensor, clips: list[Tensor], interval: int) -> tuple[float, int, int]:
    """PSNR in dB, clip and start of the nearest stretch to a sample (F, 3, H, W), uint8."""
    frames, best = len(sample), (torch.inf, 0, 0)
    for number, clip in enumerate(clips):
        errors = torch.cdist(sample.flatten(1).float(), clip.flatten(1).float()).square()  # (F, frames of the clip)
        starts = torch.arange(len(clip) - (frames - 1) * interval)[:, None]
        along = torch.arange(frames)[None]
        total, start = errors[along, starts + interval * along].sum(1).min(0)  # along a diagonal of that table
        best = min(best, (total.item(), number, int(start)))
    mse = best[0] / sample.numel()
    return 10 * torch.log10(torch.tensor(255**2 / mse)).item(), best[1], best[2]


@friendly_errors()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("samples", type=Path, help="folder of a sampling run")
    parser.add_argument("--data", default="data/emoji-anim/videos", help="folder of what was trained on [%(default)s]")
    parser.add_argument(
        "--wordings",
        metavar="FILE",
        help="JSONL of video or image, and caption: prompts in other words, and what is meant",
    )
    parser.add_argument(
        "--pictures",
        metavar="FILE",
        default=str(CONFIGS / "text-to-image/emoji_deep_pictures.txt"),
        help="list of the images to compare with, or all [those that the embedded model saw]",
    )
    parser.add_argument("--out", type=Path, help="picture to write")
    args = parser.parse_args()
    config = json.loads((args.samples / "report.json").read_text(encoding="utf-8"))["config"]
    files = sorted([*args.samples.glob("0*.mp4"), *args.samples.glob("0*.png")])
    if not files:
        raise FileNotFoundError(f"no samples in {args.samples}")
    training = read_training(args.data, config, size=read_sample(files[0]).shape[-1], pictures=args.pictures)
    asked = (
        wanted(args, training)
        if "prompts" in config
        else config.get("classes") or list(range(config["model"]["num_classes"]))
    )
    shown, values, met, right = [], [], set(), 0
    for i, file in enumerate(tqdm(files, desc="comparing", unit="sample")):
        sample = read_sample(file)
        psnr, number, start = nearest(sample, training.clips, training.interval)
        values.append(psnr)
        met.add(number)
        right += training.labels[number] == (asked[file.name] if "prompts" in config else asked[i % len(asked)])
        shown += [sample, training[number, start, len(sample)]] if i < 8 else []
    print(
        f"{len(files)} samples, {len(training.clips)} in training: PSNR to the nearest {min(values):.1f} to "
        f"{max(values):.1f} dB, median {torch.tensor(values).median():.1f}; {right / len(files):.0%} of the "
        f"{'caption' if 'prompts' in config else 'class'} asked for; {len(met)} different ones"
    )
    if args.out:
        write_png(contact_sheet(shown), str(args.out))


def wanted(args: argparse.Namespace, training: Training) -> dict[str, int]:
    """File of a sample -> label that its prompt means. Raises ValueError for a prompt that means none."""
    prompts = json.loads((args.samples / "prompts.json").read_text(encoding="utf-8"))
    meant = dict(training.meant)
    if args.wordings:
        meant |= {caption: training.names[name] for _, name, caption in read_rows(args.wordings, training.kind)}
    if unknown := set(prompts.values()) - meant.keys():
        raise UserError(f"nothing in training is called {', '.join(map(repr, sorted(unknown)))}; give --wordings")
    return {file: meant[prompt] for file, prompt in prompts.items()}


if __name__ == "__main__":
    main()
