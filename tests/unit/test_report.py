"""The report page: what it says is what the run folders hold, and it needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from consonar.errors import UserError
from consonar.evaluation.results import Measurement
from consonar.networks.scene_detector import detector_sha256
from consonar.report import MAX_RUNS, images, load_runs, write_report
from consonar.report.records import measurement_text
from consonar.report.tables import compared

FD = "FD(efficientnet-lite0) validation"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects images, tags and text, and fails where tags do not nest."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def images_of(page: Page) -> list[np.ndarray]:
    sources = [value for tag, key, value in page.attributes if tag == "img" and key == "src"]
    assert all(source.startswith("data:image/") for source in sources)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))) for source in sources]


def write_run(folder: Path, *, weight: float = 0.0, noise: float = 0.0, config: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    noisy = {"schedule": "constant", "max_rate": noise} if noise else {"schedule": "none"}
    settings = {
        "recipe": folder.name,
        "objective": {"kind": "consistency", "embedding_weight": weight, "noise": noisy},
        "data": {"source": "openmoji"},
        "loop": {"steps": 20, "batch_size": 4},
    }
    (folder / "config.json").write_text(json.dumps(settings | (config or {})))
    lines = [{"step": s, "time": 6.0 * s, "train/cross_entropy": 7.0 - s / 10, "train/noise_rate": noise}
             for s in (1, 10, 20)]  # fmt: skip
    lines.append({"step": 20, "time": 120.0, "validation/cross_entropy": 5.125})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_results(
    folder: Path, values: dict[float, float], *, spread: float | None = 1.0, copied: float = 0.03
) -> None:
    """Rows {temperature: FD}; one 8 x 8 sample per (class, seed) whose red channel is 10 * class + seed."""
    labels, seeds = np.repeat(np.arange(3), 2), np.tile(np.arange(2), 3)
    images = np.zeros((6, 8, 8, 3), np.uint8)
    images[..., 0] = (10 * labels + seeds)[:, None, None]
    names = np.array(["faces", "<i>food", "flags"])
    rows = []
    for temperature, value in values.items():
        name = f"samples_t{temperature}.npz"
        np.savez(folder / name, images=images, labels=labels, seeds=seeds, nearest_train=images + 1, class_names=names)
        metrics = {FD: {"value": value, "spread": spread}, "copy rate (features)": {"value": copied, "spread": 0.001}}
        metrics |= {"precision": {"value": 0.7}, "recall": {"value": temperature / 2}}
        rows.append({"temperature": temperature, "num_samples": 2048, "metrics": metrics, "samples": name})
    best = min(range(len(rows)), key=lambda i: rows[i]["metrics"][FD]["value"])
    content = {"schema": 1, "rows": rows, "best": best, "checkpoint_sha256": "c0ffee", "versions": {"torch": "2.13.0"}}
    (folder / "results.json").write_text(json.dumps(content))


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    plain, rear = write_run(tmp_path / "plain"), write_run(tmp_path / "rear", weight=1.0, noise=0.5)
    write_results(plain, {1.0: 64.5, 0.9: 62.25})
    write_results(rear, {1.0: 58.75, 0.9: 60.0}, copied=0.05)
    return [plain, rear]


def test_the_page_is_one_file_that_parses_and_loads_nothing(two_runs, tmp_path):
    html = write_report(two_runs, tmp_path / "new" / "report.html").read_text()
    page = Page(html)
    assert "script" not in page.tags and "link" not in page.tags and "http" not in html
    assert not [a for a in page.attributes if a[1] in ("src", "href") and not a[2].startswith(("data:", "#"))]
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|href="#)([^")]+)', html)
    assert used and set(used) <= set(ids)
    # A strip of 6 for each run; 12 samples side by side; one sample and neighbour per class and run.
    assert len(images_of(page)) == 2 * 6 + 12 + 2 * 6
    assert page.tags.count("img") == len([a for a in page.attributes if a[:2] == ("img", "alt") and a[2]])


@pytest.mark.parametrize(
    ("images", "named"),
    [
        ("openmoji", True),
        ("scenes", True),
        ("scenes:8000", True),
        ("scenes:8000?seed=1", True),
        ("imagefolder:street-scenes", False),
    ],
)
def test_whose_emoji_they_are_is_said(tmp_path, images, named):
    write_run(tmp_path / "run", config={"data": {"images": images}})
    assert ("CC BY-SA 4.0" in write_report([tmp_path / "run"], tmp_path / "r.html").read_text()) == named


def test_values_appear_and_samples_are_paired_by_seed(two_runs, tmp_path):
    page = Page(write_report(two_runs, tmp_path / "r.html").read_text())
    text = page.text.replace("\u00a0", " ")
    for value in (
        "64.5 ± 1.0",
        "62.2 ± 1.0",
        "58.8 ± 1.0",
        "60.0 ± 1.0",
        "5.00 ± 0.10 %",
        "2,048",
        "c0ffee",
        "2.0 min",
    ):
        assert value in text
    assert "CC BY-SA 4.0" in text and "<i>food" in text
    red = [int(image[0, 0, 0]) for image in images_of(page)]
    assert page.tags.count("svg") > 10 and "T 0.9" in text and "temperature" in text
    assert red[:12] == [0, 10, 20, 1, 11, 21] * 2  # a class for each column, the same seeds for both runs
    assert red[12:24] == [0, 1, 0, 1, 10, 11, 10, 11, 20, 21, 20, 21]


def test_the_page_is_the_same_bytes_twice_and_existing_out_is_refused(two_runs, tmp_path, monkeypatch):
    first = write_report(two_runs, tmp_path / "a.html")
    assert first.read_bytes() == write_report(two_runs, tmp_path / "b.html").read_bytes()
    with pytest.raises(UserError, match=r"^--out: .* already exists"):
        write_report(two_runs, first)
    before = first.read_bytes()
    write_report(two_runs, first, title="A <title>", overwrite=True)
    assert first.read_bytes() != before and "<title>A &lt;title&gt;</title>" in first.read_text()
    with pytest.raises(UserError, match="is a folder"):
        write_report(two_runs, tmp_path)
    assert not list(tmp_path.glob(".*"))

    def late(runs):
        (tmp_path / "late.html").touch()
        return load_runs(runs)

    monkeypatch.setattr("consonar.report.load_runs", late)
    with pytest.raises(UserError, match=r"late\.html already exists"):  # it came while the runs were read
        write_report(two_runs, tmp_path / "late.html")


def test_what_is_no_page_is_not_overwritten_by_one(two_runs):
    config = two_runs[0] / "config.json"
    before = config.read_bytes()
    with pytest.raises(UserError, match="is no page, so it is not overwritten"):
        write_report(two_runs, config, overwrite=True)
    assert config.read_bytes() == before


@pytest.mark.parametrize("change", [
    {"objective": "x"}, {"init": 7}, {"objective": [1]},
    {"objective": {"kind": []}}, {"objective": {"kind": "consistency", "noise": 3}},
])  # fmt: skip
def test_a_configuration_that_no_training_writes_is_named(change, two_runs, tmp_path):
    path = two_runs[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"config\.json: {next(iter(change))}(:| is) "):
        write_report(two_runs, tmp_path / "a.html")


def test_an_opening_picture_is_on_the_page_whole(two_runs, tmp_path):
    Image.fromarray(np.full((200, 300, 3), 77, np.uint8)).save(tmp_path / "opening.png")
    page = Page(write_report(two_runs, tmp_path / "r.html", opening=tmp_path / "opening.png").read_text())
    assert [image.shape for image in images_of(page) if image[0, 0, 0] == 77] == [(200, 300, 3)]
    assert "What a longer training gives" in page.text


def test_names_are_escaped(tmp_path):
    run = write_run(tmp_path / "<b>x", config={"note": "<script>alert(1)</script>"})
    write_results(run, {1.0: 60.0})
    page = Page(write_report([run], tmp_path / "r.html").read_text())
    assert "script" not in page.tags and "b" not in page.tags and "Run <b>x" in page.text


@pytest.mark.parametrize("missing", ["results.json", "metrics.jsonl", "both"])
def test_a_run_with_missing_pieces_still_makes_a_page(two_runs, tmp_path, missing):
    for name in ("results.json", "metrics.jsonl") if missing == "both" else (missing,):
        (two_runs[0] / name).unlink()
    page = Page(write_report(two_runs, tmp_path / "r.html").read_text())
    assert "rear" in page.text and images_of(page)
    alone = Page(write_report(two_runs[:1], tmp_path / "alone.html").read_text())
    if missing == "both":
        assert "Configuration" in alone.text and "Training" not in alone.text and not images_of(alone)
    if missing == "results.json":
        assert "5.125" in alone.text and "is not yet a better picture" in alone.text


def test_a_tokenizer_run_shows_pairs_and_its_numbers(tmp_path):
    run = write_run(tmp_path / "tokenizer", config={"objective": {"kind": "reconstruction"}})
    (run / "metrics.jsonl").write_text('{"step": 5, "time": 1.0, "train/mse": 0.1, "validation/psnr": 21.5}\n')
    originals = np.full((3, 8, 8, 3), 200, np.uint8)
    np.savez(
        run / "reconstructions.npz", originals=originals, reconstructions=originals - 9, names=np.array(list("abc"))
    )
    (run / "reconstruction.json").write_text('{"psnr": 20.25, "usage": 0.93}')
    (run / "samples").mkdir()
    Image.fromarray(originals[0]).save(run / "samples" / "step_000005.png")
    page = Page(write_report([run], tmp_path / "r.html").read_text())
    assert [int(image[0, 0, 0]) for image in images_of(page)] == [200, 191] * 3 + [200]
    assert "PSNR (dB) 20.25, codes used (share of the codebook) 0.93" in page.text and "plain AR" not in page.text


def change(run: Path, **entries) -> None:
    """Entries of results.json."""
    content = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(content | entries))


def _set(run: Path, name: str, text: str) -> None:
    (run / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "no config.json"),
        (lambda run: _set(run, "config.json", "{"), "config.json: not valid JSON"),
        (lambda run: _set(run, "config.json", "[]"), "holds a list"),
        (lambda run: _set(run, "metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}'), "metrics.jsonl line 2"),
        (lambda run: _set(run, "metrics.jsonl", '{"loss": 1}\n'), "integer 'step'"),
        (lambda run: _set(run, "results.json", '{"schema": 2}'), "schema: Input should be 1, got 2; evaluate again"),
        (lambda run: _set(run, "results.json", '{"schema": 1, "rows": []}'), "rows: .* at least 1 item"),
        (lambda run: _set(run, "results.json", "{}"), "schema: Input should be 1, got None"),
        (lambda run: _set(run, "results.json", '{"schema": 1}'), "rows: Input should be a valid tuple, got None"),
        (lambda run: change(run, best=2), "best is 2; expected the index of a row, 0 to 1"),
        (lambda run: change(run, noise_floor={"FD": 3}), r"noise_floor.FD: .*, got 3; evaluate again"),
        (lambda run: change(run, remarks=[1]), "remarks.0: Input should be a valid string, got 1"),
        (
            lambda run: _set(run, "results.json", '{"schema": 1, "rows": [{"metrics": {}}]}'),
            r"rows.0.temperature: Field required, got \{'metrics'",
        ),
        (lambda run: (run / "samples_t1.0.npz").unlink(), "samples_t1.0.npz, which is not there"),
        (lambda run: _set(run, "samples_t0.9.npz", "x"), "not an .npz"),
        (lambda run: np.savez(run / "samples_t0.9.npz", images=np.zeros((1, 2, 2, 3))), "holds no labels, seeds"),
    ],
)
def test_a_broken_run_is_one_clear_line(two_runs, tmp_path, damage, message):
    damage(two_runs[0])
    with pytest.raises(UserError, match=message) as error:
        write_report(two_runs, tmp_path / "r.html")
    assert "\n" not in str(error.value) and not (tmp_path / "r.html").exists()


def test_a_run_whose_last_line_was_cut_short_still_makes_a_page(two_runs, tmp_path):
    """A killed process or a full disk: `train --resume` goes on from such a file as well."""
    with (two_runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/l')
    write_report(two_runs, tmp_path / "r.html")
    assert (tmp_path / "r.html").exists()


def test_wrong_runs_are_refused_and_equal_names_are_told_apart(tmp_path):
    first, second = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")
    assert [run.name for run in load_runs([first, second])] == ["a/run", "b/run"]
    for paths, message in [
        ([], f"1 to {MAX_RUNS}"), ([first] * (MAX_RUNS + 1), f"1 to {MAX_RUNS}"), ([first, first], "more than once"),
        ([tmp_path / "none"], "no such folder"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_runs(paths)


def test_methods_are_read_off_the_record_of_the_run(tmp_path):
    runs = [write_run(tmp_path / f"{w}{n}", weight=w, noise=n) for w in (0.0, 1.0) for n in (0.0, 0.5)]
    runs += [write_run(tmp_path / kind, config={"objective": {"kind": kind}}) for kind in ("consistency", "mine")]
    runs.append(write_run(tmp_path / "none", config={"objective": None}))
    methods = [run.method for run in load_runs(runs)]
    assert methods[:4] == ["plain AR", "noisy context only", "codebook alignment only", "reAR"]
    assert methods[4:] == ["plain AR", "mine", "run"]  # of an older version, of another package, of neither


def test_the_spread_sets_the_digits():
    assert measurement_text(Measurement(61.234, 1.26)) == "61.2\u00a0±\u00a01.3"
    assert measurement_text(Measurement(0.031, 0.004), percent=True) == "3.10\u00a0±\u00a00.40\u00a0%"
    assert measurement_text(Measurement(61.23456)) == "61.23"


def test_configuration_puts_differences_first(two_runs):
    runs = load_runs(two_runs)
    differs, same = compared(runs, [run.config for run in runs])
    assert differs["headings"] == ["plain", "rear"] and differs["rows"] == [
        ("recipe", ["plain", "rear"]),
        ("objective.embedding_weight", ["0.0", "1.0"]),
        ("objective.noise.schedule", ["none", "constant"]),
        ("objective.noise.max_rate", ["not set", "0.5"]),
    ]
    assert ("loop.steps", ["20"]) in same["rows"]


def picture_of(html: str, alt: str) -> np.ndarray:
    (source,) = re.findall(rf'src="data:image/png;base64,([^"]*)" alt="{re.escape(alt)}"', html)
    return np.array(Image.open(io.BytesIO(base64.b64decode(source))))


def ask_in_words(run: Path, prompts: list[str]) -> None:
    """Makes the labels of a run's samples numbers of prompts."""
    path = run / "samples_t1.0.npz"
    with np.load(path) as arrays:
        kept = {key: arrays[key] for key in arrays.files if key != "class_names"}
    np.savez(path, settings=np.array(json.dumps({"prompts": prompts})), **kept)


