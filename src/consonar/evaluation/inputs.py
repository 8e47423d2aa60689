"""What `evaluate` compares: samples and references, opened from files, folders and data sources, and streamed.

Shapes: `B` batch, `S` samples, `T` images of a reference, `N` tokens, `F` features. Images are uint8 (B, H, W, 3) numpy
arrays, always of one size in a set, and are never held as floats.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from consonar.cpu.kernels import channels_last
from consonar.data.bad_images import BadImages, leave_out
from consonar.data.labels import describe
from consonar.data.sources import at_size, find_source
from consonar.data.splits import open_splits
from consonar.data.transforms import from_uint8
from consonar.distributed import ALONE, World, in_turn
from consonar.errors import NotHere, UserError
from consonar.evaluation.image_sets import (
    NEEDED,
    ImageSet,
    check_integers,
    folder_image_set,
    npz_image_set,
    npz_settings,
    source_image_set,
)  # fmt: skip
from consonar.evaluation.settings import EvaluationSettings
from consonar.files.readers import npz_keys, read_npz
from consonar.files.writers import file_sha256
from consonar.json_types import Json
from consonar.origin import Origin, check, of_tokenizer
from consonar.precision import multiplying, pick_precision
from consonar.records import device_of, to_device
from consonar.sampling.pictures import bytes_of
from consonar.types import ImageSource, IndexedSource, Tokenizer

LOOKED_AT = 8
"""Pictures of a reference whose size is looked at before any work."""
BUDGET = 5 * 2**29
"""Bytes that the maps of a batch may take, as `bytes_of` estimates them: with the weights it stays below 4 GiB."""
Pictures = TypeVar("Pictures", np.ndarray, Tensor)


@dataclass(frozen=True)
class SampleSet:
    """Generated images of one size, with what was stored beside them."""

    images: ImageSet
    count: int
    image_size: int
    sha256: str
    """Of the file, or of the names and bytes of a folder's files."""
    tokens: Tensor | None = None
    """(S, N) int64."""
    labels: Tensor | None = None
    """(S,) int64; below 0 where the class is unknown."""
    settings: Json | None = None
    """Of the sampler."""
    bad: BadImages | None = None
    """What is done about files that cannot be read."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Of the classes that labels count, where the sampler's settings say where its generator comes from."""
        origin = (self.settings or {}).get("origin")
        names = origin.get("class_names") if isinstance(origin, dict) else None
        return tuple(map(str, names)) if isinstance(names, list) else None


@dataclass(frozen=True)
class ReferenceSet:
    """What samples are compared with: image sets called `train` and `validation`, or one called `reference`."""

    name: str
    images: dict[str, ImageSet]
    statistics: tuple[Tensor, Tensor] | None = None
    """Mean (F,) and covariance (F, F) that replace those of the images; without images only this distance exists."""
    spatial_statistics: tuple[Tensor, Tensor] | None = None
    """The same of spatial features, for sFID."""
    statistics_sha256: dict[str, str] = field(default_factory=dict)
    """Of the file that the statistics come from, as `statistics`."""
    tokens: dict[str, Tensor] | None = None
    """Tokens (T, N) or (T, views, N) of the same images by the same names; see `encode_reference`."""
    origin: Origin | None = None
    """The tokenizer that made them, or would (`in_tokens`)."""
    about: str = ""
    """How many pictures and classes there are; of a file its name first."""
    bad: BadImages | None = None
    """What is done about images that cannot be read."""


