"""Text encoders: tiny random models that transformers saves, and MiniLM, which pip brings."""

import json
import shutil

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from consonar import hub
from consonar.errors import UserError
from consonar.networks import text_encoders
from consonar.networks.cleaning import cleaned
from consonar.networks.text_encoders import load_text_encoder
from consonar.types import TextEncoder

WORDS = ["[PAD]", "[UNK]", "[EOS]", "a", "red", "dog", "left", "of", "two", "cats"]
SHAPE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 10}
CLIP_TEXT = {**SHAPE, "max_position_embeddings": 20, "eos_token_id": 2}
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SHAPE)),
    "t5": lambda: transformers.T5EncoderModel(
        transformers.T5Config(d_model=8, d_ff=16, d_kv=4, num_layers=2, num_heads=2, vocab_size=10)
    ),
    "clip_text_model": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_TEXT)),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=CLIP_TEXT,
            vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
                           "image_size": 8, "patch_size": 4},
        )
    ),
}  # fmt: skip


@pytest.fixture(params=list(MODELS))
def folder(request, tmp_path):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    wrapped.save_pretrained(tmp_path)
    return tmp_path


def test_features_are_the_last_hidden_states_and_stand_at_the_right(folder):
    encoder = load_text_encoder(str(folder), length=6)
    assert isinstance(encoder, TextEncoder) and (encoder.width, encoder.length) == (8, 6)
    captions = ["a red dog", "two cats left of a dog left of a dog"]
    found = encoder.encode(captions)
    assert found.features.shape == (2, 6, 8) and found.mask.tolist() == [[False] * 3 + [True] * 3, [True] * 6]
    assert not found.features[0, :3].any()
    ids = torch.tensor([[3, 4, 5]])
    direct = encoder.network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(found.features[0, 3:], direct[0])
    assert [encoder.is_cut(caption) for caption in captions] == [False, True]
    assert [encoder.knows(caption) for caption in (*captions, "a red unicorn")] == [True, True, False]


CLEANED = {
    "A RED Dog,two cats": "a red dog, two cats",
    "“A Dog’s” life — www.dogs.com/best": '"a dog\'s" life',
    "this-is-my-cute-cat_2": "this is my cute cat 2",
    "<b>Bold</b> &amp; #12 (IMG_0001.JPG)": "bold",
    "@nick: 10x20 print, free shipping": "print",
    "fish%20and+chips...": "fish and chips",
    "猫 & ＣＡＴ": "cat",
    "Page 3 of jc6640, 12.34.56.78": "of",
}
"""Captions, and what LlamaGen's released code makes of them."""


def test_captions_are_cleaned_as_released():
    assert {caption: cleaned(caption) for caption in CLEANED} == CLEANED
    assert cleaned("<![a dog") == "<! a dog"  # where the released code fails


def test_t5_reads_what_llamagen_cleaned_and_says_so(folder, monkeypatch):
    encoder = load_text_encoder(str(folder), length=6)
    is_t5 = encoder.network.config.model_type == "t5"
    found = encoder.encode(["A RED dog (photo.jpg)", "a red dog"])
    assert torch.equal(found.features[0], found.features[1]) == is_t5
    assert encoder.is_cut("a dog (left of a cat)") != is_t5 == encoder.knows("(a dog)")
    with monkeypatch.context() as before:
        before.setattr(text_encoders, "CLEANED", {})
        older = load_text_encoder(str(folder), length=6)
    assert (older.fingerprint != encoder.fingerprint) == is_t5
    # What was trained before captions were cleaned is still read as it was trained.
    again = load_text_encoder(str(folder), length=6, recorded=older.fingerprint)
    assert again.fingerprint == older.fingerprint and again.clean is older.clean is str
    assert load_text_encoder(str(folder), length=6, recorded="another").fingerprint == encoder.fingerprint


def test_weights_are_hashed_once_where_they_are_those_of_the_record(folder, monkeypatch):
    hashed, fingerprint_of = [], text_encoders.component_fingerprint
    noted = lambda about, state: hashed.append(about) or fingerprint_of(about, state)  # noqa: E731
    monkeypatch.setattr(text_encoders, "component_fingerprint", noted)
    encoder = load_text_encoder(str(folder), length=6)
    load_text_encoder(str(folder), length=6, recorded=encoder.fingerprint)
    assert len(hashed) == 2


def test_a_caption_does_not_change_that_of_another_row(folder):
    encoder = load_text_encoder(str(folder), length=10)
    alone = encoder.encode(["a red dog"])
    beside = encoder.encode(["two cats left of a dog", "a red dog"])
    torch.testing.assert_close(alone.features[0], beside.features[1], atol=1e-5, rtol=1e-5)


