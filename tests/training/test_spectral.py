"""Spectral constraints on the long skips: the numbers against torch's SVD, and what they do to a training run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FSDP, assert_equal, short_training, state, stats, tiny_dit, tiny_latte_t2v

from skipdit.class_to_image.sample import ModelConfig
from skipdit.class_to_image.train import Config, train
from skipdit.config import changed, to_yaml
from skipdit.data.settings import ImageData
from skipdit.training import loop as trainer
from skipdit.training.spectral import SQUARINGS, SpectralLimit, largest_singular, skip_linears

CAP = 1.5
ROUNDING = 1e-5  # by which float32 may miss the cap, relative


@pytest.fixture
def config(tmp_path, image_folder, vae_folder) -> Config:
    return Config(
        out=str(tmp_path / "run"),
        vae=str(vae_folder),
        model=ModelConfig(patch_size=2, hidden_size=32, depth=4, num_heads=2, num_classes=3, skip=True),
        data=ImageData(path=str(image_folder), image_size=8),
        train=short_training(spectral_weight=0.5, spectral_cap=CAP),
    )


def norms(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Spectral norms of the skips' linears in a checkpoint, by SVD."""
    found = [w for name, w in weights.items() if name.startswith("skip_linears.") and name.endswith(".linear.weight")]
    assert len(found) == 2
    return torch.stack([torch.linalg.matrix_norm(w, 2) for w in found])


# The numbers


def matrices(kind: str) -> torch.Tensor:
    """(5, 24, 48)"""
    normal = torch.randn(5, 24, 48)
    if kind == "normal":
        return normal
    if kind == "tiny":
        return normal * 1e-6
    if kind == "huge":
        return normal * 1e6
    if kind == "rank one":
        return normal[:, :, :1] * normal[:, :1, :]
    left, values, right = torch.linalg.svd(normal, full_matrices=False)
    values[:, :3] = values[:, :1]  # the largest three times
    return left @ values.diag_embed() @ right


@pytest.mark.parametrize("kind", ["normal", "tiny", "huge", "rank one", "tie"])
def test_largest_singular_value_is_that_of_the_svd(kind):
    weights = matrices(kind)
    exact = torch.linalg.svdvals(weights)[:, 0]
    sigma, bound, u, v = largest_singular(weights)
    torch.testing.assert_close(sigma, exact, rtol=1e-4, atol=0)
    assert (bound >= exact * (1 - ROUNDING)).all()
    assert (bound <= exact * 24 ** (1 / 2 ** (SQUARINGS + 2)) * (1 + ROUNDING)).all()
    torch.testing.assert_close((weights @ v[:, :, None])[..., 0], sigma[:, None] * u, rtol=1e-4, atol=0)
    torch.testing.assert_close((u * u).sum(1), torch.ones(5))
    torch.testing.assert_close((v * v).sum(1), torch.ones(5))


def test_skips_that_start_at_zero_have_none():
    sigma, bound, u, v = largest_singular(torch.zeros(2, 4, 8))
    assert (sigma == 0).all() and (bound < 1e-20).all() and (u == 0).all() and (v == 0).all()


def test_penalty_gradient_is_that_of_the_svd():
    model = tiny_dit()
    weights = [linear.weight for linear in skip_linears(model)]
    penalty = sum(torch.linalg.svdvals(weight)[0].square() for weight in weights) * 0.3 / 2
    expected = torch.autograd.grad(penalty, weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)  # what the loss left
    SpectralLimit(model, "penalty", weight=0.3, cap=1).add_gradients()
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, 1 + gradient, atol=1e-5, rtol=1e-4)


def test_projection_scales_what_is_above_the_cap_only():
    model = tiny_dit()
    first, second = (linear.weight for linear in skip_linears(model))
    before = first.detach().clone(), second.detach().clone()
    with torch.no_grad():
        second *= 0.5
    cap = 0.6 * torch.linalg.matrix_norm(first, 2).item()
    SpectralLimit(model, "cap", weight=1, cap=cap).project()
    ratio = first / before[0]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    assert 0.99 * cap < torch.linalg.matrix_norm(first, 2) <= cap * (1 + ROUNDING)
    assert torch.equal(second, 0.5 * before[1])


def test_skips_that_are_added_are_found_by_their_own_name():
    assert [linear.out_features for linear in skip_linears(tiny_latte_t2v(fuse="residual"))] == [32, 32]


# Training


def run(config, kind: str, out: str, **changes) -> dict:
    """Train a config under a constraint into a sibling of its folder. Returns the last checkpoint."""
    changes = {f"train.{name}": value for name, value in changes.items()}
    config = changed(beside(config, out), {"train.spectral": kind} | changes)
    train(config)
    return state(config)


def beside(config, out: str):
    """The config of a sibling of its folder."""
    return changed(config, {"out": str(Path(config.out).parent / out)})


