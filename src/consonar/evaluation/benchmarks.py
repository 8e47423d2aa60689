"""What the scorers of GenEval, GenEval 2 and DPG-Bench found, read back: categories, with intervals over prompts.

Their arithmetic, with what is wrong in it mended. GenEval: the mean over its tasks of the share of pictures. GenEval 2:
of each prompt the arithmetic (AM) and the geometric mean (GM) of its answers; skills by AM, numbers of atoms by GM.
DPG-Bench: an answer that depends on a "no" counts as "no" in the score of a picture. Its own scorer keeps for the
categories the last picture of each prompt alone, and skips the first question of its table, without which it fails on
the first prompt. Here all answers count, and what its scorer says is told beside it.
"""

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from consonar.errors import UserError, check_choice, reading
from consonar.evaluation.results import Measurement, library_versions
from consonar.files.readers import entry_of, parse_json, text_lines
from consonar.files.writers import file_sha256
from consonar.json_types import Json
from consonar.metrics.shares import mean_of, wilson
from consonar.sampling.exports import dpg_rows, read_benchmark

PUBLISHED = {
    "geneval": (553, "db13d3b9aa8c662809a99c92f2af07b46958f6017d12755e52462a5a9fc428d7"),
    "geneval2": (800, "c9b72ad716f4c99ee9bcbf57b0647172a36e3b83d99e100a47e440319deab67e"),
    "dpg": (1065, "835793d936e83c08ad87d77841645c0666c442b2ca1a27d334a289d80f4c9ed6"),
}
"""How many prompts a benchmark has, and their hash (`hash_of`), in the repositories of their authors."""
NAMES = {"geneval": "GenEval", "geneval2": "GenEval 2", "dpg": "DPG-Bench"}
DETAIL = re.compile(r"(?P<file>.*?), \((?P<crop>\d+, \d+, \d+, \d+)\), (?P<question>.*), (?P<answer>[^,]*)")
Values = Mapping[str, Sequence[float]]
"""By prompt, numbers from 0 to 1."""
Questions = dict[int, dict[str, str]]
"""Of a prompt of DPG-Bench the rows of its table, by proposition_id."""
Table = dict[str, Questions]
"""By item_id."""
Answers = dict[int, float]
"""Of a picture, by proposition_id in the order of its lines: 1 for "yes"."""


def hash_of(texts: Iterable[str]) -> str:
    """Of prompts in any order."""
    return hashlib.sha256("\n".join(sorted({text.strip() for text in texts})).encode()).hexdigest()


def mean_over(values: Values) -> Measurement:
    """The mean of all numbers, with an interval over prompts."""
    numbers = [number for of_prompt in values.values() for number in of_prompt]
    share = sum(numbers) / len(numbers)
    return Measurement(share, interval=wilson(share, len(values)))


def read_scores(form: str, path: Path, prompts: Path | None) -> Json:
    """What a scorer wrote to `path`, of the benchmark's file of `prompts`, which GenEval's results do not need.

    `UserError` for files of something else, and where both are of other prompts.
    """
    check_choice("--format", form, NAMES)
    more: Json = {}
    if form == "geneval":
        texts, metrics = geneval(path, prompts)
    elif prompts is None:
        raise UserError(f"--prompts: missing; {NAMES[form]}'s results are read beside its own file of prompts")
    elif form == "geneval2":
        texts, metrics = geneval2(path, prompts)
    else:
        texts, metrics, more["as_their_scorer"] = dpg(path, prompts)
    count, sha256 = PUBLISHED[form]
    is_published, different = hash_of(texts) == sha256, len(set(texts))
    known = f"the {count} published prompts" if is_published else f"not the {count} published prompts: {different}"
    return {
        "schema": 1,
        "metrics": {name: one.record() for name, one in metrics.items()},
        "benchmark": {"name": NAMES[form], "prompts_sha256": hash_of(texts), "published": is_published},
        "protocol": f"{NAMES[form]}, {known}; read from {path.name}",
        "samples": {"name": str(path), "sha256": file_sha256(path)},
        "versions": library_versions(),
        **more,
    }


def geneval(path: Path, prompts: Path | None) -> tuple[list[str], dict[str, Measurement]]:
    """Of results.jsonl: a line for each picture, with tag, prompt and whether it is correct."""
    tasks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, line in enumerate(text_lines(path, path), 1):
        if not line.strip():
            continue
        with reading(
            at := f"{path} line {number}", "a result of GenEval", "name the file that evaluate_images.py wrote"
        ):
            row = parse_json(line)
            tag, prompt, correct = (entry_of(row, key, at) for key in ("tag", "prompt", "correct"))
            if not isinstance(correct, bool):
                raise ValueError(f"correct is {correct!r}")
        tasks[str(tag)][str(prompt)].append(float(correct))
    if not tasks:
        raise UserError(f"{path}: it is empty; name the file that evaluate_images.py wrote")
    texts = [text for of_task in tasks.values() for text in of_task]
    if prompts is not None and (missing := {*read_benchmark("geneval", prompts).texts.values()} ^ {*texts}):
        raise UserError(f"{path}: is of other prompts than {prompts}: {min(missing)!r} is in one of them")
    found = {task: mean_over(values) for task, values in tasks.items()}
    score, interval = mean_of([one.value for one in found.values()], [one.interval or (0, 1) for one in found.values()])
    whole = {"GenEval": Measurement(score, interval=interval)}
    return texts, whole | {f"GenEval ({task})": one for task, one in found.items()}


