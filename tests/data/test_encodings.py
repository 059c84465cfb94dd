"""Names and texts as they come: in files of any editor, and of files from old archives, whose names are no UTF-8; on
terminals and systems that have an encoding of their own.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, skipdit_command
from PIL import Image

from skipdit.class_to_image.train import Config
from skipdit.config import ConfigError, changed, to_yaml
from skipdit.data.clip_folder import ClipFolder
from skipdit.data.files import read_list
from skipdit.data.images import ImageFolder
from skipdit.data.pictures import PictureFolder
from skipdit.data.settings import ClipData, PictureData
from skipdit.data.stream import Stream
from skipdit.data.video import Video
from skipdit.metrics.samples import open_samples
from skipdit.training.runlog import BrokenFiles
from skipdit.utils.video import write_mp4

check_main = skipdit_command("data")

SOURCES = [p for where in ("src", "scripts", "benchmarks", "*-to-*") for p in sorted(ROOT.glob(f"{where}/**/*.py"))]
CAFE = os.fsdecode(b"caf\xe9")  # as an old archive has it


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_text_files_are_opened_in_an_encoding_that_is_said(path):
    """Without one, Windows takes the country's."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in METHODS:
            said = {keyword.arg for keyword in node.keywords}
            assert "encoding" in said or is_safe(node), f"{path}, line {node.lineno}"


METHODS = {"read_text", "write_text", "open"}


def is_safe(call: ast.Call) -> bool:
    """Whether a call is of bytes, of another function of that name, or says its encoding by place."""
    if isinstance(call.func, ast.Name):  # open(file, mode), or the project's read_text
        modes = [argument.value for argument in call.args[1:2] if isinstance(argument, ast.Constant)]
        return call.func.id != "open" or any("b" in mode for mode in modes) or "devnull" in ast.unparse(call)
    if call.func.attr == "open":
        modes = [argument.value for argument in call.args[:1] if isinstance(argument, ast.Constant)]
        return not modes or "b" in modes[0] or not set(modes[0]) <= set("rwax+t")
    return len(call.args) > (call.func.attr == "write_text")


