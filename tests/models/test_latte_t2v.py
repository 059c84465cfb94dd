"""LatteT2V gives the released code's numbers, and keeps its promises about texts, masks, frames and skips."""

import json

import pytest
import torch
from conftest import GOLDEN, assert_close, assert_rounding, tiny_latte_t2v
from diffusers import LatteTransformer3DModel

from skipdit import SkipCache
from skipdit.caching.steps import CacheStep
from skipdit.checkpoints.loading import load_weights
from skipdit.checkpoints.released import from_released, to_released
from skipdit.text_to_video import LatteT2V


@pytest.fixture
def skip_case(golden):
    case = golden("latte_t2v_skip_0")
    model = LatteT2V(**case.case["config"]).eval()
    load_weights(model, case.state)
    return model, case


@torch.no_grad()
def test_forward_equals_released_code(skip_case):
    model, case = skip_case
    x, t, text, mask = (case.inputs[name] for name in ("x", "t", "text", "mask"))
    assert_close(model(x, t, text).sample, case.outputs["forward"])
    assert_close(model(x, t, text, encoder_attention_mask=mask).sample, case.outputs["forward_masked"])
    no_temporal = model(x, t, text, enable_temporal_attentions=False, return_dict=False)
    assert_close(no_temporal[0], case.outputs["forward_no_temporal"])


@torch.no_grad()
def test_joint_forward_equals_released_code(skip_case):
    model, case = skip_case
    out = model(
        case.inputs["joint/x"], case.inputs["t"], case.inputs["joint/text"], use_image_num=case.case["joint_images"]
    )
    assert_close(out.sample, case.outputs["joint"])


@torch.no_grad()
def test_plain_forward_equals_released_code(golden):
    case = golden("latte_t2v_plain_0")
    model = LatteT2V(**case.case["config"], skip=False).eval()
    load_weights(model, case.state)
    x, t, text, mask = (case.inputs[name] for name in ("x", "t", "text", "mask"))
    assert_close(model(x, t, text, encoder_attention_mask=mask).sample, case.outputs["forward_masked"])


@torch.no_grad()
@pytest.mark.parametrize("spec", ["N2-700-50", "N3-700-50", "N4-800-100"])
def test_cached_trajectory_equals_released_code(skip_case, spec):
    model, case = skip_case
    timesteps = case.case["timesteps"]
    cache = SkipCache(spec, timesteps)
    assert cache.plan == case.case["runs"][spec]["full"]
    assert cache.spec.branch == case.case["branch"]
    text = model.encode_text(case.inputs["text"], case.inputs["mask"])
    for i, t in enumerate(timesteps):
        out = model(case.inputs["xs"][i], torch.full((2,), t), text, cache=cache.at(i))
        assert_close(out.sample, case.outputs[f"cached/{spec}/{i}"])


