"""What the docs and docstrings name is there."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

from consonar.cli import parsing, plan, train

ROOT = Path(__file__).parents[2]
TEXTS = [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("src/**/README.md")]
FILES = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/*.py")}


@pytest.mark.parametrize("text", [*TEXTS, *ROOT.glob("src/**/*.py")], ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_the_package_mean_something(text: Path) -> None:
    for name in sorted(set(re.findall(r"\bconsonar(?:\.\w+)+", text.read_text()))):
        if not name.endswith((".md", ".html", ".py", ".git")):
            assert means_something(name), name


def means_something(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found is not None
    return False


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_the_docs_name_are_there(text: Path) -> None:
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", text.read_text()))
    missing = {name for name in named if not any(path.endswith(f"/{name}") or path == name for path in FILES)}
    assert not missing


def commands_in(text: Path) -> list[str]:
    """The commands of ours in its blocks, without what follows a comment or a pipe, and without those that leave out
    a part."""
    blocks = "".join(re.findall(r"```(?:bash|sh)?\n(.*?)```", text.read_text(), re.DOTALL)).replace("\\\n", " ")
    lines = [re.split(r" #| && | \| ", line)[0] for line in re.findall(r"^consonar (.*)", blocks, re.MULTILINE)]
    return [line for line in lines if not re.search(r"\.\.\.|…|\w\.yaml|--resume", line)]


@pytest.mark.parametrize("text", filter(commands_in, TEXTS), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_docs_have_only_options_that_there_are(text: Path, monkeypatch) -> None:
    """And values that configurations take; nothing is run."""
    monkeypatch.setattr(parsing, "check_output", lambda out, key: None)
    for command, *words in map(shlex.split, commands_in(text)):
        if command == "train":
            train.parse_run(command, words, train.Options, out=tyro.MISSING)
        elif command == "plan":
            plan.parse_run(command, words, plan.Options)
        else:
            parsing.parse(importlib.import_module(f"consonar.cli.{command.replace('-', '_')}").Options, words, command)


def test_a_name_that_is_not_there_is_found() -> None:
    assert means_something("consonar.types.Batch") is False and means_something("consonar.no.such") is False
    assert means_something("consonar.types.Generator")
