"""Janus by the command line, in both released layouts: converted, sampled in words, post-trained, sampled again."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from tiny_janus import WORDS, byte_words, save_released_janus

from consonar import hub
from consonar.cli import main
from consonar.components import load_generator, load_own_text_encoder, load_own_tokenizer, model_folder, read_origin
from consonar.generators.janus import JanusConfig
from consonar.model_folders import own_text_encoder
from consonar.networks.prompts import ASSISTANT, BEGIN, IMAGE_START, PAD, USER, load_prompt_tokenizer
from consonar.sampling.sample import SamplerConfig, sample

SIZES = ["--setting", "num_tokens=16", "max_prompt_tokens=64"]  # of byte_words, which has a token a letter
SHORT = ["--quiet", "--loop.steps", "2", "--loop.batch-size", "4", "--loop.save-every", "1", "--loop.precision", "fp32",
         "--objective.rewards", "mse=1", "--optim.lr", "1e-4", "--optim.min-lr", "1e-4"]  # fmt: skip


def save_captioned(folder: Path, count: int = 12) -> Path:
    """Pictures with captions of several lengths, one of them with a line break and letters of no ASCII."""
    folder.mkdir()
    lines = []
    for index in range(count):
        picture(index).save(folder / f"{index}.png")
        lines.append({"file_name": f"{index}.png", "caption": "a disc" + " é\n" * (index % 3 == 1) + "!" * index})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a converted Janus of each layout, and pictures with captions."""
    folder = tmp_path_factory.mktemp("janus")
    for layout in ("authors", "transformers"):
        save_released_janus(folder / f"{layout}-released", layout)
        main(["convert", str(folder / f"{layout}-released"), "--to", str(folder / layout), *SIZES])
    save_captioned(folder / "pictures")
    return folder


def refusal(capsys, *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    return line


def test_a_prompt_is_the_released_template_whatever_the_file_says_about_cutting_and_padding(place):
    encoder = load_own_text_encoder(place / "authors/generator", load_generator(place / "authors/generator"))
    words = byte_words(*WORDS)
    words.no_truncation()
    words.no_padding()
    captions = [" a dog\n", "zwei\nKühe, 牛"]
    condition = encoder.encode(captions)
    for row, caption in enumerate(["a dog", "zwei\nKühe, 牛"]):
        expected = words.encode(f"{BEGIN}{USER}: {caption}\n\n{ASSISTANT}:{IMAGE_START}", add_special_tokens=False).ids
        assert condition.tokens[row][condition.mask[row]].tolist() == expected
        assert not condition.mask[row][: -len(expected)].any()
    generator = load_generator(place / "authors/generator")
    null = generator.null_condition(condition)
    begin, pad, start = (words.token_to_id(token) for token in (BEGIN, PAD, IMAGE_START))
    shown = null.tokens[0][null.mask[0]].tolist()
    assert (shown[0], shown[-1], set(shown[1:-1])) == (begin, start, {pad})


def test_words_without_marks_of_roles_get_plain_ones(tmp_path):
    words = byte_words(BEGIN, PAD, IMAGE_START)
    words.save(str(tmp_path / "tokenizer.json"))
    shape = JanusConfig(text_vocab_size=300, pad_token=words.token_to_id(PAD))
    words.no_truncation()
    words.no_padding()
    expected = words.encode(f"{BEGIN}User: a dog\n\nAssistant:{IMAGE_START}", add_special_tokens=False).ids
    assert load_prompt_tokenizer(str(tmp_path), shape).encode(["a dog"]).tokens.tolist() == [expected]


def test_both_layouts_are_one_model_and_are_sampled_and_post_trained_in_words(place, tmp_path):
    drawn = {}
    for layout in ("authors", "transformers"):
        main(["sample", str(place / layout / "generator"), "--prompt", "a corgi in a teacup", "--guidance-scale", "5",
              "--num-samples", "2", "--precision", "fp32", "--out", str(tmp_path / f"{layout}.npz")])  # fmt: skip
        with np.load(tmp_path / f"{layout}.npz") as found:
            drawn[layout] = found["tokens"]
    assert np.array_equal(drawn["authors"], drawn["transformers"]) and len(np.unique(drawn["authors"])) > 2
    starts, data = {"whole": place / "authors/generator", "parts": place / "transformers/generator"}, place / "pictures"
    for out, more in (("whole", []), ("parts", ["--stop-at", "1"]), ("parts", ["--resume"])):
        main(["train", "vapi-janus-1b", "--init", str(starts[out]), "--data", f"hf:{data}", "--out",
              str(tmp_path / out), *SHORT, "--data.validation-items", "2", *more])  # fmt: skip
    before, whole, parts = (
        load_generator(folder).state_dict() for folder in (starts["whole"], tmp_path / "whole", tmp_path / "parts")
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not all(torch.equal(whole[key], before[key]) for key in whole)
    main(["sample", str(tmp_path / "whole"), "--prompt", "a disc", "--guidance-scale", "5", "--precision", "fp32",
          "--out", str(tmp_path / "after.npz")])  # fmt: skip
    generator = load_generator(tmp_path / "whole")
    encoder = load_own_text_encoder(tmp_path / "whole", generator)
    alone = sample(generator, load_own_tokenizer(tmp_path / "whole"), encoder.encode(["a disc"]), seeds=[0],
                   config=SamplerConfig(guidance_scale=5.0), precision="fp32")  # fmt: skip
    with np.load(tmp_path / "after.npz") as found:
        assert np.array_equal(found["tokens"], alone.tokens.numpy())
        settings = json.loads(str(found["settings"]))
    assert settings["text_encoder"] == encoder.fingerprint and settings["prompts"] == ["a disc"]


def test_the_control_trains_as_well_and_a_moved_folder_needs_nothing_else(place, tmp_path):
    (place / "transformers/generator").rename(tmp_path / "moved")
    main(["train", "ce-janus-1b", "--init", str(tmp_path / "moved"), "--data", f"hf:{place / 'pictures'}", "--out",
          str(tmp_path / "ce"), *SHORT, "--data.validation-items", "2"])  # fmt: skip
    origin = json.loads((tmp_path / "ce/origin.json").read_text())
    assert origin["text_encoder"] == str((tmp_path / "moved").resolve())
    (tmp_path / "moved").rename(place / "transformers/generator")


@pytest.mark.slow
def test_adapters_are_trained_resumed_and_sampled_from_and_end_in_the_weights(place, tmp_path, capsys):
    pytest.importorskip("peft")
    start, data = str(place / "authors/generator"), f"hf:{place / 'pictures'}"
    words = ["train", "vapi-janus-1b", "--init", start, "--data", data, *SHORT, "--data.validation-items", "2"]
    assert "lora.rank: 65 is above the width of" in refusal(
        capsys, *words, "--out", tmp_path / "wide", "--lora.rank", "65"
    )
    for out, more in (("whole", []), ("parts", ["--stop-at", "1"])):
        main([*words, "--lora.rank", "8", "--out", str(tmp_path / out), *more])
    main(["train", "--resume", str(tmp_path / "parts"), "--quiet"])
    before, whole, parts = (
        load_generator(folder).state_dict() for folder in (start, tmp_path / "whole", tmp_path / "parts")
    )
    assert before.keys() == whole.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    moved = {key for key in whole if not torch.equal(whole[key], before[key])}
    assert moved and all(re.search("attn|mlp", key) for key in moved), moved
    main(["sample", str(tmp_path / "parts"), "--prompt", "a disc", "--out", str(tmp_path / "after.png")])
    assert (tmp_path / "after.png").is_file()


def test_a_name_of_the_hub_brings_the_words(place, tmp_path, monkeypatch):
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append(f"{repository}/{file}")
        return str(place / "authors-released" / file)

    monkeypatch.setattr(hub, "download", download)
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path))
    folder = model_folder("hf:janus-pro-1b")
    assert own_text_encoder(folder, read_origin(folder)) == str(folder)
    assert asked == [f"deepseek-ai/Janus-Pro-1B/{file}" for file in ("pytorch_model.bin", "tokenizer.json")]


