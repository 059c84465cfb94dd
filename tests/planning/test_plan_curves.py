"""benchmarks/plans.py, on the embedded model with few steps."""

import json
import sys

import pytest
from conftest import ROOT
from PIL import Image
from test_plan import TINY

from skipdit.caching.plans import CachePlan
from skipdit.class_to_image.sample import Config, ImageSampler
from skipdit.config import load_config
from skipdit.metrics import mean_psnr, psnr
from skipdit.planning.schedules import forecast, uniform

sys.path.insert(0, str(ROOT / "benchmarks"))
import plans


@pytest.fixture
def sampler(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return ImageSampler(load_config(Config, tmp_path / "tiny.yaml", ["seed=7"]), 1)


@pytest.fixture
def files(sampler, tmp_path):
    """Plans of 5 and 3 full steps of 10; what they are does not matter here."""
    timesteps = tuple(map(float, sampler.timesteps(10)))
    for full, branch in ((5, 1), (3, 1), (4, 2)):
        weights = forecast(10, [*range(full - 1), 9], 1)
        CachePlan(timesteps, weights, branch).save(tmp_path / f"plan-{full}.json")
    return tmp_path


@pytest.fixture
def benchmark(files, monkeypatch):
    def call(*numbers, seeds=("7", "8")):
        command = ["plans.py", "--task", "class-to-image", "--config", str(files / "tiny.yaml"), "--seeds", *seeds]
        command += [part for full in numbers for part in ("--plan", str(files / f"plan-{full}.json"))]
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(files / "out")])
        plans.main()
        return json.loads((files / "out/class-to-image.json").read_text())["plans"]

    return call


@pytest.mark.slow
def test_every_row_is_measured_on_every_seed(benchmark, sampler, files, capsys):
    table = benchmark(3, 5)
    assert [(plan["full_steps"], list(plan["psnr"])) for plan in table] == [(n, list(plans.STYLES)) for n in (3, 5)]
    reference, even = sampler.make(10, plans.CacheSpec()), forecast(10, uniform(10, 3), 0)
    made = sampler.make(10, CachePlan(tuple(map(float, sampler.timesteps(10))), even))
    assert table[0]["psnr"]["even, reuse"][0] == pytest.approx(mean_psnr(psnr(made, reference)).item(), abs=1e-4)
    assert all(len(set(values)) == 2 for plan in table for values in plan["psnr"].values())
    cost = 3 + 7 * sampler.flops["cached"] / sampler.flops["full"]
    assert table[0]["speedup"]["plan"] == pytest.approx(10 / cost) and table[0]["uncached_steps"] == round(cost)
    told = capsys.readouterr().out
    assert "| 3 | 2." in told and f"({round(cost)} steps)" in told
    assert "\n|---|---|---|---|---|---|---|---|---|\n" in told
    with Image.open(files / "out/plans.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.slow
def test_what_is_known_is_not_measured_again(benchmark, monkeypatch):
    (before,) = benchmark(3, seeds=["7"])
    calls, make = [], plans.Store.save
    monkeypatch.setattr(plans.Store, "save", lambda *args: calls.append(args[1]) or make(*args))
    after, _ = benchmark(3, 5)
    assert len(calls) == 4 + 8 and before["psnr"] == {name: values[:1] for name, values in after["psnr"].items()}


def test_branches_are_not_mixed(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark(3, 4)
    assert "plans of branches [1, 2]: compare those of one branch at a time" in capsys.readouterr().err
