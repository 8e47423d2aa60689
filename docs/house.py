"""The house: which floor each room is on, what the rooms import, and the numbers that say whether it is in order.

    python docs/house.py draw     writes docs/images/house.svg from the imports as they are
    python docs/house.py count    prints the numbers of docs/architecture.md

`tests/interface/test_house.py` fails where an import points up, in a ring, or stands in a function without being named
here, and where the figure is not that of the imports.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1] / "src" / "consonar"
FIGURE = Path(__file__).parent / "images" / "house.svg"
FLOORS = (
    ("__main__",),
    ("cli",),
    ("demo", "sweeps"),
    ("report",),
    ("diagnostics",),
    ("evaluation", "planning", "recipes"),
    ("training",),
    ("sampling",),
    ("components",),
    ("convert",),
    ("model_folders",),
    ("tokenizers", "networks"),
    ("metrics", "data", "parallel"),
    ("distributed", "precision", "shards"),
    ("cpu", "generators"),
    # What everyone may use; among these the order is that of their own imports.
    (
        "__init__", "attention", "compiling", "config_io", "errors", "files", "float32", "hub", "json_types", "memory",
        "options", "origin", "records", "seeding", "types",
    ),
)  # fmt: skip
"""From the roof down: a room (a folder, or a file at the root) may import those of the floors below its own."""
ABOUT = {
    "cli": "words to calls", "demo": "the main job on real data", "sweeps": "studies over seeds",
    "report": "pages: runs, diagnoses", "diagnostics": "what goes wrong, where",
    "evaluation": "measures runs and samples", "recipes": "settings by name, from files",
    "training": "configuration, loop, methods", "planning": "what a run takes", "sampling": "tokens one by one, jobs",
    "components": "models by name", "convert": "released files, both ways",
    "model_folders": "models on disk", "generators": "token models", "tokenizers": "images to tokens and back",
    "networks": "what judges pictures", "metrics": "formulas over numbers", "data": "images, tokens, batches",
    "parallel": "whole models and shards", "distributed": "processes and devices", "precision": "what jobs multiply in",
    "cpu": "what is faster on this processor", "shards": "shards on the disk",
}  # fmt: skip
"""What each room is for, in the figure."""
LATER: dict[tuple[str, str], str] = {}
"""Every import of our own inside a function, and why."""


class Import(NamedTuple):
    """One import of our own: module names below `consonar`."""

    source: str
    target: str
    inside: bool
    """Whether it stands inside a function."""


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module by its name below `consonar`."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(root: Path = ROOT) -> list[Import]:
    """Every import of our own."""
    known, found = modules(root), []

    def named(target: str) -> str:
        """The module that `a.b` means, where b may be a name inside a."""
        while target and target not in known:
            target = target.rpartition(".")[0]
        return target or "__init__"

    for module, path in known.items():
        tree = ast.parse(path.read_text())
        inside = {node for function in functions(tree) for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "consonar":
                base = (node.module or "").removeprefix("consonar").lstrip(".")
                targets = dict.fromkeys(named(f"{base}.{alias.name}".lstrip(".")) for alias in node.names)
                found += [Import(module, target, node in inside) for target in targets]
    return found


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def room(module: str) -> str:
    """The folder that a module is in, or itself at the root."""
    return module.partition(".")[0]


def floor_of(name: str) -> int:
    """0 is the ground."""
    return next(index for index, rooms in enumerate(reversed(FLOORS)) if name in rooms)


def arrows() -> list[tuple[str, str]]:
    """(room, room) for every import between rooms; those of the ground floor are everyone's and left out."""
    ground = FLOORS[-1]
    pairs = {(room(one.source), room(one.target)) for one in imports()}
    return sorted((a, b) for a, b in pairs if a != b and a not in ground and b not in ground)


def draw() -> str:
    """The figure as SVG: a row for each floor, a line for each arrow, which always points down."""
    width, height, gap, box = 760, 42, 22, 196
    places, parts = {}, []
    shown = [floor for floor in FLOORS if floor != ("__main__",)]
    for row, rooms in enumerate(shown[:-1]):
        step = width / len(rooms)
        for column, name in enumerate(rooms):
            # Rooms that stand alone are moved aside in turn, so that lines past them are seen.
            shift = 0 if len(rooms) > 1 else (-130, 0, 130, 0)[row % 4]
            places[name] = (step * (column + 0.5) + shift, row * (height + gap) + height / 2 + 4)
    for a, b in arrows():
        if a in places and b in places:
            (x1, y1), (x2, y2) = places[a], places[b]
            middle = (y1 + y2) / 2
            parts.append(
                f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}" '
                'fill="none" stroke="#1f5a99" stroke-opacity=".28"/>'
            )
    for name, (x, y) in places.items():
        parts.append(room_box(x - box / 2, y - height / 2, box, height, [name, ABOUT[name]]))
    bottom = (len(shown) - 1) * (height + gap) + 4
    names = [name for name in shown[-1] if name != "__init__"]
    lines = [", ".join(names[:7]) + ",", ", ".join(names[7:])]
    parts.append(room_box(8, bottom, width - 16, 56, lines, "#f1f5f9"))
    total = bottom + 64
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total:.0f}" font-family="sans-serif" '
        f'font-size="13" role="img" aria-label="The rooms of consonar and which imports which; every line points down">'
        + "\n".join(["", *parts, "</svg>", ""])
    )


def room_box(x: float, y: float, width: float, height: float, lines: list[str], colour: str = "#ffffff") -> str:
    text = ""
    for i, line in enumerate(lines):
        weight = "bold" if line in ABOUT else "normal"
        baseline = y + height / 2 + 5 + 17 * (i - (len(lines) - 1) / 2)
        place = f'x="{x + width / 2:.0f}" y="{baseline:.0f}" text-anchor="middle"'
        text += f'<text {place} font-weight="{weight}">{line}</text>'
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="6" fill="{colour}" '
        f'stroke="#64748b"/>{text}'
    )


def counts() -> dict[str, Callable[[], float]]:
    """The numbers of docs/architecture.md, by what they count."""
    texts = {path: path.read_text() for path in modules().values()}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lines = sum(text.count("\n") for text in texts.values())

    def found(pattern: str) -> int:
        return sum(len(re.findall(pattern, text, re.MULTILINE)) for text in texts.values())

    def longest(limit: int) -> int:
        sizes = [(f.end_lineno or 0) - f.lineno + 1 for tree in trees.values() for f in functions(tree)]
        return sum(size > limit for size in sizes)

    page = [*(ROOT / "report").rglob("*.py"), *(ROOT / "report" / "templates").iterdir()]
    return {
        "lines of src": lambda: lines,
        "files over 300 lines": lambda: sum(text.count("\n") > 300 for text in texts.values()),
        "functions over 60 lines": lambda: longest(60),
        "imports of our own": lambda: len(imports()),
        "of these inside functions": lambda: sum(one.inside for one in imports()),
        "`Any`": lambda: found(r"\bAny\b"),
        "`assert x is not None`": lambda: found(r"^\s*assert .*\b(is not None|isinstance\()"),
        "`cast`": lambda: found(r"\bcast\("),
        "raises a thousand lines": lambda: round(1000 * found(r"^\s*raise\b") / lines, 1),
        "lines of report with templates": lambda: sum(len(path.read_text().splitlines()) for path in page),
    }


def main() -> None:
    if sys.argv[1:] == ["draw"]:
        FIGURE.write_text(draw())
    elif sys.argv[1:] == ["count"]:
        for name, count in counts().items():
            print(f"{name:34}{count():>10,}")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
