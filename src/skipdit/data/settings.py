"""Settings of training data: labelled images, clips, captioned pictures."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from skipdit.config import Settings, setting
from skipdit.data.captions import BESIDE

IMAGES = ("image_folder", "fashion_mnist", "image_shards")  # as data.kind
PICTURES = ("pictures", "picture_shards")
CLIPS = ("videos", "frames", "clip_shards")
READERS = min(4, os.cpu_count() or 1)  # processes that read; PyTorch warns of more than there are processors


def is_hub_name(path: str) -> bool:
    """Whether a path that is no folder may be a data set's name on the Hub, OWNER/NAME."""
    return path.count("/") == 1 and not path.startswith((".", "/")) and not Path(path).exists()


@dataclass(frozen=True)
class ImageData(Settings):
    """Where training images come from."""

    kind: str = setting(
        "image_folder",
        "image_folder, fashion_mnist, image_shards (Parquet or WebDataset), or latents (of `skipdit encode`)",
    )
    path: str = setting(
        "data/imagenet/train", "folder of the images, shards or latents; of shards also a Hub name", identity=False
    )
    image_size: int = setting(256, "pixels along a side", least=1)
    latents: str = setting("sample", "mean or sample: what of the autoencoder's posterior is trained on")
    flip: bool = setting(True, "flip half of the images horizontally")

    def files(self) -> dict[str, str]:
        """What has to be there, by setting. FashionMNIST and shards on the Hub are downloaded."""
        downloaded = self.kind == "fashion_mnist" or (self.kind == "image_shards" and is_hub_name(self.path))
        return {} if downloaded else {"data.path": self.path}


@dataclass(frozen=True)
class ClipData(Settings):
    """Where training clips come from."""

    kind: str = setting(
        "videos",
        "videos (files), frames (in folders), clip_shards (Parquet or WebDataset), or latents (of `skipdit encode`)",
    )
    path: str = setting(
        "data/clips",
        "folder of the clips, nested as it may be, of shards or of latents; of shards also a Hub name",
        identity=False,
    )
    clip_list: str | None = setting(None, "text file with one clip per line, relative to path; unset: all clips there")
    labelled: bool = setting(
        False, "a clip's class is the folder right below path that it lies in; of shards, a column"
    )
    classes: list[str] = field(
        default_factory=list, metadata={"help": "class folders to use, in order of their ids; empty: all, by name"}
    )
    captions: str | None = setting(
        None,
        "JSONL or CSV of video (relative to path), caption; or txt: beside every clip; of shards, their column",
        identity=False,
    )
    num_frames: int = setting(16, "frames of a clip", least=1)
    frame_interval: int = setting(3, "frames of the source from one to the next; 1 takes all", least=1)
    images: int = setting(0, "single frames beside every clip, for joint training", least=0)
    images_from: str = setting("other", "other or same: take those frames from other clips, or from the clip itself")
    image_path: str | None = setting(None, "folder of the pictures in image_list", identity=False)
    image_list: str | None = setting(None, "text file, a picture <clip>/<frame> per line: draw images from these")
    image_size: int = setting(256, "pixels along a side: centre crop, then resize", least=1)
    latents: str = setting("sample", "mean or sample: what of the autoencoder's posterior is trained on")
    flip: bool = setting(True, "flip half of the clips, and of the images, horizontally")

    def files(self) -> dict[str, str]:
        """What has to be there, by setting."""
        if self.kind == "clip_shards":
            return {} if is_hub_name(self.path) else {"data.path": self.path}
        names = ("path", "clip_list", "image_path", "image_list", *["captions"] * (self.captions != BESIDE))
        return {f"data.{name}": value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class PictureData(Settings):
    """Where captioned pictures come from."""

    kind: str = setting(
        "pictures", "pictures, picture_shards (Parquet or WebDataset), or latents (of `skipdit encode`)"
    )
    path: str = setting(
        "data/pictures",
        "folder of the pictures, nested as it may be, of shards or of latents; of shards also a Hub name",
        identity=False,
    )
    captions: str | None = setting(
        None,
        "JSONL or CSV of image (relative to path), caption; or txt: beside every one; of shards, their column",
        identity=False,
    )
    picture_list: str | None = setting(None, "text file with one picture per line, relative to path; unset: all there")
    image_size: int = setting(1024, "pixels along a side of the square bucket", least=1)
    buckets: list[str] = field(
        default_factory=list, metadata={"help": "shapes of pictures, HEIGHTxWIDTH in pixels; empty: only the square"}
    )
    latents: str = setting("sample", "mean or sample: what of the autoencoder's posterior is trained on")
    flip: bool = setting(True, "flip half of the pictures horizontally")

    def files(self) -> dict[str, str]:
        """What has to be there, by setting."""
        if self.kind == "picture_shards":
            return {} if is_hub_name(self.path) else {"data.path": self.path}
        names = ("path", "picture_list", *["captions"] * (self.captions != BESIDE))
        return {f"data.{name}": value for name in names if (value := getattr(self, name)) is not None}
