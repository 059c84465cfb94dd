"""What a training run writes beside its checkpoints: numbers, and the names of files that it could not read."""

import json
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from skipdit.utils.errors import UserError
from skipdit.utils.files import naming, replace_text

TRACKERS = {"wandb": "dir", "trackio": None}  # and the argument that is their folder


class Log:
    """stats.jsonl, judge.jsonl and tensorboard of a run, and a tracker. A resumed run drops the steps after `start`: it
    will write them again.

    Args:
        accelerator: of the main process; ends the tracker.
        tracker: one of `TRACKERS`, or None. Its project is "skipdit", its run is called as the folder.
        settings: of the run, for the tracker.

    Raises ValueError for a tracker that is unknown or not installed.
    """

    def __init__(self, out: Path, start: int, accelerator: Accelerator, tracker: str | None, settings: dict):
        self.path, self.judge_path, self._accelerator = out / "stats.jsonl", out / "judge.jsonl", accelerator
        if tracker:
            if tracker not in TRACKERS:
                raise UserError(f"train.tracker is {tracker!r}; known: {', '.join(TRACKERS)}")
            accelerator.log_with = filter_trackers([tracker])
            if not accelerator.log_with:
                raise UserError(f"train.tracker={tracker} needs its package: pip install {tracker}")
            folder = {TRACKERS[tracker]: str(out)} if TRACKERS[tracker] else {}
            accelerator.init_trackers("skipdit", settings, {tracker: {"name": out.name} | folder})
        for path in filter(Path.exists, (self.path, self.judge_path)):
            lines = path.read_text(encoding="utf-8").splitlines()
            lines = [line for line in lines if line.endswith("}")]  # a full disk may have cut one off
            kept = [line for line in lines if json.loads(line)["step"] <= start]
            replace_text(path, "".join(f"{line}\n" for line in kept))
        with naming(out / "tensorboard"):
            self.board = SummaryWriter(out / "tensorboard", purge_step=start + 1)

    def write(self, stats: dict) -> None:
        self._append(self.path, "train", stats)

    def judged(self, values: dict) -> None:
        """Take what was measured of samples."""
        self._append(self.judge_path, "samples", values)

    def _append(self, path: Path, group: str, values: dict) -> None:
        with naming(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        step = values["step"]
        known = {f"{group}/{key}": value for key, value in values.items() if value is not None}
        with naming(self.board.log_dir):
            for key, value in known.items():
                self.board.add_scalar(key, value, step)
        del known[f"{group}/step"]
        self._accelerator.log(known, step)

    def samples(self, file: Path, step: int) -> None:
        """Send a picture of samples to tensorboard and the tracker, if it was made."""
        if not file.is_file():
            return
        with Image.open(file) as image, naming(self.board.log_dir):
            pixels = np.array(image.convert("RGB"))
            self.board.add_image("samples", pixels, step, dataformats="HWC")
        for tracker in self._accelerator.trackers:
            tracker.log_images({"samples": [pixels]}, step)

    def close(self) -> None:
        with naming(self.board.log_dir):
            self.board.close()


class BrokenFiles:
    """The list of unreadable files, one line each; every process appends what it meets."""

    def __init__(self, path: Path):
        self.path, self._seen = path, set()

    def add(self, messages: list[str]) -> None:
        new = {" ".join(message.split()) for message in messages} - self._seen
        if new:
            self._seen |= new
            with naming(self.path), open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{message}\n" for message in sorted(new))

    def summarise(self) -> None:
        """Drop repetitions, by other processes or before an interruption, and say how many there are."""
        messages = sorted(set(self.path.read_text(encoding="utf-8").splitlines())) if self.path.exists() else []
        if messages:
            replace_text(self.path, "".join(f"{message}\n" for message in messages))
            print(f"files that were skipped: {len(messages)}; {self.path} says which and why")
