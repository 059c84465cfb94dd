"""The right files are asked of the Hub under the right names, resumed, and what arrives is looked at. All is local."""

import hashlib
import http.server
import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, skipdit_command
from safetensors.torch import save

from skipdit.checkpoints import download as tool
from skipdit.checkpoints.catalogue import TASKS
from skipdit.checkpoints.errors import WeightsError
from skipdit.text_to_image import sample_t2i
from skipdit.text_to_image import train as train_t2i

DIT, LATTE = "blocks.0.attn.qkv.weight", "temporal_transformer_blocks.0.scale_shift_table"
SKIP_DIT, HUNYUAN = "GuanjieChen/Skip-DiT", "Tencent-Hunyuan/HunyuanDiT-v1.2"
PLAIN, CLIPS = "maxin-cn/Latte-0", "datasets/GuanjieChen/video_seg"
FACEBOOK = "https://dl.fbaipublicfiles.com/DiT/models"
DIFFUSERS = f"{HUNYUAN}-Diffusers"
T2I = [f"t2i/{name}" for name in ("clip_text_encoder/a.bin", "mt5/a.bin", "tokenizer/vocab.txt")]
T2I_PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
VAE = ["config.json", "diffusion_pytorch_model.safetensors"]


def checkpoint(mark: str, skips: int, classes: int | None = None) -> dict:
    """As much of a released checkpoint as tells what it is."""
    names = [mark, *(f"skip_norms.{i}.{part}" for i in range(skips) for part in ("weight", "bias"))]
    state = dict.fromkeys(names, torch.zeros(1))
    return {"ema": state | ({"y_embedder.embedding_table.weight": torch.zeros(classes + 1, 1)} if classes else {})}


class Hub:
    """A stand-in for the Hub client: `repos` maps a repository to its files, `content` a file name to what it holds.

    A dataset's repository is called datasets/owner/name here, as in the Hub's addresses.
    """

    def __init__(self):
        self.fetched: list[tuple[str, str]] = []
        self.failure: Exception | None = None
        hunyuan = dict.fromkeys(
            ["mlp_t5.0.weight", *(f"blocks.{i}.skip_norm.weight" for i in range(21, 40))], torch.zeros(1)
        )
        self.content = {
            "DiT-XL-2-skip.pt": checkpoint(DIT, 14, 1000),
            "ffs-skip.pt": checkpoint("temp_embed", 7),
            "taichi-skip.pt": checkpoint("temp_embed", 7),
            "skytimelapse-skip.pt": checkpoint("temp_embed", 7),
            "ucf101-skip.pt": checkpoint("temp_embed", 7, 101),
            "Latte-skip.pt": checkpoint(LATTE, 14),
            "transformer/diffusion_pytorch_model.safetensors": checkpoint(LATTE, 0)["ema"],
            "t2i/model/pytorch_model_ema.pt": hunyuan,
            **{f"{name}.pt": checkpoint("temp_embed", 0) for name in ("ffs", "skytimelapse", "taichi-hd")},
            "ucf101.pt": checkpoint("temp_embed", 0, 101),
            **{f"DiT-XL-2-{size}x{size}.pt": checkpoint(DIT, 0, 1000) for size in (256, 512)},
        }
        self.repos = {
            SKIP_DIT: ["README.md", *(name for name in self.content if name.endswith("-skip.pt"))],
            "stabilityai/sd-vae-ft-ema": ["README.md", "diffusion_pytorch_model.bin", *VAE],
            "maxin-cn/Latte-0": [
                "vae/config.json",
                "vae/diffusion_pytorch_model.safetensors",
                "vae/diffusion_pytorch_model.bin",
                "text_encoder/pytorch_model.bin",
                "scheduler/scheduler_config.json",
                "transformer/config.json",
                "transformer/diffusion_pytorch_model.safetensors",
                "tokenizer/spiece.model",
                "vae_temporal_decoder/config.json",
                "vae_temporal_decoder/diffusion_pytorch_model.safetensors",
            ],
            "maxin-cn/Latte": ["README.md", "ffs.pt", "skytimelapse.pt", "taichi-hd.pt", "ucf101.pt", "t2v.pt"],
            CLIPS: ["README.md", "00000/1.mp4", "00001/2.mp4"],
            "maxin-cn/Latte-1": ["tokenizer/spiece.model", "transformer/config.json", "vae/config.json"],
            HUNYUAN: [
                "t2i/model/pytorch_model_ema.pt",
                "t2i/model/pytorch_model_module.pt",
                *T2I,
                "t2i/sdxl-vae-fp16-fix/diffusion_pytorch_model.bin",
                "t2i/sdxl-vae-fp16-fix/diffusion_pytorch_model.safetensors",
            ],
            DIFFUSERS: ["README.md", "model_index.json", *(f"{part}/a.json" for part in T2I_PARTS)],
        }

    def list_repo_files(self, repo, repo_type="model"):
        if self.failure:
            raise self.failure
        return self.repos[self.url(repo, "", repo_type)[0]]

    def url(self, repo, name, repo_type="model") -> tuple[str, str]:
        return f"datasets/{repo}" if repo_type == "dataset" else repo, name

    def get_hf_file_metadata(self, url, token=None):
        assert isinstance(url, tuple) or token is False, "a token would leave for another place than the Hub"
        return SimpleNamespace(size=len(self.bytes(url)), etag="git-checksum")

    def http_get(self, url, file, *, resume_size, headers, expected_size):
        assert isinstance(url, tuple) or "authorization" not in headers
        self.fetched.append(url)
        file.write(self.bytes(url)[resume_size:])

    def bytes(self, url: tuple[str, str] | str) -> bytes:
        url = url if isinstance(url, tuple) else tuple(url.rsplit("/", 1))
        if url[1].endswith(".safetensors"):
            return save({name: tensor.clone() for name, tensor in self.content.get(url[1], {}).items()})
        buffer = io.BytesIO()
        torch.save(self.content.get(url[1], {}), buffer)
        return buffer.getvalue()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(tool, "hf_hub_url", hub.url)
    for name in ("list_repo_files", "get_hf_file_metadata", "http_get"):
        monkeypatch.setattr(tool, name, getattr(hub, name))
    return hub


