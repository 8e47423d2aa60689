"""Every golden in tests/goldens, array by array, and the rule and the runner behind them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import GOLDENS, value_for
from golden import Golden
from runner import golden_names, handlers, main, outcome_of, run_golden

PROJECT = GOLDENS.parents[1]


@pytest.mark.parametrize("name", golden_names(GOLDENS))
def test_every_array_agrees_with_the_official_implementation(name):
    golden = run_golden(name, GOLDENS)
    assert golden.errors and max(golden.errors.values()) <= 1


def test_the_weight_rule():
    for key, values in json.loads((GOLDENS / "fill_vectors.json").read_text()).items():
        name, shape, codebook = key.split("|")
        ours = value_for(name, tuple(map(int, shape.split("x"))), codebook.endswith("True"))
        np.testing.assert_allclose(ours.ravel(), values, rtol=0, atol=1e-12)


def test_every_handler_can_be_imported():
    found, broken = handlers()
    assert not broken and len(found) == len(list((GOLDENS.parent / "parity").glob("golden_*.py")))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of one small golden, to be spoiled."""
    for name in ("rear_noalign.json", "rear_noalign.npz"):
        shutil.copy(GOLDENS / name, tmp_path)
        (tmp_path / name).chmod(0o644)
    return tmp_path


def edit(folder: Path, **changes) -> None:
    path = folder / "rear_noalign.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_value_fails(folder):
    with np.load(folder / "rear_noalign.npz") as file:
        arrays = dict(file)
    arrays["logits"] = arrays["logits"].copy()
    arrays["logits"][5] += 1e-2
    np.savez(folder / "rear_noalign.npz", **arrays)
    outcome = outcome_of("rear_noalign", folder)
    assert "rear_noalign.logits: error" in outcome.problem and "FAIL" in outcome.line()


def test_a_golden_that_nobody_knows_fails(folder):
    meta = json.loads((folder / "rear_noalign.json").read_text())
    edit(folder, config=meta["config"] | {"cls": "modeling.Other"})
    assert "0 handlers for 'modeling.Other'" in outcome_of("rear_noalign", folder).problem


def test_an_array_that_nobody_compares_fails(folder):
    meta = json.loads((folder / "rear_noalign.json").read_text())
    edit(folder, arrays=meta["arrays"] | {"surprise": {"shape": [1], "dtype": "float32", "desc": ""}})
    assert "not compared: surprise" in outcome_of("rear_noalign", folder).problem


def test_a_golden_without_its_arrays_fails(folder):
    (folder / "rear_noalign.npz").unlink()
    assert "FileNotFoundError" in outcome_of("rear_noalign", folder).problem


def test_a_value_that_is_not_a_number_fails(folder):
    golden = Golden("rear_noalign", folder)
    with pytest.raises(AssertionError, match="error nan"):
        golden.compare("logits", torch.full(golden.shape("logits"), float("nan")))


def test_the_command(folder):
    """From the project's root, as its users call it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parity", str(folder)], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("rear_noalign") and "1 arrays" in done.stdout and " pass" in done.stdout


def test_one_failure_fails_the_command(folder, capsys):
    shutil.copy(folder / "rear_noalign.npz", folder / "other.npz")
    text = (folder / "rear_noalign.json").read_text()
    (folder / "other.json").write_text(text.replace('"hidden_size": 64', '"hidden_size": 32'))
    assert main([str(folder)]) == 1
    assert "1 of 2 goldens pass" in capsys.readouterr().out
    (folder / "empty").mkdir()
    assert main([str(folder / "empty")]) == 1
    assert main([str(folder / "nowhere")]) == main([]) == 2
