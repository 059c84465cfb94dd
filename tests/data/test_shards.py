"""Images and clips in Parquet files and WebDataset archives: what a folder of the same files gives."""

import io
import sys
import tarfile

import datasets
import numpy as np
import pytest
import torch
from conftest import assert_equal, skipdit_command, state, stats
from PIL import Image

from skipdit.config import changed
from skipdit.data.clip_folder import ClipFolder
from skipdit.data.images import ImageFolder
from skipdit.data.latents import Shards
from skipdit.data.pictures import PictureFolder
from skipdit.data.settings import ClipData, ImageData, PictureData
from skipdit.data.shards import ShardClips, ShardImages, ShardPictures
from skipdit.tasks import TASKS
from skipdit.utils.errors import BrokenSample, UserError
from skipdit.utils.video import write_mp4

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


def write_tar(root, suffix="png", contents=None):
    """Two archives of six samples, with classes and captions."""
    contents = contents or [png(i) for i in range(6)]
    root.mkdir()
    for part in range(2):
        with tarfile.open(root / f"{part:06d}.tar", "w") as tar:
            for i in range(3 * part, 3 * part + 3):
                for name, data in ((suffix, contents[i]), ("cls", b"%d" % (i // 2)), ("txt", b"number %d" % i)):
                    info = tarfile.TarInfo(f"{i:06d}.{name}")
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
    with pytest.raises(BrokenSample, match=r"^row 1: cannot identify image file row 1$"):  # the same in every epoch
        images[1]


def test_other_columns_are_not_read(tmp_path):
    rows = {"image": [{"bytes": png(0), "path": None}], "mask": [{"bytes": b"no image", "path": None}]}
    (tmp_path / "shards").mkdir()
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "shards/a.parquet")
    assert ShardImages(tmp_path / "shards", 16)[0]["image"].shape == (3, 16, 16)


def test_files_of_other_splits_are_left_alone(tmp_path):
    shards = write_parquet(tmp_path / "shards")
    (shards / "validation-00000.parquet").write_bytes((shards / "train-00000.parquet").read_bytes())
    (shards / "._train-00000.parquet").write_bytes(b"what macOS puts beside files")
    assert len(ShardImages(shards, 16)) == 6
    for file in shards.glob("train-*"):
        file.rename(shards / file.name.replace("train-", "restrained-"))
    assert len(ShardImages(shards, 16)) == 9  # no split has a name


def test_rows_of_the_hub_may_be_files(folder, monkeypatch):
    load = datasets.load_dataset
    files = {"train": f"{folder}/**"}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **_: load("imagefolder", data_files=files, split="train")
    )
    rows, images = ShardImages("owner/name", 16), ImageFolder(folder, 16)
    assert rows.labels == [sample["label"] for sample in images]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(rows, images, strict=True))


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
    for schema, kind in ((ImageData, "image_shards"), (PictureData, "picture_shards"), (ClipData, "clip_shards")):
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
    assert_equal(state(rows)["ema"], state(config)["ema"])


# Clips


