"""What every task's sampler holds to: a sample is what it is, however and in whatever company it is made."""

import json
from pathlib import Path

import pytest
from conftest import run_sampler
from torch import Tensor
from torchvision.io import read_image

from skipdit.config import changed
from skipdit.data.video import read_mp4
from skipdit.tasks import TASKS

LEVELS = {".png": 1, ".mp4": 2}  # by which a sample may differ that was made in calls of another shape, of 255


@pytest.fixture(params=["class-to-image", *(pytest.param(t, marks=pytest.mark.slow) for t in list(TASKS)[1:])])
def task(request) -> str:
    return request.param


@pytest.fixture
def config(task, sampling_config):
    config = sampling_config(task)
    return changed(config, {"prompts": [*config.prompts, "the rain"]}) if hasattr(config, "prompts") else config


@pytest.fixture
def sample(task):
    return TASKS[task].sample


def files(config) -> list[Path]:
    return sorted(path for path in Path(config.out).glob("0*") if path.suffix in LEVELS)


def samples(config) -> dict[str, Tensor]:
    readers = {".png": lambda path: read_image(str(path)), ".mp4": read_mp4}
    return {path.name: readers[path.suffix](path).int() for path in files(config)}


def assert_same(made: dict[str, Tensor], expected: dict[str, Tensor], exactly: bool = True) -> None:
    assert made.keys() == expected.keys() and len(made) in (3, 5)
    for name, sample in made.items():
        assert (sample - expected[name]).abs().max() <= (0 if exactly else LEVELS[Path(name).suffix])


@pytest.mark.slow
def test_samples_do_not_depend_on_their_neighbours(config, sample, tmp_path):
    config = changed(config, {"batch_size": 1})
    sample(config)
    alone, config = samples(config), changed(config, {"out": str(tmp_path / "other"), "batch_size": 2})
    sample(config)
    assert_same(samples(config), alone, exactly=False)


@pytest.mark.slow
def test_interrupted_run_continues(config, sample):
    """What is there stays, what is missing is made, and is what it would have been; other settings are refused."""
    config = changed(config, {"batch_size": 1})
    sample(config)
    whole, (kept, lost, *_, last) = samples(config), files(config)
    written = kept.stat().st_mtime_ns
    for path in (lost, last):
        path.unlink()
    lost.with_name(f"partial-{lost.name}").write_bytes(b"half a sample")
    sample(config)
    assert kept.stat().st_mtime_ns == written
    assert_same(samples(config), whole)
    other = config.guidance_scale + 1
    with pytest.raises(ValueError, match=rf"guidance_scale: {config.guidance_scale} there, {other} now"):
        sample(changed(config, {"guidance_scale": other}))


@pytest.mark.slow
def test_samples_do_not_depend_on_the_number_of_processes(config, sample, task, tmp_path):
    config = changed(config, {"batch_size": 1})
    sample(config)
    alone, config = samples(config), changed(config, {"out": str(tmp_path / "two")})
    run_sampler(config, task, processes=2)
    assert_same(samples(config), alone)
    assert json.loads((Path(config.out) / "report.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_finished_run_keeps_its_report(config, sample):
    """The second time nothing is timed, and there is nothing to report."""
    first = sample(config)
    assert sample(config) == json.loads(json.dumps(first)) == json.loads((Path(config.out) / "report.json").read_text())


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_interval_1_changes_nothing(config, sample, tmp_path, guidance):
    config = changed(config, {"guidance_scale": guidance, "cache": "none"})
    sample(config)
    uncached = samples(config)
    config = changed(config, {"out": str(tmp_path / "cached"), "cache": "N1-700-50"})
    assert sample(config)["steps"] == {"full": 6, "cached": 0, "forecast": 0}
    assert_same(samples(config), uncached)
