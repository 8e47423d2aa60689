"""Sweeps: files to cells, cells to results that survive, results to tables."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Quarters, picture, save_pictures
from scipy import stats

from consonar import cli, networks
from consonar.components import save_generator, weights_sha256
from consonar.config_io import to_dict
from consonar.data.store_format import METADATA_FILE, TOKENS_FILE
from consonar.errors import NonFiniteLoss, UserError
from consonar.files.lock import hold
from consonar.metrics.shares import T_95
from consonar.networks import load_feature_network
from consonar.origin import Origin
from consonar.report.records import told_once
from consonar.sweeps import inputs, work
from consonar.sweeps.contents import Contents, known_to_both, reference_content, store_made_of
from consonar.sweeps.page import markdown, page, write_summary
from consonar.sweeps.plan import comparable
from consonar.sweeps.rows import read_sweep
from consonar.sweeps.summary import ONE_START, Difference, judge, paired, summarise
from consonar.sweeps.work import run_sweep, states

QUIET = {
    "loop.batch_size": 8, "loop.log_every": 1, "loop.precision": "fp32", "loop.device": "cpu", "loop.save_every": 1,
    "loop.validate_every": 0, "loop.sample_every": 0, "optim.warmup_steps": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def surroundings(quarters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def classes(tmp_path_factory) -> Path:
    """Pictures of the classes of the stores."""
    return save_pictures(tmp_path_factory.mktemp("classes"))


@pytest.fixture
def table(stores, tokenizer_folder, classes):
    """Plain AR and reAR of a toy, and the first post-trained: 3 rows."""
    train, validation = stores
    tiny = {"kind": "rear", "width": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0}
    toy = {"model": tiny, "tokenizer": str(tokenizer_folder), "data.tokens": str(train),
           "data.validation_tokens": str(validation)}  # fmt: skip
    return {
        "seeds": 2,
        "options": {**QUIET, "loop.steps": 2},
        "rows": {
            "plain": {"base": "ar-openmoji", "match": ["ce"], **toy},
            "ce": {"base": "ce-openmoji", "init": {"cell": "plain"}, "data.images": str(classes),
                   "objective.rewards": {"mse": 1.0}},
            "rear": {"base": "ar-openmoji", "objective.noise.schedule": "linear", **toy},
        },
        "evaluate": {
            "reference": str(classes), "feature_network": "quarters", "temperatures": [1], "draws": 2,
            "num_samples": 12, "reconstruct": False,
        },
    }  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(table) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(table, sort_keys=False))
        return path

    return write


def scores(results):
    """What must not depend on where, when and in how many parts the cells were done."""
    rows = {
        name: [(row["temperature"], row.get("matched_to"), row["metrics"]) for row in one["results"]["rows"]]
        for name, one in results.items()
    }
    keys = ("config_sha256", "validation", "weights", "start_weights", "steps", "failure")
    return {name: ({key: one[key] for key in keys}, rows[name]) for name, one in results.items()}


def test_a_sweep_is_done_once_and_goes_on_where_it_was_killed(table, write, tmp_path, monkeypatch, capsys):
    del table["rows"]["rear"]
    table["rows"]["plain"]["seeds"] = 1
    table["rows"]["ce"]["init"]["seed"] = 0
    out, again = tmp_path / "out", tmp_path / "again"
    sweep = read_sweep(write(table), out)
    assert list(sweep.cells) == ["plain-0", "ce-0", "ce-1"]
    whole = run_sweep(sweep, out, lambda text: None)
    assert sorted(path.stem for path in (out / "results").iterdir()) == sorted(sweep.cells)
    assert not (out / ".working").exists()
    assert whole["ce-1"]["start_weights"] == whole["plain-0"]["weights"] != whole["ce-0"]["weights"]
    assert [row.get("matched_to") for row in whole["plain-0"]["results"]["rows"]] == [None, "ce-0", "ce-1"]
    assert [whole[f"ce-{seed}"]["results"]["rows"][0]["seed"] for seed in (0, 1)] == [0, 10**6]

    # Killed in the middle of a run: its last checkpoint is gone on with, to the same numbers.
    killed = read_sweep(write(table), again, 1)
    trained, real = [], work.train

    def kill(config, run, **options):
        trained.append((run.name, options["resume"]))
        if len(trained) == 2:  # ce-0, which plain-0 is measured at the entropy of
            real(config, run, stop_at=1, **options)
            raise KeyboardInterrupt
        return real(config, run, **options)

    monkeypatch.setattr(work, "train", kill)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(killed, again, lambda text: None)
    assert not (again / "results").exists()
    command = ["sweep", str(tmp_path / "study.yaml"), "--out", str(again), "--seeds", "1"]
    cli.main([*command, "--dry-run"])
    said = capsys.readouterr().out.splitlines()
    assert said == ["plain-0: trained, not measured", "ce-0: step 1 of 2", "2 begun"]
    resumed = run_sweep(killed, again, lambda text: None)
    assert trained == [("plain-0", False), ("ce-0", False), ("ce-0", True)]
    assert scores(resumed)["ce-0"] == scores(whole)["ce-0"]
    assert scores(resumed)["plain-0"][1] == scores(whole)["plain-0"][1][:2]  # not yet at the entropy of ce-1
    with monkeypatch.context() as patched, pytest.raises(TypeError):  # with one seed more it is measured again
        patched.setattr(work, "do_cell", None)
        run_sweep(read_sweep(tmp_path / "study.yaml", again), again, lambda text: None)

    # Results alone are enough on another machine: of what is there nothing is trained or measured.
    monkeypatch.setattr(work, "do_cell", None)
    (tmp_path / "elsewhere").mkdir()
    (out / "results").rename(tmp_path / "elsewhere" / "results")
    cli.main(["sweep", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "elsewhere")])
    text, page = ((tmp_path / "elsewhere" / name).read_text() for name in ("sweep.md", "sweep.html"))
    for row in ("plain (n\u00a01)", "ce (n\u00a02)", "ce − plain at the entropy of ce"):
        assert f"| {row} |" in text and row in page
    assert "(n\u00a02)" in text and page.count('<svg class="chart"') == 3 and "<script" not in page


@pytest.mark.parametrize("killed", [False, True])
def test_a_start_is_trained_again_where_only_its_result_is_known(table, write, tmp_path, killed):
    """`killed`: a process was, while it did that; another post-training of the start has its result."""
    table["rows"] = {name: table["rows"][name] for name in ("plain", "ce")}
    if killed:
        table["rows"]["another"] = table["rows"]["ce"]
    table["rows"]["plain"] |= {"match": []}
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    first = run_sweep(read_sweep(write(table), out, 1), out, lambda text: None)
    elsewhere.mkdir()
    (out / "results").rename(elsewhere / "results")
    (elsewhere / "results" / "ce-0.json").unlink()
    if killed:
        without = shutil.ignore_patterns("model")
        shutil.copytree(out / "runs" / "plain-0", elsewhere / "runs" / "plain-0", ignore=without)
    said: list[str] = []
    sweep = read_sweep(write(table), elsewhere, 1)
    results = run_sweep(sweep, elsewhere, said.append)
    told = "goes on to step 2" if killed else "trains for 2 steps"
    assert f"plain-0: {told}" in said and not any("plain-0: 12 samples" in line for line in said)
    assert scores(results) == scores(first) and not any(
        "trained again" in note for note in summarise(sweep, results).notes
    )
    results["ce-0"]["start_weights"] = "others"
    assert any("ce-0 started from plain-0 trained again" in note for note in summarise(sweep, results).notes)


def test_what_differs_from_a_result_or_a_run_is_told_before_any_work(table, write, tmp_path, monkeypatch):
    table["rows"] = {"plain": table["rows"]["plain"] | {"match": []}}
    table["seeds"], out = 1, tmp_path / "out"
    run_sweep(read_sweep(write(table), out), out, lambda text: None)
    monkeypatch.setattr(work, "do_cell", None)
    for change, words in (
        ({"options": table["options"] | {"optim.lr": 0.5}}, "optim.lr is 0.001 there and 0.5 here"),
        ({"evaluate": table["evaluate"] | {"num_samples": 13}}, "evaluate.num_samples is 12 there and 13 here"),
    ):
        with pytest.raises(UserError, match=words):
            run_sweep(read_sweep(write(table | change), out), out, lambda text: None)
    run_sweep(read_sweep(write(table | {"options": table["options"] | {"loop.accumulation": 2}}), out), out, str)
    (out / "results" / "plain-0.json").unlink()
    with pytest.raises(UserError, match=r"runs/plain-0: optim.lr is 0.001 there and 0.5 here"):
        run_sweep(read_sweep(write(table | {"options": table["options"] | {"optim.lr": 0.5}}), out), out, str)


def test_a_trained_run_is_not_measured_as_one_of_another_start_or_of_other_data(table, write, tmp_path, monkeypatch):
    """After its result was removed, as the message about a changed start advises."""
    del table["rows"]["rear"], table["rows"]["plain"]["match"]
    out = tmp_path / "out"
    for cell in read_sweep(write(table), out).cells.values():
        (run := out / "runs" / cell.name).mkdir(parents=True)
        begun = replace(cell.config, init=str(Path(cell.config.init).resolve()), tokenizer="t") if cell.start else None
        (run / "config.json").write_text(json.dumps(to_dict(begun or cell.config)))
        (run / "origin.json").write_text(json.dumps({"init_sha256": "1", "data_sha256": "2"}))
    monkeypatch.setattr(work.Place, "is_trained", lambda place, cell: True)

    def check(row, **change):
        rows = table["rows"] | {row: table["rows"][row] | change}
        work.check_begun(work.Place(out, read_sweep(write(table | {"rows": rows}), out), print))

    check("ce")
    for row, change, words in (
        ("ce", {"init": {"cell": "plain", "seed": 0}}, "runs/ce-1: init is 'plain-1' there and 'plain-0' here"),
        ("ce", {"init": str(out / "runs" / "plain-1")}, "runs/ce-0: init is .*plain-0' there and .*plain-1' here"),
        ("ce", {"data.images": "openmoji"}, "runs/ce-0: data.images is .*' there and 'openmoji' here"),
        ("plain", {"data.tokens": "tokens"}, "runs/plain-0: data.tokens is .*' there and 'tokens' here"),
    ):
        with pytest.raises(UserError, match=words):
            check(row, **change)


def test_results_and_runs_of_files_that_were_made_anew_in_their_place_are_refused(
    table, write, tmp_path, stores, classes, monkeypatch
):
    for name, origin in (("train", stores[0]), ("validation", stores[1]), ("classes", classes)):
        shutil.copytree(origin, tmp_path / name)
    told = json.loads((tmp_path / "train" / METADATA_FILE).read_text()) | {"source_sha256": "pictures"}
    (tmp_path / "train" / METADATA_FILE).write_text(json.dumps(told))
    table["seeds"], out = 1, tmp_path / "out"
    table["rows"] = {name: table["rows"][name] for name in ("plain", "ce")}
    table["rows"]["plain"] |= {"data.tokens": "train", "data.validation_tokens": "validation", "match": []}
    table["rows"]["ce"]["data.images"] = table["evaluate"]["reference"] = "classes"
    sweep = read_sweep(write(table), out)
    results = run_sweep(sweep, out, lambda text: None)
    assert {"tokenizer", "data.tokens", "data.validation_tokens"} < results["plain-0"]["contents"].keys()
    assert {"tokenizer", "data.images", "evaluate.reference"} < results["ce-0"]["contents"].keys()
    monkeypatch.setattr(work, "do_cell", None)

    def refused(words):
        for ask in (lambda: run_sweep(sweep, out, str), lambda: states(sweep, out)):
            with pytest.raises(UserError, match=words):
                ask()

    run_sweep(sweep, out, str)  # as it was
    (tmp_path / "train").rename(tmp_path / "kept")
    run_sweep(sweep, out, str)  # not here: unknown
    (tmp_path / "train").mkdir()
    refused("no token store at 'train'")
    (tmp_path / "train").rmdir()
    shutil.copytree(tmp_path / "kept", tmp_path / "train")
    (tmp_path / "train" / TOKENS_FILE).write_bytes(b"cut")
    refused("'train'.* not a token store, damaged or cut short")
    shutil.copyfile(tmp_path / "kept" / TOKENS_FILE, tmp_path / "train" / TOKENS_FILE)
    rounded = told | {"content_sha256": "of a processor that decides near ties otherwise"}
    (tmp_path / "train" / METADATA_FILE).write_text(json.dumps(rounded))
    run_sweep(sweep, out, str)  # tokens of the same pictures
    (tmp_path / "train" / METADATA_FILE).write_text(json.dumps(rounded | {"views": "others"}))
    refused("the content of data.tokens is '.{12}' there and 'of a process' here; remove it")
    shutil.rmtree(tmp_path / "train")
    shutil.copytree(tmp_path / "validation", tmp_path / "train")
    refused("results/plain-0.json: the content of data.tokens is '.{12}' there and '.{12}' here; remove it")
    (out / "results" / "plain-0.json").unlink()
    refused("runs/plain-0: the content of data.tokens is")
    shutil.rmtree(tmp_path / "train")
    shutil.rmtree(out / "runs" / "plain-0")
    (tmp_path / "kept").rename(tmp_path / "train")
    picture(500).save(tmp_path / "classes" / "train" / "a" / "000.png")
    refused("results/ce-0.json: the content of (data.images|evaluate.reference) is")
    (tmp_path / "classes").rename(tmp_path / "elsewhere")
    assert states(sweep, out)["ce-0"] == "done"
    (tmp_path / "elsewhere").rename(tmp_path / "classes")
    older = json.loads((out / "results" / "ce-0.json").read_text())
    del older["contents"], older["results"]["origin"]
    (out / "results" / "ce-0.json").write_text(json.dumps(older))
    assert states(sweep, out)["ce-0"] == "done"


def test_a_sweep_without_validation_tokens_ends_and_is_called_again(table, write, tmp_path):
    table["seeds"] = 1
    table["rows"] = {"plain": table["rows"]["plain"] | {"data.validation_tokens": "", "match": []}}
    sweep = read_sweep(write(table), tmp_path / "out")
    results = run_sweep(sweep, tmp_path / "out", lambda text: None)
    assert "data.validation_tokens" not in results["plain-0"]["contents"]
    assert run_sweep(sweep, tmp_path / "out", lambda text: None) == results


def test_only_what_is_not_here_is_not_compared(tiny_generator, tmp_path):
    save_generator(tiny_generator(), tmp_path / "model", Origin())
    reads = {
        "evaluate.feature_network": lambda place: load_feature_network(f"inception:{place}").weights_sha256,
        "evaluate.reference": lambda place: reference_content(f"{place}.npz", None, lambda: 8),
        "init": weights_sha256,
    }
    for key, read in reads.items():
        assert Contents().once((key, ()), lambda read=read: read("gone")) is None
    for name in ("weights", "statistics.npz"):
        (tmp_path / name).write_bytes(b"cut")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert len(Contents().once(("evaluate.reference", ()), lambda: reads["evaluate.reference"]("statistics"))) == 64
    for key, place in (("evaluate.feature_network", "weights"), ("init", "model")):
        with pytest.raises(UserError, match=place):
            Contents().once((key, ()), lambda read=reads[key], place=place: read(place))


def test_a_result_of_an_older_version_has_the_defaults_of_newer_options(table, write, tmp_path):
    cell = read_sweep(write(table), tmp_path).cells["ce-0"]
    asked = json.loads(json.dumps(cell.asked()))
    del (
        asked["config"]["loop"]["compile"],
        asked["start"]["config"]["loop"]["ema_decay"],
        asked["evaluate"]["num_neighbours"],
    )
    assert comparable(asked, "file") == comparable(cell.asked(), "here")
    asked["start"]["config"]["optim"]["lr"] = 0.5
    assert comparable(asked, "file")["start.optim.lr"] == 0.5


def test_a_loss_that_is_not_finite_is_a_result_and_the_others_go_on(table, write, tmp_path, monkeypatch):
    table["seeds"], out, real = 1, tmp_path / "out", work.train

    def diverges(config, run, **options):
        if run.name == "ce-0":
            raise NonFiniteLoss("the loss is not finite at step 1")
        return real(config, run, **options)

    monkeypatch.setattr(work, "train", diverges)
    table["rows"]["rear"] = table["rows"]["ce"] | {"init": {"cell": "ce"}}
    sweep = read_sweep(write(table), out)
    results = run_sweep(sweep, out, lambda text: None)
    failure = "the loss is not finite at step 1"
    assert {name: one["failure"] for name, one in results.items()} == {
        "plain-0": None,
        "ce-0": failure,
        "rear-0": failure,
    }
    assert (results["plain-0"]["matched"], results["plain-0"]["not_matched"]) == ([], ["ce-0"])
    assert states(sweep, out)["plain-0"] == "done", "once"
    assert f"ce-0 failed: {failure}." in summarise(sweep, results).notes and states(sweep, out)["ce-0"] == "failed"
    write_summary(sweep, results, out)
    assert failure in (out / "sweep.html").read_text()


def work_alone(path, out, said):
    networks.FEATURE_NETWORKS["quarters"] = lambda device: Quarters()
    run_sweep(read_sweep(path, out), out, said.put)


def test_two_processes_share_a_sweep(table, write, tmp_path):
    table["rows"] = {"a": table["rows"]["rear"], "b": table["rows"]["rear"] | {"objective.noise.schedule": "uniform"}}
    table["seeds"] = 1
    path, out = write(table), tmp_path / "out"
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    processes = [context.Process(target=work_alone, args=(path, out, said)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    lines = []
    while not said.empty():
        lines.append(said.get())
    trained = [line for line in lines if "trains for" in line]
    assert len(trained) == 2 == len(set(trained)) and not any("goes on with" in line for line in lines)
    assert len(list((out / "results").iterdir())) == 2


def test_a_cell_that_another_process_holds_comes_last(table, write, tmp_path, monkeypatch):
    table["rows"] = {"a": table["rows"]["rear"], "b": table["rows"]["rear"]}
    table["seeds"], out = 1, tmp_path / "out"
    sweep, done = read_sweep(write(table), out), []

    def note(place, cell, needed):
        done.append(cell.name)
        work.write_json(place.result(cell), {"asked": cell.asked(), "row": cell.row, "seed": 0, "matched": []})

    monkeypatch.setattr(work, "do_cell", note)
    other = hold(out / ".working" / "a-0")
    other.__enter__()
    run_sweep(sweep, out, lambda text: text.startswith("waiting: ") and other.__exit__(None, None, None))
    assert done == ["b-0", "a-0"]


WRONG = {
    "rows: {}": (lambda table: table | {"rows": {}}, "rows: none are given, and no grid"),
    "unknown key": (lambda table: table | {"axes": {}}, r"axes: unknown 'axes'.*choices: base, seeds"),
    "unknown option": (
        lambda table: table | {"options": {"loop.stepz": 1}}, r"rows.plain: loop.stepz: unknown 'stepz' \(did you mean",
    ),
    "unknown section": (lambda table: table | {"options": {"lop.steps": 1}}, "lop: unknown .lop. .*did you mean"),
    "wrong value": (lambda table: table | {"options": {"loop.steps": "many"}}, "loop.steps: .*got 'many'"),
    "recipe": (lambda table: table | {"rows": {"a": {"base": "rear-openmojis"}}}, "rows.a: base: unknown .*did you"),
    "no recipe": (lambda table: table | {"rows": {"a": {}}}, "rows.a: base: no recipe is named"),
    "seed": (lambda table: table | {"options": {"seed": 3}}, "seed: 3; a sweep sets the seed"),
    "seeds": (lambda table: table | {"seeds": 0}, "seeds: 0"),
    "a list of seeds": (lambda table: table | {"seeds": [0, 0]}, r"seeds: \[0, 0\] is not a number of seeds"),
    "start": (
        lambda table: table | {"rows": table["rows"] | {"ce": {"base": "ce-openmoji", "init": {"cell": "plan"}}}},
        "rows.ce: init.cell: unknown 'plan' .*did you mean 'plain'",
    ),
    "start's seed": (
        lambda table: table | {"rows": table["rows"] | {"ce": {"init": {"cell": "plain", "seed": 2}}}},
        "rows.ce: init.seed: 'plain' has the seeds 0 to 1, not 2",
    ),
    "no start": (
        lambda table: table | {"rows": {"ce": {"base": "ce-openmoji"}}}, "rows.ce: init: 'ce-openmoji' starts",
    ),
    "ring": (
        lambda table: {"rows": {"a": {"base": "ce-openmoji", "init": {"cell": "a"}}}, "evaluate": {"reference": "x"}},
        "rows.a: init: starts from itself",
    ),
    "match": (
        lambda table: table | {"rows": table["rows"] | {"rear": table["rows"]["rear"] | {"match": ["ce"]}}},
        "rows.rear.match: no cell of 'ce' starts from rear-0",
    ),
    "tokenizer": (
        lambda table: table | {"options": {}, "rows": {"a": {"base": "tokenizer-openmoji-64"}}}, "trains a tokenizer",
    ),
    "compare_with": (lambda table: table | {"compare_with": "plan"}, "compare_with: unknown 'plan'"),
    "reference": (lambda table: table | {"evaluate": {}}, "evaluate.reference: expected a name or path, got ''"),
    "evaluate": (
        lambda table: table | {"evaluate": {"reference": "x", "temperature": 1}}, "evaluate.temperature: unknown",
    ),
    "evaluate of a row": (
        lambda table: table | {"rows": table["rows"] | {"rear": table["rows"]["rear"] | {"evaluate": {"draw": 3}}}},
        "rows.rear: evaluate.draw: unknown",
    ),
    "evaluate of a row, a number": (
        lambda table: table | {"rows": table["rows"] | {"rear": table["rows"]["rear"] | {"evaluate": 3}}},
        "rows.rear: evaluate: expected a table, got 3",
    ),
    "a temperature that is not drawn": (
        lambda table: table | {"evaluate": table["evaluate"] | {"sampler": {"temperature": 0.5}}},
        r"study.yaml: evaluate: sampler.temperature: 0.5 is none of temperatures \[1.0\], at which rows are drawn",
    ),
    "guidance that is not drawn": (
        lambda table: table | {"rows": table["rows"] | {"rear": table["rows"]["rear"] | {
            "evaluate": {"sampler": {"guidance_scale": 3}, "guidance_scales": [1, 2]}}}},
        r"rows.rear: evaluate: sampler.guidance_scale: 3.0 is none of guidance_scales \[1.0, 2.0\]",
    ),
    "a device": (lambda table: table | {"evaluate": {"reference": "x", "device": "cpu"}}, "evaluate.device: unknown"),
    "grid": (lambda table: table | {"grid": {"loop.steps": 3}}, "grid: no key has a list of values"),
    "alike": (
        lambda table: table | {"rows": {**table["rows"], "Plain": {}}}, "differs from .* in upper case only",
    ),
    "a path": (lambda table: table | {"rows": {"../a": {}}}, "rows.../a: names are of letters"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_line_before_any_work(table, write, tmp_path, capsys, case):
    change, words = WRONG[case]
    with pytest.raises(UserError, match=words):
        read_sweep(write(change(table)), tmp_path / "out")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["sweep", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_told_before_any_work(table, write, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(work, "do_cell", None)
    lost = {"data.tokens": "nowhere"}
    for change, words in (
        ({"rows": {"a": table["rows"]["rear"] | lost}}, "data.tokens: no token store at nowhere"),
        ({"evaluate": table["evaluate"] | {"reference": "gone.npz"}}, "evaluate.reference: gone.npz: cannot be read"),
        ({"evaluate": table["evaluate"] | {"feature_network": "fourths"}}, "evaluate.feature_network: unknown 'four"),
    ):
        path = write(table | change)
        with pytest.raises(UserError, match=f"^{path}: {words}"):
            run_sweep(read_sweep(path, tmp_path / "out"), tmp_path / "out", lambda text: None)
        with pytest.raises(SystemExit, match="2"):
            cli.main(["sweep", str(path), "--out", str(tmp_path / "out"), "--dry-run"])
        found = capsys.readouterr()
        assert " to do" in found.out and words in found.err


def test_the_reference_is_split_as_the_file_says(table, write, tmp_path, monkeypatch):
    table["evaluate"]["validation_split"], asked = "25%", []
    cells = list(read_sweep(write(table), tmp_path).cells.values())

    def opened(reference, size, **options):
        asked.append(options.get("validation_split"))
        raise UserError("asked")

    monkeypatch.setattr(work, "open_reference", opened)
    monkeypatch.setattr(inputs, "open_reference", opened)
    for ask in (
        lambda: inputs.check_inputs(cells, "study.yaml"),
        lambda: work.target_of(work.Place(tmp_path, None, print), cells[0], torch.device("cpu")),
    ):
        with pytest.raises(UserError, match="asked"):
            ask()
    assert asked == ["25%", "25%"]


def test_a_grid_is_every_combination_of_its_lists(table, write, tmp_path):
    rear = {key: value for key, value in table["rows"]["rear"].items() if key != "objective.noise.schedule"}
    table["grid"] = {**rear, "objective.noise.schedule": ["linear", "uniform"], "optim.lr": [0.1, 0.2]}
    sweep = read_sweep(write(table), tmp_path, 1)
    assert sweep.rows[3:] == tuple(f"schedule={s}+lr={lr}" for s in ("linear", "uniform") for lr in (0.1, 0.2))
    config = sweep.cells["schedule=uniform+lr=0.1-0"].config
    assert (config.objective.noise.schedule, config.optim.lr, config.loop.steps) == ("uniform", 0.1, 2)
    table["grid"] = {
        "base": ["ce-openmoji", "ste-openmoji"], "init": [{"cell": "plain", "seed": 0}, {"cell": "rear"}],
        "data.images": "x", "objective.rewards": {"mse": 1.0},
    }  # fmt: skip
    cells = read_sweep(write(table), tmp_path).cells
    assert (
        cells["ste-openmoji+plain-1"].start is cells["plain-0"] and cells["ce-openmoji+rear-1"].start is cells["rear-1"]
    )


def test_tables_of_options_are_joined_with_those_of_a_row_key_by_key(tmp_path, write):
    made = read_sweep(write({
        "base": "rear-openmoji",
        "options": {"data.tokens": "x", "loop.steps": 1, "loop": {"steps": 111, "validate_every": 37},
                    "evaluate": {"num_samples": 64, "draws": 2}},
        "rows": {"a": {}, "b": {"loop": {"batch_size": 16}}, "c": {"loop.steps": 9},
                 "d": {"evaluate": {"temperatures": [1, 0.5], "draws": 1}}},
        "grid": {"loop": [{"batch_size": 8}, {"steps": 7}]},
        "evaluate": {"reference": "openmoji-64", "num_samples": 32},
    }), tmp_path).cells.values()  # fmt: skip
    loops = {cell.row: (cell.config.loop.steps, cell.config.loop.validate_every) for cell in made}
    assert loops == dict.fromkeys(["a", "b", "d", "loop=batch_size=8"], (111, 37)) | {
        "c": (9, 37),
        "loop=steps=7": (7, 37),
    }
    assert {cell.row: cell.config.loop.batch_size for cell in made}["b"] == 16
    settings = {cell.row: cell.evaluated.settings for cell in made}
    assert {row: (one.num_samples, one.draws) for row, one in settings.items()} == dict.fromkeys(loops, (64, 2)) | {
        "d": (64, 1)
    }
    assert list(settings["d"].temperatures) == [1, 0.5]


def test_differences_are_taken_seed_by_seed():
    a, b = {0: 3.0, 1: 5.0, 2: 4.0, 7: 9.0}, {0: 1.0, 1: 2.0, 2: 3.0}
    found = paired(a, b)
    reference = stats.ttest_rel([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    assert found == Difference(pytest.approx(2.0), pytest.approx(2.0 / reference.statistic), 3)
    assert paired({0: 1.0}, {1: 1.0}) is None and paired({0: 1.0}, {0: 3.0}) == Difference(-2.0, None, 1)
    for count, quantile in enumerate(T_95, start=1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, count), abs=5e-4)


def test_a_run_is_compared_with_the_very_run_that_it_started_from(table, write, tmp_path):
    rows, start = table["rows"], {"cell": "plain", "seed": 0}
    rows |= {
        "ste": rows["ce"] | {"base": "ste-openmoji", "init": {"cell": "ce"}},
        "far": rows["ce"] | {"init": {"cell": "ce", "seed": 1}},
        "ce": rows["ce"] | {"init": start, "seeds": 3},
    }
    values = {"plain": (10, 99), "ce": (11, 13, 18), "rear": (40, 70), "ste": (2, 5), "far": (1, 7)}
    expected = {
        "plain": {"ce": [1, 3, 8], "rear": [30, -29], "ste": [-8, -5], "far": [-9, -3]},
        "ce": {"plain": [-1, -3, -8], "rear": [29], "ste": [-9, -8], "far": [-12, -6]},
    }
    of_one = {("plain", "ce"), ("plain", "ste"), ("plain", "far"), ("ce", "plain"), ("ce", "far")}
    for base, differences in expected.items():
        sweep = read_sweep(write(table | {"compare_with": base}), tmp_path)
        summary = summarise(sweep, {n: scored(c, {1.0: values[c.row][c.seed]}) for n, c in sweep.cells.items()})
        found = {row: summary.settings[0].differences(row).get("FD(q) validation") for row in differences}
        assert found == {
            row: replace(paired(dict(enumerate(of)), dict.fromkeys(range(3), 0)), one_start=(base, row) in of_one)
            for row, of in differences.items()
        }
        verdicts = {row: found[0].word for row, found in summary.verdicts()[1].items()}
        assert {(base, row) for row, word in verdicts.items() if word == ONE_START} == {
            pair for pair in of_one if pair[0] == base
        }


@pytest.mark.parametrize(("value", "direction", "word"), [
    (4.30, -1, "no difference"), (4.31, -1, "behind"), (-4.31, -1, "ahead"), (4.31, 1, "ahead"),
])  # fmt: skip
def test_ahead_is_beyond_the_quantile_of_student(value, direction, word):
    assert judge(Difference(value, 1.0, 3), direction).word == word
    assert judge(Difference(value, None, 1), direction).word == "open" and judge(None, direction).word == "–"


def scored(cell, values):
    rows = [
        {"temperature": t, "metrics": {"FD(q) validation": {"value": v, "spread": None}}} for t, v in values.items()
    ]
    results = {"rows": rows, "checkpoint_sha256": "0", "machine": "m", "reference": {}, "remarks": []}
    asked = {"evaluate": {"temperatures": list(values)}}
    validation = {"validation/cross_entropy": 1.0 + cell.seed}
    return {"failure": None, "asked": asked, "validation": validation, "results": results,
            "stopped": None, "weights": "w", "start_weights": "w", "versions": {"torch": "2"}}  # fmt: skip


def test_the_best_temperature_is_one_for_all_seeds_of_a_row(table, write, tmp_path):
    del table["rows"]["plain"]["match"]
    sweep = read_sweep(write(table), tmp_path)
    numbers = {
        "plain": [{1.0: 9.0, 0.5: 5.0}, {1.0: 4.0, 0.5: 6.0}],
        "rear": [{1.0: 3.0, 0.5: 4.0}, {1.0: 1.0, 0.5: 3.0}],
    }
    results = {
        name: scored(cell, numbers.get(cell.row, numbers["plain"])[cell.seed]) for name, cell in sweep.cells.items()
    }
    summary = summarise(sweep, results)
    best = next(setting for setting in summary.settings if setting.notes)
    assert best.notes == {"plain": "temperature 0.5", "ce": "temperature 0.5", "rear": "temperature 1"}
    assert best.values["plain"]["FD(q) validation"] == {0: 5.0, 1: 6.0}
    assert best.differences("rear")["FD(q) validation"].value == -3.5
    titles, verdicts = summary.verdicts()
    assert titles == ["each at its own best temperature", "at temperature 1", "at temperature 0.5"]
    assert [one.word for one in verdicts["rear"]] == ["no difference"] * 3 and "plain" not in verdicts
    changed = replace(sweep, compare_with="rear")
    assert summarise(changed, results).settings[0].differences("plain")["FD(q) validation"].value == 4.5


def test_numbers_of_two_protocols_are_told_apart_and_not_compared(table, write, tmp_path):
    """Of rows against ADM's file and against a folder, whose distance has one name."""
    del table["rows"]["plain"]["match"]
    sweep = read_sweep(write(table), tmp_path)
    results = {name: scored(cell, {1.0: 5.0, 0.5: 4.0}) for name, cell in sweep.cells.items()}
    for name, one in results.items():
        one["results"] |= {"reference": {"name": "adm.npz", "statistics_sha256": "a"}, "protocol": "against adm.npz"}
        one |= {"config_sha256": "0"}
        one["asked"]["config"] = to_dict(sweep.cells[name].config)
        if name == "rear-1":  # which has moved
            one["results"] |= {"reference": {"name": "b", "statistics_sha256": "a"}, "protocol": "against b"}
    same = markdown(summarise(sweep, results))
    assert same.count("Protocol: against adm.npz.") == 4 and "protocol 1" not in same and "| rear − plain |" in same
    for seed in (0, 1):
        results[f"rear-{seed}"]["results"] |= {"reference": {"name": "val", "reference_sha256": "b"}}
        results[f"rear-{seed}"]["results"]["protocol"] = "against val"
    summary = summarise(sweep, results)
    text, (titles, verdicts) = markdown(summary), summary.verdicts()
    assert text.count("Protocol 1: against adm.npz.") == text.count("Protocol 2: against val.") == 4
    assert "| rear (temperature 0.5; protocol 2) |" in text and "| ce (protocol 1) |" in text
    assert "rear" not in verdicts and "ce" in verdicts and len(titles) == 3
    assert text.count("| rear − plain |") == 1, "of training alone"
    legends = page(summary, results)
    assert (legends.count(", protocol 1<"), legends.count(", protocol 2<")) == (2, 1), "beside the charts"
    for cell in sweep.cells.values():  # one protocol by its words, of two files of weights
        network = {"name": "n", "sha256": ("c" if cell.row == "rear" else "d") * 64, "place": str(cell.seed)}
        results[cell.name]["results"] |= {"reference": {}, "protocol": "of n", "feature_network": network}
    summary = summarise(sweep, results)
    assert summary.protocols.lines == [f"Protocol {at}: of n (n {of * 12})." for at, of in ((1, "d"), (2, "c"))]
    assert "rear" not in summary.verdicts()[1]


