"""Peak memory of `evaluate` at full size: 50,000 samples against 50,000 training and 5,000 validation pictures, all
metrics, fd-infinity and fd-per-class included, in four draws, in features as wide as Inception's.

Run: python benchmarks/evaluation_memory.py [--images 50000] [--size 256] [--seed 0]. Prints one JSON object and writes
it to benchmarks/results/evaluation_memory.json. Pictures are drawn as they are asked for and the network picks pixels,
so that what is measured is our own: batches, moments, vectors, neighbours. `peak_mb` says how far the process had come,
from its start, when each set was in features and at the end.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from consonar.distributed import machine_name
from consonar.evaluation.evaluate import evaluate
from consonar.evaluation.image_sets import ImageSet
from consonar.evaluation.inputs import ReferenceSet, SampleSet
from consonar.evaluation.results import library_versions
from consonar.evaluation.sample_metrics import SAMPLE_METRICS, key_of
from consonar.evaluation.settings import EvaluationSettings

CLASSES = 1000


class Pixels:
    """As many outputs as Inception has, each a pixel of a picture."""

    name, weights_sha256, num_features, num_spatial = "pixels", "none", 2048, 2023

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.outputs(images)[0]

    def outputs(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pixels = images.flatten(1)
        return pixels[:, : self.num_features], pixels[:, -self.num_spatial :], pixels[:, :1008].softmax(1)


def drawn(name: str, count: int, size: int, seed: int) -> ImageSet:
    """So many pictures of noise, class by class in turn."""

    def stream(batch_size: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        for start in range(0, count, batch_size):
            shape = (min(batch_size, count - start), size, size, 3)
            yield np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8).reshape(shape)

    return ImageSet(name, stream, lambda: torch.arange(count) % CLASSES)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=256, help="pixels per side")
    parser.add_argument("--seed", type=int, default=0)
    config = vars(parser.parse_args())
    count, size, seed = config["images"], config["size"], config["seed"]
    peaks, started = {"start": peak_mb()}, time.process_time()
    samples = drawn("samples", count, size, seed)
    known = {
        "train": drawn("train", count, size, seed + 1),
        "validation": drawn("validation", count // 10, size, seed + 2),
    }
    settings = EvaluationSettings(metrics=tuple(dict.fromkeys(map(key_of, SAMPLE_METRICS))), draws=4)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["CONSONAR_CACHE"] = cache
        found = evaluate(
            SampleSet(samples, count, size, "none", labels=samples.labels()), ReferenceSet("noise", known), settings,
            feature_network=Pixels(), progress=lambda name, *_: peaks.update({name: peak_mb()}),
        )  # fmt: skip
    result = {
        "config": config,
        "peak_mb": {**peaks, "end": peak_mb()},
        "processor_seconds": time.process_time() - started,
        "metrics": {name: one.value for name, one in found.metrics.items()},
        "unavailable": found.unavailable,
        "machine": machine_name("cpu"),
        "threads": torch.get_num_threads(),
        **library_versions(),
    }
    text = json.dumps(result, indent=1)
    (Path(__file__).parent / "results" / "evaluation_memory.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
