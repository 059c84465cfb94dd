"""Text-to-image sampling: what the pipeline of diffusers makes, the original command line, resuming, and bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_sampler
from diffusers import HunyuanDiTPipeline
from torchvision.io import read_image

from skipdit import disable_cache, enable_cache, load_weights
from skipdit.checkpoints.files import load_state
from skipdit.config import changed
from skipdit.layers.embeddings import TimestepEmbedder
from skipdit.metrics.fidelity import psnr
from skipdit.text_to_image import HunyuanDiT, sample_t2i
from skipdit.text_to_image.model import rotary_tables
from skipdit.text_to_image.sample_t2i import (
    SIZES,
    Config,
    TextPair,
    check,
    encode_prompts,
    generate,
    make_scheduler,
    open_pipeline,
    sample,
)

PROMPT = "一只小猫 sleeps on the warm sofa"


@pytest.fixture
def config(sampling_config) -> Config:
    return sampling_config("text-to-image")


@pytest.fixture
def pipe(released_t2i) -> HunyuanDiTPipeline:
    """diffusers' own, text encoders included."""
    pipe = HunyuanDiTPipeline.from_pretrained(released_t2i / "diffusers", requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(config: Config) -> dict[str, torch.Tensor]:
    paths = sorted(path for path in Path(config.out).glob("*.png") if path.name != "sheet.png")
    return {path.name: read_image(str(path)).int() for path in paths}


def call(pipe: HunyuanDiTPipeline, **changes) -> torch.Tensor:
    arguments = {"height": 64, "width": 64, "num_inference_steps": 6, "use_resolution_binning": False}
    arguments |= {"generator": torch.Generator().manual_seed(0), "output_type": "pt"} | changes
    return pipe(PROMPT, negative_prompt="the rain", **arguments).images


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["N2-700-50", "N3-900-50-b2-o1"])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_pipeline_makes_equal_images_with_either_transformer(pipe, released_t2i, spec, guidance):
    """diffusers' own transformer, and ours of the same weights: uncached, cached, and with a cache of interval 1."""
    ours = HunyuanDiT(**HunyuanDiT.config_from_state(load_state(released_t2i / "diffusers/transformer"))).eval()
    load_weights(ours, released_t2i / "diffusers/transformer")
    images, steps = {}, {}
    for name, transformer in {"theirs": pipe.transformer, "ours": ours}.items():
        pipe.transformer = transformer
        images[name, "none"] = call(pipe, guidance_scale=guidance)
        for cached in ("N1-700-50", spec):
            cache = enable_cache(pipe, cached)
            images[name, cached] = call(pipe, guidance_scale=guidance)
            steps[name, cached] = cache.run.ran
        disable_cache(pipe)
        assert torch.equal(call(pipe, guidance_scale=guidance), images[name, "none"])
        assert torch.equal(images[name, "N1-700-50"], images[name, "none"])
        assert not torch.allclose(images[name, spec], images[name, "none"], atol=1e-4)
    assert isinstance(pipe.transformer, HunyuanDiT)
    for cached in ("none", spec):
        torch.testing.assert_close(images["theirs", cached], images["ours", cached], atol=1e-4, rtol=1e-4)
    assert steps["theirs", spec] == steps["ours", spec] and not all(steps["ours", spec])


def test_pipeline_makes_its_own_size_without_being_told(pipe, released_t2i):
    ours = HunyuanDiT(
        **HunyuanDiT.config_from_state(load_state(released_t2i / "diffusers/transformer")), input_size=(8, 8)
    )
    pipe = HunyuanDiTPipeline(**pipe.components | {"transformer": ours.eval()}, requires_safety_checker=False)
    assert pipe.default_sample_size == 8
    assert HunyuanDiT.from_config(ours.config).config == ours.config


@pytest.mark.slow
@torch.no_grad()
def test_picture_is_what_diffusers_makes(config, pipe, monkeypatch):
    config = changed(config, {"prompts": [PROMPT], "negative_prompt": "the rain"})
    sample(config)
    (made,) = pictures(config).values()
    pipe.scheduler = make_scheduler("ddim")
    (noise,) = sample_t2i.generators(config.seed, [0], "cpu")
    theirs = call(pipe, generator=noise, guidance_scale=config.guidance_scale)[0]
    assert (made - (theirs * 255).round().int()).abs().max() <= 1


