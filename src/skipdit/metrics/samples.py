"""What is judged, and what it is judged by: the samples of a run, folders of pictures or clips, an .npz, a data set.

A sample is uint8 (F, 3, H, W); a picture is a clip of one frame.
"""

import hashlib
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from skipdit.data.clip_folder import VIDEO_SUFFIXES, ClipFolder
from skipdit.data.files import IMAGE_SUFFIXES, is_a, read_picture, walk
from skipdit.data.images import centre_crop
from skipdit.data.settings import ClipData
from skipdit.data.video import Video, read_mp4
from skipdit.utils.errors import BrokenSample, UserError
from skipdit.utils.seeding import seed_of
from skipdit.utils.text import read_json

EVALUATION = "evaluation"  # folder inside of a run's
_EXTRAS = {"grid", "sheet", "compare", "preview"}  # what a sampler writes beside its samples
_UNKNOWN = ("guidance_scale", "steps", "sampler", "seed", "vae", "cache")  # without a report
_SETTINGS = ("steps", "seed", "guidance_scale", "guidance_channels", "guidance_low", "guidance_high", "negative_prompt")


class Samples(ABC):
    """Numbered samples.

    Attributes:
        source: where they are.
        names: theirs.
        report, job: of the run that made them; empty where that is unknown.
        about: what to report of them besides.
        statistics: mean and covariance of their features that the file brings along, by the network of FID, or None.
    """

    names: Sequence[str]
    statistics: tuple[np.ndarray, np.ndarray] | None = None

    def __init__(self, source: Path, run: Path | None = None):
        self.source = source
        self.report, self.job = (_json(run / name) if run else {} for name in ("report.json", "job.json"))
        self.about: dict[str, Any] = {}
        self._stamps: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def __getitem__(self, index: int) -> Tensor:
        """uint8 (F, 3, H, W). Raises ValueError, naming the file, if it cannot be read."""

    @abstractmethod
    def content(self, index: int) -> bytes:
        """What makes the sample what it is."""

    def stamp(self, index: int) -> str:
        """Name and hash of the content, as it was when first asked for."""
        if index not in self._stamps:
            self._stamps[index] = f"{self.names[index]} {hashlib.sha256(self.content(index)).hexdigest()[:32]}"
        return self._stamps[index]

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of the first one."""
        return tuple(self[0].shape[-2:])

    def protocol(self) -> dict[str, Any]:
        """How the samples came about, as far as that is known, their number and hash."""
        stamps = "\n".join(map(self.stamp, range(len(self))))
        digest = hashlib.sha256(stamps.encode(errors="surrogatepass")).hexdigest()
        found = {"source": str(self.source), "num_samples": len(self), "sha256": digest, "size": list(self.size)}
        found |= self.about
        if not self.report:
            return found | {"unknown": list(_UNKNOWN)}
        config = self.report["config"]
        found |= {key: config[key] for key in _SETTINGS if key in config}
        found["sampler"] = config.get("sampler") or config.get("scheduler")
        found |= {f"{kind}_steps": count for kind, count in self.report["steps"].items()}
        for part in ("weights", "vae", "text_encoder"):  # by name as far as the config has one, and by fingerprint
            if part in self.job:
                found[part] = {"source": config.get(part) or config.get("pipeline"), "fingerprint": self.job[part]}
        found |= {"dtype": self.job.get("dtype"), "cache": self.report["cache"]}
        return found | {"made_with": self.report["versions"], "device": self.report["device"]}


class Files(Samples):
    """Pictures, or clips that are video files, and the report of the run that made them, if there is one.

    Raises FileNotFoundError or ValueError if there are none, or fewer than the report says.
    """

    def __init__(self, source: Path):
        super().__init__(source, source)
        if self.job and not self.report:
            raise UserError(f"{source} holds an unfinished run: the same sampling command again completes it")
        found = source.glob("*") if self.report else walk(source)
        found = [path for path in found if EVALUATION not in path.relative_to(source).parts]
        clips = [path for path in found if is_a(path, VIDEO_SUFFIXES)]
        paths = clips or [path for path in found if is_a(path, IMAGE_SUFFIXES)]
        if self.report:
            paths = [path for path in paths if path.stem not in _EXTRAS and not path.name.startswith("partial-")]
            if len(paths) != (wanted := self.report["num_samples"]):
                raise UserError(
                    f"{source} holds {len(paths)} samples, and its report.json says {wanted}; "
                    "the sampling command again, for as many as are to be judged, completes it"
                )
        if not paths:
            raise UserError(f"{source} holds neither pictures nor video files")
        self.names = sorted(path.relative_to(source).as_posix() for path in paths)
        formats = {path.suffix.lower()[1:] for path in paths}
        self.about = {"format": " ".join(sorted(formats))}  # png keeps what was sampled, mp4 and jpg nearly

    def content(self, index: int) -> bytes:
        return (self.source / self.names[index]).read_bytes()

    def __getitem__(self, index: int) -> Tensor:
        path = self.source / self.names[index]
        if is_a(path, VIDEO_SUFFIXES):
            return read_mp4(path)
        try:
            return _tensor(read_picture(path))
        except BrokenSample as error:
            raise UserError(str(error)) from error

    @cached_property
    def prompts(self) -> dict[str, str]:
        """The prompt of every sample of a run from prompts, by its file's name. Raises FileNotFoundError."""
        file = self.source / "prompts.json"
        if not (prompts := _json(file)):
            below = sorted(path.parent for path in self.source.glob("*/prompts.json"))
            hint = f"{', '.join(map(str, below[:3]))} has one" if below else "a sampler with prompts writes it"
            raise FileNotFoundError(
                f"{file} is missing: it says which prompt made which file, as {{file: prompt}}; {hint}"
            )
        if strays := [name for name in self.names if name not in prompts]:
            raise UserError(f"{file} has no prompt of {', '.join(strays[:5])}")
        return prompts


