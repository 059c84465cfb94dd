"""The sampler as users run it: seeds, interruption, processes, refusals, reports."""

import json
import pickle
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from commands import forked
from conftest import ROOT, assert_rounding, tiny_dit
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.released import to_released
from skipdit.class_to_image.model import DiT
from skipdit.class_to_image.sample import Config, ModelConfig, build_model, main, sample
from skipdit.config import changed, load_config, to_yaml
from skipdit.data.latents import Latents, expected_latents
from skipdit.data.settings import ImageData
from skipdit.diffusion.gaussian import Diffusion
from skipdit.encoders.autoencoder import decode, encode, load_vae
from skipdit.layers.flops import step_flops
from skipdit.metrics.samples import open_samples
from skipdit.sampling.class_conditional import generate
from skipdit.sampling.job import Ahead, Job
from skipdit.utils.dtypes import resolve_dtype
from skipdit.utils.seeding import generators


@pytest.fixture
def config(sampling_config) -> Config:
    return sampling_config("class-to-image")


def images(folder) -> list[np.ndarray]:
    return [np.array(Image.open(path)).astype(int) for path in sorted(Path(folder).glob("0*.png"))]


def assert_same_images(a, b, levels: int = 1) -> None:
    """Batch size may change the last bit of a float32 sum, and so, rarely, the rounding of a pixel."""
    assert len(images(a)) == len(images(b)) > 0
    for x, y in zip(images(a), images(b), strict=True):
        assert np.abs(x - y).max() <= levels


def test_outputs_and_report(config):
    config = changed(config, {"npz": True})
    report = sample(config)
    folder = Path(config.out)
    assert len(images(folder)) == 5
    assert np.load(folder / "samples.npz")["arr_0"].shape == (5, 8, 8, 3)
    assert Image.open(folder / "grid.png").size[0] > 8
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    plan = Diffusion(6).sampling_timesteps
    assert report["steps"] == {"full": 3, "cached": 3, "forecast": 0}, plan
    assert report["cache_bytes"] == 4 * 4 * 32 * 4  # two images, with guidance four rows, of four tokens
    assert report["seconds_per_step"]["full"] > 0
    assert report["seconds_per_step"]["cached"] > 0
    assert report["flops_per_step"]["cached"] < report["flops_per_step"]["full"]
    assert {"seed", "config", "versions", "device"} <= report.keys()


@pytest.mark.slow
def test_report_of_fewer_samples_is_made_anew(config):
    """A run that was killed before its report, and was then asked for fewer."""
    sample(config)
    (Path(config.out) / "report.json").unlink()
    many, config = config.num_samples, changed(config, {"num_samples": 2})
    sample(config)
    with pytest.raises(ValueError, match=f"holds {many} samples, and its report.json says 2; the sampling command"):
        open_samples(Path(config.out))
    config = changed(config, {"num_samples": many})
    assert sample(config)["num_samples"] == many == len(open_samples(Path(config.out)))
    config = changed(config, {"num_samples": 2})
    assert sample(config)["num_samples"] == many  # a look at the first ones


@pytest.mark.slow
def test_report_of_drift(config, capsys):
    """Batches decide each by itself; the report has their mean, and nothing if none of them ran now."""
    caches, config = [], changed(config, {"cache": "D0.3", "batch_size": 1})

    def first_differs(*args, cache, **settings):
        latents = generate(*args, cache=cache, **settings)
        cache.ran[cache.ran.index(False)] |= not caches  # as if it had drifted once more
        caches.append(cache)
        return latents

    with mock.patch("skipdit.sampling.class_conditional.generate", first_differs):
        report = sample(config)
    ran = [cache.full_steps for cache in caches]
    assert len(ran) == config.num_samples and min(ran) < max(ran)
    assert report["steps"]["full"] == pytest.approx(sum(ran) / len(ran))
    assert sum(report["steps"].values()) == pytest.approx(config.steps)
    assert f"{report['steps']['full']:g} full and" in capsys.readouterr().out
    (Path(config.out) / "report.json").unlink()
    report = sample(config)
    assert report["steps"] == dict.fromkeys(["full", "cached", "forecast"]) and report["flops_speedup"] is None
    assert "full and" not in capsys.readouterr().out


