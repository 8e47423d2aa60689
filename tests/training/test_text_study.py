"""The study on captions, with a toy grid: from scenes to the section of the page, with the compositional score."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from tiny_encoder import save_encoder

from consonar.data import scene_source
from consonar.errors import UserError
from consonar.evaluation.check import check_results
from consonar.sweeps.rows import read_sweep
from consonar.sweeps.work import Place

CLAIMS = Path(__file__).parents[2] / "claims"


@pytest.fixture
def study(monkeypatch):
    """The script."""
    monkeypatch.syspath_prepend(str(CLAIMS))
    spec = importlib.util.spec_from_file_location("study_on_captions", CLAIMS / "text.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_score_is_used_beside_the_result_of_the_same_weights_prompts_and_seed_alone(study, tmp_path, monkeypatch):
    place = Place(tmp_path, read_sweep(CLAIMS / "text.yaml", tmp_path), print)
    cell = place.sweep.cells["plain-0"]
    for part in ("results", "scores"):
        (tmp_path / part).mkdir()
        shutil.copy(CLAIMS / "results" / "text" / part / "plain-0.json", tmp_path / part)
    path, result = tmp_path / "scores" / "plain-0.json", json.loads((tmp_path / "results" / "plain-0.json").read_text())
    known = json.loads(path.read_text())
    monkeypatch.setattr(study, "score_run", lambda *asked, **options: known)
    monkeypatch.setattr(Place, "is_trained", lambda place, cell: True)
    here = ["0" * 64]
    monkeypatch.setattr(study, "weights_sha256", lambda run: here[0])
    for change in (
        {"checkpoint_sha256": "0" * 64}, {"config": known["config"] | {"seed": 1}}, {"detector_sha256": "0" * 64},
        {"prompts": known["prompts"] | {"texts": known["prompts"]["texts"][1:]}},
    ):  # fmt: skip
        path.write_text(json.dumps(known | change))
        assert study.scores_of(place.sweep, {"plain-0": result}, tmp_path) == ({}, ["plain-0"])
        study.score(place, cell)  # the run here is another one than that of the result
        assert json.loads(path.read_text()) == known | change
    here[0] = result["results"]["checkpoint_sha256"]
    study.score(place, cell)
    assert study.scores_of(place.sweep, {"plain-0": result}, tmp_path) == ({"plain-0": known}, [])
    path.write_text("{}")
    with pytest.raises(UserError, match=r"scores/plain-0.json: not a score of this study.*; remove it"):
        study.score(place, cell)


@pytest.mark.slow
def test_the_study_on_captions_writes_distances_and_scores(study, tmp_path, monkeypatch, quarters):
    save_encoder(tmp_path / "enc")
    trained = {
        "text_encoder": str(tmp_path / "enc"), "data.tokens": "runs/text/tokens", "data.validation_items": 4,
        "model.width": 16, "model.num_layers": 2, "model.num_heads": 2, "model.caption_dim": 8,
        "model.num_condition_tokens": 12, "loop.steps": 2, "loop.validate_every": 1, "loop.sample_every": 0,
        "loop.batch_size": 4, "loop.precision": "fp32", "loop.device": "cpu",
    }  # fmt: skip
    after = {
        "base": "ce-scenes", "init": {"cell": "plain", "seed": 0}, "seeds": 2, "objective.rewards": {"mse": 1.0},
        "data.images": "scenes:16", "data.validation_items": 4, "loop.steps": 1, "loop.batch_size": 4,
        "loop.precision": "fp32", "loop.device": "cpu",
    }  # fmt: skip
    rows = {
        "plain": {"base": "ar-scenes", **trained}, "plain+ce": after, "plain+vapi": {**after, "base": "vapi-scenes"}
    }  # fmt: skip
    evaluated = {
        "reference": "scenes:16", "feature_network": "quarters", "temperatures": [1], "guidance_scales": [1, 2],
        "num_samples": 12, "metrics": ["fd", "precision"], "draws": 1, "reconstruct": False,
    }  # fmt: skip
    (tmp_path / "claims").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text("# Results\n")
    file = tmp_path / "claims" / "text.yaml"
    file.write_text(yaml.safe_dump({"seeds": 1, "rows": rows, "evaluate": evaluated}, sort_keys=False))
    monkeypatch.setattr(sys.modules["photographs"], "HERE", tmp_path / "claims")
    monkeypatch.setitem(study.SCENES, "cpu", "scenes:16")
    monkeypatch.setitem(scene_source.DEFAULT_COUNTS, "validation", 16)
    monkeypatch.setattr(study, "PROMPTS", 8)
    monkeypatch.setattr(study, "COLUMNS", tuple(c.replace("efficientnet-lite0", "quarters") for c in study.COLUMNS))
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["text.py"])
    monkeypatch.chdir(tmp_path)
    study.run("about", study.NAMES, study.prepare, study.page, study.score)
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "**5 of 5 runs have a result**" in text and "true pictures" in text and "| attribution |" in text
    assert "1, guidance 2" in text and "### Post-training of plain AR" in text and "| plain+vapi" in text
    table = text[text.index("Differences, seed by seed") :].splitlines()[2:]  # its cells stand under their headings
    of_row = dict(zip(table[0].split("|"), table[2].split("|"), strict=True))
    assert "%" in of_row[" compositional score "] and "%" not in of_row[" FD(quarters) train "]
    scored = tmp_path / "claims/results/text/scores/plain+ce-1.json"
    kept = json.loads(scored.read_text())
    assert [(row["temperature"], row["guidance_scale"]) for row in kept["rows"]] == [(1.0, 1.0), (1.0, 2.0)]
    assert 0 <= kept["rows"][0]["metrics"]["compositional score"]["value"] <= 1
    assert "Differences of the score by temperature" in text and text.count("\n| true pictures | ") == 2
    assert check_results(scored, samples=tmp_path / "claims/results/text/runs/plain+ce-1").reproduced
    scored.write_text(json.dumps(kept | {"checkpoint_sha256": "0" * 64}))  # as where the cell was done anew
    monkeypatch.setattr(sys, "argv", ["text.py", "--page"])
    study.run("about", study.NAMES, study.prepare, study.page, study.score)
    assert "Left out: the score of plain+ce-1, which is of other" in (tmp_path / "docs" / "results.md").read_text()
    monkeypatch.setattr(sys, "argv", ["text.py"])
    study.run("about", study.NAMES, study.prepare, study.page, study.score)
    assert (tmp_path / "docs" / "results.md").read_text() == text
    scored.unlink()  # as where a process was ended between a result and its score
    study.run("about", study.NAMES, study.prepare, study.page, study.score)
    assert json.loads(scored.read_text())["rows"] == kept["rows"]
