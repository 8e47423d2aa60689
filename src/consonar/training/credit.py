"""Spatial credit: which tokens an error in an image is due to.

VA-pi (arXiv 2512.19680) gives all tokens of an image one reward; a reward for each token is ours. It is that of the
token's own cell of the grid, or the mean of the cells weighted by the token's influence: the share of the pixel change
that falls on each cell when the token is replaced. That is measured, and not taken from the decoder's receptive field.

Simplified: the influence is one kernel of relative offsets for all positions and codes. A decoder with attention or
group normalisation also changes slightly everywhere; the kernel then is wide and low at its ends.

Letters: `B` images, `N` tokens, `M` cells (rows x columns, so N less the prefix), `P` replaced tokens, `V` codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from consonar.errors import UserError
from consonar.float32 import exact
from consonar.records import to_device
from consonar.seeding import integers, permutation
from consonar.types import Grid, Tokenizer

FOLLOWS = 0.7
"""Correlation from which effects follow places; 0.94 or more of the package's tokenizers, on pictures of their kind."""
AT_ONCE = 32
"""Images decoded at once."""


def area_weights(source: int, target: int, device: torch.device) -> Tensor:
    """(target, source), rows sum to 1: how much of target interval i lies in source interval j, both over [0, 1]."""
    # In units of 1 / (source * target), where all borders are whole numbers.
    edges = torch.arange(target + 1, device=device)[:, None] * source
    borders = torch.arange(source + 1, device=device) * target
    return (torch.minimum(edges[1:], borders[1:]) - torch.maximum(edges[:-1], borders[:-1])).clamp_min(0) / source


def resize_to_grid(maps: Tensor, grid: Grid) -> Tensor:
    """(B, rows, columns) <- (B, h, w): the mean over each cell's area. The mean over all stays what it was.

    Average pooling where the places divide evenly; where a map is coarser than the grid, cells share its values.
    """
    tall, wide = (maps.shape[1], grid.rows), (maps.shape[2], grid.columns)
    tables = {size: area_weights(*size, maps.device).to(maps.dtype) for size in {tall, wide}}  # a square has one
    return tables[tall] @ maps @ tables[wide].T


def relative_offsets(grid: Grid) -> tuple[Tensor, Tensor]:
    """Row and column of the kernel's entry for cell j seen from cell i: two (M, M) int64."""
    cells = torch.arange(grid.rows * grid.columns)
    y, x = cells // grid.columns, cells % grid.columns
    return y[None] - y[:, None] + grid.rows - 1, x[None] - x[:, None] + grid.columns - 1


@dataclass(frozen=True)
class Influence:
    """Where the effect of replacing one token falls, by offset from the token's own cell (the centre of the arrays)."""

    kernel: Tensor
    """(2 * rows - 1, 2 * columns - 1) float32: mean share of the squared pixel change at each offset; sums to 1."""
    coverage: Tensor
    """Same shape, 0..1: share of the replaced tokens from which that offset lies inside the image."""
    follows: float = 1.0
    """How well effects follow places, see `followed`."""

    @property
    def about(self) -> tuple[str, ...]:
        """A line where effects do not follow places."""
        told = (
            "objective.credit 'token': what tokens change does not follow their places (correlation "
            f"{self.follows:.2f}), so they get the credit of others: they are not in raster order, or their decoder is "
            "not trained, or lets a token change the whole picture, as some do on blank grounds"
        )
        return () if self.follows >= FOLLOWS else (told,)

    def matrix(self, grid: Grid) -> Tensor:
        """W (M, M) float32: W[i, j] is the share of token i's effect that falls on cell j; rows sum to 1.

        A token at the border spreads its whole effect over the cells that exist: far offsets, which few of the replaced
        tokens could reach, count as often as near ones.
        """
        assert self.kernel.shape == (2 * grid.rows - 1, 2 * grid.columns - 1), "measured on another grid"
        density = torch.where(self.coverage > 0, self.kernel / self.coverage.clamp_min(1e-12), 0.0)
        weights = density[relative_offsets(grid)]  # (M, M)
        total = weights.sum(1, keepdim=True)
        assert (total > 0).all(), "a cell from which no effect was seen inside the image"
        return weights / total


