"""Long skips in plain models of diffusers."""

import copy
import inspect
import pickle

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines.tiny import BUILDERS, build
from torch import Tensor, nn
from torch.nn import functional as F

from skipdit import add_long_skips, enable_cache, with_long_skips
from skipdit.layers.skip import LongSkip
from skipdit.pipelines.blocks import layers_of
from skipdit.pipelines.denoiser import denoisers
from skipdit.training.steps import set_trainable

KNOWN = [name for name in BUILDERS if all(layers_of(model) for model in denoisers(build(name)[0]))]
KNOWN.remove("Flux2Pipeline")  # whose later blocks take texts and image in one
SHOWN = ["PixArtAlphaPipeline", "LattePipeline"]


def run(pipe, call: dict) -> Tensor:
    torch.manual_seed(4)  # what encodes the image of a ControlNet draws from
    return torch.as_tensor(pipe(**call, generator=torch.Generator().manual_seed(1))[0])


def wake(model: nn.Module) -> nn.Module:
    """Give its skips weights."""
    torch.manual_seed(2)
    for skip in model.skips:
        nn.init.normal_(skip.delta.weight, std=0.2)
    return model


@pytest.fixture(params=SHOWN)
def model(request) -> nn.Module:
    return build(request.param)[0].transformer


def predict(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    size = (2, 4, 4, 4, 4) if "video_length" in model.config else (2, 4, 4, 4)
    call = {"timestep": torch.tensor([1, 2]), "encoder_hidden_states": torch.randn(2, 4, 16)}
    if "added_cond_kwargs" in inspect.signature(model.forward).parameters:
        call["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return model(torch.randn(size), **call, return_dict=False)[0]


def loss_of(model: nn.Module) -> Tensor:
    return F.mse_loss(predict(model), torch.ones(()).expand_as(predict(model)))


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_every_model_computes_what_it_did_until_its_skips_learn(name):
    pipe, call = build(name)
    expected = run(pipe, call)
    for model in denoisers(pipe):
        add_long_skips(model)
    assert torch.equal(run(pipe, call), expected)
    for model in denoisers(pipe):
        wake(model)
    assert run(pipe, call).isfinite().all() and not torch.equal(run(pipe, call), expected)


def test_skips_join_the_outer_blocks(model):
    """Against the same model, whose blocks are joined by hand."""
    by_hand, blocks = copy.deepcopy(model), "transformer_blocks"
    wake(add_long_skips(model))
    kept = {}
    for i in range(2):
        first, last = getattr(by_hand, blocks)[i], getattr(by_hand, blocks)[3 - i]
        first.register_forward_hook(lambda _, args, output, i=i: kept.update({i: output}))
        skip = model.skips[1 - i]
        last.register_forward_pre_hook(lambda _, args, i=i, skip=skip: (skip(args[0], kept[i]), *args[1:]))
    assert len(model.skips) == 2
    assert torch.allclose(predict(model), predict(by_hand), atol=1e-6)


def test_the_first_stage_trains_the_skips_alone(model):
    start = loss_of(model)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    add_long_skips(model)
    assert torch.equal(loss_of(model), start)
    set_trainable(model, {"skips.*": True, "*": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model) < 0.98 * start
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.items())
    assert {name.split(".")[0] for name in set(state) - set(plain)} == {"skips"}


def test_checkpointed_gradients_are_the_same(model):
    wake(add_long_skips(model)).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        predict(model).square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any("skips" in name for name in grads[0])
    for name, grad in grads[0].items():
        assert torch.allclose(grads[1][name], grad, rtol=1e-4, atol=1e-7), name


def test_checkpointed_forward_passes_are_not_mixed_up(model):
    """Gradients through the skips of another pass would be wrong, and nobody would see it."""
    wake(add_long_skips(model)).train()
    model.enable_gradient_checkpointing()
    first, second = predict(model), predict(model.requires_grad_())
    assert torch.equal(first, second)
    second.sum().backward()  # of equal passes, either will do
    first.sum().backward()
    first = predict(model)
    nn.init.ones_(model.caption_projection.linear_1.bias)
    second = predict(model)
    with pytest.raises(RuntimeError, match=r"call backward\(\) before the next forward pass"):
        (first + second).sum().backward()
    predict(model).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KNOWN if "ControlNet" not in name])
def test_cached_steps_use_the_skips(name):
    pipe, call = build(name)
    for model in denoisers(pipe):
        wake(add_long_skips(model))
    expected = run(pipe, call)
    enable_cache(pipe, "N1-1000-0")
    assert torch.equal(run(pipe, call), expected)
    calls: list[int] = []
    for model in denoisers(pipe):
        for skip in model.skips:
            skip.register_forward_hook(lambda *_: calls.append(0))
    run(pipe, call)
    full_run, n_skips = len(calls), len(model.skips)
    calls.clear()
    cache = enable_cache(pipe, "N2-1000-0")
    result = run(pipe, call)
    assert result.isfinite().all() and not torch.equal(result, expected)
    counts = cache.run.counts()
    steps = sum(counts.values())
    assert counts["cached"] == 2 and len(calls) == full_run * (steps - 2) // steps + full_run * 2 // (steps * n_skips)


