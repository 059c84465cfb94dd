"""What has to hold on a GPU: `pytest -m cuda`. Whatever a CPU can do, too, runs there in every test run."""

import copy
import gc
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products

import pytest
import torch
from conftest import (
    Golden,
    assert_close,
    assert_equal,
    short_training,
    state,
    tiny_dit,
    tiny_hunyuan,
    tiny_latte,
    tiny_latte_t2v,
)
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LattePipeline,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset

from skipdit import SkipCache, enable_cache
from skipdit.checkpoints.loading import load_weights
from skipdit.class_to_image import DiT
from skipdit.class_to_video import Latte
from skipdit.config import changed
from skipdit.diffusion.gaussian import Diffusion
from skipdit.sampling.class_conditional import generate
from skipdit.text_to_image import HunyuanDiT
from skipdit.text_to_video import LatteT2V
from skipdit.training.loop import fit
from skipdit.training.parallel import _shard
from skipdit.training.settings import TrainConfig
from skipdit.utils.device import set_tf32
from skipdit.utils.seeding import generators

NEEDS_GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
GPU_ONLY = pytest.param("cuda", marks=NEEDS_GPU)
MODELS = [tiny_dit, tiny_latte, tiny_latte_t2v, tiny_hunyuan]
GOLDEN = {
    **{"dit_skip_0": DiT, "dit_plain_0": DiT, "latte_plain_0": Latte, "latte_skip_extras1_0": Latte},
    **{"latte_skip_extras2_0": Latte, "latte_t2v_plain_0": LatteT2V, "latte_t2v_skip_0": LatteT2V},
}
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of a call of the tiny models, relative to its norm


@pytest.fixture(params=["cpu", GPU_ONLY])
def device(request) -> torch.device:
    set_tf32(False)
    return torch.device(request.param)


@pytest.fixture
def gpu_only(device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("of a GPU only")
    return device


def moved(thing, device):
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(device), thing)