@pytest.mark.slow
def test_more_images_of_the_same_run(config):
    sample(config)
    config = changed(config, {"num_samples": 7})
    sample(config)
    assert len(images(config.out)) == 7


@pytest.mark.slow
def test_noise_at_every_step_does_not_depend_on_batch_size(config, tmp_path):
    config = changed(config, {"sampler": "ddpm"})
    sample(config)
    first, config = config.out, changed(config, {"out": str(tmp_path / "other"), "batch_size": 5})
    sample(config)
    assert_same_images(first, config.out)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), [("guidance_scale", 2.0), ("cache", "N3-1000-20"), ("seed", 1)])
def test_other_settings_in_the_same_folder_are_refused(config, key, value):
    sample(config)
    config = changed(config, {key: value})
    with pytest.raises(ValueError, match=rf"holds samples made with other settings(.|\n)*{key}"):
        sample(config)


@pytest.mark.slow
def test_other_weights_in_the_same_folder_are_refused(config):
    sample(config)
    torch.save({"ema": to_released(tiny_dit(seed=1).state_dict())}, config.weights)
    with pytest.raises(ValueError, match=r"other settings(.|\n)*weights"):
        sample(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"classes": [3, 10, -1]}, r"class ids \[10, -1\] are out of range; this model knows 0 .. 9"),
        ({"image_size": 9}, "image_size 9 is not a multiple of the autoencoder's factor 2"),
        ({"image_size": 10}, "patch_size 2 does not divide the latent size 5"),
        ({"cache": "N2-1000-20-b3"}, "cache branch 3 is larger than the model's number of skips, 2"),
        ({"cache": "N0-1000-20"}, "interval is 0"),
        ({"cache": "sometimes"}, "does not parse"),
        ({"sampler": "edm"}, "sampler is 'edm'"),
        (
            {"sampler": "euler"},
            "'euler', for models trained by flow matching, and this one was not; known: dpm",
        ),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"steps": 2000}, "steps are 2000"),
        (
            {"weights": "nowhere/a.pt", "vae": "nowhere/else/vae"},
            r"missing: weights=nowhere/a\.pt, vae=nowhere/else/vae",
        ),
    ],
)
def test_bad_input_is_named(config, change, complaint):
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        sample(changed(config, change))
    sample(config)  # the refused command left nothing behind that refuses the mended one


def test_errors_reach_the_user_without_a_traceback(config, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, str(ROOT / "class-to-image/sample.py"), "--config", str(file), "guidance=3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: override 'guidance=3': unknown key 'guidance'")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "spec"),
    [
        ([], "N2-1000-20"),
        (["--cache", "N3-1000-20-o1"], "N3-1000-20-o1"),
        (["--cache", "none"], "none"),
        (["--cache"], "N2-1000-20-b4"),
        (["--cache", "seed=3"], "N2-1000-20-b4"),
        (["--cache-step", "3"], "N3-1000-20-b4"),
        (["--deepcache", "5"], "N5-1000-20-b4"),
        (["--model", "DiT-cache-4"], "N4-1000-20-b4"),
    ],
)
def test_command_lines_of_the_original(config, tmp_path, monkeypatch, arguments, spec):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    seen = []
    monkeypatch.setattr("skipdit.class_to_image.sample.sample", seen.append)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--config", str(file), *arguments])
    main()
    assert seen[0].cache == spec
    assert seen[0].seed == (3 if "seed=3" in arguments else 0)
    assert seen[0].model.name == ("DiT-skip" if "DiT-cache-4" in arguments else None)


def test_published_names():
    with torch.device("meta"):
        xl = build_model(ModelConfig(name="DiT-skip"), 32)
        small = build_model(ModelConfig(name="DiT-S/8"), 64)
    assert (len(xl.blocks), xl.n_skips, xl.config.hidden_size) == (28, 14, 1152)
    assert (small.n_skips, small.config.patch_size, small.config.hidden_size) == (0, 8, 384)
    with pytest.raises(ValueError, match="unknown model 'DiT-XXL/2'"):
        build_model(ModelConfig(name="DiT-XXL/2"), 32)


