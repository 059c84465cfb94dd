"""Captions of clips: that every clip, and every image beside it, goes with its own words, from each kind of file.

As in test_clips, a frame tells by its colours of which clip it is.
"""

import csv
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import skipdit_command
from test_clips import LENGTHS, cut_index_last, marks, paint, rng, write_pictures, write_video

from skipdit.data.clip_folder import ClipFolder
from skipdit.data.clips import ClipDataset
from skipdit.data.latents import ClipLatents, open_clips
from skipdit.data.settings import ClipData
from skipdit.data.stream import Stream, collate
from skipdit.encoders.autoencoder import load_vae
from skipdit.utils.errors import BrokenSample

check_main = skipdit_command("data")

NAMES = ("cat/0.mp4", "cat/1.mp4", "dog/2.mp4", "dog/3.mp4")
TEXTS = ("a cat, asleep", 'two lines:\n"one"', "ein Häßlicher 🐕", "dog")
ORDER = (2, 0, 3, 1)  # of the clips in a captions file: neither by name nor by length


@pytest.fixture(scope="session")
def films(tmp_path_factory) -> Path:
    """Clips 0 to 3 as video files, and as folders of frames `0.film` to `3.film`."""
    root = tmp_path_factory.mktemp("films")
    for clip, name in enumerate(NAMES):
        write_video(root / "videos" / name, paint(clip, range(LENGTHS[clip])))
        write_pictures(root / f"frames/{clip}.film", paint(clip, range(LENGTHS[clip])))
    return root


@pytest.fixture
def root(films, tmp_path) -> Path:
    """The videos, in a folder to write and break in."""
    return Path(shutil.copytree(films / "videos", tmp_path / "clips"))


