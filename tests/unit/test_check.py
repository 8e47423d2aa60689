"""`evaluate --check`: a result is measured again, and says whether it reproduces and what differs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture, save_pictures

from consonar import cli
from consonar.components import load_generator, save_generator, save_tokenizer
from consonar.data.bad_images import BadImages
from consonar.errors import UserError
from consonar.evaluation.check import check_results
from consonar.evaluation.compared import Check, Compared, allowed, compare, image_counts
from consonar.evaluation.evaluate import evaluate
from consonar.evaluation.reconstruction import evaluate_tokenizer, trained_on
from consonar.evaluation.results import Measurement, source_hash
from consonar.evaluation.runs import ENTROPY, RunSettings, evaluate_run
from consonar.files.weights import component_fingerprint
from consonar.origin import Origin
from consonar.recipes import read_config
from consonar.sampling.job import Job, balanced_labels, run_job
from consonar.sampling.sample import SamplerConfig


@pytest.fixture(autouse=True)
def surroundings(quarters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path, tiny_generator, tokenizer_folder, tokenizer):
    origin = Origin(tokenizer=str(tokenizer_folder), tokenizer_fingerprint=tokenizer.fingerprint)
    save_generator(tiny_generator(), tmp_path / "run" / "model", origin)
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "metrics.jsonl").touch()
    return tmp_path / "run"


@pytest.fixture
def measured(tmp_path, picture_folder):
    """Results of twelve pictures in a file."""
    images = np.stack([np.asarray(picture(index)) for index in range(200, 212)])
    np.savez(tmp_path / "samples.npz", images=images)
    results = evaluate("samples.npz", picture_folder, feature_network="quarters", draws=2, batch_size=5)
    results.to_json(tmp_path / "results.json")
    return tmp_path / "results.json"


def changed(path, **changes):
    """The file with other entries, by dotted path."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        table, *names = content, *key.split("/")
        for name in names[:-1]:
            table = table[int(name) if name.isdecimal() else name]
        table[names[-1]] = value
    path.write_text(json.dumps(content))
    return path


