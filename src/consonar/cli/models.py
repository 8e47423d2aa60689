"""The command `models`."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from consonar.cli import say
from consonar.errors import check_choice
from consonar.hub import GENERATORS, PUBLISHED, TOKENIZERS, Published

NUMBERS = ("params", "tokens", "codes")


@dataclass(frozen=True, kw_only=True)
class Options:
    name: tyro.conf.Positional[str | None] = None
    """One of them."""


def command(options: Options) -> None:
    name = options.name
    if name is None:
        print_models("tokenizers", TOKENIZERS)
        print_models("generators", GENERATORS)
        say("golden: arrays of the official implementation are reproduced, most at small size")
        say("manifest: every key and shape of the released file has its place")
        say("No released file itself was at hand. Load: hf:NAME. More: consonar models NAME")
        return
    check_choice("models", name, PUBLISHED)
    model = PUBLISHED[name]
    place = f"https://huggingface.co/{model.repository}" if model.repository else str(model.elsewhere)
    say(f"{model.name}: {model.component} of kind {model.kind}, {model.parameters:,} parameters")
    facts = {
        "tokens": f"{model.num_tokens} of {model.vocab_size} codes", "published": place, "file": model.file,
        "sha256": model.sha256 or "not stated", "licence": model.licence, "tokenizer": model.tokenizer,
        "golden": model.golden or "none", "manifest": model.manifest or "none",
    }  # fmt: skip
    for key, value in facts.items():
        if value:
            say(f"  {key:12}{value}")


def print_models(title: str, models: Sequence[Published]) -> None:
    """A table of released models; narrow terminals fold the place of publication."""
    # Plain lines: what is piped into a file or a mail stays legible.
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False)
    for heading in ("name", "kind", *NUMBERS, "licence", "parity"):
        table.add_column(heading, justify="right" if heading in NUMBERS else "left", no_wrap=True)
    table.add_column("published at", overflow="fold")
    for model in models:
        codes = str(model.vocab_size) + (f"x{model.code_dim}" if model.code_dim else "")
        millions = f"{model.parameters / 1e6:,.0f}M"
        place = f"{model.repository}/{model.file}" if model.repository else str(model.elsewhere)
        table.add_row(
            model.name, model.kind, millions, str(model.num_tokens), codes, model.licence, model.parity, place
        )
    console = Console(highlight=False)
    Console(highlight=False, width=console.width if console.is_terminal else 200).print(table)
    say("")