def test_samples_of_prompts_stand_under_their_prompt_whatever_number_each_run_gives_it(two_runs, tmp_path):
    for run in two_runs:
        write_results(run, {1.0: 50.0})
    long = "a dog " * 60
    cut = f"{long[:100]}…{long.strip()[-59:]}"
    ask_in_words(two_runs[0], ["two <b>cats</b> & 一只猫", long, "a\nhat"])
    ask_in_words(two_runs[1], [long, "a hat", "two <b>cats</b> & 一只猫"])
    html = write_report(two_runs, tmp_path / "r.html").read_text()
    page = Page(html)
    part = html[html.index('aria-label="Samples side by side"') :].split("</details>")[0]
    headings = re.findall(r"<h4>(.*?)</h4>", part)
    assert headings == ["two &lt;b&gt;cats&lt;/b&gt; &amp; 一只猫", cut, "a hat"] and "b" not in page.tags
    shown = re.findall(r'alt="(\w+): sample of a hat, seed (\d)"', part)
    # The red channel says which label a picture had: of the hat 2 in one run and 1 in the other.
    reds = {key: int(picture_of(part, f"{key[0]}: sample of a hat, seed {key[1]}")[0, 0, 0]) for key in shown}
    assert sorted(reds.values()) == [10, 11, 20, 21]
    assert "a line is one prompt" in page.text