EXPECTED = {
    "class-to-image": [(SKIP_DIT, "DiT-XL-2-skip.pt"), *(("stabilityai/sd-vae-ft-ema", name) for name in VAE)],
    "class-to-video": [
        *((SKIP_DIT, f"{name}-skip.pt") for name in ("ffs", "skytimelapse", "taichi", "ucf101")),
        *(("stabilityai/sd-vae-ft-ema", name) for name in VAE),
    ],
    "text-to-video": [
        (SKIP_DIT, "Latte-skip.pt"),
        ("maxin-cn/Latte-0", "vae/config.json"),
        ("maxin-cn/Latte-0", "vae/diffusion_pytorch_model.safetensors"),
        ("maxin-cn/Latte-0", "text_encoder/pytorch_model.bin"),
        ("maxin-cn/Latte-0", "scheduler/scheduler_config.json"),
        ("maxin-cn/Latte-0", "transformer/config.json"),
        ("maxin-cn/Latte-1", "tokenizer/spiece.model"),
    ],
    "text-to-image": [
        (HUNYUAN, "t2i/model/pytorch_model_ema.pt"),
        *((HUNYUAN, name) for name in T2I[:2]),
        (HUNYUAN, "t2i/sdxl-vae-fp16-fix/diffusion_pytorch_model.safetensors"),
        (HUNYUAN, T2I[2]),
    ],
}


@pytest.mark.parametrize("task", TASKS)
def test_each_task_fetches_its_files(hub, tmp_path, task):
    files = tool.download(task, tmp_path)
    assert hub.fetched == EXPECTED[task]
    assert all(path.is_file() and tmp_path in path.parents for path in files)
    assert len(files) == len(hub.fetched)


OPTIONAL = {
    "plain": [(PLAIN, "transformer/config.json"), (PLAIN, "transformer/diffusion_pytorch_model.safetensors")],
    "temporal_decoder": [
        (PLAIN, "vae_temporal_decoder/config.json"),
        (PLAIN, "vae_temporal_decoder/diffusion_pytorch_model.safetensors"),
    ],
    "data": [(CLIPS, "README.md"), (CLIPS, "00000/1.mp4"), (CLIPS, "00001/2.mp4")],
    **{f"plain-{size}": [f"{FACEBOOK}/DiT-XL-2-{size}x{size}.pt"] for size in (256, 512)},
    "plain-ffs": [("maxin-cn/Latte", "ffs.pt")],
    "plain-sky": [("maxin-cn/Latte", "skytimelapse.pt")],
    "plain-taichi": [("maxin-cn/Latte", "taichi-hd.pt")],
    "plain-ucf101": [("maxin-cn/Latte", "ucf101.pt")],
    "diffusers": [(DIFFUSERS, "model_index.json"), *((DIFFUSERS, f"{part}/a.json") for part in T2I_PARTS)],
}


