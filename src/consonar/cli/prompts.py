"""What `sample` is asked for in words."""

from pathlib import Path

from consonar.cli import say
from consonar.components import load_own_text_encoder
from consonar.errors import UserError, printable, reading
from consonar.files.readers import parse_json
from consonar.sampling.job import Prompts
from consonar.types import Generator


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """The prompt, or those of a file: one a line; of a .jsonl file the entry `prompt` of each.

    Raises `UserError`, with the number of the line, for an empty line and for JSON that has no prompt.
    """
    if (prompt is None) == (file is None):
        raise UserError("--prompt: give either it or --prompts FILE")
    if file is None:
        with reading(f"--prompt: {prompt!r}", "text in UTF-8"):
            return [str(prompt).encode().decode()]
    found = []
    with reading(f"--prompts: {file}", "text in UTF-8"):
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, start=1):
        if file.suffix.lower() == ".jsonl":
            with reading(f"--prompts: {file} line {number}", 'JSON such as {"prompt": "a dog"}'):
                line = parse_json(line)["prompt"]
        if not isinstance(line, str) or not line.strip():
            raise UserError(f"--prompts: {file} line {number}: {line!r} is no prompt")
        with reading(f"--prompts: {file} line {number}", "text in UTF-8"):
            found.append(line.encode().decode())
    if not found:
        raise UserError(f"--prompts: {file} is empty; give one prompt a line")
    return found


def prompts_for(generator: Generator, source: str, texts: list[str], encoder_name: str | None) -> Prompts:
    """Their features by the generator's own text encoder; a prompt that is too long for it is cut, which is said."""
    encoder = load_own_text_encoder(source, generator, encoder_name)
    for text in dict.fromkeys(texts):
        if encoder.is_cut(text):
            say(f"cut after {encoder.length} tokens: {printable(text[:60])}...")
    return Prompts.read_by(encoder, texts)
