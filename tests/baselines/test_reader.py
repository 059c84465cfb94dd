"""The benchmark of the trainer's reader reads what `skipdit encode` writes, and images."""

import re
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "benchmarks"))
import reader

from skipdit.data.latents import Latents


def call(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reader.py", *arguments])
    reader.main()


def test_latents_of_noise_are_read(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(reader, "SHARD", 16)  # 40 samples: three files
    reader.make_latents(tmp_path, 40)
    data = Latents(tmp_path)
    assert len(data) == 40 and data[39]["mean"].shape == (2, *reader.SHAPE) and data[39]["mean"].dtype == torch.half
    assert not torch.equal(data[0]["mean"], data[0]["std"])

    call(monkeypatch, "--samples", "40", "--batch", "4", "--batches", "3", "--workers", "0", "1")
    lines = re.findall(r"(\d) workers: ([\d,]+) samples/s, ([\d,]+) MB/s", capsys.readouterr().out)
    assert [workers for workers, *_ in lines] == ["0", "1"]
    for _, samples, megabytes in lines:  # mean and std, with flipped copies, in half precision: 32 KiB
        assert int(megabytes.replace(",", "")) == pytest.approx(int(samples.replace(",", "")) * 0.0328, rel=0.05, abs=1)


def test_images_are_read(monkeypatch, capsys, tmp_path):
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    arguments = ["--kind", "image_folder", "--image-size", "16", "--batch", "2", "--batches", "2", "--workers", "0"]
    call(monkeypatch, *arguments, "--path", str(tmp_path))
    assert re.search(r"2 samples of .*\n0 workers: [\d,]+ samples/s", capsys.readouterr().out)
    for mistake, said in ((arguments, "needs --path"), (["--batch", "0"], "--batch and --batches must be 1 or more")):
        with pytest.raises(SystemExit, match="2"):
            call(monkeypatch, *mistake)
        assert said in capsys.readouterr().err