def test_seeds_of_two_protocols_are_not_paired(table, write, tmp_path):
    """Where both rows have both protocols, but not at the same seeds; other settings of measuring are another one."""
    del table["rows"]["plain"]["match"]
    sweep = read_sweep(write(table | {"seeds": 3}), tmp_path)
    results = {name: scored(cell, {1.0: 5.0 + cell.seed}) for name, cell in sweep.cells.items()}
    for name in ("plain-0", "rear-1"):
        results[name]["results"] |= {"protocol": "p", "config": {"copy_quantile": 0.05, "draws": 4}}
    summary = summarise(sweep, results)
    (at_one,) = (setting for setting in summary.settings if setting.temperature == 1)
    assert at_one.pairs["rear"] == [(2, 2)] and at_one.differences("rear")["FD(q) validation"].count == 1
    assert at_one.notes["rear"] == "protocol 1 and 2" and at_one.notes["ce"] == "protocol 2"
    assert "Protocol 1: p; copy_quantile 0.05." in summary.protocols.lines


def test_training_is_compared_on_the_same_held_out_data_alone(table, write, tmp_path):
    del table["rows"]["plain"]["match"]
    sweep = read_sweep(write(table), tmp_path)
    results = {name: scored(cell, {1.0: 5.0}) for name, cell in sweep.cells.items()}
    for name, one in results.items():
        data = {"validation_tokens": "tokens", "validation_items": 500 if name.startswith("ce") else 1000}
        if name.startswith("rear"):  # left open: what lies beside
            data |= {"validation_tokens": None, "tokens": "a,b"}
        one["asked"]["config"] = {"data": data}
    text = markdown(summarise(sweep, results)).partition("## Training")[2]
    assert "| ce (validation 2) |" in text and "ce − plain" not in text and "rear − plain" not in text
    assert "Validation 1: up to 1,000 of tokens." in text and "Validation 2: up to 500 of tokens." in text
    assert "Validation 3: up to 1,000 of a-validation,b-validation." in text
    for name in ("rear-0", "rear-1"):
        results[name]["asked"]["config"]["data"]["validation_tokens"] = "tokens"
    assert "| rear − plain |" in markdown(summarise(sweep, results)).partition("## Training")[2]
    for name in ("ce-0", "ce-1"):  # which have none
        results[name]["asked"]["config"]["data"]["validation_tokens"] = ""
        results[name]["validation"] = {}
    assert "None" not in markdown(summarise(sweep, results)).partition("## Training")[2]


