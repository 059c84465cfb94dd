"""Images and clips in Parquet files or WebDataset archives, as the Hub keeps large data sets, read by `datasets`.

It lays the rows out once in its cache (`HF_HOME`), from where every process maps them into its memory. So rows have
numbers, and a training resumes at the very row. For speed, encode them to latents first.
"""

import io
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from skipdit.data.captions import match
from skipdit.data.clip_folder import VideoClip, refuse_mixtures
from skipdit.data.clips import Clip, ClipDataset
from skipdit.data.files import is_a, read_picture, walk
from skipdit.data.images import centre_crop
from skipdit.data.pictures import PictureFolder
from skipdit.data.settings import ClipData, PictureData, is_hub_name
from skipdit.data.video import Video, load_av
from skipdit.utils.errors import UserError

if TYPE_CHECKING:
    import datasets

SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
COLUMNS = {  # names that are looked for
    "Image": ("image", "img", "jpg", "jpeg", "png", "webp"),
    "Video": ("video", "clip", "mp4", "webm", "mkv", "avi", "mov"),
}
LABEL = ("label", "cls", "class", "fine_label")
CAPTION = ("caption", "text", "txt", "prompt")
TRAIN = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)  # names of files, or folders, of that split


class ShardImages(Dataset):
    """Labelled images: a column of images, and one of class ids or names; without the latter all are one class.

    Samples are {"image": uint8 (3, H, W), "label": int}. Raises FileNotFoundError or UserError, naming what is missing.
    """

    def __init__(self, root: str | Path, size: int):
        rows, self._files = open_rows(str(root))
        self.size, label = size, _find(rows, LABEL)
        values = [0] * len(rows) if label is None else rows[label]
        classes, self.labels = _class_ids(values, label and rows.features[label], root)
        self.num_classes = len(classes)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        picture = centre_crop(read_picture(_Encoded(self._files, index)), self.size, self.size)
        return {"image": torch.from_numpy(np.array(picture)).permute(2, 0, 1), "label": self.labels[index]}


class ShardPictures(PictureFolder):
    """Captioned pictures: a column of images and one of captions. Otherwise as `PictureFolder`."""

    def __init__(self, config: PictureData):
        self._rows, self._files = open_rows(config.path)
        super().__init__(config)

    def _captioned(self, config: PictureData) -> tuple[dict[str, str], list[str]]:
        if config.picture_list:
            raise UserError("data.picture_list is of data.kind=pictures: filter the rows of shards beforehand")
        return _captioned(self._rows, config)

    def _file(self, name: str) -> "_Encoded":
        return _Encoded(self._files, _number(name))


class ShardClips(ClipDataset):
    """Clips: a column of video files, and with `captions` one of them, with `labelled` one of class ids or names.

    Samples and errors are those of `ClipFolder`.
    """

    def __init__(self, config: ClipData):
        super().__init__(config.num_frames, config.frame_interval, config.images, config.images_from)
        refuse_mixtures(config)
        for name in ("clip_list", "classes", "image_list", "image_path"):
            if getattr(config, name):
                raise UserError(f"data.{name} is of clips in a folder: filter the rows of shards beforehand")
        load_av()  # or say that it is missing, before many processes read
        rows, self._files = open_rows(config.path, "Video")
        self.root, self.size = config.path, config.image_size
        self.pictures, self.strays = None, Counter()
        self.names, self.labels = [_name(i) for i in range(len(rows))], None
        if config.captions:
            self._set_captions(*_captioned(rows, config))
        elif config.labelled:
            label = _find(rows, LABEL)
            if label is None:
                raise UserError(f"{config.path} has no column of classes: {_columns(rows)}")
            self.classes, self.labels = _class_ids(rows[label], rows.features[label], config.path)

    def open(self, index: int) -> Clip:
        return VideoClip(self._video(index), self.size)

    def count(self, index: int) -> int:
        """The frames that decoding all of clip `index` gives, whatever its file says of them. Raises BrokenSample."""
        return len(self._video(index, decode=True))

    def _video(self, index: int, decode: bool = False) -> Video:
        file = _Encoded(self._files, _number(self.names[index]))
        return Video(Path(self.root, file.name), decode, file)


