"""The paper's analyses: their numbers against closed forms, and their command line on tiny models."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import skipdit_command, tiny_dit, tiny_hunyuan, tiny_latte, tiny_latte_t2v
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from skipdit.analysis import measure
from skipdit.analysis.trace import Call, predict, record, spread_out, trace
from skipdit.caching.policies import CacheSpec, parse_policy
from skipdit.caching.steps import CacheStep
from skipdit.checkpoints.released import to_released
from skipdit.class_to_image.sample import Config, ImageSampler, ModelConfig
from skipdit.class_to_video import Latte
from skipdit.class_to_video import sample as sample_c2v
from skipdit.config import changed, to_yaml
from skipdit.text_to_image import sample_t2i
from skipdit.text_to_video import sample_t2v

main = skipdit_command("analyze")


@pytest.fixture
def config(tmp_path, vae_folder) -> Config:
    """A tiny DiT, two guided pictures in two batches."""
    torch.save({"ema": to_released(tiny_dit().state_dict())}, tmp_path / "dit.pt")
    return Config(
        weights=str(tmp_path / "dit.pt"),
        vae=str(vae_folder),
        image_size=8,
        num_samples=2,
        batch_size=1,
        sampler="ddim",
        steps=6,
        model=ModelConfig(patch_size=2, hidden_size=32, depth=4, num_heads=2, num_classes=10),
    )


@pytest.fixture
def sampler(config) -> ImageSampler:
    return ImageSampler(config, None)


def call_of(model, rows: int = 2) -> Call:
    inputs = model.random_inputs(rows)
    latents = next(iter(inputs))
    return Call(500.0, latents, inputs)


@pytest.mark.parametrize(
    "model", [tiny_dit(), tiny_dit(skip=False), tiny_latte(), tiny_latte_t2v(fuse="residual"), tiny_hunyuan()]
)
@torch.no_grad()
def test_trace_is_the_forward_pass(model):
    call = call_of(model)
    seen = trace(model, call)
    out = model.forward(**call.arguments)
    out = out if torch.is_tensor(out) else out.sample
    noise = out[:, :, :4] if isinstance(model, Latte) else out[:, :4]
    assert torch.equal(seen.noise, noise) and torch.equal(predict(model, call), noise)
    assert seen.depth == (8 if model.n_skips == 3 else 4) and "run_layers" not in vars(model)
    for i in range(seen.depth):
        assert torch.equal(seen.layer(i, *seen.inputs(i)), seen.outputs[i])
    if model.n_skips:  # the feature is the one that Skip-Cache keeps
        step = CacheStep(2, None)
        model.forward(**call.arguments, cache=step)
        assert torch.equal(seen.feature(2), step.kept_feature)


@pytest.mark.slow
def test_record_sees_every_call_of_the_sampler(sampler):
    noises = []
    runs = record(sampler, 6, see=lambda call, cache, noise: noises.append(noise))
    assert [len(run) for run in runs] == [6, 6]  # two batches
    assert [call.timestep for call in runs[1]] == sampler.timesteps(6)
    assert runs[0][0].x.shape == (2, 4, 4, 4)  # guided: the row comes twice
    torch.testing.assert_close(predict(sampler.model, runs[1][5]), noises[-1])
    assert not sampler.model._forward_hooks
    assert [call.timestep for call in spread_out(runs, 2)] == [runs[0][i].timestep for i in (1, 1, 4, 4)]


def test_directions_have_the_norms_of_the_filters():
    model = tiny_dit()
    direction = measure.random_direction(model, torch.Generator().manual_seed(0))
    weights = dict(model.named_parameters())
    assert set(direction) == {name for name, weight in weights.items() if weight.ndim > 1}
    for name, part in direction.items():
        torch.testing.assert_close(part.flatten(1).norm(dim=1), weights[name].flatten(1).norm(dim=1))
        assert not torch.allclose(part, weights[name])


def test_perturbation_starts_at_zero_and_puts_the_weights_back():
    model = tiny_dit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    surface = measure.perturbation(model, [call_of(model)], [-0.2, -0.1, 0.0, 0.1, 0.2], branch=1, seed=0)
    for grid in surface.values():
        assert grid[2, 2] == 0 and (grid > 0).sum() == 24
        assert grid[2, 4] > grid[2, 3]  # farther, more
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(KeyboardInterrupt), measure.moved(model) as move:
        move((0.5, measure.random_direction(model, torch.Generator())))
        assert not torch.equal(model.blocks[0].mlp.fc1.weight, before["blocks.0.mlp.fc1.weight"])
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_perturbation_is_the_difference_of_two_models():
    """The value at (a, b), once by hand."""
    model, moved = tiny_dit(), tiny_dit()
    call, generator = call_of(model), torch.Generator().manual_seed(3)
    first, second = (measure.random_direction(model, generator) for _ in range(2))
    with torch.no_grad():
        for name, weight in moved.named_parameters():
            if name in first:
                weight += 0.2 * first[name] - 0.1 * second[name]
        new, old = trace(moved, call), trace(model, call)
        feature, noise = ((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1) for a, b in (
            (new.outputs[1], old.outputs[1]), (new.noise, old.noise)))  # fmt: skip
    surface = measure.perturbation(model, [call], [-0.1, 0.0, 0.2], branch=2, seed=3)
    torch.testing.assert_close(surface["feature"][2, 0], feature.mean())
    torch.testing.assert_close(surface["output"][2, 0], noise.mean())
    assert measure.rim(torch.arange(9.0).view(3, 3)).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]


def test_similarity_without_a_cache_is_one(sampler):
    found = measure.similarity(sampler, 6, CacheSpec())
    assert not any(found["cached"]) and found["timesteps"] == sampler.timesteps(6)
    for part in ("feature", "output"):
        assert found[part]["cosine"] == [1.0] * 6 and found[part]["relative_l2"] == [0.0] * 6
        assert found[part]["mean_cosine"] == 1.0


def test_similarity_is_that_of_cached_and_true(sampler):
    """Reuse with N=2: at step 1 the feature is that of step 0, which is the uncached run's as well."""
    model, spec = sampler.model, parse_policy("N2-1000-0")
    found = measure.similarity(sampler, 6, spec)
    assert found["cached"] == [False, True] * 3
    runs = record(sampler, 6)
    with torch.no_grad():
        old, new = (torch.cat([trace(model, run[i]).feature(1) for run in runs]).double() for i in (0, 1))
    cosine = (old * new).sum(-1) / old.norm(dim=-1) / new.norm(dim=-1)
    assert found["feature"]["cosine"][1] == pytest.approx(cosine.mean().item(), abs=1e-6)
    assert found["feature"]["spread"][1] == pytest.approx(cosine.std(correction=0).item(), abs=1e-6)
    assert found["feature"]["cosine"][0::2] == [1.0] * 3 and found["output"]["cosine"][1] < 1
    cached = found["feature"]["cosine"][1::2]
    assert found["feature"]["mean_cosine"] == pytest.approx(sum(cached) / 3)
    ahead = measure.foresight(model, runs, [spec])[str(spec)]
    assert ahead["cached"] == found["cached"]
    assert ahead["feature"]["cosine"][1] == pytest.approx(cosine.mean().item(), abs=1e-6)


