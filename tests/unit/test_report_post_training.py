"""The report page on post-training: starts, controls, charts, runs that were stopped, six runs on one page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import NUM_CLASSES, picture
from test_report import FD, Page, images_of, write_results, write_run

from consonar.errors import UserError
from consonar.report import MAX_RUNS, load_runs, write_report
from consonar.report.charts import LOOKS, RING_OF_OTHERS, Chart, Line, frontier_charts, svg_chart
from consonar.report.tables import from_to, result_sections, training_groups, verdict_table
from consonar.training.config import DataConfig
from consonar.training.objectives.controls import CrossEntropyConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.run import train

ENTROPY = "entropy (teacher-forced)"


def write_trained(folder: Path, start: Path | str, *, kind: str = "policy", noise: float = 0.0, **objective) -> Path:
    """A run of post-training as it logs itself: reward -0.5 to -0.4, entropy 4 to 3, KL 0 to 0.25, 20 steps."""
    settings = {"kind": kind, "rewards": {"mse": 1.0, "own:bright": 0.5}} | objective
    write_run(folder, config={"init": str(start), "objective": settings})
    lines, moved = [], 0.1 * (objective.get("inner_epochs", 1) - 1)
    for step in (0, 10, 20):
        done = step / 20
        lines.append({
            "step": step, "time": 1.0 * step, "validation/reward": -0.5 + 0.1 * done, "validation/reward_mse": -0.3,
            "validation/reward_own:bright": -0.4, "validation/kl": 0.25 * done, "validation/entropy": 4 - done,
            "validation/cross_entropy": 5.0, "validation/accuracy": 0.1,
        })  # fmt: skip
        if step and kind == "policy":
            lines.append({
                "step": step, "time": 1.0 * step, "train/reward": -0.5, "train/reward_mse": -0.3, "train/policy": 0.0,
                "train/ratio_deviation": moved, "train/clip_fraction": moved, "train/noise_rate": noise,
            })  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def add_results(run: Path, values: dict[float, float], entropies: dict[float, float], matched=None, **settings) -> None:
    """`write_results` with the entropy of each row, and `matched` {temperature: run name}."""
    write_results(run, values, **settings)
    content = json.loads((run / "results.json").read_text())
    for row in content["rows"]:
        row["metrics"][ENTROPY] = {"value": entropies[row["temperature"]], "spread": None}
        if matched and row["temperature"] in matched:
            row["matched_to"] = matched[row["temperature"]]
    (run / "results.json").write_text(json.dumps(content))


@pytest.fixture
def six_runs(tmp_path: Path) -> list[Path]:
    """Plain AR and reAR, each with cross-entropy and with VA-pi from it; VA-pi is as good as its start made sharper."""
    runs = []
    for name, settings, value in (("plain-ar", {}, 80.0), ("rear", {"weight": 1.0, "noise": 0.5}, 70.0)):
        start = write_run(tmp_path / name, **settings)
        control = write_trained(tmp_path / f"{name}-ce", start, kind="cross_entropy")
        trained = write_trained(tmp_path / f"{name}-vapi", start, noise=0.25)
        add_results(start, {1.0: value, 0.8: value - 20}, {1.0: 4.0, 0.8: 3.0}, {0.8: f"{name}-vapi"})
        add_results(control, {1.0: value - 0.5}, {1.0: 3.9})
        add_results(trained, {1.0: value - 20.5}, {1.0: 3.0})
        runs += [start, control, trained]
    return runs


def test_six_runs_fit_one_page_with_samples_of_equal_seeds(six_runs, tmp_path):
    html = write_report(six_runs, tmp_path / "page.html").read_text()
    page = Page(html)
    for text in ("VA-pi, from plain-ar", "cross-entropy, from rear", "rear at the entropy of others", "Post-training"):
        assert text in page.text
    red = [int(image[0, 0, 0]) for image in images_of(page)]
    assert red[:18] == [0, 10, 20] * 6  # a strip per run: the first seed of each class
    assert red[18:36] == [0] * 6 + [10] * 6 + [20] * 6  # a line per class: the first seed of it, once for each run
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert write_report(six_runs, tmp_path / "again.html").read_bytes() == html.encode()


def test_every_run_of_the_largest_page_has_a_look_of_its_own(tmp_path):
    assert MAX_RUNS == 8 and len(LOOKS) == MAX_RUNS
    assert all(len({getattr(look, key) for look in LOOKS}) == MAX_RUNS for key in ("colour", "marker", "shape"))
    runs = [write_run(tmp_path / f"run-{index}") for index in range(MAX_RUNS)]
    assert f"run-{MAX_RUNS - 1}" in write_report(runs, tmp_path / "page.html").read_text()


def test_verdicts_judge_a_method_by_its_control_and_at_equal_entropy(six_runs):
    headings, verdicts = verdict_table(load_runs(six_runs))
    assert headings == ["at its best T", "at T 1", "at equal entropy"]
    said = {row["run"].name: (row["control"], *(row[key].word for key in headings)) for row in verdicts}
    assert said == {
        "plain-ar-ce": ("plain-ar", "behind", "no difference", "–"),
        "plain-ar-vapi": ("plain-ar-ce", "ahead", "ahead", "no difference"),
        "rear": ("plain-ar", "ahead", "ahead", "–"),
        "rear-ce": ("rear", "behind", "no difference", "–"),
        "rear-vapi": ("rear-ce", "ahead", "ahead", "no difference"),
    }


def test_without_a_control_a_method_is_judged_by_its_start_or_not_at_all(tmp_path):
    start = write_run(tmp_path / "rear")
    trained = write_trained(tmp_path / "vapi", start)
    assert verdict_table(load_runs([start, trained])) == ([], [])  # nothing sampled yet
    write_results(start, {1.0: 60.0})
    write_results(trained, {1.0: 50.0})
    headings, (only,) = verdict_table(load_runs([start, trained]))
    assert only["control"] == "rear" and [only[key] for key in headings] == [("ahead", "10.0\u00a0±\u00a01.4")] * 2
    assert headings == ["at its best T", "at T 1"]  # no start was measured at equal entropy
    assert verdict_table(load_runs([trained])) == ([], [])
    page = Page(write_report([trained], tmp_path / "one.html").read_text())
    assert "there is no verdict" in page.text and "Who is ahead" not in page.text


def test_the_temperature_control_stands_beside_the_run_it_is_for(six_runs):
    runs = load_runs(six_runs)
    sections = {made["title"]: made["rows"] for made in result_sections(runs, [FD])}
    assert [*sections][2:4] == [f"{name} at the entropy of others" for name in ("plain-ar", "rear")]
    rows = sections["rear at the entropy of others"]
    shown = [(row["run"].name, row["row"].temperature, row["row"].matched_to) for row in rows]
    assert shown == [("rear-vapi", 1.0, None), ("rear", 0.8, "rear-vapi")]
    assert [row["cells"][0]["mark"] for row in rows] == ["best", "close"]


def rings_of(chart: Chart) -> set[str]:
    """Colours of the hollow circles of a chart, as Matplotlib writes markers without a fill."""
    return set(re.findall(r'style="fill-opacity: 0; stroke: (#\w+)', chart.svg))


def test_frontier_charts_ring_the_control_in_the_colour_of_its_run(six_runs):
    temperature, entropy, shares = frontier_charts(load_runs(six_runs))
    for chart in (temperature, entropy, shares):
        assert rings_of(chart) == {LOOKS[2].colour, LOOKS[5].colour}
        assert "A ring marks the temperature control" in chart.note
    alone = frontier_charts(load_runs(six_runs[:1]))
    assert rings_of(alone[0]) == {RING_OF_OTHERS}
    old = load_runs(six_runs[:1])
    rows = tuple(replace(row, metrics={FD: row.metrics[FD]}, matched_to=None) for row in old[0].results.rows)
    only = frontier_charts([replace(old[0], results=replace(old[0].results, rows=rows))])
    assert [chart.title for chart in only] == ["Distance to held-out images over temperature"]
    assert "ring" not in only[0].note


def test_points_at_one_temperature_say_which_was_guided(six_runs):
    [run] = load_runs(six_runs[:1])
    plain = next(row for row in run.results.rows if row.temperature == 1)
    guided = replace(plain, guidance_scale=2.0, top_k=100)
    both, one = (
        frontier_charts([replace(run, results=replace(run.results, rows=rows))])[0]
        for rows in ((plain, guided), (guided,))
    )
    assert both.svg.count("guidance 2, top-k 100") == 1 and "Words at a line" in both.note
    assert "guidance" not in one.svg and "guidance" not in one.note


def section(*runs: Path) -> dict:
    return training_groups(load_runs(list(runs)))[0]


def test_charts_follow_what_was_logged(tmp_path):
    trained = write_trained(tmp_path / "vapi", tmp_path, noise=0.25)
    made = section(trained)
    titles = [chart.title for chart in made["charts"]]
    assert titles == [
        "Validation reward (weighted sum)", "Training reward (weighted sum)",
        "Validation reward: mse", "Validation reward: own:bright", "Training reward: mse",
        "Validation KL to the start model (nats per token)", "Validation cross-entropy (nats per token)",
        "Validation accuracy (share of tokens)", "Validation entropy (nats per token)",
    ]  # fmt: skip
    assert any(note.startswith("Training values of vapi are under a noisy context") for note in made["notes"])
    epochs = section(trained, write_trained(tmp_path / "epochs", tmp_path, inner_epochs=2))
    titles = [chart.title for chart in epochs["charts"]]
    assert titles[-2:] == [
        "Training largest deviation of the probability ratio from 1",
        "Training clipped ratios (share)",
    ]
    (start,) = training_groups(load_runs([write_run(tmp_path / "rear", weight=1.0, noise=0.5)]))
    assert [chart.title for chart in start["charts"]] == [
        "Validation cross-entropy (nats per token)", "Training cross-entropy (nats per token)"
    ]  # fmt: skip
    assert start["title"] == "Training" and start["columns"] == ["validation/cross_entropy"] and start["notes"]


def test_rewards_are_shown_where_nothing_was_validated(tmp_path):
    trained = write_trained(tmp_path / "vapi", tmp_path)
    lines = [line for line in (trained / "metrics.jsonl").read_text().splitlines() if "train/reward" in line]
    (trained / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    made = section(trained)
    titles = [chart.title for chart in made["charts"]]
    assert titles == ["Training reward (weighted sum)", "Training reward: mse"]
    assert made["columns"] == []


def test_the_table_goes_from_the_start_model_to_the_end(tmp_path):
    trained = write_trained(tmp_path / "vapi", tmp_path)
    made = section(trained)
    assert made["columns"] == [f"validation/{name}" for name in (
        "reward", "reward_mse", "reward_own:bright", "kl", "cross_entropy", "accuracy", "entropy"
    )]  # fmt: skip
    (run,) = load_runs([trained])
    assert from_to(run, "validation/reward") == "\u22120.5000 → \u22120.4000"
    assert [from_to(run, f"validation/{key}") for key in ("kl", "entropy")] == ["0.0000 → 0.2500", "4.000 → 3.000"]
    assert from_to(run, "train/reward_mse") == "\u22120.3000" and from_to(run, "validation/other") == "–"


def test_a_run_that_was_stopped_and_its_best_step_are_told(tmp_path):
    trained, other = (write_trained(tmp_path / name, tmp_path) for name in ("vapi", "other"))
    metric = "validation/FD(net) validation"
    with (trained / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps({"step": s, metric: v}) + "\n" for s, v in ((0, 90.0), (10, 80.0), (20, 85.0))))
    (trained / "stopped.json").write_text('{"step": 20, "reason": "kl 0.31 is above <0.3>"}')
    (trained / "best.json").write_text(
        '{"step": 10, "metric": "FD(net) validation", "value": 80.0, "protocol": "8 samples"}'
    )
    made = section(trained, other)
    cells = re.findall(r"<td>([^<]*)</td>", write_report([trained, other], tmp_path / "both.html").read_text())
    assert [cells[index] for index in (0, 8, 9, 10, 18, 19)] == ["90.00 → 85.00", "20, stopped", "10", "–", "20", "–"]
    assert "vapi was stopped by its guard at step 20: kl 0.31 is above <0.3>." in made["notes"]
    assert any(
        "best FD(net) validation on the way" in n and "last one. Measured on 8 samples." in n for n in made["notes"]
    )
    best = {"step": 20, "metric": "FD(net) validation", "value": 1.0, "protocol": "9 samples"}
    (other / "best.json").write_text(json.dumps(best))
    notes = section(trained, other)["notes"]
    assert any("last one. vapi is measured on 8 samples. other is measured on 9 samples." in note for note in notes)
    chart = next(chart for chart in made["charts"] if chart.title == "Validation FD(net) validation")
    assert rings_of(chart) == {LOOKS[0].colour} and not rings_of(made["charts"][1])
    assert "&lt;0.3&gt;" in write_report([trained], tmp_path / "page.html").read_text()
    (trained / "stopped.json").write_text('{"step": 10, "reason": "kl 0.31"}')
    assert section(trained)["notes"][0].endswith("kl 0.31. It was resumed later, to step 20.")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("stopped.json", '{"step": 1}', "stopped.json: reason is None; expected step and reason"),
        ("stopped.json", "[", "stopped.json: not valid JSON"),
        ("best.json", '{"step": "a", "metric": "FD", "value": 1.0}', "best.json: step is 'a'"),
    ],
)
def test_broken_notes_of_a_run_are_one_clear_line(tmp_path, name, text, message):
    trained = write_trained(tmp_path / "vapi", tmp_path)
    (trained / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_runs([trained])
    assert "\n" not in str(error.value)


def test_different_weights_of_rewards_are_told(tmp_path):
    runs = [write_trained(tmp_path / "a", tmp_path), write_trained(tmp_path / "b", tmp_path, rewards={"mse": 2.0})]
    assert any("weights of the rewards differ" in note for note in section(*runs)["notes"])
    assert not any("weights" in note for note in section(runs[0])["notes"])


def test_real_runs_of_post_training_make_a_page(make_config, tmp_path):
    """What the loop writes is what the page reads: a start, VA-pi that its guard stops, and its control."""
    for split, count in (("train", 12), ("validation", 3)):
        for index in range(count):
            folder = tmp_path / "data" / split / "abc"[index % NUM_CLASSES]
            folder.mkdir(parents=True, exist_ok=True)
            picture(index).save(folder / f"{index}.png")
    start = train(make_config(loop={"steps": 2}), tmp_path / "start", quiet=True)
    settings = {"init": str(start), "tokenizer": None, "model": None, "data": DataConfig(images=str(tmp_path / "data"))}
    loop = {"steps": 3, "batch_size": 4, "validate_every": 1}
    rewards = {"mse": 1.0, "l1": 0.0}
    policy = PolicyConfig(rewards=rewards, group_size=2, context_noise=0.25, inner_epochs=2, kl_weight=0.1)
    policy = replace(policy, guard=replace(policy.guard, max_entropy=0.1))
    vapi = train(make_config(loop=loop, objective=policy, **settings), tmp_path / "vapi", quiet=True)
    control = CrossEntropyConfig(rewards=rewards)
    ce = train(make_config(loop=loop, objective=control, **settings), tmp_path / "ce", quiet=True)
    made = section(start, vapi, ce)
    assert made["indices"] == [1, 2] and made["title"] == "Post-training"
    titles = {chart.title for chart in made["charts"]}
    assert {"Validation reward: l1", "Training reward (weighted sum)",
            "Training largest deviation of the probability ratio from 1",
            "Validation KL to the start model (nats per token)",
            "Training KL to the start model (nats per token)"} <= titles  # fmt: skip
    assert not [title for title in titles if title.startswith(("train/", "validation/"))]
    page = Page(write_report([start, vapi, ce], tmp_path / "page.html").read_text())
    assert "2, stopped" in page.text and page.text.count(" → ") == 2 * len(made["columns"])
    assert "VA-pi, from start" in page.text and "above objective.guard.max_entropy 0.1" in page.text


def test_numbers_of_nearly_equal_values_do_not_stand_upon_each_other() -> None:
    lines = [Line(LOOKS[at], [(6.8805 + at * 2e-5, 255.0 + at)], [], []) for at in (0, 1)]
    numbers = re.findall(r">([\d.]+)</text>", svg_chart(lines, "t", ("entropy", "distance"), (4.2, 2.6)))
    across = [number for number in numbers if float(number) < 10]
    assert "6.88" in across and max(map(len, across)) <= 5
