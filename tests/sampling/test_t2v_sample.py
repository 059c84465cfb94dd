"""The text-to-video sampler, on a folder of the released layout with tiny models of the real classes."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import LattePipeline
from transformers import AutoTokenizer, T5EncoderModel

from skipdit.config import changed, to_yaml
from skipdit.data.video import read_mp4
from skipdit.diffusion.schedulers import SCHEDULERS
from skipdit.encoders.autoencoder import decode
from skipdit.sampling.prompts import read_prompts
from skipdit.text_to_video import sample_t2v
from skipdit.text_to_video.sample_t2v import Config, check, make_scheduler, open_pipeline, sample
from skipdit.utils.pixels import to_uint8


@pytest.fixture
def config(sampling_config) -> Config:
    return sampling_config("text-to-video")


def files(config: Config, suffix: str) -> list[Path]:
    return sorted(Path(config.out).glob(f"*.{suffix}"))


def contents(config: Config) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in files(config, "mp4")}


@pytest.mark.slow
def test_run_writes_clips_and_report(config):
    config = changed(config, {"gif": True, "cache": "N2-900-49"})
    report = sample(config)
    names = ["000000-a-dog-runs.gif", "000000-a-dog-runs.mp4", "000001-the-cat.gif", "000001-the-cat.mp4"]
    names += ["job.json", "preview.gif", "prompts.json", "report.json", "sheet.png"]
    assert sorted(path.name for path in Path(config.out).iterdir()) == names
    assert all(read_mp4(path).shape == (4, 3, 16, 16) for path in files(config, "mp4"))
    assert report["steps"]["cached"] > 1 and sum(report["steps"].values()) == 6
    assert report["flops_speedup"] > 1.1 and report["cache_bytes"] > 0
    assert report["seconds_per_step"]["cached"] > 0
    assert report["config"]["prompts"] == ["a dog runs", "the cat"]
    assert json.loads((Path(config.out) / "prompts.json").read_text())["000001-the-cat.mp4"] == "the cat"
    assert sample(config) == report  # nothing left to do


@pytest.mark.slow
@torch.no_grad()
def test_clip_is_what_diffusers_makes(config, released_t2v, monkeypatch):
    """The pipeline with everything in it, called with the prompt itself, gives the same frames."""
    made = {}
    monkeypatch.setattr(
        sample_t2v, "write_mp4", lambda path, frames, fps: (made.update({path.name: frames}), path.touch())
    )
    monkeypatch.setattr(sample_t2v, "write_look", lambda *_: None)
    config = changed(config, {"negative_prompt": "a bicycle"})
    sample(config)
    parts = open_pipeline(config, check(config, None))
    pipe = LattePipeline(
        AutoTokenizer.from_pretrained(released_t2v / "Latte-0/tokenizer"),
        T5EncoderModel.from_pretrained(released_t2v / "Latte-0/text_encoder"),
        parts.vae,
        parts.transformer,
        parts.scheduler,
    )
    latents = pipe(
        "the cat",
        negative_prompt="a bicycle",
        num_inference_steps=6,
        guidance_scale=7.5,
        video_length=4,
        height=16,
        width=16,
        generator=sample_t2v.generators(0, [1], "cpu"),
        output_type="latent",
    ).frames
    frames = to_uint8(decode(pipe.vae, latents.transpose(1, 2)))[0]
    assert torch.equal(made["partial-000001-the-cat.mp4"], frames)


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["model", "group"])
@pytest.mark.parametrize("compiled", [False, True])
def test_offloaded_clips_are_the_same(config, tmp_path, offload, compiled, traced):
    """With a cache, too, and compiled where that is possible; twice, since hooks come anew after every call."""
    config = changed(config, {"cache": "N2-900-49-o1", "dtype": "float32"})
    sample(config)
    expected = contents(config)
    config = changed(config, {"out": str(tmp_path / offload), "offload": offload})
    if compiled:
        config = changed(config, {"compile": "default"})
        if offload == "group":
            with pytest.raises(ValueError, match="offload=group moves weights within the model"):
                sample(config)
            return
    report = sample(config)
    assert contents(config) == expected and report["steps"]["cached"] > 1


def test_offload_is_one_of_three(config):
    config = changed(config, {"offload": "sometimes"})
    with pytest.raises(ValueError, match="offload is 'sometimes'; known: none, model, group"):
        sample(config)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "ddim"])
def test_every_scheduler_samples(config, scheduler):
    config = changed(config, {"scheduler": scheduler, "prompts": ["the cat"], "cache": "N2-900-49"})
    report = sample(config)
    assert report["steps"]["cached"] > 0
    assert sum(report["steps"].values()) == len(set_timesteps(scheduler, 6))


def set_timesteps(name: str, steps: int) -> list[float]:
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


def test_ddim_steps_are_those_of_the_paper():
    assert set_timesteps("ddim", 50) == list(range(980, -1, -20))


@pytest.mark.slow
def test_pictures(config):
    config = changed(config, {"num_frames": 1, "temporal_attention": False})
    sample(config)
    assert [path.name for path in files(config, "png")] == ["000000-a-dog-runs.png", "000001-the-cat.png", "sheet.png"]
    again = sample(config)
    assert again["num_samples"] == 2


@pytest.mark.slow
def test_temporal_decoder_and_half_precision(config):
    config = changed(
        config, {"temporal_decoder": True, "dtype": "bfloat16", "prompts": ["the cat"], "vae_slicing": False}
    )
    sample(config)
    assert read_mp4(files(config, "mp4")[0]).shape == (4, 3, 16, 16)


@pytest.mark.slow
def test_compiled(config, traced):
    config = changed(config, {"cache": "N2-900-49", "compile": True})
    assert sample(config)["steps"]["cached"] > 1
    files(config, "mp4")[0].unlink()
    config = changed(config, {"compile": False})
    assert sample(config)["num_samples"] == 2  # goes on in the same folder


@pytest.mark.slow
def test_prompts_from_files(config, tmp_path):
    """VBench: a file per dimension, five clips of every prompt, called by it."""
    folder = tmp_path / "dimensions"
    folder.mkdir()
    (folder / "color.txt").write_text("a red cat\n\na dog runs\n")
    (folder / "motion.txt").write_text("a dog runs\n")
    config = changed(config, {"prompts": [], "prompt_file": str(folder), "vbench_names": True, "videos_per_prompt": 2})
    sample(config)
    wanted = ["a dog runs-0.mp4", "a dog runs-1.mp4", "a red cat-0.mp4", "a red cat-1.mp4"]
    assert [path.name for path in files(config, "mp4")] == wanted


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a cat, asleep\n\n 一只小猫 \na cat, asleep\n"),
        ("c.jsonl", '{"image": "a.png", "caption": "a cat, asleep "}\n\n{"text": "一只小猫"}\n"a cat, asleep"\n'),
        ("vimeo_prompts.csv", 'id,caption\n1,"a cat, asleep"\n\n2,一只小猫\n3,"a cat, asleep"\n'),
        ("upper.CSV", 'Prompt , seed\n"a cat, asleep",1\n一只小猫\n"a cat, asleep",2\n'),
        ("parti.tsv", "Prompt\tCategory\na cat, asleep\tx\n一只小猫\ty\na cat, asleep\tz\n"),
        ("caption.json", '["a cat, asleep", "一只小猫", "a cat, asleep"]'),
        ("info.json", '[{"prompt_en": "a cat, asleep"}, {"prompt_en": "一只小猫"}, "a cat, asleep"]'),
        ("lists.json", '{"Prompts": ["a cat, asleep", "一只小猫", "a cat, asleep"]}'),
        ("prompts.json", '{"0.mp4": "a cat, asleep", "1.mp4": "一只小猫", "2.mp4": "a cat, asleep"}'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompt_i_is_that_of_place_i(tmp_path, name, text, encoding):
    """Repetitions stay, by whatever system's lines and encoding."""
    (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode(encoding))
    prompts = ["a cat, asleep", "一只小猫", "a cat, asleep"]
    assert read_prompts([], str(tmp_path / name)) == prompts
    assert read_prompts(["a dog", "a dog"], str(tmp_path / name)) == ["a dog", "a dog", *prompts]
    assert read_prompts(["a dog", "a dog"], str(tmp_path / name), each_once=True) == ["a dog", *prompts[:2]]


