"""What a run keeps when something beside its steps fails, and when it is asked to end."""

import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageChops

from consonar.data import loader
from consonar.errors import UserError
from consonar.generators.rear import ReARConfig
from consonar.training import loop
from consonar.training import run as runs
from consonar.training.checkpoints import list_resume, load_resume
from consonar.training.config import DataConfig
from consonar.training.objectives.autoregressive import Autoregressive
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.run import train
from consonar.training.tracking import read_metrics

STEPS = 6


@pytest.fixture
def config(make_config):
    model = ReARConfig(width=32, num_layers=1, num_heads=4, dropout=0.1)
    every = {"steps": STEPS, "save_every": 2, "validate_every": 2, "sample_every": 3}
    return make_config(model=model, loop=every)


def saved_steps(run):
    return [load_resume(path)["step"] for path in list_resume(run / "checkpoints")]


def lines(run):
    return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(run / "metrics.jsonl")]


def assert_same_run(ours, theirs):
    """The same weights, and the same lines of metrics."""
    stored = [load_resume(list_resume(run / "checkpoints")[-1]) for run in (ours, theirs)]
    assert stored[0]["step"] == stored[1]["step"] == STEPS
    assert all(torch.equal(value, stored[1]["model"][key]) for key, value in stored[0]["model"].items())
    assert lines(ours) == lines(theirs)


