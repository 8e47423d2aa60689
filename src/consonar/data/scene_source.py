"""Scenes as a source of pictures, as many as wanted.

Scene i of a split is a function of the seed and i alone, drawn when it is first read, and kept in the cache. At least
one pairing (two objects; a number, colour or size of one) of a validation scene is in no training scene; single plain
objects are in both.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import PIL
import torch
from PIL import Image

from consonar.data.kept_pictures import KeptPictures
from consonar.data.openmoji import package
from consonar.data.scenes import (
    GROUNDS,
    KINDS,
    VERSION,
    Placed,
    Scene,
    draw_scene,
    emoji_hash,
    is_held_out,
    pairings,
    picture_of,
    place,
)
from consonar.errors import UserError, check_choice
from consonar.files.writers import cache_dir
from consonar.options import Range
from consonar.types import ImageRecord

SPLITS = ("train", "validation")
DEFAULT_COUNTS = {"train": 20_000, "validation": 2_000}
TARGET = re.compile(r"0*(?P<count>[1-9]\d{0,8})(\?seed=(?P<seed>\d{1,18}))?", re.ASCII)


class Scenes:
    """`count` scenes of one split at one size, an `IndexedSource`; label: its kind, caption: what it shows.

    Raises `UserError` for an unknown split and when the packages of the extra `openmoji` are missing.
    """

    keeps_pictures = True
    """Whether they are read from the disk as drawn, so that nobody needs to hold them in memory."""

    def __init__(self, split: str = "train", image_size: int = 64, *, count: int | None = None, seed: int = 0) -> None:
        check_choice("scenes split", split, SPLITS)
        Range(32, 512).check("scenes image_size", image_size)
        self.split, self.image_size, self.seed = split, image_size, seed
        self.count = DEFAULT_COUNTS[split] if count is None else count
        Range(1, 10**9).check("scenes count", self.count)
        self.name = f"scenes/{split}@{image_size}"
        self.class_names: tuple[str, ...] | None = KINDS
        self.labels = torch.arange(self.count) % len(KINDS)
        drawn_by = package("resvg_py").__version__, emoji_hash()
        made_by = [VERSION, split, image_size, self.count, seed, *drawn_by]
        self.content_hash = hashlib.sha256(repr(made_by).encode()).hexdigest()
        self.made_by = [VERSION, split, image_size, seed, *drawn_by, PIL.__version__]
        """What decides a picture beside its number."""

    def __len__(self) -> int:
        return self.count

    @cached_property
    def captions(self) -> list[str | None]:
        """Of every picture, none of which is drawn for them."""
        return [str(self.placed(index)[0]) for index in range(self.count)]

    def scene(self, index: int) -> tuple[Scene, random.Random]:
        """What picture `index` shows, and what draws it."""
        rng = random.Random(f"{VERSION}/{self.seed}/{self.split}/{index}")
        kind = KINDS[index % len(KINDS)]
        while True:
            scene = draw_scene(kind, rng)
            asked = pairings(scene)
            if not asked or any(map(is_held_out, asked)) == (self.split == "validation"):
                return scene, rng

    def placed(self, index: int) -> tuple[Scene, str, list[Placed]]:
        """Picture `index` in words: its scene, with the ground where the caption names it; its ground; its emoji."""
        scene, rng = self.scene(index)
        ground = rng.choice(list(GROUNDS)) if rng.random() < 0.5 else "white"
        if ground != "white" and rng.random() < 0.5:
            scene = replace(scene, ground=ground)
        return scene, ground, place(scene, self.image_size, rng)

    @cached_property
    def kept(self) -> KeptPictures:
        """Those of any number of scenes that are made by the same."""
        name = hashlib.sha256(repr(self.made_by).encode()).hexdigest()[:32]
        return KeptPictures(cache_dir() / "scenes" / name, self.image_size, self.draw)

    def draw(self, index: int) -> tuple[Image.Image, str]:
        """Picture `index`, any number from 0 on, and its caption."""
        scene, ground, placed = self.placed(index)
        return picture_of(ground, placed, self.image_size), str(scene)

    def read(self, index: int) -> ImageRecord:
        """Scene `index`, 0 <= index < len(self)."""
        picture, caption = self.kept.read(index)
        return ImageRecord(picture, f"{self.split}-{index:07d}", int(self.labels[index]), caption)

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.read, range(len(self)))


def open_scenes(target: str, split: str, image_size: int) -> Scenes:
    """What `scenes`, `scenes:COUNT` and `scenes:COUNT?seed=N` name, COUNT scenes to train on; validation has as many,
    2,000 at most."""
    found = TARGET.fullmatch(target or str(DEFAULT_COUNTS["train"]))
    if found is None:
        form = f"is not a number of scenes from 1 to {10**9 - 1:,}, which ?seed=N may follow (0 to {10**18 - 1})"
        raise UserError(f"scenes: {target!r} {form}")
    many, seed = int(found["count"]), int(found["seed"] or 0)
    count = many if split == "train" else min(many, DEFAULT_COUNTS["validation"])
    return Scenes(split, image_size, count=count, seed=seed)
