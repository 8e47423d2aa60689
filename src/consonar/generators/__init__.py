"""The kinds of generators. A stored one is loaded by `consonar.components`."""

from consonar.generators import alitok, janus, llamagen, rear
from consonar.generators.base import GeneratorConfig
from consonar.types import Generator, Kind

GENERATORS: dict[str, Kind[GeneratorConfig, Generator]] = {
    "rear": Kind(rear.ReARConfig, rear.ReARGenerator),
    "llamagen": Kind(llamagen.LlamaGenConfig, llamagen.LlamaGenGenerator),
    "alitok-ar": Kind(alitok.AliTokARConfig, alitok.AliTokARGenerator),
    "janus": Kind(janus.JanusConfig, janus.JanusGenerator),
}
"""The kinds, by what files call them."""


def build_generator(config: GeneratorConfig) -> Generator:
    """A generator of this configuration, of whatever kind, with random weights."""
    return GENERATORS[config.kind].model(config)
