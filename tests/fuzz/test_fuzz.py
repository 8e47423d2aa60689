"""A part of `make fuzz`: damaged files of every format give success or one line, never another exception."""

from pathlib import Path

import pytest
from fuzz.damage import fuzz
from fuzz.formats import FORMATS

SLOW = 12
"""Damages of a file whose reader draws a page or loads a model."""
QUICK = 120


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_told_in_one_line(name: str, tmp_path: Path) -> None:
    slow = FORMATS[name].file.startswith(("run/", "t/")) and "resumed" not in name
    assert fuzz(FORMATS[name], tmp_path, limit=SLOW if slow else QUICK) == []
