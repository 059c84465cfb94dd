"""Captioned pictures: that each goes with its words and into its bucket, batches of one bucket, latents, and the check.

A picture is of one colour, which tells which it is.
"""

import csv
import json
import math
import os
import pickle
import re
import struct
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import skipdit_command
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import Dataset

from skipdit.config import ConfigError
from skipdit.data.clip_folder import ClipFolder
from skipdit.data.clips import load_section
from skipdit.data.encode_text import captions_to_train
from skipdit.data.files import read_picture
from skipdit.data.images import ImageFolder, centre_crop
from skipdit.data.latents import ClipLatents, Latents, open_pictures
from skipdit.data.pictures import PictureFolder, bucket_sizes, nearest_bucket
from skipdit.data.settings import ClipData, ImageData, PictureData
from skipdit.data.stream import Stream, collate, make_loader, rows_of
from skipdit.encoders.autoencoder import encode as encode_pixels
from skipdit.encoders.autoencoder import load_vae
from skipdit.metrics.samples import open_samples
from skipdit.training.latents import clean_latents
from skipdit.training.loop import fit
from skipdit.training.settings import TrainConfig
from skipdit.training.steps import Draw
from skipdit.utils.errors import BrokenSample
from skipdit.utils.pixels import to_float
from skipdit.utils.seeding import seed_of

check_main = skipdit_command("data")

BUCKETS = ["8x8", "8x16", "16x8"]
SHAPES = {"a/0.png": (9, 20), "a/1.jpg": (30, 31), "b/2.png": (40, 18), "3.webp": (8, 8), "b/c/4.bmp": (10, 18)}
NAMES = tuple(SHAPES)
IN_BUCKETS = (1, 0, 2, 0, 1)
TEXTS = ("a cat, asleep", 'two lines:\n"one"', "ein Häßlicher 🐕", "dog", "a sheep")
ORDER = (2, 0, 3, 4, 1)  # of the pictures in a captions file


def shade(number: int) -> int:
    return 30 + 40 * number


def number_of(image: torch.Tensor) -> int:
    """Which picture it is. Fails for anything but one, all of it in its colour."""
    numbers = (image.float() - 30) / 40
    assert (numbers - numbers.mean()).abs().max() < 0.1, "not of one colour"
    return round(numbers.mean().item())


@pytest.fixture
def root(tmp_path) -> Path:
    """Five pictures, in folders of any depth."""
    for number, (name, (height, width)) in enumerate(SHAPES.items()):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height), (shade(number),) * 3).save(path)
    return tmp_path / "pictures"


def write_rows(path: Path, rows: list[tuple]) -> str:
    path.write_text("".join(json.dumps({"image": name, "caption": text}) + "\n" for name, text in rows))
    return str(path)


@pytest.fixture
def captions(tmp_path) -> str:
    """A JSONL file with the captions of all pictures, in ORDER."""
    return write_rows(tmp_path / "captions.jsonl", [(NAMES[number], TEXTS[number]) for number in ORDER])


def pictures_at(root: Path, captions: str | Path, **settings) -> PictureData:
    return PictureData(path=str(root), captions=str(captions), **{"image_size": 8, "buckets": BUCKETS} | settings)


def write_jsonl(root: Path) -> Path:
    lines = [json.dumps({"tags": [], "caption": f" {TEXTS[i]}\n", "image": f"./{NAMES[i]}"}) for i in ORDER]
    (root / "captions.jsonl").write_text("\n\n".join(lines), encoding="utf-8-sig")
    return root / "captions.jsonl"


