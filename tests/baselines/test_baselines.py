"""The caching methods that Skip-Cache is compared with: exact when idle, and a real saving when not."""

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Pooled, tiny_dit, tiny_hunyuan, tiny_latte, tiny_latte_t2v
from diffusers import AutoencoderKL, LattePipeline
from PIL import Image
from torch import Tensor

from skipdit import CacheSpec, SkipCache, enable_cache
from skipdit.caching.plans import CachePlan
from skipdit.checkpoints.released import to_released
from skipdit.config import to_yaml
from skipdit.diffusion.gaussian import Diffusion
from skipdit.encoders.text import Encoded
from skipdit.layers.adaln import DiTBlock
from skipdit.layers.flops import flop_counter, step_flops
from skipdit.layers.skip import SkipTransformer
from skipdit.metrics import frechet_distance
from skipdit.sampling.class_conditional import generate
from skipdit.text_to_image import sample_t2i
from skipdit.text_to_image.model import Block as HunyuanBlock
from skipdit.text_to_video import sample_t2v
from skipdit.utils.seeding import generators

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare
from baselines import FORA, PAB, Baseline, DBCache, DeltaDiT, TaylorSeer, TeaCache, TGate
from full_size import full_size

STEPS = 6
MODELS = {"image": tiny_dit, "video": tiny_latte, "text-video": tiny_latte_t2v, "text-image": tiny_hunyuan}
WITH_TEXT = ("text-video", "text-image")
IDLE = {  # settings that leave nothing out
    "fora": FORA(1),
    "pab": PAB(1, 1, 1),
    "tgate": TGate(gate=STEPS),
    "taylorseer": TaylorSeer(1, order=2),
    "delta": DeltaDiT(1),
    "fbcache": DBCache(0),
    "dbcache": DBCache(0, front=1, back=1),
    "teacache": TeaCache(0),
}
BUSY = {  # settings that do, on any model
    "fora": FORA(2),
    "pab": PAB(2, 3, 5, low=0, high=1000),
    "tgate": TGate(gate=3),
    "taylorseer": TaylorSeer(2),
    "delta": DeltaDiT(2),
    "fbcache": DBCache(9),
    "dbcache": DBCache(9, front=1, back=1, warmup=3),
    "teacache": TeaCache(9),
}


@dataclass
class Case:
    """A tiny model, and how its task samples: the latents of two samples with guidance."""

    model: SkipTransformer
    timesteps: list[float]
    sample: Callable[[], Tensor]

    def __post_init__(self):
        self.weights = [parameter.detach().clone() for parameter in self.model.parameters()]

    @cached_property
    def reference(self) -> tuple[Tensor, float]:
        """Latents without any caching, and the FLOPs of making them."""
        with flop_counter() as counter:
            latents = self.sample()
        return latents, counter.get_total_flops()


@pytest.fixture(scope="module")
def case(vae_folder, eightfold_vae):
    """`case(task, skip)`, one of each."""
    made: dict[tuple[str, bool], Case] = {}

    def get(task: str, skip: bool = True) -> Case:
        if (task, skip) not in made:
            made[task, skip] = build(task, skip)
        return made[task, skip]

    def build(task: str, skip: bool) -> Case:
        model = MODELS[task](skip=skip)
        if task not in WITH_TEXT:
            labels = torch.tensor([1, 3])

            def sample() -> Tensor:
                settings = {"steps": STEPS, "sampler": "ddim", "guidance_scale": 2.0}
                return generate(model, labels, generators(0, [0, 1], "cpu"), **settings)

            return Case(model, Diffusion(STEPS).sampling_timesteps, sample)
        noise = torch.Generator().manual_seed(0)
        if task == "text-video":
            scheduler = sample_t2v.make_scheduler("ddim")
            pipe = LattePipeline(None, None, AutoencoderKL.from_pretrained(vae_folder), model, scheduler)
            prompt = sample_t2v.Prompt(*torch.randn(2, 1, 7, 12, generator=noise))

            def sample() -> Tensor:
                return sample_t2v.generate(pipe, prompt, generators(0, [0, 1], "cpu"), steps=STEPS)

        else:
            scheduler = sample_t2i.make_scheduler("ddim")
            pipe = sample_t2i.make_pipeline(AutoencoderKL.from_pretrained(eightfold_vae), model, scheduler)

            def text() -> list[Encoded]:
                return [Encoded(torch.randn(2, s, 16, generator=noise), torch.ones(2, s)) for s in (77, 256)]

            text, negative = sample_t2i.TextPair(*text()), sample_t2i.TextPair(*text())

            def sample() -> Tensor:
                settings = {"size": (32, 32), "steps": STEPS}
                return sample_t2i.generate(pipe, text, negative, generators(0, [0, 1], "cpu"), **settings)

        pipe.set_progress_bar_config(disable=True)
        enable_cache(pipe, "none")  # as `PromptSampler.make` does
        scheduler.set_timesteps(STEPS)
        return Case(model, scheduler.timesteps.tolist(), sample)

    return get


