"""What every task's trainer holds to: it can be killed, spread, and run in bf16; stage 1 trains the skips alone."""

import pytest
import torch
from conftest import FSDP, assert_equal, kill_at, run_script, state, stats

from skipdit.config import changed
from skipdit.tasks import TASKS

pytestmark = pytest.mark.slow
ROUNDING = {  # of weights, by the order in which gradients are added up: (atol, rtol)
    "class-to-image": (2e-4, 1e-3),
    "class-to-video": (2e-4, 1e-3),
    "text-to-video": (2e-3, 1e-2),
    "text-to-image": (2e-3, 1e-2),
}


@pytest.fixture(params=TASKS)
def task(request) -> str:
    return request.param


@pytest.fixture
def config(task, training_config):
    """Four steps of four samples, a checkpoint every other step."""
    return training_config(task)


@pytest.fixture
def train(task):
    return TASKS[task].train


def test_killed_run_continues_bit_equal(config, train, task, tmp_path):
    """SIGKILL at three moments, saving included (every step saves), then the same command to the end."""
    config = changed(config, {"train.steps": 24, "train.save_every": 1, "train.keep": 2})
    train(config)
    whole = state(config)
    config = changed(config, {"out": str(tmp_path / "killed")})
    kill_at(config, (3, 8, 13), task=task)
    assert run_script(config, task=task)[0] == 0
    assert_equal(whole | {"args": None}, state(config) | {"args": None})
    assert [line["step"] for line in stats(config)] == list(range(1, 25))


@pytest.mark.parametrize("parallel", ["ddp", FSDP])
def test_two_processes_equal_one(config, train, task, tmp_path, parallel):
    """Same data, noise and losses; gradients differ by the order of summation only. Then one process takes over."""
    train(config)
    alone, whole = stats(config), state(config)["ema"]
    config = changed(config, {"out": str(tmp_path / parallel), "train.parallel": parallel, "train.sample_every": 2})
    status, told = run_script(config, "train.steps=2", processes=2, task=task)
    assert status == 0, told[-3000:]
    assert list((tmp_path / parallel / "samples").glob("0000002.*"))
    config = changed(config, {"train.sample_every": 0})
    train(config)
    atol, rtol = ROUNDING[task]
    for a, b in zip(alone, stats(config), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for name, tensor in state(config)["ema"].items():
        torch.testing.assert_close(tensor, whole[name], atol=atol, rtol=rtol)


@pytest.mark.parametrize("parallel", ["ddp", FSDP])
def test_mixed_precision(config, train, task, tmp_path, parallel):
    """bf16, the default: near float32, and not equal to it."""
    train(config)
    exact, config = stats(config), changed(config, {"out": str(tmp_path / "bf16"), "train.precision": "bf16"})
    config = changed(config, {"train.parallel": parallel})
    if parallel == "ddp":
        train(config)
    else:
        status, told = run_script(config, processes=2, task=task)
        assert status == 0, told[-3000:]
    assert stats(config)[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.02)
    assert stats(config)[-1]["loss"] != exact[-1]["loss"]


def test_stage_1_trains_the_skips_alone(config, train, tmp_path):
    """Its first loss is the plain model's with residual skips; with the paper's, drawn at random, it is not."""
    plain = changed(config, {"out": str(tmp_path / "plain"), "model.skip": False})
    train(plain)
    before, losses = state(plain)["ema"], {}
    stage_1 = changed(config, {"init": plain.out, "train.freeze": True, "model.skip": True})
    for fuse in ("replace", "residual"):
        run = changed(stage_1, {"out": str(tmp_path / fuse), "model.fuse": fuse})
        train(run)
        losses[fuse] = stats(run)[0]["loss"]
        after = state(run)
        assert all(torch.equal(after["model"][name], tensor) for name, tensor in before.items())
        new = after["model"].keys() - before.keys()
        assert new and all("skip" in name and after["ema"][name].ne(after["model"][name]).any() for name in new)
        assert {key.split(".")[0] for key in after["opt"]["state"]} == {"skips"}
    again = changed(plain, {"out": str(tmp_path / "again"), "init": plain.out})
    train(again)
    assert losses["residual"] == pytest.approx(stats(again)[0]["loss"], rel=1e-5)
    assert losses["replace"] != pytest.approx(losses["residual"], rel=1e-4)