def write_rows(path: Path, rows: list) -> str:
    """A JSONL file of pairs (video, caption), or of what stands in their place."""
    rows = [{"video": row[0], "caption": row[1]} if isinstance(row, tuple) else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def captions(tmp_path) -> str:
    """A JSONL file with the captions of all four clips, in ORDER."""
    return write_rows(tmp_path / "captions.jsonl", [(NAMES[clip], TEXTS[clip]) for clip in ORDER])


def clips_at(root: Path, captions: str | Path, /, **settings) -> ClipData:
    usual = {"kind": "videos", "captions": str(captions), "num_frames": 4, "image_size": 8}
    return ClipData(path=str(root), **usual | settings)


def assert_told(dataset: ClipDataset, sample: dict) -> list[int]:
    """Clip and images of a sample have their captions. Returns the clips that they are of, the clip's own first."""
    drawn = [clip for clip, _ in marks(sample["image"])[3:]]
    labels = [sample["label"], *sample.get("image_label", torch.tensor([])).tolist()]
    assert [dataset.captions[label] for label in labels] == [TEXTS[clip] for clip in drawn]
    return drawn


def write_jsonl(root: Path) -> Path:
    """With what else may be in such a file: other keys, an empty line, space around a caption."""
    lines = [json.dumps({"tags": [], "caption": f" {TEXTS[clip]}\n", "video": f"./{NAMES[clip]}"}) for clip in ORDER]
    (root / "captions.jsonl").write_text("\n\n".join(lines), encoding="utf-8-sig")
    return root / "captions.jsonl"


def write_csv(root: Path) -> Path:
    """As a spreadsheet writes it: a mark in front, quotes, another column, line ends of Windows."""
    with open(root / "captions.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("id", "caption", "video"), *((i, TEXTS[i], NAMES[i]) for i in ORDER)])
    return root / "captions.csv"


def write_txt(root: Path) -> str:
    for name, text in zip(NAMES, TEXTS, strict=True):
        (root / name).with_suffix(".txt").write_text(f"{text}\n", encoding="utf-8")
    return "txt"


@pytest.mark.parametrize(("write", "order"), [(write_jsonl, ORDER), (write_csv, ORDER), (write_txt, range(4))])
def test_every_clip_has_its_caption(root, write, order):
    config = clips_at(root, write(root))
    dataset = ClipFolder(config)
    assert dataset.names == [NAMES[clip] for clip in order]
    assert dataset.captions == [TEXTS[clip] for clip in order]
    assert [assert_told(dataset, dataset.draw(i, rng(i))) for i in range(4)] == [[clip] for clip in order]
    assert (dataset.labels, dataset.left_out, dataset.strays) == ([0, 1, 2, 3], [], {})
    assert dataset.num_classes == 0, "a model of classes would take captions for them"
    assert config.files().get("data.captions") == (None if config.captions == "txt" else config.captions)


def test_captions_beside_folders_of_frames(films, tmp_path):
    """`0.film` is a name, not a name and a suffix. A folder too short goes, and the captions stay right."""
    root = Path(shutil.copytree(films / "frames", tmp_path / "frames"))
    for clip in range(4):
        (root / f"{clip}.film.txt").write_text(TEXTS[clip])
    (root / "notes.txt").write_text("no caption")
    write_pictures(root / "2", paint(2, range(30)))
    dataset = ClipFolder(clips_at(root, "txt", kind="frames", frame_interval=5))
    assert dataset.names == ["0.film", "2.film", "3.film"]
    assert [assert_told(dataset, dataset.draw(i, rng(i))) for i in range(3)] == [[0], [2], [3]]
    assert dataset.left_out == [f"{root}/2.txt: no caption of 2", "1.film: 14 frames, too short for 4 at every 5"]
    assert dataset.strays == {".txt": 1}


@pytest.mark.parametrize("route", ["file", "txt"])
def test_classes_and_a_list_choose_clips(root, tmp_path, captions, route):
    """Complaints are about clips asked for."""
    if route == "txt":
        captions = write_txt(root)
        (root / "cat/1.txt").unlink()
    else:
        write_rows(Path(captions), [(NAMES[2], TEXTS[2]), (NAMES[0], TEXTS[0]), (NAMES[1], ""), (NAMES[3], TEXTS[3])])
    dog = ClipFolder(clips_at(root, captions, classes=["dog"]))
    assert (dog.names, dog.labels, dog.left_out) == ([NAMES[2], NAMES[3]], [0, 1], [])
    assert_told(dog, dog.draw(1, rng(0)))
    (tmp_path / "list").write_text(f"{NAMES[3]}\n{NAMES[0]}\n")
    some = ClipFolder(clips_at(root, captions, clip_list=str(tmp_path / "list")))
    assert some.names == ([NAMES[0], NAMES[3]] if route == "file" else [NAMES[3], NAMES[0]])
    assert some.left_out == []
    for index in range(2):
        assert_told(some, some.draw(index, rng(0)))
    both = clips_at(root, captions, clip_list=str(tmp_path / "list"), classes=["cat"])
    assert ClipFolder(both).captions == [TEXTS[0]]
    with pytest.raises(ValueError, match=r"has no captions of clips of bird \(data\.classes\)"):
        ClipFolder(clips_at(root, captions, classes=["bird", "dog"]))


def test_listed_clips_that_are_not_in_the_captions_are_named(root, tmp_path, captions):
    (tmp_path / "list").write_text(f"{NAMES[3]}\ncat/9.mp4\n")
    dataset = ClipFolder(clips_at(root, captions, clip_list=str(tmp_path / "list")))
    assert dataset.left_out == dataset.uncaptioned == [f"{tmp_path}/list: cat/9.mp4 is not in {captions}"]


def test_rows_without_a_caption_are_left_out_and_named(root, captions):
    rows = [
        {"video": NAMES[0]},
        (NAMES[0], None),
        (NAMES[0], ["a", "b"]),
        (NAMES[0], " \n"),
        (NAMES[3], TEXTS[3]),
        (NAMES[0], TEXTS[0]),
        ("./" + NAMES[3], "another"),
    ]
    dataset = ClipFolder(clips_at(root, write_rows(Path(captions), rows)))
    assert dataset.captions == [TEXTS[3], TEXTS[0]]
    assert [assert_told(dataset, dataset.draw(i, rng(i))) for i in range(2)] == [[3], [0]]
    assert dataset.left_out == [
        f"{captions}, line 1: no caption of cat/0.mp4",
        f"{captions}, line 2: no caption of cat/0.mp4",
        f"{captions}, line 3: the caption of cat/0.mp4 is no text but of type list",
        f"{captions}, line 4: the caption of cat/0.mp4 is empty",
        f"{captions}, line 7: dog/3.mp4 has a caption already: {captions}, line 5",
    ]


def test_cells_that_are_missing_in_a_csv(root, tmp_path):
    """The line is that on which a row begins."""
    (tmp_path / "c.csv").write_text(f'video,caption\n\n{NAMES[0]},"two\nlines"\n{NAMES[1]}\n{NAMES[2]},\n')
    dataset = ClipFolder(clips_at(root, tmp_path / "c.csv"))
    assert dataset.captions == ["two\nlines"]
    assert dataset.left_out == [
        f"{tmp_path}/c.csv, line 5: no caption of cat/1.mp4",
        f"{tmp_path}/c.csv, line 6: the caption of dog/2.mp4 is empty",
    ]


def test_text_files_that_cannot_be_used(root):
    write_txt(root)
    (root / "cat/0.txt").unlink()
    (root / "cat/1.txt").write_text(" \n")
    (root / "dog/2.txt").write_bytes("häßlich".encode("latin-1"))
    dataset = ClipFolder(clips_at(root, "txt"))
    assert (dataset.names, dataset.captions, dataset.labels) == ([NAMES[3]], [TEXTS[3]], [0])
    assert dataset.left_out == [
        f"{root}/cat/0.txt: no caption of cat/0.mp4",
        f"{root}/cat/1.txt: the caption of cat/1.mp4 is empty",
        f"{root}/dog/2.txt: the caption of dog/2.mp4 is no text but of type bytes",
    ]


GOOD = b'{"video": "cat/0.mp4", "caption": "a"}\n'


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "c.jsonl",
            GOOD + b'\n{"video": "cat/1.mp4", "capt\n',
            r'line 3, column 24: wanted is a JSON object a line, \{"video": .*: Unterminated string',
        ),
        ("c.jsonl", GOOD + b'["cat/1.mp4", "b"]\n', "line 2: wanted is a JSON object a line"),
        ("c.jsonl", GOOD + b'{"video": "\xff", "caption": "b"}\n', "line 2: wanted is .*'utf-8' codec"),
        ("c.jsonl", GOOD + b'{"image": "cat/1.png", "caption": "b"}\n', "line 2: no video; every row has a video and"),
        ("c.jsonl", b"", r"c\.jsonl has no captions of any clips$"),
        ("c.jsonl", b'{"video": "a.mp4"}', r"c\.jsonl has no captions of any clips, for example \S*, line 1: no capt"),
        ("c.csv", b"video;caption\na.mp4;a\n", "line 1: columns video;caption; the first line has to name video and"),
        ("c.CSV", b"path,caption\na.mp4,a\n", "line 1: columns path, caption; the first line has to name video and"),
        ("c.csv", b"video,caption\na.mp4,a\n\nb.mp4,cat, asleep\n", "line 4: 3 cells for 2 columns; quote a caption"),
        ("c.csv", b'video,caption\na.mp4,"a\nb.mp4,b\n', "line 2: unexpected end of data"),
        ("c.csv", b"video,caption\na.mp4,a\nb.mp4,\xff\n", "line 3: 'utf-8' codec"),
        ("c.csv", b"caption,video\na,a.mp4\nb\n", "line 3: no video"),
        ("c.csv", b"", "line 1: it is empty; the first line has to name the columns video and caption"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(root, tmp_path, name, text, said):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=said) as raised:
        ClipFolder(clips_at(root, tmp_path / name))
    assert str(raised.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"labelled": True}, ValueError, "data.captions and data.labelled: .* leave one out"),
        ({"image_list": "list"}, ValueError, "data.captions and data.image_list: .* have no captions, leave one out"),
        ({"images_from": "own"}, ValueError, "data.images_from is 'own'; it is 'other' or 'same'"),
        ({"images_from": "same", "image_list": "list", "captions": None}, ValueError, "leave out data.image_list"),
        ({"captions": "nowhere.csv"}, FileNotFoundError, "no captions nowhere.csv: No such file"),
        ({"captions": "txt"}, ValueError, "has no captions of any clips, for example .*txt: no caption of cat/0.mp4"),
    ],
)
def test_settings_that_are_refused(films, captions, settings, error, said):
    with pytest.raises(error, match=said):
        ClipFolder(clips_at(films / "videos", captions, **settings))


