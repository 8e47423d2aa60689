"""What the report says of where runs of post-training started, of their methods, and of runs that began others."""

from __future__ import annotations

import json

import pytest
from test_report import Page, write_results, write_run
from test_report_post_training import write_trained

from consonar.report import load_runs, write_report
from consonar.report.images import load_sheets, nearest_pairs
from consonar.report.records import control_of, find_start, measured_start, start_text
from consonar.report.tables import rows_of_equal_entropy


def test_the_start_is_found_by_its_folder_and_never_by_name_alone(tmp_path):
    start, same_name = write_run(tmp_path / "demo" / "rear"), write_run(tmp_path / "else" / "rear")
    inits = {"a": start, "b": start / "model", "c": start / "best", "d": tmp_path / "gone" / "rear"}
    folders = [write_trained(tmp_path / "demo" / name, init) for name, init in inits.items()]
    runs = load_runs([start, same_name, *folders])
    assert [run.name for run in runs[:2]] == ["demo/rear", "else/rear"]
    texts = [start_text(run, runs) for run in runs]
    assert texts == ["", "", "demo/rear", "demo/rear", "demo/rear (its best model)", "demo/rear"]
    assert find_start(runs[5], runs) is runs[0]  # its start is gone from where it was, and one of its name lies beside
    # The best model is not what the page measures of its run.
    assert measured_start(runs[4], runs) is None and find_start(runs[4], runs) is runs[0]
    others = [runs[1], runs[2]]
    assert find_start(runs[2], others) is None and start_text(runs[2], others) == "rear"
    kinds = {"x": "policy", "y": "cross_entropy"}
    hub = load_runs([write_trained(tmp_path / name, "hf:rar-b", kind=kind) for name, kind in kinds.items()])
    assert start_text(hub[0], hub) == "hf:rar-b"


def test_a_control_is_of_the_same_start(tmp_path):
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", weight=1.0)
    inits = {"last": first / "model", "best": first / "best", "other": second, "hub": "hf:rar-b"}
    folders = [first, second]
    for name, init in inits.items():
        folders.append(write_trained(tmp_path / name, init))
        folders.append(write_trained(tmp_path / f"{name}-ce", init, kind="cross_entropy"))
    runs = load_runs(folders[:8])
    controls = {run.name: control and control.name for run in runs if [control := control_of(run, runs)]}
    assert controls == {
        "first": None, "second": "first", "last": "last-ce", "last-ce": "first", "best": "best-ce", "best-ce": None,
        "other": "other-ce", "other-ce": "second",
    }  # fmt: skip
    alone = [run for run in runs if run.name in ("first", "last", "best-ce", "other-ce")]
    assert control_of(alone[1], alone).name == "first"  # the controls here are of other starts
    hub = load_runs(folders[8:])
    assert control_of(hub[0], hub) is hub[1] and control_of(hub[1], hub) is None


@pytest.mark.parametrize(
    ("objective", "method"),
    [
        ({"kind": "policy"}, "VA-pi"),
        ({"kind": "policy", "estimator": "rloo", "credit": "token"}, "VA-pi (rloo, credit by place)"),
        ({"kind": "policy", "rollout": "free", "estimator": "grpo"}, "AR-GRPO"),
        ({"kind": "cross_entropy", "target": "one_hot"}, "cross-entropy"),
        ({"kind": "cross_entropy", "target": "soft"}, "soft targets"),
        ({"kind": "straight_through"}, "straight-through"),
    ],
)
def test_methods_of_post_training_have_names(objective, method, tmp_path):
    trained = write_trained(tmp_path / "run", tmp_path, **objective)
    with (trained / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "train/mse": 0.1}\n')  # logged by straight-through, and by tokenizers
    (run,) = load_runs([trained])
    assert run.method == method
    assert f"{method.partition(' (')[0]} " in Page(write_report([trained], tmp_path / "page.html").read_text()).text


def test_a_start_that_is_elsewhere_is_not_the_run_of_its_name_beside_it(tmp_path):
    beside, elsewhere = write_run(tmp_path / "demo" / "rear"), write_run(tmp_path / "else" / "rear")
    runs = load_runs([beside, write_trained(tmp_path / "demo" / "vapi", elsewhere)])
    assert find_start(runs[1], runs) is None and start_text(runs[1], runs) == "rear"


def test_only_the_own_start_is_a_control_at_equal_entropy(tmp_path):
    start, stranger = write_run(tmp_path / "start"), write_run(tmp_path / "stranger")
    trained = write_trained(tmp_path / "vapi", start)
    for run in (start, stranger, trained):
        write_results(run, {1.0: 60.0, 0.8: 55.0})
    for run, expected in ((stranger, (None, None)), (start, (60.0, 55.0))):
        content = json.loads((run / "results.json").read_text())
        content["rows"][1]["matched_to"] = "vapi"
        (run / "results.json").write_text(json.dumps(content))
        runs = load_runs([start, stranger, trained])
        rows = rows_of_equal_entropy(runs[2], runs)
        assert tuple(row and row.deciding.value for row in rows) == expected


def test_a_page_of_many_runs_shows_fewer_neighbours_of_each(tmp_path, monkeypatch):
    monkeypatch.setattr("consonar.report.images.MAX_NEAREST_OF_MANY", 2)
    folders = [write_run(tmp_path / name) for name in "abcd"]
    for folder in folders:
        write_results(folder, {1.0: 60.0})
    runs = load_runs(folders)
    sheets = load_sheets(runs)
    assert [len(pairs) for _, pairs in nearest_pairs(runs, sheets)] == [2] * 4
    assert [len(pairs) for _, pairs in nearest_pairs(runs[:3], sheets[:3])] == [3] * 3  # one for each class
