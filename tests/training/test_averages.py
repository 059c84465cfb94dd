"""Averages of any length, from what a training saved of two: against the average itself."""

import numpy as np
import pytest
import torch
from conftest import FSDP, assert_equal, run_script, state
from torch import nn

from skipdit.checkpoints.averages import LENGTHS, Profile, coefficients, combine, exponent
from skipdit.checkpoints.convert import main
from skipdit.checkpoints.files import load_state, record_of, recorded_settings
from skipdit.commands.weights import read_arguments
from skipdit.config import changed
from skipdit.tasks import TASKS
from skipdit.training.ema import PowerAverage
from skipdit.utils.errors import UserError


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_length_is_the_standard_deviation_of_the_steps(length):
    t = (np.arange(200_000) + 0.5) / 200_000
    weights = t ** exponent(length)
    weights /= weights.sum()
    mean = (weights * t).sum()
    assert np.sqrt((weights * (t - mean) ** 2).sum()) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("length", [0, -0.1, 0.3, float("nan")])
def test_impossible_lengths_are_refused(length):
    with pytest.raises(UserError, match=r"above 0 and at most 0\.28"):
        exponent(length)


def walk(steps: int) -> torch.Tensor:
    """Weights of every step (steps, 3): of a fast walk, of a slow course, and one that never moves."""
    generator = torch.Generator().manual_seed(0)
    fast = torch.randn(steps, generator=generator, dtype=torch.float64).cumsum(0)
    return torch.stack([fast, torch.linspace(0, 20, steps, dtype=torch.float64).square(), torch.full_like(fast, 7)], 1)


def exact(path: torch.Tensor, length: float) -> torch.Tensor:
    weights = torch.arange(1, len(path) + 1, dtype=torch.float64) ** exponent(length)
    return (weights[:, None] * path).sum(0) / weights.sum()


@pytest.mark.parametrize("length", LENGTHS)
def test_shadow_follows_the_power_of_the_step(length):
    path, model = walk(600), nn.ParameterList([nn.Parameter(torch.zeros(3))])
    shadow = PowerAverage(model, length)
    for step, weights in enumerate(path, 1):
        model[0].data.copy_(weights)
        shadow.update(model, step)
    torch.testing.assert_close(shadow.model[0].double(), exact(path, length), rtol=0.01, atol=0.1)


@pytest.mark.parametrize("length", [0.03, 0.07, 0.15, 0.25])
def test_other_lengths_are_rebuilt(length):
    """Nearer to the average itself than either of those that were kept."""
    path, every = walk(2_000), 100
    ends = range(every, len(path) + 1, every)
    kept = torch.stack([exact(path[:end], own) for end in ends for own in LENGTHS])
    profiles = [Profile(end, exponent(own)) for end in ends for own in LENGTHS]
    factors = torch.from_numpy(coefficients(profiles, Profile(len(path), exponent(length))))
    rebuilt, wanted = factors @ kept, exact(path, length)
    assert factors.sum().item() == pytest.approx(1) and rebuilt[2].item() == pytest.approx(7)
    apart = (kept[-len(LENGTHS) :] - wanted).abs()[:, :2].min(0).values
    assert ((rebuilt - wanted).abs()[:2] < 0.2 * apart).all()


@pytest.mark.slow
def test_training_resumes_with_its_averages(training_config, tmp_path, capsys):
    config = changed(training_config("class-to-image"), {"train.average_every": 1})
    train = TASKS["class-to-image"].train
    train(config)
    whole = state(config)
    stopped = changed(config, {"out": str(tmp_path / "stopped")})
    train(changed(stopped, {"train.steps": 2}))
    train(stopped)
    assert_equal(whole | {"args": None}, state(stopped) | {"args": None})
    none = changed(config, {"out": str(tmp_path / "none"), "train.average_every": 0})
    train(none)
    assert "averages" not in state(none) and not (tmp_path / "none/averages").exists()
    assert_equal(whole["ema"], state(none)["ema"])  # they change nothing else

    # an average as long as one that was kept is that one
    length, out = LENGTHS[1], tmp_path / "average.pt"
    main(read_arguments(["average", stopped.out, str(out), "--length", str(length)]))
    assert capsys.readouterr().out.endswith(
        f"the weights are in {out}; to sample from them:\n  skipdit sample --task class-to-image weights={out}\n"
    )
    for name, tensor in load_state({"ema": whole["averages"][f"{length:g}"]}).items():
        torch.testing.assert_close(load_state(out)[name], tensor, atol=2e-3, rtol=2e-3)
    assert recorded_settings(out)["hidden_size"] == config.model.hidden_size
    main(read_arguments(["average", stopped.out, str(tmp_path / "early.pt"), "--length", "0.2", "--step", "2"]))
    assert [record_of(file)["step"] for file in (out, tmp_path / "early.pt")] == [4, 2]
    early = combine(tmp_path / "stopped", 0.2, step=2)
    assert any(not torch.equal(early[name], tensor) for name, tensor in load_state(out).items())


def test_what_is_missing_is_said(tmp_path, training_config):
    with pytest.raises(FileNotFoundError, match=r"set train\.average_every"):
        combine(tmp_path, 0.1)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: name that of a training"):
        combine(tmp_path / "nowhere", 0.1)
    config = changed(training_config("class-to-image"), {"train.average_every": 2})
    TASKS["class-to-image"].train(config)
    with pytest.raises(UserError, match="no averages of step 3; the last before it are of step 2"):
        combine(type(tmp_path)(config.out), 0.1, step=3)


@pytest.mark.slow
def test_sharded_training_keeps_the_same_averages(training_config, tmp_path):
    config = changed(training_config("class-to-image"), {"train.average_every": 4})
    TASKS["class-to-image"].train(config)
    sharded = changed(config, {"out": str(tmp_path / "sharded"), "train.parallel": FSDP.values[0]})
    status, told = run_script(sharded, processes=2, task="class-to-image")
    assert status == 0, told[-3000:]
    one, two = (combine(type(tmp_path)(each.out), 0.1) for each in (config, sharded))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-3, rtol=2e-3)
