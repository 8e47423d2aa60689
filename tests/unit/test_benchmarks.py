"""GenEval, GenEval 2 and DPG-Bench: results of their scorers read back, categories worked by hand."""

import json

import pytest

from consonar.cli import main
from consonar.errors import UserError
from consonar.evaluation.benchmarks import PUBLISHED, hash_of, read_scores
from consonar.sampling.exports import read_benchmark


def values(content):
    return {name: round(one["value"], 6) for name, one in content["metrics"].items()}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def geneval(tmp_path):
    found = [("counting", "two dogs", True), ("counting", "two dogs", False), ("counting", "two cats", False),
             ("counting", "two cats", False), ("colors", "a red dog", True), ("colors", "a red dog", True)]  # fmt: skip
    rows = [{"tag": tag, "prompt": prompt, "correct": correct, "filename": "x"} for tag, prompt, correct in found]
    return write_lines(tmp_path / "results.jsonl", rows)


def test_geneval_is_the_mean_over_tasks(geneval, tmp_path, capsys):
    main(["evaluate", str(geneval), "--format", "geneval", "--out", str(tmp_path / "ours.json")])
    content = json.loads((tmp_path / "ours.json").read_text())
    assert values(content) == {"GenEval": 0.625, "GenEval (counting)": 0.25, "GenEval (colors)": 1}
    assert content["benchmark"]["prompts_sha256"] == hash_of(["a red dog", "two cats", "two dogs"])
    assert "not the 553 published prompts: 3" in capsys.readouterr().out
    low, high = content["metrics"]["GenEval (colors)"]["interval"]
    assert low < 0.3 and high == 1  # of one prompt
    prompts = write_lines(tmp_path / "p.jsonl", [{"tag": "x", "include": [], "prompt": "two dogs"}])
    with pytest.raises(UserError, match=r"is of other prompts than .*: 'a red dog' is in one of them"):
        read_scores("geneval", geneval, prompts)


def test_geneval2_averages_atoms_and_prompts(tmp_path):
    asked = [
        {"prompt": "two dogs", "atom_count": 2, "vqa_list": [], "skills": ["count", "object"]},
        {"prompt": "a red cat", "atom_count": 3, "vqa_list": [], "skills": ["count", "attribute", "object"]},
    ]
    prompts, scores = write_lines(tmp_path / "data.jsonl", asked), tmp_path / "scores.json"
    scores.write_text("[[0.25, 1.0], [1.0, 0.0, 0.5]]")
    assert values(read_scores("geneval2", scores, prompts)) == {
        "GenEval 2": 0.25, "GenEval 2 (AM)": 0.5625, "GenEval 2 (attribute)": 0, "GenEval 2 (count)": 0.625,
        "GenEval 2 (object)": 0.75, "GenEval 2 (2 atoms)": 0.5, "GenEval 2 (3 atoms)": 0,
    }  # fmt: skip
    write_lines(prompts, [asked[0], asked[1] | {"atom_count": "x"}])
    with pytest.raises(UserError, match=r"^--prompts: .* line 2: not a prompt of GenEval 2"):
        read_scores("geneval2", scores, prompts)
    write_lines(prompts, asked)
    scores.write_text("[[0.25], [1.0, 0.0, 0.5]]")
    with pytest.raises(UserError, match="not one for each question of 2 prompts"):
        read_scores("geneval2", scores, prompts)
    with pytest.raises(UserError, match="--prompts: missing"):
        read_scores("geneval2", scores, None)


COLUMNS = ("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed",
           "tuple", "question_natural_language")  # fmt: skip


@pytest.fixture
def dpg(tmp_path):
    """Two prompts; their scorer never asks the first question, on which the second depends."""
    rows = [("a", "one, two", "", 1, "0", "", "", "entity - whole (dog)", "Is there a dog?"),
            ("a", "one, two", "", 2, "1", "", "", "attribute - color (dog, red)", "Is it red, or so?"),
            ("b", "three", "", 1, "0", "", "", "entity - whole (cat)", "Is there a cat?"),
            ("b", "three", "", 2, "1", "", "", "attribute - color (cat, blue)", "Is the cat blue?"),
            ("b", "three", "", 3, "2", "", "", "relation - spatial (cat, x)", "Is it left?")]  # fmt: skip
    table = tmp_path / "dpg_bench.csv"
    table.write_text("\n".join(",".join(f'"{cell}"' for cell in row) for row in [COLUMNS, *rows]) + "\n")
    crops = ["(0, 0, 64, 64)", "(64, 0, 128, 64)"]
    said = [("a", 0, "Is it red, or so?", "yes"), ("b", 0, "Is it left?", "yes"),
            ("b", 0, "Is the cat blue?", "yes"), ("b", 0, "Is there a cat?", "no"), ("b", 1, "Is there a cat?", "yes"),
            ("b", 1, "Is the cat blue?", "yes"), ("b", 1, "Is it left?", "no")]  # fmt: skip
    detail = tmp_path / "r_detail.txt"
    detail.write_text("".join(f"out, x/{item}.png, {crops[k]}, {asked}, {answer}\n" for item, k, asked, answer in said))
    return detail, table


