"""Every generator, tokenizer, objective, network and reward on a CUDA device against the CPU, at tiny sizes.

The cases are those of `tests/device`, whose tables hold every kind. One line a case: OK or FAIL, what was compared, and
how far apart the two are; at the end FAILS and the names, and exit status 1, if there are any.

Run: PYTHONPATH=src:tests python benchmarks/gpu/parity.py [GROUP ...]; with PRETEND=1 on the pretended device.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from contracts.test_generators import KINDS, make_condition, make_generator
from device.pretend import pretended_cuda
from device.test_models import SAMPLERS, TOKENIZER_CASES, make_tokenizer
from device.test_steps import CASES_BY_NAME, take_steps
from torch import Tensor, nn

from consonar.distributed import pick_device
from consonar.networks import PERCEPTUAL_DISTANCES
from consonar.networks.discriminator import PatchDiscriminator, save_discriminator
from consonar.networks.efficientnet import EfficientNetLite0Features, PerceptualDistance
from consonar.networks.inception import FRONT_ENDS, InceptionFeatures, InceptionV3
from consonar.networks.lpips import LPIPS, VGG16Features
from consonar.networks.text_encoders import PretrainedTextEncoder
from consonar.networks.vision_transformers import KINDS as VISION_KINDS
from consonar.networks.vision_transformers import VisionTransformerFeatures
from consonar.precision import multiplying
from consonar.records import Captions, to_device
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.seeding import generator as seeded
from consonar.training.objectives.controls import StraightThroughConfig
from consonar.training.rewards import REWARDS, PlacedReward, Resources, Rewards
from consonar.types import ImageBatch

CPU = torch.device("cpu")
Case = Callable[[torch.device], str]
"""Compares one thing on the device with the CPU: what it found, in words; raises where they differ or it breaks."""
FLOAT32 = 1e-4
"""Norm of the difference over the norm of the CPU's numbers, at most; sums in another order give about 1e-6."""
BF16 = 0.05
LIKENESSES = ("clip", "hpsv2")
"""Rewards by networks of which there are no small ones; what they are built of is compared by itself."""
SAME_TOKENS = 0.97
"""Share of tokens that must be equal: a choice between two that are nearly as good may fall otherwise."""


def near(what: str, here: Tensor, there: Tensor, limit: float = FLOAT32) -> str:
    """`what` and the relative distance; raises AssertionError where it is over the limit, or not a number."""
    ours, theirs = here.detach().double(), there.detach().cpu().double()
    found = float((ours - theirs).norm() / ours.norm().clamp_min(1e-12))
    assert found <= limit, f"{what}: {found:.1e} apart, at most {limit:.0e} is allowed"
    return f"{what} {found:.0e}"


def same_tokens(here: Tensor, there: Tensor, least: float = SAME_TOKENS) -> str:
    """The share of equal tokens; raises AssertionError where it is too small."""
    share = float((here == there.cpu()).float().mean())
    assert share >= least, f"tokens: {share:.3f} are the CPU's, at least {least} must be"
    return f"tokens {share:.3f}"


def near_values(what: str, here: dict[str, float], there: dict[str, float]) -> str:
    """`what` and the largest difference of named numbers, some of which are nearly 0."""
    assert here.keys() == there.keys(), f"{what}: {sorted(here)} and {sorted(there)}"
    for key, value in here.items():
        assert math.isclose(value, there[key], rel_tol=1e-3, abs_tol=3e-4), f"{what}: {key} {value}, {there[key]}"
    return f"{what} {max(abs(here[key] - there[key]) for key in here):.0e}"


def moved(model: Any, device: torch.device) -> Any:
    """A copy of the model on the device."""
    return copy.deepcopy(model).to(device)


def random_images(count: int, size: int, seed: str = "images") -> Tensor:
    return torch.rand(count, 3, size, size, generator=seeded(0, seed)) * 2 - 1


