"""Clips: what training draws from each layout, what is said of files that cannot be used, latents, and the check.

Every frame painted here tells by its colours of which clip it is and its number there, so what was drawn is read back
from the pixels.
"""

import pickle
import re
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from conftest import skipdit_command
from PIL import Image
from safetensors.torch import load_file

from skipdit.data import clip_folder
from skipdit.data.clip_folder import ClipFolder, to_square
from skipdit.data.clips import load_section
from skipdit.data.latents import ClipLatents, Latents, open_clips
from skipdit.data.settings import ClipData
from skipdit.data.stream import Stream, collate, make_loader, rows_of
from skipdit.encoders.autoencoder import encode as encode_pixels
from skipdit.encoders.autoencoder import load_vae
from skipdit.utils.errors import BrokenSample
from skipdit.utils.pixels import to_float

check_main = skipdit_command("data")

LENGTHS = (20, 14, 18, 22)  # frames of clips 0 to 3
OTHERS = {clip: {0, 1, 2, 3} - {clip} for clip in range(4)}


def paint(clip: int, frames: range, height: int = 24, width: int = 40) -> np.ndarray:
    """Frames uint8 (F, H, W, 3): red is the clip, green the frame, and blue what a centre crop takes away."""
    pixels = np.zeros((len(frames), height, width, 3), np.uint8)
    pixels[..., 0] = 30 + 60 * clip
    pixels[..., 1] = 10 + 9 * np.array(frames)[:, None, None]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    outside = np.ones((height, width), bool)
    outside[top : top + side, left : left + side] = False
    pixels[:, outside, 2] = 255
    return pixels


def marks(pictures: torch.Tensor) -> list[tuple[int, int]]:
    """(clip, frame) of every picture (F, 3, 8, 8). Fails for anything but paint, cropped."""
    middle = pictures[..., 2:-2, 2:-2].float().mean((-2, -1))
    numbers = (middle - torch.tensor([30, 10, 0])) / torch.tensor([60, 9, 255])
    assert (numbers - numbers.round()).abs().max() < 0.4, "these colours are not painted here"
    assert pictures[:, 2].max() < 100, "this should have been cropped away"
    return [(int(clip), int(frame)) for clip, frame, _ in numbers.round()]


def write_video(path: Path, pixels: np.ndarray, *options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = "mpeg4" if path.suffix == ".avi" else "libx264"
    options = ["-qscale:v", "1"] if codec == "mpeg4" else ["-crf", "8", *options]
    imageio.imwrite(path, pixels, plugin="FFMPEG", fps=8, codec=codec, macro_block_size=1, output_params=options)
    return path


def write_pictures(folder: Path, pixels: np.ndarray, name: str = "frame_{}.png", start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pixels, start):
        Image.fromarray(picture).save(folder / name.format(number), quality=95)


@pytest.fixture(scope="session")
def layouts(tmp_path_factory) -> Path:
    """Each layout in a folder: class folders of videos, videos beside pictures, folders of numbered frames.

    Clip 0 to 3 in the order of their names. Only the pictures beside the videos have numbers from 24 on.
    """
    root = tmp_path_factory.mktemp("layouts")
    for clip, name in enumerate(("apple/v0.mp4", "apple/v1.avi", "pear/v2.mp4", "plum/v3.mp4")):
        pixels = paint(clip, range(LENGTHS[clip]))
        file = write_video(root / "classes" / name, pixels)
        (root / "faces/videos").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / "faces/videos" / file.name)
        write_pictures(root / "faces/pictures" / file.stem, paint(clip, range(24, 27)), "{}.jpg", start=24)
        write_pictures(root / "frames" / f"film{clip // 2}/shot{clip}", pixels)
    (root / "faces/list.txt").write_text("".join(f"v{clip}/{frame}.jpg\n" for clip in range(4) for frame in (24, 26)))
    return root


@pytest.fixture
def config(layouts):
    """`config(layout, **settings)`: four frames, every third, of 8x8 pixels."""

    def build(layout: str, **settings) -> ClipData:
        kind = "frames" if layout == "frames" else "videos"
        path = settings.pop("path", layouts / (layout + "/videos" * (layout == "faces")))
        usual = {"num_frames": 4, "frame_interval": 3, "image_size": 8}
        if layout == "faces":
            usual |= {"image_path": str(layouts / "faces/pictures"), "image_list": str(layouts / "faces/list.txt")}
        return ClipData(kind=kind, path=str(path), **usual | settings)

    return build


@pytest.fixture
def copied(layouts, tmp_path):
    """`copied(layout)`: a copy of a layout, to break."""

    def copy(layout: str) -> Path:
        return Path(shutil.copytree(layouts / layout, tmp_path / layout))

    return copy


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


each_layout = pytest.mark.parametrize("layout", ["classes", "faces", "frames"])


@each_layout
@pytest.mark.parametrize("interval", [1, 3])
def test_draws_a_stretch_in_order(config, layout, interval):
    """frame_2 comes before frame_10, too."""
    dataset = ClipFolder(config(layout, frame_interval=interval))
    assert len(dataset) == 4
    for index in range(4):
        sample = dataset.draw(index, rng(index))
        assert sample["image"].dtype == torch.uint8
        assert sample["image"].shape == (4, 3, 8, 8)
        drawn = marks(sample["image"])
        start = drawn[0][1]
        assert drawn == [(index, start + step * interval) for step in range(4)]
        assert sample.keys() == {"image", "broken"}
        assert sample["broken"] == ""


