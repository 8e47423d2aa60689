"""Post-training from the command line: what a user types, and what a user mistypes."""

import json

import pytest
from conftest import NUM_CLASSES, picture

from consonar import cli
from consonar.training.run import train
from consonar.training.tracking import read_metrics


@pytest.fixture
def start(make_config, tmp_path):
    return train(make_config(loop={"steps": 2}), tmp_path / "start", quiet=True)


@pytest.fixture
def images(tmp_path):
    for index in range(12):
        folder = tmp_path / "images" / ("train" if index < 9 else "validation") / "abc"[index % NUM_CLASSES]
        folder.mkdir(parents=True, exist_ok=True)
        picture(index).save(folder / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def words(start, images, tmp_path):
    """The command line of a tiny run, and its folder."""
    out = tmp_path / "out"
    options = [
        "--init", str(start), "--out", str(out), "--data", f"imagefolder:{images}", "--loop.steps", "2",
        "--loop.batch-size", "4", "--loop.log-every", "1", "--loop.device", "cpu", "--quiet",
    ]  # fmt: skip
    return options, out


def fails(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err.strip()
    assert "\n" not in text and "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("recipe", "rewards", "options"),
    [
        ("vapi-openmoji", "mse=1,l1=0.5", ["--objective.estimator", "rloo", "--objective.group-size", "3"]),
        ("vapi-openmoji", "mse=1", ["--objective.context-noise", "0.3", "--objective.kl-weight", "0.01"]),
        ("vapi-spatial-openmoji", "mse=1", []),
        ("isentropic-openmoji", "mse=1", ["--objective.entropy-weight", "2"]),
        ("ce-openmoji", "mse=1", []),
        ("sar-openmoji", "mse=1", ["--objective.noise-schedule", "linear"]),
        ("soft-openmoji", "ssim=1", []),
        ("ste-openmoji", "mse=1", ["--objective.perceptual-weight", "0", "--objective.perceptual", "lpips"]),
        ("free-openmoji", "mse=1", ["--objective.group-size", "2"]),
    ],
)
def test_recipes_run_with_options(recipe, rewards, options, words):
    argv, out = words
    cli.main(["train", recipe, *argv, "--objective.rewards", rewards, *options])
    names = {part.split("=")[0] for part in rewards.split(",")}
    last = [line for line in read_metrics(out / "metrics.jsonl") if "validation/reward" in line][-1]
    assert {f"validation/reward_{name}" for name in names} <= set(last)
    assert set(json.loads((out / "config.json").read_text())["objective"]["rewards"]) == names
    assert (out / "model" / "model.safetensors").is_file()


def test_a_reward_of_ones_own_from_the_working_directory(words, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "my_rewards_of_this_test.py").write_text(
        "def brightness(images, originals, batch):\n"
        "    return -(images.mean((1, 2, 3)) - originals.mean((1, 2, 3))).abs()\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    argv, out = words
    cli.main(["train", "vapi-openmoji", *argv, "--objective.rewards", "my_rewards_of_this_test:brightness=2"])
    assert any(
        "train/reward_my_rewards_of_this_test:brightness" in line for line in read_metrics(out / "metrics.jsonl")
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "ar-openmoji", "--out", "x", "--optim.lr", "1e-3", "--optim.lr", "2e-3"],
        ["train", "ar-openmoji", "--out", "x", "--optim.lr=1e-3", "--optim.lr=2e-3"],
        ["train", "ar-openmoji", "--out", "x", "--optim.min-lr", "0", "--optim.min_lr", "1e-6"],
        ["train", "vapi-openmoji", "--out", "x", "--data", "a", "--data.images", "b"],
        ["sample", "openmoji", "--out", "x.png", "--seed", "1", "--seed", "2"],
        ["convert", "x.pt", "--to", "y", "--setting", "a=1", "--setting", "b=2"],
    ],
)
def test_an_option_that_is_given_twice_is_refused(argv, capsys, tmp_path, monkeypatch):
    """The last would win, and nothing would say so."""
    monkeypatch.chdir(tmp_path)
    assert ": given twice; keep one" in fails(capsys, *argv)
    assert not list(tmp_path.iterdir())


def test_mistakes(words, capsys, tmp_path):
    argv, out = words
    vapi = ["train", "vapi-openmoji", *argv]
    good = [*vapi, "--objective.rewards", "mse=1"]
    assert "objective.group_size: 1" in fails(capsys, *good, "--objective.group-size", "1")
    assert "is not NAME=WEIGHT" in fails(capsys, *vapi, "--objective.rewards", "mse")
    assert "'mse' is given twice, in 'mse=1,mse=2'" in fails(capsys, *vapi, "--objective.rewards", "mse=1,mse=2")
    assert "--objective.rewards: given twice" in fails(capsys, *good, "--objective.rewards=l1=1")
    assert "unknown 'mze'" in fails(capsys, *vapi, "--objective.rewards", "mze=1")
    assert "no weights at" in fails(
        capsys, *vapi, "--objective.rewards", "mse=1,lpips=1", "--objective.lpips-weights", str(tmp_path / "no.pth")
    )
    (tmp_path / "wrong.pth").write_bytes(b"not the weights")
    assert "the published vgg16-397923af.pth" in fails(
        capsys, *vapi, "--objective.rewards", "lpips=1", "--objective.lpips-weights", str(tmp_path / "wrong.pth")
    )
    assert "start from" in fails(capsys, "train", "vapi-openmoji", "--out", str(out)).replace("starts", "start")
    assert "reads images of 32 px or more" in fails(capsys, *vapi)  # the recipe's own reward, on 16 px
    assert "'embedding' has no place" in fails(
        capsys, "train", "vapi-spatial-openmoji", *argv, "--objective.rewards", "mse=1,embedding=1"
    )
    assert not out.exists()
    nonsense = tmp_path / "nonsense_of_this_test.py"
    nonsense.write_text(
        "def nan(images, originals, batch):\n    return images.mean((1, 2, 3)) * float('nan')\n"
        "def shy(images, originals, batch):\n    raise RuntimeError('not today')\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert "returned nan" in fails(capsys, *vapi, "--objective.rewards", "nonsense_of_this_test:nan=1")
        elsewhere = [str(tmp_path / "shy") if word == str(out) else word for word in vapi]
        assert "'nonsense_of_this_test:shy': raised RuntimeError: not today" in fails(
            capsys, *elsewhere, "--objective.rewards", "nonsense_of_this_test:shy=1"
        )
