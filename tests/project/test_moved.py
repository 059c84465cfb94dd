"""Names of version 0.1: modules, their names, and commands."""

import ast
import importlib

import pytest
from commands import forked
from conftest import ROOT

from skipdit import _moved

OLD = {  # what version 0.1 had in its modules, some of each
    "adaln": "AdaLNTransformer Conditioning",
    "analyze.measure": "perturbation",
    "bench": "step_flops run_flops replaced interleaved_seconds",
    "cache": "CacheSpec CachePlan DriftSpec SkipCache CacheStep",
    "checkpoint": "save latest restore",
    "class_sample": "generate SamplingConfig run_job",
    "compare": "compare rows_for Sampler",
    "convert": "convert export",
    "data.images": "to_float to_uint8 ImageFolder",
    "data.latents": "Latents open_clips",
    "data.stream": "BrokenSample Stream seed_of",
    "data.video": "Video",
    "device": "process_state",
    "diffusion": "Diffusion ddim ddpm",
    "download": "download",
    "ema": "EMA",
    "encode": "main",
    "evaluate": "fid main",
    "layouts": "from_diffusers",
    "lora": "add_lora",
    "media": "write_mp4 read_mp4",
    "metrics": "psnr ssim frechet_distance",
    "nn": "Attention PatchEmbed unpatchify",
    "pipeline": "enable_cache PipelineCache",
    "plan": "Bench make_plan main",
    "prompts": "read_prompts",
    "runlog": "BrokenFiles Log",
    "sample": "Job generators preflight report resolve_dtype versions add_cache_arguments",
    "skip": "SkipTransformer skip_stack",
    "spectral": "SpectralLimit",
    "task": "find_task",
    "text": "TextEncoder load_text_encoder",
    "text_sample": "PromptConfig run_job",
    "train": "fit TrainConfig Draw set_trainable describe claim_folder",
    "vae": "load_vae encode decode",
    "weights": "load_weights load_state WeightsError from_released to_released fingerprint verify sha256",
}


@pytest.mark.parametrize("module", OLD)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_names_lead_to_the_new_ones(module):
    old = importlib.import_module(f"skipdit.{module}")
    for name in OLD[module].split():
        assert getattr(old, name).__name__ == name


def test_old_names_say_where_things_are_now():
    with pytest.warns(DeprecationWarning, match=r"skipdit\.vae\.decode is skipdit\.encoders\.autoencoder\.decode now"):
        from skipdit.vae import decode
    assert decode.__module__ == "skipdit.encoders.autoencoder"
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from skipdit.vae import nothing  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("skipdit.nowhere")


def test_every_old_module_leads_somewhere():
    for places in _moved.MODULES.values():
        for place in places:
            assert importlib.import_module(f"skipdit.{place}")


def test_the_library_uses_none_of_them():
    old = {f"skipdit.{name}" for name in _moved.MODULES}
    for path in [*(ROOT / "src").rglob("*.py"), *ROOT.glob("*-to-*/*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.module in old), path


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["plan", "evaluate", "encode", "encode_text", "download", "weights", "data", "analyze"]
)
def test_commands_of_version_0_1(module, tmp_path):
    code, said = forked(f"python -m skipdit.{module} --help", tmp_path)
    assert code == 0 and "usage: " in said and "show this help message" in said, said
