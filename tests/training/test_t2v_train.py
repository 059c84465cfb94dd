"""The text-to-video trainer: two stages on captioned clips, resumed, from files and on the fly."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import CLIP_CAPTIONS as CAPTIONS
from conftest import assert_equal, skipdit_command, state, stats, train_flow
from torch import nn
from transformers import T5EncoderModel

from skipdit.checkpoints.files import saved
from skipdit.checkpoints.loading import load_weights
from skipdit.config import ConfigError, changed, load_config
from skipdit.data.texts import LiveTexts
from skipdit.data.video import read_mp4
from skipdit.encoders.text import load_text_encoder
from skipdit.text_to_video import LatteT2V, sample_t2v
from skipdit.text_to_video.train import ModelConfig, make_loss, train
from skipdit.training.steps import Draw

encode = skipdit_command("encode")
encode_text = skipdit_command("encode-text")


@pytest.fixture
def config(training_config):
    return training_config("text-to-video")


@pytest.mark.slow
@pytest.mark.parametrize("fuse", ["replace", "residual"])
def test_both_stages_end_to_end(config, tmp_path, released_t2v, fuse):
    """A plain model; stage 1, only its skips; stage 2, everything. The result samples in the released layout."""
    config = changed(config, {"out": str(tmp_path / "plain"), "model.skip": False, "train.sample_every": 4})
    train(config)
    assert (tmp_path / "plain/samples/0000004.gif").exists()
    captions = (tmp_path / "plain/samples/captions.txt").read_text().splitlines()
    assert captions == [*CAPTIONS, "cut off"]  # nobody has found out yet that the last clip is broken
    plain = state(config)["ema"]

    config = changed(
        config, {"out": str(tmp_path / "stage1"), "init": str(tmp_path / "plain"), "train.sample_every": 0}
    )
    config = changed(config, {"model.skip": True, "model.fuse": fuse})
    config = changed(config, {"train.freeze": True})
    train(config)
    first = state(config)["ema"]
    new = {name for name in first if not (name in plain and torch.equal(first[name], plain[name]))}
    assert new == first.keys() - plain.keys()
    assert {name.split(".")[0] for name in new} <= {"skip_norms", "skip_linears", "skips"}

    config = changed(config, {"out": str(tmp_path / "stage2"), "init": str(tmp_path / "stage1"), "train.freeze": False})
    trained = train(config)
    assert all(not torch.equal(tensor, first[name]) for name, tensor in state(config)["ema"].items())

    shutil.copytree(released_t2v / "Latte-0", tmp_path / "pipeline")
    trained.save_config(tmp_path / "pipeline/transformer")
    sampling = {
        "weights": str(tmp_path / "stage2"),
        "pipeline": str(tmp_path / "pipeline"),
        "out": str(tmp_path / "out"),
    }
    sample_t2v.sample(sample_t2v.Config(**sampling, prompts=["a dog"], num_frames=4, height=16, width=16, steps=2))
    assert read_mp4(tmp_path / "out/000000-a-dog.mp4").shape == (4, 3, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["euler", "heun"])
def test_flow_matching_trains_resumes_and_samples(config, tmp_path, released_t2v, scheduler):
    shutil.copytree(released_t2v / "Latte-0", tmp_path / "pipeline")
    config = changed(config, {"model.folder": None})
    weights = train_flow(config, train, tmp_path)
    trained = LatteT2V.from_config(torch.load(weights.parent / "run/checkpoints/0000004.pt")["config"])
    trained.save_config(tmp_path / "pipeline/transformer")
    places = {"weights": str(weights), "pipeline": str(tmp_path / "pipeline"), "out": str(tmp_path / "out")}
    sizes = {"num_frames": 4, "height": 16, "width": 16, "prompts": ["a dog"], "steps": 4, "cache": "N2-1000-0"}
    report = sample_t2v.sample(sample_t2v.Config(**places, **sizes, scheduler=scheduler))
    assert report["steps"]["cached"] == (3 if scheduler == "heun" else 2)
    with pytest.raises(ValueError, match="was trained by flow matching, which 'ddim' does not sample; choose euler"):
        sample_t2v.sample(sample_t2v.Config(**places, **sizes, scheduler="ddim"))


@pytest.mark.slow
def test_files_of_latents_and_texts_train_like_clips_and_captions(config, captioned_clips, tmp_path, monkeypatch):
    """What `encode` and `encode-text` wrote gives the losses of the clips and captions themselves."""
    config = changed(config, {"data.flip": False})
    shutil.copytree(captioned_clips, tmp_path / "clips")
    (tmp_path / "clips/5.mp4").unlink()  # the encoder leaves a broken clip out, and the order changes
    lines = (tmp_path / "clips/captions.jsonl").read_text().splitlines()[:5]
    (tmp_path / "clips/captions.jsonl").write_text("\n".join(lines))
    config = changed(
        config, {"data.path": str(tmp_path / "clips"), "data.captions": str(tmp_path / "clips/captions.jsonl")}
    )
    train(config)
    live = [line["loss"] for line in stats(config)]

    arguments = [
        "--data",
        "videos",
        "--path",
        config.data.path,
        "--captions",
        config.data.captions,
        "--image-size",
        "8",
    ]
    arguments += ["--vae", config.vae, "--out", str(tmp_path / "latents"), "--workers", "0"]
    monkeypatch.setattr("sys.argv", ["encode", *arguments])
    encode()
    config = changed(config, {"data.kind": "latents", "data.path": str(tmp_path / "latents"), "data.captions": None})
    (tmp_path / "run.yaml").write_text(f"data: {{kind: latents, path: {tmp_path / 'latents'}, num_frames: 4}}\n")
    encode_text([str(tmp_path / "run.yaml"), "--text-encoder", config.text_encoder, "--out", str(tmp_path / "texts")])
    config = changed(
        config, {"texts": str(tmp_path / "texts"), "text_encoder": "nowhere/at/all", "out": str(tmp_path / "files")}
    )
    train(config)
    assert [line["loss"] for line in stats(config)] == pytest.approx(live, rel=2e-3)


@pytest.mark.slow
def test_broken_and_uncaptioned_clips_are_listed(config):
    config = changed(config, {"train.steps": 12})
    train(config)
    listed = (Path(config.out) / "broken_files.txt").read_text().splitlines()
    assert len(listed) == 2
    assert "5.mp4: Invalid data found" in listed[0] and "line 7: the caption of 6.mp4 is empty" in listed[1]


class _Listener(nn.Module):
    """Keeps what it is called with."""

    def forward(self, x, t, text, mask, use_image_num, return_dict):
        self.x, self.text, self.mask = x, text, mask
        return (torch.cat([x, x], dim=1),)


def test_captions_reach_their_pictures(config, captioned_clips):
    """Every clip and every image has the tokens of its own caption, or the empty one's under the same mask."""
    texts = LiveTexts(load_text_encoder(config.text_encoder), CAPTIONS)
    rows, model, config = 64, _Listener(), changed(config, {"data.latents": "mean"})
    labels, others = torch.arange(rows) % 5, torch.stack([torch.arange(rows) % 3, torch.arange(rows) % 2], dim=1)
    batch = {"mean": torch.zeros(rows, 6, 2, 4, 2, 2), "label": labels, "image_label": others}
    config = changed(config, {"caption_dropout": 0.3})
    make_loss(config, None, texts)(model, batch, Draw(0, 0, range(rows), rows, torch.device("cpu")))
    wanted = torch.cat([labels[:, None], others], dim=1)
    kept, mask = texts.take(wanted, torch.zeros(rows, 3, dtype=torch.bool))
    null, _ = texts.take(wanted, torch.ones(rows, 3, dtype=torch.bool))
    assert model.x.shape == (rows, 4, 6, 2, 2)
    assert torch.equal(model.mask, mask)
    dropped = (model.text == null).all(-1).all(-1)
    assert torch.equal(model.text, torch.where(dropped[..., None, None], null, kept))
    assert 0.2 < dropped.float().mean() < 0.4
    assert not torch.equal(dropped[:, 0], dropped[:, 1])