@pytest.mark.parametrize("only", [*([name] for name in OPTIONAL), ["plain", "data"], ["plain-256", "plain-512"]])
def test_optional_files_are_fetched_where_they_are_named(hub, tmp_path, only, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    tool.download(next(task for task, items in TASKS.items() if only[0] in items), tmp_path, only)
    assert hub.fetched == [file for name in only for file in OPTIONAL[name]]


def test_every_optional_item_is_among_those_above():
    optional = {name for items in TASKS.values() for name, item in items.items() if item.optional}
    assert optional == set(OPTIONAL)


def test_true_addresses_of_a_dataset(monkeypatch, tmp_path):
    """Of the true client: models and datasets of one name are different repositories."""
    listed, urls, file = [], [], "00035/1.mp4"
    metadata = SimpleNamespace(size=0, etag="git-checksum")
    monkeypatch.setattr(tool, "list_repo_files", lambda repo, repo_type: listed.append((repo, repo_type)) or [file])
    monkeypatch.setattr(tool, "get_hf_file_metadata", lambda url: urls.append(url) or metadata)
    monkeypatch.setattr(tool, "http_get", lambda url, file, **kwargs: urls.append(url))
    tool.download("text-to-video", tmp_path, only=["data"])
    assert listed == [("GuanjieChen/video_seg", "dataset")]
    assert [url.partition("/datasets/")[2] for url in urls] == [f"GuanjieChen/video_seg/resolve/main/{file}"] * 2


def test_files_land_where_pipelines_look(hub, tmp_path):
    for task, items in TASKS.items():
        tool.download(task, tmp_path)
        if optional := [name for name, item in items.items() if item.optional]:
            tool.download(task, tmp_path, optional)
    for name in (
        "DiT-XL-2-skip.pt",
        "sd-vae-ft-ema/config.json",
        "ffs-skip.pt",
        "Latte-0/vae/config.json",
        "Latte-0/tokenizer/spiece.model",
        "Latte-0/transformer/diffusion_pytorch_model.safetensors",
        "Latte-0/vae_temporal_decoder/config.json",
        "video_seg/00001/2.mp4",
        "DiT-XL-2-512x512.pt",
        "Latte/taichi-hd.pt",
        "t2i/model/pytorch_model_ema.pt",
        "t2i/tokenizer/vocab.txt",
        "HunyuanDiT-v1.2-Diffusers/model_index.json",
        "HunyuanDiT-v1.2-Diffusers/text_encoder_2/a.json",
    ):
        assert (tmp_path / name).is_file()


@pytest.mark.parametrize(
    ("task", "first"),
    [("class-to-image", "checkpoints/DiT-XL-2-skip.pt"), ("text-to-image", "ckpts/t2i/model/pytorch_model_ema.pt")],
)
def test_a_task_has_a_folder_of_its_own(hub, tmp_path, monkeypatch, task, first):
    monkeypatch.chdir(tmp_path)
    assert tool.download(task)[0] == Path(first)
    hub.fetched.clear()
    run_cli(task)  # which looks in the same place
    assert not hub.fetched


def test_sampler_and_trainer_of_text_to_image_look_where_files_land(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tool.download("text-to-image")
    places = [*sample_t2i.Config().places().values(), train_t2i.Config().vae]
    assert [place for place in places if not Path(place).exists()] == []
    tool.download("text-to-image", only=["diffusers"])
    places = sample_t2i.Config(pipeline="ckpts/HunyuanDiT-v1.2-Diffusers").places().values()
    assert [place for place in places if not Path(place).exists()] == []


def test_plain_weights_with_skips_are_noticed(hub, tmp_path):
    hub.content["transformer/diffusion_pytorch_model.safetensors"] = checkpoint(LATTE, 14)["ema"]
    with pytest.raises(WeightsError, match=r"holds text-to-video Latte, 14 long skips, but should hold \S+ Latte\."):
        tool.download("text-to-video", tmp_path, only=["plain"])


@pytest.mark.parametrize("name", ["skylapse-skip.pt", "skytimelapse-skip.pt"])
def test_sky_is_found_under_either_name_and_saved_under_one(hub, tmp_path, name):
    hub.repos[SKIP_DIT] = [name]
    hub.content[name] = checkpoint("temp_embed", 7)
    assert tool.download("class-to-video", tmp_path, only=["sky"]) == [tmp_path / "skylapse-skip.pt"]


def test_sky_under_both_names_is_fetched_once(hub, tmp_path):
    hub.repos[SKIP_DIT].append("skylapse-skip.pt")
    hub.content["skylapse-skip.pt"] = checkpoint("temp_embed", 7)
    assert tool.download("class-to-video", tmp_path, only=["sky"]) == [tmp_path / "skylapse-skip.pt"]


def test_complete_files_are_not_fetched_again(hub, tmp_path):
    files = tool.download("class-to-image", tmp_path)
    files[0].unlink()
    hub.fetched.clear()
    assert tool.download("class-to-image", tmp_path) == files
    assert hub.fetched == [(SKIP_DIT, "DiT-XL-2-skip.pt")]


@pytest.fixture
def server(monkeypatch):
    """A file server that the true Hub client talks to: `content`, its checksum, and the ranges that were asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(200, server.content)

        def do_GET(self):
            asked = self.headers.get("Range")
            server.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.knows_ranges else 0
            self.answer(206 if start else 200, server.content[start:])

        def answer(self, status: int, body: bytes):
            self.send_response(status)
            self.send_header("ETag", f'"{server.checksum}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.ranges, server.knows_ranges = os.urandom(10_000), [], True
    server.checksum = hashlib.sha256(server.content).hexdigest()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(tool, "hf_hub_url", lambda repo, name, repo_type: f"{address}/{name}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def partial(server, folder: Path, content: bytes) -> None:
    """What an interrupted call leaves."""
    (folder / f"big.pt.{server.checksum[:12]}.partial").write_bytes(content)


def test_interrupted_file_continues_where_it_stopped(server, tmp_path):
    partial(server, tmp_path, server.content[:4_000])
    assert tool.fetch("a/b", "big.pt", tmp_path / "big.pt").read_bytes() == server.content
    assert server.ranges == ["bytes=4000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["big.pt"]


def test_server_without_ranges_is_no_harm(server, tmp_path):
    server.knows_ranges = False
    partial(server, tmp_path, server.content[:4_000])
    assert tool.fetch("a/b", "big.pt", tmp_path / "big.pt").read_bytes() == server.content


def test_partial_file_that_grew_too_long_starts_again(server, tmp_path):
    partial(server, tmp_path, server.content * 2)
    assert tool.fetch("a/b", "big.pt", tmp_path / "big.pt").read_bytes() == server.content


def test_new_version_of_a_file_does_not_continue_the_old(server, tmp_path):
    partial(server, tmp_path, b"old" * 1_000)
    server.content = os.urandom(9_000)
    server.checksum = hashlib.sha256(server.content).hexdigest()
    assert tool.fetch("a/b", "big.pt", tmp_path / "big.pt").read_bytes() == server.content


def test_damaged_bytes_are_removed_and_the_next_call_succeeds(server, tmp_path):
    partial(server, tmp_path, bytes(4_000))
    with pytest.raises(OSError, match="damaged"):
        tool.fetch("a/b", "big.pt", tmp_path / "big.pt")
    assert not list(tmp_path.iterdir())
    assert tool.fetch("a/b", "big.pt", tmp_path / "big.pt").read_bytes() == server.content


@pytest.mark.parametrize(
    ("task", "name", "wrong"),
    [
        ("class-to-image", "DiT-XL-2-skip.pt", checkpoint(LATTE, 14)),
        ("class-to-image", "DiT-XL-2-skip.pt", checkpoint(DIT, 0, 1000)),
        ("text-to-video", "Latte-skip.pt", checkpoint(DIT, 14, 1000)),
        ("class-to-video", "ffs-skip.pt", checkpoint("temp_embed", 7, 101)),
    ],
)
def test_swapped_file_is_noticed(hub, tmp_path, task, name, wrong):
    hub.content[name] = wrong
    with pytest.raises(WeightsError, match=rf"{name} from {SKIP_DIT} holds .* should hold .* remove it"):
        tool.download(task, tmp_path)


def test_every_absent_file_is_named_before_anything_is_fetched(hub, tmp_path):
    hub.repos[SKIP_DIT] = ["ffs-skip.pt"]
    with pytest.raises(FileNotFoundError) as caught:
        tool.download("class-to-video", tmp_path)
    for name in ("skylapse-skip.pt or skytimelapse-skip.pt", "taichi-skip.pt", "ucf101-skip.pt"):
        assert f"{SKIP_DIT}: {name}\n" in str(caught.value) + "\n"
    assert "ffs" not in str(caught.value)
    assert not hub.fetched


def run_cli(*args) -> None:
    skipdit_command("download")([str(arg) for arg in args])


@pytest.mark.parametrize("when", ["listing", "fetching"])
def test_no_connection_is_explained(hub, tmp_path, capsys, monkeypatch, when):
    class TransportError(Exception):  # no OSError: what the client raises depends on its HTTP library
        pass

    def fail(*args, **kwargs):
        raise TransportError("name or service not known\nand more")

    monkeypatch.setattr(tool, "list_repo_files" if when == "listing" else "http_get", fail)
    with pytest.raises(SystemExit) as caught:
        run_cli("class-to-image", "--dir", tmp_path)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith(f"error: could not fetch {SKIP_DIT}: DiT-XL-2-skip.pt from the Hub: name or service not")
    assert "the same command again continues" in error and "and more" not in error


@pytest.mark.slow
def test_client_really_offline(tmp_path):
    """The true client in its offline mode: the tool's own mocks do not hide what it raises."""
    run = subprocess.run(
        [sys.executable, "-m", "skipdit", "download", "class-to-image", "--dir", tmp_path],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: could not fetch {SKIP_DIT}: DiT-XL-2-skip.pt")


def test_dry_run_lists_sizes_and_stays_offline(hub, capsys):
    hub.failure = AssertionError("asked the Hub")
    run_cli("class-to-video", "--only", "ffs", "sky", "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["ffs", "2.77", "GB"], ["sky", "2.77", "GB"]]
    assert "skylapse-skip.pt or skytimelapse-skip.pt" in lines[1]


def test_help_tells_what_is_only_fetched_by_name(capsys):
    with pytest.raises(SystemExit):
        run_cli("--help")
    said = capsys.readouterr().out
    marked = [line.split()[1] for line in said.splitlines() if re.match(r"\* [\w-]+  ", line)]
    assert sorted(marked) == sorted(OPTIONAL)
    assert "* only where --only names it" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "only", "listed"),
    [
        ("text-to-video", [], ["latte", "pipeline", "tokenizer"]),
        ("text-to-video", ["--only", "data"], ["data"]),
        ("text-to-image", [], ["hunyuan", "pipeline"]),
        ("text-to-image", ["--only", "diffusers"], ["diffusers"]),
    ],
)
def test_script_of_a_task_knows_it(task, only, listed, tmp_path):
    script = ROOT / task / "download.py"
    command = [sys.executable, script, "--dry-run", "--dir", "here", *only]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()] == listed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_script_passes_its_arguments_on():
    script = ROOT / "scripts/download.sh"
    run = subprocess.run(["bash", script, "class-to-image", "--dry-run"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "11.40 GB" in run.stdout


def test_unknown_names_list_the_known(hub, tmp_path):
    with pytest.raises(ValueError, match="no faces; known: ffs, sky, taichi, ucf101"):
        tool.download("class-to-video", tmp_path, only=["faces"])
    with pytest.raises(ValueError, match="known: class-to-image"):
        tool.download("class-to-audio", tmp_path)


@pytest.mark.parametrize(
    ("place", "is_one"),
    [
        ("google/t5-v1_1-small", True),
        ("GuanjieChen/Skip-DiT.v2", True),
        ("checkpoints/sd-vae-ft-ema", False),
        ("ckpts/HunyuanDiT-v1.2-Diffusers", False),
        ("local/vae", False),
        ("./vae", False),
        ("../vae", False),
        ("/vae", False),
        ("vae", False),
        ("google/", False),
        ("google/t5/text_encoder", False),
    ],
)
def test_hub_names_are_told_from_paths(tmp_path, monkeypatch, place, is_one):
    (tmp_path / "local").mkdir()
    monkeypatch.chdir(tmp_path)
    assert tool.is_hub_name(place) == is_one
