"""Training: resume, processes, freezing, broken data, bad numbers. Small models of the real classes, a real folder."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import LoggerType
from commands import forked
from conftest import FSDP, assert_equal, assert_resumes, run_script, state, stats, tiny_dit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.loading import load_weights
from skipdit.checkpoints.released import to_released
from skipdit.class_to_image.train import Config, train
from skipdit.config import changed, load_config
from skipdit.data.images import ImageFolder
from skipdit.data.stream import rows_of
from skipdit.training.checkpoints import latest
from skipdit.training.loop import describe, fit
from skipdit.training.parallel import peak_memory
from skipdit.training.settings import TrainConfig
from skipdit.training.steps import Draw, learning_rate, set_trainable
from skipdit.utils.errors import UserError


@pytest.fixture
def config(training_config):
    return training_config("class-to-image")


@pytest.mark.slow
def test_loss_falls(config):
    config = changed(config, {"train.steps": 60, "train.lr": 3e-3})
    train(config)
    losses = [line["loss"] for line in stats(config)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.slow
def test_two_precisions_in_one_process(config, tmp_path):
    """As in a notebook."""
    train(config)
    whole = state(config)["ema"]
    for precision in ("bf16", "fp32"):
        config = changed(config, {"out": str(tmp_path / precision), "train.precision": precision})
        train(config)
        same = all(torch.equal(tensor, whole[name]) for name, tensor in state(config)["ema"].items())
        assert same == (precision == "fp32")


def test_resume_is_bit_equal(config, tmp_path):
    """Story 7: two steps, then two more, equal four at once: weights, average, optimizer, data, noise."""
    config = assert_resumes(config, train, tmp_path)
    assert [line["step"] for line in stats(config)] == [1, 2, 3, 4]


def test_tensorboard_has_every_step_of_a_resumed_run_once(config):
    """The point at the checkpoint too; step 3 is done twice."""
    config = changed(config, {"train.steps": 3})
    train(config)
    (Path(config.out) / "checkpoints/0000003.pt").unlink()
    config = changed(config, {"train.steps": 4})
    train(config)
    board = EventAccumulator(str(Path(config.out) / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]


def test_damaged_checkpoint_is_passed_over(config):
    train(config)
    folder = Path(config.out) / "checkpoints"
    newest = folder / "0000004.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"0000004\.pt is damaged"):
        path, _ = latest(folder)
    assert path.name == "0000002.pt"
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(WeightsError, match=r"none of the 2 checkpoints in .* can be read"):
        train(config)  # and not from the beginning, with the weights that `init` would have given it


@pytest.mark.slow
def test_the_main_process_chooses_the_checkpoint(config, tmp_path):
    """Another one has a newer file, on a machine that does not share the run folder."""
    for process, steps in enumerate((2, 4)):
        config = changed(config, {"out": str(tmp_path / f"run-{process}"), "train.steps": steps})
        train(config)
    config = changed(config, {"out": str(tmp_path / "run-0")})
    status, told = run_script(config, f"out={tmp_path}/run-${{oc.env:LOCAL_RANK}}", processes=2)
    assert status == 0, told[-3000:]
    assert [line["step"] for line in stats(config)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_process_that_cannot_see_the_checkpoint_does_not_start_anew(config, tmp_path):
    config = changed(config, {"out": str(tmp_path / "run-0"), "train.steps": 2})
    train(config)
    status, told = run_script(config, f"out={tmp_path}/run-${{oc.env:LOCAL_RANK}}", "train.steps=4", processes=2)
    assert status
    assert re.search(r"run-1/checkpoints/0000002\.pt.* all machines must see the same folder", told)


def test_checkpoints_of_other_names_are_left_alone(config):
    config = changed(config, {"train.keep": 1})
    folder = Path(config.out) / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "best.pt").write_bytes(b"mine")
    train(config)
    assert sorted(file.name for file in folder.iterdir()) == ["0000004.pt", "best.pt"]
    path, _ = latest(folder)
    assert path.name == "0000004.pt"


def test_a_damaged_checkpoint_does_not_outlive_a_good_one(config):
    config = changed(config, {"train.save_every": 1, "train.keep": 0})
    train(config)
    folder = Path(config.out) / "checkpoints"
    (folder / "0000004.pt").write_bytes(b"damaged")
    (folder / "0000003.pt").unlink()
    with pytest.warns(UserWarning, match=r"0000004\.pt is damaged"):
        train(changed(config, {"train.steps": 3, "train.keep": 1}))
    assert sorted(file.name for file in folder.iterdir()) == ["0000003.pt", "0000004.pt"]
    with pytest.warns(UserWarning):
        assert latest(folder)[0].name == "0000003.pt"


def test_freezing_all_but_skips_needs_skips(config):
    config = changed(config, {"model.skip": False, "train.freeze": True})
    with pytest.raises(UserError, match=r"freeze trains the long skips alone, and the model has none: set model\.skip"):
        train(config)


def test_only_the_end_is_saved(config):
    config = changed(config, {"train.save_every": 0, "train.log_every": 0})
    train(config)
    assert [file.name for file in (Path(config.out) / "checkpoints").iterdir()] == ["0000004.pt"]
    assert [line["step"] for line in stats(config)] == [4]


COUNT_MODELS = """
import gc, sys
import torch
from skipdit.class_to_image import DiT
from skipdit.training.loop import fit
from skipdit.training.settings import TrainConfig