@each_layout
def test_all_of_a_clip(config, layout):
    dataset = ClipFolder(config(layout))
    assert [marks(dataset[i]["image"]) for i in range(4)] == [
        [(clip, frame) for frame in range(length)] for clip, length in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("layout", ["classes", "frames"])
def test_every_start_is_drawn(config, layout):
    """Clip 1 has 14 frames, of which 4 at every third reach over 10."""
    dataset = ClipFolder(config(layout))
    starts = {marks(dataset.draw(1, rng(seed))["image"])[0][1] for seed in range(30)}
    assert starts == {0, 1, 2, 3, 4}


def test_a_clip_that_just_fits(config):
    dataset = ClipFolder(config("classes", num_frames=14, frame_interval=1))
    assert marks(dataset.draw(1, rng(0))["image"]) == [(1, frame) for frame in range(14)]
    longer = ClipFolder(config("classes", num_frames=15, frame_interval=1))
    with pytest.raises(BrokenSample, match=re.escape("apple/v1.avi: 14 frames, too short for 15 at every 1")):
        longer.draw(1, rng(0))


@pytest.mark.parametrize("layout", ["faces", "frames"])
def test_stream_follows_from_seed_and_position(config, layout):
    def drawn(seed: int) -> list[list[tuple[int, int]]]:
        stream = Stream(ClipFolder(config(layout, images=1)), seed)
        return [marks(stream[position]["image"]) for position in range(16)]

    first = drawn(seed=3)
    assert first == drawn(seed=3)
    assert first != drawn(seed=4)
    assert [sorted(clip[0][0] for clip in first[i : i + 4]) for i in range(0, 16, 4)] == [[0, 1, 2, 3]] * 4
    for number in range(4):  # a clip's four turns, one per epoch
        assert len({clip[0][1] for clip in first if clip[0][0] == number}) > 1
    assert len({clip[-1] for clip in first}) > 4


def test_starts_follow_from_the_seed(config):
    """Of a single clip, which no order hides."""
    drawn = [
        [marks(stream[position]["image"])[0] for position in range(8)]
        for stream in (Stream(ClipFolder(config("classes", classes=["pear"])), seed) for seed in (0, 0, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_from_the_step(config, workers):
    """A run that goes on at step 2, on two processes, gets the rows that one process would have got."""
    stream = Stream(ClipFolder(config("frames", images=1)), 0)
    whole = list(make_loader(stream, rows_of(4, 4, 0, 1), 4, 0, 4, 0))
    halves = [list(make_loader(stream, rows_of(4, 2, rank, 2), 4, 2, 4, workers)) for rank in range(2)]
    for step, parts in zip((2, 3), zip(*halves, strict=True), strict=True):
        assert torch.equal(whole[step]["image"], torch.cat([part["image"] for part in parts]))
        assert whole[step]["index"].tolist() == [index for part in parts for index in part["index"].tolist()]
    assert whole[0]["image"].shape == (4, 5, 3, 8, 8)


@pytest.mark.parametrize("size", [(24, 40), (40, 20), (20, 20), (8, 60)])
@pytest.mark.parametrize("kind", ["videos", "frames"])
def test_middle_square_is_kept(tmp_path, kind, size):
    pixels = paint(2, range(10), *size)
    if kind == "videos":
        write_video(tmp_path / "clip.mp4", pixels)
    else:
        write_pictures(tmp_path / "clip", pixels)
    dataset = ClipFolder(ClipData(kind, str(tmp_path), num_frames=10, frame_interval=1, image_size=8))
    image = dataset.draw(0, rng(0))["image"]
    assert image.shape == (10, 3, 8, 8)
    assert marks(image) == [(2, frame) for frame in range(10)]


@pytest.mark.parametrize("kind", ["videos", "frames"])
def test_pictures_are_upright(tmp_path, kind):
    pixels = np.full((4, 24, 40, 3), 50, np.uint8)
    pixels[:, 12:, :20] = 200
    if kind == "videos":
        write_video(tmp_path / "clip.mp4", pixels)
    else:
        write_pictures(tmp_path / "clip", pixels)
    dataset = ClipFolder(ClipData(kind, str(tmp_path), num_frames=4, frame_interval=1, image_size=8))
    quarters = dataset[0]["image"].float().unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((0, 1, 3, 5))
    torch.testing.assert_close(quarters, torch.tensor([[50.0, 50.0], [200.0, 50.0]]), atol=10, rtol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_to_square_crops_and_shrinks(transposed):
    """A slope that rises from left to right stays one; at the final size no pixel changes."""
    slope = torch.arange(64, dtype=torch.uint8).expand(2, 3, 32, 64)
    square = to_square(slope.mT if transposed else slope, 8)
    square = square.mT if transposed else square
    assert square.shape == (2, 3, 8, 8)
    torch.testing.assert_close(square[0, 0, 0].float(), 16 + 4 * torch.arange(8) + 1.5, atol=1, rtol=0)
    assert torch.equal(to_square(slope, 32), slope[..., 16:48])


def test_to_square_takes_means():
    """Of stripes that become narrower than a pixel grey is left."""
    stripes = torch.tensor([0, 255, 255, 0], dtype=torch.uint8).repeat(16).expand(3, 64, 64)
    assert (to_square(stripes, 16).float() - 127.5).abs().max() < 40


@pytest.mark.parametrize("layout", ["classes", "frames"])
def test_images_are_frames_of_all_other_clips(config, layout):
    dataset = ClipFolder(config(layout, images=6))
    for index in range(4):
        samples = [dataset.draw(index, rng(seed)) for seed in range(4)]
        assert all(sample["image"].shape == (10, 3, 8, 8) for sample in samples)
        assert {clip for sample in samples for clip, _ in marks(sample["image"][:4])} == {index}
        images = [mark for sample in samples for mark in marks(sample["image"][4:])]
        assert {clip for clip, _ in images} == OTHERS[index]
        assert len(set(images)) > 12
        assert all(frame < LENGTHS[clip] for clip, frame in images)


def test_images_are_listed_pictures_of_other_clips(config):
    dataset = ClipFolder(config("faces", images=10))
    for index in range(4):
        samples = [dataset.draw(index, rng(seed)) for seed in range(4)]
        images = {mark for sample in samples for mark in marks(sample["image"][4:])}
        assert images == {(clip, frame) for clip in OTHERS[index] for frame in (24, 26)}


@pytest.mark.parametrize("kind", ["videos", "frames"])
def test_a_rare_picture_of_another_clip_is_found(layouts, tmp_path, kind):
    """Nearly all pictures are the clip's own, in a folder of its name; names have dots."""
    for clip in (0, 1):
        if kind == "videos":
            shutil.copy(layouts / f"faces/videos/v{2 * clip}.mp4", tmp_path / f"shot.{clip}.mp4")
        else:
            write_pictures(tmp_path / f"shot.{clip}", paint(2 * clip, range(10)))
        shutil.copytree(layouts / f"faces/pictures/v{2 * clip}", tmp_path / f"pictures/shot.{clip}")
    (tmp_path / "clips.txt").write_text("\n".join(f"shot.{clip}{'.mp4' * (kind == 'videos')}" for clip in (0, 1)))
    (tmp_path / "list.txt").write_text("shot.0/24.jpg\n" * 50 + "shot.1/25.jpg\n")
    config = ClipData(kind, str(tmp_path), str(tmp_path / "clips.txt"), num_frames=4, image_size=8, images=2)
    config = replace(config, image_list=str(tmp_path / "list.txt"), image_path=str(tmp_path / "pictures"))
    dataset = ClipFolder(config)
    for seed in range(4):
        assert marks(dataset.draw(0, rng(seed))["image"][4:]) == [(2, 25)] * 2
        assert marks(dataset.draw(1, rng(seed))["image"][4:]) == [(0, 24)] * 2
    (tmp_path / "list.txt").write_text("shot.0/24.jpg\nshot.0/25.jpg\n")
    with pytest.raises(ValueError, match=r"image_list lists no picture of another clip than shot\.0"):
        ClipFolder(config).draw(0, rng(0))


@pytest.mark.parametrize(
    ("settings", "classes", "clips"),
    [
        ({"labelled": True}, ["apple", "pear", "plum"], [0, 1, 2, 3]),
        ({"labelled": True, "classes": ["plum", "apple"]}, ["plum", "apple"], [0, 1, 3]),
        ({"classes": ["pear", "plum"]}, ["pear", "plum"], [2, 3]),
    ],
)
def test_labels_are_class_folders(config, settings, classes, clips):
    dataset = ClipFolder(config("classes", images=4, **settings))
    assert dataset.classes == classes
    assert dataset.num_classes == len(classes)
    class_of = [classes.index(name) if name in classes else None for name in ("apple", "apple", "pear", "plum")]
    found = []
    for index in range(len(dataset)):
        sample = dataset.draw(index, rng(index))
        drawn = marks(sample["image"])
        found.append(drawn[0][0])
        assert sample["label"] == class_of[drawn[0][0]]
        assert dataset[index]["label"] == sample["label"]
        assert sample["image_label"].dtype == torch.int64
        assert sample["image_label"].tolist() == [class_of[clip] for clip, _ in drawn[4:]]
    assert found == clips


@pytest.mark.parametrize("names", [["001", "010"], ["no", "yes"], ["off", "on"], ["1e3", "2"], ["null", "x"]])
@pytest.mark.parametrize("override", [False, True])
def test_class_folders_may_be_called_anything(tmp_path, names, override):
    for number, name in enumerate(names):
        write_pictures(tmp_path / f"clips/{name}/a", paint(number, range(4)))
    file, classes = tmp_path / "config.yaml", f"[{', '.join(names[::-1])}]"
    settings = f"kind: frames, path: {tmp_path}/clips, num_frames: 4, frame_interval: 1, image_size: 8"
    file.write_text(f"data: {{{settings}, labelled: true, classes: {[] if override else classes}}}")
    dataset = ClipFolder(load_section(str(file), [f"data.classes={classes}"] if override else []))
    assert dataset.classes == names[::-1]
    assert [marks(dataset[index]["image"])[0][0] for index in range(2)] == [0, 1]
    assert dataset.labels == [1, 0]


def test_without_pyav_videos_are_refused_and_frames_are_read(config, monkeypatch):
    """Every video would be broken, and training would go on with none of them."""
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="pip install av"):
        ClipFolder(config("classes"))
    assert len(ClipFolder(config("frames")).open(0)) == LENGTHS[0]


def test_labels_of_listed_pictures(config, layouts, tmp_path):
    """Pictures outside of the classes asked for go with their clips."""
    folders = ("apple", "apple", "pear", "plum")
    for clip, folder in enumerate(folders):
        shutil.copytree(layouts / f"faces/pictures/v{clip}", tmp_path / folder / f"v{clip}")
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{folder}/v{clip}/25.jpg\n" for clip, folder in enumerate(folders)))
    pictures = {"image_list": str(listed), "image_path": str(tmp_path), "images": 8}
    dataset = ClipFolder(config("classes", classes=["plum", "apple"], **pictures))
    for index, clip in enumerate((0, 1, 3)):
        sample = dataset.draw(index, rng(index))
        drawn = marks(sample["image"])[4:]
        assert set(drawn) == {(other, 25) for other in {0, 1, 3} - {clip}}
        assert sample["image_label"].tolist() == [0 if other == 3 else 1 for other, _ in drawn]
    listed.write_text("pear/v2/25.jpg\n")
    with pytest.raises(ValueError, match=r"lists no pictures in the class folders apple: it has pear/v2/25\.jpg"):
        ClipFolder(config("classes", classes=["apple"], **pictures))


def test_clip_list(config, tmp_path):
    """Only the clips listed, in that order; empty lines do not count."""
    (tmp_path / "list.txt").write_text("plum/v3.mp4\n\n  apple/v1.avi \n")
    dataset = ClipFolder(config("classes", clip_list=str(tmp_path / "list.txt"), labelled=True))
    samples = [dataset.draw(index, rng(0)) for index in range(len(dataset))]
    assert [marks(sample["image"])[0][0] for sample in samples] == [3, 1]
    assert [sample["label"] for sample in samples] == [1, 0]
    (tmp_path / "list.txt").write_text("film1/shot2\n")
    assert ClipFolder(config("frames", clip_list=str(tmp_path / "list.txt"))).names == ["film1/shot2"]


STRAYS = {
    "classes": ["notes.txt", ".DS_Store", "apple/Thumbs.db", "apple/._v0.mp4", "apple/v0.txt", "pear/cover.jpg"],
    "frames": ["notes.txt", ".DS_Store", "film0/Thumbs.db", "film0/shot0/._frame_1.png", "film0/shot0/a.txt", "x.mp4"],
}


def add_strays(root: Path, layout: str) -> None:
    for name in STRAYS[layout]:
        (root / name).write_text("no clip")
    (root / "empty/empty").mkdir(parents=True)
    (root / "folder.mp4").mkdir()
    (root / "folder.png").mkdir()


@pytest.mark.parametrize("layout", ["classes", "frames"])
def test_stray_files_and_empty_folders_are_passed_over(config, copied, layout):
    root = copied(layout)
    clean = ClipFolder(config(layout, path=root, labelled=True))
    assert clean.strays == {}
    add_strays(root, layout)
    dataset = ClipFolder(config(layout, path=root, labelled=True))
    assert (dataset.names, dataset.labels) == (clean.names, clean.labels)
    assert [marks(dataset[i]["image"]) for i in range(4)] == [marks(clean[i]["image"]) for i in range(4)]
    hidden, other = (".mp4", ".jpg") if layout == "classes" else (".png", ".mp4")
    assert dataset.strays == {".txt": 2, "": 1, ".db": 1, hidden: 1, other: 1}


def test_linked_class_folders_are_followed(config, layouts, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/linked").symlink_to(layouts / "classes/pear")
    dataset = ClipFolder(config("classes", path=tmp_path / "clips", labelled=True))
    assert dataset.names == ["linked/v2.mp4"]


@pytest.mark.parametrize("layout", ["classes", "frames"])
def test_hidden_folders_and_links_to_folders_above_are_passed_over(config, copied, layout):
    root = copied(layout)
    names = ClipFolder(config(layout, path=root)).names
    first = root / Path(names[0]).parts[0]
    for folder in (".hidden", ".Trash-1000/files", "__MACOSX"):
        shutil.copytree(first, root / folder)
    (first / "above").symlink_to(root)
    (first / "itself").symlink_to("itself")
    (first / "here").symlink_to(".")
    dataset = ClipFolder(config(layout, path=root, labelled=True))
    assert (dataset.names, dataset.classes) == (names, sorted({Path(name).parts[0] for name in names}))


def test_links_across_end(tmp_path):
    """Two folders that hold links to each other."""
    for name, other in (("a", "b"), ("b", "a")):
        write_pictures(tmp_path / name, paint(0, range(3)))
        (tmp_path / name / "other").symlink_to(tmp_path / other)
    dataset = ClipFolder(ClipData("frames", str(tmp_path), num_frames=1, image_size=8))
    assert dataset.names == ["a", "a/other", "b", "b/other"]


def test_frames_of_one_number_have_an_order(tmp_path):
    names = [f"frame_{number}.png" for number in ("1", "01", "001", "²", "x", "10", "2")]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    files = [path.name for path in clip_folder._frames(tmp_path)]
    expected = ["001", "01", "1", "2", "10", "x", "²"]
    assert files == [f"frame_{number}.png" for number in expected]


@pytest.mark.parametrize(
    ("layout", "settings", "error", "said"),
    [
        ("classes", {"path": "nowhere"}, FileNotFoundError, "no folder of clips nowhere"),
        ("classes", {"path": "EMPTY"}, ValueError, "EMPTY holds no video files"),
        ("frames", {"path": "EMPTY"}, ValueError, "EMPTY holds no folders of pictures"),
        ("classes", {"classes": ["pear", "fig"]}, ValueError, r"has no clips of fig \(data.classes\)"),
        ("faces", {"labelled": True}, ValueError, "holds no video files in class folders"),
        ("classes", {"clip_list": "nowhere.txt"}, FileNotFoundError, "no list nowhere.txt: No such file"),
        ("classes", {"clip_list": "EMPTY/list"}, ValueError, "EMPTY/list holds no video files"),
        ("faces", {"images": 1, "image_list": "nowhere.txt"}, FileNotFoundError, "no list nowhere.txt: No such file"),
        ("faces", {"images": 1, "image_list": "EMPTY/list"}, ValueError, "EMPTY/list lists no pictures"),
        ("classes", {"num_frames": 0}, ValueError, "num_frames is 0; it should be 1 or more"),
        ("classes", {"frame_interval": 0}, ValueError, "frame_interval is 0; it should be 1 or more"),
        ("classes", {"images": -1}, ValueError, "images is -1; it should be 0 or more"),
        ("frames", {"num_frames": 9}, ValueError, "all 4 clips are too short, for example film0/shot0: 20 frames"),
    ],
)
def test_nothing_to_read_is_an_error_that_names_it(config, tmp_path, monkeypatch, layout, settings, error, said):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY/list").write_text("\n \n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said):
        ClipFolder(config(layout, **settings))


def test_without_images_their_list_is_not_read(config):
    assert len(ClipFolder(config("faces", image_list="nowhere.txt"))) == 4


def test_images_want_a_second_clip(config):
    with pytest.raises(ValueError, match=r"only one clip: set data\.images=0"):
        ClipFolder(config("classes", classes=["pear"], images=1)).draw(0, rng(0))


# ---------------------------------------------------------------------------------------------------------------------
# Files that cannot be read


def cut(path: Path, share: float = 0.6) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])


def cut_index_last(path: Path) -> None:
    """How an mp4 is usually written: the table of its frames comes after them, and is cut off."""
    assert path.read_bytes().find(b"moov") > path.read_bytes().find(b"mdat")
    cut(path)


def cut_index_first(path: Path) -> None:
    """An mp4 for streaming: its table promises frames that are cut off."""
    write_video(path, paint(0, range(20)), "-movflags", "+faststart")
    assert path.read_bytes().find(b"moov") < path.read_bytes().find(b"mdat")
    cut(path, 0.9)


def make_hole(path: Path) -> None:
    """A file that opens, and says how many frames it has, and cannot be decoded for long."""
    write_video(path, rng(0).integers(0, 256, (20, 24, 40, 3), dtype=np.uint8))
    whole = bytearray(path.read_bytes())
    start, stop = whole.find(b"mdat"), whole.find(b"moov")
    start += (stop - start) // 4
    path.write_bytes(whole[:start] + bytes(stop - 4 - start) + whole[stop - 4 :])


def make_text(path: Path) -> None:
    path.write_text("no video at all\n" * 20)


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_short(path: Path) -> None:
    write_video(path, paint(0, range(9)))


BREAK = [cut_index_last, cut_index_first, make_hole, make_text, make_empty]


@pytest.mark.parametrize("damage", [*BREAK, make_short], ids=lambda function: function.__name__)
def test_broken_video_weighs_nothing(config, copied, damage):
    """Its place in the batch is kept, with zeros and a message of one line that names it."""
    root = copied("classes")
    damage(root / "apple/v0.mp4")
    stream = Stream(ClipFolder(config("classes", path=root, labelled=True, images=1)), 0)
    samples = {stream.index(position): stream[position] for position in range(4)}
    assert {index: sample["weight"] for index, sample in samples.items()} == {0: 0, 1: 1, 2: 1, 3: 1}
    reason = r": 9 frames, too short for 4 at every 3$" if damage is make_short else r": \S"
    assert re.search(r"apple/v0\.mp4" + reason, samples[0]["broken"])
    assert "\n" not in samples[0]["broken"]
    assert not re.search(r"\d\d:\d\d:\d\d", samples[0]["broken"]), "with a time in it, it would be listed every time"
    batch = collate([samples[index] for index in range(4)])
    assert batch["image"].shape == (4, 5, 3, 8, 8)
    assert not batch["image"][0].any()
    assert [marks(image)[0][0] for image in batch["image"][1:]] == [1, 2, 3]
    assert batch["label"].tolist() == [0, 0, 1, 2]
    assert batch["image_label"].shape == (4, 1)
    assert samples[0]["broken"] in batch["broken"]


def test_every_message_is_one_line():
    assert str(BrokenSample("a.mp4: one\n  two", "b.mp4: three")) == "a.mp4: one two\nb.mp4: three"


@pytest.mark.parametrize("layout", ["classes", "frames"])
def test_broken_source_of_an_image_is_replaced(config, copied, layout):
    root = copied(layout)
    broken = root / ClipFolder(config(layout, path=root)).names[0]
    for file in [broken] if layout == "classes" else list(broken.iterdir()):
        make_text(file)
    dataset = ClipFolder(config(layout, path=root, images=8))
    samples = [dataset.draw(index, rng(index)) for index in (1, 2, 3)]
    for index, sample in enumerate(samples, 1):
        assert {clip for clip, _ in marks(sample["image"][4:])} == {1, 2, 3} - {index}
        assert sample["broken"]
        assert all(line.startswith(str(broken)) for line in sample["broken"].splitlines())
    stream = Stream(dataset, 0)
    batch = collate([stream[position] for position in range(4)])
    assert sorted(batch["weight"].tolist()) == [0, 1, 1, 1]
    assert len(batch["broken"]) > 1
    assert all(line.startswith(str(broken)) for line in batch["broken"])


def test_broken_and_missing_pictures_are_replaced(config, copied):
    root = copied("faces")
    (root / "pictures/v1/24.jpg").unlink()
    cut(root / "pictures/v1/26.jpg")
    make_empty(root / "pictures/v2/24.jpg")
    dataset = ClipFolder(config("faces", path=root / "videos", image_path=str(root / "pictures"), images=4))
    samples = [dataset.draw(0, rng(seed)) for seed in range(8)]
    assert {mark for sample in samples for mark in marks(sample["image"][4:])} == {(2, 26), (3, 24), (3, 26)}
    named = {Path(line.split(": ")[0]) for sample in samples for line in sample["broken"].splitlines()}
    assert named == {root / "pictures" / name for name in ("v1/24.jpg", "v1/26.jpg", "v2/24.jpg")}


def test_one_readable_clip(config, copied):
    """It trains by itself; beside it there are no images, so with them nothing is left."""
    root = copied("classes")
    for name in ("apple/v1.avi", "pear/v2.mp4", "plum/v3.mp4"):
        make_text(root / name)
    alone = Stream(ClipFolder(config("classes", path=root)), 0)
    assert sorted((alone[p]["index"], alone[p]["weight"]) for p in range(4)) == [(0, 1), (1, 0), (2, 0), (3, 0)]
    joint = Stream(ClipFolder(config("classes", path=root, images=1)), 0)
    with pytest.raises(ValueError, match=r"none of 4 samples can be read:(.|\n)*apple/v1\.avi(.|\n)*plum/v3\.mp4"):
        joint[0]


def test_a_broken_folder_ahead_of_good_ones():
    """However many samples it has: any readable one tells what is to stand in for them."""

    class Folders:
        def __len__(self) -> int:
            return 3000

        def __getitem__(self, index: int) -> dict:
            if index < 1000:
                raise BrokenSample(f"clip {index} is cut short")
            return {"image": torch.ones(2, 3)}

    stream = Stream(Folders(), 0)
    samples = [stream[position] for position in range(12)]
    assert {sample["weight"] for sample in samples} == {0.0, 1.0}
    assert all(torch.equal(sample["image"], torch.full((2, 3), sample["weight"])) for sample in samples)


def test_short_folders_of_frames_are_left_out_and_named(config, copied):
    root = copied("frames")
    write_pictures(root / "film0/shot", paint(0, range(9)))
    write_pictures(root / "film2/shot", paint(0, range(10)))
    (root / "film0/shot1/frame_3.png").write_text("broken")
    dataset = ClipFolder(config("frames", path=root, labelled=True))
    assert dataset.left_out == ["film0/shot: 9 frames, too short for 4 at every 3"]
    assert dataset.names == ["film0/shot0", "film0/shot1", "film1/shot2", "film1/shot3", "film2/shot"]
    assert dataset.labels == [0, 0, 1, 1, 2]
    assert marks(dataset.draw(2, rng(0))["image"])[0][0] == 2
    with pytest.raises(BrokenSample, match=r"film0/shot1/frame_3\.png: cannot identify"):
        dataset[1]


def test_broken_frame_breaks_only_the_stretches_that_hold_it(config, copied):
    root = copied("frames")
    cut(root / "film0/shot1/frame_0.png", 0.5)
    dataset = ClipFolder(config("frames", path=root))
    starts = set()
    for seed in range(40):
        try:
            starts.add(marks(dataset.draw(1, rng(seed))["image"])[0][1])
        except BrokenSample as error:
            assert re.search(r"film0/shot1/frame_0\.png: \S", str(error))
            starts.add("broken")
    assert starts == {"broken", 1, 2, 3, 4}


# ---------------------------------------------------------------------------------------------------------------------
# Latents


@pytest.fixture
def encode_clips(monkeypatch, vae_folder, capsys):
    """`encode_clips(kind, path, out, *arguments)` runs the program and returns what it prints."""

    def run(kind: str, path: Path, out: Path, *arguments: str) -> str:
        command = f"encode --data {kind} --path {path} --out {out} --vae {vae_folder} --image-size 8 --workers 0"
        monkeypatch.setattr(sys, "argv", [*command.split(), *arguments])
        capsys.readouterr()
        skipdit_command("encode")()
        return capsys.readouterr().out

    return run


def test_latents_are_those_of_the_pixels_drawn(tmp_path, vae_folder, encode_clips):
    """Two clips of noise per shard: one random state draws the same frames, images and labels; and mirrored copies."""
    for clip, folder in enumerate(("apple", "apple", "pear", "plum")):
        noise = rng(clip).integers(0, 256, (LENGTHS[clip], 8, 8, 3), dtype=np.uint8)
        write_pictures(tmp_path / f"clips/{folder}/{clip}", noise)
    encode_clips("frames", tmp_path / "clips", tmp_path / "latents", "--labelled", "--shard", "2")
    config = ClipData("frames", str(tmp_path / "clips"), labelled=True, num_frames=4, images=2, image_size=8)
    vae = load_vae(str(vae_folder))
    pixels = open_clips(config, vae)
    latents = open_clips(replace(config, kind="latents", path=str(tmp_path / "latents")), vae)
    assert (len(latents), latents.labels, latents.num_classes) == (4, [0, 0, 1, 2], 3)
    assert [len(latents[i]["mean"]) for i in range(4)] == list(LENGTHS)
    for index in range(4):
        drawn, encoded = pixels.draw(index, rng(index)), latents.draw(index, rng(index))
        assert encoded["label"] == drawn["label"]
        assert torch.equal(encoded["image_label"], drawn["image_label"])
        assert encoded["mean"].shape == encoded["std"].shape == (6, 2, 4, 4, 4)
        for copy, view in enumerate((drawn["image"], drawn["image"].flip(-1))):
            mean, std = encode_pixels(vae, to_float(view))
            torch.testing.assert_close(encoded["mean"][:, copy].float(), mean, atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(encoded["std"][:, copy].float(), std, atol=2e-3, rtol=2e-3)


def test_latents_without_classes_or_deviation(config, layouts, tmp_path, encode_clips):
    said = encode_clips("frames", layouts / "frames", tmp_path / "latents", "--latents", "mean")
    assert "4 of 4 clips, latents in" in said
    assert load_file(tmp_path / "latents/latents-00000.safetensors").keys() == {"mean", "length"}
    latents = ClipLatents(tmp_path / "latents", num_frames=4, frame_interval=5, images=1)
    assert latents.left_out == [f"{tmp_path}/latents: clip 1: 14 frames, too short for 4 at every 5"]
    assert [len(latents[i]["mean"]) for i in range(len(latents))] == [20, 18, 22]
    sample = latents.draw(0, rng(0))
    assert sample.keys() == {"mean", "broken"}
    assert sample["mean"].shape == (5, 2, 4, 4, 4)
    with pytest.raises(ValueError, match="all 4 clips are too short"):
        ClipLatents(tmp_path / "latents", num_frames=40, frame_interval=1)


@pytest.mark.parametrize("shard", ["1", "10"])
def test_broken_clips_are_left_out_of_the_latents(config, copied, tmp_path, encode_clips, shard):
    """Also where a shard is left with nothing."""
    root, out = copied("classes"), tmp_path / "latents"
    cut_index_last(root / "apple/v0.mp4")
    make_text(root / "pear/v2.mp4")
    said = encode_clips("videos", root, out, "--labelled", "--shard", shard)
    assert f"2 of 4 clips, latents in {out}\n2 unreadable clips were left out, listed in {out}/broken_files.txt" in said
    listed = (out / "broken_files.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{root}/apple/v0.mp4", f"{root}/pear/v2.mp4"]
    latents = ClipLatents(out, num_frames=4, frame_interval=3, images=1)
    assert latents.labels == [0, 2]
    assert [len(latents[i]["mean"]) for i in range(2)] == [LENGTHS[1], LENGTHS[3]]
    assert latents.draw(1, rng(0))["image_label"].tolist() == [0]


def test_encoding_goes_on_only_with_the_same_clips(layouts, tmp_path, encode_clips, capsys):
    """The shard that is missing is made again; with classes, or with other ones, it is another dataset."""
    out = tmp_path / "latents"
    encode_clips("videos", layouts / "classes", out, "--shard", "2")
    files = sorted(out.glob("*.safetensors"))
    before = load_file(files[1])
    files[1].unlink()
    with pytest.raises(ValueError, match="holds latents of 2 of 4 samples: encoding was interrupted"):
        ClipLatents(out, 4, 3)
    encode_clips("videos", layouts / "classes", out, "--shard", "2")
    assert sorted(out.iterdir()) == files
    again = load_file(files[1])
    assert again.keys() == before.keys() == {"mean", "std", "length"}
    assert all(torch.equal(again[key], before[key]) for key in before)
    for other in (["--labelled"], ["--classes", "apple", "pear", "plum"]):
        with pytest.raises(SystemExit):
            encode_clips("videos", layouts / "classes", out, "--shard", "2", *other)
        assert "holds other latents" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_size": 16}, r"latents-00000\.safetensors do not fit: image_size is 8 there, 16 wanted"),
        ({"latents": "mean"}, "kind is 'sample' there, 'mean' wanted"),
        ({"latents": "median"}, r"data\.latents is 'median'; it is 'mean' or 'sample'"),
        ({"classes": ["pear"]}, r"latents hold the clips of their encoding, .* unset data\.classes$"),
        ({"image_list": "a.txt", "image_path": "pictures"}, r"unset data\.image_list, data\.image_path$"),
        ({"kind": "films"}, r"data\.kind is 'films'; it is videos, frames, clip_shards or latents"),
    ],
)
def test_latents_of_other_settings_are_refused(layouts, tmp_path, vae_folder, encode_clips, settings, said):
    encode_clips("videos", layouts / "classes", tmp_path / "latents")
    config = ClipData("latents", str(tmp_path / "latents"), num_frames=4, image_size=8)
    assert len(open_clips(config, load_vae(str(vae_folder)))) == 4
    with pytest.raises(ValueError, match=said):
        open_clips(replace(config, **settings), load_vae(str(vae_folder)))


def test_latents_of_another_autoencoder_are_refused(layouts, tmp_path, vae_folder, encode_clips):
    encode_clips("videos", layouts / "classes", tmp_path / "latents")
    vae = load_vae(str(vae_folder))
    vae.decoder.conv_in.weight.data += 1
    with pytest.raises(ValueError, match="do not fit: vae_id is"):
        open_clips(ClipData("latents", str(tmp_path / "latents"), image_size=8), vae)


def test_labels_of_pictures_stay_with_them(tmp_path, image_folder, encode_clips):
    """Two pictures within the batch are broken."""
    encode_clips("image_folder", image_folder, tmp_path / "latents")
    whole = [path for path in sorted(image_folder.rglob("*.png")) if path.name not in ("03.png", "04.png")]
    latents = Latents(tmp_path / "latents")
    assert [latents[i]["label"] for i in range(22)] == [int(path.parent.name.removeprefix("class")) for path in whole]


def test_latents_of_pictures_are_none_of_clips(layouts, tmp_path, image_folder, encode_clips):
    encode_clips("videos", layouts / "classes", tmp_path / "clips")
    encode_clips("image_folder", image_folder, tmp_path / "pictures")
    with pytest.raises(ValueError, match="pictures holds latents of pictures with classes, not of clips"):
        ClipLatents(tmp_path / "pictures", num_frames=4, frame_interval=3)
    with pytest.raises(ValueError, match="clips holds latents of clips, not of pictures"):
        Latents(tmp_path / "clips")


@pytest.mark.parametrize("kind", ["videos", "frames", "latents"])
@pytest.mark.slow
def test_loading_processes(config, layouts, tmp_path, encode_clips, kind):
    """Two of them give what one process gives, and a dataset that was in use can be sent to one."""
    if kind == "latents":
        encode_clips("videos", layouts / "classes", tmp_path / "latents")
        dataset = ClipLatents(tmp_path / "latents", 4, 3, images=1)
    else:
        dataset = ClipFolder(config("frames" if kind == "frames" else "classes", images=1))
    stream, key = Stream(dataset, 0), "mean" if kind == "latents" else "image"
    alone = [batch[key] for batch in make_loader(stream, [range(3)], 3, 0, 4, 0)]
    for sent in (stream, pickle.loads(pickle.dumps(stream))):
        batches = [batch[key] for batch in make_loader(sent, [range(3)], 3, 0, 4, 2)]
        assert torch.equal(torch.stack(batches), torch.stack(alone))


# ---------------------------------------------------------------------------------------------------------------------
# python -m skipdit data check


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """`check(config, *arguments)` runs it on a config, given as settings or as text: (status, output, errors)."""

    def run(config: ClipData | str, *arguments: str) -> tuple[int, str, str]:
        file = tmp_path / "config.yaml"
        if isinstance(config, ClipData):
            given = {name: value for name, value in vars(config).items() if value not in (None, [])}
            config = "out: here\ndata:\n" + "".join(f"  {name}: {value}\n" for name, value in given.items())
        file.write_text(config)
        monkeypatch.setattr(sys, "argv", ["check", "check", str(file), "--workers", "0", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            check_main()
        return end.value.code, *capsys.readouterr()

    return run


def passed_over(said: str) -> list[str]:
    """What the report says of stray files, in any order."""
    kinds = re.search(r"\npassed over: 6 other files \((.*)\)\n", said)[1]
    return sorted(kinds.split(", "))


def test_check_of_class_folders(config, copied, check):
    root = copied("classes")
    add_strays(root, "classes")
    status, said, _ = check(config("classes", path=root, labelled=True))
    assert said.startswith(
        f"{root}: 4 readable video files, 74 frames\n"
        "frames per clip: 14 to 22, median 19\n"
        "3 classes of 1 to 2 clips:\n"
        "  0 apple (2), 1 pear (1), 2 plum (1)\n"
        "passed over: "
    )
    assert passed_over(said) == ["1 .db", "1 .jpg", "1 .mp4", "1 without suffix", "2 .txt"]
    assert len(said.splitlines()) == 5
    assert status == 0


def test_check_of_videos_and_pictures(config, copied, check):
    root = copied("faces")
    settings = {"path": root / "videos", "image_path": str(root / "pictures"), "images": 2}
    whole = f"{root}/videos: 4 readable video files, 74 frames\nframes per clip: 14 to 22, median 19\n"
    assert check(config("faces", **settings))[:2] == (0, whole + "8 pictures listed to draw images from\n")
    (root / "pictures/v2/24.jpg").unlink()
    cut_index_first(root / "videos/v0.mp4")
    status, said, _ = check(config("faces", **settings))
    assert said.startswith(f"{root}/videos: 3 readable video files, 54 frames\n")
    assert re.search(
        rf"\nbroken: 2\n  {root}/videos/v0\.mp4: \S.*\n  {root}/pictures/v2/24\.jpg: listed, but not there\n$", said
    )
    assert status == 1


def test_check_of_folders_of_frames(config, copied, check):
    root = copied("frames")
    add_strays(root, "frames")
    cut(root / "film1/shot3/frame_7.png", 0.5)
    status, said, _ = check(config("frames", path=root, frame_interval=5, labelled=True))
    assert said.startswith(
        f"{root}: 2 readable folders of frames, 38 frames\n"
        "frames per clip: 18 to 20, median 19\n"
        "2 classes of 1 to 2 clips:\n"
        "  0 film0 (1), 1 film1 (2)\n"
        "passed over: "
    )
    assert passed_over(said) == ["1 .db", "1 .mp4", "1 .png", "1 without suffix", "2 .txt"]
    short = "too short for 4 frames at every 5: 1\n  film0/shot1: 14 frames, too short for 4 at every 5\n"
    assert f"\n{short}broken: 1\n  {root}/film1/shot3/frame_7.png: " in said
    assert status == 1


@pytest.mark.parametrize("layout", ["classes", "frames"])
def test_list_of_good_clips_makes_a_dataset_without_problems(config, copied, check, tmp_path, layout):
    root = copied(layout)
    names = ClipFolder(config(layout, path=root)).names
    if layout == "classes":
        make_short(root / names[0])
        make_empty(root / names[2])
    else:
        shutil.rmtree(root / names[0])
        write_pictures(root / names[0], paint(0, range(9)))
        make_empty(root / names[2] / "frame_5.png")
    good = tmp_path / "good.txt"
    status, said, _ = check(config(layout, path=root, labelled=True), "--good", str(good))
    assert status == 1
    assert "too short for 4 frames at every 3: 1\n" in said
    assert "broken: 1\n" in said
    assert said.endswith(f"2 good clips listed in {good}: train with data.clip_list={good}\n")
    assert good.read_text() == f"{names[1]}\n{names[3]}\n"
    status, said, _ = check(config(layout, path=root, labelled=True), f"clip_list={good}")
    assert status == 0
    assert f"{root}: 2 readable" in said
    assert "too short" not in said
    dataset = ClipFolder(config(layout, path=root, clip_list=str(good), labelled=True))
    assert [marks(dataset.draw(index, rng(0))["image"])[0][0] for index in range(2)] == [1, 3]


@pytest.mark.parametrize(("frame", "quick", "status"), [(0, 1, 1), (6, 1, 0), (19, 1, 1), (6, 0, 1)])
def test_quick_check_reads_the_ends_only(config, copied, check, frame, quick, status):
    root = copied("frames")
    make_text(root / f"film0/shot0/frame_{frame}.png")
    found, said, _ = check(config("frames", path=root), *["--quick"] * quick)
    assert found == status
    assert (f"frame_{frame}.png: cannot identify" in said) == status
    assert "frames per clip: 14 to 22, median " in said


def test_check_counts_frames_by_decoding_on_request(config, copied, check):
    """The first and the last frame are whole, one in between is not."""
    root = copied("classes")
    noise = rng(0).integers(0, 256, (20, 24, 40, 3), dtype=np.uint8)
    content = bytearray(write_video(root / "apple/v0.mp4", noise, "-g", "5").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    (root / "apple/v0.mp4").write_bytes(content)
    assert check(config("classes", path=root), "--quick")[0] == 0
    status, said, _ = check(config("classes", path=root), "--quick", "--decode")
    assert status == 1
    assert re.search(rf"broken: 1\n  {root}/apple/v0\.mp4: \S", said)
    for kind in ("classes", "frames"):
        assert check(config(kind), "--decode")[0] == 0


@pytest.mark.parametrize("frame", [64, 129])
def test_check_reads_long_clips_to_the_end(tmp_path, check, frame):
    write_pictures(tmp_path / "clips/long", np.zeros((130, 8, 8, 3), np.uint8))
    make_empty(tmp_path / f"clips/long/frame_{frame}.png")
    status, said, _ = check(ClipData("frames", str(tmp_path / "clips"), image_size=8))
    assert (status, f"long/frame_{frame}.png: " in said) == (1, True)


@pytest.mark.parametrize("damage", BREAK, ids=lambda function: function.__name__)
def test_quick_check_finds_broken_videos(config, copied, check, damage):
    root = copied("classes")
    damage(root / "apple/v0.mp4")
    status, said, _ = check(config("classes", path=root), "--quick")
    assert status == 1
    assert re.search(rf"broken: 1\n  {root}/apple/v0\.mp4: \S", said)


def test_check_of_images(image_folder, check):
    status, said, _ = check(f"data: {{path: {image_folder}, kind: image_folder, image_size: 8}}")
    assert said.startswith(f"{image_folder}: 22 images in 3 classes\nbroken: 2\n  {image_folder}/class0/03.png: ")
    assert f"\n  {image_folder}/class1/04.png: cannot identify" in said
    assert status == 1
    for name in ("class0/03.png", "class1/04.png"):
        (image_folder / name).unlink()
    said = f"{image_folder}: 22 images in 3 classes\n"
    assert check(f"data: {{path: {image_folder}}}")[:2] == (0, said)  # image_folder is what images are by default


def test_check_of_fashion_mnist(tmp_path, check):
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 5, 28, 28) + bytes(5 * 28 * 28))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 5) + bytes(range(5)))
    status, said, _ = check(f"data: {{kind: fashion_mnist, path: {tmp_path}, image_size: 32}}")
    assert (status, said) == (0, f"{tmp_path}: 5 images in 10 classes\n")


