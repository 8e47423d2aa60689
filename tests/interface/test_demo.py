"""The demo end to end at a toy budget, on the real data and the shipped tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from consonar import cli
from consonar.demo import job as demo
from consonar.demo import plan as demo_plan
from consonar.evaluation import runs


@pytest.mark.slow
def test_demo_makes_a_page_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(demo_plan, "FEWEST_SAMPLES", 40)
    monkeypatch.setattr(demo, "TEMPERATURES", (1.0, 0.9))
    out = tmp_path / "demo"
    argv = ["demo", "--out", str(out), "--minutes", "0.1"]
    original = demo.measure_part
    monkeypatch.setattr(demo, "measure_part", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 130 and not (out / "report.html").exists()
    weights = (out / "rear" / "model" / "model.safetensors").stat().st_mtime_ns
    plan = (out / "demo.json").read_text()
    assert (out / "opening.png").is_file() and not (out / ".measure").exists()
    assert "minutes here, the least there is" in capsys.readouterr().out
    monkeypatch.setattr(demo, "measure_part", original)
    cli.main(argv)
    assert (out / "rear" / "model" / "model.safetensors").stat().st_mtime_ns == weights
    assert (out / "demo.json").read_text() == plan
    page = (out / "report.html").read_text()
    assert "reAR" in page and "CC BY-SA" in page
    posts = [f"{start}-{name}" for start in demo.RUNS for name in demo.POST_TRAINING]
    for name in (*demo.RUNS, *posts):
        results = json.loads((out / name / "results.json").read_text())
        assert [row["temperature"] for row in results["rows"][:2]] == [1.0, 0.9]
        matched = [row["matched_to"] for row in results["rows"][2:]]
        assert matched == ([f"{name}-vapi"] if name in demo.RUNS else [])
        assert results["best"] == runs.best_row(results["rows"])
        assert {"FD(efficientnet-lite0) train", "FD(efficientnet-lite0) validation", "precision", "recall"} <= set(
            results["rows"][0]["metrics"]
        )
    for start in demo.RUNS:
        configs = [json.loads((out / f"{start}-{name}" / "config.json").read_text()) for name in demo.POST_TRAINING]
        same = [{k: v for k, v in config.items() if k not in ("objective", "recipe")} for config in configs]
        assert same[0] == same[1] and same[0]["init"] == str((out / start).resolve())
    capsys.readouterr()
    cli.main(argv)
    assert "there already" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv[:-1], "0.5"])
    assert stop.value.code == 2 and "minutes" in capsys.readouterr().err
