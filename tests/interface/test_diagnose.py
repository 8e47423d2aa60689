"""The command `diagnose` end to end on tiny models: the page, its numbers, and what wrong input is told."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_generator, save_pictures, save_tokenizer_of_32
from forked import Child

from consonar import cli
from consonar.cli import diagnose as cli_diagnose
from consonar.cli.diagnose import Options
from consonar.components import load_tokenizer, save_generator
from consonar.data.bad_images import BadImages
from consonar.data.splits import open_splits
from consonar.diagnostics.diagnose import PARTS, chosen_parts
from consonar.diagnostics.pictures import foreign
from consonar.errors import UserError
from consonar.evaluation.check import check_results
from consonar.files.writers import write_json
from consonar.networks import FEATURE_NETWORKS
from consonar.origin import Origin
from consonar.report import diagnosis as report_diagnosis

HOSTILE = 'a "name" <b>&amp;'


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 32 px in three classes, a tokenizer, and an untrained generator in a folder of a hostile name."""
    root = tmp_path_factory.mktemp("diagnose")
    save_pictures(root / "pictures", validation=18, size=32)
    save_tokenizer_of_32(root / "tokenizer")
    of = load_tokenizer(root / "tokenizer").fingerprint
    origin = Origin(tokenizer=str(root / "tokenizer"), tokenizer_fingerprint=of, class_names=("a", "b", "c"))
    save_generator(make_tiny_generator(), root / HOSTILE, origin)
    return root


def diagnose(root: Path, out: Path, *more: str, model: str = HOSTILE) -> dict:
    images = [] if "--num-images" in more else ["--num-images", "8"]
    data = [] if "--data" in more else ["--data", str(root / "pictures")]
    cli.main(["diagnose", str(root / model), "--out", str(out), *data, *images, *more])
    return json.loads(out.with_suffix(".json").read_text())


class Greys:
    """Features that cost nothing."""

    name, weights_sha256, num_features = "greys", "0", 16

    def __init__(self, device: str) -> None:
        pass

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, ::8, ::8].flatten(1)


