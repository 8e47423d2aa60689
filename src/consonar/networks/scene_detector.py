"""A small detector of what scenes show: which emoji stand where, in which colour and size; trained weights are here.

Fully convolutional, with a quarter of the picture's resolution: at every cell whether an emoji's centre is there, which
object it is, in which colour, how large, and where in the cell (Zhou et al. 2019, arXiv 1904.07850, in form). Pictures
of any size are read at `SIDE` px. Its card is in `pretrained/scene-detector`, the script that trained it is
`benchmarks/scene_detector.py`.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from consonar.data.scenes import COLOURS, GROUNDS, OBJECTS
from consonar.errors import UserError
from consonar.files.weights import component_config, load_module
from consonar.files.writers import file_sha256
from consonar.float32 import exact
from consonar.networks.base import Frozen, pieces
from consonar.records import device_of

SIDE, STRIDE = 64, 4
OBJECT_NAMES = tuple(OBJECTS)
COLOUR_NAMES = ("", *COLOURS)
"""The first: the object's own."""
SMALLEST_INPUT = 32
"""Pixels, as of scenes."""
FAINTEST = 0.1
"""Confidence below which nothing is found."""
FARTHEST_GROUND = 40.0
"""8-bit levels from one of `GROUNDS`, as a root of mean squares, beyond which a picture has none of them."""
FOLDER = Path(__file__).parent / "pretrained" / "scene-detector"


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden + self.second(self.first(hidden).relu())).relu()


class SceneDetector(Frozen):
    """(B, 3, SIDE, SIDE) in [-1, 1] -> (B, 4 + objects + colours, SIDE / STRIDE, SIDE / STRIDE).

    Channels: logit of a centre, side (of SIDE), down and right from the cell's middle (of STRIDE), logits of
    `OBJECT_NAMES` and of `COLOUR_NAMES`.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.fine_in = nn.Conv2d(32, width, 3, stride=2, padding=1)
        self.fine = nn.Sequential(Residual(width), Residual(width))
        self.coarse_in = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(Residual(2 * width), Residual(2 * width))
        self.back = nn.Conv2d(2 * width, width, 1)
        self.joined = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.heads = nn.Conv2d(2 * width, 4 + len(OBJECT_NAMES) + len(COLOUR_NAMES), 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(self.fine_in(self.stem(images).relu()).relu())
        coarse = self.back(self.coarse(self.coarse_in(fine).relu()))
        return self.heads(self.joined(fine + functional.interpolate(coarse, scale_factor=2)).relu())


@dataclass(frozen=True)
class Found:
    """One emoji that was found in a picture."""

    object: str
    colour: str
    confidence: float
    """That an emoji is there, and this one: 0 to 1."""
    x: float
    y: float
    """Its centre, from the top left corner, of a picture of 1 x 1."""
    side: float
    """Of its square, likewise."""


@dataclass(frozen=True)
class Sight:
    """What was found in a picture."""

    objects: tuple[Found, ...]
    ground: str
    """One of `GROUNDS`, or "": none."""


def load_scene_detector() -> SceneDetector:
    """The detector in the package, on the CPU; `UserError` where it knows other objects than scenes have now."""
    config = component_config(FOLDER)
    if config["objects"] != list(OBJECT_NAMES) or config["colours"] != list(COLOUR_NAMES):
        raise UserError(f"{FOLDER}: is of other objects or colours; python benchmarks/scene_detector.py train")
    return load_module(SceneDetector, FOLDER)


@lru_cache(maxsize=1)
def detector_sha256() -> str:
    return file_sha256(FOLDER / "model.safetensors")


@torch.no_grad()
def look(detector: SceneDetector, images: Tensor) -> list[Sight]:
    """What the detector finds in each of images (B, 3, H, W) in [-1, 1], `SMALLEST_INPUT` px or more; clamped first."""
    if min(images.shape[-2:]) < SMALLEST_INPUT:
        raise UserError(f"scenes are found in pictures of {SMALLEST_INPUT} px or more, not of {min(images.shape[-2:])}")
    sights, device = [], device_of(detector)
    for piece in pieces(images.clamp(-1, 1), device):
        read = functional.interpolate(piece, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        with exact(device):
            maps = detector(read).cpu()
        grounds = ground_of(read).cpu()
        sights += [Sight(peaks(one), ground) for one, ground in zip(maps, named(grounds), strict=True)]
    return sights


def peaks(maps: Tensor) -> tuple[Found, ...]:
    """The emoji in the maps (C, h, w) of one picture: cells that are likelier a centre than all around them."""
    centre = maps[0].sigmoid()
    is_peak = (centre == functional.max_pool2d(centre[None], 3, 1, 1)[0]) & (centre > FAINTEST)
    found = []
    for row, column in is_peak.nonzero().tolist():
        cell = maps[:, row, column]
        chance, which = cell[4 : 4 + len(OBJECT_NAMES)].softmax(0).max(0)
        colour = COLOUR_NAMES[int(cell[4 + len(OBJECT_NAMES) :].argmax())]
        if (confidence := float(centre[row, column] * chance)) > FAINTEST:
            x, y = (STRIDE * (place + 0.5 + float(cell[i])) / SIDE for place, i in ((column, 3), (row, 2)))
            found.append(Found(OBJECT_NAMES[int(which)], colour, confidence, x, y, float(cell[1])))
    return tuple(found)


def ground_of(images: Tensor) -> Tensor:
    """The median colour of the frame of two pixels, (B, 3) in 8-bit levels, of images (B, 3, H, W) in [-1, 1]."""
    inside = torch.zeros(images.shape[-2:], dtype=torch.bool, device=images.device)
    inside[2:-2, 2:-2] = True
    return (images[:, :, ~inside].median(-1).values + 1) * 127.5


def named(colours: Tensor) -> list[str]:
    """The nearest of `GROUNDS` to each of colours (B, 3); "" where none is near."""
    known = torch.tensor(list(GROUNDS.values()), dtype=torch.float32)
    distances, nearest = ((colours[:, None] - known).square().mean(-1).sqrt()).min(1)
    pairs = zip(distances.tolist(), nearest.tolist(), strict=True)
    return [list(GROUNDS)[index] if distance <= FARTHEST_GROUND else "" for distance, index in pairs]
