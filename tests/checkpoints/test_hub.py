"""All four models go to the Hub with a card and come back bit for bit; single files become models. All is local."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import skipdit_command, tiny_dit, tiny_hunyuan, tiny_latte, tiny_latte_t2v
from diffusers import HunyuanDiT2DModel
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import save_file

from skipdit import parse_policy
from skipdit.caching.plans import CachePlan
from skipdit.checkpoints.convert import export
from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.released import to_released
from skipdit.checkpoints.sums import verify
from skipdit.class_to_image import DiT
from skipdit.training import checkpoints as checkpoint
from skipdit.utils.provenance import fingerprint

MODELS = {"DiT": tiny_dit, "Latte": tiny_latte, "LatteT2V": tiny_latte_t2v, "HunyuanDiT": tiny_hunyuan}
UNTOLD = {"DiT": {"num_heads": 2}, "Latte": {"num_heads": 2}, "HunyuanDiT": {}}
UNTOLD |= {"LatteT2V": {"num_attention_heads": 2, "sample_size": 4, "video_length": 4}}  # by a released file
SETTINGS = {
    "out": "/home/somebody/results/mine",
    "vae": "stabilityai/sd-vae-ft-ema",
    "model": {"hidden_size": 32, "depth": 4},
    "data": {"kind": "image_folder", "path": "/home/somebody/shoes", "image_size": 32},
    "train": {"batch_size": 64, "objective": "diffusion"},
    "judge": {"reference": "/home/somebody/real", "network": "/home/somebody/network.pt"},
}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> SimpleNamespace:
    """A stand-in for the Hub: a folder with a folder for every repository."""
    stand_in = SimpleNamespace(folder=tmp_path / "hub", calls=[])

    def create_repo(self, repo_id, **options):
        stand_in.calls.append((repo_id, options))
        (stand_in.folder / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **options):
        ignore = shutil.ignore_patterns(*(ignore_patterns or ()))
        shutil.copytree(folder_path, stand_in.folder / repo_id, ignore=ignore, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub.example/{repo_id}/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "file_exists", lambda self, repo, name: (stand_in.folder / repo / name).exists())
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return stand_in


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a training of seven steps."""
    model, ema = tiny_dit(1), tiny_dit()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(tmp_path / "run/checkpoints", 7, model, ema, optimizer, SETTINGS, keep=1, writer=True)
    return tmp_path / "run"


@pytest.fixture
def plan(tmp_path) -> Path:
    """A plan for its weights, of two full steps, a cached one and a forecast."""
    about = {"model": fingerprint(tiny_dit()), "sampler": "ddim", "guidance_scale": 2.0}
    file = tmp_path / "measured.json"
    CachePlan((999, 600, 300, 0), (None, (), None, None), 1, "FSFO", ((),) * 4, about).save(file)
    return file


@pytest.fixture
def samples(tmp_path) -> Path:
    """As much of a sampler's output folder as a card needs, with a judgement of it."""
    folder = tmp_path / "samples"
    (folder / "evaluation").mkdir(parents=True)
    config = {"sampler": "ddim", "steps": 4, "guidance_scale": 2.0, "cache": "none", "image_size": 32, "out": "samples"}
    (folder / "report.json").write_text(json.dumps({"config": config, "flops_speedup": 1.75}))
    fid = {"results": {"fid": 12.3456, "num_samples": 5}, "protocol": {"reference": {"source": "/data/shoes"}}}
    (folder / "evaluation/fid.json").write_text(json.dumps({"metric": "fid"} | fid))
    (folder / "grid.png").write_bytes(b"a picture")
    return folder


def weights_command(*args) -> None:
    skipdit_command("weights")([str(arg) for arg in args])


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    assert type(model) is type(expected) and not model.training
    assert settings_of(model) == settings_of(expected)
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def settings_of(model: torch.nn.Module) -> dict:
    """As JSON has them, which knows no tuples."""
    return json.loads(json.dumps({key: value for key, value in model.config.items() if key[0] != "_"}))


