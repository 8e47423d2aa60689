"""Recipes: functions that return a complete `TrainConfig`. Variants use `dataclasses.replace`."""

from __future__ import annotations

from collections.abc import Callable

from consonar.errors import check_choice
from consonar.recipes import openmoji, published
from consonar.training.config import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "ar-openmoji": openmoji.ar_openmoji,
    "rear-openmoji": openmoji.rear_openmoji,
    "rear-openmoji-f4": openmoji.rear_openmoji_f4,
    "rear-openmoji-f4-tune": openmoji.rear_openmoji_f4_tune,
    "tokenizer-openmoji-64": openmoji.tokenizer_openmoji_64,
    "tokenizer-openmoji-64-f4": openmoji.tokenizer_openmoji_64_f4,
    "vapi-openmoji": openmoji.vapi_openmoji,
    "vapi-spatial-openmoji": openmoji.vapi_spatial_openmoji,
    "ce-openmoji": openmoji.ce_openmoji,
    "soft-openmoji": openmoji.soft_openmoji,
    "ste-openmoji": openmoji.ste_openmoji,
    "free-openmoji": openmoji.free_openmoji,
    "rear-s": published.rear_s,
    "rear-b": published.rear_b,
    "rear-l": published.rear_l,
    "ar-l": published.ar_l,
    "rear-l-vqgan-plus": published.rear_l_vqgan_plus,
    "rear-b-titok": published.rear_b_titok,
    "ar-b-titok": published.ar_b_titok,
    "rear-b-alitok": published.rear_b_alitok,
    "ar-b-alitok": published.ar_b_alitok,
    "vapi-llamagen-xxl": published.vapi_llamagen_xxl,
    "vapi-llamagen-xl": published.vapi_llamagen_xl,
}


def find_recipe(name: str) -> TrainConfig:
    """The recipe called `name`; `UserError` lists the choices."""
    check_choice("recipe", name, RECIPES)
    return RECIPES[name]()
