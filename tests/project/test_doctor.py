"""`skipdit doctor`: a finding and a fix for whatever is wrong, and never a traceback."""

import time
from argparse import Namespace
from importlib import metadata

import pytest

from skipdit import doctor


def test_all_is_reported(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    doctor.main(Namespace())
    out = capsys.readouterr().out
    for expected in ("torch 2", "CPU:", "reads h264", "writes mp4", "GB free", "HF_HUB_OFFLINE is set"):
        assert expected in out
    for task in doctor.TASKS:
        assert f"{task}: embedded model" in out and f"skipdit download {task} --only" in out
    assert out.endswith("to see a model at work: skipdit demo\n")
    assert "could not be checked" not in out and "MISSING" not in out


def test_a_missing_package_is_named_with_its_fix(monkeypatch, capsys):
    monkeypatch.setattr(metadata, "requires", lambda _: ["nowhere>=3", "numpy>=99", 'peft>=1; extra == "lora"'])
    first, *rest = doctor.examine(doctor.versions)
    assert first.status == "ok" and rest[0] == ("MISSING", "nowhere is not installed", 'pip install "nowhere>=3"')
    assert rest[1].status == "note" and "is not >=99" in rest[1].text and rest[1].fix == 'pip install "numpy>=99"'
    assert rest[2].text.endswith("for adapters of text-to-image")
    monkeypatch.setattr(doctor, "CHECKS", {"Packages": doctor.versions})
    with pytest.raises(SystemExit, match="1"):
        doctor.main(Namespace())
    assert "1 packages are missing" in capsys.readouterr().err


def test_a_check_that_fails_is_a_finding():
    def broken():
        yield doctor.Finding("ok", "first")
        raise OSError("no such driver\nmore")

    first, second = doctor.examine(broken)
    assert first.text == "first" and second.text == "could not be checked: OSError: no such driver"


def test_a_hub_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(doctor, "SECONDS", 0.05)
    monkeypatch.setattr(doctor, "_status", lambda place: time.sleep(5))
    began = time.perf_counter()
    (finding,) = doctor.examine(doctor.hub)
    assert time.perf_counter() - began < 2 and "does not answer" in finding.text and "--dry-run" in finding.fix
    monkeypatch.setattr(doctor, "_status", lambda place: 200)
    assert doctor.examine(doctor.hub)[0].status == "ok"


def test_downloaded_models_are_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("DiT-XL-2-skip.pt", "sd-vae-ft-ema/config.json", "sd-vae-ft-ema/x.safetensors"):
        (tmp_path / "checkpoints" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkpoints" / name).touch()
    said = [finding.text for finding in doctor.examine(doctor.models)]
    assert "class-to-image: released model in checkpoints" in said
