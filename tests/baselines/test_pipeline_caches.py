"""diffusers' caches and ours on the plain model in diffusers' class."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from skipdit import load_weights
from skipdit.class_to_image import DiT

sys.path.insert(0, str(ROOT / "benchmarks"))
ASSERTED = (
    "steps|plan|N2-1000-0-b0|TaylorSeer (lite )?N=2, order 1|FirstBlockCache 0.2|MagCache 0.24, at most 5|Broadcast N=2"
)
pipeline_caches = pytest.importorskip("pipeline_caches", reason="an older diffusers without these caches")
models = pytest.importorskip("pipeline_models")


def test_diffusers_class_computes_the_same():
    model = DiT(**models.SIZES, skip=False)
    load_weights(model, ROOT / "benchmarks/weights/class-to-image-plain.pt")
    theirs = models.to_diffusers(model)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 999])
    with torch.no_grad():
        expected = model(x, t, torch.tensor([1, 2, 10]))
        result = theirs(x, t, torch.tensor([1, 2, models.NULL])).sample
    assert torch.allclose(result, expected, atol=1e-5)


@pytest.mark.slow
def test_every_cache_engages_and_is_removed(tmp_path, monkeypatch):
    sample, seen = pipeline_caches.sample, []
    monkeypatch.setattr(pipeline_caches, "sample", lambda *args: seen.append(sample(*args)) or seen[-1])
    words = ["x", "--out", str(tmp_path), "--steps", "6", "--samples", "1", "--speedups", "2", "--only", ASSERTED]
    monkeypatch.setattr(sys, "argv", words)
    pipeline_caches.main()
    rows = {row["name"]: row for row in json.loads((tmp_path / "pipeline_caches.json").read_text())}
    for name in ("plan of forecasts, 2x", "N2-1000-0-b0-o1", "TaylorSeer N=2, order 1", "TaylorSeer lite N=2, order 1"):
        assert rows[name]["speedup"] > 1.3 and rows[name]["psnr"] < 60, name
    assert rows["FirstBlockCache 0.2"]["speedup"] > 1.2 and rows["MagCache 0.24, at most 5"]["speedup"] > 1.2
    assert rows["PyramidAttentionBroadcast N=2"]["speedup"] > 1.1
    assert rows["3 steps"]["speedup"] == 2
    model = models.MODELS["class-to-image"](None, 1)
    model.pipe.set_progress_bar_config(disable=True)
    uncached, flops = sample(model.pipe, model.call, 6, 1)
    assert np.array_equal(seen[0][0], uncached) and seen[0][1] == flops


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text-to-image", "text-to-video"])
def test_models_of_prompts(name):
    model = models.MODELS[name](None, 1)
    only = "2 steps|N2-1000-0-o1|TaylorSeer N=2, order 1|FirstBlockCache 0.2"
    rows = pipeline_caches.benchmark(model, 4, 1, [2.0], only)
    by_name = {row["name"]: row for row in rows}
    assert by_name["2 steps"]["speedup"] == 2 and by_name["N2-1000-0-o1"]["speedup"] > 1.2
    assert by_name["TaylorSeer N=2, order 1"]["psnr"] > 15
    fails = "HunyuanDiTBlock'> not registered" in by_name["FirstBlockCache 0.2"].get("fails", "")
    assert fails == (name == "text-to-image")


def test_failures_stand_below_the_table():
    rows = [{"name": "a", "speedup": 2.0, "psnr": 40.0, "error": 1.0}, {"name": "b", "fails": "ValueError: no"}]
    text = pipeline_caches.table(rows)
    assert "| a | 2.00 | 40.0 ± 1.0 |" in text and text.endswith("\n\nb fails: ValueError: no\n")
