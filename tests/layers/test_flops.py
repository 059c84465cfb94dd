"""FLOPs of the full-size models of prompts, in truth and in the paper's way of counting."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_hunyuan, tiny_latte_t2v
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "benchmarks"))
from flops import paper_macs


def linear_macs(model: torch.nn.Module, *inputs: torch.Tensor) -> float:
    """Multiply-adds of a forward pass, without those of attention."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    products = counter.get_flop_counts()["Global"]
    return sum(count for op, count in products.items() if str(op) in ("aten.mm", "aten.addmm")) / 2


@pytest.mark.parametrize(("skip", "skips"), [(True, 2), (False, 0)])
def test_formula_is_what_the_linear_layers_do(skip, skips):
    """For one frame, where the model runs the text as often as the released code does."""
    model = tiny_latte_t2v(skip=skip, video_length=1, caption_channels=20).to("meta")
    inputs = torch.randn(1, 4, 1, 4, 4, device="meta"), torch.full((1,), 5, device="meta")
    timestep = 256 * 32 + 32 * 32 + 6 * 32 * 32  # which the formula leaves out: nothing against the tokens
    text = torch.randn(1, 7, 20, device="meta")
    assert linear_macs(model, *inputs, text) == paper_macs(model, 4, skips, tokens=7) + timestep


@pytest.mark.parametrize(("skip", "skips"), [(True, 3), (False, 0)])
def test_formula_is_what_the_linear_layers_of_hunyuan_do(skip, skips):
    model = tiny_hunyuan(skip=skip, text_len=5, text_len_t5=7, text_states_dim_t5=24, mlp_ratio=4.3637).to("meta")
    inputs = torch.randn(1, 4, 8, 8, device="meta"), torch.full((1,), 5, device="meta")
    clip, t5 = torch.randn(1, 5, 16, device="meta"), torch.randn(1, 7, 24, device="meta")
    masks = torch.ones(1, 5, device="meta"), torch.ones(1, 7, device="meta")
    of_vectors = 256 * 32 + 32 * 32 + 24 * 1024 + 1024 * 128 + 128 * 32  # timestep, pooled text
    of_vectors += (8 + 2) * 32 * 32  # shifts of the blocks, and of the last layer
    assert linear_macs(model, *inputs, clip, masks[0], t5, masks[1]) == paper_macs(model, 8, skips) + of_vectors


def table(*arguments: str) -> tuple[list[list[str]], str]:
    """The benchmark's table, cell by cell, and all that it prints."""
    command = [sys.executable, ROOT / "benchmarks/flops.py", *arguments]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line[:1] == "|"]
    return rows[2:], said


@pytest.mark.slow
def test_benchmark_prints_the_papers_table():
    """TFLOPs of all eight rows of the paper within 0.1 %; true FLOPs are more than twice as many."""
    rows, said = table()
    assert [row[0] for row in rows] == ["plain Latte", "none", *(f"N{n}-{s}-50" for s in (700, 800) for n in (2, 3, 4))]
    assert [int(row[1].split(" + ")[0]) for row in rows] == [50, 50, 33, 28, 25, 31, 24, 21]
    assert all(abs(float(row[6]) / float(row[7]) - 1) < 1e-3 for row in rows)
    assert all(2 < 1e3 * float(row[4]) / float(row[7]) < 2.2 for row in rows)
    assert re.search(r"70\.660 \| 5\.051", said)


@pytest.mark.slow
def test_benchmark_prints_the_papers_table_of_hunyuan():
    rows, said = table("--model", "HunyuanDiT")
    assert [row[0] for row in rows] == ["plain Hunyuan-DiT", "none", *(f"N{n}-700-50" for n in range(2, 7))]
    assert [int(row[1].split(" + ")[0]) for row in rows] == [50, 50, 33, 28, 25, 24, 22]
    assert [row[7] for row in rows] == ["", "514.02", "348.24", "299.48", "270.22", "260.47", "240.96"]
    assert all(abs(float(row[6]) / float(row[7]) - 1) < 1e-3 for row in rows[1:])
    assert "text of 333 tokens" in said