@pytest.fixture
def clips(tmp_path):
    """Six video files of 6 to 11 frames in three class folders, with captions."""
    rows = []
    for number in range(6):
        path = tmp_path / "own-clips" / CLASSES[number // 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(number)
        write_mp4(path, torch.randint(256, (6 + number, 3, 16, 16), dtype=torch.uint8, generator=generator), fps=8)
        name = path.relative_to(tmp_path / "own-clips")
        rows.append(f'{{"video": "{name}", "caption": "number {number}"}}\n')
    (tmp_path / "clips.jsonl").write_text("".join(rows))
    return tmp_path / "own-clips"


@pytest.fixture(params=["parquet", "plain", "tar"])
def clip_shards(request, clips, tmp_path):
    """The same in shards: of videos as `datasets` keeps them, of bytes, and of archives."""
    contents, root = [file.read_bytes() for file in sorted(clips.rglob("*.mp4"))], tmp_path / "clip-shards"
    if request.param == "tar":
        return write_tar(root, "mp4", contents)
    if request.param == "parquet":
        features = {"video": datasets.Video(decode=False)}
        contents = [{"bytes": each, "path": None} for each in contents]
    else:
        features = {"video": datasets.Value("binary")}
    features |= {"txt": datasets.Value("string"), "label": datasets.ClassLabel(names=CLASSES)}
    rows = {"video": contents, "txt": [f"number {i}" for i in range(6)], "label": [i // 2 for i in range(6)]}
    root.mkdir()
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(root / "train-00000.parquet")
    return root


STRETCH = {"num_frames": 3, "frame_interval": 2, "images": 2, "image_size": 8}


@pytest.mark.parametrize("labels", ["", "labelled", "captions"])
def test_clips_are_those_of_a_folder(clips, clip_shards, tmp_path, labels):
    mine, theirs = {}, {}
    if labels == "labelled":
        mine = theirs = {"labelled": True}
    elif labels:
        mine, theirs = {"captions": "txt"}, {"captions": str(tmp_path / "clips.jsonl")}
    files = ClipFolder(ClipData(path=str(clips), **theirs, **STRETCH))
    rows = ShardClips(ClipData(kind="clip_shards", path=str(clip_shards), **mine, **STRETCH))
    assert (rows.labels, rows.captions, rows.num_classes) == (files.labels, files.captions, files.num_classes)
    assert len(rows) == len(files) == 6 and rows.count(2) == 8
    for i in range(6):
        a, b = (each.draw(i, np.random.default_rng(i)) for each in (files, rows))
        assert a.keys() == b.keys() and torch.equal(a["image"], b["image"])
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a if "label" in key)


def test_clips_that_cannot_be_read_are_named(clips, tmp_path):
    whole = (clips / "ant/0.mp4").read_bytes()
    rows = {"video": [whole, b"no video", whole[:300], None], "caption": ["a", "b", "c", " "]}
    (tmp_path / "shards").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "shards/a.parquet")
    config = ClipData(kind="clip_shards", path=str(tmp_path / "shards"), image_size=8, num_frames=1)
    broken = ShardClips(config)
    assert len(broken[0]["image"]) == 6
    for row in (1, 2, 3):
        with pytest.raises(BrokenSample, match=f"shards/row {row}: "):
            broken[row]
    captioned = ShardClips(changed(config, {"captions": "caption"}))
    assert len(captioned) == 3 and "the caption of row 3 is empty" in captioned.uncaptioned[0]
    for change, complaint in (
        ({"captions": "title"}, "no column of captions title: its columns are video, caption"),
        ({"labelled": True}, "no column of classes: its columns are video, caption"),
        ({"classes": ["ant"]}, r"data\.classes is of clips in a folder: filter the rows"),
        ({"labelled": True, "captions": "caption"}, "a clip's label is its caption or its class"),
    ):
        with pytest.raises(UserError, match=complaint):
            ShardClips(changed(config, change))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["class-to-video", "text-to-video"])
def test_training_on_shards_of_clips_is_training_on_the_folder(training_config, clips, clip_shards, tmp_path, task):
    labels = {"data.labelled": True, "data.captions": None, "model.num_classes": 3}
    rows = {"data.kind": "clip_shards", "data.path": str(clip_shards), "out": str(tmp_path / "rows")}
    if task == "text-to-video":
        labels, rows = {"data.captions": str(tmp_path / "clips.jsonl")}, rows | {"data.captions": "txt"}
    config = changed(training_config(task), {"data.kind": "videos", "data.path": str(clips)} | labels)
    TASKS[task].train(config)
    rows = changed(config, rows)
    TASKS[task].train(changed(rows, {"train.steps": 2, "train.workers": 1}))
    TASKS[task].train(rows)
    assert [line["loss"] for line in stats(rows)] == [line["loss"] for line in stats(config)]
    assert_equal(state(rows)["ema"], state(config)["ema"])


@pytest.mark.slow
def test_shards_of_clips_are_checked_and_encoded(clips, clip_shards, vae_folder, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        f"data: {{kind: clip_shards, path: {clip_shards}, captions: txt, num_frames: 8}}"
    )
    with pytest.raises(SystemExit):
        skipdit_command("data")(["check", str(tmp_path / "run.yaml"), "data.frame_interval=1", "--workers", "0"])
    said = capsys.readouterr().out
    assert "6 readable rows with a video, 51 frames" in said and "6 captions" in said and "too short" in said
    common = ["--image-size", "16", "--vae", str(vae_folder), "--workers", "0"]
    encode = skipdit_command("encode")
    for kind, path, captions in (("clip_shards", clip_shards, "txt"), ("videos", clips, tmp_path / "clips.jsonl")):
        out = tmp_path / "latents" / kind
        encode(["--data", kind, "--path", f"{path}", "--captions", f"{captions}", "--out", f"{out}", *common])
    a, b = (Shards(tmp_path / "latents" / kind) for kind in ("clip_shards", "videos"))
    assert (a.captions, a.column("length")) == (b.captions, b.column("length"))
    assert all(torch.equal(a.read(range(i, i + 1))["mean"], b.read(range(i, i + 1))["mean"]) for i in range(len(a)))
