"""What a generator from outside of the package is asked before a job uses it; those of the package have their tests.

Each of these mistakes trains, samples and measures without a word, and gives wrong numbers.
"""

import torch
from torch import Tensor

from consonar.errors import UserError
from consonar.generators.base import GeneratorConfig
from consonar.seeding import generator as seeded
from consonar.seeding import integers, uniform
from consonar.types import Condition, Generator, PromptCondition, TextCondition

CLOSE = 0.01
"""How far two logits may be apart that are to be the same, as a share of the range of all."""
READ = 3
"""Tokens that are read with a cache."""


def checked_generator(generator: Generator, name: str) -> Generator:
    """The generator itself; `UserError` as `check_generator` for one from outside of the package."""
    if type(generator).__module__.partition(".")[0] != __name__.partition(".")[0]:
        check_generator(generator, name)
    return generator


@torch.no_grad()
def check_generator(generator: Generator, name: str) -> None:
    """`UserError` where it does not do what `types.Generator` says, seen on one sequence of tokens drawn by seed. It is
    in evaluation mode then."""

    def must(holds: object, rule: str) -> None:
        if not holds:
            raise UserError(f"generator: {name}: {rule} (docs/own-models.md)")

    count, vocabulary, device = generator.num_tokens, generator.vocab_size, next(generator.parameters()).device
    generator.eval()
    tokens = integers(seeded(0, "checked"), 0, vocabulary, 1, count).to(device)
    condition = condition_for(generator, device)
    layer = generator.num_layers - 1
    logits, taps = generator(tokens, condition, tap_layers=(layer,))
    shape, places = (1, count, vocabulary), (1, generator.prefix_length + count, generator.width)
    must(logits.shape == shape, f"logits of shape {tuple(logits.shape)}, not (B, N, V), here {shape}")
    must(logits.is_floating_point() and logits.isfinite().all(), "logits that are not finite floating numbers")
    must(layer in taps and taps[layer].shape == places, f"tap_layers ({layer},): no hidden states of shape {places}")
    apart = CLOSE * float(logits.max() - logits.min()) + 1e-6

    def same(these: Tensor, those: Tensor) -> bool:
        return these.shape == those.shape and bool((these - those).abs().max() <= apart)

    changed = tokens.clone()
    place = count // 2
    changed[:, place] = (changed[:, place] + 1) % vocabulary
    before = generator(changed, condition)[0][:, : place + 1]
    must(same(before, logits[:, : place + 1]), f"logits[:, i] depend on token i or later ones: seen at token {place}")
    cache = generator.new_cache(1)
    for read in range(min(READ, count - 1) + 1):
        context = tokens[:, max(0, read - 1) : read]
        next_logits = generator(context, condition, cache=cache)[0]
        must(same(next_logits, logits[:, read : read + 1]), f"with a cache the logits of token {read} are others")
    generator(tokens, generator.null_condition(condition))  # guidance reads it: an error of its own now, not then


def condition_for(generator: Generator, device: torch.device) -> Condition:
    """One of the kind that it takes: the class 0, or a caption of which all places are read."""
    if generator.num_classes:
        return torch.zeros(1, dtype=torch.int64, device=device)
    assert isinstance(generator.config, GeneratorConfig)  # those of `GENERATORS` are
    length, width = generator.config.caption_shape
    mask = torch.ones(1, length, dtype=torch.bool, device=device)
    if width:
        return TextCondition(uniform(seeded(0, "caption"), 1, length, width).to(device), mask)
    return PromptCondition(torch.zeros(1, length, dtype=torch.int64, device=device), mask)