def load_samples(path: str | Path, *, bad: BadImages | None = None) -> SampleSet:
    """Samples from an .npz or a folder of picture files.

    .npz: uint8 images (S, H, H, 3) as `images` or `arr_0` (ADM); optional `labels` or `arr_1` (S,), `tokens` (S, N),
    `seeds` (S,), integers, and the sampler's `settings` as a JSON string. Raises UserError for a missing or damaged
    file, other arrays, or images that are not square. `bad`: what is done about files of a folder that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        images, shape, sha256 = folder_image_set(path, bad)
        return SampleSet(images, shape[0], _square(path, shape), sha256, bad=bad)
    images, shape = npz_image_set(path)
    arrays, labels, settings = read_npz(path, ("tokens", "seeds")), images.labels(), npz_settings(path)
    for key, array in arrays.items():
        check_integers(path, key, array, shape[0])
        if key == "tokens" and array.size and (array.min() < 0 or array.max() >= 2**31):
            raise UserError(f"{path}: tokens from {array.min()} to {array.max()}; a tokenizer counts its codes from 0")
    tokens = torch.from_numpy(arrays["tokens"].astype(np.int64)) if "tokens" in arrays else None
    return SampleSet(images, shape[0], _square(path, shape), file_sha256(path), tokens, labels, settings)


def open_reference(
    spec: str | Path,
    image_size: int,
    *,
    validation_split: str | None = None,
    held_out: float = 0,
    bad: BadImages | None = None,
    enlarge: bool = False,
) -> ReferenceSet:
    """The reference called `spec`, for samples of `image_size` px; UserError for an unknown one or another image size.

    A drawn source with its size (`openmoji-64`); an .npz of images (as for `load_samples`), of statistics (`mu` (F,),
    `sigma` (F, F), and for sFID `mu_s`, `sigma_s`) or of both, as ADM publishes them: then distances are to the
    statistics, and neighbours come from the images; otherwise what `open_source` takes, centre-cropped. Such a
    source is the sets train and validation (`open_splits` of `validation_split`), where it has splits or a share is
    `held_out`, else one set. `bad`: what is done about images that cannot be read. `enlarge`: whether all pictures may
    be smaller than `image_size`, to which they are then enlarged; some always may, as a few of ImageNet's are.
    """
    spec = str(spec)
    source, size = at_size(spec)
    if size is not None:
        if size != image_size:
            raise UserError(f"reference {spec} has {size} px, but the samples have {image_size} px; use {source!r}")
        return replace(open_reference(source, size, validation_split=validation_split), name=spec)
    if spec.endswith(".npz"):
        if validation_split is not None:
            raise UserError(f"--validation-split: {validation_split!r} is not read with {spec}; leave it away")
        return _open_npz_reference(Path(spec), image_size)

    try:
        find_source(spec)
    except NotHere as error:
        said = str(error).removeprefix("data: ").replace("choices: ", "choices: FILE.npz, openmoji-64, ")
        raise NotHere(f"--reference: {said}") from error
    splits = open_splits(spec, validation_split, key="--validation-split", otherwise=held_out, image_size=image_size)
    sources = {"reference": splits.train}
    if splits.validation:
        sources = {"train": splits.train, "validation": splits.validation}
    sources = {name: leave_out(source, bad, f"reference {name}") for name, source in sources.items()}
    for name, one in sources.items():
        if not enlarge and (side := largest_looked_at(one)) < image_size:
            raise UserError(
                f"reference {spec}: its pictures ({name}) have {side} px, but the samples have {image_size} px; they "
                "would be enlarged: name larger ones, or reduce the samples (sample --image-size)"
            )
    sets = {name: source_image_set(source, image_size) for name, source in sources.items()}
    about = "; ".join(f"{name.replace('reference', 'all')}: {describe(one)}" for name, one in sources.items())
    return ReferenceSet(spec, sets, about=about, bad=bad)


def largest_looked_at(source: ImageSource) -> float:
    """The largest shorter side among some pictures of a source, evenly spaced; infinite for a stream, which has no
    pictures before it is read."""
    if not isinstance(source, IndexedSource):
        return math.inf
    rows = {i * len(source) // LOOKED_AT for i in range(LOOKED_AT)}
    return max(min(source.read(row).image.size) for row in rows)


def _open_npz_reference(path: Path, image_size: int) -> ReferenceSet:
    keys, images, about = set(npz_keys(path, NEEDED)), {}, [str(path)]
    statistics, spatial_statistics = (
        npz_statistics(path, mean, cov) if keys.issuperset((mean, cov)) else None
        for mean, cov in (("mu", "sigma"), ("mu_s", "sigma_s"))
    )
    if "mu" in keys and statistics is None:
        raise UserError(f"{path}: holds mu without sigma; statistics are both")
    if statistics is None or keys & {"images", "arr_0"}:
        images["reference"], shape = npz_image_set(path)
        about.append(f"{shape[0]:,} pictures")
        if (size := _square(path, shape)) != image_size:
            raise UserError(f"reference {path}: images of {size} px, but the samples have {image_size} px")
    of_file = {"statistics": file_sha256(path)} if statistics else {}
    about += ["statistics"] if statistics else []
    return ReferenceSet(str(path), images, statistics, spatial_statistics, of_file, about=", ".join(about))


def _square(path: Path, shape: tuple[int, ...]) -> int:
    if shape[1] != shape[2]:
        raise UserError(f"{path}: images of {shape[2]} x {shape[1]} px; only square images can be evaluated")
    return shape[1]


def npz_statistics(path: Path, mean: str, cov: str) -> tuple[Tensor, Tensor]:
    """Mean (F,) and covariance (F, F), finite floating-point numbers, of an .npz. Raises UserError for others."""
    arrays = read_npz(path, (mean, cov))
    for key, array in arrays.items():
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            what = "holds NaN or infinity" if array.dtype.kind == "f" else f"is {array.dtype}"
            raise UserError(f"{path}: {key} {what}; expected finite floating-point numbers")
    shape, size = arrays[mean].shape, arrays[mean].size
    if size == 0 or shape != (size,) or arrays[cov].shape != (size, size):
        shapes = f"{mean} has shape {shape}, {cov} {arrays[cov].shape}"
        swapped = "; are the two exchanged?" if (len(shape), arrays[cov].ndim) == (2, 1) else ""
        raise UserError(f"{path}: {shapes}; expected (F,) and (F, F){swapped}")
    return torch.from_numpy(arrays[mean].astype(np.float64)), torch.from_numpy(arrays[cov].astype(np.float64))


def check_tokenizer(samples: SampleSet, used: Origin) -> None:
    """Raises `UserError` where the samples say that they are tokens of another tokenizer than that of `used`."""
    stored = samples.settings or {}
    keys = [key for key in ("tokenizer", "tokenizer_fingerprint") if isinstance(stored.get(key), str)]
    theirs = Origin(**{key: stored[key] for key in keys})
    check("tokenizer", used, theirs, samples.images.name, "name the tokenizer that the samples were drawn with")


def encode_reference(
    reference: ReferenceSet,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 64,
    precision: str = "fp32",
    world: World = ALONE,
) -> ReferenceSet:
    """The reference with the tokens of its images, for the copy rate in tokens; the tokenizer must be the samples'.

    The processes of `world` take turns at the batches; all get the same.
    """

    def encoded(batch: np.ndarray) -> Tensor:
        return tokenizer.encode(as_input(batch, tokenizer)).cpu()

    device = device_of(tokenizer)
    chosen = pick_precision(precision, device, "precision", "measuring")
    with multiplying(chosen, device, autocast=True):
        tokens = {
            name: torch.cat(list(in_turn(encoded, fitting(images.stream(batch_size), encoded), world)))
            for name, images in reference.images.items()
        }
    return replace(reference, tokens=tokens, origin=of_tokenizer(tokenizer))


def in_tokens(
    reference: ReferenceSet, tokenizer: Tokenizer, settings: EvaluationSettings, world: World = ALONE
) -> ReferenceSet:
    """`encode_reference` where the copy rate is wanted and has both sets that it needs; else whose tokens they would
    be, alone."""
    if not settings.wants("copy-rate") or not {"train", "validation"} <= reference.images.keys():
        return replace(reference, origin=of_tokenizer(tokenizer))
    return encode_reference(
        reference, tokenizer, batch_size=settings.batch_size, precision=settings.precision, world=world
    )


def fitting(batches: Iterable[Pictures], run: Callable[[Pictures], object]) -> Iterator[Pictures]:
    """The batches, in equal parts where what `run` makes of one would take more than `BUDGET`: its first picture is
    looked at for that."""
    at_once = 0
    for batch in batches:
        at_once = at_once or max(1, BUDGET // bytes_of(partial(run, batch[:1])))
        parts = -(-len(batch) // at_once)
        yield from (batch[len(batch) * i // parts : len(batch) * (i + 1) // parts] for i in range(parts))


def as_input(images: np.ndarray, model: object) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1] where `model` is. UserError for another type or shape."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(f"images: {images.dtype} {images.shape}; expected uint8 (count, height, width, 3)")
    return to_device(channels_last(from_uint8(torch.from_numpy(np.array(images)))), device_of(model))
