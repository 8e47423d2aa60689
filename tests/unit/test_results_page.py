"""docs/results.md: its sections are of the files of the demo and of the studies."""

import importlib.util
import json
import subprocess
from pathlib import Path
from threading import Thread

import pytest
import yaml

from consonar.config_io import to_dict
from consonar.demo.plan import PARTS, Work, config_of
from consonar.diagnostics.diagnose import Diagnosis
from consonar.diagnostics.findings import Finding, Interval
from consonar.errors import UserError
from consonar.evaluation.check import diagnosed_by
from consonar.files.readers import read_json
from consonar.files.writers import write_json
from consonar.sweeps.rows import read_sweep
from consonar.sweeps.summary import notes_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"


@pytest.mark.parametrize(("target", "usual"), [("claims", 720), ("claims-text", 600)])
def test_a_call_on_a_gpu_takes_the_seconds_that_it_is_given(target, usual):
    for given, limit in (["LIMIT=3600"], 3600), ([], usual):
        command = ["make", "-n", "-o", ".venv/installed", target, "PROFILE=gpu", *given]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        assert f"timeout --signal=INT {limit} " in told


def script(place):
    spec = importlib.util.spec_from_file_location(Path(place).stem, ROOT / place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "claims"))
    return script("claims/demo.py")


def test_the_section_on_the_demo_is_of_its_files(demo):
    known = {path.stem: read_json(path) for path in demo.KEPT.iterdir()}
    plan = known.pop("demo")
    assert known.keys() == demo.NAMES.keys() == PARTS.keys(), "all runs of the demo"
    known = {name: known[name] for name in demo.NAMES}  # a folder has its files in any order
    assert f"<!-- demo -->\n{demo.page(plan, known)}\n<!-- /demo -->" in PAGE.read_text()
    for name, content in known.items():
        work, config = Work(plan["steps"], plan["updates"], plan["samples"]), content["asked"]["config"]
        # From a configuration to JSON and back, as the run wrote its own.
        asked = json.loads(json.dumps(to_dict(config_of(name, Path("runs/demo"), work, plan["seed"]))))
        chosen = ("recipe", "seed", "objective", "init")
        assert {key: config[key] for key in chosen} == {key: asked[key] for key in chosen}
        assert all(row["num_samples"] == plan["samples"] for row in content["results"]["rows"])


def test_the_diagnosed_models_of_the_demo_are_those_of_its_numbers(demo):
    for name in demo.TRAINED:
        diagnosis = read_json(ROOT / "claims" / "results" / "diagnosis" / f"{name}.json")
        kept = read_json(demo.KEPT / f"{name}.json")
        assert diagnosis["provenance"]["generator"]["sha256"] == kept["results"]["checkpoint_sha256"]


def test_the_numbers_of_the_readme_are_those_of_the_demo(demo):
    said = " ".join((ROOT / "README.md").read_text().split())
    plan = read_json(demo.KEPT / "demo.json")
    assert f"({plan['steps']} steps and {plan['updates']} updates; temperature 0.7," in said
    for row in (0, 1):
        of = [read_json(demo.KEPT / f"{run}.json")["results"]["rows"][row] for run in demo.PICTURED]
        assert ", ".join(demo.cell(entry["metrics"][demo.COLUMNS[0]]) for entry in of) in said


