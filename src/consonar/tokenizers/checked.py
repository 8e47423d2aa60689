"""What a tokenizer from outside of the package is asked before a job uses it; those of the package have their tests.

Each of these mistakes trains, samples and measures without a word, and writes wrong pictures and numbers.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from consonar import errors
from consonar.errors import UserError
from consonar.files.weights import of_package
from consonar.options import is_whole
from consonar.seeding import generator, uniform
from consonar.tokenizers.base import OVERSHOOT, described
from consonar.types import Tokenizer

Own = TypeVar("Own", bound=Tokenizer)
CLOSE, DARK = 0.01, 0.5
"""How far two pixels may be apart that are to be the same; what the mean of a black picture in [0, 1] is below."""
ALIKE = 0.9
"""Share of the tokens of an image that are the same in other batches, where kernels round otherwise."""


def checked_tokenizer(tokenizer: Own, name: str) -> Own:
    """The tokenizer itself; `UserError` as `check_tokenizer` for one from outside of the package."""
    if not of_package(type(tokenizer)):
        check_tokenizer(tokenizer, name)
    return tokenizer


@torch.no_grad()
def check_tokenizer(tokenizer: Tokenizer, name: str) -> None:
    """`UserError` where it does not do what `types.Tokenizer` says, seen on two pictures, of noise and all black."""
    must = partial(errors.must, f"tokenizer: {name}")
    count, vocabulary, side, grid = tokenizer.num_tokens, tokenizer.vocab_size, tokenizer.image_size, tokenizer.grid
    must(is_whole(side), f"image_size {side!r}, not the side of a square picture")
    must(vocabulary > 1, f"vocab_size {vocabulary}: a generator has nothing to choose from")
    must(grid is None or grid.num_tokens == count, f"{grid} is not of num_tokens {count}")
    images = torch.cat([uniform(generator(0, "checked"), 3 * side**2) * 2 - 1, -torch.ones(3 * side**2)])
    images = images.view(2, 3, side, side)
    tokens, again = tokenizer.encode(images), tokenizer.encode(images)
    is_right = isinstance(tokens, Tensor) and tokens.dtype == torch.int64 and tokens.shape == (2, count)
    must(is_right, f"encode gives {described(tokens)}, not torch.int64 of shape (2, {count})")
    least, most = int(tokens.min()), int(tokens.max())
    must(least >= 0 and most < vocabulary, f"encode gives tokens {least}..{most} with vocab_size {vocabulary}")
    must(torch.equal(tokens, again), "encode gives other tokens for the same images")
    alone = (tokenizer.encode(images[:1]) == tokens[:1]).float().mean()
    must(alone >= ALIKE, "the tokens of an image depend on the others of its batch")
    try:
        tokenizer.embed(torch.full((1, count), vocabulary - 1))
    except (IndexError, RuntimeError) as error:
        raise UserError(f"tokenizer: {name}: embed has no token {vocabulary - 1}: vocab_size {vocabulary}") from error
    codes = tokenizer.embed(tokens)
    check_numbers(must, "embed", codes, (2, count, tokenizer.code_dim))
    decoded = {"decode": tokenizer.decode(tokens), "decode_embeddings": tokenizer.decode_embeddings(codes)}
    for method, pictures in decoded.items():
        check_numbers(must, method, pictures, tuple(images.shape))
        low, high = (float(end) for end in pictures.aminmax())
        must(max(-low, high) <= 2 * OVERSHOOT, f"{method} gives pixels from {low:g} to {high:g}, not in [-1, 1]")
        is_dark = low >= 0 and high > low and float(pictures[1].mean()) < DARK
        must(not is_dark, f"{method} gives no pixel below 0, of a black picture either: [-1, 1] is meant, not [0, 1]")

    def apart(these: Tensor, those: Tensor) -> float:
        """How far they are apart at most, as pictures: who clamps and who does not are alike."""
        return float((these.clamp(-1, 1) - those.clamp(-1, 1)).abs().max())

    whole = decoded["decode"]
    must(apart(tokenizer.decode(tokens), whole) <= CLOSE, "decode gives other pictures for the same tokens")
    must(apart(tokenizer.decode(tokens[:1]), whole[:1]) <= CLOSE, "a picture depends on the others of its batch")
    both = apart(whole, decoded["decode_embeddings"])
    must(both <= CLOSE, f"decode(tokens) and decode_embeddings(embed(tokens)) are {both:.2g} apart")


def check_numbers(must: Callable[[object, str], None], method: str, given: object, shape: tuple[int, ...]) -> None:
    """That they are finite, floating, and of this shape."""
    is_right = isinstance(given, Tensor) and given.is_floating_point() and tuple(given.shape) == shape
    must(is_right, f"{method} gives {described(given)}, not floating numbers of shape {shape}")
    must(isinstance(given, Tensor) and given.isfinite().all(), f"{method} gives numbers that are not finite")
