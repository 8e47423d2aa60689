import json
import math
from dataclasses import replace

import pytest

from consonar.config_io import to_dict
from consonar.errors import UserError
from consonar.training import tracking
from consonar.training.config import LoopConfig, TrainConfig
from consonar.training.tracking import Tracker, read_metrics

CONFIG = TrainConfig(recipe="tiny", tokenizer="t", loop=LoopConfig(steps=10))
LONG = replace(CONFIG, loop=LoopConfig(steps=120))


def test_how_far_something_is_says_a_line_now_and_then(capsys, monkeypatch):
    for every, quiet, lines in ((0, False, 2), (60, False, 1), (0, True, 0)):
        monkeypatch.setattr(tracking, "EVERY", every)
        told = tracking.how_far("captions", quiet=quiet)
        for done in (64, 128, 1500):
            told(done, 1500)
        said = capsys.readouterr().out.splitlines()
        assert said == ["captions: 64 of 1,500 are read", "captions: 128 of 1,500 are read"][:lines]


def test_metrics_are_lines_of_json(tmp_path):
    tracker = Tracker(tmp_path, CONFIG, quiet=True)
    tracker.log(1, {"train/loss": 0.5, "train/rate": 2.0}, rate=3.0)
    tracker.log(2, {"train/loss": math.nan, "train/rate": math.inf})
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.pop("time") >= 0 for line in lines] == [True, True]
    assert lines[0] == {"step": 1, "train/loss": 0.5, "train/rate": 2.0}
    assert lines[1] == {"step": 2, "train/loss": None, "train/rate": None}


def test_resuming_cuts_what_will_be_repeated_and_goes_on_with_the_clock(tmp_path):
    text = '{"step": 1, "time": 100.0}\n{"step": 2, "time": 200.0}\n{"step": 3, "time": 300.0}\n{"step": 4, "ti'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]  # the cut line is left out
    tracker = Tracker(tmp_path, CONFIG, resume_step=2, quiet=True)
    tracker.log(3, {})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3] and 200 <= lines[2]["time"] < 201


def test_a_last_line_counts_when_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "time": 1.5}\n{"step": 2, "train/loss": 0.25}'
    for length, steps in (
        (len(whole), [1, 2]),
        (len(whole) - 1, [1]),
        (26, [1]),
        (25, [1]),
        (24, [1]),
        (23, []),
        (0, []),
    ):
        path.write_text(whole[:length])
        assert [line["step"] for line in read_metrics(path)] == steps, length


def test_a_new_run_starts_an_empty_file_and_a_disabled_tracker_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1}\n')
    Tracker(tmp_path, CONFIG, quiet=True)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    other = tmp_path / "rank1"
    tracker = Tracker(other, CONFIG, enabled=False)
    tracker.log(1, {"a": 1.0})
    tracker.advance(1)
    tracker.close()
    assert not other.exists() and read_metrics(other / "metrics.jsonl") == []


def test_plain_lines_when_output_is_not_a_terminal(tmp_path, capsys):
    tracker = Tracker(tmp_path, LONG)
    tracker.advance(1)
    tracker.log(60, {"train/loss": 1.23456, "train/[bold]x": 2.0}, rate=2.0)
    tracker.close()
    output = capsys.readouterr().out
    assert output == "tiny 60/120  loss 1.235  [bold]x 2  2.00 steps/s  0.5 min left\n"
    quiet = Tracker(tmp_path, LONG, quiet=True)
    quiet.log(1, {"a": 1.0})
    assert capsys.readouterr().out == ""


class ListSink:
    def __init__(self):
        self.logged, self.closed = [], False

    def log(self, step, values):
        self.logged.append((step, values))

    def close(self):
        self.closed = True


def test_sinks_get_copies(tmp_path, monkeypatch):
    sink, made = ListSink(), []
    monkeypatch.setitem(tracking.SINKS, "json", lambda folder, config: made.append((folder, config)) or sink)
    config = replace(CONFIG, loop=LoopConfig(steps=10, trackers=("json",)))
    tracker = Tracker(tmp_path, config, quiet=True)
    tracker.log(2, {"train/loss": 0.5})
    tracker.close()
    assert made == [(tmp_path, to_dict(config))] and sink.logged == [(2, {"train/loss": 0.5})] and sink.closed
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] == 0.5


def test_sinks_that_are_not_there(monkeypatch):
    with pytest.raises(UserError, match=r"loop\.trackers: unknown 'wandbb' .*'wandb'.*; choices: tensorboard"):
        tracking.check_sinks(("wandbb",))
    monkeypatch.setitem(tracking.SINKS, "no_such_package", lambda folder, config: None)
    with pytest.raises(UserError, match=r"'no_such_package' needs the package of that name; install with: pip install"):
        tracking.check_sinks(("no_such_package",))
