"""What has to hold for every input of a kind: specs, plans, jobs and configs as nobody has thought of them."""

import copy
import json
import random
import string
import tempfile
import threading
import typing
import warnings
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_dit
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import CacheSpec, DriftSpec, parse_policy
from skipdit.caching.runtime import SkipCache
from skipdit.class_to_image import sample, train
from skipdit.config import ConfigError, load_config, to_yaml
from skipdit.diffusion.gaussian import Diffusion
from skipdit.evaluation.compare import check_plans
from skipdit.sampling.class_conditional import generate
from skipdit.sampling.job import Job
from skipdit.text_to_image import sample_t2i
from skipdit.text_to_video import train as t2v_train
from skipdit.utils.seeding import generators

settings.register_profile(
    "here", max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("here")


# Specs

small = st.integers(0, 10**6)
specs = st.builds(CacheSpec, st.integers(1, 99), small, small, st.integers(1, 40), st.integers(0, 1))
drifts = st.builds(DriftSpec, st.floats(0, 1e6), st.integers(0, 99), st.integers(1, 40), st.integers(0, 1))
schedules = st.lists(st.integers(0, 999), min_size=1, max_size=60, unique=True).map(lambda ts: sorted(ts)[::-1])


@pytest.mark.slow
@given(specs | drifts)
@example(DriftSpec(0.12345678))
@example(DriftSpec(1e-7))
def test_a_spec_is_what_it_says_it_is(spec):
    """What a job keeps of a spec is its text."""
    assert parse_policy(str(spec)) == spec
    assert parse_policy(f"  {spec} ") == spec


@pytest.mark.slow
@given(st.text(max_size=30) | st.text("ND0123456789.-bmo+e ", max_size=30) | st.text("N0-1b", max_size=12))
@example("N2-7\u0660-5")
@example("D" + "9" * 400)
@example("N" + "1" * 5000 + "-1-1")
@example("\x00.json")
def test_any_other_text_is_refused_in_a_sentence(text):
    try:
        spec = parse_policy(text)
    except (ValueError, FileNotFoundError) as error:
        assert len(str(error)) > 20
    else:
        assert parse_policy(str(spec)) == spec


@pytest.mark.filterwarnings("ignore:cache .* never engages")
@given(specs, schedules)
def test_the_plan_of_a_spec(spec, timesteps):
    plan = spec.full_mask(timesteps)
    assert len(plan) == len(timesteps) and plan[0] is True
    assert all(full for full, t in zip(plan, timesteps, strict=True) if t >= spec.start)
    runs = "".join("f" if full else "c" for full in plan).split("f")
    assert max(map(len, runs)) < spec.interval
    cache = SkipCache(spec, timesteps)
    assert cache.full_steps == sum(plan) and sum(cache.counts().values()) == len(timesteps)


# Plans


@st.composite
def plans(draw) -> CachePlan:
    timesteps, kinds, features, outputs = draw(schedules), "", [], []

    def coefficients(stored: int):
        return tuple(draw(st.lists(st.floats(-9, 9), max_size=min(max(stored - 1, 0), 3))))

    for _ in timesteps:
        kinds += draw(st.sampled_from("FSO")) if kinds else "F"
        features.append(coefficients(kinds.count("F")) if kinds[-1] == "S" else None)
        outputs.append(coefficients(kinds.count("F") + kinds.count("S")))
    return CachePlan(tuple(map(float, timesteps)), tuple(features), 1, kinds, tuple(outputs))


@given(plans())
def test_a_plan_is_read_as_it_was_written(plan):
    with tempfile.TemporaryDirectory() as folder:
        plan.save(f"{folder}/plan.json")
        again = parse_policy(f"{folder}/plan.json")
    assert again == plan and str(again) == str(plan)
    assert list(SkipCache(again, plan.timesteps).counts().values()) == [plan.kinds.count(kind) for kind in "FSO"]


ODD = [None, True, 0, -1, 1.5, 3, 1e400, float("nan"), "", "12", "\u0663", [], [1, "2"], [None], {}, {"a": 1}]
ODD += [10**400, [[0.5]], {"seed": 1}]


def mutated(content, rng: random.Random):
    """The same JSON, one place in it another."""
    content = copy.deepcopy(content)
    node, way = content, []
    while isinstance(node, dict | list) and node and (not way or rng.random() < 0.8):
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        way.append((node, key))
        node = node[key]
    holder, key = way[-1]
    if rng.random() < 0.2:
        del holder[key]
    elif rng.random() < 0.2 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(rng.choice([node, *ODD])))
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    return content


def scribbled(text: bytes, rng: random.Random) -> bytes:
    place, some = rng.randrange(len(text)), bytes(rng.randrange(256) for _ in range(rng.randrange(4)))
    return text[:place] + some + text[place + rng.randrange(30) :]