class Arrays(Samples):
    """Pictures in an .npz as ADM's evaluation suite has them, `arr_0` uint8 (N, H, W, 3); read into memory whole.

    Raises ValueError if it holds neither pictures nor statistics.
    """

    def __init__(self, source: Path):
        super().__init__(source, source.parent if source.name == "samples.npz" else None)  # as a sampler calls its own
        try:
            with np.load(source) as file:
                arrays = {key: file[key] for key in ("arr_0", "mu", "sigma") if key in file}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{source} cannot be read as .npz: {error}") from error
        self._pixels = arrays.get("arr_0", np.empty((0, 1, 1, 3), np.uint8))
        if self._pixels.dtype != np.uint8 or self._pixels.ndim != 4 or self._pixels.shape[3] != 3:
            raise UserError(f"{source}: arr_0 is {self._pixels.dtype} {self._pixels.shape}, not uint8 (N, H, W, 3)")
        self.statistics = (arrays["mu"], arrays["sigma"]) if {"mu", "sigma"} <= arrays.keys() else None
        if not len(self._pixels) and self.statistics is None:
            raise UserError(f"{source} holds neither pictures (arr_0) nor statistics (mu and sigma)")
        self.names = [f"{i:06d}" for i in range(len(self._pixels))]

    def content(self, index: int) -> bytes:
        return self._pixels[index].tobytes()

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self._pixels[index]).permute(2, 0, 1)[None]


