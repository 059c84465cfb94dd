"""YAML files to typed dataclasses, with `key=value` overrides.

A task describes its settings as nested dataclasses; their field comments are the documentation. Unknown keys and wrong
types raise `ConfigError`, which names the file, the line and the nearest known key.
"""

import difflib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from skipdit.utils.errors import UserError
from skipdit.utils.shipped import find_config, found, locate, near_configs
from skipdit.utils.text import read_text, user_path

T = TypeVar("T")
_TEXT = (str, str | None)  # types of settings that are a text
_QUOTED = re.compile(r"""\s*(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')\s*""")  # all of it, as YAML has it


class ConfigError(UserError):
    """A config that names an unknown key, has a value of the wrong type, or lacks a required one."""


def setting(
    default: Any, help: str, identity: bool = True, least: float | None = None, most: float | None = None
) -> Any:
    """A dataclass field with a default and the line that `--help` shows.

    Args:
        default: a list makes each config its own.
        identity: whether what a run makes depends on it. One that says where, how fast or how long may differ when a
            run goes on.
        least, most: bounds of a number, both included, which `Settings` checks.
    """
    given = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"help": help, "identity": identity, "least": least, "most": most})


class Settings:
    """Base of frozen dataclasses of settings: numbers outside their bounds are refused, nan among them."""

    def __post_init__(self):
        for entry in fields(self):
            value, least, most = getattr(self, entry.name), entry.metadata.get("least"), entry.metadata.get("most")
            if least is None or not isinstance(value, int | float):
                continue
            if not (math.isfinite(value) and least <= value and (most is None or value <= most)):
                bounds = f"{least:g} or more" if most is None else f"{least:g} to {most:g}"
                raise ConfigError(f"{entry.name} is {value:g}; it should be {bounds}")

    def given(self, *without: str) -> dict[str, Any]:
        """Return the settings that are not None, by name, but for those called `without`."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in without}
        return {name: value for name, value in values.items() if value is not None}


def changed(config: T, values: Mapping[str, Any]) -> T:
    """Return a copy of a config in which some settings have other values.

    Args:
        values: by dotted name, as in an override: {"train.steps": 3}.

    Raises ConfigError for numbers outside their bounds.
    """
    for key, value in values.items():
        name, _, rest = key.partition(".")
        config = replace(config, **{name: changed(getattr(config, name), {rest: value}) if rest else value})
    return config


def required(help: str, identity: bool = True) -> Any:
    """A dataclass field that a config must set; arguments as of `setting`."""
    return setting("???", help, identity)


def load_config(schema: type[T], file: str | Path | None, overrides: list[str] = (), section: str | None = None) -> T:
    """Build a `schema` instance from a YAML file, then from `key=value` overrides, later ones winning.

    With `section`, the schema is that of one section of the file, and overrides are of its keys.

    A file that is not here is looked for in the project, see `find_config`; so are the files and folders that settings
    name, of which `found` tells.

    Raises ConfigError naming file, line and key for anything the schema does not know.
    """
    file, layers = None if file is None else find_config(file), []
    if file is not None:
        values, lines = _read(file, section, schema)
        if kind := "" if section else _other_kind(schema, values):
            raise ConfigError(f"{file} has the settings of {kind}")
        prefix = f"{section}." if section else ""
        layers.append((values, lambda key: f"{file}, line {lines.get(prefix + key, '?')}"))
    layers += [(_read_override(schema, text), lambda _, text=text: f"override {text!r}") for text in overrides]
    config = OmegaConf.structured(schema)
    for values, where in layers:
        config = _merge(schema, config, values, where)
    if inherited := getattr(schema, "inherited", None):
        below = inherited(OmegaConf.to_container(OmegaConf.merge(*(values for values, _ in layers))) if layers else {})
        config = OmegaConf.structured(schema)
        for values, where in [(below, lambda key: f"{key}, as the weights have it"), *layers]:
            config = _merge(schema, config, values, where)
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(f"{file or 'the config'} does not set {', '.join(missing)}, which has no default")
        return _with_files(OmegaConf.to_object(config))
    except OmegaConfBaseException as error:  # a ${reference} to nothing
        raise ConfigError(f"{file or 'the config'}: {error.full_key}: {_first_line(error)}") from error


def _with_files(config: T) -> T:
    """Put in where the files lie that settings name. Others say what a run makes, and stay as they are written."""
    places = {}
    for entry in fields(config):
        value, identity = getattr(config, entry.name), entry.metadata.get("identity", True)
        if is_dataclass(value):
            places[entry.name] = _with_files(value)
        elif isinstance(value, str) and entry.name != "out" and (not identity or entry.name == "cache"):
            places[entry.name] = found(value)
    return replace(config, **places)


def in_the_project(path: str | Path) -> str:
    """What to tell of a file that is not here, but where the project lies; empty for others."""
    place = locate(path)
    return f"; {path} comes with the project: write {place}" if place else ""


def given_values(file: str | Path, section: str) -> dict:
    """What a section of a YAML file sets. Raises ConfigError if there is none."""
    return _read(find_config(file), section)[0]


def read_values(file: Path) -> dict:
    """Return all that a YAML file sets. Raises ConfigError if it is none."""
    return _read(file, None)[0]


def named_task(file: str | Path) -> str | None:
    """Return what a YAML file says under `task`, None if nothing. Raises ConfigError for a file that is none."""
    return _read(find_config(file), None)[0].get("task")


class _Words(yaml.SafeLoader):
    """Reads the scalars of YAML as the text that they are: no, 007 and 1e3 are neither truth values nor numbers."""


_Words.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # merging stays


def _read(path: Path, section: str | None, schema: type | None = None) -> tuple[dict, dict[str, int]]:
    """The values of a YAML file, or of a section of it, and the line of every dotted key.

    With a schema, of that file or section, what is text there is taken as text.
    """
    if not path.is_file():
        raise ConfigError(f"no config file {path}{near_configs(path)}")
    try:
        text = read_text(path)
        node = yaml.compose(text)
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}, line {node.start_mark.line + 1}: not a config: write 'key: value' lines")
        values, words = OmegaConf.to_container(OmegaConf.load(io.StringIO(text))), yaml.load(text, _Words)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        problem = getattr(error, "problem", "") or _first_line(error)
        advice = "; indent with spaces, not with tabs" if r"'\t'" in problem else ""
        raise ConfigError(f"{where}: not valid YAML: {problem}{advice}") from error
    if schema and not section:
        values.pop("task", None)  # see `skipdit.tasks.find_task`
    if section:
        values, words = values.get(section), (words or {}).get(section)
        if not isinstance(values, dict):
            raise ConfigError(f"{path} has no section {section!r}")
    return _as_text(schema, values, words) if schema else values, _key_lines(node)


def _other_kind(schema: type, values: dict) -> str:
    """What a config is for, if not for `schema`: the settings of a trainer have a section `train`."""
    trains = any(entry.name == "train" for entry in fields(schema))
    if trains and "train" not in values and "weights" in values:
        return "sampling: skipdit sample --config FILE"
    return "training: skipdit train --config FILE" if "train" in values and not trains else ""


def _read_override(schema: type, text: str) -> dict:
    """The values of `key=value`. A text is taken as it is, but for quotes around all of it; null is none."""
    key, equals, value = text.partition("=")
    if not equals:
        key = [*_likely(text, [entry.name for entry in fields(schema)], schema), *_dotted(schema)][0]
        raise ConfigError(f"override {text!r} has no '='; write key=value, such as {key}=VALUE")
    kind: Any = schema
    for name in key.split("."):
        kind = {field.name: field.type for field in fields(kind)}.get(name) if is_dataclass(kind) else None
    try:
        if kind in _TEXT and not _QUOTED.fullmatch(value):
            return _nested(key, None if value.strip().lower() in ("", "~", "null") else value.strip())
        values = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
        return _as_text(schema, values, _nested(key, yaml.load(value, _Words)))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"override {text!r}: {_first_line(error)}") from error


def _nested(key: str, value: Any) -> dict:
    """{"a": {"b": value}} of "a.b"."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _as_text(schema: type, values: dict, words: Any) -> dict:
    """Values of which those of text settings are replaced by `words`, the same read as text."""
    kinds, found = {field.name: field.type for field in fields(schema)}, {}
    for name, value in values.items():
        kind, word = kinds.get(name), words.get(name) if isinstance(words, dict) else None
        if is_dataclass(kind) and isinstance(value, dict):
            found[name] = _as_text(kind, value, word)
        elif kind in _TEXT and isinstance(word, str) and value is not None:
            found[name] = word
        elif kind == list[str] and isinstance(value, list) and isinstance(word, list):
            found[name] = [w if w and isinstance(w, str) else v for v, w in zip(value, word, strict=True)]
        else:
            found[name] = value
    return found


