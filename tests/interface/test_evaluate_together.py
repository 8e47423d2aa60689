"""`evaluate` by two processes of torchrun: the numbers of one, written and said once; and what one line ends both."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import Quarters
from forked import call, on_two
from PIL import Image
from torch.nn import functional

from consonar import cli, networks
from consonar.components import save_generator, save_tokenizer
from consonar.errors import UserError
from consonar.evaluation.settings import EvaluationSettings
from consonar.origin import Origin


class Spatial(Quarters):
    """`Quarters` with maps and classes, that rank `breaks` does not have."""

    num_spatial = 48

    def __init__(self, breaks):
        self.breaks = breaks

    def __call__(self, images):
        if self.breaks == os.environ.get("RANK"):
            raise UserError("this process has no network")
        return super().__call__(images)

    def outputs(self, images):
        maps = functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return self(images), maps, maps.softmax(1)


def evaluate(breaks, words):
    networks.FEATURE_NETWORKS["quarters"] = lambda device: Spatial(breaks)
    try:
        cli.main(["evaluate", *map(str, words), "--feature-network", "quarters"])
    finally:  # threads of the group end with it: alive when the interpreter ends they abort, now and then
        assert not any("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def processes(words, cache, ranks=2, breaks="-", run=evaluate):
    """How every process ended."""
    start = on_two if ranks == 2 else lambda *given, **settings: [call(*given, **settings)]
    return start(run, breaks, words, CONSONAR_CACHE=str(cache))


@dataclass(frozen=True, kw_only=True)
class FewCompared(EvaluationSettings):
    """Of which single images are drawn from all sets of the test; copies are seen in part of them."""

    max_neighbours_images: int = 18
    copy_quantile: float = 0.5


def evaluate_few(breaks, words):
    sys.modules["consonar.cli.evaluate"].EvaluationSettings = FewCompared
    evaluate(breaks, words)


@pytest.fixture
def samples(tmp_path):
    """Two files of the same pictures, the second in another order, and a reference of both, likewise."""
    pictures = np.random.default_rng(0).integers(0, 256, (105, 2, 2, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    np.savez(tmp_path / "known.npz", images=pictures[45:75], labels=np.arange(30) % 3)
    for seed, name in enumerate("ab"):
        order = np.random.default_rng(seed).permutation(105)
        ours = order[order < 45]
        np.savez(tmp_path / f"{name}.npz", images=pictures[ours], labels=ours % 3)
        for number, row in enumerate(order[order >= 45]):
            folder = tmp_path / name / ("train" if row < 81 else "validation") / "xyz"[row % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures[row]).save(folder / f"{number:03d}.png")
    return tmp_path


DEFAULT = "fd,sfd,kid,is,precision,recall,density,coverage,copy-rate"


@pytest.mark.parametrize(
    "wanted", [DEFAULT, pytest.param(f"{DEFAULT},fd-infinity,fd-per-class", marks=pytest.mark.slow)]
)
def test_two_processes_give_the_numbers_of_one_in_any_order_and_batch(samples, wanted):
    """Of sets that are all larger than what is compared one by one, which is drawn."""
    words = ["--metrics", wanted, "--draws", "3"]
    a, b = ([samples / f"{name}.npz", "--reference", samples / name, *words] for name in "ab")
    alone = processes([*a, "--out", samples / "1.json"], samples / "cache-1", ranks=1, run=evaluate_few)
    assert alone[0][0] == 0, alone
    b += ["--out", samples / "2.json", "--batch-size", "7"]
    both = processes(b, samples / "cache-2", run=evaluate_few)
    assert [status for status, *_ in both] == [0, 0], both
    assert "results:" in both[0][1] and both[1][1] == "", "one of them says it"
    one, two = (json.loads((samples / f"{count}.json").read_text()) for count in (1, 2))
    assert one["metrics"].keys() == two["metrics"].keys() and len(one["metrics"]) == (12 if wanted == DEFAULT else 16)
    assert "single images of 18 drawn" in one["protocol"] and 0 < one["metrics"]["copy rate (features)"]["value"] < 1
    for name, found in one["metrics"].items():
        again = two["metrics"][name]
        for part in ("value", "spread", "error", "classes"):
            if found.get(part) is not None:
                assert again[part] == pytest.approx(found[part], rel=1e-4, abs=1e-7), (name, part)
    for count in (1, 2):
        assert len([*(samples / f"cache-{count}" / "features").iterdir()]) == 2, "train and validation, once"


@pytest.mark.parametrize("where", ["both", "1", "end"])
def test_what_fails_in_one_process_ends_both_with_one_line(samples, where):
    words = [samples / "a.npz", "--reference", samples / ("none.npz" if where == "both" else "known.npz")]
    words += ["--batch-size", "7"]
    if where == "end":  # the first alone writes; there the results cannot be
        words += ["--out", samples / "r.json"]
        (samples / "r.json").write_text("[]")
    ended = processes(words, samples / "cache", breaks=where)
    assert [status for status, *_ in ended] == [2, 2], ended
    lines = [line for *_, errors in ended for line in errors.splitlines()]
    assert len(lines) == 1 and lines[0].startswith("consonar: "), lines
    assert {"both": "none.npz", "1": "this process has no network", "end": "r.json"}[where] in lines[0]


@pytest.mark.slow
def test_two_processes_share_runs(tiny_generator, tokenizer, tokenizer_folder, picture_folder, tmp_path):
    for name in ("generator", "tokenizer"):
        for count in (1, 2):
            run = tmp_path / f"{name}-{count}"
            if name == "tokenizer":
                save_tokenizer(tokenizer, run / "model")
            else:
                origin = Origin(tokenizer=str(tokenizer_folder), tokenizer_fingerprint=tokenizer.fingerprint)
                save_generator(tiny_generator(), run / "model", origin)
            (run / "config.json").write_text("{}")
            (run / "metrics.jsonl").touch()
            words = [run, "--reference", picture_folder]
            if name == "generator":
                words += ["--num-samples", "10", "--draws", "2", "--batch-size", "4", "--temperatures", "1,0.8"]
            ended = processes(words, tmp_path / f"cache-{count}", ranks=count)
            assert [status for status, *_ in ended] == [0] * count, ended
            assert all(out == "" for _, out, _ in ended[1:])
        of = "results.json" if name == "generator" else "reconstruction.json"
        one, two = (json.loads((tmp_path / f"{name}-{count}" / of).read_text()) for count in (1, 2))
        if name == "tokenizer":
            assert two["rFD(quarters)"] == pytest.approx(one["rFD(quarters)"], rel=1e-4)
            assert two["origin"]["images_sha256"] == one["origin"]["images_sha256"]
            assert two["psnr"] == pytest.approx(one["psnr"], rel=1e-4) and one["num_images"] == two["num_images"]
            continue
        for first, second in zip(one["rows"], two["rows"], strict=True):
            assert first["metrics"].keys() == second["metrics"].keys() and len(first["metrics"]) > 5
            for metric, found in first["metrics"].items():
                again = second["metrics"][metric]
                for part in ("value", "spread"):
                    expected = found[part] if found[part] is None else pytest.approx(found[part], rel=1e-4, abs=1e-7)
                    assert again[part] == expected, (metric, part)
            assert second["num_samples"] == 10 and first["samples"] == second["samples"]
        names = [sorted(path.name for path in (tmp_path / f"{name}-{count}").iterdir()) for count in (1, 2)]
        assert names[0] == names[1]


def test_one_process_checks(samples, monkeypatch, capsys):
    ended = processes(["--check", samples / "a.npz"], samples / "cache")
    lines = [line for *_, errors in ended for line in errors.splitlines()]
    assert [status for status, *_ in ended] == [2, 2] and lines == [
        "consonar: --check: is for one process; leave torchrun away"
    ]
    with pytest.raises(SystemExit):
        cli.main(["evaluate"])
    assert "name samples" in capsys.readouterr().err


def test_what_would_keep_a_group_is_imported_before_there_is_one():
    """The server of the others has imported it in any case."""
    told = "import sys, consonar.distributed; sys.exit('torch.distributed.nn' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0
