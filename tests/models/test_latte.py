"""Latte gives the released code's numbers, and keeps its promises about frames, images and skips."""

import json

import pytest
import torch
from conftest import GOLDEN, assert_close, assert_rounding, skipdit_command, tiny_latte

from skipdit import SkipCache
from skipdit.caching.steps import CacheStep
from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.loading import load_weights
from skipdit.checkpoints.released import from_released, to_released
from skipdit.class_to_video import Latte
from skipdit.training import checkpoints as checkpoint


@pytest.fixture(params=["latte_skip_extras1_0", "latte_skip_extras2_0"])
def skip_case(golden, request):
    case = golden(request.param)
    model = Latte(**case.case["config"]).eval()
    load_weights(model, case.state)
    return model, case


@torch.no_grad()
def test_forward_equals_released_code(skip_case):
    model, case = skip_case
    x, t = case.inputs["x"], case.inputs["t"]
    assert_close(model(x, t, case.inputs.get("y")), case.outputs["forward"])


@torch.no_grad()
def test_joint_forward_equals_released_code(skip_case):
    model, case = skip_case
    images = case.inputs["joint/x"], case.inputs["t"], case.inputs.get("y"), case.inputs.get("joint/y_image")
    assert_close(model(*images, use_image_num=case.case["joint_images"]), case.outputs["joint"])


@torch.no_grad()
def test_plain_forward_equals_released_code(golden):
    case = golden("latte_plain_0")
    model = Latte(**case.case["config"], skip=False).eval()
    load_weights(model, case.state)
    assert_close(model(*(case.inputs[k] for k in ("x", "t", "y"))), case.outputs["forward"])


@torch.no_grad()
def test_guided_forward_equals_released_code(golden):
    case = golden("latte_skip_extras2_0")
    model = Latte(**case.case["config"]).eval()
    load_weights(model, case.state)
    x, t, y = case.inputs["x"], case.inputs["t"], case.inputs["y_cfg"]
    guided = model.forward_with_cfg(x, t, y, case.case["cfg_scale"], cfg_channels=case.case["cfg_channels"])
    assert_close(guided, case.outputs["forward_with_cfg"])


@torch.no_grad()
@pytest.mark.parametrize(("run", "spec"), [("every2", "N2-900-49"), ("every3", "N3-900-49")])
def test_cached_trajectory_equals_released_code(skip_case, run, spec):
    model, case = skip_case
    timesteps = case.case["timesteps"]
    cache = SkipCache(spec, timesteps)
    assert cache.plan == case.case["runs"][run]["full"]
    assert cache.spec.branch == case.case["branch"]
    for i, t in enumerate(timesteps):
        out = model(case.inputs["xs"][i], torch.full((2,), t), case.inputs.get("y"), cache=cache.at(i))
        assert_close(out, case.outputs[f"cached/{run}/{i}"])


