"""Sets of images that are streamed: from an .npz, a folder of pictures, or a data source.

Shapes: `B` batch. Images are uint8 (B, H, W, 3) numpy arrays, always of one size in a set, never held as floats.
"""

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from consonar.data.bad_images import BadImages, readable_rows
from consonar.data.labels import known_labels
from consonar.data.picture_files import IMAGE_ENDINGS, find_pictures, read_image
from consonar.data.transforms import center_crop
from consonar.errors import BadImage, UserError, reading
from consonar.files.readers import npz_keys, npz_member, parse_json, read_npz
from consonar.files.writers import file_sha256
from consonar.json_types import Json
from consonar.types import ImageSource

NEEDED = "give an .npz or a folder of images"


@dataclass(frozen=True)
class ImageSet:
    """A set of images of one size that can be streamed more than once."""

    name: str
    stream: Callable[[int], Iterator[np.ndarray]]
    """Batch size -> uint8 (B, H, W, 3) arrays, always in the same order; the last one may be short."""
    labels: Callable[[], Tensor | None] = lambda: None
    """The class of every image (count,), where all have one."""
    class_names: tuple[str, ...] | None = None
    """Of the classes that labels count; None: they have numbers only."""
    knows_labels: bool = True
    """Whether labels are there before pictures are decoded."""
    enlarged: Callable[[], int] = lambda: 0
    """How many of the images that were streamed so far are smaller than the size, to which they were enlarged."""
    content_hash: Callable[[], str | None] = lambda: None
    """Of the source that it is read from, where that has one."""

    def pick(self, rows: Tensor) -> np.ndarray:
        """The images at `rows` (n,), in that order, for which all are walked through: uint8 (n, H, W, 3)."""
        wanted, images = set(rows.tolist()), itertools.chain.from_iterable(self.stream(256))
        found = {row: image for row, image in enumerate(images) if row in wanted}
        return np.stack([found[row] for row in rows.tolist()])


def hashed(batches: Iterable[np.ndarray], update: Callable[[bytes | memoryview], object]) -> Iterator[np.ndarray]:
    """The batches of a set as they come; the hash of `update` gets their pixels, behind the size: however cut, the
    same."""
    for number, batch in enumerate(batches):
        update(b"" if number else repr(batch.shape[1:]).encode())
        update(np.ascontiguousarray(batch).data)
        yield batch


def npz_image_set(path: Path) -> tuple[ImageSet, tuple[int, ...]]:
    """The uint8 array `images` or `arr_0` (count, H, W, 3) of an .npz, read batch by batch, and its shape.

    `np.load` would hold the whole array (10 GB for 50,000 images of 256 px). Raises UserError for a file without such
    an array and, while streaming, for a damaged one.
    """
    keys = npz_keys(path, NEEDED)
    key = one_of(path, keys, "images", "arr_0")
    if key is None:
        also = "; statistics are given as --reference" if "mu" in keys else ""
        raise UserError(f"{path}: no array 'images' or 'arr_0'; it holds {', '.join(keys) or 'no array'}{also}")
    with npz_member(path, key) as array:
        shape, dtype = array.shape, array.dtype
        if shape[:1] == (0,):
            raise UserError(f"{path}: {key} holds no image; its shape is {shape}")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or array.fortran_order or 0 in shape:
            levels = " with levels from 0 to 255" if dtype.kind == "f" else ""
            expected = f"uint8 (count, height, width, 3){levels} in C order"
            raise UserError(f"{path}: {key} is {dtype} {shape}; expected {expected}")

    def stream(batch_size: int) -> Iterator[np.ndarray]:
        with npz_member(path, key) as array:
            for start in range(0, shape[0], batch_size):
                batch_shape = (min(batch_size, shape[0] - start), *shape[1:])
                yield np.frombuffer(array.file.read(math.prod(batch_shape)), np.uint8).reshape(batch_shape)

    def labels() -> Tensor | None:
        if (key := one_of(path, keys, "labels", "arr_1")) is None:
            return None
        check_integers(path, key, found := read_npz(path, (key,))[key], shape[0])
        settings = None
        with suppress(UserError):  # of a reference by other hands, whose settings nothing reads
            settings = npz_settings(path)
        # What they number of samples of prompts is no classes.
        return None if "prompts" in (settings or {}) else torch.from_numpy(found.astype(np.int64))

    return ImageSet(str(path), stream, labels), shape


