"""The command `import-tokens`."""

from dataclasses import dataclass
from pathlib import Path

from consonar.cli import say
from consonar.cli.parsing import check_name
from consonar.components import load_tokenizer
from consonar.data.upstream import import_llamagen_npy, import_rar_jsonl
from consonar.errors import UserError, check_choice
from consonar.files.lock import is_taken

FORMATS = ("rar-jsonl", "llamagen-npy")


@dataclass(frozen=True, kw_only=True)
class Options:
    format: str
    """rar-jsonl or llamagen-npy."""
    data: Path
    """The .jsonl file, or the folder of codes."""
    tokenizer: str
    """Name or folder of the tokenizer that made the tokens."""
    out: Path
    """Folder of the token store to make."""
    labels: Path | None = None
    """Folder of label files (llamagen-npy)."""


def command(options: Options) -> None:
    data, out, labels = options.data, options.out, options.labels
    check_choice("--format", options.format, FORMATS)
    if (labels is None) != (options.format == "rar-jsonl"):
        raise UserError("--labels: needed by llamagen-npy and by nothing else")
    check_name(out)
    if is_taken(out):
        raise UserError(f"--out: {out} exists; choose another folder")
    model = load_tokenizer(options.tokenizer)
    store = import_rar_jsonl(data, out, model) if labels is None else import_llamagen_npy(data, labels, out, model)
    say(store.describe())
    say(f"{len(store)} images x {store.num_views} views x {store.num_tokens} tokens: {out}")