def test_every_part_is_measured_written_and_shown(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(FEATURE_NETWORKS, "greys", Greys)
    content = diagnose(root, tmp_path / "page.html", "--feature-network", "greys")
    assert list(content["parts"]) == list(PARTS) and content["unavailable"] == {}
    said, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    for name, part in content["parts"].items():
        assert f"{name}: {part['summary']}" in said and f'id="{name}"' in page and part["numbers"]
        assert all(number["low"] <= number["value"] + 1e-9 and number["value"] <= number["high"] + 1e-9
                   for number in part["numbers"].values()), name  # fmt: skip
    told = {name: part["protocol"] for name, part in content["parts"].items() if part["protocol"]}
    assert told.keys() == {"forgiveness", "attribution"} and all(line in page for line in told.values())
    assert told["attribution"].startswith("each time 8 pictures, greys, against ") and "8 images as others" in page
    source = content["provenance"]
    assert len(source["generator"]["sha256"]) == 64 and source["settings"]["seed"] == 0
    assert source["pictures"]["held-out"]["count"] == source["pictures"]["others"]["count"] == 8
    assert {"torch", "consonar"} <= source["versions"].keys()


def test_the_page_escapes_names_and_asks_nobody(root: Path, tmp_path: Path) -> None:
    diagnose(root, tmp_path / "page.html", "--parts", "positions,gap")
    page = (tmp_path / "page.html").read_text()
    assert "<b>&amp;</h1>" not in page and "&lt;b&gt;&amp;amp;" in page
    assert not re.search(r"<script|(src|href)=\"(?!data:image/png;base64,|#)|url\((?!#)|@import", page)
    assert page.startswith("<!doctype html>") and page.count('<details class="part"') == 3
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_seed_gives_the_same_numbers_and_another_one_others(root: Path, tmp_path: Path) -> None:
    first, again, other = (
        diagnose(root, tmp_path / f"{index}.html", "--parts", "gap", "--seed", seed)["parts"]
        for index, seed in enumerate("778")
    )
    assert first == again != other


def test_a_tokenizer_alone_has_the_parts_that_need_no_generator(root: Path, tmp_path: Path, capsys) -> None:
    small = save_pictures(tmp_path / "small", validation=18, size=16)
    words = "--parts", "receptive", "--data", str(small)
    content = diagnose(root, tmp_path / "page.html", *words, model="tokenizer")
    assert "smaller than the tokenizer's pictures, and enlarged: 8 of 8 held-out, 8 of 8" in capsys.readouterr().out
    assert list(content["parts"]) == ["receptive"] and "generator" not in content["provenance"]
    assert len(content["provenance"]["tokenizer"]["sha256"]) == 64


def test_pictures_too_small_to_compare_cost_the_parts_that_do(
    root: Path, tokenizer_folder: Path, tmp_path: Path, capsys
) -> None:
    words = "--parts", "receptive,codebook,forgiveness"
    content = diagnose(root, tmp_path / "page.html", *words, model=str(tokenizer_folder))
    why = "--perceptual: efficientnet-lite0 reads images of 32 px or more, these have 16"
    assert list(content["parts"]) == ["receptive"]
    assert content["unavailable"] == {"codebook": why, "forgiveness": why}
    assert f"codebook: not measured ({why})" in capsys.readouterr().out


def test_sets_are_compared_with_all_training_pictures_where_few_are_left_over(
    root: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(FEATURE_NETWORKS, "greys", Greys)
    few = save_pictures(tmp_path / "few", train=10, validation=8, size=32)
    words = "--parts", "attribution", "--feature-network", "greys", "--data", str(few)
    pictures = diagnose(root, tmp_path / "page.html", *words)["provenance"]["pictures"]
    assert [pictures[part]["count"] for part in ("held-out", "training", "others")] == [8, 8, 8]


def test_data_of_one_set_say_what_cannot_be_measured(root: Path, tmp_path: Path, capsys) -> None:
    content = diagnose(
        root,
        tmp_path / "page.html",
        "--parts",
        "gap,attribution",
        "--data",
        str(root / "pictures" / "train"),
        "--validation-split",
        "0%",
    )
    assert content["unavailable"].keys() == {"gap", "attribution"} and content["parts"] == {}
    assert "gap: not measured (the data have no training pictures" in capsys.readouterr().out
    assert "not measured, there are too few other pictures" in (tmp_path / "page.html").read_text()


def test_a_diagnosis_records_the_command_that_makes_it_again(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["--num-images", "9", "--seed", "3", "--batch-size", "5", "--temperature", "0.8", "--label-default", "b"]
    first = diagnose(root, tmp_path / "page.html", "--parts", "embedding", "--validation-split", "validation", *asked)
    with pytest.raises(UserError, match="is of a diagnosis, which is made again rather than checked: ") as refused:
        check_results(tmp_path / "page.json")
    cli.main(shlex.split(str(refused.value).partition("checked: ")[2].rpartition("; of which pictures")[0])[1:])
    again = json.loads((tmp_path / "page-again.json").read_text())
    assert first["provenance"].pop("timestamp") and again["provenance"].pop("timestamp")
    assert again == first


def test_a_gap_on_pictures_of_others_is_said(root: Path, tmp_path: Path) -> None:
    train = open_splits(str(root / "pictures"), key="k", image_size=32).train
    of = load_tokenizer(root / "tokenizer").fingerprint
    for data, sha256, said in (
        (train.name, train.content_hash, ""), ("moved", train.content_hash, ""),
        (None, None, "trained on is not known: "), (train.name, None, ""),
        (train.name, "0", "these are others"), ("emoji", None, "the same is not known"),
    ):  # fmt: skip
        told = foreign(Origin(data=data, pictures_sha256=sha256), train, BadImages("skip", limit=1))
        assert said in told and bool(said) == bool(told), (data, sha256)
    origin = Origin(tokenizer=str(root / "tokenizer"), tokenizer_fingerprint=of, data="emoji", pictures_sha256="0")
    save_generator(make_tiny_generator(), tmp_path / "of-emoji", origin)
    found = diagnose(root, tmp_path / "page.html", "--parts", "gap", model=str(tmp_path / "of-emoji"))
    assert "The generator was trained on emoji; these are others" in found["parts"]["gap"]["summary"]


def test_numbers_that_are_not_finite_cost_their_part_alone(root: Path, tmp_path: Path) -> None:
    broken = make_tiny_generator()
    for parameter in broken.parameters():  # finite, which is looked at where they are read; what they make is not
        torch.nn.init.constant_(parameter, 1e30)
    of = load_tokenizer(root / "tokenizer").fingerprint
    save_generator(broken, tmp_path / "broken", Origin(tokenizer=str(root / "tokenizer"), tokenizer_fingerprint=of))
    parts = "--parts", "layers,noise,receptive"
    content = diagnose(root, tmp_path / "page.html", *parts, model=str(tmp_path / "broken"))
    assert content["parts"].keys() == {"receptive"} and content["unavailable"].keys() == {"layers", "noise"}
    assert content["unavailable"]["noise"] == "cross-entropy, nats per token, clean context is no finite number"
    assert "is no finite number" in (tmp_path / "page.html").read_text()


def test_the_help_names_every_part() -> None:
    source = inspect.getsource(Options)
    listed = re.search(r"\(default: all\): (.*?)\.\"\"\"", source, re.DOTALL)
    assert listed and re.split(r",\s*", listed[1]) == list(PARTS)


def test_a_part_of_generators_is_told_to_be_one() -> None:
    with pytest.raises(UserError, match=r"^--parts: 'exposure' is of a generator, and this is a tokenizer; choices: "):
        chosen_parts(["exposure"], has_generator=False)
    assert chosen_parts(["codebook"], has_generator=False) == ["codebook"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "exposure,nothing"], "--parts: unknown 'nothing'"),
        (["--perceptual", "ssim"], "perceptual: unknown 'ssim'"),
        (["--feature-network", "x"], "feature_network: unknown 'x'"),
        (["--num-images", "3"], "num_images: 3 is not in [8, 100000]"),
        (["--batch-size", "0"], "batch_size: 0 is not positive"),
        (["--seed", "-1"], "seed: -1 is not between"),
        (["--parts", "gap,noise", "--top-k", "3"], "--top-k: 3 is read only where tokens"),
        (["--guidance-power", "2"], "guidance_power: 2.0 is read only with"),
        (["--label-default", "zebra"], "--label-default: unknown 'zebra'"),
        (["--validation-split", "nothing"], "--validation-split: "),
        (["--data", "nowhere"], "data: 'nowhere' is neither a folder nor a known source"),
        (["--tokenizer", "openmoji-64"], "--tokenizer: the tokenizer is"),
    ],
)
def test_wrong_input_is_told_in_one_line(root: Path, tmp_path: Path, capsys, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        diagnose(root, tmp_path / "page.html", *words)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in line
    assert not list(tmp_path.iterdir())


def test_labels_of_other_classes_are_refused(root: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(root / "pictures" / "train", tmp_path / "other")
    (tmp_path / "other" / "a").rename(tmp_path / "other" / "zebra")
    with pytest.raises(SystemExit):
        diagnose(root, tmp_path / "page.html", "--data", str(tmp_path / "other"))
    assert "--data: class 0 is 'b' (3 classes), in the generator it is 'a' (3)" in capsys.readouterr().err


def test_a_tokenizer_takes_no_other_and_no_part_of_generators(root: Path, tmp_path: Path, capsys) -> None:
    for words, message in (
        (["--tokenizer", "x"], "is read only with a generator"),
        (["--parts", "gap"], "--parts: 'gap' is of a generator"),
        (["--temperature", "0.7"], "--temperature: 0.7 is read only where tokens of a generator are drawn (exposure,"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            diagnose(root, tmp_path / "page.html", *words, model="tokenizer")
        assert message in capsys.readouterr().err


def test_only_a_diagnosis_is_replaced(root: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.html"

    def refused(*words: str, out: Path = page) -> str:
        with pytest.raises(SystemExit):
            diagnose(root, out, "--parts", "gap", *words)
        return capsys.readouterr().err

    assert "does not end in .html" in refused(out=tmp_path / "page")
    page.write_text("mine")
    assert "already exists" in refused() and "is no page" in refused("--overwrite")
    page.unlink()
    page.with_suffix(".json").write_text('{"mine": 1}')
    assert "exists; choose another name" in refused() and "is no diagnosis" in refused("--overwrite")
    assert page.with_suffix(".json").read_text() == '{"mine": 1}'
    page.with_suffix(".json").unlink()
    diagnose(root, page, "--parts", "gap")
    diagnose(root, page, "--parts", "gap", "--overwrite")


def test_a_page_that_came_while_it_worked_is_not_replaced(root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    measure = cli_diagnose.diagnose

    def meanwhile(*given, **named):
        (tmp_path / "page.html").write_text("another's")
        return measure(*given, **named)

    monkeypatch.setattr(cli_diagnose, "diagnose", meanwhile)
    with pytest.raises(SystemExit):
        diagnose(root, tmp_path / "page.html", "--parts", "gap")
    assert "page.html already exists" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"page.html": "another's"}


def killed_after_its_numbers(root: Path, page: Path) -> None:
    def write_numbers(path: Path, value: object) -> None:
        write_json(path, value)
        os.kill(os.getpid(), signal.SIGKILL)

    report_diagnosis.write_json = write_numbers
    diagnose(root, page, "--parts", "gap")


def test_one_that_was_killed_between_its_two_files_goes_on(root: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.html"
    assert Child(killed_after_its_numbers, root, page).end().code == -signal.SIGKILL
    assert page.with_suffix(".json").exists() and not page.exists()
    diagnose(root, page, "--parts", "gap")
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "page.json"}
    page.unlink()
    with pytest.raises(SystemExit):  # numbers that somebody keeps without their page
        diagnose(root, page, "--parts", "gap")
    assert "page.json already exists" in capsys.readouterr().err
