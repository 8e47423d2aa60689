"""Scenes: one to four emoji on a plain or tinted ground, with captions made by rules; `scene_source` has many of them.

Kinds of prompts are GenEval's (arXiv 2310.11513) and more. The emoji are OpenMoji's (CC BY-SA 4.0).
"""

import hashlib
import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from consonar.data.openmoji import package, svg_files
from consonar.errors import UserError

VERSION = 1
"""Changes with what a seed draws."""
OBJECTS = {
    "dog": "1F436", "cat": "1F431", "mouse": "1F42D", "rabbit": "1F430", "fox": "1F98A", "bear": "1F43B",
    "panda": "1F43C", "cow": "1F42E", "pig": "1F437", "frog": "1F438", "penguin": "1F427", "owl": "1F989",
    "duck": "1F986", "octopus": "1F419", "crab": "1F980", "snail": "1F40C", "butterfly": "1F98B", "bee": "1F41D",
    "ladybug": "1F41E", "turtle": "1F422", "elephant": "1F418", "apple": "1F34E", "pear": "1F350", "banana": "1F34C",
    "lemon": "1F34B", "strawberry": "1F353", "pineapple": "1F34D", "carrot": "1F955", "mushroom": "1F344",
    "hamburger": "1F354", "egg": "1F95A", "doughnut": "1F369", "cup": "2615", "house": "1F3E0", "car": "1F697",
    "bicycle": "1F6B2", "rocket": "1F680", "airplane": "2708", "tree": "1F333", "cactus": "1F335", "rose": "1F339",
    "star": "2B50", "moon": "1F319", "cloud": "2601", "umbrella": "2602", "snowman": "26C4", "balloon": "1F388",
    "gift": "1F381", "ball": "26BD", "guitar": "1F3B8", "drum": "1F941", "book": "1F4D6", "key": "1F511",
    "lock": "1F512", "bell": "1F514", "clock": "23F0", "chair": "1FA91", "hat": "1F3A9", "shoe": "1F45F",
    "shirt": "1F455", "crown": "1F451", "hammer": "1F528", "camera": "1F4F7", "robot": "1F916", "ghost": "1F47B",
    "heart": "2764", "anchor": "2693", "backpack": "1F392",
}  # fmt: skip
"""What scenes show, and the emoji that it is: chosen by hand; how far they are told apart: docs/text-to-image.md."""
PLURALS = {
    "mouse": "mice", "fox": "foxes", "octopus": "octopuses", "butterfly": "butterflies", "strawberry": "strawberries",
    "cactus": "cacti", "snowman": "snowmen",
}  # fmt: skip
COLOURS = {
    "red": (235, 50, 45), "yellow": (252, 220, 50), "green": (85, 180, 60), "blue": (60, 125, 235),
    "purple": (150, 75, 205), "pink": (250, 150, 195),
}  # fmt: skip
"""What an emoji is painted in, outlines apart; without one it has its own colours."""
GROUNDS = {
    "white": (255, 255, 255), "pale blue": (222, 236, 250), "pale green": (226, 242, 220),
    "pale yellow": (250, 245, 214), "pale grey": (232, 232, 232),
}  # fmt: skip
SIZES = {"small": 17, "": 25, "large": 31}
"""Pixels of an emoji, of 64 that a side of the picture has."""
NUMBERS = ("a", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("single", "pair", "counting", "colour", "position", "attribution", "size", "mixed")
"""The classes: GenEval's (single and two objects, counting, colours, position, attribution), sizes, several of them."""
HELD_OUT = 0.1
"""Share of pairings that are for validation."""


@dataclass(frozen=True)
class Group:
    """`count` times one object, 1 to 4; `colour` and `size` may be "": its own, and the usual."""

    object: str
    count: int = 1
    colour: str = ""
    size: str = ""

    def __str__(self) -> str:
        text = " ".join(filter(None, (self.size, self.colour, self.object if self.count == 1 else plural(self.object))))
        article = "an" if text[0] in "aeiou" else "a"
        return f"{article if self.count == 1 else NUMBERS[self.count - 1]} {text}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a group, or two of different objects and how the first stands to the second."""

    groups: tuple[Group, ...]
    relation: str = ""
    """One of `RELATIONS`, or "": beside each other in any way."""
    ground: str = field(default="", kw_only=True)
    """The ground that the caption names; "": it names none."""

    def __str__(self) -> str:
        text = f" {self.relation or 'and'} ".join(map(str, self.groups))
        return f"{text} on a {self.ground} ground" if self.ground else text


@dataclass(frozen=True)
class Placed:
    """One emoji of a picture, in a square of `side` pixels."""

    object: str
    colour: str
    left: int
    top: int
    side: int


def plural(name: str) -> str:
    return PLURALS.get(name, f"{name}s")


GROUP = re.compile(
    rf"(?P<count>an|{'|'.join(NUMBERS)}) ((?P<size>small|large) )?((?P<colour>{'|'.join(COLOURS)}) )?(?P<object>[a-z]+)"
)
GROUND = re.compile(rf" on an? ({'|'.join(GROUNDS)}) ground$")


def read_caption(text: str) -> Scene:
    """The scene that a caption of the rules describes, in upper or lower case.

    `UserError` for any other text, and for one that asks for more than four emoji, or twice for one object.
    """
    words = re.sub("to the (left|right) of", r"\1 of", " ".join(text.lower().split()).rstrip("."))
    ground = GROUND.search(words)
    first, *rest = re.split(f" (and|{'|'.join(RELATIONS)}) ", GROUND.sub("", words))
    groups = tuple(read_group(part, text) for part in (first, *rest[1::2]))
    asked = len({group.object for group in groups})
    if asked > 2 or asked < len(groups) or sum(group.count for group in groups) > 4:
        raise UserError(f"scenes: {text!r} asks for more than two kinds of objects, four in all, or twice for one kind")
    return Scene(groups, "".join(rest[:1]).replace("and", ""), ground=ground[1] if ground else "")


def read_group(words: str, text: str) -> Group:
    """The group of `words`, which are part of the caption `text`."""
    found, names = GROUP.fullmatch(words), {word: name for name in OBJECTS for word in (plural(name), name)}
    if found is None or (name := found["object"]) not in names:
        form = f"[{', '.join(NUMBERS)}] [small, large] [{', '.join(COLOURS)}] OBJECT"
        inside = "" if words == " ".join(text.lower().split()).rstrip(".") else f" in {text[:60]!r}"
        last = words.rpartition(" ")[2]
        near = [] if last in names else [*dict.fromkeys(names[one] for one in get_close_matches(last, names))]
        like = f" (did you mean {' or '.join(near)}?)" if near else ""
        listed = f"docs/text-to-image.md lists the {len(OBJECTS)} objects"
        raise UserError(f"scenes: {words[:60]!r}{inside} is not of the form {form}{like}; {listed}")
    count = 1 if found["count"] == "an" else NUMBERS.index(found["count"]) + 1
    return Group(names[name], count, found["colour"] or "", found["size"] or "")


def pairings(scene: Scene) -> list[str]:
    """What is asked together in a scene: what validation has that training never shows."""
    names = sorted(group.object for group in scene.groups)
    found = [" ".join(names)] if len(names) == 2 else []
    for group in scene.groups:
        words = group.colour, group.size, group.count if group.count > 1 else ""
        found += [f"{word} {group.object}" for word in words if word]
    return found


def is_held_out(pairing: str) -> bool:
    return int(hashlib.sha256(pairing.encode()).hexdigest()[:8], 16) < HELD_OUT * 2**32


def draw_scene(kind: str, rng: random.Random) -> Scene:
    """A scene of one of `KINDS`, whatever split it is for."""
    first, second = (Group(name) for name in rng.sample(list(OBJECTS), 2))
    one, other = rng.sample(list(COLOURS), 2)
    relation = rng.choice(RELATIONS)
    if kind == "mixed":
        first = replace(first, count=rng.randint(2, 3), colour=rng.choice(["", one]))
        second = replace(second, count=rng.randint(1, 4 - first.count), colour=rng.choice(["", other]))
        return Scene(tuple(rng.sample([first, second], 2)), relation)
    return {
        "single": Scene((first,)),
        "pair": Scene((first, second)),
        "counting": Scene((replace(first, count=rng.randint(2, 4)),)),
        "colour": Scene((replace(first, colour=one),)),
        "position": Scene((first, second), relation),
        "attribution": Scene((replace(first, colour=one), replace(second, colour=other))),
        "size": Scene(
            tuple(replace(g, size=s) for g, s in zip((first, second), rng.sample(("small", "large"), 2), strict=True))
        ),
    }[kind]


def place(scene: Scene, image_size: int, rng: random.Random) -> list[Placed]:
    """The emoji of a scene where its relation wants them: each somewhere in a cell of its own, of 64 x 64 units."""
    unit, total = image_size / 64, sum(group.count for group in scene.groups)
    stacked = scene.relation in ("above", "below") or (not scene.relation and rng.random() < 0.5)
    order = scene.groups[::-1] if scene.relation in ("right of", "below") else scene.groups
    rows = [(order[0], 2), (order[0], total - 2)] if len(order) == 1 and total > 2 else [(g, g.count) for g in order]
    placed: list[Placed] = []
    for row, (group, count) in enumerate(rows):
        for column in range(count):
            # Along the row, then across the rows; where the rows stand beside each other it is the other way round.
            corner, extent = (64 / count * column, 64 / len(rows) * row), (64 / count, 64 / len(rows))
            if not stacked:
                corner, extent = corner[::-1], extent[::-1]
            side = round(unit * side_of(group.size, min(extent), total))
            left, top = (
                rng.randint(round(unit * low), max(round(unit * low), int(unit * (low + room)) - side))
                for low, room in zip(corner, extent, strict=True)
            )
            placed.append(Placed(group.object, group.colour, left, top, side))
    return placed


def side_of(size: str, cell: float, total: int) -> float:
    """The side of an emoji of a size in a cell so wide, one of `total` in a picture of 64 units."""
    return min(SIZES[size] * (1.4 if total == 1 else 1), cell - 1)


def picture_of(ground: str, placed: Sequence[Placed], image_size: int) -> Image.Image:
    picture = Image.new("RGB", (image_size, image_size), GROUNDS[ground])
    for one in placed:
        picture.paste(emoji := sprite(one.object, one.colour, one.side), (one.left, one.top), emoji)
    return picture


@lru_cache(maxsize=4096)
def sprite(name: str, colour: str, side: int) -> Image.Image:
    """An object's emoji, (side, side) RGBA; in a colour its brightness is kept, so that outlines stay black."""
    draw = package("resvg_py").svg_to_bytes
    png = bytes(draw(svg_path=str(svgs()[name]), width=side, height=side, skip_system_fonts=True))
    emoji = Image.open(io.BytesIO(png)).convert("RGBA")
    if not colour:
        return emoji
    pixels = np.asarray(emoji).astype(np.float32)
    brightness = pixels[..., :3].max(-1, keepdims=True) / 255
    painted = np.concatenate([brightness * np.array(COLOURS[colour], np.float32), pixels[..., 3:]], -1)
    return Image.fromarray(painted.round().astype(np.uint8), "RGBA")


@lru_cache(maxsize=1)
def svgs() -> dict[str, Path]:
    """The file of every object."""
    files = {file.stem.removesuffix("-FE0F"): file for file in svg_files()}
    return {name: files[code] for name, code in OBJECTS.items()}


@lru_cache(maxsize=1)
def emoji_hash() -> str:
    """SHA-256 of the SVGs that scenes are made of."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in svgs().values())).hexdigest()
