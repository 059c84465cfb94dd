"""Every shipped config loads and builds its model, and a config with a mistake says where it is."""

import json
import re
from pathlib import Path

import pytest
import torch

from skipdit.cache import CacheSpec
from skipdit.class_to_image import sample, train
from skipdit.config import ConfigError, load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def schema_of(path: Path) -> type:
    return sample.Config if re.search("sample|demo", path.stem) else train.Config


def downsampling(vae: str) -> int:
    """Pixels per latent pixel: read from a folder of this repository; the Hub's autoencoders all have 8."""
    file = ROOT / vae / "config.json"
    return 2 ** (len(json.loads(file.read_text())["block_out_channels"]) - 1) if file.exists() else 8


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_config_builds_its_model(path):
    schema = schema_of(path)
    config = load_config(schema, path)
    image_size = config.image_size if schema is sample.Config else config.data.image_size
    with torch.device("meta"):
        model = sample.build_model(config.model, image_size // downsampling(config.vae))
    if schema is sample.Config:
        assert CacheSpec.parse(config.cache).branch <= max(model.n_skips, 1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_config_begins_with_a_command_that_exists(path):
    head = re.match(r"(?:#.*\n)+", path.read_text())
    assert head, "the first lines are to say the command and what to expect"
    files = re.findall(r"(?:scripts|configs|[a-z]+-to-[a-z]+)/[\w/.-]+\.(?:sh|py|yaml)", head[0])
    assert files, "no command"
    assert [file for file in files if not (ROOT / file).exists()] == []


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
        ("train.betas.0=3", "train.betas"),
        ("out=[a", "override 'out=[a'"),
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