def test_values_computed_ahead_change_nothing():
    """The modulations of many steps at once are those of each step alone, cached steps included."""
    model, labels = tiny_dit(), torch.tensor([1, 2])
    c_all = model.condition(torch.tensor([10, 500]), labels)
    c_outer = model.condition(torch.tensor([10, 500]), labels, branch=1)
    x = torch.randn(2, 4, 4, 4)
    from skipdit.caching.steps import CacheStep

    for number, t in enumerate((10, 500)):
        times, full = torch.full((2,), t), CacheStep(1, None)
        assert_rounding(model(x, times, labels, full), model(x, times, labels, None, c_all[number]))
        cached = CacheStep(1, full.kept_feature)
        expected = model(x, times, labels, cached)
        assert_rounding(expected, model(x, times, labels, cached, c_outer[number]))


def test_ahead_computes_in_chunks_of_one_kind():
    calls = []

    def compute(steps, kind):
        calls.append((steps, kind))
        return steps

    full, cached = "full", "cached"
    ahead = Ahead(compute, [full, cached, full, cached, full], chunk=2)
    assert [ahead.at(i, kind) for i, kind in enumerate([full, cached, full, full, full])] == [0, 1, 2, 3, 4]
    assert calls == [([0, 2], full), ([1, 3], cached), ([3], full), ([4], full)]


@torch.no_grad()
def test_guidance_channels():
    model = tiny_dit()
    noise = generators(0, range(2), "cpu")
    some = generate(model, torch.tensor([1, 2]), noise, steps=4, sampler="ddim", guidance_channels=3)
    noise = generators(0, range(2), "cpu")
    every = generate(model, torch.tensor([1, 2]), noise, steps=4, sampler="ddim", guidance_channels=None)
    assert not torch.equal(some, every)


def test_autocast_does_not_change_pictures(vae_folder):
    vae, latents = load_vae(str(vae_folder)), torch.randn(2, 4, 4, 4)
    expected = decode(vae, latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode(vae, latents), expected)


def test_latents_that_are_not_finite_raise(vae_folder):
    """Story 14: the stage is named, no black picture is saved."""
    with pytest.raises(FloatingPointError, match="latents are not finite before decoding"):
        decode(load_vae(str(vae_folder)), torch.full((1, 4, 4, 4), torch.nan))


def test_weights_that_overflow_name_the_step(config):
    state = tiny_dit().state_dict()
    state["final_layer.linear.bias"] += 3e38  # finite itself
    torch.save({"ema": to_released(state)}, config.weights)
    with pytest.raises(FloatingPointError, match=r"not finite from step 0 \(timestep 999\) on, in torch\.float32"):
        sample(config)
    assert not images(config.out)


def test_bfloat16_sampling_runs(config):
    config = changed(config, {"dtype": "bfloat16"})
    sample(config)
    assert len(images(config.out)) == 5
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cpu"), torch.float16) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda"), torch.float16) == torch.float16  # of a released model


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["true", "reduce-overhead", "max-autotune", "False"])
def test_compile_modes(config, tmp_path, monkeypatch, setting):
    """The setting reaches torch.compile, and version 0.1's true and false are understood."""
    asked = []
    monkeypatch.setattr(DiT, "compile", lambda model, **kwargs: asked.append(kwargs))
    text = to_yaml(replace(config, compile="none")).replace("compile: none", f"compile: {setting}")
    (tmp_path / "run.yaml").write_text(text)
    sample(load_config(Config, tmp_path / "run.yaml"))
    mode = {"true": "default", "False": None}.get(setting, setting)
    assert asked == ([{"fullgraph": True, "mode": mode}] if mode else [])
    with pytest.raises(ValueError, match="compile is 'fast'; known: none, default, reduce-overhead, max-autotune"):
        sample(replace(config, compile="fast"))


