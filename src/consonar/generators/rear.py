"""The causal transformer of RAR (arXiv 2411.00776) and reAR (arXiv 2510.04450), in raster order; for captions too.

State-dict keys are those of the released checkpoints, so that released weights load without renaming. Facts kept from
them: one embedding table for codes, the mask, the classes and the null class, in this order; sequence [cls, condition,
token 0, ...]; the position that predicts token t also receives the target-aware embedding of row t + 2; AdaLN from
SiLU(condition embedding + step embedding of the position); chunks shift, scale, gate for attention, then for the MLP,
but scale, shift before the head; LayerNorm eps 1e-6 everywhere, on queries and keys too; exact GELU.

Captions are ours, no released model has them: the features of a caption's tokens, projected as LlamaGen's, stand in the
place of the class, [cls, caption, token 0, ...], where padding is hidden; AdaLN reads the step embedding alone, or with
`pooled` the projected mean of the features as well. The null caption is LlamaGen's.

Deviations: the last token is read in training (reAR's encode head regresses its code there) but no logits are made
from it; the alignment heads live in `training.trainee`, not here; `forward` never corrupts its input.

Letters: `B` batch, `N` tokens, `V` codes, `D` width, `P` positions before the tokens, `L` = P + N positions.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consonar.attention import KVCache, NormedAttention, attention_mask
from consonar.errors import UserError
from consonar.float32 import product_in_float32
from consonar.generators.base import CausalGenerator, GeneratorConfig
from consonar.generators.captions import CAPTIONS, CaptionEmbedding
from consonar.generators.tied import embedding_of
from consonar.options import Count, CountOrZero, Depth, Divides, Positive, ShareBelowOne
from consonar.seeding import draw_weights
from consonar.types import TextCondition

SPARE_POSITIONS, SPARE_STEPS = 1024, 100  # of the position tables in the released checkpoints
FEW_CLASSES = 32  # up to here projecting every class costs little next to a batch of pictures
# While sampling, AdaLN is projected for so many positions at once, fewer where that were more rows than so many.
MOST_AHEAD, MOST_ROWS_AHEAD = 16, 1024


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
    condition: Literal["class", "text"] = "class"
    """What it is conditioned on: a class id, or the features of a caption."""
    caption_dim: Annotated[Count, CAPTIONS] = 2048
    """Width of a caption feature (text only)."""
    num_condition_tokens: Annotated[Count, CAPTIONS] = 120
    """Positions of a caption (text only)."""
    pooled: Annotated[bool, CAPTIONS] = False
    """Whether AdaLN reads the mean of a caption's features as well (text only)."""
    tied_code_dim: CountOrZero = 0
    """Width of the tokenizer's embeddings, of which codes are then projections; 0: codes have rows of their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition == "text" and self.num_classes:
            raise UserError(f"model.num_classes: {self.num_classes}, but model.condition is text, which has none")
        if self.width * self.mlp_ratio < 1:
            raise UserError(f"model.mlp_ratio: {self.mlp_ratio} leaves the MLP no unit; at least 1 / model.width")

    @property
    def has_classes(self) -> bool:
        return self.condition == "class"

    @property
    def caption_shape(self) -> tuple[int, int]:
        return self.num_condition_tokens, self.caption_dim

    @property
    def prefix_length(self) -> int:
        """P: cls and the condition."""
        return 1 + (self.num_condition_tokens if self.condition == "text" else 1)


REAR_PRESETS = {
    "tiny": ReARConfig(width=256, num_layers=6, num_heads=4, dropout=0.0),
    "S": ReARConfig(width=768, num_layers=20),
    "B": ReARConfig(width=768, num_layers=24),
    "L": ReARConfig(width=1024, num_layers=24),
}


class Modulation(torch.autograd.Function):
    """x * (1 + scale) + shift, all of one shape, and its gradient in as few passes over memory as there are products:
    of what `addcmul` does by itself for a gradient, a third multiplies by 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return torch.addcmul(x + shift, x, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return torch.addcmul(gradient, gradient, scale), gradient, gradient * x


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift (DiT, Peebles & Xie 2023), in the type of the projections: it is the next one's input."""
    modulated: Tensor = Modulation.apply(x.to(shift.dtype), shift, scale)
    return modulated


def positions_ahead(num_rows: int) -> int:
    """For how many positions AdaLN is projected at once while sampling, see `MOST_AHEAD`."""
    return max(1, min(MOST_AHEAD, MOST_ROWS_AHEAD // num_rows))


@dataclass(frozen=True)
class Condition:
    """What AdaLN reads at every position: `vectors` (R, L, D), and which of them belongs to each image.

    With few classes there is one row per class, and one for all captions where AdaLN reads none, so that the
    projections, a third of the model's arithmetic, run once for each; `rows` (B,) then says which. None: row b is
    image b. Or, in the place of `vectors`, what the projections of all blocks and the head made of them ahead,
    (R, L, 6 D) and the last (R, L, 2 D).
    """

    rows: Tensor | None
    vectors: Tensor | None = None
    projected: Sequence[Tensor] = ()

    def project(self, projection: nn.Module, layer: int) -> Tensor:
        """(B, L, n D) <- projection of D to n D, of a block or the head (-1)."""
        projected = self.projected[layer] if self.vectors is None else projection(self.vectors)
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
        projected = condition.project(self.adaLN_modulation, layer)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = projected.chunk(6, dim=-1)
        x = x + gate_a * self.dropout(self.attn(modulate(self.norm1(x), shift_a, scale_a), mask, cache, layer))
        return x + gate_m * self.dropout(self.mlp(modulate(self.norm2(x), shift_m, scale_m)))


class HeadModulation(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        scale, shift = condition.project(self.adaLN_modulation, -1).chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)


class ReARGenerator(CausalGenerator[Tensor | TextCondition]):
    config: ReARConfig

    def __init__(self, config: ReARConfig):
        super().__init__(config, config.num_classes)
        self.mask_token = config.vocab_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        spare = (max(least, self.prefix_length + 1) for least in (SPARE_POSITIONS, SPARE_STEPS))
        positions, steps = (config.num_tokens + rows for rows in spare)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, config.width))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, positions, config.width))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, steps, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        takes_text, shape = config.condition == "text", (*config.caption_shape, config.width)
        self.captions = CaptionEmbedding(*shape, pooled=config.pooled) if takes_text else None
        conditions = 0 if takes_text else config.num_classes + 1
        self.embeddings = embedding_of(config.vocab_size, 1 + conditions, config.width, config.tied_code_dim)
        self.adaln_before_head = HeadModulation(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, rng: torch.Generator | None = None) -> None:
        """Truncated normals of std 0.02; biases 0; AdaLN projections 0, so that every block starts as the identity."""
        for parameter in (self.cls_token, self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
            nn.init.trunc_normal_(parameter, std=0.02, generator=rng)
        draw_weights(self, rng=rng)
        for module in [*self.blocks, self.adaln_before_head]:
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        if self.captions is not None:
            self.captions.draw_null(rng)

    def logits(self, hidden: Tensor) -> Tensor:
        return product_in_float32(self.lm_head, hidden)

    def hidden_states(
        self,
        context: Tensor,
        condition: Tensor | TextCondition,
        *,
        cache: KVCache | None = None,
        tap_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Of the classes `condition` (B,) int64, `num_classes` = the null class; or of captions."""
        x = self.embeddings(context)
        if cache is None or cache.read == 0:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.embed_condition(condition), x], 1)
        count = x.shape[1]
        places = cache.places(count) if cache is not None else slice(0, count)
        target = self.target_aware_pos_embed[:, 1:][:, places]  # of classes: token t at position t + 1, by row t + 2
        first, end = self.prefix_length - 1, self.prefix_length - 1 + self.num_tokens
        if isinstance(places, slice) and not first <= places.start < places.stop <= end:
            numbers = torch.arange(places.start, places.stop, device=x.device)[:, None]
            target = target * ((numbers >= first) & (numbers < end)).to(x.dtype)
        x = x + self.pos_embed[:, places] + target
        step = self.condition_at(places, condition, cache)
        kept = F.pad(condition.mask, (1, 0), value=True) if isinstance(condition, TextCondition) else None
        mask = attention_mask(count, kept, cache, x.device)
        x, taps = self.run_blocks(x, step, mask, cache, tap_layers)
        return self.adaln_before_head(x, step), taps

    def embed_condition(self, condition: Tensor | TextCondition) -> Tensor:
        """(B, P - 1, D)."""
        if self.captions is None:
            assert isinstance(condition, Tensor), "this generator takes classes"
            return self.embeddings(condition + self.vocab_size + 1)[:, None]
        return self.captions.checked(condition)

    def null_condition(self, condition: Tensor | TextCondition) -> Tensor | TextCondition:
        """The null class, or the null caption under the mask of the caption."""
        return super().null_condition(condition) if self.captions is None else self.captions.null(condition)

    def rows_of(self, condition: Tensor | TextCondition, sampling: bool) -> Tensor | None:
        """Which row of `vectors` is whose; None: each image has its own."""
        if isinstance(condition, TextCondition):
            return None if self.config.pooled else torch.zeros_like(condition.mask[:, 0], dtype=torch.int64)
        # While sampling the model decides and not the batch, so that a picture is rounded alike in any batch.
        few = self.num_classes < FEW_CLASSES if sampling else self.num_classes + 1 < len(condition)
        return condition if few else None

    def vectors(self, condition: Tensor | TextCondition, rows: Tensor | None) -> Tensor:
        """What AdaLN reads, (R, D): of all classes where these are few, or one row of zeros for all captions."""
        if isinstance(condition, TextCondition):
            pooled = self.captions.pooled(condition) if self.captions is not None else None
            return torch.zeros_like(self.cls_token[0]) if pooled is None else pooled
        last = -self.num_classes - 1  # rows are those of the classes
        return self.embeddings(condition + self.vocab_size + 1) if rows is None else self.embeddings.weight[last:]

    def condition_at(
        self, places: slice | Tensor, condition: Tensor | TextCondition, cache: KVCache | None
    ) -> Condition:
        """For the positions of `places`, see `KVCache.places`."""
        rows = self.rows_of(condition, sampling=cache is not None)
        if cache is not None and isinstance(places, Tensor):  # rows of one table of all positions and classes or images
            count = cache.tables[0].shape[1]
            rows = torch.arange(count, device=places.device) if rows is None else rows
            rows = rows + places % positions_ahead(count) * count
            return Condition(rows, projected=[table.flatten(0, 1)[:, None] for table in cache.tables])
        assert isinstance(places, slice)
        vectors = self.vectors(condition, rows)
        piece = positions_ahead(len(vectors))
        if cache is not None and places.start % piece + places.stop - places.start <= piece:
            self.look_ahead(condition, cache, places.start)
            here = slice(places.start - cache.first, places.stop - cache.first)
            return Condition(rows, projected=[table[here].transpose(0, 1) for table in cache.tables])
        return Condition(rows, F.silu(vectors[:, None] + self.timesteps_embeddings[:, places]))

    def look_ahead(self, condition: Tensor | TextCondition, cache: KVCache, place: int) -> None:
        """Projects AdaLN for some positions at once: its weights, a third of the model, are then read once for all."""
        if cache.first >= 0 and place in range(cache.first, cache.first + len(cache.tables[0])):
            return
        given = self.vectors(condition, self.rows_of(condition, sampling=True))
        piece = positions_ahead(len(given))
        cache.first = first = place // piece * piece
        steps = self.timesteps_embeddings[0, first : min(first + piece, self.prefix_length + self.num_tokens), None]
        vectors = F.silu(given + steps)  # (positions, R, D)
        cache.keep(module.adaLN_modulation(vectors) for module in [*self.blocks, self.adaln_before_head])