def test_full_size_model_has_the_released_keys():
    shapes = json.loads((GOLDEN / "released_checkpoint_keys.json").read_text())["Latte-skip.pt (text-to-video)"]
    with torch.device("meta"):
        model = LatteT2V()
    ours = {name: list(tensor.shape) for name, tensor in to_released(model.state_dict()).items()}
    unused = {"caption_projection.y_embedding": [120, 4096]}
    assert ours | unused == shapes
    state = from_released({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    config = LatteT2V.config_from_state(state)
    assert config == {key: model.config[key] for key in config}


def test_plain_folder_of_diffusers_loads_and_agrees(tmp_path):
    ours = tiny_latte_t2v(skip=False)
    own = ("skip", "fuse", "flow_shift")
    arguments = {name: value for name, value in ours.config.items() if name not in own and name[0] != "_"}
    theirs = LatteTransformer3DModel(**arguments).eval()
    theirs.save_pretrained(tmp_path)
    load_weights(ours, tmp_path)
    x, t, text = torch.randn(2, 4, 4, 4, 4), torch.tensor([5, 500]), torch.randn(2, 7, 12)
    with torch.no_grad():
        assert_rounding(ours(x, t, text).sample, theirs(x, t, text).sample)
        again = LatteT2V.from_pretrained(tmp_path, skip=False).eval()
        assert torch.equal(again(x, t, text).sample, ours(x, t, text).sample)
        picture, wide = torch.randn(2, 4, 1, 4, 4), torch.randn(2, 4, 4, 6, 8)
        assert_rounding(ours(picture, t, text).sample, theirs(picture, t, text).sample)
        assert_rounding(ours(wide, t, text).sample, theirs(wide, t, text).sample)


@torch.no_grad()
def test_masked_tokens_change_nothing():
    model, x, t = tiny_latte_t2v(), torch.randn(2, 4, 4, 4, 4), torch.tensor([5, 500])
    text, mask = torch.randn(2, 6, 12), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    masked = model(x, t, text, mask).sample
    assert_rounding(masked[:1], model(x[:1], t[:1], text[:1, :4]).sample)
    assert_rounding(masked[1:], model(x[1:], t[1:], text[1:, :2]).sample)
    assert_rounding(masked, model(x, t, text, mask.bool()).sample)
    assert_rounding(masked, model(x, t, text, (mask[:, None] - 1) * 10_000.0).sample)
    assert not torch.allclose(masked, model(x, t, text).sample)
    assert model(x, t, text, torch.zeros(2, 6)).sample.isfinite().all()


@torch.no_grad()
def test_images_change_nothing_in_the_clip_and_have_texts_of_their_own():
    model, x, t = tiny_latte_t2v(), torch.randn(2, 4, 6, 4, 4), torch.tensor([5, 500])
    text, mask = torch.randn(2, 3, 6, 12), torch.rand(2, 3, 6) < 0.7
    joint = model(x, t, text, mask, use_image_num=2).sample
    assert_rounding(joint[:, :, :4], model(x[:, :, :4], t, text[:, 0], mask[:, 0]).sample)
    other = model(x, t, torch.cat([text[:, :2], text[:, 2:] + 1], 1), mask, use_image_num=2).sample
    assert torch.equal(joint[:, :, :5], other[:, :, :5])
    assert not torch.allclose(joint[:, :, 5], other[:, :, 5])


@torch.no_grad()
def test_text_once_per_run_is_the_text_of_every_step():
    model, x, t, text = tiny_latte_t2v(), torch.randn(2, 4, 4, 4, 4), torch.tensor([5, 500]), torch.randn(2, 7, 12)
    assert torch.equal(model(x, t, model.encode_text(text)).sample, model(x, t, text).sample)


@torch.no_grad()
def test_cached_pass_on_a_fresh_feature_is_the_full_pass():
    model, text = tiny_latte_t2v(), torch.randn(2, 7, 12)
    x, t, full = torch.randn(2, 4, 4, 4, 4), torch.tensor([5, 500]), CacheStep(2, None)
    expected = model(x, t, text, cache=full).sample
    assert torch.equal(expected, model(x, t, text).sample)
    torch.testing.assert_close(model(x, t, text, cache=CacheStep(2, full.kept_feature)).sample, expected)


@torch.no_grad()
@torch.no_grad()
def test_stream_is_float32_where_weights_are_not():
    """As FSDP has them in its forward passes: bf16, under autocast, with float32 latents."""
    model, seen = tiny_latte_t2v().bfloat16(), []
    run = model._run
    model._run = lambda block, x, *args: seen.append(x.dtype) or run(block, x, *args)
    x, text = torch.randn(1, 4, 4, 4, 4), torch.randn(1, 6, 12)
    with torch.autocast("cpu", torch.bfloat16):
        model(x, torch.tensor([500]), text)
    assert seen and set(seen) == {torch.float32}


def test_residual_skips_start_at_the_plain_model():
    plain, model = tiny_latte_t2v(skip=False), LatteT2V(**tiny_latte_t2v(fuse="residual").config)
    new = load_weights(model, plain.state_dict(), allow_missing="skips.*")
    assert {name.split(".", 2)[2] for name in new} == {"norm.weight", "norm.bias", "delta.weight", "delta.bias"}
    x, t, text = torch.randn(2, 4, 4, 4, 4), torch.tensor([5, 500]), torch.randn(2, 7, 12)
    assert torch.equal(model(x, t, text).sample, plain(x, t, text).sample)


def test_residual_and_replacing_skips_do_not_mix():
    with pytest.raises(ValueError, match="set fuse=residual"):
        load_weights(tiny_latte_t2v(), tiny_latte_t2v(fuse="residual").state_dict())
    with pytest.raises(ValueError, match="fuse=replace"):
        load_weights(tiny_latte_t2v(fuse="residual"), tiny_latte_t2v().state_dict())


def test_gradient_checkpointing_gives_the_same_gradients():
    inputs = torch.randn(2, 4, 6, 4, 4), torch.tensor([5, 500]), torch.randn(2, 3, 5, 12), torch.ones(2, 3, 5)

    def gradients(checkpointing: bool) -> dict:
        model = tiny_latte_t2v().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*inputs, use_image_num=2).sample.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize(
    ("shape", "text", "images", "complaint"),
    [
        ((1, 4, 5, 4, 4), (1, 6, 12), 0, "clips have 5 frames, the model was made for up to 4"),
        ((1, 4, 4, 4, 5), (1, 6, 12), 0, "latents are 4 x 5, which patches of 2 do not tile"),
        ((1, 4, 6, 4, 4), (1, 6, 12), 2, r"texts are \(1, 1\), wanted is one for each of 1 clips and its 2 images"),
        ((2, 4, 4, 4, 4), (1, 6, 12), 0, r"texts are \(1, 1\), wanted is one for each of 2 clips"),
    ],
)
def test_inputs_that_do_not_fit_are_named(shape, text, images, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny_latte_t2v()(torch.randn(shape), torch.tensor([5] * shape[0]), torch.randn(text), use_image_num=images)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [({"norm_type": "layer_norm"}, "only 'ada_norm_single'"), ({"fuse": "sum"}, "fuse is 'sum'")],
)
def test_bad_arguments_are_named(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny_latte_t2v(**arguments)


def test_pretrained_round_trip(tmp_path):
    model = tiny_latte_t2v(fuse="residual")
    model.save_pretrained(tmp_path)
    again = LatteT2V.from_pretrained(tmp_path)
    assert again.config.fuse == "residual"
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