@pytest.mark.slow
def test_oblong_pictures_have_the_released_tables(config):
    """Those of the pipeline are for other places; see `rotary_tables`."""
    config = changed(config, {"width": 96, "steps": 2})
    parts = check(config, None)
    pipe, seen = open_pipeline(config, parts), []
    text, negative, _ = encode_prompts(config, parts.model, ["the cat"])
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[-1]))
    latents = generate(pipe, text, negative, [torch.Generator()], size=(64, 96), steps=2)
    assert latents.shape == (1, 4, 8, 12)
    wanted = rotary_tables(4, 6, 16)
    assert len(seen) == 2 and all(torch.equal(a, b) for tables in seen for a, b in zip(tables, wanted, strict=True))
    assert not pipe.transformer._forward_pre_hooks


@pytest.mark.slow
def test_run_writes_pictures_and_report(config):
    config = changed(config, {"cache": "N2-900-49"})
    report = sample(config)
    assert sorted(path.name for path in Path(config.out).iterdir()) == [
        "000000-一只小猫-sleeps-on-the-warm-sofa.png",
        "000001-the-dog-runs.png",
        *("job.json", "prompts.json", "report.json", "sheet.png"),
    ]
    assert all(picture.shape == (3, 64, 64) for picture in pictures(config).values())
    assert report["steps"]["cached"] > 1 and sum(report["steps"].values()) == 6
    assert report["flops_speedup"] > 1.1 and report["cache_bytes"] > 0
    table = json.loads((Path(config.out) / "prompts.json").read_text(encoding="utf-8"))
    assert list(table.values()) == config.prompts
    assert sample(config) == report  # nothing left to do


@pytest.mark.slow
def test_both_layouts_give_the_same_pictures(config, released_t2i, tmp_path):
    sample(config)
    released = pictures(config)
    config = changed(config, {"pipeline": str(released_t2i / "diffusers"), "out": str(tmp_path / "theirs")})
    sample(config)
    assert all((picture - released[name]).abs().max() <= 1 for name, picture in pictures(config).items())


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["ddpm", "dpmms", "euler"])
def test_other_schedulers_sample(config, scheduler):
    config = changed(config, {"scheduler": scheduler, "prompts": ["the cat"], "cache": "N2-900-49"})
    assert sample(config)["steps"]["cached"] > 0


@pytest.mark.slow
def test_half_precision(config, monkeypatch):
    """The model is told the timesteps as they are: bfloat16 has no 831."""
    seen, config = [], changed(config, {"dtype": "bfloat16", "prompts": ["the cat"]})
    embed = TimestepEmbedder.forward
    monkeypatch.setattr(TimestepEmbedder, "forward", lambda self, t: seen.append(t[:1]) or embed(self, t))
    sample(config)
    (half,) = pictures(config).values()
    assert [t.item() for t in seen if not t.is_meta] == [831, 665, 499, 333, 167, 1]
    config = changed(config, {"dtype": "float32", "out": config.out + "-whole"})
    sample(config)
    (whole,) = pictures(config).values()
    assert psnr(half.byte()[None], whole.byte()[None]) > 30


@pytest.mark.slow
def test_compiled(config):
    """Full and cached steps as one graph each, and the pictures of the model as it is."""
    config = changed(config, {"prompts": ["the cat"], "cache": "N2-900-49"})
    sample(config)
    (eager,) = pictures(config).values()
    config = changed(config, {"compile": True, "out": config.out + "-compiled"})
    assert sample(config)["steps"]["cached"] > 0
    (compiled,) = pictures(config).values()
    assert (compiled - eager).abs().max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prompts": []}, "there is nothing to show"),
        ({"scheduler": "magic"}, "scheduler is 'magic'; known: ddim, ddpm"),
        ({"height": 72}, "height 72 and width 64 must be multiples of 16 pixels"),
        ({"cache": "N2-700-50-b4"}, "cache branch 4 is larger than the model's number of skips, 3"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"guidance_scale": 0.5}, r"guidance_scale is 0\.5; it should be 1 or more"),
        ({"load_key": "module"}, r"pytorch_model_module\.pt"),
    ],
)
def test_bad_input_is_named(config, change, complaint):
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        sample(changed(config, change))


