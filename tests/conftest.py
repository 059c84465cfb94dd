"""What the tests share: golden files, and tiny models of the real classes."""

import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Bit-equality needs the same number of threads here and in the processes started here.
os.environ["OMP_NUM_THREADS"] = os.environ.get("SKIPDIT_TEST_THREADS", "1")

import imageio.v3 as imageio
import numpy as np
import pytest
import sentencepiece
import torch
from commands import forked, started
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, DDIMScheduler, DDPMScheduler, HunyuanDiT2DModel
from PIL import Image
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

from skipdit.__main__ import main as run_command
from skipdit.checkpoints.convert import export
from skipdit.checkpoints.diffusers_layout import diffusers_config, to_diffusers
from skipdit.checkpoints.files import recorded_flow_shift
from skipdit.checkpoints.released import to_released
from skipdit.class_to_image import DiT
from skipdit.class_to_video import Latte
from skipdit.config import changed, to_yaml
from skipdit.data.settings import ClipData, ImageData, PictureData
from skipdit.tasks import TASKS
from skipdit.text_to_image import HunyuanDiT
from skipdit.text_to_image.settings import TextConfig
from skipdit.text_to_video import LatteT2V
from skipdit.training.checkpoints import latest
from skipdit.training.settings import TrainConfig
from skipdit.utils.video import write_mp4

# A background job of a shell ignores Ctrl-C, and so do the processes that it starts; those of the tests are to hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
VAE_NAME = "sdxl-vae-fp16-fix"  # its folder in the release of Hunyuan-DiT
NUMERICS = re.compile(r"torch\.equal\(|assert_(close|equal|rounding|same_images)\(|contents\(|approx\(")
CLIP_CAPTIONS = ["the red car drives", "a dog runs", "two birds fly above the quiet lake", "the cat", "a man sleeps"]
PICTURE_CAPTIONS = [
    "the red car drives",
    "a dog runs",
    "two birds fly",
    "一只小猫",
    "a man sleeps",
    "the cat",
    "the lake",
]
TOKENS = 16  # of a caption of a picture
TINY_MODEL = {"patch_size": 2, "hidden_size": 32, "num_heads": 2, "num_classes": 3, "skip": True}
SHORT_CLIPS = {"image_size": 8, "num_frames": 4, "frame_interval": 2, "images": 2}
SENTENCES = [  # what the tokenizers know
    "a small cat sleeps on the warm sofa",
    "two birds fly above the quiet lake!",
    "the red car drives through the rain",
    "children build a castle of sand",
    "a man plays the guitar in the street, and children dance around him",
    "the dog runs, waves",
]


def skipdit_command(name: str) -> Callable[[list[str] | None], None]:
    """`python -m skipdit NAME`, to call with its arguments; without them the program's own count."""

    def run(argv: list[str] | None = None) -> None:
        run_command([name, *(sys.argv[1:] if argv is None else argv)])

    return run


class Golden:
    """One golden file: `case` (its metadata), `state`, `inputs` and `outputs`."""

    def __init__(self, name: str):
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            self.case = json.loads(file.metadata()["case"])
        self.state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
        self.inputs = {k.removeprefix("in/"): v for k, v in tensors.items() if k.startswith("in/")}
        self.outputs = {k.removeprefix("out/"): v for k, v in tensors.items() if k.startswith("out/")}
        self.tensors = tensors


@pytest.fixture
def golden():
    return Golden


class Pooled(torch.nn.Module):
    """Twelve features: means over quarters of a picture, as a small trained network would give."""

    def __init__(self, work: int = 0):
        super().__init__()
        self.work = work  # products of large matrices per picture, to take time

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.work * len(x)):
            torch.mm(torch.ones(500, 500), torch.ones(500, 500))
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def tiny_dit(seed: int = 0, **overrides) -> DiT:
    """A four-block DiT on 4x4 latents whose outputs depend on all of its weights (DiT's own init predicts zero)."""
    torch.manual_seed(seed)
    config = {"input_size": 4, "patch_size": 2, "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
    return _stirred(DiT(**config | overrides))


def tiny_latte(seed: int = 0, **overrides) -> Latte:
    """A class-conditional Latte of four pairs on four frames of 4x4 latents."""
    torch.manual_seed(seed)
    config = {"input_size": 4, "patch_size": 2, "hidden_size": 32, "depth": 8, "num_heads": 2, "num_frames": 4}
    return _stirred(Latte(**config | {"num_classes": 5, "extras": 2} | overrides))


def tiny_latte_t2v(seed: int = 0, **overrides) -> LatteT2V:
    """A LatteT2V of four pairs on up to four frames of 4x4 latents, for texts of width 12."""
    torch.manual_seed(seed)
    config = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4, "cross_attention_dim": 32}
    config |= {"sample_size": 4, "caption_channels": 12, "video_length": 4}
    return _stirred(LatteT2V(**config | overrides))


