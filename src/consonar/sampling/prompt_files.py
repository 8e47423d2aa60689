"""Prompts in files, told by their line or item where they are none."""

from collections.abc import Callable
from pathlib import Path

from consonar.errors import UserError, check_choice, reading
from consonar.files.readers import entry_of, lines_of, parse_json, text_in

ENDINGS = (".txt", ".jsonl", ".json")


def checked(prompt: object, at: str) -> str:
    """The prompt; `UserError`, which begins with `at`, for what is none: JSON may hold half a letter."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{at}: {prompt!r} is no prompt")
    return text_in(prompt.encode(errors="surrogatepass"), at)


def read_prompt_file(file: Path, check: Callable[[str], object] = str) -> dict[str, str]:
    """Prompts by where they stand, in words: one a line; of a .jsonl file the entry `prompt` of each line; of a .json
    file those of a list, texts or tables with that entry.

    Raises `UserError`, with the number of the line or item, for one that is empty, for JSON that has no prompt, and
    where `check` raises it of a prompt; for a file of another ending (a table's header would pass for a prompt).
    """
    where, suffix, found = f"--prompts: {file}", file.suffix.lower(), dict[str, str]()
    check_choice(f"{where}: ending", suffix, ENDINGS)
    items: list[object] = [*lines_of(file, where)]
    if suffix == ".json":
        with reading(where, 'a JSON list of prompts, or of tables such as {"prompt": "a dog"}'):
            if not isinstance(given := parse_json("\n".join(map(str, items))), list):
                raise ValueError(f"it holds a {type(given).__name__}")
        items = given
    for number, item in enumerate(items, start=1):
        at = f"{where} {'item' if suffix == '.json' else 'line'} {number}"
        if suffix == ".jsonl":
            with reading(at, 'JSON such as {"prompt": "a dog"}'):
                item = parse_json(checked(item, at))
        if suffix == ".jsonl" or isinstance(item, dict):
            item = entry_of(item, "prompt", at)
        elif suffix == ".txt":
            item = str(item).strip()
        found[at] = checked(item, at)
        try:
            check(found[at])
        except UserError as error:
            raise UserError(f"{at}: {error}") from error
    if not found:
        raise UserError(f"{where} is empty; give one prompt a line")
    return found
