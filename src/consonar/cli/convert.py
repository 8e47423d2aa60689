"""The command `convert`."""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from consonar import convert as conversion
from consonar.cli import say
from consonar.cli.parsing import pairs
from consonar.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    source: tyro.conf.Positional[Path]
    """A .pt, .pth, .bin or .safetensors file, an index of shards, or (--to-official) a model folder."""
    to: Path | None = None
    """Model folder to make; for a file with both halves TO/generator and TO/tokenizer."""
    to_official: Path | None = None
    """File to write in the released layout: .pt, .pth, .bin or .safetensors."""
    image_size: int | None = None
    """Pixels, where shapes do not say it (default: as published, or as the file name says)."""
    tokenizer: str | None = None
    """Of a generator: name or folder of its tokenizer, kept for `consonar sample`."""
    entry: str | None = None
    """The part of a training checkpoint to take, e.g. ema (default: model, module or state_dict)."""
    setting: tuple[str, ...] = ()
    """Other fields of the configuration that shapes do not say, e.g. l2_normalize=false."""


def command(options: Options) -> None:
    if (options.to is None) == (options.to_official is None):
        raise UserError("convert: give either --to FOLDER, or --to-official FILE for the way back")
    if options.to_official is not None:
        if options != Options(source=options.source, to_official=options.to_official):
            raise UserError("--to-official: takes no other option")
        say(f"{conversion.to_official(options.source, options.to_official)}: {options.to_official}")
    elif options.to is not None:
        given = pairs(options.setting, "--setting", "of the form field=value")
        made = conversion.convert(
            options.source, options.to, image_size=options.image_size, tokenizer=options.tokenizer, entry=options.entry,
            settings={key: setting(value) for key, value in given.items()},
        )  # fmt: skip
        for part in made:
            official, module = part.official, part.module
            code_dim = getattr(module, "code_dim", None)  # that of a tokenizer
            codes = f"{module.vocab_size} codes" + (f" of width {code_dim}" if code_dim else "")
            millions = f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.1f}M parameters"
            say(f"{official.name}: {millions}, {module.num_tokens} tokens, {codes}")
            for note in part.notes:
                say(f"  {note}")
            say(f"  {official.component} folder: {part.folder}")


def setting(text: str) -> object:
    """False <- "false": JSON, or else text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