def fitting(baselines: dict[str, Baseline], task: str) -> dict[str, Baseline]:
    return {name: baseline for name, baseline in baselines.items() if name != "tgate" or task in WITH_TEXT}


def contents(model: torch.nn.Module) -> dict:
    """What the objects of a model hold: modules and parameters, hooks, functions put over methods."""
    return {name: dict(vars(module)) for name, module in model.named_modules()}


every = [(task, name) for task in MODELS for name in fitting(IDLE, task)]


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize(("task", "name"), every)
def test_idle_is_exact_and_busy_saves(case, task, name, skip):
    it = case(task, skip)
    held = contents(it.model)
    reference, flops = it.reference

    with IDLE[name].on(it.model, it.timesteps) as run:
        assert torch.equal(it.sample(), reference)
    assert (run.full, run.partial) == (STEPS, 0)

    with BUSY[name].on(it.model, it.timesteps) as run:
        with flop_counter() as counter:
            made = it.sample()
        assert torch.equal(it.sample(), made)  # the next batch begins with nothing stored
    change = ((made - reference).norm() / reference.norm()).item()
    assert 1 - counter.get_total_flops() / flops > 0.02 and 0 < change < 0.5
    assert run.full + run.partial == 2 * STEPS and 2 <= run.full < 2 * STEPS
    assert run.peak_bytes > 0 and not run.kept

    assert contents(it.model) == held
    assert all(torch.equal(now, before) for now, before in zip(it.model.parameters(), it.weights, strict=True))


@torch.no_grad()
def calls(model: SkipTransformer, count: int) -> list[Tensor]:
    """Outputs of a model on a slowly changing input."""
    inputs = model.random_inputs(2)
    latents, timestep = list(inputs)[:2]
    drift, outputs = torch.randn_like(inputs[latents]), []
    for i in range(count):
        step = inputs | {latents: inputs[latents] + 0.1 * i**2 * drift, timestep: inputs[timestep] - i}
        out = model(**step)
        outputs.append(out if isinstance(out, Tensor) else out.sample)
    return outputs


@pytest.mark.parametrize(
    ("make", "block", "threshold"),
    [(tiny_dit, DiTBlock, 0.3), (tiny_hunyuan, HunyuanBlock, 0.1)],
    ids=["DiT", "HunyuanDiT"],
)
def test_first_block_cache_is_that_of_diffusers(make, block, threshold):
    """On plain models without anything between their blocks."""
    from diffusers import CacheMixin, FirstBlockCacheConfig
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    class Blocks(CacheMixin, torch.nn.Module):
        pass

    model = make(skip=False)
    with DBCache(threshold).on(model, range(8)) as run:
        ours = calls(_seeded(model), 8)
    assert run.full > 1 and run.partial > 1

    known = TransformerBlockMetadata(return_hidden_states_index=0, _cached_parameter_indices={"hidden_states": 0})
    TransformerBlockRegistry.register(block, known)
    holder = Blocks()
    holder.blocks = model.blocks
    holder.enable_cache(FirstBlockCacheConfig(threshold))
    with holder.cache_context("run"):
        theirs = calls(_seeded(model), 8)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_pyramid_attention_broadcast_is_that_of_diffusers():
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook

    model, timesteps, done = tiny_latte(), [950, 790, 600, 450, 300, 150, 90, 10], []
    with PAB(2, 3, 5).on(model, timesteps):
        ours = calls(_seeded(model), 8)
    for i, block in enumerate(model.blocks):
        hook = PyramidAttentionBroadcastHook((100, 800), 3 if i % 2 else 2, lambda: timesteps[len(done)])
        HookRegistry.check_if_exists_or_initialize(block.attn).register_hook(hook, "pab")
    model.register_forward_hook(lambda *_: done.append(1))
    assert all(torch.equal(a, b) for a, b in zip(ours, calls(_seeded(model), 8), strict=True))