@pytest.mark.parametrize("images_from", ["other", "same"])
def test_images_have_the_captions_of_their_clips(films, captions, images_from):
    dataset = ClipFolder(clips_at(films / "videos", captions, images=6, images_from=images_from))
    for index, clip in enumerate(ORDER):
        samples = [dataset.draw(index, rng(seed)) for seed in range(4)]
        own, images = zip(*((drawn[0], drawn[1:]) for drawn in (assert_told(dataset, s) for s in samples)), strict=True)
        assert set(own) == {clip}
        assert {image for some in images for image in some} == (
            {clip} if images_from == "same" else {0, 1, 2, 3} - {clip}
        )
        assert len({mark for sample in samples for mark in marks(sample["image"][4:])}) > 6


def test_images_of_the_same_clip_need_no_other_one(films, tmp_path):
    """Also without captions; and a frame that is broken is replaced by one of the same clip."""
    write_pictures(tmp_path / "frames/clip", paint(1, range(11)))
    (tmp_path / "frames/clip/frame_10.png").write_text("broken")
    config = ClipData("frames", str(tmp_path / "frames"), num_frames=4, image_size=8, images=30, images_from="same")
    dataset = ClipFolder(config)
    sample = next(s for s in (Stream(dataset, seed)[0] for seed in range(9)) if s["weight"])
    assert set(marks(sample["image"][4:])) == {(1, frame) for frame in range(10)}
    assert "frame_10.png: cannot identify" in sample["broken"]
    assert sample.keys() == {"image", "broken", "index", "weight"}


