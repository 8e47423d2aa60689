"""What `sample` is asked for in words."""

from collections.abc import Mapping
from pathlib import Path

import torch

from consonar.cli import say
from consonar.components import load_own_text_encoder
from consonar.errors import UserError, printable
from consonar.sampling.job import Prompts
from consonar.sampling.prompt_files import checked, read_prompt_file
from consonar.types import Generator


def read_prompts(prompt: str | None, file: Path | None) -> dict[str, str]:
    """The prompt, or those of a file (`read_prompt_file`), by where they stand; `UserError` for both, neither, and what
    is no prompt."""
    if (prompt is None) == (file is None):
        raise UserError("--prompt: give either it or --prompts FILE")
    if file is not None:
        return read_prompt_file(file)
    return {"--prompt": checked(prompt, "--prompt")}


def prompts_for(
    generator: Generator, source: str, asked: Mapping[str, str], encoder_name: str | None, device: torch.device
) -> Prompts:
    """The features of what is asked, prompts by where they stand, by the generator's own text encoder; a prompt that is
    too long for it is cut, which is said, as it is of words that it does not know. `UserError` for one without words
    for it."""
    encoder = load_own_text_encoder(source, generator, encoder_name, device=device)
    for where, text in asked.items():
        if not encoder.has_words(text):
            raise UserError(f"{where}: {text[:60]!r} has no words for {encoder.name}")
    different = list(dict.fromkeys(asked.values()))
    for text in different:
        if encoder.is_cut(text):
            say(f"cut after {encoder.length} tokens: {printable(text[:60])}...")
    if strange := [text for text in different if not encoder.knows(text)]:
        others = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        say(f"{encoder.name} does not know all words of {printable(strange[0][:60])!r}{others}, and reads those alike")
    return Prompts.read_by(encoder, [*asked.values()])