def tiny_hunyuan(seed: int = 0, **overrides) -> HunyuanDiT:
    """A HunyuanDiT of eight blocks for the texts of `hunyuan_folder`."""
    torch.manual_seed(seed)
    config = {"input_size": (8, 8), "hidden_size": 32, "depth": 8, "num_heads": 2}
    config |= {"text_states_dim": 16, "text_states_dim_t5": 16}
    return _stirred(HunyuanDiT(**config | overrides))


def _stirred(model, std: float = 0.1):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Path:
    """A random autoencoder of the real class that halves 8x8 images into 4x4 latents."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """A pipeline's folder with a random T5 of width 16 in `text_encoder`, and a trained `tokenizer`."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_t5_tokenizer(folder / "tokenizer", SENTENCES)
    save_t5(folder / "text_encoder")
    return folder


@pytest.fixture(scope="session")
def hunyuan_folder(tmp_path_factory) -> Path:
    """A folder as diffusers has it for Hunyuan-DiT: a BERT in `text_encoder`, a T5 in `text_encoder_2`, of width 16."""
    folder = tmp_path_factory.mktemp("hunyuan")
    chinese = "一只小猫睡在沙发上"
    words = sorted({word.strip(",!") for sentence in SENTENCES for word in sentence.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "!", *words, *chinese, "##s"]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    save_t5_tokenizer(folder / "tokenizer_2", [*SENTENCES, chinese])
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(vocab_size=len(vocabulary), **sizes))
    _stirred(bert, 0.5).save_pretrained(folder / "text_encoder")
    save_t5(folder / "text_encoder_2")
    return folder


def save_t5_tokenizer(folder: Path, sentences: list[str]) -> None:
    """A tokenizer trained on these, in the files that a release has of it."""
    words = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 3),
        model_writer=words,
        vocab_size=100,
        hard_vocab_limit=False,
        pad_id=0,  # the special tokens of T5
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir()
    (folder / "spiece.model").write_bytes(words.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))


def save_t5(folder: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=256, d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=2, dropout_rate=0.5)
    _stirred(T5EncoderModel(config), 0.5).save_pretrained(folder)


@pytest.fixture(scope="session")
def released_t2v(tmp_path_factory, text_folder, vae_folder) -> Path:
    """Latte-0/{transformer/config.json, scheduler, vae, text_encoder, tokenizer}, and Latte-skip.pt beside it."""
    folder = tmp_path_factory.mktemp("released")
    shutil.copytree(text_folder, folder / "Latte-0")
    shutil.copytree(vae_folder, folder / "Latte-0/vae")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "block_out_channels": (32, 32)}
    AutoencoderKLTemporalDecoder(**blocks, scaling_factor=0.5).save_pretrained(folder / "Latte-0/vae_temporal_decoder")
    width = json.loads((text_folder / "text_encoder/config.json").read_text())["d_model"]
    model = tiny_latte_t2v(caption_channels=width)
    model.save_config(folder / "Latte-0/transformer")
    DDIMScheduler().save_pretrained(folder / "Latte-0/scheduler")
    torch.save({"ema": to_released(model.state_dict())}, folder / "Latte-skip.pt")
    return folder


