"""Pictures of prompts in the folders that the scorers of benchmarks read, from their own files of prompts.

GenEval (arXiv 2310.11513): a folder for each line of evaluation_metadata.jsonl, `00000/metadata.jsonl` with the line
and `00000/samples/0000.png` and more. GenEval 2 (arXiv 2512.16853): one picture of each prompt, and
`image_paths.json` from prompts to files. DPG-Bench (arXiv 2403.05135): `images/ID.png`, the four pictures of a prompt
as one of 2 x 2.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from consonar.errors import UserError, reading
from consonar.files.readers import parse_json, plain_name
from consonar.sampling.prompt_files import checked, lines_of, read_prompt_file

PER_PROMPT = {"geneval": (4, 1000), "geneval2": (1, 1), "dpg": (4, 4)}
"""Pictures of a prompt: how many are usual, and at most."""
READ = {"geneval": ("prompt", "tag", "include"), "geneval2": ("prompt", "skills", "atom_count")}
"""What scorers read of each line."""


@dataclass(frozen=True)
class BenchmarkPrompts:
    """The prompts of a benchmark, and what its folder says of each: GenEval's line, GenEval 2's prompt, DPG's id."""

    format: str
    texts: tuple[str, ...]
    items: tuple[str, ...]


def read_benchmark(form: str, place: Path) -> BenchmarkPrompts:
    """From the benchmark's own file; of GenEval also from a .txt of prompts, of DPG from its folder of ID.txt.

    `UserError` for anything else.
    """
    if form == "dpg":
        pairs = dpg_prompts(place)
    elif form == "geneval" and place.suffix.lower() == ".txt":  # without tasks, for which GenEval's own scorer asks
        pairs = [(json.dumps({"prompt": text}, ensure_ascii=False), text) for text in read_prompt_file(place)]
    else:
        lines = enumerate(lines_of(place), 1)
        pairs = [(line if form == "geneval" else "", prompt_of(form, place, n, line)) for n, line in lines]
    items, texts = zip(*pairs, strict=True) if pairs else ((), ())
    if not texts:
        raise UserError(f"{place}: holds no prompts of {form}")
    if twice := [text for text in texts if texts.count(text) > 1 and form == "geneval2"]:
        raise UserError(f"{place}: {twice[0]!r} is there twice, and GenEval 2 knows its pictures by the prompt")
    return BenchmarkPrompts(form, texts, items)


def prompt_of(form: str, place: Path, number: int, line: str) -> str:
    at = f"--prompts: {place} line {number}"
    with reading(at, f"a line of {form}"):
        row = parse_json(line)
        if missing := [key for key in READ[form] if key not in row]:
            raise ValueError(f"it has no {missing[0]!r}")
    return checked(row["prompt"], at)


def dpg_prompts(place: Path) -> list[tuple[str, str]]:
    """Ids and prompts, of dpg_bench.csv or the folder `prompts`."""
    if place.is_dir():
        with reading(place, "text in UTF-8"):
            read = {path.stem: path.read_text(encoding="utf-8-sig") for path in sorted(place.glob("*.txt"))}
    else:
        read = {row["item_id"]: row["text"] for row in dpg_rows(place)}
    return [(item, checked(text, f"--prompts: {place}, {item}").strip()) for item, text in read.items()]


def dpg_rows(place: Path) -> list[dict[str, str]]:
    """The rows of dpg_bench.csv, one for each question."""
    with reading(place, "dpg_bench.csv"):
        rows = list(csv.DictReader(io.StringIO(place.read_text(encoding="utf-8-sig"))))
        if not {"item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language"} <= {*rows[0]}:
            raise ValueError(f"has the columns {', '.join(rows[0])}")
        for row in rows:  # what is calculated with, and what names a file
            if not plain_name(row["item_id"]):
                raise ValueError(f"item_id {row['item_id']!r} names no file")
            int(row["proposition_id"]), [int(word) for word in row["dependency"].split(",")], row["tuple"].split()
    return rows


def write_export(
    asked: BenchmarkPrompts, per_prompt: int, folder: Path, out: Path, pictures: Iterator[np.ndarray]
) -> None:
    """Writes `per_prompt` pictures (H, W, 3) of each prompt, which follow each other, into `folder`, that becomes
    `out`."""
    paths, across = {}, 2 if per_prompt > 1 else 1
    for index, item in enumerate(asked.items):
        some, place = list(islice(pictures, per_prompt)), folder / f"{index:05d}"
        if asked.format == "geneval":
            (place / "samples").mkdir(parents=True)
            (place / "metadata.jsonl").write_text(item, encoding="utf-8")
            for number, picture in enumerate(some):
                Image.fromarray(picture).save(place / "samples" / f"{number:04d}.png")
        elif asked.format == "geneval2":
            Image.fromarray(some[0]).save(place.with_suffix(".png"))
            paths[asked.texts[index]] = str(out.resolve() / f"{index:05d}.png")
        else:
            (folder / "images").mkdir(exist_ok=True)
            rows = [np.concatenate(some[start : start + across], 1) for start in range(0, per_prompt, across)]
            Image.fromarray(np.concatenate(rows)).save(folder / "images" / f"{item}.png")
    if paths:
        (folder / "image_paths.json").write_text(json.dumps(paths, indent=1))
