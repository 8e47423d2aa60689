"""Moments, Fréchet distance, precision, recall and Inception score against the ADM evaluator's arithmetic."""

import re

import torch
from golden import Golden

from consonar.metrics.distribution import InceptionScore, Moments, frechet_distance
from consonar.metrics.neighbours import neighbour_radii, precision_recall

NUM_NEIGHBOURS = 3
# The json's rtol of the Fréchet distance and the Inception score; `compare` is relative above 1.
RELATIVE = 1e-6


def matches(meta: dict) -> bool:
    return meta["name"].startswith("adm_metrics")


def moments_of(features: torch.Tensor) -> Moments:
    moments = Moments(features.shape[1])
    for chunk in features.split(64):
        moments.update(chunk)
    return moments


def run(golden: Golden) -> None:
    ref, sample = golden.tensor("ref"), golden.tensor("sample")
    for key in ("ref", "sample", "is_weight", "is_preds"):
        golden.skip(key, "an input")
    for key in golden.meta["arrays"]:
        if key.endswith("_f16"):
            golden.skip(key, "ADM's float16 rounding; ours takes distances in float64")
    compare_moments(golden, ref, sample)
    compare_neighbours(golden, ref, sample)
    for key in golden.meta["arrays"]:
        if found := re.fullmatch(r"inception_score_split(\d+)", key):
            predictions = golden.tensor("is_preds")
            score = InceptionScore(torch.arange(len(predictions)) // int(found[1]))
            score.update(predictions)
            golden.compare(key, torch.tensor(score.value, dtype=torch.float64), RELATIVE)


def compare_moments(golden: Golden, ref: torch.Tensor, sample: torch.Tensor) -> None:
    one, two = moments_of(ref), moments_of(sample)
    golden.compare("mu_ref", one.mean, 1e-6)
    golden.compare("mu_sample", two.mean, 1e-6)
    golden.compare("sigma_ref", one.cov, 1e-6)
    others = {"fid": two, "fid_self": one}
    for key in golden.meta["arrays"]:
        if found := re.fullmatch(r"fid_singular_n(\d+)", key):
            others[key] = moments_of(sample[: int(found[1])])
    for key, other in others.items():
        distance = frechet_distance(one.mean, one.cov, other.mean, other.cov)
        golden.compare(key, torch.tensor(distance, dtype=torch.float64), RELATIVE)


def compare_neighbours(golden: Golden, ref: torch.Tensor, sample: torch.Tensor) -> None:
    """In both precisions, and in blocks that do not divide the rows."""
    for dtype in (torch.float64, torch.float32):
        one, two = ref.to(dtype), sample.to(dtype)
        golden.compare("radii_ref_f32", neighbour_radii(one, NUM_NEIGHBOURS), 1e-5)
        golden.compare("radii_sample_f32", neighbour_radii(two, NUM_NEIGHBOURS, block=64), 1e-5)
        for block in (7, 1024):
            pair = torch.tensor(precision_recall(one, two, NUM_NEIGHBOURS, block), dtype=torch.float64)
            golden.compare("prec_recall_f32", pair, 1e-9)
