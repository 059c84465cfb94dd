"""`--help`, a mistake in a setting and a missing file are answered before anything is imported that takes seconds."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

from skipdit.__main__ import COMMANDS

HEAVY = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "timm", "matplotlib", "scipy", "sympy")
MOST_MODULES = 500  # a bare Python has 60, and torch alone brings a thousand: this is what a second has time for
SCRIPTS = [
    *(f"{task}/train.py" for task in ("class-to-image", "class-to-video", "text-to-video", "text-to-image")),
    "class-to-image/sample.py",
    "class-to-video/sample.py",
    "text-to-video/sample_t2v.py",
    "text-to-image/sample_t2i.py",
]
# Runs a program as `python ARGUMENTS` would, and tells at its end which modules are there.
PROGRAM = """
import atexit, runpy, sys
atexit.register(lambda: print("modules:", *(name for name in %r if name in sys.modules), file=sys.stderr))
atexit.register(lambda: print("count:", len(sys.modules), file=sys.stderr))
sys.argv = %r
sys.path.insert(0, "")
runpy.run_module("skipdit", run_name="__main__") if %r else runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*argv: str) -> tuple[int, str, str, set[str]]:
    """Exit code, output, messages, and the heavy modules that were imported."""
    module = argv[0] == "skipdit"
    program = PROGRAM % (HEAVY, list(argv), module)
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    messages, _, modules = ran.stderr.rpartition("modules:")
    return ran.returncode, ran.stdout, messages, set(modules.split())


@pytest.mark.parametrize("program", [*SCRIPTS, *(f"skipdit {name}" for name in COMMANDS)])
@pytest.mark.slow
def test_help_imports_nothing_heavy(program):
    code, out, messages, modules = start(*program.split(), "--help")
    assert code == 0 and "usage:" in out and not modules
    assert int(messages.partition("count:")[2].split()[0]) < MOST_MODULES


@pytest.mark.slow
def test_help_of_a_task_lists_its_settings():
    for command, setting in {"sample": "guidance_channels=3", "train": "train.freeze=False"}.items():
        code, out, _, modules = start("skipdit", command, "--task", "class-to-image", "--help")
        assert code == 0 and f"usage: skipdit {command}" in out and setting in out and not modules
    code, _, messages, _ = start("skipdit", "sample", "steps=3")
    assert code == 2 and "or --task NAME" in messages


@pytest.mark.parametrize(
    "command", ["encode --data videos --path data --out out", "data check configs/class-to-video/ffs_scratch.yaml"]
)
def test_no_more_processes_read_than_there_are_processors(command):
    name, *argv = command.split()
    arguments = import_module(f"skipdit.commands.{name}").read_arguments(argv)
    assert 1 <= arguments.workers <= min(4, os.cpu_count())


def example(program: str) -> str:
    """A config of the program's task and kind."""
    task = Path(program).parent.name if program in SCRIPTS else "class-to-image"
    files = sorted((ROOT / "configs" / task).glob("*.yaml"))
    return str(
        next(file for file in files if ("\ntrain:" in file.read_text()) == program.endswith(("train.py", "train")))
    )


WITH_CONFIG = {
    "sample": ["skipdit", "sample"],
    "train": ["skipdit", "train"],
    **{script: [script] for script in SCRIPTS},
    "compare": ["skipdit", "compare"],
    "plan": ["skipdit", "plan", "--budget", "3"],
    "analyze": ["skipdit", "analyze", "perturb"],
}


@pytest.mark.slow
@pytest.mark.parametrize("program", WITH_CONFIG)
def test_a_mistake_in_a_setting_imports_nothing_heavy(program):
    code, _, messages, modules = start(*WITH_CONFIG[program], "--config", example(program), "sedd=3")
    assert code == 2 and "unknown key 'sedd'" in messages and "seed" in messages and not modules


@pytest.mark.slow
@pytest.mark.parametrize("program", WITH_CONFIG)
def test_a_missing_config_imports_nothing_heavy(program):
    code, _, messages, modules = start(*WITH_CONFIG[program], "--config", "configs/class-to-image/nope.yaml")
    assert code == 2 and "no config file configs/class-to-image/nope.yaml" in messages and not modules


def test_a_mistake_in_a_cache_imports_nothing_heavy():
    code, _, messages, modules = start(SCRIPTS[4], "--config", example(SCRIPTS[4]), "--cache", "N2-70")
    assert code == 2 and "N2-70" in messages and not modules
