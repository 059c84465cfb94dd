"""Class-to-video as users run it: training on real video files, sampling, processes, interruption, compiling."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    NoReadBack,
    skipdit_command,
    state,
    stats,
    tiny_latte,
    train_flow,
)
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

from skipdit import SkipCache
from skipdit.checkpoints.loading import load_weights
from skipdit.checkpoints.released import to_released
from skipdit.class_to_video import Latte
from skipdit.class_to_video import sample as sampler
from skipdit.class_to_video.sample import sample
from skipdit.class_to_video.train import make_loss, train
from skipdit.config import changed, load_config, to_yaml
from skipdit.data.video import read_mp4
from skipdit.diffusion.gaussian import Diffusion
from skipdit.layers.flops import step_flops
from skipdit.sampling.class_conditional import generate
from skipdit.training.steps import Draw
from skipdit.utils.seeding import generators
from skipdit.utils.video import contact_sheet, side_by_side, write_gif, write_mp4

convert = skipdit_command("weights")

TINY = {"patch_size": 2, "hidden_size": 32, "depth": 8, "num_heads": 2, "num_classes": 5, "skip": True}


@pytest.fixture
def training(training_config):
    return training_config("class-to-video")


@pytest.fixture
def sampling(sampling_config):
    return sampling_config("class-to-video")


@pytest.mark.slow
def test_flow_matching_trains_resumes_and_samples(training, tmp_path, vae_folder):
    """Clips with images beside them; the sampler knows by the weights alone."""
    weights = train_flow(training, train, tmp_path)
    places = {"weights": str(weights), "vae": str(vae_folder), "out": str(tmp_path / "out"), "image_size": 8}
    run = {"num_frames": 4, "num_samples": 2, "steps": 6, "sampler": "unipc", "guidance_scale": 2.0}
    report = sample(sampler.Config(**places, **run, cache="N2-1000-0", model=training.model))
    assert report["steps"] == {"full": 3, "cached": 3, "forecast": 0}
    with pytest.raises(ValueError, match="by flow matching, which 'ddim' does not sample"):
        sample(sampler.Config(**places, **run | {"sampler": "ddim"}, model=training.model))


@pytest.mark.slow
def test_loss_falls(training):
    training = changed(training, {"train.steps": 60, "train.lr": 3e-3})
    train(training)
    losses = [line["loss"] for line in stats(training)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    listed = (Path(training.out) / "broken_files.txt").read_text().splitlines()
    assert len(listed) == 1
    assert "class0/3.mp4" in listed[0]


@pytest.mark.slow
def test_accumulated_gradients_are_the_same(training, tmp_path):
    train(training)
    whole, training = stats(training), changed(training, {"out": str(tmp_path / "accumulated")})
    training = changed(training, {"train.micro_batch_size": 1, "train.gradient_checkpointing": True})
    train(training)
    for a, b in zip(whole, stats(training), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


class _Listener(torch.nn.Module):
    """A model that notes what the loss asks of it."""

    def forward(self, x, t, y, y_image, use_image_num):
        self.x, self.t, self.y, self.y_image = x, t, y, y_image
        return torch.cat([x, x], dim=2)


def listen(training, rows=64) -> _Listener:
    """What the model gets for a batch of latents that are 1, and 2 where they are flipped, almost without noise."""
    mean = torch.stack([torch.ones(rows, 6, 4, 2, 2), torch.full((rows, 6, 4, 2, 2), 2.0)], dim=2)
    batch = {"mean": mean, "label": torch.zeros(rows).long(), "image_label": torch.tensor([[1, 2]] * rows)}
    draw = Draw(0, 0, range(rows), rows, torch.device("cpu"))
    draw.randint = lambda high: torch.zeros(rows, dtype=torch.long)
    draw.randn = lambda *shape: torch.zeros(rows, *shape)
    model, training = _Listener(), changed(training, {"data.latents": "mean"})
    make_loss(training, None)(model, batch, draw)
    return model


def test_a_clip_is_flipped_as_a_whole_and_images_by_themselves(training):
    x = listen(training).x[..., 0, 0, 0].round()  # (N, 4 frames + 2 images)
    assert (x[:, :4] == x[:, :1]).all()
    patterns = {tuple(row) for row in x[:, [0, 4, 5]].tolist()}
    assert len(patterns) == 8
    training = changed(training, {"data.flip": False})
    assert (listen(training).x.round() == 1).all()


def test_labels_are_dropped_one_by_one(training):
    training = changed(training, {"label_dropout": 0.5})
    model, null = listen(training), training.model.num_classes
    assert set(model.y.tolist()) == {0, null}
    assert {tuple(row) for row in model.y_image.tolist()} == {(1, 2), (null, 2), (1, null), (null, null)}
    training = changed(training, {"label_dropout": 0.0})
    model = listen(training)
    assert model.y.eq(0).all()
    assert model.y_image.eq(torch.tensor([1, 2])).all()


def test_stage_1_trains_the_skips_only(training, tmp_path):
    """Onto a plain Latte; with the skips of the outer pair only."""
    plain = tiny_latte(num_classes=3, skip=False)
    torch.save({"ema": to_released(plain.state_dict())}, tmp_path / "plain.pt")
    training = changed(training, {"init": str(tmp_path / "plain.pt"), "train.freeze": True, "model.n_skips": 1})
    train(training)
    trained = state(training)["model"]
    for name, tensor in to_released(plain.state_dict()).items():
        assert torch.equal(trained[name], tensor), name
    assert {name for name in trained if name.startswith("skip_")} == {
        *("skip_norms.0.weight", "skip_norms.0.bias", "skip_linears.0.linear.weight", "skip_linears.0.linear.bias")
    }


@pytest.mark.slow
def test_unconditional_training(training):
    training = changed(training, {"model.num_classes": None, "data.labelled": False})
    train(training)
    assert "y_embedder.embedding_table.weight" not in state(training)["model"]


@pytest.mark.parametrize("change", [{"labelled": False}, {"classes": []}])
def test_classes_that_do_not_fit_are_named(training, change):
    if "labelled" in change:
        training = changed(training, {"data.labelled": False})
    else:
        training = changed(training, {"model.num_classes": 2})
    with pytest.raises(ValueError, match=r"has [03] classes and the model [23]: set model\.num_classes"):
        train(training)


@pytest.mark.slow
def test_outputs_and_report(sampling):
    report = sample(sampling)
    folder = Path(sampling.out)
    for i in range(5):
        assert read_mp4(folder / f"{i:06d}.mp4").shape == (4, 3, 8, 8)
        assert Image.open(folder / f"{i:06d}.gif").n_frames == 4
    assert Image.open(folder / "preview.gif").n_frames == 4
    assert Image.open(folder / "sheet.png").size == (4 * 10 + 2, 5 * 10 + 2)
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["steps"] == {"full": 3, "cached": 3, "forecast": 0}, Diffusion(6).sampling_timesteps
    assert report["cache_bytes"] == 4 * 4 * 4 * 32 * 4  # two clips, with guidance four rows, of four frames and tokens
    assert report["flops_per_step"]["cached"] < report["flops_per_step"]["full"]


def clips(folder) -> torch.Tensor:
    return torch.stack([read_mp4(path) for path in sorted(Path(folder).glob("0*.mp4"))]).float()


@pytest.mark.slow
def test_gifs_may_be_asked_for_later(sampling):
    sampling = changed(sampling, {"gif": False})
    sample(sampling)
    assert not list(Path(sampling.out).glob("0*.gif"))
    sample(changed(sampling, {"gif": True}))
    assert len(list(Path(sampling.out).glob("0*.gif"))) == 5


@pytest.mark.slow
def test_gif_shows_its_clip(sampling):
    """Also if it was there before the clip: without its clips, a folder is free for other settings."""
    gif, sampling = Path(sampling.out) / "000000.gif", changed(sampling, {"num_samples": 1})
    sample(sampling)
    first, written = gif.read_bytes(), gif.stat().st_mtime_ns
    sample(sampling)
    assert gif.stat().st_mtime_ns == written
    (Path(sampling.out) / "000000.mp4").unlink()
    sampling = changed(sampling, {"seed": 1})
    sample(sampling)
    assert gif.read_bytes() != first


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"classes": [5]}, r"class ids \[5\] are out of range; this model knows 0 .. 4"),
        ({"num_frames": 5}, r"temp_embed is \(1, 4, 32\), the model has \(1, 5, 32\)"),
        ({"cache": "N2-900-49-b3"}, "cache branch 3 is larger than the model's number of skips, 2"),
        ({"fps": 0.0}, "fps is 0; it should be 0.01 to 1000"),
        ({"fps": -8.0}, "fps is -8"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"weights": "nowhere/a.pt"}, r"missing: weights=nowhere/a\.pt; `skipdit download class-to-video`"),
    ],
)
def test_bad_input_is_named(sampling, change, complaint):
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        sample(changed(sampling, change))


@pytest.mark.slow
def test_unconditional_model(sampling, tmp_path):
    torch.save({"ema": to_released(tiny_latte(extras=1).state_dict())}, tmp_path / "tiny.pt")
    sampling = changed(sampling, {"model.num_classes": None})
    with pytest.raises(ValueError, match=r"guidance_scale is 4\.0, and the model is unconditional"):
        sample(sampling)
    sampling = changed(sampling, {"guidance_scale": 1.0})
    assert sample(sampling)["steps"] == {"full": 3, "cached": 3, "forecast": 0}


@pytest.mark.parametrize(
    ("arguments", "spec"),
    [([], "N2-900-49"), (["--cache"], "N2-900-49"), (["--deepcache", "3"], "N3-900-49"), (["--cache", "none"], "none")],
)
def test_command_lines_of_the_original(sampling, tmp_path, monkeypatch, arguments, spec):
    (tmp_path / "config.yaml").write_text(to_yaml(sampling))
    seen = []
    monkeypatch.setattr(sampler, "sample", seen.append)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--config", str(tmp_path / "config.yaml"), *arguments])
    sampler.main()
    assert seen[0].cache == spec


def test_conversion(sampling, tmp_path, capsys):
    """A Latte is converted as what it is; as a DiT it is refused with its name."""
    with pytest.raises(SystemExit):
        dit = ["--model-class", "skipdit.class_to_image.DiT", "--num-heads", "2"]
        convert(["convert", sampling.weights, str(tmp_path / "folder"), *dit])
    assert "the weights of a class-to-video Latte, not of a DiT" in capsys.readouterr().err
    convert(["convert", sampling.weights, str(tmp_path / "folder"), "--num-heads", "2"])
    model = Latte.from_pretrained(tmp_path / "folder")
    assert load_weights(model, sampling.weights) == []
    assert (model.config.num_frames, model.config.extras, model.n_skips) == (4, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("extras", [1, 2])
def test_two_graphs_without_breaks_or_read_backs(extras, monkeypatch):
    """Both kinds of step compile with fullgraph; no step waits for the device."""
    torch._dynamo.reset()
    model, backend = tiny_latte(extras=extras), CompileCounterWithBackend("eager")
    labels = torch.tensor([1, 2]) if extras == 2 else None

    def run(spec, steps=10):
        noise = generators(0, range(2), "cpu")
        return generate(model, labels, noise, steps=steps, sampler="ddim", guidance_channels=None, cache=spec)

    expected = run("N2-900-49-o1")
    monkeypatch.setattr("skipdit.sampling.class_conditional.require_finite", lambda *_: None)  # after the last step
    with NoReadBack():
        run(SkipCache("N2-900-49-o1", Diffusion(10).sampling_timesteps))
    model.compile(fullgraph=True, backend=backend)
    torch.testing.assert_close(run("N2-900-49-o1"), expected)
    run("N2-900-49-o1", steps=17)
    assert backend.frame_count == 2
    torch._dynamo.reset()


def test_cached_step_is_its_share_of_the_flops():
    """One pair of four at either end, one skip: counted, not timed."""
    model = tiny_latte()
    flops = step_flops(model, batch=2)
    tokens, d = 2 * 4 * 4, 32
    pair = 2 * tokens * (2 * 12 * d * d) + 2 * 2 * tokens * d * (
        4 + 4
    )  # linear layers; attention in 4 tokens, 4 frames
    skip = 2 * tokens * 2 * d * d
    modulation = 2 * 2 * 6 * d * d  # of one block, for two clips
    assert flops["full"] - flops["cached"] == pytest.approx(2 * pair + skip + 4 * modulation)


def test_media_round_trip(tmp_path):
    film = torch.zeros(5, 3, 16, 24, dtype=torch.uint8)
    film[:, 0] = torch.arange(0, 250, 50, dtype=torch.uint8)[:, None, None]
    write_mp4(tmp_path / "film.mp4", film, fps=8)
    assert (read_mp4(tmp_path / "film.mp4").float() - film).abs().mean() < 3
    write_gif(tmp_path / "film.gif", film, fps=8)
    with Image.open(tmp_path / "film.gif") as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (5, 120, 0)
        gif.seek(4)
        assert abs(np.array(gif.convert("RGB"))[0, 0, 0].astype(int) - 200) < 3
    assert contact_sheet([film, film], columns=3).shape == (3, 2 * 18 + 2, 3 * 26 + 2)
    assert side_by_side([film, film, film], columns=2).shape == (5, 3, 2 * 18 + 2, 2 * 26 + 2)


@pytest.mark.slow
def test_a_run_says_what_its_samples_are(training, tmp_path):
    train(changed(training, {"train.steps": 1}))
    config = load_config(sampler.Config, None, [f"weights={training.out}", "steps=2", "num_samples=1"])
    assert (config.num_frames, config.image_size, config.model) == (4, 8, training.model)
    sampler.sample(changed(config, {"out": str(tmp_path / "out")}))
    assert (tmp_path / "out/000000.mp4").exists()
