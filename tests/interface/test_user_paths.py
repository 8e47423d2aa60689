"""What happens to people: interruptions, full disks, data without classes, odd names, options that would do nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from conftest import picture

from consonar import cli
from consonar.errors import UserError

ODD_NAMES = ('<b>cats</b> & "dogs"', "größer", "z'class")
Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must fail with `code` and returns its single line of standard error."""

    def run(*argv: str | Path, code: int = 2) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in argv])
        error = capsys.readouterr().err.strip()
        assert stop.value.code == code and "\n" not in error and error.startswith("consonar: "), error
        return error

    return run


def consonar(*argv: str | Path) -> None:
    cli.main([str(word) for word in argv])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Stores `flat` (no classes) and `odd` (three classes with odd names), and tiny.yaml, which trains on `flat`."""
    root = tmp_path_factory.mktemp("user")
    for index in range(12):
        for path in (root / "images" / "flat", root / "images" / "odd" / ODD_NAMES[index % 3]):
            path.mkdir(parents=True, exist_ok=True)
            picture(index).save(path / f"{index}.png")
    for name in ("flat", "odd"):
        data = root / "images" / name
        consonar("tokenize", "--tokenizer", tokenizer_folder, "--data", data, "--out", root / name)
    changes = {
        "base": "rear-openmoji",
        "tokenizer": str(tokenizer_folder),
        "model": {"width": 32, "num_layers": 2, "num_heads": 4},
        "objective": {"head_width": 16},
        "data": {"tokens": str(root / "flat"), "validation_tokens": None},
        "loop": {"steps": 4, "batch_size": 4, "log_every": 1, "save_every": 1, "precision": "fp32", "device": "cpu"},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(changes))
    return root


def test_images_without_classes_from_tokens_to_report(place: Path, tmp_path: Path) -> None:
    consonar("train", place / "tiny.yaml", "--out", tmp_path / "run")
    consonar("sample", tmp_path / "run", "--num-samples", "3", "--out", tmp_path / "samples.npz")
    consonar("report", tmp_path / "run", "--out", tmp_path / "page.html")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["num_classes"] == 1 and config["class_names"] is None
    modes = {path.stat().st_mode for path in (tmp_path / "run" / "model").iterdir()}
    assert len(modes) == 1  # whoever can read the configuration can read the weights
    assert "<html" in (tmp_path / "page.html").read_text()


def test_class_names_travel_from_the_images_to_the_page(place: Path, tmp_path: Path, quarters) -> None:
    consonar("train", place / "tiny.yaml", "--out", tmp_path / "run", "--data.tokens", place / "odd")
    reference, few = place / "images" / "odd", ("--num-samples", "6", "--draws", "1")
    consonar("evaluate", tmp_path / "run", "--reference", reference, *few, "--feature-network", "quarters")
    consonar("report", tmp_path / "run", "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "größer" in page and "<b>cats" not in page and "&lt;b&gt;cats" in page


def test_validation_with_other_classes_is_refused(place: Path, tmp_path: Path, fails: Fails) -> None:
    stores = {"flat": place / "flat", "odd": place / "odd"}
    for ours, theirs in (("flat", "odd"), ("odd", "flat")):
        data = ("--data.tokens", stores[ours], "--data.validation_tokens", stores[theirs])
        line = fails("train", place / "tiny.yaml", "--out", tmp_path / "run", *data)
        assert "data.validation_tokens" in line and "3 classes" in line and "no classes" in line
    assert not (tmp_path / "run").exists()


WITHOUT_EFFECT = {
    "flip": (["--data.flip"], "data.flip"),
    "images": (["--data.images", "openmoji"], "data.images"),
    "stop at nothing": (["--stop-at", "0"], "--stop-at"),
    "no MLP": (["--model.mlp-ratio", "-1"], "mlp_ratio"),
}


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_an_option_that_nothing_would_read_is_refused(case: str, place: Path, tmp_path: Path, fails: Fails) -> None:
    options, expected = WITHOUT_EFFECT[case]
    assert expected in fails("train", place / "tiny.yaml", "--out", tmp_path / "run", *options)
    assert not list(tmp_path.iterdir())


TOKENIZER_MISTAKES = {
    "tokens": (["--data.tokens", "somewhere"], "data.tokens"),
    "tokenizer": (["--tokenizer", "openmoji-64"], "tokenizer"),
    "groups": (["--model.num-groups", "0"], "num_groups"),
    "levels": (["--model.channel-multipliers"], "channel_multipliers"),
    "small": (["--model.image-size", "16"], "perceptual_weight"),
    "revive": (["--objective.revive-until", "3"], "revive_until"),
}


@pytest.mark.parametrize("case", TOKENIZER_MISTAKES)
def test_wrong_options_of_a_tokenizer(case: str, tmp_path: Path, fails: Fails) -> None:
    options, expected = TOKENIZER_MISTAKES[case]
    assert expected in fails("train", "tokenizer-openmoji-64", "--out", tmp_path / "run", *options)


def test_a_wrong_sampling_job_leaves_nothing_behind(place: Path, tmp_path: Path, fails: Fails) -> None:
    consonar("train", place / "tiny.yaml", "--out", tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    assert "batch_size" in fails("sample", tmp_path / "run", "--batch-size", "0", "--out", tmp_path / "a.npz")
    for options in (
        ["--seed", "-1"],
        ["--seed", "1" + "0" * 20],
        ["--temperature", "nan"],
        ["--guidance-scale", "inf"],
    ):
        line = fails("sample", tmp_path / "run", *options, "--out", tmp_path / "a.npz")
        assert options[0].removeprefix("--").replace("-", "_") in line
    few = ("evaluate", tmp_path / "run", "--reference", place / "images" / "flat")
    for options, expected in (
        (["--num-samples", "0"], "num_samples"),
        (["--num-samples", "8", "--draws", "4"], "draws"),
        (["--batch-size", "0"], "batch_size"),
        (["--temperatures", "1,-1"], "temperature"),
    ):
        assert expected in fails(*few, *options)
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_options_of_evaluate_on_a_file(place: Path, tmp_path: Path, fails: Fails) -> None:
    reference = place / "images" / "flat"
    few = ("evaluate", reference, "--reference", reference)
    assert "batch_size" in fails(*few, "--draws", "1", "--batch-size", "0")
    assert "need 16 or more" in fails(*few, "--draws", "4")


def test_pictures_of_an_older_unfinished_job_do_not_mix_in(place: Path, tmp_path: Path) -> None:
    """A folder of samples holds this job's pictures only, whatever a killed job left beside it."""
    consonar("train", place / "tiny.yaml", "--out", tmp_path / "run")
    (tmp_path / ".many.partial").mkdir()
    (tmp_path / ".many.partial" / "999999_class0.png").write_bytes(b"old")
    consonar("sample", tmp_path / "run", "--num-samples", "2", "--out", tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.png"))) == 2


def test_a_tokenizer_that_changed_after_training_is_refused(
    place: Path, tmp_path: Path, tokenizer_folder: Path, fails: Fails
) -> None:
    from consonar.components import load_own_tokenizer, load_tokenizer, save_tokenizer

    own = tmp_path / "tokenizer"
    tokenizer = load_tokenizer(tokenizer_folder)
    save_tokenizer(tokenizer, own)
    consonar("train", place / "tiny.yaml", "--out", tmp_path / "run", "--tokenizer", own)
    assert load_own_tokenizer(tmp_path / "run").fingerprint == tokenizer.fingerprint
    tokenizer.post_quant_conv.weight.add_(1)
    save_tokenizer(tokenizer, own)
    with pytest.raises(UserError, match="has changed"):
        load_own_tokenizer(tmp_path / "run")
    assert "has changed" in fails("evaluate", tmp_path / "run", "--reference", place / "images" / "flat")


def test_a_metric_that_was_not_finite_does_not_stop_the_report(place: Path, tmp_path: Path) -> None:
    consonar("train", place / "tiny.yaml", "--out", tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "time": 9.0, "validation/cross_entropy": null, "train/loss": null}\n')
    consonar("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert "<html" in (tmp_path / "page.html").read_text()


def test_interrupted_training_goes_on(place: Path, tmp_path: Path, fails: Fails) -> None:
    """Ctrl-C once a checkpoint is there: one line, and `--resume` goes on from it."""
    # A shell starts its background jobs with SIGINT ignored, and Python then leaves it so: as from a terminal here.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    checkpoints = tmp_path / "run" / "checkpoints"
    train = ("train", place / "tiny.yaml", "--out", tmp_path / "run", "--loop.steps", "5000")

    def interrupt() -> None:
        while not list(checkpoints.glob("step_*.pt")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    try:
        assert "interrupted" in fails(*train, code=130)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    done = int(sorted(checkpoints.glob("step_*.pt"))[-1].stem.removeprefix("step_"))
    consonar("train", "--resume", tmp_path / "run", "--stop-at", str(done + 2))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, done + 3))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow over `size` bytes: writing fails half way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_a_file_is_one_line_and_the_run_goes_on_later(place: Path, tmp_path: Path, fails: Fails) -> None:
    train = ("train", place / "tiny.yaml", "--out", tmp_path / "run")
    with largest_file(50_000):
        assert "files may not be so large here (ulimit -f)" in fails(*train)
    assert not list((tmp_path / "run").rglob("*partial*"))
    consonar(*train, "--resume")
    samples = ("sample", tmp_path / "run", "--num-samples", "4", "--out", tmp_path / "a.npz")
    page = ("report", tmp_path / "run", "--out", tmp_path / "page.html")
    with largest_file(2_000):
        assert "files may not be so large here (ulimit -f)" in fails(*samples)
        assert "files may not be so large here (ulimit -f)" in fails(*page)
    consonar(*samples)
    consonar(*page)
    assert (tmp_path / "a.npz").exists() and (tmp_path / "page.html").exists()


def test_tokenizing_goes_on_with_the_store_that_is_missing(
    picture_folder: Path, tokenizer_folder: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    from consonar.data import tokenizing, tokens

    command = ("tokenize", "--tokenizer", tokenizer_folder, "--data", picture_folder, "--out", tmp_path / "tokens")
    write, made = tokenizing.write_token_store, []

    def one(path: Path, *arguments: object, **options: object) -> tokens.TokenStore:
        made.append(path.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return write(path, *arguments, **options)

    monkeypatch.setattr("consonar.cli.tokenize.write_token_store", one)
    assert "interrupted" in fails(*command, code=130)
    first = (tmp_path / "tokens" / "tokens.arrow").stat().st_mtime_ns
    assert "exists" in fails(*command, "--views", "center"), "another command must not take it for its own"
    consonar(*command)
    assert made == ["tokens", "tokens-validation", "tokens-validation"]
    assert (tmp_path / "tokens" / "tokens.arrow").stat().st_mtime_ns == first
    assert len(tokens.TokenStore.open(tmp_path / "tokens-validation")) == 6
    assert "exists" in fails(*command)


def change_a_picture(folder: Path) -> None:
    picture(7).save(folder / "train" / "a" / "000.png")


def swap_two_classes(folder: Path) -> None:
    for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
        (folder / "train" / old).rename(folder / "train" / new)


@pytest.mark.parametrize(
    "change", [change_a_picture, swap_two_classes, None], ids=lambda change: change and change.__name__
)
def test_tokenizing_goes_on_only_with_a_store_of_the_same_images_and_labels(
    change: Callable[[Path], None] | None, tokenizer_folder: Path, tmp_path: Path, fails: Fails
) -> None:
    for index, place in enumerate(("train/a", "train/b", "validation/a", "validation/b")):
        (tmp_path / "data" / place).mkdir(parents=True)
        picture(index).save(tmp_path / "data" / place / f"{index:03d}.png")
    command = ("tokenize", "--tokenizer", tokenizer_folder, "--data", tmp_path / "data", "--out", tmp_path / "tokens")
    consonar(*command)
    shutil.rmtree(tmp_path / "tokens-validation")
    if change is None:
        consonar(*command)
    else:
        change(tmp_path / "data")
        assert "exists, and not of these images, labels and options" in fails(*command)


def test_a_label_default_is_of_the_store(tokenizer_folder: Path, tmp_path: Path, fails: Fails) -> None:
    for split in ("train", "validation"):
        (tmp_path / "data" / split).mkdir(parents=True)
        picture(0).save(tmp_path / "data" / split / "000.png")
    command = ("tokenize", "--tokenizer", tokenizer_folder, "--data", tmp_path / "data", "--out", tmp_path / "tokens")
    consonar(*command, "--label-default", "1")
    shutil.rmtree(tmp_path / "tokens-validation")
    assert "exists, and not of these images, labels and options" in fails(*command, "--label-default", "5")


@pytest.mark.parametrize("listing", ["tokens-bad-images.txt", "samples.json-bad-images.txt"])
def test_a_file_of_the_users_where_bad_images_are_listed_is_kept(
    listing: str, picture_folder: Path, tokenizer_folder: Path, tmp_path: Path, fails: Fails
) -> None:
    (tmp_path / listing).write_text("my notes\n")
    tokenize = ("tokenize", "--tokenizer", tokenizer_folder, "--data", picture_folder, "--out", tmp_path / "tokens")
    evaluate = (
        "evaluate",
        picture_folder / "train/all",
        "--reference",
        picture_folder,
        "--out",
        tmp_path / "samples.json",
    )
    command = tokenize if listing.startswith("tokens") else evaluate
    assert f"{listing}: not a list of pictures that are left out" in fails(*command, "--bad-images", "skip")
    assert (tmp_path / listing).read_text() == "my notes\n"
    (tmp_path / listing).write_text("train\t24\tpictures\n")
    consonar(*tokenize, "--bad-images", "skip")
    assert (tmp_path / "tokens").is_dir()


def test_no_list_of_bad_images_is_made_where_there_are_none(picture_folder, tokenizer_folder, tmp_path) -> None:
    words = ("--tokenizer", tokenizer_folder, "--data", picture_folder, "--bad-images", "skip")
    consonar("tokenize", *words, "--out", tmp_path / "tokens")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens", "tokens-validation"]
