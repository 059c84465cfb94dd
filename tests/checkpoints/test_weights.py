"""Every layout of a checkpoint loads, strictly, lazily and without running code; ours convert both ways."""

import argparse
import copy
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import assert_close, assert_equal, skipdit_command
from safetensors.torch import save_file

import skipdit
from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.files import load_checkpoint, load_state, record_of, recorded_settings
from skipdit.checkpoints.loading import identify, load_weights
from skipdit.checkpoints.released import from_released, to_released
from skipdit.checkpoints.sums import verify
from skipdit.class_to_image import DiT
from skipdit.training import checkpoints as checkpoint

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
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt.*`skipdit download`"):
        load_state(tmp_path / "nowhere.pt")


def test_all_absent_shards_are_named_at_once(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    first, *_, last = sorted(tmp_path.glob("*.safetensors"))
    first.unlink(), last.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_state(tmp_path)
    assert first.name in str(caught.value) and last.name in str(caught.value)


# Files that are damaged


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.slow
def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """Of the bits of a file's framework, and of its tensors: either the file is refused, or nothing has changed."""
    path, model = tmp_path / "0000001.pt", tiny(hidden_size=8, depth=2, num_heads=1)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(tmp_path, 1, model, model, optimizer, {"seed": 0}, keep=0, writer=True)
    whole, content = path.read_bytes(), copy.deepcopy(load_checkpoint(path))  # away from the file
    generator, refusals = np.random.default_rng(0), 0
    edges = [*range(0, 8 * 400, 72), *range(8 * len(whole) - 8 * 1200, 8 * len(whole), 136)]
    for bit in [*edges, *generator.integers(0, 8 * len(whole), 80).tolist()]:
        path.write_bytes(flipped(whole, bit))
        try:
            verify(path)
        except WeightsError as error:
            assert "0000001.pt" in str(error)
            refusals += 1
        else:
            assert_equal(load_checkpoint(path), content, f"bit {bit}")
    assert refusals > 80


def test_a_flipped_bit_in_the_weights_is_named(model, tmp_path, capsys):
    path = tmp_path / "weights.pt"
    state = released(model)
    torch.save({"model": {"other": torch.ones(9)}, "ema": state}, path)
    place = path.read_bytes().index(state["skip_linears.1.linear.bias"].numpy().tobytes())
    path.write_bytes(flipped(path.read_bytes(), 8 * place + 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    complaint = r"weights\.pt is damaged: skips\.1\.linear\.bias are not as they were saved"
    with pytest.raises(WeightsError, match=complaint):
        load_weights(model, path)
    assert_same(model.state_dict(), before)
    for arguments in (["export", path, tmp_path / "out.pt"], ["convert", path, tmp_path / "out", "--num-heads", 2]):
        assert re.search(complaint, refused(capsys, *arguments))
    assert "ema.skip_linears.1.linear.bias are not" in refused(capsys, "verify", path)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pt"]


def test_damage_to_what_is_not_used_is_for_verify_to_find(model, tmp_path, capsys):
    """A sampler reads the average only, and not 11 GB to use a quarter of them."""
    path, other = tmp_path / "weights.pt", torch.rand(99)
    torch.save({"model": {"other": other}, "ema": released(model)}, path)
    path.write_bytes(flipped(path.read_bytes(), 8 * path.read_bytes().index(other.numpy().tobytes())))
    load_weights(tiny(), path)
    assert "model.other are not as they were saved" in refused(capsys, "verify", path)


def test_resuming_passes_over_flipped_bits_of_the_optimizer(model, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    optimizer.step()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, model, model, optimizer, {}, keep=0, writer=True)
    path = tmp_path / "0000002.pt"
    moments = checkpoint.latest(tmp_path)[1]["opt"]["state"]["x_embedder.proj.bias"]
    place = path.read_bytes().index(moments["exp_avg"].numpy().tobytes())
    path.write_bytes(flipped(path.read_bytes(), 8 * place))
    with pytest.warns(UserWarning, match=r"0000002\.pt is damaged: opt\.state\.\S+\.exp_avg are not as they were"):
        assert checkpoint.latest(tmp_path)[0].name == "0000001.pt"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_are_not_finite_are_named(model, tmp_path, capsys, number, suffix):
    state, path = released(model), tmp_path / f"weights.{suffix}"
    state["blocks.2.mlp.fc1.weight"][3, 1] = number
    save_file(state, path) if suffix == "safetensors" else torch.save({"ema": state}, path)
    with pytest.raises(WeightsError, match=rf"weights\.{suffix}: not finite are blocks\.2\.mlp\.fc1\.weight$"):
        load_weights(model, path)
    with pytest.raises(WeightsError, match=r"the state dict: not finite are blocks\.2\.mlp\.fc1\.weight$"):
        load_weights(model, state)
    assert "blocks.2.mlp.fc1.weight" in refused(capsys, "verify", path)


def test_verify_says_what_it_could_compare_with(model, tmp_path, capsys):
    state = released(model)
    torch.save(state, tmp_path / "sums.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    torch.save(state, tmp_path / "none.pt")
    torch.serialization.set_crc32_options(True)
    save_file(state, tmp_path / "plain.safetensors")
    for name in ("sums.pt", "old.pt", "none.pt", "plain.safetensors"):
        run_cli("verify", tmp_path / name)
        told = "as they were saved" if name == "sums.pt" else "there are no checksums to compare with"
        line = capsys.readouterr().out
        assert f"{len(state)} tensors" in line and told in line
        load_weights(tiny(), tmp_path / name)


def test_converted_safetensors_have_checksums(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    run_cli("verify", tmp_path / "saved")
    assert "no checksums" in capsys.readouterr().out
    run_cli("convert", tmp_path / "saved", tmp_path / "out")
    run_cli("verify", tmp_path / "out")
    assert "as they were saved" in capsys.readouterr().out
    path = tmp_path / "out/diffusion_pytorch_model.safetensors"
    path.write_bytes(flipped(path.read_bytes(), 8 * path.stat().st_size - 30))
    assert "diffusion_pytorch_model.safetensors: not as saved" in refused(capsys, "verify", tmp_path / "out")


# Weights of another model


ODD_STATES = {
    "0 is no parameter's name": lambda state: {0: state["pos_embed"], **state},
    "None is no parameter's name": lambda state: {None: state["pos_embed"]},
    r"('pos_embed', 1) is no parameter's name": lambda state: {**state, ("pos_embed", 1): state["pos_embed"]},
    "pos_embed is not a dense tensor": lambda state: state | {"pos_embed": state["pos_embed"].to_sparse()},
    "pos_embed has a shape but no numbers": lambda state: state | {"pos_embed": state["pos_embed"].to("meta")},
    "two of its tensors are pos_embed": lambda state: {**state, "module.pos_embed": state["pos_embed"] + 1},
    "two of its tensors are skips.0.norm.bias": lambda state: {**state, "skips.0.norm.bias": state["pos_embed"]},
    "pos_embed are not tensors": lambda state: state | {"pos_embed": 3},
    "pos_embed is torch.int8": lambda state: state | {"pos_embed": state["pos_embed"].to(torch.int8)},
    "pos_embed is torch.complex64": lambda state: state | {"pos_embed": state["pos_embed"].to(torch.complex64)},
    "pos_embed is ()": lambda state: state | {"pos_embed": torch.zeros(())},
}


@pytest.mark.parametrize("complaint", ODD_STATES)
def test_odd_state_dicts_are_named(model, tmp_path, capsys, complaint):
    """In one error that says the file and the key; from a file, from memory, and when converted."""
    odd, path = ODD_STATES[complaint](released(model)), tmp_path / "odd.pt"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"ema": odd}, path)
    for source, name in ((path, "odd.pt"), (odd, "the state dict"), ({"model": odd}, "the state dict")):
        with pytest.raises(WeightsError, match=re.escape(complaint)) as caught:
            load_weights(model, source)
        assert name in str(caught.value)
    assert_same(model.state_dict(), before)
    assert "odd.pt" in refused(capsys, "convert", path, tmp_path / "out", "--num-heads", 2)


@pytest.mark.parametrize("part", ["model", "ema", "opt"])
@pytest.mark.parametrize(
    "odd",
    [{0: torch.ones(1)}, {"a": torch.eye(2).to_sparse()}, {"a": torch.ones(2, device="meta")}],
    ids=["integer name", "sparse", "meta"],
)
def test_odd_training_checkpoints_are_passed_over(model, tmp_path, part, odd):
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        checkpoint.save(tmp_path, step, model, model, optimizer, {}, keep=0, writer=True)
    state = copy.deepcopy(load_checkpoint(tmp_path / "0000002.pt"))  # away from the file, which is written anew
    torch.save({**state, part: odd if part != "opt" or 0 not in odd else {"state": odd}}, tmp_path / "0000002.pt")
    if part == "opt" and 0 in odd:  # what an optimizer keeps has its own ways
        with pytest.raises(WeightsError, match="does not fit its model and optimizer"):
            checkpoint.restore(checkpoint.latest(tmp_path)[1], model, model, optimizer)
    else:
        with pytest.warns(UserWarning, match=r"0000002\.pt.*(0 is no parameter's name|a is not|a has a shape but)"):
            assert checkpoint.latest(tmp_path)[0].name == "0000001.pt"


@pytest.mark.parametrize("name", ["pos_embed", "x_embedder.proj.weight", "blocks.0.mlp.fc1.weight"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (1, 1, 1, 1, 1)])
def test_shapes_that_fit_no_model_are_an_error_of_the_file(model, tmp_path, capsys, name, shape):
    _plain(released(model) | {name: torch.zeros(shape)}, tmp_path / "in.pt")
    assert "in.pt" in refused(capsys, "convert", tmp_path / "in.pt", tmp_path / "out", "--num-heads", 2)


def test_damaged_settings_beside_weights_are_named(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in/config.json").write_text("{")
    assert "config.json is damaged" in refused(capsys, "convert", tmp_path / "in", tmp_path / "out", "--num-heads", 2)
    (tmp_path / "in/other.safetensors.index.json").write_text("[1]")
    assert "index.json is damaged" in refused(capsys, "convert", tmp_path / "in", tmp_path / "out")


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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_what_is_used_is_read(tmp_path):
    """A checkpoint of 200 MB whose average is small: peak memory grows by far less."""
    path = tmp_path / "large.pt"
    big = {f"weight{i}": torch.zeros(12_500_000) for i in range(4)}
    torch.save({"model": big, "ema": torch.nn.Linear(4, 4).state_dict(), "opt": {}}, path)
    script = f"""
        import re, torch
        from skipdit import load_weights

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
    skipdit_command("weights")([str(arg) for arg in args])


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
    assert content.keys() == {"ema", "config", "args", "step"} and "skip_norms.0.weight" in content["ema"]
    assert content["config"].items() >= TINY.items() and (content["args"], content["step"]) == (args, 7)
    halves = {name: tensor.half() for name, tensor in ema.state_dict().items()}
    assert_same(load_state(tmp_path / "small.pt"), halves)


def test_convert_and_export_keep_that_a_model_is_of_flow_matching(tmp_path):
    ema = tiny()
    ema.flow_shift = 2.0
    place, model = tmp_path / "run/checkpoints", tiny()
    checkpoint.save(place, 7, model, ema, torch.optim.AdamW(model.parameters()), {}, keep=1, writer=True)
    run_cli("export", tmp_path / "run", tmp_path / "small.pt")
    for source in ("run", "small.pt"):
        run_cli("convert", tmp_path / source, tmp_path / f"{source}-folder")
    for name in ("run", "small.pt", "run-folder", "small.pt-folder"):
        model = tiny()
        load_weights(model, tmp_path / name)
        assert model.flow_shift == 2.0, name
    assert DiT.from_pretrained(tmp_path / "run-folder").flow_shift == 2.0
    (tmp_path / "run-folder/config.json").write_text('{"flow_shift": "large"}')
    with pytest.raises(WeightsError, match="run-folder: flow_shift is 'large'; it should be a number above 0"):
        load_weights(tiny(), tmp_path / "run-folder")


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_export_round_trip_is_bit_exact(model, tmp_path, name):
    model.save_pretrained(tmp_path / "folder")
    run_cli("export", tmp_path / "folder", tmp_path / name)
    assert_same(load_state(tmp_path / name), model.state_dict())
    assert recorded_settings(tmp_path / name).items() >= TINY.items()
    run_cli("export", tmp_path / name, tmp_path / "again.pt")
    assert record_of(tmp_path / "again.pt") == record_of(tmp_path / name)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("patch_size", [2, 4])
def test_published_sizes_are_read_off_the_shapes(patch_size):
    with torch.device("meta"):
        model = DiT.from_name(f"DiT-S/{patch_size}", num_classes=5)
    config = DiT.config_from_state(model.state_dict())
    assert config == {name: model.config[name] for name in config}
    assert len(config) == 14


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


@pytest.mark.slow
def test_module_runs_without_warnings(tmp_path):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "skipdit", "weights", "export"]
    run = subprocess.run([*command, tmp_path / "nowhere.pt", tmp_path / "out.pt"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: no checkpoint at")
