"""How samples are measured: what the functions of this folder share."""

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated

import torch

from consonar.errors import UserError
from consonar.json_types import Json, JsonMap
from consonar.options import Count, Range, check_options
from consonar.precision import multiplying, pick_precision
from consonar.seeding import check_seed

ON_REQUEST = ("fd-infinity", "fd-per-class")
"""Metrics for which every vector is kept, 4 bytes a feature and image: calculated where they are named."""
ENOUGH = 10
"""Images for each feature from which on the bias of a Fréchet distance is not mentioned."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How samples are measured. Raises `UserError` for settings with which nothing can be."""

    metrics: tuple[str, ...] = ()
    """Which are calculated, by their keys (`sample_metrics.key_of`): fd, kid, copy-rate, ...; none: all but those of
    `ON_REQUEST`."""
    num_neighbours: Count = 3
    """k of improved precision and recall (Kynkäänniemi et al. 2019)."""
    density_neighbours: Count = 5
    """k of density and coverage (Naeem et al. 2020)."""
    max_neighbours_images: int = 10_000
    """Images of a set that are compared with each other, drawn by `seed` and the pixels."""
    copy_quantile: Annotated[float, Range(0, 1, note="0 is the minimum")] = 0.0
    """Which quantile of the distances of validation images is the threshold of the copy rates; 0 is the minimum."""
    validation_split: str | None = None
    """Images of the reference to validate on, as in `open_splits`."""
    batch_size: Count = 64
    """Images per call of a network."""
    device: str = "cpu"
    """Where a network runs that is given by its name."""
    precision: str = "fp32"
    """What networks multiply in, one of `precision.CHOICES`; statistics and distances are float32 or better."""
    draws: int = 1
    """Disjoint parts of equal size whose spread is reported; 1: none is."""
    seed: int = 0
    """Of the parts, of the images that are compared with each other, and of the first sample of a run."""

    def __post_init__(self) -> None:
        check_options(self, "")
        chosen = pick_precision(self.precision, torch.device(self.device), "precision", "measuring")
        object.__setattr__(self, "precision", chosen)
        check_seed(self.seed, "seed")
        if self.max_neighbours_images < self.fewest:
            needed = f"a measurement{self.of_neighbours} needs {self.fewest} or more"
            raise UserError(f"max_neighbours_images: {self.max_neighbours_images}; {needed}")

    def wants(self, *keys: str) -> bool:
        """Whether any of the metrics with these keys is to be calculated."""
        return any(key in self.metrics if self.metrics else key not in ON_REQUEST for key in keys)

    @property
    def of_neighbours(self) -> str:
        """What asks for more images than a covariance does, in words; empty where no metric does."""
        return f" of {self.num_neighbours} neighbours" if self.wants("precision", "recall") else ""

    @property
    def fewest(self) -> int:
        """Samples that a measurement needs."""
        return max(2, self.num_neighbours + 1) if self.of_neighbours else 2

    @property
    def kept_samples(self) -> int:
        """Samples whose vectors are kept."""
        return sys.maxsize if self.wants(*ON_REQUEST) else self.max_neighbours_images

    @property
    def kept_references(self) -> int:
        """Images of each set of the reference whose vectors are kept."""
        return sys.maxsize if self.wants("fd-per-class") else self.max_neighbours_images

    @classmethod
    def deciding(cls, recorded: JsonMap) -> Json:
        """Of settings that a file records those that numbers depend on; what is newer than the file has its default."""
        keys = ("num_neighbours", "density_neighbours", "max_neighbours_images", "copy_quantile", "draws", "precision")
        return {key: recorded.get(key, getattr(cls, key)) for key in keys}

    def multiplying(self) -> AbstractContextManager[None]:
        """Around what is measured."""
        return multiplying(self.precision, torch.device(self.device), autocast=True)

    def check_parts(self, count: int, what: str) -> None:
        """Raises `UserError` where so many images, called `what`, cannot be measured in `draws` parts."""
        if self.draws < 1:
            raise UserError(f"draws: {self.draws}; choose 1 or more")
        if min(count, self.max_neighbours_images) // self.draws < self.fewest:
            several = self.draws > 1
            parts = f"{self.draws} draws (--draws: parts whose spread is reported)" if several else "a measurement"
            needed = f"{parts}{self.of_neighbours} {'need' if several else 'needs'} {self.draws * self.fewest} or more"
            raise UserError(f"{what}: {count} image{'' if count == 1 else 's'}; {needed}")
