"""Recipes: functions that return a complete `TrainConfig`. Variants use `dataclasses.replace`."""

from __future__ import annotations

from collections.abc import Callable

from consonar.errors import check_choice
from consonar.recipes.openmoji import (
    ar_openmoji,
    ce_openmoji,
    free_openmoji,
    rear_openmoji,
    rear_openmoji_f4,
    rear_openmoji_f4_tune,
    soft_openmoji,
    ste_openmoji,
    tokenizer_openmoji_64,
    tokenizer_openmoji_64_f4,
    vapi_openmoji,
    vapi_spatial_openmoji,
)
from consonar.recipes.published import (
    ar_b_alitok,
    ar_b_titok,
    ar_l,
    rear_b,
    rear_b_alitok,
    rear_b_titok,
    rear_l,
    rear_l_vqgan_plus,
    rear_s,
    vapi_llamagen_xl,
    vapi_llamagen_xxl,
)
from consonar.training.config import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "ar-openmoji": ar_openmoji,
    "rear-openmoji": rear_openmoji,
    "rear-openmoji-f4": rear_openmoji_f4,
    "rear-openmoji-f4-tune": rear_openmoji_f4_tune,
    "tokenizer-openmoji-64": tokenizer_openmoji_64,
    "tokenizer-openmoji-64-f4": tokenizer_openmoji_64_f4,
    "vapi-openmoji": vapi_openmoji,
    "vapi-spatial-openmoji": vapi_spatial_openmoji,
    "ce-openmoji": ce_openmoji,
    "soft-openmoji": soft_openmoji,
    "ste-openmoji": ste_openmoji,
    "free-openmoji": free_openmoji,
    "rear-s": rear_s,
    "rear-b": rear_b,
    "rear-l": rear_l,
    "ar-l": ar_l,
    "rear-l-vqgan-plus": rear_l_vqgan_plus,
    "rear-b-titok": rear_b_titok,
    "ar-b-titok": ar_b_titok,
    "rear-b-alitok": rear_b_alitok,
    "ar-b-alitok": ar_b_alitok,
    "vapi-llamagen-xxl": vapi_llamagen_xxl,
    "vapi-llamagen-xl": vapi_llamagen_xl,
}


def find_recipe(name: str) -> TrainConfig:
    """The recipe called `name`; `UserError` lists the choices."""
    check_choice("recipe", name, RECIPES)
    return RECIPES[name]()
