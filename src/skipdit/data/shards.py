"""Images in Parquet files or WebDataset archives, as the Hub keeps large data sets, read by the `datasets` library.

It lays the rows out once in its cache (`HF_HOME`), from where every process maps them into its memory. So rows have
numbers, and a training resumes at the very row. For speed, encode them to latents first.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from skipdit.data.captions import match
from skipdit.data.files import read_picture
from skipdit.data.images import centre_crop
from skipdit.data.pictures import PictureFolder
from skipdit.data.settings import PictureData, is_hub_name
from skipdit.utils.errors import UserError

if TYPE_CHECKING:
    import datasets

SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
IMAGE = ("image", "img", "jpg", "jpeg", "png", "webp")  # names of columns that are looked for
LABEL = ("label", "cls", "class", "fine_label")
CAPTION = ("caption", "text", "txt", "prompt")


class ShardImages(Dataset):
    """Labelled images: a column of images, and one of class ids or names; without the latter all are one class.

    Samples are {"image": uint8 (3, H, W), "label": int}. Raises FileNotFoundError or UserError, naming what is missing.
    """

    def __init__(self, root: str | Path, size: int):
        self._rows, self._column = open_rows(str(root))
        self.size, label = size, _find(self._rows, LABEL)
        values = [0] * len(self._rows) if label is None else self._rows[label]
        self.num_classes, self.labels = _class_ids(values, label and self._rows.features[label], root)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        picture = centre_crop(read_picture(_Encoded(self._rows, index, self._column)), self.size, self.size)
        return {"image": torch.from_numpy(np.array(picture)).permute(2, 0, 1), "label": self.labels[index]}


class ShardPictures(PictureFolder):
    """Captioned pictures: a column of images and one of captions. Otherwise as `PictureFolder`."""

    def __init__(self, config: PictureData):
        self._rows, self._column = open_rows(config.path)
        super().__init__(config)

    def _captioned(self, config: PictureData) -> tuple[dict[str, str], list[str]]:
        if config.picture_list:
            raise UserError("data.picture_list is of data.kind=pictures: filter the rows of shards beforehand")
        caption = config.captions or _find(self._rows, CAPTION)
        if caption not in self._rows.column_names:
            raise UserError(f"{config.path} has no column of captions {caption or ''}: {_columns(self._rows)}")
        texts = enumerate(self._rows[caption])
        rows = ((f"{config.path}, row {i}", f"row {i}", text) for i, text in texts)
        return match(rows, config.path, "any rows")

    def _file(self, name: str) -> "_Encoded":
        return _Encoded(self._rows, int(name.removeprefix("row ")), self._column)


class _Encoded(io.BytesIO):
    """The file of an image in a row, which goes by the row's number in messages."""

    def __init__(self, rows: "datasets.Dataset", index: int, column: str):
        super().__init__((rows[index][column] or {}).get("bytes") or b"")
        self.name = f"row {index}"

    def __str__(self) -> str:
        return self.name


def open_rows(path: str) -> tuple["datasets.Dataset", str]:
    """The rows of a folder of .parquet or .tar files, or of the split "train" of a data set on the Hub, and the name of
    their column of images, which is left encoded.

    Raises FileNotFoundError if there is nothing, UserError without such a column or the library.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"shards need the datasets library: `pip install datasets` ({error})") from error
    kind, files = path, []
    if Path(path).is_dir():
        found = {kind: sorted(Path(path).rglob(f"*{suffix}")) for kind, suffix in SUFFIXES.items()}
        kind, files = next(((kind, files) for kind, files in found.items() if files), (None, []))
        if kind is None:
            raise FileNotFoundError(f"{path} holds no {' or '.join(SUFFIXES.values())} files")
    elif not is_hub_name(path):
        raise FileNotFoundError(f"no folder {path} of {' or '.join(SUFFIXES.values())} files")
    try:
        rows = datasets.load_dataset(kind, data_files=[str(file) for file in files] or None, split="train")
    except Exception as error:  # damaged files make it raise nearly anything
        raise UserError(f"{path} cannot be read by the datasets library: {error.__cause__ or error}") from error
    column = _find(rows, IMAGE)
    if column is None:
        raise UserError(f"{path} has no column of images: {_columns(rows)}")
    return rows.cast_column(column, datasets.Image(decode=False)), column


def _find(rows: "datasets.Dataset", names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in rows.column_names), None)


def _columns(rows: "datasets.Dataset") -> str:
    return f"its columns are {', '.join(rows.column_names)}"


def _class_ids(values: list, feature: object, root: str | Path) -> tuple[int, list[int]]:
    """Number of classes, and the class id of every row: as they are, or of names in their order."""
    if all(isinstance(value, int) and value >= 0 for value in values):
        return max(getattr(feature, "num_classes", 0), max(values, default=-1) + 1), list(values)
    if all(isinstance(value, str) for value in values):
        names = {name: number for number, name in enumerate(sorted(set(values)))}
        return len(names), [names[value] for value in values]
    raise UserError(f"{root} has labels that are neither class ids from 0 on nor names")