@pytest.mark.parametrize("start", [{"cell": "plain"}, {"cell": "plain", "seed": 0}])
def test_at_equal_entropy_both_have_the_guidance_at_which_the_start_was_drawn(table, write, tmp_path, start):
    table["rows"]["ce"]["init"] = start
    table["rows"]["plain"]["seeds"] = 1 if "seed" in start else 2
    sweep = read_sweep(write(table), tmp_path)
    results = {}
    for name, cell in sweep.cells.items():
        rows = [
            {"temperature": 1.0, "guidance_scale": scale, "metrics": {"FD(q) validation": {"value": scale}}}
            for scale in (2.0, 4.0)
        ]
        if cell.row == "plain":
            matched = sweep.matched(cell)
            rows += [{**rows[0], "temperature": 0.8, "matched_to": other.name} for other in matched]
        results[name] = scored(cell, {}) | {
            "asked": {"evaluate": {"temperatures": [1.0], "guidance_scales": [2.0, 4.0]}}
        }
        results[name]["results"]["rows"] = rows
    equal = next(setting for setting in summarise(sweep, results).settings if setting.title == "at equal entropy")
    assert set(equal.values["ce"]["FD(q) validation"].values()) == {2.0}
    word = judge(equal.differences("ce")["FD(q) validation"], -1).word
    assert word == (ONE_START if "seed" in start else "no difference")


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml")), ids=lambda file: file.stem
)
def test_the_sweeps_of_the_repository_are_valid(file, tmp_path):
    assert len(read_sweep(file, tmp_path).cells) >= 10