def test_a_batch_to_train_on(films, tmp_path):
    """A listed video that does not exist keeps its row, with weight 0."""
    rows = [(NAMES[clip], TEXTS[clip]) for clip in ORDER]
    listed = write_rows(tmp_path / "captions.jsonl", [*rows[:2], ("cat/gone.mp4", "gone"), *rows[2:]])
    dataset = ClipFolder(clips_at(films / "videos", listed, images=2))
    with pytest.raises(BrokenSample, match=r"cat/gone\.mp4: \S"):
        dataset.draw(2, rng(0))
    stream = Stream(dataset, 0)
    batch = collate([stream[position] for position in range(5)])
    assert batch["label"].dtype == batch["image_label"].dtype == torch.int64
    assert batch["image_label"].shape == (5, 2)
    assert dict(zip(batch["index"].tolist(), batch["weight"].tolist(), strict=True)) == {0: 1, 1: 1, 2: 0, 3: 1, 4: 1}
    for row in batch["weight"].nonzero().flatten().tolist():
        sample = {key: batch[key][row] for key in ("image", "label", "image_label")}
        assert sample["label"] == batch["index"][row]
        assert_told(dataset, sample)


# ---------------------------------------------------------------------------------------------------------------------
# Latents


@pytest.fixture
def encode_clips(monkeypatch, vae_folder, tmp_path, capsys):
    """`encode_clips(kind, path, *arguments)` runs the program into tmp_path/latents and returns what it prints."""

    def run(kind: str, path: Path, *arguments: str) -> str:
        command = f"encode --data {kind} --path {path} --out {tmp_path}/latents --vae {vae_folder} --image-size 8"
        monkeypatch.setattr(sys, "argv", [*command.split(), "--workers", "0", *arguments])
        capsys.readouterr()
        skipdit_command("encode")()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("images_from", ["other", "same"])
def test_latents_keep_captions(root, tmp_path, captions, vae_folder, encode_clips, images_from):
    """Of two shards, with a corrupt video between; then one clip that is too short to train on."""
    cut_index_last(root / NAMES[ORDER[1]])
    said = encode_clips("videos", root, "--captions", captions, "--shard", "2")
    assert "3 of 4 clips, latents in" in said
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 2
    config = ClipData("latents", str(tmp_path / "latents"), num_frames=4, frame_interval=5, image_size=8)
    config = replace(config, images=6, images_from=images_from)
    latents = open_clips(config, load_vae(str(vae_folder)))
    assert latents.captions == [TEXTS[clip] for clip in ORDER]
    assert latents.labels == [0, 2], "clip 1 has 14 frames"
    wholes = [latents[i]["mean"] for i in range(2)]
    for index in range(2):
        assert latents.captions[latents[index]["label"]] == TEXTS[LENGTHS.index(len(wholes[index]))]
        sample, other = latents.draw(index, rng(index)), index if images_from == "same" else 1 - index
        assert sample["label"] == latents.labels[index]
        assert sample["image_label"].tolist() == [latents.labels[other]] * 6
        for image in sample["mean"][4:]:
            assert (wholes[other] == image).flatten(1).all(1).any()


def test_a_shard_without_a_readable_clip_keeps_its_captions(root, tmp_path, captions, encode_clips):
    (root / NAMES[ORDER[0]]).write_text("no video")
    encode_clips("videos", root, "--captions", captions, "--shard", "1")
    latents = ClipLatents(tmp_path / "latents", 4, 3)
    assert latents.captions == [TEXTS[clip] for clip in ORDER]
    assert latents.labels == [1, 2, 3]