@pytest.mark.slow
def test_tf32_is_what_the_setting_says(config, tmp_path):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for tf32 in (True, False):
            report = sample(replace(config, tf32=tf32, out=str(tmp_path / str(tf32))))
            assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32
            assert report["tf32"] is (tf32 and torch.cuda.is_available())
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_flops_are_counted_right():
    """A closed form: 24 D^2 per token and block, 4 D^2 per token and skip, attention 4 T D, and the small ends."""
    model, width, tokens, batch = tiny_dit(), 32, 4, 3
    block = batch * tokens * (24 * width**2 + 4 * tokens * width) + batch * 12 * width**2  # adaLN: per sample
    skip = batch * tokens * 4 * width**2
    embed = batch * (2 * 256 * width + 2 * width**2 + tokens * 2 * 16 * width)
    ends = embed + batch * (4 * width**2 + tokens * 2 * width * 32)
    flops = step_flops(model, batch, branch=1)
    assert flops == {"full": 4 * block + 2 * skip + ends, "cached": 2 * block + skip + ends}


@pytest.mark.slow
def test_nothing_optional_is_imported():
    """Story 16: neither flash-attn, xformers nor apex is needed, nor PyAV for latents."""
    code = "import sys\nfor name in ('flash_attn', 'xformers', 'apex', 'av'): sys.modules[name] = None\n"
    code += "import skipdit.class_to_image.train, skipdit.class_to_video.train, skipdit.text_to_video.train"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_seeds_are_per_sample():
    a, b = generators(0, [3, 7], "cpu"), generators(0, [7], "cpu")
    assert torch.equal(torch.randn(4, generator=a[1]), torch.randn(4, generator=b[0]))


def test_job_shares_out_every_index(tmp_path):
    jobs = [Job(tmp_path, {"a": 1}, 7, rank=rank, world=3) for rank in range(3)]
    assert sorted(i for job in jobs for i in job.pending()) == list(range(7))


def test_jobs_of_other_suffixes_do_not_mix(tmp_path):
    """Clips, and with one frame pictures, in one folder."""
    clips = Job(tmp_path, {"num_frames": 16}, 2, suffix="mp4")
    clips.save(0, lambda path: path.write_text("a clip"))
    with pytest.raises(ValueError, match="other settings; use another folder:\n  num_frames: 16 there, 1 now"):
        Job(tmp_path, {"num_frames": 1}, 2, suffix="png")
    assert Job(tmp_path, {"num_frames": 16}, 2, suffix="mp4").pending() == [1]
    old = json.loads((tmp_path / "job.json").read_text())
    del old["suffix"]  # as before it was kept
    (tmp_path / "job.json").write_text(json.dumps(old))
    assert Job(tmp_path, {"num_frames": 16}, 2, suffix="mp4").pending() == [1]


