"""YAML files to typed dataclasses, with `key=value` overrides.

A task describes its settings as nested dataclasses; their field comments are the documentation. Unknown keys and wrong
types raise `ConfigError`, which names the file, the line and the nearest known key.
"""

import argparse
import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class ConfigError(ValueError):
    """A config that names an unknown key, has a value of the wrong type, or lacks a required one."""


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a default and the line that `--help` shows."""
    return field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """A dataclass field that a config must set."""
    return field(default="???", metadata={"help": help})


def load_config(schema: type[T], file: str | Path | None, overrides: list[str] = ()) -> T:
    """Build a `schema` instance from a YAML file, then from `key=value` overrides, later ones winning.

    Raises ConfigError naming file, line and key for anything the schema does not know.
    """
    config = OmegaConf.structured(schema)
    lines: dict[str, int] = {}
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise ConfigError(f"no config file {path}; the ones that come with the project are in configs/")
        try:
            node = yaml.compose(path.read_text())
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        lines = _key_lines(node)
        config = _merge(schema, config, OmegaConf.load(path), lambda key: f"{path}, line {lines.get(key, '?')}")
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals:
            raise ConfigError(f"override {text!r} has no '='; write key=value, for example sample.steps=50")
        try:
            override = OmegaConf.from_dotlist([text])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"override {text!r}: {error}") from error
        config = _merge(schema, config, override, lambda _: f"override {text!r}")
    for key in sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{file or 'the config'} does not set {key}, which has no default")
    return OmegaConf.to_object(config)


def _merge(schema: type, config: Any, new: Any, where) -> Any:
    for key in _leaf_keys(new):
        if unknown := _unknown_part(schema, key):
            parent, name = unknown.rpartition(".")[::2]
            known = [field.name for field in fields(_type_at(schema, parent))]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{where(unknown)}: unknown key {unknown!r}; {hint}")
    try:
        return OmegaConf.merge(config, new)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise ConfigError(f"{where(key)}: {key}: {str(error).splitlines()[0]}") from error


def _leaf_keys(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all values of a config, and of its empty sections."""
    keys = []
    for key in config or {}:
        value = config._get_node(key)
        name = f"{prefix}{key}"
        keys += _leaf_keys(value, f"{name}.") if OmegaConf.is_dict(value) and len(value) else [name]
    return keys


def _type_at(schema: type, key: str) -> type:
    for name in filter(None, key.split(".")):
        schema = next(field.type for field in fields(schema) if field.name == name)
    return schema


def _unknown_part(schema: type, key: str) -> str | None:
    """The shortest prefix of a dotted key that the schema does not know. Plain dict fields know everything."""
    parts = key.split(".")
    for depth, name in enumerate(parts):
        if not is_dataclass(schema):
            return None
        types = {field.name: field.type for field in fields(schema)}
        if name not in types:
            return ".".join(parts[: depth + 1])
        schema = types[name]
    return None


def _key_lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    """Line number, from 1, of every dotted key of a YAML document."""
    lines = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            lines[name] = key.start_mark.line + 1
            lines |= _key_lines(value, f"{name}.")
    return lines


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict:
    return OmegaConf.to_container(OmegaConf.structured(config))


def make_parser(schema: type, description: str) -> argparse.ArgumentParser:
    """The command line that all tasks share: `--config FILE [key=value ...]`."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="settings:\n" + describe(schema),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file with the run's settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    return parser


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Ends the program with a message, not a traceback, for what the user can mend: settings, files, checkpoints."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def describe(schema: type, prefix: str = "  ") -> str:
    """Every setting with its default, one per line, for `--help`."""
    lines = []
    for field in fields(schema):
        if is_dataclass(field.type):
            lines.append(describe(field.type, f"{prefix}{field.name}."))
        else:
            default = field.default if field.default is not MISSING else field.default_factory()
            default = "(required)" if default == "???" else default
            lines.append(f"{prefix}{field.name}={default}".ljust(44) + f" {field.metadata.get('help', '')}")
    return "\n".join(lines)