def failing(at, error, inner):
    """`inner`, which raises `error` at its call number `at`."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise error
        return inner(*arguments)

    return call


def test_a_picture_that_fails_is_a_warning(config, tmp_path, monkeypatch, capsys):
    from consonar.training import build

    broken = failing(1, RuntimeError("no font\nhere"), build.preview_samples)
    monkeypatch.setattr(build, "preview_samples", broken)
    run = train(config, tmp_path / "run", quiet=True)
    assert capsys.readouterr().err == "tiny: no picture of step 3: RuntimeError: no font here\n"
    assert [path.name for path in (run / "samples").iterdir()] == ["step_000006.png"]
    assert (run / "model" / "config.json").is_file()


def test_validation_that_fails_costs_no_step_and_does_not_stop_the_next_resume(config, tmp_path, monkeypatch, capsys):
    validate = Autoregressive.validate

    def broken(self, *arguments):
        raise RuntimeError("a picture is damaged")

    monkeypatch.setattr(Autoregressive, "validate", broken)
    run = tmp_path / "run"
    for steps in ([2], [2, 4], [4, 6]):  # every attempt fails, and every one gets on
        with pytest.raises(RuntimeError, match="damaged"):
            train(config, run, resume=run.exists(), quiet=True)
        assert saved_steps(run) == steps
    assert "the validation of step 4 is left out: RuntimeError: a picture is damaged" in capsys.readouterr().err
    monkeypatch.setattr(Autoregressive, "validate", validate)
    train(config, run, resume=True, quiet=True)
    assert [line["step"] for line in lines(run) if "validation/cross_entropy" in line] == [STEPS]
    assert [line["step"] for line in lines(run) if "train/loss" in line] == list(range(1, STEPS + 1))
    assert (run / "model" / "config.json").is_file()


@pytest.mark.parametrize("call", [1, 3])  # in the middle, and after the last step
def test_a_run_that_ended_in_its_validation_is_resumed_as_if_it_had_not(call, config, tmp_path, monkeypatch):
    straight = train(config, tmp_path / "straight", quiet=True)
    broken = failing(call, KeyboardInterrupt(), Autoregressive.validate)
    monkeypatch.setattr(Autoregressive, "validate", lambda *arguments: broken(*arguments))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "model").exists()
    train(config, tmp_path / "run", resume=True, quiet=True)
    assert_same_run(straight, tmp_path / "run")
    assert {p.name for p in (tmp_path / "run" / "samples").iterdir()} == {"step_000003.png", "step_000006.png"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_saves_its_step_first(number, config, tmp_path, monkeypatch, capsys):
    straight = train(config, tmp_path / "straight", quiet=True)
    heard = []
    before = signal.signal(number, lambda *_: heard.append(number))
    try:
        log = loop.Running.log

        def at_step_3(self, terms):
            if self.state.step == 3:
                os.kill(os.getpid(), number)
            log(self, terms)

        monkeypatch.setattr(loop.Running, "log", at_step_3)
        run = train(config, tmp_path / "run", quiet=True)
        assert heard == [number], "the process must end as its caller meant it to"
        assert signal.getsignal(number) is not before and saved_steps(run) == [2, 3]
        said = "tiny: asked to end; step 3 is saved, --resume goes on from there\n" if number == signal.SIGTERM else ""
        assert capsys.readouterr().err == said and not (run / "model").exists()
        monkeypatch.setattr(loop.Running, "log", log)
        train(config, run, resume=True, quiet=True)
    finally:
        signal.signal(number, before)
    assert_same_run(straight, run)


def test_pictures_of_a_tokenizer_whose_validation_images_are_not_in_memory(
    make_config, tokenizer, picture_folder, tmp_path, monkeypatch, capsys
):
    config = make_config(
        recipe="tokenizer-tiny", tokenizer=None, model=tokenizer.config,
        objective=ReconstructionConfig(perceptual_weight=0), data=DataConfig(images=str(picture_folder)),
        loop={"steps": 1},
    )  # fmt: skip
    pictures = []
    for limit in (4e9, 1):
        monkeypatch.setattr(loader, "MAX_MEMORY", limit)
        run = train(replace(config, seed=1), tmp_path / f"{limit}", quiet=True)
        pictures.append(Image.open(run / "samples" / "step_000001.png").convert("RGB"))
    assert capsys.readouterr().err == ""
    assert pictures[0].size == pictures[1].size and ImageChops.difference(*pictures).getbbox() is None


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BrokenPipeError(), SystemExit(1)])
def test_a_terminal_a_pipe_or_a_log_that_has_gone_costs_no_step(error, config, tmp_path, monkeypatch):
    from rich.console import Console

    printed = failing(3, error, Console.print)
    monkeypatch.setattr(Console, "print", lambda *arguments, **options: printed(*arguments))
    run = train(config, tmp_path / "run")
    assert [line["step"] for line in lines(run) if "train/loss" in line] == list(range(1, STEPS + 1))
    assert (run / "model" / "config.json").is_file()


def test_a_closed_terminal_ends_a_run_after_a_checkpoint_and_what_is_ignored_stays_so(config, tmp_path, monkeypatch):
    """`nohup` and the background of a script start a process that ignores a signal."""
    log = loop.Running.log

    def at_step_3(self, terms):
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGHUP)
        log(self, terms)

    monkeypatch.setattr(loop.Running, "log", at_step_3)
    heard = []
    before = signal.signal(signal.SIGHUP, lambda *_: heard.append("closed"))
    try:
        assert saved_steps(train(config, tmp_path / "closed", quiet=True)) == [2, 3] and heard == ["closed"]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert saved_steps(train(config, tmp_path / "nohup", quiet=True)) == [4, 6]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_scheduler_ends_has_status_0_once_it_is_saved(config, tmp_path, monkeypatch):
    log = loop.Running.log

    def at_step_3(self, terms):
        if self.state.step == 3:
            for _ in range(2):  # a launcher passes on what all of its group got
                os.kill(os.getpid(), signal.SIGTERM)
        log(self, terms)

    monkeypatch.setattr(loop.Running, "log", at_step_3)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended:
            train(config, tmp_path / "run", quiet=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 0 and saved_steps(tmp_path / "run") == [2, 3]


def test_a_token_store_that_vanishes_is_missed_by_the_next_resume_alone(config, stores, tmp_path, monkeypatch):
    """What is mapped stays; put back, the run goes on."""
    tokens, log = shutil.copytree(stores[0], tmp_path / "tokens"), loop.Running.log
    config = replace(config, data=replace(config.data, tokens=str(tokens)))
    straight = train(config, tmp_path / "straight", quiet=True)

    def at_step_2(self, terms):
        if self.state.step == 2:
            tokens.rename(tmp_path / "away")
        log(self, terms)

    monkeypatch.setattr(loop.Running, "log", at_step_2)
    run = train(config, tmp_path / "run", stop_at=4, quiet=True)
    with pytest.raises(UserError, match=rf"no token store at {tokens}"):
        train(config, run, resume=True, quiet=True)
    (tmp_path / "away").rename(tokens)
    train(config, run, resume=True, quiet=True)
    assert_same_run(straight, run)


def test_a_second_signal_acts_at_once_when_it_comes_later(config, tmp_path, monkeypatch):
    log = loop.Running.log

    def at_step_3(self, terms):
        log(self, terms)
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(runs, "AGAIN", -1)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop.Running, "log", at_step_3)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", quiet=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert saved_steps(tmp_path / "run") == [2]
