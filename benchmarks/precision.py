"""What bf16 changes in samples: the shipped generator on common random numbers, in float32 and in bf16, on the CPU.

Every image is drawn twice from the same class and seed. A token that falls otherwise changes all tokens after it, so
the share of tokens that differ is large where that of single draws, under equal contexts, is small; the images are then
other ones, and the Fréchet distance says whether of the same distribution. Its own scatter is that of two sets of
float32 samples of other seeds. Run: python benchmarks/precision.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import write_result
from torch import Tensor

from consonar.components import load_generator, load_own_tokenizer, weights_sha256
from consonar.data.transforms import to_uint8
from consonar.evaluation.inputs import as_input, open_reference
from consonar.metrics.distribution import Moments, frechet_distance
from consonar.networks import FeatureNetwork, load_feature_network
from consonar.precision import with_weights
from consonar.records import concatenate
from consonar.sampling.job import balanced_labels
from consonar.sampling.sample import Samples, sample
from consonar.seeding import choose, uniform
from consonar.seeding import generator as seeded
from consonar.types import Generator, Tokenizer

CPU, NAME = torch.device("cpu"), "openmoji"


def moments_of(network: FeatureNetwork, images: Tensor) -> Moments:
    moments = Moments(network.num_features)
    for batch in images.split(64):
        moments.update(network(as_input(to_uint8(batch).numpy(), network)))
    return moments


def distance(one: Moments, other: Moments) -> float:
    return round(frechet_distance(one.mean, one.cov, other.mean, other.cov), 2)


@torch.inference_mode()
def single_draws(generator: Generator, tokens: Tensor, labels: Tensor) -> dict[str, float]:
    """Of draws under the contexts of the float32 samples `tokens`: how many differ, and the divergence in nats."""
    low, differ, divergence = with_weights(generator, "bf16", CPU), 0.0, 0.0
    chunks = list(zip(tokens.split(64), labels.split(64), strict=True))
    for index, (context, condition) in enumerate(chunks):
        numbers = uniform(seeded(0, "draws", index), context.numel(), 1, dtype=torch.float64)
        exact, rounded = (model(context, condition)[0].float().flatten(0, 1) for model in (generator, low))
        differ += float((choose(exact, numbers) != choose(rounded, numbers)).double().sum())
        log_probs, others = exact.double().log_softmax(-1), rounded.double().log_softmax(-1)
        divergence += float((log_probs.exp() * (log_probs - others)).sum())
    return {
        "tokens that differ": round(differ / tokens.numel(), 4),
        "KL, nats": float(f"{divergence / tokens.numel():.2g}"),
    }


def compared(
    draw: Callable[[int, str], Samples], network: FeatureNetwork, validation: Moments, parts: int
) -> dict[str, object]:
    """Free-running samples: every part has seeds of its own."""
    kept: dict[str, list[Samples]] = {"fp32": [], "bf16": []}
    for part in range(parts):
        for name, drawn in kept.items():
            drawn.append(draw(part, name))
            print(f"part {part}, {name}: drawn", flush=True)
    whole = {name: concatenate(*drawn) for name, drawn in kept.items()}
    same = whole["fp32"].tokens == whole["bf16"].tokens  # (n, N)
    features = {name: [moments_of(network, part.images) for part in drawn] for name, drawn in kept.items()}
    return {
        "tokens that differ": round(1 - float(same.double().mean()), 4),
        "images of equal tokens": round(float(same.all(1).double().mean()), 4),
        "mean place of the first token that differs": round(float(same.long().cumprod(1).sum(1).double().mean()), 1),
        "mean entropy, nats": {name: round(float(drawn.entropy.mean()), 4) for name, drawn in whole.items()},
        "FD to validation, each part": {
            name: [distance(found, validation) for found in parts] for name, parts in features.items()
        },
        "FD fp32 to bf16, equal seeds": [distance(*pair) for pair in zip(*features.values(), strict=True)],
        "FD fp32 to fp32, other seeds": [
            distance(one, other) for one, other in zip(features["fp32"], features["fp32"][1:], strict=False)
        ],
    }


@torch.inference_mode()
def decoded_apart(tokenizer: Tokenizer, tokens: Tensor) -> dict[str, float]:
    """The decoder in bf16 on equal tokens: differences of pixels in levels of 255."""
    low = with_weights(tokenizer, "bf16", CPU)
    levels = [
        (to_uint8(tokenizer.decode(part)).int() - to_uint8(low.decode(part)).int()).abs() for part in tokens.split(64)
    ]
    apart = torch.cat(levels)
    return {"mean": round(float(apart.double().mean()), 3), "largest": int(apart.max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192, help="of each part and precision")
    parser.add_argument("--parts", type=int, default=3)
    args = parser.parse_args()
    generator, tokenizer = load_generator(NAME), load_own_tokenizer(NAME)
    network = load_feature_network("efficientnet-lite0")
    reference = open_reference(f"openmoji-{tokenizer.image_size}", tokenizer.image_size)
    validation = Moments(network.num_features)
    for batch in reference.images["validation"].stream(64):
        validation.update(network(as_input(batch, network)))
    labels = balanced_labels(args.images, generator.num_classes)

    def draw(part: int, name: str) -> Samples:
        first = part * args.images
        return sample(generator, tokenizer, labels, seeds=range(first, first + args.images), precision=name)

    figures = {"free-running": compared(draw, network, validation, args.parts)}
    tokens = draw(0, "fp32").tokens
    figures["under equal contexts"] = single_draws(generator, tokens, labels)
    figures["decoder on equal tokens, levels of 255"] = decoded_apart(tokenizer, tokens)
    config = {
        "generator": NAME, "generator_sha256": weights_sha256(NAME), "tokenizer_fingerprint": tokenizer.fingerprint,
        "images": args.images, "parts": args.parts, "temperature": 1.0, "network": network.name,
        "network_sha256": network.weights_sha256,
    }  # fmt: skip
    write_result("precision", config, 0, figures)


if __name__ == "__main__":
    main()
