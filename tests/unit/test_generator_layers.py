import math

import pytest
import torch
from rounding import assert_rounding
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from consonar.attention import CausalAttention, KVCache, attention_mask, rotate
from consonar.cpu import kernels
from consonar.cpu.kernels import Attention
from consonar.generators.rear import modulate
from consonar.generators.rotary import RMSNorm, SwiGLU, rotary_table, swiglu_width
from consonar.types import Grid

CPU = torch.device("cpu")


def test_rms_norm_is_its_formula(rng):
    x, norm = torch.randn(2, 5, 8, generator=rng), RMSNorm(8, eps=0.1)
    nn.init.normal_(norm.weight, generator=rng)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_of_half_precision_is_calculated_in_float32(rng):
    """In bfloat16 the mean square of 4096 entries would be off by percents; the weight applies after the cast."""
    x, norm = (256 + torch.randn(4096, generator=rng)).bfloat16(), RMSNorm(4096).bfloat16()
    assert torch.equal(norm(x), (x.float() / x.float().square().mean().sqrt()).bfloat16())
    nn.init.constant_(norm.weight, 3.0)
    assert torch.equal(norm(x), (x.float() / x.float().square().mean().sqrt()).bfloat16() * 3)


def test_swiglu_is_its_formula(rng):
    x, layer = torch.randn(4, 8, generator=rng), SwiGLU(8, 12, dropout=0.0)
    up, gate, down = layer.w3.weight, layer.w1.weight, layer.w2.weight
    torch.testing.assert_close(layer(x), F.silu(x @ gate.T) * (x @ up.T) @ down.T)


@pytest.mark.parametrize(
    ("width", "hidden"), [(768, 2048), (1024, 2816), (1280, 3584), (1536, 4096), (2560, 6912), (3200, 8704)]
)
def test_swiglu_widths_are_the_published_ones(width, hidden):
    assert swiglu_width(width, 256) == hidden


def test_swiglu_width_is_rounded_up_only_where_needed():
    assert [swiglu_width(width, 16) for width in (24, 25, 6)] == [64, 80, 16]


def test_rotation_turns_neighbouring_pairs():
    table = torch.tensor([[[0.0, 1.0], [math.cos(0.5), math.sin(0.5)]]])  # a quarter turn, then 0.5
    turned = rotate(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), table)
    torch.testing.assert_close(turned, torch.tensor([[-2.0, 1.0, 3 * math.cos(0.5), 3 * math.sin(0.5)]]))


def test_rotation_keeps_the_type_and_rounds_once(rng):
    x, table = torch.randn(2, 3, 6, 8, generator=rng), rotary_table(8, 0, 6, None, 10000.0, CPU)
    turned = rotate(x.bfloat16(), table)
    assert turned.dtype == torch.bfloat16 and torch.equal(turned, rotate(x.bfloat16().float(), table).bfloat16())
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))


def test_condition_rows_are_zero_and_line_positions_count_from_zero():
    table = rotary_table(8, 3, 5, None, 100.0, CPU)
    assert table.shape == (8, 4, 2) and table[:3].abs().sum() == 0
    angles = torch.arange(5.0)[:, None] * 100.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(table[3:], torch.stack([angles.cos(), angles.sin()], -1))


def test_grid_positions_are_rows_then_columns():
    """The first half of the pairs turns with the row, the second with the column; both start behind the prefix."""
    table = rotary_table(8, 1, 3 + 2 * 4, Grid(2, 4, prefix=3), 100.0, CPU)
    line = rotary_table(8, 0, 3, None, 100.0, CPU)
    assert torch.equal(table[1:4], line)
    frequencies = 100.0 ** (-torch.arange(2) / 2)
    for row in range(2):
        for column in range(4):
            angles = torch.cat([(3 + row) * frequencies, (3 + column) * frequencies])
            expected = torch.stack([angles.cos(), angles.sin()], -1)
            torch.testing.assert_close(table[4 + 4 * row + column], expected)


def test_scores_on_a_grid_depend_on_the_distance_alone(rng):
    table = rotary_table(8, 0, 30, Grid(5, 6), 10000.0, CPU).view(5, 6, 4, 2)
    q, k = torch.randn(2, 8, generator=rng)

    def score(a, b) -> float:
        return float(rotate(q[None], table[a][None]) @ rotate(k[None], table[b][None]).T)

    assert score((1, 1), (3, 2)) == pytest.approx(score((2, 4), (4, 5)), abs=1e-5)
    assert score((1, 1), (3, 2)) != pytest.approx(score((1, 1), (2, 3)), abs=1e-3)


def test_a_table_made_while_sampling_serves_training(rng):
    with torch.inference_mode():
        table = rotary_table(12, 1, 7, None, 54321.0, CPU)
    x = torch.randn(8, 12, generator=rng, requires_grad=True)
    (rotate(x, table)[1:] ** 2).sum().backward()
    assert x.grad[0].abs().sum() == 0 and x.grad[1:].abs().sum() > 0
    assert rotary_table(12, 1, 7, None, 54321.0, CPU) is table  # made once


KEPT = torch.tensor([[False, True], [True, True], [False, False]])


def test_the_mask_hides_padding_from_everybody_but_itself():
    mask = attention_mask(4, KEPT, None, CPU)
    assert mask.shape == (3, 1, 4, 4)
    for row in range(3):
        for query in range(4):
            for key in range(4):
                readable = key <= query and (key >= 2 or bool(KEPT[row, key]))
                assert bool(mask[row, 0, query, key]) == (readable or key == query)