def test_everything_missing_is_listed_at_once(config, released_t2i, tmp_path):
    config = changed(config, {"pipeline": str(tmp_path / "half")})
    shutil.copytree(released_t2i / "ckpts/t2i/mt5", tmp_path / "half/t2i/mt5")
    (tmp_path / "half/t2i/mt5/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        sample(config)
    for name in ("pytorch_model_ema.pt", "sdxl-vae-fp16-fix", "clip_text_encoder", "t2i/tokenizer", "mt5/model",
                 "skipdit download text-to-image"):  # fmt: skip
        assert name in str(caught.value)


def test_versions_before_1_2_are_told_apart(config, released_t2i, tmp_path):
    state = load_state(released_t2i / "ckpts/t2i/model/pytorch_model_ema.pt")
    old = tmp_path / "v1.1.pt"
    torch.save(state | {"style_embedder.weight": torch.zeros(1, 32)}, old)
    config = changed(config, {"weights": str(old)})
    with pytest.raises(ValueError, match=r"v1\.1\.pt.*before v1\.2.*Tencent-Hunyuan/HunyuanDiT-v1\.2"):
        sample(config)
    with pytest.raises(ValueError, match=r"Tencent-Hunyuan/HunyuanDiT-v1\.2"):
        load_weights(HunyuanDiT(**HunyuanDiT.config_from_state(state)), old)


@pytest.mark.parametrize("size", SIZES)
def test_every_supported_size_is_in_the_pipeline_too(size):
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import SUPPORTED_SHAPE

    assert tuple(map(int, size.split("x"))) in SUPPORTED_SHAPE and len(SIZES) == len(set(SUPPORTED_SHAPE))


def run(monkeypatch, *arguments: str) -> dict:
    monkeypatch.setattr("sys.argv", ["sample_t2i.py", *arguments])
    sample_t2i.main()


@pytest.mark.slow
def test_original_command_line(config, tmp_path, monkeypatch):
    """The command of the released code, on a tiny model in ./ckpts."""
    monkeypatch.chdir(Path(config.pipeline).parent)
    out = tmp_path / "original"
    run(monkeypatch, "--prompt", "渔舟唱晚", "--no-enhance", "--infer-steps", "20", "--cache", "--cache-step", "2",
        "--image-size", "64", "96", f"out={out}")  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["cache"] == "N2-700-50" and sum(report["steps"].values()) == 20 and report["steps"]["cached"] > 4
    told = report["config"]
    assert (told["scheduler"], told["seed"], told["guidance_scale"]) == ("ddpm", 42, 6.0)
    assert told["negative_prompt"].startswith("错误的眼睛")
    assert read_image(str(out / "000000-渔舟唱晚.png")).shape == (3, 64, 96)


@pytest.mark.slow
def test_a_process_may_have_no_prompt(config, tmp_path):
    config = changed(config, {"prompts": ["the cat"]})
    sample(config)
    alone = pictures(config)
    config = changed(config, {"out": str(tmp_path / "two")})
    run_sampler(config, "text-to-image", processes=2)
    assert len(pictures(config)) == 1
    assert all(torch.equal(picture, alone[name]) for name, picture in pictures(config).items())


@pytest.mark.slow
def test_other_original_switches(config, tmp_path, monkeypatch):
    out = tmp_path / "original"
    run(monkeypatch, "--prompt", "the cat", "--infer-steps", "6", "--image-size", "64", "--negative", "rain: a, b",
        "--seed", "7", "--batch-size", "2", "--cfg-scale", "3", "--sampler", "dpmms", "--load-key", "ema",
        "--model-root", config.pipeline, "--infer-mode", "fa", "--cache", "--cache-at-branch", "2",
        f"out={out}")  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["cache"] == "N2-700-50-b2" and report["num_samples"] == 2
    told = report["config"]
    assert (told["scheduler"], told["seed"], told["guidance_scale"]) == ("dpmms", 7, 3.0)
    assert told["negative_prompt"] == "rain: a, b" and told["batch_size"] == told["images_per_prompt"] == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--image-size", "64", "64", "64"], "it takes a height and a width"),
        (["--image-size", "wide"], "it takes a height and a width"),
        (["--cache-at-branch", "2"], "--cache-at-branch goes with --cache"),
    ],
)
def test_bad_switches_are_named(monkeypatch, capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--prompt", "the cat", *arguments)
    assert complaint in capsys.readouterr().err


def test_texts_of_a_batch_are_rows(config):
    model = check(config, None).model
    text, negative, _ = encode_prompts(config, model, ["the cat", "the dog"])
    assert isinstance(text, TextPair) and text.clip.embeddings.shape == (2, 77, 16)
    rows = text.rows([1, 1], torch.device("cpu"), torch.float32)
    assert torch.equal(rows.t5.embeddings[0], text.t5.embeddings[1]) and rows.t5.mask.shape == (2, 256)
    assert negative.clip.mask.shape == (1, 77)
