"""The best model of a run, by the Fréchet distance of its samples to the validation images."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from consonar.components import save_generator
from consonar.data.loader import ImageBatches
from consonar.errors import UserError, reading
from consonar.files.readers import read_json
from consonar.files.writers import write_json
from consonar.metrics.distribution import Moments, frechet_distance
from consonar.networks import load_feature_network
from consonar.origin import Origin
from consonar.records import device_of
from consonar.sampling.job import balanced_labels
from consonar.sampling.sample import sample
from consonar.types import Condition, Generator, Tokenizer

NETWORK = "efficientnet-lite0"
METRIC = f"FD({NETWORK}) validation"


@dataclass
class KeepBest:
    """Keeps the state of a generator whose samples have the lowest Fréchet distance so far to the validation images.

    It is in best/ of the run `folder`, step and value in best.json. `num_samples` are drawn at temperature 1, of the
    same seeds at every step.
    """

    validation: ImageBatches
    tokenizer: Tokenizer
    num_samples: int
    folder: Path
    origin: Origin

    def __post_init__(self) -> None:
        self.network = load_feature_network(NETWORK, str(device_of(self.tokenizer)))
        self.batch_size = self.validation.batch_size
        self.target = self.moments(batch.images for batch in self.validation.ordered(self.batch_size))
        if self.target.count < 2:
            raise UserError("loop.fd_samples: a distance needs 2 validation images or more, there is 1; set it to 0")

    def moments(self, batches: Iterable[Tensor]) -> Moments:
        moments = Moments(self.network.num_features)
        for images in batches:
            moments.update(self.network(images))
        return moments

    def distance(self, model: Generator) -> float:
        """That of the samples of the generator."""
        condition: Condition = balanced_labels(self.num_samples, max(1, model.num_classes))
        if self.validation.captions is not None:
            captions = self.validation.captions
            condition = captions.read(captions.spread(self.num_samples))
        images = sample(model, self.tokenizer, condition, batch_size=self.batch_size, precision="fp32").images
        found = self.moments(images.split(self.batch_size))
        return frechet_distance(found.mean, found.cov, self.target.mean, self.target.cov)

    def keep(self, model: Generator, step: int, distance: float) -> None:
        """Keeps the generator, if it is the best so far."""
        record = self.folder / "best.json"
        # A record of a later step is left from before a resume: the run will come by there again.
        if record.exists():
            known = read_json(record)
            with reading(record, "the record of the best model", "remove it"):
                better = known["step"] < step and known["value"] <= distance
            if better:
                return
        save_generator(model, self.folder / "best", self.origin)
        write_json(record, {"step": step, "metric": METRIC, "value": distance})