@pytest.mark.parametrize("kept", [None, KEPT])
@pytest.mark.parametrize("num_queries", [1, 3, 5])
def test_a_cached_mask_is_the_last_rows_of_the_whole(kept, num_queries):
    mask = attention_mask(num_queries, kept, KVCache(torch.empty(0), 5 - num_queries), CPU)
    whole = attention_mask(5, KEPT if kept is not None else torch.ones(3, 2).bool(), None, CPU)
    if mask is None:  # the last position reads everything
        assert kept is None and num_queries == 1
        mask = torch.ones(1, 5).bool()
    assert torch.equal(mask.expand(3, 1, num_queries, 5), whole[:, :, -num_queries:])


def test_nothing_is_masked_where_attention_is_plainly_causal():
    assert attention_mask(5, None, None, CPU) is None


@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
@torch.inference_mode()
def test_attention_through_the_cache_equals_attention_without(num_key_heads, rng):
    q = torch.randn(3, 4, 6, 8, generator=rng)
    k, v = torch.randn(2, 3, num_key_heads, 6, 8, generator=rng)
    whole = CausalAttention()(q, k, v, mask=None, cache=None, layer=0, dropout=0.0)
    repeated = [x.repeat_interleave(4 // num_key_heads, 1) for x in (k, v)]
    expected = F.scaled_dot_product_attention(q, *repeated, is_causal=True).transpose(1, 2).flatten(2)
    assert_rounding(whole, expected, 64)
    cache, start = KVCache(torch.zeros(1, 2, 3, num_key_heads, 6, 8)), 0
    for piece in (2, 1, 3):
        new = slice(start, start + piece)
        mask = attention_mask(piece, None, cache, CPU)
        mixed = CausalAttention()(
            q[:, :, new], k[:, :, new], v[:, :, new], mask=mask, cache=cache, layer=0, dropout=0.0
        )
        assert_rounding(mixed, whole[:, new], 64)
        cache.advance(piece)
        start += piece


class FromKeys(TorchDispatchMode):
    """How many numbers the largest tensor has that an operation made of one of these."""

    def __init__(self, *keys: torch.Tensor) -> None:
        super().__init__()
        self.stores, self.largest = {key.untyped_storage().data_ptr() for key in keys}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        stores = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in made if isinstance(made, tuple) else (made,):
            if stores & self.stores and isinstance(x, torch.Tensor):
                known = x.untyped_storage().data_ptr() in self.stores
                self.largest = max(self.largest, 0 if known else x.numel())
        return made


@pytest.mark.parametrize("attend", [CausalAttention(), Attention()], ids=["fused", "plain"])
@pytest.mark.parametrize("padded", [None, (2, 0, 1)], ids=["whole", "padded"])
@pytest.mark.parametrize("num_key_heads", [1, 2])
def test_heads_that_share_keys_read_them_without_copies(attend, padded, num_key_heads, rng, monkeypatch):
    """The numbers and gradients of repeated keys, of which there are none, with padding and without."""
    monkeypatch.setattr(kernels, "prefers_plain_attention", lambda *_: True)
    q = torch.randn(3, 4, 6, 8, generator=rng, requires_grad=True)
    k, v = (torch.randn(3, num_key_heads, 6, 8, generator=rng, requires_grad=True) for _ in range(2))
    kept = None if padded is None else torch.arange(3) >= torch.tensor(padded)[:, None]
    mask = attention_mask(6, kept, None, CPU)
    with FromKeys(k, v) as made:
        mixed = attend(q, k, v, mask=mask, cache=None, layer=0, dropout=0.0)
    assert 0 < made.largest <= k.numel()
    mixed.square().sum().backward()
    found = [x.grad for x in (q, k, v)]
    repeated = (x.repeat_interleave(4 // num_key_heads, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, *repeated, attn_mask=mask, is_causal=mask is None)
    assert_rounding(mixed, expected.transpose(1, 2).flatten(2), 64)
    for ours, theirs in zip(found, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        assert_rounding(ours, theirs, 256)


def test_dropout_acts_on_attention_weights(rng):
    q, k = torch.randn(2, 1, 1, 6, 4, generator=rng)
    mask, ones = attention_mask(6, torch.ones(1, 1).bool(), None, CPU), torch.ones(1, 1, 6, 4)
    for given in (None, mask):
        kept = CausalAttention()(q, k, ones, mask=given, cache=None, layer=0, dropout=0.0)
        torch.testing.assert_close(kept, torch.ones(1, 6, 4))
        dropped = CausalAttention()(q, k, ones, mask=given, cache=None, layer=0, dropout=0.5)
        assert not torch.isclose(dropped, kept).all()


def test_modulation_is_its_formula_with_its_gradient(rng):
    x, shift, scale = (torch.randn(2, 3, 4, generator=rng, dtype=torch.float64, requires_grad=True) for _ in range(3))
    torch.testing.assert_close(modulate(x, shift, scale), x * (1 + scale) + shift)
    assert torch.autograd.gradcheck(modulate, (x, shift, scale))


def test_modulation_under_autocast_is_in_the_type_of_the_projections_and_keeps_their_gradients(rng):
    x, shift, scale = (torch.randn(2, 3, 4, generator=rng) for _ in range(3))
    given = [x.requires_grad_(), shift.bfloat16().requires_grad_(), scale.bfloat16().requires_grad_()]
    result = modulate(*given)
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    assert [part.grad.dtype for part in given] == [torch.float32, torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(x.grad, 1 + given[2].detach().float(), rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(given[2].grad, x.detach().bfloat16())
