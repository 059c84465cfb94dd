"""`skipdit train new`: what lies in a folder, what is decided, and configs that train and sample."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from skipdit.__main__ import main
from skipdit.config import load_config
from skipdit.data.folder import look_into
from skipdit.tasks import TASKS
from skipdit.training.new import Machine, Plan, choose
from skipdit.utils.video import write_mp4

LAPTOP, CARD, LARGE = Machine(0), Machine(24), Machine(80)
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def picture(file: Path, height: int = 40, width: int = 70) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def clip(file: Path, frames: int = 20) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(file, torch.zeros(frames, 3, 64, 80, dtype=torch.uint8), fps=8)


@pytest.fixture
def folder(tmp_path, request) -> Path:
    """A folder of one of the kinds below."""
    kind, data = request.param, tmp_path / "own"
    suffix, write = ("png", picture) if "pictures" in kind else ("mp4", clip)
    for number in range(4):
        place = f"kind{number % 2}/" if "classes" in kind else ""
        write(data / f"{place}{number}.{suffix}")
        if "texts" in kind:
            (data / f"{number}.txt").write_text(f"the number {number}")
    if "table" in kind:
        key = "image" if suffix == "png" else "video"
        rows = [json.dumps({key: f"{n}.{suffix}", "caption": f"the number {n}"}) for n in range(4)]
        (data / "captions.jsonl").write_text("\n".join(rows))
    return data


KINDS = {
    "flat pictures": ("class-to-image", "image_folder", ""),
    "classes of pictures": ("class-to-image", "image_folder", ""),
    "pictures, texts": ("text-to-image", "pictures", " --captions txt"),
    "flat clips": ("class-to-video", "videos", ""),
    "classes of clips": ("class-to-video", "videos", " --labelled"),
    "clips, table": ("text-to-video", "videos", "captions.jsonl"),
}


@pytest.mark.slow
@pytest.mark.parametrize("machine", [LAPTOP, LARGE], ids=str)
@pytest.mark.parametrize(("folder", "task", "kind", "more"), [(k, *v) for k, v in KINDS.items()], indirect=["folder"])
def test_configs_of_every_kind_of_folder(folder, task, kind, more, machine, tmp_path):
    found = look_into(folder)
    choice = choose(found, machine, vae="class-to-video/weights/vae")
    plan = Plan(found, choice, machine, "own", tmp_path / "configs", MINILM)
    plan.write()
    commands = plan.commands()
    assert commands[0].startswith(f"skipdit encode --data {kind} --path {folder}") and more in commands[0]
    assert len(commands) == 5 + {"text-to-video": 1, "text-to-image": 2}.get(task, 0)
    settings = TASKS[task].part("settings")
    stages = {
        name: load_config(settings.TrainingConfig, plan.out / f"{name}.yaml") for name in ("plain", "stage1", "stage2")
    }
    assert [config.model.skip for config in stages.values()] == [False, True, True]
    assert [config.train.freeze for config in stages.values()] == [False, True, False]
    assert [config.init for config in stages.values()] == [None, "results/own-plain", "results/own-stage1"]
    sampling = load_config(settings.SampleConfig, plan.out / "sample.yaml")
    assert sampling.weights == stages["stage2"].out
    text = (plan.out / "plain.yaml").read_text()
    assert f"# Of `skipdit train new --data {folder}`. " in text  # whose name the runs have
    plan._replace(name="other", out=tmp_path / "other").write()
    assert f"--data {folder} --name other`" in (tmp_path / "other/plain.yaml").read_text()
    assert yaml.safe_load(text)["task"] == task and all(f"#   {command}\n" in text for command in commands)
    with pytest.raises(FileExistsError, match=r"plain.yaml, .* exist and are kept; say another --out"):
        plan.write()


@pytest.mark.parametrize("folder", ["classes of pictures"], indirect=True)
@pytest.mark.parametrize(
    ("machine", "side", "size", "width"),
    [(LAPTOP, 40, 32, 128), (LAPTOP, 300, 64, 128), (CARD, 600, 256, 384), (LARGE, 600, 512, 384)],
)
def test_sizes_fit_files_and_machine(folder, machine, side, size, width):
    found = look_into(folder)
    assert (found.classes, found.side, len(found.files)) == (["kind0", "kind1"], 40, 4)
    choice = choose(found._replace(side=side), machine, vae="class-to-video/weights/vae")
    assert (choice.size, choice.model[0]) == (size, width)
    assert choice.patch == {32: 1, 64: 2, 256: 4, 512: 8}[size]  # of an autoencoder of a quarter of the size
    odd = choose(found._replace(side=side), machine, 100, "class-to-video/weights/vae")  # 25 latents along a side
    assert odd.patch == 1
    many = found._replace(files=found.files * 30_000)
    assert (
        choose(many, machine, 64, "class-to-video/weights/vae").model[0]
        == {LAPTOP: 128, CARD: 768, LARGE: 1152}[machine]
    )


def test_a_clip_alone_has_no_images_of_others(tmp_path):
    clip(tmp_path / "own/0.mp4")
    found = look_into(tmp_path / "own")
    plan = Plan(found, choose(found, LAPTOP), LAPTOP, "own", tmp_path / "configs", MINILM)
    plan.write()
    assert load_config(TASKS[found.task].part("settings").TrainingConfig, plan.out / "plain.yaml").data.images == 0


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda place: None, "no folder .*own: --data wants a folder of pictures or clips"),
        (lambda place: place.mkdir(), r"own holds neither pictures \(.*.jpg.*\) nor video files"),
        (lambda place: (picture(place / "a.png"), (place / "a.png").write_text("no")), "none of 1 files can be read"),
        (
            lambda place: (picture(place / "a.png"), picture(place / "cats/b.png")),
            "own/a.png lies beside folders of pictures, which are classes: move it into one, or out of .*own",
        ),
    ],
)
def test_folders_of_nothing(tmp_path, make, complaint):
    make(tmp_path / "own")
    with pytest.raises((ValueError, OSError), match=complaint):
        look_into(tmp_path / "own")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["flat pictures"], indirect=True)
def test_all_commands_run_in_an_empty_folder(folder, tmp_path, monkeypatch, capsys):
    """As they are printed, with few steps."""
    monkeypatch.chdir(tmp_path)
    main(["train", "new", "--data", "own"])
    told = capsys.readouterr().out
    assert "own: 4 images, no classes: class-to-image" in told and "no GPU" in told
    assert "class-to-video/weights/vae, of those that come with skipdit the better one" in told  # noise has colours
    commands = [line.split()[1:] for line in told.splitlines() if line.startswith("  skipdit ")]
    assert [command[0] for command in commands] == ["encode", "train", "train", "train", "sample"]
    small = {
        "encode": ["--workers", "0"],
        "train": ["train.steps=1", "train.warmup=0", "train.decay_steps=0", "train.sample_every=0"],
    }
    for command in commands:
        main([*command, *small.get(command[0], ["steps=2", "num_samples=1"])])
    assert Path("samples/own/000000.png").exists()
    assert "skipdit sample --task class-to-image weights=results/own-stage2" in capsys.readouterr().out
