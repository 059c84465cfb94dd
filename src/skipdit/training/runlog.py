"""What a training run writes beside its checkpoints: numbers, and the names of files that it could not read."""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from skipdit.utils.files import naming, replace_text


class Log:
    """stats.jsonl and tensorboard of a run. A resumed run drops the steps after `start`: it will write them again."""

    def __init__(self, out: Path, start: int):
        self.path = out / "stats.jsonl"
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            lines = [line for line in lines if line.endswith("}")]  # a full disk may have cut one off
            kept = [line for line in lines if json.loads(line)["step"] <= start]
            replace_text(self.path, "".join(f"{line}\n" for line in kept))
        with naming(out / "tensorboard"):
            self.board = SummaryWriter(out / "tensorboard", purge_step=start + 1)

    def write(self, stats: dict) -> None:
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(stats) + "\n")
        with naming(self.board.log_dir):
            for key, value in stats.items():
                if value is not None:
                    self.board.add_scalar(f"train/{key}", value, stats["step"])

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