class Stretches(Samples):
    """Stretches of real clips, as training draws them: of every clip one, and where clips are too few further ones.

    Clips that are too short or cannot be opened are left out and counted.

    Args:
        source: folder of video files, or of folders of numbered pictures, nested as they may be.
        frames, interval: of a stretch: every `interval`-th frame of the clip.
        size: pixels along a side: centre crop, then resize; None keeps the first clip's smaller side.
        most: stretches to draw.

    Raises FileNotFoundError or ValueError if there are none.
    """

    def __init__(self, source: Path, frames: int, interval: int, size: int | None, most: int):
        is_video = any(is_a(path, VIDEO_SUFFIXES) for path in walk(source))
        kind = "videos" if is_video else "frames"
        config = ClipData(kind=kind, path=str(source), num_frames=frames, frame_interval=interval, image_size=size or 1)
        super().__init__(source)
        self._clips = ClipFolder(config)
        self._clips.names = [name for name in self._clips.names if EVALUATION not in Path(name).parts]
        if size is None:
            self._clips.size = self._smaller_side()
        chosen, left_out = {}, list(self._clips.left_out)  # clip -> where its stretches can begin, in random order
        for number in np.random.default_rng(0).permutation(len(self._clips.names)).tolist():
            if len(chosen) == most:
                break
            try:
                chosen[number] = self._starts(number)
            except BrokenSample as error:
                left_out += error.args
        if not chosen:
            raise UserError(f"{source} has no clip of {frames} frames at every {interval}, for example: {left_out[0]}")
        rounds = range(max(map(len, chosen.values())) if len(chosen) < most else 1)
        places = [(number, starts[i]) for i in rounds for number, starts in chosen.items() if i < len(starts)]
        self._places = places[:most]
        self.names = [f"{self._clips.names[number]}:{start}" for number, start in self._places]
        self.about = {"clips": len(chosen), "frame_interval": interval, "clips_left_out": len(left_out)}

    def _files(self, number: int) -> list[Path]:
        """What a clip consists of: the video file, or its pictures."""
        path = self.source / self._clips.names[number]
        return [path] if path.is_file() else sorted(file for file in path.iterdir() if is_a(file, IMAGE_SUFFIXES))

    def _smaller_side(self) -> int:
        """That of the first clip which can be read."""
        for number in range(len(self._clips.names)):
            first = self._files(number)[0]
            with suppress(BrokenSample):
                frame = Video(first).read(range(1))[0] if is_a(first, VIDEO_SUFFIXES) else _tensor(read_picture(first))
                return min(frame.shape[-2:])
        raise UserError(f"{self.source} has no clip that can be read")

    def _starts(self, number: int) -> list[int]:
        """Raises BrokenSample for a clip that is short or cannot be read."""
        length = len(self._clips.open(number))
        if self._clips.is_short(length):
            raise BrokenSample(self._clips.too_short(number, length))
        return np.random.default_rng(seed_of(0, number)).permutation(length - self._clips.span + 1).tolist()

    def content(self, index: int) -> bytes:
        files = self._files(self._places[index][0])
        return b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)

    def __getitem__(self, index: int) -> Tensor:
        number, start = self._places[index]
        clips = self._clips
        try:
            return clips.open(number).read(range(start, start + clips.span, clips.frame_interval))["image"]
        except BrokenSample as error:
            raise UserError(str(error)) from error


def open_samples(path: str | Path) -> Files | Arrays:
    """A run, a folder or an .npz. Raises FileNotFoundError or ValueError if there is nothing of the kind."""
    path = Path(path)
    if path.is_file() and path.suffix == ".npz":
        return Arrays(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a folder nor an .npz file")
    return Files(path)


def open_clips(path: str | Path, frames: int, interval: int, size: int | None, most: int) -> Files | Stretches:
    """The clips of a run, or stretches of those of a folder; the arguments are those of `Stretches`."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder of clips")
    is_run = any((path / name).is_file() for name in ("report.json", "job.json"))
    return Files(path) if is_run else Stretches(path, frames, interval, size, most)


def fitted(sample: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (F, 3, H, W) -> (F, 3, *size), by ADM's centre crop; unchanged where the size fits."""
    if tuple(sample.shape[-2:]) == tuple(size):
        return sample
    frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in sample]
    return torch.cat([_tensor(centre_crop(frame, *size)) for frame in frames])


def _json(file: Path) -> dict[str, Any]:
    """What a run wrote, nothing where there is no such file. Raises UserError for a damaged one."""
    return read_json(file) if file.is_file() else {}


def _tensor(image: Image.Image) -> Tensor:
    """(1, 3, H, W)"""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