def test_a_fingerprint_is_of_weights_words_and_length(folder):
    state = torch.get_rng_state()
    first = load_text_encoder(str(folder), length=6)
    assert torch.equal(torch.get_rng_state(), state)
    others = {load_text_encoder(str(folder), length=5).fingerprint}
    words = folder / "tokenizer.json"
    words.write_text(words.read_text().replace('"red"', '"blue"'))
    others.add(load_text_encoder(str(folder), length=6).fingerprint)
    words.write_text(words.read_text().replace('"blue"', '"red"'))
    with torch.no_grad():
        next(iter(first.network.parameters())).add_(1)
    first.network.save_pretrained(folder)
    others.add(load_text_encoder(str(folder), length=6).fingerprint)
    assert len(others | {first.fingerprint}) == 4


def test_a_caption_without_words_shows_nothing(folder):
    encoder = load_text_encoder(str(folder), length=6)
    cleaned_away, special = ["<b>", "一只狗", "http://x.y/z.jpg"], ["[PAD]", "[EOS] [EOS]"]
    is_t5 = encoder.network.config.model_type == "t5"  # which reads captions cleaned
    captions = ["", "  \n", *(cleaned_away if is_t5 else special), *(special if is_t5 else cleaned_away), "a dog"]
    given = encoder.encode(captions)
    shown = [index >= (5 if is_t5 else 4) for index in range(len(captions))]
    assert given.mask.any(1).tolist() == shown == list(map(encoder.has_words, captions))
    assert not given.features[: shown.index(True)].any()


def test_what_is_missing_is_said(folder, tmp_path):
    with pytest.raises(UserError, match=r"^text_encoder: \./nowhere: no folder"):
        load_text_encoder("./nowhere")
    with pytest.raises(
        UserError, match=r"^text_encoder: minim: .*choices: minilm, a folder of T5, .*, OWNER/NAME of the hub"
    ):
        load_text_encoder("minim")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(
        UserError, match=r"^text_encoder: .*pictures has no config\.json; choices: minilm, a folder of T5"
    ):
        load_text_encoder(str(tmp_path / "pictures"))
    config = json.loads((folder / "config.json").read_text())
    if "clip" in config["model_type"]:
        with pytest.raises(
            UserError, match=r"^model.num_condition_tokens: 120 is not from 1 to 20, which .* was made for"
        ):
            load_text_encoder(str(folder), length=120)
        assert load_text_encoder(str(folder)).length == 20
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(UserError, match=r"model_type in config.json.*'gpt2'.*bert, t5"):
        load_text_encoder(str(folder), length=6)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_text_encoder(str(folder), length=6)


@pytest.mark.parametrize("folder", ["t5"], indirect=True)
def test_an_encoder_of_the_hub_may_be_in_shards(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    whole, place = load_text_encoder(str(folder), length=6), tmp_path / "hub"
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("hub", "cache", "model.safetensors"))
    whole.network.save_pretrained(place, max_shard_size="2KB")
    shards = {path.name for path in place.glob("model-*.safetensors")}
    assert len(shards) > 1 and not (place / "model.safetensors").exists()
    asked = []

    def download(repository, file):
        asked.append(file)
        if not (place / file).is_file():
            raise ConnectionError("404")
        return str(place / file)

    monkeypatch.setattr(hub, "download", download)
    assert load_text_encoder("owner/large", length=6).fingerprint == whole.fingerprint
    assert shards <= set(asked)
    lost = min(shards)
    (place / lost).unlink()
    with pytest.raises(
        UserError, match=rf"^text_encoder: owner/large: .*cannot download {lost} of .*owner/large \(404\)"
    ):
        load_text_encoder("owner/large", length=6)
    (place / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"cannot download model\.safetensors of .*owner/large \(404\)"):
        load_text_encoder("owner/large", length=6)


def test_minilm_knows_what_is_alike():
    """What pip brings, offline: the mean of its features is what sentence-transformers compares."""
    encoder = load_text_encoder("minilm")
    given = encoder.encode(["a dog", "a puppy", "the stock market fell"])
    means = given.features.sum(1) / given.mask.sum(1, keepdim=True)
    alike = torch.nn.functional.cosine_similarity(means[:1], means[1:])
    assert encoder.width == 384 and alike[0] > 0.7 and alike[1] < 0.2
    assert given.features.shape == (3, 120, 384)
    # What leaves it nothing but the tokens that it puts around every caption.
    assert [encoder.has_words(caption) for caption in ("\u200b", "\x00", "[SEP]", "?", "\u732b")] == [False] * 3 + [
        True
    ] * 2
