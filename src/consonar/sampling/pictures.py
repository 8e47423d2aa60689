"""From tokens to pictures: as many at once as fit, and on CUDA while the tokens of the next batch are drawn."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from consonar import memory
from consonar.compiling import compiled
from consonar.types import Tokenizer

LIVE_MAPS = 6
"""Tensors as large as the largest one that a layer of a decoder makes, for which there must be room: an estimate."""


def images_at_once(tokenizer: Tokenizer, tokens: Tensor) -> int:
    """How many images one call of the decoder makes: on CUDA what half of the free memory holds, by the decoder's
    largest map of one of the tokens (B, N); elsewhere as many as there are."""
    if tokens.device.type != "cuda" or not isinstance(tokenizer, nn.Module):
        return sys.maxsize
    return max(1, memory.bytes_free(tokens.device) // 2 // bytes_of_image(tokenizer, tokens[:1]))


def bytes_of_image(tokenizer: Tokenizer, tokens: Tensor) -> int:
    """Memory that decoding takes for each image, of tokens (1, N)."""
    return bytes_of(partial(tokenizer.decode, tokens))


def bytes_of(run: Callable[[], object]) -> int:
    """Memory that `run` takes, by the largest map that a layer makes in it; next to none for what is no module of
    PyTorch's, which does not say."""
    sizes = [1]

    def see(module: nn.Module, inputs: object, output: object) -> None:
        sizes.append(output.nbytes if isinstance(output, Tensor) else 0)

    with register_module_forward_hook(see):
        run()
    return LIVE_MAPS * max(sizes)


class PictureDecoder:
    """Decodes the batches of a job, each in equal parts that are as large as the first batch found to fit.

    `compile`: the network is compiled for the largest part so far (`Compiled`). `image_size`: pictures are reduced to
    it as LlamaGen's sampler reduces them, bicubic, not antialiased, before they are clamped. Raises `UserError` for a
    tokenizer that has no `pixels`.
    """

    def __init__(self, tokenizer: Tokenizer, *, compile: bool = False, image_size: int | None = None):
        self.tokenizer, self.at_once, self.image_size = tokenizer, 0, image_size
        self.codec = compiled(tokenizer, "pixels") if compile else tokenizer

    def __call__(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of tokens (B, N)."""
        self.at_once = self.at_once or images_at_once(self.tokenizer, tokens)
        parts = tokens.chunk(-(-len(tokens) // self.at_once))
        images = [self.reduced(self.codec.decode(part).float()).clamp(-1, 1) for part in parts]
        return torch.cat(images) if len(images) > 1 else images[0]

    def reduced(self, images: Tensor) -> Tensor:
        if self.image_size in (None, images.shape[-1]):
            return images
        return F.interpolate(images, self.image_size, mode="bicubic")


@contextmanager
def evaluating(*models: object) -> Iterator[None]:
    """Models in evaluation mode, without dropout; after it every part is in the mode that it was in."""
    modules = [model for model in models if isinstance(model, nn.Module)]
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
