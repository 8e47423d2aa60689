"""Generators and tokenizers of other packages (docs/own-models.md)."""

import os
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module

from consonar.errors import UserError
from consonar.generators import GENERATORS
from consonar.generators.base import GeneratorConfig
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.base import TokenizerConfig
from consonar.types import Kind, ModelConfig

VARIABLE = "CONSONAR_MODELS"


def import_own_models() -> None:
    """Imports the modules that `CONSONAR_MODELS` names, with commas, which add rows to the tables of kinds. `UserError`
    for one that is not there, and for a row whose configuration a file could not give."""
    for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
        try:
            import_module(name)
        except ImportError as error:
            where = "is its folder installed, or named in PYTHONPATH?"
            raise UserError(f"{VARIABLE}: {name!r}: {error}; {where}") from error
    check_rows("GENERATORS", GENERATORS, GeneratorConfig)
    check_rows("TOKENIZERS", TOKENIZERS, TokenizerConfig)


def check_rows(table: str, kinds: Mapping[str, Kind[ModelConfig, object]], base: type[ModelConfig]) -> None:
    """`UserError` for a row whose configuration is not of this class, or has another `kind` than it is called."""
    for kind, row in kinds.items():
        if not (isinstance(row, Kind) and isinstance(row.config, type) and issubclass(row.config, base)):
            raise UserError(f"{table}[{kind!r}]: give it as Kind(configuration, model), the first a {base.__name__}")
        own = next(field.default for field in fields(row.config) if field.name == "kind")
        if own != kind:
            raise UserError(f"{table}[{kind!r}]: {row.config.__name__}.kind is {own!r}; it is to be the same name")
