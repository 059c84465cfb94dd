"""HunyuanDiT gives the released code's numbers, and those of diffusers' own class."""

import json
from functools import partial

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import GOLDEN, assert_close, assert_rounding, skipdit_command
from diffusers import DDIMScheduler, HunyuanDiT2DModel

from skipdit import SkipCache, disable_cache, enable_cache
from skipdit.caching.steps import CacheStep
from skipdit.checkpoints.diffusers_layout import to_diffusers
from skipdit.checkpoints.loading import load_weights
from skipdit.checkpoints.released import from_released, to_released
from skipdit.pipelines.hunyuan2d import cached_forward
from skipdit.text_to_image import HunyuanDiT
from skipdit.text_to_image.model import rotary_tables


@pytest.fixture
def case(golden):
    case = golden("hunyuan_dit_0")
    model = HunyuanDiT(**case.case["config"]).eval()
    load_weights(model, case.state)
    return model, case


TINY = {"depth": 8, "hidden_size": 32, "num_heads": 2, "text_states_dim": 12, "text_states_dim_t5": 16}
TINY |= {"input_size": (8, 8), "text_len": 5, "text_len_t5": 6}


@pytest.fixture
def theirs() -> HunyuanDiT2DModel:
    """diffusers' own class with random weights, as v1.2 has it."""
    torch.manual_seed(0)
    model = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=8,
        mlp_ratio=4.3637,
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=1024,
        text_len=5,
        text_len_t5=6,
        use_style_cond_and_image_meta_size=False,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(**sizes) -> dict:
    clip_mask, t5_mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5]), torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6])
    return {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "timestep": torch.tensor([5.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "text_embedding_mask": clip_mask,
        "encoder_hidden_states_t5": torch.randn(2, 6, 16),
        "text_embedding_mask_t5": t5_mask,
        "image_rotary_emb": rotary_tables(4, 6, 16),
    }


@torch.no_grad()
def test_weights_of_diffusers_load_and_give_its_numbers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = HunyuanDiT(**TINY).eval()
    load_weights(ours, tmp_path)
    arguments = inputs()
    torch.testing.assert_close(ours(**arguments).sample, theirs(**arguments).sample, atol=1e-5, rtol=1e-4)
    controls = [torch.randn(2, 24, 32) for _ in range(3)]
    controlled = theirs(**arguments, controlnet_block_samples=list(controls)).sample
    again = ours(**arguments, controlnet_block_samples=controls).sample
    torch.testing.assert_close(again, controlled, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="there are 2 controls for 3 skips"):
        ours(**arguments, controlnet_block_samples=controls[:2])
    back = to_diffusers(to_released(ours.state_dict()))
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.slow
def test_command_converts_to_diffusers_and_back(theirs, tmp_path):
    """diffusers' folder to the released file, to ours, and to diffusers' again: the same bits."""
    theirs.save_pretrained(tmp_path / "theirs")
    for command, source, out, *more in [
        ("export", "theirs", "released.pt"),
        ("convert", "released.pt", "ours", "--model-class", "skipdit.text_to_image.HunyuanDiT"),
        ("convert", "ours", "again", "--model-class", "diffusers.HunyuanDiT2DModel"),
    ]:
        skipdit_command("weights")([command, str(tmp_path / source), str(tmp_path / out), *more])
    again = HunyuanDiT2DModel.from_pretrained(tmp_path / "again")
    differ = {name for name, value in theirs.config.items() if name[0] != "_" and again.config[name] != value}
    assert differ == {"sample_size", "mlp_ratio"}  # which leave no trace, or less than all
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    HunyuanDiT(**TINY, skip=False).save_pretrained(tmp_path / "plain")
    with pytest.raises(SystemExit):
        skipdit_command("weights")(
            ["convert", str(tmp_path / "plain"), str(tmp_path / "no"), "--model-class", "diffusers.HunyuanDiT2DModel"]
        )


@torch.no_grad()
def test_text_once_per_run_is_the_text_of_every_step():
    model, arguments = HunyuanDiT(**TINY).eval(), inputs()
    expected = model(**arguments).sample
    text = model.encode_text(*(arguments.pop(name) for name in model.text_arguments))
    assert torch.equal(model(**arguments, encoder_hidden_states=text).sample, expected)


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


@torch.no_grad()
@pytest.mark.parametrize("styled", [False, True])
def test_cached_forward_is_the_forward_of_diffusers(styled):
    """Of v1.1 too, with its style and sizes, and with controls."""
    sizes = {"hidden_size": 32, "num_layers": 8, "cross_attention_dim": 12, "cross_attention_dim_t5": 16}
    sizes |= {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "patch_size": 2, "sample_size": 8}
    model = HunyuanDiT2DModel(**sizes, text_len=5, text_len_t5=6, use_style_cond_and_image_meta_size=styled).eval()
    arguments, controls = inputs(), [torch.randn(2, 24, 32) for _ in range(3)]
    if styled:
        arguments |= {"image_meta_size": torch.tensor([[64.0, 96, 64, 96, 0, 0]] * 2), "style": torch.tensor([0, 0])}
    for given in (None, controls):
        wanted = model(**arguments, controlnet_block_samples=given and list(given)).sample
        assert torch.equal(cached_forward(model, **arguments, controlnet_block_samples=given).sample, wanted)
    with pytest.raises(ValueError, match="there are 2 controls for 3 skips"):
        cached_forward(model, **arguments, controlnet_block_samples=controls[:2])


class Pipe:
    """As much of a pipeline as a cache looks at."""

    def __init__(self, transformer):
        self.transformer, self.scheduler = transformer, DDIMScheduler()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("spec", ["N2-700-50", "N3-900-50-b2-o1"])
def test_unmodified_diffusers_model_caches_like_ours(theirs, tmp_path, spec):
    """`enable_cache` on a pipeline with diffusers' own transformer, or with ours of the same weights: equal latents."""
    theirs.save_pretrained(tmp_path)
    ours = HunyuanDiT(**TINY).eval()
    load_weights(ours, tmp_path)
    arguments, latents, caches = inputs(), {}, {}
    x = arguments.pop("hidden_states")
    arguments.pop("timestep")
    for name, model in {"theirs": theirs, "ours": ours}.items():
        for cached in ("none", spec):
            pipe = Pipe(model)
            cache = enable_cache(pipe, cached)
            latents[name, cached] = loop(pipe, x, arguments)
            caches[name, cached] = cache.run
            disable_cache(pipe)
    assert_rounding(latents["theirs", spec], latents["ours", spec])
    assert_rounding(latents["theirs", "none"], latents["ours", "none"])
    assert not torch.allclose(latents["ours", spec], latents["ours", "none"], atol=1e-4)
    assert caches["theirs", spec].ran == caches["ours", spec].ran and caches["theirs", spec].cached_steps > 2
    assert "forward" not in vars(theirs) and not theirs._forward_pre_hooks
    pipe = Pipe(theirs)
    assert torch.equal(loop(pipe, x, arguments), latents["theirs", "none"])


@torch.no_grad()
@pytest.mark.parametrize("first", ["offload", "cache"])
def test_offloading_stays_whichever_comes_first(theirs, first):
    """accelerate moves weights around the model's own `forward`; that inside of it is what the cache replaces."""
    pipe, given, moved = Pipe(theirs), inputs(), []
    expected = theirs(**given).sample

    class Move(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            moved.append(1)
            return args, kwargs

    if first == "cache":
        enable_cache(pipe, "N2-700-50")
    add_hook_to_module(theirs, Move())
    enable_cache(pipe, "N3-700-50")
    step = CacheStep(1, None)
    assert torch.equal(theirs(**given, cache=step).sample, expected) and step.kept_feature is not None
    disable_cache(pipe)
    assert torch.equal(theirs(**given).sample, expected)
    with pytest.raises(TypeError, match="cache"):
        theirs(**given, cache=step)
    assert len(moved) == 3
    remove_hook_from_module(theirs)
    assert torch.equal(theirs(**given).sample, expected) and len(moved) == 3


@torch.no_grad()
def test_other_wrappers_come_after_the_cache(theirs):
    pipe, given = Pipe(theirs), inputs()
    expected = theirs(**given).sample
    enable_cache(pipe, "N2-700-50")
    theirs.forward = partial(theirs.forward)
    disable_cache(pipe)
    assert torch.equal(theirs(**given).sample, expected)  # of the wrapper, and inside of it what computes the same
    enable_cache(pipe, "N2-700-50")
    theirs(**given, cache=CacheStep(1, None))


def test_what_wraps_a_forward_in_an_unknown_way_is_refused(theirs):
    theirs.forward = partial(theirs.forward)
    with pytest.raises(ValueError, match="forward is wrapped, by group offloading perhaps: call enable_cache before"):
        enable_cache(Pipe(theirs), "N2-700-50")


def loop(pipe, x: torch.Tensor, arguments: dict) -> torch.Tensor:
    """What a pipeline does."""
    pipe.scheduler.set_timesteps(10)
    for t in pipe.scheduler.timesteps:
        noise = pipe.transformer(hidden_states=x, timestep=t.float().expand(2), **arguments).sample[:, :4]
        x = pipe.scheduler.step(noise, t, x).prev_sample
    return x
