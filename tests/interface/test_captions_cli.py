"""Generators of captions by the command line: tokenised, trained, resumed, sampled; what does not fit is refused."""

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import picture, save_pictures, save_tokenizer_of_32
from PIL import Image
from tiny_encoder import save_encoder

from consonar.cli import main
from consonar.cli.prompts import read_prompts
from consonar.components import load_generator, load_own_text_encoder, load_tokenizer, read_origin
from consonar.convert.layouts.generators import LLAMAGEN
from consonar.data.scenes import KINDS
from consonar.data.splits import open_splits
from consonar.data.tokens import TokenStore
from consonar.data.transforms import from_uint8
from consonar.evaluation import compositional
from consonar.evaluation.compositional import VALIDATION_PROMPTS, validation_prompts
from consonar.generators.llamagen import LlamaGenConfig, LlamaGenGenerator
from consonar.sampling.sample import SamplerConfig, sample
from consonar.seeding import generator as seeded
from consonar.types import Grid

MODEL = ["--model.width", "16", "--model.num-layers", "2", "--model.num-heads", "2", "--model.caption-dim", "8",
         "--model.num-condition-tokens", "12"]  # fmt: skip
SHORT = ["--loop.batch-size", "4", "--loop.steps", "4", "--loop.save-every", "2", "--data.validation-items", "4",
         "--loop.precision", "fp32"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tokenizer, encoder, two stores and a run."""
    folder = tmp_path_factory.mktemp("captions")
    save_tokenizer_of_32(folder / "tok")
    save_encoder(folder / "enc")
    main(["tokenize", "--tokenizer", str(folder / "tok"), "--data", "scenes:24", "--out",
          str(folder / "scenes")])  # fmt: skip
    train(folder, "run")
    return folder


def train(folder: Path, out: str, *more: str, encoder: str = "enc") -> None:
    main(["train", "ar-scenes", "--tokenizer", str(folder / "tok"), "--data.tokens", str(folder / "scenes"),
          "--text-encoder", str(folder / encoder), "--out", str(folder / out), "--quiet", *MODEL, *SHORT,
          *more])  # fmt: skip


def refusal(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_run_says_what_read_its_captions(place):
    origin = json.loads((place / "run/origin.json").read_text())
    encoder = load_own_text_encoder(place / "run", load_generator(place / "run"))
    assert origin["text_encoder_fingerprint"] == encoder.fingerprint and origin["class_names"] is None
    assert encoder.length == 12
    assert list((place / "run/samples").glob("*.png"))
    lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    assert any("validation/cross_entropy" in line for line in lines)


def test_a_recipe_takes_the_tokenizer_that_made_its_tokens(place, tmp_path, capsys):
    main(["tokenize", "--tokenizer", "openmoji-64", "--data", "scenes:4", "--split", "train", "--out",
          str(tmp_path / "tokens")])  # fmt: skip
    words = ["train", "ar-scenes", "--data.tokens", str(tmp_path / "tokens"), "--data.validation-items", "0",
             "--text-encoder", str(place / "enc"), "--loop.steps", "1", "--loop.batch-size", "4", *MODEL]  # fmt: skip
    main([*words, "--out", str(tmp_path / "run"), "--quiet"])
    assert read_origin(tmp_path / "run").tokenizer == "openmoji-64"
    line = refusal(capsys, *words, "--out", str(tmp_path / "other"), "--tokenizer", "openmoji-64-f4")
    assert "the tokenizer is 'openmoji-64'" in line and "in this run it is 'openmoji-64-f4'" in line


def test_a_resumed_run_is_the_uninterrupted_one(place):
    train(place, "parts", "--stop-at", "2")
    train(place, "parts", "--resume")
    whole, parts = (load_generator(place / name).state_dict() for name in ("run", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_what_is_drawn_follows_the_prompt_and_the_seed_alone(place, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "two red apples above a dog"}\n{"prompt": "a blue cat"}\n')
    main(["sample", str(place / "run"), "--prompts", str(prompts), "--num-samples", "5", "--out",
          str(tmp_path / "o.npz"), "--guidance-scale", "2", "--precision", "fp32"])  # fmt: skip
    with np.load(tmp_path / "o.npz") as found:
        assert found["labels"].tolist() == [0, 1, 0, 1, 0]
        settings, tokens = json.loads(str(found["settings"])), found["tokens"]
    assert settings["prompts"] == ["two red apples above a dog", "a blue cat"]
    generator = load_generator(place / "run")
    encoder = load_own_text_encoder(place / "run", generator)
    condition = encoder.encode(["a blue cat"])
    alone = sample(generator, load_tokenizer(place / "tok"), condition, seeds=[3],
                   config=SamplerConfig(guidance_scale=2.0), precision="fp32")  # fmt: skip
    assert np.array_equal(alone.tokens[0].numpy(), tokens[3])
    main(["sample", str(place / "run"), "--prompt", "a blue cat", "--seed", "3", "--out", str(tmp_path / "one"),
          "--guidance-scale", "2", "--precision", "fp32"])  # fmt: skip
    assert (tmp_path / "one/000000_prompt0.png").is_file()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a dog\na cat\n\n \n\n"),
        ("p.jsonl", '{"prompt": "a dog"}\n{"prompt": "a cat"}\n\n'),
        ("p.json", '["a dog", {"prompt": "a cat", "tag": "single"}]\n'),
    ],
)
def test_the_prompts_of_a_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    kind = "item" if name == "p.json" else "line"
    assert read_prompts(None, tmp_path / name) == {
        f"--prompts: {tmp_path / name} {kind} 1": "a dog",
        f"--prompts: {tmp_path / name} {kind} 2": "a cat",
    }


def test_another_encoder_is_refused(place, tmp_path, capsys):
    save_encoder(place / "other", seed=1)
    line = refusal(capsys, "sample", str(place / "run"), "--prompt", "a dog", "--text-encoder", str(place / "other"),
                   "--out", str(tmp_path / "x.png"))  # fmt: skip
    assert "text_encoder: the text encoder is" in line and "its features mean something else" in line
    with pytest.raises(SystemExit):
        train(place, "run", "--resume", encoder="other")
    assert "the text encoder is" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(place, "again", "--init", str(place / "run"), encoder="other")
    assert "the text encoder is" in capsys.readouterr().err and not (place / "again").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "classes: this generator has none, it takes captions: give --prompt"),
        (["--prompt", "  "], "--prompt: '  ' is no prompt"),
        (["--prompt", "[PAD]"], "--prompt: '[PAD]' has no words for enc"),
        (
            ["--prompt", "a\0dog"],
            "--prompt: not text in UTF-8, damaged or cut short (ValueError: it holds a zero byte)",
        ),
        (["--prompt", "a dog", "--classes", "1"], "--classes: given together with a prompt"),
        (["--prompt", "a dog", "--prompts", "x.txt"], "--prompt: give either it or --prompts FILE"),
        (["--prompts", "nowhere.txt"], "--prompts: nowhere.txt: cannot be read"),
        (["--prompt", "a dog", "--num-samples", "0"], "--num-samples: 0 is not between"),
        (["--classes", "1", "--text-encoder", "minilm"], "--text-encoder: 'minilm' is read only with --prompt"),
    ],
)
def test_wrong_prompts(place, tmp_path, capsys, words, said):
    line = refusal(capsys, "sample", str(place / "run"), "--out", str(tmp_path / "x.png"), *words)
    assert said in line and line.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"a dog\n\na cat\n", "line 2: '' is no prompt"),
        ("p.txt", b"", "is empty"),
        ("p.txt", b"a dog\na\0cat\n", "line 2: not text in UTF-8"),
        ("p.jsonl", b'{"prompt": "a dog"}\n\n{"prompt": "a cat"}\n\n', "line 2: '' is no prompt"),
        ("p.jsonl", b'{"prompt": "a\\u0000dog"}\n', "line 1: not text in UTF-8"),
        ("p.txt", b"a dog\r\na cat\r\n\xff\n", "p.txt line 3: not text in UTF-8"),
        ("p.jsonl", b'{"prompt": "a dog"}\n{"prompt": "\xe9"}\n', "p.jsonl line 2: not text in UTF-8"),
        ("p.jsonl", b'{"prompt": "a dog"}\n"a cat"\n', 'line 2: a str, no table of JSON with the entry "prompt"'),
        ("p.jsonl", b'{"promt": "a cat", "tag": 1}\n', 'line 1: the entry "prompt" is missing; there: promt, tag'),
        ("p.jsonl", b"a cat\n", "line 1: not JSON such as"),
        ("p.csv", b"prompt\na dog\n", "ending: unknown '.csv'; choices: .txt, .jsonl, .json"),
        ("p", b"a dog\n", "ending: unknown ''; choices"),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1: 3 is no prompt"),
        ("p.jsonl", b'{"prompt": "a \\ud83d"}\n', "line 1: not text in UTF-8"),
        ("p.json", b'["a dog", 3]', "item 2: 3 is no prompt"),
        ("p.json", b'[{"text": "a dog"}]', 'item 1: the entry "prompt" is missing; there: text'),
        ("p.json", b'{"prompt": "a dog"}', "not a JSON list of prompts, or of tables such as"),
        ("p.json", b"[]", "is empty"),
        ("p.txt", b"a dog\na cat\na dog\n[PAD]\n", "line 4: '[PAD]' has no words for enc"),
        ("p.jsonl", b'{"prompt": "a dog"}\n{"prompt": "[PAD]"}\n', "line 2: '[PAD]' has no words for enc"),
        ("p.json", b'["a dog", "[PAD]", "[PAD]"]', "item 2: '[PAD]' has no words for enc"),
    ],
)
def test_wrong_files_of_prompts(place, tmp_path, capsys, name, content, said):
    (tmp_path / name).write_bytes(content)
    line = refusal(capsys, "sample", str(place / "run"), "--prompts", str(tmp_path / name), "--out",
                   str(tmp_path / "x.png"))  # fmt: skip
    assert f"--prompts: {tmp_path / name}" in line and said in line and line.count("\n") == 1


def test_a_long_prompt_is_cut_and_that_is_said(place, tmp_path, capsys):
    main(["sample", str(place / "run"), "--prompt", "a dog " * 2000, "--out", str(tmp_path / "x.png")])
    said = capsys.readouterr()
    assert re.search(r"cut after 12 tokens: a dog a dog", said.out) and "Token indices" not in said.err


def test_words_that_the_encoder_does_not_know_are_said(place, tmp_path, capsys):
    for number, prompts in enumerate((["a dog"], ["a unicorn", "a dog", "a griffin"])):
        (tmp_path / "p.json").write_text(json.dumps(prompts))
        main(
            ["sample", str(place / "run"), "--prompts", str(tmp_path / "p.json"), "--out", str(tmp_path / f"{number}")]
        )
    said = [line for line in capsys.readouterr().out.splitlines() if "does not know" in line]
    assert said == ["enc does not know all words of 'a unicorn' and 1 more, and reads those alike"]


def test_generators_of_classes_take_no_prompts(tmp_path, capsys):
    line = refusal(capsys, "sample", "openmoji", "--prompt", "a dog", "--out", str(tmp_path / "x.png"))
    assert "prompts: openmoji takes class ids 0..9" in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model.caption-dim", "9"], "model.caption_dim: 9, but the features of"),
        (["--model.num-condition-tokens", "50"], "model.num_condition_tokens: 50 is not from 1 to 40"),
    ],
)
def test_encoders_that_do_not_fit(place, capsys, more, said):
    words = [word for word in MODEL if word not in (more[0], MODEL[MODEL.index(more[0]) + 1])]
    line = refusal(capsys, "train", "ar-scenes", "--tokenizer", str(place / "tok"), "--data.tokens",
                   str(place / "scenes"), "--text-encoder", str(place / "enc"), "--out", str(place / "bad"),
                   *words, *more)  # fmt: skip
    assert said in line and not (place / "bad").exists()


def test_tokens_without_captions_are_refused(place, tmp_path, capsys):
    pictures = save_pictures(tmp_path / "pictures", size=32)
    main(["tokenize", "--tokenizer", str(place / "tok"), "--data", str(pictures), "--out", str(tmp_path / "tokens")])
    line = refusal(capsys, "train", "ar-scenes", "--tokenizer", str(place / "tok"), "--data.tokens",
                   str(tmp_path / "tokens"), "--text-encoder", str(place / "enc"), "--out", str(tmp_path / "bad"),
                   *MODEL)  # fmt: skip
    assert re.search(r"tokens: .*: 12 of 12 items have no caption", line) and not (tmp_path / "bad").exists()


def test_tokenize_makes_the_features_that_train_reads(place, tmp_path, capsys, monkeypatch):
    """For any length that cuts no caption; ended between the two, the same command makes what is left."""
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    words = ["tokenize", "--tokenizer", str(place / "tok"), "--data", "scenes:10", "--text-encoder", str(place / "enc"),
             "--out", str(tmp_path / "scenes")]  # fmt: skip
    with monkeypatch.context() as ended:
        ended.setattr("consonar.cli.tokenize.CaptionFeatures", lambda *given, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(words)
    main(words)
    said = capsys.readouterr().out
    assert f"train: is there already: {tmp_path / 'scenes'}" in said
    line = r"validation: captions: \d+ different, read by enc; the longest has (\d+) of 40 tokens; (\d+) with words"
    found = re.search(line, said)
    assert found and int(found[1]) <= 12
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache/captions").glob("*/*")}
    assert len(files) == 4
    main(["train", "ar-scenes", "--tokenizer", str(place / "tok"), "--data.tokens", str(tmp_path / "scenes"),
          "--text-encoder", str(place / "enc"), "--out", str(tmp_path / "run"), "--quiet", *MODEL,
          *SHORT])  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache/captions").glob("*/*")} == files


def test_pictures_without_captions_are_refused_before_they_are_tokenized(place, tmp_path, capsys, monkeypatch):
    def given(captions: list[str | None]) -> str:
        dataset = datasets.Dataset.from_dict(
            {"image": [picture(index, 32) for index in range(len(captions))], "caption": captions},
            features=datasets.Features(image=datasets.Image(), caption=datasets.Value("string")),
        )
        dataset.save_to_disk(tmp_path / "data")
        return f"arrow:{tmp_path / 'data'}"

    words = ["tokenize", "--tokenizer", str(place / "tok"), "--out", str(tmp_path / "out"), "--data"]
    main([*words[:-2], str(tmp_path / "kept"), "--data", given(["a dog", "a cat"]), "--captions", "--split", "train"])
    assert TokenStore.open(tmp_path / "kept").metadata.views == "center"  # mirrored, captions may be untrue
    without = f"{given(['a dog', 'a cat'])}?caption="
    for asked in ([*words, without, "--captions"], ["train", "ce-scenes", "--init", str(place / "run"), "--out",
                  str(tmp_path / "ce"), "--data", without]):  # fmt: skip
        with monkeypatch.context() as untouched:  # before a picture is read
            untouched.delattr("consonar.data.huggingface.DatasetImages.read")
            line = refusal(capsys, *asked)
        assert "data: no caption column in 'arrow:" in line and line.endswith("; its columns: image, caption\n")
    few = given(["a dog", "", None, *["a cat"] * 5])
    line = refusal(capsys, *words, few, "--captions", "--validation-split", "0%")
    assert re.search(
        r"--captions: arrow:\S+: 2 of 8 items have no caption \(the first: row 1 of the data, counted .*, ''\); give",
        line,
    )
    odd = given(["a dog", "[PAD]", *["a cat"] * 6])
    line = refusal(capsys, *words, odd, "--text-encoder", str(place / "enc"), "--validation-split", "0%")
    assert "1 of 8 items have no caption (the first: row 1 of the data, counted from 0, '[PAD]')" in line
    odd = given([*["a dog"] * 7, "[PAD]"])
    for asked in (["--captions", "--text-encoder", str(place / "enc")], []):
        start = words if asked else ["train", "ce-scenes", "--init", str(place / "run"), "--out", str(tmp_path / "ce"),
                                     "--data"]  # fmt: skip
        split = "--validation-split" if asked else "--data.validation-split"
        line = refusal(capsys, *start, odd, *asked, split, "25%")  # wherever it is then
        assert "row 7 of the data, counted from 0" in line and "[PAD]" in line
    few = given(["a dog", "", None, *["a cat"] * 5])
    folder = save_pictures(tmp_path / "pictures", size=32)
    for option in (["--captions"], ["--text-encoder", str(place / "enc")]):
        line = refusal(capsys, *words, str(folder), *option)
        assert f"--captions: no picture of {str(folder)!r} has one; leave --captions" in line
    assert refusal(capsys, *words, "scenes:8", "--text-encoder", "nowhere").count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.parts").exists()
    # Where captions are known only when pictures are read: at the first shard in which they lack.
    monkeypatch.delattr("consonar.data.huggingface.DatasetImages.captions")
    line = refusal(capsys, *words, few, "--captions", "--validation-split", "0%")
    assert re.search(r"arrow:(\S+), shard 0: 2 of 8 items have no caption \(the first: arrow:\1/1, ''\)", line)
    main([*words, few, "--validation-split", "0%", "--views", "center"])  # goes on with that shard
    assert TokenStore.open(tmp_path / "out").metadata.counts.captioned == 7


def test_an_encoder_that_nothing_reads_is_refused(place, tmp_path, capsys):
    line = refusal(capsys, "train", "ar-openmoji", "--tokenizer", str(place / "tok"), "--data.tokens",
                   str(place / "scenes"), "--text-encoder", "minilm", "--out", str(tmp_path / "bad"))  # fmt: skip
    assert "text_encoder: 'minilm' is read only with a generator of captions" in line


def test_an_encoder_of_another_width_and_a_start_model_of_classes_are_refused(place, tmp_path, capsys):
    out = ["--out", str(tmp_path / "bad")]
    wide = ["9" if word == "8" else word for word in MODEL]  # the width of a caption's features
    line = refusal(capsys, "train", "ar-scenes", "--tokenizer", str(place / "tok"), "--data.tokens",
                   str(place / "scenes"), "--text-encoder", str(place / "enc"), *wide, *out)  # fmt: skip
    assert "model.caption_dim: 9, but the features of" in line and "have 8; set model.caption_dim to 8, or give" in line
    line = refusal(capsys, "train", "vapi-scenes", "--init", "openmoji", "--data", "scenes:4", *out)
    assert "init: 'openmoji' takes classes, no captions, and not the classes of data.images: scenes:4" in line


@pytest.mark.parametrize("recipe", ["vapi-scenes", "vapi-spatial-scenes", "ce-scenes"])
def test_post_training_reads_the_captions_of_pictures(place, tmp_path, recipe, monkeypatch):
    words = ["--init", str(place / "run"), "--data", "scenes:12", "--data.validation-items", "4", "--quiet",
             "--loop.steps", "2", "--loop.batch-size", "4", "--loop.save-every", "1", "--loop.precision", "fp32",
             "--objective.rewards", "mse=1,compositional=0"]  # fmt: skip
    seen = []
    with monkeypatch.context() as first:  # nothing is known of any caption
        first.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
        first.setattr(
            "consonar.training.run.how_far", lambda *what, **how: lambda *done: seen.append((what, how, done))
        )
        main(["train", recipe, "--out", str(tmp_path / "whole"), *words])
    assert seen[0][:2] == ((f"{recipe}: captions",), {"quiet": True}) and seen[0][2][0] == seen[0][2][1] > 4
    first = json.loads((tmp_path / "whole/metrics.jsonl").read_text().split("\n")[0])
    assert 0 <= first["validation/reward_compositional"] <= 1
    start, whole = (load_generator(folder).state_dict() for folder in (place / "run", tmp_path / "whole"))
    if recipe == "vapi-scenes":  # one is enough, for each reads 2,000 pictures
        main(["train", recipe, "--out", str(tmp_path / "parts"), *words, "--stop-at", "1"])
        main(["train", recipe, "--out", str(tmp_path / "parts"), *words, "--resume"])
        parts = load_generator(tmp_path / "parts").state_dict()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not all(torch.equal(whole[key], start[key]) for key in whole)
    assert load_own_text_encoder(tmp_path / "whole", load_generator(tmp_path / "whole")).width == 8


def measured(place, folder: Path, *more: str) -> dict:
    """results.json of a copy of the run, evaluated on scenes."""
    shutil.copytree(place / "run", folder)
    main(["evaluate", str(folder), "--reference", "scenes:16", "--validation-split", "50%", "--num-samples", "12",
          "--draws", "1", "--metrics", "fd", "--feature-network", "quarters", *more])  # fmt: skip
    return json.loads((folder / "results.json").read_text())


def test_a_run_is_evaluated_on_the_captions_of_held_out_pictures(place, tmp_path, capsys, quarters):
    run = tmp_path / "run"
    found = measured(place, run, "--guidance-scales", "1,2")
    assert [(row["temperature"], row["guidance_scale"]) for row in found["rows"]] == [(1.0, 1.0), (1.0, 2.0)]
    names = set(found["rows"][0]["metrics"])
    assert {"FD(quarters) validation", "entropy (teacher-forced)"} <= names
    held_out = open_splits("scenes:16", "50%", key="", image_size=32).validation
    with np.load(run / "samples_t1_g2.npz") as kept:
        settings = json.loads(str(kept["settings"]))
        assert kept["labels"].tolist() == [i % 8 for i in range(12)]
    assert settings["prompts"] == [record.caption for record in held_out]
    assert (run / "reconstruction.json").exists()
    capsys.readouterr()
    main(["evaluate", "--check", str(run / "results.json")])
    said = capsys.readouterr().out
    assert "digit for digit" in said and "guidance" in said


@pytest.mark.slow
def test_who_reads_captions_says_how_many_are_cut(place, tmp_path, capsys, quarters):
    short = ["--loop.steps", "1", "--loop.batch-size", "4", "--loop.precision", "fp32", "--data.validation-items", "4"]
    run = tmp_path / "run"
    (tmp_path / "p.txt").write_text("a dog\ntwo red apples above a cat\n")
    cut = r"captions: \d+ different, read by enc; \d+ cut after 3 tokens"
    jobs = {
        rf"ar-scenes: {cut}\nar-scenes: validation {cut}": [
            "train", "ar-scenes", "--tokenizer", str(place / "tok"), "--data.tokens", str(place / "scenes"),
            "--text-encoder", str(place / "enc"), "--out", str(run), *MODEL[:-1], "3", *short
        ],
        rf"ce-scenes: {cut}\nce-scenes: validation {cut}": [
            "train", "ce-scenes", "--init", str(run), "--data", "scenes:8", "--out", str(tmp_path / "ce"), *short
        ],
        rf"(?m)^{cut}": [
            "evaluate", str(run), "--reference", "scenes:8", "--validation-split", "50%", "--num-samples", "8",
            "--draws", "1", "--metrics", "fd", "--feature-network", "quarters"
        ],
        rf"(?m)^{cut}$": ["evaluate", str(run), "--prompts", str(tmp_path / "p.txt"), "--per-prompt", "1"],
        rf"held-out {cut}; training {cut}; others {cut}": [
            "diagnose", str(run), "--data", "scenes:8", "--num-images", "8", "--parts", "noise", "--out",
            str(tmp_path / "d.html")
        ],
    }  # fmt: skip
    for said, words in jobs.items():
        capsys.readouterr()
        main(words)
        out = capsys.readouterr().out
        assert re.search(said, out) and out.count("cut after") == said.count("cut after"), out


def test_pictures_without_captions_are_no_reference(place, tmp_path, capsys):
    line = refusal(capsys, "evaluate", str(place / "run"), "--reference", str(save_pictures(tmp_path / "p", size=32)),
                   "--validation-split", "50%", "--num-samples", "8", "--draws", "1")  # fmt: skip
    assert "6 of 6 items have no caption" in line and line.count("\n") == 1
    line = refusal(capsys, "evaluate", str(place / "run"), "--reference", "scenes:8", "--validation-split", "0%",
                   "--num-samples", "8", "--draws", "1")  # fmt: skip
    assert "samples are drawn for the captions of its validation images" in line and line.count("\n") == 1


def test_a_run_is_diagnosed_under_its_captions(place, tmp_path):
    out = tmp_path / "d.html"
    main(["diagnose", str(place / "run"), "--data", "scenes:16", "--validation-split", "50%", "--num-images", "8",
          "--parts", "noise,exposure,layers", "--out", str(out), "--precision", "fp32"])  # fmt: skip
    noise = json.loads(out.with_suffix(".json").read_text())["parts"]["noise"]["numbers"]
    held_out = open_splits("scenes:16", "50%", key="", image_size=32).validation
    generator, tokenizer = load_generator(place / "run"), load_tokenizer(place / "tok")
    records = list(held_out)
    images = from_uint8(torch.from_numpy(np.stack([np.asarray(record.image) for record in records])))
    tokens = tokenizer.encode(images)
    condition = load_own_text_encoder(place / "run", generator).encode([record.caption for record in records])
    expected = torch.nn.functional.cross_entropy(generator(tokens, condition)[0].transpose(1, 2), tokens)
    assert noise["cross-entropy, nats per token, clean context"]["value"] == pytest.approx(float(expected), rel=1e-5)


def test_scenes_are_never_mirrored(place, tmp_path, capsys):
    main(["tokenize", "--tokenizer", str(place / "tok"), "--data", "scenes:8", "--split", "train", "--out",
          str(tmp_path / "plain")])  # fmt: skip
    assert TokenStore.open(tmp_path / "plain").metadata.views == "center"
    line = refusal(capsys, "tokenize", "--tokenizer", str(place / "tok"), "--data", "scenes:8", "--views",
                   "center_flip", "--out", str(tmp_path / "t"))  # fmt: skip
    assert "--views: 'center_flip' mirrors pictures, and the captions of scenes:8 tell left from right" in line
    line = refusal(capsys, "train", "ce-scenes", "--init", str(place / "run"), "--data.flip", "--out",
                   str(tmp_path / "run"))  # fmt: skip
    assert "data.flip: True mirrors pictures" in line and line.count("\n") == 1


def test_a_released_llamagen_for_captions_is_sampled_and_post_trained(place, tmp_path, capsys):
    """The layout of t2i_XL_stage1_256.pt at tiny size, and a T5 folder as transformers saves one."""
    shape = LlamaGenConfig(condition="text", caption_dim=8, width=64, num_layers=2, num_heads=4, vocab_size=32,
                           num_tokens=16, grid=Grid(4, 4))  # fmt: skip
    model = LlamaGenGenerator(shape)
    model.reset_parameters(seeded(0, "t2i"))
    torch.save({"model": LLAMAGEN.to_official(model.state_dict(), {}, shape)}, tmp_path / "t2i.pt")
    save_encoder(tmp_path / "t5")  # for its words
    config = transformers.T5Config(vocab_size=200, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    main(["convert", str(tmp_path / "t2i.pt"), "--to", str(tmp_path / "t2i"), "--tokenizer", str(place / "tok"),
          "--image-size", "64", "--setting", "num_heads=4"])  # fmt: skip
    line = refusal(capsys, "sample", str(tmp_path / "t2i"), "--prompt", "a cat", "--out", str(tmp_path / "x.png"))
    assert "t2i does not say what reads its captions; add --text-encoder: minilm, a folder" in line
    line = refusal(capsys, "sample", str(tmp_path / "t2i"), "--prompt", "a cat", "--out", str(tmp_path / "x.png"),
                   "--text-encoder", "minilm")  # fmt: skip
    assert "model.caption_dim: 8, but the features of minilm have 384" in line
    main(["sample", str(tmp_path / "t2i"), "--prompt", "a cat", "--guidance-scale", "7.5", "--top-k", "20",
          "--text-encoder", str(tmp_path / "t5"), "--out", str(tmp_path / "before.npz")])  # fmt: skip
    main(["train", "vapi-llamagen-t2i", "--init", str(tmp_path / "t2i"), "--text-encoder", str(tmp_path / "t5"),
          "--data", "scenes:8", "--data.validation-items", "2", "--loop.steps", "1", "--loop.batch-size", "4",
          "--objective.rewards", "mse=1", "--loop.precision", "fp32", "--out", str(tmp_path / "run"),
          "--quiet"])  # fmt: skip
    encoder = load_own_text_encoder(tmp_path / "run", load_generator(tmp_path / "run"))
    read = encoder.encode(["a cat"])
    assert read.features.shape == (1, 120, 8) and read.mask[0].sum() < 5 and read.mask[0, -1]
    before, after = load_generator(tmp_path / "t2i").state_dict(), load_generator(tmp_path / "run").state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert "output.weight" in moved and "cls_embedding.uncond_embedding" not in moved  # drawn once, as released


def test_captions_stand_under_pictures(place, tmp_path):
    """Each its own; a contact sheet is as high as its pictures and their captions, whatever letters these have."""
    for name, prompts in (
        ("short", ["a dog", "a dog", "a cat"]),
        ("long", ["a large red dog left of a small blue cat"]),
        ("other", ["一只 é\n<b>"]),
    ):
        (tmp_path / "p.json").write_text(json.dumps(prompts))
        main(["sample", str(place / "run"), "--prompts", str(tmp_path / "p.json"), "--out",
              str(tmp_path / f"{name}.png")])  # fmt: skip
    sheets = {path.stem: np.asarray(Image.open(path).convert("L")) for path in tmp_path.glob("*.png")}
    dog, again, cat = (sheets["short"][32:, left : left + 32] for left in (0, 34, 68))
    assert np.array_equal(dog, again) and not np.array_equal(dog, cat)
    assert len(sheets["long"]) > len(sheets["short"])
    previews = [np.asarray(Image.open(path)) for path in (place / "run/samples").glob("*.png")]
    assert all(len(sheet) > 2 * 32 + 20 for sheet in previews)
    assert all(sheet[32:44].min() < 128 for sheet in (*sheets.values(), *previews))  # the first line of text


def test_pictures_are_scored_by_what_their_prompts_say(place, tmp_path, capsys):
    run, found = place / "run", place / "run/compositional.json"
    words = ["evaluate", str(run), "--prompts", "scenes-validation:8", "--per-prompt", "2", "--guidance-scales", "1,2"]
    main(words)
    content, said = json.loads(found.read_text()), capsys.readouterr().out
    assert [row["num_samples"] for row in content["rows"]] == [16, 16] and len(content["prompts"]["texts"]) == 8
    of_row, of_true = content["rows"][0]["metrics"], content["ceilings"]["true pictures"]
    score, top = of_row["compositional score"], of_true["compositional score"]
    assert 0 <= score["interval"][0] <= score["value"] <= score["interval"][1] <= 1 and top["value"] > 0.5
    assert set(content["ceilings"]) == {"true pictures", "reconstructions"}
    assert {f"compositional score ({kind})" for kind in KINDS} <= set(content["rows"][0]["metrics"])
    assert "temperature 1, guidance 2" in said and "reconstructions" in said
    assert "exists; add --overwrite" in refusal(capsys, *words)
    main(["evaluate", "--check", str(found)])
    assert "reproduced: digit for digit" in capsys.readouterr().out
    (tmp_path / "again.txt").write_text("two dogs\na cat\ntwo dogs\n")  # a prompt that comes twice is one
    main(["evaluate", str(run), "--prompts", str(tmp_path / "again.txt"), "--per-prompt", "2", "--overwrite"])
    main(["evaluate", "--check", str(found)])
    assert "reproduced: digit for digit" in capsys.readouterr().out
    assert len(set(validation_prompts())) == VALIDATION_PROMPTS


def test_samples_remember_what_they_were_asked_for(place, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a dog\ntwo red apples\n")
    for out in ("out.npz", "folder"):
        main(["sample", str(place / "run"), "--prompts", str(tmp_path / "p.txt"), "--per-prompt", "2", "--out",
              str(tmp_path / out)])  # fmt: skip
        main(["evaluate", str(tmp_path / out), "--prompts", "stored", "--out", str(tmp_path / f"{out}.json")])
    whole, pictures = (json.loads((tmp_path / f"{out}.json").read_text()) for out in ("out.npz", "folder"))
    assert whole["metrics"] == pictures["metrics"] and whole["prompts"]["per_prompt"] == 2
    assert whole["prompts"]["texts"] == ["a dog", "two red apples"]
    assert set(whole["ceilings"]) == {"true pictures"}  # of a tokenizer that is nowhere by its name
    main(["evaluate", str(tmp_path / "out.npz"), "--prompts", "stored", "--tokenizer", str(place / "tok"), "--out",
          str(tmp_path / "t.json")])  # fmt: skip
    (tmp_path / "there").mkdir()
    for name in ("out.npz", "t.json"):
        (tmp_path / name).rename(tmp_path / "there" / name)
    check = ["evaluate", "--check", str(tmp_path / "there/t.json")]
    capsys.readouterr()
    main(check)
    assert "reproduced: digit for digit" in capsys.readouterr().out
    (tmp_path / "there/out.npz").unlink()
    main(check)
    assert re.search(r"out\.npz is gone: 4 samples are drawn again from .*reproduced", capsys.readouterr().out, re.S)
    content = json.loads((tmp_path / "there/t.json").read_text())
    assert set(content["ceilings"]) == {"true pictures", "reconstructions"}
    for path, value, said in (
        (("tokenizer", "place"), "/nowhere", "holds a ceiling of '/nowhere'; say where it lies: --tokenizer"),
        (("samples", "settings"), None, "out.npz is not there; name the samples, or draw them again"),
    ):
        changed = json.loads(json.dumps(content))
        changed[path[0]][path[1]] = value
        (tmp_path / "there/t.json").write_text(json.dumps(changed))
        assert said in refusal(capsys, *check)


def test_samples_of_other_prompts_than_scenes_are_refused_with_the_option(tmp_path, capsys):
    made = {"prompts": ["a dog", "a corgi in a teacup"]}
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((2, 64, 64, 3), np.uint8), labels=np.arange(2),
             settings=np.array(json.dumps(made)))  # fmt: skip
    line = refusal(capsys, "evaluate", str(tmp_path / "s.npz"), "--prompts", "stored")
    assert f"--prompts: {tmp_path / 's.npz'}: scenes: 'a corgi in a teacup'" in line and line.count("\n") == 1


def test_samples_name_the_tokenizer_of_their_ceiling(tmp_path, monkeypatch):
    loaded = []
    load = compositional.load_tokenizer
    monkeypatch.setattr(compositional, "load_tokenizer", lambda name: loaded.append(name) or load(name))
    made = {"prompts": ["a dog"], "tokenizer": "scenes-64"}
    for name, more, there in (("a", {}, True), ("b", {"tokenizer_fingerprint": "another"}, False)):
        pixels, place, out = np.zeros((1, 64, 64, 3), np.uint8), tmp_path / f"{name}.npz", tmp_path / f"{name}.json"
        np.savez(place, arr_0=pixels, labels=np.array([0]), settings=np.array(json.dumps(made | more)))
        main(["evaluate", str(place), "--prompts", "stored", "--out", str(out)])
        assert ("reconstructions" in json.loads(out.read_text())["ceilings"]) == there
    assert loaded == ["scenes-64"] * 2  # once for each


@pytest.mark.parametrize(
    ("name", "content", "at"),
    [
        ("p.txt", "a dog\na corgi in a teacup\n", "line 2"),
        ("p.txt", "a dog\na cat\n[PAD]\n", "line 3"),
        ("p.json", '["a dog", "two dogs and a dog"]', "item 2"),
    ],
)
def test_a_prompt_that_is_none_of_scenes_is_told_with_its_place(place, tmp_path, capsys, name, content, at):
    (tmp_path / name).write_text(content)
    line = refusal(capsys, "evaluate", str(place / "run"), "--prompts", str(tmp_path / name), "--overwrite")
    assert f"--prompts: {tmp_path / name} {at}: scenes: " in line and line.count("\n") == 1
    assert line.count("corgi") < 2 and len(line) < 500


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompts", "scenes-validation:0"], "COUNT is a number of prompts"),
        (["--prompts", "scenes"], "--prompts: unknown 'scenes'"),
        (["--prompts", "stored"], "--prompts: 'stored' is of samples"),
        (["--prompts", "scenes-validation", "--reference", "scenes"], "is read only without --prompts"),
        (["--reference", "scenes", "--per-prompt", "3"], "--per-prompt: 3 is read only with --prompts"),
        (["--prompts", "scenes-validation", "--per-prompt", "0"], "per_prompt: 0"),
    ],
)
def test_wrong_prompts_to_score(place, capsys, words, said):
    line = refusal(capsys, "evaluate", str(place / "run"), *words, *([] if "--reference" in words else ["--overwrite"]))
    assert said in line and line.count("\n") == 1


def test_a_generator_of_classes_has_no_score_of_prompts(capsys):
    line = refusal(capsys, "evaluate", "openmoji", "--prompts", "scenes-validation")
    assert line == "consonar: prompts: openmoji takes class ids 0..9, no captions\n"


def test_folders_for_the_scorers_of_benchmarks(place, tmp_path, capsys):
    of_both = {"tag": "single_object", "include": [], "skills": ["object"], "atom_count": 1}
    lines = [json.dumps({**of_both, "prompt": text}) for text in ("a dog", "a red cat")]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg/7.txt").write_text("a dog\n")
    asked = ["sample", str(place / "run"), "--precision", "fp32"]
    of_lines = [*asked, "--prompts", str(tmp_path / "p.jsonl")]
    main([*of_lines, "--per-prompt", "2", "--format", "geneval", "--out", str(tmp_path / "g")])
    main([*of_lines, "--format", "geneval2", "--out", str(tmp_path / "g2")])
    main([*asked, "--prompts", str(tmp_path / "dpg"), "--format", "dpg", "--out", str(tmp_path / "d")])
    main([*of_lines, "--per-prompt", "2", "--out", str(tmp_path / "plain.npz")])
    with np.load(tmp_path / "plain.npz") as plain:
        drawn = plain["arr_0"]
    for index, line in enumerate(lines):
        folder = tmp_path / "g" / f"{index:05d}"
        assert (folder / "metadata.jsonl").read_text() == line
        shown = [np.asarray(Image.open(path)) for path in sorted((folder / "samples").iterdir())]
        assert np.array_equal(np.stack(shown), drawn[2 * index : 2 * index + 2])
    paths = json.loads((tmp_path / "g2/image_paths.json").read_text())
    assert list(paths) == ["a dog", "a red cat"] and np.array_equal(np.asarray(Image.open(paths["a dog"])), drawn[0])
    grid = np.asarray(Image.open(tmp_path / "d/images/7.png"))
    assert grid.shape == (64, 64, 3) and np.array_equal(grid[:32, :32], drawn[0])
    assert np.array_equal(grid[:32, 32:], drawn[1]) and not np.array_equal(grid[32:, :32], drawn[1])
    line = refusal(capsys, *of_lines, "--format", "geneval2", "--per-prompt", "2", "--out", str(tmp_path / "x"))
    assert "--per-prompt: 2; geneval2 reads 1 to 1" in line
    for words in (["sample", "nowhere", "--out", str(tmp_path / "x")], ["evaluate", str(tmp_path / "p.jsonl")]):
        line = refusal(capsys, *words, "--prompts", str(tmp_path / "p.jsonl"), "--format", "genevil")
        assert "--format: unknown 'genevil' (did you mean 'geneval'?); choices: geneval, geneval2, dpg" in line
    main(["evaluate", str(tmp_path / "g"), "--prompts", "stored"])
    assert "compositional score (single)" in capsys.readouterr().out