def count():
    return sum(isinstance(thing, DiT) and not next(thing.parameters()).is_meta for thing in gc.get_objects())

def loss(model, batch, draw):
    counts.append(count())
    return model(batch["x"], draw.randint(1000), draw.randint(2)).square().flatten(1).mean(1)

counts, sampled, data = [], [], [{"x": torch.randn(4, 4, 4)} for _ in range(4)]
model = DiT(input_size=4, hidden_size=32, depth=4, num_heads=2, num_classes=2, skip=True)
config = TrainConfig(steps=3, batch_size=4, precision="fp32", parallel="fsdp", workers=0, sample_every=1)
fit(model, loss, data, config, sys.argv[1], config, lambda model, step: sampled.append(count()))
assert counts == [2, 2, 2], f"trained, averaged, and others: {counts}"
assert sampled in ([], [3, 3, 3]), sampled
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [FSDP])
def test_the_model_of_a_sample_grid_is_dropped(tmp_path, parallel):
    """Sharded weights are gathered for it: in the main process, and not for the rest of the run."""
    (tmp_path / "count.py").write_text(COUNT_MODELS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, "count.py", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def mean_output(model, batch, draw):
    """A loss that needs no targets."""
    return model(draw.randn(4, 4, 4), draw.randint(1000), batch["label"]).flatten(1).mean(1)


def test_sampling_runs_in_the_precision_of_training(config, monkeypatch):
    monkeypatch.setattr(
        "skipdit.training.loop.Accelerator.autocast", lambda self: torch.autocast("cpu", torch.bfloat16)
    )
    sampled, config = [], changed(config, {"train.sample_every": 2})

    def sample(model, step):
        sampled.append((step, torch.is_autocast_enabled("cpu")))

    data = ImageFolder(config.data.path, 8)
    fit(tiny_dit(num_classes=3), mean_output, data, config.train, config.out, config, sample)
    assert sampled == [(2, True), (4, True)]


def test_samples_that_are_not_finite_end_no_training(config, capsys):
    config = changed(config, {"train.sample_every": 2})

    def sample(model, step):
        raise FloatingPointError("latents are not finite")

    data = ImageFolder(config.data.path, 8)
    fit(tiny_dit(num_classes=3), mean_output, data, config.train, config.out, config, sample)
    assert "step 2: no samples to look at: latents are not finite" in capsys.readouterr().out
    assert Path(config.out, "checkpoints/0000004.pt").exists()


@pytest.mark.slow
def test_every_process_lists_its_broken_images(config, image_folder):
    """Both broken files are found, whichever process met them."""
    config = changed(config, {"train.steps": 12})
    status, told = run_script(config, processes=2)
    assert status == 0, told[-3000:]
    listed = (Path(config.out) / "broken_files.txt").read_text().splitlines()
    assert len(listed) == 2
    assert "files that were skipped: 2" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"micro_batch_size": 1}, {"gradient_checkpointing": True}, {"compile": True, "micro_batch_size": 2}]
)
def test_saving_memory_or_time_changes_no_gradient(config, tmp_path, change):
    """Story 20. From random weights: those that DiT starts with give most blocks no gradient."""
    torch.save({"ema": to_released(tiny_dit(num_classes=3).state_dict())}, tmp_path / "random.pt")
    config = changed(config, {"init": str(tmp_path / "random.pt"), "train.steps": 2})
    train(config)
    reference, norms = state(config), [line["grad_norm"] for line in stats(config)]
    config = changed(
        config, {"out": str(tmp_path / "other")} | {f"train.{key}": value for key, value in change.items()}
    )
    train(config)
    assert [line["grad_norm"] for line in stats(config)] == pytest.approx(norms, rel=1e-4)
    for name, moments in state(config)["opt"]["state"].items():
        expected = reference["opt"]["state"][name]["exp_avg"]
        torch.testing.assert_close(moments["exp_avg"], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.fixture
def launched(monkeypatch):
    """Sets variables as a launcher does, before the process knows what it is."""

    def reset():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    def set_variables(**variables):
        reset()
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield set_variables
    reset()


def accelerate_variables() -> set[str]:
    """All that the installed accelerate reads of a training, as its source has them."""
    sources = [path.read_text(encoding="utf-8") for path in Path(accelerate.__file__).parent.rglob("*.py")]
    whole = re.compile(r"[\"']((?:ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_[A-Z0-9_]+[A-Z0-9])[\"']")
    parts = re.compile(r"""prefix ?\+ ?["']([A-Z0-9_]+)["']""")
    names = {name for source in sources for name in whole.findall(source)}
    ends = {name for source in sources for name in parts.findall(source)}
    prefixes = ("ACCELERATE_DYNAMO_", "ACCELERATE_FP8_", "FSDP_", "MEGATRON_LM_")
    return names | {prefix + end for prefix in prefixes for end in ends}


@pytest.mark.slow
@pytest.mark.parametrize("value", ["4", "true", "fp16", "TE", "inductor"])
def test_accelerates_variables_change_no_bit(config, tmp_path, launched, capsys, value):
    """Accumulation, precision, compilation, clipping and whatever else a launcher or accelerate's config file sets."""
    config = changed(config, {"train.micro_batch_size": 2, "train.grad_clip": 0.5})
    train(config)
    expected = state(config)
    names = {name for name in accelerate_variables() - FOREIGN.keys() if not name.endswith(PLACES)}
    assert len(names) > 80 and {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "FSDP_OFFLOAD_PARAMS"} < names
    launched(**dict.fromkeys(names, value))
    config = changed(config, {"out": str(tmp_path / "launched")})
    train(config)
    assert_equal(expected | {"args": None}, state(config) | {"args": None})
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == value  # it is other programs', too
    assert f"ACCELERATE_GRADIENT_CLIPPING={value} is not used: train.grad_clip decides" in capsys.readouterr().out


PLACES = ("_USE_CPU", "_TORCH_DEVICE", "_CPU_AFFINITY", "_DEBUG_MODE", "_LOG_LEVEL")  # where to run; no number changes
FOREIGN = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "accelerate's own sharding",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's device meshes",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "SageMaker's own parallelism",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOREIGN)
def test_launches_that_cannot_be_honoured_are_refused(config, launched, name):
    launched(**{name: "DATA_PARALLEL" if "SAGEMAKER" in name else "true"})
    with pytest.raises(ValueError, match=rf"sets {name} \({FOREIGN[name]}\), which is not supported: .*torchrun"):
        train(config)
    assert not Path(config.out).exists()
    launched(**{name: "NO" if "SAGEMAKER" in name else "false"})
    train(config)


def test_stage_one_builds_no_graph_before_the_first_skip():
    model = tiny_dit()
    set_trainable(model, {"skips.*": True, "*": False})
    graphs = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, out, i=i: graphs.update({i: out.requires_grad}))
    model(torch.randn(1, 4, 4, 4), torch.tensor([3]), torch.tensor([1]))
    assert graphs == {0: False, 1: False, 2: True, 3: True}