def test_check_of_latents(layouts, image_folder, tmp_path, encode_clips, check):
    """Keys that only clips have do not disturb, and the command line may choose another kind."""
    clips, pictures = tmp_path / "clips", tmp_path / "pictures"
    encode_clips("videos", layouts / "classes", clips)
    encode_clips("image_folder", image_folder, pictures)
    text = f"data: {{kind: latents, path: {clips}, num_frames: 4, image_size: 8}}"
    status, said, _ = check(text)
    made = r"8 pixels a side, by the autoencoder [0-9a-f]{16}; kind sample, float\d\d"
    assert re.match(rf"{re.escape(str(clips))}: latents of 74 frames of 4 clips, {made}\n", said)
    assert status == 0
    status, said, _ = check(f"data: {{kind: latents, path: {pictures}}}")
    assert re.match(rf"{re.escape(str(pictures))}: latents of 22 images, {made}\n", said)
    assert status == 0
    assert "4 readable video files" in check(text, "kind=videos", f"path={layouts / 'classes'}")[1]


@pytest.mark.parametrize(
    ("key", "override"),
    [("num_frames: 4", "image_size=8"), ("flip: true", "num_frames=4"), ("flip: true", "kind=videos")],
)
def test_check_takes_videos_for_the_kind_of_clips(layouts, check, key, override):
    """A config that does not say its kind may have keys that only clips have."""
    status, said, _ = check(f"data: {{path: {layouts / 'classes'}, {key}}}", override)
    assert (status, "4 readable video files" in said) == (0, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("out: here\n", r"config\.yaml has no section 'data'"),
        ("data:\n", r"config\.yaml has no section 'data'"),
        ("data: videos\n", r"config\.yaml has no section 'data'"),
        ("data:\n  kind: videos\n  num_frame: 4\n", r"config\.yaml, line 3: unknown key 'num_frame'; did you mean"),
        ("data:\n  kind: image_folder\n  num_frames: 4\n", r"config\.yaml, line 3: unknown key 'num_frames'"),
        ("data:\n  kind: frames\n  images: few\n", r"config\.yaml, line 3: images is 'few'; it should be int"),
        (
            "data: {kind: films}\n",
            "data.kind is 'films'; it is image_folder, .*, pictures, picture_shards or latents",
        ),
        ("data: {kind: videos, path: nowhere}\n", "no folder of clips nowhere"),
        ("data: {kind: image_folder, path: nowhere}\n", "no image folder nowhere"),
        ("data: {kind: latents, path: nowhere}\n", "no latents in nowhere"),
        ("data: {kind: videos\n", r"config\.yaml, line 2: not valid YAML"),
    ],
)
def test_check_of_a_config_with_a_mistake(check, text, said):
    status, _, error = check(text)
    assert status == 2
    assert re.search("^error: .*" + said, error, flags=re.M)
