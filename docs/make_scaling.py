"""Writes the table of docs/scaling.md, what the published recipes take on 1, 8 and 64 GPUs: python docs/make_scaling.py

Every number is of `consonar plan`; a test makes a row again. It takes some minutes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from consonar.memory import GIB
from consonar.planning.page import span
from consonar.planning.plan import Machine, plan, remedies
from consonar.recipes import find_recipe

PAGE = Path(__file__).parent / "scaling.md"
TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- /table -->)", re.DOTALL)
PUBLISHED_ON = 8
GPUS = (1, 8, 64)
ROWS: dict[str, tuple[str, str | None]] = {
    "rear-s": ("rear-s", None),
    "rear-b": ("rear-b", None),
    "rear-l": ("rear-l", None),
    "vapi-llamagen-xl, from L": ("vapi-llamagen-xl", "hf:llamagen-c2i-l-384"),
    "vapi-llamagen-xl": ("vapi-llamagen-xl", None),
    "vapi-llamagen-xxl": ("vapi-llamagen-xxl", None),
    "vapi-llamagen-t2i": ("vapi-llamagen-t2i", None),
    "vapi-janus-1b": ("vapi-janus-1b", None),
}
"""What is planned, and the start model where the recipe's name does not say it."""
HEAD = """| recipe | GPUs | images at a time x micro-batches | options | GiB of tensors | s a step | in all |
|---|---|---|---|---|---|---|
"""


def row(name: str, gpus: int) -> str:
    """The plan as published, on fewer GPUs in as many more micro-batches; where that is too much, the first change that
    fits."""
    recipe, init = ROWS[name]
    config = find_recipe(recipe)
    more = max(1, PUBLISHED_ON // gpus) * config.loop.accumulation
    config = replace(config, init=init, loop=replace(config.loop, accumulation=more))
    found = plan(config, Machine(gpus=min(gpus, 8), nodes=max(1, gpus // 8)))
    words, found = next(
        (way, each) for way, each in chain([("", found)], remedies(found)) if each.fits
    )  # StopIteration: nothing fits, which no row is for
    options = " ".join(each for each in re.split(r" (?=--)", words) if each and "accumulation" not in each)
    once = found.rows // found.config.loop.accumulation
    return (
        f"| `{recipe}`{name.removeprefix(recipe)} | {gpus} | {once} x {found.config.loop.accumulation} | "
        f"{f'`{options}`' if options else ''} | {found.peak / GIB:.0f} | {found.seconds:.3g} | {span(found.hours)} |"
    )


def rows() -> Iterator[str]:
    for name in ROWS:
        for gpus in GPUS:
            yield row(name, gpus)


def main() -> None:
    lines = []
    for line in rows():
        print(line, flush=True)
        lines.append(line)
    table = HEAD + "\n".join(lines) + "\n"
    PAGE.write_text(TABLE.sub(lambda _: table, PAGE.read_text()))


if __name__ == "__main__":
    main()
