"""Ctrl-C, SIGTERM, SIGKILL, a second process, a full disk: what was made stays whole, and the same command goes on."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import launched, started
from conftest import ROOT, assert_equal, short_training, state, tiny_dit
from PIL import Image

from skipdit.checkpoints.released import to_released
from skipdit.class_to_image import sample as sampler
from skipdit.class_to_image import train as trainer
from skipdit.cli import friendly_errors
from skipdit.config import changed, to_yaml
from skipdit.data.settings import ImageData
from skipdit.sampling.job import Job
from skipdit.utils.files import replace_text, whole_file
from skipdit.utils.lock import hold

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
TRAIN = f"python {ROOT}/class-to-image/train.py --config run.yaml"


@pytest.fixture
def config(tmp_path, vae_folder, image_folder):
    """A training of many steps."""
    model = sampler.ModelConfig(patch_size=2, hidden_size=32, depth=4, num_heads=2, num_classes=3, skip=True)
    training = short_training()
    training = changed(training, {"steps": 400, "save_every": 100, "log_every": 100})
    data = ImageData(path=str(image_folder), image_size=8)
    return trainer.Config(out=str(tmp_path / "run"), vae=str(vae_folder), model=model, data=data, train=training)


def wait_for(happened, process, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.is_alive(), "the command has ended"
        assert time.monotonic() < deadline, "the command hangs"
        time.sleep(0.005)


def ended(process, told: Path, seconds: float = 60) -> tuple[int, str]:
    process.join(seconds)
    alive = process.is_alive()
    process.kill()
    assert not alive, f"does not end: {told.read_text()[-2000:]}"
    return process.exitcode, told.read_text()


def text_of(told: Path) -> str:
    return told.read_text() if told.exists() else ""


def steps_done(told: Path) -> int:
    """By the progress bar."""
    return max(map(int, re.findall(r"(\d+)/\d+ \[", text_of(told))), default=0)


# Training


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "workers"), [(signal.SIGINT, 0), (signal.SIGINT, 2), (signal.SIGTERM, 2)])
def test_a_training_that_is_stopped_goes_on_bit_equal(config, tmp_path, signum, workers):
    """The signal goes to its data loading processes, too, as from a terminal or a batch system."""
    file, told = tmp_path / "run.yaml", tmp_path / "told.txt"
    config = changed(config, {"train.workers": workers, "train.steps": 80})
    file.write_text(to_yaml(config))
    process = started(TRAIN, tmp_path)
    wait_for(lambda: steps_done(told) > 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
    code, said = ended(process, told)
    assert code == CODES[signum] and "Traceback" not in said
    done, folder = re.search(r"stopped after step (\d+), saved in (\S+): the same command goes on", said).groups()
    assert 3 < int(done) < 80 and Path(folder) == Path(config.out, "checkpoints")
    assert [path.name for path in Path(folder).iterdir()] == [f"{int(done):07d}.pt"]
    trainer.train(config)
    stopped, config = state(config), changed(config, {"out": str(tmp_path / "whole")})
    trainer.train(config)
    assert_equal(stopped | {"args": None}, state(config) | {"args": None})


@pytest.mark.slow
def test_processes_stop_after_the_same_step(config, tmp_path):
    """Only one of them is asked. On going on, all is as if nothing had been."""
    config = changed(config, {"train.steps": 60})
    (tmp_path / "run.yaml").write_text(to_yaml(config))

    def launch(out: str) -> list:
        return launched(f"{TRAIN} out={out}", tmp_path, 2, told=out)

    main, other = launch("stopped")
    wait_for(lambda: steps_done(tmp_path / "stopped0.txt") > 3, main)
    os.kill(other.pid, signal.SIGTERM)
    said = [ended(process, tmp_path / f"stopped{n}.txt") for n, process in enumerate((main, other))]
    assert [code for code, _ in said] == [143, 143]
    assert re.search(r"stopped after step (\d+), saved", said[0][1]) and "stopped after" not in said[1][1]
    for out in ("stopped", "whole"):
        for n, process in enumerate(launch(out)):
            assert ended(process, tmp_path / f"{out}{n}.txt")[0] == 0
    resumed, whole = (Path(tmp_path, out, "checkpoints/0000060.pt") for out in ("stopped", "whole"))
    resumed, whole = (torch.load(path, weights_only=True) | {"args": None} for path in (resumed, whole))
    assert_equal(resumed, whole)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(config, tmp_path):
    """The step takes a minute."""
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
from skipdit.cli import friendly_errors
from skipdit.training.loop import fit
from skipdit.training.settings import TrainConfig
from conftest import tiny_dit

def loss(model, batch, draw):
    print("began", flush=True)
    for _ in range(600):
        time.sleep(0.1)

config = TrainConfig(steps=9, batch_size=2, precision="fp32", workers=0)
with friendly_errors():
    fit(tiny_dit(), loss, [{{"label": 0}}] * 4, config, "out", config)
"""
    (tmp_path / "slow.py").write_text(script)
    process = started("python slow.py", tmp_path)
    wait_for(lambda: "began" in text_of(tmp_path / "told.txt"), process)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)  # some launchers send two
    time.sleep(0.4)
    assert process.is_alive() and "once more ends at once" in (tmp_path / "told.txt").read_text()
    os.kill(process.pid, signal.SIGINT)
    assert ended(process, tmp_path / "told.txt", 5)[0] == 130
    assert not list(tmp_path.glob("out/checkpoints/*"))


