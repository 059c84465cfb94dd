"""How near the embedded video model's samples are to its training clips: did it learn, and did it memorise?

    python class-to-video/sample.py --config configs/class-to-video/demo.yaml num_samples=32 out=samples/video-32
    python scripts/nearest_clip.py samples/video-32 --data data/emoji-anim/videos --out samples/video-32/nearest.png

For every sample, the training stretch (any clip, any start) with the least squared error, over all frames and pixels.
Prints the PSNR to it, how often it is of the class that was asked for, and how many different clips were met; the
picture shows samples with their nearest stretch below each.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import write_png
from tqdm import tqdm

from skipdit.config import friendly_errors
from skipdit.data.clips import ClipData, ClipFolder
from skipdit.media import contact_sheet, read_mp4

EMOJI = ["face-smiling", "face-affection", "face-tongue", "face-negative", "face-costume", "cat-face", "heart", "hands"]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="folder of a sampling run")
    parser.add_argument("--data", default="data/emoji-anim/videos", help="folder of the training clips [%(default)s]")
    parser.add_argument("--out", type=Path, help="picture to write")
    args = parser.parse_args()
    with friendly_errors():
        report = json.loads((args.samples / "report.json").read_text())
        frames, size = report["config"]["num_frames"], report["config"]["image_size"]
        asked = report["config"]["classes"] or list(range(len(EMOJI)))
        dataset = ClipFolder(ClipData(path=args.data, classes=EMOJI, num_frames=frames, image_size=size))
        clips, labels, span = [], [], dataset.span
        for index in tqdm(range(len(dataset)), desc="reading", unit="clip"):
            clip = dataset[index]
            if len(clip["image"]) >= span:
                clips.append(clip["image"])
                labels.append(clip["label"])
    shown, values, met, right = [], [], set(), 0
    files = sorted(args.samples.glob("0*.mp4"))
    for i, file in enumerate(tqdm(files, desc="comparing", unit="sample")):
        sample = read_mp4(file)
        psnr, number, start = nearest(sample, clips, dataset.frame_interval)
        values.append(psnr)
        met.add(number)
        right += labels[number] == asked[i % len(asked)]
        shown += [sample, clips[number][start : start + span : dataset.frame_interval]] if i < 8 else []
    print(
        f"{len(files)} samples, {len(clips)} training clips: PSNR to the nearest stretch {min(values):.1f} to "
        f"{max(values):.1f} dB, median {torch.tensor(values).median():.1f}; {right / len(files):.0%} of the class "
        f"asked for; {len(met)} different clips"
    )
    if args.out:
        write_png(contact_sheet(shown), str(args.out))


if __name__ == "__main__":
    main()
