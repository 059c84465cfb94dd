"""A sampler takes from the folder of a training what it is not told: the model's shape, sizes, the autoencoder.

The trainers' tests do the same for the other tasks.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import short_training

from skipdit.checkpoints.convert import export
from skipdit.checkpoints.files import load_checkpoint
from skipdit.checkpoints.records import read_metadata
from skipdit.class_to_image.sample import Config, ModelConfig, sample
from skipdit.class_to_image.train import Config as TrainingConfig
from skipdit.class_to_image.train import train
from skipdit.config import ConfigError, changed, load_config
from skipdit.data.settings import ImageData


@pytest.fixture
def training(tmp_path, vae_folder, image_folder) -> TrainingConfig:
    config = TrainingConfig(
        out=str(tmp_path / "run"),
        vae=str(vae_folder),
        model=ModelConfig(patch_size=2, hidden_size=32, depth=4, num_heads=2, num_classes=3, fuse="residual"),
        data=ImageData(path=str(image_folder), image_size=8),
        train=changed(short_training(), {"steps": 1}),
    )
    train(config)
    return config


@pytest.mark.parametrize("weights", ["run", "run/checkpoints", "run/checkpoints/0000001.pt"])
@pytest.mark.slow
def test_nothing_but_the_run_is_said(training, tmp_path, weights):
    config = load_config(Config, None, [f"weights={tmp_path / weights}", "num_samples=1", "steps=2"])
    assert (config.model, config.image_size, config.vae) == (training.model, 8, training.vae)
    sample(changed(config, {"out": str(tmp_path / "out")}))
    assert (tmp_path / "out/000000.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mine.safetensors", "mine.pt", "0000001.pt"])
def test_a_file_without_its_folder_says_as_much(training, tmp_path, name):
    file = tmp_path / "elsewhere" / name
    if name == "0000001.pt":
        file.parent.mkdir()
        shutil.copy(Path(training.out, "checkpoints", name), file)
    else:
        export(Path(training.out), file, torch.float32)
    config = load_config(Config, None, [f"weights={file}", "num_samples=1", "steps=2"])
    assert (config.model, config.image_size, config.vae) == (training.model, 8, training.vae)
    sample(changed(config, {"out": str(tmp_path / "out")}))
    sample(load_config(Config, None, [f"weights={training.out}", "num_samples=1", "steps=2", f"out={tmp_path}/other"]))
    assert (tmp_path / "out/000000.png").read_bytes() == (tmp_path / "other/000000.png").read_bytes()


def test_a_file_beside_settings_of_a_model_is_not_asked(training, tmp_path):
    """What worked before files recorded anything works on."""
    export(Path(training.out), tmp_path / "mine.pt", torch.float32)
    settings = ["model.hidden_size=32", "model.depth=4", f"weights={tmp_path / 'mine.pt'}"]
    assert load_config(Config, None, settings) == Config(
        weights=str(tmp_path / "mine.pt"), model=ModelConfig(hidden_size=32, depth=4)
    )


def test_safetensors_are_asked_without_torch(training, tmp_path):
    """So that mistakes are answered at once."""
    export(Path(training.out), tmp_path / "mine.safetensors", torch.float32)
    program = """
import sys
from skipdit.config import load_config
from skipdit.class_to_image.settings import SampleConfig
assert load_config(SampleConfig, None, sys.argv[1:]).model.hidden_size == 32
assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", program, f"weights={tmp_path / 'mine.safetensors'}"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_what_a_file_tells_has_no_folders_of_its_maker(training, tmp_path):
    export(Path(training.out), tmp_path / "mine.safetensors", torch.float32)
    record = read_metadata(tmp_path / "mine.safetensors")
    assert (record["step"], record["config"]["num_heads"], record["args"]["model"]["depth"]) == (1, 2, 4)
    assert (record["args"]["out"], record["args"]["data"]["path"]) == ("run", "images")
    assert record["args"]["vae"] == training.vae  # which a sampler needs
    assert load_checkpoint(Path(training.out, "checkpoints/0000001.pt"))["args"]["out"] == training.out


def test_what_is_said_counts(training, vae_folder, tmp_path):
    file = tmp_path / "sample.yaml"
    file.write_text(f"weights: {training.out}\nimage_size: 16\nmodel: {{depth: 4}}\n")
    other = shutil.copytree(vae_folder, tmp_path / "vae")
    config = load_config(Config, file, [f"vae={other}", "model.num_heads=2"])
    assert (config.image_size, config.vae, config.model) == (16, str(other), training.model)
    assert load_config(Config, file, ["model.name=DiT-S/2"]).model == ModelConfig(name="DiT-S/2", depth=4)


def test_another_shape_is_one_sentence(training, tmp_path):
    complaint = r"a model with hidden_size=32, not 64 \(.*run.config.yaml\): leave `model` out, or name other weights$"
    with pytest.raises(ConfigError, match=complaint):
        load_config(Config, None, [f"weights={training.out}", "model.hidden_size=64"])


def test_a_config_beside_other_weights_is_none_of_a_run(tmp_path):
    (tmp_path / "tiny.pt").touch()
    Path(tmp_path / "config.yaml").write_text("image_size: 8\n")
    config = load_config(Config, None, [f"weights={tmp_path / 'tiny.pt'}"])
    assert config == Config(weights=str(tmp_path / "tiny.pt"))


def test_a_flow_is_sampled_as_one(training, tmp_path):
    flow = changed(training, {"out": str(tmp_path / "flow"), "train.objective": "flow"})
    train(flow)
    assert load_config(Config, None, [f"weights={flow.out}"]).sampler == "euler"
    assert load_config(Config, None, [f"weights={flow.out}", "sampler=unipc"]).sampler == "unipc"
