"""Commands in copies of one process that has imported the libraries: what takes seconds happens once."""

import multiprocessing
import os
import runpy
import shlex
import sys
from pathlib import Path

PRELOADED = [
    "skipdit.training.loop",
    "skipdit.planning.command",
    "skipdit.evaluation.command",
    "skipdit.data.encode",
    "skipdit.analysis.command",
]
PRELOADED += [
    "skipdit.class_to_image.train",
    "skipdit.class_to_video.train",
    "skipdit.text_to_video.train",
    "skipdit.text_to_image.train",
]


def started(command: str, folder: Path, told: str = "told.txt", **env: str) -> multiprocessing.Process:
    """A command that runs in a folder; what it says lies in the file `told` there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # of the first call
    command = command.replace("skipdit ", "python -m skipdit ", 1) if command.startswith("skipdit ") else command
    process = context.Process(target=become, args=(shlex.split(command), folder, folder / told, env))
    process.start()
    return process


def forked(command: str, folder: Path) -> tuple[int, str]:
    """Exit status and output of a command."""
    process = started(command, folder)
    process.join(timeout=300)
    process.kill()
    return process.exitcode, (folder / "told.txt").read_text()


def become(command: list[str], folder: Path, told: Path, env: dict[str, str]) -> None:
    """What `python ...` does, in this process."""
    multiprocessing.set_start_method(None, force=True)  # as it is where nobody has chosen one
    os.chdir(folder)
    os.environ.update(env)
    with told.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if command[1] == "-m":
        sys.path[0], sys.argv = str(folder), command[2:]
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str((folder / command[1]).resolve().parent), command[1:]
        runpy.run_path(command[1], run_name="__main__")