def test_fora_is_taylorseer_of_order_zero():
    """The former is ours, the latter the hook of diffusers."""
    model = tiny_latte_t2v()
    with FORA(3).on(model, range(8)):
        ours = calls(_seeded(model), 8)
    with TaylorSeer(3, order=0).on(model, range(8)):
        assert all(torch.equal(a, b) for a, b in zip(ours, calls(_seeded(model), 8), strict=True))


def test_delta_dit_leaves_out_the_last_layers_then_the_first():
    """Then skips bring what the first layers gave in the last full step."""
    model, ran, brought = tiny_dit(), [], []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran[-1].append(i))
    for j, skip in enumerate(model.skips):
        skip.register_forward_pre_hook(lambda *_, j=j: ran[-1].append(f"skip {j}"))
        skip.register_forward_pre_hook(lambda module, args: brought.append(args[1]))
    model.register_forward_pre_hook(lambda *_: ran.append([]))
    with DeltaDiT(2, share=0.5, boundary=0.5).on(model, range(4)):
        calls(model, 4)
    everything = [0, 1, "skip 0", 2, "skip 1", 3]
    assert ran == [everything, [0, 1], everything, ["skip 0", 2, "skip 1", 3]]
    assert len(brought) == 6 and all(torch.equal(brought[i], brought[i + 2]) for i in (2, 3))


def test_gated_text_is_read_no_more_and_guidance_ends(case):
    """After the gate the halves of guidance would be the same, so one of them runs."""
    it, rows = case("text-video"), []
    hook = it.model.proj_out.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    attended = 0

    def count(*_):
        nonlocal attended
        attended += 1

    reads = it.model.transformer_blocks[0].attn2.to_q.register_forward_pre_hook(count)
    with TGate(gate=2).on(it.model, it.timesteps):
        it.sample()
    hook.remove()
    reads.remove()
    assert rows == [4, 4, 2, 2, 2, 2] and attended == 2


def test_teacache_fit_finds_how_the_output_changes(case):
    it = case("image")
    inputs, outputs = [], []  # the first attention's input has been modulated
    handles = [it.model.blocks[0].attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))]
    handles += [it.model.register_forward_hook(lambda *call: outputs.append(call[-1]))]
    it.sample()
    for handle in handles:
        handle.remove()
    changes = [[float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(kind)] for kind in (inputs, outputs)]
    assert len(changes[0]) == STEPS - 1
    polynomial = TeaCache.fit(it.model, it.timesteps, it.sample, degree=1)
    assert polynomial == pytest.approx(np.polyfit(*changes, 1).tolist(), rel=1e-4)


@pytest.mark.parametrize("polynomial", [(1.0, 0.0), (0.5, 0.0, 0.01)])
def test_teacache_sums_changes_since_the_last_full_step(case, polynomial):
    """On given inputs, where no step depends on what was left out before it."""
    it, seen = case("image"), []
    calls = [it.model.random_inputs(2) for _ in range(STEPS)]
    for i, call in enumerate(calls):
        call |= {"x": calls[0]["x"] + 0.1 * i * call["x"], "t": calls[0]["t"], "y": calls[0]["y"]}
    hook = it.model.blocks[0].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for call in calls:
        it.model(**call)
    hook.remove()
    changes = [float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(seen)]
    rises = np.polyval(polynomial, changes)
    total, expected, threshold = 0.0, [True], 0.4 * rises.sum()
    for rise in rises:
        total += rise
        expected.append(total >= threshold or len(expected) == STEPS - 1)
        total = 0.0 if expected[-1] else total
    found = []
    with TeaCache(threshold, polynomial).on(it.model, it.timesteps) as run:
        for call in calls:
            before = run.full
            it.model(**call)
            found.append(run.full > before)
    assert found == expected and 2 < sum(expected) < STEPS - 1