def test_long_prompts_that_begin_alike_have_rows_of_their_own(two_runs):
    prompts = ["a hat", *(f"{'a dog ' * 60} and {other}" for other in ("a cat", "a car"))]
    for run in two_runs:
        write_results(run, {1.0: 50.0})
        ask_in_words(run, prompts)
    runs = load_runs(two_runs)
    lines, _ = images.sample_lines(runs, images.load_sheets(runs))
    assert [name[-5:] for name, _ in lines] == ["a hat", "a cat", "a car"]


def test_labels_that_are_no_numbers_of_prompts_are_told(two_runs, tmp_path):
    write_results(two_runs[0], {1.0: 50.0})
    ask_in_words(two_runs[0], ["one"])
    with pytest.raises(UserError, match=r"samples_t1\.0\.npz: settings: .*labels that are no numbers of prompts"):
        write_report(two_runs[:1], tmp_path / "r.html")


def write_scores(
    run: Path,
    share: float,
    texts: list[str],
    *,
    tokenizer: str = "scenes-64",
    detector: str | None = None,
    seed: int = 0,
) -> None:
    """A file of compositional scores, as `evaluate --prompts` writes it."""
    metrics = {
        name: {"value": share, "spread": None, "interval": [share - 0.1, share + 0.1]}
        for name in ("compositional score", "compositional score (pair)")
    }
    rows = [{"temperature": 1.0, "guidance_scale": scale, "seed": seed, "metrics": metrics} for scale in (1.0, 3.0)]
    content = {
        "schema": 1, "prompts": {"name": "p", "texts": texts, "per_prompt": 4}, "rows": rows,
        "ceilings": {
            name: {"compositional score": {"value": value, "interval": [0.9, 1.0]}}
            for name, value in {"true pictures": 0.97, "reconstructions": 0.9 + len(tokenizer) / 200}.items()
        },
        "checkpoint_sha256": None, "tokenizer": {"name": tokenizer, "fingerprint": f"print of {tokenizer}"},
        "detector_sha256": detector or detector_sha256(),
    }  # fmt: skip
    (run / "compositional.json").write_text(json.dumps(content))


