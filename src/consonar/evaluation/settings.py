"""How samples are measured, and how a run is sampled to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

from consonar.errors import UserError
from consonar.json_types import Json
from consonar.options import Count, Options, Range
from consonar.sampling.job import check_count
from consonar.sampling.sample import SamplerConfig
from consonar.seeding import check_seed


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Options):
    """How samples are measured. Raises `UserError` for settings with which nothing can be."""

    num_neighbours: int = 3
    """k of improved precision and recall (Kynkäänniemi et al. 2019)."""
    max_neighbours_images: int = 10_000
    """Images of a set that are compared with each other, drawn by `seed` and the pixels."""
    copy_quantile: Annotated[float, Range(0, 1, note="0 is the minimum")] = 0.0
    """Which quantile of the distances of validation images is the threshold of the copy rates; 0 is the minimum."""
    batch_size: Count = 64
    """Images per call of a network."""
    device: str = "cpu"
    """Where a network runs that is given by its name."""
    draws: int = 1
    """Disjoint parts of equal size whose spread is reported; 1: none is."""
    seed: int = 0
    """Of the parts, of the images that are compared with each other, and of the first sample of a run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed, "seed")
        if self.max_neighbours_images <= self.least:
            needed = f"{self.num_neighbours} neighbours need more"
            raise UserError(f"max_neighbours_images: {self.max_neighbours_images}; {needed}")

    @property
    def least(self) -> int:
        """A set needs more images than these: for neighbours, and for a covariance."""
        return max(self.num_neighbours, 1)

    def check_parts(self, count: int, what: str) -> None:
        """Raises `UserError` where so many images, called `what`, cannot be measured in `draws` parts."""
        if self.draws < 1:
            raise UserError(f"draws: {self.draws}; choose 1 or more")
        if count // self.draws <= self.least:
            raise UserError(f"{what}: {count} images; each of {self.draws} draws needs over {self.least}")

    @property
    def stored(self) -> Json:
        """What results.json says of them, under `config`; the seed stands beside it."""
        return {item.name: getattr(self, item.name) for item in fields(EvaluationSettings) if item.name != "seed"}


@dataclass(frozen=True, kw_only=True)
class RunSettings(EvaluationSettings):
    """How a run is sampled, a row for every temperature, and how the samples are measured."""

    draws: int = 4
    """As in `EvaluationSettings`."""
    num_samples: int = 1024
    """Images of every row."""
    temperatures: Sequence[float] = (1.0,)
    match: Sequence[Path] = ()
    """Other runs, each of which adds a row at the temperature at which this one has its teacher-forced entropy."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """All but the temperature."""
    reconstruct: bool = True
    """Measure the tokenizer on the validation images as well."""

    def __post_init__(self) -> None:
        check_count(self.num_samples, "num_samples", self.seed)
        super().__post_init__()
        self.check_parts(self.num_samples, "num_samples")
        for temperature in self.temperatures:
            self.at(temperature)

    def at(self, temperature: float) -> SamplerConfig:
        """The sampler of one row."""
        return replace(self.sampler, temperature=temperature)