def test_what_cannot_be_is_refused_and_leaves_nothing_behind(case):
    it = case("image")
    held, inputs = contents(it.model), it.model.random_inputs(4)
    with pytest.raises(ValueError, match="no cross-attention"), TGate(2).on(it.model, it.timesteps):
        pass
    with pytest.raises(ValueError, match="so is Skip-Cache"), FORA(2).on(it.model, it.timesteps):
        it.model(**inputs, cache=SkipCache("N2-1000-0", it.timesteps).at(0))
    with pytest.raises(ValueError, match="guidance at all steps"), FORA(2).on(it.model, it.timesteps):
        it.model(**inputs)
        it.model(**it.model.random_inputs(2))
    with pytest.raises(ValueError, match="leave nothing"), DBCache(1, front=2, back=2).on(it.model, it.timesteps):
        it.model(**inputs)
    with pytest.raises(RuntimeError, match="broke"), TaylorSeer(2).on(it.model, it.timesteps):
        it.sample()
        raise RuntimeError("broke")
    assert contents(it.model) == held
    assert torch.equal(it.sample(), it.reference[0])
    with FORA(2).on(it.model, it.timesteps) as run:
        first = it.sample()
        it.model(**inputs)
        with pytest.raises(ValueError, match="y is missing"):
            it.model(x=inputs["x"], t=inputs["t"], y=None)  # breaks off in the second step
        assert torch.equal(it.sample(), first) and run.step == STEPS - 1


def _seeded(model: SkipTransformer) -> SkipTransformer:
    torch.manual_seed(1)
    return model


def compare_command(monkeypatch, *arguments: str) -> dict:
    """benchmarks/compare.py as a user runs it; its JSON."""
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    compare.main()
    out = Path(arguments[arguments.index("--out") + 1])
    assert (out / "compare.png").stat().st_size > 1000 and "| uncached |" in (out / "compare.md").read_text()
    return json.loads((out / "compare.json").read_text())


@pytest.mark.slow
def test_benchmark_of_both_backbones(released_t2i, tmp_path, monkeypatch):
    settings = {"pipeline": str(released_t2i / "ckpts"), "prompts": ["a dog"], "height": 64, "width": 64, "steps": 6}
    config = sample_t2i.Config(**settings, scheduler="ddim", guidance_scale=2.0)
    (tmp_path / "t2i.yaml").write_text(to_yaml(config))
    torch.save({"ema": to_released(tiny_hunyuan(skip=False).state_dict())}, tmp_path / "plain.pt")
    command = ["--task", "text-to-image", "--config", str(tmp_path / "t2i.yaml"), "--out", str(tmp_path / "out")]
    command += ["--plain", str(tmp_path / "plain.pt"), "--quick"]
    record = compare_command(monkeypatch, *command, "steps=6", "--methods", "skip-cache", "fora", "t-gate")
    rows = {(row["backbone"], row["name"]): row for row in record["rows"]}
    assert {name for backbone, name in rows if backbone == "plain"} == {"uncached", "FORA N3", "T-GATE m2-k1"}
    assert not any("Skip-Cache" in name for backbone, name in rows if backbone == "plain")
    full, cached = rows["skip", "uncached"], rows["skip", "Skip-Cache N2-700-50"]
    assert full["identical"] and (full["full_steps"], full["partial_steps"]) == (6, 0)
    assert (cached["full_steps"], cached["partial_steps"]) == (3, 3) and cached["cache_bytes"] == 2 * 16 * 32 * 4
    assert cached["flops_speedup"] > 1.3 and 10 < cached["psnr"] < 100
    assert rows["skip", "FORA N3"]["flops_speedup"] > cached["flops_speedup"]
    assert all(len(row["seconds"]) == 1 for row in record["rows"])

    monkeypatch.setattr(compare, "measure", lambda backbone, row: pytest.fail(f"{row.key} is measured again"))
    again = compare_command(monkeypatch, *command, "steps=6", "--repeats", "2", "--methods", "skip-cache", "fora")
    assert [row["flops"] for row in again["rows"]] == [
        row["flops"] for row in record["rows"] if row["method"] != "T-GATE"
    ]
    assert all(len(row["seconds"]) == len(row["uncached_seconds"]) == 2 for row in again["rows"])
    assert all(row["speedup"] == 1 for row in again["rows"] if row["method"] == "uncached")
    base = [row["uncached_seconds"] for row in again["rows"] if row["backbone"] == "plain"]
    assert base == base[:1] * len(base)  # one uncached run for all rows of a turn
    with pytest.raises(SystemExit):
        compare_command(monkeypatch, *command, "steps=5")


