"""Objectives of a training: the released one as it was, min-SNR weights, flow matching."""

import pytest
import torch
from conftest import short_training, stats, tiny_dit, train_flow

from skipdit.checkpoints.loading import load_weights
from skipdit.class_to_image import sample as sampler
from skipdit.class_to_image.train import Config, train
from skipdit.config import ConfigError, changed
from skipdit.data.settings import ImageData
from skipdit.diffusion.gaussian import Diffusion
from skipdit.training.objective import make_objective
from skipdit.training.settings import TrainConfig
from skipdit.training.steps import Draw

X0 = torch.randn(256, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def draws(step: int = 0) -> Draw:
    return Draw(0, step, range(len(X0)), len(X0), torch.device("cpu"))


@pytest.fixture
def config(tmp_path, vae_folder, image_folder):
    model = sampler.ModelConfig(patch_size=2, hidden_size=32, depth=4, num_heads=2, num_classes=3, skip=True)
    data = ImageData(path=str(image_folder), image_size=8)
    return Config(out=str(tmp_path / "run"), vae=str(vae_folder), model=model, data=data, train=short_training())


def sampling(config, weights, **more) -> sampler.Config:
    places = {"weights": str(weights), "vae": config.vae, "out": config.out + "-samples", "model": config.model}
    return sampler.Config(**places, **{"image_size": 8, "num_samples": 3, "steps": 6, "guidance_scale": 2.0} | more)


def test_the_released_objective_is_bit_equal():
    """Its numbers are drawn in the order in which they always were."""
    diffusion, draw, out = Diffusion(), draws(), torch.randn(256, 8, 4, 4)
    t, noise = draw.randint(1000), draw.randn(4, 4, 4)
    noised = make_objective(TrainConfig())(X0, draws())
    assert torch.equal(noised.t, t) and torch.equal(noised.x, diffusion.q_sample(X0, t, noise))
    assert torch.equal(noised.losses(out), diffusion.losses(out, X0, noised.x, t, noise)["loss"])


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_min_snr_weighs_the_error_of_x0(prediction):
    diffusion, t, noise = Diffusion(prediction=prediction), torch.tensor([3, 300, 900]), torch.randn(3, 4, 4, 4)
    x0, out = X0[:3], torch.randn(3, 8, 4, 4)
    x = diffusion.q_sample(x0, t, noise)
    signal = diffusion.coefficient("signal", t, t)
    error = (diffusion.pred_x0(out, x, t) - x0).square().flatten(1).mean(1)
    weighted = diffusion.losses(out, x0, x, t, noise, 5.0)
    torch.testing.assert_close(weighted["mse"], (signal / (1 - signal)).clamp(max=5) * error, rtol=1e-3, atol=0)
    plain = diffusion.losses(out, x0, x, t, noise)
    assert torch.equal(weighted["vb"], plain["vb"]) and weighted["mse"][0] < 0.01 * plain["mse"][0]


@pytest.mark.parametrize(("times", "shift"), [("uniform", 1.0), ("logit-normal", 1.0), ("logit-normal", 3.0)])
def test_flow_matching_draws_times_and_its_loss_is_that_of_velocity(times, shift):
    noised = make_objective(TrainConfig(objective="flow", flow_times=times, flow_shift=shift))(X0, draws())
    t = noised.t / 1000
    assert t.min() > 0 and t.max() < 1
    assert t.median().item() == pytest.approx(shift / (1 + shift), abs=0.06)
    assert t.std().item() == pytest.approx(
        {"uniform": 0.289, "logit-normal": 0.208 if shift == 1 else 0.18}[times], abs=0.02
    )
    noise = (noised.x - (1 - t)[:, None, None, None] * X0) / t[:, None, None, None]
    right = torch.cat([noise - X0, torch.randn_like(X0)], dim=1)
    assert noised.losses(right).max() < 1e-4 < noised.losses(right + 1).min()


@pytest.mark.slow
def test_flow_matching_trains_resumes_samples_and_caches(config, tmp_path):
    weights, run = train_flow(config, train, tmp_path), config.out
    for source, method in ((weights, "heun"), (run, "dpm"), (weights, "euler")):
        own = changed(config, {"out": str(tmp_path / method)})
        cached = sampling(own, source, sampler=method, cache="N2-1000-0", guidance_low=100)
        assert sampler.sample(cached)["steps"]["cached"] == (5 if method == "heun" else 3)
    with pytest.raises(ValueError, match="by flow matching, which 'ddpm' does not sample"):
        sampler.sample(sampling(config, weights, sampler="ddpm"))


@pytest.mark.slow
def test_weights_without_a_word_of_it_are_of_diffusion(config, tmp_path):
    train(config)
    with pytest.raises(
        ValueError, match="solver is 'euler', for models trained by flow matching, and this one was not; known: dpm"
    ):
        sampler.sample(sampling(config, config.out, sampler="euler"))
    model = tiny_dit(num_classes=3, flow_shift=2.0)
    load_weights(model, config.out)
    assert model.flow_shift is None


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"objective": "flow"}, {"min_snr": 5.0}])
def test_losses_fall(config, settings):
    own = {f"train.{name}": value for name, value in (settings | {"steps": 60, "lr": 3e-3}).items()}
    train(changed(config, own))
    losses = [line["loss"] for line in stats(config)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"objective": "v"}, "objective is 'v'; known: diffusion, flow"),
        ({"flow_times": "cosine"}, "flow_times is 'cosine'; known: logit-normal, uniform"),
        ({"objective": "flow", "min_snr": 5.0}, "objective=flow has no such weights: set min_snr=0"),
        ({"flow_shift": 0.0}, "flow_shift is 0; it should be 0.01 or more"),
    ],
)
def test_bad_settings_are_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        TrainConfig(**settings)
