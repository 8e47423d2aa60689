"""Feature networks, and the features of image sets that are streamed, never held as floats.

The offline network is EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946, Lite variant), ImageNet weights. A Fréchet
distance of its features is named `FD(efficientnet-lite0)`: it is not FID, which is defined by one Inception network.

Shapes: `B` batch, `F` features. Images on this side are uint8 (B, H, W, 3) numpy arrays until the network is called.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from consonar.cache import cache_dir
from consonar.checkpoint import file_sha256
from consonar.errors import UserError, unknown
from consonar.evaluation.statistics import Moments
from consonar.types import ImageSource

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")


@runtime_checkable
class FeatureNetwork(Protocol):
    """A frozen map from images to feature vectors; any object of this shape can be given to `evaluate`."""

    name: str
    weights_sha256: str
    num_features: int

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [-1, 1], any H and W -> (B, F) float32; one image's features ignore its batch."""
        ...


class EfficientNetLite0Features:
    """The 1,280 pooled features of EfficientNet-Lite0 at 224 px.

    Images of any size are resized to 224 x 224 px first: bilinear, half-pixel centres, antialiased when they shrink
    (enlarging is plain bilinear). The size is part of the metric: other sizes give other features.
    """

    name = "efficientnet-lite0"
    num_features = 1280
    input_size = 224

    def __init__(self, device: str = "cpu") -> None:
        from consonar.perceptual.efficientnet import load_efficientnet_lite0

        backbone, self.weights_sha256 = load_efficientnet_lite0()
        self.device = torch.device(device)
        # A copy: the loader hands the same module to everyone, and it must not move to this device for all of them.
        self.backbone = copy.deepcopy(backbone).eval().to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] on any device -> (B, 1280) float32 on the network's device."""
        size = (self.input_size, self.input_size)
        pooled = []  # a CPU is twice as fast on pieces that stay in its caches, and with the channels last
        for part in images.to(self.device).split(16 if self.device.type == "cpu" else max(1, len(images))):
            part = functional.interpolate(part, size=size, mode="bilinear", antialias=True)
            pooled.append(self.backbone(part.contiguous(memory_format=torch.channels_last))[1])
        return torch.cat(pooled).float()  # (B, 1280)


FEATURE_NETWORKS: dict[str, Callable[[str], FeatureNetwork]] = {"efficientnet-lite0": EfficientNetLite0Features}


def load_feature_network(name: str, device: str = "cpu") -> FeatureNetwork:
    """The feature network called `name` on `device`. Raises UserError for a name outside `FEATURE_NETWORKS`."""
    if name not in FEATURE_NETWORKS:
        raise unknown("feature_network", name, FEATURE_NETWORKS)
    return FEATURE_NETWORKS[name](device)


@dataclass(frozen=True)
class ImageSet:
    """A set of images of one size that can be streamed more than once."""

    name: str
    stream: Callable[[int], Iterator[np.ndarray]]
    """Batch size -> uint8 (B, H, W, 3) arrays, always in the same order; the last one may be short."""