def test_freezing_must_cover_every_parameter():
    with pytest.raises(ValueError, match=r"no freezing rule covers parameter x_embedder\.proj\.weight"):
        set_trainable(tiny_dit(), {"skips.*": True, "blocks.*": False})
    with pytest.raises(ValueError, match=r"match no parameter: slips\.\*"):
        set_trainable(tiny_dit(), {"slips.*": True, "*": False})


def test_broken_images_are_skipped_counted_and_listed(config, capsys):
    config = changed(config, {"train.steps": 12, "train.batch_size": 4})
    train(config)
    listed = (Path(config.out) / "broken_files.txt").read_text()
    assert "class0/03.png" in listed
    assert "class1/04.png" in listed
    assert "files that were skipped: 2" in capsys.readouterr().out
    assert all(math.isfinite(line["loss"]) for line in stats(config))


@pytest.mark.slow
def test_nan_aborts_naming_step_and_batch(config):
    """Story 13: bad steps change nothing; after a few in a row the run stops and the good checkpoint stays."""
    train(config)
    good = state(config)
    known = {"vae_fingerprint": load_config(Config, f"{config.out}/config.yaml").vae_fingerprint}
    config = changed(config, {"train.steps": 20, "train.max_bad_steps": 3} | known)

    def loss(model, batch, draw):
        return model(torch.zeros(4, 4, 4, 4), draw.randint(1000), batch["label"]).flatten(1).mean(1) * math.nan

    model = tiny_dit(num_classes=3)
    with pytest.raises(RuntimeError, match=r"3 steps in a row .* step 6, dataset samples \[\d+, \d+, \d+, \d+\]"):
        fit(model, loss, ImageFolder(config.data.path, 8), config.train, config.out, config)
    for part in ("model", "ema", "opt"):
        assert_equal(state(config)[part], good[part], part)
    assert [line["skipped_steps"] for line in stats(config)[4:]] == [1, 2]
    assert stats(config)[-1]["loss"] is None


