"""What is diagnosed, loaded and encoded once: a tokenizer, a generator or none, and the pictures that both are asked.

Pictures are kept as the bytes that a file would hold, (n, H, W, 3) uint8, decoded ones too, so that every number is of
what can be seen. Letters: `n` pictures, `m` decoded ones, `N` tokens, `V` codes, `F` features.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from consonar.components import (
    load_generator,
    load_own_text_encoder,
    load_own_tokenizer,
    load_tokenizer,
    read_component_kind,
)  # fmt: skip
from consonar.data.bad_images import BadImages
from consonar.data.captions import CaptionFeatures, all_captions
from consonar.data.labels import check_label
from consonar.data.sources import at_size, find_source
from consonar.data.transforms import to_uint8
from consonar.diagnostics.pictures import choose, foreign, open_data
from consonar.errors import UserError, check_choice
from consonar.evaluation.image_sets import cropped
from consonar.evaluation.inputs import as_input
from consonar.model_folders import SHIPPED
from consonar.networks import PERCEPTUAL_DISTANCES, FeatureNetwork, load_feature_network
from consonar.networks.base import LayerDistance
from consonar.options import Count, Options, Range
from consonar.origin import Origin, check, of_tokenizer
from consonar.precision import pick_precision
from consonar.records import device_of, to_device
from consonar.sampling.sample import SamplerConfig, check_fit
from consonar.seeding import check_seed, generator, uniform
from consonar.tokenizers.base import CodebookTokenizer
from consonar.types import Condition, Generator, ImageRecord, TextEncoder, Tokenizer

SHOWN = 6
"""Pictures in a row of examples."""


@dataclass(frozen=True, kw_only=True)
class DiagnosisSettings(Options):
    """On how many pictures, and how tokens are drawn."""

    num_images: Annotated[int, Range(8, 100_000)] = 64
    """Held-out pictures, as many of the training set, and as many others to compare sets with."""
    batch_size: Count = 64
    """Pictures per call of a network."""
    seed: int = 0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    perceptual: str = "efficientnet-lite0"
    """Which perceptual distance, a name of `PERCEPTUAL_DISTANCES`."""
    feature_network: str = "efficientnet-lite0"
    """Of Fréchet distances."""
    device: str = "cpu"
    precision: str = "fp32"
    """What networks multiply in, one of `precision.CHOICES`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed, "seed")
        check_choice("perceptual", self.perceptual, PERCEPTUAL_DISTANCES)
        chosen = pick_precision(self.precision, torch.device(self.device), "precision", "measuring")
        object.__setattr__(self, "precision", chosen)


@dataclass(frozen=True)
class Pictures:
    """Pictures as pixels and as tokens, on the CPU."""

    name: str
    images: np.ndarray
    """(n, H, W, 3) uint8."""
    tokens: Tensor
    """(n, N) int64."""
    condition: Condition
    """Of the generator: its classes (n,) int64, or captions."""
    about: str = ""
    """What must be known of the captions: that some are cut; empty where none are."""
    enlarged: int = 0
    """How many are smaller than the tokenizer's, to whose size they were enlarged."""

    @property
    def sha256(self) -> str:
        """Of the pixels."""
        return hashlib.sha256(np.ascontiguousarray(self.images).data).hexdigest()


