"""Looking inside a model: its layers seen and replaced by one function, and nothing of it left behind."""

import pytest
import torch
from conftest import tiny_dit, tiny_hunyuan, tiny_latte, tiny_latte_t2v
from torch import Tensor

from skipdit.caching.steps import CacheStep
from skipdit.layers.inspect import layers_run_by
from skipdit.layers.skip import SkipTransformer, skip_stack

MODELS = [tiny_dit(), tiny_dit(skip=False), tiny_latte(), tiny_latte_t2v(), tiny_hunyuan()]
IDS = ["DiT", "plain", "Latte", "LatteT2V", "HunyuanDiT"]


def output(model: SkipTransformer, inputs: dict, cache: CacheStep | None = None) -> Tensor:
    out = model(**inputs, cache=cache)
    return out if isinstance(out, Tensor) else out.sample


@pytest.mark.parametrize("model", MODELS, ids=IDS)
@torch.no_grad()
def test_layers_are_watched(model):
    inputs, seen = model.random_inputs(2), []

    def stack(x: Tensor, *, block, **how) -> Tensor:
        def watched(i: int, x: Tensor) -> Tensor:
            seen.append((i, block(i, x)))
            return seen[-1][1]

        return skip_stack(x, block=watched, **how)

    reference, held = output(model, inputs), dict(vars(model))
    with layers_run_by(model, stack):
        assert torch.equal(output(model, inputs), reference)
    assert [i for i, _ in seen] == list(range(model.depth)) and vars(model) == held
    with layers_run_by(model, stack):  # the step of a cache comes with the rest
        output(model, inputs, step := CacheStep(1, None))
    start, end = seen[model.depth][1], seen[-2][1]  # of the middle layers, in this second pass
    assert torch.equal(step.kept_feature, end if model.n_skips else end - start)


@pytest.mark.parametrize("model", MODELS, ids=IDS)
@torch.no_grad()
def test_layers_are_replaced(model):
    inputs = model.random_inputs(2)
    reference = output(model, inputs)
    with layers_run_by(model, lambda x, **_: x):
        assert not torch.equal(output(model, inputs), reference)
    assert torch.equal(output(model, inputs), reference)


def test_what_breaks_off_leaves_nothing():
    model = tiny_dit()
    held = dict(vars(model))

    def stack(x: Tensor, **_) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), layers_run_by(model, stack):
        model(**model.random_inputs(1))
    assert vars(model) == held
