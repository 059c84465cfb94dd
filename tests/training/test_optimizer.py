"""AdamW and Muon: which parameters each gets, exact resume, sharding."""

import pytest
import torch
from conftest import (
    FSDP,
    assert_resumes,
    run_script,
    short_training,
    state,
    stats,
    tiny_dit,
    tiny_hunyuan,
    tiny_latte,
    tiny_latte_t2v,
)

from skipdit.class_to_image.sample import ModelConfig
from skipdit.class_to_image.train import Config, train
from skipdit.config import changed
from skipdit.data.settings import ImageData
from skipdit.training.optimizer import Float32Muon, hidden_matrices, make_optimizers

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@pytest.fixture
def config(tmp_path, vae_folder, image_folder):
    model = ModelConfig(patch_size=2, hidden_size=32, depth=4, num_heads=2, num_classes=3, skip=True)
    data = ImageData(path=str(image_folder), image_size=8)
    training = short_training(optimizer="muon", muon_lr=2e-3)
    return Config(out=str(tmp_path / "run"), vae=str(vae_folder), model=model, data=data, train=training)


@pytest.mark.parametrize("make", [tiny_dit, tiny_latte, tiny_latte_t2v, tiny_hunyuan])
def test_matrices_are_those_of_blocks_and_skips(make):
    model = make()
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = {names[id(p)] for p in hidden_matrices(model)}
    assert any(name.startswith("skips.") for name in chosen)
    assert any("mlp" in name or ".ff." in name for name in chosen) and any("attn" in name for name in chosen)
    inside = ("blocks.", "skips.", "transformer_blocks.", "temporal_transformer_blocks.")
    assert all(name.startswith(inside) for name in chosen)
    assert all(model.get_parameter(name).ndim == 2 for name in chosen)
    left = sum(p.numel() for name, p in model.named_parameters() if name.startswith(inside) and name not in chosen)
    assert left < 0.15 * sum(model.get_parameter(name).numel() for name in chosen)  # norms, biases, tables


@needs_muon
def test_every_parameter_has_one_optimizer():
    model = tiny_dit()
    for kind, number in (("adamw", 1), ("muon", 2)):
        optimizers = make_optimizers(model, kind, lr=1e-3)
        given = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        assert len(optimizers) == number and sorted(given) == sorted(map(id, model.parameters()))


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match=r"train\.optimizer is 'lion'; known: adamw, muon"):
        make_optimizers(tiny_dit(), "lion", lr=1e-3)


def test_a_torch_without_muon_is_told(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=r"train.optimizer=muon needs torch 2\.9 or newer; this is \d"):
        make_optimizers(tiny_dit(), "muon", lr=1e-3)


@pytest.mark.slow
@needs_muon
@pytest.mark.parametrize("freeze", [False, True])
def test_muon_resumes_bit_equal(config, tmp_path, freeze):
    config = changed(config, {"train.freeze": freeze, "train.warmup": 3})
    assert_resumes(config, train, tmp_path)


@needs_muon
def test_updates_of_muon_are_orthogonal_and_as_large_as_those_of_adamw():
    model = tiny_dit()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in make_optimizers(model, "muon", lr=1e-3, muon_lr=2e-3):
        optimizer.step()
    updates = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    muon, adamw = updates["blocks.1.mlp.fc1.weight"] / 2e-3, updates["x_embedder.proj.weight"] / 1e-3
    assert muon.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)
    values = torch.linalg.svdvals(muon)
    assert values.min() > 0.4 * values.max()
    torch.testing.assert_close(adamw.abs(), torch.ones_like(adamw), rtol=0, atol=1e-3)


@needs_muon
@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_muon_in_float32_is_muon(shape):
    weights = []
    for kind in (torch.optim.Muon, Float32Muon):
        weight = torch.nn.Parameter(torch.zeros(shape))
        optimizer = kind([weight], lr=1.0, weight_decay=0.1)
        for seed in range(3):
            weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        weights.append(weight.detach())
    theirs, ours = weights
    difference = (ours - theirs).norm() / theirs.norm()
    assert 0 < difference < 0.02  # above 0: the iteration was ours, and torch has its own back
    assert torch.optim._muon._zeropower_via_newtonschulz.__module__ == "torch.optim._muon"


@needs_muon
@pytest.mark.parametrize(("fast", "kind"), [(True, "Muon"), (False, "Float32Muon")])
def test_muon_is_in_float32_where_bfloat16_is_slow(monkeypatch, fast, kind):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    assert type(make_optimizers(tiny_dit(), "muon", lr=1e-3)[-1]).__name__ == kind


@pytest.mark.slow
@needs_muon
@pytest.mark.parametrize("parallel", ["ddp", FSDP])
def test_two_processes_equal_one(config, tmp_path, parallel):
    train(config)
    alone, whole = stats(config), state(config)["ema"]
    config = changed(config, {"out": str(tmp_path / parallel), "train.parallel": parallel})
    status, told = run_script(config, "train.steps=2", processes=2)
    assert status == 0, told[-3000:]
    train(config)
    for a, b in zip(alone, stats(config), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    for name, tensor in state(config)["ema"].items():
        # where the iteration is in bfloat16, rounding of single entries grows
        assert (tensor - whole[name]).abs().mean() < 1e-4, name
