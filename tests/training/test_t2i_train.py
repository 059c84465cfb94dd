"""The text-to-image trainer: two stages on captioned pictures of several shapes, resumed, pre-encoded, and LoRA."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import PICTURE_CAPTIONS as CAPTIONS
from conftest import TOKENS, assert_equal, skipdit_command, state, stats, train_flow
from diffusers import AutoencoderKL
from torch import nn
from torchvision.io import read_image
from transformers import BertModel

from skipdit.checkpoints.files import load_state
from skipdit.checkpoints.loading import load_weights
from skipdit.config import changed, load_config
from skipdit.data.settings import PictureData
from skipdit.data.texts import LiveTexts
from skipdit.diffusion.gaussian import Diffusion
from skipdit.encoders.reading import CLIP, T5
from skipdit.encoders.text import load_text_encoder
from skipdit.text_to_image import HunyuanDiT, sample_t2i
from skipdit.text_to_image.settings import NEGATIVE
from skipdit.text_to_image.train import Config, make_loss, train
from skipdit.training.steps import Draw

encode = skipdit_command("encode")
encode_text = skipdit_command("encode-text")


@pytest.fixture
def config(training_config):
    return training_config("text-to-image")


def sample(config: Config, hunyuan_folder: Path, weights: Path, out: Path, **more) -> torch.Tensor:
    settings = {"weights": str(weights), "vae": config.vae, "pipeline": str(hunyuan_folder), "out": str(out)}
    places = {"text_encoder": config.clip.encoder, "text_encoder_2": config.t5.encoder}
    sizes = {"height": 16, "width": 32, "steps": 2, "guidance_scale": 2.0}
    sample_t2i.sample(sample_t2i.Config(**settings, **places, **sizes, **more, prompts=["a dog"]))
    return read_image(str(out / "000000-a-dog.png"))


@pytest.mark.slow
@pytest.mark.parametrize("fuse", ["replace", "residual"])
def test_both_stages_end_to_end(config, tmp_path, hunyuan_folder, fuse):
    """A backbone without skips; stage 1, only its skips; stage 2, everything. The result samples."""
    config = changed(config, {"out": str(tmp_path / "plain"), "model.skip": False, "train.sample_every": 4})
    train(config)
    grid = read_image(str(tmp_path / "plain/samples/0000004.png"))
    assert grid.shape[0] == 3 and grid.shape[2] > 4 * 16
    assert (tmp_path / "plain/samples/captions.txt").read_text().splitlines()[:2] == CAPTIONS[:2]
    plain = state(config)["ema"]
    losses = stats(config)

    config = changed(
        config, {"out": str(tmp_path / "stage1"), "init": str(tmp_path / "plain"), "train.sample_every": 0}
    )
    config = changed(config, {"model.skip": True, "model.fuse": fuse})
    config = changed(config, {"train.freeze": True})
    train(config)
    first = state(config)["ema"]
    assert all(torch.equal(first[name], tensor) for name, tensor in plain.items())
    new = first.keys() - plain.keys()
    assert len(new) == 2 * 4 and all("skip" in name for name in new)

    config = changed(config, {"out": str(tmp_path / "stage2"), "init": str(tmp_path / "stage1"), "train.freeze": False})
    train(config)
    second = state(config)["ema"]
    still = {name for name, tensor in second.items() if torch.equal(tensor, first[name])}
    assert still == set() and len(losses) == 4
    assert sample(config, hunyuan_folder, tmp_path / "stage2", tmp_path / "out").shape == (3, 16, 32)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["euler", "dpm"])
def test_flow_matching_trains_resumes_and_samples(config, tmp_path, hunyuan_folder, scheduler):
    weights = train_flow(config, train, tmp_path)
    more = {"scheduler": scheduler, "cache": "N2-1000-0"}
    assert sample(config, hunyuan_folder, weights, tmp_path / "out", **more).shape == (3, 16, 32)
    with pytest.raises(ValueError, match="was trained by flow matching, which 'ddpm' does not sample; choose euler"):
        sample(config, hunyuan_folder, weights, tmp_path / "out")


@pytest.mark.slow
def test_encoded_files_train_the_same(config, captioned_pictures, tmp_path):
    """Latents and texts made once, against both on the fly; neither text encoder is there then."""
    lines = (captioned_pictures / "captions.jsonl").read_text().splitlines()[: len(CAPTIONS)]
    (tmp_path / "good.jsonl").write_text("\n".join(lines))  # the encoder leaves out broken ones: another order
    config = changed(config, {"data.latents": "mean", "data.captions": str(tmp_path / "good.jsonl")})
    train(config)
    losses = [line["loss"] for line in stats(config)]
    data = config.data
    encode_to(tmp_path / "latents", config)
    (tmp_path / "run.yaml").write_text(
        f"data:\n  kind: pictures\n  path: {data.path}\n  captions: {data.captions}\n  buckets: [16x16, 16x24]\n"
    )
    for role, part in {"clip": config.clip, "t5": config.t5}.items():
        encode_text([
            *(str(tmp_path / "run.yaml"), "--text-encoder", part.encoder, "--out", str(tmp_path / role)),
            *("--role", role, "--max-tokens", str(TOKENS)),
        ])  # fmt: skip
        config = changed(config, {f"{role}.files": str(tmp_path / role), f"{role}.encoder": None})
    config = changed(
        config,
        {
            "data": PictureData(
                kind="latents", path=str(tmp_path / "latents"), image_size=16, buckets=data.buckets, latents="mean"
            )
        },
    )
    config = changed(config, {"out": str(tmp_path / "encoded")})
    train(config)
    assert [line["loss"] for line in stats(config)] == pytest.approx(
        losses, rel=2e-3
    )  # they are kept in half precision


def encode_to(out: Path, config: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [
            *("encode", "--data", "pictures", "--path", config.data.path, "--captions", config.data.captions),
            *("--image-size", "16", "--buckets", *config.data.buckets, "--latents", config.data.latents),
            *("--vae", config.vae, "--out", str(out), "--workers", "0"),
        ])  # fmt: skip
        encode()


@pytest.fixture
def both(hunyuan_folder) -> list[LiveTexts]:
    """The captions by the CLIP and by the T5."""
    readings = {"text_encoder": CLIP._replace(max_tokens=TOKENS), "text_encoder_2": T5._replace(max_tokens=TOKENS)}
    return [
        LiveTexts(load_text_encoder(str(hunyuan_folder / name), reading=reading), CAPTIONS)
        for name, reading in readings.items()
    ]


class Recorder(nn.Module):
    """Stands for the model and keeps what it was called with."""

    def forward(self, x, t, *texts, image_rotary_emb, return_dict):
        self.x, self.t, self.texts, self.rotary = x, t, texts, image_rotary_emb
        return (torch.zeros(len(x), 8, *x.shape[2:]),)


def test_loss_reads_texts_sizes_and_drops_either_by_itself(config, both):
    recorder, rows = Recorder(), 400
    model = HunyuanDiT((4, 4), **config.model.given())
    batch = {"mean": torch.randn(rows, 2, 4, 4, 6), "std": torch.rand(rows, 2, 4, 4, 6)}
    batch["label"] = torch.arange(rows) % len(CAPTIONS)
    loss = make_loss(config, None, *both, model)(recorder, batch, Draw(0, 0, range(rows), rows, torch.device("cpu")))
    assert loss.shape == (rows,) and recorder.x.shape == (rows, 4, 4, 6)
    assert [table.shape for table in recorder.rotary] == [(6, 16), (6, 16)]  # 2 x 3 patches
    shares = []
    for texts, (embeddings, mask) in zip(both, (recorder.texts[:2], recorder.texts[2:]), strict=True):
        kept, _ = texts.take_whole(batch["label"], torch.zeros(rows, dtype=torch.bool))
        dropped = (embeddings != kept).flatten(1).any(1)
        assert torch.equal(embeddings[dropped], texts.null.float().expand(int(dropped.sum()), -1, -1))
        assert (mask[dropped] == texts.null_mask).all()
        shares.append(dropped)
    assert all(0.13 < dropped.float().mean() < 0.27 for dropped in shares)
    assert 0.01 < (shares[0] & shares[1]).float().mean() < 0.08


def test_loss_is_of_the_noise_that_the_sampler_takes_away(config, both):
    """Noisy latents, and the v to predict, are those of the sampler's scheduler."""
    config = changed(config, {"data.latents": "mean", "data.flip": False})
    model = HunyuanDiT((4, 4), **config.model.given())
    batch = {"mean": torch.randn(6, 2, 4, 4, 4), "label": torch.arange(6)}
    draw, recorder = Draw(0, 0, range(6), 6, torch.device("cpu")), Recorder()
    loss = make_loss(config, None, *both, model)(recorder, batch, draw)
    again = Draw(0, 0, range(6), 6, torch.device("cpu"))
    again.rand(), again.rand(2)
    t, noise, x0 = again.randint(1000), again.randn(4, 4, 4), batch["mean"][:, 0]
    scheduler = sample_t2i.make_scheduler("ddpm")
    assert torch.equal(recorder.t, t)
    torch.testing.assert_close(recorder.x, scheduler.add_noise(x0, noise, t))
    v = scheduler.get_velocity(x0, noise, t)  # the recorder predicts zero
    assert (loss >= v.square().flatten(1).mean(1) - 1e-4).all()
    diffusion = Diffusion(beta_start=0.00085, beta_end=0.02, scaled=True, prediction="v")
    torch.testing.assert_close(diffusion.losses(torch.zeros(6, 8, 4, 4), x0, recorder.x, t, noise)["loss"], loss)


