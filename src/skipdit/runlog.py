"""What a training run writes beside its checkpoints: numbers, and the names of files that it could not read."""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Log:
    """stats.jsonl and tensorboard of a run. A resumed run drops the steps after `start`: it will write them again."""

    def __init__(self, out: Path, start: int):
        self.path = out / "stats.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= start]
            replace_text(self.path, "".join(f"{line}\n" for line in kept))
        self.board = SummaryWriter(out / "tensorboard", purge_step=start + 1)

    def write(self, stats: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(stats) + "\n")
        for key, value in stats.items():
            if value is not None:
                self.board.add_scalar(f"train/{key}", value, stats["step"])

    def close(self) -> None:
        self.board.close()


class BrokenFiles:
    """The list of unreadable files, one line each; every process appends what it meets."""

    def __init__(self, path: Path):
        self.path, self._seen = path, set()

    def add(self, messages: list[str]) -> None:
        new = {" ".join(message.split()) for message in messages} - self._seen
        if new:
            self._seen |= new
            with open(self.path, "a") as file:
                file.writelines(f"{message}\n" for message in sorted(new))

    def summarise(self) -> None:
        """Drop repetitions, by other processes or before an interruption, and say how many there are."""
        messages = sorted(set(self.path.read_text().splitlines())) if self.path.exists() else []
        if messages:
            replace_text(self.path, "".join(f"{message}\n" for message in messages))
            print(f"files that were skipped: {len(messages)}; {self.path} says which and why")


def replace_text(path: Path, text: str) -> None:
    """Rewrite a file so that it is whole at any moment."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
