"""Respacing, posterior, samplers and losses give the released code's numbers, and closed forms where there are some."""

import math

import pytest
import torch
from conftest import assert_close
from diffusers import DDPMScheduler

from skipdit.diffusion.gaussian import Diffusion, discretized_log_likelihood, normal_kl, respace
from skipdit.diffusion.samplers import ddim, ddpm


@pytest.fixture
def case(golden):
    return golden("diffusion_0")


def toy_model(case):
    """out = W x (1 + 0.3 cos(t / 100)), as the golden file's metadata says."""
    weight = case.tensors["model/W"]

    def model(x, t, i=0):
        return torch.einsum("oc,nchw->nohw", weight, x) * (1 + 0.3 * torch.cos(t.float() / 100)).view(-1, 1, 1, 1)

    return model


@pytest.mark.parametrize("steps", ["10", "50", "250", "ddim25"])
def test_respacing(case, steps):
    assert respace(steps) == case.case["spacings"][steps]


@pytest.mark.parametrize("steps", [0, 1001, "ddim300"])
def test_impossible_spacing_is_refused(steps):
    with pytest.raises(ValueError, match="steps"):
        respace(steps)


@pytest.mark.parametrize(("steps", "k"), [(10, 0), (10, 1), (10, 5), (10, 9), (250, 0), (250, 1), (250, 5), (250, 249)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_posterior(case, steps, k, as_tensor):
    diffusion, x = Diffusion(steps), case.inputs["x"]
    out = toy_model(case)(x, torch.full((len(x),), diffusion.timesteps[k]))
    p = diffusion.posterior(out, x, torch.full((len(x),), k) if as_tensor else k)
    expected = {name: case.outputs[f"p/{steps}/{k}/{name}"] for name in ("mean", "log_variance", "pred_xstart")}
    scale = max(1.0, expected["pred_xstart"].abs().max().item())  # x0 at t = 999 is in the hundreds
    assert_close(p.mean, expected["mean"], 1e-4 * scale)
    assert_close(p.log_variance, expected["log_variance"])
    assert_close(p.pred_x0, expected["pred_xstart"], 1e-4 * scale)


@pytest.mark.parametrize("steps", [10, 250])
def test_ddim(case, steps):
    sample, expected = ddim(toy_model(case), case.inputs["x"], Diffusion(steps)), case.outputs[f"ddim/{steps}"]
    # The toy model diverges to values near 2,000, where neighbouring float32 numbers are 2.4e-4 apart.
    assert_close(sample, expected, 1e-4 * max(1.0, expected.abs().max().item()))


def test_losses(case):
    diffusion, t = Diffusion(), case.inputs["t"]
    x = diffusion.q_sample(case.inputs["x0"], t, case.inputs["noise"])
    assert_close(x, case.outputs["q_sample"])
    losses = diffusion.losses(toy_model(case)(x, t), case.inputs["x0"], x, t, case.inputs["noise"])
    for name, value in losses.items():
        assert_close(value, case.outputs[f"loss/{name}"])


def test_vb_does_not_train_the_noise():
    diffusion, t = Diffusion(), torch.tensor([0, 500])
    out, x0 = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 4, 4, 4)
    noise = torch.randn_like(x0)
    diffusion.losses(out, x0, diffusion.q_sample(x0, t, noise), t, noise)["vb"].sum().backward()
    assert out.grad[:, :4].abs().max() == 0
    assert out.grad[:, 4:].abs().max() > 0


def test_normal_kl_closed_form():
    kl = normal_kl(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0), torch.tensor(math.log(4.0)))
    assert kl.item() == pytest.approx(math.log(2) + (1 + 1) / 8 - 0.5)


def test_discretized_likelihood_sums_to_one():
    pixels = torch.arange(256) / 127.5 - 1
    log_likelihood = discretized_log_likelihood(pixels, torch.tensor(0.1), torch.tensor(-1.0))
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_ddpm_with_the_true_model_samples_the_data():
    """Data N(3, 0.5^2): the optimal noise prediction is known, and 1000 ancestral steps must give the data back."""
    diffusion, mean, std = Diffusion(), 3.0, 0.5

    def model(x, t, i):
        signal = diffusion._tables["signal"][t].float().view(-1, 1, 1, 1)
        noise = (1 - signal).sqrt() * (x - signal.sqrt() * mean) / (signal * std**2 + 1 - signal)
        return torch.cat([noise, torch.zeros_like(noise)], dim=1)

    x = ddpm(model, torch.randn(500, 1, 4, 4), diffusion, torch.Generator().manual_seed(1))
    assert x.mean().item() == pytest.approx(mean, abs=0.03)
    assert x.std().item() == pytest.approx(std, abs=0.03)


def test_callback_sees_every_step():
    seen = []
    ddim(
        lambda x, t, i: torch.cat([x, x], 1),
        torch.randn(1, 4, 2, 2),
        Diffusion(7),
        callback=lambda i, x, x0: seen.append(i),
    )
    assert seen == list(range(7))


def test_v_prediction_on_scaled_betas_is_that_of_diffusers():
    diffusion = Diffusion(beta_start=0.00085, beta_end=0.02, scaled=True, prediction="v")
    settings = {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear", "clip_sample": False}
    scheduler = DDPMScheduler(**settings, prediction_type="v_prediction", variance_type="learned_range")
    x0, noise, fraction = torch.randn(3, 3, 4, 8, 8)
    t = torch.tensor([1, 500, 999])
    x, v = diffusion.q_sample(x0, t, noise), diffusion.target(x0, t, noise)
    assert_close(x, scheduler.add_noise(x0, noise, t))
    assert_close(v, scheduler.get_velocity(x0, noise, t))
    out = torch.cat([v, fraction], dim=1)
    assert_close(diffusion.pred_x0(out, x, t), x0)
    losses = diffusion.losses(out, x0, x, t, noise)
    assert losses["mse"].max() < 1e-10 and (losses["vb"] > 0).all()
    p = diffusion.posterior(out, x, t)
    for i, step in enumerate(t.tolist()):
        scheduler.set_timesteps(1000)
        generator = torch.Generator().manual_seed(i)
        drawn = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        after = scheduler.step(out[i : i + 1], step, x[i : i + 1], generator=generator).prev_sample
        assert_close(p.mean[i] + (p.log_variance[i] / 2).exp() * drawn[0], after[0])


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="prediction is 'x0'"):
        Diffusion(prediction="x0")
