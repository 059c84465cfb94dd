"""The benchmark of the halves of guidance: a fit of both halves alike is the planner's own."""

import re
import sys

import pytest
import torch
from conftest import ROOT
from test_plan import bench

from skipdit.planning.calibration import MEMORY
from skipdit.planning.fitting import Fit

sys.path.insert(0, str(ROOT / "benchmarks"))
import guidance_halves

KINDS = "FFOFOOFO"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sampler", "converged"])
def test_halves_alike_are_the_planners_fit(tmp_path, target):
    made = bench(tmp_path, target, guidance_channels="null")
    arguments = made.sampler, made.own, made.goals, KINDS, 1, made.response, MEMORY[target], target == "converged"
    plain, halves = Fit(*arguments), guidance_halves.Halves(*arguments, scale=2.0, apart=False)
    ends = [fit.final(0, fit.run()[0]) for fit in (plain, halves)]
    torch.testing.assert_close(*ends, rtol=0, atol=2e-4)
    apart = guidance_halves.Halves(*arguments, scale=2.0, apart=True)
    assert (apart.final(0, apart.run()[0]) - ends[0]).abs().max() > 2e-3


@pytest.mark.slow
def test_half_steps_run_the_conditional_half(tmp_path, monkeypatch):
    made, rows = bench(tmp_path, guidance_channels="null"), []
    forward = made.model.forward
    monkeypatch.setattr(made.model, "forward", lambda **given: rows.append(len(given["x"])) or forward(**given))
    fit = guidance_halves.Halves(
        made.sampler, made.own, made.goals, "FFOCFOCO", 1, made.response, (2, 3), False, scale=2.0, apart=True
    )
    fit.run()
    count = len(made.own[0].latents[0])
    assert rows == [2 * count, 2 * count, count, 2 * count, count]


def test_the_schedules_have_what_they_are_asked_for():
    for full, half in ((16, 0), (14, 4), (10, 12)):
        kinds = guidance_halves.kinds_of(50, full, half)
        assert len(kinds) == 50 and kinds.startswith("FF")
        assert (kinds.count("F"), kinds.count("C")) == (full, half)


@pytest.mark.slow
def test_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["halves", "--budget", "4", "num_samples=2", "batch_size=1", "steps=8"])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(guidance_halves, "CONFIG", "configs/class-to-image/demo.yaml")
    guidance_halves.main()
    rows = re.findall(r"\| (\d) full \+ (\d) half steps(, apart)? \| [\d.]+ \| [\d.]+ \|", capsys.readouterr().out)
    assert rows == [("4", "0", ""), ("4", "0", ", apart")]
    monkeypatch.setattr(sys, "argv", ["halves", "num_samples=2", "batch_size=2"])
    with pytest.raises(SystemExit, match="2"):
        guidance_halves.main()
    assert "set batch_size to half of it" in capsys.readouterr().err


@pytest.mark.parametrize("budget", [0, 9])
def test_a_budget_that_no_run_has_is_refused(budget, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["halves", "--budget", str(budget), "steps=8"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        guidance_halves.main()
    assert f"--budget is {budget} full steps; a run of 8 has 1 to 8" in capsys.readouterr().err
