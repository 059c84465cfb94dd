"""Full and cached passes compile without graph breaks, twice per shape at most, and never read the device back."""

import pytest
import torch
from conftest import NoReadBack, tiny_dit
from torch._dynamo.testing import CompileCounterWithBackend

from skipdit import SkipCache
from skipdit.diffusion.gaussian import Diffusion
from skipdit.sampling.class_conditional import generate
from skipdit.utils.seeding import generators


def run(model, spec, labels=(1, 2), steps=10, **kwargs):
    noise = generators(0, range(len(labels)), "cpu")
    return generate(model, torch.tensor(labels), noise, steps=steps, sampler="ddim", cache=spec, **kwargs)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["N2-1000-20-b2", "N3-1000-20-o1"])
def test_two_graphs_and_no_breaks(spec):
    model, backend = tiny_dit(), CompileCounterWithBackend("eager")
    expected = run(model, spec)
    model.compile(fullgraph=True, backend=backend)
    torch.testing.assert_close(run(model, spec), expected)
    assert backend.frame_count == 2
    run(model, spec, steps=17)  # other timesteps, another plan: the same graphs
    assert backend.frame_count == 2
    run(model, spec, labels=(1, 2, 3))  # another shape: two more at the most
    assert backend.frame_count <= 4


@pytest.mark.slow
def test_uncached_is_one_graph():
    model, backend = tiny_dit(), CompileCounterWithBackend("eager")
    model.compile(fullgraph=True, backend=backend)
    run(model, "none")
    run(model, "none", steps=7)
    assert backend.frame_count == 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("spec", ["none", "N2-1000-20", "N3-1000-20-o1"])
def test_no_step_waits_for_the_device(sampler, spec, monkeypatch):
    monkeypatch.setattr("skipdit.sampling.class_conditional.require_finite", lambda *_: None)  # after the last step
    model, diffusion, labels = tiny_dit(), Diffusion(8), torch.tensor([1, 2])
    cache, noise = SkipCache(spec, diffusion.sampling_timesteps), generators(0, range(2), "cpu")
    with NoReadBack():
        generate(model, labels, noise, steps=8, sampler=sampler, cache=cache)


def test_the_read_back_check_can_fail():
    with pytest.raises(AssertionError, match="reads the device back"), NoReadBack():
        torch.ones(1).item()