def test_full_disk_keeps_the_last_checkpoint(config, monkeypatch):
    config = changed(config, {"train.steps": 2})
    train(config)
    config = changed(config, {"train.steps": 4})

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("skipdit.training.checkpoints.os.fsync", no_space)
    with pytest.raises(RuntimeError, match=r"No space left on device.*last good checkpoint is .*0000002\.pt"):
        train(config)
    assert [p.name for p in (Path(config.out) / "checkpoints").iterdir()] == ["0000002.pt"]


def test_other_settings_in_the_same_folder_are_refused(config):
    train(config)
    config = changed(config, {"train.lr": 5e-3})
    with pytest.raises(ValueError, match=r"other settings(.|\n)*train\.lr: 0\.01 there, 0\.005 now"):
        train(config)


def test_averaged_weights_are_what_the_samplers_load(config):
    train(config)
    model = tiny_dit(num_classes=3)
    assert load_weights(model, config.out) == []
    assert torch.equal(model.skips[0].linear.weight, state(config)["ema"]["skip_linears.0.linear.weight"])


def test_empty_dataset(config, tmp_path):
    (tmp_path / "nothing").mkdir()
    config = changed(config, {"data.path": str(tmp_path / "nothing")})
    with pytest.raises(ValueError, match="nothing is empty of images"):
        train(config)


def test_image_size_that_does_not_divide(config):
    config = changed(config, {"data.image_size": 9})
    with pytest.raises(ValueError, match="image_size 9 is not a multiple of the autoencoder's factor 2"):
        train(config)
    config = changed(config, {"data.image_size": 10})
    with pytest.raises(ValueError, match="patch_size 2 does not divide the latent size 5"):
        train(config)


def test_dry_run_measures_and_writes_nothing(config, capsys):
    train(config, dry_run=True)
    assert "peak memory" in capsys.readouterr().out
    assert not Path(config.out).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="compares with what Windows lacks")
