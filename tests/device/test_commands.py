"""Every command on the device that `--device auto` finds, on tiny real data."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import save_pictures, save_tokenizer_of_32
from device.pretend import pretended_cuda

from consonar import cli
from consonar.cli import ceilings
from consonar.components import load_generator
from consonar.data.tokens import TokenStore
from consonar.diagnostics.diagnose import PARTS
from consonar.generators.rear import ReARConfig
from consonar.tokenizers.vqgan import MaskGITConfig
from consonar.training import best
from consonar.training import policy_gradient as policy

LOOP = {"steps": 2, "batch_size": 4, "log_every": 1, "precision": "bf16"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with pictures in three classes, a tokenizer, and what the commands make of them on the device."""
    if torch.cuda.is_available():
        pytest.skip("a real CUDA device is here: `make test-gpu`")
    root = tmp_path_factory.mktemp("device")
    save_pictures(root / "pictures", size=32)
    save_tokenizer_of_32(root / "tokenizer")
    with pretended_cuda():
        cli.main(
            ["tokenize", "--tokenizer", str(root / "tokenizer"), "--data", str(root / "pictures"),
             "--out", str(root / "tokens")]
        )  # fmt: skip
        train(
            root, "rear", base="rear-openmoji", tokenizer=str(root / "tokenizer"),
            model={"width": 32, "num_layers": 2, "num_heads": 4}, objective={"head_width": 16},
            data={"tokens": str(root / "tokens")},
            loop=LOOP | {"validate_every": 1, "sample_every": 1, "save_every": 1, "ema_decay": 0.9},
        )  # fmt: skip
    yield root


def train(root: Path, name: str, **changes: object) -> None:
    (root / f"{name}.yaml").write_text(yaml.safe_dump(changes))
    cli.main(["train", str(root / f"{name}.yaml"), "--out", str(root / name), "--quiet"])


def stored_tokens(folder: Path) -> torch.Tensor:
    """(12, 16), the centre crop of every training picture."""
    return TokenStore.open(folder).read(torch.arange(12), torch.zeros(12, dtype=torch.int64))


def test_a_store_made_on_the_device_holds_the_tokens_of_the_cpu(cuda, root: Path, tmp_path: Path) -> None:
    cli.main(
        ["tokenize", "--tokenizer", str(root / "tokenizer"), "--data", str(root / "pictures"),
         "--out", str(tmp_path / "tokens"), "--device", "cpu"]
    )  # fmt: skip
    ours, theirs = (stored_tokens(folder) for folder in (root / "tokens", tmp_path / "tokens"))
    assert (ours == theirs).float().mean() > 0.99