@dataclass(frozen=True)
class Subject:
    """Everything that a diagnostic is given."""

    tokenizer: Tokenizer
    held_out: Pictures
    settings: DiagnosisSettings
    judge: LayerDistance
    """The perceptual distance."""
    network: FeatureNetwork
    model: Generator | None = None
    train: Pictures | None = None
    others: Pictures | None = None
    """Pictures that none of the held-out ones are among."""
    left_out: str = ""
    """How many pictures could not be read, in words; empty where all could."""
    foreign: str = ""
    """That the training pictures are not those of the generator, in a sentence; empty where nothing speaks for it."""

    @property
    def generator(self) -> Generator:
        """The generator, for diagnostics of one."""
        assert self.model is not None, "diagnostics of a generator are asked of one alone (`diagnose`)"
        return self.model

    @property
    def too_small(self) -> str:
        """Why the perceptual distance cannot compare the pictures, in words; empty where it can."""
        smallest, size = PERCEPTUAL_DISTANCES[self.settings.perceptual].smallest_input, self.tokenizer.image_size
        told = f"--perceptual: {self.settings.perceptual} reads images of {smallest} px or more, these have {size}"
        return told if size < smallest else ""

    @property
    def device(self) -> torch.device:
        return device_of(self.tokenizer)

    @property
    def uniforms(self) -> Tensor:
        """(n, N) float64 in [0, 1): what every draw of a token is made by, the same in all diagnostics."""
        rng = generator(self.settings.seed, "diagnosis", "draws")
        return uniform(rng, *self.held_out.tokens.shape, dtype=torch.float64)

    @property
    def shown(self) -> Tensor:
        """Rows of the pictures that are shown, spread evenly over all, for a set may be sorted by class."""
        return torch.linspace(0, len(self.held_out.tokens) - 1, SHOWN).long()

    def parts(self, count: int) -> Iterator[slice]:
        """Batches of so many rows."""
        size = self.settings.batch_size
        return (slice(start, start + size) for start in range(0, count, size))

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Pictures (m, H, W, 3) uint8 of tokens (m, N)."""
        decoded = (self.tokenizer.decode(to_device(tokens[part], self.device)) for part in self.parts(len(tokens)))
        return np.concatenate([to_uint8(images).cpu().numpy() for images in decoded])

    def compare(self, images: np.ndarray, originals: np.ndarray) -> tuple[Tensor, Tensor]:
        """Perceptual distance and mean squared error on the scale of 0 to 1 of m pairs, (m,) float64 each."""
        perceptual, errors = [], []
        for part in self.parts(len(images)):
            pair = [as_input(side[part], self.tokenizer) for side in (images, originals)]
            perceptual.append(self.judge(*pair).double().cpu())
            errors.append((pair[0] - pair[1]).double().square().flatten(1).mean(1).cpu() / 4)
        return torch.cat(perceptual), torch.cat(errors)

    def features(self, images: np.ndarray) -> Tensor:
        """(m, F) float32 on the CPU."""
        batches = (as_input(images[part], self.tokenizer) for part in self.parts(len(images)))
        return torch.cat([self.network(batch).float().cpu() for batch in batches])


def encoded(
    records: Sequence[ImageRecord], name: str, tokenizer: Tokenizer, num_classes: int | None, batch_size: int,
    encoder: TextEncoder | None = None,
) -> Pictures:  # fmt: skip
    """The pictures, centre-cropped to the tokenizer's size; `UserError` for one without a label, or, where `encoder`
    reads captions, one without a caption that is needed."""
    condition: Condition
    about = ""
    if encoder is None:
        condition = torch.tensor([check_label(record.label, num_classes, record.name) for record in records])
    else:
        where, names = f"--data: {name}", [record.name for record in records]
        captions = all_captions([record.caption for record in records], where, called=names.__getitem__)
        features = CaptionFeatures(captions, encoder, where=where, called=names.__getitem__)
        condition, about = features.read(torch.arange(len(captions))), features.about if features.num_cut else ""
    size = tokenizer.image_size
    images = np.stack([cropped(record.image, size) for record in records])
    batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    tokens = torch.cat([tokenizer.encode(as_input(batch, tokenizer)).cpu() for batch in batches])
    return Pictures(name, images, tokens, condition, about, sum(min(record.image.size) < size for record in records))


def load_models(name: str, tokenizer: str | None) -> tuple[Generator | None, CodebookTokenizer, Origin]:
    """The generator that `name` means with its tokenizer, or the tokenizer alone where it names one."""
    if name in SHIPPED["tokenizer"] or (name not in SHIPPED["generator"] and read_component_kind(name) == "tokenizer"):
        if tokenizer is not None:
            raise UserError(f"--tokenizer: {tokenizer!r} is read only with a generator, and {name} is a tokenizer")
        return None, load_tokenizer(name), Origin()
    model = load_generator(name)
    origin = model.origin or Origin()
    if tokenizer is None:
        return model, load_own_tokenizer(name), origin
    codec = load_tokenizer(tokenizer, num_tokens=model.num_tokens)
    check("--tokenizer", of_tokenizer(codec), origin, name, "its codes mean something else")
    return model, codec, origin


def open_subject(
    name: str,
    data: str,
    settings: DiagnosisSettings,
    *,
    tokenizer: str | None = None,
    validation_split: str | None = None,
    label_default: str | None = None,
) -> Subject:
    """Loads the models that `name` means and the pictures of `data`, on the settings' device.

    Held-out pictures are those of `data.splits.open_splits`; where it holds none out, all. Raises `UserError` for
    models or data that are not there or do not fit, and for fewer than 8 pictures.
    """
    model, codec, origin = load_models(name, tokenizer)
    if model is not None:
        check_fit(model, codec, settings.sampler)
    judge = PERCEPTUAL_DISTANCES[settings.perceptual].load(None).to(settings.device)
    network = load_feature_network(settings.feature_network, settings.device)
    held_out, seen = open_data(data, codec.image_size, origin, validation_split, label_default)
    codec, model = codec.to(settings.device), model and model.to(settings.device)
    num_classes = model.num_classes if model else None
    encoder = load_own_text_encoder(name, model) if model and not num_classes else None
    made = partial(encoded, tokenizer=codec, num_classes=num_classes, batch_size=settings.batch_size, encoder=encoder)
    drawn_here = find_source(at_size(data)[0])[0].is_drawn  # in an order that no file has
    bad = BadImages("skip", limit=1)
    chosen = partial(
        choose, wanted=settings.num_images, seed=settings.seed, bad=bad,
        image_size=None if drawn_here else codec.image_size,
    )  # fmt: skip
    measured, others = chosen(held_out)
    if len(measured) < 8:
        raise UserError(
            f"--data: {held_out.name} has {len(measured)} pictures to measure; 8 or more are needed "
            "(--validation-split says which)"
        )
    train, more = chosen(seen, part="training") if seen else ([], [])
    source = held_out
    if seen and len(others) * 2 < len(measured):  # too few are left to compare with
        others, source = train if len(more) * 2 < len(measured) else more, seen
    return Subject(
        codec, made(measured, held_out.name), settings, judge, network, model,
        train=made(train, seen.name) if seen and train else None, others=made(others, source.name) if others else None,
        left_out=bad.note, foreign=foreign(origin, seen, bad) if seen else "",
    )  # fmt: skip
