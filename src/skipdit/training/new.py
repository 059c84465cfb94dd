"""Configs for a folder of somebody's own: `skipdit train new`."""

import argparse
import math
import shlex
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from skipdit.data.folder import Folder, look_into
from skipdit.encoders.autoencoder import decode, downsampling, encode, load_vae
from skipdit.encoders.reading import CLIP
from skipdit.encoders.text import text_width
from skipdit.utils.files import naming, replace_text
from skipdit.utils.pixels import to_float
from skipdit.utils.shipped import found

STAGES = ("plain", "stage1", "stage2")
EMBEDDED = ("class-to-image/weights/vae", "class-to-video/weights/vae")
RELEASED = ("checkpoints/sd-vae-ft-ema", "stabilityai/sd-vae-ft-ema")
JUDGED = 8  # images by which autoencoders are compared
FRAMES = 16  # of a clip, as published
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "XL": (1152, 28, 16)}  # width, depth, heads, as published
SMALL = {"image": (128, 12, 2), "clip": (144, 16, 3)}  # of the embedded models


class Machine(NamedTuple):
    """What training has: the memory of the first GPU in GiB, 0 without one."""

    memory: float

    @classmethod
    def here(cls) -> "Machine":
        return cls(torch.cuda.mem_get_info()[1] / 2**30 if torch.cuda.is_available() else 0.0)

    def __str__(self) -> str:
        return f"a GPU of {self.memory:.0f} GiB" if self.memory else "no GPU"


class Choice(NamedTuple):
    """What was decided about a folder, besides what lies in it.

    Attributes:
        size: pixels along a side.
        vae: the autoencoder's folder or Hub name.
        why: the reason for it, in a few words.
        model: width, depth and heads.
        steps: of plain, stage 1 and stage 2.
        batch: samples per step.
        patch: the side of a patch in latent pixels.
    """

    size: int
    vae: str
    why: str
    model: tuple[int, int, int]
    steps: tuple[int, int, int]
    batch: int
    patch: int


def choose(folder: Folder, machine: Machine, size: int | None = None, vae: str | None = None) -> Choice:
    """Decide what fits the files and the machine; `size` and `vae` if they are not None."""
    small, count = not machine.memory, len(folder.files)
    size = size or _image_size(folder, machine)
    vae, why = (vae, "as you say") if vae else _autoencoder(folder, machine, size)
    large = "XL" if count >= 100_000 and machine.memory >= 40 else "B" if count >= 10_000 else "S"
    model = SMALL[folder.unit] if small else SIZES[large]
    steps = (2_000, 300, 2_000) if small else (50_000, 5_000, 50_000)
    batch = (32 if small else 128) if folder.unit == "image" else 8
    latents = size // downsampling(load_vae(found(vae)))
    side = 16 if not small else 8 if folder.unit == "image" else 4  # patches along a side, or a few more
    patch = math.gcd(latents, 2 ** int(math.log2(max(1, latents / side))))  # which divides the latents
    return Choice(size, vae, why, model, steps, min(batch, count), patch)


def _image_size(folder: Folder, machine: Machine) -> int:
    most = 64 if not machine.memory else 512 if machine.memory >= 40 and folder.unit == "image" else 256
    return max([size for size in (32, 64, 128, 256, 512) if size <= min(most, folder.side)], default=32)


def _autoencoder(folder: Folder, machine: Machine, size: int) -> tuple[str, str]:
    """An autoencoder, and why: that of the released models with a GPU, and otherwise the better of the small ones."""
    if machine.memory:
        return next((name for name in RELEASED if Path(found(name)).exists()), RELEASED[1]), "as in the released models"
    images = to_float(folder.pictures(JUDGED, size))
    fidelity = {name: _psnr(name, images) for name in EMBEDDED}
    best = max(fidelity, key=fidelity.__getitem__)
    return best, f"of those that come with skipdit the better one for these files, with {fidelity[best]:.1f} dB"


def _psnr(vae: str, images: torch.Tensor) -> float:
    """How near images in [-1, 1] come back from an autoencoder, in dB."""
    model = load_vae(found(vae))
    error = decode(model, encode(model, images)[0]).clamp(-1, 1) - images
    return 10 * math.log10(4 / error.square().mean().item())