def test_residual_stream_is_float32_in_mixed_precision(config, monkeypatch):
    model, dtypes, run = HunyuanDiT((8, 8), **config.model.given()), set(), HunyuanDiT._run
    monkeypatch.setattr(HunyuanDiT, "_run", lambda self, *args: dtypes.add(args[1].dtype) or run(self, *args))
    with torch.autocast("cpu", torch.bfloat16):
        model(**model.random_inputs(2, encoded=False))
    assert dtypes == {torch.float32}


def test_gradient_checkpointing_changes_no_gradient(config):
    model = HunyuanDiT((8, 8), **config.model.given()).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs, gradients = model.random_inputs(2, encoded=False), []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(**inputs).sample.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.slow
def test_lora_trains_adapters_and_merges_them(config, tmp_path, hunyuan_folder):
    train(config)
    base = state(config)["ema"]
    config = changed(config, {"init": config.out, "out": str(tmp_path / "lora"), "lora_rank": 2})
    trained = train(config)
    learning = {name for name, parameter in trained.named_parameters() if ".lora_B." in name and parameter.any()}
    assert len(learning) == 6 * 5  # Wqkv, out_proj; q_proj, kv_proj, out_proj, of every block
    merged = load_state(tmp_path / "lora/merged.pt")
    model = HunyuanDiT((4, 4), **config.model.given()).eval()
    load_weights(model, tmp_path / "lora")  # of all that lies there, what has everything
    untouched = {name for name, tensor in load_state(config.init).items() if torch.equal(tensor, merged[name])}
    assert len(merged) == len(base) and len(merged) - len(untouched) == 6 * 5
    inputs = model.random_inputs(2)
    inputs["encoder_hidden_states"] = torch.randn(2, TOKENS, 16)
    inputs |= {"encoder_hidden_states_t5": torch.randn(2, TOKENS, 16)}
    inputs |= {f"text_embedding_mask{end}": torch.ones(2, TOKENS) for end in ("", "_t5")}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, trained.eval()(**inputs).sample, atol=1e-5, rtol=1e-4)
    sample(config, hunyuan_folder, tmp_path / "lora/merged.pt", tmp_path / "out")
    for file in (tmp_path / "lora").glob("checkpoints/*4.pt"):
        file.unlink()
    train(config)  # from step 2
    assert_equal(load_state(tmp_path / "lora/merged.pt"), merged)