@pytest.mark.slow
def test_benchmark_of_other_policies(tmp_path, monkeypatch):
    """Plans and drift, whose full steps are counted as they ran; and a distance to real pictures."""
    (tmp_path / "real").mkdir()
    real = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i, pixels in enumerate(real):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"real/{i}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Pooled()).save(tmp_path / "network.pt")
    timesteps = Diffusion(6).sampling_timesteps
    CachePlan(tuple(map(float, timesteps)), (None, (), None, (0.5,), (0.9,), None)).save(tmp_path / "plan.json")
    command = ["--task", "class-to-image", "--quick", "--out", str(tmp_path / "out"), "steps=6", "num_samples=2"]
    command += ["--also", str(tmp_path / "plan.json"), "--also", "D9-m2", "--also", "D0"]
    command += ["--methods", "skip-cache-planned", "skip-cache-drift"]
    command += ["--network", str(tmp_path / "network.pt"), "--reference", str(tmp_path / "real")]
    record = compare_command(monkeypatch, *command)
    rows = {row["name"].split(" of ")[0]: row for row in record["rows"] if row["backbone"] == "skip"}
    steps = {name: (row["method"], row["full_steps"], row["partial_steps"]) for name, row in rows.items()}
    assert steps["Skip-Cache plan"] == ("Skip-Cache planned", 3, 3)
    assert steps["Skip-Cache D9-m2"] == ("Skip-Cache by drift", 2, 4)
    assert steps["Skip-Cache D0"] == ("Skip-Cache by drift", 6, 0) and rows["Skip-Cache D0"]["identical"]
    assert rows["Skip-Cache D0"]["flops"] == rows["uncached"]["flops"]
    made = torch.load(tmp_path / "out/rows/skip-uncached.pt", weights_only=True)
    features = [Pooled()(pixels / 127.5 - 1) for pixels in (made, real)]
    assert rows["uncached"]["frechet"] == pytest.approx(frechet_distance(*features), rel=1e-3)
    assert rows["Skip-Cache plan"]["cache_bytes"] == rows["Skip-Cache D9-m2"]["cache_bytes"]  # both keep two tensors


@pytest.mark.slow
def test_full_size_flops_are_those_of_the_steps():
    """Counted over a run, and by `step_flops` of a full and a cached step."""
    timesteps = Diffusion(4).sampling_timesteps
    table = full_size(tiny_dit, 4, timesteps, CacheSpec(2, 1000, 20), {"Skip-Cache", "FORA"})
    rows = {(row["backbone"], row["name"]): row for row in table}
    steps = step_flops(tiny_dit(), 2)
    assert rows["skip", "uncached"]["flops"] == 4 * steps["full"]
    assert rows["plain", "uncached"]["flops"] == 4 * step_flops(tiny_dit(skip=False), 2)["full"]
    assert rows["skip", "Skip-Cache N2-1000-20"]["flops"] == 2 * (steps["full"] + steps["cached"])
    assert rows["plain", "FORA N2"]["flops_speedup"] > 1.5
