"""Cost of evaluation: peak memory against the number of images, moments against numpy's covariance of features that are
all in memory, and the Fréchet distance against scipy's general root.

Run: python benchmarks/evaluation.py [--images 500] [--size 256] [--features 1280] [--seed 0]; under two minutes on two
cores. Prints one JSON object and writes it to benchmarks/results/evaluation.json. The memory part calls `evaluate` in
a fresh process per size, with a small random feature network of the real width, so that what is measured is the
streaming and not the backbone; the cap of kept vectors is the smaller number of images. This parent imports the
standard library only: on Linux the peak memory of a child process starts at its parent's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write_images(path: Path, count: int, size: int, seed: int) -> None:
    """An .npz of `count` random images of `size` px."""
    import numpy as np

    np.savez(path, images=np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def measure_memory(samples: str, reference: str, cap: int, width: int, seed: int) -> dict:
    """Peak memory in MB and seconds of one `evaluate` in this process."""
    import resource

    import torch
    from torch.nn import functional

    from consonar.evaluation.evaluate import evaluate
    from consonar.evaluation.settings import EvaluationSettings
    from consonar.seeding import generator

    class RandomProjection:
        name, weights_sha256, num_features = "random-projection", f"seed {seed}", width
        weights = torch.randn(3 * 16 * 16, width, generator=generator(seed, "projection"))

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return functional.adaptive_avg_pool2d(images, 16).flatten(1) @ self.weights

    started = time.perf_counter()
    evaluate(samples, reference, EvaluationSettings(max_neighbours_images=cap), feature_network=RandomProjection())
    seconds = time.perf_counter() - started
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "seconds": seconds}


def measure_frechet(width: int, seed: int) -> dict:
    """Seconds of the symmetric and of the general matrix square root on the same two covariances, and both values."""
    import scipy.linalg
    import torch

    from consonar.metrics.distribution import frechet_distance
    from consonar.seeding import generator

    rng = generator(seed, "covariances")
    first, second = (torch.randn(3 * width, width, generator=rng, dtype=torch.float64) for _ in range(2))
    mean1, mean2, cov1, cov2 = first.mean(0), second.mean(0), first.T.cov(), (2 * second).T.cov()
    started = time.perf_counter()
    symmetric = frechet_distance(mean1, cov1, mean2, cov2)
    symmetric_seconds = time.perf_counter() - started
    started = time.perf_counter()
    root = scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy())
    general = float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root.trace().real)
    general_seconds = time.perf_counter() - started
    return {
        "symmetric_seconds": symmetric_seconds,
        "scipy_sqrtm_seconds": general_seconds,
        "ratio": general_seconds / symmetric_seconds,
        "relative_difference": abs(symmetric - general) / general,
    }


def measure_moments(width: int, seed: int) -> dict:
    """Seconds of mean and covariance of 4,096 features: streamed in batches of 64, and by numpy with all in memory."""
    import numpy as np
    import torch

    from consonar.metrics.distribution import Moments
    from consonar.seeding import generator

    features = torch.randn(4096, width, generator=generator(seed, "features"))

    def streamed() -> np.ndarray:
        moments = Moments(width)
        for batch in features.split(64):
            moments.update(batch)
        return moments.cov.numpy()

    def held() -> np.ndarray:
        return np.cov(features.double().numpy(), rowvar=False)

    seconds: dict[str, list[float]] = {"streamed": [], "held": []}
    for _ in range(3):
        for name, way in (("streamed", streamed), ("held", held)):
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    difference = float(np.abs(streamed() - held()).max())
    ratio = min(seconds["streamed"]) / min(seconds["held"])
    return {"seconds": seconds, "ratio": ratio, "largest_difference": difference}


def describe_machine() -> dict:
    """Processor, threads and library versions."""
    import scipy
    import torch

    from consonar.distributed import machine_name
    from consonar.evaluation.results import library_versions

    versions = {**library_versions(), "scipy": scipy.__version__}
    return {"machine": machine_name("cpu"), "cores": os.cpu_count(), "threads": torch.get_num_threads(), **versions}


def in_fresh_process(function: str, *args: object, cache: str) -> dict:
    """Result of one function of this file, called in a new interpreter."""
    code = f"import json, evaluation; print(json.dumps(evaluation.{function}(*{args!r})))"
    environment = {**os.environ, "CONSONAR_CACHE": cache, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(process.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500, help="smaller number of images; the larger is 4 times it")
    parser.add_argument("--size", type=int, default=256, help="pixels per side")
    parser.add_argument("--features", type=int, default=1280, help="width of the features")
    parser.add_argument("--seed", type=int, default=0)
    config = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:

        def memory(count: int) -> dict:
            paths = [f"{folder}/{count}_{seed}.npz" for seed in (1, 2)]
            for seed, path in enumerate(paths):
                in_fresh_process("write_images", path, count, config["size"], config["seed"] + seed, cache=folder)
            arguments = (*paths, config["images"], config["features"], config["seed"])
            measured = in_fresh_process("measure_memory", *arguments, cache=folder)
            return {"images": count, "pixels_mb": count * config["size"] ** 2 * 3 / 2**20, **measured}

        small, large = memory(config["images"]), memory(4 * config["images"])
        result = {
            "config": config,
            "memory": {"small": small, "large": large, "ratio": large["peak_mb"] / small["peak_mb"]},
            "moments": in_fresh_process("measure_moments", config["features"], config["seed"], cache=folder),
            "frechet_distance": in_fresh_process("measure_frechet", config["features"], config["seed"], cache=folder),
            **in_fresh_process("describe_machine", cache=folder),
        }
    text = json.dumps(result, indent=1)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "evaluation.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
