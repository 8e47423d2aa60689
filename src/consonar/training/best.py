"""The best model of a run, by a number of its validations."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from consonar.data.loader import ImageBatches
from consonar.errors import UserError, reading
from consonar.files.readers import read_json
from consonar.files.writers import write_json
from consonar.metrics import metric_of, protocol_line
from consonar.metrics.distribution import Moments, frechet_distance
from consonar.networks import load_feature_network
from consonar.origin import Origin
from consonar.records import device_of
from consonar.sampling.job import balanced_labels
from consonar.sampling.sample import sample
from consonar.training.objectives.reconstruction import TokenizerTrainee
from consonar.training.trainee import Trainee
from consonar.types import Condition, Generator, Tokenizer

NETWORK = "efficientnet-lite0"
METRIC = f"FD({NETWORK}) validation"
BEST_BY = {"generator": "cross_entropy", "post-training": METRIC, "tokenizer": "psnr"}
"""The metric, by the kind of run."""


@dataclass(frozen=True)
class KeepBest:
    """Keeps the model whose validation has the best `metric` so far, of equal ones the first: in best/ of the run
    `folder`, step and value in best.json."""

    metric: str
    folder: Path
    origin: Origin
    protocol: str | None = None
    """What values of the metric are of, where its name does not say it."""

    def keep(self, trainee: Trainee | TokenizerTrainee, step: int, value: float) -> None:
        """Keeps the model of what is trained, if it is the best so far."""
        record, sign = self.folder / "best.json", metric_of(self.metric).direction
        # A record of a later step is left from before a resume: the run will come by there again.
        if record.exists():
            known = read_json(record)
            with reading(record, "the record of the best model", "remove it"):
                better = known["step"] < step and sign * known["value"] >= sign * value
            if better:
                return
        trainee.save(self.folder / "best", self.origin)
        of = {} if self.protocol is None else {"protocol": self.protocol}
        write_json(record, {"step": step, "metric": self.metric, "value": value, **of})


@dataclass
class DistanceToHeldOut:
    """The Fréchet distance of a generator's samples to the validation images.

    `num_samples` are drawn at temperature 1, of the same seeds at every step.
    """

    validation: ImageBatches
    where: str
    """Name of the data that these are of."""
    tokenizer: Tokenizer
    num_samples: int

    def __post_init__(self) -> None:
        self.network = load_feature_network(NETWORK, str(device_of(self.tokenizer)))
        self.batch_size = self.validation.batch_size
        self.target = self.moments(batch.images for batch in self.validation.ordered(self.batch_size))
        if self.target.count < 2:
            raise UserError("loop.fd_samples: a distance needs 2 validation images or more, there is 1; set it to 0")

    @property
    def protocol(self) -> str:
        """What the distance is of, in one line."""
        drawn = f"{self.num_samples:,} samples at temperature 1 of seeds from 0 on, not rounded to 8 bits"
        return protocol_line(drawn, self.network.name, self.where, {"validation": self.target.count})

    def moments(self, batches: Iterable[Tensor]) -> Moments:
        moments = Moments(self.network.num_features)
        for images in batches:
            moments.update(self.network(images))
        return moments

    def __call__(self, model: Generator) -> float:
        condition: Condition = balanced_labels(self.num_samples, max(1, model.num_classes))
        if self.validation.captions is not None:
            captions = self.validation.captions
            condition = captions.read(captions.spread(self.num_samples))
        images = sample(model, self.tokenizer, condition, batch_size=self.batch_size, precision="fp32").images
        found = self.moments(images.split(self.batch_size))
        return frechet_distance(found.mean, found.cov, self.target.mean, self.target.cov)
