"""Names of version 0.1: `skipdit.cache` and its like, and `python -m skipdit.plan`, lead to where things are now."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {  # module of version 0.1 -> the ones that hold its names now
    "adaln": ("layers.adaln",),
    "analyze": ("analysis",),
    "analyze.measure": ("analysis.measure",),
    "analyze.plot": ("analysis.plot",),
    "analyze.trace": ("analysis.trace",),
    "bench": ("layers.flops", "layers.inspect", "utils.timing"),
    "cache": ("caching.policies", "caching.policy", "caching.plans", "caching.runtime", "caching.steps"),
    "checkpoint": ("training.checkpoints",),
    "class_sample": ("sampling.class_conditional", "sampling.settings", "sampling.job"),
    "compare": ("evaluation.compare", "sampling.sampler"),
    "convert": ("checkpoints.convert",),
    "device": ("utils.device",),
    "download": ("checkpoints.download", "checkpoints.catalogue"),
    "ema": ("training.ema",),
    "encode": ("data.encode",),
    "encode_text": ("data.encode_text",),
    "evaluate": ("evaluation.command",),
    "fashion": ("evaluation.fashion",),
    "hunyuan2d": ("pipelines.hunyuan2d",),
    "layouts": ("checkpoints.diffusers_layout",),
    "lock": ("utils.lock",),
    "lora": ("training.lora",),
    "media": ("utils.video", "data.video"),
    "nn": ("layers.attention", "layers.embeddings"),
    "pipeline": ("pipelines.cache",),
    "plan": (
        "planning.command",
        "planning.search",
        "planning.schedules",
        "planning.calibration",
        "planning.fitting",
    ),
    "prepare": ("training.prepare",),
    "prompts": ("sampling.prompts",),
    "reading": ("utils.text",),
    "runlog": ("training.runlog",),
    "sample": (
        "sampling.job",
        "sampling.report",
        "sampling.arguments",
        "utils.provenance",
        "utils.seeding",
        "utils.dtypes",
    ),
    "skip": ("layers.skip",),
    "spectral": ("training.spectral",),
    "stopping": ("utils.signals",),
    "task": ("tasks",),
    "text": ("encoders.text", "encoders.reading"),
    "text_sample": ("sampling.text_conditional", "sampling.settings", "sampling.arguments", "sampling.job"),
    "train": ("training.loop", "training.settings", "training.steps", "training.parallel", "training.run_folder"),
    "vae": ("encoders.autoencoder",),
    "weights": (
        "checkpoints.loading",
        "checkpoints.files",
        "checkpoints.released",
        "checkpoints.sums",
        "checkpoints.errors",
        "utils.provenance",
    ),
    "writing": ("utils.files",),
}
COMMANDS = {"analyze.__main__": "analyze", "data.__main__": "data", "encode_text": "encode-text"}
COMMANDS |= {name: name for name in ("download", "encode", "evaluate", "plan", "weights")}


def find(old: str, name: str) -> Any:
    """Return what a module of version 0.1 called `name`."""
    for new in MODULES[old]:
        module = import_module(f"skipdit.{new}")
        if hasattr(module, name):
            warnings.warn(f"skipdit.{old}.{name} is skipdit.{new}.{name} now", DeprecationWarning, stacklevel=3)
            return getattr(module, name)
    raise AttributeError(f"module 'skipdit.{old}' has no attribute {name!r}; version 0.2 may have dropped it")


class MovedModules(MetaPathFinder, InspectLoader):
    """Finds the modules of version 0.1, whose names are looked up when they are asked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix("skipdit.")
        if not fullname.startswith("skipdit.") or (old not in MODULES and old not in COMMANDS):
            return None
        return ModuleSpec(fullname, self, is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        return fullname == "skipdit.analyze"

    def get_source(self, fullname: str) -> str:
        old = fullname.removeprefix("skipdit.")
        source = "from functools import partial\nfrom skipdit._moved import find\n"
        source += f"__getattr__ = partial(find, {old!r})\n"
        if old in COMMANDS:
            source += "if __name__ == '__main__':\n    import sys\n    from skipdit.__main__ import main\n"
            source += f"    main([{COMMANDS[old]!r}, *sys.argv[1:]])\n"
        return source


def install() -> None:
    """Find the old names, after all real modules."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