def _merge(schema: type, config: Any, values: dict, where: Callable[[str], str]) -> Any:
    """Put values into a config. `where` tells the place of a key."""
    given = list(_settings(schema, values, where))
    with suppress(OmegaConfBaseException, TypeError):
        return OmegaConf.merge(config, *(_nested(key, value) for key, _, value in given))
    for key, kind, value in given:  # to name the one at fault; each merge copies the whole config, so not at first
        try:
            config = OmegaConf.merge(config, _nested(key, value))
        except (OmegaConfBaseException, TypeError) as error:
            if is_dataclass(kind):
                expected = f"a section with the keys {', '.join(field.name for field in fields(kind))}"
            else:
                expected = str(kind) if hasattr(kind, "__args__") else kind.__name__
            raise ConfigError(f"{where(key)}: {key} is {value!r}; it should be {expected}") from error
    return config


def _settings(
    schema: type, values: dict, where: Callable[[str], str], prefix: str = "", root: type | None = None
) -> Iterator[tuple]:
    """(dotted key, type, value) of all values that are not sections. Raises ConfigError for a key without a field."""
    types = {field.name: field.type for field in fields(schema)}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in types:
            hint = " or ".join(map(repr, _likely(str(name), list(types), root or schema)))
            hint = f"did you mean {hint}?" if hint else f"known: {', '.join(types)}"
            raise ConfigError(f"{where(key)}: unknown key {key!r}; {hint}")
        if is_dataclass(types[name]) and isinstance(value, dict):
            yield from _settings(types[name], value, where, f"{key}.", root or schema)
        else:
            yield key, types[name], user_path(value) if isinstance(value, str) else value