@pytest.mark.slow
def test_released_folder_gives_the_model(config, released_t2v, tmp_path):
    """Stage 1 as for the released model: config.json and weights of a transformer folder."""
    plain = LatteT2V.from_config(LatteT2V.load_config(released_t2v / "Latte-0/transformer"), skip=False)
    plain.save_pretrained(tmp_path / "transformer")
    config = changed(
        config, {"model": ModelConfig(folder=str(tmp_path / "transformer")), "init": str(tmp_path / "transformer")}
    )
    config = changed(config, {"train.freeze": True})
    trained = train(config)
    assert trained.config.sample_size == 4 and trained.n_skips == 2
    config = changed(config, {"out": config.out + "-large", "data.image_size": 16})
    with pytest.raises(ValueError, match=r"for 4 frames of 4 latent pixels; the data has 4 of 8 .*data.image_size"):
        train(config)


@pytest.mark.slow
def test_another_text_encoder_is_refused(config, text_folder, tmp_path):
    """By a run that goes on; but the encoder, like the data, may have moved."""
    train(config)
    shutil.copytree(text_folder, tmp_path / "moved")
    config = changed(config, {"text_encoder": str(tmp_path / "moved/text_encoder"), "train.steps": 5})
    train(config)
    other = T5EncoderModel.from_pretrained(config.text_encoder)
    torch.nn.init.normal_(other.shared.weight)
    other.save_pretrained(config.text_encoder)
    config = changed(config, {"train.steps": 6})
    with pytest.raises(ValueError, match="text_fingerprint: "):
        train(config)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"data.captions": None}, "the clips have no captions; set data.captions"),
        ({"model.caption_channels": 12}, "they have 16 channels, the model takes 12"),
        ({"data.image_size": 9}, "image_size 9 is not a multiple of the autoencoder's factor 2"),
        ({"data.image_size": 10}, "image_size makes latents of 5 pixels a side, which patches of 2"),
        (
            {"data.captions": "nowhere.jsonl", "text_encoder": "nowhere/else/t5"},
            r"missing: data.captions=nowhere.jsonl, nowhere/else/t5/config.json",
        ),
        ({"texts": "nowhere/texts"}, "missing: texts=nowhere/texts"),
    ],
)
def test_what_does_not_fit_is_named(config, settings, complaint):
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        train(changed(config, settings))