@pytest.mark.slow
def test_two_trainings_in_one_folder(config, tmp_path, monkeypatch):
    """The second refuses and names the first; after SIGKILL the next one need not wait, though data is being loaded."""
    config = changed(config, {"train.workers": 1})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    first = started(TRAIN, tmp_path)
    wait_for(lambda: steps_done(tmp_path / "told.txt") > 1, first)
    config = changed(config, {"train.workers": 0})
    with pytest.raises(ValueError, match=rf"process {first.pid} on {socket.gethostname()} is training in .*run: wait"):
        trainer.train(config)
    assert first.is_alive()
    first.kill()
    first.join()
    config = changed(config, {"train.steps": 2})
    trainer.train(config)
    with hold(Path(config.out)):  # a run that has ended holds nothing
        pass


def test_a_dry_run_needs_no_folder_of_its_own(config, tmp_path):
    with hold(tmp_path):
        config = changed(config, {"out": str(tmp_path)})
        trainer.train(config, dry_run=True)


@pytest.mark.skipif(sys.platform == "win32", reason="stands in for the locks of POSIX")
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    import fcntl

    def none(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\): start no second training"):  # noqa: SIM117
        with hold(tmp_path):
            pass


def test_what_a_killed_process_left_half_written_goes(config):
    config = changed(config, {"train.steps": 2})
    folder = Path(config.out, "checkpoints")
    folder.mkdir(parents=True)
    (folder / "0000001.pt.partial").write_bytes(b"half")
    trainer.train(config)
    assert [path.name for path in folder.iterdir()] == ["0000002.pt"]


# Other commands


@pytest.fixture
def sampling(tmp_path, vae_folder):
    torch.save({"ema": to_released(tiny_dit().state_dict())}, tmp_path / "tiny.pt")
    model = sampler.ModelConfig(patch_size=2, hidden_size=32, depth=4, num_heads=2, num_classes=10, skip=True)
    places = {"weights": str(tmp_path / "tiny.pt"), "vae": str(vae_folder), "out": str(tmp_path / "out")}
    sizes = {"image_size": 8, "num_samples": 4000, "batch_size": 4, "steps": 6}
    config = sampler.Config(**places, **sizes, sampler="ddim", model=model)
    folder = tmp_path / "class-to-image"  # which says the task
    folder.mkdir()
    (folder / "run.yaml").write_text(to_yaml(config))
    return config


