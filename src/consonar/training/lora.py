"""Low-rank adapters (LoRA, arXiv 2106.09685) beside products of a start model, which stays as it is. By peft (extra
`lora`).

A product W x becomes W x + alpha / rank B A x. A is drawn from the run's seed and B is 0, so that a run begins at its
start model. What samples from a trainee, measures or writes it does so with `merged`: W + alpha / rank B A, which is a
generator as any other. The start model itself is the trainee `without_adapters`.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor, nn

from consonar.errors import UserError, needs, unknown
from consonar.options import CountOrZero, Options, Positive, ReadOnlyWith, ShareBelowOne
from consonar.seeding import derive_seed
from consonar.types import Condition, Generator

Module = TypeVar("Module", bound=nn.Module)
ADAPTED = ReadOnlyWith(lambda given: given.rank > 0, "{}rank over 0")
MODULATION = "adaLN_modulation"
"""Of reAR's blocks the one linear layer that is neither attention's nor the MLP's."""
MARK = ".lora_"
"""In the names of what is trained."""
NAME = "default"
"""What peft calls the only adapter of a layer."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Options):
    """Low-rank adapters in the place of all weights of a start model."""

    section = "lora"

    rank: CountOrZero = 0
    """Rank of the adapters that are trained; 0: all weights are."""
    alpha: Annotated[Positive | None, ADAPTED] = None
    """What adapters add is multiplied by alpha / rank; None: the rank."""
    dropout: Annotated[ShareBelowOne, ADAPTED] = 0.0
    """Dropout on what adapters read."""
    targets: Annotated[tuple[str, ...], ADAPTED] = ()
    """Linear layers of a block that get them, such as wqkv w2; (): those of attention and MLP."""


def adapt(generator: Generator, config: LoRAConfig, seed: int) -> None:
    """Freezes the generator and gives its blocks adapters, where `config` says so.

    Raises `UserError` without peft, for a target that no block has, and for a rank above the width of a layer that gets
    adapters: they could say no more than its weights.
    """
    if not config.rank:
        return
    layers = {name: layer for name, layer in generator.blocks.named_modules() if isinstance(layer, nn.Linear)}
    targets = chosen(list(layers), config.targets)
    most, narrow = min((min(layers[name].weight.shape), name.partition(".")[2]) for name in targets)
    if config.rank > most:
        raise UserError(f"lora.rank: {config.rank} is above the width of {narrow}, which gets adapters; at most {most}")
    with needs(f"lora.rank: {config.rank}", "lora"):
        from peft import LoraConfig, inject_adapter_in_model
    generator.requires_grad_(False)
    settings = LoraConfig(
        r=config.rank, lora_alpha=config.alpha or config.rank, lora_dropout=config.dropout,
        target_modules=targets,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora"))
        inject_adapter_in_model(settings, generator.blocks)


def chosen(names: list[str], targets: tuple[str, ...]) -> list[str]:
    """Those of the names of layers, `3.attn.qkv` in block 3, that a target means: `attn.qkv`, or `qkv`."""
    if not targets:
        return [name for name in names if MODULATION not in name]
    inside = dict.fromkeys(name.partition(".")[2] for name in names)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in inside):
            raise unknown("lora.targets", target, inside)
    return [name for name in names if any(name.endswith(f".{target}") for target in targets)]


def adapted(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters by name; peft is untyped."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_base_layer")}


def moving(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model; with adapters without the start model's, which is known by its hash."""
    state = model.state_dict()
    if not adapted(model):
        return state
    return {key: value for key, value in state.items() if MARK in key or not key.startswith("generator.")}


@torch.no_grad()
def merged(model: Module) -> Module:
    """The model itself, or of one with adapters a copy that has them in its weights and shares all others."""
    if not adapted(model):
        return model
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for name, layer in adapted(copied).items():
        base = layer.get_base_layer()
        base.weight = nn.Parameter(base.weight + layer.get_delta_weight(NAME), requires_grad=False)
        copied.set_submodule(name, base)
    return copied


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the start model."""
    layers = adapted(model)
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer.get_base_layer())
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


class StartModel:
    """The start model as the reference of post-training, in the weights of the trainee. Called as a generator is."""

    def __init__(self, trainee: nn.Module):
        self.trainee = trainee

    def __call__(self, context: Tensor, condition: Condition) -> tuple[Tensor, dict[int, Tensor]]:
        with without_adapters(self.trainee):  # all of the trainee: what is in shards is gathered by that
            return self.trainee(context, condition).logits, {}
