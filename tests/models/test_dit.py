"""The model gives the released code's numbers."""

import json

import pytest
import torch
from conftest import GOLDEN, assert_close, tiny_dit, tiny_hunyuan, tiny_latte, tiny_latte_t2v

from skipdit import SkipCache
from skipdit.caching.policies import parse_policy
from skipdit.checkpoints.files import load_state
from skipdit.checkpoints.loading import load_weights
from skipdit.checkpoints.released import to_released
from skipdit.class_to_image import DiT
from skipdit.layers.adaln import AdaLNTransformer
from skipdit.layers.attention import GELU


@pytest.fixture
def skip_case(golden):
    case = golden("dit_skip_0")
    model = DiT(**case.case["config"]).eval()
    load_weights(model, case.state)
    return model, case


@torch.no_grad()
def test_forward_equals_released_code(skip_case):
    model, case = skip_case
    x, t, y = (case.inputs[k] for k in ("x", "t", "y"))
    assert_close(model(x, t, y), case.outputs["forward"])


@torch.no_grad()
def test_guided_forward_equals_released_code(skip_case):
    model, case = skip_case
    x, t, y = case.inputs["x"], case.inputs["t"], case.inputs["y_cfg"]
    assert_close(model.forward_with_cfg(x, t, y, case.case["cfg_scale"]), case.outputs["forward_with_cfg"])


@torch.no_grad()
def test_plain_forward_equals_released_code(golden):
    case = golden("dit_plain_0")
    model = DiT(**case.case["config"], skip=False).eval()
    load_weights(model, case.state)
    assert_close(model(*(case.inputs[k] for k in ("x", "t", "y"))), case.outputs["forward"])


@torch.no_grad()
@pytest.mark.parametrize(("run", "spec"), [("every2", "N2-1000-20-b4"), ("every3", "N3-1000-20-b4")])
def test_cached_trajectory_equals_released_code(skip_case, run, spec):
    model, case = skip_case
    timesteps = case.case["timesteps"]
    cache = SkipCache(spec, timesteps)
    assert cache.plan == case.case["runs"][run]["full"]
    assert cache.spec.branch == case.case["branch"]
    for i, t in enumerate(timesteps):
        out = model(case.inputs["xs"][i], torch.full((2,), t), case.inputs["y"], cache=cache.at(i))
        assert_close(out, case.outputs[f"cached/{run}/{i}"])


def test_full_size_model_has_the_released_keys():
    released = json.loads((GOLDEN / "released_checkpoint_keys.json").read_text())
    shapes = released["DiT-XL-2-skip.pt (class-to-image, 256x256)"]
    with torch.device("meta"):
        model = DiT()
    ours = {name: list(tensor.shape) for name, tensor in to_released(model.state_dict()).items()}
    assert ours == shapes


def test_spec_of_golden_text_t2v_windows():
    """The window rule on the other tasks' golden timesteps, so that the rule is known before the models are."""
    timesteps = list(range(980, -1, -20))
    counts = {n: sum(parse_policy(f"N{n}-700-50").full_mask(timesteps)) for n in (2, 3, 4)}
    assert counts == {2: 33, 3: 28, 4: 25}  # as the paper's FLOPs imply


@pytest.mark.parametrize("make", [tiny_dit, tiny_latte, tiny_latte_t2v, tiny_hunyuan])
def test_layerwise_casting(make):
    """Weights of 3 bits of mantissa are off by up to 6 %, and nothing is computed in float8."""
    model = make().requires_grad_(False)
    inputs = model.random_inputs(2)
    with torch.no_grad():
        expected = model(**inputs, **({} if isinstance(model, AdaLNTransformer) else {"return_dict": False}))
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        found = model(**inputs, **({} if isinstance(model, AdaLNTransformer) else {"return_dict": False}))
    expected, found = (x if isinstance(x, torch.Tensor) else x[0] for x in (expected, found))
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    stored = sum(p.numel() for p in model.parameters() if p.dtype == torch.float8_e4m3fn)
    assert stored > 0.5 * sum(p.numel() for p in model.parameters())


def test_gelu_overwrites_its_input_only_where_no_gradient_flows():
    x = torch.randn(8)
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    given, leaf = x.clone(), x.clone().requires_grad_()
    with torch.no_grad():
        out = GELU()(given)
    assert torch.equal(out, expected) and out is given
    assert torch.equal(GELU()(leaf), expected) and torch.equal(leaf, x)


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_dit, tiny_latte])
def test_residual_skips_start_at_the_plain_model(make, tmp_path):
    """And come back from a file, by its shapes."""
    plain = make(skip=False)
    model = type(plain)(**make(fuse="residual").config).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    inputs = plain.random_inputs(2)
    assert torch.equal(model(**inputs), plain(**inputs))
    for skip in model.skips:
        torch.nn.init.normal_(skip.delta.weight, std=0.1)
    torch.save({"ema": to_released(model.state_dict())}, tmp_path / "residual.pt")
    state = load_state(tmp_path / "residual.pt")
    again = type(plain)(**type(plain).config_from_state(state, num_heads=2)).eval()
    load_weights(again, tmp_path / "residual.pt")
    assert again.config.fuse == "residual" and torch.equal(again(**inputs), model(**inputs))
    assert not torch.equal(again(**inputs), plain(**inputs))