def test_remarks_that_differ_in_one_number_alone_are_told_once():
    drawn = [
        f"FD(lite0) is high: {count} of run-3 score {value}" for count, value in (("1,024", 16.5), ("1,024", 7.81))
    ]
    others = ["2 empty", "2 full", "few (train 2,500, validation 500)", "few (train 500, validation 2,500)"]
    assert told_once([*drawn, *others, drawn[0]]) == ["FD(lite0) is high: 1,024 of run-3 score 7.81 to 16.5", *others]


def test_tokens_of_other_labels_or_of_another_tokenizer_are_not_made_alike(stores, tmp_path):
    def made(**change):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(stores[0], tmp_path / "store")
        file = tmp_path / "store" / METADATA_FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | {"source_sha256": "pictures"} | change))
        return store_made_of(str(tmp_path / "store"))

    alike = made()
    assert alike == made(content_sha256="rounded", consonar_version="0.2")
    names = json.loads((stores[0] / METADATA_FILE).read_text())["class_names"]
    for change in ({"fingerprint": "other"}, {"views": "flip"}, {"class_names": names[::-1] if names else ["a"]}):
        assert made(**change) != alike, change
    assert made(source_sha256=None) is None
    now, before = {"data.tokens": "a", "data.tokens made of": "x"}, {"data.tokens": "b", "data.tokens made of": "x"}
    assert known_to_both(now, before) == ({}, {})
    assert known_to_both(now | {"data.tokens made of": "y"}, before) == (
        {"the content of data.tokens": "a"}, {"the content of data.tokens": "b"},
    )  # fmt: skip
