"""The ComfyUI node: sampling by `comfy`, of which tests/integrations/stand_in.py has what the node needs."""

import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from conftest import ROOT, assert_close, tiny_dit
from diffusers import FlowMatchEulerDiscreteScheduler
from integrations import stand_in
from integrations.stand_in import (
    BaseModel,
    CFGGuider,
    Flow,
    ModelPatcher,
    Noise,
    Options,
    Velocity,
    cond,
    sample_dpm_2,
    sample_euler,
    sample_heun,
    simple_scheduler,
)
from pipelines.tiny import build
from torch import Tensor, nn

from skipdit import SkipCache, enable_cache
from skipdit.caching import CachePlan

PACKAGE = ROOT / "integrations/comfyui"
FORECASTS = "N3-1000-0-b0-o1"
STEPS = 8


@pytest.fixture(scope="module")
def package() -> Iterator[ModuleType]:
    """Imported as ComfyUI imports a folder of custom_nodes: by its path, which is its name too."""
    stand_in.install()
    name = str(PACKAGE).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, PACKAGE / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for loaded in [m for m in sys.modules if m.partition(".")[0] in (name, "comfy")]:
        del sys.modules[loaded]


@pytest.fixture
def node(package) -> type:
    (kind,) = package.NODE_CLASS_MAPPINGS.values()
    return kind


@pytest.fixture
def patch(node) -> Callable[..., ModelPatcher]:
    def patched(model: ModelPatcher, cache: str = FORECASTS, last_full: int = 0) -> ModelPatcher:
        (result,) = getattr(node(), node.FUNCTION)(model=model, cache=cache, last_full=last_full)
        return result

    return patched


class ForComfy(nn.Module):
    """A DiT for classes, called as ComfyUI calls a network."""

    def __init__(self):
        super().__init__()
        self.dit = tiny_dit(input_size=8).eval()

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: Options) -> Tensor:
        return self.dit(x, timesteps, context[:, 0, 0].long())[:, :4]


PROMPT, OTHER, NONE = (cond(c_crossattn=torch.full((1, 1, 1), float(i))) for i in (1, 0, 2))


@pytest.fixture(params=[Flow, Noise, Velocity])
def model(request) -> ModelPatcher:
    return ModelPatcher(BaseModel(ForComfy(), request.param()))


@pytest.fixture
def flow() -> ModelPatcher:
    return ModelPatcher(BaseModel(ForComfy(), Flow()))


def sample(model: ModelPatcher, steps: int = STEPS, batch: int = 2, cfg: float = 3.0, **options) -> Tensor:
    """Sample from the same noise at every call. Options: sampler, sigmas, positive, negative, capacity, callback."""
    noise = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    guider = CFGGuider(model, options.get("positive", [PROMPT]), options.get("negative", [NONE]), cfg)
    guider.capacity = options.get("capacity")
    sigmas = options.get("sigmas", simple_scheduler(model.get_model_object("model_sampling"), steps))
    return guider.sample(noise, options.get("sampler", sample_euler), sigmas, options.get("callback"))


def calls(model: ModelPatcher, **options) -> int:
    """How often the network runs in a sampling run."""
    model.model.calls.clear()
    sample(model, **options)
    return len(model.model.calls)


def test_comfyui_finds_the_node(package, node):
    assert list(package.NODE_CLASS_MAPPINGS) == list(package.NODE_DISPLAY_NAME_MAPPINGS)
    assert list(package.NODE_DISPLAY_NAME_MAPPINGS.values()) == ["Skip-Cache: output forecast"]
    inputs = node.INPUT_TYPES()["required"]
    assert {name: kind[0] for name, kind in inputs.items()} == {"model": "MODEL", "cache": "STRING", "last_full": "INT"}
    assert inputs["cache"][1]["default"] == FORECASTS and inputs["last_full"][1]["default"] == 1
    assert node.RETURN_TYPES == ("MODEL",) and callable(getattr(node, node.FUNCTION)) and node.CATEGORY


def test_the_package_has_what_comfyui_s_registry_asks_for():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["comfy"]["PublisherId"] and project["tool"]["comfy"]["DisplayName"]
    assert "comfyui" not in project["project"]["name"].lower()


@pytest.mark.slow
def test_the_node_needs_nothing_that_comfyui_has_not_got():
    """skipdit may be installed without its dependencies there: torch, numpy and tqdm are ComfyUI's own."""
    code = "import sys; from skipdit.caching import SkipCache, parse_policy; SkipCache('N2-9-0-b0', [2, 1]); "
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "numpy"} <= set(loaded)
    assert not {"diffusers", "transformers", "accelerate", "omegaconf", "timm", "av", "einops"} & set(loaded)


