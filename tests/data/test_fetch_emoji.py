"""From tarballs like those of npm to folders of videos and pictures. Nothing is fetched."""

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageDraw

SCRIPT = ROOT / "scripts/fetch_emoji.py"
spec = importlib.util.spec_from_file_location("fetch_emoji", SCRIPT)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

GROUPS = {"groups": {"0": "smileys-emotion", "3": "nature"}, "subgroups": {"12": "cat-face", "35": "bird"}}
EMOJI = [
    {"hexcode": "1F63A", "label": "grinning cat", "tags": ["cat"], "group": 0, "subgroup": 12},
    {"hexcode": "1F54A", "label": "dove “of peace”", "tags": ["bird", "fly"], "group": 3, "subgroup": 35},
    {"hexcode": "1F413", "label": "rooster", "tags": [], "group": 3, "subgroup": 35},
    {"hexcode": "1F414", "label": "chicken", "tags": [], "group": 3, "subgroup": 35},
    {"hexcode": "1F1E6", "label": "regional indicator A"},
]
RED = (220, 20, 30)


def webp(times: list[int], background: tuple = (0, 0, 0, 0)) -> bytes:
    """A red square that moves to the right, one frame for each duration in milliseconds."""
    frames = []
    for step in range(len(times)):
        frames.append(Image.new("RGBA", (64, 64), background))
        ImageDraw.Draw(frames[-1]).rectangle((step, 16, step + 31, 47), fill=(*RED, 255))
    file = io.BytesIO()
    animation = {"save_all": True, "append_images": frames[1:], "duration": times} if len(times) > 1 else {}
    frames[0].save(file, "webp", lossless=True, **animation)
    return file.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> None:
    """A tarball of npm's layout."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Path:
    """A folder with all the tarballs, tiny."""
    cache = tmp_path_factory.mktemp("npm")
    parts = [
        {"README.md": b"not an emoji", "assets/1f63a.webp": webp([42] * 16)},
        {"assets/1f54a-fe0f.webp": webp([40] * 16 + [160, 40], background=(0, 0, 255, 255))},
        {"assets/1f413.webp": webp([42] * 15), "assets/1f414.webp": webp([0])},  # too short, and a still
        {"assets/1f63a-1f3fb.webp": webp([42] * 16), "assets/1f1e6.webp": webp([42] * 16)},  # skin tone, no group
    ]
    for part, files in enumerate(parts, start=1):
        pack(cache / f"lobehub-fluent-emoji-anim-{part}-1.0.0.tgz", files)
    stills = {f"assets/{name}.webp": webp([0]) for name in ("1f63a", "1f54a-fe0f", "1f63a-1f3fb")}
    pack(cache / "lobehub-fluent-emoji-3d-1.1.0.tgz", stills)
    names = {"en/data.json": EMOJI, "en/compact.json": [], "meta/groups.json": GROUPS}
    pack(
        cache / "emojibase-data-17.0.0.tgz",
        {name: json.dumps(content).encode() for name, content in names.items()},
    )
    return cache


@pytest.fixture
def build(packed, tmp_path, monkeypatch):
    """Run the script into `out` without npm; returns that folder."""
    monkeypatch.setenv("PATH", "")

    def run(*args: str, out: str = "out", cache: Path = packed) -> Path:
        tool.main(["--out", str(tmp_path / out), "--cache", str(cache), *args])
        return tmp_path / out

    return run


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def captions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]


def read(path: Path) -> tuple[np.ndarray, dict]:
    """Frames (T, H, W, C) and what the file says of itself."""
    with imageio.get_reader(path) as reader:
        return np.stack([frame for frame in reader]), reader.get_meta_data()  # noqa: C416 (its length is infinite)


def test_layout_and_captions(build):
    folder = build()
    assert files(folder) == ["captions.jsonl", "source.json", "videos/bird/1f54a-fe0f.mp4", "videos/cat-face/1f63a.mp4"]
    dove, cat = captions(folder)
    assert dove == {
        "video": "videos/bird/1f54a-fe0f.mp4",
        "caption": "dove “of peace”",
        "tags": ["bird", "fly"],
        "label": "bird",
        "group": "nature",
        "frames": 18,
        "fps": 21,  # 18 frames in 0.84 s
    }
    assert (cat["label"], cat["frames"], cat["fps"]) == ("cat-face", 16, 24)
    assert "“" in (folder / "captions.jsonl").read_text(encoding="utf-8")  # for the human reader


def test_videos_hold_the_frames_on_white(build):
    folder = build()
    for line in captions(folder):
        frames, meta = read(folder / line["video"])
        assert frames.shape == (line["frames"], 64, 64, 3)
        assert (meta["fps"], meta["codec"]) == (line["fps"], "h264")
        corner = (0, 0, 255) if "1f54a" in line["video"] else (255, 255, 255)
        for step, frame in enumerate(frames.astype(int)):
            assert abs(frame[4, 4] - corner).max() < 12
            assert abs(frame[32, 16 + step] - RED).max() < 12


@pytest.mark.parametrize("kind", ["anim", "3d"])
def test_the_same_run_gives_the_same_bytes(build, kind):
    one, two = build("--kind", kind, out="one"), build("--kind", kind, out="two")
    assert files(one) == files(two)
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files(one))


@pytest.mark.parametrize("kind", [["--kind", "3d"], ["--still"]])
def test_stills(build, kind):
    folder = build(*kind, "--size", "20")
    assert files(folder / "images") == ["bird/1f54a-fe0f.png", "cat-face/1f63a.png"]
    assert captions(folder)[1] == {
        "image": "images/cat-face/1f63a.png",
        "caption": "grinning cat",
        "tags": ["cat"],
        "label": "cat-face",
        "group": "smileys-emotion",
    }
    with Image.open(folder / "images/cat-face/1f63a.png") as image:
        assert (image.size, image.mode, image.getpixel((18, 10))) == ((20, 20), "RGB", (255, 255, 255))
        assert image.getpixel((4, 10)) == RED


def test_an_interrupted_run_continues(build, tmp_path, monkeypatch):
    save, saved = tool.save_video, []

    def interrupted(webp, size, fps, path):
        save(webp, size, fps, path)
        saved.append(path.name)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tool, "save_video", interrupted)
    with pytest.raises(SystemExit, match="130"):
        build()
    assert files(tmp_path / "out") == ["source.json", "videos/cat-face/1f63a.mp4"]
    folder = build()
    assert saved == ["1f63a.mp4", "1f54a-fe0f.mp4", "1f54a-fe0f.mp4"]
    assert len(captions(folder)) == 2
    build()
    assert len(saved) == 3


def test_an_interrupted_run_of_stills_continues(build, tmp_path, monkeypatch):
    replace, made = tool.os.replace, []

    def interrupted(partial, target):
        replace(partial, target)
        made.append(target.name)
        if len(made) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(tool.os, "replace", interrupted)
    with pytest.raises(SystemExit, match="130"):
        build("--kind", "3d")
    assert files(tmp_path / "out") == ["images/cat-face/1f63a.png", "source.json"]
    folder = build("--kind", "3d")
    assert made == ["1f63a.png", "1f54a-fe0f.png", "captions.jsonl"]
    assert len(captions(folder)) == 2


def test_only_adds_to_what_is_there(build):
    folder = build("--only", "bird")
    assert [line["label"] for line in captions(folder)] == ["bird"]
    build("--only", "cat-face")
    assert [line["label"] for line in captions(folder)] == ["bird", "cat-face"]


def test_without_npm_the_missing_tarballs_are_named(build, tmp_path, packed, capsys):
    (tmp_path / "npm").mkdir()
    name = "lobehub-fluent-emoji-anim-2-1.0.0.tgz"
    for path in packed.iterdir():
        if path.name != name:
            (tmp_path / "npm" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SystemExit):
        build(cache=tmp_path / "npm")
    message = capsys.readouterr().err
    assert "Install Node.js" in message
    assert f"{tmp_path / 'npm' / name} of @lobehub/fluent-emoji-anim-2@1.0.0" in message
    assert "anim-1" not in message


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Put a shell script in npm's place; returns a function that takes its body."""
    if sys.platform == "win32":
        pytest.skip("the stand-in for npm is a shell script")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")

    def write(body: str) -> None:
        (tmp_path / "bin/npm").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin/npm").chmod(0o755)

    return write