@pytest.mark.slow
def test_cap_holds_for_weights_and_average_after_training(config):
    free = run(config, "none", "free", steps=20)
    capped = run(config, "cap", "capped", steps=20)
    assert (norms(free["model"]) > 1.2 * CAP).all()
    for part in ("model", "ema"):
        assert (norms(capped[part]) <= CAP * (1 + ROUNDING)).all()
        assert (norms(capped[part]) > 0.9 * CAP).any()  # at work, not merely met
    sigmas = [line["skip_sigma"] for line in stats(beside(config, "capped"))]
    assert sigmas[-1] == pytest.approx(norms(capped["model"]).max().item(), rel=1e-4)
    assert all(sigma <= CAP * (1 + ROUNDING) for sigma in sigmas)


@pytest.mark.slow
def test_penalty_lowers_the_norms(config):
    free = run(config, "none", "free", steps=20)
    held = run(config, "penalty", "held", steps=20)
    assert (norms(held["model"]) < 0.9 * norms(free["model"])).all()
    assert (norms(held["ema"]) < 0.95 * norms(free["ema"])).all()


@pytest.mark.slow
def test_without_a_constraint_nothing_is_computed(config, monkeypatch):
    """And one that never acts changes no bit."""
    idle = run(config, "cap", "idle", spectral_cap=1e6)
    monkeypatch.setattr(trainer, "SpectralLimit", None)
    free = run(config, "none", "free")
    for part in ("model", "ema", "opt"):
        assert_equal(free[part], idle[part])
    assert "skip_sigma" not in stats(beside(config, "free"))[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["penalty", "cap"])
def test_resume_is_bit_equal(config, kind):
    whole = run(config, kind, "whole")
    run(config, kind, "resumed", steps=2)
    assert_equal(whole | {"args": None}, run(config, kind, "resumed", steps=4) | {"args": None})
    assert [line["step"] for line in stats(beside(config, "resumed"))] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["penalty", "cap"])
def test_accumulation_counts_the_constraint_once(config, kind):
    run(config, kind, "whole")
    run(config, kind, "parts", micro_batch_size=1)
    whole, parts = (stats(beside(config, out)) for out in ("whole", "parts"))
    for key in ("grad_norm", "skip_sigma"):
        assert [line[key] for line in parts] == pytest.approx([line[key] for line in whole], rel=1e-3)


TRAIN_ALL = """
import sys
from accelerate import Accelerator
from skipdit.class_to_image.train import Config, train
from skipdit.config import load_config
Accelerator.end_training = lambda self: None  # which would end the processes' group, and another run follows
for file in sys.argv[1:]:
    train(load_config(Config, file))
"""


@pytest.mark.slow
def test_two_processes_equal_one(config, tmp_path):
    """All of them in one launch, since that is what takes long."""
    (tmp_path / "train_all.py").write_text(TRAIN_ALL)
    cannot_shard = FSDP.marks[0].args[0]
    ways = [("ddp", "penalty"), ("ddp", "cap"), *([] if cannot_shard else [("fsdp", "penalty"), ("fsdp", "cap")])]
    expected = {}
    for kind in ("penalty", "cap"):
        run(config, kind, kind)
        expected[kind] = stats(beside(config, kind))
    for parallel, kind in ways:
        way = changed(beside(config, f"{parallel}-{kind}"), {"train.parallel": parallel, "train.spectral": kind})
        (tmp_path / f"{parallel}-{kind}.yaml").write_text(to_yaml(way))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_all.py"]
    command += [f"{parallel}-{kind}.yaml" for parallel, kind in ways]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for parallel, kind in ways:
        lines = stats(beside(config, f"{parallel}-{kind}"))
        for key in ("loss", "grad_norm", "skip_sigma"):
            wanted = [line[key] for line in expected[kind]]
            assert [line[key] for line in lines] == pytest.approx(wanted, rel=1e-3), (parallel, kind, key)


def test_stage_one_is_held_too(config):
    """Skips alone are trained, and stay below the cap."""
    done = run(config, "cap", "stage1", freeze=True)
    assert {key.split(".")[0] for key in done["opt"]["state"]} == {"skips"}
    assert (norms(done["model"]) <= CAP * (1 + ROUNDING)).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spectral": "clip"}, "train.spectral is 'clip'; it is none, penalty, cap"),
        ({"spectral": "cap", "spectral_cap": 0.0}, "train.spectral_cap is 0.0; it must be positive"),
        ({"spectral": "penalty", "spectral_weight": float("nan")}, "spectral_weight is nan; it should be 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(config, changes, said):
    with pytest.raises(ValueError, match=said):
        train(changed(config, {f"train.{name}": value for name, value in changes.items()}))
    assert not Path(config.out).exists()


def test_models_without_trained_skips_are_refused(config):
    config = changed(config, {"train.spectral": "cap", "model.skip": False})
    with pytest.raises(ValueError, match=r"the model has none: set model\.skip=true"):
        train(config)
    with pytest.raises(ValueError, match="here they are frozen"):
        SpectralLimit(tiny_dit().requires_grad_(False), "cap", 1, 1)
