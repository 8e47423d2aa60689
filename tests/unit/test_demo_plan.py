"""The demo's minutes are minutes: what fits is arithmetic on measured seconds, decided once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from consonar.demo import job as demo
from consonar.demo.plan import (
    DRAWING,
    LEAST_STEPS,
    SUSTAINED,
    VALIDATIONS,
    Progress,
    Rate,
    Work,
    first_guess,
    most_work,
    rate_through,
    seconds_of,
    training_rate,
    work_for,
)
from consonar.errors import UserError
from consonar.files.lock import hold
from consonar.files.weights import save_component

TRAINING = {
    "plain-ar": Rate(2.0 + VALIDATIONS["rear"] * 1.5, 0.7),
    "rear": Rate(2.0 + VALIDATIONS["rear"] * 1.5, 0.8),
    "ce": Rate(5.0 + VALIDATIONS["vapi"] * 4.0, 0.9),
    "vapi": Rate(6.0 + VALIDATIONS["vapi"] * 4.0, 1.4),
    "isentropic": Rate(6.0 + VALIDATIONS["isentropic"] * 4.0, 1.7),
}
OTHERS = {
    "tokens": Rate(2 * 3906 * 0.002), "reference": Rate((3906 + 364) * 0.002), "features": Rate(3906 * 0.01),
    "measuring": Rate(1.0), "row": Rate(3.0, 0.05),
}  # fmt: skip


def rates(slower: float = 1.0) -> dict[str, Rate]:
    return {k: Rate(slower * rate.fixed, slower * rate.each) for k, rate in TRAINING.items()} | OTHERS


def cost(work: Work, slower: float = 1.0) -> float:
    return sum(seconds_of(work, rates(slower)).values())


def test_the_seconds_of_a_job_are_those_of_its_pieces() -> None:
    seconds = seconds_of(Work(100, 20, 64), rates(), {"a": "plain-ar", "a-vapi": "vapi"})
    assert seconds == {
        "tokens": pytest.approx(SUSTAINED * (2 * 3906 * 0.002)),
        "reference": pytest.approx(SUSTAINED * ((3906 + 364) * 0.002)),
        "training a": pytest.approx(SUSTAINED * (2 + 100 * 0.7 + 8 * 1.5)),
        "training a-vapi": pytest.approx(SUSTAINED * (6 + 20 * 1.4 + 3 * 4.0)),
        "measuring a": pytest.approx(SUSTAINED * (1 + 3 * (3 + 64 * 0.05) + 3906 * 0.01)),
        "measuring a-vapi": pytest.approx(SUSTAINED * (1 + 2 * (3 + 64 * 0.05))),
        "page": 10.0,
    }


@pytest.mark.parametrize("minutes", [15, 18, 60, 600])
@pytest.mark.parametrize("slower", [0.1, 1, 3])
def test_the_work_fills_the_minutes(minutes: float, slower: float) -> None:
    work = most_work(60 * minutes, rates(slower))
    one_more = work_for(work.steps + 1)
    assert work == work_for(work.steps) and cost(work, slower) <= 60 * minutes < cost(one_more, slower)


def test_a_slower_machine_does_less_and_never_less_than_the_least() -> None:
    fast, slow = (most_work(900, rates(slower)) for slower in (1, 2))
    assert fast.steps > slow.steps > LEAST_STEPS and fast.updates > slow.updates
    for seconds in (1.0, 0.0, -50.0):
        assert most_work(seconds, rates()) == work_for(LEAST_STEPS)


def test_rates_are_read_from_a_run_that_logged_every_step() -> None:
    lines = [{"step": 0, "time": 2.0, "validation/loss": 1.0}]
    lines += [{"step": i, "time": t, "train/loss": 1.0} for i, t in ((1, 5.0), (2, 6.0), (3, 7.5), (4, 8.5))]
    lines += [{"step": 4, "time": 10.5, "validation/loss": 1.0}]
    # four steps of a second and two validations of two leave four of sixteen
    assert training_rate(lines, 12.0, validations=0) == Rate(4.0, 1.0)
    assert training_rate(lines, 12.0, validations=3) == Rate(4.0 + 3 * 2.0, 1.0)
    assert training_rate([{**line, "time": 0.0} for line in lines], 0.0, validations=1).each > 0


def test_rates_of_measuring_are_a_line_through_two_rows() -> None:
    assert rate_through((32, 5.0), (96, 11.4)) == Rate(pytest.approx(1.8), pytest.approx(0.1))
    assert rate_through((32, 5.0), (96, 4.0)).each == 0  # a machine that was busy meanwhile


def test_progress_is_that_of_the_whole_job() -> None:
    now, said = [0.0], []
    seconds = {"preparing": 60.0, "training a": 120.0, "training b": 360.0, "page": 60.0}
    progress = Progress(seconds, said.append, every=20, clock=lambda: now[0])
    progress.skip("preparing")
    with progress.piece("training a", "100 steps"):
        now[0] = 10
        progress.at(0.1, "step 10 of 100")  # too soon for another line
        now[0] = 180  # twice as long as was estimated for half of it
        progress.at(0.5, "step 50 of 100")
    with progress.piece("training b"):
        pass
    assert said == [
        "[ 10 %, 1 of 10 min] training a: 100 steps",
        "[ 20 %, 4 of 12 min] training a: step 50 of 100",
        "[ 30 %, 4 of 11 min] training b",
    ]


def test_the_first_guess_is_as_many_times_longer_as_the_pictures_took() -> None:
    guesses = [first_guess(slower * DRAWING, 18) for slower in (1, 6)]
    assert "takes 18 minutes, as asked for; measured in 1.8 minutes" in guesses[0]
    assert "takes 69 minutes, the least there is; measured in 10.9 minutes" in guesses[1]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The demo with its work pretended: what was trained and measured is noted, and files show that it was done."""
    noted = SimpleNamespace(trained={}, measured={}, slower=1.0, fail_at=None)

    def train(config, out, *, on_step, **options) -> None:
        if out.name == noted.fail_at:
            raise KeyboardInterrupt
        noted.trained[out.name] = config
        save_component(out / "model", {}, {"weight": torch.zeros(1)})
        on_step(config.loop.steps)

    def evaluate_run(run, settings, *, progress, **options) -> None:
        noted.measured[run.name] = settings.num_samples
        progress(f"{run.name}: {settings.num_samples} samples at temperature 1")
        (run / "results.json").touch()

    for name, value in {
        "train": train, "evaluate_run": evaluate_run,
        "measure_machine": lambda *places: rates(noted.slower),
        "draw_opening": lambda path, device, say: say(f"{path}: pictures") or noted.slower * DRAWING,
        "make_tokens": lambda *places: None,
        "open_reference": lambda *spec: None, "encode_reference": lambda *reference: None,
        "write_report": lambda runs, page, **options: page.touch(),
    }.items():  # fmt: skip
        monkeypatch.setattr(demo, name, value)
    return noted


