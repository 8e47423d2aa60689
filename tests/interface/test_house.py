"""The house has floors: who may import whom stands in `docs/house.py`, and no arrow points up or in a ring."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest


def load_house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", Path(__file__).parents[2] / "docs" / "house.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


house = load_house()
IMPORTS = house.imports()


def test_every_room_has_a_floor() -> None:
    assert {house.room(module) for module in house.modules()} == {name for rooms in house.FLOORS for name in rooms}


def test_the_readme_names_every_room() -> None:
    block = (Path(__file__).parents[2] / "README.md").read_text().partition("## The house")[2].split("```")[1]
    rooms = {name for rooms in house.FLOORS for name in rooms if not name.startswith("__")}
    named = [
        line.partition("   ")[0] for line in block.splitlines() if not line.startswith(" ")
    ]  # not what is said of them
    assert rooms == set(", ".join(filter(None, named)).split(", "))


def test_no_arrow_points_up() -> None:
    arrows = {(house.room(one.source), house.room(one.target)) for one in IMPORTS}
    ground = set(house.FLOORS[-1])
    wrong = [(a, b) for a, b in arrows if a != b and b != "__init__" and house.floor_of(a) <= house.floor_of(b)]
    assert not [(a, b) for a, b in wrong if not {a, b} <= ground]


@pytest.mark.parametrize("name", [str, house.room], ids=["files", "rooms"])
def test_there_are_no_rings(name) -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for one in IMPORTS:
        if name(one.source) != name(one.target) and one.target != "__init__":
            graph[name(one.source)].add(name(one.target))
    assert ring_in(graph) == []


def ring_in(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one ring, its first again at the end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_inside_functions_are_listed() -> None:
    assert {(one.source, one.target) for one in IMPORTS if one.inside} == set(house.LATER)


def test_the_figure_is_of_these_imports() -> None:
    assert house.FIGURE.read_text() == house.draw(), "draw it again: python docs/house.py draw"


def test_no_function_and_no_file_is_too_long() -> None:
    counts = house.counts()
    assert counts["functions over 60 lines"]() == 0
    assert counts["files over 300 lines"]() == 0


def test_the_checks_can_fail(monkeypatch) -> None:
    """An arrow from a lower room to a higher one, a ring of two files, an import inside a function are all seen."""
    up, ring, inside = (
        house.Import("errors", *of) for of in (("cli", False), ("seeding", False), ("types", True))
    )  # fmt: skip
    monkeypatch.setitem(globals(), "IMPORTS", [*IMPORTS, up])
    with pytest.raises(AssertionError):
        test_no_arrow_points_up()
    monkeypatch.setitem(globals(), "IMPORTS", [*IMPORTS, ring])
    with pytest.raises(AssertionError):
        test_there_are_no_rings(str)
    monkeypatch.setitem(globals(), "IMPORTS", [*IMPORTS, inside])
    with pytest.raises(AssertionError):
        test_imports_inside_functions_are_listed()
