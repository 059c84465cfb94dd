"""The rooms of the library: an import goes to a room above in this table, never below, and never in a circle."""

import ast
from collections.abc import Iterator

import pytest
from conftest import ROOT

LIBRARY = ROOT / "src/skipdit"
ROOMS = [
    {"utils", "_moved"},  # what is moved is looked up by name, when a program asks for it
    {"config", "cli"},
    {"caching"},
    {"diffusion"},
    {"checkpoints"},
    {"layers"},
    {"encoders"},
    {"pipelines"},
    {"data"},
    {"sampling"},
    {"training"},
    {"tasks"},
    {"metrics", "evaluation"},
    {"planning", "analysis", "doctor"},
    {"app"},
    {"commands"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def modules() -> dict[str, ast.Module]:
    """Dotted name below skipdit -> its code."""
    trees = {}
    for path in LIBRARY.rglob("*.py"):
        parts = path.relative_to(LIBRARY).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules of the library that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "skipdit":
            module = node.module.removeprefix("skipdit").lstrip(".")
            yield from [module] if module else [alias.name for alias in node.names]


def wrong_directions(trees: dict[str, ast.Module]) -> list[str]:
    def level(name: str) -> int:
        return LEVEL[name.split(".")[0]]

    return [f"{name} imports {other}" for name in trees for other in imports(trees[name]) if level(other) > level(name)]


def circle(trees: dict[str, ast.Module]) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    graph = {
        name: sorted({other for other in imports(tree) if other in trees} - {name}) for name, tree in trees.items()
    }
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        found = next((c for other in graph[name] if (c := visit(other, [*path, name]))), [])
        done.add(name)
        return found

    return next((c for name in graph if (c := visit(name, []))), [])


def test_every_module_lies_in_a_room():
    assert {name.split(".")[0] for name in modules()} <= LEVEL.keys()


@pytest.mark.slow
def test_imports_go_up():
    assert not wrong_directions(modules())


def test_imports_have_no_circle():
    assert not circle(modules())


@pytest.mark.slow
@pytest.mark.parametrize("check", [wrong_directions, circle])
def test_the_checks_see_what_is_wrong(check):
    trees = modules()
    trees["utils.files"] = ast.parse(
        "def f():\n    from skipdit.utils.text import g\n    from skipdit.training import loop\n"
    )
    trees["utils.text"] = ast.parse("from skipdit.utils import files\nfrom skipdit.utils.files import f\n")
    assert check(trees)
