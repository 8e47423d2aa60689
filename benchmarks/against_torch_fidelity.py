"""Evaluation against torch-fidelity: features of the same pictures by Inception with the same weights, mean and
covariance of the same features, and the Fréchet distance of the same statistics, in seconds of the processor (which
other work on the machine moves less than those of a clock).

Run: python benchmarks/against_torch_fidelity.py [--images 32] [--size 256] [--rows 4096] [--rounds 9] [--seed 0]; some
ten minutes on one core, most of it torch-fidelity's distance. It needs torch-fidelity 0.4.0 (pip install --no-deps
torch-fidelity); without it one line says so. Its import of torchvision, whose data sets and weights are not used here,
is answered with empty modules where that is not there. Weights are random: time does not depend on them.
"""

import argparse
import statistics
import sys
import tempfile
import time
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from common import interleaved, ratio, write_result

from consonar.evaluation.inputs import as_input
from consonar.metrics.distribution import Moments, frechet_distance
from consonar.networks.inception import InceptionV3, load_inception
from consonar.seeding import generator

TORCHVISION = {"": (), ".datasets": ("CIFAR10", "STL10", "CIFAR100"), ".transforms": (), ".transforms.functional": ()}
"""What torch-fidelity imports of it, by module."""


def stand_in() -> None:
    """Empty modules in the place of torchvision's, each known to the one above it."""
    for name, classes in TORCHVISION.items():
        module = types.ModuleType(f"torchvision{name}")
        vars(module).update({one: type(one, (), {}) for one in classes})
        sys.modules[module.__name__] = module
        above, _, last = module.__name__.rpartition(".")
        if above:
            setattr(sys.modules[above], last, module)


def features(images: int, size: int, rounds: int, seed: int) -> dict:
    """Of a batch of uint8 pictures in memory: ours with all that FID, sFID and IS need, theirs with FID's alone."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    pictures = np.random.default_rng(seed).integers(0, 256, (images, size, size, 3), dtype=np.uint8)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pth"
        torch.save(InceptionV3().state_dict(), path)
        ours = load_inception("inception", path=path, check_hash=False)
        theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    found: dict[str, torch.Tensor] = {}

    def by_us() -> None:
        found["ours"] = ours.outputs(as_input(pictures, ours))[0]

    @torch.no_grad()
    def by_them() -> None:
        found["theirs"] = theirs(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous())[0]

    seconds = interleaved({"ours": by_us, "theirs": by_them}, rounds, time.process_time)
    gap = (found["ours"] - found["theirs"]).abs().max() / found["theirs"].abs().max()
    return figures(seconds) | {"largest_relative_difference": float(gap)}


def measured(rows: int, rounds: int, seed: int) -> dict:
    """Of 2,048 features: mean and covariance, then the distance of two such Gaussians."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    rng = generator(seed, "features")
    sets = [scale * torch.randn(rows, 2048, generator=rng) for scale in (1, 1.1)]
    ours: list[Moments] = []
    theirs: list[dict] = []
    values: dict[str, float] = {}

    def our_moments() -> None:
        ours[:] = [Moments(2048), Moments(2048)]
        for moments, vectors in zip(ours, sets, strict=True):
            for batch in vectors.split(64):
                moments.update(batch)
            _ = moments.cov

    def their_moments() -> None:
        theirs[:] = map(fid_features_to_statistics, sets)

    def our_distance() -> None:
        values["ours"] = frechet_distance(ours[0].mean, ours[0].cov, ours[1].mean, ours[1].cov)

    def their_distance() -> None:
        values["theirs"] = fid_statistics_to_metric(*theirs, verbose=False)[KEY_METRIC_FID]

    of_moments = figures(interleaved({"ours": our_moments, "theirs": their_moments}, rounds, time.process_time))
    seconds = interleaved({"ours": our_distance, "theirs": their_distance}, min(3, rounds), time.process_time)
    gap = abs(values["ours"] - values["theirs"]) / values["theirs"]
    return {"moments": of_moments, "distance": figures(seconds) | {"relative_difference": gap}}


def figures(seconds: dict[str, list[float]]) -> dict:
    """Medians, and how many times as long as ours theirs takes, in the median over rounds."""
    medians = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    return {**medians, "ratio": ratio(seconds, "theirs", "ours"), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32, help="pictures of a round")
    parser.add_argument("--size", type=int, default=256, help="pixels per side")
    parser.add_argument("--rows", type=int, default=4096, help="features whose mean and covariance are taken")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    config = vars(parser.parse_args())
    if find_spec("torch_fidelity") is None:
        print(
            "against_torch_fidelity: left out, torch-fidelity is not installed (pip install --no-deps torch-fidelity)"
        )
        return
    if find_spec("torchvision") is None:
        stand_in()
    seed, rounds = config["seed"], config["rounds"]
    found = {"features": features(config["images"], config["size"], rounds, seed)}
    write_result("against_torch_fidelity", config, seed, found | measured(config["rows"], rounds, seed))


if __name__ == "__main__":
    main()
