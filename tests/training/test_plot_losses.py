"""scripts/plot_losses.py: runs after each other, resumed ones, and what is no run."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

SCRIPT = str(ROOT / "scripts/plot_losses.py")


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """A run that was resumed at step 20 and had a step that was not finite, and one that starts from it."""
    folders = [tmp_path / "first", tmp_path / "second"]
    steps = [[(10, 1.0), (20, 0.5), (30, 9.0), (30, 0.4), (40, None)], [(10, 0.3), (20, 0.2)]]
    for folder, lines in zip(folders, steps, strict=True):
        folder.mkdir()
        (folder / "stats.jsonl").write_text("".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in lines))
    return folders


def test_runs_follow_each_other(runs):
    read = runpy.run_path(SCRIPT)["read"]
    assert read(runs, None) == ([10, 20, 30, 40, 50], [1.0, 0.5, 0.4, 0.3, 0.2], [30])
    assert read(runs, 40)[0] == [10, 20, 30, 40]


def test_picture_is_written(runs, tmp_path, monkeypatch, capsys):
    named = f"both={runs[0]},{runs[1]}"
    monkeypatch.setattr(sys, "argv", [SCRIPT, named, str(runs[1]), "--out", str(tmp_path / "new/losses.png")])
    runpy.run_path(SCRIPT, run_name="__main__")
    with Image.open(tmp_path / "new/losses.png") as picture:
        assert picture.size[0] > 600 and len(picture.getcolors(10**6)) > 10
    monkeypatch.setattr(sys, "argv", [SCRIPT, str(tmp_path / "nowhere"), "--out", str(tmp_path / "no.png")])
    with pytest.raises(SystemExit):
        runpy.run_path(SCRIPT, run_name="__main__")
    assert "nowhere is no run of a trainer" in capsys.readouterr().err