def test_likeness_of_the_same_and_of_opposites():
    likeness, x = measure.Likeness(), torch.randn(2, 3, 8)
    likeness.add(9, x, x, tokens=True)
    likeness.add(5, -2 * x, x, tokens=True)
    found = likeness.numbers([True, True])
    assert found["cosine"] == pytest.approx([1, -1]) and found["relative_l2"] == pytest.approx([0, 3])
    assert found["mean_cosine"] == pytest.approx(0, abs=1e-12)


def test_change_of_features_by_hand():
    old = [torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]), torch.ones(1, 2, 2)]
    new = [torch.tensor([[[3.0, 0.0], [4.0, 0.0]]]), 3 * torch.ones(1, 2, 2)]
    found = measure.change(new, old)  # (3, layers, rows)
    expected = [[8 / 7, 2.0], [32**0.5 / 5, 2.0], [0.5, 1.0]]
    torch.testing.assert_close(found[..., 0], torch.tensor(expected))


def test_dynamics_are_the_changes_along_the_run(sampler):
    runs, model = record(sampler, 6), sampler.model
    found = measure.dynamics(model, runs)
    assert found.shape == (3, 4, 5)
    with torch.no_grad():
        pairs = [(trace(model, run[3]).outputs[2], trace(model, run[2]).outputs[2]) for run in runs]
    by_hand = torch.cat([measure.relative(new, old) for new, old in pairs]).mean()
    torch.testing.assert_close(found[1, 2, 2], by_hand)