@pytest.fixture(scope="session")
def eightfold_vae(tmp_path_factory) -> Path:
    """A random autoencoder that makes 8x8 latents of 64x64 images, as those of Hunyuan-DiT do."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=(8,) * 4, norm_num_groups=4, scaling_factor=0.5)
    folder = tmp_path_factory.mktemp("eightfold")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def released_t2i(tmp_path_factory, hunyuan_folder, eightfold_vae) -> Path:
    """ckpts/t2i as Hunyuan-DiT was released, and diffusers/ with the same weights as diffusers has them."""
    folder = tmp_path_factory.mktemp("released_t2i")
    t2i, theirs = folder / "ckpts/t2i", folder / "diffusers"
    places = {"text_encoder": "clip_text_encoder", "tokenizer": "tokenizer", "text_encoder_2": "mt5", "vae": VAE_NAME}
    for name, place in places.items():
        for target in (t2i / place, theirs / name):
            shutil.copytree(eightfold_vae if name == "vae" else hunyuan_folder / name, target)
    shutil.copytree(hunyuan_folder / "tokenizer_2", theirs / "tokenizer_2")
    shutil.copytree(hunyuan_folder / "tokenizer_2", t2i / "mt5", dirs_exist_ok=True)
    model = tiny_hunyuan()
    (t2i / "model").mkdir()
    torch.save(to_released(model.state_dict()), t2i / "model/pytorch_model_ema.pt")
    state = to_diffusers(to_released(model.state_dict()))
    transformer = HunyuanDiT2DModel(**diffusers_config(state) | {"sample_size": 8})
    transformer.load_state_dict(state)
    transformer.save_pretrained(theirs / "transformer")
    noise = {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear", "steps_offset": 1}
    DDPMScheduler(**noise, clip_sample=False, prediction_type="v_prediction").save_pretrained(theirs / "scheduler")
    index = {"_class_name": "HunyuanDiTPipeline", "requires_safety_checker": False}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "transformer": ["diffusers", "HunyuanDiT2DModel"]}
    index |= {"text_encoder": ["transformers", "BertModel"], "text_encoder_2": ["transformers", "T5EncoderModel"]}
    index |= {"tokenizer": ["transformers", "BertTokenizer"], "tokenizer_2": ["transformers", "T5Tokenizer"]}
    index |= {"scheduler": ["diffusers", "DDPMScheduler"], "safety_checker": [None, None]}
    (theirs / "model_index.json").write_text(json.dumps(index | {"feature_extractor": [None, None]}))
    return folder


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """24 pictures of random size in three classes, one of them truncated and one no picture at all."""
    generator = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "images" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        height, width = generator.integers(9, 40, 2)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    whole = (tmp_path / "images/class0/03.png").read_bytes()
    (tmp_path / "images/class0/03.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images/class1/04.png").write_text("not a picture")
    return tmp_path / "images"


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "numerics: compares what was computed, as scripts/test_matrix.sh repeats it")


def pytest_collection_modifyitems(items) -> None:
    """Mark what compares numbers, by its source: a new test is then repeated without being listed anywhere."""
    for item in items:
        if NUMERICS.search(inspect.getsource(item.function)):
            item.add_marker("numerics")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def traced(monkeypatch):
    """`torch.compile` traces, and generates no code, which takes it half a minute of a small model."""
    torch._dynamo.reset()
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, mode=None, **kwargs: compiled(model, **kwargs | {"backend": "aot_eager"})
    )
    yield
    torch._dynamo.reset()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """The golden files' criterion: largest absolute error."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error < tolerance, f"max abs error {error:.2e}"


def assert_rounding(actual: torch.Tensor, expected: torch.Tensor, units: float = 100) -> None:
    """What is equal in exact arithmetic, and is computed by calls of other shapes or in another order.

    Matrix libraries choose their kernels, and with them the order of a sum, by shape and by processor: such results
    differ in their last bits on one machine and not on the other. What runs the same calls twice is compared by
    `torch.equal` instead.

    Args:
        units: the largest error that is allowed, in units of eps of the dtype times the largest magnitude. One pass of
            a tiny model rounds by 1 to 10 of them, and a run of a dozen steps, each of which magnifies what the ones
            before it left, by up to 50. A defect is 1e-3 of the magnitude and more, which is 8,000 in float32.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    unit = torch.finfo(expected.dtype).eps * expected.abs().max().item()
    error = (actual - expected).abs().max().item()
    assert error <= units * unit, f"off by {error / unit:.0f} units of rounding, {units} are allowed"


def stats(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.out) / "stats.jsonl").read_text().splitlines()]


def state(config) -> dict:
    return latest(Path(config.out) / "checkpoints")[1]


def assert_equal(a, b, path="") -> None:
    """Two checkpoints hold the same bits."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def assert_resumes(config, train, folder: Path, changes: dict[str, Any] | None = None) -> Any:
    """A run of two steps, then two more, leaves what one of four does. Returns the config of the interrupted run.

    Args:
        changes: of settings, in that one.
    """
    train(config)
    resumed = changed(config, {"out": str(folder / "resumed"), **(changes or {})})
    for steps in (2, 4):
        train(changed(resumed, {"train.steps": steps}))
    assert_equal(state(config) | {"args": None}, state(resumed) | {"args": None})
    return resumed


