"""Every layout of a checkpoint loads, strictly, lazily and without running code; ours convert both ways."""

import argparse
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import assert_close
from safetensors.torch import save_file

import skipdit
from skipdit import checkpoint, convert
from skipdit.class_to_image import DiT
from skipdit.weights import (
    WeightsError,
    from_released,
    identify,
    load_checkpoint,
    load_state,
    load_weights,
    to_released,
)

TINY = {"input_size": 4, "hidden_size": 24, "depth": 4, "num_heads": 2, "num_classes": 3}


def tiny(skip: bool = True, **changes) -> DiT:
    """A small DiT, every weight random: DiT's own initialisation has zeros, which hide mistakes."""
    model = DiT(**(TINY | changes), skip=skip)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def released(model: DiT) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in to_released(model.state_dict()).items()}


def assert_same(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.fixture
def model():
    return tiny()


# Layouts


def _released_layout(state, path):
    old = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, betas=[0.9, 0.999])
    torch.save({"model": old, "ema": state, "opt": {"state": {0: {"step": torch.ones(())}}}, "args": args}, path)


def _plain(state, path):
    torch.save(state, path)


def _before_zip(state, path):
    torch.save({"ema": state}, path, _use_new_zipfile_serialization=False)


def _ours(state, path):
    torch.save(from_released(state), path)


def _wrapped(state, path):
    torch.save({"model": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}}, path)