@pytest.mark.filterwarnings("ignore:cache N3-0-0-b0 never engages")
@pytest.mark.parametrize("cache", ["N1-1000-0", "N1-1000-0-b0-o1", "none", "N3-0-0-b0"])
def test_what_caches_nothing_changes_nothing(model, patch, cache):
    assert torch.equal(sample(patch(model, cache)), sample(model))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_forecasts_are_those_of_the_library(model, patch, cfg):
    """As in a loop of one's own over the network, with a `SkipCache`."""
    network, sampling, sigmas = (
        model.model.diffusion_model,
        model.model.model_sampling,
        simple_scheduler(model.model.model_sampling, STEPS),
    )
    timesteps = sampling.timestep(sigmas[:-1])
    cache = SkipCache(FORECASTS, timesteps)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * sigmas[0]
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            denoised = []
            for one in (PROMPT, NONE):
                step, sigma = cache.at(i, stream=str(one["uuid"])), sigmas[i].expand(2)
                if (output := step.forecast) is None:
                    label, network_input = one["model_conds"]["c_crossattn"], sampling.calculate_input(sigma, x)
                    output = step.finish(network(network_input, t.expand(2).float(), label.expand(2, 1, 1), {}))
                denoised.append(sampling.calculate_denoised(sigma, output, x))
            guided = denoised[0] if cfg == 1 else denoised[1] + cfg * (denoised[0] - denoised[1])
            x = x + (x - guided) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    patched = patch(model)
    assert calls(patched, cfg=cfg) == sum(cache.plan) < STEPS
    assert_close(sample(patched, cfg=cfg), x)
    assert not torch.allclose(sample(model, cfg=cfg), x, rtol=1e-2, atol=1e-2)


class SD3ForComfy(nn.Module):
    """diffusers' transformer of Stable Diffusion 3, called as ComfyUI calls a network."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor, transformer_options: Options) -> Tensor:
        return self.transformer(x, context, y, timesteps, return_dict=False)[0]


@pytest.mark.parametrize("kind", ["spec", "plan", "plan with corrections"])
def test_forecasts_are_those_of_enable_cache(patch, tmp_path, kind):
    """In diffusers' pipeline of the same model, with the same noise: its plans are plans for ComfyUI's steps."""
    pipe, call = build("StableDiffusion3Pipeline")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas = simple_scheduler(Flow(shift=3.0), 5)
    cache, last_full = FORECASTS, 0
    if kind != "spec":
        pipe.scheduler.set_timesteps(sigmas=torch.arange(5, 0, -1).div(5).tolist())
        outputs = ((), (), (0.7,), (-0.1,) if kind == "plan with corrections" else (), (0.9,))
        timesteps = tuple(pipe.scheduler.timesteps.tolist())
        CachePlan(timesteps, (None,) * 5, 0, "FFOFO", outputs).save(tmp_path / "plan.json")
        cache = str(tmp_path / "plan.json")
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    enable_cache(pipe, cache)
    call |= {"latents": noise, "sigmas": torch.arange(5, 0, -1).div(5).tolist(), "guidance_scale": 3.0}
    call.pop("num_inference_steps")
    expected = pipe(**call)[0]
    model = ModelPatcher(BaseModel(SD3ForComfy(pipe.transformer), Flow(shift=3.0)))
    prompts = [
        [cond(c_crossattn=call[f"{name}prompt_embeds"], y=call[f"{name}pooled_prompt_embeds"])]
        for name in ("", "negative_")
    ]
    guider = CFGGuider(patch(model, cache, last_full), *prompts, 3.0)
    assert_close(guider.sample(noise, sample_euler, sigmas), torch.as_tensor(expected))
    assert len(model.model.calls) == sum(pipe._skip_cache.run.plan) < 5


@pytest.mark.parametrize("last_full, expected", [(0, "100100100100"), (1, "100100100101"), (5, "100100111111")])
def test_first_and_last_steps_run_the_model(flow, patch, last_full, expected):
    """The first one always, the last ones as the node says."""
    before, ran = [0], ""

    def callback(*_) -> None:
        nonlocal ran
        before.append(len(flow.model.calls))
        ran += str(int(before[-1] > before[-2]))

    sample(patch(flow, FORECASTS, last_full), steps=12, callback=callback)
    assert ran == expected


@pytest.mark.filterwarnings("ignore:cache N3-1000-0-b0-o1 cached none")
def test_runs_do_not_meet(flow, patch):
    """A, B, A: other steps, batch, guidance and sampler in between. The model itself samples as before."""
    uncached, patched = sample(flow), patch(flow)
    first = sample(patched)
    sample(patched, steps=5, batch=3, cfg=1.0, sampler=sample_heun)
    assert torch.equal(sample(patched), first)
    assert torch.equal(sample(flow), uncached) and not torch.equal(first, uncached)
    assert not flow.wrappers and list(flow.model_options) == ["transformer_options"]


def test_batched_and_sequential_guidance_agree(model, patch):
    """How many halves fit into one call may change from step to step."""
    patched = patch(model)
    together = sample(patched)
    assert_close(sample(patched, capacity=itertools.repeat(1)), together)
    assert_close(sample(patched, capacity=itertools.cycle([1, 2, 2])), together)


def test_prompts_are_kept_apart(model, patch):
    """Several of them, one of which ends early, with ComfyUI's names for them and without, as before it had those."""
    early = OTHER | {"timestep_end": float(simple_scheduler(model.model.model_sampling, STEPS)[4])}
    late = OTHER | {"timestep_start": float(simple_scheduler(model.model.model_sampling, STEPS)[4])}
    for several in ([PROMPT, early], [PROMPT, late]):
        patched = patch(model)
        together = sample(patched, positive=several)
        assert_close(sample(patched, positive=several, capacity=itertools.repeat(1)), together)
        assert torch.equal(sample(patched, positive=several), together)
    nameless = [{"model_conds": one["model_conds"]} for one in (PROMPT, NONE)]
    assert torch.equal(sample(patched, positive=nameless[:1], negative=nameless[1:]), sample(patched))