def write_csv(root: Path) -> Path:
    with open(root / "captions.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("id", "caption", "image"), *((i, TEXTS[i], NAMES[i]) for i in ORDER)])
    return root / "captions.csv"


def write_txt(root: Path) -> str:
    for name, text in zip(NAMES, TEXTS, strict=True):
        (root / name).with_suffix(".txt").write_text(f"{text}\n", encoding="utf-8")
    return "txt"


BY_NAME = (3, 0, 1, 2, 4)


@pytest.mark.parametrize(("write", "order"), [(write_jsonl, ORDER), (write_csv, ORDER), (write_txt, BY_NAME)])
def test_every_picture_has_its_caption_and_its_bucket(root, write, order):
    config = pictures_at(root, write(root))
    dataset = PictureFolder(config)
    assert dataset.names == [NAMES[number] for number in order]
    assert dataset.captions == [TEXTS[number] for number in order]
    assert dataset.labels == [0, 1, 2, 3, 4]
    assert dataset.sizes == [(8, 8), (8, 16), (16, 8)]
    assert dataset.buckets == [IN_BUCKETS[number] for number in order]
    assert (dataset.left_out, dataset.uncaptioned) == ([], [])
    for index, number in enumerate(order):
        sample = dataset[index]
        assert (sample["label"], number_of(sample["image"])) == (index, number)
        assert sample["image"].dtype == torch.uint8
        assert sample["image"].shape == (3, *dataset.sizes[IN_BUCKETS[number]])
    assert config.files().get("data.captions") == (None if config.captions == "txt" else config.captions)


def test_without_buckets_all_are_square(root, captions):
    dataset = PictureFolder(pictures_at(root, captions, buckets=[], image_size=12))
    assert (dataset.sizes, dataset.buckets) == ([(12, 12)], [0] * 5)
    assert {dataset[index]["image"].shape for index in range(5)} == {(3, 12, 12)}


def test_a_list_chooses_pictures(root, tmp_path, captions):
    """Those without captions are named."""
    (tmp_path / "list").write_text(f"{NAMES[1]}\n./{NAMES[4]}\n\ngone.png\n")
    dataset = PictureFolder(pictures_at(root, captions, picture_list=str(tmp_path / "list")))
    assert dataset.names == [NAMES[4], NAMES[1]]
    assert dataset.left_out == [f"{tmp_path}/list: gone.png is not in {captions}"]
    write_txt(root)
    beside = PictureFolder(pictures_at(root, "txt", picture_list=str(tmp_path / "list")))
    assert beside.captions == [TEXTS[1], TEXTS[4]]
    assert beside.left_out == [f"{root}/gone.txt: no caption of gone.png"]


def test_pictures_without_caption_or_header_are_left_out_and_named(root, tmp_path):
    (root / "text.png").write_text("no picture")
    rows = [("gone.png", "gone"), (NAMES[0], ""), ("text.png", "text"), (NAMES[3], TEXTS[3]), (NAMES[3], "another")]
    listed = write_rows(tmp_path / "c.jsonl", [*rows, (NAMES[2], TEXTS[2])])
    dataset = PictureFolder(pictures_at(root, listed))
    assert (dataset.names, dataset.captions, dataset.labels) == ([NAMES[3], NAMES[2]], [TEXTS[3], TEXTS[2]], [0, 1])
    assert [number_of(dataset[index]["image"]) for index in (0, 1)] == [3, 2]
    assert dataset.uncaptioned == [
        f"{listed}, line 2: the caption of {NAMES[0]} is empty",
        f"{listed}, line 5: {NAMES[3]} has a caption already: {listed}, line 4",
    ]
    missing, text = dataset.left_out[2:]
    assert missing.startswith(f"{root}/gone.png: ")
    assert text.startswith(f"{root}/text.png: cannot identify")


def cut(path: Path) -> None:
    """Only the header and the first rows are left."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def test_a_broken_picture_is_named_and_keeps_its_place_in_a_batch(root, captions):
    """The only other one of its bucket is broken, too. The tall picture is alone in its own, and fills up its batch."""
    cut(root / NAMES[0])
    cut(root / NAMES[4])
    dataset = PictureFolder(pictures_at(root, captions))
    with pytest.raises(BrokenSample, match=r"^\S*a/0\.png: \S"):
        dataset[1]
    stream = Stream(dataset, 0, batch_size=2)
    batches = [collate([stream[2 * step], stream[2 * step + 1]]) for step in range(3)]
    assert sorted(batch["image"].shape for batch in batches) == [(2, 3, 8, 8), (2, 3, 8, 16), (2, 3, 16, 8)]
    for batch in batches:
        shape = tuple(batch["image"].shape[-2:])
        assert batch["weight"].tolist() == {(8, 8): [1, 1], (8, 16): [0, 0], (16, 8): [1, 0]}[shape]
        assert len(batch["broken"]) == 2 * (shape == (8, 16))
        assert batch["image"].dtype == torch.uint8


def by_every_reader(picture: Image.Image, folder: Path, name: str = "0.png", **saving) -> dict[str, np.ndarray]:
    """What training, by class, by caption and on frames, and evaluation see of a picture as it is saved: (S, S, 3), S
    its smaller side."""
    (folder / "a").mkdir()
    picture.save(folder / "a" / name, **saving)
    (folder / "a/0.txt").write_text("a")
    size = min(picture.size)
    clips = ClipData("frames", str(folder), num_frames=1, frame_interval=1, image_size=size)
    seen = {
        "classes": ImageFolder(folder, size)[0]["image"],
        "captions": PictureFolder(pictures_at(folder, "txt", buckets=[], image_size=size))[0]["image"],
        "frames": ClipFolder(clips)[0]["image"][0],
        "evaluation": open_samples(folder)[0][0],
    }
    return {name: image.permute(1, 2, 0).numpy() for name, image in seen.items()}


TONES = np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (16, 1))  # from black on the left to white on the right
GREY = np.round(TONES / 257).astype(np.uint8)


def with_half_transparent(mode: str) -> Image.Image:
    """GREY, of which the lower half is transparent."""
    alpha = np.full_like(GREY, 255)
    alpha[8:] = 0
    picture = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(alpha)))
    return picture.convert("RGBA").quantize(32) if mode == "P" else picture.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_lie_on_white(tmp_path, mode):
    for reader, image in by_every_reader(with_half_transparent(mode), tmp_path).items():
        np.testing.assert_allclose(image[:8], GREY[:8, :, None].repeat(3, 2), atol=0 if mode != "P" else 4)
        assert (image[8:] == 255).all(), reader


@pytest.mark.parametrize("transparent", [0, TONES[0, 5]])
def test_one_tone_may_be_transparent(tmp_path, transparent):
    depth = TONES if transparent else GREY
    expected = np.where(depth == transparent, 255, GREY)[..., None].repeat(3, 2)
    for image in by_every_reader(Image.fromarray(depth), tmp_path, transparency=int(transparent)).values():
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("mode", ["I;16", "L", "1", "P", "RGB"])
def test_pictures_of_any_mode_keep_their_tones(tmp_path, mode):
    """Of 16 bits most tones are beyond 255."""
    picture = Image.fromarray(TONES) if mode == "I;16" else Image.fromarray(GREY).convert(mode)
    expected = np.where(GREY > 127, 255, 0) if mode == "1" else GREY
    found = by_every_reader(picture, tmp_path)
    assert Image.open(tmp_path / "a/0.png").mode == mode
    for image in found.values():
        if mode == "1":  # dithered
            assert set(np.unique(image)) == {0, 255}
            assert abs(image.mean() - expected.mean()) < 10
        else:
            np.testing.assert_array_equal(image, expected[..., None].repeat(3, 2))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (TONES, "16-bit.tif"),
        (TONES, "16-bit.pgm"),
        (TONES.astype(np.int32), "32-bit.tif"),
        (GREY.astype(np.int32), "8-of-32-bit.tif"),
        ((TONES / 65535).astype(np.float32), "shares.tif"),
        (GREY.astype(np.float32), "float.tif"),
        (np.zeros_like(GREY, np.float32), "black.tif"),
    ],
)
def test_tones_of_more_than_8_bits(tmp_path, values, name):
    Image.fromarray(values).save(tmp_path / name)
    expected = GREY if values.any() else values
    np.testing.assert_array_equal(np.array(read_picture(tmp_path / name)), expected[..., None].repeat(3, 2))


@pytest.mark.parametrize("wrong", [lambda x: x - 1, lambda x: x * 2, lambda x: x * np.float32(np.nan)])
@pytest.mark.parametrize("tones", [TONES.astype(np.int32), GREY.astype(np.float32)])
def test_tones_outside_of_any_range_are_named(tmp_path, tones, wrong):
    if (values := wrong(tones)).dtype == np.float64:
        pytest.skip("integers are never nan")
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(BrokenSample, match=r"a\.tif: it has values from \S+ to \S+; they should be 0 to (255|65535)"):
        read_picture(tmp_path / "a.tif")


def ink_profile() -> bytes:
    """An ICC profile of four inks, by which full cyan, and nothing else, is the red of Lab (50, 60, 40)."""
    corners = [(128, 188, 168) if corner == 0b1000 else (255, 128, 128) for corner in range(16)]
    ramp = bytes(range(256))
    table = struct.pack(">4s4x4B", b"mft1", 4, 3, 2, 0) + struct.pack(">9i", *[65536, 0, 0, 0] * 2, 65536)
    table += ramp * 4 + bytes(value for corner in corners for value in corner) + ramp * 3
    white = struct.pack(">4s4x3i", b"XYZ ", 63190, 65536, 54061)
    tags = struct.pack(">I4sII4sII", 2, b"A2B0", 156, len(table), b"wtpt", 156 + len(table), len(white))
    kind = (156 + len(table) + 20, b"", 0x2100000, b"prtr", b"CMYK", b"Lab ", b"acsp")
    head = struct.pack(">I4sI4s4s4s12x4s28x3I48x", *kind, 63190, 65536, 54061)
    return head + tags + table + white


def test_cmyk_goes_by_its_profile(tmp_path):
    """Without one, or with a damaged one, it is what PIL makes of it."""
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    cyan.save(tmp_path / "plain.tif")
    cyan.save(tmp_path / "damaged.tif", icc_profile=ink_profile()[:200])
    cyan.save(tmp_path / "inks.tif", icc_profile=ink_profile())
    colours = {name: read_picture(tmp_path / f"{name}.tif").getpixel((4, 4)) for name in ("plain", "damaged", "inks")}
    assert colours["plain"] == colours["damaged"] == (0, 255, 255)
    np.testing.assert_allclose(colours["inks"], (205, 62, 58), atol=12)


def test_hidden_files_and_folders_and_links_to_folders_above_are_passed_over(tmp_path):
    """By training and by evaluation; a class folder without pictures would move the ids of others, and is named."""
    for name in ("a/0.png", "a/b/1.PNG", "c/2.tif", "a/._0.png", ".hidden/3.png", "a/.cache/4.png", "__MACOSX/a/5.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, format="PNG")
        path.with_suffix(".txt").write_text("text")
    (tmp_path / "a/above").symlink_to(tmp_path)
    (tmp_path / "c/Thumbs.db").write_text("")
    os.mkfifo(tmp_path / "a/pipe.png") if hasattr(os, "mkfifo") else None
    classes = ImageFolder(tmp_path, 8)
    assert classes.num_classes == 2
    assert [classes[index]["label"] for index in range(len(classes))] == [0, 0, 1]
    assert PictureFolder(pictures_at(tmp_path, "txt")).names == ["a/0.png", "a/b/1.PNG"]
    assert open_samples(tmp_path).names == ["a/0.png", "a/b/1.PNG"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is empty of images in its class folders empty"):
        ImageFolder(tmp_path, 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path, suffix, orientation):
    """Stored lying or mirrored, with the orientation that says so."""
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[8:, :8] = 90, 200
    turns = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"]
    picture, exif = Image.fromarray(upright), Image.Exif()
    if orientation > 1:
        picture = picture.transpose(Image.Transpose[turns[orientation - 2]])
    exif[0x0112] = orientation
    for image in by_every_reader(picture, tmp_path, f"0.{suffix}", exif=exif).values():
        np.testing.assert_allclose(image.astype(int), upright, atol=9)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_orientation_does_not_count(tmp_path):
    damaged = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0rubbish"
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", exif=damaged)
    assert read_picture(tmp_path / "a.jpg").getpixel((4, 4))[0] > 250
    exif = Image.Exif()
    exif[0x0112] = 77
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").getpixel((4, 4))[0] > 250


def test_buckets_are_of_the_upright_picture(tmp_path):
    """Orientation 6: as stored, the top is on the left."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 16)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("a")
    dataset = PictureFolder(pictures_at(tmp_path, "txt"))
    assert dataset.buckets == [2]
    assert dataset[0]["image"].shape == (3, 16, 8)


@pytest.mark.filterwarnings("ignore:Image size")
def test_pictures_of_too_many_pixels_are_named(root, captions, monkeypatch):
    """A file of some kilobytes may hold gigabytes."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    dataset = PictureFolder(pictures_at(root, captions))
    said = [message for message in dataset.left_out if "pixels are more than the 700 that are decoded" in message]
    assert sorted(message.split(": ")[0] for message in said) == [str(root / NAMES[1]), str(root / NAMES[2])]


@pytest.mark.parametrize("transposed", [False, True])
def test_centre_crop_covers_a_bucket(transposed):
    """A slope along the side that is too long loses its ends; halving and resizing keep it a slope."""
    slope = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (40, 200, 3))
    image, size = Image.fromarray(np.ascontiguousarray(slope)), (10, 20)
    if transposed:
        turn = Image.Transpose.TRANSPOSE
        cropped = centre_crop(image.transpose(turn), *size[::-1]).transpose(turn)
    else:
        cropped = centre_crop(image, *size)
    assert cropped.size == (20, 10)
    np.testing.assert_allclose(np.array(cropped)[0, :, 0], 60 + 4 * np.arange(20) + 1.5, atol=1)


@pytest.mark.parametrize("size", [(600, 2), (2, 600), (3, 1000), (5, 2000), (64, 20000)])
def test_work_is_bounded_for_pictures_that_are_long(monkeypatch, size):
    """Only the middle is resized; it is what cropping all of it would leave."""
    resized, resize = [], Image.Image.resize
    watched = lambda picture, size, *more: resized.append(size) or resize(picture, size, *more)  # noqa: E731
    monkeypatch.setattr(Image.Image, "resize", watched)
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    picture = Image.fromarray(noise)
    cropped = centre_crop(picture, 48, 64)
    assert max(width * height for width, height in resized) <= max(16 * 48 * 64, picture.width * picture.height)
    monkeypatch.setattr("skipdit.data.images.TOO_LONG", math.inf)
    whole = centre_crop(picture, 48, 64)
    np.testing.assert_allclose(np.array(cropped).astype(int), np.array(whole), atol=1)


def test_nearest_bucket():
    """By ratio, in log: 2:1 is as far from 1:1 as 1:2. Of one ratio, by area."""
    sizes = [(8, 8), (16, 16), (8, 16), (16, 8)]
    assert [nearest_bucket(h, w, sizes) for h, w in ((9, 9), (100, 99), (8, 10), (10, 8))] == [0, 1, 0, 0]
    assert [nearest_bucket(h, w, sizes) for h, w in ((7, 10), (10, 7), (1, 50), (50, 1))] == [2, 3, 2, 3]
    assert nearest_bucket(100, 142, [(8, 16), (8, 8)]) == 0, "142 is more than 100 times the square root of 2"
    assert nearest_bucket(100, 141, [(8, 16), (8, 8)]) == 1


@pytest.mark.parametrize("text", ["8", "8x", "x8", "8x0", "0x8", "-8x8", "8x8x8", "8 by 8", "8.5x8", ""])
def test_a_bad_bucket_is_named(text):
    with pytest.raises(ValueError, match=re.escape(f"data.buckets has {text!r}; a bucket is HEIGHTxWIDTH in pixels")):
        bucket_sizes(8, ["8x8", text])


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"captions": None}, ValueError, r"data\.captions is not set: a file of captions, or txt"),
        ({"path": "nowhere"}, FileNotFoundError, "no folder of pictures nowhere"),
        ({"captions": "nowhere.csv"}, FileNotFoundError, r"no captions nowhere\.csv: No such file"),
        ({"captions": "txt"}, ValueError, "has no captions of any pictures, for example .*txt: no caption of 3.webp"),
        ({"picture_list": "nowhere"}, FileNotFoundError, "no list nowhere: No such file"),
        ({"buckets": ["8"]}, ValueError, r"data\.buckets has '8'"),
    ],
)
def test_settings_that_are_refused(root, captions, settings, error, said):
    with pytest.raises(error, match=said):
        PictureFolder(replace(pictures_at(root, captions), **settings))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.jsonl", '{"video": "a", "caption": "b"}\n', "line 1: no image; every row has an image and its caption"),
        ("c.jsonl", '["a"]\n', r'line 1: wanted is a JSON object a line, \{"image": \.\.\., "caption"'),
        ("c.csv", "video,caption\na,b\n", "line 1: columns video, caption; the first line has to name image and capt"),
        ("c.csv", "", "line 1: it is empty; the first line has to name the columns image and caption"),
        ("c.jsonl", '{"image": "gone.png", "caption": "a"}\n', r"none of 1 pictures can be read, for example \S*gone"),
    ],
)
def test_captions_that_are_refused(root, tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        PictureFolder(pictures_at(root, tmp_path / name))


# ---------------------------------------------------------------------------------------------------------------------
# Batches of one bucket


class Numbers(Dataset):
    """Samples that are their own numbers, in buckets."""

    def __init__(self, *counts: int):
        self.count, numbers = sum(counts), np.repeat(np.arange(len(counts)), counts)
        self.sizes = [(8, 8 * (number + 1)) for number in range(len(counts))]
        self.buckets = np.random.default_rng(0).permutation(numbers).tolist()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {"number": index}


def batches_of(stream: Stream, steps: range) -> list[list[int]]:
    size = stream.batch_size
    return [[stream.index(position) for position in range(step * size, (step + 1) * size)] for step in steps]


def test_an_epoch_is_of_batches_of_one_bucket():
    """7, 4, 1 and 0 pictures in batches of 4 are 2 + 1 + 1 batches, in two of which pictures come again."""
    dataset = Numbers(7, 4, 1, 0)
    stream = Stream(dataset, 0, batch_size=4)
    epochs = [batches_of(stream, range(4 * epoch, 4 * epoch + 4)) for epoch in range(20)]
    for epoch in epochs:
        kinds = [{dataset.buckets[index] for index in batch} for batch in epoch]
        assert Counter(kind for (kind,) in kinds) == {0: 2, 1: 1, 2: 1}
        seen = Counter(index for batch in epoch for index in batch)
        assert seen.keys() == set(range(12))
        assert sorted(seen[index] for index in range(12) if dataset.buckets[index] == 0) == [1] * 6 + [2]
        assert all(len(set(batch)) == 4 for batch in epoch if dataset.buckets[batch[0]] < 2)
    assert len({str(epoch) for epoch in epochs}) == 20
    assert len({str([dataset.buckets[batch[0]] for batch in epoch]) for epoch in epochs}) > 3


@pytest.mark.parametrize("counts", [(25, 1), (7, 4, 1, 0), (9,)])
def test_every_sample_counts_once_per_epoch(counts):
    """However few there are of its shape: what fills up a batch has no weight."""
    stream, epochs = Stream(Numbers(*counts), 0, batch_size=4), []
    length = sum(math.ceil(count / 4) * 4 for count in counts) if len(counts) > 1 else counts[0]
    for epoch in range(3):
        weights = Counter()
        for position in range(epoch * length, (epoch + 1) * length):
            sample = stream[position]
            weights[sample["number"]] += sample["weight"]
        epochs.append(weights)
    assert epochs == [dict.fromkeys(range(sum(counts)), 1)] * 3


@pytest.mark.parametrize("counts", [(7, 40, 2, 0), (40, 7, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_the_largest_shape_is_found(counts, seed):
    """The first batch of the last bucket that has pictures."""
    dataset = Numbers(*counts)
    stream = Stream(dataset, seed, batch_size=4)
    step, size = stream.largest()
    assert size == (8, 24)
    kinds = [dataset.buckets[batch[0]] for batch in batches_of(stream, range(step + 1))]
    assert kinds.index(2) == step
    assert Stream(Numbers(7), seed, 4).largest() == (0, None)


def test_a_batch_may_be_entered_anywhere():
    dataset = Numbers(7, 4, 1)
    whole = batches_of(Stream(dataset, 3, 4), range(12))
    assert whole != batches_of(Stream(dataset, 4, 4), range(12))
    for step in (11, 5, 4, 0):
        assert batches_of(Stream(dataset, 3, 4), range(step, step + 1)) == whole[step : step + 1]


@pytest.mark.parametrize("buckets", [[], [0] * 7, [2] * 7])
def test_a_single_bucket_is_as_none(buckets):
    """As datasets without buckets have been shuffled since the first version."""
    dataset = Numbers(7)
    dataset.buckets = buckets
    stream = Stream(dataset, 5, batch_size=4)
    order = [stream.index(position) for position in range(21)]
    for epoch in range(3):
        permutation = torch.randperm(7, generator=torch.Generator().manual_seed(seed_of(5, epoch)))
        assert order[7 * epoch : 7 * epoch + 7] == permutation.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_number_of_processes(root, captions, workers):
    """A run that goes on at step 2, on two processes, gets the rows that one process would have got."""
    stream = pickle.loads(pickle.dumps(Stream(PictureFolder(pictures_at(root, captions)), 0, 4)))
    whole = list(make_loader(stream, rows_of(4, 4, 0, 1), 4, 0, 6, 0))
    halves = [list(make_loader(stream, rows_of(4, 2, rank, 2), 4, 2, 6, workers)) for rank in range(2)]
    for step, parts in zip(range(2, 6), zip(*halves, strict=True), strict=True):
        for key in ("image", "weight"):
            assert torch.equal(whole[step][key], torch.cat([part[key] for part in parts]))
        assert whole[step]["label"].tolist() == [label for part in parts for label in part["label"].tolist()]
    assert {batch["image"].shape for batch in whole} == {(4, 3, 8, 8), (4, 3, 8, 16), (4, 3, 16, 8)}


def test_the_trainer_gives_batches_of_one_bucket(root, tmp_path, captions):
    """In an epoch of three batches of four, each run as two micro-batches."""
    shapes = []

    def loss(model: torch.nn.Module, batch: dict, draw: Draw) -> torch.Tensor:
        shapes.append(batch["image"].shape)
        return model(to_float(batch["image"])).square().mean((1, 2, 3))

    config = TrainConfig(steps=3, batch_size=4, micro_batch_size=2, precision="fp32", workers=0, sample_every=0)
    dataset = PictureFolder(pictures_at(root, captions))
    fit(torch.nn.Conv2d(3, 3, 1), loss, dataset, config, tmp_path / "run", pictures_at(root, captions))
    assert shapes[::2] == shapes[1::2]
    assert sorted(shapes[::2]) == [(2, 3, 8, 8), (2, 3, 8, 16), (2, 3, 16, 8)]


@pytest.mark.parametrize("seed", range(4))
def test_a_dry_run_measures_the_largest_shape(root, tmp_path, captions, capsys, seed):
    """Of those that have pictures; also if the first epoch is longer than the run."""
    shapes = []

    def loss(model: torch.nn.Module, batch: dict, draw: Draw) -> torch.Tensor:
        shapes.append(batch["image"].shape)
        return model(to_float(batch["image"])).square().mean((1, 2, 3))

    data = pictures_at(root, captions, buckets=["8x8", "8x16", "24x12", "64x8"])
    config = TrainConfig(steps=1, batch_size=1, precision="fp32", workers=0, seed=seed)
    fit(torch.nn.Conv2d(3, 3, 1), loss, PictureFolder(data), config, tmp_path / "run", data, dry_run=True)
    assert shapes == [(1, 3, 24, 12)] * 2
    assert "two steps of 1 samples of 24x12: peak memory" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Latents


@pytest.fixture
def encode_pictures(monkeypatch, vae_folder, tmp_path, capsys):
    """`encode_pictures(path, *arguments)` runs the program into tmp_path/latents and returns what it prints."""

    def run(path: Path, *arguments: str, kind: str = "pictures", size: int = 8) -> str:
        command = f"encode --data {kind} --path {path} --out {tmp_path}/latents --vae {vae_folder} --image-size {size}"
        monkeypatch.setattr(sys, "argv", [*command.split(), "--workers", "0", *arguments])
        capsys.readouterr()
        skipdit_command("encode")()
        return capsys.readouterr().out

    return run


def latents_at(tmp_path: Path, **settings) -> PictureData:
    usual = {"kind": "latents", "image_size": 8, "buckets": BUCKETS, "captions": None}
    return PictureData(path=str(tmp_path / "latents"), **usual | settings)


def paint_noise(root: Path) -> None:
    """Pictures that are not their own mirror images."""
    for number, (name, (height, width)) in enumerate(SHAPES.items()):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(root / name)


@pytest.mark.parametrize("buckets", [BUCKETS, []])
def test_latents_are_those_of_the_pictures(root, tmp_path, captions, vae_folder, encode_pictures, buckets):
    """In shards of two at most, of one bucket each."""
    paint_noise(root)
    chosen = ["--buckets", *buckets] if buckets else []
    said = encode_pictures(root, "--captions", captions, "--shard", "2", *chosen)
    assert said == f"5 of 5 pictures, latents in {tmp_path}/latents\n"
    assert len(list((tmp_path / "latents").iterdir())) == 3
    vae = load_vae(str(vae_folder))
    latents = open_pictures(latents_at(tmp_path, buckets=buckets), vae)
    pixels = open_pictures(pictures_at(root, captions, buckets=buckets), vae)
    assert latents.captions == pixels.captions == [TEXTS[number] for number in ORDER]
    assert (latents.sizes, latents.left_out, latents.num_classes) == (pixels.sizes, [], 0)
    assert sorted(latents.labels) == pixels.labels
    assert latents.buckets == [pixels.buckets[label] for label in latents.labels] == sorted(pixels.buckets)
    for index, label in enumerate(latents.labels):
        encoded, drawn = latents[index], pixels[label]
        assert encoded.keys() == {"mean", "std", "label"}
        assert encoded["label"] == drawn["label"] == label
        assert encoded["mean"].shape == (2, 4, *(side // 2 for side in pixels.sizes[pixels.buckets[label]]))
        for copy, view in enumerate((drawn["image"], drawn["image"].flip(-1))):
            for key, expected in zip(("mean", "std"), encode_pixels(vae, to_float(view[None])), strict=True):
                torch.testing.assert_close(encoded[key][copy].float(), expected[0], atol=2e-3, rtol=2e-3)


def test_large_pictures_are_encoded_few_at_once(vae_folder, monkeypatch):
    """As many as fit, and one that does not fit by itself."""
    vae, images, calls = load_vae(str(vae_folder)), torch.rand(7, 3, 8, 16), []
    expected, encode_some = encode_pixels(vae, images), vae.encode
    monkeypatch.setattr(vae, "encode", lambda chunk: calls.append(len(chunk)) or encode_some(chunk))
    for room, lengths in ((3 * 8 * 16, [3, 3, 1]), (1, [1] * 7)):
        monkeypatch.setattr("skipdit.encoders.autoencoder.CHUNK_PIXELS", room)
        torch.testing.assert_close(encode_pixels(vae, images), expected)
        assert calls == lengths
        calls.clear()


def test_a_batch_of_latents_is_that_of_the_pictures(root, tmp_path, captions, vae_folder, encode_pictures):
    """What the trainer makes of each: clean latents of one shape, of which the first is flipped."""
    paint_noise(root)
    encode_pictures(root, "--captions", captions, "--buckets", *BUCKETS)
    vae, flipped = load_vae(str(vae_folder)), torch.tensor([True, False])
    pictures = open_pictures(pictures_at(root, captions), vae)
    for dataset in (open_pictures(latents_at(tmp_path), vae), pictures):
        shapes = set()
        for batch in make_loader(Stream(dataset, 0, 2), [range(2)], 2, 0, 6, 0):
            clean = clean_latents(batch, flipped, "sample", vae, lambda *shape: torch.zeros(2, *shape))
            first, second = (pictures[label]["image"] for label in batch["label"].tolist())
            expected, _ = encode_pixels(vae, to_float(torch.stack([first.flip(-1), second])))
            torch.testing.assert_close(clean, expected, atol=2e-3, rtol=2e-3)
            shapes.add(clean.shape[1:])
        assert shapes == {(4, 4, 4), (4, 4, 8), (4, 8, 4)}


@pytest.mark.parametrize("shard", ["1", "2"])
def test_a_broken_picture_keeps_its_caption(root, tmp_path, captions, vae_folder, encode_pictures, shard):
    """Also if it is all of its shard, or all of its bucket; one without header is in none."""
    cut(root / NAMES[0])
    cut(root / NAMES[4])
    (root / NAMES[3]).write_text("no picture")
    said = encode_pictures(root, "--captions", captions, "--buckets", *BUCKETS, "--shard", shard)
    assert "2 of 4 pictures, latents in" in said
    assert "2 unreadable pictures were left out, listed in" in said
    assert "1 more had no caption or could not be read, listed in" in said
    listed = (tmp_path / "latents/broken_files.txt").read_text().splitlines()
    assert [re.search(r"pictures/(\S+): ", line)[1] for line in listed] == [NAMES[0], NAMES[4], NAMES[3]]
    latents = open_pictures(latents_at(tmp_path), load_vae(str(vae_folder)))
    assert latents.captions == [TEXTS[number] for number in ORDER if number != 3]
    assert [latents.captions[label] for label in latents.labels] == [TEXTS[1], TEXTS[2]]
    assert latents.buckets == [0, 2]


def test_encoding_goes_on_only_with_the_same_pictures(root, tmp_path, captions, encode_pictures, capsys):
    """With captions and buckets as they were, and every picture in the bucket that it was in."""
    arguments = ("--captions", captions, "--shard", "2", "--buckets", *BUCKETS)
    encode_pictures(root, *arguments)
    file = tmp_path / "latents/latents-00001.safetensors"
    before = load_file(file)
    file.unlink()
    with pytest.raises(ValueError, match="holds latents of 3 of 5 samples: encoding was interrupted"):
        Latents(tmp_path / "latents")
    encode_pictures(root, *arguments)
    assert all(torch.equal(tensor, before[key]) for key, tensor in load_file(file).items())

    def refused(*arguments: str) -> bool:
        with pytest.raises(SystemExit):
            encode_pictures(root, *arguments)
        return "holds other latents, or other shards" in capsys.readouterr().err

    assert refused(*arguments[:-3], "8x8", "16x8", "8x16")
    assert refused(*arguments[:4])
    rows = [(NAMES[number], TEXTS[number]) for number in ORDER]
    assert refused("--captions", write_rows(tmp_path / "other.jsonl", rows[::-1]), *arguments[2:])
    (root / NAMES[0]).write_bytes((root / NAMES[2]).read_bytes())
    assert refused(*arguments)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_size": 16}, r"latents-00000\.safetensors do not fit: image_size is 8 there, 16 wanted"),
        ({"latents": "mean"}, "kind is 'sample' there, 'mean' wanted"),
        ({"buckets": ["8x8"]}, r"buckets is \('8x8', '8x16', '16x8'\) there, \('8x8',\) wanted"),
        ({"buckets": ["8x9"]}, r"data\.buckets, 8x9: 9 is not a multiple of the autoencoder's factor 2"),
        ({"buckets": ["8"]}, r"data\.buckets has '8'"),
        ({"latents": "median"}, r"data\.latents is 'median'"),
        ({"captions": "txt"}, r"leave out data\.captions and data\.picture_list"),
        ({"picture_list": "list"}, r"leave out data\.captions and data\.picture_list"),
        ({"kind": "videos"}, r"data\.kind is 'videos'; it is pictures, picture_shards or latents"),
    ],
)
def test_latents_of_other_settings_are_refused(root, tmp_path, captions, vae_folder, encode_pictures, settings, said):
    encode_pictures(root, "--captions", captions, "--buckets", *BUCKETS)
    config, vae = latents_at(tmp_path), load_vae(str(vae_folder))
    assert len(open_pictures(config, vae)) == 5
    with pytest.raises(ValueError, match=said):
        open_pictures(replace(config, **settings), vae)


def test_latents_of_another_autoencoder_are_refused(root, tmp_path, captions, vae_folder, encode_pictures):
    encode_pictures(root, "--captions", captions, "--buckets", *BUCKETS)
    vae = load_vae(str(vae_folder))
    vae.decoder.conv_in.weight.data += 1
    with pytest.raises(ValueError, match="do not fit: vae_id is"):
        open_pictures(latents_at(tmp_path), vae)


def test_latents_of_other_things_are_refused(root, tmp_path, captions, vae_folder, encode_pictures):
    """Even if nothing else is as wanted."""
    vae = load_vae(str(vae_folder))
    encode_pictures(root, "--captions", captions)
    with pytest.raises(ValueError, match="holds latents of captioned pictures, not of pictures with classes"):
        Latents(tmp_path / "latents")
    with pytest.raises(ValueError, match="holds latents of captioned pictures, not of clips"):
        ClipLatents(tmp_path / "latents", 4, 3)
    (tmp_path / "latents").rename(tmp_path / "captioned")
    encode_pictures(root, kind="image_folder")
    with pytest.raises(ValueError, match="holds latents of pictures with classes, not of captioned pictures"):
        open_pictures(latents_at(tmp_path), vae)
    (tmp_path / "latents").rename(tmp_path / "classes")
    encode_pictures(root, kind="frames")
    with pytest.raises(ValueError, match="holds latents of clips, not of captioned pictures"):
        open_pictures(latents_at(tmp_path), vae)


def test_options_of_pictures_are_refused_for_others(root, encode_pictures, capsys):
    for option in (("--buckets", "8x8"), ("--picture-list", "list")):
        with pytest.raises(SystemExit):
            encode_pictures(root, *option, kind="frames")
        assert "are of --data pictures and picture_shards, not of frames" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The section of a config, and python -m skipdit data check


@pytest.mark.parametrize(
    ("section", "overrides", "schema"),
    [
        ("kind: pictures", [], PictureData),
        ("kind: latents, buckets: [8x8]", [], PictureData),
        ("kind: latents", ["data.buckets=[8x8]"], PictureData),
        ("picture_list: list", [], PictureData),
        ("kind: pictures, picture_list: list", ["data.kind=latents", "path=here"], PictureData),
        ("kind: latents, num_frames: 4", [], ClipData),
        ("kind: videos, captions: txt", [], ClipData),
        ("flip: true", ["kind=frames"], ClipData),
        ("flip: true", [], ImageData),
    ],
)
def test_the_section_is_told_by_its_kind_or_keys(tmp_path, section, overrides, schema):
    (tmp_path / "c.yaml").write_text(f"data: {{{section}}}")
    assert type(load_section(str(tmp_path / "c.yaml"), overrides)) is schema


@pytest.mark.parametrize(
    ("task", "schema"), [("class-to-image", ImageData), ("class-to-video", ClipData), ("text-to-image", PictureData)]
)
def test_the_section_without_a_kind_is_that_of_the_task(tmp_path, task, schema):
    (tmp_path / "c.yaml").write_text(f"task: {task}\ndata: {{image_size: 16}}")
    assert type(load_section(str(tmp_path / "c.yaml"), [])) is schema
    (tmp_path / task).mkdir()
    (tmp_path / task / "c.yaml").write_text("data: {image_size: 16}")
    assert type(load_section(str(tmp_path / task / "c.yaml"), [])) is schema


def test_an_unknown_key_of_pictures_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("data:\n  kind: pictures\n  bucket: [8x8]\n")
    with pytest.raises(ConfigError, match=r"c\.yaml, line 3: unknown key 'bucket'; did you mean 'buckets'\?"):
        load_section(str(tmp_path / "c.yaml"), [])


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """`check(config, *arguments)` runs it on a config: (status, output)."""

    def run(config: PictureData, *arguments: str) -> tuple[int, str]:
        given = {name: value for name, value in vars(config).items() if value not in (None, [])}
        (tmp_path / "c.yaml").write_text(json.dumps({"data": given}))
        monkeypatch.setattr(sys, "argv", ["check", "check", str(tmp_path / "c.yaml"), "--workers", "0", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            check_main()
        return end.value.code, capsys.readouterr().out

    return run


DESCRIBED = (
    "5 captions: median 3 words, largest 3, for example 'ein Häßlicher 🐕'\n"
    "pictures per bucket, height x width: 8x8 (2), 8x16 (2), 16x8 (1)\n"
)


def test_check_of_pictures(root, captions, check):
    assert check(pictures_at(root, captions)) == (0, f"{root}: 5 readable pictures\n{DESCRIBED}")


def test_check_lists_good_files_where_a_training_takes_a_list(tmp_path, check, capsys):
    code, _ = check(ImageData(kind="image_folder", path=str(tmp_path)), "--good", str(tmp_path / "good.txt"))
    assert code == 2 and not (tmp_path / "good.txt").exists()


def test_check_names_what_cannot_be_used(root, tmp_path, captions, check):
    """Its list of good pictures makes a dataset without problems."""
    cut(root / NAMES[0])
    (root / NAMES[1]).write_text("no picture")
    rows = [(NAMES[number], TEXTS[number] * (number != 4)) for number in ORDER]
    config, good = pictures_at(root, write_rows(Path(captions), rows)), tmp_path / "good.txt"
    status, said = check(config, "--good", str(good))
    assert status == 1
    assert f"{root}: 2 readable pictures\n3 captions: " in said
    assert f"\nwithout caption, or with a second one: 1\n  {captions}, line 4: the caption of {NAMES[4]} is" in said
    assert re.search(rf"\nbroken: 2\n  {root}/a/0\.png: \S.*\n  {root}/a/1\.jpg: cannot identify", said)
    assert said.endswith(f"2 good pictures listed in {good}: train with data.picture_list={good}\n")
    assert good.read_text() == f"{NAMES[2]}\n{NAMES[3]}\n"
    assert check(config, f"data.picture_list={good}")[0] == 0


def test_check_of_latents(root, tmp_path, captions, encode_pictures, check):
    encode_pictures(root, "--captions", captions, "--buckets", *BUCKETS)
    status, said = check(latents_at(tmp_path))
    assert re.fullmatch(
        r".*: latents of 5 images, by the autoencoder \w+; kind sample, float16\n" + re.escape(DESCRIBED), said
    )
    assert status == 0


def test_captions_to_train(root, tmp_path, captions, encode_pictures):
    """Those of latents are those of the pictures, so that one set of text embeddings does for both."""
    encode_pictures(root, "--captions", captions, "--buckets", *BUCKETS)
    expected = [TEXTS[number] for number in ORDER]
    assert captions_to_train(pictures_at(root, captions)) == captions_to_train(latents_at(tmp_path)) == expected