def test_autoencoder_with_a_shift(tmp_path, vae_folder):
    """Latents are (z - shift) * scale, as in the training of SD3 and FLUX, and come back so."""
    vae = AutoencoderKL.from_pretrained(vae_folder)
    vae.register_to_config(scaling_factor=1.5, shift_factor=0.25)
    vae.save_pretrained(tmp_path / "shifted")
    shifted, images = load_vae(str(tmp_path / "shifted")), torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        expected = vae.decode(posterior.mean).sample
    mean, std = encode(shifted, images)
    torch.testing.assert_close(mean, (posterior.mean - 0.25) * 1.5)
    torch.testing.assert_close(std, posterior.std * 1.5)
    torch.testing.assert_close(decode(shifted, mean), expected)
    assert expected_latents("mean", 8, shifted) != expected_latents("mean", 8, load_vae(str(vae_folder)))
    vae.register_to_config(shift_factor=None, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    vae.save_pretrained(tmp_path / "per-channel")
    with pytest.raises(ValueError, match=r"per-channel normalises latents per channel \(latents_mean, latents_std\)"):
        load_vae(str(tmp_path / "per-channel"))


@pytest.mark.slow
def test_folders_of_older_versions_go_on(config):
    """Settings that are newer than a folder's samples are off in it."""
    sample(config)
    path = Path(config.out) / "job.json"
    job = json.loads(path.read_text())
    del job["tf32"], job["model"]["fuse"]
    path.write_text(json.dumps(job))
    (Path(config.out) / "000003.png").unlink()
    sample(config)
    assert len(images(config.out)) == 5
    config = changed(config, {"tf32": True})
    with pytest.raises(ValueError, match="tf32: None there, True now"):
        sample(config)


def test_models_take_their_channels_from_the_autoencoder(config, tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=16)
    vae.save_pretrained(tmp_path / "wide")
    config = changed(config, {"vae": str(tmp_path / "wide")})
    torch.save({"ema": to_released(tiny_dit(in_channels=16).state_dict())}, config.weights)
    sample(config)
    assert len(images(config.out)) == 5


@pytest.mark.slow
def test_encoding_and_training_on_latents(tmp_path, vae_folder, image_folder):
    """`python -m skipdit encode`: flipped copies, broken images left out and listed, a mismatch refused."""
    out = tmp_path / "latents"
    command = ["skipdit", "encode", "--data", "image_folder", "--path", str(image_folder), "--workers", "0"]
    command = shlex.join([*command, "--image-size", "8", "--vae", str(vae_folder), "--out", str(out), "--shard"])
    status, told = forked(f"{command} 10", tmp_path)
    assert status == 0, told[-2000:]
    assert "2 unreadable images were left out" in told
    assert len((out / "broken_files.txt").read_text().splitlines()) == 2
    status, told = forked(f"{command} 5", tmp_path)
    assert status == 2 and "holds other latents, or other shards" in told
    first = out / "latents-00000.safetensors"
    kept = load_file(first)
    first.unlink()
    with pytest.raises(ValueError, match="holds latents of 14 of 24 samples: encoding was interrupted"):
        Latents(out)
    assert forked(f"{command} 10", tmp_path)[0] == 0
    assert all(torch.equal(tensor, kept[key]) for key, tensor in load_file(first).items())
    latents = Latents(out)
    assert len(latents) == 22
    item = latents[21]
    assert item["mean"].shape == (2, 4, 4, 4)
    assert item["std"].min() > 0
    assert latents.info.kind == "sample"
    assert torch.equal(pickle.loads(pickle.dumps(latents))[21]["mean"], item["mean"])  # to spawned workers
    from skipdit.data.latents import open_images

    with pytest.raises(ValueError, match="image_size is 8 there, 16 wanted"):
        open_images(ImageData("latents", str(out), 16), load_vae(str(vae_folder)))
    with pytest.raises(ValueError, match="kind is 'sample' there, 'mean' wanted"):
        open_images(ImageData("latents", str(out), 8, latents="mean"), load_vae(str(vae_folder)))
    rescaled = load_vae(str(vae_folder))
    rescaled.register_to_config(scaling_factor=0.18215)
    with pytest.raises(ValueError, match=r"scaling_factor is 0\.5 there, 0\.18215 wanted"):
        open_images(ImageData("latents", str(out), 8), rescaled)
    other = load_vae(str(vae_folder))
    other.decoder.conv_in.weight.data += 1
    with pytest.raises(ValueError, match="vae_id is"):
        open_images(ImageData("latents", str(out), 8), other)


def test_autoencoders_with_weights_that_are_no_good(tmp_path, vae_folder):
    """The library fills what a file lacks with random numbers."""
    shutil.copytree(vae_folder, tmp_path / "vae")
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    state, name = load_file(path), "decoder.conv_out.weight"
    save_file({key: value for key, value in state.items() if key != name}, path)
    with pytest.raises(WeightsError, match=rf"autoencoder .*vae lacks weights, which would be random: {name}"):
        load_vae(str(tmp_path / "vae"))
    save_file(state | {name: state[name] * torch.inf}, path)
    with pytest.raises(WeightsError, match=rf"autoencoder .*vae: not finite are {name}"):
        load_vae(str(tmp_path / "vae"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FileNotFoundError, match=r"no autoencoder .*vae: that folder cannot be loaded"):
        load_vae(str(tmp_path / "vae"))
