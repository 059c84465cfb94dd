"""HunyuanDiT gives the released code's numbers, and those of diffusers' own class."""

import json

import pytest
import torch
from conftest import GOLDEN, assert_close

from skipdit import SkipCache
from skipdit.text_to_image import HunyuanDiT
from skipdit.text_to_image.model import rotary_tables
from skipdit.weights import from_released, load_weights, to_released


@pytest.fixture
def case(golden):
    case = golden("hunyuan_dit_0")
    model = HunyuanDiT(**case.case["config"]).eval()
    load_weights(model, case.state)
    return model, case


def texts(case) -> tuple[torch.Tensor, ...]:
    return tuple(case.inputs[name] for name in ("clip", "clip_mask", "t5", "t5_mask"))


@torch.no_grad()
def test_forward_equals_released_code(case):
    model, case = case
    rotary = case.inputs["cos"], case.inputs["sin"]
    out = model(case.inputs["x"], case.inputs["t"], *texts(case), image_rotary_emb=rotary)
    assert_close(out.sample, case.outputs["forward"])


@torch.no_grad()
@pytest.mark.parametrize("run", ["every2_branch1", "every3_branch1", "every2_branch2"])
def test_cached_trajectory_equals_released_code(case, run):
    model, case = case
    timesteps, wanted = case.case["timesteps"], case.case["runs"][run]
    cache = SkipCache(f"N{wanted['interval']}-700-50-b{wanted['branch']}", timesteps)
    assert cache.plan == wanted["full"]
    text, rotary = model.encode_text(*texts(case)), (case.inputs["cos"], case.inputs["sin"])
    for i, t in enumerate(timesteps):
        out = model(case.inputs["xs"][i], torch.full((2,), float(t)), text, image_rotary_emb=rotary, cache=cache.at(i))
        assert_close(out.sample, case.outputs[f"cached/{run}/{i}"])


def test_full_size_model_has_the_released_keys():
    keys = json.loads((GOLDEN / "released_checkpoint_keys.json").read_text())
    shapes = next(value for name, value in keys.items() if name.startswith("HunyuanDiT-v1.2"))
    with torch.device("meta"):
        model = HunyuanDiT()
    ours = model.state_dict()
    assert {name: list(tensor.shape) for name, tensor in to_released(ours).items()} == shapes
    assert from_released(to_released(ours)).keys() == ours.keys()


@pytest.mark.parametrize("size", ["1024x1024", "1280x768"])
def test_rotary_tables_equal_released_code(golden, size):
    case = golden("hunyuan_rope_0")
    wanted, grid = case.case["sizes"][size], [int(side) // 16 for side in size.split("x")]
    cos, sin = rotary_tables(*grid, case.case["head_dim"], case.case["base"])
    rows = case.tensors[f"{size}/rows"].long()
    assert len(cos) == wanted["rows"]
    assert_close(cos[rows].float(), case.tensors[f"{size}/cos"])
    assert_close(sin[rows].float(), case.tensors[f"{size}/sin"])
