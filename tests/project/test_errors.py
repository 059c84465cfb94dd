"""What a command ends with: one line for what its user can mend, a traceback for a defect of the program."""

import pytest
from conftest import ROOT, skipdit_command
from torch.utils.data import DataLoader, Dataset

from skipdit import __version__
from skipdit.__main__ import COMMANDS, main
from skipdit.checkpoints.errors import WeightsError
from skipdit.cli import friendly_errors
from skipdit.config import ConfigError
from skipdit.utils.errors import UserError

DEMO = str(ROOT / "configs/class-to-image/demo.yaml")
FASHION = str(ROOT / "configs/class-to-image/fashion_plain.yaml")


def ending_with(error: Exception) -> None:
    """A command that fails with `error`."""
    with friendly_errors():
        raise error


@pytest.mark.parametrize(
    "error",
    [UserError, ConfigError, WeightsError, FileNotFoundError, PermissionError, ConnectionError, FloatingPointError],
)
def test_an_error_of_the_user_is_one_line(error, capsys):
    with pytest.raises(SystemExit) as caught:
        ending_with(error("seed is -1"))
    assert caught.value.code == 2 and capsys.readouterr().err == "error: seed is -1\n"


class Refusing(Dataset):
    """A dataset that a user has to mend."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict:
        raise UserError("none of 2 samples can be read:\n  a.png\n  b.png")


def test_an_error_of_the_user_in_a_reading_process_is_the_same(capsys):
    with pytest.raises(SystemExit), friendly_errors():
        next(iter(DataLoader(Refusing(), num_workers=1)))
    assert capsys.readouterr().err == "error: none of 2 samples can be read:\n  a.png\n  b.png\n"


@pytest.mark.parametrize("error", [ValueError, ZeroDivisionError, TypeError, KeyError, RuntimeError])
def test_a_defect_keeps_its_traceback(error, capsys):
    with pytest.raises(error, match="defect"):
        ending_with(error("a defect"))
    assert not capsys.readouterr().err


def test_users_of_the_library_can_catch_value_errors():
    assert issubclass(UserError, ValueError) and issubclass(ConfigError, UserError)
    assert issubclass(WeightsError, UserError)


def test_a_variable_shows_every_traceback(monkeypatch, capsys):
    monkeypatch.setenv("SKIPDIT_TRACEBACK", "1")
    with pytest.raises(SystemExit) as caught:
        ending_with(UserError("seed is -1"))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "in ending_with" in error and error.endswith("UserError: seed is -1\n")


def test_the_variable_off_shows_a_line(monkeypatch, capsys):
    monkeypatch.setenv("SKIPDIT_TRACEBACK", "0")
    with pytest.raises(SystemExit):
        ending_with(UserError("seed is -1"))
    assert capsys.readouterr().err == "error: seed is -1\n"


@pytest.mark.slow
def test_a_command_tells_defects_from_its_users_errors(monkeypatch, capsys, tmp_path):
    sample = skipdit_command("sample")
    with pytest.raises(SystemExit):
        sample(["--config", DEMO, f"out={tmp_path}", "cache=N0-1-2"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cache interval is 0")

    def broken(*_, **__):
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr("skipdit.class_to_image.sample.run_job", broken)
    with pytest.raises(ValueError, match="unpack"):
        sample(["--config", DEMO, f"out={tmp_path}"])


@pytest.mark.parametrize("override", ["seed=-1", "steps=0", "image_size=30", "model.num_heads=0", "model.patch_size=0"])
def test_settings_that_no_model_can_have_are_one_line(override, capsys, tmp_path):
    with pytest.raises(SystemExit):
        skipdit_command("sample")(["--config", DEMO, f"out={tmp_path / 'out'}", override])
    *told, line = capsys.readouterr().err.splitlines()
    assert len(told) <= 1  # that libraries load
    assert line.startswith("error: ") and override.split("=")[0].split(".")[-1] in line.replace(" ", "_")


def complaint_of(capsys, *argv: str) -> str:
    """The last line of a command that fails before it loads anything."""
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["smaple"], "error: no command 'smaple'; did you mean 'sample'?"),
        (["sample"], "say what to run, for example --config configs/class-to-image/demo.yaml"),
        (["sample", "--config", DEMO, "--steps", "4"], "error: unrecognized arguments: --steps; write steps=VALUE"),
        (["sample", "--config", DEMO, "--cash", "N2"], "error: unrecognized arguments: --cash; did you mean --cache?"),
        (["sample", "--config", DEMO, "--nothing"], "unrecognized arguments: --nothing; --help lists what there is"),
        (["sample", "--config", DEMO, "steps"], "override 'steps' has no '='; write key=value, such as steps=VALUE"),
        (
            ["sample", "--config", "dmeo.yaml"],
            "no config file dmeo.yaml; did you mean configs/class-to-image/demo.yaml",
        ),
        (["sample", "--config", "configs/imagenet256_sampel.yaml"], "configs/class-to-image/imagenet256_sample.yaml?"),
        (["download", "class-to-imag"], "error: no task 'class-to-imag'; did you mean 'class-to-image'?"),
        (
            ["download", "nonsense"],
            "error: no task 'nonsense'; known: class-to-image, class-to-video, text-to-video, text-to-image",
        ),
        (["download"], "error: the following arguments are required: task; --help tells more"),
        (["evaluate", "fvdd", "samples"], "error: no METRIC 'fvdd'; did you mean 'fvd'?"),
        (
            ["evaluate", "clip", "samples", "--model", "clip", "--batchsize", "3"],
            "error: unrecognized arguments: --batchsize 3; did you mean --batch-size?",
        ),
        (
            ["evaluate", "fvd", "samples", "--reference", "clips"],
            "error: the following arguments are required: --i3d; --help tells more",
        ),
        (["weights", "verfy", "a.pt"], "error: no command 'verfy'; did you mean 'verify'?"),
        (["weights", "verify"], "error: the following arguments are required: IN; --help tells more"),
        (["analyze"], "error: the following arguments are required: analysis; --help tells more"),
        (["analyze", "jacobean"], "error: no analysis 'jacobean'; did you mean 'jacobian'?"),
        (
            ["plan", "--config", DEMO, "--speedup", "2", "--target", "convergd"],
            "error: no --target 'convergd'; did you mean 'converged'?",
        ),
        (["plan", "--config", DEMO, "--speedup", "2", "--branch=-1"], "argument --branch: -1 is no number from 0 on"),
        (["compare", "--config", DEMO, "--repeats", "0"], "error: argument --repeats: 0 is no number from 1 on"),
        (["plan", "--config", DEMO, "--speedup", "two"], "error: argument --speedup: invalid float value: 'two'"),
        (["sample", "--task", "class"], "error: no --task 'class'; known: class-to-image, class-to-video"),
        (["encode", "--data", "videos", "--shard", "0"], "error: argument --shard: 0 is no number from 1 on"),
        (["train", "new"], "error: the following arguments are required: --data; --help tells more"),
        (["train", "--config", DEMO], "demo.yaml has the settings of sampling: skipdit sample --config FILE"),
        (["sample", "--config", FASHION], "plain.yaml has the settings of training: skipdit train --config FILE"),
    ],
)
def test_a_mistake_is_answered_with_what_to_type(argv, complaint, capsys):
    assert complaint in complaint_of(capsys, *argv)


@pytest.mark.parametrize("argv", [[name, "--nonsense"] for name in COMMANDS] + [["nonsense"]], ids=" ".join)
def test_a_mistake_ends_every_command_with_one_line_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith("error: ")


def test_tabs_in_a_config_are_named(tmp_path, capsys):
    (tmp_path / "tabs.yaml").write_text("model:\n\tname: DiT-S\n")
    told = complaint_of(capsys, "sample", "--task", "class-to-image", "--config", str(tmp_path / "tabs.yaml"))
    assert "tabs.yaml, line 2: not valid YAML" in told and told.endswith("indent with spaces, not with tabs")


def test_the_version_is_told(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"skipdit {__version__}\n"