def test_only_line_ends_end_a_prompt(tmp_path):
    """Unicode has more, which str.splitlines takes for them."""
    odd = "a\u2028b\x85c\x0bd\x1ce"
    (tmp_path / "a.txt").write_text(f"{odd}\nf", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(f'{{"caption": "{odd[:3]}"}}\n"f"', encoding="utf-8")
    assert read_prompts([], str(tmp_path / "a.txt")) == [odd, "f"]
    assert read_prompts([], str(tmp_path / "a.jsonl")) == [odd[:3], "f"]


def test_one_object_is_one_prompt(tmp_path):
    (tmp_path / "a.json").write_text('{"image": "a.png", "caption": "a cat"}')
    assert read_prompts([], str(tmp_path / "a.json")) == ["a cat"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '"a"\nno JSON', r"a\.jsonl, line 2: wanted is an object with prompt, prompts, .* or text"),
        ("a.jsonl", '{"title": "a cat"}', r"a\.jsonl: wanted is an object with .*, and one has title"),
        ("a.jsonl", '["a cat"]', r"a\.jsonl, line 1: the prompt is \['a cat'\]; it should be a text"),
        ("a.json", '["a", null]', r"a\.json, entry 1 from 0: the prompt is None"),
        ("a.json", '["a", ""]', r"a\.json, entry 1 from 0: the prompt is ''"),
        ("a.json", "[", r"a\.json is no JSON"),
        ("a.json", '{"a": {"b": "c"}}', r"a\.json: wanted is a list of prompts"),
        ("a.json", "[]", "there is nothing to show"),
        ("a.csv", "a cat\na dog\n", r"a\.csv, line 1: columns a cat; .* name one prompt, .* called \.txt"),
        ("a.csv", "caption,id\na,1\n,2\n", r"a\.csv, line 3: the prompt is ''"),
        ("a.csv", "id,caption\n1,a\n2\n", r"a\.csv, line 3: the prompt is None"),
        ("a.csv", "caption\n" + "a" * 200_000, r"a\.csv, line 2: field larger than"),
        ("a.csv", "", "there is nothing to show"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_prompts([], str(tmp_path / name))


@pytest.mark.parametrize("other", ["prompt_file=prompts.txt", "prompts=[a dog]"])
def test_a_command_line_says_once_what_to_show(config, tmp_path, monkeypatch, capsys, other):
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    command = ["sample_t2v.py", "--config", str(tmp_path / "run.yaml"), "--prompt", "a cat", other]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        sample_t2v.main()
    assert f"--prompt and {other.partition('=')[0]}= both say what to show" in capsys.readouterr().err


@pytest.mark.slow
def test_repeated_prompts_have_samples_of_their_own(config):
    """But where files are called by their prompts."""
    config = changed(config, {"prompts": ["the cat", "a dog", "the cat"]})
    sample(config)
    names = ["000000-the-cat.mp4", "000001-a-dog.mp4", "000002-the-cat.mp4"]
    clips = [read_mp4(path) for path in files(config, "mp4")]
    assert [path.name for path in files(config, "mp4")] == names
    assert not torch.equal(clips[0], clips[2])
    config = changed(config, {"vbench_names": True, "out": f"{config.out}-vbench"})
    sample(config)
    assert [path.name for path in files(config, "mp4")] == ["a dog-0.mp4", "the cat-0.mp4"]


@pytest.mark.slow
def test_two_runs_do_not_mix_in_a_folder(config):
    """Whatever their files are called, and whether tiles make the clips others or another schedule."""
    config = changed(config, {"prompts": ["the cat"], "vbench_names": True})
    sample(config)
    for change in ({"prompts": ["a dog"]}, {"cache": "N2-700-50"}, {"vae_tiling": True}):
        with pytest.raises(ValueError, match="made with other settings"):
            sample(replace(config, **change))
    again = replace(config, height=None, width=None, vae_slicing=True, fuse="replace")
    with pytest.raises(ValueError, match=r"size: \[16, 16\] there, \[8, 8\] now"):
        sample(again)
    sample(replace(again, height=16, width=16))


@pytest.mark.slow
def test_empty_and_long_prompts(config):
    config = changed(config, {"prompts": [""]})
    sample(config)
    assert [path.name for path in files(config, "mp4")] == ["000000.mp4"]
    config = changed(config, {"prompts": ["the cat " * 200], "out": config.out + "-long"})
    with pytest.warns(UserWarning, match="120 are the limit"):
        sample(config)
    assert len(files(config, "mp4")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prompts": []}, "there is nothing to show"),
        ({"prompt_file": "nowhere.txt"}, "no prompts in nowhere.txt"),
        ({"scheduler": "magic"}, "scheduler is 'magic'; known: ddim, ddpm"),
        ({"height": 20}, "height 20 and width 16 must be multiples of 8 pixels"),
        ({"num_frames": 5}, "num_frames is 5; this model makes 1 to 4"),
        ({"cache": "N2-700-50-b3"}, "cache branch 3 is larger than the model's number of skips, 2"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"skip": False}, "set skip=true"),
        ({"fuse": "residual"}, "set fuse=replace"),
        ({"guidance_scale": 0.5}, r"guidance_scale is 0\.5; it should be 1 or more"),
        ({"temporal_decoder": True, "vae_tiling": True}, "knows neither vae_slicing nor vae_tiling"),
        *[({"fps": fps}, f"fps is {fps:g}; it should be 0.01 to 1000") for fps in (0, -1.5, math.nan, math.inf, 1e-3)],
        ({"prompts": ["a/b"], "vbench_names": True}, "no file can be called 'a/b'"),
        ({"prompts": ["cat " * 100], "vbench_names": True}, "no file can be called"),
    ],
)
def test_bad_input_is_named(config, change, complaint):
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        sample(changed(config, change))


