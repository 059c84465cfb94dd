"""gpu.json: the machine, and every result as soon as it is there."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "diffusers", "accelerate", "timm", "transformers", "omegaconf")
SAME = ("device", "card", "torch", "cuda", "tiny")  # results of machines that differ in these do not share a file
QUERY = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")  # read, never set


class Record:
    """The results of one machine, kept in `gpu.json` of a folder.

    Args:
        folder: created if absent. The results of another machine that lie there move aside.
        machine: what `describe_machine` returns.

    Attributes:
        data: `machine`; `rows`, by name; `runs`, one entry per call of the program, with what it left out.
        run: the entry of this call.
    """

    def __init__(self, folder: Path, machine: dict[str, Any]):
        self.path = folder / "gpu.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.data = _load(self.path)
        before = self.data.get("machine", {})
        if before and any(before.get(key) != machine.get(key) for key in SAME):
            aside = self.path.with_name(f"gpu-{time.strftime('%Y%m%d-%H%M%S')}.json")
            self.path.replace(aside)
            print(f"the results of {before.get('card')} with torch {before.get('torch')} are in {aside} now")
            self.data = {}
        self.data = {"machine": machine, "rows": self.data.get("rows", {}), "runs": self.data.get("runs", [])}
        self.run: dict[str, Any] = {}

    def begin(self, run: dict[str, Any]) -> None:
        """Start the entry of this call, or go on with the one of the same `id`."""
        known = [entry for entry in self.data["runs"] if entry["id"] == run["id"]]
        self.run = known[0] if known else run
        if not known:
            self.data["runs"].append(run)
        self.save()

    def put(self, key: str, **entry: Any) -> None:
        """Keep the result of a row. It takes the place of an earlier one."""
        self.data["rows"][key] = {**entry, "run": self.run["id"]}
        self.save()

    def good(self) -> set[str]:
        """Names of the rows that succeeded."""
        return {key for key, row in self.data["rows"].items() if row["status"] == "ok"}

    def save(self) -> None:
        """Write the file, whole at any moment."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def _load(path: Path) -> dict[str, Any]:
    """The results of earlier calls; a file that cannot be read moves aside."""
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return data if isinstance(data, dict) and "rows" in data else {}
    except ValueError:
        path.replace(path.with_suffix(".damaged"))
        return {}


def describe_machine(device: torch.device, tiny: bool) -> dict[str, Any]:
    """What results depend on: card, driver, versions, and the code. A part that cannot be told is None."""
    versions = {name: _version(name) for name in PACKAGES}
    machine = {
        "device": device.type,
        "tiny": tiny,
        "card": _card(device),
        "date": time.strftime("%Y-%m-%d"),
        **versions,
        "skipdit": _skipdit(),
        "code": _commit(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
            **_query_card(),
        }
    return machine


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    if name == "torch":
        return torch.__version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _skipdit() -> str | None:
    """Version of the package under test, and whether it is this checkout's code."""
    try:
        import skipdit
    except ImportError:
        return None
    here, there = ROOT / "src/skipdit", Path(skipdit.__file__).parent
    same = all(
        (there / file.relative_to(here)).is_file()
        and (there / file.relative_to(here)).read_bytes() == file.read_bytes()
        for file in here.rglob("*.py")
    )
    return skipdit.__version__ + ("" if same else ", other code than this checkout's")


def _commit() -> str | None:
    """The checkout's commit, with a plus behind it if files differ from it."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changed else "")


def _query_card() -> dict[str, str | None]:
    """Driver, power limit and highest clocks, as the card has them."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    answer = _output("nvidia-smi", f"--id={index}", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader")
    values = [part.strip() for part in answer.split(",")] if answer else []
    if len(values) == len(QUERY):
        return dict(zip(QUERY, values, strict=True))
    file = Path("/proc/driver/nvidia/version")
    return {"driver_version": file.read_text("utf-8").splitlines()[0] if file.exists() else None}


def _output(*command: str) -> str | None:
    """What a command prints; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def shorten(text: str) -> str:
    """An error's text without the folders of this machine."""
    for folder in (str(ROOT), sys.prefix, sys.base_prefix, str(Path.home())):
        text = text.replace(f"{folder}/", "")
    return text
