"""What `sample` is asked for in words."""

from pathlib import Path

from consonar.cli import say
from consonar.components import load_own_text_encoder
from consonar.errors import UserError, printable, reading
from consonar.files.readers import parse_json
from consonar.sampling.job import Prompts
from consonar.types import Generator


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """The prompt, or those of a file: one a line, without empty ones at the end; of a .jsonl file the entry `prompt` of
    each line; of a .json file those of a list, texts or tables with that entry.

    Raises `UserError`, with the number of the line or item, for one that is empty and for JSON that has no prompt.
    """
    if (prompt is None) == (file is None):
        raise UserError("--prompt: give either it or --prompts FILE")
    if file is None:
        with reading(f"--prompt: {prompt!r}", "text in UTF-8"):
            return [str(prompt).encode().decode()]
    where, suffix, found = f"--prompts: {file}", file.suffix.lower(), []
    with reading(where, "text in UTF-8"):
        text = file.read_text(encoding="utf-8-sig")
    items = text.split("\n")
    while items and not items[-1].strip():
        items.pop()
    if suffix == ".json":
        with reading(where, 'a JSON list of prompts, or of tables such as {"prompt": "a dog"}'):
            if not isinstance(items := parse_json(text), list):
                raise ValueError(f"it holds a {type(items).__name__}")
    for number, item in enumerate(items, start=1):
        at = f"{where} {'item' if suffix == '.json' else 'line'} {number}"
        if suffix == ".jsonl":
            with reading(at, 'JSON such as {"prompt": "a dog"}'):
                item = parse_json(item)["prompt"]
        elif isinstance(item, dict):
            item = item.get("prompt")
        if not isinstance(item, str) or not item.strip():
            raise UserError(f"{at}: {item!r} is no prompt")
        with reading(at, "text in UTF-8"):
            found.append(item.encode().decode())
    if not found:
        raise UserError(f"--prompts: {file} is empty; give one prompt a line")
    return found


def prompts_for(generator: Generator, source: str, texts: list[str], encoder_name: str | None) -> Prompts:
    """Their features by the generator's own text encoder; a prompt that is too long for it is cut, which is said, as it
    is of words that it does not know."""
    encoder = load_own_text_encoder(source, generator, encoder_name)
    different = list(dict.fromkeys(texts))
    for text in different:
        if encoder.is_cut(text):
            say(f"cut after {encoder.length} tokens: {printable(text[:60])}...")
    if strange := [text for text in different if not encoder.knows(text)]:
        others = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        say(f"{encoder.name} does not know all words of {printable(strange[0][:60])!r}{others}, and reads those alike")
    return Prompts.read_by(encoder, texts)
