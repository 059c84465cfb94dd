"""What the tests share: golden files, and tiny models of the real classes."""

import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Bit-equality needs the same number of threads here and in the processes started here.
os.environ["OMP_NUM_THREADS"] = os.environ.get("SKIPDIT_TEST_THREADS", "1")

import numpy as np
import pytest
import sentencepiece
import torch
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
from skipdit.text_to_image import HunyuanDiT
from skipdit.text_to_video import LatteT2V
from skipdit.training.checkpoints import latest
from skipdit.training.settings import TrainConfig

# A background job of a shell ignores Ctrl-C, and so do the processes that it starts; those of the tests are to hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
VAE_NAME = "sdxl-vae-fp16-fix"  # its folder in the release of Hunyuan-DiT
NUMERICS = re.compile(r"torch\.equal\(|assert_(close|equal|rounding|same_images)\(|contents\(|approx\(")
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


def run_script(config, *overrides, processes=1, task="class-to-image", **kwargs) -> subprocess.CompletedProcess:
    """The trainer as a user starts it."""
    file = Path(config.out).parent / f"{Path(config.out).name}.yaml"
    file.write_text(to_yaml(config))
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, str(ROOT / task / "train.py"), "--config", str(file), *overrides]
    return subprocess.run(command, capture_output=True, text=True, cwd=file.parent, timeout=300, **kwargs)


def kill_at(config, goals: Sequence[int], task="class-to-image") -> None:
    """Start the trainer again and again, and SIGKILL it as soon as it has saved each of these steps."""
    file = Path(config.out).parent / f"{Path(config.out).name}.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, str(ROOT / task / "train.py"), "--config", str(file)]
    checkpoints = Path(config.out) / "checkpoints"
    for goal in goals:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=file.parent)
        while process.poll() is None and not any(int(p.stem) >= goal for p in checkpoints.glob("*.pt")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
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


def train_flow(config, train, tmp_path: Path) -> Path:
    """Train by flow matching, resume bit-equal, and export. Returns the exported weights."""
    config = changed(config, {"train.objective": "flow", "train.flow_shift": 2.0, "train.sample_every": 4})
    train(config)
    whole, out, exported = state(config), config.out, tmp_path / "flow.pt"
    resumed = {"out": str(tmp_path / "resumed"), "train.sample_every": 0}
    train(changed(config, resumed | {"train.steps": 2}))
    train(changed(config, resumed | {"train.steps": 4}))
    assert_equal(whole | {"args": None}, state(changed(config, resumed)) | {"args": None})
    assert list((Path(out) / "samples").iterdir())
    export(Path(out), exported, torch.float32)
    assert recorded_flow_shift(out) == recorded_flow_shift(exported) == 2.0
    return exported
