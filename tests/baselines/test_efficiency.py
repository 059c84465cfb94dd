"""benchmarks/efficiency.py on tiny models and random pictures, and the judge that evaluate_fashion.py has too."""

import copy
import json
import os
import re
import runpy
import struct
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, skipdit_command, tiny_dit
from PIL import Image

from skipdit.caching.plans import CachePlan
from skipdit.checkpoints.released import to_released
from skipdit.diffusion.gaussian import Diffusion
from skipdit.evaluation.fashion import Classifier, Judge, load_judge
from skipdit.training.checkpoints import latest

sys.path.insert(0, str(ROOT / "benchmarks"))
import efficiency
import training_recipes

SMALL = "model.hidden_size=32 model.depth=4 train.steps=4 train.batch_size=4 train.warmup=0 train.log_every=1"
STEPS = [2, 4]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """FashionMNIST of 64 random pictures in data/, their latents in latents/."""
    folder = tmp_path_factory.mktemp("fashion")
    raw = folder / "data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels, labels = os.urandom(64 * 28 * 28), bytes(i % 10 for i in range(64))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 64, 28, 28) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 64) + labels)
    command = f"encode --data fashion_mnist --path {folder / 'data'} --image-size 32 --workers 0"
    command += f" --vae {ROOT / 'class-to-image/weights/vae'} --out {folder / 'latents'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command.split())
        skipdit_command("encode")()
    return folder


@pytest.fixture
def benchmark(data, monkeypatch):
    """Run it as from the command line, with an untrained judge. Returns its output folder."""

    def judge(path, train, test, device) -> Judge:
        torch.manual_seed(0)
        return Judge(Classifier(), *test)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(efficiency, "load_judge", judge)
    monkeypatch.setattr(efficiency, "CACHED_SAMPLES", 2)
    monkeypatch.setitem(efficiency.SAMPLER, "steps", 3)
    monkeypatch.setitem(efficiency.CACHED, "steps", 10)

    def call(out: Path, *more: str) -> Path:
        command = ["efficiency.py", *SMALL.split(), f"data.path={data / 'latents'}"]
        command += f"--data {data / 'data'} --out {out} --every 2 --samples 4 --held-out 64".split()
        command += more
        monkeypatch.setattr(sys, "argv", command)
        efficiency.main()
        return out

    return call


def numbers(runs: dict) -> dict:
    """All that two equal studies agree in."""
    return {name: [{key: run[key] for key in ("points", "final")} for run in several] for name, several in runs.items()}


@pytest.mark.slow
def test_interrupted_study_goes_on_and_measures_the_same(benchmark, tmp_path, monkeypatch):
    whole = json.loads((benchmark(tmp_path / "whole") / "convergence.json").read_text())
    point, calls = efficiency.Examiner.point, []

    def dies(self, model):
        calls.append(model)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return point(self, model)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(efficiency.Examiner, "point", dies)
        benchmark(tmp_path / "parts")
    assert not (tmp_path / "parts/convergence.json").exists()
    known = json.loads((tmp_path / "parts/runs/plain-seed0/evaluation.json").read_text())["points"]
    assert [row["step"] for row in known] == [2]
    continued = json.loads((benchmark(tmp_path / "parts") / "convergence.json").read_text())
    assert numbers(continued["runs"]) == numbers(whole["runs"])
    assert [row["step"] for row in whole["runs"]["skip"][0]["points"]] == STEPS