def test_a_prompt_that_begins_late_runs_the_model(flow, patch):
    """At steps 4 and 5, which are forecasts for the others: the spec makes step 6 full."""
    late = OTHER | {"timestep_start": float(simple_scheduler(Flow(), STEPS)[4])}
    assert calls(patch(flow), positive=[PROMPT, late]) == calls(patch(flow)) + 2


@pytest.mark.parametrize("step", [0, 2, 4])
def test_an_interrupted_run_leaves_nothing(flow, patch, step):
    patched = patch(flow)
    expected = sample(patched)

    def interrupt(i: int, *_) -> None:
        if i == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(patched, callback=interrupt)
    assert held(patched) == []
    assert torch.equal(sample(patched), expected)


def held(model: ModelPatcher) -> list[Tensor]:
    """Tensors that the node keeps."""
    found, seen, queue = [], set(), [w.__self__ for keys in model.wrappers.values() for (w,) in keys.values()]
    while queue:
        thing = queue.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, dict):
            queue += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set):
            queue += thing
        elif hasattr(thing, "__dict__") and not isinstance(thing, type | ModuleType):
            queue += vars(thing).values()
    return found


def test_a_run_within_a_run_is_one_of_its_own(flow, patch):
    """Some samplers sample at each of their steps."""
    patched = patch(flow)
    inner, expected = [], sample(patched)
    assert torch.equal(sample(patched, callback=lambda *_: inner.append(sample(patched))), expected)
    assert len(inner) == STEPS and all(torch.equal(each, expected) for each in inner)


def test_the_log_has_a_line_on_every_run(flow, patch, caplog):
    caplog.set_level("INFO")
    for sampler in (sample_euler, sample_dpm_2):
        sample(patch(flow), sampler=sampler)
    sample(patch(flow, "none"))
    assert caplog.messages == [
        "Skip-Cache N3-1000-0-b0-o1: the model ran at 3 of 8 steps",
        "Skip-Cache N3-1000-0-b0-o1: the model ran at 3 of 8 steps, and 7 times between them, as this sampler does",
        "Skip-Cache none: the model ran at 8 of 8 steps",
    ]


def test_another_size_within_a_run_starts_anew(flow, patch):
    """Samplers may change the latents on the way."""

    def changing(model: Callable, x: Tensor, sigmas: Tensor, extra_args: Options, callback: None) -> Tensor:
        x = sample_euler(model, x, sigmas[:5], extra_args, callback)
        return sample_euler(model, x[:1], sigmas[4:], extra_args, callback)

    assert calls(patch(flow), sampler=changing) == calls(patch(flow)) + 2  # steps 4 and 5, forecasts otherwise
    assert sample(patch(flow), sampler=changing).isfinite().all()


def test_a_sampler_that_calls_twice_a_step(flow, patch):
    """Heun's calls of one sigma are two streams of outputs; those between the sigmas of a run are made."""
    uncached = {sampler: calls(flow, sampler=sampler) for sampler in (sample_heun, sample_dpm_2)}
    patched = patch(flow)
    assert calls(patched, sampler=sample_heun) < uncached[sample_heun]
    assert_close(sample(patched, sampler=sample_heun), sample(flow, sampler=sample_heun), 0.3)
    cached = calls(patched)
    assert calls(patched, sampler=sample_dpm_2) == cached + (uncached[sample_dpm_2] - STEPS)


