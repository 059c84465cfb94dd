"""What training draws from clips, wherever they are kept: stretches, with single images riding along.

A clip dataset is indexed by clip. `dataset[i]` is all of clip i; `dataset.draw(i, rng)` is what training sees of it: a
random stretch, and for joint image-video training (Latte, arXiv 2401.03048) frames of other clips behind it.

A caption is a label: where clips have captions, a clip's label is the number of its caption in `dataset.captions`.
"""

from abc import ABC, abstractmethod
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from skipdit.config import find_config, given_values, load_config, named_task
from skipdit.data.settings import CLIPS, IMAGES, PICTURES, ClipData, ImageData, PictureData
from skipdit.utils.errors import BrokenSample, UserError

ATTEMPTS = 10  # other pictures to try where one of those that ride along cannot be read


KINDS = {ImageData: IMAGES, ClipData: CLIPS, PictureData: PICTURES}  # as data.kind, besides latents
OF_TASK = {
    "class-to-image": ImageData,
    "class-to-video": ClipData,
    "text-to-video": ClipData,
    "text-to-image": PictureData,
}


def load_section(file: str, overrides: list[str]) -> ClipData | ImageData | PictureData:
    """The section `data` of a trainer's config: of clips, of images with classes, or of captioned pictures.

    Its kind tells which. For latents, or without a kind, the config's task does, which stands in it or is the name of
    its folder, or else it is the first of these that knows all its keys.

    Args:
        file: the YAML file.
        overrides: `data.key=value`, as the trainer takes them, or `key=value`.

    Raises ConfigError or ValueError, naming the key.
    """
    overrides = [text.removeprefix("data.") for text in overrides]
    given = given_values(file, "data") | dict(text.partition("=")[::2] for text in overrides)
    kind = given.pop("kind", None)
    fitting = [schema for schema, kinds in KINDS.items() if kind in kinds]
    if not fitting and (of_task := OF_TASK.get(named_task(file) or find_config(file).resolve().parent.name)):
        fitting = [of_task]
    fitting = fitting or [schema for schema in KINDS if given.keys() <= {field.name for field in fields(schema)}]
    config = load_config([*fitting, ClipData][0], file, overrides, section="data")
    known = [kind for kinds in KINDS.values() for kind in kinds]
    if config.kind not in (*known, "latents"):
        raise UserError(f"data.kind is {config.kind!r}; it is {', '.join(known)} or latents")
    return config


