"""Products and attention in PyTorch's way and in ours: the same numbers up to rounding, whichever was chosen."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rounding import assert_rounding
from torch import nn
from torch.nn import functional as F

from consonar import cpu
from consonar.cpu import kernels, timing
from consonar.cpu.kernels import Attention, Dropout, Linear, drop, nearest_power_of_two, tune
from consonar.generators.rear import ReARGenerator
from consonar.sampling.sample import SamplerConfig, sample_tokens


def test_a_tuned_generator_is_the_same_model_with_layers_that_choose(tiny_generator):
    """Twice is once; copies keep it."""
    plain = ReARGenerator(tiny_generator().config)
    before = {key: value.data_ptr() for key, value in plain.state_dict().items()}
    kinds = [type(layer) for layer in plain.modules()]
    assert set(kernels.TUNED) <= set(kinds)
    tuned = copy.deepcopy(tune(tune(plain)))
    assert {key: value.data_ptr() for key, value in plain.state_dict().items()} == before
    assert [type(layer) for layer in tuned.modules()] == [kernels.TUNED.get(kind, kind) for kind in kinds]


def test_one_variable_turns_all_of_it_off(monkeypatch):
    """What is not timed; the rest: `test_the_environment_overrides_and_wrong_words_are_refused`."""
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: done.append("kept"))
    monkeypatch.setattr(cpu, "ask_for_huge_pages", lambda: done.append("huge"))
    for mode in ("pytorch", "ours", "measured"):
        monkeypatch.setenv("CONSONAR_KERNELS", mode)
        network, done = nn.Sequential(nn.ReLU6()), []
        kernels.spare_copies(network)
        cpu.hold_memory()
        plain = kernels.channels_last(torch.rand(2, 3, 4, 5)).is_contiguous()
        assert (plain, network[0].inplace, len(done)) == ((True, False, 0) if mode == "pytorch" else (False, True, 2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 512), (4, 4, 512), (2, 3, 3, 512), (1, 512)])
@pytest.mark.parametrize("ours", [True, False])
def test_products_are_products_either_way(bias, shape, ours, rng):
    """Also of strided inputs; under gradients always PyTorch's."""
    linear, x = Linear(512, 256, bias), torch.randn(shape, generator=rng)
    nn.init.normal_(linear.weight, generator=rng)
    strided = torch.stack([x, x], -1)[..., 0]
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None).float()
    with timing.forced("linear", ours):
        with torch.inference_mode():
            for given in (x, strided):
                assert_rounding(linear(given), expected, 512)
            product = kernels.onednn_linear if ours else F.linear
            assert torch.equal(linear(x), product(x, linear.weight, linear.bias))
        assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias)) and linear(x).requires_grad


@torch.inference_mode()
def test_small_half_precision_and_autocast_products_are_pytorchs(rng):
    linear = Linear(1024, 1024)
    with timing.forced("linear", True):
        for x in (torch.randn(0, 1024), torch.randn(3, 1024, generator=rng).bfloat16()):
            assert torch.equal(linear.to(x.dtype)(x), F.linear(x, linear.weight, linear.bias))
        linear.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(torch.randn(3, 1024, generator=rng)).dtype == torch.bfloat16
        small, x = Linear(8, 8), torch.randn(3, 8, generator=rng)
        assert torch.equal(small(x), F.linear(x, small.weight, small.bias))


ORDERED = {"rows": 4, "tokens": kernels.FEWEST_TOKENS}


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_weights_in_another_order_are_the_same_weights_for_as_long_as_a_batch_is_drawn(bias, rng):
    linear, x = Linear(512, 256, bias), torch.randn(4, 1, 512, generator=rng)
    nn.init.normal_(linear.weight, generator=rng)
    with timing.forced("linear", True):
        before, keys = linear(x), list(linear.state_dict())
        with pytest.raises(RuntimeError, match="ends"), kernels.ordered_weights(linear, *ORDERED.values()):
            assert linear.ordered is not None and list(linear.state_dict()) == keys
            for given in (x, x[:1], x.expand(4, 3, 512)):
                assert_rounding(linear(given), before[: len(given)].expand(*given.shape[:2], 256), 512)
            assert_rounding(linear.double()(x.double()).float(), before, 512)  # no product of oneDNN's
            raise RuntimeError("ends")
        linear.float().weight.mul_(2)
        assert linear.ordered is None and not torch.equal(linear(x), before)


@pytest.mark.parametrize("reason", ["slower", "few tokens", "small", "bf16", "autocast", "no module", "memory"])
@torch.inference_mode()
def test_weights_keep_their_order_where_another_does_not_pay(reason, monkeypatch):
    linear = Linear(8, 8) if reason == "small" else Linear(512, 256)
    linear = linear.bfloat16() if reason == "bf16" else linear
    monkeypatch.setattr(kernels, "bytes_of_machine", lambda: 8 * linear.weight.nbytes - (reason == "memory"))
    given = {**ORDERED, "tokens": kernels.FEWEST_TOKENS - (reason == "few tokens")}.values()
    with (
        timing.forced("linear", reason != "slower"), torch.autocast("cpu", enabled=reason == "autocast"),
        kernels.ordered_weights([linear] if reason == "no module" else linear, *given),
    ):  # fmt: skip
        assert linear.ordered is None


def test_a_sampler_orders_the_weights_for_its_batch(tiny_generator, monkeypatch):
    model, seen = tiny_generator(num_tokens=kernels.FEWEST_TOKENS), []
    monkeypatch.setattr(kernels, "SMALLEST_WEIGHT", 2**10)
    condition, greedy = torch.arange(3), SamplerConfig(temperature=0.0, guidance_scale=2.0)
    expected, _ = sample_tokens(model, condition, range(3), greedy)
    order = kernels.onednn_order
    monkeypatch.setattr(kernels, "onednn_order", lambda weight, rows: (seen.append(rows), order(weight, rows))[1])
    with timing.forced("linear", True):
        drawn, _ = sample_tokens(model, condition, range(3), greedy)
    assert set(seen) == {6} and (drawn == expected).float().mean() > 0.9
    assert all(layer.ordered is None for layer in model.modules() if isinstance(layer, Linear))


