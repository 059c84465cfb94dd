"""How near the embedded video models' samples are to their training clips: did they learn, and did they memorise?

    python class-to-video/sample.py --config configs/class-to-video/demo.yaml num_samples=32 out=samples/video-32
    python scripts/nearest_clip.py samples/video-32 --data data/emoji-anim/videos --out samples/video-32/nearest.png

Samples of text-to-video, whose prompts are captions of the training clips, or other wordings of them:
    python scripts/nearest_clip.py samples/captions --data data/emoji-anim
    python scripts/nearest_clip.py samples/wordings --data data/emoji-anim \\
        --wordings configs/text-to-video/emoji_wordings.jsonl

For every sample, the training stretch (any clip, any start) with the least squared error, over all frames and pixels.
Prints the PSNR to it, how often it is of the class or caption that was asked for, and how many different clips were
met; the picture shows samples with their nearest stretch below each.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import write_png
from tqdm import tqdm

from skipdit.config import friendly_errors
from skipdit.data.captions import read_rows
from skipdit.data.clip_folder import ClipFolder
from skipdit.data.clips import ClipData
from skipdit.media import contact_sheet, read_mp4

EMOJI = ["face-smiling", "face-affection", "face-tongue", "face-negative", "face-costume", "cat-face", "heart", "hands"]
CLIPS = Path(__file__).parents[1] / "configs/text-to-video/emoji_clips.txt"


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
    parser.add_argument(
        "--wordings", metavar="FILE", help="JSONL of video and caption: prompts in other words, and the clips they mean"
    )
    parser.add_argument("--out", type=Path, help="picture to write")
    args = parser.parse_args()
    with friendly_errors():
        config = json.loads((args.samples / "report.json").read_text())["config"]
        texts = "prompts" in config
        files = sorted(args.samples.glob("0*.mp4"))
        size = read_mp4(files[0]).shape[-1]
        chosen = {"captions": f"{args.data}/captions.jsonl", "clip_list": str(CLIPS)} if texts else {"classes": EMOJI}
        dataset = ClipFolder(ClipData(path=args.data, **chosen, num_frames=config["num_frames"], image_size=size))
        meant = wanted_clips(args, dataset) if texts else None
        clips, labels, span = [], [], dataset.span
        for index in tqdm(range(len(dataset)), desc="reading", unit="clip"):
            clip = dataset[index]
            if len(clip["image"]) >= span:
                clips.append(clip["image"])
                labels.append(clip["label"])
    asked = config.get("classes") or list(range(len(EMOJI)))
    shown, values, met, right = [], [], set(), 0
    for i, file in enumerate(tqdm(files, desc="comparing", unit="sample")):
        sample = read_mp4(file)
        psnr, number, start = nearest(sample, clips, dataset.frame_interval)
        values.append(psnr)
        met.add(number)
        right += labels[number] == (meant[file.name] if texts else asked[i % len(asked)])
        shown += [sample, clips[number][start : start + span : dataset.frame_interval]] if i < 8 else []
    print(
        f"{len(files)} samples, {len(clips)} training clips: PSNR to the nearest stretch {min(values):.1f} to "
        f"{max(values):.1f} dB, median {torch.tensor(values).median():.1f}; {right / len(files):.0%} of the "
        f"{'caption' if texts else 'class'} asked for; {len(met)} different clips"
    )
    if args.out:
        write_png(contact_sheet(shown), str(args.out))


def wanted_clips(args: argparse.Namespace, dataset: ClipFolder) -> dict[str, int]:
    """File of a sample -> label of the clip that its prompt means. Raises ValueError for a prompt that means none."""
    prompts = json.loads((args.samples / "prompts.json").read_text())
    meant = {caption: label for label, caption in enumerate(dataset.captions)}
    if args.wordings:
        clips = dict(zip(dataset.names, dataset.labels, strict=True))
        meant |= {caption: clips[video] for _, video, caption in read_rows(args.wordings)}
    if unknown := set(prompts.values()) - meant.keys():
        raise ValueError(f"no training clip is called {', '.join(map(repr, sorted(unknown)))}; give --wordings")
    return {file: meant[prompt] for file, prompt in prompts.items()}


if __name__ == "__main__":
    main()