def test_dpg_counts_all_pictures_and_says_what_its_scorer_says(dpg):
    content = read_scores("dpg", *dpg)
    found = values(content)
    # b: in the first picture all depends on a no; in the second two of three.
    assert found["DPG-Bench"] == round((1 + (0 + 2 / 3) / 2) / 2, 6)
    assert found["DPG-Bench (attribute)"] == found["DPG-Bench (attribute - color)"] == 1
    assert found["DPG-Bench (entity)"] == found["DPG-Bench (relation)"] == 0.5
    theirs = content["as_their_scorer"]  # fails on a, and knows the last picture of b alone
    assert theirs["DPG-Bench (entity)"] == 1 and theirs["DPG-Bench (relation)"] == 0
    assert theirs["DPG-Bench"] == pytest.approx(1 / 3)


def test_dpg_keeps_questions_that_are_worded_alike_apart(dpg):
    detail, table = dpg
    rows = [(1, "0", "entity - whole (dog)", "Is there a dog?"), (2, "1", "attribute - size (dog)", "Is it small?"),
            (3, "0", "entity - whole (cat)", "Is there a cat?"), (4, "3", "attribute - size (cat)", "Is it small?"),
            (5, "2", "relation - spatial (dog, x)", "Is it left?")]  # fmt: skip
    lines = [f'c,four,"",{number},{parent},"","","{tuple}",{asked}' for number, parent, tuple, asked in rows]
    table.write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")
    said = ["yes", "yes", "no", "no", "yes"]
    detail.write_text(
        "".join(f"x/c.png, (0, 0, 9, 9), {row[3]}, {word}\n" for row, word in zip(rows, said, strict=True))
    )
    found = values(read_scores("dpg", detail, table))
    assert found["DPG-Bench"] == 0.6 and found["DPG-Bench (attribute - size)"] == 0.5
    with detail.open("a") as again:  # the scorer goes on in the file of an earlier call
        again.writelines(f"x/c.png, (0, 0, 9, 9), {row[3]}, yes\n" for row in rows[:3])
    assert values(read_scores("dpg", detail, table))["DPG-Bench"] == 0.8


def test_prompts_that_differ_in_a_letter_are_not_the_published_ones(geneval, monkeypatch):
    """The hash is that of "a red dog", "two cats" and "two dogs", a line each."""
    known = "d1179af9925c07b058cfca01cc3edb678474fd8d73eafca06c52800d5e381a57"
    monkeypatch.setitem(PUBLISHED, "geneval", (3, known))
    content = read_scores("geneval", geneval, None)
    assert content["benchmark"] == {"name": "GenEval", "prompts_sha256": known, "published": True}
    assert "the 3 published prompts; " in content["protocol"] and "not the" not in content["protocol"]
    geneval.write_text(geneval.read_text().replace("two cats", "two bats"))
    content = read_scores("geneval", geneval, None)
    assert not content["benchmark"]["published"] and "not the 3 published prompts: 3" in content["protocol"]


@pytest.mark.parametrize(
    ("form", "text", "said"),
    [("geneval", "{}\n", 'line 1: the entry "tag" is missing'), ("geneval", "[\n", "line 1: not a result of GenEval"),
      ("geneval", "", "it is empty"),
     ("dpg", "a.png, yes\n", "line 1 has no file"),
     ("dpg", "a.png, (0, 0, 1, 1), Why?, yes\n", "asks no such question of 'a'")],
)  # fmt: skip
def test_files_of_something_else(dpg, tmp_path, form, text, said):
    path = tmp_path / "wrong"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_scores(form, path, dpg[1] if form == "dpg" else None)


def test_prompts_are_told_by_their_line_and_ids_name_files(tmp_path):
    path = tmp_path / "lines.jsonl"
    first = {"prompt": "a", "tag": "t", "include": []}
    for second, said in (
        (first | {"prompt": ""}, "'' is no prompt"), ({"prompt": "x"}, 'the entry "tag" is missing'),
        ("", "'' is no prompt"), (first | {"prompt": "x\ud83d"}, "not text in UTF-8"),
    ):  # fmt: skip
        rows = [first, second, first]
        path.write_text("\n".join(json.dumps(row) if row else "" for row in rows), encoding="utf-8-sig")
        with pytest.raises(UserError, match=f"line 2: .*{said}"):
            read_benchmark("geneval", path)
    path.write_text("item_id,text,proposition_id,dependency,tuple,question_natural_language\n../x,a,1,0,whole (a),A?\n")
    with pytest.raises(UserError, match=r"^--prompts: .* line 2: .*'\.\./x' names no file"):
        read_benchmark("dpg", path)
    write_lines(path, [{"prompt": text, "skills": [], "atom_count": 1} for text in ("a", "b", "a")])
    with pytest.raises(UserError, match=r"^--prompts: .* line 3: 'a' is there twice"):
        read_benchmark("geneval2", path)
    (tmp_path / "p").mkdir()
    (tmp_path / "p/0.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"^--prompts: .*p/0\.txt: ' \\n' is no prompt"):
        read_benchmark("dpg", tmp_path / "p")


def test_geneval_takes_plain_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('a "dog"\n\nzwei Bäume \n', encoding="utf-8-sig")
    with pytest.raises(UserError, match="line 2: '' is no prompt"):  # else no folder has the number of its line
        read_benchmark("geneval", path)
    path.write_text('a "dog"\nzwei Bäume \n\n', encoding="utf-8-sig")
    read = read_benchmark("geneval", path)
    assert [*read.texts.values()] == ['a "dog"', "zwei Bäume"]
    assert [json.loads(item) for item in read.items] == [{"prompt": text} for text in read.texts.values()]