@pytest.mark.slow
def test_study_is_reported(benchmark, tmp_path, monkeypatch, capsys):
    """Curves, table and picture; then the study of constraints, which takes the plain skips' run over."""
    out = benchmark(tmp_path / "out")
    result, said = json.loads((out / "convergence.json").read_text()), capsys.readouterr().out
    table = (out / "convergence.md").read_text()
    assert table in said and "4.4 times sooner" in table
    assert result["costs"]["skip"]["parameters"] - result["costs"]["plain"]["parameters"] == 2 * (64 * 32 + 32 + 2 * 64)
    for run in result["runs"]["plain"] + result["runs"]["skip"]:
        assert all(0 <= point["accuracy"] <= 1 and point["frechet"] > 0 for point in run["points"])
        assert all(change > 0 for change in run["final"]["output_change"])
    assert {"versions", "protocol", "config", "speedups"} <= result.keys()
    skip = latest(out / "runs/skip-seed0/checkpoints")[1]
    args = {name: latest(out / f"runs/{name}-seed0/checkpoints")[1]["args"] for name in ("plain", "skip")}
    for name, of in args.items():
        assert of.pop("out").endswith(f"{name}-seed0") and of["model"].pop("skip") == (name == "skip")
    assert args["plain"] == args["skip"]  # nothing else differs

    benchmark(tmp_path / "out", "--spectral")
    after = json.loads((out / "spectral.json").read_text())
    assert numbers({"skip": after["runs"]["skip"]}) == numbers({"skip": result["runs"]["skip"]})
    sigma = {name: run[0]["final"]["sigma"] for name, run in after["runs"].items()}
    exact = [torch.linalg.matrix_norm(skip["ema"][f"skip_linears.{i}.linear.weight"], 2).item() for i in range(2)]
    assert sigma["skip"] == pytest.approx(exact, rel=1e-4)
    assert max(sigma["cap"]) <= 1.0 + 1e-5 and max(sigma["skip"]) > 1.2
    assert after["runs"]["cap"][0]["final"]["N3-1000-20-o1"]["psnr"] > 0
    assert "| cap 1 |" in (out / "spectral.md").read_text()
    for name in ("convergence", "spectral"):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.size[0] > 600 and len(picture.getcolors(10**6)) > 10


@pytest.mark.slow
def test_what_was_measured_in_another_way_is_not_mixed_in(benchmark, tmp_path, capsys):
    benchmark(tmp_path, "train.steps=2")
    for more, said in [
        (["--samples", "5"], "measured in another way"),
        (["train.lr=0.5"], "other settings"),
        (["--every", "1"], "was trained to step 2, and is to be measured at step 1"),
        (["train.steps=5"], "--every 2 has to divide train.steps=5"),
        (["train.decay_steps=2"], "train.decay_steps has to be 0"),
        (["--held-out", "3"], "--held-out at least 64"),
    ]:
        with pytest.raises(SystemExit):
            benchmark(tmp_path, *more)
        assert said in capsys.readouterr().err


def curve(**values: list[float]) -> list[dict]:
    count = len(next(iter(values.values())))
    return [{"step": 10 * (i + 1), **{name: of[i] for name, of in values.items()}} for i in range(count)]


@pytest.mark.parametrize(
    ("losses", "goal", "at"),
    [
        ([3.0, 2.0, 1.0], 1.5, 25),
        ([3.0, 2.0, 1.0], 2.0, 20),
        ([3.0, 2.0, 1.0], 5.0, 10),  # or before
        ([3.0, 2.0, 1.0], 0.5, None),
        ([3.0, 1.0, 2.0], 1.5, 17.5),  # the first time
    ],
)
def test_step_that_reaches_a_value(losses, goal, at):
    assert efficiency.reached(curve(loss=losses), "loss", goal) == at
    rising = [-loss for loss in losses]
    assert efficiency.reached(curve(accuracy=rising), "accuracy", -goal) == at


def test_speedup_is_over_the_whole_plain_run():
    found = efficiency.speedups(curve(loss=[4.0, 3.0, 2.0]), curve(loss=[3.0, 1.0, 1.0]), "loss")
    assert found == {"goal": 2.0, "skip_at": 15.0, "plain_at": 30.0, "ratio": 2.0, "plain_ratio": 1.0}