def test_what_is_kept_of_a_demo_says_where_its_runs_lay_by_paths_from_here(demo, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "KEPT", tmp_path / "kept")
    folder = tmp_path / "runs" / "demo"
    for name in demo.NAMES:
        write_json(folder / name / "results.json", {"rows": [], "origin": {"init_sha256": "5" * 64}})
        write_json(folder / name / "config.json", {"init": f"{folder}/rear"})
        lines = [{"step": 1, "train/loss": 1.0}, {"step": 1, "validation/cross_entropy": 2.0}]
        (folder / name / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    write_json(folder / "rear" / "reconstruction.json", {"psnr": 20.0})
    with pytest.raises(UserError, match=r"demo/demo\.json: .*; it is of no finished demo"):
        demo.keep(folder)
    assert not (tmp_path / "kept").exists(), "all or nothing"
    write_json(folder / "demo.json", {"steps": 3})
    demo.keep(folder)
    assert read_json(tmp_path / "kept" / "demo.json") == {"steps": 3, "reconstruction": {"psnr": 20.0}}
    kept = read_json(tmp_path / "kept" / "rear-vapi.json")
    assert kept["asked"]["config"] == {"init": "runs/demo/rear"} and kept["run"] == "../runs/demo/rear-vapi"
    assert kept["validations"] == [{"step": 1, "validation/cross_entropy": 2.0}] and kept["start_weights"] == "5" * 64


def test_the_section_on_diagnoses_is_of_its_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "claims"))
    module = script("claims/diagnosis.py")
    known = {name: read_json(ROOT / "claims" / "results" / "diagnosis" / f"{name}.json") for name in module.MODELS}
    assert f"<!-- diagnosis -->\n{module.page(known)}\n<!-- /diagnosis -->" in PAGE.read_text()
    asked = {}

    def diagnose(model, data, settings, parts):
        asked[model] = list(parts)
        return Diagnosis(
            model, {"noise": Finding("", {"cost": Interval(1 / 3, 0.0, 1.0)})}, {}, known["rear"]["provenance"]
        )

    monkeypatch.setattr(module, "diagnose", diagnose)
    for name, one in known.items():
        again = module.measured(name)
        assert again["command"] == one["command"] and again.keys() == one.keys()
        assert one["command"].split(" --parts ")[0].split(" --out ")[0] in str(diagnosed_by(one, name))
        assert again["numbers"] == {"noise": {"cost": {"value": 0.333333, "low": 0.0, "high": 1.0}}}
    assert asked == {model: list(parts) for model, _, parts in module.MODELS.values()}


def test_a_diagnosis_whose_model_is_missing_has_it_trained_or_says_who_makes_it(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "claims"))
    module, done = script("claims/diagnosis.py"), []
    (tmp_path / "claims").mkdir()
    study = yaml.safe_load((ROOT / "claims" / "photographs.yaml").read_text())
    study["rows"] = {row: study["rows"][row] for row in ("plain", "plain+vapi")}
    (tmp_path / "claims" / "photographs.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "HERE", tmp_path / "claims")
    monkeypatch.setattr(module, "prepare", lambda profile, sweep, out: done.append(profile))
    monkeypatch.setattr(module, "train_cell", lambda place, cell: done.append(cell.name))
    monkeypatch.setattr("sys.argv", ["diagnosis.py"])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert (
        capsys.readouterr().err
        == "runs/demo/plain-ar: not here; `make demo MINUTES=60` makes it, and `make results` its numbers\n"
        and not done
    )
    module.complete(["openmoji", "photographs-vapi"])
    assert done == ["cpu", "plain-0", "plain+vapi-0"]


@pytest.mark.parametrize("name", ["photographs", "text"])
def test_the_sections_of_studies_are_of_their_files(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "claims"))
    study, out = script("claims/photographs.py"), ROOT / "claims" / "results" / name
    sweep = read_sweep(ROOT / "claims" / f"{name}.yaml", out)
    results = study.results_of(sweep, out)
    section = script(f"claims/{name}.py").page(name, sweep, results, out)
    assert f"<!-- {name} -->\n{section}\n<!-- /{name} -->" in PAGE.read_text()
    assert all(section.count(f"- {note}\n") == 1 for note in notes_of(sweep, results)), "once in all"


def test_two_studies_that_write_at_once_both_have_their_section(monkeypatch, tmp_path):
    study, others = script("claims/photographs.py"), []
    monkeypatch.setattr(study, "HERE", tmp_path / "claims")
    (tmp_path / "docs").mkdir()
    (page := tmp_path / "docs" / "results.md").write_text("# Results\n")
    write = study.write_atomically

    def slow(path, put):
        if not others:
            others.append(Thread(target=study.write_section, args=("text", "T")))
            others[0].start()
            others[0].join(0.1)
        write(path, put)

    monkeypatch.setattr(study, "write_atomically", slow)
    study.write_section("photographs", "P")
    others[0].join(60)
    assert "<!-- photographs -->\nP\n" in page.read_text() and "<!-- text -->\nT\n" in page.read_text()
    assert [path.name for path in page.parent.iterdir()] == ["results.md"]


