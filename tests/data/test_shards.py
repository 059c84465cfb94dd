"""Images in Parquet files and WebDataset archives: what a folder of the same files gives."""

import io
import sys
import tarfile

import datasets
import numpy as np
import pytest
import torch
from conftest import state, stats
from PIL import Image

from skipdit.config import changed
from skipdit.data.images import ImageFolder
from skipdit.data.pictures import PictureFolder
from skipdit.data.settings import ImageData, PictureData
from skipdit.data.shards import ShardImages, ShardPictures
from skipdit.tasks import TASKS
from skipdit.utils.errors import BrokenSample, UserError

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(number: int) -> bytes:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (20 + 3 * number, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Six files in three class folders, with captions."""
    rows = []
    for number in range(6):
        path = tmp_path / "files" / CLASSES[number // 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
        rows.append(f'{{"image": "{path.relative_to(tmp_path / "files")}", "caption": "number {number}"}}\n')
    (tmp_path / "captions.jsonl").write_text("".join(rows))
    return tmp_path / "files"


def write_parquet(root, labels=None):
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(6)], "text": [f"number {i}" for i in range(6)]}
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    features["label"] = datasets.ClassLabel(names=CLASSES) if labels is None else datasets.Value("string")
    rows["label"] = labels or [i // 2 for i in range(6)]
    whole = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    root.mkdir()
    for part in range(2):
        whole.shard(2, part, contiguous=True).to_parquet(root / f"train-{part:05d}.parquet")
    return root


def write_tar(root):
    root.mkdir()
    for part in range(2):
        with tarfile.open(root / f"{part:06d}.tar", "w") as tar:
            for i in range(3 * part, 3 * part + 3):
                for suffix, data in (("png", png(i)), ("cls", b"%d" % (i // 2)), ("txt", b"number %d" % i)):
                    info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return root


@pytest.fixture(params=["parquet", "tar"])
def shards(request, tmp_path):
    return {"parquet": write_parquet, "tar": write_tar}[request.param](tmp_path / "shards")


def test_labelled_images_are_those_of_a_folder(folder, shards):
    files, rows = ImageFolder(folder, 16), ShardImages(shards, 16)
    assert rows.num_classes == files.num_classes == 3 and len(rows) == len(files) == 6
    for a, b in zip(files, rows, strict=True):
        assert torch.equal(a["image"], b["image"]) and a["label"] == b["label"]


def test_captioned_images_are_those_of_a_folder(folder, shards, tmp_path):
    common = {"image_size": 16, "buckets": ["16x16", "16x24", "24x16"]}
    files = PictureFolder(PictureData(path=str(folder), captions=str(tmp_path / "captions.jsonl"), **common))
    rows = ShardPictures(PictureData(kind="picture_shards", path=str(shards), **common))
    assert (rows.captions, rows.buckets) == (files.captions, files.buckets) and len(set(rows.buckets)) > 1
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(files, rows, strict=True))


def test_names_of_classes_are_numbered_in_their_order(tmp_path):
    rows = ShardImages(write_parquet(tmp_path / "shards", ["cat", "bee", "ant", "ant", "bee", "cat"]), 16)
    assert rows.num_classes == 3 and rows.labels == [2, 1, 0, 0, 1, 2]


def test_a_broken_image_is_named(tmp_path):
    rows = {"image": [{"bytes": png(0), "path": None}, {"bytes": b"no image", "path": None}]}
    (tmp_path / "shards").mkdir()
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "shards/a.parquet")
    images = ShardImages(tmp_path / "shards", 16)
    assert images.num_classes == 1 and images[0]["label"] == 0
    with pytest.raises(BrokenSample, match="row 1: cannot identify image file"):
        images[1]


def test_what_is_missing_is_said(tmp_path, monkeypatch, folder):
    with pytest.raises(FileNotFoundError, match=r"holds no \.parquet or \.tar files"):
        ShardImages(folder, 16)
    with pytest.raises(FileNotFoundError, match="no folder"):
        ShardImages(tmp_path / "nowhere", 16)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="damaged cannot be read by the datasets library"):
        ShardImages(tmp_path / "damaged", 16)
    (tmp_path / "texts").mkdir()
    datasets.Dataset.from_dict({"title": ["a"]}).to_parquet(tmp_path / "texts/a.parquet")
    with pytest.raises(UserError, match="no column of images: its columns are title"):
        ShardImages(tmp_path / "texts", 16)
    shards = write_parquet(tmp_path / "shards")
    with pytest.raises(UserError, match="no column of captions title: its columns are image, text, label"):
        ShardPictures(PictureData(kind="picture_shards", path=str(shards), captions="title", image_size=16))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        ShardImages(shards, 16)


def test_a_name_on_the_hub_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for schema, kind in ((ImageData, "image_shards"), (PictureData, "picture_shards")):
        assert not schema(kind=kind, path="owner/name").files()
        assert schema(kind=kind, path="shards").files() == {"data.path": "shards"}


@pytest.mark.slow
def test_training_on_shards_is_training_on_the_folder(training_config, folder, shards, tmp_path):
    """With a reading process, and on through a stop."""
    config = changed(training_config("class-to-image"), {"data.path": str(folder), "data.kind": "image_folder"})
    config = changed(config, {"data.image_size": 8, "train.batch_size": 4})
    TASKS["class-to-image"].train(config)
    rows = {"data.kind": "image_shards", "data.path": str(shards), "out": str(tmp_path / "rows"), "train.workers": 1}
    rows = changed(config, rows)
    TASKS["class-to-image"].train(changed(rows, {"train.steps": 2}))
    TASKS["class-to-image"].train(rows)
    assert [line["loss"] for line in stats(rows)] == [line["loss"] for line in stats(config)]
    assert all(torch.equal(tensor, state(rows)["ema"][name]) for name, tensor in state(config)["ema"].items())
