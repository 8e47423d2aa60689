"""What objectives share: the class of their configurations, how a condition is dropped, means over batches."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from consonar import records
from consonar.distributed import World
from consonar.errors import UserError
from consonar.options import Options
from consonar.seeding import generator, uniform
from consonar.training import losses
from consonar.training.trainee import HeadSpec
from consonar.types import Condition, Generator, ModelConfig, Tokenizer


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Options):
    """The settings of one objective; `kind` names it in files."""

    section = "objective"

    kind: str

    @property
    def updates(self) -> int:
        """Optimiser steps on each batch."""
        return 1

    def needs_prior(self, *, validated: bool = True) -> bool:
        """Whether the start model is kept in memory, in a run with data for validation or without."""
        return False

    @property
    def keeps_heads(self) -> bool:
        """Whether the alignment heads of the run to start from are kept, and trained on."""
        return False

    @property
    def drops_all_classes(self) -> bool:
        """Whether no image is trained with its class, so that none needs one."""
        return False

    @property
    def has_discriminator(self) -> bool:
        """Whether a discriminator is trained beside the tokenizer."""
        return False

    def check_model(self, model: ModelConfig | None) -> None:
        """Raises `UserError` for the shape of a model that this objective cannot train."""

    def head_specs(self, num_layers: int, code_dim: int) -> tuple[HeadSpec, ...]:
        """The training-only heads of a generator with `num_layers` blocks for a tokenizer of width `code_dim`."""
        return ()


def drop_classes(model: Generator, condition: Condition, share: float, seed: int, step: int, world: World) -> Condition:
    """The condition with the null condition in this `share` of the rows, drawn by (seed, step) alone."""
    rng = generator(seed, "class_dropout", step, 0)
    dropped = world.own_rows(lambda n: uniform(rng, n), records.num_rows(condition))
    keep = records.to_device(dropped >= share, records.first_tensor(condition).device)
    return records.select(keep, condition, model.null_condition(condition))


def alignment_terms(
    taps: Mapping[str, Tensor], tokenizer: Tokenizer, tokens: Tensor, keep: Tensor | None = None
) -> dict[str, Tensor]:
    """L_emb of each head by `align_` and its name, from what they predict, (B, N, C), of the codes of tokens (B, N).

    `keep` is for the codes of the tokens that are read, see `losses.codebook_alignment_loss`.
    """
    codes = tokenizer.embed(tokens) if taps else tokens  # (B, N, C)
    return {
        f"align_{name}": losses.codebook_alignment_loss(predicted, codes, keep if name == "current" else None)
        for name, predicted in taps.items()
    }


def codebook_of(tokenizer: Tokenizer, device: torch.device) -> Tensor:
    """(V, C): what the decoder receives for each token. `UserError` where that depends on the token's place, as with
    one codebook for each level of a residual quantiser: there is no such table."""
    codes, places = tokenizer.vocab_size, tokenizer.num_tokens
    tokens = torch.arange(-(-codes // places) * places, device=device) % codes
    table = tokenizer.embed(tokens.view(-1, places)).flatten(0, 1)
    moved = tokenizer.embed(tokens.roll(1).view(-1, places)).flatten(0, 1).roll(-1, 0)
    if type(table) is Tensor and not torch.allclose(table, moved, rtol=1e-4, atol=1e-5):  # a plan's has no numbers
        raise UserError(
            "tokenizer: what its decoder receives for a token depends on the token's place, so that there is no "
            "codebook; straight-through, soft targets, `nearest` noise, tied embeddings and diagnoses of the codebook "
            "need one"
        )
    return table[:codes]


def means(measured: Iterable[tuple[int, Mapping[str, Tensor]]]) -> dict[str, float]:
    """Means over all items, by name, from the number of items in each batch and the means over those. In float64."""
    sums: dict[str, Tensor] = {}
    total = 0
    for count, values in measured:
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.double() * count
        total += count
    return {name: float(value / total) for name, value in sums.items()}
