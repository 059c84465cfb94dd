"""Commands in copies of one process that has imported the libraries: what takes seconds happens once."""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import shlex
import socket
import sys
import time
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


def launched(command: str, folder: Path, processes: int, told: str = "told") -> list[multiprocessing.Process]:
    """The processes that `torchrun` would start; what the first one says lies in `told0.txt`, and so on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    count = str(processes)
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [str(rank) for rank in range(processes)]
    return [started(command, folder, f"{told}{n}.txt", RANK=n, LOCAL_RANK=n, **shared) for n in ranks]


def forked(command: str, folder: Path, processes: int = 1) -> tuple[int, str]:
    """Exit status and output of a command. Of several processes, those of the first one that fails."""
    if processes == 1:
        running, told = [started(command, folder)], [folder / "told.txt"]
    else:
        running = launched(command, folder, processes)
        told = [folder / f"told{n}.txt" for n in range(processes)]
    end = time.monotonic() + 300
    while any(process.exitcode is None for process in running) and time.monotonic() < end:
        if any(process.exitcode for process in running):  # the others wait for it
            break
        multiprocessing.connection.wait([process.sentinel for process in running if process.exitcode is None], 1)
    failed = next((n for n, process in enumerate(running) if process.exitcode), 0)
    for process in running:
        process.kill()
        process.join()
    return running[failed].exitcode, told[failed].read_text()


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
