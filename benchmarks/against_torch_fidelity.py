"""Evaluation against torch-fidelity: features of the same pictures by Inception with the same weights, mean and
covariance of the same features, the Fréchet distance of the same statistics, and all of it from two folders of PNG
files to the distance as either package is called, in seconds of the processor (which other work on the machine moves
less than those of a clock).

Run: python benchmarks/against_torch_fidelity.py [--images 32] [--size 256] [--pictures 128] [--rows 4096] [--rounds 9]
[--seed 0]; some fifteen minutes on one core, most of it torch-fidelity's. It needs torch-fidelity 0.4.0 (pip install
--no-deps torch-fidelity); without it one line says so. Its import of torchvision is answered with what it uses of that
(two small functions) where that is not there. Weights are random: time does not depend on them. The whole pass begins
without features in either package's cache, and torch-fidelity reads in the same process (its workers would not be
counted). Ours also hashes the pictures, keeps what it knows of the reference and says how biased so few samples are: of
sets of 4 pictures of 32 px it took 8.6 s and theirs 3.5 s, so that the ratio is the worse the smaller the sets are.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from common import interleaved, ratio, write_result
from PIL import Image

from consonar.evaluation.evaluate import evaluate
from consonar.evaluation.inputs import as_input
from consonar.metrics.distribution import Moments, frechet_distance
from consonar.networks.inception import InceptionV3, load_inception
from consonar.seeding import generator


def composed(steps: Sequence[Callable]) -> Callable:
    """One after the other."""

    def apply(value: object) -> object:
        for step in steps:
            value = step(value)
        return value

    return apply


def pil_to_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


TORCHVISION = {
    "": {}, ".datasets": {name: type(name, (), {}) for name in ("CIFAR10", "STL10", "CIFAR100")},
    ".transforms": {"Compose": composed}, ".transforms.functional": {"pil_to_tensor": pil_to_tensor},
}  # fmt: skip
"""What torch-fidelity imports of it, by module; of the data sets the names alone."""


def stand_in() -> None:
    """Modules in the place of torchvision's, each known to the one above it."""
    for name, contents in TORCHVISION.items():
        module = types.ModuleType(f"torchvision{name}")
        vars(module).update(contents)
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


def whole(images: int, size: int, rounds: int, seed: int) -> dict:
    """From two folders of so many noise pictures each to the distance, the network's weights read anew each time."""
    from torch_fidelity import calculate_metrics
    from torch_fidelity.metric_fid import KEY_METRIC_FID

    rng, values = np.random.default_rng(seed), dict[str, float]()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folders = [place / "samples", place / "reference"]
        for folder, levels in zip(folders, (256, 224), strict=True):
            folder.mkdir()
            for index in range(images):
                pixels = rng.integers(0, levels, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:06d}.png")
        torch.manual_seed(seed)
        torch.save(InceptionV3().state_dict(), path := place / "inception.pth")

        def by_us() -> None:
            shutil.rmtree(place / "cache", ignore_errors=True)
            network = load_inception("inception", path=path, check_hash=False)
            found = evaluate(*folders, feature_network=network, metrics=("fd",))
            values["ours"] = found.metrics["FD(inception)"].value

        def by_them() -> None:
            found = calculate_metrics(
                input1=str(folders[0]), input2=str(folders[1]), fid=True, cuda=False, cache=False, save_cpu_ram=True,
                verbose=False, feature_extractor_weights_path=str(path),
            )  # fmt: skip
            values["theirs"] = found[KEY_METRIC_FID]

        os.environ["CONSONAR_CACHE"] = str(place / "cache")
        seconds = interleaved({"ours": by_us, "theirs": by_them}, rounds, time.process_time)
    return figures(seconds) | {"relative_difference": abs(values["ours"] - values["theirs"]) / values["theirs"]}


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
    parser.add_argument("--pictures", type=int, default=128, help="pictures of each of the two sets of the whole pass")
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
    found = {
        "features": features(config["images"], config["size"], rounds, seed),
        "whole": whole(config["pictures"], config["size"], min(3, rounds), seed),
    }
    write_result("against_torch_fidelity", config, seed, found | measured(config["rows"], rounds, seed))


if __name__ == "__main__":
    main()
