"""The kinds of generators. A stored one is loaded by `consonar.components`."""

from consonar.generators.alitok import AliTokARConfig, AliTokARGenerator
from consonar.generators.base import GeneratorConfig
from consonar.generators.janus import JanusConfig, JanusGenerator
from consonar.generators.llamagen import LlamaGenConfig, LlamaGenGenerator
from consonar.generators.rear import ReARConfig, ReARGenerator
from consonar.types import Generator, Kind

GENERATORS: dict[str, Kind[GeneratorConfig, Generator]] = {
    "rear": Kind(ReARConfig, ReARGenerator),
    "llamagen": Kind(LlamaGenConfig, LlamaGenGenerator),
    "alitok-ar": Kind(AliTokARConfig, AliTokARGenerator),
    # Needs transformers, which is imported when one is built.
    "janus": Kind(JanusConfig, JanusGenerator),
}
"""The kinds, by what files call them."""


def build_generator(config: GeneratorConfig) -> Generator:
    """A generator of this configuration, of whatever kind, with random weights."""
    return GENERATORS[config.kind].model(config)