class Plan(NamedTuple):
    """The configs and commands of a training.

    Attributes:
        name: of its runs.
        out: folder of the configs.
        encoder: of captions.
    """

    folder: Folder
    choice: Choice
    machine: Machine
    name: str
    out: Path
    encoder: str

    @property
    def latents(self) -> str:
        return f"results/{self.name}-latents"

    @property
    def texts(self) -> dict[str, str]:
        """Folders of encoded captions, by their role."""
        roles = {"text-to-video": ["latte"], "text-to-image": ["clip", "t5"]}.get(self.folder.task, [])
        return {role: f"results/{self.name}-{role}" for role in roles}

    @property
    def tokens(self) -> int:
        """Tokens of the longest caption, about, of which Hunyuan-DiT has a fixed number."""
        words = max(len(text.split()) for text in self.folder.texts)
        return min(CLIP.max_tokens, 8 * math.ceil((2 * words + 2) / 8))

    def training(self, stage: str) -> dict[str, Any]:
        """Settings of a stage."""
        number = STAGES.index(stage)
        before = {"init": f"results/{self.name}-{STAGES[number - 1]}"} if number else {}
        common = {"task": self.folder.task, "out": f"results/{self.name}-{stage}"} | before | {"vae": self.choice.vae}
        skips = {"skip": True, "fuse": "residual"} if number else {"skip": False}
        return (
            common
            | self._captions()
            | {"model": self._model() | skips, "data": self._data(), "train": self._train(number)}
        )

    def _captions(self) -> dict[str, Any]:
        precision = {"text_dtype": "bfloat16" if self.machine.memory else "float32"}
        if self.folder.task == "text-to-video":
            return {"text_encoder": self.encoder, "texts": self.texts["latte"]} | precision
        parts = {role: {"encoder": self.encoder, "files": place} for role, place in self.texts.items()}
        return parts | precision if parts else {}

    def _model(self) -> dict[str, Any]:
        (width, depth, heads), patch = self.choice.model, self.choice.patch
        if self.folder.task == "text-to-video":
            sizes = {"num_attention_heads": heads, "attention_head_dim": width // heads, "num_layers": depth // 2}
            return sizes | {"patch_size": patch, "caption_channels": text_width(self.encoder)}
        sizes = {"patch_size": patch, "hidden_size": width, "depth": depth, "num_heads": heads}
        if self.folder.task == "text-to-image":
            dim = text_width(self.encoder)
            texts = {"text_states_dim": dim, "text_states_dim_t5": dim}
            return sizes | texts | {"text_len": self.tokens, "text_len_t5": self.tokens}
        if self.folder.classes or self.folder.unit == "image":
            return sizes | {"num_classes": max(1, len(self.folder.classes))}
        return sizes

    def _data(self) -> dict[str, Any]:
        clips = {}
        if self.folder.unit == "clip":
            frames = min(FRAMES, self.folder.frames)
            clips = {"num_frames": frames, "frame_interval": max(1, min(3, self.folder.frames // frames))}
            clips["images"] = 4 if len(self.folder.files) > 1 else 0  # frames of other clips
        return {"kind": "latents", "path": self.latents, "image_size": self.choice.size} | clips

    def _train(self, number: int) -> dict[str, Any]:
        steps, small = self.choice.steps[number], not self.machine.memory
        settings: dict[str, Any] = {"freeze": True} if number == 1 else {}
        settings |= {"steps": steps, "batch_size": self.choice.batch, "lr": 1e-3 if small else 1e-4}
        settings |= {"warmup": min(100, steps // 10), "decay_steps": steps // 2 if number == 2 else 0, "grad_clip": 1.0}
        often = steps // 4
        settings |= {
            "ema_decay": 0.998 if small else 0.9999,
            "save_every": often,
            "sample_every": 0 if number == 1 else often,
        }
        return settings | ({"precision": "fp32", "workers": 0} if small else {})

    def sampling(self) -> dict[str, Any]:
        """Settings of the sampler; what it takes from the run of stage 2 is not among them."""
        common = {"task": self.folder.task, "weights": f"results/{self.name}-stage2", "out": f"samples/{self.name}"}
        if self.folder.captions:
            prompts = list(dict.fromkeys(self.folder.texts))[:4]
            return common | {
                "prompts": prompts,
                "negative_prompt": "",
                "scheduler": "ddim",
                "steps": 50,
                "guidance_scale": 3.0,
            }
        guidance = 2.0 if len(self.folder.classes) > 1 else 1.0
        common |= {"num_samples": 8, "batch_size": 8, "sampler": "ddim", "steps": 50, "guidance_scale": guidance}
        return common | ({"guidance_channels": None} if self.folder.unit == "image" else {})

    def commands(self) -> list[str]:
        """The commands from files to samples, in their order."""
        folder, quote = self.folder, partial(shlex.quote)
        kind = "videos" if folder.unit == "clip" else "pictures" if folder.captions else "image_folder"
        encode = ["skipdit encode --data", kind, "--path", quote(str(folder.path))]
        encode += ["--labelled"] if kind == "videos" and folder.classes and not folder.captions else []
        encode += ["--captions", quote(folder.captions)] if folder.captions else []
        encode += ["--image-size", str(self.choice.size), "--vae", quote(self.choice.vae), "--out", quote(self.latents)]
        configs = {name: quote(str(self.out / f"{name}.yaml")) for name in (*STAGES, "sample")}
        texts = []
        for role, place in self.texts.items():
            limit = "" if role == "latte" else f" --role {role} --max-tokens {self.tokens}"
            command = f"skipdit encode-text {configs['plain']} --text-encoder {quote(self.encoder)}{limit}"
            texts.append(f"{command} --out {quote(place)}")
        training = [f"skipdit train --config {configs[stage]}" for stage in STAGES]
        return [" ".join(encode), *texts, *training, f"skipdit sample --config {configs['sample']}"]

    def write(self) -> None:
        """Write the configs. Raises FileExistsError if one is there."""
        configs = {stage: self.training(stage) for stage in STAGES} | {"sample": self.sampling()}
        files = {self.out / f"{name}.yaml": settings for name, settings in configs.items()}
        if there := [str(file) for file in files if file.exists()]:
            raise FileExistsError(f"{', '.join(there)} exist and are kept; say another --out, or remove them first")
        head = "".join(f"#   {command}\n" for command in self.commands())
        given = str(self.folder.path)
        given += f" --name {self.name}" if self.name != self.folder.path.resolve().name else ""
        with naming(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        for file, settings in files.items():
            text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
            replace_text(file, f"# Of `skipdit train new --data {given}`. All commands, in their order:\n{head}{text}")

    def in_words(self) -> list[str]:
        """What was decided, and why."""
        folder, choice = self.folder, self.choice
        about = f"{len(folder.classes)} classes" if folder.classes else "no classes"
        about = f"captions ({folder.captions})" if folder.captions else about
        length = f", {folder.frames} frames or more" if folder.unit == "clip" else ""
        width, depth, heads = choice.model
        few = "as small as the embedded models" if not self.machine.memory else f"for {len(folder.files):,} files"
        return [
            f"{folder.path}: {len(folder.files):,} {folder.unit}s, {about}: {folder.task}",
            f"size: {choice.size}x{choice.size} pixels: half of the files have {folder.side} or more{length}; "
            f"{self.machine}",
            f"autoencoder: {choice.vae}, {choice.why}",
            f"model: {depth} blocks, {width} wide, {heads} heads, patches of {choice.patch} latent pixels: {few}",
            f"training: {', '.join(f'{s:,} steps of {n}' for s, n in zip(choice.steps, STAGES, strict=True))}, "
            f"{choice.batch} {folder.unit}s each; `skipdit train --config FILE --dry-run` measures the memory",
        ]


def main(args: argparse.Namespace) -> None:
    """Write the configs that a command line asks for, and say what was decided."""
    folder, machine = look_into(args.data), Machine.here()
    name = args.name or args.data.resolve().name
    out = args.out or Path("configs", name)
    plan = Plan(folder, choose(folder, machine, args.image_size, args.vae), machine, name, out, args.text_encoder)
    plan.write()
    print("\n".join(plan.in_words()))
    print(f"configs: {out}/ has plain.yaml, stage1.yaml, stage2.yaml and sample.yaml. Next, in this order:")
    print("\n".join(f"  {command}" for command in plan.commands()))
