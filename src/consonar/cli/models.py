"""Commands about released models: convert, models."""

import json
from pathlib import Path
from typing import Any

import tyro

from consonar.cli.console import print_models, say
from consonar.cli.parsing import check_output
from consonar.errors import UserError, unknown


def convert(
    source: tyro.conf.Positional[Path],
    *,
    to: Path | None = None,
    to_official: Path | None = None,
    image_size: int | None = None,
    tokenizer: str | None = None,
    entry: str | None = None,
    setting: tuple[str, ...] = (),
) -> None:
    """Convert a released weight file into a model folder, or (--to-official) a model folder back.

    Args:
        source: A .pt, .pth, .bin or .safetensors file, an index of shards, or (--to-official) a model folder.
        to: Model folder to make; for a file with both halves TO/generator and TO/tokenizer.
        to_official: File to write in the released layout: .pt, .pth, .bin or .safetensors.
        image_size: Pixels, where shapes do not say it (default: as published, or as the file name says).
        tokenizer: Of a generator: name or folder of its tokenizer, kept for `consonar sample`.
        entry: The part of a training checkpoint to take, e.g. ema (default: model, module or state_dict).
        setting: Other fields of the configuration that shapes do not say, e.g. l2_normalize=false.
    """
    from consonar import convert as conversion

    check_output(to or to_official, "--to" if to else "--to-official")
    if (to is None) == (to_official is None):
        raise UserError("convert: give either --to FOLDER, or --to-official FILE for the way back")
    if to_official is not None:
        if image_size is not None or tokenizer is not None or entry is not None or setting:
            raise UserError("--to-official: takes no other option")
        say(f"{conversion.to_official(source, to_official)}: {to_official}")
        return
    assert to is not None
    made = conversion.convert(
        source, to, image_size=image_size, tokenizer=tokenizer, entry=entry, settings=read_settings(setting)
    )
    for part in made:
        codes = f"{part.vocab_size} codes" + (f" of width {part.code_dim}" if part.code_dim else "")
        say(f"{part.recognised_as}: {part.num_parameters / 1e6:,.1f}M parameters, {part.num_tokens} tokens, {codes}")
        for note in part.notes:
            say(f"  {note}")
        say(f"  {part.component} folder: {part.folder}")


def read_settings(words: tuple[str, ...]) -> dict[str, Any]:
    """{"l2_normalize": False} <- ("l2_normalize=false",); values are JSON, or else text."""
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise UserError(f"--setting: {word!r} is not of the form field=value")
        if key in settings:
            raise UserError(f"--setting: {key} is given twice; keep one")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def models(name: tyro.conf.Positional[str | None] = None, /) -> None:
    """List the released models that can be loaded by name, or show where one was published.

    Args:
        name: One of them.
    """
    from consonar.published import GENERATORS, PUBLISHED, TOKENIZERS

    if name is None:
        print_models("tokenizers", TOKENIZERS)
        print_models("generators", GENERATORS)
        say("golden: arrays of the official implementation are reproduced, most at small size")
        say("manifest: every key and shape of the released file has its place")
        say("No released file itself was at hand. Load: hf:NAME. More: consonar models NAME")
        return
    if name not in PUBLISHED:
        raise unknown("models", name, PUBLISHED)
    model = PUBLISHED[name]
    place = f"https://huggingface.co/{model.repository}" if model.repository else str(model.elsewhere)
    say(f"{model.name}: {model.component} of kind {model.kind}, {model.parameters:,} parameters")
    say(f"  tokens      {model.num_tokens} of {model.vocab_size} codes")
    say(f"  published   {place}")
    say(f"  file        {model.file}")
    say(f"  sha256      {model.sha256 or 'not stated'}")
    say(f"  licence     {model.licence}")
    if model.tokenizer:
        say(f"  tokenizer   {model.tokenizer}")
    say(f"  golden      {model.golden or 'none'}")
    say(f"  manifest    {model.manifest or 'none'}")
