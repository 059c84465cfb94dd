"""What the shell offers after TAB, with argcomplete: asked as its script for bash asks."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from skipdit.__main__ import COMMANDS

pytest.importorskip("argcomplete", reason="completion needs argcomplete: pip install argcomplete")
DEMO = "configs/class-to-image/demo.yaml"
FASHION = "configs/class-to-image/fashion_plain.yaml"


def offered(line: str, folder) -> list[str]:
    """What can stand at the end of a line."""
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(folder / "offered"), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    program = [sys.executable, "-m", "skipdit"]
    ran = subprocess.run(program, cwd=ROOT, env=os.environ | asked, capture_output=True, text=True, timeout=300)
    assert not ran.stdout
    return (folder / "offered").read_text().split("\n")


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("skipdit ", {*COMMANDS, "--version"}),
        ("skipdit dow", {"download"}),
        ("skipdit download ", {"class-to-image", "text-to-video"}),
        ("skipdit download class-to-image --dr", {"--dry-run"}),
        ("skipdit evaluate ", {"fid", "fvd"}),
        ("skipdit evaluate fvd samples --i", {"--i3d", "--interval"}),
        ("skipdit weights average run --len", {"--length"}),
        ("skipdit analyze j", {"jacobian"}),
        ("skipdit analyze jacobian --it", {"--iterations"}),
        ("skipdit demo text", {"text-to-image", "text-to-video"}),
        ("skipdit data ", {"check"}),
        ("skipdit train new --im", {"--image-size"}),
        ("skipdit train --conf", {"--config"}),
        (f"skipdit train --config {FASHION} train.av", {"train.average_every="}),
        (f"skipdit sample --config {DEMO} --ca", {"--cache"}),
        (f"skipdit sample --config {DEMO} guidance_s", {"guidance_scale="}),
        (f"skipdit plan --config {DEMO} --tar", {"--target"}),
        (f"skipdit plan --config {DEMO} --target conv", {"converged"}),
    ],
)
def test_words_that_fit_are_offered(line, offers, tmp_path):
    assert {word.strip() for word in offered(line, tmp_path)} >= offers


def test_words_that_do_not_fit_are_left_out(tmp_path):
    assert offered("skipdit dow", tmp_path) == ["download"]
    assert offered(f"skipdit train --config {FASHION} train.average_e", tmp_path) == ["train.average_every="]