def test_the_demo_says_how_long_the_whole_takes_before_it_trains(pretended, tmp_path: Path) -> None:
    said: list[str] = []
    demo.run_demo(tmp_path / "demo", minutes=15, seed=0, say=said.append)
    plan = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert "opening.png" in said[0] and "first guess" in said[1] and "the whole takes about 15 minutes here" in said[4]
    assert "%, 0 of 15 min] tokens: " in said[5] and f"min] training plain-ar: {plan['steps']} steps" in said[7]
    assert sum(plan["seconds"].values()) == pytest.approx(15 * 60, rel=0.01)
    assert {run: config.loop.steps for run, config in pretended.trained.items()} == {
        name: plan["steps"] if name in demo.RUNS else plan["updates"] for name in demo.PARTS
    }
    assert set(pretended.measured.values()) == {plan["samples"]} and len(pretended.measured) == len(demo.PARTS)


def test_an_interrupted_demo_goes_on_with_the_same_plan_on_a_busier_machine(pretended, tmp_path: Path) -> None:
    pretended.fail_at = "rear-ce"
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path / "demo", minutes=15, seed=0, say=print)
    before = (tmp_path / "demo" / "demo.json").read_text()
    pretended.fail_at, pretended.slower = None, 10.0
    done = set(pretended.trained)
    (tmp_path / "demo" / "rear-ce" / "model").mkdir(parents=True)  # begun and not finished
    pretended.trained.clear()
    demo.run_demo(tmp_path / "demo", minutes=15, seed=0, say=print)
    assert (tmp_path / "demo" / "demo.json").read_text() == before
    assert set(pretended.trained) == set(demo.PARTS) - done and "rear-ce" in pretended.trained
    assert pretended.trained["rear-ce"].loop.steps == json.loads(before)["updates"]
    with pytest.raises(UserError, match=r"--minutes: 20, but the demo in .* was started with 15"):
        demo.run_demo(tmp_path / "demo", minutes=20, seed=0, say=print)


def test_too_few_minutes_are_said_and_the_least_is_done(pretended, tmp_path: Path) -> None:
    said: list[str] = []
    demo.run_demo(tmp_path / "demo", minutes=0.1, seed=0, say=said.append)
    assert f"the least there is: 0.1 are too few: {LEAST_STEPS} steps" in "\n".join(said)
    assert pretended.trained["rear"].loop.steps == LEAST_STEPS and (tmp_path / "demo" / "report.html").exists()


@pytest.mark.parametrize("minutes", [0.0, -1.0, 1e300, float("nan"), float("inf")])
def test_minutes_that_are_no_time_are_refused(pretended, tmp_path: Path, minutes: float) -> None:
    with pytest.raises(UserError, match="--minutes"):
        demo.run_demo(tmp_path / "demo", minutes=minutes, seed=0, say=print)
    assert not (tmp_path / "demo").exists()


def test_a_plan_that_cannot_be_read_is_told_and_nothing_is_replaced(pretended, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    older = '{"minutes": 15, "seed": 0, "steps": 273'
    fewer = f'{older}, "seconds": {{"training rear": 9}}}}'
    for content, message in (("{", "not valid JSON"), (older + "}", "older version"), (fewer, "older version")):
        (tmp_path / "demo" / "demo.json").write_text(content)
        with pytest.raises(UserError, match=message):
            demo.run_demo(tmp_path / "demo", minutes=15, seed=0, say=print)
        assert (tmp_path / "demo" / "demo.json").read_text() == content


def test_an_empty_store_is_made_and_a_finished_one_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(demo, "open_source", lambda *_, split, image_size: split)
    monkeypatch.setattr(demo, "write_token_store", lambda path, *_, **__: made.append(path.name))
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens-validation").mkdir()
    (tmp_path / "tokens-validation" / "store.json").touch()
    for split in ("train", "validation"):
        demo.make_tokens(tmp_path, split, SimpleNamespace(image_size=64))
    assert made == ["tokens"]


def test_a_demo_has_one_process_and_no_folder_of_something_else(tmp_path: Path) -> None:
    settings = {"minutes": 1.0, "seed": 0, "say": lambda text: None}
    with hold(tmp_path / "demo"), pytest.raises(UserError, match="is writing it"):
        demo.run_demo(tmp_path / "demo", **settings)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(UserError, match="exists and holds no demo"):
        demo.run_demo(tmp_path / "photos", **settings)
    with pytest.raises(UserError, match="is a file"):
        demo.run_demo(tmp_path / "photos" / "cat.png", **settings)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cat.png", "photos"]
