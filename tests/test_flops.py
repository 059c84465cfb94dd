"""FLOPs of the full-size text-to-video model, in truth and in the paper's way of counting."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_latte_t2v
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "benchmarks"))
from flops import paper_macs


@pytest.mark.parametrize(("skip", "skips"), [(True, 2), (False, 0)])
def test_formula_is_what_the_linear_layers_do(skip, skips):
    """For one frame, where the model runs the text as often as the released code does."""
    model = tiny_latte_t2v(skip=skip, video_length=1, caption_channels=20).to("meta")
    inputs = torch.randn(1, 4, 1, 4, 4, device="meta"), torch.full((1,), 5, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(*inputs, torch.randn(1, 7, 20, device="meta"))
    products = counter.get_flop_counts()["Global"]
    linear = sum(count for op, count in products.items() if str(op) in ("aten.mm", "aten.addmm")) / 2
    timestep = 256 * 32 + 32 * 32 + 6 * 32 * 32  # which the formula leaves out: nothing against the tokens
    assert linear == paper_macs(model, 4, skips, tokens=7) + timestep


def test_benchmark_prints_the_papers_table():
    """TFLOPs of all eight rows of the paper within 0.1 %; true FLOPs are more than twice as many."""
    run = subprocess.run([sys.executable, ROOT / "benchmarks/flops.py"], capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines() if line[:1] == "|"][2:]
    assert [row[0] for row in rows] == ["plain Latte", "none", *(f"N{n}-{s}-50" for s in (700, 800) for n in (2, 3, 4))]
    assert [int(row[1].split(" + ")[0]) for row in rows] == [50, 50, 33, 28, 25, 31, 24, 21]
    assert all(abs(float(row[6]) / float(row[7]) - 1) < 1e-3 for row in rows)
    assert all(2 < 1e3 * float(row[4]) / float(row[7]) < 2.2 for row in rows)
    assert re.search(r"70\.660 \| 5\.051", run.stdout)
