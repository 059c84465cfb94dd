"""What README, task READMEs and docs say is so: their commands and examples run, their links and files exist.

A comment right before each block of commands or Python says what the test does with it:

    <!-- test: run steps=3 -->            adds `steps=3` to every command of the block, to make it small, and runs it
    <!-- test: run twice steps=3 -->      the same, and once more in a new process
    <!-- test: missing TASK NAME=... -->  runs it without the released checkpoint: it ends and says what to fetch
    <!-- test: skip REASON -->            does not run it, and says why, or which test covers it
    <!-- test: run with NAME -->          of Python: a small model takes the released one's place, see `STAND_INS`

One comment serves all commands of a block; otherwise there is one per command, in order. Commands run in the order of
`PAGES` in one folder, so that later ones use what earlier ones made. A command that stands in several places has the
same comment everywhere, and runs once.
"""

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from commands import forked
from conftest import ROOT
from pipelines.tiny import build

from skipdit import plan_pipeline
from skipdit.checkpoints.released import to_released
from skipdit.class_to_image import DiT

TASKS = ("class-to-image", "class-to-video", "text-to-video", "text-to-image")
PAGES = [ROOT / "README.md", *(ROOT / task / "README.md" for task in TASKS), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "integrations/comfyui/README.md", ROOT / "CONTRIBUTING.md"]
GENERATED = {ROOT / "docs/gpu.md"}  # by benchmarks/gpu, which test_gpu_check.py runs: no comments there
WRITTEN = tuple(f"configs/{name}/" for name in ("mine", "told", "moving", "film"))  # by the tutorials' own commands
EMOJI = ("face-smiling", "face-affection", "face-tongue", "face-negative", "face-costume", "cat-face", "heart", "hands")

BLOCK = re.compile(r"((?:^<!-- test: [^\n]* -->\n)*)^```(bash|python)\n(.*?)^```", flags=re.M | re.S)
COMMENT = re.compile(r"<!-- test: (.*) -->")


class Step(NamedTuple):
    """A command or a Python block, and the comment that says what to do with it."""

    page: str
    code: str
    kind: str  # run, missing, skip
    rest: str


def commands_of(block: str) -> list[str]:
    """The commands of a shell block, without comments and line breaks."""
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line.strip()]


def steps_of(page: Path, language: str) -> list[Step]:
    """Commands or Python blocks of a page. Fails if one has no comment, or a block has too many."""
    steps = []
    for comments, found, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if found != language or page in GENERATED:
            continue
        name, marks = str(page.relative_to(ROOT)), COMMENT.findall(comments)
        parts = commands_of(block) if language == "bash" else [block]
        assert marks, f"{name}: no `<!-- test: ... -->` right before\n{block}"
        assert len(marks) in (1, len(parts)), f"{name}: {len(marks)} comments for {len(parts)} commands\n{block}"
        for part, mark in zip(parts, marks * len(parts) if len(marks) == 1 else marks, strict=True):
            kind, _, rest = mark.partition(" ")
            assert kind in ("run", "missing", "skip"), f"{name}: a comment says {mark!r}"
            assert rest or kind == "run", f"{name}: a comment says {kind} and not why\n{part}"
            steps.append(Step(name, part, kind, rest))
    return steps


def shell_steps() -> list[Step]:
    """All commands, each once, in order."""
    steps: dict[str, Step] = {}
    for page in PAGES:
        for step in steps_of(page, "bash"):
            first = steps.setdefault(step.code, step)
            assert first[2:] == step[2:], f"{first.page} and {step.page} have two comments for {step.code}"
    return list(steps.values())


