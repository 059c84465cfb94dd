"""benchmarks/plans.py, on the embedded model with few steps."""

import json
import sys

import pytest
from conftest import ROOT
from PIL import Image
from test_plan import TINY

from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import CacheSpec
from skipdit.class_to_image.sample import Config, ImageSampler
from skipdit.config import load_config
from skipdit.metrics import mean_psnr, psnr
from skipdit.planning.calibration import Bench, Fitted

sys.path.insert(0, str(ROOT / "benchmarks"))
import plans
from store import Store


@pytest.fixture
def sampler(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return ImageSampler(load_config(Config, tmp_path / "tiny.yaml", ["seed=7", "steps=6"]), 1)


@pytest.fixture
def files(sampler, tmp_path):
    """Plans of 4, 3 and 2 full steps of 6; what they are does not matter here."""
    timesteps = tuple(map(float, sampler.timesteps(6)))
    for full, branch in ((4, 1), (3, 1), (2, 2)):
        features = (*[None] * (full - 1), *[(1.0,) if full > 2 else ()] * (6 - full), None)
        CachePlan(timesteps, features, branch).save(tmp_path / f"plan-{full}.json")
    return tmp_path


@pytest.fixture
def benchmark(files, monkeypatch):
    def call(*numbers, seeds=("7", "8"), more=()):
        command = ["plans.py", "--task", "class-to-image", "--config", str(files / "tiny.yaml"), "--seeds", *seeds]
        command += [part for full in numbers for part in ("--plan", str(files / f"plan-{full}.json"))]
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(files / "out"), *more, "steps=6"])
        plans.main()
        return json.loads((files / "out/class-to-image.json").read_text())["plans"]

    return call


@pytest.mark.slow
def test_every_row_is_measured_on_every_seed(benchmark, sampler, capsys):
    first, second = benchmark(4, 3)  # the cheaper plan first
    assert first["plan"]["speedup"] > second["plan"]["speedup"] > 1
    cost = 3 + 3 * sampler.flops["cached"] / sampler.flops["full"]
    assert first["plan"]["speedup"] == pytest.approx(6 / cost)
    assert {f"{round(cost)} steps, {method}" for method in ("ddim", "dpm", "unipc", "deis3")} < set(first)
    assert all(len(set(row["psnr"][t])) == 2 for row in (first["plan"], second["plan"]) for t in plans.TARGETS)
    made, uncached = sampler.make(4, CacheSpec()), sampler.make(6, CacheSpec())
    measured = second["4 steps, ddim"]["psnr"]["sampler"][0]
    assert measured == pytest.approx(mean_psnr(psnr(made, uncached)).item(), abs=0.1)  # that one is of 8 bits
    assert first[plans.EVEN]["speedup"] == 6 / round(cost) and second[plans.EVEN]["speedup"] == 6 / 4
    (seer,) = [name for name in first if name.startswith("TaylorSeer")]
    assert 1.7 < first[seer]["speedup"] < 2 and seer == f"TaylorSeer N=2, {first[seer]['speedup']:.2f}x"
    assert first[seer]["psnr"]["sampler"] != first["6 steps, ddim, uncached"]["psnr"]["sampler"]
    told = capsys.readouterr().out
    assert "| **plan** | " in told and "6 steps, ddim, uncached | 1.00 |" in told and "identical" in told


@pytest.mark.slow
def test_what_is_known_is_not_measured_again(benchmark, monkeypatch, files):
    (before,) = benchmark(3, seeds=["7"])
    calls, make = [], plans.Store.save
    monkeypatch.setattr(plans.Store, "save", lambda *args: calls.append(args[1]) or make(*args))
    (after,) = benchmark(3)
    assert len(calls) == len(before) and all(key.startswith("seed 8") for key in calls)
    assert before["plan"]["psnr"]["converged"] == after["plan"]["psnr"]["converged"][:1]
    benchmark(3, seeds=["7"], more=["--name", "another"])
    assert (files / "out/another.json").exists() and "another |" in (files / "out/plans.md").read_text()
    with Image.open(files / "out/plans.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.slow
def test_evenly_spaced_forecasts_are_fitted_on_other_noise(sampler, files, tmp_path):
    """Once, on samples of another seed than those to be judged, and better on these than outputs used again."""
    bench, store = Bench(sampler, 6, 1, "sampler"), Store(tmp_path / "out", {"threads": 1})
    plan = CachePlan.load(files / "plan-3.json")  # costs 3.5 full steps
    even = plans.evenly_spaced(bench, plan, store)
    assert even.kinds == "FOFFFO" and sampler.config.seed == 7
    bench.calibrate()
    assert 1e-3 < bench.error(even) < bench.error(CachePlan(bench.timesteps, (None,) * 6, 1, even.kinds))
    of_seed_7 = bench.fit(even.kinds).plan
    assert of_seed_7.outputs != even.outputs
    bench.calibrate = None
    assert plans.evenly_spaced(bench, plan, store) == even


@pytest.mark.slow
def test_evenly_spaced_forecasts_of_many_steps_have_a_short_name(sampler, tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "calibrate", lambda _: None)
    monkeypatch.setattr(Bench, "fit", lambda own, kinds: Fitted(CachePlan(own.timesteps, nothing, 0, kinds, empty), 0))
    bench, nothing, empty = Bench(sampler, 250, 0, "sampler"), (None,) * 250, ((),) * 250
    plan = CachePlan(bench.timesteps, nothing, 0, "F" * 50 + "O" * 200, empty)
    assert plans.evenly_spaced(bench, plan, Store(tmp_path / "out", {"threads": 1})).kinds.count("F") == 50


@pytest.mark.slow
def test_what_taylor_seer_costs(sampler):
    share = plans.extrapolated_share(sampler.model)
    assert 0 < share < 0.1  # modulations, and what is before and after the blocks
    baseline, speedup = plans.taylor_seer(Bench(sampler, 6, 1), 3.4)
    assert baseline == plans.TaylorSeer(2, 2) and speedup == pytest.approx(6 / (3 + 3 * share))
    assert plans.taylor_seer(Bench(sampler, 6, 1), 1.0)[0] == plans.TaylorSeer(6, 2)


def test_branches_are_not_mixed(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark(3, 2)
    assert "plans of branches [1, 2]: compare those of one branch at a time" in capsys.readouterr().err
