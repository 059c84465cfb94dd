"""`--cache`, and how the original commands say it."""

import argparse
import re


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


def original_model_name(name: str) -> tuple[str, int | None]:
    """The original `--model DiT-cache-N` -> (model name, cache interval or None)."""
    match = re.fullmatch(r"(.+)-cache-(\d+)", name)
    return (f"{match[1]}-skip", int(match[2])) if match else (name, None)
