"""The best model of a run by the Fréchet distance of its free-running samples to the validation images."""

from __future__ import annotations

from pathlib import Path

import torch

from consonar.components import save_generator
from consonar.data.loader import PictureBatches
from consonar.errors import UserError, reading
from consonar.files.readers import read_json
from consonar.files.writers import write_json
from consonar.metrics.distribution import Moments, frechet_distance
from consonar.networks import load_feature_network
from consonar.origin import Origin
from consonar.sampling.job import balanced_labels
from consonar.sampling.sample import sample
from consonar.training.trainee import Trainee
from consonar.types import Generator, Tokenizer

NETWORK = "efficientnet-lite0"
METRIC = f"FD({NETWORK}) validation"


class ValidationDistance:
    """FD to the validation images of `num_samples` samples at temperature 1, the same seeds at every call."""

    def __init__(self, validation: PictureBatches, tokenizer: Tokenizer, num_samples: int, device: torch.device):
        self.tokenizer, self.num_samples = tokenizer, num_samples
        self.network = load_feature_network(NETWORK, str(device))
        self.batch_size = validation.batch_size
        self.target = Moments(self.network.num_features)
        for batch in validation.ordered(self.batch_size):
            self.target.update(self.network(batch.images))
        if self.target.count < 2:
            raise UserError("loop.fd_samples: a distance needs 2 validation images or more, there is 1; set it to 0")

    def __call__(self, generator: Generator) -> float:
        labels = balanced_labels(self.num_samples, max(1, generator.num_classes))
        images = sample(generator, self.tokenizer, labels, batch_size=self.batch_size).images
        moments = Moments(self.network.num_features)
        for part in images.split(self.batch_size):
            moments.update(self.network(part))
        return frechet_distance(moments.mean, moments.cov, self.target.mean, self.target.cov)


class KeepBest:
    """Keeps the generator of the lowest `METRIC` so far in `folder`, and the step and value in best.json beside it."""

    def __init__(self, folder: Path, origin: Origin):
        self.folder, self.origin = folder, origin

    def __call__(self, trainee: Trainee, step: int, metrics: dict[str, float]) -> None:
        record = self.folder.parent / "best.json"
        # A record of a later step is left from before a resume: the run will come by there again.
        known = read_json(record) if record.exists() else None
        if known is not None:
            with reading(record, "the record of the best model", "remove it"):
                better = known["step"] < step and known["value"] <= metrics[METRIC]
            if better:
                return
        save_generator(trainee.generator, self.folder, self.origin)
        write_json(record, {"step": step, "metric": METRIC, "value": metrics[METRIC]})
