"""Representation alignment: features of a tiny image encoder beside latents, and trainings towards them."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
from conftest import FSDP, assert_equal, assert_resumes, run_script, skipdit_command, state, stats, tiny_dit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch.nn.functional import cosine_similarity, interpolate
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from skipdit.checkpoints.loading import load_weights
from skipdit.class_to_image.train import train
from skipdit.config import ConfigError, changed
from skipdit.data.features import FeatureInfo, WithFeatures
from skipdit.data.images import ImageFolder
from skipdit.data.latents import Latents
from skipdit.data.stream import Stream, collate
from skipdit.encoders.image import load_image_encoder
from skipdit.sampling.class_conditional import generate
from skipdit.tasks import TASKS
from skipdit.training.align import Alignment
from skipdit.training.latents import clean_latents
from skipdit.training.settings import TrainConfig
from skipdit.utils.errors import BrokenSample
from skipdit.utils.seeding import generators

DIM = 24


def timm_vit(folder: Path, seed: int = 0, **settings) -> torch.nn.Module:
    torch.manual_seed(seed)
    given = {"img_size": 16, "patch_size": 4, "embed_dim": DIM, "depth": 1, "num_heads": 2} | settings
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **given).eval()
    save_for_hf(model, folder, model_args=given, safe_serialization=True)
    return model


def transformers_vit(folder: Path) -> torch.nn.Module:
    """A DINOv2 that was trained on 28 pixels, and whose processor crops to 16."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=DIM, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=4)
    model = Dinov2Model(config).eval()
    model.save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return model


