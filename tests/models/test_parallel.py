"""Context parallelism of diffusers: two processes that share the tokens compute what one does, with a cache, too."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, tiny_dit, tiny_hunyuan, tiny_latte, tiny_latte_t2v
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.utils._pytree import tree_leaves

from skipdit.caching.steps import CacheStep

pytest.importorskip("diffusers", minversion="0.36")
MODELS = {"class-to-image": tiny_dit, "class-to-video": tiny_latte}
MODELS |= {"text-to-video": tiny_latte_t2v, "text-to-image": tiny_hunyuan}


def outputs(model: nn.Module, inputs: dict) -> tuple[list[Tensor], int]:
    """Of a full and a cached step, and how many numbers are stored between the two."""
    full = CacheStep(1, None)
    first = model(**inputs, cache=full)
    second = model(**{name: x * 1.1 if name in ("x", "hidden_states") else x for name, x in inputs.items()}, cache=None)
    third = model(**inputs, cache=CacheStep(1, 0.9 * full.kept_feature))
    leaves = tree_leaves([tuple(each.values()) if isinstance(each, dict) else each for each in (first, second, third)])
    return leaves, full.kept_feature.numel()


@torch.no_grad()
def compare(rank: int, store: str) -> None:
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, make in MODELS.items():
        model = make().eval()
        torch.manual_seed(1)
        inputs = model.random_inputs(2)
        expected, stored = outputs(model, inputs)
        with mock.patch("torch.accelerator.device_count", return_value=1):  # diffusers counts accelerators
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        found, own = outputs(model, inputs)
        assert own == stored / 2, name  # the blocks saw half of the tokens
        for one, two in zip(expected, found, strict=True):
            torch.testing.assert_close(two, one, msg=lambda text, name=name: f"{name}: {text}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spawn(compare, (str(tmp_path / "store"),), nprocs=2)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="there are two GPUs")
def test_the_example_says_that_it_needs_two_gpus():
    command = [sys.executable, str(ROOT / "scripts/two_gpus.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "2 GPUs are needed, and there are" in result.stderr
