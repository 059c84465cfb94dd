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

from skipdit import __version__

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
    source = copy_of_the_checkout(tmp_path_factory.mktemp("source"))
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)], cwd=source)
    (path,) = (source / "dist").glob("*.whl")
    return path


def copy_of_the_checkout(source: Path) -> Path:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel, unpacked by pip into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)], ROOT)
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what git knows, in a folder named as the README's clone is."""
    return copy_of_the_checkout(tmp_path_factory.mktemp("around") / "skipdit")


def environment(folder: Path, package: str, *options: str) -> Path:
    """A fresh environment with the package in it, whose other packages are those of this process. Returns its Python.

    The .pth file that lends them does not run their own .pth files: this process's editable install stays out.
    """
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], ROOT)
    python = folder / "bin/python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-deps", "--ignore-installed"]
    run([*pip, *options, package], folder)
    return python


@pytest.fixture(scope="module")
def wheel_python(wheel, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("wheel"), str(wheel))


@pytest.fixture(scope="module")
def editable_python(source, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("editable"), str(source), "--no-build-isolation", "--editable")


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
    expected |= {f"skipdit/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*") if path.is_file()}
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


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_script_runs_by_its_path(script, installed, tmp_path):
    wanted = "--only NAME" if script.name == "download.py" else "--config FILE"
    assert wanted in run([sys.executable, str(script), "--help"], tmp_path, PYTHONPATH=str(installed))


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_demo_and_the_doctor_of_a_wheel_run_in_an_empty_folder(wheel_python, tmp_path):
    command = wheel_python.parent / "skipdit"
    said = run([str(command), "demo", "num_samples=1", "steps=3"], tmp_path, PYTHONPATH="")
    assert "side by side: samples/demo/compare.png" in said and (tmp_path / "samples/demo/compare.png").exists()
    said = run([str(command), "doctor"], tmp_path, PYTHONPATH="", HF_HUB_OFFLINE="1")
    assert f"skipdit {__version__} in {wheel_python.parents[1]}/lib" in said and "MISSING" not in said
    assert "class-to-image: embedded model" in said and "skipdit download class-to-image --only dit vae" in said


@pytest.mark.slow
def test_a_sampler_of_a_wheel_finds_the_projects_configs(wheel_python, tmp_path):
    command = [str(wheel_python), "-m", "skipdit", "sample", "--config", "configs/class-to-image/demo.yaml"]
    run([*command, "--cache", "configs/class-to-image/demo_plan.json", "num_samples=1"], tmp_path, PYTHONPATH="")
    assert (tmp_path / "samples/demo/000000.png").exists()


ORIGIN = "from skipdit import parse_policy; import skipdit; print(skipdit.__file__)"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["parent", "inside", "elsewhere"])
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_imports_work_wherever_one_stands(kind, place, request, source, tmp_path):
    """Beside a clone named skipdit, too, where Python takes its folder for the package."""
    python = request.getfixturevalue(f"{kind}_python")
    folder = {"parent": source.parent, "inside": source, "elsewhere": tmp_path}[place]
    home = source / "src" if kind == "editable" else python.parents[1]
    assert Path(run([str(python), "-c", ORIGIN], folder, PYTHONPATH="").strip()).is_relative_to(home)
    assert "usage: skipdit" in run([str(python), "-m", "skipdit", "--help"], folder, PYTHONPATH="")
    task = "import skipdit; from skipdit.class_to_image import settings; print(settings.__file__)"
    run([str(python), "-c", task], folder, PYTHONPATH="")