@pytest.fixture
def vit(tmp_path) -> Path:
    timm_vit(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def encode(tmp_path, image_folder, vae_folder, vit, monkeypatch, capsys):
    """`encode(*arguments)` runs the program, with the features of a tiny encoder into tmp_path/latents."""

    def run(*arguments: str, features: Path | None = vit, size: int = 8, out: str = "latents") -> str:
        command = ["encode", "--data", "image_folder", "--path", str(image_folder), "--image-size", str(size)]
        command += ["--vae", str(vae_folder), "--out", str(tmp_path / out), "--shard", "10", "--workers", "0"]
        command += ["--features", str(features)] if features else []
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        skipdit_command("encode")()
        return capsys.readouterr().out

    return run


@pytest.fixture
def config(training_config, tmp_path, encode):
    encode()
    config = training_config("class-to-image")
    return changed(config, {"data.kind": "latents", "data.path": str(tmp_path / "latents"), "train.align": 0.5})


# Features


@pytest.mark.parametrize("make", [timm_vit, transformers_vit])
def test_features_are_the_patch_tokens_of_the_images(tmp_path, image_folder, encode, make):
    """Of those that can be read, resized and normalised as the encoder wants them, without its other tokens."""
    model = make(tmp_path / "encoder")
    said = encode(features=tmp_path / "encoder")
    assert f"features of {tmp_path}/encoder: 4x4 tokens of {DIM} per image" in said
    info = FeatureInfo.read(tmp_path / "latents/latents-00000.safetensors")
    assert (info.encoder, info.image_size, info.size) == (str(tmp_path / "encoder"), 8, 16)
    assert (info.grid, info.dim, info.dtype) == ((4, 4), DIM, "float16")
    dataset = WithFeatures(Latents(tmp_path / "latents"))
    images, kept = ImageFolder(image_folder, 8), []
    for index in range(24):
        with suppress(BrokenSample):
            kept.append(images[index])
    assert len(dataset) == len(kept) == 22
    mean, std = (torch.tensor(x)[:, None, None] for x in (info.mean, info.std))
    for index, sample in enumerate(kept):
        assert dataset[index]["label"] == sample["label"]
        pixels = interpolate(sample["image"][None] / 255, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            x = (pixels - mean) / std
            tokens = model.forward_features(x) if make is timm_vit else model(x).last_hidden_state
        expected = tokens[0, 1:].unflatten(0, (4, 4))
        assert dataset[index]["features"].dtype == torch.float16
        torch.testing.assert_close(dataset[index]["features"].float(), expected, atol=2e-3, rtol=2e-3)


def test_the_encoder_sees_images_of_another_size(tmp_path, encode):
    encode("--features-size", "8")
    info = FeatureInfo.read(tmp_path / "latents/latents-00000.safetensors")
    assert (info.size, info.grid) == (8, (2, 2))
    with pytest.raises(ValueError, match="--features-size 9 is not a multiple of 4, the side of a patch"):
        load_image_encoder(str(tmp_path / "vit"), 9)


def test_a_size_needs_an_encoder(encode, capsys):
    with pytest.raises(SystemExit, match="2"):
        encode("--features-size", "8", features=None)
    assert "--features-size needs --features" in capsys.readouterr().err


def test_features_join_latents_and_an_interrupted_run_goes_on(tmp_path, encode):
    encode(features=None)
    folder = tmp_path / "latents"
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    encode()
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    first = folder / "features/features-00000.safetensors"
    kept = load_file(first)
    first.unlink()
    with pytest.raises(ValueError, match=r"features-00000\.safetensors is not there.* --features"):
        WithFeatures(Latents(folder))
    times = {path: path.stat().st_mtime_ns for path in first.parent.iterdir()}
    encode()
    assert torch.equal(load_file(first)["features"], kept["features"])
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_features_of_another_encoder_are_not_mixed_in(tmp_path, encode, capsys):
    encode()
    timm_vit(tmp_path / "other", seed=1)
    for arguments, options in (((), {"features": tmp_path / "other"}), (("--features-size", "8"), {})):
        with pytest.raises(SystemExit):
            encode(*arguments, **options)
        told = capsys.readouterr().err
        assert "features-00000.safetensors" in told and f"remove {tmp_path}/latents/features" in told


@pytest.mark.parametrize("kind", ["pictures", "videos"])
def test_features_are_of_images_with_classes(tmp_path, vae_folder, vit, kind, monkeypatch, capsys):
    command = f"encode --data {kind} --path {tmp_path} --out {tmp_path}/out --vae {vae_folder} --features {vit}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit):
        skipdit_command("encode")()
    assert f"--features are of images with classes, and --data is {kind}" in capsys.readouterr().err


def test_an_encoder_that_is_none_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image encoder .*nowhere"):
        load_image_encoder(str(tmp_path / "nowhere"))
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=0), tmp_path / "cnn", safe_serialization=True)
    with pytest.raises(ValueError, match=r"cnn, which should be a ViT: ResNet is no ViT"):
        load_image_encoder(str(tmp_path / "cnn"))
    timm_vit(tmp_path / "vit")
    weights = load_file(tmp_path / "vit/model.safetensors")
    weights.pop("blocks.0.attn.qkv.weight")
    save_file(weights, tmp_path / "vit/model.safetensors")
    with pytest.raises(ValueError, match=r"cannot take features of .*vit.*blocks\.0\.attn\.qkv\.weight"):
        load_image_encoder(str(tmp_path / "vit"))


def test_features_of_other_latents_are_refused(tmp_path, encode):
    """A folder of features that was copied in, and a shard that was cut off."""
    encode()
    features = tmp_path / "latents/features"
    first = features / "features-00000.safetensors"
    with safe_open(first, framework="pt") as file:
        metadata = file.metadata()
    part = json.loads(metadata["part"])
    whole = first.read_bytes()
    save_file(load_file(first), first, metadata=metadata | {"part": json.dumps(part | {"source": "image_folder x"})})
    with pytest.raises(ValueError, match=rf"features-00000\.safetensors is of other images .* remove {features}"):
        WithFeatures(Latents(tmp_path / "latents"))
    first.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"features-00000\.safetensors holds no features .*remove it"):
        WithFeatures(Latents(tmp_path / "latents"))


def test_a_flipped_image_has_mirrored_features():
    features = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    batch = {"mean": torch.randn(2, 2, 4, 6, 6), "features": features}
    clean_latents(batch, torch.tensor([False, True]), "mean", None, None)
    assert torch.equal(batch["features"], torch.stack([features[0], features[1].flip(1)]))


# Training


