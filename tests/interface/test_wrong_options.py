"""Options that are empty, contradict each other, or are found wrong only after work: told at once, in one line."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from consonar import cli
from consonar.cli.parsing import check_repeats
from consonar.cli.sample import class_list
from consonar.cli.train import with_rewards
from consonar.components import load_generator, load_tokenizer, read_origin, save_generator
from consonar.demo.job import run_demo
from consonar.errors import UserError, unknown
from consonar.evaluation.entropy import Sharpness
from consonar.evaluation.evaluate import evaluate
from consonar.evaluation.results import check_place
from consonar.evaluation.runs import RunSettings
from consonar.evaluation.settings import EvaluationSettings
from consonar.origin import Origin
from consonar.recipes import find_recipe, read_config
from consonar.sampling.job import MOST_IMAGES
from consonar.training.config import LoopConfig
from consonar.training.tracking import check_sinks


def told(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must exit with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in error and error.startswith("consonar: "), error
    return error.removeprefix("consonar: ")


@pytest.fixture
def model(tiny_generator, tmp_path) -> Path:
    save_generator(tiny_generator(num_classes=6), tmp_path / "model", Origin())
    return tmp_path / "model"


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "ar-openmoji", "--out", "OUT", "--init", ""],
        ["train", "ar-openmoji", "--out", "OUT", "--recipe="],
        ["train", "vapi-openmoji", "--out", "OUT", "--init", "MODEL", "--data", ""],
        ["sample", "", "--out", "OUT"],
        ["sample", "MODEL", "--out", "OUT", "--tokenizer", ""],
        ["evaluate", "", "--reference", "MODEL"],
        ["evaluate", "MODEL", "--reference", ""],
        ["tokenize", "--tokenizer", "openmoji-64", "--data", "", "--out", "OUT"],
        ["tokenize", "--tokenizer", "openmoji-64", "--data", "MODEL", "--out", "OUT", "--split="],
        ["report", "", "--out", "OUT"],
    ],
)
def test_an_empty_value_does_not_mean_the_working_directory(argv, model, tmp_path, monkeypatch, capsys):
    """As of a shell variable that is not set."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    places = {"OUT": str(tmp_path / "out"), "MODEL": str(model)}
    assert "given an empty value" in told([places.get(word, word) for word in argv], capsys)
    assert not (tmp_path / "out").exists()


def test_the_functions_refuse_empty_names_too(tmp_path, monkeypatch):
    from consonar.data.sources import open_source

    monkeypatch.chdir(tmp_path)
    for load in (load_generator, load_tokenizer):
        with pytest.raises(UserError, match=r"unknown ''.*choices: openmoji"):
            load("")
    with pytest.raises(UserError, match=r"is no path|nobody is called so"):
        open_source("", image_size=16)


def test_a_validation_store_may_be_none(capsys):
    error = told(["train", "ar-openmoji", "--out", "x", "--data.validation-tokens", "", "--optim.lr", "0"], capsys)
    assert error == "optim.lr: 0.0 is not in (0, 10]"  # what the configuration says, and no more


