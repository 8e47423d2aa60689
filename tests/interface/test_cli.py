"""The command line as a user meets it: every command once on tiny real data, and one clear line for wrong input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from forked import call
from PIL import Image
from rich.console import Console

from consonar import cli
from consonar.components import model_folder
from consonar.config_io import to_dict
from consonar.training.config import TrainConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, picture_folder: Path) -> Path:
    """A folder with a token store `tokens`, a YAML file and a finished run `run`, all made by the command line."""
    root = tmp_path_factory.mktemp("cli")
    tokenizer, pictures = str(tokenizer_folder), str(picture_folder)
    cli.main(["tokenize", "--tokenizer", tokenizer, "--data", pictures, "--out", str(root / "tokens")])
    changes = {
        "base": "rear-openmoji",
        "tokenizer": tokenizer,
        "model": {"width": 32, "num_layers": 2, "num_heads": 4},
        "objective": {"head_width": 16},
        "data": {"tokens": str(root / "tokens")},
        "loop": {"steps": 4, "batch_size": 4, "log_every": 1},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(changes))
    cli.main(["train", str(root / "tiny.yaml"), "--out", str(root / "run"), "--optim.lr", "0.002"])
    return root


def fails(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The single line of standard error of a command that must fail with `code`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == code
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith("consonar: "), error
    return error


def test_train_from_yaml_with_an_override(trained: Path) -> None:
    config = json.loads((trained / "run" / "config.json").read_text())
    assert (
        config["recipe"] == "tiny" and config["optim"]["lr"] == 0.002 and config["objective"]["embedding_weight"] == 1
    )
    lines = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    # tokenize made the validation store, train found it
    assert (trained / "tokens-validation").is_dir() and "validation/cross_entropy" in lines[-1]
    assert (trained / "run" / "model" / "model.safetensors").is_file()


def test_sample_to_npz_folder_and_png(trained: Path, tmp_path: Path) -> None:
    run = str(trained / "run")
    options = ["--classes", "0,0,0", "--guidance-scale", "2", "--seed", "5"]
    cli.main(["sample", run, *options, "--out", str(tmp_path / "a.npz")])
    cli.main(["sample", run, *options, "--out", str(tmp_path / "folder"), "--batch-size", "2"])
    cli.main(["sample", run, *options, "--out", str(tmp_path / "alone.npz"), "--batch-size", "1"])
    cli.main(["sample", run, *options, "--out", str(tmp_path / "a.png")])
    with np.load(tmp_path / "a.npz") as arrays, np.load(tmp_path / "alone.npz") as alone:
        assert np.array_equal(arrays["tokens"], alone["tokens"])
        images, seeds, settings = arrays["arr_0"], arrays["seeds"], json.loads(str(arrays["settings"]))
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8 and seeds.tolist() == [5, 6, 7]
    assert settings["sampler"]["guidance_scale"] == 2 and settings["seed"] == 5
    files = sorted((tmp_path / "folder").glob("*.png"))
    assert len(files) == 3
    for file, image in zip(files, images, strict=True):
        # Drawn in batches of 2 and 1 instead of 3: the same tokens, and pixels that rounding may move by one level.
        assert np.abs(np.asarray(Image.open(file)).astype(int) - image).max() <= 1
    assert Image.open(tmp_path / "a.png").size == (3 * 16 + 2 * 2, 16)
    assert not list(tmp_path.glob("*.parts"))


def test_an_interrupted_sampling_job_goes_on(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from consonar.components import load_generator, load_tokenizer
    from consonar.sampling import job as jobs
    from consonar.sampling.sample import SamplerConfig

    generator = load_generator(trained / "run")
    tokenizer = load_tokenizer(json.loads((trained / "run" / "model" / "config.json").read_text())["tokenizer"])
    labels = jobs.balanced_labels(6, generator.num_classes)
    job = jobs.Job(generator, tokenizer, labels, seed=0, sampler=SamplerConfig(), source="run")
    whole = jobs.run_job(job, tmp_path / "whole.npz", shard_size=2)

    def stop_after_two(done: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.run_job(job, tmp_path / "cut.npz", shard_size=2, progress=stop_after_two)
    assert not (tmp_path / "cut.npz").exists()
    drawn: list[int] = []
    original = jobs.draw
    monkeypatch.setattr(jobs, "draw", lambda *a, **k: drawn.append(len(a[2])) or original(*a, **k))
    resumed = jobs.run_job(job, tmp_path / "cut.npz", shard_size=2)
    assert drawn == [2]
    with np.load(whole) as a, np.load(resumed) as b:
        assert sorted(a.files) == sorted(b.files) and all(np.array_equal(a[key], b[key]) for key in a.files)


def test_unfinished_samples_of_another_job_are_refused(trained: Path, tmp_path: Path, capsys) -> None:
    parts = tmp_path / "a.npz.parts"
    parts.mkdir()
    (parts / "job.json").write_text("{}")
    line = fails(["sample", str(trained / "run"), "--out", str(tmp_path / "a.npz")], capsys)
    assert "a.npz.parts" in line and (parts / "job.json").read_text() == "{}"


def test_quiet_training_prints_nothing(trained: Path, tmp_path: Path, capsys) -> None:
    train = ["train", str(trained / "tiny.yaml"), "--out", str(tmp_path / "run")]
    capsys.readouterr()
    cli.main([*train, "--quiet", "--stop-at", "1", "--resume-if-begun"])
    assert capsys.readouterr() == ("", "")
    cli.main([*train, "--resume-if-begun", "--stop-at", "2"])
    assert capsys.readouterr().out.endswith(f"run folder: {tmp_path / 'run'}\n")


def test_a_bar_says_of_what_how_many_of_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = StringIO()
    monkeypatch.setattr(cli, "Console", lambda **_: Console(file=shown, force_terminal=True, width=90))
    with cli.counting("evaluate") as count:
        count(300, 500, "cifar10[train]")
    assert all(word in shown.getvalue() for word in ("cifar10[train]", "60%", "300/500"))


def test_report_on_a_run(trained: Path, tmp_path: Path, capsys) -> None:
    cli.main(["report", str(trained / "run"), "--out", str(tmp_path / "page.html")])
    assert "<html" in (tmp_path / "page.html").read_text()
    assert "exists" in fails(["report", str(trained / "run"), "--out", str(tmp_path / "page.html")], capsys)


def test_options_that_a_command_does_not_read_here_are_refused(trained: Path, tmp_path: Path, capsys) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    samples = ["evaluate", str(tmp_path / "samples.npz"), "--reference", "openmoji-64"]
    for option, value in (
        ("--temperatures", "1,0.9"),
        ("--match", "x"),
        ("--num-samples", "16"),
        ("--perceptual", "x"),
    ):
        assert f"{option}: " in fails([*samples, option, value], capsys)
    assert "--overwrite: True is read only with --out" in fails([*samples, "--overwrite"], capsys)
    tokenizer = tmp_path / "run"
    shutil.copytree(model_folder("openmoji-64", "tokenizer"), tokenizer / "model")
    for name in ("config.json", "metrics.jsonl"):
        (tokenizer / name).write_text("{}")
    for option, value in (("--temperatures", "0.9"), ("--num-samples", "16"), ("--draws", "2"), ("--seed", "1")):
        line = fails(["evaluate", str(tokenizer), "--reference", "openmoji-64", option, value], capsys)
        assert f"{option}: " in line and "read only where samples of a generator are measured" in line
    words = ["--tokenizer", "openmoji-64", "--data", "openmoji", "--out", str(tmp_path / "t"), "--split", "validation"]
    assert "--views: 'ten_crop' is read only for the split train" in fails(
        ["tokenize", *words, "--views", "ten_crop"], capsys
    )
    assert not (tmp_path / "t").exists()


def test_evaluate_a_run_and_samples(trained: Path, picture_folder: Path, tmp_path: Path, quarters, capsys) -> None:
    """By a small network, and once, for the samples, by the one that is used where none is named."""
    run = shutil.copytree(trained / "run", tmp_path / "run")
    options = ["--num-samples", "16", "--draws", "2", "--temperatures", "1,0.5", "--feature-network", "quarters"]
    cli.main(["evaluate", str(run), "--reference", str(picture_folder), *options])
    results = json.loads((run / "results.json").read_text())
    assert [row["temperature"] for row in results["rows"]] == [1.0, 0.5] and results["best"] in (0, 1)
    metrics = results["rows"][0]["metrics"]
    assert {"FD(quarters) validation", "precision", "recall", "copy rate (tokens)"} <= set(metrics)
    assert metrics["FD(quarters) train"]["value"] > 0 and metrics["FD(quarters) train"]["spread"] > 0
    # A flatter distribution has more entropy, whatever the model.
    assert results["rows"][0]["metrics"]["entropy"]["value"] > results["rows"][1]["metrics"]["entropy"]["value"]
    with np.load(run / "samples_t0.5.npz") as arrays:
        assert arrays["images"].shape == arrays["nearest_train"].shape == (16, 16, 16, 3)
    assert json.loads((run / "reconstruction.json").read_text())["num_images"] == 6
    assert not list(run.glob(".samples*"))
    assert "--overwrite" in fails(["evaluate", str(run), "--reference", str(picture_folder)], capsys)
    again = ["evaluate", str(run), "--reference", str(picture_folder), "--overwrite", "--feature-network"]
    assert "choices: efficientnet-lite0, inception" in fails([*again, "fid"], capsys)
    assert "inception: no weights at" in fails([*again, "inception"], capsys)
    assert json.loads((run / "results.json").read_text()) == results
    cli.main(["sample", str(run), "--num-samples", "16", "--out", str(tmp_path / "a.npz")])
    of_samples = ["evaluate", str(tmp_path / "a.npz"), "--reference", str(picture_folder), "--metrics", "fd"]
    small, out = str(tmp_path / "small.json"), tmp_path / "a.json"
    cli.main([*of_samples, "--draws", "2", "--feature-network", "quarters", "--out", small])
    # The same seeds, classes and settings: the same tokens and, within a level, pixels.
    value = json.loads(Path(small).read_text())["metrics"]["FD(quarters) train"]["value"]
    assert value == pytest.approx(metrics["FD(quarters) train"]["value"], rel=1e-3)
    cli.main([*of_samples, "--draws", "1", "--out", str(out)])
    stored = json.loads(out.read_text())
    assert stored["metrics"]["FD(efficientnet-lite0) train"]["value"] > 0
    assert (
        stored["feature_network"]["sha256"]
        and stored["versions"]["torch"]
        and stored["samples"]["settings"]["seed"] == 0
    )


def test_train_and_evaluate_a_tokenizer(picture_folder: Path, tmp_path: Path, quarters, capsys) -> None:
    changes = {
        "base": "tokenizer-openmoji-64",
        "model": {
            "image_size": 16,
            "vocab_size": 32,
            "base_channels": 8,
            "channel_multipliers": [1, 2],
            "num_groups": 8,
        },
        "objective": {"perceptual_weight": 0.0},
        "data": {"images": str(picture_folder)},
        "loop": {"steps": 3, "batch_size": 4},
    }
    (tmp_path / "tok.yaml").write_text(yaml.safe_dump(changes))
    cli.main(["train", str(tmp_path / "tok.yaml"), "--out", str(tmp_path / "mine")])
    cli.main(["evaluate", str(tmp_path / "mine")])
    metrics = json.loads((tmp_path / "mine" / "reconstruction.json").read_text())
    assert metrics["num_images"] == 6 and 0 < metrics["usage"] <= 1 and metrics["psnr"] > 0
    assert metrics["origin"]["protocol"].endswith("efficientnet-lite0")
    shutil.copytree(picture_folder, tmp_path / "changed")
    next((tmp_path / "changed" / "validation").rglob("*.png")).unlink()
    changed = {"images": str(tmp_path / "changed")}
    (tmp_path / "mine" / "config.json").write_text(json.dumps({"data": changed}))
    cli.main(["evaluate", str(tmp_path / "mine"), "--overwrite", "--feature-network", "quarters"])
    assert "; not the pictures that were held out when it was trained" in capsys.readouterr().out
    cli.main(["report", str(tmp_path / "mine"), "--out", str(tmp_path / "tok.html")])
    model = str(tmp_path / "mine" / "model")
    config = json.loads((tmp_path / "mine" / "model" / "config.json").read_text())
    assert config["name"] == "mine", "called after its run, not after the shipped one of the recipe"
    cli.main(["tokenize", "--tokenizer", model, "--data", str(picture_folder), "--out", str(tmp_path / "tokens")])
    assert (tmp_path / "tokens").is_dir()


def test_import_of_both_upstream_formats(tokenizer_folder: Path, tmp_path: Path, capsys) -> None:
    lines = [json.dumps({"class_id": i % 2, "tokens": [i] * 16}) for i in range(3)]
    (tmp_path / "rar.jsonl").write_text("\n".join(lines))
    common = ["--tokenizer", str(tokenizer_folder)]
    cli.main(
        [
            "import-tokens",
            "--format",
            "rar-jsonl",
            "--data",
            str(tmp_path / "rar.jsonl"),
            *common,
            "--out",
            str(tmp_path / "a"),
        ]
    )
    assert "3 images x 1 views x 16 tokens" in capsys.readouterr().out
    for name, value in (("codes", np.ones((1, 2, 16), np.int64)), ("labels", np.zeros(1, np.int64))):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", value)
    folders = ["--data", str(tmp_path / "codes"), "--labels", str(tmp_path / "labels")]
    cli.main(["import-tokens", "--format", "llamagen-npy", *folders, *common, "--out", str(tmp_path / "b")])
    assert "1 images x 2 views x 16 tokens" in capsys.readouterr().out
    wrong = ["import-tokens", "--format", "nope", "--data", "x", *common, "--out", str(tmp_path / "c")]
    assert "rar-jsonl, llamagen-npy" in fails(wrong, capsys)


WRONG = {
    "unknown command": (["trian"], "train"),
    "unknown recipe": (["train", "rear-openmojy", "--out", "OUT"], "rear-openmoji"),
    "no recipe": (["train"], "ar-openmoji"),
    "unknown option": (["train", "rear-openmoji", "--out", "OUT", "--optim.lx", "1"], "--optim.lr"),
    "wrong type": (["train", "rear-openmoji", "--out", "OUT", "--optim.lr", "fast"], "fast"),
    "wrong value": (["train", "rear-openmoji", "--out", "OUT", "--optim.lr", "-1"], "optim.lr"),
    "wrong choice": (["train", "rear-openmoji", "--out", "OUT", "--objective.noise.schedule", "x"], "truncated_linear"),
    "missing file": (["train", "nowhere.yaml", "--out", "OUT"], "nowhere.yaml"),
    "missing option": (["train", "rear-openmoji"], "--out"),
    "no run": (["sample", "nowhere", "--out", "OUT.png"], "nowhere"),
    "unknown class": (["sample", "RUN", "--classes", "0,99", "--out", "OUT.png"], "choices: 0..0"),
    "class not a number": (["sample", "RUN", "--classes", "cat", "--out", "OUT.png"], "cat"),
    "unknown ending": (["sample", "RUN", "--out", "OUT.gif"], ".npz"),
    "output exists": (["sample", "RUN", "--out", "RUN"], "exists"),
    "unknown tokenizer": (["tokenize", "--tokenizer", "nope", "--data", "PICTURES", "--out", "OUT"], "openmoji-64"),
    "unknown views": (
        ["tokenize", "--tokenizer", "TOKENIZER", "--data", "PICTURES", "--out", "OUT", "--views", "x"],
        "ten_crop",
    ),
    "missing images": (["tokenize", "--tokenizer", "TOKENIZER", "--data", "nowhere", "--out", "OUT"], "nowhere"),
    "device": (["sample", "RUN", "--out", "OUT.png", "--device", "tpu"], "cuda"),
    "run exists": (["train", "YAML", "--out", "RUN"], "--resume"),
    "resume of another": (["train", "YAML", "--out", "RUN", "--resume", "--seed", "3"], "optim.lr"),
    "no tokens": (
        ["train", "YAML", "--out", "OUT", "--data.tokens", "no/scenes-2"],
        "--data scenes --out no/scenes-2",
    ),
    "samples missing": (["evaluate", "nowhere.npz", "--reference", "openmoji"], "nowhere.npz"),
    "report of nothing": (["report", "nowhere", "--out", "OUT.html"], "nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case: str, trained, tokenizer_folder, picture_folder, tmp_path, capsys) -> None:
    argv, expected = WRONG[case]
    places = {
        "OUT": tmp_path / "out", "RUN": trained / "run", "YAML": trained / "tiny.yaml",
        "PICTURES": picture_folder, "TOKENIZER": tokenizer_folder,
    }  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    filled = [
        str(places[word.split(".")[0]]) + word[len(word.split(".")[0]) :] if word.split(".")[0] in places else word
        for word in argv
    ]
    assert expected in fails(filled, capsys)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    assert not list(tmp_path.iterdir())


def test_tokens_of_another_tokenizer_are_refused(
    trained: Path, tmp_path: Path, make_config: Callable[..., TrainConfig], capsys
) -> None:
    from consonar.components import load_tokenizer, save_tokenizer

    config = to_dict(make_config())
    other = load_tokenizer(config["tokenizer"])
    other.requires_grad_(False)
    other.post_quant_conv.weight.add_(1)
    save_tokenizer(other, tmp_path / "other")
    argv = ["train", str(trained / "tiny.yaml"), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "other")]
    assert "tokenizer" in fails(argv, capsys)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_shape_or_version(trained: Path, tmp_path: Path, capsys) -> None:
    for name, change in (("width", 64), ("format_version", 99)):
        shutil.copytree(trained / "run" / "model", tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: change}))
        line = fails(["sample", str(tmp_path / name), "--out", str(tmp_path / "x.png")], capsys)
        assert name in line or "not the weights" in line
    weights = tmp_path / "width" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "damaged" in fails(["sample", str(tmp_path / "width"), "--out", str(tmp_path / "x.png")], capsys)


def test_help_of_every_command(capsys) -> None:
    cli.main(["--help"])
    overview = capsys.readouterr().out
    assert all(name in overview for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        if name in ("train", "plan"):  # whose options are those of a recipe
            cli.main([name, "--help"])
        else:
            with pytest.raises(SystemExit) as stop:
                cli.main([name, "--help"])
            assert stop.value.code in (0, None)
        assert "usage" in capsys.readouterr().out


def test_every_recipe_shows_its_options(capsys) -> None:
    from consonar.recipes import RECIPES

    for name in RECIPES:
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", name, "--help"])
        out = capsys.readouterr().out
        assert stop.value.code in (0, None) and "--optim.lr" in out and "--loop.steps" in out


@pytest.mark.parametrize("args", [["--help"], ["recipes"], ["train", "--help"]], ids=" ".join)
def test_who_leaves_before_the_end_of_the_output_is_told_nothing(args):
    """As after `| head`: no traceback, no message, and the status that a shell gives a closed pipe."""
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-m", "consonar", *args], stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


def to_a_terminal(encoding: str, words: list[str]) -> None:
    sys.stdout.reconfigure(encoding=encoding)
    cli.main(words)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_few_characters_ends_no_command(encoding: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    """ "cat … dog" is no Latin-1."""
    for place in ("train/cat", "train/dog"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / place / "0.png")
    words = ["tokenize", "--tokenizer", str(tokenizer_folder), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    done = call(to_a_terminal, encoding, words)
    assert done.code == 0 and r"cat \u2026 dog" in done.out, done.err


@pytest.mark.parametrize("form", [["--out", "~/t"], ["--out=~/t"]], ids=" ".join)
def test_a_home_folder_is_written_out_wherever_it_stands(
    form, tokenizer_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "train" / "0.png")
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    monkeypatch.setenv("CONSONAR_CACHE", "~/cache")
    cli.main(["tokenize", "--tokenizer=~/tokenizer", "--data", "~", *form])
    assert (tmp_path / "t" / "store.json").is_file() and not (tmp_path / "~").exists()


def test_samples_of_another_tokenizer_of_a_shipped_name_are_measured_without_it(
    picture_folder: Path, tmp_path: Path, quarters, capsys
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    settings = json.dumps({"tokenizer": "openmoji-64", "tokenizer_fingerprint": "0" * 64})
    np.savez(tmp_path / "samples.npz", arr_0=images, tokens=np.zeros((6, 16), np.int64), settings=settings)
    command = ["evaluate", str(tmp_path / "samples.npz"), "--reference", str(picture_folder), "--draws", "1"]
    command += ["--feature-network", "quarters"]
    cli.main(command)
    assert "copy rate (tokens): not measured" in capsys.readouterr().out
    assert "the tokenizer is 'openmoji-64'" in fails([*command, "--tokenizer", "openmoji-64"], capsys)


def test_a_model_that_does_not_fit_into_memory_is_one_line(trained: Path, tmp_path: Path, capsys) -> None:
    command = ["train", str(trained / "tiny.yaml"), "--out", str(tmp_path / "run"), "--model.num-heads", "2"]
    for width in ("1000000000", "1000000000000000"):
        assert "not enough memory" in fails([*command, "--model.width", width], capsys)


def test_text_that_is_not_utf_8_is_escaped_on_the_page(trained: Path, tmp_path: Path) -> None:
    cli.main(["report", str(trained / "run"), "--out", str(tmp_path / "page.html"), "--title", "caf\udce9"])
    assert r"caf\udce9" in (tmp_path / "page.html").read_text()


def test_tokens_beyond_the_vocabulary_are_not_counted(picture_folder: Path, tmp_path: Path, capsys) -> None:
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images, tokens=np.full((16, 64), 5000))
    command = ["evaluate", str(tmp_path / "samples.npz"), "--reference", str(picture_folder)]
    assert "token 5000; 'openmoji-64' has 0..1023" in fails([*command, "--tokenizer", "openmoji-64"], capsys)