def test_scores_by_kind_stand_beside_their_ceiling_and_for_equal_prompts_alone(two_runs, tmp_path):
    write_scores(two_runs[0], 0.5, ["a dog", "a cat"])
    write_scores(two_runs[1], 0.25, ["a dog"])
    page = Page(write_report(two_runs, tmp_path / "r.html").read_text())
    part = " ".join(page.text.partition("Does it show what was asked?")[2].split())
    assert "50 % [40, 60]" in part and "temperature 1, guidance 3" in part and "true pictures97 % [90, 100]–" in part
    assert "25 %" not in part and f"The scores of {two_runs[1].name} are not shown: they are of other prompts." in part
    assert "2 prompts, pictures of each: 4" in part
    assert "reconstructions94 % [90, 100]" in part and "not this version's" not in part
    (two_runs[0] / "compositional.json").write_text('{"schema": 1, "prompts": {}}')
    with pytest.raises(UserError, match=r"compositional\.json: not compositional scores"):
        write_report(two_runs, tmp_path / "other.html")


def test_scores_of_different_seeds_are_said_to_be(two_runs, tmp_path):
    for seed in (0, 7):
        write_scores(two_runs[0], 0.5, ["a dog"])
        write_scores(two_runs[1], 0.25, ["a dog"], seed=seed)
        part = " ".join(Page(write_report(two_runs, tmp_path / f"{seed}.html").read_text()).text.split())
        said = f"different seeds, which differ by chance as well: {two_runs[0].name} 0, {two_runs[1].name} 7."
        assert (said in part) == (seed == 7) and "25 %" in part