def _name(row: int) -> str:
    """What a row is called, in messages and in place of a file's name."""
    return f"row {row}"


def _number(name: str) -> int:
    return int(name.removeprefix("row "))


def _captioned(rows: "datasets.Dataset", config: ClipData | PictureData) -> tuple[dict[str, str], list[str]]:
    """Captions by the rows' names, and messages about those that have none."""
    caption = config.captions or _find(rows, CAPTION)
    if caption not in rows.column_names:
        raise UserError(f"{config.path} has no column of captions {caption or ''}: {_columns(rows)}")
    texts = ((f"{config.path}, {_name(i)}", _name(i), text) for i, text in enumerate(rows[caption]))
    return match(texts, config.path, "any rows")


class _Encoded(io.BytesIO):
    """The file in a row, which goes by the row's name in messages."""

    def __init__(self, files: "datasets.Dataset", index: int):
        (value,) = files[index].values()
        content = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(value, dict) and content is None and value.get("path"):  # of a folder of files on the Hub
            content = Path(value["path"]).read_bytes()
        super().__init__(content or b"")
        self.name = _name(index)

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__  # which Pillow shows


def open_rows(path: str, content: str = "Image") -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """The rows of a folder of .parquet or .tar files, or of a data set on the Hub, and their column of images, or of
    another `content`, alone and left encoded: reading a row decodes all that it holds.

    Of several splits it is "train": in a folder, if some files have that in their names, those.

    Raises FileNotFoundError if there is nothing, UserError without such a column or the library.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"shards need the datasets library: `pip install datasets` ({error})") from error
    kind, files = path, []
    if Path(path).is_dir():
        everything = sorted(walk(path))
        found = {kind: [file for file in everything if is_a(file, {suffix})] for kind, suffix in SUFFIXES.items()}
        kind, files = next(((kind, files) for kind, files in found.items() if files), (None, []))
        if kind is None:
            raise FileNotFoundError(f"{path} holds no {' or '.join(SUFFIXES.values())} files")
        files = [file for file in files if TRAIN.search(str(file.relative_to(path)))] or files
    elif not is_hub_name(path):
        raise FileNotFoundError(f"no folder {path} of {' or '.join(SUFFIXES.values())} files")
    try:
        rows = datasets.load_dataset(kind, data_files=[str(file) for file in files] or None, split="train")
    except Exception as error:  # damaged files make it raise nearly anything
        raise UserError(f"{path} cannot be read by the datasets library: {error.__cause__ or error}") from error
    column = _find(rows, COLUMNS[content])
    if column is None:
        raise UserError(f"{path} has no column of {content.lower()}s: {_columns(rows)}")
    files = rows.select_columns([column])
    if hasattr(datasets, content):  # old versions leave videos as they are
        files = files.cast_column(column, getattr(datasets, content)(decode=False))
    return rows, files


def _find(rows: "datasets.Dataset", names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in rows.column_names), None)


def _columns(rows: "datasets.Dataset") -> str:
    return f"its columns are {', '.join(rows.column_names)}"


def _class_ids(values: list, feature: object, root: str | Path) -> tuple[list[str], list[int]]:
    """The names of the classes, and the class id of every row: as they are, or of names in their order."""
    if all(isinstance(value, int) and value >= 0 for value in values):
        numbers = [str(number) for number in range(max(values, default=-1) + 1)]
        return getattr(feature, "names", None) or numbers, list(values)
    if all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        ids = {name: number for number, name in enumerate(names)}
        return names, [ids[value] for value in values]
    raise UserError(f"{root} has labels that are neither class ids from 0 on nor names")