@pytest.mark.slow
def test_a_thousand_mutated_plans(tmp_path):
    """Each is refused in an error that names the file, or says exactly what it is read as."""
    rng, file = random.Random(0), tmp_path / "plan.json"
    whole = (ROOT / "benchmarks/plans/12-blocks-13.json").read_bytes()
    model, refused = torch.nn.Linear(1, 1), 0
    for number in range(1000):
        content = scribbled(whole, rng) if number % 4 == 0 else json.dumps(mutated(json.loads(whole), rng)).encode()
        file.write_bytes(content)
        try:
            plan = parse_policy(str(file))
        except ValueError as error:
            assert str(file) in str(error)
            refused += 1
            continue
        said = json.loads(content)
        assert list(plan.timesteps) == said["timesteps"]
        assert [None if ws is None else list(ws) for ws in plan.features] == said["weights"]
        assert type(said["branch"]) is int and plan.branch == said["branch"]
        assert SkipCache(plan, plan.timesteps).full_steps == plan.kinds.count("F")
        sampler = SimpleNamespace(
            config=SimpleNamespace(seed=1, guidance_scale=2.0, steps=50),
            method="ddim",
            model=model,
            timesteps=lambda steps, plan=plan: plan.timesteps,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_plans([plan], sampler)
    assert 300 < refused < 1000


# Jobs


@given(
    total=st.integers(0, 30),
    world=st.integers(1, 5),
    made=st.sets(st.integers(0, 29)),
    data=st.data(),
)
def test_processes_share_a_job(total, world, made, data):
    """Between them they make every sample that is not there, once."""
    names = data.draw(st.none() | st.just([f"{i:03d}-é" for i in range(total)]))
    with tempfile.TemporaryDirectory() as folder:
        jobs = [Job(folder, {"seed": 1}, total, "png", rank, world, names) for rank in range(world)]
        made = {i for i in made if i < total}
        for i in made:
            jobs[0].save(i, lambda path: path.write_bytes(b"sample"))
        assert jobs[0].made() == len(made) and jobs[0].is_complete() == (len(made) == total)
        assert sorted(i for job in jobs for i in job.pending()) == sorted(set(range(total)) - made)
        again = Job(folder, {"seed": 1}, total, "png", 0, 1, names)
        assert again.pending() == sorted(set(range(total)) - made)
        if made:
            with pytest.raises(ValueError, match="seed: 1 there, 2 now"):
                Job(folder, {"seed": 2}, total, "png", 0, 1, names)


# Configs

SCHEMAS = [sample.Config, train.Config, sample_t2i.Config, t2v_train.Config]
words = st.text(string.printable + "é渔\u2028\u0085\x07", max_size=12) | st.sampled_from(
    ["no", "007", "1e3", "null", "~", "", " ", "a: b", "- x", "#", "'", '"', "\n", "yes\n", "1:30", "!!int 3", "*a"]
)
words = words.filter(lambda text: "$" not in text and not text.startswith(("~/", "~\\")) and text != "???")


def values_of(kind) -> st.SearchStrategy:
    """Whatever a setting of a type may be."""
    simple = {int: st.integers(0, 2**40), float: st.floats(allow_nan=False), bool: st.booleans(), str: words}
    if kind in simple:
        return simple[kind]
    parts, origin = typing.get_args(kind), typing.get_origin(kind)
    if origin is tuple:
        return st.tuples(*map(values_of, parts))
    if origin is list:
        return st.lists(values_of(parts[0]), max_size=3)
    return st.one_of(*(st.none() if part is NoneType else values_of(part) for part in parts))


@st.composite
def configs(draw, schema):
    """A config with a few settings of its own."""
    own = {}
    for entry in fields(schema):
        if is_dataclass(entry.type):
            own[entry.name] = draw(configs(entry.type))
        elif entry.default == "???" or draw(st.integers(0, 3)) == 0:
            own[entry.name] = draw(values_of(entry.type))
    try:
        return schema(**own)
    except ValueError:
        assume(False)


@pytest.mark.slow
@pytest.mark.parametrize("schema", SCHEMAS)
@settings(max_examples=12)
@given(data=st.data())
def test_a_config_is_read_as_it_was_written(schema, data):
    config = data.draw(configs(schema))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.yaml")
        file.write_text(to_yaml(config), encoding="utf-8", newline="")
        assert load_config(schema, file) == config


@pytest.mark.slow
@given(st.text(max_size=40) | st.from_regex(r"(train\.|data\.|model\.)?[a-z_]{1,12}=.{0,12}", fullmatch=True))
@example("=")
@example("train=")
@example("train.=1")
@example(".=1")
@example("train.steps.x=1")
@example("out=${out}")
@example("data.path=[1, {2: 3}]")
@example("train.betas=[1]")
@example("steps=1_0")
def test_any_override_is_taken_or_refused_in_a_sentence(text):
    try:
        load_config(train.Config, None, [text])
    except ConfigError as error:
        assert str(error)


@given(st.text(max_size=60) | st.from_regex(r"((train|data|out|model): ?[\[\]{}&*!|>'\"%@`a-z0-9:, -]{0,20}\n){1,4}"))
@example("out: &a [*a]")
@example("train: 3")
@example("out:\n\ttabs: 1")
@example("? [a]\n: 1")
@example("1: 2")
@example("out: !!python/object/apply:os.system ['true']")
@example("a: b\n---\nc: d")
@example("train: {steps: 1, steps: 2}")
def test_any_file_is_read_or_refused_in_a_sentence(text):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.yaml")
        file.write_bytes(text.encode("utf-8", errors="surrogatepass"))
        try:
            load_config(train.Config, file)
        except ConfigError as error:
            assert str(file) in str(error)


# Threads


@pytest.mark.filterwarnings("ignore:cache D0.1 cached none")
def test_eight_threads_with_one_model_and_their_own_caches():
    """Every sample is that of a run alone, to the bit."""
    model = tiny_dit()
    kinds = ["none", "N2-1000-20", "N3-1000-20-b2", "N2-1000-20-o1", "N4-900-0-o1", "D0.1", "D0.3-o1", "N2-500-100"]

    def run(number: int) -> torch.Tensor:
        labels, noise = torch.tensor([number, 3]), generators(number, [0, 1], "cpu")
        cache = SkipCache(kinds[number], Diffusion(12).sampling_timesteps)
        return generate(model, labels, noise, steps=12, sampler="ddim", guidance_scale=1.5 + number, cache=cache)

    alone, together = [run(number) for number in range(8)], {}
    threads = [threading.Thread(target=lambda n=n: together.update({n: run(n)})) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        assert torch.equal(together[number], expected), kinds[number]
