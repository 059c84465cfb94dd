"""Every shipped config fits its schema and its own comments; launch scripts start it; a mistake in one is located."""

import copy
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from conftest import ROOT
from diffusers import ModelMixin

from skipdit.caching.policies import parse_policy
from skipdit.caching.runtime import SkipCache
from skipdit.checkpoints.catalogue import FOLDERS, TASKS, Item, select
from skipdit.checkpoints.files import load_state
from skipdit.checkpoints.loading import identify
from skipdit.class_to_image import sample, train
from skipdit.class_to_video import sample as video_sample
from skipdit.class_to_video import train as video_train
from skipdit.commands import app, demo
from skipdit.config import ConfigError, changed, load_config, to_dict, to_yaml
from skipdit.data.settings import ClipData
from skipdit.data.stream import rows_of
from skipdit.diffusion.gaussian import Diffusion
from skipdit.diffusion.schedulers import SCHEDULERS
from skipdit.encoders.reading import READINGS
from skipdit.encoders.text import missing_text_files
from skipdit.layers.flops import run_flops, step_flops
from skipdit.sampling.class_conditional import SAMPLERS
from skipdit.sampling.prompts import read_prompts
from skipdit.tasks import find_task
from skipdit.text_to_image import HunyuanDiT
from skipdit.text_to_image import sample_t2i as t2i_sample
from skipdit.text_to_image import train as t2i_train
from skipdit.text_to_video import LatteT2V
from skipdit.text_to_video import sample_t2v as t2v_sample
from skipdit.text_to_video import train as t2v_train
from skipdit.training.lora import add_lora
from skipdit.utils import shipped
from skipdit.utils.seeding import seed_of

SCRIPTS = {
    "class-to-image": (train, sample),
    "class-to-video": (video_train, video_sample),
    "text-to-video": (t2v_train, t2v_sample),
    "text-to-image": (t2i_train, t2i_sample),
}
TRAIN = "scripts/train.sh"
SPEC = r"N\d+-\d+-\d+(?:-b\d+)?(?:-o\d+)?"


class Shipped:
    """A config of this repository; where tasks differ, of one whose model knows classes.

    Attributes:
        name: as the commands of the comments write it.
        samples: whether it is a run of the task's sampler, not of its trainer.
        head: the comment that the file begins with.
        prose: the head in one line.
        commands: the indented lines of the head, split as a shell does.
    """

    def __init__(self, path: Path):
        self.path, self.task, self.name = path, path.parent.name, path.relative_to(ROOT).as_posix()
        self.samples = re.search("sample|demo", path.stem) is not None
        self.head = re.match(r"(?:#.*\n)*", path.read_text())[0]
        self.prose = " ".join(line.removeprefix("#").strip() for line in self.head.splitlines())
        lines = self.head.replace("\\\n#", "").splitlines()
        self.commands = [shlex.split(line.removeprefix("#")) for line in lines if line.startswith("#   ")]

    @property
    def module(self) -> ModuleType:
        """The script that runs it."""
        return SCRIPTS[self.task][self.samples]

    @cached_property
    def config(self):
        return self.load([])

    def load(self, overrides: list[str]):
        return load_config(self.module.Config, self.path, overrides)

    @cached_property
    def model(self) -> ModelMixin:
        """On the meta device."""
        with torch.device("meta"):
            return self.build().to("meta")

    def flops(self, config, branch: int = 1) -> dict[str, float]:
        """Of a full and a cached step of one sample."""
        return step_flops(self.model, 1 if config.guidance_scale == 1 else 2, branch, **self.sizes)

    # What differs between tasks

    def build(self) -> ModelMixin:
        data = self.config if self.samples else self.config.data
        size = data.image_size // downsampling(self.config.vae)
        frames = (data.num_frames,) if self.task == "class-to-video" else ()
        return SCRIPTS[self.task][1].build_model(self.config.model, size, *frames)

    def cache(self, config, spec: str) -> SkipCache:
        return SkipCache(spec, Diffusion(config.steps).sampling_timesteps)

    @property
    def made(self) -> int:
        """Samples."""
        return self.config.num_samples

    @property
    def sizes(self) -> dict[str, int]:
        """Of the model's inputs, where it takes several."""
        return {}

    @property
    def latents(self) -> tuple[int, ...]:
        """Of a frame, (C, h, w)."""
        return self.model.sample_shape[-3:]

    @property
    def stack(self) -> tuple[int, int, str]:
        """Parts of a layer, parts in all, and what the comments call them."""
        return self.model.blocks_per_layer, len(self.model.blocks), "blocks"

    @property
    def weights(self) -> str:
        """To start from; empty for none."""
        return (self.config.weights if self.samples else self.config.init) or ""

    @property
    def needed(self) -> list[str]:
        """Files that have to be there; of a folder, one of them."""
        return [f"{self.config.vae}/config.json", *filter(None, [self.weights])]

    def text_files(self, role: str) -> tuple[str, str]:
        """Text encoder of a training run, and where it looks for what that gave."""
        return self.config.text_encoder, self.config.texts

    def text_override(self, role: str) -> str:
        """The setting of the latter."""
        return "texts"

    def tokens(self, role: str) -> int:
        """At most, of a text."""
        return READINGS[role].max_tokens


class Prompted(Shipped):
    """Of a task whose model reads texts, and whose sampler runs a pipeline of diffusers."""

    def cache(self, config, spec: str) -> SkipCache:
        scheduler = self.module.make_scheduler(config.scheduler)
        scheduler.set_timesteps(config.steps)
        return SkipCache(spec, scheduler.timesteps)