def test_tokens_are_those_after_the_block(config, tmp_path):
    dataset, model = WithFeatures(Latents(tmp_path / "latents")), tiny_dit(num_classes=3)
    assert Alignment(model, dataset.features, config.train).block == 2  # the middle of four
    assert Alignment(tiny_dit(num_classes=3, skip=False), dataset.features, config.train).block == 1
    align = Alignment(model, dataset.features, changed(config.train, {"align_block": 3}))
    kept, given = [], (torch.randn(2, 4, 4, 4), torch.tensor([3, 500]), torch.tensor([0, 1]))
    hook = model.blocks[2].register_forward_hook(lambda module, inputs, output: kept.append(output))
    expected = model(*given)
    hook.remove()
    with align.watching(model):
        assert torch.equal(model(*given), expected)
    features = torch.randn(2, 2, 2, DIM)  # of the model's grid
    similarity = cosine_similarity(align.projection(kept[0]), features.flatten(1, 2), dim=-1)
    losses = align.losses(features)
    torch.testing.assert_close(losses, -similarity.mean(1))
    with align.watching(model):
        model(*given)
    finer = torch.randn(2, 4, 4, DIM)  # to the model's 2x2 tokens, channel by channel
    channels = [interpolate(finer[None, ..., i], (2, 2), mode="bilinear", antialias=True)[0] for i in range(DIM)]
    similarity = cosine_similarity(align.projection(kept[0]), torch.stack(channels, -1).flatten(1, 2), dim=-1)
    torch.testing.assert_close(align.losses(finer), -similarity.mean(1))
    widths = [(layer.in_features, layer.out_features) for layer in align.projection if hasattr(layer, "in_features")]
    assert widths == [(32, 2048), (2048, 2048), (2048, DIM)]


@pytest.mark.slow
def test_training_logs_both_losses_and_saves_the_projection(config, tmp_path):
    train(config)
    for line in stats(config):
        assert -1 <= line["align_loss"] <= 1 and line["loss"] > 0
    aligned = state(config)
    assert set(aligned["align"]) == {"encoder", "projection", "opt"}
    start = Alignment(tiny_dit(num_classes=3), WithFeatures(Latents(config.data.path)).features, config.train)
    for name, tensor in start.projection.state_dict().items():
        assert not torch.equal(tensor, aligned["align"]["projection"][name])
    config = changed(config, {"out": str(tmp_path / "plain"), "train.align": 0.0})
    train(config)
    plain = state(config)
    assert aligned["model"].keys() == plain["model"].keys() and "align" not in plain
    assert aligned["opt"]["state"].keys() == plain["opt"]["state"].keys()
    assert not torch.equal(aligned["model"]["blocks.0.attn.qkv.weight"], plain["model"]["blocks.0.attn.qkv.weight"])
    assert "align_loss" not in stats(config)[0]


@pytest.mark.slow
def test_without_a_weight_features_change_nothing(config, tmp_path, encode):
    config = changed(config, {"train.align": 0.0})
    train(config)
    encode(features=None, out="bare")
    bare = changed(config, {"out": str(tmp_path / "bare-run"), "data.path": str(tmp_path / "bare")})
    train(bare)
    assert_equal(state(config) | {"args": None}, state(bare) | {"args": None})


@pytest.mark.slow
def test_the_aligned_loss_falls(config):
    config = changed(config, {"train.steps": 16, "train.lr": 3e-3, "train.save_every": 0})
    train(config)
    losses = [line["align_loss"] for line in stats(config)]
    assert sum(losses[-4:]) / 4 < losses[0] - 0.4


