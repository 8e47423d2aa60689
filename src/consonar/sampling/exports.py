"""Pictures of prompts in the folders that the scorers of benchmarks read, from their own files of prompts.

GenEval (arXiv 2310.11513): a folder for each line of evaluation_metadata.jsonl, `00000/metadata.jsonl` with the line
and `00000/samples/0000.png` and more. GenEval 2 (arXiv 2512.16853): one picture of each prompt, and
`image_paths.json` from prompts to files. DPG-Bench (arXiv 2403.05135): `images/ID.png`, the four pictures of a prompt
as one of 2 x 2.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from consonar.errors import UserError, reading
from consonar.files.readers import entry_of, lines_of, parse_json, plain_name, text_lines
from consonar.sampling.prompt_files import checked, read_prompt_file

PER_PROMPT = {"geneval": (4, 1000), "geneval2": (1, 1), "dpg": (4, 4)}
"""Pictures of a prompt: how many are usual, and at most."""
READ = {"geneval": ("prompt", "tag", "include"), "geneval2": ("prompt", "skills", "atom_count")}
"""What scorers read of each line."""


@dataclass(frozen=True)
class BenchmarkPrompts:
    """The prompts of a benchmark, by where they stand, and beside each its line, or DPG's id."""

    format: str
    texts: Mapping[str, str]
    items: tuple[str, ...]


def read_benchmark(form: str, place: Path) -> BenchmarkPrompts:
    """From the benchmark's own file; of GenEval also from a .txt of prompts, of DPG from its folder of ID.txt.

    `UserError`, with the line, for anything else.
    """
    if form == "dpg":
        items, texts = dpg_prompts(place)
    elif form == "geneval" and place.suffix.lower() == ".txt":  # without tasks, for which GenEval's own scorer asks
        texts = read_prompt_file(place)
        items = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts.values()]
    else:
        items = lines_of(place, f"--prompts: {place}")
        texts = dict(prompt_of(form, f"--prompts: {place} line {number}", line) for number, line in enumerate(items, 1))
    if not texts:
        raise UserError(f"--prompts: {place} holds no prompts of {form}")
    first: dict[str, str] = {}
    for where, text in texts.items():
        if first.setdefault(text, where) != where and form == "geneval2":
            raise UserError(f"{where}: {text!r} is there twice, and GenEval 2 knows its pictures by the prompt")
    return BenchmarkPrompts(form, texts, tuple(items))


def prompt_of(form: str, where: str, line: str) -> tuple[str, str]:
    """Where a line stands, and its prompt."""
    with reading(where, f"a line of {form}"):
        row = parse_json(checked(line, where))
    read = {key: entry_of(row, key, where) for key in READ[form]}
    return where, checked(read["prompt"], where)


def dpg_prompts(place: Path) -> tuple[list[str], dict[str, str]]:
    """Ids, and prompts by where they stand, of dpg_bench.csv or the folder `prompts`."""
    found: dict[str, tuple[str, str]] = {}
    if place.is_dir():
        for path in sorted(place.glob("*.txt")):
            where = f"--prompts: {path}"
            found[path.stem] = where, "\n".join(text_lines(path, where))
    else:
        for line, row in dpg_rows(place).items():
            found.setdefault(row["item_id"], (f"--prompts: {place} line {line}", row["text"]))
    return [*found], {where: checked(text, where).strip() for where, text in found.values()}


def dpg_rows(place: Path) -> dict[int, dict[str, str]]:
    """The rows of dpg_bench.csv, one for each question, by the line on which they end."""
    rows: dict[int, dict[str, str]] = {}
    with reading(f"--prompts: {place}", "dpg_bench.csv"):
        table = csv.DictReader(io.StringIO("\n".join(text_lines(place, f"--prompts: {place}"))))
        columns = table.fieldnames or ()
        if not {"item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language"} <= {*columns}:
            raise ValueError(f"has the columns {', '.join(columns)}")
        for row in table:
            rows[table.line_num] = row
    for line, row in rows.items():
        with reading(f"--prompts: {place} line {line}", "a question of DPG-Bench"):
            if not plain_name(row["item_id"]):  # what names a file, and what is calculated with
                raise ValueError(f"item_id {row['item_id']!r} names no file")
            int(row["proposition_id"]), [int(word) for word in row["dependency"].split(",")], row["tuple"].split()
    return rows


def write_export(
    asked: BenchmarkPrompts, per_prompt: int, folder: Path, out: Path, pictures: Iterator[np.ndarray]
) -> None:
    """Writes `per_prompt` pictures (H, W, 3) of each prompt, which follow each other, into `folder`, that becomes
    `out`."""
    paths, across = {}, 2 if per_prompt > 1 else 1
    for index, (item, text) in enumerate(zip(asked.items, asked.texts.values(), strict=True)):
        some, place = list(islice(pictures, per_prompt)), folder / f"{index:05d}"
        if asked.format == "geneval":
            (place / "samples").mkdir(parents=True)
            (place / "metadata.jsonl").write_text(item, encoding="utf-8")
            for number, picture in enumerate(some):
                Image.fromarray(picture).save(place / "samples" / f"{number:04d}.png")
        elif asked.format == "geneval2":
            Image.fromarray(some[0]).save(place.with_suffix(".png"))
            paths[text] = str(out.resolve() / f"{index:05d}.png")
        else:
            (folder / "images").mkdir(exist_ok=True)
            rows = [np.concatenate(some[start : start + across], 1) for start in range(0, per_prompt, across)]
            Image.fromarray(np.concatenate(rows)).save(folder / "images" / f"{item}.png")
    if paths:
        (folder / "image_paths.json").write_text(json.dumps(paths, indent=1))
