"""The methods: one row each. A new one is a module here, a row, and a recipe.

A row is what the rest of the house knows of a method: its configuration and objective, what kind of run trains it, and
what it is called and said to do on the report's page.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from consonar.config_io import merge, to_dict
from consonar.json_types import JsonMap
from consonar.training.objectives.autoregressive import Autoregressive, AutoregressiveConfig
from consonar.training.objectives.base import ObjectiveConfig
from consonar.training.objectives.controls import (
    CrossEntropy,
    CrossEntropyConfig,
    StraightThrough,
    StraightThroughConfig,
)
from consonar.training.objectives.free import FreePolicy
from consonar.training.objectives.policy import PolicyConfig, TeacherForcedPolicy
from consonar.training.objectives.reconstruction import Reconstruction, ReconstructionConfig
from consonar.types import Objective

Settings = JsonMap
"""A configuration of an objective as a plain dict, as `config.json` of a run has it."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train."""

    name: str
    """What reports call it."""
    config: type[ObjectiveConfig]
    objective: Callable[..., Objective[Any, Any]]
    """From the configuration and what the kind of run gives (`training.build`)."""
    run: Literal["generator", "post-training", "tokenizer"]
    """From tokens; from images and a start model; a tokenizer from images."""
    about: str = ""
    """A clause that follows the name, on the page."""
    fits: Callable[[Settings], bool] = lambda settings: True
    """Which settings of this kind are this method, where several share a configuration; the first that fits counts."""
    details: Callable[[Settings], list[str]] = lambda settings: []
    """What is said of the settings behind the name."""
    is_control: bool = False
    """Whether other methods of its kind of run are judged by it."""

    @property
    def kind(self) -> str:
        """What files call it."""
        return str(self.config.__dataclass_fields__["kind"].default)


def adds_noise(settings: Settings) -> bool:
    return settings["noise"]["schedule"] != "none" and settings["noise"]["max_rate"] > 0


def aligns_codes(settings: Settings) -> bool:
    return bool(settings["embedding_weight"] > 0)


def policy_details(settings: Settings) -> list[str]:
    estimator = settings["estimator"]
    held = {"mean": ["mean entropy held"], "position": ["entropy held"]}.get(settings["entropy"], [])
    heads = ["heads kept"] * (settings["embedding_weight"] > 0)
    return [estimator] * (estimator != "grpo") + ["credit by place"] * (settings["credit"] == "token") + held + heads


METHODS: list[Method] = [
    Method(
        name="reAR", config=AutoregressiveConfig, objective=Autoregressive, run="generator",
        fits=lambda settings: adds_noise(settings) and aligns_codes(settings),
        about="replaces some of the tokens that the generator reads by wrong ones, and makes its inner states point at "
        "the codebook entries that the decoder will use; nothing of this remains at sampling time",
    ),
    Method(
        name="noisy context only", config=AutoregressiveConfig, objective=Autoregressive, run="generator",
        fits=adds_noise,
        about="is reAR without the alignment: some of the tokens that the generator reads are wrong ones",
    ),
    Method(
        name="codebook alignment only", config=AutoregressiveConfig, objective=Autoregressive, run="generator",
        fits=aligns_codes,
        about="is reAR on correct tokens: inner states point at the codebook entries that the decoder will use",
    ),
    Method(
        name="plain AR", config=AutoregressiveConfig, objective=Autoregressive, run="generator", is_control=True,
        about="teaches the generator only to guess the next token after correct ones",
    ),
    Method(
        name="AR-GRPO", config=PolicyConfig, objective=FreePolicy, run="post-training",
        fits=lambda settings: settings["rollout"] == "free", details=policy_details,
        about="draws whole sequences freely and makes those more likely that earn more reward than the others",
    ),
    Method(
        name="VA-pi", config=PolicyConfig, objective=TeacherForcedPolicy, run="post-training",
        details=policy_details,
        about="draws several sequences of tokens under the true tokens of a picture, decodes them, and makes those "
        "more likely whose picture is nearer to the original",
    ),
    Method(
        name="soft targets", config=CrossEntropyConfig, objective=CrossEntropy, run="post-training",
        fits=lambda settings: settings["target"] == "soft",
        about="is cross-entropy in which codes that are near the true one count as well",
    ),
    Method(
        name="self-rollout", config=CrossEntropyConfig, objective=CrossEntropy, run="post-training",
        fits=lambda settings: settings["context_noise"] > 0 and settings["corruption"] == "drawn",
        about="is cross-entropy on the true token after tokens that the model drew itself",
    ),
    Method(
        name="cross-entropy", config=CrossEntropyConfig, objective=CrossEntropy, run="post-training", is_control=True,
        about="is the control: further training with the true next token as its only aim",
    ),
    Method(
        name="straight-through", config=StraightThroughConfig, objective=StraightThrough, run="post-training",
        about="sends the pixel error back through the decoder",
    ),
    Method(name="tokenizer", config=ReconstructionConfig, objective=Reconstruction, run="tokenizer"),
]  # fmt: skip


def kinds(*runs: str) -> dict[str, type[ObjectiveConfig]]:
    """The configurations of the methods of these kinds of run, of all without any, by what files call them."""
    return {method.kind: method.config for method in METHODS if not runs or method.run in runs}


def completed(settings: Settings) -> Settings:
    """The settings with the defaults of what they lack: older versions had fewer; as they are for an unknown kind."""
    config = kinds().get(settings.get("kind", ""))
    return merge(to_dict(config(kind=settings["kind"])), settings) if config else settings


def method_of(settings: Settings) -> Method | None:
    """The method with these settings, which are `completed`; None for a kind that is not in the table."""
    return next((m for m in METHODS if m.kind == settings.get("kind") and m.fits(settings)), None)


def method_of_config(config: ObjectiveConfig) -> Method:
    """The method with this configuration."""
    return next(m for m in METHODS if isinstance(config, m.config) and m.fits(to_dict(config)))
