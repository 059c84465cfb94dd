"""The wheel, away from this repository: every package and data file is in it, every module imports, scripts run.

A nested package that pyproject.toml forgets works in an editable install and is missing from the wheel only.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

TASKS = {  # hyphenated folders become packages
    path.parent: f"skipdit.{path.parent.name.replace('-', '_')}" for path in sorted(ROOT.glob("*-*/__init__.py"))
}

IMPORT_ALL = """
import importlib, pkgutil, sys
import skipdit
names = ["skipdit"] + [module.name for module in pkgutil.walk_packages(skipdit.__path__, "skipdit.")]
for name in names:
    importlib.import_module(name)
for name, module in sys.modules.items():
    if name.partition(".")[0] == "skipdit":
        print(name, module.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what git knows: the checkout stays as it is, and what lies about in it cannot help."""
    source = tmp_path_factory.mktemp("source")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)], cwd=source)
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel, unpacked by pip into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)], ROOT)
    return target


def run(command: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_wheel_holds_every_package_and_data_file(wheel):
    expected = {
        f"{init.parent.relative_to(ROOT / 'src').as_posix()}/{module.name}"
        for init in (ROOT / "src" / "skipdit").rglob("__init__.py")
        for module in init.parent.glob("*.py")
    }
    for task, package in TASKS.items():
        weights = [path for path in task.glob("weights/**/*") if path.is_file()]
        assert weights, f"{task} has no embedded model"
        assert sum(path.stat().st_size for path in weights) < 20e6, "the embedded models are to stay small"
        files = [*task.rglob("*.py"), *weights]
        expected |= {f"{package.replace('.', '/')}/{path.relative_to(task).as_posix()}" for path in files}
    assert TASKS
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(expected - set(archive.namelist())) == []


@pytest.mark.slow
def test_every_module_of_the_wheel_imports(installed, tmp_path):
    lines = run([sys.executable, "-c", IMPORT_ALL], tmp_path, PYTHONPATH=str(installed)).splitlines()
    modules = dict(line.split(" ", 1) for line in lines)  # also those that only the editable install could give
    of_tasks = {f"{package}.{file.stem}" for task, package in TASKS.items() for file in task.glob("[!_]*.py")}
    assert of_tasks | {"skipdit.training.loop"} <= set(modules)
    assert [name for name, file in modules.items() if not Path(file).is_relative_to(installed)] == []


SCRIPTS = [script for task in TASKS for script in sorted(task.glob("*.py")) if "__main__" in script.read_text()]


def named(script: Path) -> str:
    return f"{script.parent.name}/{script.name}"


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_script_runs_by_its_path(script, installed, tmp_path):
    wanted = "--only NAME" if script.name == "download.py" else "--config FILE"
    assert wanted in run([sys.executable, str(script), "--help"], tmp_path, PYTHONPATH=str(installed))


@pytest.mark.parametrize("script", [script for script in SCRIPTS if "sample" in script.stem], ids=named)
def test_sampler_runs_as_a_module(script, installed, tmp_path):
    command = [sys.executable, "-m", f"{TASKS[script.parent]}.{script.stem}", "--help"]
    assert "--config FILE" in run(command, tmp_path, PYTHONPATH=str(installed))


def test_every_task_has_its_scripts():
    samplers = {f"{name}/sample.py" for name in ("class-to-image", "class-to-video")}
    samplers |= {"text-to-video/sample_t2v.py", "text-to-image/sample_t2i.py"}
    downloads = {f"text-to-{what}/download.py" for what in ("video", "image")}
    trainers = {f"{task.name}/train.py" for task in TASKS}
    assert samplers | downloads | trainers <= {named(script) for script in SCRIPTS}
