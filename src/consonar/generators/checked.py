"""What a generator from outside of the package is asked before a job uses it; those of the package have their tests.

Each of these mistakes trains, samples and measures without a word, and gives wrong numbers.
"""

from functools import partial

import torch
from torch import Tensor

from consonar import errors
from consonar.files.weights import of_package
from consonar.generators.base import GeneratorConfig
from consonar.seeding import generator as seeded
from consonar.seeding import integers, uniform
from consonar.types import Condition, Generator, PromptCondition, TextCondition

CLOSE = 0.01
"""How far two numbers may be apart that are to be the same, as a share of the range of all."""
READ = 12
"""Tokens that are read with a cache."""


def checked_generator(generator: Generator, name: str) -> Generator:
    """The generator itself; `UserError` as `check_generator` for one from outside of the package."""
    if not of_package(type(generator)):
        check_generator(generator, name)
    return generator


@torch.no_grad()
def check_generator(generator: Generator, name: str) -> None:
    """`UserError` where it does not do what `types.Generator` says, seen on two sequences of tokens drawn by seed. It
    is in evaluation mode then."""
    must = partial(errors.must, f"generator: {name}")
    count, vocabulary, device = generator.num_tokens, generator.vocab_size, next(generator.parameters()).device
    generator.eval()
    tokens = integers(seeded(0, "checked"), 0, vocabulary, 2, count).to(device)
    condition, layer, prefix = condition_for(generator, 2, device), generator.num_layers - 1, generator.prefix_length
    logits, taps = generator(tokens, condition, tap_layers=(layer,))
    shape, places = (2, count, vocabulary), (2, prefix + count, generator.width)
    must(logits.shape == shape, f"logits of shape {tuple(logits.shape)}, not (B, N, V), here {shape}")
    must(logits.is_floating_point() and logits.isfinite().all(), "logits that are not finite floating numbers")
    must(layer in taps and taps[layer].shape == places, f"tap_layers ({layer},): no hidden states of shape {places}")

    def same(these: Tensor, those: Tensor, of: Tensor = logits) -> bool:
        apart = CLOSE * float(of.max() - of.min()) + 1e-6
        return these.shape == those.shape and bool((these - those).abs().max() <= apart)

    alone = generator(tokens[:1], condition_for(generator, 1, device))[0]
    must(same(alone, logits[:1]), "the logits of an image depend on the others of its batch")
    changed, place = tokens.clone(), count // 2
    changed[:, place] = (changed[:, place] + 1) % vocabulary
    now, hidden = generator(changed, condition, tap_layers=(layer,))
    sees = f"logits[:, i] depend on token i or later ones: seen at token {place}"
    must(same(now[:, : place + 1], logits[:, : place + 1]), sees)
    before = slice(0, prefix + place)  # a head of zeros shows nothing
    must(same(hidden[layer][:, before], taps[layer][:, before], taps[layer]), f"{sees}, in the hidden states")
    cache = generator.new_cache(2)
    for read in range(min(READ, count - 1) + 1):
        context = tokens[:, max(0, read - 1) : read]
        next_logits = generator(context, condition, cache=cache)[0]
        must(same(next_logits, logits[:, read : read + 1]), f"with a cache the logits of token {read} are others")
    generator(tokens, generator.null_condition(condition))  # guidance reads it: an error of its own now, not then


def condition_for(generator: Generator, rows: int, device: torch.device) -> Condition:
    """So many of the kind that it takes: the class 0, or one caption of which all places are read."""
    if generator.num_classes:
        return torch.zeros(rows, dtype=torch.int64, device=device)
    assert isinstance(generator.config, GeneratorConfig)  # those of `GENERATORS` are
    length, width = generator.config.caption_shape
    mask = torch.ones(rows, length, dtype=torch.bool, device=device)
    if width:
        features = uniform(seeded(0, "caption"), 1, length, width).expand(rows, -1, -1)
        return TextCondition(features.to(device), mask)
    return PromptCondition(torch.zeros(rows, length, dtype=torch.int64, device=device), mask)