def _likely(name: str, siblings: list[str], root: type) -> list[str]:
    """What a name that is no key may stand for: keys of this name in other sections, or one spelt nearly so, here or
    there.
    """
    keys = list(_dotted(root))
    if elsewhere := [key for key in keys if key.rpartition(".")[2] == name]:
        return elsewhere
    if near := difflib.get_close_matches(name, siblings, n=1):
        return near
    near = difflib.get_close_matches(name, [key.rpartition(".")[2] for key in keys], n=1)
    return [key for key in keys if key.rpartition(".")[2] in near]


def _dotted(schema: type, prefix: str = "") -> Iterator[str]:
    """All keys of a schema."""
    for entry in fields(schema):
        yield f"{prefix}{entry.name}"
        if is_dataclass(entry.type):
            yield from _dotted(entry.type, f"{prefix}{entry.name}.")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _key_lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    """Line number, from 1, of every dotted key of a YAML document."""
    lines = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            lines[name] = key.start_mark.line + 1
            lines |= _key_lines(value, f"{name}.")
    return lines


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def to_yaml(config: Any) -> str:
    """Raises ConfigError for a text that YAML cannot hold: a path that is no UTF-8."""
    try:
        return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
    except UnicodeEncodeError as error:
        advice = "rename that file or folder, or link to it"
        raise ConfigError(f"{error.object!r} is no UTF-8, as configs are: {advice}") from error


def to_dict(config: Any) -> dict:
    """Return nested settings as YAML and JSON have them: tuples are lists."""
    return asdict(config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})


def free_settings(schema: type, prefix: str = "") -> set[str]:
    """Dotted names of the settings on which what a run makes does not depend."""
    names: set[str] = set()
    for entry in fields(schema):
        if not entry.metadata.get("identity", True):
            names.add(f"{prefix}{entry.name}")
        elif is_dataclass(entry.type):
            names |= free_settings(entry.type, f"{prefix}{entry.name}.")
    return names


def identity_of(config: Any) -> dict[str, Any]:
    """Settings on which what a run makes depends."""

    def chosen(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        kept = {key: value for key, value in values.items() if f"{prefix}{key}" not in free}
        return {k: chosen(v, f"{prefix}{k}.") if isinstance(v, dict) else v for k, v in kept.items()}

    free = free_settings(type(config))
    return chosen(to_dict(config), "")