def token_grid(tokenizer: Tokenizer) -> Grid:
    """The grid of a tokenizer whose tokens have a place; `UserError` for a 1D tokenizer."""
    if tokenizer.grid is None:
        raise UserError(
            f"objective.credit: 'token' needs tokens with a place; {tokenizer.name} is a 1D tokenizer; "
            "choices: sequence"
        )
    return tokenizer.grid


def followed(places: Tensor, shares: Tensor, grid: Grid) -> float:
    """Correlation of the rows of tokens at the cells `places` (P,) with those of the centres of their effects, `shares`
    (P, M) float64; that of the columns where it is lower; 1 for one cell, 0 where nothing varies."""
    cells, found = torch.arange(grid.rows * grid.columns), []
    for axis in (cells // grid.columns, cells % grid.columns):
        if axis.any():
            pair = torch.stack([axis[places].double(), shares @ axis.double()])
            found.append(float(torch.corrcoef(pair)[0, 1].nan_to_num()))
    return min(found, default=1.0)


@torch.no_grad()
def measure_influence(
    tokenizer: Tokenizer,
    tokens: Tensor,
    *,
    num_positions: int,
    rng: torch.Generator,
) -> Influence:
    """Replaces single tokens of real sequences `tokens` (B, N) by another random code and decodes: where does it show?

    At most `num_positions` places of each sequence are tried, drawn without repetition from `rng` (on the CPU). Every
    replacement counts the same, however much it changes.

    Raises `UserError` for a 1D tokenizer or a decoder that ignores its tokens.
    """
    grid = token_grid(tokenizer)
    num_cells = grid.rows * grid.columns
    sums, counts = (torch.zeros(2 * grid.rows - 1, 2 * grid.columns - 1, dtype=torch.float64) for _ in range(2))
    vertical, horizontal = relative_offsets(grid)
    tried: list[tuple[Tensor, Tensor]] = []
    for sequence in tokens:  # (N,)
        original = tokenizer.decode(sequence[None])  # (1, 3, H, W)
        replaced = permutation(rng, num_cells)[:num_positions]
        shifts = integers(rng, 1, tokenizer.vocab_size, len(replaced))  # not 0: to another code
        for cells, shift in zip(replaced.split(AT_ONCE), shifts.split(AT_ONCE), strict=True):
            places, shift = to_device(grid.prefix + cells, tokens.device), to_device(shift, tokens.device)
            others = (sequence[places] + shift) % tokenizer.vocab_size
            changed = sequence.repeat(len(cells), 1).scatter(1, places[:, None], others[:, None])  # (P, N)
            change = (tokenizer.decode(changed) - original).double().square().mean(1)  # (P, H, W)
            change = resize_to_grid(change, grid).flatten(1).cpu()  # (P, M)
            seen = change.sum(1) > 0  # a code may decode like another: it then says nothing about places
            place = (vertical[cells[seen]], horizontal[cells[seen]])
            shares = change[seen] / change[seen].sum(1, keepdim=True)
            sums.index_put_(place, shares, accumulate=True)
            tried.append((cells[seen], shares))
            counts.index_put_(place, torch.ones_like(change[seen]), accumulate=True)
    total = float(sums.sum())
    if total == 0:
        raise UserError(f"{tokenizer.name}: replacing tokens changes no pixel; there is no influence to measure")
    places, effects = (torch.cat(part) for part in zip(*tried, strict=True))
    return Influence((sums / total).float(), (counts / total).float(), followed(places, effects, grid))


def spatial_credit(maps: Tensor, influence: Tensor | None, grid: Grid) -> Tensor:
    """One reward for each token: (B, N) <- rewards of the cells (B, rows, columns).

    Without `influence`, an `Influence.matrix` (M, M), a token gets its own cell's reward, with it the mean over cells
    that it weighs.
    Prefix tokens have no place: they get the mean over all cells.
    """
    cells = maps.flatten(1)  # (B, M)
    assert cells.shape[1] == grid.rows * grid.columns
    prefix = cells.mean(1, keepdim=True).expand(-1, grid.prefix)
    if influence is not None:
        with exact(cells.device):  # bf16 would round away what sets cells apart
            cells = cells @ influence.to(cells.dtype).T
    return torch.cat([prefix, cells], 1)
