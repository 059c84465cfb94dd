"""Not the package, which `src/skipdit` is: in the folder around a clone named skipdit, Python takes the clone for it.

This module then gives way to the installed package, so that `import skipdit` is the same wherever one stands.
"""

import sys
from importlib.util import module_from_spec
from pathlib import Path


def _give_way() -> None:
    around = Path(__file__).resolve().parents[1]
    elsewhere = [place for place in sys.path if Path(place).resolve() != around]
    specs = (finder.find_spec(__name__, elsewhere) for finder in sys.meta_path)
    spec = next((spec for spec in specs if spec is not None and spec.loader is not None), None)
    if spec is None:
        raise ModuleNotFoundError("skipdit is not installed: run `pip install -e skipdit` here", name=__name__)
    sys.modules[__name__] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])


if __name__ == "skipdit":
    _give_way()
