"""Settings of text-to-image: of the model, the sampler and the trainer, and the sampler's command line."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from skipdit.cli import friendly_errors, make_parser
from skipdit.config import Settings, load_config, setting
from skipdit.data.settings import PictureData
from skipdit.diffusion.schedulers import SCHEDULERS
from skipdit.sampling.arguments import (
    ORIGINAL,
    add_cache_arguments,
    add_original_switches,
    add_prompt_argument,
    cache_override,
    checked,
    take_prompts,
)
from skipdit.sampling.run_folder import inherit
from skipdit.sampling.settings import WINDOW, PromptConfig
from skipdit.training.settings import TrainerConfig
from skipdit.utils.errors import UserError

NEGATIVE = "错误的眼睛，糟糕的人脸，毁容，糟糕的艺术，变形，多余的肢体，模糊的颜色，模糊，重复，病态，残缺，"

RELEASED = ("clip_text_encoder", "text_encoder")  # folders of the released CLIP, and of diffusers' pipelines


@dataclass(frozen=True)
class SampleConfig(PromptConfig):
    """A text-to-image sampling run."""

    pipeline: str = setting(
        "ckpts", "folder of the released files (t2i/...), or of a diffusers pipeline", identity=False
    )
    load_key: str = setting(
        "ema", "which t2i/model/pytorch_model_<key>.pt of the released files: ema, module ...", identity=False
    )
    weights: str | None = setting(None, "checkpoint of the transformer; unset: the pipeline's", identity=False)
    vae: str | None = setting(None, "autoencoder, folder or Hub name; unset: the pipeline's", identity=False)
    text_encoder: str | None = setting(None, "the CLIP, folder or Hub name; unset: the pipeline's", identity=False)
    tokenizer: str | None = setting(None, "folder or Hub name; unset: beside the text encoder", identity=False)
    text_encoder_2: str | None = setting(
        None, "the multilingual T5, folder or Hub name; unset: the pipeline's", identity=False
    )
    tokenizer_2: str | None = setting(None, "folder or Hub name; unset: beside the text encoder", identity=False)
    out: str = setting("samples/text-to-image", "folder for the pictures and the report", identity=False)
    height: int = setting(1024, "pixels", identity=False, least=1)
    width: int = setting(1024, "pixels", identity=False, least=1)
    negative_prompt: str = setting(NEGATIVE, "what not to show")
    images_per_prompt: int = setting(1, "pictures of each prompt", least=1)
    seed: int = setting(42, "seed of the run; picture i depends on it and on i", least=0)
    scheduler: str = setting("ddpm", f"one of {', '.join(SCHEDULERS)}")
    steps: int = setting(100, "sampling steps", least=1)
    guidance_scale: float = setting(6.0, "classifier-free guidance; 1 is none", least=1)

    @classmethod
    def inherited(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that follow from the folder of the run in `weights`; see `load_config`."""
        settings = {"vae": "vae", "height": "data.image_size", "width": "data.image_size"}
        settings |= {"text_encoder": "clip.encoder", "tokenizer": "clip.tokenizer"}
        settings |= {"text_encoder_2": "t5.encoder", "tokenizer_2": "t5.tokenizer"}
        found = inherit(given, settings, "scheduler")
        if Path(found.get("text_encoder", RELEASED[0])).name not in RELEASED:
            found["negative_prompt"] = ""  # the default one is for those that read Chinese
        return found

    def places(self) -> dict[str, str]:
        """Where models come from that are not set directly: the released layout, or that of diffusers."""
        root = Path(self.pipeline)
        released = root / "t2i"
        if released.is_dir() or not (root / "model_index.json").is_file():
            names = {"weights": f"model/pytorch_model_{self.load_key}.pt", "vae": "sdxl-vae-fp16-fix"}
            names |= {"text_encoder": "clip_text_encoder", "text_encoder_2": "mt5"}
            root = released
        else:
            names = {name: name for name in ("vae", "text_encoder", "text_encoder_2")} | {"weights": "transformer"}
        return {name: getattr(self, name) or str(root / place) for name, place in names.items()}


SWITCHES = {  # of the released code -> settings
    "negative": "negative_prompt",
    "batch-size": "images_per_prompt batch_size",
    "sampler sample_method": "scheduler",
    "infer-steps": "steps",
    "load-key": "load_key",
    "model-root": "pipeline",
    "dit-weight": "weights",
    "save-dir": "out",
}
UNIT = 16  # pixels of a patch


def add_original_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the released code's switches."""
    add_original_switches(parser, ORIGINAL, SWITCHES)
    parser.add_argument(
        "--image-size", nargs="+", metavar="PIXELS", help="height and width, one for both if they agree"
    )
    parser.add_argument("--cache-at-branch", type=int, metavar="B", help="branch of --cache and --cache-step")
    parser.add_argument("--infer-mode", choices=["fa", "torch"], help="accepted: attention is PyTorch's in both")
    parser.add_argument("--no-enhance", action="store_true", help="accepted: prompts are taken as they are")