@pytest.mark.slow
def test_another_autoencoder_is_refused(config, tmp_path):
    """By a run that goes on; but the same one may have moved."""
    train(config)
    vae = AutoencoderKL.from_pretrained(config.vae)
    vae.save_pretrained(tmp_path / "vae")
    config = changed(config, {"vae": str(tmp_path / "vae"), "train.steps": 5})
    train(config)
    torch.nn.init.normal_(vae.decoder.conv_out.weight)
    vae.save_pretrained(tmp_path / "vae")
    config = changed(config, {"train.steps": 6})
    with pytest.raises(ValueError, match="vae_fingerprint: "):
        train(config)


@pytest.mark.slow
def test_another_text_encoder_is_refused(config, hunyuan_folder, tmp_path):
    """By a run that goes on; but the encoder, like the data, may have moved."""
    train(config)
    shutil.copytree(hunyuan_folder, tmp_path / "moved")
    config = changed(config, {"clip.encoder": str(tmp_path / "moved/text_encoder"), "train.steps": 5})
    train(config)
    other = BertModel.from_pretrained(config.clip.encoder)
    torch.nn.init.normal_(other.embeddings.word_embeddings.weight)
    other.save_pretrained(config.clip.encoder)
    config = changed(config, {"train.steps": 6})
    with pytest.raises(ValueError, match=r"clip\.fingerprint: "):
        train(config)


