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
            raise ValueError(f"--prompt and {name}= both say what to show: leave one out")
    config = changed(config, {"prompts": args.prompt, "prompt_file": None})
    if any(text.startswith("out=") for text in args.overrides):
        return config
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:8]
    return changed(config, {"out": str(Path(config.out, f"{slug(args.prompt[0])}-{digest}".strip("-")))})