@pytest.mark.slow
def test_resume_is_bit_equal(config, tmp_path):
    assert_resumes(config, train, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"micro_batch_size": 1}, {"gradient_checkpointing": True}, {"compile": True, "micro_batch_size": 2}]
)
def test_saving_memory_or_time_changes_no_gradient(config, tmp_path, change, traced):
    torch.save({"ema": tiny_dit(num_classes=3).state_dict()}, tmp_path / "random.pt")
    config = changed(config, {"init": str(tmp_path / "random.pt"), "train.steps": 2})
    train(config)
    reference, lines = state(config), stats(config)
    config = changed(
        config, {"out": str(tmp_path / "other")} | {f"train.{key}": value for key, value in change.items()}
    )
    train(config)
    for before, after in zip(lines, stats(config), strict=True):
        for key in ("loss", "align_loss", "grad_norm"):
            assert after[key] == pytest.approx(before[key], rel=1e-4)
    for name, moments in state(config)["opt"]["state"].items():
        expected = reference["opt"]["state"][name]["exp_avg"]
        torch.testing.assert_close(moments["exp_avg"], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", FSDP])
def test_two_processes_equal_one(config, tmp_path, parallel):
    """And one process takes over."""
    config = changed(config, {"train.grad_clip": 0.5})
    train(config)
    alone, whole = stats(config), state(config)
    config = changed(config, {"out": str(tmp_path / parallel), "train.parallel": parallel})
    status, told = run_script(config, "train.steps=2", "train.micro_batch_size=1", processes=2)
    assert status == 0, told[-3000:]
    train(config)
    for before, after in zip(alone, stats(config), strict=True):
        for key in ("loss", "align_loss", "grad_norm"):
            assert after[key] == pytest.approx(before[key], rel=1e-3)
    mine = state(config)
    for one, other in ((mine["align"]["projection"], whole["align"]["projection"]), (mine["ema"], whole["ema"])):
        for name, tensor in other.items():
            torch.testing.assert_close(one[name], tensor, atol=2e-4, rtol=1e-3)


def test_a_broken_row_has_no_weight_in_either_loss(config, tmp_path):
    """Blank samples have features of the others' shape."""
    dataset = WithFeatures(Latents(tmp_path / "latents"))
    stream = Stream(dataset, 0)
    blank = stream.blank(0)
    assert blank["features"].shape == (4, 4, DIM) and not blank["features"].any()
    batch = collate([stream[0], {**blank, "index": 1, "weight": 0.0, "broken": "x"}])
    align, model = Alignment(tiny_dit(num_classes=3), dataset.features, config.train), tiny_dit(num_classes=3)
    with align.watching(model):
        model(torch.randn(2, 4, 4, 4), torch.tensor([3, 500]), torch.tensor([0, 1]))
    losses = align.losses(batch["features"])
    assert losses[1] == 0 and losses[0] != 0


@pytest.mark.slow
def test_exported_weights_are_those_of_any_model(config, tmp_path):
    """They hold no projection, sample, and cache."""
    train(config)
    skipdit_command("weights")(["export", config.out, str(tmp_path / "model.pt")])
    exported = torch.load(tmp_path / "model.pt", weights_only=True)
    assert exported["ema"].keys() == state(config)["ema"].keys()
    model = tiny_dit(num_classes=3)
    assert load_weights(model, tmp_path / "model.pt") == []
    labels, noise = torch.tensor([0, 1]), generators(0, range(2), "cpu")
    latents = generate(model.eval(), labels, noise, steps=6, sampler="ddim", cache="N2-1000-0")
    assert latents.shape == (2, 4, 4, 4) and latents.isfinite().all()


# What is refused


def test_trainings_without_features_are_refused(config, image_folder, tmp_path):
    pixels = changed(config, {"data.kind": "image_folder", "data.path": str(image_folder)})
    with pytest.raises(ValueError, match=r"train\.align needs data\.kind=latents.* --features"):
        train(pixels)
    with pytest.raises(ConfigError, match=r"align is 0\.5, and freeze"):
        changed(config, {"train.freeze": True})
    with pytest.raises(ValueError, match=r"train\.align_block is 5; the model has 4 blocks"):
        train(changed(config, {"train.align_block": 5}))


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(TASKS) - {"class-to-image"}))
def test_other_tasks_refuse(task, training_config):
    config = changed(training_config(task), {"train.align": 0.5})
    with pytest.raises(ValueError, match=r"train\.align .* class-to-image .*set train\.align=0"):
        TASKS[task].train(config)
    assert not Path(config.out).exists()


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_features(config, tmp_path, encode):
    config = changed(config, {"train.steps": 2})
    train(config)
    timm_vit(tmp_path / "other", seed=1)
    for path in (tmp_path / "latents/features").iterdir():
        path.unlink()
    encode(features=tmp_path / "other")
    with pytest.raises(ValueError, match=r"^the run began with features of another encoder .* another folder"):
        train(changed(config, {"train.steps": 4}))


@pytest.mark.slow
def test_the_weight_is_part_of_the_run(config):
    assert TrainConfig().align == 0
    train(config)
    with pytest.raises(ValueError, match=r"train\.align: 0\.5 there, 1\.0 now"):
        train(changed(config, {"train.align": 1.0}))