class TextToVideo(Prompted):
    """Its models are described by folders; the released ones, which are absent here, have the defaults of the class."""

    def build(self) -> ModelMixin:
        config = self.config
        if not self.samples and config.model.folder is None:
            size = config.data.image_size // downsampling(config.vae)
            return t2v_train.build_model(config.model, size, config.data.num_frames)
        folder = ROOT / (f"{config.pipeline}/transformer" if self.samples else config.model.folder)
        settings = LatteT2V.load_config(folder) if (folder / "config.json").is_file() else {}
        kind = {"skip": config.skip} if self.samples else {"skip": config.model.skip, "fuse": config.model.fuse}
        return LatteT2V.from_config(settings, **kind)

    @property
    def made(self) -> int:
        return len(self.config.prompts) * self.config.videos_per_prompt

    @property
    def sizes(self) -> dict[str, int]:
        data = self.config if self.samples else self.config.data
        factor = downsampling(self.config.places()["vae"] if self.samples else self.config.vae)
        pixels = (data.height, data.width) if self.samples else (data.image_size, data.image_size)
        height, width = (side // factor if side else self.latents[-1] for side in pixels)
        return {"frames": data.num_frames, "height": height, "width": width, "tokens": 120}

    @property
    def latents(self) -> tuple[int, ...]:
        return self.model.config.in_channels, self.model.config.sample_size, self.model.config.sample_size

    @property
    def stack(self) -> tuple[int, int, str]:
        return 1, self.model.config.num_layers, "pairs"

    @property
    def needed(self) -> list[str]:
        config = self.config
        if self.samples:
            weights, places = config.weights, config.places()
            files = [f"{config.pipeline}/transformer/config.json"]
            files += [f"{config.pipeline}/scheduler/scheduler_config.json"]
        else:
            weights, places = config.init or "", {"vae": config.vae, "text_encoder": config.text_encoder}
            files = [f"{config.model.folder}/config.json"] if config.model.folder else []
        files += [f"{place}/config.json" for place in places.values()]
        files += [f"{config.tokenizer or Path(places['text_encoder']).parent / 'tokenizer'}/tokenizer_config.json"]
        weights += "/diffusion_pytorch_model.safetensors" if weights.endswith("/transformer") else ""
        return [*files, weights]


class TextToImage(Prompted):
    """The released model is absent here, and is what the defaults of the class describe."""

    def build(self) -> ModelMixin:
        if not self.samples:
            return t2i_train.build_model(self.config.model, self.config.data.image_size // downsampling(self.vae))
        weights = ROOT / self.weights
        return HunyuanDiT(**HunyuanDiT.config_from_state(load_state(weights))) if weights.exists() else HunyuanDiT()

    @property
    def weights(self) -> str:
        return self.config.places()["weights"] if self.samples else super().weights

    @property
    def vae(self) -> str:
        return self.config.places()["vae"] if self.samples else self.config.vae

    @property
    def made(self) -> int:
        return len(self.config.prompts) * self.config.images_per_prompt

    @property
    def sizes(self) -> dict[str, int]:
        data, factor = self.config if self.samples else self.config.data, downsampling(self.vae)
        height, width = (data.height, data.width) if self.samples else (data.image_size, data.image_size)
        return {"height": height // factor, "width": width // factor}

    @property
    def latents(self) -> tuple[int, ...]:
        return self.model.config.in_channels, *self.model.config.input_size

    @property
    def stack(self) -> tuple[int, int, str]:
        return 1, self.model.config.depth, "blocks"

    @property
    def needed(self) -> list[str]:
        config = self.config
        if self.samples:
            places = config.places()
            encoders = (places["text_encoder"], config.tokenizer), (places["text_encoder_2"], config.tokenizer_2)
        else:
            encoders = (config.clip.encoder, config.clip.tokenizer), (config.t5.encoder, config.t5.tokenizer)
        of_texts = [file.partition(" (or")[0] for encoder in encoders for file in missing_text_files(*encoder)]
        return [f"{self.vae}/config.json", *of_texts, *filter(None, [self.weights])]

    def text_files(self, role: str) -> tuple[str, str]:
        part = getattr(self.config, role)
        return part.encoder, part.files

    def text_override(self, role: str) -> str:
        return f"{role}.files"

    def tokens(self, role: str) -> int:
        return {"clip": self.model.config.text_len, "t5": self.model.config.text_len_t5}[role]


def shipped_at(path: Path) -> Shipped:
    return {"text-to-video": TextToVideo, "text-to-image": TextToImage}.get(path.parent.name, Shipped)(path)


def downsampling(vae: str) -> int:
    """Pixels per latent pixel: read from a folder of this repository; the Hub's autoencoders all have 8."""
    file = ROOT / vae / "config.json"
    return 2 ** (len(json.loads(file.read_text())["block_out_channels"]) - 1) if file.exists() else 8


ALL = [shipped_at(path) for path in sorted((ROOT / "configs").rglob("*.yaml"))]
TRAINING, SAMPLING = [s for s in ALL if not s.samples], [s for s in ALL if s.samples]


def each(shipped: list[Shipped]):
    return pytest.mark.parametrize("shipped", shipped, ids=lambda s: f"{s.task}/{s.path.stem}")


@pytest.mark.slow
@each(ALL)
def test_shipped_config_builds_its_model(shipped):
    assert shipped.latents[-1] % shipped.model.config.patch_size == 0


@pytest.mark.slow
def test_every_config_is_of_a_task_and_has_an_out_folder_of_its_own():
    folders = [shipped.config.out for shipped in ALL]
    assert {shipped.task for shipped in ALL} == set(SCRIPTS)
    assert sorted(set(folders)) == sorted(folders)


@pytest.mark.slow
@each([s for s in TRAINING if s.path.stem.endswith(("stage1", "stage2"))])
def test_stages_follow_each_other(shipped):
    """Stage 1 trains skips onto a plain model; stage 2 trains everything, from what stage 1 made."""
    config, first = shipped.config, shipped.path.stem.endswith("stage1")
    assert config.init
    assert config.train.freeze is first
    assert shipped.model.n_skips > 0
    if not first:
        before = stage1(shipped).config
        assert config.init == before.out
        assert (config.model, config.data) == (before.model, before.data)


def stage1(shipped: Shipped) -> Shipped:
    return shipped_at(shipped.path.with_stem(shipped.path.stem.replace("stage2", "stage1")))


@pytest.mark.slow
@each([s for s in SAMPLING if not isinstance(s, Prompted)])
def test_sampling_settings_fit_the_model(shipped):
    config, known = shipped.config, shipped.model.null_class or 0
    assert [c for c in config.classes if not 0 <= c < known] == []
    assert known or config.guidance_scale == 1
    assert config.sampler in SAMPLERS


@pytest.mark.slow
@each([s for s in ALL if isinstance(s, TextToVideo)])
def test_text_to_video_settings_fit_the_model(shipped):
    model, sizes = shipped.model.config, shipped.sizes
    assert 1 <= sizes["frames"] <= model.video_length
    assert (sizes["height"] % model.patch_size, sizes["width"] % model.patch_size) == (0, 0)
    if not shipped.samples:
        assert (sizes["height"], sizes["width"]) == shipped.latents[1:]


@pytest.mark.slow
@each([s for s in ALL if isinstance(s, TextToImage)])
def test_text_to_image_settings_fit_the_model(shipped):
    """The released model is sampled in a shape that it was trained for, and trained further in all of them."""
    config, model = shipped.config, shipped.model.config
    if shipped.samples:
        shapes = [f"{config.height}x{config.width}"]
    else:
        shapes = config.data.buckets or [f"{config.data.image_size}x{config.data.image_size}"]
        assert config.clip.encoder and config.t5.encoder
        assert bool(config.lora_rank) == ("lora" in shipped.path.stem)
    unit = max(t2i_sample.UNIT, downsampling(shipped.vae) * model.patch_size)
    assert [side for shape in shapes for side in map(int, shape.split("x")) if side % unit] == []
    if model.hidden_size == t2i_sample.RELEASED_WIDTH:
        assert set(shapes) <= set(t2i_sample.SIZES)
        assert shipped.samples or len(shapes) == len(t2i_sample.SIZES)


@each([s for s in SAMPLING if isinstance(s, Prompted)])
def test_prompts_are_there_once(shipped):
    config = shipped.config
    assert config.scheduler in SCHEDULERS
    assert bool(config.prompts) != bool(config.prompt_file)
    assert len(set(config.prompts)) == len(config.prompts)


def places(item: Item, folder: str) -> Iterator[str]:
    """Where its files are after the download; patterns, as the item has them."""
    for pattern in item.files:
        yield from ((Path(folder) / item.folder / name).as_posix() for name in pattern.split("|"))


def downloaded(command: list[str]) -> tuple[str, dict[str, Item]]:
    """Folder and items of a `download.sh` command."""
    only = command[command.index("--only") + 1 :] if "--only" in command else []
    return after("--dir", command, FOLDERS[command[2]]), select(command[2], only)


def is_released(file: str) -> bool:
    return file.startswith(tuple(f"{folder}/" for folder in FOLDERS.values()))


@each(SAMPLING + [s for s in TRAINING if s.task != "class-to-image"])  # which do not say where the autoencoder is from
def test_commands_bring_the_released_files(shipped):
    """Those of stage 1 count for stage 2."""
    found = []
    for command in shipped.commands + (stage1(shipped).commands if shipped.path.stem.endswith("stage2") else []):
        if command[:2] == ["bash", "scripts/download.sh"]:
            folder, items = downloaded(command)
            found += [place for item in items.values() for place in places(item, folder)]
        elif command[0] == "wget":
            found.append(f"{after('-P', command)}/{Path(command[-1]).name}")
    needed = [file for file in shipped.needed if is_released(file)]
    assert [file for file in needed if not any(fnmatch(file, place) for place in found)] == []


@each([s for s in SAMPLING + [s for s in TRAINING if "lora" in s.path.stem] if is_released(s.weights)])
@pytest.mark.slow
def test_released_weights_are_of_the_model_that_the_config_builds(shipped):
    checkpoints = [item for item in TASKS[shipped.task].values() if item.holds]
    found = [(item.holds, place) for item in checkpoints for place in places(item, FOLDERS[shipped.task])]
    fitting = [holds for holds, place in found if any(fnmatch(file, place) for file in shipped.needed)]
    assert identify(shipped.model.state_dict()) in fitting


@pytest.mark.filterwarnings("error")  # SkipCache warns if it never engages
@each(SAMPLING)
def test_caches_engage_and_fit_the_model(shipped):
    """That of the config, and those that its comment proposes."""
    own = [shipped.config.cache] if shipped.config.cache != "none" else []
    assert bool(own) == ("cache" in shipped.path.stem)
    for spec in own + re.findall(SPEC, shipped.head):
        cache = shipped.cache(shipped.config, spec)
        assert cache.cached_steps > 0
        assert cache.spec.branch <= shipped.model.n_skips


@each(ALL)
def test_shipped_config_begins_with_its_command(shipped, launch):
    """Commands name files and settings that exist, and one of them runs this very config."""
    runs = []
    for command in shipped.commands:
        assert [w for w in command if w.startswith(("configs/", "scripts/")) and not (ROOT / w).is_file()] == []
        if command[0] == "torchrun" and "-m" in command:
            command = ["python", *command[command.index("-m") :]]
        elif command[0] == "skipdit":
            command = ["python", "-m", *command]
        if command[:2] == ["bash", TRAIN]:
            runs.append(after("--config", launch(*command[1:]).stdout.splitlines()))
        elif command[:2] == ["bash", "scripts/download.sh"]:
            assert set(command[3:5:2]) <= {"--dir", "--only"}
            folder, items = downloaded(command)
            assert command[2] == shipped.task
            for item in items.values():
                assert item.repo_type == "model" or f"{folder}/{item.folder}" == shipped.config.data.path
        elif command[:2] == ["python", "scripts/fetch_emoji.py"]:
            assert after("--out", command) == f"data/emoji-{after('--kind', command, 'anim')}"
        elif command[0] == "python" and command[1].startswith("scripts/"):
            continue  # what prepares the data
        elif command[0] == "wget":  # the checkpoint to start from
            assert f"{after('-P', command)}/{Path(command[-1]).name}" == shipped.config.init
        elif command[:4] == ["python", "-m", "skipdit", "data"]:
            assert command[4:] == ["check", shipped.name]
        elif command[:4] == ["python", "-m", "skipdit", "encode"]:
            data = shipped.config.data
            if data.kind == "latents":  # the ones that this run trains on
                assert after("--out", command) == data.path
                continue
            assert (after("--data", command), after("--path", command)) == (data.kind, data.path)
            assert ("--labelled" in command) == getattr(data, "labelled", False)
            assert buckets_of(command) == getattr(data, "buckets", [])
            assert int(after("--image-size", command, "256")) == data.image_size
            assert after("--captions", command) == getattr(data, "captions", None)
            assert after("--vae", command) == shipped.config.vae
            assert f"data.kind=latents data.path={after('--out', command)}:" in shipped.prose
        elif command[:4] == ["python", "-m", "skipdit", "encode-text"]:
            role, out = after("--role", command, "latte"), after("--out", command)
            encoder, files = shipped.text_files(role)
            assert (command[4], after("--text-encoder", command)) == (shipped.name, encoder)
            assert files == out or f"{shipped.text_override(role)}={out} " in shipped.prose
            assert int(after("--max-tokens", command, READINGS[role].max_tokens)) == shipped.tokens(role)
        elif command[:2] == ["python", "-c"]:
            continue  # tested below
        else:
            assert command[0] in ("python", "torchrun")
            script = f"{shipped.task}/{shipped.module.__name__.rpartition('.')[2]}.py"
            assert script in command
            assert (ROOT / script).is_file()
            runs.append(after("--config", command))
    assert runs == [shipped.name]


def buckets_of(command: list[str]) -> list[str]:
    words = command[command.index("--buckets") + 1 :] if "--buckets" in command else []
    return list(itertools.takewhile(lambda word: not word.startswith("--"), words))


def after(option: str, words: list[str], default: str | None = None) -> str | None:
    return words[words.index(option) + 1] if option in words else default


@pytest.mark.parametrize("gpus", [4, 8, 16])
@each([s for s in TRAINING if TRAIN in s.head])
def test_batch_of_a_launched_config_is_shared_out_evenly(shipped, gpus):
    config = shipped.config.train
    assert rows_of(config.batch_size, config.micro_batch_size or config.batch_size // gpus, 0, gpus)


def number(text: str) -> float:
    return float(text.replace(",", "").replace("M", "e6"))


@pytest.mark.slow
@each(ALL)
def test_settings_quoted_in_the_comment(shipped):
    """Steps, samples, the files of its neighbours, and settings as they are given on the command line."""
    steps = shipped.config.steps if shipped.samples else shipped.config.train.steps
    assert {number(n) for n in re.findall(r"([\d,.]*\dM?) steps", shipped.prose)} <= {steps}
    if shipped.samples:
        quoted = {number(n) for n in re.findall(r"([\d,]*\d) (?:clips|images|pictures)", shipped.prose)}
        assert quoted <= {shipped.made}
    for file in re.findall(r"(?<![\w/-])[\w-]+\.yaml", shipped.head):
        assert (shipped.path.parent / file).is_file()
    for override in re.findall(r"(?<!\S)[a-z_]\w*(?:\.[a-z_]+)*=\S*\w", shipped.prose):
        shipped.load([override])


@pytest.mark.slow
@each(ALL)
def test_sizes_quoted_in_the_comment(shipped):
    """Parameters, blocks, bytes on disk, frames."""
    model, prose = shipped.model, shipped.prose
    skips = sum(p.numel() for name, p in model.named_parameters() if name.startswith("skips."))
    total = sum(p.numel() for p in model.parameters())
    for trained, frozen in re.findall(r"(\d+)M parameters train, (\d+)M are frozen", prose):
        added = adapters(shipped)
        counts = (added, total) if added else (skips, total - skips)
        assert (int(trained), int(frozen)) == tuple(round(count / 1e6) for count in counts)
    for count in re.findall(r"all (\d+)M parameters train", prose):
        assert int(count) == round(total / 1e6)
    for outer, count, unit in re.findall(r"runs (\d+) of the (\d+) (blocks|pairs)", prose):
        each_layer, *whole = shipped.stack
        branch = parse_policy(shipped.config.cache).branch
        assert (int(outer), int(count), unit) == (2 * branch * each_layer, *whole)
    for gigabytes in re.findall(r"checkpoint takes ([\d.]+) GB", prose):
        trained = skips if shipped.config.train.freeze else total  # these have two moments, beside weights and average
        assert float(gigabytes) == round(4 * (2 * total + 2 * trained) / 1e9, 1)
    frame = 2 * 2 * 2 * math.prod(shipped.latents)  # mean and deviation, both ways round, float16
    for kibibytes in re.findall(r"(\d+) KiB a (?:frame|picture)", prose):
        assert int(kibibytes) == frame / 1024
    for terabytes, clips, frames in re.findall(r"([\d.]+) TB for (\d+)k clips of (\d+) frames", prose):
        assert float(terabytes) == round(1000 * int(clips) * int(frames) * frame / 1e12, 1)
    for kibibytes in re.findall(r"(\d+) KiB a token", prose):  # float16
        assert int(kibibytes) == 2 * model.config.caption_channels / 1024
    for kibibytes in re.findall(r"(\d+) KiB a caption of the T5", prose):  # with its padding
        assert int(kibibytes) == 2 * model.config.text_len_t5 * model.config.text_states_dim_t5 / 1024
    for frames in re.findall(r"fewer than (\d+) frames", prose):
        data = shipped.config.data
        assert int(frames) == (data.num_frames - 1) * data.frame_interval + 1


def adapters(shipped: Shipped) -> int:
    """Parameters of the adapters that a config trains."""
    rank = getattr(shipped.config, "lora_rank", 0)
    if not rank:
        return 0
    model = copy.deepcopy(shipped.model)
    add_lora(model, rank)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
@each(SAMPLING)
def test_costs_quoted_in_the_comment(shipped):
    """Plans and the FLOPs that they save, with the overrides that the comment names; FLOPs of a sample."""
    quoted = re.findall(
        r"(\d+) full and (\d+) cached steps, ([\d.]+) times fewer FLOPs"
        r"(?: with ((?:(?:--cache |[\w.]+=)[\w./-]*\w ?)+))?",
        shipped.prose,
    )
    assert quoted or "cache" not in shipped.path.stem, "a config with a cache says what it saves"
    for full, cached, saved, overrides in quoted:
        config = shipped.load(overrides.replace("--cache ", "cache=").split())
        cache = shipped.cache(config, config.cache)
        flops = shipped.flops(config, cache.spec.branch)
        assert (int(full), int(cached)) == (cache.full_steps, cache.cached_steps)
        assert float(saved) == round(len(cache.plan) * flops["full"] / run_flops(cache, flops), 2)
        assert not overrides or config.out != shipped.config.out, "other samples need another folder"
    for teraflops in re.findall(r"([\d,]+) TFLOPs a (?:clip|picture)", shipped.prose):
        assert number(teraflops) == round(shipped.config.steps * shipped.flops(shipped.config)["full"] / 1e12)


def test_prompts_of_coco_are_one_caption_per_line(tmp_path):
    """The command of the config makes the file that the config reads, of one caption of each picture."""
    shipped = shipped_at(ROOT / "configs/text-to-image/t2i_sample_coco.yaml")
    (command,) = (command for command in shipped.commands if command[1] == "-c")
    rows = [{"image_id": i // 2, "caption": f"picture\n {i // 2},  caption {i}"} for i in range(60_040)]
    (tmp_path / "data/coco/annotations").mkdir(parents=True)
    content = json.dumps({"annotations": [*rows, {"image_id": -1, "caption": rows[1]["caption"]}]})
    (tmp_path / "data/coco/annotations/captions_val2014.json").write_text(content)
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    prompts = read_prompts([], tmp_path / shipped.config.prompt_file)
    assert (len(prompts), len({prompt.split(",")[0] for prompt in prompts})) == (30_000, 30_000)


# Launch scripts


@pytest.fixture
def launch(tmp_path):
    """Run a script in a copy of this repository's scripts, where `torchrun` prints its arguments, one a line."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("configs", *SCRIPTS):
        (tmp_path / name).symlink_to(ROOT / name)
    fake(tmp_path / "bin" / "torchrun", 'printf "%s\\n" "$@"')
    inherited = {k: v for k, v in os.environ.items() if not re.match("GPUS|N?NODE|SLURM_|MASTER_", k)}
    inherited["PATH"] = f"{tmp_path / 'bin'}:{inherited['PATH']}"

    def run(script: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
        command = ["bash", script, *args]
        return subprocess.run(command, cwd=tmp_path, env=inherited | environment, capture_output=True, text=True)

    return run


def fake(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


STANDALONE = ["--standalone", "--nproc-per-node"]
RUN = ["class-to-image", "imagenet256_scratch"]
CLUSTER = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "node0"}


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_script_parses(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("args", "environment", "complaint"),
    [
        ([], {}, "a task and the name of a config are wanted"),
        (["class-to-image"], {}, "a task and the name of a config are wanted"),
        (["class-to-image", "ucf101_scratch"], {}, "no file configs/class-to-image/ucf101_scratch.yaml"),
        (["imagenet256_scratch", "class-to-image"], {}, "no task imagenet256_scratch"),
        *(
            (RUN, CLUSTER | {name: ""}, "4 machines need NODE_RANK and MASTER_ADDR")
            for name in CLUSTER
            if name != "NNODES"
        ),
    ],
)
def test_launch_script_explains_itself(launch, args, environment, complaint):
    done = launch(TRAIN, *args, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {complaint}\nusage: bash {TRAIN}" in done.stderr


@each([s for s in TRAINING if TRAIN in s.head])
def test_launch_script_starts_torchrun(shipped, launch):
    task, config = Path(shipped.name).parts[-2:]
    said = launch(TRAIN, task, Path(config).stem).stdout.splitlines()
    assert said == [*STANDALONE, "8", f"{task}/train.py", "--config", f"configs/{task}/{config}"]


def test_launch_script_hands_on_what_follows(launch):
    said = launch(TRAIN, *RUN, "--dry-run", "out=a folder", GPUS="4").stdout.splitlines()
    assert said[:3] == [*STANDALONE, "4"]
    assert said[-2:] == ["--dry-run", "out=a folder"]


@pytest.mark.parametrize("slurm", [False, True])
@pytest.mark.parametrize(
    "run", ["class-to-video/ucf101_scratch", "text-to-video/t2v_train_stage2", "text-to-image/t2i_lora"]
)
def test_multinode_script_starts_torchrun(launch, slurm, run):
    names = {"NNODES": "SLURM_NNODES", "NODE_RANK": "SLURM_NODEID"} if slurm else {}
    environment = {names.get(name, name): value for name, value in CLUSTER.items()}
    task, config = run.split("/")
    said = launch(TRAIN, task, config, "train.parallel=fsdp", **environment).stdout.splitlines()
    assert said == [
        *("--nnodes", "4", "--node-rank", "3"),
        *("--rdzv-backend", "static", "--rdzv-endpoint", "node0:29500", "--nproc-per-node", "8"),
        *(f"{task}/train.py", "--config", f"configs/{run}.yaml", "train.parallel=fsdp"),
    ]


def test_launch_script_prefers_the_environment_of_the_checkout(launch, tmp_path):
    fake(tmp_path / ".venv/bin/torchrun", "echo from .venv")
    for environment in ({}, CLUSTER):
        assert launch(TRAIN, *RUN, **environment).stdout == "from .venv\n"


# Mistakes in configs


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("out: x\ntrain:\n  setps: 3\n", 3, ["train.setps", "'steps'"]),  # the nearest known key
        ("outt: x\n", 1, ["'outt'", "'out'"]),
        ("train.steps: 3\n", 1, ["train.steps"]),
        ("train:\n  steps: many\n", 2, ["train.steps", "'many'", "int"]),
        ("train:\n  steps: 2.5\n", 2, ["train.steps", "2.5"]),
        ("train:\n  steps:\n", 2, ["train.steps", "None"]),
        ("train:\n  lr: {a: 1}\n", 2, ["train.lr", "float"]),
        ("train:\n  betas: [0.9, x]\n", 2, ["train.betas"]),
        ("out: x\ntrain: 3\n", 2, ["train is 3", "section"]),
        ("out: a\nout: b\n", 2, ["out"]),  # the same key twice
        ("a: [1, 2\nb: }\n", 2, ["not valid YAML"]),
        ("out: !!python/object/apply:os.getcwd []\n", 1, ["python/object"]),
        ("- a\n- b\n", 1, ["not a config"]),
        ("only words\n", 1, ["not a config"]),
    ],
)
def test_mistake_names_file_line_and_key(tmp_path, text, line, said):
    path = tmp_path / "mistake.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(train.Config, path)
    for part in (f"{path}, line {line}:", *said):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("schema", "text", "line", "said"),
    [
        (t2v_train.Config, "out: x\nmodel:\n  fused: residual\n", 3, ["model.fused", "'fuse'"]),
        (t2v_train.Config, "data:\n  caption: x\n", 2, ["data.caption", "'captions'"]),
        (t2v_sample.Config, "weights: x\nguidance: 3\n", 2, ["'guidance'", "'guidance_scale'"]),
        (t2v_sample.Config, "weights: x\nprompts: a cat\n", 2, ["prompts is 'a cat'", "list"]),
        (t2i_train.Config, "out: x\nclip:\n  encode: x\n", 3, ["clip.encode", "'encoder'"]),
        (t2i_train.Config, "out: x\nlora_rank: many\n", 2, ["lora_rank", "'many'"]),
        (t2i_train.Config, "data:\n  buckets: 1024x768\n", 2, ["data.buckets", "list"]),
        (t2i_sample.Config, "out: x\nsize: 3\n", 2, ["'size'"]),
    ],
)
def test_mistake_in_a_config_of_prompts_is_located(tmp_path, schema, text, line, said):
    path = tmp_path / "mistake.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(schema, path)
    for part in (f"{path}, line {line}:", *said):
        assert part in str(error.value)


@pytest.mark.parametrize("content", [b"\x80\x00\x01", b"out: \x00"])
def test_file_that_is_not_text_is_named(tmp_path, content):
    path = tmp_path / "weights.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_config(train.Config, path)


def test_absent_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(train.Config, "nowhere.yaml")


def test_missing_required_key_is_named(tmp_path):
    path = tmp_path / "mistake.yaml"
    path.write_text("out: x\n")
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))} does not set weights"):
        load_config(sample.Config, path)


def test_reference_to_nothing_is_named(tmp_path):
    path = tmp_path / "mistake.yaml"
    path.write_text("out: ${nothing}\n")
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}: out: .*nothing"):
        load_config(train.Config, path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps", "has no '='"),
        ("train.steps=many", "train.steps is 'many'"),
        ("train.setps=3", "did you mean 'steps'"),
        ("freeze=True", "unknown key 'freeze'; did you mean 'train.freeze'?"),
        ("model.freeze=True", "unknown key 'model.freeze'; did you mean 'train.freeze'?"),
        ("steps=3", "did you mean 'train.steps'?"),
        ("bathc_size=3", "did you mean 'train.batch_size'?"),
        ("path=x", "did you mean 'data.path'?"),
        ("train.out=x", "did you mean 'out'"),
        ("train.betas.0=3", "train.betas"),
        ("train.betas=[0.9", "override 'train.betas=[0.9'"),
        ("out=", "out is None; it should be str"),
        ("out=null", "out is None; it should be str"),
    ],
)
def test_mistake_in_override_is_named(override, said):
    with pytest.raises(ConfigError) as error:
        load_config(train.Config, None, [override])
    assert said in str(error.value)
    assert override in str(error.value)


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("out: file\ntrain: {steps: 5, lr: 1e-3}\n")
    config = load_config(train.Config, path, ["train.steps=6", "train.steps=7", "train.betas=[0.5, 0.9]"])
    assert (config.out, config.train.steps, config.train.lr) == ("file", 7, 1e-3)
    assert tuple(config.train.betas) == (0.5, 0.9)


WORDS = ("no", "yes", "on", "off", "true", "007", "1e3", "0x1F", "1_000", "12:30:45", "2024-01-01", ".5", "null", "~")


@pytest.mark.parametrize("how", ["block", "flow", "command line"])
def test_lists_of_text_are_taken_as_they_are(tmp_path, how):
    """YAML would take these words for truth values, numbers, times and nothing."""
    path, overrides = tmp_path / "run.yaml", []
    if how == "command line":
        path.write_text("prompts: [a]\n")
        overrides = [f"prompts=[{', '.join(WORDS)}]"]
    else:
        block, flow = "".join(f"\n- {word}" for word in WORDS), f" [{', '.join(WORDS)}]"
        path.write_text("prompts:" + (block if how == "block" else flow))
    config = load_config(t2i_sample.Config, path, overrides)
    assert config.prompts == list(WORDS)
    path.write_text(to_yaml(config))
    assert load_config(t2i_sample.Config, path).prompts == list(WORDS), "as runs keep their configs"


@pytest.mark.parametrize("word", [word for word in WORDS if word not in ("null", "~")])
def test_texts_are_taken_as_they_are(tmp_path, word):
    path = tmp_path / "run.yaml"
    path.write_text(f"out: a/{word}\nnegative_prompt: {word}\nvae: {word}\nprompt_file: {word}\nsteps: 7\n")
    config = load_config(t2i_sample.Config, path)
    assert (config.out, config.negative_prompt, config.vae, config.prompt_file) == (f"a/{word}", *[word] * 3)
    config = load_config(t2i_sample.Config, path, [f"{name}={word}" for name in ("out", "negative_prompt", "vae")])
    assert (config.out, config.negative_prompt, config.vae, config.steps) == (word, word, word, 7)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("a: b, c", "a: b, c"),
        ("[worst quality], blurry", "[worst quality], blurry"),
        ("{a} # 1", "{a} # 1"),
        ('it\'s "so"', 'it\'s "so"'),
        ("'quoted'", "quoted"),
        ('"null"', "null"),
        ('""', ""),
        (" spaces ", "spaces"),
        ("a=b", "a=b"),
    ],
)
def test_a_text_of_the_command_line_is_no_yaml(given, text):
    assert load_config(t2i_sample.Config, None, [f"negative_prompt={given}"]).negative_prompt == text


def test_settings_without_a_text_stay_without(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("vae: null\nprompt_file: ~\nweights:\n")
    config = load_config(t2i_sample.Config, path)
    assert (config.vae, config.prompt_file, config.weights) == (None, None, None)
    overrides = ["vae=a", "vae=null", "weights=b", "weights=", "prompt_file=c", "prompt_file=~"]
    config = load_config(t2i_sample.Config, path, overrides)
    assert (config.vae, config.prompt_file, config.weights) == (None, None, None)


def test_texts_of_merged_mappings_and_of_sections(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: &data\n  path: 010\n  clip_list: no\n  flip: no\nout: x\n")
    config = load_config(video_train.Config, path)
    assert (config.data.path, config.data.clip_list, config.data.flip) == ("010", "no", False)
    config = load_config(video_train.Config, path, ["data={path: 011, flip: yes}"])
    assert (config.data.path, config.data.flip) == ("011", True)
    path.write_text("base: &base {path: 010, clip_list: off}\ndata:\n  <<: *base\n  path: 1e3\n")
    section = load_config(ClipData, path, ["classes=[001, on]"], section="data")
    assert (section.path, section.clip_list, section.classes) == ("1e3", "off", ["001", "on"])


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = tmp_path / "run.yaml"
    path.write_text("out: ~/runs/a\ndata: {path: ~/clips, clip_list: a~/list}\n")
    config = load_config(video_train.Config, path, ["init=~/plain.pt", "vae=~vae"])
    assert (config.out, config.data.path) == (f"{tmp_path}/runs/a", f"{tmp_path}/clips")
    assert (config.init, config.vae, config.data.clip_list) == (f"{tmp_path}/plain.pt", "~vae", "a~/list")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_of_any_editor(tmp_path, encoding):
    """Windows' editors begin files with a byte order mark, and end lines with two characters."""
    path = tmp_path / "run.yaml"
    path.write_bytes("out: läufe/渔舟\r\nnegative_prompt: 模糊\r\n".encode(encoding))
    config = load_config(t2i_sample.Config, path)
    assert (config.out, config.negative_prompt) == ("läufe/渔舟", "模糊")


@pytest.mark.parametrize("task", SCRIPTS)
@pytest.mark.parametrize("kind", [0, 1])
def test_a_seed_that_other_programs_draw_is_refused(task, kind):
    """Before anything is loaded."""
    given = ["train.seed=-1"] if kind == 0 else ["seed=-1"]
    given += ["weights=x"] if "weights" in {field.name for field in fields(SCRIPTS[task][kind].Config)} else []
    with pytest.raises(ConfigError, match="seed is -1; it should be 0 or more"):
        load_config(SCRIPTS[task][kind].Config, None, given)
    with pytest.raises(ValueError, match="seed is -1"):
        seed_of(-1, 3)


@pytest.mark.parametrize("command", [app, demo], ids=["app", "demo"])
def test_files_that_no_user_named_are_found_without_a_word(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "find_spec", lambda package: package)  # gradio is not everybody's
    shipped._told.cache_clear()
    config = command.read_arguments([]).config
    config = config if command is demo else config[0]
    load_config(find_task(config).schema, config)  # as the command itself does then
    assert not capsys.readouterr().err


def test_files_of_the_project_are_found_in_any_folder(tmp_path, monkeypatch, capsys):
    """What lies in the checkout is found there; the others are fetched by a command that needs no checkout."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"no config file configs/none\.yaml; .* are in {ROOT}/configs$"):
        load_config(sample.Config, "configs/none.yaml")
    shipped._told.cache_clear()
    plan = "configs/class-to-image/demo_plan.json"
    config = load_config(sample.Config, "configs/class-to-image/demo.yaml", [f"cache={plan}"])
    assert config.weights == str(ROOT / "class-to-image/weights/fashion-deep-skip.pt") and config.out == "samples/demo"
    assert config.cache == str(ROOT / plan)
    assert f"demo.yaml is not here: taking {ROOT}/configs/class-to-image/demo.yaml\n" in capsys.readouterr().err
    assert find_task("configs/class-to-video/demo.yaml").name == "class-to-video"
    with pytest.raises(FileNotFoundError, match=r"`skipdit download class-to-image` fetches"):
        sample.sample(load_config(sample.Config, "configs/class-to-image/demo.yaml", ["weights=nowhere.pt"]))
    sources = [*ROOT.glob("src/**/*.py"), *ROOT.glob("class-to-*/*.py"), *ROOT.glob("text-to-*/*.py")]
    assert len(sources) > 60 and not [path for path in sources if "bash scripts/" in path.read_text()]


def test_a_config_can_name_its_task(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("task: text-to-video\nweights: x.pt\n")
    assert (
        find_task(str(file)).name == "text-to-video" and find_task(str(file), "class-to-image").name == "class-to-image"
    )
    assert load_config(t2v_sample.Config, file).weights == "x.pt"
    file.write_text("weights: x.pt\n")
    with pytest.raises(ValueError, match="write task: class-to-image into it"):
        find_task(str(file))


@pytest.mark.slow
def test_what_commands_write_is_ignored_by_git():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no checkout")
    written = [*(config.config.out for config in ALL), *FOLDERS.values(), "analysis", "plan.json", "plans/a.json"]
    written = {place if place.endswith(".json") else f"{place}/x" for place in written}
    command = ["git", "check-ignore", "--no-index", *written]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert written == set(ignored)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("num_samples=0", "num_samples is 0; it should be 1 or more"),
        ("image_size=0", "image_size is 0; it should be 1 or more"),
        ("image_size=-32", "image_size is -32; it should be 1 or more"),
        ("batch_size=0", "batch_size is 0; it should be 1 or more"),
        ("seed=-1", "seed is -1; it should be 0 or more"),
        ("guidance_scale=.nan", "guidance_scale is nan; it should be 0 or more"),
        ("guidance_scale=.inf", "guidance_scale is inf; it should be 0 or more"),
        ("guidance_scale=-2", "guidance_scale is -2; it should be 0 or more"),
        ("guidance_channels=0", "guidance_channels is 0; it should be 1 or more"),
        ("guidance_channels=-1", "guidance_channels is -1; it should be 1 or more"),
        ("guidance_low=1001", "guidance_low is 1001, above guidance_high, 1000"),
        ("model.hidden_size=0", "hidden_size is 0; it should be 1 or more"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_loads(override, complaint):
    with pytest.raises(ConfigError, match=f"^{re.escape(complaint)}$"):
        load_config(sample.Config, ROOT / "configs/class-to-image/demo.yaml", [override])


@pytest.mark.slow
@pytest.mark.parametrize("task", SCRIPTS)
@pytest.mark.parametrize(
    "number", ["batch_size=0", "seed=-1", "steps=0", "guidance_scale=.nan", "guidance_scale=.inf", "guidance_scale=-1"]
)
def test_every_sampler_refuses_numbers_out_of_range(task, number):
    name, value = number.replace("=.", "=").split("=")
    with pytest.raises(ConfigError, match=f"^{name} is {value}; it should be [01] or more$"):
        load_config(SCRIPTS[task][1].Config, ROOT / f"configs/{task}/demo.yaml", [number])


def test_a_config_as_a_dictionary_is_what_its_file_says():
    """Checkpoints and reports hold the one, run folders the other: the two betas are a list in both."""
    for each_shipped in ALL:
        assert to_dict(each_shipped.config) == yaml.safe_load(to_yaml(each_shipped.config))


def test_a_changed_config_leaves_the_first_as_it_is_and_is_checked():
    config = train.Config(out="a")
    other = changed(config, {"out": "b", "train.steps": 3})
    assert (config.out, config.train.steps, other.out, other.train.steps) == ("a", 400_000, "b", 3)
    with pytest.raises(FrozenInstanceError):
        config.train.steps = 3
    with pytest.raises(ConfigError, match="batch_size is 0; it should be 1 or more"):
        changed(config, {"train.batch_size": 0})


def test_more_guided_channels_than_the_latents_have(tmp_path):
    config = load_config(sample.Config, ROOT / "configs/class-to-image/demo.yaml", ["guidance_channels=9"])
    config = changed(config, {name: str(ROOT / getattr(config, name)) for name in ("weights", "vae")})
    with pytest.raises(ValueError, match="guidance_channels is 9; the latents have 4"):
        sample.ImageSampler(config, None)


@pytest.mark.parametrize("kind", [train.Config, video_train.Config, t2v_train.Config, t2i_train.Config])
@pytest.mark.parametrize("name", ["batch_size", "micro_batch_size", "lr", "warmup", "ema_decay"])
def test_trainers_refuse_numbers_out_of_range(kind, name, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("out: x\n")
    with pytest.raises(ConfigError, match=rf"^{name} is -1; it should be [01] (or more|to 1)$"):
        load_config(kind, file, [f"train.{name}=-1"])