@pytest.mark.parametrize(
    "argv",
    [
        ["sample", "nowhere", "--out", "OUT"],
        ["sample", "nowhere", "--prompts", "nowhere", "--format", "dpg", "--out", "OUT"],
        ["tokenize", "--tokenizer", "nowhere", "--data", "nowhere", "--split", "train", "--out", "OUT"],
        ["import-tokens", "--format", "rar-jsonl", "--data", "nowhere", "--tokenizer", "nowhere", "--out", "OUT"],
        ["train", "vapi-openmoji", "--init", "nowhere", "--data", "nowhere", "--out", "OUT"],
        ["convert", "nowhere", "--to", "OUT"],
        ["diagnose", "nowhere", "--data", "nowhere", "--out", "OUT/a.html"],
        ["report", "nowhere", "--out", "OUT/a.html"],
    ],
)
def test_what_is_there_already_is_told_before_anything_is_read(argv, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.html", "config.json", "metrics.jsonl", "results.json"):
        (out / name).write_text('{"component": "generator"}')
    line = told([word.replace("OUT", str(out)) for word in argv], capsys)
    assert str(out) in line and ("exists" in line or "already holds a run" in line)


def test_going_on_with_a_run_asks_for_one(tmp_path, capsys):
    for words, wrong in ((["--resume"], "no run folder is named"), (["--resume", str(tmp_path)], "holds no run")):
        line = told(["train", *words], capsys)
        assert line.startswith("--resume: ") and wrong in line and "consonar train --resume RUN" in line


def test_a_switch_that_is_put_on_and_off_is_refused():
    with pytest.raises(UserError, match=r"--loop\.no-compile: given together with --loop\.compile; keep one"):
        check_repeats(["--loop.compile", "--loop.no-compile"])
    with pytest.raises(UserError, match=r"--top-k: given twice"):
        check_repeats(["--top_k", "3", "--top-k=4"])
    check_repeats(["--objective.noise.schedule", "none", "--objective.noise-schedule", "linear"])


def test_rewards_are_named_together_with_what_they_need(tmp_path, capsys):
    """As docs/post-training.md says: patch-discriminator and the folder of a discriminator."""
    start = ["train", "vapi-openmoji", "--out", str(tmp_path / "run"), "--init", "nowhere", "--data", str(tmp_path)]
    rewards = ["--objective.rewards", "mse=1,patch-discriminator=0.1"]
    assert "needs the folder of a discriminator" in told([*start, *rewards], capsys)
    both = told([*start, *rewards, "--objective.discriminator", str(tmp_path)], capsys)
    assert both.startswith("init: unknown 'nowhere'")  # the next thing that is wrong
    tokenizer = ["train", "tokenizer-openmoji-64", "--out", str(tmp_path / "run"), "--init", "./nowhere"]
    assert told(tokenizer, capsys).startswith("init: no folder ./nowhere; choices: openmoji-64, ")
    assert "-1.0 is not 0 or more" in told([*start, "--objective.rewards", "mse=-1"], capsys)
    given = [*start, "--objective.rewards", "mse=1", "--objective.rewards.mse", "2"]
    assert "--objective.rewards.mse: given together with --objective.rewards" in told(given, capsys)
    assert with_rewards(find_recipe("vapi-openmoji"), "ssim=2").objective.rewards == {"ssim": 2.0}


def test_a_wrong_option_of_train_names_the_help_that_lists_it(tmp_path, capsys):
    for words, message in (
        (["--optim.lr", "fast"], "--optim.lr: 'fast' is not a number"),
        (["--optim.lr", "fa'st"], '--optim.lr: "fa\'st" is not a number'),
        (["--loop.steps=3.5"], "--loop.steps: '3.5' is not a whole number"),
        (["--data.tokens"], "--data.tokens: a value is missing"),
    ):
        found = told(["train", "ar-openmoji", "--out", str(tmp_path / "x"), *words], capsys)
        assert found.endswith(f"train ar-openmoji: {message}; see: consonar train ar-openmoji --help")
    several = told(["sample", "openmoji", "--out", str(tmp_path / "x"), "--num-samples", "few"], capsys)
    assert several.endswith("sample: --num-samples: 'few' is not a whole number or None; see: consonar sample --help")


def test_the_nearest_choice_is_suggested_in_any_case():
    assert "did you mean 'fp32'?" in str(unknown("loop.precision", "FP32", ["auto", "fp32", "bf16"]))
    assert "did you mean 'Objects'?" in str(unknown("--classes", "objects", ["Objects", "Flags"]))
    assert "did you mean" not in str(unknown("x", "nothing", ["FP32", "A"]))
    many = str(unknown("--classes", "N 999", [f"n{i}" for i in range(1000)]))
    assert "did you mean 'n999'" in many and many.endswith("n58, n59 and 940 more")


def test_a_tracker_that_is_named_twice_is_refused():
    with pytest.raises(UserError, match=r"loop\.trackers: 'tensorboard' is given twice"):
        check_sinks(("wandb", "tensorboard", "tensorboard"))
    assert LoopConfig(trackers=("wandb", "trackio")).trackers == ("wandb", "trackio")


@pytest.mark.parametrize("count", [0, MOST_IMAGES + 1, 10**20])
def test_a_number_of_samples_that_no_job_has_is_refused_at_once(count, model, tokenizer_folder, tmp_path, capsys):
    """And not after the memory is full of their classes."""
    command = ["sample", str(model), "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "x.npz")]
    assert told([*command, f"--num-samples={count}"], capsys).startswith(f"--num-samples: {count} is not between 1 and")
    with pytest.raises(UserError, match=rf"num_samples: {count} is not between 1 and"):
        RunSettings(num_samples=count)


def test_fewer_samples_than_classes_are_of_classes_at_equal_steps():
    assert class_list(None, 3, 6).tolist() == [0, 2, 4]
    assert class_list(None, 8, 6).tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert class_list("4,1,2", 2, 6).tolist() == [4, 1] and class_list("4,1", 3, 6).tolist() == [4, 1, 4]


def test_a_wrong_seed_is_refused_before_anything_is_made(tmp_path):
    for seed in (-1, 2**63, 10**20):
        with pytest.raises(UserError, match=rf"--seed: {seed} is not between 0 and 2\^63 - 1"):
            run_demo(tmp_path / "demo", minutes=18, seed=seed, say=print)
        with pytest.raises(UserError, match=rf"seed: {seed} is not between 0 and 2\^63 - 1"):
            RunSettings(seed=seed)
        with pytest.raises(UserError, match=rf"seed: {seed} is not between 0 and 2\^63 - 1"):
            evaluate(tmp_path / "none.npz", "nothing", EvaluationSettings(seed=seed))
    assert not list(tmp_path.iterdir())


def test_wrong_settings_of_an_evaluation_are_refused_before_a_model_is_read():
    for wrong, words in (
        (
            {"temperatures": [1.0, -1.0]},
            r"temperature: -1\.0 is not in \[1e-06, 1e\+06\]; 0 takes the most likely token",
        ),
        ({"temperatures": [1.0, 0.5, 1.0]}, r"temperatures: \[1\.0, 0\.5, 1\.0\] has one twice; keep one of each"),
        ({"guidance_scales": [2, 2]}, r"guidance_scales: \[2, 2\] has one twice"),
        ({"temperatures": [float("nan")]}, r"temperature: nan is not a finite number"),
        ({"draws": 0}, r"draws: 0; choose 1 or more"),
        ({"draws": 10**20}, r"100000000000000000000 draws .* need 4000"),
        ({"batch_size": 0}, r"batch_size: 0"),
    ):
        with pytest.raises(UserError, match=words):
            RunSettings(**wrong)


def test_an_evaluation_does_not_work_for_results_that_it_cannot_keep(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "s.npz", arr_0=rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8))
    command = ["evaluate", str(tmp_path / "s.npz"), "--reference", str(tmp_path / "s.npz"), "--out"]
    assert "is a folder; name a file" in told([*command, str(tmp_path), "--overwrite"], capsys)
    many = told([*command[:-1], f"--draws={10**20}"], capsys)
    assert "100000000000000000000 draws (--draws: parts whose spread is reported) of 3 neighbours need 4000" in many
    unread = told([*command[:-1], "--tokenizer", "no such"], capsys)
    assert "--tokenizer: 'no such' is read only for samples with tokens" in unread
    for nowhere in ("/proc/r.json", "/proc/new/r.json", str(tmp_path / "s.npz" / "r.json")):
        assert "cannot be written (N" in told([*command, nowhere], capsys)
    assert told(["report", "run", "--out", "/proc/r.html"], capsys).startswith("--out: /proc cannot be")
    assert "folder: is a folder; name a YAML" in told(["sweep", str(tmp_path)], capsys).replace(tmp_path.name, "folder")
    check_place(tmp_path / "new" / "folder" / "r.json", overwrite=False, key="--out")
    assert (tmp_path / "new" / "folder").is_dir()  # else a new folder's name would be found wrong at the end


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: mine.yaml", r"base: recipe: unknown 'mine\.yaml'.*choices: ar-openmoji"),
        ("base: rear-openmoji\nrecipe: 2020-01-01", r"recipe: datetime.* is neither number, text, list nor table"),
        ("base: rear-openmoji\nloop: {trackers: [!!binary aGk=]}", r"loop\.trackers: \[b'hi'\] is neither number"),
    ],
)
def test_a_file_and_its_key_are_named(text, words, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"mine\.yaml: {words}") as caught:
        read_config(tmp_path / "mine.yaml")
    assert "\n" not in str(caught.value)


