"""Writing clips for people to look at: mp4, GIF, and contact sheets."""

from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from skipdit.utils.files import whole_file, write_png


def write_mp4(path: Path, frames: Tensor, fps: float) -> None:
    """Frames uint8 (F, 3, H, W), H and W even -> H.264 that any player shows, nearly without loss."""
    options = ["-crf", "10"]
    imageio.imwrite(
        path, _pixels(frames), plugin="FFMPEG", fps=fps, codec="libx264", macro_block_size=1, output_params=options
    )
    if not _has_index(path):  # nobody hears of what goes wrong in ffmpeg
        raise RuntimeError("ffmpeg did not write all of it")


def write_gif(path: Path, frames: Tensor, fps: float) -> None:
    """Frames uint8 (F, 3, H, W) -> a GIF that repeats for ever, each frame with its own 256 colours."""
    first, *rest = [Image.fromarray(frame).quantize(dither=Image.Dither.NONE) for frame in _pixels(frames)]
    with whole_file(path) as partial:
        first.save(partial, format="gif", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def contact_sheet(clips: Sequence[Tensor], columns: int = 8) -> Tensor:
    """Clips, each uint8 (F, 3, H, W) -> one picture, a clip per line, `columns` of its frames evenly spread."""
    shown = []
    for clip in clips:
        picks = torch.linspace(0, len(clip) - 1, min(columns, len(clip))).round().long()
        shown.append(clip[picks])
    return make_grid(torch.cat(shown), nrow=len(shown[0]), pad_value=255)


def side_by_side(clips: Sequence[Tensor], columns: int = 4) -> Tensor:
    """Clips of one length, each uint8 (F, 3, H, W) -> one clip that shows all of them in a grid."""
    grids = [make_grid(torch.stack(frames), nrow=columns, pad_value=255) for frames in zip(*clips, strict=True)]
    film = torch.stack(grids)
    return film[..., : film.shape[-2] // 2 * 2, : film.shape[-1] // 2 * 2]  # H.264 wants even sides


def write_look(folder: Path, name: str, clips: Sequence[Tensor], fps: float = 8) -> None:
    """Clips, each uint8 (F, 3, H, W), for a look at a training: `<name>.png`, frames of each, and `<name>.gif`."""
    folder.mkdir(exist_ok=True)
    write_png(contact_sheet(clips), str(folder / f"{name}.png"))
    write_gif(folder / f"{name}.gif", side_by_side(clips), fps)


def _has_index(path: Path) -> bool:
    """Whether an mp4 file has its index, which is written last, and all of it."""
    content = path.read_bytes()
    place = content.rfind(b"moov") - 4
    return place >= 0 and place + int.from_bytes(content[place : place + 4], "big") <= len(content)


def _pixels(frames: Tensor) -> np.ndarray:
    return frames.permute(0, 2, 3, 1).cpu().numpy()