def written(config) -> Path:
    """The file of a config, beside its run folder."""
    file = Path(config.out).parent / f"{Path(config.out).name}.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    return file


def run_script(config, *overrides, processes=1, task="class-to-image", script="train.py") -> tuple[int, str]:
    """The trainer or sampler as a user starts it: its exit status, and what it says."""
    file = written(config)
    command = ["python", str(ROOT / task / script), "--config", str(file), *overrides]
    return forked(shlex.join(command), file.parent, processes)


def kill_at(config, goals: Sequence[int], task="class-to-image") -> None:
    """Start the trainer again and again, and SIGKILL it as soon as it has saved each of these steps."""
    file = written(config)
    command = shlex.join(["python", str(ROOT / task / "train.py"), "--config", str(file)])
    checkpoints = Path(config.out) / "checkpoints"
    for goal in goals:
        process = started(command, file.parent)
        while process.exitcode is None and not any(int(p.stem) >= goal for p in checkpoints.glob("*.pt")):
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (checkpoints / f"{config.train.steps:07d}.pt").exists()


class NoReadBack(TorchDispatchMode):
    """Fails on every operation whose result has to travel from the device to the host."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name.split("::")[1] not in self.FORBIDDEN, f"{func} reads the device back"
        return func(*args, **(kwargs or {}))


FSDP = pytest.param(
    "fsdp",
    marks=pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on a CPU, only on GPUs"
    ),
)


def short_training(**more) -> TrainConfig:
    """Four steps of four samples, a checkpoint every other step."""
    settings = {"steps": 4, "batch_size": 4, "lr": 1e-2, "ema_decay": 0.9, "precision": "fp32", "workers": 0}
    return TrainConfig(**settings, log_every=1, save_every=2, sample_every=0, **more)


@pytest.fixture(scope="session")
def films(tmp_path_factory) -> Path:
    """Nine films of a square that moves, in three classes by its direction; one file is cut off."""
    root = tmp_path_factory.mktemp("films")
    for number in range(9):
        folder = root / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        film = np.full((12, 16, 20, 3), 20 * number, np.uint8)
        for i, frame in enumerate(film):
            y, x = (i, 4) if number % 3 == 0 else (4, i) if number % 3 == 1 else (i, i)
            frame[y : y + 4, x : x + 4] = 255
        imageio.imwrite(folder / f"{number}.mp4", film, plugin="FFMPEG", fps=8, macro_block_size=1)
    whole = (root / "class0/3.mp4").read_bytes()
    (root / "class0/3.mp4").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.fixture
def videos(films, tmp_path) -> Path:
    """A copy of `films`, to change."""
    return shutil.copytree(films, tmp_path / "videos")


@pytest.fixture(scope="session")
def captioned_clips(tmp_path_factory) -> Path:
    """Five clips of ten frames with their captions; a sixth that is cut short, a seventh without a caption."""
    folder, rng, rows = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0), []
    for number, caption in enumerate([*CLIP_CAPTIONS, "cut off", ""]):
        frames = torch.from_numpy(rng.integers(0, 256, (10, 3, 24, 32), dtype=np.uint8))
        write_mp4(folder / f"{number}.mp4", frames, fps=8)
        rows.append({"video": f"{number}.mp4", "caption": caption})
    cut = folder / "5.mp4"
    cut.write_bytes(cut.read_bytes()[:300])
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def captioned_pictures(tmp_path_factory) -> Path:
    """Seven pictures with captions, square and wide; an eighth that is cut short, a ninth without a caption."""
    folder, rng, rows = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for number, caption in enumerate([*PICTURE_CAPTIONS, "cut off", ""]):
        size = (24, 40, 3) if number % 2 else (24, 26, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": caption})
    cut = folder / "7.png"
    cut.write_bytes(cut.read_bytes()[:300])
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def training_config(request, tmp_path, vae_folder) -> Callable[[str], Any]:
    """`training_config(task)`: four steps of a tiny model of a task on real files, a checkpoint every other step."""

    def folder(name: str) -> str:
        return str(request.getfixturevalue(name))

    def sections(task: str) -> dict[str, Any]:
        if task == "class-to-image":
            data = ImageData(path=folder("image_folder"), image_size=8)
            return {"data": data, "model": {**TINY_MODEL, "depth": 4}}
        if task == "class-to-video":
            data = ClipData(path=folder("videos"), labelled=True, **SHORT_CLIPS)
            return {"data": data, "model": {**TINY_MODEL, "depth": 8}}
        if task == "text-to-video":
            model = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4, "caption_channels": 16}
            path = folder("captioned_clips")
            texts = {"text_encoder": folder("text_folder") + "/text_encoder", "text_dtype": "float32"}
            data = ClipData(path=path, captions=f"{path}/captions.jsonl", **SHORT_CLIPS)
            return texts | {"data": data, "model": model}
        path, encoders = folder("captioned_pictures"), folder("hunyuan_folder")
        data = PictureData(path=path, captions=f"{path}/captions.jsonl", image_size=16, buckets=["16x16", "16x24"])
        texts = {"text_states_dim": 16, "text_states_dim_t5": 16, "text_len": TOKENS, "text_len_t5": TOKENS}
        clip, t5 = (TextConfig(encoder=f"{encoders}/{name}") for name in ("text_encoder", "text_encoder_2"))
        model = {"hidden_size": 32, "depth": 6, "num_heads": 2, **texts}
        return {"data": data, "model": model, "clip": clip, "t5": t5, "text_dtype": "float32"}

    def make(task: str) -> Any:
        settings, given = TASKS[task].part("settings"), sections(task)
        given["model"] = settings.ModelConfig(**given["model"])
        places = {"out": str(tmp_path / "run"), "vae": str(vae_folder)}
        return settings.TrainingConfig(**places, train=short_training(), **given)

    return make


@pytest.fixture
def sampling_config(request, tmp_path, vae_folder) -> Callable[[str], Any]:
    """`sampling_config(task)`: samples of a tiny model of a task, in six steps, cached for the tasks with classes."""

    def given(task: str) -> dict[str, Any]:
        if task == "text-to-video":
            released = request.getfixturevalue("released_t2v")
            places = {"weights": str(released / "Latte-skip.pt"), "pipeline": str(released / "Latte-0")}
            return places | {"prompts": ["a dog runs", "the cat"], "num_frames": 4, "height": 16, "width": 16}
        if task == "text-to-image":
            prompts = ["一只小猫 sleeps on the warm sofa", "the dog runs"]
            places = {"pipeline": str(request.getfixturevalue("released_t2i") / "ckpts")}
            return places | {"prompts": prompts, "height": 64, "width": 64, "scheduler": "ddim"}
        places = {"weights": str(tmp_path / "tiny.pt"), "vae": str(vae_folder), "image_size": 8}
        run = places | {"num_samples": 5, "batch_size": 2, "sampler": "ddim"}
        if task == "class-to-image":
            model, own = tiny_dit(), {"cache": "N2-1000-20", "model": TINY_MODEL | {"depth": 4, "num_classes": 10}}
        else:
            own = {"cache": "N2-900-49", "num_frames": 4, "guidance_scale": 4.0}
            model, own = tiny_latte(), own | {"model": TINY_MODEL | {"depth": 8, "num_classes": 5}}
        torch.save({"ema": to_released(model.state_dict())}, tmp_path / "tiny.pt")
        return run | own

    def make(task: str) -> Any:
        settings, run = TASKS[task].part("settings"), given(task)
        if "model" in run:
            run["model"] = settings.ModelConfig(**run["model"])
        return settings.SampleConfig(out=str(tmp_path / "out"), steps=6, **run)

    return make


def run_sampler(config, task: str, processes: int) -> None:
    """The sampler as a user starts it, in several processes."""
    script = next((ROOT / task).glob("sample*.py")).name
    status, told = run_script(config, processes=processes, task=task, script=script)
    assert status == 0, told[-3000:]


def train_flow(config, train, tmp_path: Path) -> Path:
    """Train by flow matching, resume bit-equal, and export. Returns the exported weights."""
    config = changed(config, {"train.objective": "flow", "train.flow_shift": 2.0, "train.sample_every": 4})
    out, exported = config.out, tmp_path / "flow.pt"
    assert_resumes(config, train, tmp_path, {"train.sample_every": 0})
    assert list((Path(out) / "samples").iterdir())
    export(Path(out), exported, torch.float32)
    assert recorded_flow_shift(out) == recorded_flow_shift(exported) == 2.0
    return exported