def test_everything_missing_is_listed_at_once(config, released_t2v, tmp_path):
    config = changed(config, {"weights": str(tmp_path / "nowhere.pt"), "pipeline": str(tmp_path / "half")})
    shutil.copytree(released_t2v / "Latte-0/text_encoder", tmp_path / "half/text_encoder")
    (tmp_path / "half/text_encoder/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        sample(config)
    for name in ("nowhere.pt", "half/vae", "transformer/config.json", "scheduler_config.json", "model.safetensors",
                 "half/tokenizer", "skipdit download text-to-video"):  # fmt: skip
        assert name in str(caught.value)


@pytest.mark.slow
def test_command_line(config, tmp_path, monkeypatch, capsys):
    """`--prompt` takes the place of the config's prompts; `--cache` alone is the original's window."""
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    monkeypatch.setattr("sys.argv", ["sample_t2v.py", "--config", str(tmp_path / "run.yaml"), "--prompt", "a bicycle",
                                     "--prompt", "the cat", "--cache", "steps=8"])  # fmt: skip
    sample_t2v.main()
    (folder,) = Path(config.out).iterdir()  # of these prompts alone: others do not meet them
    assert re.fullmatch("a-bicycle-[0-9a-f]{8}", folder.name)
    report = json.loads((folder / "report.json").read_text())
    assert report["cache"] == "N2-700-50" and sum(report["steps"].values()) == 8
    assert report["config"]["prompts"] == ["a bicycle", "the cat"]
    assert re.search(r"2 clips in .*: \d full and \d cached steps", capsys.readouterr().out)