def npz_keys(path: Path) -> list[str]:
    """Names of the arrays in an .npz. Raises UserError when there is no such file or it is not an .npz."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give an .npz or a folder of images")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not an .npz file, or a truncated one; give an .npz or a folder of images")
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def npz_image_set(path: Path) -> tuple[ImageSet, tuple[int, ...]]:
    """The uint8 array `images` or `arr_0` (count, H, W, 3) of an .npz, read batch by batch, and its shape.

    `np.load` would hold the whole array (10 GB for 50,000 images of 256 px). Raises UserError for a file without such
    an array and, while streaming, for a damaged one.
    """
    keys = npz_keys(path)
    key = next((key for key in ("images", "arr_0") if key in keys), None)
    if key is None:
        raise UserError(f"{path}: no array 'images' or 'arr_0'; it holds {', '.join(keys)}")
    with _npz_member(path, key) as (_, shape, fortran_order, dtype):
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order or 0 in shape:
            raise UserError(f"{path}: {key} is {dtype} {shape}; expected uint8 (count, height, width, 3) in C order")

    def stream(batch_size: int) -> Iterator[np.ndarray]:
        with _npz_member(path, key) as (file, shape, *_):
            for start in range(0, shape[0], batch_size):
                batch_shape = (min(batch_size, shape[0] - start), *shape[1:])
                yield np.frombuffer(file.read(math.prod(batch_shape)), np.uint8).reshape(batch_shape)

    return ImageSet(str(path), stream), shape


@contextmanager
def _npz_member(path: Path, key: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype]]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
            yield file, *readers[np.lib.format.read_magic(file)](file)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: {key} cannot be read ({error}); the file is damaged, make it again") from error


def folder_image_set(folder: Path) -> tuple[ImageSet, tuple[int, ...], str]:
    """All image files below `folder` in the order of their names, the shape (count, H, W, 3), and a SHA-256 of it all.

    Images are neither cropped nor resized. Raises UserError for an empty folder and, while streaming, for an image that
    cannot be read or whose size differs from the first one's.
    """
    from consonar.data.images import read_image

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    if not files:
        raise UserError(f"{folder}: no images; looked for files ending in {', '.join(IMAGE_ENDINGS)}")
    width, height = read_image(files[0], str(files[0])).size
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder)}\0{file_sha256(file)}\n".encode())

    def arrays() -> Iterator[np.ndarray]:
        for path in files:
            image = read_image(path, str(path))
            if image.size != (width, height):
                raise UserError(f"{path}: {image.size[0]} x {image.size[1]} px; the first has {width} x {height} px")
            yield np.asarray(image)

    images = ImageSet(str(folder), lambda batch_size: _stacked(arrays(), batch_size))
    return images, (len(files), height, width, 3), digest.hexdigest()


def source_image_set(source: ImageSource, image_size: int) -> ImageSet:
    """The images of `source` under the ADM centre crop to `image_size` px (nothing is done to those of that size)."""

    def arrays() -> Iterator[np.ndarray]:
        from consonar.data.transforms import center_crop

        for record in source:
            whole = record.image.size == (image_size, image_size)
            yield np.asarray(record.image if whole else center_crop(record.image, image_size))

    return ImageSet(source.name, lambda batch_size: _stacked(arrays(), batch_size))


def _stacked(arrays: Iterator[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    while batch := list(itertools.islice(arrays, batch_size)):
        yield np.stack(batch)


@dataclass(frozen=True)
class FeatureSet:
    """What is kept of a set of images: moments of all, single vectors of the first ones."""

    moments: Moments
    rows: Tensor
    """(min(count, max_rows), F) float32: the features of the first images, for neighbours."""
    parts: tuple[Moments, ...] = ()
    """Moments of disjoint parts, when they were asked for."""


def to_float(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def extract_features(
    network: FeatureNetwork,
    images: ImageSet,
    *,
    batch_size: int,
    max_rows: int,
    part_of: Tensor | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> FeatureSet:
    """Features of a set of images; keeps the moments of all and the first `max_rows` vectors.

    `part_of` (count,) int64 asks for the moments of each part as well (-1: in no part). Memory does not depend on the
    number of images beyond `max_rows`. `progress` gets the set's name and the number of images done so far. Raises
    ValueError when the network returns another shape than it declares or values that are not finite.
    """
    num_parts = 0 if part_of is None else int(part_of.max()) + 1
    moments, *parts = [Moments(network.num_features) for _ in range(1 + num_parts)]
    rows, num_rows = [], 0
    for batch in images.stream(batch_size):
        features = network(to_float(batch)).to("cpu", torch.float32)  # (B, F)
        if part_of is not None:
            members = part_of[moments.count : moments.count + len(features)]
            for part, part_moments in enumerate(parts):
                part_moments.update(features[members == part])
        moments.update(features)
        if num_rows < max_rows:
            rows.append(features[: max_rows - num_rows].clone())
            num_rows += len(rows[-1])
        if progress:
            progress(images.name, moments.count)
    return FeatureSet(moments, torch.cat(rows) if rows else torch.zeros(0, network.num_features), tuple(parts))


def content_hash(batches: Iterable[np.ndarray]) -> str:
    """SHA-256 of the pixels and the size of a stream of uint8 (B, H, W, 3) batches, however it is cut into batches."""
    digest = hashlib.sha256()
    for number, batch in enumerate(batches):
        digest.update(repr(batch.shape[1:]).encode() if number == 0 else b"")
        digest.update(np.ascontiguousarray(batch).data)
    return digest.hexdigest()


def cached_features(
    network: FeatureNetwork,
    images: ImageSet,
    *,
    batch_size: int,
    max_rows: int,
    progress: Callable[[str, int], None] | None = None,
) -> FeatureSet:
    """`extract_features` of a reference, kept in `cache_dir()/features`.

    The key hashes the pixels (so the size, too), the network's name and weights, and `max_rows`; reading the images
    once for the hash costs little beside the network. Files are written under a temporary name and renamed. Raises
    UserError when a cached file cannot be read: delete it.
    """
    content = content_hash(images.stream(batch_size))
    key = hashlib.sha256(f"{content}/{network.name}/{network.weights_sha256}/{max_rows}".encode()).hexdigest()
    path = cache_dir() / "features" / f"{key[:32]}.npz"
    if path.exists():
        return _read_features(path)
    features = extract_features(network, images, batch_size=batch_size, max_rows=max_rows, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    moments = features.moments
    with atomic_file(path) as file:
        np.savez(file, count=moments.count, mean=moments.mean, scatter=moments.scatter, rows=features.rows)
    return features


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` only when the block ends well. Raises UserError when that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); nothing was replaced") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read_features(path: Path) -> FeatureSet:
    try:
        with np.load(path) as arrays:
            moments = Moments(len(arrays["mean"]))
            moments.count = int(arrays["count"])
            moments.mean, moments.scatter = torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["scatter"])
            return FeatureSet(moments, torch.from_numpy(arrays["rows"]))
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"feature cache: {path} cannot be read ({error}); delete it, it is made again") from error
