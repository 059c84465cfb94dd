"""What commands say as they begin, while they run, and at their end."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, short_training, tiny_dit

from skipdit.__main__ import COMMANDS, QUICK, main
from skipdit.checkpoints.released import to_released
from skipdit.class_to_image import train as training
from skipdit.class_to_image.sample import Config, ModelConfig, sample
from skipdit.config import changed, to_yaml
from skipdit.data.settings import ImageData
from skipdit.evaluation.compare import markdown
from skipdit.sampling.job import preflight


@pytest.fixture
def sampling(tmp_path, vae_folder) -> Config:
    torch.save({"ema": to_released(tiny_dit(input_size=8).state_dict())}, tmp_path / "tiny.pt")
    sizes = {"image_size": 16, "num_samples": 2, "steps": 6, "sampler": "ddim"}
    model = ModelConfig(patch_size=2, hidden_size=32, depth=4, num_heads=2, num_classes=10)
    places = {"weights": str(tmp_path / "tiny.pt"), "vae": str(vae_folder), "out": str(tmp_path / "out")}
    return Config(**places, **sizes, model=model)


@pytest.mark.parametrize(
    "program", [["class-to-image/sample.py"], ["-m", "skipdit", "sample", "--task", "class-to-image"]]
)
def test_a_line_comes_before_anything_is_imported_that_takes_seconds(program):
    """Its time is that of a bare Python and of YAML; a stop watch on a busy machine would tell another one."""
    code = "import runpy, sys\nfrom skipdit import cli\ntell = cli.say_start\n"
    code += "cli.say_start = lambda *a: (tell(*a), sys.exit(7 if 'torch' in sys.modules else 3))\n"
    script, argv = program[0], [*program[1:], "weights=a.pt"]
    code += f"sys.argv = {[script, *argv]!r}\n" if script != "-m" else f"sys.argv = {['skipdit', *argv[1:]]!r}\n"
    run = f"runpy.run_path({script!r}" if script != "-m" else "runpy.run_module('skipdit'"
    code += f"{run}, run_name='__main__')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3, done.stderr
    name = "skipdit sample" if script == "-m" else "sample.py"
    assert done.stderr == f"{name}: loading libraries and models, which takes some seconds\n"


def test_only_commands_that_answer_at_once_say_nothing_first():
    assert set(COMMANDS) - set(QUICK) >= {"sample", "train", "compare", "plan", "demo", "encode", "evaluate"}


def test_compare_names_every_row_and_gives_its_result(sampling, tmp_path, capsys):
    folder = tmp_path / "class-to-image"
    folder.mkdir()
    (folder / "run.yaml").write_text(to_yaml(sampling))
    main(["compare", "--config", str(folder / "run.yaml"), "--intervals", "2", "--repeats", "2"])
    told = capsys.readouterr().err.replace("\r", "\n").splitlines()
    named = [line.partition(" (")[0] for line in told if line.endswith(" steps) ...")]
    assert named[:3] == ["uncached", "reuse N=2", "extrapolate N=2"] and named[4:] == named[:4]
    rounds = [line.partition(",")[0] for line in told if line.startswith("round")]
    assert rounds == ["round 1 of 2", "round 2 of 2"]
    results = [line for line in told if re.fullmatch(r".+: [\d.]+ s / image(, [\d.]+ dB)?", line)]
    assert [line.partition(":")[0] for line in results] == named
    assert told.index("uncached (none, 6 steps) ...") < told.index(results[0]) < told.index(results[-1])


def row(name: str, speedup: float, flops_speedup: float) -> dict:
    counts = {"full_steps": 3, "cached_steps": 3, "forecast_steps": 0, "seconds_per_sample": 1.0}
    return {
        "name": name,
        "psnr": 30.0,
        "psnr_error": None,
        "ssim": 0.9,
        "identical": False,
        "speedup": speedup,
        "flops_speedup": flops_speedup,
    } | counts


def test_times_far_from_flops_are_marked():
    table = markdown(
        [row("uncached", 1, 1), row("busy", 114, 2.5), row("slow", 1.1, 2.5), row("as it should", 2.4, 2.5)], "image"
    )
    assert "| 114.00* | 2.50 |" in table and "| 1.10* |" in table and "| 2.40 |" in table and "| 1.00 |" in table
    assert table.endswith(
        "\\* far from the speedup in FLOPs: other programs took processors, or the model is very small"
    )
    assert "far from" not in markdown([row("uncached", 1, 1)], "image")


@pytest.mark.slow
def test_a_finished_run_says_where_to_look(sampling, capsys):
    sample(sampling)
    capsys.readouterr()
    sample(sampling)
    told = capsys.readouterr()
    assert told.out == f"all 2 images are there: see {sampling.out}/grid.png\n" and told.err == ""


def test_the_end_of_a_run_names_the_file_to_open(sampling, capsys):
    sample(changed(sampling, {"num_samples": 1}))
    assert capsys.readouterr().out.startswith(f"1 image in {sampling.out}, see grid.png: 6 full")


@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        (
            {"weights": "results/mine-stage2", "vae": "x/y/z"},
            "results/mine-stage2 has no checkpoint yet: run the train",
        ),
        ({"init": "checkpoints/Latte-0/transformer"}, "`fetch it` fetches the released ones"),
        ({"vae": "class-to-image", "data.path": "data/mine"}, "the head of the config has the commands"),
        ({"vae": "class-to-image", "texts": "data/texts"}, "the head of the config has the commands"),
        ({"vae": "class-to-image", "data.path": "data/mine", "absent": ["t5"]}, "`fetch it` fetches the released ones"),
    ],
)
def test_what_is_missing_comes_with_what_makes_it(missing, advice, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(FileNotFoundError) as caught:
        preflight(
            {key: path for key, path in missing.items() if key != "absent"}, "fetch it", missing.get("absent", ())
        )
    assert advice in str(caught.value) and str(caught.value).count(";") == 1


@pytest.mark.slow
def test_sample_grids_have_a_bar_and_courses_longer_than_the_run_are_told(tmp_path, vae_folder, image_folder, capsys):
    model = ModelConfig(patch_size=2, hidden_size=32, depth=4, num_heads=2, num_classes=3)
    config = training.Config(
        out=str(tmp_path / "run"),
        vae=str(vae_folder),
        model=model,
        data=ImageData(path=str(image_folder), image_size=8),
        train=changed(short_training(), {"steps": 2, "sample_every": 2, "warmup": 1, "decay_steps": 1}),
    )
    training.train(config)
    told = capsys.readouterr()
    assert re.search(r"sampling: .*\b\d+/50 \[", told.err) and "warning" not in told.out
    training.train(changed(config, {"out": str(tmp_path / "short"), "train.warmup": 2, "train.sample_every": 0}))
    complaint = "warning: train.warmup=2 and train.decay_steps=1 are longer than train.steps=2: the learning rate never"
    assert complaint in capsys.readouterr().out