def test_scores_have_the_ceiling_of_their_own_tokenizer_and_one_detector(two_runs, tmp_path):
    write_scores(two_runs[0], 0.5, ["a dog"])
    write_scores(two_runs[1], 0.25, ["a dog"], tokenizer="scenes-64-f4")
    part = " ".join(Page(write_report(two_runs, tmp_path / "a.html").read_text()).text.split())
    assert "reconstructions (scenes-64)94 % [90, 100]" in part and "reconstructions (scenes-64-f4)96 %" in part
    assert part.count("true pictures97 %") == 1  # alike for both
    write_scores(two_runs[1], 0.25, ["a dog"], detector="another")
    part = " ".join(Page(write_report(two_runs, tmp_path / "b.html").read_text()).text.split())
    assert "25 %" not in part and f"{two_runs[1].name} are not shown: another detector looked at its pictures" in part
    write_scores(two_runs[0], 0.5, ["a dog"], detector="another")
    part = " ".join(Page(write_report(two_runs, tmp_path / "c.html").read_text()).text.split())
    assert "25 %" in part and "The detector is not this version's (another...)" in part


def test_a_run_whose_prompts_alone_were_scored_is_told_how_its_pictures_come(two_runs, tmp_path):
    write_results(two_runs[0], {1.0: 50.0})
    ask_in_words(two_runs[0], ["a dog", "a cat", "a hat"])
    (two_runs[1] / "results.json").unlink()
    write_scores(two_runs[1], 0.5, ["a dog"])
    html = write_report(two_runs, tmp_path / "r.html").read_text()
    told = "Pictures come with consonar evaluate RUN --reference DATA; a score of prompts alone keeps none."
    assert f"Not sampled: {two_runs[1].name}. {told}" in " ".join(Page(html).text.split())
    assert '<span class=""> Columns: a dog; a cat; a hat.' in html  # on narrow screens too
