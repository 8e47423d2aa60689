"""The house has floors: who may import whom stands in `FLOORS`, and nowhere does an arrow point up or in a ring."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import consonar

ROOT = Path(consonar.__file__).parent
FLOORS = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("report",),
    ("evaluation", "recipes"),
    ("training",),
    ("sampling",),
    ("components",),
    ("convert",),
    ("model_folders",),
    ("generators", "tokenizers", "networks"),
    ("metrics", "data"),
    ("distributed",),
    ("cpu",),
    # What everyone may use; among these the order is that of their own imports.
    (
        "__init__", "cache", "checkpoint", "config_io", "errors", "hub", "lock", "options", "origin", "outside",
        "precision", "published", "records", "seeding", "tensors", "tracking", "types",
    ),
)  # fmt: skip
"""From the roof down: rooms (folders, or files at the root) may import those of floors below their own."""
BEHIND_A_WORD = ("__init__", "cli")
"""Rooms whose imports stand inside functions, because `import consonar` and `consonar --help` are to be quick."""
LATER = {
    ("data.images", "data.openmoji"): "needs the optional package openmoji",
    ("report", "report.page"): "jinja2 and matplotlib are slow to import",
}
"""Every other import of our own inside a function, and why."""


def floor_of(room: str) -> int:
    return next(index for index, rooms in enumerate(reversed(FLOORS)) if room in rooms)


@cache
def modules() -> dict[str, Path]:
    """Every module by its name below `consonar`."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def named(target: str) -> str:
    """The module that `consonar.a.b` means, where b may be a name inside a."""
    while target and target not in modules():
        target = target.rpartition(".")[0]
    return target or "__init__"


@cache
def imports() -> list[tuple[str, str, bool]]:
    """(module, what it imports, whether inside a function) for every import of our own."""
    found = []
    for module, path in modules().items():
        tree = ast.parse(path.read_text())
        inside = {
            node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "consonar":
                base = (node.module or "").removeprefix("consonar").lstrip(".")
                found += [(module, named(f"{base}.{a.name}".lstrip(".")), node in inside) for a in node.names]
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in modules()} == {name for rooms in FLOORS for name in rooms}


def test_no_arrow_points_up() -> None:
    arrows = {(room(a), room(b)) for a, b, _ in imports() if room(a) != room(b) and room(b) != "__init__"}
    lowest = set(FLOORS[-1])
    wrong = [(a, b) for a, b in arrows if floor_of(a) <= floor_of(b) and not {a, b} <= lowest]
    assert not wrong


@pytest.mark.parametrize("name", [str, room], ids=["files", "rooms"])
def test_there_are_no_rings(name) -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for a, b, _ in imports():
        if name(a) != name(b) and b != "__init__":
            graph[name(a)].add(name(b))
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a ring: {' -> '.join(error.args[1])}")


def test_imports_inside_functions_are_listed() -> None:
    found = {(a, b) for a, b, inside in imports() if inside and room(a) not in BEHIND_A_WORD}
    assert found == set(LATER)


def test_the_checks_can_fail(monkeypatch) -> None:
    """An arrow from a lower room to a higher one, a ring of two files, an import inside a function are all seen."""
    real = imports()
    monkeypatch.setattr(f"{__name__}.imports", lambda: [*real, ("errors", "cli", False)])
    with pytest.raises(AssertionError):
        test_no_arrow_points_up()
    monkeypatch.setattr(f"{__name__}.imports", lambda: [*real, ("errors", "seeding", False)])
    with pytest.raises(pytest.fail.Exception):
        test_there_are_no_rings(str)
    monkeypatch.setattr(f"{__name__}.imports", lambda: [*real, ("errors", "types", True)])
    with pytest.raises(AssertionError):
        test_imports_inside_functions_are_listed()
