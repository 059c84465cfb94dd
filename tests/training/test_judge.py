"""The Fréchet distance during a training: that of `skipdit evaluate fid`, logged, and no part of what is trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Pooled, assert_equal, state
from PIL import Image

from skipdit.class_to_image import train as class_to_image
from skipdit.class_to_image.train import Config, train
from skipdit.config import changed
from skipdit.encoders.autoencoder import load_vae, pixels
from skipdit.metrics import frechet_distance
from skipdit.metrics.features import checked
from skipdit.metrics.networks import load_image_script
from skipdit.sampling.class_conditional import generate
from skipdit.utils.device import process_state
from skipdit.utils.seeding import generators


@pytest.fixture
def network(tmp_path) -> str:
    file = tmp_path / "network.pt"
    torch.jit.script(Pooled()).save(str(file))
    return str(file)


@pytest.fixture
def real(tmp_path) -> Path:
    folder = tmp_path / "real"
    folder.mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def judged(training_config, network, real) -> Config:
    asked = {"every": 2, "reference": str(real), "samples": 5, "sampling_steps": 3, "network": network}
    return changed(training_config("class-to-image"), {f"judge.{key}": value for key, value in asked.items()})


def lines(config: Config) -> list[dict]:
    return [json.loads(line) for line in Path(config.out, "judge.jsonl").read_text().splitlines()]


def test_distance_of_a_models_samples(judged, real, capsys):
    model = train(judged)
    first, last = lines(judged)
    assert (first["step"], last["step"]) == (2, 4) and first["frechet_distance"] != last["frechet_distance"]

    labels = torch.arange(5) % judged.model.num_classes
    noise = generators(judged.train.seed, range(5), model.device)
    latents = generate(model, labels, noise, sampler="ddim", steps=3, guidance_scale=1.0)
    samples = pixels(load_vae(judged.vae), latents)
    images = np.stack([np.array(Image.open(file)) for file in sorted(real.iterdir())])
    features = [Pooled()(batch.float() / 255 * 2 - 1).flatten(1) for batch in (samples, to_tensor(images))]
    assert last["frechet_distance"] == pytest.approx(frechet_distance(*features), rel=1e-3)
    assert f"step 4: the Fréchet distance of 5 images is {last['frechet_distance']:.4g}" in capsys.readouterr().out


def test_other_processes_do_not_judge(judged, monkeypatch):
    monkeypatch.setattr(class_to_image, "FrechetJudge", None)  # is not called
    monkeypatch.setattr(type(process_state()), "is_main_process", False)
    every, _ = class_to_image.make_judge(judged, load_vae(judged.vae))
    assert every == 2


def to_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.slow
def test_weights_are_the_same_without_it(judged, tmp_path):
    train(judged)
    alone = changed(judged, {"judge.every": 0, "out": str(tmp_path / "alone")})
    train(alone)
    for part in ("model", "ema", "opt"):
        assert_equal(state(judged)[part], state(alone)[part])
    assert not Path(alone.out, "judge.jsonl").exists()


def test_a_resumed_run_measures_again(judged):
    train(changed(judged, {"train.steps": 2}))
    (before,) = lines(judged)
    with Path(judged.out, "judge.jsonl").open("a") as file:  # of a step whose checkpoint was lost
        file.write('{"step": 3, "frechet_distance": 0.0}\n')
    train(judged)
    assert [line["step"] for line in lines(judged)] == [2, 4] and lines(judged)[0] == before


def test_statistics_are_of_the_network_of_fid(judged, tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"statistics.npz holds only statistics .* leave out judge.network"):
        train(changed(judged, {"judge.reference": str(tmp_path / "statistics.npz")}))


@pytest.mark.parametrize(
    ("reference", "said"), [(None, "needs judge.reference"), ("nowhere", "nowhere is neither a folder nor an .npz")]
)
def test_real_images_are_needed(judged, reference, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        train(changed(judged, {"judge.reference": reference}))


def test_samples_of_all_classes_are_needed(judged):
    with pytest.raises(ValueError, match=r"samples=2 leaves out .* model.num_classes=3 or more"):
        train(changed(judged, {"judge.samples": 2}))


def test_statistics_of_another_network_are_refused_before_the_training(judged, tmp_path, network, monkeypatch):
    monkeypatch.setattr("skipdit.metrics.networks.load_inception", lambda *_: load_image_script(network, "cpu"))
    asked = changed(judged, {"judge.reference": str(tmp_path / "statistics.npz"), "judge.network": None})
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match="do not fit each other"):
        train(asked)
    assert not Path(judged.out, "config.yaml").exists()
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(12), sigma=np.eye(12))
    train(asked)
    assert [line["step"] for line in lines(judged)] == [2, 4]


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_too_many_sampling_steps_are_refused_before_the_training(judged, objective):
    with pytest.raises(ValueError, match="1001"):
        train(changed(judged, {"judge.sampling_steps": 1001, "train.objective": objective}))
    assert not Path(judged.out, "config.yaml").exists()


def test_precision_of_samples_is_that_of_the_training_and_of_features_float32(judged, monkeypatch):
    """As of the sample grids; what is measured by the network is measured as `skipdit evaluate` does."""
    seen = []

    def noting(name, function):
        return lambda *args, **given: seen.append((name, torch.is_autocast_enabled("cpu"))) or function(*args, **given)

    monkeypatch.setattr("skipdit.class_to_image.train.generate", noting("samples", generate))
    monkeypatch.setattr("skipdit.metrics.progress.checked", noting("features", checked))
    train(changed(judged, {"train.precision": "bf16", "train.sample_every": 0}))
    assert set(seen) == {("samples", True), ("features", False)}
