"""What is installed, what this machine has, and what is missing for which task: `skipdit doctor`."""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple

import skipdit
from skipdit.checkpoints.catalogue import FOLDERS, TASKS, Item
from skipdit.utils.shipped import PROJECT, found, locate

if TYPE_CHECKING:  # what this reports as missing is imported where it is needed
    from packaging.requirements import Requirement

SECONDS = 5  # to wait for the Hub, and for a driver's tool
EXTRAS = {
    "app": "the page of skipdit app",
    "lora": "adapters of text-to-image",
    "metrics": "LPIPS",
    "minilm": "demos of text-to-video and text-to-image",
}
OK, MISSING, NOTE = "ok", "MISSING", "note"


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        status: OK, NOTE for what a command may come to want, or MISSING for what all of them need.
        fix: what to do; empty if nothing is wrong.
    """

    status: str
    text: str
    fix: str = ""


Check = Callable[[], Iterator[Finding]]


def versions() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    place = PROJECT or Path(skipdit.__file__).parent
    yield Finding(OK, f"skipdit {skipdit.__version__} in {place}; Python {platform.python_version()}")
    for text in metadata.requires("skipdit") or []:
        requirement = Requirement(text)
        extra = next((name for name in EXTRAS if requirement.marker and f'"{name}"' in str(requirement.marker)), None)
        if requirement.marker and extra is None:
            continue
        yield _package(requirement, extra)


def _package(requirement: "Requirement", extra: str | None) -> Finding:
    use = f", for {EXTRAS[extra]}" if extra else ""
    fix = f'pip install "{requirement.name}{requirement.specifier}"'
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(NOTE if extra else MISSING, f"{requirement.name} is not installed{use}", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(NOTE, f"{requirement.name} {version} is not {requirement.specifier}{use}", fix)
    return Finding(OK, f"{requirement.name} {version}{use}")


def devices() -> Iterator[Finding]:
    import torch

    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"
    yield Finding(OK, f"CPU: {platform.processor() or platform.machine()}, {threads}; float32, bfloat16")
    for index in range(torch.cuda.device_count()):
        card, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        precisions = "float32, float16" + ", bfloat16" * torch.cuda.is_bf16_supported() + ", TF32" * (card.major >= 8)
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield Finding(OK, f"cuda:{index}: {card.name}, {memory}, capability {card.major}.{card.minor}; {precisions}")
    if torch.backends.mps.is_available():
        yield Finding(OK, "mps: an Apple GPU; float32, float16")
    if not torch.cuda.is_available() and (driver := _driver()):
        why = "torch is built without CUDA" if torch.version.cuda is None else f"torch is for CUDA {torch.version.cuda}"
        yield Finding(
            NOTE, f"{driver} is here and torch cannot use it: {why}", "install the torch of pytorch.org's selector"
        )


def _driver() -> str:
    """The first NVIDIA card that the driver's own tool names, if there is one."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    return told.stdout.partition("\n")[0].strip() if told.returncode == 0 else ""


def videos() -> Iterator[Finding]:
    import av

    for codec in ("h264", "hevc", "vp9", "av1"):
        try:
            av.Codec(codec, "r")
            yield Finding(OK, f"reads {codec} (PyAV {av.__version__})")
        except ValueError:  # av's UnknownCodecError is one
            yield Finding(NOTE, f"cannot read {codec} videos", "pip install --force-reinstall av")
    import imageio_ffmpeg

    yield Finding(OK, f"writes mp4 with {imageio_ffmpeg.get_ffmpeg_exe()}")


def disk() -> Iterator[Finding]:
    places = {"this folder": (Path.cwd(), "--dir FOLDER downloads elsewhere")}
    places["the Hub's cache"] = (_hub_cache(), "HF_HOME=FOLDER moves the cache")
    for name, (folder, remedy) in places.items():
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free / 1e9
        small = free < 50
        fix = f"the released models of a task take 3 to 30 GB; {remedy}" * small
        yield Finding(NOTE if small else OK, f"{name}, {folder}: {free:.0f} GB free", fix)
        if not os.access(there, os.W_OK):
            yield Finding(NOTE, f"{there} cannot be written", "run the commands elsewhere, or with out=FOLDER")


def _hub_cache() -> Path:
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"


def hub() -> Iterator[Finding]:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding(NOTE, "HF_HUB_OFFLINE is set: nothing is downloaded", "unset HF_HUB_OFFLINE")
        return
    from huggingface_hub.constants import ENDPOINT

    if _within(SECONDS, lambda: _status(ENDPOINT)):
        yield Finding(OK, f"{ENDPOINT} answers")
    else:
        fix = "check the connection and proxies; or copy the files here, see skipdit download TASK --dry-run"
        yield Finding(NOTE, f"{ENDPOINT} does not answer: nothing can be downloaded", fix)


def _within(seconds: float, ask: Callable[[], object]) -> object:
    """What a function returns in this time, None if it takes longer or fails: a resolver heeds no timeout."""
    answers: list[object] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception:
            answers.append(None)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def _status(place: str) -> int:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(place, method="HEAD"), timeout=SECONDS) as response:
            return response.status
    except HTTPError as error:  # it has answered
        return error.code


def models() -> Iterator[Finding]:
    for task, items in TASKS.items():
        embedded = locate(f"{task}/weights")
        fix = "install skipdit again: its wheel holds them"
        yield Finding(OK, f"{task}: embedded model") if embedded else Finding(NOTE, f"{task}: no embedded model", fix)
        absent = [name for name, item in items.items() if not item.optional and not _is_here(task, item)]
        if absent:
            command = f"skipdit download {task} --only {' '.join(absent)}"
            yield Finding(NOTE, f"{task}: of the released model {', '.join(absent)} not in {FOLDERS[task]}", command)
        else:
            yield Finding(OK, f"{task}: released model in {found(FOLDERS[task])}")


def _is_here(task: str, item: Item) -> bool:
    """Whether all files of an item are there, of patterns one each."""
    folder = Path(found(FOLDERS[task]), item.folder)
    return all(any(list(folder.glob(name)) for name in files.split("|")) for files in item.files)


CHECKS: dict[str, Check] = {
    "Packages": versions,
    "Devices and precisions": devices,
    "Videos": videos,
    "Disk": disk,
    "Hub": hub,
    "Models": models,
}


def examine(check: Check) -> list[Finding]:
    """Return the findings of a check. What it fails by is a finding, too."""
    findings = []
    try:
        findings.extend(check())
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        findings.append(Finding(NOTE, f"could not be checked: {type(error).__name__}: {reason}", "see the lines above"))
    return findings


def main(args: argparse.Namespace) -> None:
    missing = 0
    for title, check in CHECKS.items():
        print(f"\n{title}")
        for status, text, fix in examine(check):
            missing += status == MISSING
            print(f"  {status:8}{text}" + (f"\n          fix: {fix}" if fix else ""), flush=True)
    if missing:
        print(f"\n{missing} packages are missing that every task needs", file=sys.stderr)
        raise SystemExit(1)
    print("\nNothing is missing that every task needs; to see a model at work: skipdit demo")
