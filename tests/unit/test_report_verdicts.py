"""The verdicts: ahead, no difference or behind by the spread that was measured, and open where nothing can be said."""

from __future__ import annotations

import json

import pytest
from test_report import FD, Page, write_results, write_run

from consonar.evaluation.results import Measurement
from consonar.report import load_runs, write_report
from consonar.report.tables import judge, result_sections, verdict_table


@pytest.mark.parametrize(
    ("score", "spread", "word"),
    [
        (90.0, 3.0, "no difference"),  # 10 with a spread of 5
        (89.9, 3.0, "ahead"),
        (91.0, 3.0, "no difference"),
        (100.0, 3.0, "no difference"),
        (109.0, 3.0, "no difference"),
        (110.1, 3.0, "behind"),
        (100.0, 0.0, "no difference"),
        (90.0, None, "open"),
        (float("nan"), 3.0, "open"),
        (float("inf"), 3.0, "open"),
    ],
)
def test_ahead_and_behind_lie_beyond_twice_the_spread(score, spread, word):
    assert judge(Measurement(score, spread), Measurement(100.0, 4.0)).word == word


def test_more_may_be_better_and_a_spread_of_zero_was_measured_too():
    assert judge(Measurement(0.9, 0.01), Measurement(0.5, 0.01), direction=1).word == "ahead"
    assert judge(Measurement(0.0, 0.0), Measurement(0.01, 0.01)).word == "no difference"
    assert judge(Measurement(1.0), Measurement(1.0)) == ("open", "equal, without a spread")
    assert judge(None, Measurement(1.0)).word == "–"


def test_marks_follow_the_spread_of_the_difference(tmp_path):
    runs = [write_run(tmp_path / name) for name in "abc"]
    for run, value, copied in zip(runs, (60.0, 62.0, 63.0), (0.05, 0.03, 0.031), strict=True):
        write_results(run, {1.0: value}, copied=copied)  # spreads of 1 and of 0.001
    loaded = load_runs(runs)
    columns = [FD, "copy rate (features)", "precision"]
    cells = [row["cells"] for row in result_sections(loaded, columns)[0]["rows"]]
    marks = {name: [cell[index]["mark"] for cell in cells] for index, name in enumerate(columns)}
    assert marks[FD] == ["best", "close", ""] and marks["copy rate (features)"] == ["", "best", "close"]
    assert marks["precision"] == ["", "", ""]  # all are equal
    assert cells[0][columns.index("copy rate (features)")]["text"] == "5.00\u00a0±\u00a00.10\u00a0%"


def test_a_verdict_says_by_how_much_and_why_it_is_open():
    assert judge(Measurement(80.0, 3.0), Measurement(100.0, 4.0)).text == "20.0\u00a0±\u00a05.0"
    assert judge(Measurement(80.0), Measurement(100.0, 4.0)).text == "20 lower, but no spread was measured"
    assert judge(Measurement(120.0, 4.0), Measurement(100.0)).text == "20 higher, but no spread was measured"


@pytest.mark.parametrize(
    ("plain", "rear", "words"),
    [
        ({1.0: 60.0}, {1.0: 61.0}, ["no difference", "no difference"]),
        ({1.0: 60.0}, {1.0: 50.0}, ["ahead", "ahead"]),
        ({1.0: 50.0}, {1.0: 60.0}, ["behind", "behind"]),
        ({1.0: 70.0, 0.8: 60.0}, {1.0: 60.0}, ["no difference", "ahead"]),  # temperature alone gives it
        ({1.0: 70.0, 0.8: 50.0}, {1.0: 60.0}, ["behind", "ahead"]),  # the order turns round
    ],
)
def test_each_run_is_judged_at_its_best_and_at_temperature_one(tmp_path, plain, rear, words):
    runs = [write_run(tmp_path / "rear", weight=1.0, noise=0.5), write_run(tmp_path / "plain")]
    write_results(runs[0], rear, copied=0.05)
    write_results(runs[1], plain)
    headings, verdicts = verdict_table(load_runs(runs))
    assert headings == ["at its best T", "at T 1"]
    said = [(row["run"].name, row["control"], [row[key].word for key in headings]) for row in verdicts]
    assert said == [("rear", "plain", words)]
    page = Page(write_report(runs, tmp_path / "r.html").read_text())
    assert "Who is ahead" in page.text and "vs plain" in page.text and words[0] in page.text


def test_without_a_spread_or_a_measured_run_nobody_is_ahead(tmp_path):
    runs = [write_run(tmp_path / "plain"), write_run(tmp_path / "rear", weight=1.0, noise=0.5)]
    write_results(runs[1], {1.0: 50.0}, spread=None)
    assert verdict_table(load_runs(runs)) == ([], [])  # plain was not measured
    page = Page(write_report(runs, tmp_path / "a.html").read_text())
    assert "there is no verdict" in page.text and "Who is ahead" not in page.text
    write_results(runs[0], {1.0: 60.0}, spread=None)
    (row,) = verdict_table(load_runs(runs))[1]
    assert [row["at its best T"], row["at T 1"]] == [("open", "10 lower, but no spread was measured")] * 2
    content = json.loads((runs[0] / "results.json").read_text())
    content["rows"][0]["metrics"] = {FD.replace("validation", "train"): {"value": 3.0}}
    (runs[0] / "results.json").write_text(json.dumps(content))
    assert verdict_table(load_runs(runs)) == ([], [])  # nor with another distance


def test_details_fold_away_below_pictures_verdicts_and_the_frontier(tmp_path):
    runs = [write_run(tmp_path / "plain"), write_run(tmp_path / "rear", weight=1.0, noise=0.5)]
    for run, value in zip(runs, (60.0, 40.0), strict=True):
        write_results(run, {1.0: value, 0.9: value + 1})
    html = write_report(runs, tmp_path / "r.html").read_text()
    order = [html.index(part) for part in ('class="strip"', "Who is ahead", "</figure>", "<details", "Numbers")]
    assert order == sorted(order) and '<details class="part" open' not in html
