"""Prompts of Janus and Janus-Pro (arXiv 2410.13848, 2501.17811): captions as tokens of the generator's own text
vocabulary, which its `tokenizer.json` is read for by the package tokenizers (with transformers, extra `text`).

As released for pictures: begin of sentence, `<|User|>: CAPTION`, a blank line, `<|Assistant|>:`, start of image; no
system prompt, and the caption without white space at its ends. A vocabulary that has no `<|User|>` gets `User` and
`Assistant`, as the authors' example for Janus-1.3B has it. Begin of sentence is put first here, whatever the file's
post-processor or the files beside it say.

Deviation: a caption that is too long loses its end, never the template.
"""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from consonar.errors import UserError, needs, printable, reading
from consonar.files.weights import component_fingerprint
from consonar.files.writers import file_sha256
from consonar.generators.janus import JanusConfig, pad_prompts
from consonar.networks.released import find_folder
from consonar.types import PromptCondition

FILE = "tokenizer.json"
BEGIN, PAD, USER, ASSISTANT, IMAGE_START = (
    "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<|User|>", "<|Assistant|>", "<begin_of_image>"
)  # fmt: skip


class PromptTokenizer:
    """Follows `consonar.types.TextEncoder`; `words` is of the package tokenizers, and `length` the longest prompt.

    Raises `UserError`, which begins with `where`, for words that lack what a prompt is made of, and for a length that
    leaves a caption no token.
    """

    width = 0

    def __init__(self, name: str, words: Any, length: int, fingerprint: str, uncut: str, where: str) -> None:
        self.name, self.words, self.length = name, words, length
        self.fingerprint, self.uncut = fingerprint, uncut
        words.no_truncation()
        words.no_padding()
        self.begin, self.pad, _ = (id_of(words, token, where) for token in (BEGIN, PAD, IMAGE_START))
        pro = words.token_to_id(USER) is not None
        user, assistant = (USER, ASSISTANT) if pro else ("User", "Assistant")
        self.before, self.after = f"{user}: ", f"\n\n{assistant}:{IMAGE_START}"
        if (least := len(self.whole(""))) >= length:
            raise UserError(f"model.max_prompt_tokens: {length}, but a prompt without words has {least} already")

    def ids(self, text: str) -> list[int]:
        return self.words.encode(text, add_special_tokens=False).ids

    def whole(self, caption: str) -> list[int]:
        """All tokens of a prompt."""
        return [self.begin, *self.ids(self.before + caption.strip() + self.after)]

    def encode(self, captions: Sequence[str]) -> PromptCondition:
        """Tokens and mask (B, length of the longest). A caption without words has nothing to show; one that is too long
        is cut (`is_cut` tells)."""
        prompts, end = [], self.ids(self.after)
        for caption in captions:
            found = self.whole(caption)
            prompts.append(found if len(found) <= self.length else found[: self.length - len(end)] + end)
        given = pad_prompts(prompts, self.pad)
        return replace(given, mask=given.mask & torch.tensor([*map(self.has_words, captions)])[:, None])

    def has_words(self, caption: str) -> bool:
        return bool(caption.strip())

    def is_cut(self, caption: str) -> bool:
        """Whether the prompt of a caption has more tokens than are read."""
        return len(self.whole(caption)) > self.length

    def knows(self, caption: str) -> bool:
        """Whether all of a caption is in the vocabulary; one of bytes, as released, has all."""
        unknown = getattr(self.words.model, "unk_token", None)
        return unknown is None or self.words.token_to_id(unknown) not in self.ids(caption)


def id_of(words: Any, token: str, where: str) -> int:
    """Of a token that a prompt needs."""
    found = words.token_to_id(token)
    if found is None:
        raise UserError(f"{where}: has no token {token}, which prompts of Janus are made with")
    return found


def read_words(path: Path, where: str) -> Any:
    """What a tokenizer.json holds, of the package tokenizers."""
    with needs(where, "text"):
        tokenizers = importlib.import_module("tokenizers")
    with reading(where, "a tokenizer.json of the package tokenizers"):
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))


def load_prompt_tokenizer(name: str, shape: JanusConfig) -> PromptTokenizer:
    """What reads prompts for a generator of this shape: tokenizer.json of a folder, or of OWNER/NAME of the hub.

    Raises `UserError` where there is none, and for words that are not the generator's.
    """
    where = f"text_encoder: {name}"
    path = find_folder(name, where, (FILE,)) / FILE
    if not path.is_file():
        raise UserError(f"{where}: has no {FILE}; name the folder with that of the released model, or copy it there")
    words = read_words(path, where)
    most = max(words.get_vocab().values(), default=0) + 1
    if most > shape.text_vocab_size:
        raise UserError(f"{where}: has {most} tokens, the generator reads {shape.text_vocab_size}; give its own")
    about, length = {"tokenizer": file_sha256(path), "kind": shape.kind}, shape.max_prompt_tokens
    fingerprint, uncut = (component_fingerprint(one, {}) for one in ({**about, "length": length}, about))
    made = PromptTokenizer(printable(path.parent.name), words, length, fingerprint, uncut, where)
    if made.pad != shape.pad_token:
        raise UserError(f"{where}: pads with token {made.pad}, the generator with model.pad_token {shape.pad_token}")
    return made