def first(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def sample(model, cache="none", labels=(1, 2), seed=0, steps=12, **kwargs) -> Tensor:
    noise = generators(seed, range(len(labels)), model.device)
    labels = torch.tensor(labels, device=model.device)
    return generate(model, labels, noise, steps=steps, sampler="ddim", cache=cache, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_released_code(name, device):
    """In float32, without TF32."""
    case, kind = Golden(name), GOLDEN[name]
    skip = {} if "skip" in name else {"skip": False}
    model = kind(**case.case["config"], **skip).eval()
    load_weights(model, case.state)
    model.to(device)
    names = ("x", "t", "text", "mask") if kind is LatteT2V else ("x", "t", "y")
    inputs = [case.inputs[key].to(device) if key in case.inputs else None for key in names]
    key = "forward_masked" if kind is LatteT2V else "forward"
    assert_close(first(model(*inputs)).cpu(), case.outputs[key])


@torch.no_grad()
def test_released_hunyuan(device):
    case = Golden("hunyuan_dit_0")
    model = HunyuanDiT(**case.case["config"]).eval()
    load_weights(model, case.state)
    inputs = {name: tensor.to(device) for name, tensor in case.inputs.items()}
    texts = (inputs[name] for name in ("clip", "clip_mask", "t5", "t5_mask"))
    rotary = inputs["cos"], inputs["sin"]
    out = model.to(device)(inputs["x"], inputs["t"], *texts, image_rotary_emb=rotary)
    assert_close(first(out).cpu(), case.outputs["forward"])


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_half_precision(make, dtype, device):
    model = make().to(device)
    inputs = model.random_inputs(2)
    expected = first(model(**inputs))
    model.to(dtype)
    halved = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
    found = first(model(**halved)).float()
    error = ((found - expected).norm() / expected.norm()).item()
    assert 0 < error < TOLERANCE[dtype]


@pytest.mark.parametrize("make", [tiny_dit, tiny_latte])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_interval_one_is_uncached_to_the_bit(make, scale, device):
    model = make().to(device)
    assert torch.equal(sample(model, "N1-1000-20", guidance_scale=scale), sample(model, guidance_scale=scale))


def test_a_b_a(device):
    model = tiny_dit().to(device)
    expected = sample(model, "N3-1000-20-o1")
    for other in ({"labels": (3,)}, {"steps": 7}, {"guidance_scale": 1.0}, {"seed": 5, "labels": (4, 5, 6)}):
        sample(model, "N2-1000-20", **other)
        assert torch.equal(sample(model, "N3-1000-20-o1"), expected)


@contextmanager
def no_sync():
    """Fails on whatever makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("spec", ["none", "N2-1000-20", "N3-1000-20-o1"])
def test_no_step_waits(sampler, spec, gpu_only, monkeypatch):
    """From the second on; the timesteps come to the GPU before the first."""
    monkeypatch.setattr("skipdit.sampling.class_conditional.require_finite", lambda *_: None)  # after the last step
    model, strict = tiny_dit().to(gpu_only), no_sync()

    def after(i, x, x0):
        if i == 0:
            strict.__enter__()

    noise, labels = generators(0, range(2), gpu_only), torch.tensor([1, 2], device=gpu_only)
    cache = SkipCache(spec, Diffusion(8).sampling_timesteps)
    try:
        generate(model, labels, noise, steps=8, sampler=sampler, cache=cache, callback=after)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_pipe(device, scheduler=DDIMScheduler, **settings) -> LattePipeline:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4)
    pipe = LattePipeline(None, None, vae, tiny_latte_t2v(), scheduler(**settings))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def run(pipe, steps=10, guidance=3.0, **kwargs) -> Tensor:
    device = pipe._execution_device
    text, null = torch.randn(2, 1, 6, 12, generator=torch.Generator().manual_seed(0)).to(device)
    return pipe(
        None,
        negative_prompt=None,
        prompt_embeds=text,
        negative_prompt_embeds=null,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator(device).manual_seed(0),
        **{"height": 8, "width": 8, "video_length": 4, "output_type": "latent"} | kwargs,
    ).frames


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]
)
def test_no_step_of_a_pipeline_waits(scheduler, gpu_only):
    pipe, strict = make_pipe(gpu_only, scheduler), no_sync()
    cache = enable_cache(pipe, "N2-1000-0-o1")

    def after(pipe, i, t, tensors):
        if i == 0:
            strict.__enter__()
        if i == 9:
            strict.__exit__(None, None, None)
        return {}

    try:
        run(pipe, callback_on_step_end=after)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.run.cached_steps > 2


def test_pipelines(device):
    """A, B, A; on the GPU the model and the scheduler see the timesteps where they need them."""
    pipe = make_pipe(device)
    uncached = run(pipe)
    enable_cache(pipe, "N1-1000-0")
    assert torch.equal(run(pipe), uncached)
    cache = enable_cache(pipe, "N2-1000-0")
    expected = run(pipe)
    for other in ({"steps": 7}, {"guidance": 1.0}, {"height": 16, "width": 24}, {"video_length": 1}):
        run(pipe, **other)
        assert torch.equal(run(pipe), expected)
    assert cache.run.ran == [True, False] * 4 + [True, False] and not torch.equal(expected, uncached)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_loops_by_hand_may_begin_in_the_middle(scheduler, device):
    pipe = make_pipe(device, scheduler)
    cache, x = enable_cache(pipe, "N2-1000-0"), torch.randn(1, 4, 4, 4, 4, device=device)
    text = torch.randn(1, 6, 12, device=device)
    pipe.scheduler.set_timesteps(20, device=device)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[9:]:
            given = pipe.scheduler.scale_model_input(x, t)
            noise = pipe.transformer(hidden_states=given, timestep=t[None], encoder_hidden_states=text).sample[:, :4]
            x = pipe.scheduler.step(noise, t, x)[0]
    assert cache.run.ran == [True, False] * 5 + [True]


@pytest.mark.slow
def test_nothing_of_a_cache_stays(device):
    model = tiny_dit().to(device)
    cache = SkipCache("N3-1000-20-o1", Diffusion(12).sampling_timesteps)
    sample(model, "N3-1000-20-o1")  # whatever libraries keep of a first run
    before = allocated(device)
    sample(model, cache)
    assert cache.peak_bytes > 0
    assert allocated(device) == before


def allocated(device) -> int:
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("spec", ["none", "N2-1000-20-b2", "N3-1000-20-o1"])
def test_compiled(mode, spec, gpu_only):
    """One graph without breaks for each kind of step, none more after the first run; with CUDA graphs, too."""
    torch._dynamo.reset()
    model = tiny_dit().to(gpu_only)
    expected = [sample(model, spec, seed=seed) for seed in (0, 1)]
    model.compile(fullgraph=True, mode=mode)
    for _ in range(3):  # CUDA graphs warm up, record, replay
        sample(model, spec)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, wanted in enumerate(expected):
            torch.testing.assert_close(sample(model, spec, seed=seed), wanted, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_pipeline(mode, gpu_only):
    """Multistep schedulers keep what the model returned, guidance in two calls does, too: no graph may overwrite it."""
    torch._dynamo.reset()
    pipe = make_pipe(gpu_only, DPMSolverMultistepScheduler)
    enable_cache(pipe, "N2-1000-0-o1")
    expected = run(pipe)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, mode=mode)
    for _ in range(4):
        torch.testing.assert_close(run(pipe), expected, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


def loss_of(model, x, t, y, noise) -> Tensor:
    diffusion = Diffusion()
    noisy = diffusion.q_sample(x, t, noise)
    return diffusion.losses(model(noisy, t, y), x, noisy, t, noise)["loss"].mean()


def training_batch() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 8, 4, 4, 4, generator=generator)
    return x, torch.randint(1000, (8,), generator=generator), torch.arange(8), noise


@pytest.mark.parametrize("compiled", [False, True])
def test_training_step_is_that_of_the_cpu(compiled, gpu_only):
    model, batch, gradients = tiny_dit().train(), training_batch(), []
    for where in ("cpu", gpu_only):
        ours = copy.deepcopy(model).to(where)
        if compiled and where != "cpu":
            ours.compile()
        loss_of(ours, *moved(batch, where)).backward()
        gradients.append({name: p.grad.cpu() for name, p in ours.named_parameters()})
    for name, expected in gradients[0].items():
        error = (gradients[1][name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 1e-3, name


class Latents(Dataset):
    """Twelve random latents of three classes."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict:
        x = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(index))
        return {"image": x, "label": index % 3}


@dataclass
class Run:
    """What a task's config has of a run."""

    out: str
    train: TrainConfig = field(default_factory=TrainConfig)


def train(out, **settings) -> None:
    def loss(model, batch, draw):
        x, t = batch["image"], draw.randint(1000)
        diffusion, noise = Diffusion(), draw.randn(4, 4, 4)
        noisy = diffusion.q_sample(x, t, noise)
        return diffusion.losses(model(noisy, t, batch["label"]), x, noisy, t, noise)["loss"]

    config = changed(short_training(), settings)
    fit(tiny_dit(num_classes=3), loss, Latents(), config, out, Run(str(out), config))


def test_resume_is_bit_equal(tmp_path, device):
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("training takes the GPU that is there")
    with deterministic():
        train(tmp_path / "whole")
        train(tmp_path / "halves", steps=2)
        train(tmp_path / "halves")
    whole, halves = (state(Run(str(tmp_path / name))) | {"args": None} for name in ("whole", "halves"))
    assert_equal(whole, halves)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharded_gradients(precision, gpu_only):
    """FSDP2 on one GPU: the gradients of a model that is not sharded."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        whole, sharded = tiny_dit().to(gpu_only).train(), tiny_dit().to(gpu_only).train()
        _shard(sharded, precision)
        for model in (whole, sharded):
            with torch.autocast("cuda", torch.bfloat16) if precision == "bf16" else nullcontext():
                loss = loss_of(model, *moved(training_batch(), gpu_only))
            loss.backward()
        for (name, p), (_, q) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
            error = (q.grad.full_tensor() - p.grad).norm() / p.grad.norm().clamp(min=1e-6)
            assert error < (1e-4 if precision == "fp32" else 5e-2), name
    finally:
        torch.distributed.destroy_process_group()