class ClipDataset(Dataset, ABC):
    """What training draws from clips, wherever they are kept.

    A subclass sets `names` and `labels` (None where there are neither classes nor captions), and opens clips.

    Args:
        num_frames: F, frames of a clip.
        frame_interval: frames of the source from one to the next.
        images: I, single frames beside every clip.
        images_from: "other" clips or the "same" one.

    Attributes:
        captions: where clips have captions, what `labels` are indices of; clips left out as too short keep theirs here.
        left_out: messages about clips left out for their captions, or as too short where that is known without reading.
        uncaptioned: those of the first kind.

    Raises ValueError, naming the setting, for one that is out of its range.
    """

    names: list[str]
    labels: list[int] | None

    def __init__(self, num_frames: int, frame_interval: int, images: int = 0, images_from: str = "other"):
        if num_frames < 1 or frame_interval < 1 or images < 0:
            raise UserError(
                f"num_frames {num_frames} and frame_interval {frame_interval} must be at least 1, images {images} 0"
            )
        if images_from not in ("other", "same"):
            raise UserError(f"data.images_from is {images_from!r}; it is 'other' or 'same'")
        self.num_frames, self.frame_interval = num_frames, frame_interval
        self.images, self.images_from = images, images_from
        self.captions: list[str] | None = None
        self.left_out: list[str] = []
        self.uncaptioned: list[str] = []

    @abstractmethod
    def open(self, index: int) -> "Clip":
        """Clip `index`, to read frames from. Raises BrokenSample."""

    @property
    def span(self) -> int:
        """Frames of the source that a clip reaches over."""
        return (self.num_frames - 1) * self.frame_interval + 1

    @property
    def num_classes(self) -> int:
        """0 without classes; labels that are of captions are none."""
        return 0 if self.labels is None or self.captions is not None else 1 + max(self.labels)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        """All frames of a clip."""
        clip = self.open(index)
        return clip.read(range(len(clip))) | self._label(index)

    def draw(self, index: int, rng: np.random.Generator) -> dict:
        """A stretch of clip `index` and `images` single frames, F + I pictures along the first axis.

        With classes or captions, `label` is the clip's and `image_label` (I,) are those of the images' clips. Where an
        image cannot be read, another one is drawn, and `broken` holds the message. Raises BrokenSample if the clip
        itself cannot be read.
        """
        clip = self.open(index)
        if self.is_short(len(clip)):
            raise BrokenSample(self.too_short(index, len(clip)))
        start = int(rng.integers(len(clip) - self.span + 1))
        parts, labels, broken = [clip.read(range(start, start + self.span, self.frame_interval))], [], []
        for _ in range(self.images):
            picture, label, messages = self._draw_image(index, clip, rng)
            parts.append(picture)
            labels.append(label)
            broken += messages
        sample = {key: torch.cat([part[key] for part in parts]) for key in parts[0]} | self._label(index)
        if self.labels is not None and self.images:
            sample["image_label"] = torch.tensor(labels)
        return sample | {"broken": "\n".join(broken)}

    def _draw_image(self, index: int, clip: "Clip", rng: np.random.Generator) -> tuple[dict, int | None, list[str]]:
        """A picture (1, ...) to ride along, its label, and messages of those that could not be read."""
        broken = []
        for _ in range(ATTEMPTS):
            try:
                return *self.draw_image(index, clip, rng), broken
            except BrokenSample as error:
                broken += error.args
        raise BrokenSample(*broken)

    def draw_image(self, index: int, clip: "Clip", rng: np.random.Generator) -> tuple[dict, int | None]:
        """One frame (1, ...) beside clip `index`, which is open as `clip`, and its label. Raises BrokenSample."""
        if self.images_from == "other":
            if len(self) < 2:
                raise UserError("images of other clips are wanted, and there is only one clip: set data.images=0")
            other = int(rng.integers(len(self) - 1))
            index = other + (other >= index)
            clip = self.open(index)
        frame = int(rng.integers(len(clip)))
        return clip.read(range(frame, frame + 1)), self._label(index).get("label")

    def _label(self, index: int) -> dict:
        return {} if self.labels is None else {"label": self.labels[index]}

    def is_short(self, length: int) -> bool:
        return length < self.span

    def too_short(self, index: int, length: int) -> str:
        return f"{self.names[index]}: {length} frames, too short for {self.num_frames} at every {self.frame_interval}"

    def _set_captions(self, found: dict[str, str], uncaptioned: list[str]) -> None:
        """Set the clips to those with a caption, as `captions.match` gives them; the labels count the captions."""
        self.uncaptioned = uncaptioned
        self.left_out += uncaptioned
        self.names, self.captions, self.labels = list(found), list(found.values()), list(range(len(found)))

    def _leave_out_short(self, lengths: list[int]) -> list[int]:
        """Drop the clips that are too short. Returns the positions that stay."""
        kept = [i for i, length in enumerate(lengths) if not self.is_short(length)]
        short = [self.too_short(i, length) for i, length in enumerate(lengths) if self.is_short(length)]
        if not kept:
            raise UserError(f"all {len(lengths)} clips are too short, for example {short[0]}")
        self.left_out += short
        self.names = [self.names[i] for i in kept]
        self.labels = None if self.labels is None else [self.labels[i] for i in kept]
        return kept


class Clip(ABC):
    """An open clip: its number of frames, and a way to read some."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, frames: range) -> dict[str, Tensor]:
        """Tensors with one entry per frame along the first axis. Raises BrokenSample."""