@cache
def _tell_once(line: str) -> None:
    """Scripts read their arguments twice: before their imports, and to run."""
    print(line, file=sys.stderr)


def image_size(args: argparse.Namespace) -> list[str]:
    """Return the overrides that --image-size stands for, rounded down as the released code does, which is said.

    Raises ValueError for an image size that is none.
    """
    if not (sides := args.image_size):
        return []
    args.overrides += [text for text in sides if "=" in text]  # argparse gives the switch what follows it
    sides = [text for text in sides if "=" not in text]
    if len(sides) not in (1, 2) or not all(text.isdecimal() and int(text) >= UNIT for text in sides):
        raise UserError(f"--image-size {' '.join(sides)}: it takes a height and a width in pixels, {UNIT} or more")
    height, width = (int(text) // UNIT * UNIT for text in (sides[0], sides[-1]))
    if (height, width) != (int(sides[0]), int(sides[-1])):
        _tell_once(f"--image-size {' '.join(sides)} is no multiple of {UNIT}: taking {height} {width}")
    return [f"height={height}", f"width={width}"]


def read_arguments(description: str, argv: list[str] | None = None) -> SampleConfig:
    """Return the settings that the sampler's command line asks for; ends the program for --help and mistakes.

    Args:
        argv: arguments of `skipdit sample`; None: those of the task's own script.
    """
    parser = make_parser(
        SampleConfig, description, default="the released model in ckpts/", prog=argv and "skipdit sample"
    )
    add_cache_arguments(parser, WINDOW)
    add_prompt_argument(parser)
    add_original_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    with friendly_errors():
        cache = cache_override(args, WINDOW)
        if args.cache_at_branch is not None:
            if not cache:
                raise UserError("--cache-at-branch goes with --cache or --cache-step")
            cache = [f"{cache[0]}-b{args.cache_at_branch}"]
        args.overrides = [*args.first, *image_size(args), *args.overrides]
        config = load_config(SampleConfig, args.config, args.overrides + cache)
        return checked(take_prompts(config, args))


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Arguments of `HunyuanDiT`; unset ones are those of the released model."""

    hidden_size: int | None = setting(None, "width", least=1)
    depth: int | None = setting(None, "blocks", least=1)
    num_heads: int | None = setting(None, "attention heads", least=1)
    patch_size: int | None = setting(None, "side of a patch in latent pixels", least=1)
    mlp_ratio: float | None = setting(None, "hidden width of the MLP over the model's", least=0.01)
    text_states_dim: int | None = setting(None, "channels of the CLIP", least=1)
    text_len: int | None = setting(None, "tokens of its texts", least=1)
    text_states_dim_t5: int | None = setting(None, "channels of the T5", least=1)
    text_len_t5: int | None = setting(None, "tokens of its texts", least=1)
    skip: bool = setting(True, "long skips")
    fuse: str = setting("replace", "replace, as released, or residual, which starts at the model without skips")


@dataclass(frozen=True)
class TextConfig(Settings):
    """Where one of the two encodings of the captions comes from."""

    encoder: str | None = setting(None, "text encoder, folder or Hub name; frozen", identity=False)
    tokenizer: str | None = setting(None, "folder or Hub name; unset: beside the text encoder", identity=False)
    files: str | None = setting(
        None, "embeddings of `skipdit encode-text`, in place of the text encoder", identity=False
    )
    fingerprint: str | None = setting(None, "of the text encoder; the trainer fills it in and refuses another")
    dropout: float = setting(0.2, "share of captions replaced by the empty one, for guidance", least=0, most=1)


@dataclass(frozen=True)
class TrainingConfig(TrainerConfig):
    """A text-to-image training run."""

    out: str = setting("results/text-to-image", "run folder", identity=False)
    vae: str = setting("ckpts/t2i/sdxl-vae-fp16-fix", "autoencoder, folder or Hub name", identity=False)
    clip: TextConfig = field(default_factory=TextConfig)
    t5: TextConfig = field(default_factory=TextConfig)
    text_dtype: str = setting("bfloat16", "of the text encoders: auto, float32, bfloat16 or float16")
    grid_guidance: float = setting(6.0, "guidance scale of the sample grids", identity=False, least=0)
    lora_rank: int = setting(0, "train adapters of this rank, and nothing else; 0: none", least=0)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: PictureData = field(default_factory=PictureData)

    def files(self) -> dict[str, str]:
        """What has to be there, by setting."""
        texts = {"clip.files": self.clip.files, "t5.files": self.t5.files}
        return self.data.files() | {name: place for name, place in texts.items() if place}