SAMPLE = f"python {ROOT}/class-to-image/sample.py --config class-to-image/run.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("signum", CODES)
def test_a_sampler_that_is_stopped_leaves_whole_files(sampling, tmp_path, signum):
    folder = Path(sampling.out)
    process = started(SAMPLE, tmp_path)
    wait_for(lambda: len(list(folder.glob("0*.png"))) > 20, process)
    os.kill(process.pid, signum)
    code, said = ended(process, tmp_path / "told.txt")
    assert code == CODES[signum] and "Traceback" not in said
    made = sorted(folder.glob("0*.png"))
    assert f"stopped; {len(made)} of 4000 images are in {folder}: the same command makes the others" in said
    for path in made:
        Image.open(path).load()
    assert {path.name for path in folder.iterdir()} - {path.name for path in made} == {"job.json"}
    sampling = changed(sampling, {"num_samples": len(made) // 4 * 4 + 4})
    before = {path.name: path.read_bytes() for path in made}
    sampler.sample(sampling)
    assert before.items() <= {path.name: path.read_bytes() for path in folder.glob("0*.png")}.items()


COMMANDS = {  # command -> what to wait for
    "python -m skipdit compare --config class-to-image/run.yaml num_samples=400": r"\b1/4 \[",
    "python -m skipdit plan --config class-to-image/run.yaml --budget 3 num_samples=2000": r"\d+/\d+ \[",
    "python -m skipdit analyze jacobian --config class-to-image/run.yaml num_samples=2000 --out kept": r"\d+/\d+ \[",
    "python -m skipdit evaluate fidelity a --reference b --out kept": r"\d+/\d+ \[",
    "python -m skipdit encode --data image_folder --path images --image-size 8 --shard 8 --vae vae --out kept "
    "--workers 2": r"\b[1-9]/\d+ \[",
    "python -m skipdit data check data.yaml --workers 2": r"[1-9]\d*/\d+ \[",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_is_stopped_keeps_what_it_has(sampling, tmp_path, vae_folder, command):
    many_pictures(tmp_path, vae_folder)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "before.json").write_text("{}")
    (tmp_path / "plan.json").write_text("mine")
    process, told = started(command, tmp_path), tmp_path / "told.txt"
    wait_for(lambda: re.search(COMMANDS[command], text_of(told)), process)
    signum = list(CODES)[len(command) % 2]
    os.kill(process.pid, signum)
    code, said = ended(process, told)
    assert code == CODES[signum] and "Traceback" not in said and "same command" in said.splitlines()[-1]
    assert (tmp_path / "plan.json").read_text() == "mine" and (kept / "before.json").exists()
    assert not list(tmp_path.rglob("*partial*"))


def many_pictures(folder: Path, vae_folder: Path) -> None:
    """Two folders of pictures and one with classes, of which each file is linked many times."""
    Image.effect_noise((256, 256), 50).convert("RGB").save(folder / "one.png")
    for name in ("a", "b", "images/c"):
        (folder / name).mkdir(parents=True)
        for number in range(3000):
            os.link(folder / "one.png", folder / name / f"{number:06d}.png")
    (folder / "vae").symlink_to(vae_folder)
    (folder / "data.yaml").write_text(f"data: {{kind: image_folder, path: {folder}/images, image_size: 8}}")


def test_commands_of_files_end_with_the_code_of_the_signal():
    for signum, code in CODES.items():
        with pytest.raises(SystemExit) as caught, friendly_errors():
            os.kill(os.getpid(), signum)
            time.sleep(5)
        assert caught.value.code == code
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_a_signal_meets_half_made_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    class Bar:
        def __init__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

        def __del__(self):
            print(self.position)

    with pytest.raises(SystemExit) as caught, friendly_errors():
        Bar()
    assert caught.value.code == 130 and "Exception ignored" not in capsys.readouterr().err


def test_a_signal_that_meets_a_destructor_is_not_lost(monkeypatch):
    """Python drops what is raised there. The end of a data loader's processes is waited for in one."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    class Loader:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with pytest.raises(SystemExit) as caught, friendly_errors():
        loader = Loader()
        del loader
        time.sleep(5)
        pytest.fail("the signal is lost")
    assert caught.value.code == 130


# Disks


@pytest.fixture
def disk(tmp_path):
    """`disk(kilobytes)` gives the folder of a file system of its own."""
    mounted = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def error_of(capsys, call) -> str:
    """What a command says that ends with an error: one line."""
    with pytest.raises(SystemExit) as caught, friendly_errors():
        call()
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint(config, disk, capsys):
    """The disk has room for one checkpoint and a half."""
    config = changed(config, {"out": str(disk(3072) / "run"), "train.steps": 40, "train.save_every": 10})
    line = error_of(capsys, lambda: trainer.train(config))
    folder = Path(config.out, "checkpoints")
    (last,) = folder.iterdir()
    assert re.search(r"could not write \S+\.pt: No space left on device; free some space, and run", line)
    assert line.endswith(f"the last good checkpoint is {last}")
    config = changed(config, {"train.steps": int(last.stem) + 1, "train.keep": 1})
    (Path(config.out) / "ballast").unlink(missing_ok=True)
    before = torch.load(last, weights_only=True)
    assert before["step"] == int(last.stem)


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 8, 200])
def test_a_training_that_cannot_even_begin_says_so(config, disk, capsys, room):
    config = changed(config, {"out": str(disk(room + 4) / "run")})
    (Path(config.out).parent / "ballast").write_bytes(bytes(1024 * 4))
    line = error_of(capsys, lambda: trainer.train(config))
    assert re.search(r"error: could not write \S*run\S*: No space left on device; free some space", line)
    assert not list(Path(config.out).rglob("*partial*"))


@pytest.mark.slow
def test_a_disk_that_cannot_be_written(config, sampling, disk, capsys):
    folder = disk(4096)
    config = changed(config, {"out": str(folder / "run"), "train.steps": 2})
    trainer.train(config)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    config = changed(config, {"train.steps": 4})
    for out in (folder / "run", folder / "new"):
        complaint = rf"could not write {out}(?!\S*partial)\S*: Read-only file system; name a folder that may be written"
        for run, settings in ((trainer.train, config), (sampler.sample, sampling)):
            assert re.search(complaint, error_of(capsys, partial(run, changed(settings, {"out": str(out)}))))
    assert [path.name for path in (folder / "run/checkpoints").iterdir()] == ["0000002.pt"]


def test_a_sampler_on_a_full_disk(sampling, disk, capsys):
    """Every picture that is there is whole."""
    folder = disk(64)
    sampling = changed(sampling, {"out": str(folder / "out"), "num_samples": 40})
    line = error_of(capsys, lambda: sampler.sample(sampling))
    assert re.search(r"could not write \S+\.png: No space left on device; free some space", line)
    made = list((folder / "out").glob("*.png"))
    assert made and not list(folder.rglob("*partial*"))
    for path in made:
        Image.open(path).load()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["mp4", "gif", "png"])
def test_writers_that_keep_a_full_disk_to_themselves(disk, suffix):
    """ffmpeg and libpng end well with half a file."""
    from skipdit.utils.files import write_png
    from skipdit.utils.video import write_gif, write_mp4

    clip = torch.randint(0, 256, (8, 3, 128, 128), dtype=torch.uint8)
    write = {
        "mp4": lambda path: write_mp4(path, clip, 8),
        "gif": lambda path: write_gif(path, clip, 8),
        "png": lambda path: write_png(clip[0], path),
    }[suffix]
    job = Job(disk(40), {}, 3, suffix)
    with pytest.raises(OSError, match=rf"could not write \S+000000\.{suffix}: .*No space left on device; free"):
        job.save(0, write)
    assert [path.name for path in job.folder.iterdir()] == ["job.json"]


def test_whole_files_replace_and_clean_up(tmp_path):
    path = tmp_path / "a.json"
    replace_text(path, "one\udce9")
    assert path.read_text(encoding="utf-8") == "one\\udce9"
    for error in (ValueError, KeyboardInterrupt, OSError(28, "No space left on device")):
        with contextlib.suppress(Exception, KeyboardInterrupt), whole_file(path) as partial:
            partial.write_text("two")
            raise error
        assert json.dumps([file.name for file in tmp_path.iterdir()]) == '["a.json"]'
        assert path.read_text(encoding="utf-8") == "one\\udce9"
    with whole_file(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "b").write_text("b")
    assert (tmp_path / "folder/b").exists()
