"""Features of DINOv2 and CLIP, by transformers (extra `text`) from a local folder or the Hugging Face hub.

The class token of DINOv2 after the last norm (Oquab et al. 2023), as Stein et al. 2023 (arXiv 2306.04675) measure with,
and CLIP's projected embedding of an image (Radford et al. 2021), not normalised, as torch-fidelity does. Images are
resized to the network's size as their pictures were: bicubic, antialiased, rounded to 8 bits; then mean and deviation
of the data that each was trained on. transformers' own preprocessing, which needs torchvision, is not used.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from consonar.errors import UserError, check_choice
from consonar.files.readers import read_json
from consonar.files.weights import component_fingerprint
from consonar.networks.base import pieces
from consonar.networks.released import WEIGHTS, find_folder, read_network


@dataclass(frozen=True)
class Kind:
    """What one family of networks is, and what its pictures went through."""

    model_types: tuple[str, ...]
    """In its config.json."""
    loader: str
    """The class of transformers that reads it."""
    output: str
    """Which of its outputs the features are."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int | None = None
    """Pixels a side; None: what its config.json says."""


KINDS = {
    "dinov2": Kind(
        ("dinov2", "dinov2_with_registers"), "AutoModel", "pooler_output",
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), image_size=224,
    ),
    "clip": Kind(
        ("clip", "clip_vision_model"), "CLIPVisionModelWithProjection", "image_embeds",
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
    ),
}  # fmt: skip


class VisionTransformerFeatures:
    """A feature network (`networks.FeatureNetwork`); `network` is a model of transformers in evaluation mode, `place`
    what loads it again."""

    def __init__(self, kind: Kind, place: str, network: Any, device: str = "cpu") -> None:  # Any: an optional package's
        self.kind, self.place, self.device = kind, place, torch.device(device)
        self.name = f"{place.partition(':')[0]}:{Path(place.partition(':')[2]).name}"
        self.weights_sha256 = component_fingerprint({}, network.state_dict())
        self.image_size = kind.image_size or network.config.image_size
        self.network = network.to(self.device)
        width = "projection_dim" if kind.output == "image_embeds" else "hidden_size"
        self.num_features: int = getattr(network.config, width)
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1).to(self.device) for values in (kind.mean, kind.std))

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, S, S), normalised, from images (B, 3, H, W) in [-1, 1]."""
        size = (self.image_size, self.image_size)
        levels = ((images.float() + 1) * 127.5).round()
        if images.shape[-2:] != size:
            levels = functional.interpolate(levels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        return (levels / 255 - self.mean) / self.std

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] on any device -> (B, F) float32 on the network's device."""
        found = [getattr(self.network(self.pixels(piece)), self.kind.output) for piece in pieces(images, self.device)]
        return torch.cat(found).float()


def load_vision_transformer(name: str, device: str = "cpu") -> VisionTransformerFeatures:
    """The network that KIND:FOLDER or KIND:OWNER/NAME of the hub means, KIND a key of `KINDS`.

    A folder holds config.json and weights as transformers saves them. Raises `UserError` where transformers or files
    are missing, and for a network of another kind or files that lack weights.
    """
    kind_name, _, place = name.partition(":")
    kind, where = KINDS[kind_name], f"feature_network: {name}"
    if not place:
        raise UserError(f"{where} names no folder; write {kind_name}:FOLDER or {kind_name}:OWNER/NAME")
    folder = find_folder(place, where, ("config.json", WEIGHTS))
    config = read_json(folder / "config.json")
    check_choice(f"{where}: model_type in config.json", config.get("model_type"), kind.model_types)
    # One of both halves of CLIP says there how wide embeddings are, which the half for images would not read.
    given = {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}
    return VisionTransformerFeatures(kind, name, read_network(kind.loader, folder, where, **given), device)