def test_stage_1_weights_load_as_released(config, tmp_path):
    config = changed(config, {"model.skip": True})
    trained = train(config)
    again = LatteT2V.from_config(trained.config)
    load_weights(again, config.out)
    assert_equal(dict(again.state_dict()), dict(trained.state_dict()))


@pytest.mark.slow
def test_what_the_weights_do_not_tell_is_recorded(config, tmp_path, capsys):
    """Heads, side of the latents and frames of a run, which `convert` and `export` have to write down; of weights that
    say nothing `convert` warns.
    """
    trained, latte = train(config), ["--model-class", "skipdit.text_to_video.LatteT2V"]
    skipdit_command("weights")(["convert", config.out, str(tmp_path / "folder"), *latte])
    again = LatteT2V.from_pretrained(tmp_path / "folder")
    names = ("num_attention_heads", "sample_size", "video_length")
    assert [again.config[name] for name in names] == [2, 4, 4] == [trained.config[name] for name in names]
    capsys.readouterr()
    skipdit_command("weights")(["export", config.out, str(tmp_path / "told.pt")])
    told, command = capsys.readouterr().out.splitlines()
    assert told == f"the weights are in {tmp_path / 'told.pt'}; to sample from them:"
    assert command == f'  skipdit sample --task text-to-video weights={tmp_path / "told.pt"} --prompt "WHAT TO SHOW"'
    skipdit_command("weights")(["convert", str(tmp_path / "told.pt"), str(tmp_path / "again"), *latte])
    assert LatteT2V.load_config(tmp_path / "again") == LatteT2V.load_config(tmp_path / "folder")
    torch.save({"ema": torch.load(tmp_path / "told.pt")["ema"]}, tmp_path / "bare.pt")
    capsys.readouterr()
    skipdit_command("weights")(["export", str(tmp_path / "bare.pt"), str(tmp_path / "bare.safetensors")])
    assert capsys.readouterr().out == f"{tmp_path / 'bare.safetensors'}\n"  # their sampler wants a config
    with pytest.warns(UserWarning, match=r"nothing in .*bare\.pt tells sample_size 64, video_length 16, as released"):
        skipdit_command("weights")(
            ["convert", str(tmp_path / "bare.pt"), str(tmp_path / "guess"), "--num-heads", "2", *latte]
        )


@pytest.mark.slow
def test_a_run_samples_without_a_pipeline(config, tmp_path):
    config = changed(config, {"model.fuse": "residual", "train.steps": 1})
    train(config)
    sizes = ["steps=2", "prompts=[a dog]", f"out={tmp_path / 'out'}"]
    sampling = load_config(sample_t2v.Config, None, [f"weights={config.out}", *sizes])
    assert (sampling.pipeline, sampling.num_frames, sampling.fuse) == (None, 4, "residual")
    sample_t2v.sample(sampling)
    assert read_mp4(tmp_path / "out/000000-a-dog.mp4").shape[0] == 4
    file = saved(tmp_path / "run/checkpoints")[-1].rename(tmp_path / "alone.pt")
    with pytest.raises(ConfigError, match=r"^without a pipeline, vae and text_encoder must be set: a folder or Hub"):
        sample_t2v.sample(load_config(sample_t2v.Config, None, [f"weights={file}", "pipeline=null", *sizes]))
    texts = [f"vae={config.vae}", f"text_encoder={config.text_encoder}", "pipeline=null"]
    torch.save({"ema": torch.load(file)["ema"]}, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"bare.pt says nothing of its model's sizes: set pipeline to a folder that"):
        sample_t2v.sample(load_config(sample_t2v.Config, None, [f"weights={tmp_path / 'bare.pt'}", *texts, *sizes]))