@pytest.mark.parametrize("name", MODELS)
def test_models_come_back_from_the_hub(hub, name):
    model = MODELS[name]()
    address = model.push_to_hub("me/mine", license="mit", private=True)
    assert address == "https://hub.example/me/mine/commit/1"
    assert hub.calls == [("me/mine", {"private": True, "exist_ok": True})]
    assert_same(type(model).from_pretrained(hub.folder / "me/mine").eval(), model)
    card = ModelCard.load(hub.folder / "me/mine/README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "skipdit")
    assert f'{name}.from_pretrained("me/mine")' in card.text and f"from skipdit import {name}" in card.text


def test_a_training_goes_to_the_hub_in_one_command(hub, run, plan, samples, tmp_path, capsys):
    facts = ["--plan", plan, "--samples", samples, "--license", "apache-2.0", "--push-to", "me/shoes"]
    weights_command("convert", run, tmp_path / "out", *facts)
    assert capsys.readouterr().out.split() == [str(tmp_path / "out"), "https://hub.example/me/shoes/commit/1"]
    place = hub.folder / "me/shoes"
    assert_same(DiT.from_pretrained(place).eval(), tiny_dit())
    policy = parse_policy(str(place / "plan.json"))
    assert policy.kinds == "FSFO" and policy.about["model"] == fingerprint(DiT.from_pretrained(place))
    assert "as they were saved" in verify(place)
    card = ModelCard.load(place / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "unconditional-image-generation")
    assert [(r.metric_type, r.metric_value, r.dataset_name) for r in card.data.eval_results] == [
        ("fid", 12.3456, "shoes")
    ]
    for line in (
        "DiT for class-to-image with 0.1 million parameters and 2 long skips",
        "skipdit sample --task class-to-image weights=shoes sampler=ddim steps=4 guidance_scale=2.0 --cache shoes/plan",
        "of 4 steps 2 full, 1 cached, 1 forecast; made for sampler ddim, guidance scale 2.0",
        "| depth | 4 |",
        "| data | shoes |",
        "| steps | 7 |",
        "| train.batch_size | 64 |",
        "| speedup in FLOPs | 1.75 |",
        "| fid, shoes | 12.35 |",
        "![Samples](samples.png)",
    ):
        assert line in card.text
    assert (place / "samples.png").read_bytes() == b"a picture"
    assert "somebody" not in card.text + (place / "config.yaml").read_text()


def test_examples_of_a_card_run(hub, run, plan, tmp_path, monkeypatch):
    weights_command("convert", run, tmp_path / "out", "--plan", plan, "--push-to", "me/shoes")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: str(hub.folder / repo / name))
    text, names = ModelCard.load(hub.folder / "me/shoes/README.md").text, {}
    monkeypatch.chdir(hub.folder)
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(block, names)
    assert_same(names["model"], tiny_dit())
    assert names["policy"].kinds == "FSFO"


def test_a_card_that_is_there_stays(hub, run, tmp_path):
    (hub.folder / "me/mine").mkdir(parents=True)
    (hub.folder / "me/mine/README.md").write_text("written by hand")
    weights_command("convert", run, tmp_path / "out", "--push-to", "me/mine")
    assert (hub.folder / "me/mine/README.md").read_text() == "written by hand"
    assert "\nlicense: unknown\n" in (tmp_path / "out/README.md").read_text()


def test_a_refused_upload_says_how_to_go_on(hub, run, tmp_path, monkeypatch, capsys):
    def refuse(self, *args, **kwargs):
        raise ConnectionError("401 Client Error\nmore of it")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(SystemExit):
        weights_command("convert", run, tmp_path / "out", "--push-to", "me/mine")
    error = capsys.readouterr().err
    assert error.startswith("error: me/mine was not uploaded: 401 Client Error; `hf auth login`")
    assert f"`hf upload me/mine {tmp_path / 'out'}`" in error and error.count("\n") == 1
    assert_same(DiT.from_pretrained(tmp_path / "out").eval(), tiny_dit())


def test_a_plan_of_other_weights_is_named(plan, tmp_path):
    tiny_dit(1).save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match=r"measured\.json was made for model \w{16}, not"):
        weights_command("convert", tmp_path / "other", tmp_path / "out", "--plan", plan)


def test_samples_without_report_are_named(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        weights_command("convert", run, tmp_path / "out", "--samples", tmp_path)
    assert "no report.json in" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_of_diffusers_gets_a_card_too(tmp_path):
    export_released(tiny_hunyuan(), tmp_path / "in.pt")
    weights_command("convert", tmp_path / "in.pt", tmp_path / "out", "--model-class", "diffusers.HunyuanDiT2DModel")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "diffusers" and "from diffusers import HunyuanDiT2DModel" in card.text
    HunyuanDiT2DModel.from_pretrained(tmp_path / "out")


def export_released(model: torch.nn.Module, path: Path) -> None:
    """A file that says nothing of its model, as the original's."""
    state = {name: tensor.clone() for name, tensor in to_released(model.state_dict()).items()}
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"model": other, "ema": state}, path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("name", MODELS)
def test_exports_are_single_files(name, suffix, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "folder")
    export(tmp_path / "folder", tmp_path / f"mine.{suffix}", torch.float32)
    assert_same(type(model).from_single_file(tmp_path / f"mine.{suffix}"), model)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_released_files_are_single_files(name, suffix, tmp_path):
    model, path = MODELS[name](), tmp_path / f"released.{suffix}"
    export_released(model, path)
    if name != "HunyuanDiT":
        with pytest.raises(
            WeightsError, match=rf"released\.{suffix}, as {name}: .*state its number of attention heads"
        ):
            type(model).from_single_file(path)
    loaded = type(model).from_single_file(path, **UNTOLD[name])
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs | ours)
    half = type(model).from_single_file(path, torch_dtype=torch.float16, **UNTOLD[name])
    assert half.dtype == torch.float16
    inputs = model.random_inputs(1)
    with torch.no_grad():
        assert torch.equal(first(loaded(**inputs)), first(model(**inputs)))


def first(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def test_a_file_of_another_model_is_named(tmp_path):
    export_released(tiny_latte(), tmp_path / "clips.pt")
    with pytest.raises(WeightsError, match=r"clips\.pt, as DiT: these are the weights of a class-to-video Latte"):
        DiT.from_single_file(tmp_path / "clips.pt", num_heads=2)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "none.pt")
    with pytest.raises(SystemExit):
        weights_command("convert", tmp_path / "none.pt", tmp_path / "out")