@pytest.mark.parametrize(
    ("checkpoint", "classes"),
    [
        ("ffs-skip.pt / sky / taichi (class-to-video, extras=1)", {}),
        ("ucf101-skip.pt (class-to-video, extras=2, num_classes=101)", {"extras": 2, "num_classes": 101}),
    ],
)
def test_full_size_model_has_the_released_keys(checkpoint, classes):
    shapes = json.loads((GOLDEN / "released_checkpoint_keys.json").read_text())[checkpoint]
    with torch.device("meta"):
        model = Latte.from_name("Latte-skip", **classes)
    ours = {name: list(tensor.shape) for name, tensor in to_released(model.state_dict()).items()}
    assert ours == shapes
    state = from_released({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    config = Latte.config_from_state(state)
    assert {key: model.config[key] for key in config} == config | {"n_skips": None}


def test_images_change_nothing_in_the_clip():
    model, x, t = tiny_latte(), torch.randn(2, 7, 4, 4, 4), torch.tensor([5, 500])
    y, y_image = torch.tensor([0, 1]), torch.tensor([[2, 3, 4], [0, 1, 2]])
    with torch.no_grad():
        joint = model(x, t, y, y_image, use_image_num=3)
        assert_rounding(joint[:, :4], model(x[:, :4], t, y))
        other = model(x, t, y, (y_image + 1) % 5, use_image_num=3)
    assert torch.equal(joint[:, :4], other[:, :4])
    assert not torch.allclose(joint[:, 4:], other[:, 4:])


def test_frames_see_each_other():
    model, x = tiny_latte(), torch.randn(1, 4, 4, 4, 4)
    changed = x.clone()
    changed[:, 3] += 1
    with torch.no_grad():
        a, b = (model(x, torch.tensor([5]), torch.tensor([0])) for x in (x, changed))
    assert not torch.allclose(a[:, 0], b[:, 0])


@pytest.mark.parametrize(("n_skips", "wanted"), [(None, 3), (1, 1), (0, 0)])
def test_skips_of_the_outer_pairs_only(n_skips, wanted):
    model = tiny_latte(depth=12, n_skips=n_skips)
    assert len(model.skips) == model.n_skips == wanted
    full = CacheStep(1, None)
    x, t, y = torch.randn(2, 4, 4, 4, 4), torch.tensor([5, 500]), torch.tensor([0, 1])
    with torch.no_grad():
        expected = model(x, t, y, cache=full)
        torch.testing.assert_close(model(x, t, y, cache=CacheStep(1, full.kept_feature)), expected)


def original_partial(model, state: dict, x, t, y):
    """LatteIMG-skip-partial as released: of n skips, number 0 feeds the last pair, number n - 1 the first that has one.

    Blocks and embeddings are those of `model`; norms and linears come from the state dict, by their released names.
    """
    c, n, pairs, kept = model.embed(t, y), model.n_skips, len(model.blocks) // 2, []
    x = model.x_embedder(x.flatten(0, 1)).unflatten(0, x.shape[:2]) + model.pos_embed
    for i in range(pairs):
        if i >= pairs - n:
            number = pairs - 1 - i
            norm = [state[f"skip_norms.{number}.{part}"] for part in ("weight", "bias")]
            linear = [state[f"skip_linears.{number}.linear.{part}"] for part in ("weight", "bias")]
            joined = torch.cat([x, kept.pop()], dim=-1)
            x = torch.nn.functional.linear(torch.layer_norm(joined, joined.shape[-1:], *norm, 1e-6), *linear)
        x = model.blocks[2 * i](x, c)
        x = x + model.temp_embed[:, :, None] if i == 0 else x
        x = model.blocks[2 * i + 1](x.transpose(1, 2), c.transpose(1, 2)).transpose(1, 2)
        if i < n:
            kept.append(x)
    return model._unpatchify(model.final_layer(x, c))


@torch.no_grad()
def test_skips_of_the_original_partial_model_are_taken_in_their_order(tmp_path, capsys):
    """Its numbers run from the outside in; nothing in the file says so, and a guess would be far off."""
    model, x, t = tiny_latte(depth=16, n_skips=3), torch.randn(2, 4, 4, 4, 4), torch.tensor([5, 500])
    y = torch.tensor([0, 1])
    state = {name: torch.randn(tensor.shape) * 0.3 for name, tensor in to_released(model.state_dict()).items()}
    torch.save({"ema": state}, tmp_path / "partial.pt")
    for source in (tmp_path / "partial.pt", {"ema": state}, state, {f"module.{name}": state[name] for name in state}):
        with pytest.raises(WeightsError, match=r"LatteIMG-skip-partial does(.|\n)*--skips outside-in"):
            load_weights(model, source)
    outputs = {}
    for order in ("outside-in", "inside-out"):
        export = ["export", str(tmp_path / "partial.pt"), str(tmp_path / f"{order}.pt"), "--skips", order]
        skipdit_command("weights")(export)
        load_weights(model, tmp_path / f"{order}.pt")
        outputs[order] = model(x, t, y)
    load_weights(model, tmp_path / "outside-in.pt")
    expected = original_partial(model, state, x, t, y)
    assert_close(outputs["outside-in"], expected, 1e-4 * expected.abs().max().item())
    assert (outputs["inside-out"] - expected).abs().max() > 0.1 * expected.abs().max()
    folder = ["convert", str(tmp_path / "partial.pt"), str(tmp_path / "folder"), "--skips", "outside-in"]
    skipdit_command("weights")([*folder, "--model-class", "skipdit.class_to_video.Latte", "--num-heads", "2"])
    assert torch.equal(Latte.from_pretrained(tmp_path / "folder").eval()(x, t, y), outputs["outside-in"])


def test_partial_models_of_our_own_runs_need_no_word(tmp_path):
    """The trainer's checkpoints record the model's settings; exports and folders have our names for the skips."""
    model = tiny_latte(n_skips=1)
    optimizer = torch.optim.AdamW(model.parameters())
    for config in ({}, {"model": {"n_skips": 1}}):
        checkpoint.save(tmp_path / "run", 1, model, model, optimizer, config, keep=1, writer=True)
        skipdit_command("weights")(["export", str(tmp_path / "run"), str(tmp_path / f"out-{len(config)}.pt")])
        model.save_pretrained(tmp_path / "folder")
        for source in (tmp_path / "run", tmp_path / f"out-{len(config)}.pt", tmp_path / "folder"):
            other = tiny_latte(seed=1, n_skips=1)
            load_weights(other, source)
            assert torch.equal(other.skips[0].linear.weight, model.skips[0].linear.weight)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"depth": 5}, "depth 5 is odd"),
        ({"extras": 3}, "extras is 3"),
        ({"n_skips": 3}, "n_skips is 3; 4 pairs have at most 2"),
        ({"num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
    ],
)
def test_bad_arguments_are_named(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny_latte(**arguments)


@pytest.mark.parametrize(
    ("frames", "size", "y", "complaint"),
    [
        (5, 4, torch.tensor([0]), "clips have 5 frames, the model was made for 4"),
        (4, 6, torch.tensor([0]), r"latents are \(6, 6\), the model was made for \(4, 4\)"),
        (4, 4, None, "y is missing"),
    ],
)
def test_inputs_that_do_not_fit_are_named(frames, size, y, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny_latte()(torch.randn(1, frames, 4, size, size), torch.tensor([5]), y)


def test_unconditional_model_refuses_classes():
    with pytest.raises(ValueError, match="the model is unconditional"):
        tiny_latte(extras=1)(torch.randn(1, 4, 4, 4, 4), torch.tensor([5]), torch.tensor([0]))


@pytest.mark.parametrize("extras", [1, 2])
def test_modulations_ahead_change_nothing(extras):
    """The modulations of many steps at once are those of each step alone, cached steps included."""
    model, y = tiny_latte(extras=extras), torch.tensor([1, 2]) if extras == 2 else None
    ahead = model.condition(torch.tensor([10, 500]), y)
    outer = model.condition(torch.tensor([10, 500]), y, branch=1)
    x = torch.randn(2, 4, 4, 4, 4)
    with torch.no_grad():
        for number, step in enumerate((10, 500)):
            t, full = torch.full((2,), step), CacheStep(1, None)
            assert_rounding(model(x, t, y, cache=full), model(x, t, y, conditioning=ahead[number]))
            cached = CacheStep(1, full.kept_feature)
            expected = model(x, t, y, cache=cached)
            assert_rounding(expected, model(x, t, y, cache=cached, conditioning=outer[number]))


def test_gradient_checkpointing_gives_the_same_gradients():
    inputs = torch.randn(2, 6, 4, 4, 4), torch.tensor([5, 500]), torch.tensor([0, 1]), torch.tensor([[1, 2], [3, 4]])

    def gradients(checkpointing: bool) -> dict:
        model = tiny_latte().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*inputs, use_image_num=2).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    torch.testing.assert_close(gradients(True), gradients(False))


def test_pretrained_round_trip(tmp_path):
    model = tiny_latte()
    model.save_pretrained(tmp_path)
    again = Latte.from_pretrained(tmp_path)
    assert again.config.num_frames == 4
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
