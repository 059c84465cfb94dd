"""Names of a package that are imported when they are first asked for: torch and diffusers take seconds."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's `__getattr__`.

    Args:
        places: public name -> its module, below `skipdit`.
    """

    def get(name: str) -> Any:
        if name in places:
            return getattr(import_module(f"skipdit.{places[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