def test_a_long_prompt_keeps_the_template(place, tmp_path, capsys):
    generator = place / "authors/generator"
    main(["sample", str(generator), "--prompt", "word " * 2000, "--out", str(tmp_path / "x.png")])
    assert re.search(r"cut after 64 tokens: word word", capsys.readouterr().out)
    encoder = load_own_text_encoder(generator, load_generator(generator))
    (long,), (short,) = (encoder.encode([text]).tokens.tolist() for text in ("word " * 2000, "word"))
    assert len(long) == 64 and long[-5:] == short[-5:] and long[: len(short) - 5] == short[:-5]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", " \n"], r"--prompt: ' \\n' is no prompt"),
        (["--prompt", "a dog \udcff"], "not text in UTF-8"),
        (["--classes", "1"], "this generator has none, it takes captions: give --prompt"),
        (["--prompt", "a dog", "--text-encoder", "minilm"], "text_encoder: minilm"),
        (["--prompt", "a dog", "--text-encoder", "{}/pictures"], "has no tokenizer.json"),
        (
            ["--prompt", "a dog", "--text-encoder", "{}/other"],
            r"the text encoder is '.*/other' \(\w+\), in .* it is 'its own' \(",
        ),
        (["--prompt", "a dog", "--text-encoder", "{}/large"], "has 274 tokens, the generator reads 270"),
        (["--prompt", "a dog", "--text-encoder", "{}/bad"], "has no token <begin_of_image>"),
        (["--prompt", "a dog", "--text-encoder", "{}/broken"], "not a tokenizer.json"),
    ],
)
def test_wrong_words(place, tmp_path, capsys, words, said):
    special = {"other": [*WORDS[:2], "x", *WORDS[2:]], "large": [*WORDS, *map(str, range(20, 33))], "bad": WORDS[:4]}
    for name, kept in special.items():
        (place / name).mkdir(exist_ok=True)
        byte_words(*kept).save(str(place / name / "tokenizer.json"))
    (place / "broken").mkdir(exist_ok=True)
    (place / "broken/tokenizer.json").write_text("{")
    words = [word.format(place) for word in words]
    assert re.search(said, refusal(capsys, "sample", place / "authors/generator", "--out", tmp_path / "x.png", *words))


def test_other_words_are_refused_by_convert_and_none_are_said(place, tmp_path, capsys):
    released = tmp_path / "released"
    released.mkdir()
    weights = place / "transformers-released/model.safetensors"
    (released / weights.name).symlink_to(weights)
    main(["convert", str(released), "--to", str(tmp_path / "without"), *SIZES])
    assert "no tokenizer.json beside the file" in capsys.readouterr().out
    line = refusal(capsys, "sample", tmp_path / "without/generator", "--prompt", "a dog", "--out", tmp_path / "x.png")
    assert "does not say what reads its captions; add --text-encoder: the folder" in line
    byte_words(*WORDS[:4]).save(str(released / "tokenizer.json"))
    line = refusal(capsys, "convert", released, "--to", tmp_path / "with", *SIZES)
    assert "has no token <begin_of_image>" in line and not (tmp_path / "with").exists()
    line = refusal(capsys, "convert", place / "authors-released", "--to", tmp_path / "with", "--setting",
                   "max_prompt_tokens=9")  # fmt: skip
    assert "model.max_prompt_tokens: 9, but a prompt without words has" in line
