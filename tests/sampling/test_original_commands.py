"""Commands of the original code: what its switches set, and where its configs and weights are found."""

import pytest
from conftest import ROOT

from skipdit.config import ConfigError, load_config
from skipdit.tasks import TASKS
from skipdit.training.arguments import read_arguments as read_training
from skipdit.utils import shipped

CLIPS = ["--config", "configs/class-to-video/ffs_sample.yaml"]


def settings_of(task: str, *argv: str):
    return TASKS[task].part("settings").read_arguments("", list(argv))


def test_class_to_image():
    config = settings_of("class-to-image", "--ckpt", "a.pt", "--model", "DiT-cache-3", "--cfg-scale", "1.5")
    assert (config.weights, config.model.name, config.guidance_scale) == ("a.pt", "DiT-skip", 1.5)
    assert config.cache == "N3-1000-20-b4" and config.steps == 250
    more = ["--num-sampling-steps", "50", "--per-proc-batch-size", "4", "--no-tf32", "--vae", "mse", "--seed", "3"]
    config = settings_of("class-to-image", "--model", "DiT-XL/2", "--image-size", "512", *more)
    assert config.weights == "checkpoints/DiT-XL-2-512x512.pt" and (config.steps, config.batch_size) == (50, 4)
    assert (config.tf32, config.vae, config.seed) == (False, "stabilityai/sd-vae-ft-mse", 3)
    assert settings_of("class-to-image", "--model", "DiT-XL/2").weights == "checkpoints/DiT-XL-2-256x256.pt"
    with pytest.raises(SystemExit):
        settings_of("class-to-image", "steps=3")


def test_class_to_video():
    argv = ["--ckpt", "a.pt", "--save_video_path", "clips", "--sample_method", "ddim", "--num_sampling_steps", "50"]
    config = settings_of("class-to-video", *CLIPS, *argv, "--deepcache", "2", "--no-fp16", "--tf32")
    assert (config.weights, config.out, config.sampler, config.steps) == ("a.pt", "clips", "ddim", 50)
    assert (config.cache, config.dtype, config.tf32) == ("N2-900-49", "float32", True)
    assert settings_of("class-to-video", *CLIPS, "--ckpt", "a.pt", "weights=b.pt").weights == "b.pt"


def test_text_to_image(capsys):
    argv = ["--prompt", "a", "--dit-weight", "a.pt", "--save-dir", "b", "--use-fp16", "--image-size", "1000", "777"]
    config = settings_of("text-to-image", *argv, "--sampler", "ddim", "--infer-steps", "20", "--batch-size", "2")
    assert (config.weights, config.dtype, config.scheduler, config.steps) == ("a.pt", "float16", "ddim", 20)
    assert (config.height, config.width, config.images_per_prompt, config.batch_size) == (992, 768, 2, 2)
    assert config.out == "b"
    assert "--image-size 1000 777 is no multiple of 16: taking 992 768" in capsys.readouterr().err


def test_trainers():
    schema = TASKS["class-to-image"].part("settings").TrainingConfig
    argv = ["--config", "configs/class-to-image/imagenet256_scratch.yaml", "--data-path", "d", "--results-dir", "r"]
    config, _ = read_training(schema, "", [*argv, "--global-batch-size", "8", "--ckpt-every", "7"])
    assert (config.data.path, config.out) == ("d", "r")
    assert (config.train.batch_size, config.train.save_every) == (8, 7)
    with pytest.raises(ConfigError, match=r"unknown key 'freeze'; did you mean 'train\.freeze'"):
        load_config(schema, None, ["freeze=True"])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    {
        "./configs/t2v/t2v_sample_skip.yaml": "text-to-video/t2v_sample_skip.yaml",
        "./configs/t2v/t2v_sample_origin.yaml": "text-to-video/t2v_sample_plain.yaml",
        "./configs/t2v/t2v_joint_train_skip.yaml": "text-to-video/t2v_train_stage2.yaml",
        "./configs/ffs/ffs_sample_cache.yaml": "class-to-video/ffs_sample_cache.yaml",
        "./configs/ffs/ffs_sample_skip.yaml": "class-to-video/ffs_sample.yaml",
        "./configs/sky/sky_sample_origin.yaml": "class-to-video/sky_sample_plain.yaml",
        "./configs/ucf101/ucf101_img_train.yaml": "class-to-video/ucf101_scratch.yaml",
        "./configs/ffs/ffs_train.yaml": "class-to-video/ffs_scratch.yaml",
    }.items(),
)
def test_configs_are_found_in_a_task_folder(theirs, ours, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "class-to-video")
    shipped._told.cache_clear()
    assert shipped.find_config(theirs) == ROOT / "configs" / ours
    assert capsys.readouterr().err == f"{theirs} is not here: taking {ROOT}/configs/{ours}\n"


def test_a_name_of_several_tasks_is_not_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not shipped.find_config("configs/nowhere/demo.yaml").exists()


def test_weights_are_found_where_the_original_has_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained/ffs-skip.pt").touch()
    shipped._told.cache_clear()
    assert settings_of("class-to-video", *CLIPS).weights == "pretrained/ffs-skip.pt"
    assert "checkpoints/ffs-skip.pt is not here: taking pretrained/ffs-skip.pt" in capsys.readouterr().err