def _blocks_compiled(state, path):
    torch.save({re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", name): t for name, t in state.items()}, path)


@pytest.mark.parametrize("write", [_released_layout, _plain, _before_zip, _ours, _wrapped, _blocks_compiled])
def test_pickled_layouts_load(model, tmp_path, write):
    write(released(model), tmp_path / "weights.pt")
    other = tiny()
    assert load_weights(other, tmp_path / "weights.pt") == []
    assert_same(other.state_dict(), model.state_dict())


def test_public_name_takes_a_state_dict_or_a_whole_checkpoint(model):
    for source in (released(model), {"ema": released(model), "args": None}):
        other = tiny()
        skipdit.load_weights(other, source)
        assert_same(other.state_dict(), model.state_dict())


def test_dtype_of_the_model_stays(model):
    half = {name: tensor.half() for name, tensor in released(model).items()}
    load_weights(model, half)
    assert model.dtype == torch.float32
    assert torch.equal(model.state_dict()["blocks.0.mlp.fc1.weight"].half(), half["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("shard_size", ["10GB", "50KB"])
def test_diffusers_folder_loads(model, tmp_path, shard_size):
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert_same(load_state(tmp_path), model.state_dict())


def test_safetensors_file_loads(model, tmp_path):
    save_file(released(model), tmp_path / "weights.safetensors")
    assert_same(load_state(tmp_path / "weights.safetensors"), model.state_dict())


def test_run_folder_gives_the_average_of_its_newest_checkpoint(model, tmp_path):
    ema = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (9, 10):
        ema.pos_embed.fill_(step)
        checkpoint.save(tmp_path / "checkpoints", step, model, ema, optimizer, {"seed": 0}, keep=2, writer=True)
    assert_same(load_state(tmp_path), ema.state_dict())
    assert_same(load_state(tmp_path / "checkpoints"), ema.state_dict())


def test_folder_of_several_files_does_not_guess(model, tmp_path):
    for name in ("ffs-skip.pt", "DiT-XL-2-skip.pt"):
        _plain(released(model), tmp_path / name)
    with pytest.raises(WeightsError, match=r"DiT-XL-2-skip\.pt, ffs-skip\.pt; name one"):
        load_state(tmp_path)


def test_released_names_are_a_bijection(model):
    state = model.state_dict()
    names = to_released(state)
    assert {"skip_norms.0.weight", "skip_linears.1.linear.bias"} < names.keys()
    assert list(from_released(names)) == list(state)


# Files that must not load


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_never_runs(model, tmp_path, new_format):
    path, proof = tmp_path / "evil.pt", tmp_path / "ran"
    content = {"ema": released(model), "args": Evil(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"evil\.pt was not loaded: it wants to call \w+\.mkdir") as caught:
        load_weights(model, path)
    assert not proof.exists()
    assert "weights_only" not in str(caught.value)  # torch's message tells how to run the code
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("write", [_released_layout, _before_zip])
def test_truncated_file_is_named(model, tmp_path, write, share):
    path = tmp_path / "half.pt"
    write(released(model), path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(WeightsError, match=r"half\.pt is damaged"):
        load_weights(model, path)


def test_truncated_safetensors_is_named(model, tmp_path):
    path = tmp_path / "half.safetensors"
    save_file(released(model), path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(WeightsError, match=r"half\.safetensors is damaged"):
        load_weights(model, path)


@pytest.mark.parametrize("text", ["<html>not found</html>", "version https://git-lfs.github.com/spec/v1\nsize 11\n"])
def test_text_under_a_checkpoints_name_is_named(tmp_path, text):
    (tmp_path / "page.pt").write_text(text)
    with pytest.raises(WeightsError, match=r"page\.pt is damaged, incomplete or no checkpoint"):
        load_state(tmp_path / "page.pt")


@pytest.mark.parametrize("content", [torch.zeros(2), [torch.zeros(2)], {"step": 3}])
def test_files_of_other_things_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"other\.pt"):
        load_state(tmp_path / "other.pt")


def test_absent_file_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt.*download\.sh"):
        load_state(tmp_path / "nowhere.pt")


def test_all_absent_shards_are_named_at_once(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    first, *_, last = sorted(tmp_path.glob("*.safetensors"))
    first.unlink(), last.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_state(tmp_path)
    assert first.name in str(caught.value) and last.name in str(caught.value)


# Weights of another model


def test_other_backbone_is_named_and_every_name_listed(model, tmp_path):
    state = released(model)
    state["temp_embed"] = torch.zeros(1, 16, 24)
    del state["y_embedder.embedding_table.weight"]
    state["final_layer.linear.bias"] = torch.zeros(5)
    torch.save({"ema": state}, tmp_path / "ffs-skip.pt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, tmp_path / "ffs-skip.pt")
    header, *listed = str(caught.value).splitlines()
    assert header.endswith(
        "ffs-skip.pt holds class-to-video Latte, 2 long skips; "
        "it does not fit DiT, class-to-image DiT, 2 long skips, 3 classes:"
    )
    assert [line.strip() for line in listed] == [
        "missing (1):",
        "y_embedder.embedding_table.weight",
        "unexpected (1):",
        "temp_embed",
        "misshapen (1):",
        "final_layer.linear.bias is (5,), the model has (32,)",
    ]
    assert_same(model.state_dict(), before)


def test_plain_weights_start_a_skip_model(model):
    plain, own = tiny(skip=False), {name: t.clone() for name, t in model.state_dict().items() if "skips" in name}
    missing = load_weights(model, released(plain), allow_missing="skips.*")
    assert missing == list(own)
    assert_same(model.state_dict(), plain.state_dict() | own)


def test_plain_weights_do_not_silently_fill_a_skip_model(model):
    with pytest.raises(WeightsError, match="stage 1 of training adds them"):
        load_weights(model, released(tiny(skip=False)))


def test_skip_weights_do_not_fit_a_plain_model(model):
    with pytest.raises(WeightsError, match=r"set skip=true"):
        load_weights(tiny(skip=False), released(model))


def test_some_skips_are_not_enough(model):
    state = {name: t for name, t in released(model).items() if not re.match(r"skip_\w+\.1\.", name)}
    with pytest.raises(WeightsError, match=r"missing \(4\)(.|\n)*all of them or none"):
        load_weights(model, state, allow_missing="skips.*")


def test_only_the_skips_may_be_missing(model):
    state = released(tiny(skip=False))
    del state["pos_embed"]
    with pytest.raises(WeightsError, match=r"missing \(1\):\n +pos_embed"):
        load_weights(model, state, allow_missing="skips.*")


def test_hunyuan_versions_are_told_apart():
    skips = [f"blocks.{i}.skip_norm.{part}" for i in range(21, 40) for part in ("weight", "bias")]
    state = dict.fromkeys(["mlp_t5.0.weight", *skips], torch.zeros(1))
    assert identify(state) == "text-to-image Hunyuan-DiT, 19 long skips"
    assert "before v1.2" in identify(state | {"style_embedder.weight": torch.zeros(1)})


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_what_is_used_is_read(tmp_path):
    """A checkpoint of 200 MB whose average is small: peak memory grows by far less."""
    path = tmp_path / "large.pt"
    big = {f"weight{i}": torch.zeros(12_500_000) for i in range(4)}
    torch.save({"model": big, "ema": torch.nn.Linear(4, 4).state_dict(), "opt": {}}, path)
    script = f"""
        import re, torch
        from skipdit.weights import load_weights

        def peak():  # MiB; unlike getrusage's it is not inherited from the process that started this one
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

        model = torch.nn.Linear(4, 4)
        before = peak()
        load_weights(model, {str(path)!r})
        print(peak() - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert path.stat().st_size > 190e6
    assert float(run.stdout) < 40


# Conversion


def run_cli(*args) -> None:
    convert.main([str(arg) for arg in args])


def test_convert_keeps_the_released_numbers(golden, tmp_path):
    case = golden("dit_skip_0")
    torch.save({"ema": case.state}, tmp_path / "released.pt")
    heads = case.case["config"]["num_heads"]
    run_cli("convert", tmp_path / "released.pt", tmp_path / "folder", "--num-heads", heads)
    model = DiT.from_pretrained(tmp_path / "folder").eval()
    assert {name: model.config[name] for name in case.case["config"]} == case.case["config"]
    with torch.no_grad():
        assert_close(model(*(case.inputs[name] for name in ("x", "t", "y"))), case.outputs["forward"])


@pytest.mark.parametrize("skip", [True, False])
def test_folder_round_trip_is_bit_exact(tmp_path, skip):
    model = tiny(skip)
    model.save_pretrained(tmp_path / "saved")
    run_cli("convert", tmp_path / "saved", tmp_path / "again")  # heads from config.json
    for folder in ("saved", "again"):
        loaded = DiT.from_pretrained(tmp_path / folder)
        assert_same(loaded.state_dict(), model.state_dict())
        assert {**TINY, "skip": skip}.items() <= dict(loaded.config).items()


def test_convert_and_export_a_training_checkpoint(model, tmp_path):
    ema, optimizer = tiny(), torch.optim.AdamW(model.parameters())
    args = {"model": {"num_heads": 2}}
    checkpoint.save(tmp_path / "run/checkpoints", 7, model, ema, optimizer, args, keep=1, writer=True)
    run_cli("convert", tmp_path / "run", tmp_path / "folder")
    assert_same(DiT.from_pretrained(tmp_path / "folder").state_dict(), ema.state_dict())
    run_cli("export", tmp_path / "run", tmp_path / "small.pt", "--dtype", "float16")
    content = load_checkpoint(tmp_path / "small.pt")
    assert content.keys() == {"ema"} and "skip_norms.0.weight" in content["ema"]
    halves = {name: tensor.half() for name, tensor in ema.state_dict().items()}
    assert_same(load_state(tmp_path / "small.pt"), halves)


def test_export_round_trip_is_bit_exact(model, tmp_path):
    model.save_pretrained(tmp_path / "folder")
    run_cli("export", tmp_path / "folder", tmp_path / "out.pt")
    assert_same(load_state(tmp_path / "out.pt"), model.state_dict())
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("patch_size", [2, 4])
def test_published_sizes_are_read_off_the_shapes(patch_size):
    with torch.device("meta"):
        model = DiT.from_name(f"DiT-S/{patch_size}", num_classes=5)
    config = DiT.config_from_state(model.state_dict())
    assert config == {name: model.config[name] for name in config}
    assert len(config) == 9


def refused(capsys, *args) -> str:
    with pytest.raises(SystemExit) as caught:
        run_cli(*args)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_unpublished_width_needs_its_heads(model, tmp_path, capsys):
    _plain(released(model), tmp_path / "in.pt")
    assert "num_heads" in refused(capsys, "convert", tmp_path / "in.pt", tmp_path / "out")


def test_existing_output_is_kept(model, tmp_path, capsys):
    _plain(released(model), tmp_path / "in.pt")
    (tmp_path / "out.pt").write_text("precious")
    assert "exists and is kept" in refused(capsys, "export", tmp_path / "in.pt", tmp_path / "out.pt")
    assert (tmp_path / "out.pt").read_text() == "precious"


@pytest.mark.parametrize("command", ["convert", "export"])
def test_overflow_writes_nothing(model, tmp_path, capsys, command):
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "in")
    error = refused(capsys, command, tmp_path / "in", tmp_path / "out", "--dtype", "float16")
    assert "not finite in torch.float16" in error and "blocks.0.mlp.fc1.weight" in error
    assert not (tmp_path / "out").exists()


def test_failed_write_leaves_nothing(model, tmp_path, capsys, monkeypatch):
    def full_disk(content, path):
        path.write_text("part")
        raise RuntimeError("no space left")

    _plain(released(model), tmp_path / "in.pt")
    monkeypatch.setattr(torch, "save", full_disk)
    assert "no space left" in refused(capsys, "export", tmp_path / "in.pt", tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


@pytest.mark.parametrize("name", ["skipdit.nothing.DiT", "skipdit.class_to_image.Dit", "DiT", "torch.nn.Linear"])
def test_wrong_model_class_is_named(model, tmp_path, capsys, name):
    _plain(released(model), tmp_path / "in.pt")
    assert name in refused(capsys, "convert", tmp_path / "in.pt", tmp_path / "out", "--model-class", name)


def test_module_runs_without_warnings(tmp_path):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "skipdit.weights", "export"]
    run = subprocess.run([*command, tmp_path / "nowhere.pt", tmp_path / "out.pt"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: no checkpoint at")
