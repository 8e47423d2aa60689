"""Spatial credit in closed form on decoders whose influence is known, and on the tokenizer of the package."""

import pytest
import torch
from torch.nn import functional as F

from consonar.components import load_tokenizer
from consonar.errors import UserError
from consonar.training import credit
from consonar.training.credit import Influence, followed, measure_influence, resize_to_grid, spatial_credit, token_grid
from consonar.types import Grid

ALL = 99
"""Positions: more than any grid here has."""


class Painter:
    """A tokenizer whose tokens paint squares of 4 px in their own grey, blurred over the cells by `blur` (3, 3)."""

    name, vocab_size = "painter", 8

    def __init__(self, grid: Grid | None, blur: torch.Tensor | None = None):
        self.grid, self.blur, self.largest_batch = grid, blur, 0
        self.num_tokens = grid.num_tokens if grid else 6

    def decode(self, tokens):
        self.largest_batch = max(self.largest_batch, len(tokens))
        cells = (tokens[:, self.grid.prefix :] / 4.0 - 1).view(-1, 1, self.grid.rows, self.grid.columns)
        if self.blur is not None:
            cells = F.conv2d(cells, self.blur.view(1, 1, 3, 3), padding=1)
        return cells.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


def radius(influence: Influence, share: float = 0.9) -> int:
    """Smallest r such that the cells at most r rows and r columns away hold `share` (0..1) of the effect."""
    rows, columns = ((size - 1) // 2 for size in influence.kernel.shape)
    largest = max(rows, columns)
    for r in range(largest):
        square = influence.kernel[max(0, rows - r) : rows + r + 1, max(0, columns - r) : columns + r + 1]
        if float(square.double().sum()) >= share:
            return r
    return largest


def tokens_for(tokenizer, rng, count=2):
    return torch.randint(tokenizer.vocab_size, (count, tokenizer.num_tokens), generator=rng)


def test_resizing_in_closed_form():
    maps = torch.arange(16.0).view(1, 4, 4)
    assert resize_to_grid(maps, Grid(2, 2)).tolist() == F.adaptive_avg_pool2d(maps, 2).tolist()
    assert torch.equal(resize_to_grid(maps, Grid(4, 4)), maps)
    assert torch.equal(resize_to_grid(maps, Grid(8, 8))[0, ::2, 1::2], maps[0])  # finer cells repeat the value
    # Two places on three cells: the middle one lies half in each.
    assert resize_to_grid(torch.tensor([[[3.0, 9.0]]]), Grid(1, 3)).tolist() == [[[3.0, 6.0, 9.0]]]
    # Three places on two cells: a cell is one and a half places wide.
    torch.testing.assert_close(resize_to_grid(torch.tensor([[[3.0, 6, 9]]]), Grid(1, 2)), torch.tensor([[[4.0, 8.0]]]))


@pytest.mark.parametrize("size", [(64, 64), (5, 9), (3, 1), (7, 100)])
def test_resizing_keeps_the_mean(size, rng):
    maps = torch.rand(2, *size, generator=rng)
    torch.testing.assert_close(resize_to_grid(maps, Grid(6, 7)).mean((1, 2)), maps.mean((1, 2)))


@pytest.mark.parametrize("grid", [Grid(3, 4), Grid(3, 4, prefix=5)], ids=str)
def test_a_local_decoder_influences_its_own_cell_alone(grid, rng):
    tokenizer = Painter(grid)
    influence = measure_influence(tokenizer, tokens_for(tokenizer, rng), num_positions=ALL, rng=rng)
    expected = torch.zeros(5, 7)
    expected[2, 3] = 1
    assert torch.equal(influence.kernel, expected)
    assert torch.equal(influence.matrix(grid), torch.eye(12))
    assert radius(influence) == 0


def test_a_blur_is_measured(rng):
    """Squared weights, normalised: replacing a token changes cell i + d by blur[d] times the token's change."""
    blur = torch.tensor([[0.0, 1, 0], [2, 4, 2], [0, 1, 0]])  # symmetric: a convolution is a correlation
    grid = Grid(5, 6)
    tokenizer = Painter(grid, blur)
    influence = measure_influence(tokenizer, tokens_for(tokenizer, rng), num_positions=ALL, rng=rng)
    assert influence.kernel.sum().item() == pytest.approx(1)
    outside = influence.kernel.clone()
    outside[3:6, 4:7] = 0
    assert outside.abs().max() < 1e-6 and radius(influence, 0.95) == 1
    matrix = influence.matrix(grid)
    torch.testing.assert_close(matrix.sum(1), torch.ones(30))
    inner = matrix[2 * 6 + 3].view(5, 6)  # the token in row 2, column 3 loses nothing at the border
    # A token at the border gives its whole share to fewer cells, so that the mean share is a little off.
    torch.testing.assert_close(inner[1:4, 2:5], blur.square() / blur.square().sum(), atol=0.02, rtol=0)
    one_sided = torch.tensor([[0.0, 0, 0], [3, 4, 0], [0, 0, 0]])  # the cell to the right of a token, by correlation
    tokenizer = Painter(grid, one_sided)
    matrix = measure_influence(tokenizer, tokens_for(tokenizer, rng), num_positions=ALL, rng=rng).matrix(grid)
    torch.testing.assert_close(matrix[8, 8:10], torch.tensor([16 / 25, 9 / 25]), atol=0.06, rtol=0)
    assert matrix[8, 9] > 0.3 and matrix[8, [7, 2, 14]].abs().max() < 1e-6
    assert matrix[11, 11].item() == pytest.approx(1)  # the last column has no cell to its right


def test_far_offsets_count_as_often_as_near_ones():
    """A decoder that changes every cell alike: few tokens reach the far offsets, the matrix is flat nevertheless."""
    coverage = torch.tensor([[1.0, 2, 3, 2, 1]]) / 3  # 3 cells in a row, each replaced once
    influence = Influence(coverage / coverage.sum(), coverage)
    torch.testing.assert_close(influence.matrix(Grid(1, 3)), torch.full((3, 3), 1 / 3))


def test_radius_in_closed_form():
    kernel = torch.zeros(5, 9)
    kernel[2, 4], kernel[1, 4], kernel[2, 7] = 0.5, 0.3, 0.2
    influence = Influence(kernel, torch.ones(5, 9))
    assert [radius(influence, share) for share in (0.4, 0.6, 0.8, 0.9, 1.0)] == [0, 1, 1, 3, 3]


def test_positions_and_the_generator_decide_what_is_replaced(monkeypatch):
    tokenizer = Painter(Grid(4, 4), torch.tensor([[0.0, 1, 0], [1, 4, 1], [0, 1, 0]]))
    tokens = tokens_for(tokenizer, torch.Generator().manual_seed(5), count=3)

    def measure(seed, num_positions=16):
        rng = torch.Generator().manual_seed(seed)
        return measure_influence(tokenizer, tokens, num_positions=num_positions, rng=rng)

    some = measure(0, num_positions=2)
    assert torch.equal(some.kernel, measure(0, num_positions=2).kernel)
    assert not torch.equal(some.kernel, measure(1, num_positions=2).kernel)
    assert torch.equal(measure(0, num_positions=99).kernel, measure(0).kernel)  # there are 16
    everywhere = torch.tensor([1.0, 2, 3, 4, 3, 2, 1]) / 4
    torch.testing.assert_close(measure(0).coverage, everywhere[:, None] * everywhere)
    assert tokenizer.largest_batch == 16
    whole, tokenizer.largest_batch = measure(0), 0
    monkeypatch.setattr(credit, "AT_ONCE", 5)
    torch.testing.assert_close(measure(0).kernel, whole.kernel)
    assert tokenizer.largest_batch == 5


def test_credit_in_closed_form():
    maps = torch.arange(12.0).view(2, 2, 3)
    assert torch.equal(spatial_credit(maps, None, Grid(2, 3)), maps.flatten(1))
    with_prefix = spatial_credit(maps, None, Grid(2, 3, prefix=2))
    assert with_prefix.tolist() == [[2.5, 2.5, 0, 1, 2, 3, 4, 5], [8.5, 8.5, 6, 7, 8, 9, 10, 11]]
    kernel = torch.zeros(3, 5)
    kernel[1, 2], kernel[1, 3] = 0.75, 0.25  # its own cell, and the one to the right
    influence = Influence(kernel, torch.ones(3, 5))
    smoothed = spatial_credit(maps, influence.matrix(Grid(2, 3)), Grid(2, 3, prefix=1))
    torch.testing.assert_close(smoothed[0], torch.tensor([2.5, 0.25, 1.25, 2, 3.25, 4.25, 5]))
    below = torch.zeros(3, 5)
    below[2, 2] = below[1, 2] = 0.5
    smoothed = spatial_credit(maps, Influence(below, torch.ones(3, 5)).matrix(Grid(2, 3)), Grid(2, 3))
    torch.testing.assert_close(smoothed[0], torch.tensor([1.5, 2.5, 3.5, 3, 4, 5]))


@pytest.mark.parametrize(
    ("order", "lowest", "highest"),
    [("raster", 1, 1), ("columns", -0.1, 0.1), ("snake", -0.3, 0.3), ("reversed", -1, -1)],
)
@pytest.mark.parametrize("grid", [Grid(4, 4), Grid(6, 6, prefix=2)], ids=str)
def test_tokens_in_another_order_are_told(order, lowest, highest, grid, rng):
    cells = torch.arange(grid.rows * grid.columns).view(grid.rows, grid.columns)
    snake = torch.stack([row.flip(0) if i % 2 else row for i, row in enumerate(cells)])
    moved = {"raster": cells, "columns": cells.T, "snake": snake, "reversed": cells.flip(0, 1)}[order].flatten()
    tokenizer = Painter(grid)
    decode, place = tokenizer.decode, torch.cat([torch.arange(grid.prefix), grid.prefix + moved])
    tokenizer.decode = lambda tokens: decode(tokens[:, place])
    found = measure_influence(tokenizer, tokens_for(tokenizer, rng), num_positions=ALL, rng=rng)
    assert lowest - 1e-6 <= found.follows <= highest + 1e-6
    assert ["not follow their places (correlation" in line for line in found.about] == [True] * (order != "raster")


def test_what_follows_in_closed_form():
    assert followed(torch.tensor([0]), torch.ones(1, 1), Grid(1, 1)) == 1
    assert followed(torch.arange(3), torch.eye(3).double(), Grid(1, 3)) == pytest.approx(1)
    assert followed(torch.arange(4), torch.full((4, 4), 0.25).double(), Grid(2, 2)) == 0  # the same everywhere


def test_equal_cells_stay_equal_under_smoothing(rng):
    kernel = torch.rand(7, 5, generator=rng)
    influence = Influence(kernel / kernel.sum(), torch.rand(7, 5, generator=rng) + 0.1).matrix(Grid(4, 3))
    credit = spatial_credit(torch.full((1, 4, 3), -2.5), influence, Grid(4, 3, prefix=2))
    torch.testing.assert_close(credit, torch.full((1, 14), -2.5))
    maps = torch.rand(2, 4, 3, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        low = spatial_credit(maps, influence, Grid(4, 3))
    assert torch.equal(low, spatial_credit(maps, influence, Grid(4, 3)))


def test_what_cannot_be_measured_is_refused(rng):
    one_dimensional = Painter(None)
    measure = lambda model: measure_influence(model, tokens_for(model, rng), num_positions=ALL, rng=rng)  # noqa: E731
    for call in (token_grid, measure):
        with pytest.raises(
            UserError, match=r"^objective\.credit: 'token' .*painter is a 1D tokenizer; choices: seq"
        ) as e:
            call(one_dimensional)
        assert "\n" not in str(e.value)
    deaf = Painter(Grid(2, 2), torch.zeros(3, 3))
    with pytest.raises(UserError, match="painter: replacing tokens changes no pixel"):
        measure(deaf)


def test_a_token_of_the_shipped_tokenizer_shows_near_its_own_cell(rng):
    tokenizer = load_tokenizer("openmoji-64")
    blocks = torch.rand(3, 3, 4, 4, generator=rng) * 2 - 1
    tokens = tokenizer.encode(blocks.repeat_interleave(16, 2).repeat_interleave(16, 3))
    influence = measure_influence(tokenizer, tokens, num_positions=12, rng=rng)
    centre = tokenizer.grid.rows - 1
    assert influence.follows > 0.9 and not influence.about
    kernel = influence.kernel
    assert kernel.sum().item() == pytest.approx(1)
    assert kernel.argmax() == centre * kernel.shape[1] + centre
    near = float(kernel[centre - 1 : centre + 2, centre - 1 : centre + 2].sum())
    assert near > 0.5  # an even spread would put at most 9 / 64 there
    assert 1 <= radius(influence, 0.5) <= radius(influence, 0.9) <= 4
    assert (influence.matrix(tokenizer.grid).argmax(1) == torch.arange(64)).all()