def test_spread_over_seeds():
    assert efficiency.spread([1.0]) == "1.000"
    assert efficiency.spread([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert efficiency.spread([1.0, None], 1) == "1.0 (never in 1 of 2)"
    assert efficiency.spread([None]) == "never"


@pytest.fixture
def examiner() -> efficiency.Examiner:
    torch.manual_seed(0)
    return efficiency.Examiner(None, None, torch.randn(80, 4, 4, 4), torch.arange(80) % 10, samples=2)


def test_loss_is_that_of_training_at_every_stretch_of_timesteps(examiner):
    model = tiny_dit()
    assert examiner.t.sort().values.tolist() == [i * 1000 // 80 for i in range(80)]
    with torch.no_grad():
        out = model(examiner.noisy, examiner.t, examiner.labels)
    expected = Diffusion().losses(out, examiner.latents, examiner.noisy, examiner.t, examiner.noise)["loss"].mean()
    assert examiner.loss(model) == pytest.approx(expected.item(), rel=1e-5)


def test_output_moves_with_the_weights(examiner, monkeypatch):
    """Twice as far for twice the perturbation, while that is small; the weights are put back."""
    model, changes = tiny_dit(), []
    before = copy.deepcopy(model.state_dict())
    for moved in (1e-3, 2e-3):
        monkeypatch.setattr(efficiency, "MOVED", moved)
        changes.append(examiner.output_change(model))
    assert changes[1] == pytest.approx([2 * change for change in changes[0]], rel=0.05)
    assert len(set(changes[0])) == efficiency.DIRECTIONS
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_poor_judge_is_refused_and_a_kept_one_is_used(tmp_path):
    images, labels = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8), torch.arange(256) % 10
    path = tmp_path / "classifier.pt"
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot judge samples; delete .*classifier\.pt"):
            load_judge(path, (images, labels), (images, (labels + 5) % 10), torch.device("cpu"))
        kept = path.read_bytes()
    assert path.read_bytes() == kept
    scores = Judge(Classifier(), images, labels).scores(images, labels)
    assert scores["frechet"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_evaluate_fashion(data, tmp_path, monkeypatch, capsys):
    """Every kind of cache with its cost; the same command again samples nothing and says the same."""
    (tmp_path / "results").mkdir()
    torch.save(Classifier().state_dict(), tmp_path / "results/classifier.pt")
    plan = CachePlan(tuple(map(float, Diffusion(10).sampling_timesteps)), (None, (), None, (1.0,), *[None] * 6))
    plan.save(tmp_path / "plan.json")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("skipdit.evaluation.fashion.LEAST_ACCURACY", 0.0)
    command = f"evaluate --data {data / 'data'} --out {tmp_path / 'results'} --samples 3 --batch-size 2 --steps 10"
    command += f" --cache N2-1000-20-o1 --cache {tmp_path / 'plan.json'} --cache 8"
    command += " --config configs/class-to-image/demo_12_blocks.yaml"  # on which so plain a plan is better than 8 steps
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path("scripts/evaluate_fashion.py", run_name="__main__")
    assert "| 8 steps | 8 + 0 | 1.25x |" in capsys.readouterr().out
    results = json.loads((tmp_path / "results/results.json").read_text())
    names = [
        "real training images (the floor)",
        "test images, autoencoded",
        "none",
        "N2-1000-20-o1",
        str(plan),
        "8 steps",
    ]
    assert [row["images"] for row in results["rows"]] == names
    uncached, interval, planned, fewer = results["rows"][2:]
    assert uncached["flops_speedup"] == 1 and "psnr" not in uncached
    assert (interval["full_steps"], interval["cached_steps"]) == (5, 5)
    assert (planned["full_steps"], planned["cached_steps"]) == (8, 2)
    cached = 2 / interval["flops_speedup"] - 1  # of a full step, since half are cached
    assert planned["flops_speedup"] == pytest.approx(10 / (8 + 2 * cached)) and 20 < fewer["psnr"] < planned["psnr"]

    monkeypatch.setattr(
        "skipdit.sampling.class_conditional.generate", lambda *args, **kwargs: pytest.fail("sampled again")
    )
    runpy.run_path("scripts/evaluate_fashion.py", run_name="__main__")
    assert json.loads((tmp_path / "results/results.json").read_text()) == results

    monkeypatch.setattr(sys, "argv", [*command.split(), "--cache", "D0.2"])
    with pytest.raises(SystemExit):
        runpy.run_path("scripts/evaluate_fashion.py", run_name="__main__")
    assert "give an interval, a plan, or a number of uncached steps" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_fashion_of_a_plain_model(data, tmp_path, monkeypatch, capsys):
    """It has no cache, but fewer steps; by default the config's own weights are judged."""
    (tmp_path / "results").mkdir()
    torch.save(Classifier().state_dict(), tmp_path / "results/classifier.pt")
    torch.save(
        {"ema": to_released(tiny_dit(input_size=8, patch_size=1, skip=False).state_dict())}, tmp_path / "plain.pt"
    )
    demo = (ROOT / "configs/class-to-image/demo.yaml").read_text()
    sizes = "patch_size: 1, hidden_size: 32, depth: 4, num_heads: 2, num_classes: 10, skip: false"
    demo = re.sub("model: .*", f"model: {{{sizes}}}", demo)
    (tmp_path / "plain.yaml").write_text(demo.replace("vae: ", f"vae: {ROOT}/"))
    monkeypatch.setattr("skipdit.evaluation.fashion.LEAST_ACCURACY", 0.0)
    command = f"evaluate --data {data / 'data'} --config {tmp_path / 'plain.yaml'} --weights {tmp_path / 'plain.pt'}"
    command += f" --out {tmp_path / 'results'} --samples 3 --batch-size 3 --steps 4 --cache 2"
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(str(ROOT / "scripts/evaluate_fashion.py"), run_name="__main__")
    assert "| 2 steps | 2 + 0 | 2.00x |" in capsys.readouterr().out


@pytest.mark.slow
def test_training_recipes_are_compared(data, tmp_path, monkeypatch, capsys):
    """Four recipes; a call for fewer of them measures nothing again, and has the baseline with them."""

    def judge(path, train, test, device) -> Judge:
        torch.manual_seed(0)
        return Judge(Classifier(), *test)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(efficiency, "load_judge", judge)
    command = f"recipes {SMALL} data.path={data / 'latents'} --data {data / 'data'} --out {tmp_path}"
    command += " --every 2 --samples 4 --sampling-steps 2 3 --held-out 64 model.num_heads=2"

    def call(*more: str) -> dict:
        monkeypatch.setattr(sys, "argv", [*command.split(), *more])
        training_recipes.main()
        return json.loads((tmp_path / "recipes.json").read_text())

    names = [f"{skips}-{objective}-adamw" for skips in ("plain", "skip") for objective in ("diffusion", "flow")]
    first = call("--recipes", *names)
    assert list(first["runs"]) == names
    for name, (run,) in first["runs"].items():
        for point in run["points"]:
            assert point["frechet"] == point["frechet_3"] != point["frechet_2"] and 0 <= point["accuracy"] <= 1
        args = latest(tmp_path / f"runs/{name}-seed0/checkpoints")[1]["args"]
        assert args["model"]["skip"] == name.startswith("skip") and args["train"]["objective"] == name.split("-")[1]
    (plain,) = first["rows"][training_recipes.BASELINE]
    assert plain["step_ratio"] == pytest.approx(plain["pflop_ratio"]) and plain["step"] <= 4
    assert (tmp_path / "recipes.md").read_text() in capsys.readouterr().out
    with Image.open(tmp_path / "recipes.png") as picture:
        assert picture.size[0] > 600 and len(picture.getcolors(10**6)) > 10
    monkeypatch.setattr(training_recipes.RecipeExaminer, "point", None)
    again = call("--recipes", "skip-flow-adamw")["runs"]
    assert list(again) == [training_recipes.BASELINE, "skip-flow-adamw"] and again.items() <= first["runs"].items()
