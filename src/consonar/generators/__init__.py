"""The kinds of generators. A stored one is loaded by `consonar.components`."""

from collections.abc import Callable
from typing import NamedTuple

from consonar.generators.alitok import AliTokARConfig, AliTokARGenerator
from consonar.generators.base import GeneratorConfig
from consonar.generators.janus import JanusConfig, JanusGenerator
from consonar.generators.llamagen import LlamaGenConfig, LlamaGenGenerator
from consonar.generators.rear import ReARConfig, ReARGenerator
from consonar.types import Generator


class GeneratorKind(NamedTuple):
    """A row of the table."""

    config: type[GeneratorConfig]
    model: Callable[..., Generator]


GENERATORS: dict[str, GeneratorKind] = {
    "rear": GeneratorKind(ReARConfig, ReARGenerator),
    "llamagen": GeneratorKind(LlamaGenConfig, LlamaGenGenerator),
    "alitok-ar": GeneratorKind(AliTokARConfig, AliTokARGenerator),
    # Needs transformers, which is imported when one is built.
    "janus": GeneratorKind(JanusConfig, JanusGenerator),
}
"""The kinds, by what files call them."""


def build_generator(config: GeneratorConfig) -> Generator:
    """A generator of this configuration, of whatever kind, with random weights."""
    return GENERATORS[config.kind].model(config)