def python_steps() -> list[Step]:
    return [step for page in PAGES for step in steps_of(page, "python")]


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    command = command.replace("python ", f"{sys.executable} ", 1)
    return subprocess.run(shlex.split(command), capture_output=True, text=True, cwd=folder, timeout=300)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, released_t2i) -> Path:
    """A folder that looks like a checkout, with a FashionMNIST of 20 random images, 8 random emoji, two prompts and a
    tiny pipeline, by the name of another one, in it.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for number, kind in enumerate(EMOJI):
        (folder / "data/emoji-anim/videos" / kind).mkdir(parents=True)
        film = np.full((46, 64, 64, 3), 30 * number, np.uint8)
        imageio.imwrite(folder / f"data/emoji-anim/videos/{kind}/a.mp4", film, plugin="FFMPEG", fps=24)
    own_data(folder / "data")
    for name in (*TASKS, "scripts", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "configs").mkdir()  # a folder of its own, for what `skipdit train new` writes
    for task in TASKS:
        (folder / "configs" / task).symlink_to(ROOT / "configs" / task)
    (folder / "ckpts").symlink_to(released_t2i / "ckpts")
    (folder / "black-forest-labs").mkdir()
    (folder / "black-forest-labs/FLUX.1-dev").symlink_to(released_t2i / "diffusers")
    (folder / "prompts.txt").write_text("a lighthouse at dusk\ntwo cats on a sofa\n")
    raw = folder / "data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 20)):
        pixels, labels = os.urandom(count * 28 * 28), bytes(i % 10 for i in range(count))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels)
    return folder


def own_data(data: Path) -> None:
    """What the tutorials are about: circles and squares in two colours, still and moving, by class or captioned."""
    rows, y, x = [], *np.mgrid[:72, :80] - 36
    for number in range(12):
        shape, colour = ("circle", "square")[number % 2], [200, 40, 40] if number < 6 else [40, 40, 200]
        inside = (np.hypot(x - number, y) if shape == "circle" else np.maximum(abs(x - number), abs(y))) < 20
        pixels = np.where(inside[..., None], np.uint8(colour), np.uint8(250))
        film = np.stack([np.roll(pixels, step, axis=1) for step in range(20)])
        for folder, moves in {
            f"pictures/{shape}": False,
            "captioned": False,
            f"clips/{shape}": True,
            "told-clips": True,
        }.items():
            place = data / folder / f"{number}.{'mp4' if moves else 'png'}"
            place.parent.mkdir(parents=True, exist_ok=True)
            imageio.imwrite(place, film if moves else pixels, **{"plugin": "FFMPEG", "fps": 8} if moves else {})
        name = "red" if number < 6 else "blue"
        rows.append({"image": f"{number}.png", "video": f"{number}.mp4", "caption": f"a {name} {shape} on white"})
    for folder in ("captioned", "told-clips"):
        (data / folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_block_says_how_it_is_tested():
    steps = shell_steps()
    assert {step.kind for step in steps} == {"run", "missing", "skip"}
    assert len(steps) > 80 and len(python_steps()) > 3  # they are found at all
    named = re.findall(r"\btest_\w+\.py", " ".join(step.rest for step in steps if step.kind == "skip"))
    assert named and not [name for name in named if not list((ROOT / "tests").rglob(name))]


@pytest.mark.slow
def test_commands_run(checkout):
    for page, command, kind, rest in shell_steps():
        if kind != "run":
            continue
        twice, small = rest.startswith("twice"), rest.removeprefix("twice")
        status, told = forked(f"{command} {small}", checkout)
        assert status == 0, f"{page}: {command}\n{told[-3000:]}"
        if twice:  # in a process with other hashes
            result = run(f"{command} {small}", checkout)
            assert result.returncode == 0, f"{page}: {command}, again\n{result.stderr[-3000:]}"
    assert (checkout / "samples/demo/grid.png").exists()
    assert (checkout / "samples/demo/compare.png").exists()
    assert (checkout / "results/fashion-stage2/checkpoints/0000002.pt").exists()
    assert (checkout / "samples/video-demo/compare.gif").exists()
    assert (checkout / "results/emoji/checkpoints/0000002.pt").exists()
    assert (checkout / "samples/moving-cached/evaluation/fidelity.json").exists()
    assert (checkout / "samples/text-demo/compare.gif").exists()
    assert len(list(checkout.glob("samples/text-to-image/渔舟唱晚-*/000000-渔舟唱晚.png"))) == 2


@pytest.mark.slow
def test_commands_that_fail_are_seen(tmp_path):
    """By the test above."""
    (tmp_path / "fails.py").write_text("import sys\nprint(sys.argv, flush=True)\nraise OSError('as it should')\n")
    status, told = forked("python fails.py -x 1", tmp_path)
    assert status == 1 and "['fails.py', '-x', '1']" in told and "OSError: as it should" in told
    assert forked("python -m skipdit plan --config no/such.yaml --budget 3", tmp_path)[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("step", [step for step in shell_steps() if step.kind == "missing"], ids=lambda step: step.code)
def test_without_the_released_checkpoint_the_fix_is_named(step, tmp_path):
    task, missing = step.rest.split(maxsplit=1)
    for name in (task, "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    status, told = forked(step.code, tmp_path)
    last = told.strip().splitlines()[-1]
    assert status == 2
    assert last.startswith(f"error: missing: {missing}, vae=")
    assert f"skipdit download {task}" in last


def small_dit(code: str, tmp_path: Path, request) -> str:
    tiny = {"input_size": 32, "patch_size": 8, "hidden_size": 32, "depth": 8, "num_heads": 2}
    torch.save({"ema": to_released(DiT(**tiny).state_dict())}, tmp_path / "tiny.pt")
    return replaced(
        code,
        {'DiT.from_name("DiT-skip")': f"DiT(**{tiny})", "checkpoints/DiT-XL-2-skip.pt": str(tmp_path / "tiny.pt")},
    )


def embedded(code: str, tmp_path: Path, request) -> str:
    return replaced(code, {"steps=50": "steps=5", "clothing.png": str(tmp_path / "clothing.png")})


def small_latte(code: str, tmp_path: Path, request) -> str:
    """With the folder of a whole tiny pipeline, in single precision, with the smallest frames."""
    released = request.getfixturevalue("released_t2v")
    width = {"caption_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
    shutil.copytree(released / "Latte-0", tmp_path / "whole")
    parts = {
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "LatteTransformer3DModel"],
    }
    index = {"_class_name": "LattePipeline", "_diffusers_version": "0.33.0"} | parts
    (tmp_path / "whole/model_index.json").write_text(json.dumps(index))
    return replaced(
        code,
        {
            "LatteT2V().half()": f"LatteT2V(**{width}, num_layers=4, sample_size=4, video_length=4)",
            "checkpoints/Latte-skip.pt": str(released / "Latte-skip.pt"),
            "maxin-cn/Latte-1": str(tmp_path / "whole"),
            'torch.float16).to("cuda")': "torch.float32)",
            'trots through snow")': 'trots through snow", num_inference_steps=3, video_length=4, height=16, width=16)',
        },
    )


def small_hunyuan(code: str, tmp_path: Path, request) -> str:
    released = request.getfixturevalue("released_t2i")
    return replaced(
        code,
        {
            "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers": str(released / "diffusers"),
            'torch.float16).to("cuda")': "torch.float32)",
            '渔舟唱晚")': '渔舟唱晚", num_inference_steps=5, height=64, width=64, use_resolution_binning=False)',
        },
    )


def small_flux(code: str, tmp_path: Path, request) -> str:
    """Without text encoders: the prompt is embeddings."""
    name = '"black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16'
    embeds = "prompt_embeds=torch.ones(1, 4, 16), pooled_prompt_embeds=torch.ones(1, 16)"
    return replaced(
        code,
        {
            "from diffusers import FluxPipeline": "from pipelines.tiny import build",
            f'FluxPipeline.from_pretrained({name}).to("cuda")': 'build("FluxPipeline")[0]',
            '"a red fox trots through snow"': f'{embeds}, height=32, width=32, output_type="latent"',
        },
    )


def planned_flux(code: str, tmp_path: Path, request) -> str:
    """The same, with a plan for as few steps."""
    call = {"prompt_embeds": torch.ones(1, 4, 16), "pooled_prompt_embeds": torch.ones(1, 16), "height": 32, "width": 32}
    call |= {"num_inference_steps": 5, "output_type": "latent"}
    plan_pipeline(build("FluxPipeline")[0], 2, **call).save(tmp_path / "plan.json")
    torch.save(call, tmp_path / "call.pt")
    prompts = (
        'prompt=["a lighthouse at dusk", "two cats on a sofa"]',
        '"a red fox trots through snow", num_inference_steps=50',
    )
    return replaced(
        code,
        {
            "from diffusers import FluxPipeline": "from pipelines.tiny import build",
            'FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")': (
                'build("FluxPipeline")[0]'
            ),
            **{each: f'**torch.load("{tmp_path}/call.pt")' for each in prompts if each in code},
            '"plan.json"': f'"{tmp_path}/plan.json"',
        },
    )


def small_pixart(code: str, tmp_path: Path, request) -> str:
    name = '"PixArt-alpha/PixArt-XL-2-512x512", subfolder="transformer"'
    build("PixArtAlphaPipeline")[0].transformer.save_pretrained(tmp_path / "pixart")
    folder = {'"pixart-with-skips"': f'"{tmp_path}/with-skips"'}
    return replaced(code, {name: f'"{tmp_path}/pixart"'} | folder)


def replaced(code: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in code, f"the example no longer has {old}"
        code = code.replace(old, new)
    return code


def check_dit(names: dict) -> None:
    assert names["out"].shape == (2, 8, 32, 32)


def check_embedded(names: dict) -> None:
    assert names["latents"].shape == (10, 4, 8, 8) and names["latents"].isfinite().all()


def check_latte(names: dict) -> None:
    assert len(names["frames"][0]) == 4


def check_hunyuan(names: dict) -> None:
    assert names["image"].size == (64, 64) and names["pipe"]._skip_cache.run.cached_steps > 0


def check_flux(names: dict) -> None:
    assert names["image"].isfinite().all() and names["cache"].run.counts() == {"full": 10, "cached": 0, "forecast": 18}


def check_skips(names: dict) -> None:
    assert {p.requires_grad for p in names["model"].skips.parameters()} == {True}
    assert not any(p.requires_grad for p in names["model"].transformer_blocks.parameters())
    assert len(names["loaded"].skips) == len(names["model"].skips)


def check_plan(names: dict) -> None:
    assert names["pipe"]._skip_cache.run is None or names["pipe"]._skip_cache.run.counts()["forecast"]


STAND_INS = {
    "small_dit": (small_dit, check_dit),
    "embedded": (embedded, check_embedded),
    "small_latte": (small_latte, check_latte),
    "small_hunyuan": (small_hunyuan, check_hunyuan),
    "small_flux": (small_flux, check_flux),
    "small_pixart": (small_pixart, check_skips),
    "planned_flux": (planned_flux, check_plan),
}


@pytest.mark.slow
@pytest.mark.parametrize("step", [step for step in python_steps() if step.kind == "run"], ids=lambda step: step.page)
def test_python_runs(step, tmp_path, request, monkeypatch):
    monkeypatch.chdir(ROOT)
    make, check = STAND_INS.get(step.rest.removeprefix("with "), (None, None))
    code = make(step.code, tmp_path, request) if make else step.code
    names: dict = {}
    with torch.no_grad():
        exec(code, names)
    if check:
        check(names)


def test_all_stand_ins_are_used():
    used = {step.rest.removeprefix("with ") for step in python_steps() if step.rest.startswith("with ")}
    assert used == set(STAND_INS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [path for path, _, _ in links if path and not (page.parent / path).exists()]
    for path, _, anchor in links:
        target = page.parent / path if path else page
        if anchor and target.suffix == ".md" and target.exists():
            missing += [] if anchor in anchors(target) else [f"{path}#{anchor}"]
    assert not missing


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    top = "src|class-to-image|class-to-video|text-to-video|text-to-image|configs|scripts|visuals|benchmarks|tests|docs"
    text = page.read_text(encoding="utf-8")
    names = re.findall(rf"(?<![\w./-])((?:{top})/[\w./-]*\w\.\w+)", text)
    names += [f"src/skipdit/{name}" for name in re.findall(rf"`((?!(?:{top})/)\w+/\w+\.py)`", text)]  # of the rooms
    names = [name for name in names if name != "docs/gpu.json"]  # comes with the first GPU
    names = [name for name in names if not name.startswith(WRITTEN)]
    missing = [name for name in names if not (ROOT / name).exists() and page not in GENERATED]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_modules_exist(page):
    """Names like `skipdit.caching.SkipCache`, and no command of version 0.1."""
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"python -m skipdit\.\w+", text)
    for name in set(re.findall(r"(?<![\w./-])skipdit(?:\.[a-zA-Z]\w*)+", text)):
        assert resolves(name), name


def resolves(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            found = getattr(found, attribute, None)
        return found is not None
    return False


def test_environment():
    import yaml

    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    assert {"pip": ["-e ."]} in environment["dependencies"]
