"""Results of a benchmark that outlive an interruption."""

import json
from pathlib import Path

import torch
from torch import Tensor

from skipdit.utils.errors import UserError
from skipdit.utils.files import replace_text, whole_file


class Store:
    """A JSON file, and samples, for every row.

    Raises ValueError if the folder holds results of other settings.
    """

    def __init__(self, folder: Path, identity: dict):
        self.folder = folder / "rows"
        self.folder.mkdir(parents=True, exist_ok=True)
        file, identity = self.folder / "settings.json", json.loads(json.dumps(identity))
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if differ := [key for key in before.keys() & identity.keys() if before[key] != identity[key]]:
            lines = [f"  {key}: {before[key]} there, {identity[key]} now" for key in differ]
            raise UserError(f"{folder} holds results of other settings; use another --out:\n" + "\n".join(lines))
        replace_text(file, json.dumps(before | identity, indent=2) + "\n")

    def result(self, key: str) -> dict | None:
        file = self.folder / f"{key}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def save(self, key: str, result: dict) -> None:
        replace_text(self.folder / f"{key}.json", json.dumps(result, indent=2) + "\n")

    def samples(self, key: str) -> Tensor:
        return torch.load(self.folder / f"{key}.pt", weights_only=True)

    def save_samples(self, key: str, samples: Tensor) -> None:
        with whole_file(self.folder / f"{key}.pt") as partial:
            torch.save(samples, partial)