def test_power_iteration_of_a_linear_map():
    left, right = (torch.linalg.qr(torch.randn(6, 6))[0] for _ in range(2))
    matrix = left @ torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.5, 0.1, 0.0])) @ right
    scales = torch.tensor([[1.0], [3.0]])  # rows by themselves
    found, count = measure.largest_singular_values(lambda x: scales * (x @ matrix), torch.randn(2, 6))
    torch.testing.assert_close(found, torch.tensor([5.0, 15.0]), rtol=1e-3, atol=0)
    assert 1 < count < 50
    assert measure.largest_singular_values(lambda x: 0 * x, torch.randn(2, 6))[0].tolist() == [0, 0]


@pytest.mark.slow
def test_what_torch_deprecates_is_not_told(tmp_path):
    program = "import torch; from skipdit.analysis.measure import largest_singular_values as norm\n"
    program += "norm(lambda x: 2 * x, torch.ones(1, 2))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stderr) == (0, "")


def jacobian_norms(function, x: torch.Tensor) -> torch.Tensor:
    """Largest singular value of every row's Jacobian, all of which is built."""
    with sdpa_kernel(SDPBackend.MATH):
        whole = torch.func.jacrev(function)(x)
    rows = []
    for i in range(len(x)):
        rows.append(whole.select(0, i).select(x.ndim - 1, i).reshape(-1, x[0].numel()))
    return torch.stack([torch.linalg.svdvals(row)[0] for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [tiny_dit(skip=False), tiny_hunyuan(), tiny_latte_t2v(fuse="residual", video_length=2)]
)
def test_layer_norms_against_explicit_jacobians(model):
    seen = trace(model.requires_grad_(False), call_of(model, rows=1))
    last = seen.depth - 1
    x, *rest = seen.inputs(last)
    own, both, _ = measure.layer_norms(seen, last, iterations=50, tolerance=1e-4)
    assert own.item() == pytest.approx(jacobian_norms(lambda x: seen.layer(last, x, *rest), x).item(), rel=1e-2)
    parts = 1 + len(rest)
    joint = jacobian_norms(lambda z: seen.layer(last, *z.chunk(parts, dim=-1)), torch.cat([x, *rest], dim=-1))
    assert both.item() == pytest.approx(joint.item(), rel=1e-2)
    assert (both > own * 1.001) == bool(model.n_skips)


@pytest.mark.slow
def test_jacobian_from_end_to_end_and_its_layers():
    model = tiny_dit().requires_grad_(False)
    call = call_of(model)
    found = measure.jacobian(model, [call], iterations=40, tolerance=1e-3)
    through = jacobian_norms(lambda x: predict(model, call, x), call.x).mean().item()
    assert found["end_to_end"] == [pytest.approx(through, rel=1e-2)]
    own, both, _ = measure.layer_norms(trace(model, call), 2, iterations=40, tolerance=1e-3)
    assert found["layers"][0][2] == pytest.approx(own.mean().item())
    assert found["layers_with_skip_input"][0][2] == pytest.approx(both.mean().item())
    assert found["timesteps"] == [500.0] and len(found["layers"][0]) == 4


def test_bound_by_hand():
    assert measure.bound([1.0, 2.0, 0.5, 3.0], n_skips=2) == [
        {"layer": 2, "g": 0.5, "at_a_1": 0.25},
        {"layer": 3, "g": 3.0, "at_a_1": 81.0},
    ]


SHORT = {
    "perturb": ["--points", "3", "--timesteps", "2"],
    "similarity": ["--spec", "N2-1000-0", "--spec", "N2-1000-0-o1"],
    "dynamics": [],
    "jacobian": ["--timesteps", "1", "--iterations", "3"],
}


def run(folder, task, config, *arguments) -> dict:
    """A command line on a config in the task's folder; its record, after a look at its picture."""
    file = folder / task / "run.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(to_yaml(config))
    analysis = arguments[0]
    main([*arguments, "--config", str(file), "--out", str(folder / "found"), *SHORT[analysis]])
    with Image.open(folder / "found" / f"{analysis}.png") as picture:
        pixels = np.array(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    return json.loads((folder / "found" / f"{analysis}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("analysis", SHORT)
def test_command_line_on_images(config, tmp_path, analysis, capsys):
    torch.save({"ema": to_released(tiny_dit(1, skip=False).state_dict())}, tmp_path / "plain.pt")
    found = run(
        tmp_path, "class-to-image", config, analysis, "num_samples=1", "steps=4", "--plain", str(tmp_path / "plain.pt")
    )
    assert set(found["models"]) == {"with skips", "plain"}
    assert found["configs"]["plain"]["weights"] == str(tmp_path / "plain.pt")
    assert found["configs"]["with skips"]["num_samples"] == 1 and found["versions"]["torch"] == torch.__version__
    assert "plain" in capsys.readouterr().out
    skip, plain = found["models"]["with skips"], found["models"]["plain"]
    if analysis == "perturb":
        assert np.shape(skip["feature"]) == np.shape(plain["output"]) == (3, 3) and skip["output"][1][1] == 0
        assert len(skip["timesteps"]) == 2
    elif analysis == "similarity":
        assert set(skip["cached_runs"]) == set(plain["foresight"]) == {"N2-1000-0", "N2-1000-0-o1"}
        assert "cached_runs" not in plain
    elif analysis == "dynamics":
        assert np.shape(skip["cosine"]) == (4, 3)
    else:
        assert np.shape(skip["layers"]) == (1, 4) and [row["layer"] for row in found["bound"]] == [2, 3]
        assert found["bound"][1]["measured"] == skip["layers"][0][3]


@pytest.mark.slow
@pytest.mark.parametrize("analysis", SHORT)
def test_command_line_on_videos(released_t2v, tmp_path, analysis):
    folder = released_t2v / "Latte-0"
    config = sample_t2v.Config(
        weights=str(released_t2v / "Latte-skip.pt"), pipeline=str(folder), prompts=["a dog runs"], steps=4
    )
    config = changed(config, {"num_frames": 2, "height": 16, "width": 16})
    found = run(tmp_path, "text-to-video", config, analysis)
    assert set(found["models"]) == {"with skips"} and found["models"]["with skips"]["n_skips"] == 2


@pytest.mark.slow
def test_classes_of_videos(config, tmp_path):
    torch.save({"ema": to_released(tiny_latte().state_dict())}, tmp_path / "latte.pt")
    tiny = {"patch_size": 2, "hidden_size": 32, "depth": 8, "num_heads": 2, "num_classes": 5}
    settings = {"vae": config.vae, "image_size": 8, "num_frames": 4, "num_samples": 1, "steps": 3, "sampler": "ddpm"}
    model = sample_c2v.ModelConfig(**tiny)
    clips = sample_c2v.Config(weights=str(tmp_path / "latte.pt"), guidance_scale=4.0, model=model, **settings)
    found = run(tmp_path, "class-to-video", clips, "dynamics")
    assert np.shape(found["models"]["with skips"]["relative_l2"]) == (4, 2)


@pytest.mark.slow
def test_prompts_of_pictures(released_t2i, tmp_path):
    settings = {"prompts": ["the dog runs"], "height": 64, "width": 64, "steps": 3, "scheduler": "ddim"}
    found = run(
        tmp_path, "text-to-image", sample_t2i.Config(pipeline=str(released_t2i / "ckpts"), **settings), "dynamics"
    )
    assert np.shape(found["models"]["with skips"]["relative_l2"]) == (8, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["perturb", "--task", "pictures"], "--task class-to-image"),
        (["perturb", "--points", "2"], "--points is 2"),
        (["similarity", "--spec", "N2-1000-0-b3"], "branch 3 is larger"),
        (["similarity", "--spec", "N2-1000-0-b0-o1"], "--spec N2-1000-0-b0-o1 has forecast steps"),
        (["similarity", "--spec", "configs/class-to-image/demo_plan.json"], "demo_plan.json has forecast steps"),
        (["dynamics", "guidance_low=300", "guidance_high=500"], "guidance begins or ends within the run"),
        (["similarity", "model.skip=false"], "similarity needs a model with skips"),
        (["dynamics", "steps=1"], "steps is 1"),
        (["jacobian", "--plain", "nowhere.pt"], "weights=nowhere.pt"),
    ],
)
def test_bad_input_is_named(config, tmp_path, capsys, arguments, complaint):
    if "model.skip=false" in arguments:
        torch.save({"ema": to_released(tiny_dit(skip=False).state_dict())}, config.weights)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    task = [] if "--task" in arguments else ["--task", "class-to-image"]
    with pytest.raises(SystemExit):
        main([*arguments, *task, "--config", str(tmp_path / "run.yaml")])
    assert complaint in capsys.readouterr().err