def status(*words):
    """What the command ends with."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", *map(str, words)])
    return stopped.value.code


def test_the_same_pictures_give_the_same_digits(measured, capsys):
    before = measured.read_bytes()
    cli.main(["evaluate", "--check", str(measured)])
    assert capsys.readouterr().out.splitlines()[-1] == "reproduced: digit for digit"
    assert measured.read_bytes() == before


def test_a_number_that_is_not_what_is_measured_is_not_reproduced(measured, capsys):
    value = json.loads(measured.read_text())["metrics"]["FD(quarters) validation"]["value"]
    changed(measured, **{"metrics/FD(quarters) validation/value": value * 1.00005})
    found = check_results(measured)
    assert found.reproduced and found.tolerance.startswith("the same pictures, within 0.0001 of the value")
    spread = json.loads(measured.read_text())["metrics"]["FD(quarters) validation"]["spread"]
    changed(measured, **{"metrics/FD(quarters) validation/value": value + 0.02 * spread, "versions/torch": "1.0"})
    changed(measured, **{"noise_floor/FD(quarters) validation vs train": 1.0})
    assert status("--check", measured) == 1
    said = capsys.readouterr().out
    assert "not reproduced: 2 of" in said and f"differs: torch: 1.0 then, {torch.__version__} now" in said


def test_other_pictures_of_that_name_are_told_and_not_reproduced(measured):
    images = np.stack([np.asarray(picture(index)) for index in range(300, 312)])
    np.savez("samples.npz", images=images)
    found = check_results(measured)
    assert not found.reproduced and any(line.startswith("samples: ") for line in found.differs)


def test_samples_and_references_may_have_moved(measured, tmp_path, picture_folder, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "samples.npz").rename(tmp_path / "there" / "mine.npz")
    with pytest.raises(UserError, match=r"samples.npz is not there; name the samples"):
        check_results(measured)
    shutil.copytree(picture_folder, "pictures")
    changed(measured, reference="nowhere")
    assert status("--check", measured, "there/mine.npz") == 2
    said = capsys.readouterr().err
    assert "'nowhere' is neither" in said and said.endswith("by --reference, --tokenizer, --feature-network\n")
    cli.main(["evaluate", "there/mine.npz", "--reference", "pictures", "--check", str(measured)])
    assert check_results(measured, samples=tmp_path / "there/mine.npz", reference="pictures").differs == []


def test_only_what_is_not_there_is_said_to_have_moved(measured, capsys):
    assert status("--check", measured, "--feature-network", "quartets") == 2
    assert capsys.readouterr().err.startswith("consonar: --feature-network: unknown 'quartets' (did you mean")
    Path("samples.npz").write_bytes(b"PK damaged")
    assert status("--check", measured) == 2
    said = capsys.readouterr().err
    assert said.startswith("consonar: samples.npz: not an .npz") and "has moved" not in said


def test_results_of_older_versions_are_compared_by_what_they_record(measured):
    content = json.loads(measured.read_text())
    assert content["versions"]["threads"] == str(torch.get_num_threads()) and "pillow" in content["versions"]
    changed(measured, **{f"versions/{key}": "0" for key in ("threads", "pillow", "consonar source")})
    assert [line.partition(":")[0] for line in check_results(measured).differs] == [
        "pillow", "consonar source", "threads",
    ]  # fmt: skip
    for key in ("tokenizer", "versions", "machine"):
        del content[key]
    del content["config"]["precision"]
    measured.write_text(json.dumps(content))
    assert check_results(measured).tolerance == "digit for digit"


def test_the_hash_of_the_code_changes_with_it_and_not_with_its_place(tmp_path):
    code = b"1\n2\n"
    for place, name, text in (
        ("a", "x.py", code), ("b", "x.py", b"1\r\n2\r\n"), ("c", "x.py", b"1\n3\n"), ("d", "y.py", code)
    ):  # fmt: skip
        (tmp_path / place / "room").mkdir(parents=True)
        (tmp_path / place / "room" / name).write_bytes(text)
        (tmp_path / place / "room" / "x.pyc").write_text(place)
    one, moved, other, renamed = (source_hash(tmp_path / place) for place in "abcd")
    assert one == moved and len({one, other, renamed, source_hash()}) == 4


def test_samples_that_are_gone_are_drawn_again_as_they_were(run, tiny_generator, tokenizer, picture_folder, tmp_path):
    generator = tiny_generator()
    job = Job(
        generator, tokenizer, balanced_labels(12, generator.num_classes), seed=3, source=str(run),
        sampler=SamplerConfig(temperature=0.9), precision="fp32",
    )  # fmt: skip
    run_job(job, tmp_path / "drawn.npz")
    results = evaluate("drawn.npz", picture_folder, feature_network="quarters", draws=2)
    results.to_json("results.json")
    (tmp_path / "drawn.npz").unlink()
    said = []
    found = check_results(tmp_path / "results.json", progress=said.append)
    assert (
        found.redrawn and found.reproduced and said[0].startswith("drawn.npz is gone: 12 samples are drawn again from")
    )
    changed(tmp_path / "results.json", **{"samples/settings/labels_sha256": "0"})
    with pytest.raises(UserError, match="the classes of its images are not known"):
        check_results(tmp_path / "results.json")


AT = "temperature 0.5, guidance 2"


def test_a_run_is_sampled_again_and_keeps_its_files(run, picture_folder, tokenizer_folder, tmp_path):
    settings = RunSettings(num_samples=12, draws=2, guidance_scales=(1, 2), seed=4, reconstruct=False)
    grid = [SamplerConfig(top_k=7), SamplerConfig(temperature=0.5, top_k=7, guidance_scale=2)]
    content = evaluate_run(run, settings, reference=str(picture_folder), feature_network="quarters", grid=grid)
    assert content["remarks"][-1].startswith("entropy (teacher-forced) is that of the model alone")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = []
    found = check_results(run / "results.json", progress=said.append)
    assert found.reproduced and found.redrawn and found.differs == []
    assert sum(" samples at " in line for line in said) == len(grid), "no row is drawn twice, nor any that was not"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert {number.name.partition(": ")[0] for number in found.numbers} == {"temperature 1", AT, "noise floor"}
    metric = "FD(quarters) validation"
    entry = json.loads((run / "results.json").read_text())["rows"][1]["metrics"][metric]
    changed(run / "results.json", **{f"rows/1/metrics/{metric}/value": entry["value"] + 1.9 * entry["spread"]})
    found = check_results(run / "results.json")
    assert found.reproduced and found.verdict.startswith("reproduced: samples drawn again, within 2 spreads")
    deciding = f" of {found.numbers[1].before:.4g} in temperature 1: {metric}"
    assert "not seen are differences below those allowed, as " in found.verdict and found.verdict.endswith(deciding)
    changed(run / "results.json", **{f"rows/1/metrics/{metric}/value": entry["value"] + 2.1 * entry["spread"]})
    assert [one.name for one in check_results(run / "results.json").numbers if not one.holds] == [f"{AT}: {metric}"]
    changed(run / "model" / "config.json", tokenizer=str(tmp_path / "gone"))
    with pytest.raises(
        UserError, match=r"^tokenizer: .*gone.*; what has moved since .* by SAMPLES, --reference, --tok"
    ):
        check_results(run / "results.json")
    assert check_results(run / "results.json", tokenizer=str(tokenizer_folder)).differs == []


def test_a_cell_of_a_sweep_is_checked_by_its_run(run, picture_folder, tmp_path):
    settings = RunSettings(num_samples=12, draws=2, reconstruct=False)
    content = evaluate_run(run, settings, reference=str(picture_folder), feature_network="quarters")
    (tmp_path / "results").mkdir()
    result = {"asked": {}, "failure": None, "run": "../run", "results": json.loads(json.dumps(content))}
    (tmp_path / "results" / "cell-0.json").write_text(json.dumps(result))
    assert check_results(tmp_path / "results" / "cell-0.json").reproduced
    (tmp_path / "results" / "cell-0.json").write_text(json.dumps(result | {"failure": "the loss is not finite"}))
    with pytest.raises(UserError, match="records a run that failed"):
        check_results(tmp_path / "results" / "cell-0.json")
    (tmp_path / "results" / "cell-0.json").write_text(json.dumps(result | {"run": "../gone"}))
    with pytest.raises(UserError, match=r"its run is not in .*gone; .*consonar train .*cell-0.json --out RUN"):
        check_results(tmp_path / "results" / "cell-0.json")
    (tmp_path / "gone").mkdir()
    with pytest.raises(UserError, match=r"no trained model in .*gone; name the run"):
        check_results(tmp_path / "results" / "cell-0.json")


def test_the_files_of_claims_say_how_they_are_made_again(tmp_path):
    """Those that are committed, where no run is."""
    shutil.copytree(Path(__file__).parents[2] / "claims" / "results", tmp_path / "claims", ignore=lambda *_: ["runs"])
    for place, line in (
        (
            "diagnosis/rear.json",
            "made again rather than checked: consonar diagnose runs/demo/rear --data openmoji --parts",
        ),
        (
            "photographs/tokenizer.json",
            r"checked: consonar diagnose cifar10-32 --data \S+ --parts forgiveness --num-images 256 .*--seed 0 .*--out "
            "tokenizer-again.html;",
        ),
        ("photographs/results/plain-0.json", r"consonar train \S+/plain-0.json --out RUN"),
        (
            "photographs/results/plain[+]ce-0.json",
            r"consonar train \S+/plain[+]ce-0.json --init START --out RUN",
        ),
        ("vapi/start.json", "no results of samples, a run, a cell of a sweep or a tokenizer"),
        ("entropy_bandit.json", "no results of samples"),
    ):
        with pytest.raises(UserError, match=line):
            check_results(tmp_path / "claims" / place.replace("[+]", "+"))
    config = read_config(tmp_path / "claims/photographs/results/plain-0.json")
    assert (config.recipe, config.loop.steps, config.model.width) == ("plain", 600, 128)


def test_reconstructions_of_a_tokenizer_are_measured_again(tmp_path, tokenizer):
    pictures = save_pictures(tmp_path / "pictures")
    save_tokenizer(tokenizer, (codec := tmp_path / "codec") / "model")
    (codec / "config.json").write_text('{"data": {"images": "elsewhere"}}')
    evaluate_tokenizer(codec, into=codec, reference=str(pictures), feature_network="quarters")
    found = check_results(tmp_path / "codec" / "reconstruction.json")
    assert found.tolerance == "digit for digit" and found.differs == []
    assert {"psnr", "rFD(quarters)", "usage"} <= {number.name for number in found.numbers}
    content = json.loads((codec / "reconstruction.json").read_text())
    assert image_counts(content)["samples"] == content["num_images"] == len(list(pictures.glob("validation/*/*.png")))
    changed(tmp_path / "codec" / "reconstruction.json", psnr=40.0, **{"origin/torch": "1.0"})
    found = check_results(tmp_path / "codec" / "reconstruction.json")
    assert not found.reproduced and found.differs == [f"torch: 1.0 then, {torch.__version__} now"]
    picture(999).save(pictures / "validation" / "a" / "102.png")
    told = check_results(tmp_path / "codec" / "reconstruction.json").differs
    assert [line.partition(":")[0] for line in told] == ["images_sha256", "torch"], "one picture is another one"


def test_a_model_folder_is_measured_where_it_is_one_of_a_tokenizer(
    tmp_path, tokenizer, tiny_generator, picture_folder, capsys
):
    """As `convert` writes them: rFID and the like of a released tokenizer, into its folder."""
    save_tokenizer(tokenizer, tmp_path / "codec")
    save_generator(tiny_generator(), tmp_path / "generator", Origin())
    cli.main(["evaluate", "codec", "--reference", str(picture_folder), "--feature-network", "quarters"])
    said = capsys.readouterr().out
    assert "reconstructions by tiny-vq against their originals in" in said
    assert "rFD(quarters) is biased upwards by few images (6, 12 features); compare it at equal images only" in said
    assert check_results(tmp_path / "codec" / "reconstruction.json").tolerance == "digit for digit"
    assert status("generator", "--reference", picture_folder) == 2
    assert "generator is the model of a generator, which keeps no results; first consonar" in capsys.readouterr().err


def test_reconstructions_are_measured_again_of_the_pictures_that_were_held_out(tmp_path, tokenizer, picture_folder):
    save_tokenizer(tokenizer, (codec := tmp_path / "codec") / "model")
    (codec / "config.json").write_text("{}")
    evaluate_tokenizer(
        codec, into=codec, reference=str(picture_folder), feature_network="quarters", validation_split="50%"
    )
    found = check_results(tmp_path / "codec" / "reconstruction.json")
    assert {number.name: number.before for number in found.numbers}["num_images"] == 12
    assert found.tolerance == "digit for digit"


def test_a_tokenizer_that_is_named_is_measured_into_a_file(tmp_path, tokenizer, picture_folder, capsys):
    save_tokenizer(tokenizer, tmp_path / "codec")
    words = ["--data", str(picture_folder), "--feature-network", "quarters", "--out", "rfd.json"]
    cli.main(["evaluate", "--tokenizer", "codec", *words])
    assert "reconstructions by tiny-vq" in capsys.readouterr().out and not list(tmp_path.glob("codec/recon*"))
    assert check_results(tmp_path / "rfd.json").tolerance == "digit for digit"
    assert status("--tokenizer", "codec", *words) == 2 and status("codec", *words[2:4]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "--out: rfd.json already exists" in said[0] and "--data: missing; name the images that codec" in said[1]
    cli.main(["evaluate", "openmoji-64", *words, "--overwrite", "--batch-size", "4"])
    content = json.loads((tmp_path / "rfd.json").read_text())
    assert content["num_images"] == 6 and content["perceptual(efficientnet-lite0)"] > 0
    assert check_results(tmp_path / "rfd.json").tolerance == "digit for digit"
    assert trained_on("openmoji-64") == {"images": "openmoji"} and trained_on("cifar10-32") == {"images": "cifar10"}
    for wrong, expected in (
        (["openmoji-46"], "unknown 'openmoji-46' (did you mean 'openmoji-64'?); choices: samples"),
        (["openmoji-64", "--tokenizer", "codec"], "openmoji-64 is the tokenizer that is measured"),
        (["--tokenizer", "openmoji-46"], "tokenizer: unknown 'openmoji-46'"),
        (["codec", "--reference", "x", "--data", "y"], "--data: given together with --reference"),
        (["codec", "--perceptual", "lpips"], "lpips"),
    ):
        reference = [] if "--reference" in wrong else ["--reference", picture_folder]
        assert status(*wrong, *reference) == 2
        assert expected in capsys.readouterr().err


def test_pictures_that_were_left_out_are_left_out_again(tmp_path, picture_folder, run, tokenizer, capsys):
    """Of samples and their reference, and where a run or a tokenizer is measured on it."""
    shutil.copytree(picture_folder, "pictures")
    (tmp_path / "mine").mkdir()
    for index in range(200, 212):
        picture(index).save(tmp_path / "mine" / f"{index}.png")
    for path in ("mine/205.png", "pictures/validation/all/100.png"):
        (tmp_path / path).write_bytes(b"no picture")
    words = ["--feature-network", "quarters", "--bad-images", "skip", "--bad-images-limit", "0.5"]
    cli.main(["evaluate", "mine", "--reference", "pictures", "--draws", "1", "--out", "results.json", *words])
    known = json.loads((tmp_path / "results.json").read_text())["bad_images"]
    of_reference = {"reference train": 0, "reference validation": 1}
    assert known == {"limit": 0.5, "left_out": {"samples": 1, **of_reference}}
    assert check_results(tmp_path / "results.json").tolerance == "digit for digit"
    (tmp_path / "mine" / "206.png").write_bytes(b"no picture")
    assert "left out of samples: 1 then, 2 now" in check_results(tmp_path / "results.json").differs
    bad = BadImages("skip", 0.5)
    settings = RunSettings(num_samples=12, draws=2)
    content = evaluate_run(run, settings, reference="pictures", feature_network="quarters", bad=bad)
    assert content["bad_images"]["left_out"] == of_reference
    save_tokenizer(tokenizer, (codec := tmp_path / "codec") / "model")
    (codec / "config.json").write_text("{}")
    found = evaluate_tokenizer(codec, into=codec, reference="pictures", feature_network="quarters", bad=bad)
    assert found["origin"]["bad_images"] == {"limit": 0.5, "left_out": of_reference} and found["num_images"] == 5
    for path in (run / "results.json", run / "reconstruction.json", codec / "reconstruction.json"):
        assert check_results(path).tolerance == "digit for digit", path


def test_as_many_are_held_out_again_where_the_data_of_a_tokenizer_have_moved(tmp_path, tokenizer):
    pictures = save_pictures(tmp_path / "pictures", train=40, validation=0) / "train"
    save_tokenizer(tokenizer, (codec := tmp_path / "codec") / "model")
    (codec / "config.json").write_text(json.dumps({"data": {"images": str(pictures)}}))
    assert evaluate_tokenizer(codec, into=codec, feature_network="quarters")["num_images"] == 2
    found = check_results(codec / "reconstruction.json", reference=str(pictures.rename(tmp_path / "there")))
    assert found.tolerance == "digit for digit"


def test_a_sound_file_is_told_what_it_lacks(tmp_path):
    row = {"temperature": 1.0, "num_samples": 400, "seed": 0, "metrics": {"compositional score": {"value": 0.03}}}
    (tmp_path / "condensed.json").write_text(json.dumps({"schema": 1, "prompts": 400, "rows": [row]}))
    with pytest.raises(UserError, match=r"condensed.json: lacks config.seed, which is needed to measure again"):
        check_results(tmp_path / "condensed.json")


WRONG = (
    "{}", "[]", "1", '{"rows": []}', '{"rows": [1]}', '{"rows": [{}]}', '{"metrics": {}}', '{"asked": {}}',
    '{"metrics": {"FD": 1}, "samples": {"name": "x"}}', '{"metrics": {"FD": {"value": 1}}, "samples": 1}',
    '{"metrics": {"FD": {"value": 1}}, "samples": {"name": "x"}, "config": []}', '{"schema": 1, "parts": {}}',
)  # fmt: skip


@pytest.mark.parametrize("content", WRONG)
def test_a_file_that_holds_no_results_is_one_line(tmp_path, capsys, content):
    (tmp_path / "wrong.json").write_text(content)
    assert status("--check", "wrong.json") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_results_of_a_later_format_are_refused(measured, capsys):
    measured.write_text(json.dumps(json.loads(measured.read_text()) | {"schema": 2}))
    assert status("--check", measured) == 2
    assert "results.json: schema is 2; this version reads 1" in capsys.readouterr().err


def test_options_that_the_record_has_are_refused(measured, capsys):
    for words in (["--draws", "3"], ["--bad-images", "skip"], ["--perceptual", "lpips"], ["--overwrite"]):
        assert status("--check", measured, *words) == 2
        assert "read only without --check" in capsys.readouterr().err
    assert status() == 2 and status("samples.npz") == 2
    assert "--reference: missing" in capsys.readouterr().err


def test_how_far_a_number_may_be_off():
    sizes = {"samples": 1000, "compared": 500, "reference": 50}
    for name, measured, redrawn, far in (
        ("FD(x)", Measurement(100.0, 0.5), False, 0.01),
        ("FD(x)", Measurement(0.5, 3.0), False, 0.03),
        ("temperature 1: precision", Measurement(0.5), False, 0.004),
        ("temperature 1: recall", Measurement(0.5), False, 0.04),
        ("coverage", Measurement(0.5), True, 0.04),
        ("copy rate (tokens)", Measurement(0.0), False, 0.002),
        ("copy rate (features)", Measurement(0.0), False, 0.004),
        ("FD(x)", Measurement(100.0, 3.0), True, 6.0),
        ("entropy", Measurement(3.0), True, 0.03),
        ("exact", Measurement(3.0), False, 2.0),
        ("density", Measurement(0.0, 0.0), True, 0.004),
        ("temperature 1: KID(x) validation", Measurement(0.0001), True, 0.25 / 1000**0.5),
        ("KID(x) validation", Measurement(0.9), True, 0.009),
        ("KID(x) validation", Measurement(0.0001, error=0.001), True, 0.002),
        ("KID(x) validation", Measurement(1.0), False, 0.0001),
    ):
        assert allowed(name, measured, sizes, redrawn) == pytest.approx(far), name
    assert not Check([Compared("FD(x)", 1.0, None, 9.0)], redrawn=False, differs=[]).reproduced
    exact = {"exact": Measurement(2.0)}  # pictures; where there are none no number is written
    for few, many in ((exact, {}), ({}, exact)):
        assert compare(few, many, sizes, False)[0].holds
    for few, many in (({"exact": Measurement(3.0)}, {}), ({}, {"exact": Measurement(3.0)})):
        assert not compare(few, many, sizes, False)[0].holds


def test_shares_of_the_reference_are_of_its_images(measured, run, picture_folder):
    settings = RunSettings(num_samples=14, draws=2, reconstruct=False, max_neighbours_images=13)
    content = evaluate_run(run, settings, reference=str(picture_folder), feature_network="quarters")
    assert image_counts(content) == {"samples": 14, "compared": 13, "reference": 13}
    assert image_counts(json.loads(measured.read_text())) == {"samples": 12, "compared": 12, "reference": 24}


def test_what_is_not_drawn_again_is_as_that_of_the_same_pictures():
    """The entropy under the true context is of the model: under other weights a number without a spread."""
    sizes = {"samples": 9, "compared": 9, "reference": 9}
    before = {f"temperature 1: {ENTROPY}": 3.0, "noise floor: FD(x) validation vs train": 50.0, "entropy": 2.0}
    was, now = ({name: Measurement(k * value) for name, value in before.items()} for k in (1, 1.001))
    for redrawn, other, holds in (
        (True, False, [False, False, True]), (True, True, [True, False, True]), (False, False, [False] * 3)
    ):  # fmt: skip
        assert [one.holds for one in compare(was, now, sizes, redrawn, other)] == holds


def test_every_class_of_a_mean_over_classes_is_compared():
    sizes = {"samples": 9, "compared": 9, "reference": 9}
    before = {"FD per class(x)": Measurement(2.0, classes={"0": 1.0, "1": 3.0, "2": 2.0})}
    swapped = {"FD per class(x)": Measurement(2.0, classes={"0": 3.0, "1": 1.0, "2": 2.0})}
    for redrawn in (False, True):
        mean, worst = compare(before, swapped, sizes, redrawn)
        assert mean.holds and not worst.holds and worst.name == "FD per class(x), class 0"
        assert all(one.holds for one in compare(before, before, sizes, redrawn))
    near = {"FD per class(x)": Measurement(2.0, classes={"0": 1.0, "1": 3.05, "2": 2.0})}
    assert [one.holds for one in compare(before, near, sizes, True)] == [True, True]  # 1 % * sqrt(3)
    lost = {"FD per class(x)": Measurement(2.0)}
    assert not compare(before, lost, sizes, True)[1].holds


def test_other_weights_are_the_first_words_of_the_verdict(run, picture_folder, tmp_path, capsys):
    settings = RunSettings(num_samples=12, draws=2, reconstruct=False)
    content = evaluate_run(run, settings, reference=str(picture_folder), feature_network="quarters")
    changed(run / "results.json", checkpoint_sha256="0" * 64)
    cli.main(["evaluate", "--check", str(run / "results.json")])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("not the recorded weights: their numbers are reproduced: digit for digit")
    # A file is another one also where a run was trained again to the same weights, which a cell of a sweep records.
    (tmp_path / "results").mkdir()
    weights = component_fingerprint({}, load_generator(run).state_dict())
    result = {"asked": {}, "failure": None, "run": "../run", "weights": weights}
    result["results"] = json.loads(json.dumps(content)) | {"checkpoint_sha256": "0" * 64}
    for known, first in ((weights, "reproduced: "), ("1", "not the recorded weights: ")):
        (tmp_path / "results" / "cell-0.json").write_text(json.dumps(result | {"weights": known}))
        assert check_results(tmp_path / "results" / "cell-0.json").verdict.startswith(first)