def test_a_sampler_that_goes_back_starts_anew(flow, patch):
    def restarted(model: Callable, x: Tensor, sigmas: Tensor, extra_args: Options, callback: None) -> Tensor:
        x = sample_euler(model, x, sigmas[:6], extra_args, callback)
        return sample_euler(model, x, sigmas[3:], extra_args, callback)

    assert calls(patch(flow), sampler=restarted) == 2 + 2  # steps 0, 3 of the first, 3, 6 of the second
    assert sample(patch(flow), sampler=restarted).isfinite().all()


@pytest.mark.parametrize(
    "cache, words",
    [
        ("fast", "cache spec 'fast' does not parse"),
        ("N2-700-50", "N2-700-50 has cached steps.*: write N3-1000-0-b0-o1"),
        ("D0.2", "D0.2 has cached steps"),
        ("no/such.json", "no plan no/such.json"),
    ],
)
def test_errors_say_what_to_do(node, flow, patch, cache, words):
    """Before anything runs, and again if the text comes from another node."""
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        patch(flow, cache)
    told = node.VALIDATE_INPUTS(cache=cache)
    assert isinstance(told, str) and "\n" not in told


def test_good_input_is_accepted(node):
    assert node.VALIDATE_INPUTS(cache=FORECASTS) is True
    assert node.VALIDATE_INPUTS(cache=None) is True  # from another node: not known yet


def plan_for(sigmas: Tensor, kinds: str, file) -> str:
    CachePlan(tuple((1000 * sigmas[:-1]).tolist()), (None,) * len(kinds), 0, kinds, ((),) * len(kinds)).save(file)
    return str(file)


def test_a_plan_for_other_steps_is_refused(flow, patch, tmp_path):
    plan = plan_for(simple_scheduler(Flow(), 4), "FOFO", tmp_path / "plan.json")
    assert calls(patch(flow, plan), steps=4) == 2
    for steps, sigmas in ((5, simple_scheduler(Flow(), 5)), (4, simple_scheduler(Flow(3.0), 4))):
        with pytest.raises(ValueError, match=f"plan.json is for 4 steps from .* this run has {steps} steps from 1000"):
            sample(patch(flow, plan), sigmas=sigmas)
    assert flow.model.calls[4:] == [], "the model ran"


def test_a_plan_that_changes_is_read_again(node, tmp_path):
    file = tmp_path / "plan.json"
    first = node.IS_CHANGED(cache=plan_for(simple_scheduler(Flow(), 4), "FOFO", file), model=None, last_full=1)
    assert node.IS_CHANGED(cache=str(file), model=None, last_full=1) == first
    plan_for(simple_scheduler(Flow(), 4), "FOOO", file)
    assert node.IS_CHANGED(cache=str(file), model=None, last_full=1) != first


def test_a_second_node_replaces_the_first(flow, patch):
    assert calls(patch(patch(flow), "N4-1000-0-b0")) == calls(patch(flow, "N4-1000-0-b0")) < calls(patch(flow))
    assert torch.equal(sample(patch(patch(flow), "none")), sample(flow))


@pytest.fixture
def nodes(node) -> ModuleType:
    return sys.modules[node.__module__]


def test_a_plan_of_forecasts_has_no_cached_steps(nodes):
    assert nodes.forecasting_policy(str(ROOT / "configs/class-to-image/demo_plan.json")).branch == 1


def test_sigmas_that_are_rounded_above_one_are_those_of_a_flow(nodes):
    table = torch.linspace(0.001, 1.00000012, 1000)
    assert nodes.timesteps_of(nodes.forecasting_policy("N2-1000-0-b0"), table[[-1, 499]], table) == pytest.approx(
        [1000, 500], abs=1e-2
    )


def test_the_window_is_in_timesteps_of_any_model(patch):
    """1000 is noise and 0 is none, whatever unit a model has for it."""
    counts = set()
    for sampling in (Flow(), Flow(multiplier=1.0, size=10000), Noise(), Velocity()):
        model = ModelPatcher(BaseModel(ForComfy(), sampling))
        counts.add(calls(patch(model, "N3-600-0-b0-o1")))
    assert counts == {5}  # four above 600, and every third one


def test_the_shift_of_another_node_counts(patch):
    model = ModelPatcher(BaseModel(ForComfy(), Flow()))
    shifted = model.clone()
    shifted.add_object_patch("model_sampling", Flow(shift=3.0))
    few, many = (calls(patch(each, "N3-600-0-b0-o1")) for each in (model, shifted))
    assert few < many  # more of its steps are above 600
