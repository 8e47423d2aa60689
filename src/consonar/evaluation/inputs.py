"""What `evaluate` compares: samples and references, opened from files, folders and data sources."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consonar.data.bad_images import BadImages, leave_out
from consonar.data.labels import describe
from consonar.data.sources import at_size, find_source, open_source
from consonar.errors import UserError, reading
from consonar.evaluation.features import as_input
from consonar.evaluation.image_sets import (
    NEEDED,
    ImageSet,
    folder_image_set,
    npz_image_set,
    npz_statistics,
    one_of,
    source_image_set,
)
from consonar.files.readers import npz_keys, parse_json, read_npz
from consonar.files.writers import file_sha256
from consonar.json_types import Json
from consonar.origin import Origin, check, of_tokenizer
from consonar.types import Tokenizer


@dataclass(frozen=True)
class SampleSet:
    """Generated images of one size, streamed, with what was stored beside them."""

    images: ImageSet
    count: int
    image_size: int
    sha256: str
    """Of the file, or of the names and bytes of a folder's files."""
    labels: Tensor | None = None
    tokens: Tensor | None = None
    seeds: Tensor | None = None
    """Labels (S,), tokens (S, N) and seeds (S,) are int64."""
    settings: Json | None = None
    """The sampler's settings."""


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
    """The tokenizer that made them."""
    about: str = ""
    """How many pictures and classes there are."""


def load_samples(path: str | Path, *, bad: BadImages | None = None) -> SampleSet:
    """Samples from an .npz or a folder of picture files; the images are streamed later, not read now.

    .npz: uint8 images (S, H, H, 3) as `images` or `arr_0` (ADM); optional `labels` or `arr_1` (S,), `tokens` (S, N),
    `seeds` (S,), and the sampler's `settings` as a JSON string. Raises UserError for a missing or damaged file, arrays
    of other shapes, or images that are not square. `bad`: what is done about files of a folder that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        images, shape, sha256 = folder_image_set(path, bad)
        return SampleSet(images, shape[0], _square(path, shape), sha256)
    images, shape = npz_image_set(path)
    extra: Json = {}
    names = {"labels": "labels", "arr_1": "labels", "tokens": "tokens", "seeds": "seeds"}
    arrays = read_npz(path, (*names, "settings"))
    one_of(path, arrays, "labels", "arr_1")
    for key in names.keys() & arrays.keys():
        array, ndim = arrays[key], 2 if key == "tokens" else 1
        if array.dtype.kind not in "iu" or array.ndim != ndim or len(array) != shape[0]:
            expected = f"expected {ndim}-d integers for {shape[0]} images"
            raise UserError(f"{path}: {key} is {array.dtype} {array.shape}; {expected}")
        if key == "tokens" and array.size and (array.min() < 0 or array.max() >= 2**31):
            raise UserError(f"{path}: tokens from {array.min()} to {array.max()}; a tokenizer counts its codes from 0")
        extra[names[key]] = torch.from_numpy(array.astype(np.int64))
    if "settings" in arrays:
        with reading(f"{path}: settings", "valid JSON"):
            extra["settings"] = parse_json(str(arrays["settings"]))
        if not isinstance(extra["settings"], dict):
            raise UserError(f"{path}: settings are a {type(extra['settings']).__name__}, expected a JSON object")
    return SampleSet(images, shape[0], _square(path, shape), file_sha256(path), **extra)


def open_reference(
    spec: str | Path, image_size: int, *, splits: tuple[str, ...] | None = None, bad: BadImages | None = None
) -> ReferenceSet:
    """The reference called `spec`, for samples of `image_size` px.

    A drawn source with its size (`openmoji-64`); an .npz of images (as for `load_samples`), of statistics (`mu` (F,),
    `sigma` (F, F), and for sFID `mu_s`, `sigma_s`) or of both, as ADM publishes them: then distances are to the
    statistics, and neighbours come from the images; otherwise what `consonar.data.sources.open_source` takes,
    centre-cropped to `image_size`. `splits` of such a source: by default train and validation where it is known to have
    both (`SourceKind.has_validation`), else its images as one set. `bad`: what is done about images that cannot be
    read. Raises UserError for an unknown spec or another image size.
    """
    spec = str(spec)
    source, size = at_size(spec)
    if size is not None:
        if size != image_size:
            raise UserError(f"reference {spec} has {size} px, but the samples have {image_size} px; use {source!r}")
        return replace(open_reference(source, size), name=spec)
    if spec.endswith(".npz"):
        return _open_npz_reference(Path(spec), image_size)

    kind, target = find_source(spec)
    chosen = splits or (("train", "validation") if kind.has_validation(target) else None)
    sources = {
        name: leave_out(open_source(spec, split=name, image_size=image_size), bad, f"reference {name}")
        for name in chosen or ("train",)
    }
    opened = {name: source_image_set(source, image_size) for name, source in sources.items()}
    about = "; ".join(f"{name if chosen else 'all'}: {describe(source)}" for name, source in sources.items())
    return ReferenceSet(spec, opened if chosen else {"reference": opened["train"]}, about=about)


def _open_npz_reference(path: Path, image_size: int) -> ReferenceSet:
    keys, images = set(npz_keys(path, NEEDED)), {}
    statistics, spatial_statistics = (
        npz_statistics(path, mean, cov) if keys.issuperset((mean, cov)) else None
        for mean, cov in (("mu", "sigma"), ("mu_s", "sigma_s"))
    )
    if statistics is None or keys & {"images", "arr_0"}:
        images["reference"], shape = npz_image_set(path)
        if _square(path, shape) != image_size:
            raise UserError(f"reference {path}: images of {shape[1]} px, but the samples have {image_size} px")
    of_file = {"statistics": file_sha256(path)} if statistics else {}
    return ReferenceSet(str(path), images, statistics, spatial_statistics, of_file)


def check_tokenizer(samples: SampleSet, used: Origin) -> None:
    """Raises `UserError` where the samples say that they are tokens of another tokenizer than that of `used`."""
    stored = samples.settings if isinstance(samples.settings, dict) else {}
    keys = [key for key in ("tokenizer", "tokenizer_fingerprint") if isinstance(stored.get(key), str)]
    theirs = Origin(**{key: stored[key] for key in keys})
    check("tokenizer", used, theirs, samples.images.name, "name the tokenizer that the samples were drawn with")


def encode_reference(reference: ReferenceSet, tokenizer: Tokenizer, *, batch_size: int = 64) -> ReferenceSet:
    """The reference with the tokens of its images, for the copy rate in tokens; the tokenizer must be the samples'."""
    tokens = {
        name: torch.cat([tokenizer.encode(as_input(batch, tokenizer)).cpu() for batch in images.stream(batch_size)])
        for name, images in reference.images.items()
    }
    origin = of_tokenizer(tokenizer)
    return replace(reference, tokens=tokens, origin=origin)


def _square(path: Path, shape: tuple[int, ...]) -> int:
    if shape[1] != shape[2]:
        raise UserError(f"{path}: images of {shape[2]} x {shape[1]} px; only square images can be evaluated")
    return shape[1]