def npz_settings(path: Path) -> Json | None:
    """What a sampler said of an .npz that it drew; `UserError` for what is no JSON object."""
    if (text := read_npz(path, ("settings",)).get("settings")) is None:
        return None
    with reading(f"{path}: settings", "valid JSON"):
        settings = parse_json(str(text))
    if not isinstance(settings, dict):
        raise UserError(f"{path}: settings are a {type(settings).__name__}, expected a JSON object")
    return settings


def one_of(path: Path, keys: Iterable[str], *names: str) -> str | None:
    """Which of the names of one array an .npz has; UserError for several, one of which would win unsaid."""
    found = [name for name in names if name in keys]
    if len(found) > 1:
        raise UserError(f"{path}: holds {' and '.join(found)}, which are names of one array; keep one of them")
    return found[0] if found else None


def check_integers(path: Path, key: str, array: np.ndarray, count: int) -> None:
    """Raises UserError for what is not one integer for each of `count` images, or of `tokens` a row of them."""
    ndim = 2 if key == "tokens" else 1
    if array.dtype.kind not in "iu" or array.ndim != ndim or len(array) != count:
        expected = f"expected {ndim}-d integers for {count} images"
        raise UserError(f"{path}: {key} is {array.dtype} {array.shape}; {expected}")


def folder_image_set(folder: Path, bad: BadImages | None = None) -> tuple[ImageSet, tuple[int, ...], str]:
    """The pictures below `folder` (`find_pictures`) by path, the shape (count, H, W, 3), and a SHA-256 of it all.

    Raises UserError for an empty folder, for one with the grids of a run (also below: of a sweep), and, while
    streaming, for an image that cannot be read or whose size differs from the first one's.
    """
    found = find_pictures(folder)
    files = found.files
    if not files:
        beside = f" beside {found.note}" if found.note else ""
        raise UserError(f"{folder}: no images{beside}; looked for files ending in {', '.join(IMAGE_ENDINGS)}")
    if bad is not None and bad.skips:
        readable = readable_rows(lambda row: read_image(files[row], str(files[row])), len(files), bad, "samples")
        files = [files[row] for row in readable]
    for place in {file.parents[1] for file in files if file.parent.name == "samples" and file.name.startswith("step_")}:
        if (place / "metrics.jsonl").is_file():
            raise UserError(f"{folder}: holds grids of the run {place}, which are no samples; name samples, or one run")
    width, height = read_image(files[0], str(files[0])).size
    digest = hashlib.sha256()
    for file in files:
        with reading(file, "an image", kind=BadImage):
            content = file_sha256(file)
        digest.update(os.fsencode(file.relative_to(folder)) + f"\0{content}\n".encode())

    def read(path: Path) -> np.ndarray:
        image = read_image(path, str(path))
        if image.size != (width, height):
            raise UserError(f"{path}: {image.size[0]} x {image.size[1]} px; the first has {width} x {height} px")
        return np.asarray(image)

    return stacked(str(folder), lambda: map(read, files)), (len(files), height, width, 3), digest.hexdigest()


def source_image_set(source: ImageSource, image_size: int) -> ImageSet:
    """The images of `source`, `cropped` to `image_size` px, with their labels."""
    small: set[int] = set()

    def images() -> Iterator[np.ndarray]:
        for row, record in enumerate(source):
            if min(record.image.size) < image_size:
                small.add(row)
            yield cropped(record.image, image_size)

    def labels() -> Tensor | None:
        known = known_labels(source) or [record.label for record in source]
        return None if None in known else torch.tensor(known)

    return replace(
        stacked(source.name, images), labels=labels, content_hash=lambda: getattr(source, "content_hash", None),
        class_names=source.class_names, knows_labels=known_labels(source) is not None, enlarged=lambda: len(small),
    )  # fmt: skip


def cropped(image: Image.Image, image_size: int) -> np.ndarray:
    """uint8 (S, S, 3): the picture itself if it has that size, else its ADM centre crop."""
    return np.asarray(image if image.size == (image_size, image_size) else center_crop(image, image_size))


def stacked(name: str, images: Callable[[], Iterator[np.ndarray]]) -> ImageSet:
    """The set of what `images` gives one by one, each time that it is called."""

    def stream(batch_size: int) -> Iterator[np.ndarray]:
        remaining = images()
        while batch := list(itertools.islice(remaining, batch_size)):
            yield np.stack(batch)

    return ImageSet(name, stream)
