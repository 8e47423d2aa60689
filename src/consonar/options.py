"""What every configuration is checked for when it is made, from Python, a file or the command line alike."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterator
from typing import Any

from consonar.errors import UserError, unknown

LARGEST = 1e6
"""Bound of a float option's magnitude where the next table has no other; beyond it float32 soon has no room."""
LARGEST_OF = {"lr": 10.0, "rope_base": 1e12}
SMALLEST_OF = {"temperature": 1e-6, "gumbel_temperature": 1e-6, "tau": 1e-6, "rope_base": 1e-6}
"""Least value over 0 of what is divided by, or raised to a power."""


Rule = tuple[Callable[[Any], bool], str]
"""Whether a configuration reads an option, and in words what would make it read ({} is the configuration's prefix)."""


def has_heads(config: Any, side: str) -> bool:
    return config.embedding_weight > 0 and config.heads in (side, "both")


def adds_noise(config: Any) -> bool:
    return config.noise.schedule != "none" and config.noise.max_rate > 0


NOISE: Rule = (lambda c: c.schedule != "none", "{}schedule other than 'none'")
HEADS: Rule = (lambda c: c.embedding_weight > 0, "{}embedding_weight over 0")
EPOCHS: Rule = (lambda c: c.inner_epochs > 1, "{}inner_epochs over 1: until then every ratio is 1")
TOKENS: Rule = (lambda c: not c.reads_images, "objective.kind 'consistency'")
IMAGES: Rule = (
    lambda c: c.reads_images, "objective.kind 'reconstruction', 'policy', 'cross_entropy' or 'straight_through'"
)  # fmt: skip
ALIGNS: Rule = (lambda c: c.aligns, "objective.kind 'policy', 'cross_entropy' or 'straight_through'")
GENERATOR: Rule = (lambda c: c.objective.kind != "reconstruction", "a model.kind that is a generator")
DRAWN: Rule = (lambda c: c.temperature > 0, "{}temperature over 0")
FEATURES: Rule = (lambda c: c.perceptual_weight > 0, "{}perceptual_weight over 0")

READ_ONLY_WITH: dict[str, dict[str, Rule]] = {
    "TrainConfig": {
        "init": GENERATOR,
        "tokenizer": GENERATOR,
        "data.tokens": TOKENS,
        "data.validation_tokens": TOKENS,
        "data.views": TOKENS,
        "data.images": IMAGES,
        "data.flip": IMAGES,
        "data.validation_split": IMAGES,
        "data.bad_images": IMAGES,
        "data.bad_images_limit": (lambda c: c.data.bad_images == "skip", "data.bad_images 'skip'"),
        "data.classes": ALIGNS,
        "data.label_default": ALIGNS,
        "data.validation_items": (lambda c: c.data.validation_tokens != "", "a data.validation_tokens that is not ''"),
        "loop.fd_samples": ALIGNS,
    },
    "AutoregressiveConfig": {
        "heads": HEADS,
        "head_depth": HEADS,
        "head_width": HEADS,
        "encode_layer": (lambda c: has_heads(c, "encode"), "{}embedding_weight over 0 and {}heads 'encode' or 'both'"),
        "decode_layer": (lambda c: has_heads(c, "decode"), "{}embedding_weight over 0 and {}heads 'decode' or 'both'"),
        "mask_noised": (
            lambda c: has_heads(c, "encode") and adds_noise(c),
            "{}embedding_weight over 0, {}heads 'encode' or 'both', and {}noise.schedule other than 'none'",
        ),
    },
    "NoiseConfig": {
        "max_rate": NOISE,
        "corruption": NOISE,
        "anneal_end": (lambda c: c.schedule == "truncated_linear", "{}schedule 'truncated_linear'"),
        "num_neighbours": (
            lambda c: c.schedule != "none" and c.corruption == "nearest",
            "{}corruption 'nearest' and {}schedule other than 'none'",
        ),
    },
    "AlignmentConfig": {
        "noise_schedule": (lambda c: c.context_noise > 0, "{}context_noise over 0"),
        "discriminator": (lambda c: "patch-discriminator" in c.rewards, "'patch-discriminator' in {}rewards"),
        "lpips_weights": (
            lambda c: (
                "lpips" in c.rewards
                or (c.kind == "straight_through" and c.perceptual == "lpips" and c.perceptual_weight > 0)
            ),
            "'lpips' in {}rewards (or {}perceptual 'lpips', in {}kind 'straight_through')",
        ),
    },
    "PolicyConfig": {
        "guidance_scale": (lambda c: c.rollout == "free", "{}rollout 'free'"),
        "clip_range": EPOCHS,
        "clip_range_high": EPOCHS,
        "kl": (lambda c: c.kl_weight > 0, "{}kl_weight over 0"),
        "credit": (lambda c: c.estimator != "gspo", "an {}estimator with a ratio for each token, so not 'gspo'"),
        "smooth_credit": (lambda c: c.credit == "token", "{}credit 'token'"),
        "baseline_decay": (lambda c: c.estimator == "reinforce", "{}estimator 'reinforce'"),
    },
    "CrossEntropyConfig": {"tau": (lambda c: c.target == "soft", "{}target 'soft'")},
    "StraightThroughConfig": {
        "perceptual": FEATURES,
        "gumbel_temperature": (
            lambda c: c.mse_weight > 0 or c.perceptual_weight > 0,
            "{}mse_weight or {}perceptual_weight over 0",
        ),
    },
    "ReconstructionConfig": {
        "perceptual": FEATURES,
        "perceptual_weights": (
            lambda c: c.perceptual == "lpips" and c.perceptual_weight > 0,
            "{}perceptual 'lpips' and {}perceptual_weight over 0",
        ),
        "discriminator_start": (lambda c: c.discriminator_weight > 0, "{}discriminator_weight over 0"),
        "revive_until": (lambda c: c.revive_after > 0, "{}revive_after over 0"),
    },
    "SamplerConfig": {
        "top_k": DRAWN,
        "top_p": DRAWN,
        "guidance_schedule": (lambda c: c.guidance_scale != 1, "{}guidance_scale other than 1"),
        "guidance_power": (
            lambda c: c.guidance_schedule.startswith("power_cosine"),
            "{}guidance_schedule 'power_cosine' or 'power_cosine_vapi'",
        ),
        "guidance_interval": (lambda c: c.guidance_schedule == "interval", "{}guidance_schedule 'interval'"),
    },
    "RotaryConfig": {"multiple_of": (lambda c: c.ffn_width == 0, "{}ffn_width 0")},
    "LlamaGenConfig": {"caption_dim": (lambda c: c.condition == "text", "{}condition 'text'")},
}
"""Options that only some configurations read, by class and field. All others are always read."""


