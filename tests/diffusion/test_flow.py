"""Flow matching: the path, its shift, its loss; solvers against the exact solution for Gaussian data."""

from itertools import pairwise

import pytest
import torch
from conftest import tiny_dit

from skipdit.class_to_image.model import DiT
from skipdit.diffusion.flow import FLOW_SOLVERS, make_flow_scheduler, path, shifted, velocity_loss
from skipdit.diffusion.samplers import make_solver, multistep
from skipdit.diffusion.schedulers import SOLVERS
from skipdit.sampling.class_conditional import generate
from skipdit.utils.seeding import generators

MEAN, STD = 0.7, 0.5  # of the data, one number


def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[noise - x0 | x_t = x], for Gaussian data."""
    residual = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2)
    return t * residual - (MEAN + (1 - t) * STD**2 * residual)


def solve(name: str, steps: int, shift: float = 1.0) -> tuple[float, int]:
    """The largest error of samples, and the number of model calls."""
    noise, calls = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1), []

    def model(x, t, i):
        calls.append(i)
        out = velocity(x, t[0].item() / 1000)
        return torch.cat([out, torch.full_like(out, 9.0)], dim=1)  # what would be the variance is not read

    x = multistep(model, noise, make_solver(name, steps, shift))
    assert calls == list(range(len(calls)))
    return (x - (MEAN + STD * noise)).abs().max().item(), len(calls)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", FLOW_SOLVERS)
def test_solvers_reach_the_exact_solution(name, shift):
    coarse, _ = solve(name, 16, shift)
    fine, calls = solve(name, 64, shift)
    assert calls == (127 if name == "heun" else 64)
    assert fine < 0.3 * coarse and fine < (0.05 if name == "euler" else 0.02)


def test_euler_is_the_plain_rule():
    x = noise = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    solver = make_solver("euler", 5, 2.0)
    times = [*(solver.timesteps / 1000).tolist(), 0.0]
    for t, following in pairwise(times):
        x = x + (following - t) * velocity(x, t)
    out = multistep(lambda x, t, i: velocity(x, t[0].item() / 1000), noise, solver)
    torch.testing.assert_close(out, x, rtol=1e-5, atol=1e-5)


def test_timesteps_of_solvers_are_exact_and_nested():
    for name in FLOW_SOLVERS:
        few, many = ({*make_solver(name, steps, 3.0).timesteps.tolist()} for steps in (7, 28))
        assert len(few) == 7 and few <= many and max(few) == pytest.approx(1000, abs=1e-2)


def test_a_model_reads_the_step_that_the_solver_takes():
    seen = []
    multistep(lambda x, t, i: seen.append(t.tolist()) or x, torch.randn(2, 1, 2, 2), make_solver("dpm", 4, 1.0))
    assert [row for row, _ in seen] == pytest.approx([1000, 750, 500, 250], abs=2e-3)


def test_shift_keeps_the_ends_and_moves_the_middle():
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert torch.equal(shifted(t, 1.0), t)
    torch.testing.assert_close(shifted(t, 3.0), torch.tensor([0.0, 0.5, 0.75, 1.0]))


def test_path_and_loss():
    x0, noise, t = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2), torch.tensor([0.25, 1.0])
    x = path(x0, noise, t)
    torch.testing.assert_close(x[0], 0.75 * x0[0] + 0.25 * noise[0])
    assert torch.equal(x[1], noise[1])
    right = torch.cat([noise - x0, torch.randn_like(x0)], dim=2)
    assert torch.equal(velocity_loss(right, x0, noise), torch.zeros(2))
    torch.testing.assert_close(velocity_loss(right + 2, x0, noise), torch.full((2,), 4.0))


@pytest.mark.parametrize("name", sorted({"ddpm", "ddim", *SOLVERS} - {*FLOW_SOLVERS}))
def test_samplers_of_noise_are_refused(name):
    model = tiny_dit()
    model.flow_shift = 1.0
    with pytest.raises(ValueError, match=f"by flow matching, which '{name}' does not sample; choose euler, heun"):
        generate(model, torch.tensor([1]), generators(0, range(1), "cpu"), sampler=name, steps=4)


def test_a_scheduler_keeps_its_kind_and_shift():
    """Pipelines and samplers make schedulers anew from their configs."""
    for name in FLOW_SOLVERS:
        scheduler = make_flow_scheduler(name, 3.0)
        again = type(scheduler).from_config(scheduler.config)
        for each in (scheduler, again):
            each.set_timesteps(6)
        assert torch.equal(again.sigmas, scheduler.sigmas) and again.init_noise_sigma == 1


@pytest.mark.parametrize("cache", ["none", "N2-1000-0", "N3-1000-0-o1", "D0.5"])
@pytest.mark.slow
def test_flow_models_sample_under_every_cache(cache):
    model = tiny_dit(flow_shift=2.0)
    noise = {"labels": torch.tensor([1, 2]), "generators": generators(0, range(2), "cpu")}
    settings = {"steps": 6, "guidance_scale": 2.0, "guidance_interval": (100, 900)}
    out = generate(model, **noise, **settings, sampler="heun" if cache == "none" else "dpm", cache=cache)
    assert out.isfinite().all()


def test_the_shift_is_kept_by_diffusers_folders(tmp_path):
    model = tiny_dit()
    assert model.flow_shift is None
    model.flow_shift = 2.5
    model.save_pretrained(tmp_path)
    assert DiT.from_pretrained(tmp_path).flow_shift == model.config["flow_shift"] == 2.5
