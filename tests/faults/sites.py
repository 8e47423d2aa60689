"""Where `src/` writes: every call of what makes or changes files, by the function that it stands in."""

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "src" / "consonar"
OURS = {"write_atomically", "write_json", "keep", "folder_at_once", "hold", "replacing"}
METHODS = {"write_text", "write_bytes", "mkdir", "rename", "symlink_to"}
"""Of paths; `replace` with one argument beside them. Image.save, torch.save and their like stand inside one of `OURS`.
What only removes is left out: much of it is for what a killed process has left."""


UNREACHED = {
    "cli/doctor.py:cached": "the cache folder, to see whether it can be written",
    "components.py:fetch_component": "a lock around `convert`, of a file of the hub",
    "convert/__init__.py:write": "tokenizer.json beside a released Janus",
    "cpu/timing.py:_measure_and_keep": "what is faster here, which the commands are told not to measure",
    "cpu/timing.py:keep_for_run": "the same",
    "data/openmoji.py:_render_all": "thousands of emoji, into the cache",
    "data/shard_index.py:index_of": "where pictures lie in shards, into the cache",
    "demo/job.py:claim": "minutes of the other commands",
    "demo/job.py:run_demo": "the same",
    "evaluation/check.py:stand_in": "in a temporary folder",
    "evaluation/reconstruction.py:evaluate_tokenizer": "entered in a line below the call",
    "files/lock.py:folder_at_once": "a lock on an empty folder that was there; the other calls are reached",
    "files/shared_work.py:remove_shards": "a lock, of a job that was killed while it tidied",
    "files/shared_work.py:remove_unused": "a lock, of a job that failed before its first shard",
    "files/weights.py:finish_save": "what a killed process did not get to",
    "sweeps/work.py:run_sweep": "a lock that another process has",
    "sweeps/work.py:states": "the same, of `--status`",
    "training/run.py:export": "stopped.json, of a guard",
}
"""Functions of `writing_calls` with a call that no command of `world` gets to, and what it would write."""


def writing_calls() -> dict[str, list[range]]:
    """FILE:FUNCTION to the lines of its calls."""
    found: dict[str, list[range]] = {}
    for path in sorted(SOURCES.rglob("*.py")):
        name = path.relative_to(SOURCES).as_posix()
        for function, call in calls(ast.parse(path.read_text()), ""):
            if writes(call):
                found.setdefault(f"{name}:{function}", []).append(range(call.lineno, (call.end_lineno or 0) + 1))
    return found


def calls(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, ast.FunctionDef) else function
        if isinstance(child, ast.Call):
            yield inner, child
        yield from calls(child, inner)


def writes(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Name):
        return call.func.id in OURS
    if not isinstance(call.func, ast.Attribute):
        return False
    of_path = call.func.attr == "replace" and len(call.args) == 1 and not call.keywords
    return of_path or call.func.attr in METHODS


def unreached(lines: set[str]) -> set[str]:
    """The functions with a call that is on none of these lines, FILE:LINE, from which something was written."""
    return {
        place for place, calls in writing_calls().items()
        if any(not {f"{place.split(':')[0]}:{line}" for line in call} & lines for call in calls)
    }  # fmt: skip