def test_memory_is_measured_without_a_module_that_windows_lacks(monkeypatch):
    usual = peak_memory()
    monkeypatch.setitem(sys.modules, "resource", None)
    assert usual / 10 < peak_memory() <= 1.1 * usual


def test_description_counts(config):
    model = tiny_dit()
    set_trainable(model, {"skips.*": True, "*": False})
    text = describe(model, config.train, 2, 1, 2, 100)
    skips = 2 * (64 * 32 + 32 + 64 + 64)
    assert f"parameters: {skips:,} trained" in text
    assert "batch 4 = 1 x 2 accumulated x 2 processes" in text


def test_rows_cover_the_global_batch():
    rows = [row for rank in range(2) for part in rows_of(12, 3, rank, 2) for row in part]
    assert sorted(rows) == list(range(12))
    with pytest.raises(ValueError, match="batch_size 10 is not a multiple of micro_batch_size 3 x 2 processes"):
        rows_of(10, 3, 0, 2)


def test_draws_do_not_depend_on_the_split():
    def draw(step: int, rows: range) -> Draw:
        return Draw(0, step, rows, 6, torch.device("cpu"))

    whole, parts = draw(7, range(6)), [draw(7, range(i, i + 2)) for i in (0, 2, 4)]
    assert torch.equal(whole.randn(3), torch.cat([part.randn(3) for part in parts]))
    assert torch.equal(whole.randint(1000), torch.cat([part.randint(1000) for part in parts]))
    assert not torch.equal(draw(8, range(6)).randn(3), draw(7, range(6)).randn(3))


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(steps=100, lr=1.0, warmup=10, decay_steps=20)
    assert [learning_rate(config, step) for step in (0, 9, 50, 80, 90, 99)] == pytest.approx([0.1, 1, 1, 1, 0.5, 0.05])
    config = changed(config, {"decay": "cosine", "decay_steps": 90})
    assert [learning_rate(config, step) for step in (0, 10, 55, 100)] == pytest.approx([0.1, 1, 0.5, 0])
    assert learning_rate(config, 30) == pytest.approx((1 + math.cos(math.pi * 20 / 90)) / 2)


class Wandb:
    """Stands in for the package."""

    def __init__(self):
        self.given, self.logged, self.config, self.ended = {}, [], self, False
        self.Image = lambda image: image.shape

    def init(self, **given):
        self.given = given
        return self

    def update(self, settings, **kwargs):
        self.given["settings"] = settings

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, values))

    def finish(self):
        self.ended = True


def test_a_tracker_gets_numbers_samples_and_settings(config, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [LoggerType.WANDB])
    config = changed(config, {"train.tracker": "wandb", "train.sample_every": 4})
    train(config)
    assert wandb.ended and wandb.given["project"] == "skipdit" and wandb.given["name"] == "run"
    assert wandb.given["dir"] == config.out and wandb.given["settings"]["train"]["lr"] == config.train.lr
    assert [step for step, values in wandb.logged if "train/loss" in values] == [1, 2, 3, 4]
    assert [step for step, values in wandb.logged if "samples" in values] == [4]
    board = EventAccumulator(str(Path(config.out) / "tensorboard")).Reload()
    assert [event.step for event in board.Images("samples")] == [4]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("wandb", "train.tracker=wandb needs its package: pip install wandb"),
        ("csv", "train.tracker is 'csv'; known"),
    ],
)
def test_a_tracker_that_is_not_there_is_told(config, monkeypatch, name, complaint):
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    with pytest.raises(ValueError, match=complaint):
        train(changed(config, {"train.tracker": name}))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_the_end_says_what_to_type_next(config, tmp_path, objective):
    """And that is right."""
    config = changed(config, {"train.objective": objective})
    _, told = run_script(config)
    where, command = told.splitlines()[-2:]
    assert where == f"the trained model is in {config.out}/checkpoints/0000004.pt; to sample from it:"
    status, told = forked(f"{command.strip()} num_samples=1 guidance_scale=1 steps=3", tmp_path)
    assert status == 0, told[-2000:]
    assert "1 image in samples/class-to-image, see grid.png" in told
