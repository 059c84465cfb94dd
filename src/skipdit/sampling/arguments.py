"""`--cache`, and how the original commands say it."""

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import TypeVar

from skipdit.caching.policies import parse_policy
from skipdit.config import Settings, changed, to_dict
from skipdit.sampling.prompts import slug
from skipdit.sampling.settings import PromptConfig
from skipdit.utils.errors import UserError

T = TypeVar("T", bound=Settings)


def add_cache_arguments(parser: argparse.ArgumentParser, window: str) -> None:
    """`--cache SPEC`, and the original commands' ways to say it.

    Args:
        window: the task's default spec, with `{}` for the interval.
    """
    parser.add_argument(
        "--cache",
        nargs="?",
        const="default",
        metavar="SPEC",
        help="N<interval>-<start>-<stop>[-b<branch>][-o<order>], a plan's FILE.json, D<threshold>[-m<most>][-b<branch>]"
        f"[-o<order>], or none; alone: {window.format(2)}",
    )
    parser.add_argument("--cache-step", "--deepcache", type=int, metavar="N", help=f"as --cache {window.format('<N>')}")


ORIGINAL = {  # switches of the original samplers -> settings, the same in all tasks
    "ckpt": "weights",
    "save_video_path": "out",
    "num_sampling_steps": "steps",
    "cfg-scale": "guidance_scale",
    "seed": "seed",
}
FLAGS = {"use-fp16": "dtype=float16", "no-fp16": "dtype=float32", "tf32": "tf32=true", "no-tf32": "tf32=false"}


def add_original_switches(
    parser: argparse.ArgumentParser, switches: dict[str, str], own: dict[str, str], flags: dict[str, str] = FLAGS
) -> None:
    """Add switches of the original code, each for settings; their names may be written with dashes or underscores.

    Args:
        switches, own: names, in one text -> names of the settings, or `setting=value` with {0} for what is given.
        flags: the same, of switches without a value.
    """
    group = parser.add_argument_group("switches of the original code, each for a setting")
    for names, settings in (switches | own).items():
        forms = [text if "=" in text else f"{text}={{0}}" for text in settings.split()]
        spellings = [
            f"--{form}"
            for name in names.split()
            for form in dict.fromkeys((name, name.replace("_", "-"), name.replace("-", "_")))
        ]
        shown = ", ".join(form.format("X") for form in forms)
        group.add_argument(*spellings, dest="first", action=_Override, forms=forms, metavar="X", help=shown)
    for name, override in flags.items():
        group.add_argument(f"--{name}", dest="first", action=_Override, forms=[override], nargs=0, help=override)


class _Override(argparse.Action):
    """Collects overrides, which those that are written as `key=value` win over."""

    def __init__(self, *args, forms: list[str], **kwargs):
        super().__init__(*args, default=[], **kwargs)
        self.forms = forms

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.first = [*namespace.first, *(form.format(values) for form in self.forms)]


def require_config(parser: argparse.ArgumentParser, args: argparse.Namespace, more: str = "") -> None:
    """End the program unless a config, or weights that may have settings beside them, are named.

    Args:
        more: what does as well.
    """
    if not args.config and not any(text.startswith("weights=") for text in args.first + args.overrides):
        parser.error(f"the following arguments are required: --config{more}, or weights=FOLDER of a training")


def cache_override(args: argparse.Namespace, window: str) -> list[str]:
    """What a command line says of the cache, as overrides of the setting `cache`; nothing leaves it to the config.

    Args:
        args: parsed arguments of `add_cache_arguments`.
        window: the same as there.
    """
    if args.cache and "=" in args.cache:  # `--cache key=value`: argparse gives the switch what follows it
        args.overrides.append(args.cache)
        args.cache = "default"
    if args.cache_step is not None:
        return [f"cache={window.format(args.cache_step)}"]
    if args.cache == "default":
        return [f"cache={window.format(2)}"]
    return [f"cache={args.cache}"] if args.cache else []


def checked(config: T) -> T:
    """Return the settings of a sampler as they are. Raises ValueError, as `parse_policy`, for a cache that is none."""
    parse_policy(config.cache)
    return config


def original_model_name(name: str) -> tuple[str, int | None]:
    """The original `--model DiT-cache-N` -> (model name, cache interval or None)."""
    match = re.fullmatch(r"(.+)-cache-(\d+)", name)
    return (f"{match[1]}-skip", int(match[2])) if match else (name, None)


def add_prompt_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to show, instead of the config's prompts; more than once for several",
    )


def take_prompts(config: PromptConfig, args: argparse.Namespace) -> PromptConfig:
    """Return the config with the prompts of a command line, if there are some.

    They get a folder of their own, named after the first of them and all settings, unless the command line names one:
    one command after the other, and the same one again, can be given without thinking of `out`. Raises ValueError if
    the command line says otherwise, too, what to show.
    """
    if not args.prompt:
        return config
    for name in ("prompts", "prompt_file"):
        if any(text.startswith(f"{name}=") for text in args.overrides):
            raise UserError(f"--prompt and {name}= both say what to show: leave one out")
    config = changed(config, {"prompts": args.prompt, "prompt_file": None})
    if any(text.startswith("out=") for text in args.overrides):
        return config
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:8]
    return changed(config, {"out": str(Path(config.out, f"{slug(args.prompt[0])}-{digest}".strip("-")))})