def test_the_stored_feature_takes_the_place_of_the_middle(model):
    """As in the paper: what enters the last layer is the stored feature, joined with what is fresh."""
    wake(add_long_skips(model, n_skips=1))
    last, skip = model.transformer_blocks[-1], model.skips[0]
    seen = []
    skip.register_forward_pre_hook(lambda _, args: seen.append(args))
    name = "LattePipeline" if hasattr(model, "temporal_transformer_blocks") else "PixArtAlphaPipeline"
    pipe, call = build(name)
    pipe.transformer = model
    assert type(last).__name__ == "BasicTransformerBlock"
    enable_cache(pipe, "N5-1000-0")
    run(pipe, call)
    features, fresh = zip(*seen, strict=True)
    assert all(torch.equal(feature, features[0]) for feature in features)
    assert not any(torch.equal(each, fresh[0]) for each in fresh[1:])


@pytest.mark.slow
def test_copies_and_compiled_models_have_skips_of_their_own(model):
    wake(add_long_skips(model))
    expected, copied = predict(model), copy.deepcopy(model)
    nn.init.zeros_(model.skips[0].delta.weight)
    assert torch.equal(predict(copied), expected) and not torch.equal(predict(model), expected)
    assert torch.allclose(predict(torch.compile(copied, fullgraph=True, backend="eager")), expected, atol=1e-6)


def test_saved_skips_load(model, tmp_path):
    expected = predict(wake(add_long_skips(model)))
    torch.save(model.skips.state_dict(), tmp_path / "skips.pt")
    again = add_long_skips(copy.deepcopy(build(SHOWN["Latte" in type(model).__name__])[0].transformer))
    again.skips.load_state_dict(torch.load(tmp_path / "skips.pt"))
    assert torch.equal(predict(again), expected)


def test_models_are_saved_with_their_skips(model, tmp_path):
    plain = type(model)
    expected = predict(wake(add_long_skips(model, n_skips=1)))
    model.save_pretrained(tmp_path / "model")
    again = with_long_skips(plain).from_pretrained(tmp_path / "model")
    assert isinstance(again, plain) and len(again.skips) == 1
    torch.testing.assert_close(predict(again), expected)
    with pytest.raises(OSError, match="no file named"):  # rather than a model without its skips
        plain.from_pretrained(tmp_path / "model")
    pickled = pickle.loads(pickle.dumps(model))
    assert torch.equal(predict(pickled), expected)
    nn.init.zeros_(model.skips[0].delta.weight)
    assert torch.equal(predict(pickled), expected)


def test_pipelines_are_saved_with_the_skips(tmp_path):
    pipe, call = build("PixArtAlphaPipeline")
    pipe.transformer = wake(add_long_skips(pipe.transformer))  # the pipeline notes the class of what it is given
    expected = run(pipe, call)
    enable_cache(pipe, "N2-1000-0")
    pipe.save_pretrained(tmp_path)
    missing = {name: None for name, part in pipe.components.items() if part is None}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **missing)
    torch.testing.assert_close(run(loaded, call), expected)
    enable_cache(loaded, "N2-1000-0")
    torch.testing.assert_close(run(loaded, call), run(pipe, call))


def test_what_cannot_be_joined_is_refused():
    model = build("PixArtAlphaPipeline")[0].transformer
    with pytest.raises(ValueError, match="n_skips is 3; PixArtTransformer2DModel has 4 layers, so it takes 1 to 2"):
        add_long_skips(model, 3)
    with pytest.raises(ValueError, match="has long skips already"):
        add_long_skips(add_long_skips(model))
    with pytest.raises(TypeError, match="the blocks of SanaTransformer2DModel are not known"):
        add_long_skips(build("SanaPipeline")[0].transformer)
    pipe, call = build("PixArtAlphaPipeline")
    with pytest.raises(TypeError, match=r"not of a PixArtAlphaPipeline: give pipe.transformer"):
        add_long_skips(pipe)
    enable_cache(pipe, "N2-1000-0")
    with pytest.raises(ValueError, match=r"call disable_cache\(pipe\) first"):
        add_long_skips(pipe.transformer)
    pipe, call = build("Flux2Pipeline")
    add_long_skips(pipe.transformer)
    with pytest.raises(ValueError, match="skips cannot join the blocks of this model"):
        run(pipe, call)
    assert not any(isinstance(module, LongSkip) for module in build("SanaPipeline")[0].transformer.modules())