def test_npm_is_asked_once_for_what_is_missing(npm, packed, tmp_path):
    npm(f'cp {packed}/emojibase-data-17.0.0.tgz "$4"\necho "$@" >> {tmp_path}/asked')
    for _ in range(2):
        assert tool.fetch([tool.NAMES], tmp_path / "npm") == [tmp_path / "npm/emojibase-data-17.0.0.tgz"]
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert asked.startswith("pack emojibase-data@17.0.0 --pack-destination")
    assert files(tmp_path / "npm") == ["emojibase-data-17.0.0.tgz"]


def test_what_npm_says_when_it_fails_is_passed_on(npm, tmp_path):
    npm("echo half > $4/emojibase-data-17.0.0.tgz; echo no such host >&2; exit 1")
    with pytest.raises(OSError, match=r"npm could not fetch emojibase-data@17.0.0:\nno such host"):
        tool.fetch([tool.NAMES], tmp_path / "npm")
    assert files(tmp_path / "npm") == []


@pytest.mark.parametrize("share", [0.5, 0.999])  # in the middle of a file, and behind the last one
def test_a_damaged_tarball_is_named(build, tmp_path, packed, capsys, share):
    (tmp_path / "npm").mkdir()
    for path in packed.iterdir():
        content = path.read_bytes()
        (tmp_path / "npm" / path.name).write_bytes(
            content[: int(share * len(content))] if "anim-1" in path.name else content
        )
    with pytest.raises(SystemExit):
        build(cache=tmp_path / "npm")
    assert "lobehub-fluent-emoji-anim-1-1.0.0.tgz is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "cats"], "no subgroup cats; known: bird, cat-face"),
        (["--size", "33"], "--size 33"),
        (["--size", "32"], "choose another folder"),
        (["--kind", "3d"], "choose another folder"),
        (["--kind", "2d"], "no --kind '2d'; known: anim, 3d"),
    ],
)
def test_bad_settings(build, capsys, args, message):
    build("--only", "bird")
    with pytest.raises(SystemExit):
        build(*args)
    assert message in capsys.readouterr().err