def test_a_trained_run_went_through_the_device(cuda, root: Path) -> None:
    lines = [json.loads(line) for line in (root / "rear" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2]
    assert any("validation/cross_entropy" in line for line in lines)
    assert list((root / "rear" / "samples").glob("*.png"))


def test_samples_of_a_run_are_drawn_and_measured(cuda, root: Path, tmp_path: Path) -> None:
    run, drawn, results = str(root / "rear"), str(tmp_path / "drawn.npz"), tmp_path / "results.json"
    cli.main(["sample", run, "--out", str(tmp_path / "grid.png")])
    cli.main(
        ["sample", run, "--num-samples", "8", "--guidance-scale", "2", "--top-k", "5", "--top-p", "0.9", "--out", drawn]
    )
    cli.main(
        ["evaluate", drawn, "--reference", str(root / "pictures"), "--tokenizer", str(root / "tokenizer"),
         "--draws", "2", "--metrics", "precision,copy-rate", "--out", str(results)]
    )  # fmt: skip
    content = json.loads(results.read_text())
    assert {"copy rate (tokens)", "copy rate (features)", "precision"} <= set(content["metrics"])
    assert content["feature_network"]["name"] == "efficientnet-lite0"
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.parametrize("parts", [("exposure", "embedding", "layers"), pytest.param(PARTS, marks=pytest.mark.slow)])
def test_a_run_is_diagnosed(cuda, root: Path, tmp_path: Path, parts: Collection[str]) -> None:
    cli.main(
        ["diagnose", str(root / "rear"), "--data", str(root / "pictures" / "train"), "--num-images", "8",
         "--validation-split", "0%",
         "--parts", ",".join(parts), "--guidance-scale", "2",
         "--out", str(tmp_path / "page.html")]
    )  # fmt: skip
    content = json.loads((tmp_path / "page.json").read_text())
    assert (
        content["parts"].keys() | content["unavailable"].keys() == set(parts)
        and content["provenance"]["machine"] == "a pretended device"
    )


def test_a_run_is_measured_over_temperatures_and_matched(cuda, quarters, root: Path, capsys) -> None:
    """By a small network: distances of 1,280 features are no matter of a device, and what has them was there above."""
    run = root / "rear"
    cli.main(
        ["evaluate", str(run), "--reference", str(root / "pictures"), "--num-samples", "8", "--draws", "2",
         "--temperatures", "1,0", "--match", str(run), "--feature-network", "quarters"]
    )  # fmt: skip
    assert "entropy of rear" in capsys.readouterr().out
    content = json.loads((run / "results.json").read_text())
    assert content["machine"] == "a pretended device"
    assert {"entropy (teacher-forced)", "copy rate (tokens)"} <= set(content["rows"][0]["metrics"])
    cli.main(["report", str(run), "--out", str(run / "report.html")])


def test_a_sweep_is_trained_and_measured(cuda, quarters, root: Path) -> None:
    options = {f"loop.{name}": value for name, value in LOOP.items()} | {"data.tokens": str(root / "tokens")}
    study = {
        "base": "ar-openmoji", "options": {**options, "tokenizer": str(root / "tokenizer")},
        "rows": {"plain": {"model.num_layers": 1, "model.width": 32, "model.num_heads": 2}},
        "evaluate": {"reference": str(root / "pictures"), "feature_network": "quarters", "num_samples": 8, "draws": 2},
    }  # fmt: skip
    (root / "study.yaml").write_text(yaml.safe_dump(study))
    cli.main(["sweep", str(root / "study.yaml"), "--out", str(root / "sweep")])
    content = json.loads((root / "sweep" / "results" / "plain-0.json").read_text())
    assert content["results"]["machine"] == content["sessions"][0]["machine"] == "a pretended device"
    assert (root / "sweep" / "sweep.html").is_file()


@pytest.mark.parametrize("base", ["vapi-spatial-openmoji", "ce-openmoji", "ste-openmoji"])
def test_a_generator_is_post_trained(cuda, quarters, root: Path, base: str, monkeypatch) -> None:
    monkeypatch.setattr(best, "NETWORK", "quarters")
    name = base.removesuffix("-openmoji")
    train(
        root, name, base=base, init=str(root / "rear"), data={"images": str(root / "pictures")},
        objective={"rewards": {"mse": 1.0, "efficientnet-lite0": 1.0}, "group_size": 2} if name[0] == "v" else {},
        loop=LOOP | {"batch_size": 2, "accumulation": 2, "validate_every": 2, "fd_samples": 4 if name == "ce" else 0},
    )  # fmt: skip
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    assert any("validation/reward" in line for line in lines)


def test_a_run_without_memory_says_where_it_went_and_what_to_change(cuda, root: Path, monkeypatch, capsys) -> None:
    """The second update is refused memory: the optimizer is there then, and so are the moving average and the prior."""
    calls, loss = [], policy.clipped_policy_loss

    def refused(*given: torch.Tensor) -> torch.Tensor:
        calls.append(given)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.62 GiB.\nmore")
        return loss(*given)

    monkeypatch.setattr(policy, "clipped_policy_loss", refused)
    with pytest.raises(SystemExit) as stopped:
        train(
            root, "full", base="vapi-openmoji", init=str(root / "rear"), data={"images": str(root / "pictures")},
            objective={"rewards": {"mse": 1.0}}, loop=LOOP | {"ema_decay": 0.9},
        )  # fmt: skip
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "consonar: not enough memory; CUDA out of memory. Tried to allocate 5.62 GiB.; 1.00 GiB in use: "
    )
    parts = re.findall(r"([a-z -]+) \d+\.\d\d", line.partition("in use: ")[2])
    assert [part.strip() for part in parts] == [
        "weights", "optimizer", "frozen models", "moving average", "activations and the rest",
    ]  # fmt: skip
    change = line.partition("rest ")[2].partition("; ")[2].split(" or ")
    assert change == [
        "raise loop.accumulation (1)", "set loop.activation_checkpointing (0) to 1", "set objective.chunk (0) to 8",
        "lower loop.batch_size (4)",
    ]  # fmt: skip


def test_a_tokenizer_is_trained_and_measured(cuda, quarters, root: Path) -> None:
    train(
        root, "codec", base="tokenizer-openmoji-64", data={"images": str(root / "pictures")},
        model={"image_size": 32, "vocab_size": 32, "code_dim": 4, "base_channels": 8, "latent_channels": 8,
               "channel_multipliers": [1, 1, 2, 2], "num_groups": 4},
        objective={"discriminator_weight": 0.1, "discriminator_start": 0, "revive_after": 1},
        loop=LOOP | {"batch_size": 2, "accumulation": 2, "validate_every": 1, "sample_every": 1},
    )  # fmt: skip
    cli.main(["evaluate", str(root / "codec"), "--reference", str(root / "pictures"), "--feature-network", "quarters"])
    assert (root / "codec" / "reconstruction.json").is_file()


def test_a_model_of_the_device_is_converted_back(cuda, root: Path, tmp_path: Path) -> None:
    cli.main(["convert", str(root / "rear"), "--to-official", str(tmp_path / "rear.safetensors")])
    cli.main(["convert", str(tmp_path / "rear.safetensors"), "--to", str(tmp_path / "rear")])
    before, after = (load_generator(folder).state_dict() for folder in (root / "rear", tmp_path / "rear"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_the_doctor_measures_the_device(cuda, capsys, monkeypatch) -> None:
    toy = replace(
        ceilings.SIZES["cuda"],
        generator=ReARConfig(width=32, num_layers=1, num_heads=2).sized(16, 4, 3),
        tokenizer=MaskGITConfig(base_channels=32, image_size=32),
        rows=2, tokens=4, pictures=1, step_rows=2, copied=2**20, product=64,
    )  # fmt: skip
    monkeypatch.setattr(ceilings, "SIZES", {"cuda": toy})
    monkeypatch.setattr(ceilings, "MOST_CALLS", 1)
    cli.main(["doctor", "--benchmark"])
    told = " ".join(capsys.readouterr().out.split())
    assert "a pretended device, 2 GB, compute capability 9.0" in told
    for work in ("a token of 2 guided rows, bfloat16", "a picture decoded, bfloat16", "a picture encoded, float32",
                 "a training step of 2 rows, bfloat16"):  # fmt: skip
        assert work in told
