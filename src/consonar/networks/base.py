"""What networks that judge images share: their weights are one published file each, brought by the user, hash checked;
they are frozen; a distance compares the layers of a network.

Letters: `B` images, `G` images of each original, `C` channels, `h`, `w` places of one layer's map.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from consonar.errors import NotHere, UserError, reading
from consonar.files.readers import home_expanded
from consonar.files.weights import check_plain, load_weights
from consonar.files.writers import cache_dir, file_sha256
from consonar.float32 import in_float32

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class WeightFile:
    """A published file of weights."""

    network: str
    """What it is for; begins every message."""
    name: str
    url: str
    sha256_prefix: str
    """By PyTorch's convention part of the name: the first eight hex digits of the SHA-256."""

    def read(self, path: str | Path | None, *, check_hash: bool) -> tuple[Path, str, dict[str, Tensor]]:
        """The file, its SHA-256 and its tensors; `path` None: `name` in `cache_dir()`. Never downloads.

        A .pth or .safetensors state dict; nothing in the file is executed. Raises `UserError` when it is missing,
        damaged, holds something else, or (with `check_hash`) has another SHA-256.
        """
        file = home_expanded(path) if path is not None else cache_dir() / self.name
        where = f"{self.network}: {file}"
        if not file.is_file():
            raise NotHere(
                f"{self.network}: no weights at {file}; download {self.url} (SHA-256 {self.sha256_prefix}...) and put "
                "it there" + ("" if path is None else ", or name the file you have")
            )
        digest = file_sha256(file)
        if check_hash and not digest.startswith(self.sha256_prefix):
            raise UserError(
                f"{where} has SHA-256 {digest[:8]}..., the published {self.name} {self.sha256_prefix}...: cut short or "
                f"another file; download {self.url} again"
            )
        with reading(where, "a file of weights"):
            if file.suffix == ".safetensors":
                return file, digest, safetensors.torch.load_file(file)
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise UserError(f"{where}: holds a {type(state).__name__}, expected a table of weights by name")
        tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
        check_plain(tensors, where)
        return file, digest, tensors


def with_weights(build: Callable[[], Network], state: Mapping[str, Tensor], where: str) -> Network:
    """The network that `build` makes, on the CPU, with exactly these weights; `UserError` begins with `where`."""
    # On the meta device: random weights that are overwritten at once would advance the global random generator.
    with torch.device("meta"):
        network = build()
    network.to_empty(device="cpu")
    load_weights(network, state, where)
    return network


class Frozen(nn.Module):
    """Stays in evaluation mode: a frozen measure has no other."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


class LayerDistance(Frozen, ABC):
    """Distance of image pairs, (B * G,), 0 for equal images: the sum of the means of `maps`. Images in [-1, 1].

    Frozen; gradients flow to the first images alone.
    """

    name: str
    weights_sha256: str
    bears_bf16: ClassVar[bool] = False
    """Whether its network may multiply in bf16 where draws of one picture are ranked: what that moves is small beside
    what sets them apart (a test)."""

    @abstractmethod
    def layers(self, images: Tensor) -> list[Tensor]:
        """The feature maps of images in [-1, 1]: (B, C, h, w) each."""

    @abstractmethod
    def difference(self, layer: int, a: Tensor, b: Tensor) -> Tensor:
        """At every place of one layer: (B, h, w) <- features a, b (B, C, h, w)."""

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        return torch.stack([layer.mean((1, 2)) for layer in self.maps(images, originals)]).sum(0)

    @in_float32
    def maps(self, images: Tensor, originals: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Per layer, where two images differ: (B * G, h, w) <- images (B * G, 3, H, W), originals (B, 3, H, W).

        The G images of one original follow each other. In float32, the network too where it does not bear the `dtype`
        of fewer bits: the features of like images differ by less than the rounding of bf16.
        """
        group = len(images) // len(originals)
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None and self.bears_bf16):
            found = self.layers(images)
            with torch.no_grad():
                target = self.layers(originals)
        return [
            self.difference(index, a, b.repeat_interleave(group, 0) if group > 1 else b)
            for index, (a, b) in enumerate(zip(found, target, strict=True))
        ]


def pieces(images: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """The images on `device`, on a CPU 16 at a time, which stay in its caches: twice as fast."""
    return images.to(device).split(16 if device.type == "cpu" else max(1, len(images)))