def test_the_section_on_vapi_is_of_its_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "claims"))
    module, asked = script("claims/vapi.py"), []
    monkeypatch.setattr(module.Study, "make", lambda study, run: asked.append(run))
    monkeypatch.setattr(module.Study, "match", lambda study, runs: asked.append("match"))
    monkeypatch.setattr(module.Study, "begin", lambda study: asked.append("start"))
    monkeypatch.setattr(
        module, "write_section", lambda name, text: asked.append(f"<!-- {name} -->\n{text}\n<!-- /{name} -->")
    )
    monkeypatch.setattr("sys.argv", ["vapi.py", "--page"])
    module.main()
    assert asked.pop() in PAGE.read_text() and not asked
    monkeypatch.setattr("sys.argv", ["vapi.py", "--methods", "ce,vapi"])
    module.main()
    made = [f"{name}-{seed}" for seed in range(3) for name in ("ce", "vapi")]
    assert asked[:-1] == [*made, "match"], "no start where nothing lacks"


@pytest.fixture
def emoji_study(monkeypatch, tmp_path):
    """The module and a study of two runs, all of whose weights are here; nothing is trained."""
    monkeypatch.syspath_prepend(str(ROOT / "claims"))
    module = script("claims/vapi.py")
    study = module.Study(tmp_path / "runs", tmp_path / "results", 80, 8)
    monkeypatch.setattr(module.Study, "train", lambda study, run: None)
    for run in ("start", "ce-0", "vapi-0"):
        weights = tmp_path / "runs" / run / "model" / "model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(run.encode())
    for run in ("start", "ce-0", "vapi-0"):
        config = module.to_dict(module.run_config(run, Path(), 80))
        hashes = {"weights_sha256": study.weights(run), "start_sha256": study.weights("start")}
        study.keep(run, {"settings": study.settings, "config": config, "minutes": 1, "frontier": [], **hashes})
    return module, study


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"settings": {"steps"', "vapi-2.json: not valid JSON"),
        ('{"settings": {}}', "vapi-2.json: not a result of this study"),
    ],
)
def test_a_damaged_result_of_the_emoji_study_is_one_line(emoji_study, monkeypatch, capsys, text, said):
    module, study = emoji_study
    (study.results / "vapi-2.json").write_text(text)
    monkeypatch.setattr("sys.argv", ["vapi.py", "--page", "--results", str(study.results), "--samples", "8"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_start_trained_to_other_weights_has_all_runs_made_anew(emoji_study, monkeypatch, capsys):
    (module, study), made = emoji_study, []
    monkeypatch.setattr(module.Study, "make", lambda study, run: made.append((run, study.result(run))))
    study.keep("ce-1", {**study.result("ce-0"), "start_sha256": "another"})
    study.keep("ce-2", {**study.result("ce-0"), "config": module.to_dict(module.run_config("vapi-2", Path(), 80))})
    assert study.result("ce-0") is not None and study.result("ce-1") is None, "of one start"
    assert study.result("ce-2") is None, "of this configuration"
    study.begin()
    assert made.pop()[1] is not None and not capsys.readouterr().out
    (study.out / "start" / "model" / "model.safetensors").write_bytes(b"other")
    study.begin()
    assert made == [("start", None)] and study.result("ce-0") is None
    assert "all is made anew" in capsys.readouterr().out


def test_the_start_is_measured_anew_at_the_entropy_of_a_run_that_was(emoji_study, monkeypatch, capsys):
    (module, study), asked = emoji_study, []

    def measure(study, run, *, temperatures, match):
        asked.append([path.name for path in match])
        return [{"matched_to": path.name, "matched_sha256": study.weights(path.name)} for path in match]

    monkeypatch.setattr(module.Study, "measure", measure)
    for _ in range(2):
        study.match(["vapi-0"])
    assert asked == [["vapi-0"]], "once"
    (study.out / "vapi-0" / "model" / "model.safetensors").write_bytes(b"anew")
    study.keep("vapi-0", {**study.result("vapi-0"), "weights_sha256": study.weights("vapi-0")})
    study.match(["vapi-0"])
    assert asked == [["vapi-0"]] * 2 and len(study.result("start")["frontier"]) == 1
    study.keep("vapi-0", {**study.result("vapi-0"), "weights_sha256": "elsewhere"})
    study.match(["vapi-0"])
    assert len(asked) == 2 and study.result("start")["frontier"] == [] and "vapi-0" in capsys.readouterr().out