def test_captions_of_clips_that_were_not_there_to_encode(films, tmp_path, encode_clips):
    """Rows without caption and folders without frames are no part of the latents' numbers, and are named."""
    rows = [("0.film", TEXTS[0]), ("gone", "gone"), ("1.film", ""), ("2.film", TEXTS[2]), ("3.film", TEXTS[3])]
    listed = write_rows(tmp_path / "captions.jsonl", rows)
    said = encode_clips("frames", films / "frames", "--captions", listed, "--shard", "2")
    assert "3 of 3 clips, latents in" in said
    assert f"2 more had no caption or no frames, listed in {tmp_path}/latents/broken_files.txt" in said
    named = (tmp_path / "latents/broken_files.txt").read_text().splitlines()
    assert named[0] == f"{listed}, line 3: the caption of 1.film is empty"
    assert named[1].startswith("gone: 0 frames")
    latents = ClipLatents(tmp_path / "latents", 4, 3)
    assert (latents.captions, latents.labels) == ([TEXTS[0], TEXTS[2], TEXTS[3]], [0, 1, 2])
    assert [len(latents[i]["mean"]) for i in range(3)] == [LENGTHS[clip] for clip in (0, 2, 3)]


def test_latents_without_captions(films, tmp_path, encode_clips):
    encode_clips("videos", films / "videos", "--labelled")
    latents = ClipLatents(tmp_path / "latents", 4, 3)
    assert (latents.captions, latents.labels, latents.num_classes) == (None, [0, 0, 1, 1], 2)
    with pytest.raises(ValueError, match=r"data\.images_from is 'own'"):
        ClipLatents(tmp_path / "latents", 4, 3, images_from="own")


def test_encoding_goes_on_only_with_the_same_captions(films, tmp_path, captions, encode_clips, capsys):
    """A row more is another dataset anyway; other words, or another order, of the same number of rows are, too."""
    encode_clips("videos", films / "videos", "--captions", captions, "--shard", "2")
    (tmp_path / "latents/latents-00001.safetensors").unlink()
    encode_clips("videos", films / "videos", "--captions", captions, "--shard", "2")
    rows = [(NAMES[clip], TEXTS[clip]) for clip in ORDER]
    for other in (rows[::-1], [*rows[:3], (rows[3][0], "other words")], None):
        arguments = ["--captions", write_rows(Path(captions), other)] if other else []
        with pytest.raises(SystemExit):
            encode_clips("videos", films / "videos", *arguments, "--shard", "2")
        assert "holds other latents" in capsys.readouterr().err


def test_captions_are_given_where_they_count(films, captions, vae_folder, encode_clips, capsys):
    with pytest.raises(SystemExit):
        encode_clips("image_folder", films / "frames", "--captions", captions)
    assert "--captions are of clips, and --data image_folder is of images" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"images are their frames: unset data\.captions$"):
        open_clips(clips_at(films, captions, kind="latents"), load_vae(str(vae_folder)))


# ---------------------------------------------------------------------------------------------------------------------
# python -m skipdit data check


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """`check(config)` runs it on a config: (status, output)."""

    def run(config: ClipData) -> tuple[int, str]:
        given = {name: value for name, value in vars(config).items() if value not in (None, [])}
        (tmp_path / "config.yaml").write_text(json.dumps({"data": given}))
        monkeypatch.setattr(sys, "argv", ["check", "check", str(tmp_path / "config.yaml"), "--workers", "0"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            check_main()
        return end.value.code, capsys.readouterr().out

    return run


DESCRIBED = "4 captions: median 3 words, largest 3, for example 'ein Häßlicher 🐕'\n"


def test_check_describes_captions(films, captions, check):
    status, said = check(clips_at(films / "videos", captions))
    assert said.endswith(" 74 frames\nframes per clip: 14 to 22, median 19\n" + DESCRIBED)
    assert status == 0


def test_check_describes_captions_of_latents(films, tmp_path, captions, encode_clips, check):
    encode_clips("videos", films / "videos", "--captions", captions)
    status, said = check(ClipData(kind="latents", path=str(tmp_path / "latents"), image_size=8))
    assert re.fullmatch(r".*: latents of 74 frames of 4 clips, 8 pixels a side, .*\n" + re.escape(DESCRIBED), said)
    assert status == 0


@pytest.mark.parametrize("kind", ["videos", "frames"])
def test_check_names_what_lacks_a_caption(films, captions, check, kind):
    """By itself: it is not too short, and yet the check fails."""
    names = NAMES if kind == "videos" else [f"{clip}.film" for clip in range(4)]
    write_rows(Path(captions), [*((name, "some words") for name in names[:3]), (names[3], "")])
    status, said = check(clips_at(films / kind, captions, kind=kind, frame_interval=5))
    missing = f"without caption, or with a second one: 1\n  {captions}, line 4: the caption of {names[3]} is empty\n"
    short = "too short for 4 frames at every 5: 1\n  "
    assert f"\n{missing}{short}{names[1]}: 14 frames" in said
    assert "broken" not in said
    assert status == 1
