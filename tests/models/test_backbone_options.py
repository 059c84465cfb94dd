"""Options that the released models lack: they come back from a file, cache, train, resume and sample."""

import pytest
import torch
from conftest import assert_equal, state, tiny_dit, tiny_latte

from skipdit.caching.policies import CacheSpec
from skipdit.caching.runtime import SkipCache
from skipdit.checkpoints.files import load_state
from skipdit.checkpoints.loading import load_weights
from skipdit.checkpoints.released import to_released
from skipdit.config import changed
from skipdit.tasks import TASKS
from skipdit.utils.errors import UserError

OPTIONS = ("qk_norm", "rms_norm", "swiglu", "rotary")


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_dit, tiny_latte])
@pytest.mark.parametrize("option", OPTIONS)
def test_option_changes_the_model_and_comes_back_from_a_file(make, option, tmp_path):
    model, released = make(**{option: True}).eval(), make().eval()
    inputs = model.random_inputs(2)
    out = model(**inputs)
    assert not torch.equal(out, released(**inputs))
    torch.save({"ema": to_released(model.state_dict())}, tmp_path / "model.pt")
    config = type(model).config_from_state(load_state(tmp_path / "model.pt"), num_heads=2)
    assert {name: config[name] for name in OPTIONS} == {name: name == option for name in OPTIONS}
    again = type(model)(**config).eval()
    load_weights(again, tmp_path / "model.pt")
    assert torch.equal(again(**inputs), out)


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_dit, tiny_latte])
def test_all_options_cache(make):
    """Full steps are untouched, cached ones run the outer layers; modulations computed ahead are the same."""
    model = make(**dict.fromkeys(OPTIONS, True)).eval()
    inputs = model.random_inputs(2)
    out, ahead = model(**inputs), model.condition(inputs["t"][:1], inputs["y"])[0]
    torch.testing.assert_close(model(inputs["x"], inputs["t"], inputs["y"], conditioning=ahead), out)
    cache = SkipCache(CacheSpec(2), [999, 500, 1])
    assert torch.equal(model(**inputs, cache=cache.at(0)), out)
    torch.testing.assert_close(model(**inputs, cache=cache.at(1)), out)  # of the same inputs: what is stored is right


@torch.no_grad()
def test_rotary_positions_tell_frames_and_places_apart():
    """Without them, and with the added positions at zero, the order of frames and of places makes no difference."""
    for rotary in (False, True):
        model = tiny_latte(rotary=rotary).eval()
        model.temp_embed.zero_()
        model.pos_embed.zero_()
        inputs = model.random_inputs(1)
        x, rest = inputs["x"], {"t": inputs["t"], "y": inputs["y"]}
        for turn in (lambda x: x.flip(1), lambda x: x.unflatten(-1, (2, 2)).flip(-2).flatten(-2)):  # frames, patches
            assert torch.allclose(turn(model(turn(x), **rest)), model(x, **rest), atol=1e-5) != rotary


def test_rotary_positions_want_heads_of_whole_quarters():
    with pytest.raises(UserError, match="multiple of 4, not 6"):
        tiny_dit(hidden_size=12, num_heads=2, rotary=True)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["class-to-image", "class-to-video"])
def test_all_options_train_resume_and_sample(task, training_config, tmp_path):
    config = changed(training_config(task), {f"model.{name}": True for name in OPTIONS})
    TASKS[task].train(config)
    whole = state(config)
    assert all(whole["config"][name] is True for name in OPTIONS)
    config = changed(config, {"out": str(tmp_path / "stopped")})
    TASKS[task].train(changed(config, {"train.steps": 2}))
    TASKS[task].train(config)
    assert_equal(whole | {"args": None}, state(config) | {"args": None})
