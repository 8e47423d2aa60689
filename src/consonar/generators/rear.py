"""The causal transformer of RAR (arXiv 2411.00776) and reAR (arXiv 2510.04450), in raster order.

State-dict keys are those of the released checkpoints, so that released weights load without renaming. Facts kept from
them: one embedding table for codes, the mask, the classes and the null class, in this order; sequence [cls, condition,
token 0, ...]; the position that predicts token t also receives the target-aware embedding of row t + 2; AdaLN from
SiLU(condition embedding + step embedding of the position); chunks shift, scale, gate for attention, then for the MLP,
but scale, shift before the head; LayerNorm eps 1e-6 everywhere, on queries and keys too; exact GELU.

Deviations: the last token is read in training (reAR's encode head regresses its code there) but no logits are made
from it; the alignment heads live in `training.trainee`, not here; `forward` never corrupts its input.

Letters: `B` batch, `N` tokens, `V` codes, `D` width, `L` = N + 2 positions.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consonar.attention import KVCache, NormedAttention, attention_mask
from consonar.errors import UserError
from consonar.generators.base import CausalGenerator, GeneratorConfig
from consonar.options import Count, CountOrZero, Depth, Divides, Positive, ShareBelowOne

# Spare rows of the position tables in the released checkpoints.
SPARE_POSITIONS, SPARE_STEPS = 1024, 100
# Up to here projecting every class costs little next to a batch of pictures.
FEW_CLASSES = 32


@dataclass(frozen=True, kw_only=True)
class ReARConfig(GeneratorConfig):
    """Shape of a reAR/RAR generator. Recipes leave `vocab_size`, `num_tokens`, `num_classes` at 0: set by the data."""

    kind: Literal["rear"] = "rear"
    num_layers: Depth = 20
    """Transformer blocks."""
    num_heads: Annotated[Count, Divides("width")] = 16
    """Attention heads; divides `width`."""
    mlp_ratio: Positive = 4.0
    """Width of the MLP as a multiple of `width`."""
    dropout: ShareBelowOne = 0.1
    """Dropout after attention and MLP, and on the attention weights."""
    num_classes: CountOrZero = 0
    """Classes; 0: taken from the token store."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width * self.mlp_ratio < 1:
            raise UserError(f"model.mlp_ratio: {self.mlp_ratio} leaves the MLP no unit; at least 1 / model.width")

    @property
    def prefix_length(self) -> int:
        """P: cls and the condition."""
        return 2


REAR_PRESETS = {
    "tiny": ReARConfig(width=256, num_layers=6, num_heads=4, dropout=0.0),
    "S": ReARConfig(width=768, num_layers=20),
    "B": ReARConfig(width=768, num_layers=24),
    "L": ReARConfig(width=1024, num_layers=24),
}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift (DiT, Peebles & Xie 2023)."""
    return torch.addcmul(x + shift, x, scale)


@dataclass(frozen=True)
class Condition:
    """What AdaLN reads at every position: `vectors` (R, L, D), and which of them belongs to each image.

    With few classes there is one row per class, so that the projections, a third of the model's arithmetic, run once
    per class; `rows` (B,) then says which. None: row b is image b.
    """

    vectors: Tensor
    rows: Tensor | None = None

    def project(self, projection: nn.Module) -> Tensor:
        """(B, L, n D) <- projection of D to n D."""
        projected = projection(self.vectors)
        if self.rows is None:
            return projected
        return F.embedding(self.rows, projected.flatten(1)).unflatten(1, projected.shape[1:])


class Block(nn.Module):
    """x + gate * attention(modulated norm(x)), then the same with the MLP."""

    def __init__(self, config: ReARConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = NormedAttention(config.width, config.num_heads, config.dropout, partial(nn.LayerNorm, eps=1e-6))
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        layers = {"fc1": nn.Linear(width, hidden), "gelu": nn.GELU(), "fc2": nn.Linear(hidden, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        # The released module starts with SiLU; it is applied once for all blocks, in `hidden_states`.
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(config.width, 6 * config.width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, condition: Condition, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = condition.project(self.adaLN_modulation).chunk(6, dim=-1)
        x = x + gate_a * self.dropout(self.attn(modulate(self.norm1(x), shift_a, scale_a), mask, cache, layer))
        return x + gate_m * self.dropout(self.mlp(modulate(self.norm2(x), shift_m, scale_m)))


class HeadModulation(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        scale, shift = condition.project(self.adaLN_modulation).chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)


class ReARGenerator(CausalGenerator[Tensor]):
    config: ReARConfig

    def __init__(self, config: ReARConfig):
        super().__init__(config, config.num_classes)
        self.mask_token = config.vocab_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens + SPARE_POSITIONS, config.width))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens + SPARE_POSITIONS, config.width))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, config.num_tokens + SPARE_STEPS, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.embeddings = nn.Embedding(config.vocab_size + 1 + config.num_classes + 1, config.width)
        self.adaln_before_head = HeadModulation(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, rng: torch.Generator | None = None) -> None:
        """Truncated normals of std 0.02; biases 0; AdaLN projections 0, so that every block starts as the identity."""
        for parameter in (self.cls_token, self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
            nn.init.trunc_normal_(parameter, std=0.02, generator=rng)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=rng)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for module in [*self.blocks, self.adaln_before_head]:
            nn.init.zeros_(module.adaLN_modulation[1].weight)

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, self.num_classes)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def hidden_states(
        self, context: Tensor, condition: Tensor, *, cache: KVCache | None = None, tap_layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Of the classes `condition` (B,) int64, `num_classes` = the null class."""
        start = cache.length if cache is not None else 0
        condition_embedding = self.embeddings(condition + self.vocab_size + 1).unsqueeze(1)  # (B, 1, D)
        x = self.embeddings(context)
        if start == 0:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), condition_embedding, x], 1)
        end = start + x.shape[1]
        places = torch.arange(start, end, device=x.device)
        predicts = (places >= 1) & (places <= self.num_tokens)  # token t at position t + 1, by row t + 2
        target = self.target_aware_pos_embed[:, start + 1 : end + 1] * predicts.to(x.dtype)[:, None]
        x = x + self.pos_embed[:, start:end] + target
        rows = None
        # While sampling the model decides and not the batch, so that a picture is rounded alike in any batch.
        few = self.num_classes < FEW_CLASSES if cache is not None else self.num_classes + 1 < len(condition)
        if few:
            rows, condition_embedding = condition, self.embeddings.weight[self.vocab_size + 1 :].unsqueeze(1)
        step = Condition(F.silu(condition_embedding + self.timesteps_embeddings[:, start:end]), rows)
        mask = attention_mask(end - start, end, None, cached=cache is not None, device=x.device)
        x, taps = self.run_blocks(x, step, mask, cache, tap_layers)
        return self.adaln_before_head(x, step), taps