def train_generator(kind: str, device: torch.device) -> str:
    """Logits and gradients of a pass, in float32 and in bf16."""
    model = make_generator(kind)
    condition = make_condition(model, seeded(0, "condition"))
    tokens = torch.randint(model.vocab_size, (3, model.num_tokens), generator=seeded(0, "tokens"))

    def run(model: Any, place: torch.device, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(place.type, dtype, enabled=dtype is not None):
            logits, _ = model(tokens.to(place), to_device(condition, place), tap_layers=(0,))
        torch.autograd.backward(logits.float().square().mean())
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return logits.float(), torch.cat(gradients)

    (logits, gradient), exact = run(copy.deepcopy(model), CPU), run(moved(model, device), device)
    low = run(moved(model, device), device, torch.bfloat16)
    return ", ".join(
        [
            near("logits", logits, exact[0]), near("gradient", gradient, exact[1]),
            near("bf16 logits", logits, low[0], BF16), near("bf16 gradient", gradient, low[1], BF16),
        ]
    )  # fmt: skip


def sample_generator(kind: str, sampler: SamplerConfig, device: torch.device) -> str:
    """Tokens and entropy; that it also samples under autocast and with bf16 weights."""
    model = make_generator(kind)
    condition = make_condition(model, seeded(0, "condition"))
    tokens, entropy = sample_tokens(model, condition, range(3), sampler)
    on_device, elsewhere = moved(model, device), to_device(condition, device)
    found, spread = sample_tokens(on_device, elsewhere, range(3), sampler)
    told = [same_tokens(tokens, found, least=0.9), near("entropy", entropy, spread, limit=0.05)]
    with torch.autocast(device.type, torch.bfloat16):
        told.append("autocast " + same_tokens(tokens, sample_tokens(on_device, elsewhere, range(3), sampler)[0], 0))
    low = sample_tokens(on_device.bfloat16(), elsewhere, range(3), sampler)[0]
    return ", ".join([*told, "bf16 weights " + same_tokens(tokens, low, 0)])


def generator_cases() -> Iterator[tuple[str, Case]]:
    for kind in KINDS:
        yield f"{kind}: a pass", partial(train_generator, kind)
        for name, sampler in SAMPLERS.items():
            yield f"{kind}: sampling, {name}", partial(sample_generator, kind, sampler)


def tokenizer_case(name: str, device: torch.device) -> str:
    """Tokens of pictures, pictures of tokens, the gradient through the decoder, a decode in bf16, the fingerprint."""
    here = make_tokenizer(name)
    there, images = moved(here, device), random_images(3, here.image_size)
    tokens = here.encode(images)
    told = [same_tokens(tokens, there.encode(images.to(device)))]
    gradients = []
    for model, place in ((here, CPU), (there, device)):
        codes = model.embed(tokens.to(place)).detach().requires_grad_()
        torch.autograd.backward(model.decode_embeddings(codes).square().mean())
        gradients.append(codes.grad)
    decoded = here.decode(tokens)
    told += [near("pictures", decoded, there.decode(tokens.to(device))), near("gradient", *gradients)]
    with torch.autocast(device.type, torch.bfloat16):
        told.append(near("bf16 pictures", decoded, there.decode(tokens.to(device)).float(), BF16))
    assert here.fingerprint == there.fingerprint, "another fingerprint on the device"
    return ", ".join(told)


def objective_case(name: str, device: torch.device) -> str:
    """The terms of two steps (of free rollouts: one) and of a validation in float32; that two in bf16 stay finite."""
    config = CASES_BY_NAME[name]
    low, _, _ = take_steps(config, device, torch.bfloat16)
    assert all(math.isfinite(value) for row in low for value in row.values()), "bf16: a term is not finite"
    steps, _, measured = take_steps(config, device)
    if isinstance(config, StraightThroughConfig):  # its noise is drawn on the device, where numbers are others
        return "finite"
    expected, _, known = take_steps(config, CPU)
    if getattr(config, "rollout", "") == "free":  # of other weights by a rounding, the second draws another token
        expected, steps = expected[: config.updates], steps[: config.updates]
    told = [near_values(f"step {index}", *pair) for index, pair in enumerate(zip(expected, steps, strict=True))]
    return ", ".join([*told, near_values("validation", known, measured)])


def features_case(name: str, device: torch.device) -> str:
    images = random_images(2, 64)
    if name == "efficientnet-lite0":
        return near(
            "features", EfficientNetLite0Features("cpu")(images), EfficientNetLite0Features(str(device))(images)
        )
    network = seeded_module(InceptionV3)
    outputs = [
        InceptionFeatures(name, copy.deepcopy(network), "x", str(place)).outputs(images) for place in (CPU, device)
    ]
    return ", ".join(map(near, ("features", "spatial", "probabilities"), *outputs))


def vision_transformer_case(kind: str, device: torch.device) -> str:
    """Pictures are rounded to 8 bits when they were resized: a level may fall otherwise now and then."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 56}
    if kind == "dinov2":
        network = seeded_module(lambda: transformers.Dinov2Model(transformers.Dinov2Config(**shape, mlp_ratio=2)))
    else:
        config = transformers.CLIPVisionConfig(**shape, intermediate_size=32, projection_dim=12)
        network = seeded_module(lambda: transformers.CLIPVisionModelWithProjection(config))
    images, made = random_images(2, 64), VisionTransformerFeatures
    here, there = (
        made(VISION_KINDS[kind], f"{kind}:x", copy.deepcopy(network).eval(), str(place))(images)
        for place in (CPU, device)
    )
    return near("features", here, there, limit=1e-3)


TEXT_ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    ),
    "t5": lambda: transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ),
    "clip": lambda: transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
    ),
}


def text_encoder_case(kind: str, device: torch.device) -> str:
    """Features of three captions, whose words are numbers."""
    network, found = seeded_module(TEXT_ENCODERS[kind]).eval(), []
    numbers = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(number): number for number in range(20)}))
    numbers.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=numbers, pad_token="0")
    for place in (CPU, device):
        encoder = PretrainedTextEncoder(kind, moved(network, place), words, 8, "x", {})
        found.append(encoder.encode(["3 4 5 6 2", "7 2", "8 9 3 2"]))
    assert torch.equal(found[0].mask, found[1].mask.cpu()), "another mask on the device"
    return near("features", *(one.features for one in found))


def seeded_module(make: Callable[[], nn.Module]) -> nn.Module:
    """A module with its own initialisation, from seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def differentiable_case(make: Callable[[], nn.Module], num_inputs: int, device: torch.device) -> str:
    """A network's values, and the gradient that reaches the first pictures."""
    here, found = seeded_module(make), []
    for network, place in ((here, CPU), (moved(here, device), device)):
        images, others = (random_images(2, 64, seed).to(place) for seed in ("images", "others"))
        images.requires_grad_()
        values = network(*(images, others)[:num_inputs])
        torch.autograd.backward(values.sum())
        found.append((values, images.grad))
    return ", ".join(near(what, a, b) for what, a, b in zip(("values", "gradient"), *found, strict=True))


DISTANCES: dict[str, Callable[[], nn.Module]] = {
    "lpips": lambda: LPIPS(VGG16Features(), "drawn"),  # the weights of VGG16 are a file that the user brings
    "efficientnet-lite0": PerceptualDistance,
}


def network_cases() -> Iterator[tuple[str, Case]]:
    for name in ("efficientnet-lite0", *FRONT_ENDS):
        yield f"features of {name}", partial(features_case, name)
    for kind in VISION_KINDS:
        yield f"features of {kind}", partial(vision_transformer_case, kind)
    for kind in TEXT_ENCODERS:
        yield f"text encoder {kind}", partial(text_encoder_case, kind)
    for name in PERCEPTUAL_DISTANCES:
        yield f"distance {name}", partial(differentiable_case, DISTANCES[name], 2)
    yield "patch discriminator", partial(differentiable_case, PatchDiscriminator, 1)


def reward_case(name: str, device: torch.device) -> str:
    """One reward of two pictures of each of two originals; inside an update in bf16 too it is measured in float32."""
    zeros = torch.zeros(2, dtype=torch.int64)
    batch = ImageBatch(random_images(2, 64), zeros, captions=Captions(["a dog"], zeros))
    images = random_images(4, 64, "others")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        save_discriminator(seeded_module(PatchDiscriminator), Path(folder) / "discriminator")
        for place in (CPU, device):
            reward = REWARDS[name] if name != "lpips" else lpips_with_drawn_weights
            function = reward(Resources(place, discriminator=folder))
            with torch.autocast(place.type, torch.bfloat16):
                measured = Rewards({name: function}, {name: 1.0}).measure(images.to(place), to_device(batch, place))
            found.append(measured[0])
    return near("reward", *found, limit=1e-3)


def lpips_with_drawn_weights(resources: Resources) -> PlacedReward:
    return PlacedReward(seeded_module(DISTANCES["lpips"]).to(resources.device).maps)


def cases_of(
    case: Callable[[str, torch.device], str], names: Iterable[str]
) -> Callable[[], Iterator[tuple[str, Case]]]:
    return lambda: ((name, partial(case, name)) for name in names)


GROUPS: dict[str, Callable[[], Iterator[tuple[str, Case]]]] = {
    "generators": generator_cases,
    "tokenizers": cases_of(tokenizer_case, TOKENIZER_CASES),
    "objectives": cases_of(objective_case, CASES_BY_NAME),
    "networks": network_cases,
    "rewards": cases_of(reward_case, [name for name in REWARDS if name not in LIKENESSES]),
}


def try_case(name: str, case: Case, device: torch.device) -> str:
    """Prints the line of a case; why it failed, and where in the library it broke, or nothing."""
    try:
        print(f"OK    {name}: {case(device)}", flush=True)
        return ""
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((frame for frame in reversed(frames) if "/consonar/" in frame.filename), frames[-1])
        reason = f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
        print(f"FAIL  {name}: {reason}", flush=True)
        return reason


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="only cases whose names contain one")
    args = parser.parse_args(arguments)
    tried, failed = 0, []
    with ExitStack() as stack:
        if os.environ.get("PRETEND"):
            stack.enter_context(pretended_cuda())
        device = pick_device("cuda")
        stack.enter_context(multiplying("fp32", device))
        for group in args.groups or GROUPS:
            for case_name, case in GROUPS[group]():
                name = f"{group}: {case_name}"
                if any(text in name for text in args.only):
                    tried += 1
                    reason = try_case(name, case, device)
                    failed += [f"{name}: {reason}"] if reason else []
    print(f"FAILS: {len(failed)} of {tried}", *failed, sep="\n")
    if failed or not tried:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