@pytest.fixture
def old_names(tmp_path) -> Path:
    """A folder with a picture and a clip of odd names, and ones that are broken. Skips the test where no file can have
    such a name."""
    try:
        (tmp_path / CAFE).mkdir()
    except OSError:
        pytest.skip("names are UTF-8 here")
    (tmp_path / CAFE).rmdir()
    root = tmp_path / "files"
    for kind in ("images", "videos", "frames"):
        (root / kind / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(root / f"images/a/{CAFE}.png")
    (root / f"images/a/{CAFE}.txt").write_text("a cup")
    (root / f"images/a/{CAFE}-broken.png").write_text("no picture")
    (root / f"images/a/{CAFE}-broken.txt").write_text("another")
    write_mp4(root / "videos/a/plain.mp4", torch.zeros(4, 3, 16, 16, dtype=torch.uint8), 8)
    (root / "videos/a/plain.mp4").rename(root / f"videos/a/{CAFE}.mp4")
    (root / f"videos/a/{CAFE}-broken.mp4").write_text("no video")
    for name in (CAFE, f"{CAFE}-broken"):
        (root / f"frames/a/{name}").mkdir()
        for number in range(4):
            Image.new("RGB", (8, 8), "red").save(root / f"frames/a/{name}/{number}.png")
    (root / f"frames/a/{CAFE}-broken/0.png").write_text("no picture")
    return root


DATA = {
    "image_folder": ("images", ""),
    "pictures": ("images", "captions: txt, "),
    "videos": ("videos", "num_frames: 4, frame_interval: 1, "),
    "frames": ("frames", "num_frames: 4, frame_interval: 1, "),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "terminal"),
    [("image_folder", "utf-8"), ("pictures", "cp1252"), ("videos", "ascii"), ("frames", "utf-8")],
)
def test_check_names_files_whose_names_are_no_utf_8(old_names, tmp_path, kind, terminal):
    folder, settings = DATA[kind]
    place = f"kind: {kind}, path: {old_names / folder}"
    (tmp_path / "config.yaml").write_text(f"data: {{{place}, {settings}image_size: 8}}")
    command = [sys.executable, "-m", "skipdit", "data", "check", str(tmp_path / "config.yaml"), "--workers", "0"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": f"{terminal}:strict"}, capture_output=True)
    assert done.returncode == 1, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert rb"caf\udce9-broken" in done.stdout
    assert b"broken: 1\n" in done.stdout.replace(b"\r", b"")


@pytest.mark.parametrize("kind", ["videos", "frames", "pictures"])
def test_a_list_of_good_files_holds_such_names(old_names, tmp_path, kind, monkeypatch, capsys):
    folder, settings = DATA[kind]
    file, good = tmp_path / "config.yaml", tmp_path / "good.txt"
    file.write_text(f"data: {{kind: {kind}, path: {old_names / folder}, {settings}image_size: 8}}")
    monkeypatch.setattr(sys, "argv", ["check", "check", str(file), "--workers", "0", "--good", str(good)])
    with pytest.raises(SystemExit):
        check_main()
    suffix = {"videos": ".mp4", "frames": "", "pictures": ".png"}[kind]
    assert good.read_bytes() == b"a/caf\xe9" + suffix.encode() + b"\n"
    path = str(old_names / folder)
    if kind == "pictures":
        dataset = PictureFolder(PictureData(path=path, captions="txt", picture_list=str(good), image_size=8))
    else:
        dataset = ClipFolder(ClipData(kind, path, clip_list=str(good), num_frames=4, frame_interval=1, image_size=8))
    assert len(dataset) == 1
    assert dataset[0]["image"].shape[-1] == 8


def test_training_and_encoding_go_on_past_such_names(old_names, tmp_path, vae_folder, monkeypatch):
    stream = Stream(ImageFolder(old_names / "images", 8), 0)
    messages = [message for position in range(2) if (message := stream[position]["broken"])]
    broken = BrokenFiles(tmp_path / "broken_files.txt")
    broken.add(messages)
    broken.summarise()
    listed = (tmp_path / "broken_files.txt").read_text("utf-8")
    assert listed.startswith(rf"{old_names}/images/a/caf\udce9-broken.png: ")
    out = tmp_path / "latents"
    command = f"encode --data image_folder --path {old_names}/images --out {out} --vae {vae_folder} --image-size 8"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--workers", "0"])
    skipdit_command("encode")()
    assert r"caf\udce9-broken.png" in (out / "broken_files.txt").read_text("utf-8")


def test_a_config_names_the_path_that_it_cannot_hold():
    config = Config()
    config = changed(config, {"data.path": f"data/{CAFE}"})
    with pytest.raises(ConfigError, match=r"'data/caf\\udce9' is no UTF-8, .* rename that"):
        to_yaml(config)


def test_evaluation_of_such_names(old_names):
    for kind in ("images", "videos"):
        for path in (old_names / kind / "a").glob("*broken*"):
            path.unlink()
        samples = open_samples(old_names / kind)
        assert samples[0].shape[1] == 3
        assert json.loads(json.dumps(samples.protocol()))["num_samples"] == 1


def test_videos_of_such_names(old_names):
    assert len(Video(old_names / f"videos/a/{CAFE}.mp4").read(range(4))) == 4


def test_a_tilde_on_the_command_line_is_the_home_folder(image_folder, tmp_path, vae_folder, monkeypatch):
    """Shells do not see to it where it follows a "=", nor where no shell is."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    place = image_folder.relative_to(tmp_path)
    command = f"encode --data image_folder --path=~/{place} --out=~/latents --vae {vae_folder} --image-size 8"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--workers", "0"])
    skipdit_command("encode")()
    assert list((tmp_path / "latents").glob("*.safetensors"))
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_of_any_editor(tmp_path, encoding, end):
    """Notepad begins with a byte order mark, PowerShell writes UTF-16. Only ends of lines end a name."""
    names = ["première/猫.mp4", "b\u2028c\x85d.png", "e f"]
    text = ("\ufeff" * (encoding == "utf-16-be") + end.join(["", *names, " ", ""])).encode(encoding)
    (tmp_path / "list.txt").write_bytes(text)
    assert read_list(str(tmp_path / "list.txt")) == names


def test_a_list_of_an_old_system_names_its_files(tmp_path):
    """Bytes that are no UTF-8 stay, as in names of files."""
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.png\n")
    assert [os.fsencode(name) for name in read_list(str(tmp_path / "list.txt"))] == [b"caf\xe9.png"]


@pytest.mark.parametrize("kind", ["videos", "frames", "pictures"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_captions_of_any_editor(tmp_path, kind, suffix, encoding):
    name, text = "première", "ein Kätzchen, 猫\u2028b"
    key = "image" if kind == "pictures" else "video"
    if kind == "videos":
        name = f"{name}.mp4"
        write_mp4(tmp_path / name, torch.zeros(4, 3, 16, 16, dtype=torch.uint8), 8)
    elif kind == "frames":
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name / "0.png")
    else:
        name = f"{name}.png"
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    row = json.dumps({key: name, "caption": text}, ensure_ascii=False)
    rows = row if suffix == "jsonl" else f'{key},caption\r\n{name},"{text}"'
    file = tmp_path / f"captions.{suffix}"
    file.write_bytes(f"{rows}\r\n".encode(encoding))
    if kind == "pictures":
        dataset = PictureFolder(PictureData(path=str(tmp_path), captions=str(file), image_size=8))
    else:
        dataset = ClipFolder(ClipData(kind, str(tmp_path), captions=str(file), num_frames=1, image_size=8))
    assert (dataset.names, dataset.captions) == ([name], [text])