def geneval2(path: Path, prompts: Path) -> tuple[list[str], dict[str, Measurement]]:
    """Of the list of each prompt's scores that evaluation.py wrote for soft_tifa, in the order of its prompts."""
    asked, skills, atoms = read_benchmark("geneval2", prompts), [], []
    texts = [*asked.texts.values()]
    for where, line in zip(asked.texts, asked.items, strict=True):
        with reading(where, "a prompt of GenEval 2, with skills and atom_count"):
            row = parse_json(line)
            skills.append([str(name) for name in row["skills"]])
            atoms.append(int(row["atom_count"]))
    with reading(path, "scores of GenEval 2", "name the output file of evaluation.py, of soft_tifa"):
        lists = [[float(score) for score in scores] for scores in parse_json(path.read_text(encoding="utf-8"))]
        if list(map(len, lists)) != list(map(len, skills)) or [] in lists:
            raise ValueError(f"{len(lists)} lists of scores are not one for each question of {len(texts)} prompts")
        if any(not 0 <= score <= 1 for scores in lists for score in scores):
            raise ValueError("scores are from 0 to 1")
    arithmetic = {text: [sum(scores) / len(scores)] for text, scores in zip(texts, lists, strict=True)}
    geometric = {text: [geometric_mean(scores)] for text, scores in zip(texts, lists, strict=True)}
    found = {"GenEval 2": mean_over(geometric), "GenEval 2 (AM)": mean_over(arithmetic)}
    by_skill: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for text, names, scores in zip(texts, skills, lists, strict=True):
        for name, score in zip(names, scores, strict=True):
            by_skill[name][text].append(score)
    found |= {f"GenEval 2 ({skill})": mean_over(values) for skill, values in sorted(by_skill.items())}
    for count in sorted(set(atoms)):
        some = {text: geometric[text] for text, number in zip(texts, atoms, strict=True) if number == count}
        found[f"GenEval 2 ({count} atoms)"] = mean_over(some)
    return texts, found


def geometric_mean(scores: Sequence[float]) -> float:
    return math.prod(scores) ** (1 / len(scores))


def dpg(path: Path, prompts: Path) -> tuple[list[str], dict[str, Measurement], dict[str, float]]:
    """Of ..._detail.txt: a line for each question of each picture of a prompt, beside dpg_bench.csv; last, what its own
    scorer says. Lines have no numbers: of questions worded alike the next behind the picture's last line is meant."""
    rows: Table = defaultdict(dict)
    for row in dpg_rows(prompts).values():
        rows[row["item_id"]][int(row["proposition_id"])] = row
    answers: dict[str, dict[str, Answers]] = defaultdict(lambda: defaultdict(dict))
    with reading(path, "answers of DPG-Bench", "name the file ..._detail.txt that compute_dpg_bench.py wrote"):
        for number, line in enumerate(text_lines(path, path), 1):
            if not line:
                continue
            if (found := DETAIL.fullmatch(line)) is None:
                raise ValueError(f"line {number} has no file, place, question and answer")
            item = PurePosixPath(found["file"]).stem
            asked = rows.get(item, {}).items()
            alike = [key for key, row in asked if row["question_natural_language"] == found["question"]]
            if not alike:
                raise ValueError(f"line {number}: {prompts.name} asks no such question of {item!r}")
            said = answers[item][found["crop"]]
            last = next(reversed(said), 0)
            key = min(alike, key=lambda key: (key <= last, key))
            said.pop(key, None)  # of a picture that was judged twice the later answer counts
            said[key] = float(found["answer"].strip() == "yes")
        if not answers:
            raise ValueError("it is empty")
    scores = {item: [picture_score(rows[item], one) for one in said.values()] for item, said in answers.items()}
    metrics = {"DPG-Bench": mean_over({item: [sum(of) / len(of)] for item, of in scores.items()})}
    metrics |= {f"DPG-Bench ({name})": mean_over(of) for name, of in categories(rows, answers).items()}
    last_one = {item: {"": list(said.values())[-1]} for item, said in answers.items() if not fails(rows[item], said)}
    theirs = {f"DPG-Bench ({name})": mean_over(of).value for name, of in categories(rows, last_one).items()}
    if last_one:
        theirs["DPG-Bench"] = sum(sum(scores[item]) / len(scores[item]) for item in last_one) / len(last_one)
    return [next(iter(rows[item].values()))["text"] for item in answers], metrics, theirs


def fails(rows: Questions, said: Mapping[str, Answers]) -> bool:
    """Whether their scorer fails on a prompt: where a question depends on one that it did not ask."""
    asked = {key for one in said.values() for key in one}
    return any({*parents(rows[key])} - asked - {0} for key in asked)


def parents(row: Mapping[str, str]) -> list[int]:
    """The numbers of the questions that a question depends on; 0: none."""
    return [int(word) for word in row["dependency"].split(",")]


def picture_score(rows: Questions, said: Answers) -> float:
    """The share of "yes", without what depends on a "no", itself or by what it depends on."""
    kept = dict(said)
    while fallen := [key for key in kept if kept[key] and any(kept.get(parent) == 0 for parent in parents(rows[key]))]:
        kept |= dict.fromkeys(fallen, 0.0)
    return sum(kept.values()) / len(kept)


def categories(rows: Table, answers: Mapping[str, Mapping[str, Answers]]) -> dict[str, dict[str, list[float]]]:
    """The answers of each category, broad and in detail, by prompt."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item, pictures in answers.items():
        for said in pictures.values():
            for key, answer in said.items():
                detailed = rows[item][key]["tuple"].split("(")[0].strip()
                for name in {detailed, detailed.split("-")[0].strip()}:
                    found[name][item].append(answer)
    return {name: dict(found[name]) for name in sorted(found)}