@pytest.mark.parametrize(
    ("section", "settings", "complaint"),
    [
        ("data", {"captions": None}, "data.captions is not set"),
        ("data", {"buckets": ["8by8"]}, "data.buckets has '8by8'"),
        ("data", {"buckets": ["9x8"]}, "9x8: 9 is not a multiple of the autoencoder's factor 2"),
        ("data", {"buckets": ["16x16", "16x18"]}, "16x18: 18 is not a multiple of the autoencoder's factor 2 times 2"),
        (
            "data",
            {"image_size": 18, "buckets": []},
            "image_size 18 is not a multiple of the autoencoder's factor 2 times 2",
        ),
        ("model", {"text_states_dim": 12}, "clip: they have 16 channels, the model takes 12"),
        ("clip", {"encoder": None}, r"set clip\.encoder, a text encoder, or clip\.files"),
        ("t5", {"encoder": "nowhere/else/t5"}, "missing: nowhere/else/t5/config.json"),
        ("t5", {"files": "nowhere/texts"}, r"missing: t5\.files=nowhere/texts"),
        (None, {"lora_rank": 4}, "lora_rank puts adapters onto `init`"),
    ],
)
def test_what_does_not_fit_is_named(config, section, settings, complaint):
    settings = {f"{section}.{name}" if section else name: value for name, value in settings.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        train(changed(config, settings))


@pytest.mark.slow
def test_the_chinese_negative_prompt_is_for_encoders_that_read_it(config):
    train(changed(config, {"train.steps": 1}))

    def negative(*overrides: str) -> str:
        return load_config(sample_t2i.Config, None, [f"weights={config.out}", *overrides]).negative_prompt

    assert negative() == NEGATIVE  # in a folder as a pipeline has it
    file = Path(config.out, "config.yaml")
    settings = file.read_text()
    assert config.clip.encoder in settings
    file.write_text(settings.replace(config.clip.encoder, "sentence-transformers/all-MiniLM-L6-v2"))
    assert (negative(), negative("negative_prompt=a cat")) == ("", "a cat")


@pytest.mark.slow
def test_a_run_samples_without_a_pipeline(config, tmp_path):
    train(changed(config, {"train.steps": 1}))
    sizes = ["steps=2", "prompts=[a dog]", f"out={tmp_path / 'out'}"]
    sampling = load_config(sample_t2i.Config, None, [f"weights={config.out}", *sizes])
    assert (sampling.height, sampling.text_encoder_2) == (16, config.t5.encoder)
    sample_t2i.sample(sampling)
    assert read_image(str(tmp_path / "out/000000-a-dog.png")).shape == (3, 16, 16)