def check_options(config: Any, prefix: str) -> None:
    """Raises `UserError`, naming `prefix` + field, for values that no configuration takes and for those not read here.

    Floats are finite and within the bounds above, integers within 64 bits, literals among their choices. An option that
    is set to something else than its default must be one that this configuration reads (`READ_ONLY_WITH`).
    """
    kind: Any = type(config)
    for name, choices in literals(kind).items():
        if getattr(config, name) not in choices:
            raise unknown(f"{prefix}{name}", getattr(config, name), [str(choice) for choice in choices])
    for item in dataclasses.fields(config):
        for key, value in numbers(item.name, getattr(config, item.name)):
            check_number(f"{prefix}{key}", value, item.name)
    for kind in type(config).__mro__:
        for key, (is_read, words) in READ_ONLY_WITH.get(kind.__name__, {}).items():
            value, default = find(config, key)
            if value != default and not is_read(config):
                raise UserError(
                    f"{prefix}{key}: {value!r} is read only with {words.replace('{}', prefix)}; remove it, or set it "
                    f"to its default {default!r}"
                )


def find(config: Any, key: str) -> tuple[Any, Any]:
    """The value of a field, or of one inside a field, and its default."""
    name, _, inside = key.partition(".")
    if inside:
        return find(getattr(config, name), inside)
    item = type(config).__dataclass_fields__[name]
    return getattr(config, name), item.default


@functools.cache
def literals(kind: Any) -> dict[str, tuple[Any, ...]]:
    """The choices of each field of `kind` that has a list of them."""
    hints = typing.get_type_hints(kind)
    return {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is typing.Literal}


def numbers(key: str, value: Any) -> Iterator[tuple[str, int | float]]:
    """The numbers of a field by key: itself, or those in its table or list."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from numbers(f"{key}.{name}", part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from numbers(key, part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def check_number(key: str, value: int | float, name: str) -> None:
    """Raises `UserError` for a number outside the bounds of the option `name`."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{key}: {value} does not fit into 64 bits")
    if isinstance(value, int) and name not in LARGEST_OF | SMALLEST_OF:
        return
    largest, smallest = LARGEST_OF.get(name, LARGEST), SMALLEST_OF.get(name, 0.0)
    if not math.isfinite(value):
        raise UserError(f"{key}: {value} is not a finite number")
    if abs(value) > largest:
        raise UserError(f"{key}: {value} is too large; at most {largest:g}")
    if 0 < value < smallest:
        raise UserError(f"{key}: {value} is too small to calculate with; at least {smallest:g}")