def test_a_file_is_known_by_its_ending_in_any_case(tmp_path, capsys):
    (tmp_path / "MINE.YAML").write_text("base: rear-openmoji\nsteps: 3\n")
    assert "MINE.YAML: steps: unknown 'steps'" in told(["train", str(tmp_path / "MINE.YAML"), "--out", "x"], capsys)


def test_views_and_batches_are_refused_before_a_picture_is_read(tokenizer_folder, tmp_path, capsys):
    command = ["tokenize", "--tokenizer", str(tokenizer_folder), "--data", "nowhere", "--out", str(tmp_path / "x")]
    assert told([*command, "--views", "center-flip"], capsys).startswith("--views: unknown 'center-flip'")
    assert told([*command, "--batch-size", "0"], capsys).startswith("--batch-size: 0 is not")


def test_class_ids_are_a_tensor_of_the_size_asked_for():
    drawn = class_list(None, 1000, 7)
    assert drawn.dtype == torch.int64 and drawn.bincount().tolist() == [143] * 6 + [142]


def test_guidance_that_would_end_behind_the_last_token_is_refused_before_work(tmp_path, capsys):
    guided = ["--guidance-scale", "2", "--guidance-schedule", "interval", "--guidance-interval"]
    line = told(["sample", "openmoji", "--num-samples", "1", "--out", str(tmp_path / "a.npz"), *guided, "256"], capsys)
    assert line.startswith("guidance_interval: 256 is not in [0, 255]")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.txt", "x.PDF", "x.jsonl", ".png", ".npz", "x.npz."])