def test_causal_attention_is_the_same_either_way_with_its_gradients(rng):
    results = []
    for ours in (True, False):
        q, k, v = (torch.randn(2, 3, 10, 8, generator=rng.manual_seed(i)).requires_grad_() for i in range(3))
        with timing.forced("attention", ours):
            mixed = Attention().unmasked(q, k, v, 0.0)
        mixed.square().sum().backward()
        results.append((mixed.detach(), q.grad, k.grad, v.grad))
    for one, other in zip(*results, strict=True):
        assert_rounding(one, other, 100)


@pytest.mark.parametrize("ours", [True, False])
def test_dropout_zeroes_and_scales_attention_weights(ours, rng):
    """The values are the identity, so that what comes out are the weights."""
    q = torch.randn(8, 2, 64, 64, generator=rng, requires_grad=True)
    values = torch.eye(64).expand_as(q)
    torch.manual_seed(0)
    with timing.forced("attention", ours):
        dropped, whole = Attention().unmasked(q, q, values, 0.25), Attention().unmasked(q, q, values, 0.0)
    kept = dropped != 0
    assert_rounding(dropped[kept], whole[kept] / 0.75, 100)
    lower = torch.ones(64, 64, dtype=torch.bool).tril().expand_as(kept)
    assert not kept[~lower].any() and kept[lower].float().mean() == pytest.approx(0.75, abs=0.02)
    assert torch.autograd.grad(dropped.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 1 - 1e-6])
def test_dropout_keeps_the_mean_and_its_share(p, ours):
    torch.manual_seed(0)
    x = torch.ones(999, 1001).T.requires_grad_()
    with timing.forced("dropout", ours):
        dropped = drop(x, p)
        dropped.sum().backward()
    assert torch.equal(x.grad, dropped) and dropped.shape == x.shape
    assert (dropped == 0).float().mean() == pytest.approx(p, abs=4e-3)
    kept = dropped[dropped != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-4, atol=0)  # p is a multiple of 2^-16


def test_dropout_rests_in_evaluation_and_is_random_in_both_halves_of_a_word():
    layer, x = Dropout(0.5), torch.ones(4, 100_000, dtype=torch.bfloat16)
    assert layer.eval()(x) is x and Dropout(0.0)(x) is x
    torch.manual_seed(0)
    with timing.forced("dropout", True):
        zero = (layer.train()(x) == 0).view(-1, 4).float()
        assert not torch.equal(layer(x), layer(x))
    assert (zero.mean(0) - 0.5).abs().max() < 0.01  # each of the four numbers drawn with one word
    assert (torch.corrcoef(zero.T) - torch.eye(4)).abs().max() < 0.02


def test_the_choice_is_asked_in_training_alone_and_by_rounded_sizes(rng, monkeypatch):
    asked = []
    monkeypatch.setattr(kernels.timing, "ours", lambda choice, ways: asked.append(choice))
    q = torch.randn(1, 2, 66, 8, generator=rng)
    with torch.no_grad():
        Attention().unmasked(q, q, q, 0.0)
    assert not asked
    Attention().unmasked(q, q, q, 0.0)
    Attention().unmasked(q, q, q, 0.1)
    with torch.inference_mode():
        Linear(256, 300)(torch.randn(5, 3, 256))
        kernels.prefers_order(15, 300, 256)
    assert asked == [
        "attention, 64 positions of 8 in float32",
        "attention, 64 positions of 8 in float32, with dropout",
        "linear, 16 rows, weights of 2^16",
        "linear, 16 rows, weights of 2^16",
        "linear, ordered, 16 rows, weights of 2^16",
    ]
    assert [nearest_power_of_two(n) for n in (1, 2, 3, 66, 95, 96, 258, 1026)] == [1, 2, 4, 64, 64, 128, 256, 1024]


@pytest.mark.parametrize("make", ["linear", "linear, ordered", "attention", "attention with dropout"])
def test_both_ways_run_when_they_are_timed(make):
    state, dropout = torch.get_rng_state(), 0.1 if "dropout" in make else 0.0
    if make.startswith("linear"):
        ways = kernels.linear_ways(2, 64, 32, ordered="ordered" in make)
    else:
        ways = kernels.attention_ways(8, 4, torch.bfloat16, dropout)
    with torch.inference_mode():
        for way in ways:
            way()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_first_asked_in_a_checkpointed_block_is_measured_there(tmp_path: Path) -> None:
    """It asked for itself again, behind its own lock, for ever; hence a process of its own."""
    script = """
import torch
from torch.utils.checkpoint import checkpoint
from consonar.cpu.kernels import prefers_plain_attention
asked = []
def block(x):
    asked.append(prefers_plain_attention(16, 8, torch.float32))
    return x.sin()
x = torch.ones(3, requires_grad=True)
checkpoint(block, x, use_reentrant=False).sum().backward()
print(len(asked), len(set(asked)))
"""
    settings = os.environ | {"CONSONAR_CACHE": str(tmp_path), "CONSONAR_KERNELS": "measured"}
    ran = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, timeout=100)
    assert ran.stdout.split() == ["2", "1"], ran.stderr
    answers = [path.read_text() for path in tmp_path.glob("kernels*.json")]  # on a busy machine of another name
    assert len(answers) == 1 and "attention, 16 positions of 8 in float32" in answers[0]
