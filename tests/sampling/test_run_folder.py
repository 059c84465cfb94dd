"""A sampler takes from the folder of a training what it is not told: the model's shape, sizes, the autoencoder.

The trainers' tests do the same for the other tasks.
"""

import shutil
from pathlib import Path

import pytest
from conftest import short_training

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
def test_nothing_but_the_run_is_said(training, tmp_path, weights):
    config = load_config(Config, None, [f"weights={tmp_path / weights}", "num_samples=1", "steps=2"])
    assert (config.model, config.image_size, config.vae) == (training.model, 8, training.vae)
    sample(changed(config, {"out": str(tmp_path / "out")}))
    assert (tmp_path / "out/000000.png").exists()


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