def test_samples_are_not_written_as_what_is_plainly_another_file(name, tmp_path, capsys):
    line = told(["sample", "openmoji", "--num-samples", "1", "--out", str(tmp_path / name)], capsys)
    assert f"samples are not written as {name}; choices: NAME.png, NAME.npz, or a folder" in line
    assert not list(tmp_path.iterdir())


def test_samples_that_are_not_there_are_named_first(tmp_path, capsys):
    missing = ["evaluate", str(tmp_path / "mistyped"), "--reference", "openmoji-64", "--temperatures", "1,0.9"]
    assert told(missing, capsys).startswith(f"evaluate: unknown {str(tmp_path / 'mistyped')!r}; choices: samples (.npz")


def test_an_option_of_runs_is_told_as_it_was_given(tmp_path, capsys):
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    line = told(["evaluate", str(tmp_path / "s.npz"), "--reference", "openmoji-64", "--match", "ar"], capsys)
    assert (
        line
        == f"--match: 'ar' is read only with the run folder of a generator, not {tmp_path / 's.npz'}; leave it away"
    )


def test_a_reference_that_is_nowhere_is_told_by_its_option_and_what_it_takes(tmp_path, capsys):
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((16, 16, 16, 3), np.uint8))
    line = told(["evaluate", str(tmp_path / "s.npz"), "--reference", "nowhere"], capsys)
    assert line.startswith(
        "--reference: 'nowhere' is neither a folder nor a known source; choices: FILE.npz, openmoji-64,"
    )
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet" / "train.parquet").touch()
    line = told(["evaluate", str(tmp_path / "s.npz"), "--reference", str(tmp_path / "parquet")], capsys)
    assert "(.parquet 1)" in line and "one of Parquet files with hf:PATH" in line


def test_a_model_to_match_is_told_by_its_option_and_may_be_one_of_the_package(model, picture_folder):
    sharpness = Sharpness(str(picture_folder), load_tokenizer("openmoji-64"), 8, read_origin(model), None, None, None)
    with pytest.raises(UserError, match=r"^--match: unknown 'nope'; choices: openmoji, a run folder"):
        sharpness.match(load_generator(model), Path("nope"))
    # Found, and of another tokenizer than the toy.
    with pytest.raises(UserError, match=r"^--match: openmoji: "):
        sharpness.match(load_generator(model), Path("openmoji"))


def test_results_of_samples_that_no_file_keeps_are_said_to_be_so(tmp_path, quarters, capsys):
    colours = np.random.default_rng(0).integers(0, 255, (16, 16, 16, 3), np.uint8)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", arr_0=colours)
    command = ["evaluate", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "b.npz"), "--metrics", "fd"]
    command += ["--feature-network", "quarters"]
    cli.main(command)
    assert "results: in no file; --out FILE keeps them" in capsys.readouterr().out
    cli.main([*command, "--out", str(tmp_path / "r.json")])
    assert f"results: {tmp_path / 'r.json'}\n" in capsys.readouterr().out


def test_a_file_that_is_of_no_results_is_not_called_damaged(tmp_path, capsys):
    (tmp_path / "store.json").write_text('{"origin": "mine", "num_images": 3}')
    assert "no results of samples, a run" in told(["evaluate", "--check", str(tmp_path / "store.json")], capsys)


def test_where_there_are_no_choices_that_is_said():
    assert str(unknown("x.pt: --entry", "ema", [])) == "x.pt: --entry: unknown 'ema'; there are none"


def test_most_commands_are_for_one_process(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = told(["report", "run", "--out", str(tmp_path / "a.html")], capsys)
    assert line == "report: is for one process; leave torchrun away, which is for train, sample, tokenize, evaluate"
    assert not list(tmp_path.iterdir())


def test_an_interruption_promises_no_run_where_none_has_begun(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "hold_memory", interrupted)
    with pytest.raises(SystemExit, match="130"):
        cli.main(["train"])
    assert "train: with --resume, if its run folder is there" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "tokenize", "evaluate", "sweep", "demo", "report", "diagnose"])
def test_sigterm_is_a_line_and_status_143(command, monkeypatch, capsys):
    """`train` saves first: tests/training/test_interruptions.py."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(cli, "hold_memory", lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit, match="143"):
            cli.main([command])
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.startswith("consonar: asked to end; the same command ")
