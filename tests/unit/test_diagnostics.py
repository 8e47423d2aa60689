"""Diagnostics on cases whose answer is known: generators that know the truth or count, decoders of plain cells."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import picture
from scipy.stats import spearmanr

from consonar.data.bad_images import BadImages
from consonar.data.sources import Stream
from consonar.diagnostics import codes, context, decoding, exposure, forcing, layers, statistics
from consonar.diagnostics.diagnose import PARTS, Diagnosis
from consonar.diagnostics.findings import Curve, Figure, Finding, HeatMap, Interval, exactly
from consonar.diagnostics.pictures import choose
from consonar.diagnostics.subject import DiagnosisSettings, Pictures, Subject
from consonar.errors import BadImage
from consonar.metrics.pixels import LARGEST_PSNR
from consonar.report.diagnosis import heat_map
from consonar.sampling.sample import SamplerConfig
from consonar.seeding import generator as seeded
from consonar.seeding import spread
from consonar.types import Grid, ImageRecord

SIDE, CODES, COUNT = 4, 16, 12
LENGTH = SIDE * SIDE


class Cells:
    """A decoder of plain cells of 4 px: a token is the grey of its cell, and `spill` of it is added on its right.

    Code k of 16 has the grey k / 16 (less with spill, to stay in range) and the vector (1, k)."""

    name, fingerprint, vocab_size, num_tokens, code_dim, image_size = "cells", "0", CODES, LENGTH, 2, 4 * SIDE
    grid: Grid | None = Grid(SIDE, SIDE)

    def __init__(self, spill: float = 0.0) -> None:
        self.spill = spill

    def embed(self, tokens):
        return torch.stack([torch.ones_like(tokens), tokens], -1).float()

    def decode(self, tokens):
        grey = (tokens.float() / CODES / (1 + self.spill)).view(-1, 1, SIDE, SIDE)
        spilt = grey.clone()
        spilt[..., 1:] += self.spill * grey[..., :-1]
        return spilt.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


class Memory:
    """What a toy generator has read."""

    def __init__(self) -> None:
        self.tokens: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.tokens is None else self.tokens.shape[1]


class Toy:
    """A generator that is sure: `guess(tokens before (B, i), classes (B,))` is its next token, (B,)."""

    vocab_size, num_tokens, num_classes, num_layers, width, prefix_length, origin = CODES, LENGTH, COUNT, 2, 3, 1, None

    def __init__(self, guess) -> None:
        self.guess = guess

    def __call__(self, context, condition, *, cache=None, tap_layers=()):
        if cache is not None:
            cache.tokens = context if cache.tokens is None else torch.cat([cache.tokens, context], 1)
            guesses = self.guess(cache.tokens, condition)[:, None]
        else:
            guesses = torch.stack([self.guess(context[:, :i], condition) for i in range(context.shape[1])], 1)
        return 60.0 * torch.nn.functional.one_hot(guesses, CODES).float(), {}

    def new_cache(self, batch_size):
        return Memory()

    def null_condition(self, condition):
        return condition


@dataclass
class Squared:
    name: str = "squared"
    weights_sha256: str = "0"

    def __call__(self, images, originals):
        return (images - originals).square().flatten(1).mean(1)


@dataclass
class Corners:
    """Features: the greys of all cells."""

    name: str = "corners"
    weights_sha256: str = "0"
    num_features: int = LENGTH

    def __call__(self, images):
        return images[:, 0, ::4, ::4].flatten(1)


COUNTED = (torch.arange(LENGTH) + torch.arange(COUNT)[:, None]) % CODES
"""Picture b counts up from b."""


def subject_of(guess=None, tokens=COUNTED, tokenizer=None, **changes) -> Subject:
    tokenizer = tokenizer or Cells()
    settings = DiagnosisSettings(num_images=len(tokens), batch_size=5, **changes)
    images = np.asarray(
        ((tokenizer.decode(tokens) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    )
    pictures = Pictures("counted", images, tokens, torch.arange(len(tokens)))
    model = Toy(guess) if guess else None
    return Subject(tokenizer, pictures, settings, Squared(), Corners(), model, pictures, pictures)


def knows(tokens, classes):
    """The next token of the counted picture of this class."""
    return COUNTED[classes, tokens.shape[1]]


def counts(tokens, classes):
    """One more than the last token; 15 at the start, which is wrong for all pictures."""
    return (tokens[:, -1] + 1) % CODES if tokens.shape[1] else torch.full((len(tokens),), 15)


def near(interval: Interval, value: float, rel: float = 1e-6) -> bool:
    return interval.value == pytest.approx(value, rel=rel, abs=1e-9)


def test_given_tokens_stay_and_the_others_follow_from_all_before_them() -> None:
    keep = torch.zeros(COUNT, LENGTH, dtype=torch.bool)
    keep[:, 5] = True
    found = forcing.completed(subject_of(counts), keep[None])[0]
    assert torch.equal(found[:, 5:], COUNTED[:, 5:])
    assert torch.equal(found[:, :5], ((torch.arange(5) + 15) % CODES).expand(COUNT, 5))


def test_draws_under_true_context_err_once_where_free_ones_err_for_long() -> None:
    drawn = forcing.forced_draws(subject_of(counts))
    assert torch.equal(drawn[:, 1:], COUNTED[:, 1:]) and bool((drawn[:, 0] == 15).all())


def test_guidance_reaches_every_position_with_its_own_scale() -> None:
    class Shifted(Toy):
        def __call__(self, context, condition, *, cache=None, tap_layers=()):
            logits = torch.zeros(*context.shape, CODES)
            logits[..., 0] = condition[:, None].float()
            return logits, {}

        def null_condition(self, condition):
            return torch.zeros_like(condition)

    sampler = SamplerConfig(guidance_scale=3, guidance_schedule="linear")
    logits = forcing.forced_logits(Shifted(counts), COUNTED, torch.arange(COUNT), sampler)
    scales = torch.tensor([sampler.scale(i, LENGTH) for i in range(LENGTH)])
    torch.testing.assert_close(logits[..., 0], torch.arange(COUNT)[:, None] * scales)


@pytest.mark.parametrize("ratio", exposure.RATIOS)
def test_both_protocols_give_as_many_true_tokens(ratio: float) -> None:
    order = torch.rand(7, 50, generator=seeded(0, "order")).argsort(1).argsort(1)
    prefix, interleaved = (exposure.true_positions(name, ratio, order) for name in ("prefix", "interleaved"))
    assert prefix.sum(1).tolist() == interleaved.sum(1).tolist() == [round(ratio * 50)] * 7
    assert not (prefix[:, 1:] & ~prefix[:, :-1]).any()
    assert ratio in (0, 1) or not torch.equal(prefix, interleaved)


def test_a_generator_that_knows_the_truth_has_no_exposure_bias() -> None:
    found = exposure.exposure_bias(subject_of(knows))
    assert all(tuple(interval) == (0, 0, 0) for interval in found.numbers.values())
    assert all(y.value == 0 for curve in found.figures[0].curves for y in curve.y)
    assert {x for curve in found.figures[0].curves for x in curve.x} == {1.0}
    assert {y.value for curve in found.figures[1].curves for y in curve.y} == {LARGEST_PSNR}


def test_exposure_bias_of_a_counter_is_what_its_first_error_costs() -> None:
    """Any true prefix puts it right; interleaved it is wrong up to the first true token."""
    subject = subject_of(counts)
    found = exposure.exposure_bias(subject).numbers
    order = torch.rand(COUNT, LENGTH, generator=seeded(0, "diagnosis", "interleaved")).argsort(1).argsort(1)
    for ratio in exposure.RATIOS[1:]:
        keep = exposure.true_positions("interleaved", ratio, order)
        started = keep.cumsum(1) > 0
        wrong = torch.where(started, COUNTED, (torch.arange(LENGTH) + 15) % CODES)
        expected = subject.compare(subject.decode(wrong), subject.decode(COUNTED))[0].mean()
        assert expected > 0 and near(found[f"interleaved above prefix, {ratio:.0%} true"], float(expected))
        assert near(found[f"own context above true context, prefix, {ratio:.0%} true"], 0)
    assert found["interleaved above prefix, 25% true"].sign == 1


def test_the_gap_at_an_equal_share_is_read_off_the_prefix_curve() -> None:
    share, distance = torch.tensor([[0.0, 0.5]]), torch.tensor([[1.0, 0.5]])  # the line 1 - share, to (1, 0)
    at, above = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.85, 0.25]])
    gap = exposure.gap_at_equal_share((share, distance), (at, above))
    torch.testing.assert_close(gap, torch.tensor([[0.1, 0.0]]))


def test_noise_does_not_move_a_generator_that_reads_no_context() -> None:
    found = context.noise_robustness(subject_of(knows)).numbers
    assert all(near(value, 0) for name, value in found.items() if "added" in name or "lost" in name)


def test_noise_costs_a_counter_the_tokens_after_it() -> None:
    found = context.noise_robustness(subject_of(counts)).numbers
    lost = found["accuracy lost to 50% noise"]
    assert lost.low - 0.05 < 0.5 * (1 - 1 / CODES) * (LENGTH - 1) / LENGTH < lost.high + 0.05


def test_equal_sets_have_no_gap_and_a_model_of_one_of_them_has() -> None:
    assert near(context.train_gap(subject_of(counts)).numbers["cross-entropy, held-out above training"], 0)
    subject = subject_of(knows)
    other = Pictures("other", subject.held_out.images, (COUNTED + 1) % CODES, subject.held_out.condition)
    found = context.train_gap(Subject(**{**vars(subject), "held_out": other}))
    assert near(found.numbers["cross-entropy, held-out above training"], 60.0, 1e-4)
    assert near(found.numbers["accuracy, held-out above training"], -1)
    assert isinstance(context.train_gap(Subject(**{**vars(subject), "train": None})), str)


def test_positions_show_where_a_counter_is_wrong() -> None:
    found = context.positions(subject_of(counts))
    accuracy = found.maps[1].rows
    assert accuracy[0] == [0, 1, 1, 1] and accuracy[1:] == [[1, 1, 1, 1]] * 3
    for one in found.maps:
        low, values, high = map(np.array, (one.low, one.rows, one.high))
        assert low.shape == values.shape == high.shape and (low <= values).all() and (values <= high).all()
    shown = heat_map(HeatMap("m", [[0.5]], "nats", low=[[0.25]], high=[[0.75]]))[0]
    assert "row 0, column 0: 0.50 [0.25, 0.75]" in shown and "column 0: 0.5<" in heat_map(HeatMap("m", [[0.5]], ""))[0]
    assert near(found.numbers["accuracy, last above first quarter"], 0.25)


@pytest.mark.parametrize(
    ("grid", "rows"),
    [(Grid(2, 3), [[0, 1, 2], [3, 4, 5]]), (Grid(2, 2, 2), [[0, 1], [2, 3], [4, 5]]),
     (Grid(1, 4, 2), [[0, 1, None, None], [2, 3, 4, 5]]), (None, [[0, 1], [2, 3], [4, 5]])],
)  # fmt: skip
def test_tokens_take_their_places_on_the_grid(grid: Grid | None, rows: list) -> None:
    assert context.on_grid(torch.arange(6).float(), grid) == rows


def test_neighbours_are_the_nearest_others() -> None:
    codebook = torch.tensor([[0.0, 0.1], [1.0, 0.1], [3.0, 0.1], [7.0, 0.1]])
    ids, distances = codes.neighbours(codebook, torch.tensor([0, 2]), [1, 3])
    assert ids.tolist() == [[1, 3], [1, 3]]
    torch.testing.assert_close(distances, torch.tensor([[1.0, 7.0], [2.0, 4.0]]).double())
    by_angle, _ = codes.neighbours(codebook, torch.tensor([0, 2]), [1], cosine=True)
    assert by_angle.tolist() == [[1], [3]]


def test_only_wrong_tokens_are_replaced_and_never_by_the_true_one() -> None:
    drawn, tokens, nearest = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 5, 6]]), torch.tensor([[9, 4, 7]])
    uniforms = torch.tensor([[0.1, 0.1, 0.9]])
    assert codes.replace_wrong(drawn, tokens, nearest, 0.5, uniforms).tolist() == [[1, 4, 3]]
    assert codes.replace_wrong(drawn, tokens, nearest, 1.0, uniforms).tolist() == [[1, 4, 7]]


def test_nearest_codes_bring_draws_near_and_no_more_of_them_are_right() -> None:
    """All draws are wrong by 8 of 16 greys; the nearest code by angle is wrong by one."""
    subject = subject_of(lambda tokens, classes: (COUNTED[classes, tokens.shape[1]] + 8) % CODES)
    found = codes.embedding_unawareness(subject)
    assert near(found.numbers["share of correct tokens"], 0)
    curve = found.figures[0].curves[0].y
    assert curve[0].value == pytest.approx((8 / CODES) ** 2, rel=0.02)
    assert curve[-1].value == pytest.approx((1 / CODES) ** 2, rel=0.07)
    assert found.numbers["perceptual distance, all replaced above none"].sign == -1
    assert all(later.value < earlier.value for earlier, later in itertools.pairwise(curve))


def test_change_grows_with_distance_in_a_codebook_of_greys() -> None:
    found = codes.neighbourhoods(subject_of(tokenizer=Cells()))
    assert found.numbers["rank correlation of code distance and squared pixel change"].value > 0.99
    assert near(found.numbers["distance to the nearest code"], 1)
    assert near(found.numbers["share of the codes that occur"], 1)
    nearest = found.figures[1].curves[0].y[0].value
    assert nearest == pytest.approx((1 / CODES) ** 2 / 4 / LENGTH, rel=0.1)


class Pairs(Cells):
    """Codes 2 k and 2 k + 1 are the same in the codebook and in the picture."""

    def embed(self, tokens):
        return super().embed(tokens // 2)

    def decode(self, tokens):
        return super().decode(tokens // 2 * 2)


class Blank(Cells):
    """All codes are one, and no picture depends on its tokens."""

    def embed(self, tokens):
        return super().embed(tokens * 0)

    def decode(self, tokens):
        return super().decode(tokens * 0)


@pytest.mark.parametrize(("tokenizer", "left"), [(Pairs(), True), (Blank(), False)])
def test_what_has_nothing_below_the_line_is_left_out_and_said(tokenizer, left: bool) -> None:
    found = codes.neighbourhoods(subject_of(tokenizer=tokenizer))
    assert "changes too few pixels to compare others with." in found.summary and not found.not_finite
    assert "squared pixel change, farthest over nearest code" not in found.numbers
    assert ("the same over the distance to the middle one" in found.numbers) == left
    reach = decoding.receptive_field(subject_of(tokenizer=tokenizer))
    assert any(name.startswith("reach") for name in reach.numbers) == left and not reach.not_finite
    assert ("too few pictures" in reach.summary) != left
    draws = codes.embedding_unawareness(subject_of(knows, tokenizer=tokenizer))
    assert "the same, relative" not in draws.numbers and "the change is 0, with " in draws.summary


def test_a_ratio_has_the_interval_of_both_its_numbers() -> None:
    under = torch.rand(50, 1, generator=seeded(0, "ratio")).double() + 0.5
    weights = statistics.bootstrap_weights(50, 0, "ratio")
    found = statistics.ratio(weights @ (under / 2), weights @ under)
    assert found is not None and found == pytest.approx((0.5, 0.5, 0.5))
    assert statistics.ratio(weights, weights * 0) is None


def test_a_finding_names_what_is_not_finite() -> None:
    good, bad = exactly(1.0), Interval(0.0, -math.inf, math.nan)
    assert Finding("", {"a": good, "b": bad}).not_finite == "b" and not Finding("", {"a": good}).not_finite
    figure = Figure("f", "x", "y", [Curve("c", [0.0], [bad])])
    assert Finding("", {"a": good}, [figure]).not_finite == "f"
    assert Finding("", {}, maps=[HeatMap("m", [[None, 0.0], [math.nan]], "")]).not_finite == "m"
    assert Interval(math.nan, math.nan, math.nan).text == "nan"


def test_probes_are_scored_in_float32_under_autocast() -> None:
    hidden = torch.randn(4, 9, 6, generator=seeded(0, "hidden")) + 30
    codes_of = hidden @ torch.randn(6, 3, generator=seeded(0, "codes"))
    products = statistics.Products(6, 3)
    products.add(hidden.flatten(0, 1), codes_of.flatten(0, 1))
    fitted = products.ridge()
    expected = layers.cosines(hidden, codes_of, fitted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layers.cosines(hidden, codes_of, fitted), expected)


def test_a_ridge_finds_a_linear_map_and_shrinks_noise() -> None:
    rng = seeded(0, "ridge")
    x, true = torch.randn(400, 6, generator=rng), torch.randn(6, 3, generator=rng)
    products = statistics.Products(6, 3)
    for part in (x + 5).split(64):
        products.add(part, (part - 5) @ true + 2)
    weights, offset = products.ridge()
    torch.testing.assert_close((x + 5) @ weights + offset, x @ true + 2, rtol=1e-3, atol=1e-3)
    wide, noise = torch.randn(40, 30, generator=rng), torch.randn(40, 3, generator=rng)
    of_noise = statistics.Products(30, 3)
    of_noise.add(wide, noise)
    unshrunk = torch.linalg.lstsq(wide - wide.mean(0), noise - noise.mean(0)).solution
    assert of_noise.ridge()[0].norm() < 0.5 * unshrunk.norm()


class Deep(Toy):
    """Three layers: the second holds the code of the token read, the last that of the next one, the first noise."""

    num_layers, width = 3, 2

    def __call__(self, context, condition, *, cache=None, tap_layers=()):
        read = torch.cat([torch.full_like(context[:, :1], 3), context], 1)  # the prefix, then the tokens
        coming = torch.cat([context, torch.full_like(context[:, :1], 3)], 1)
        noise = torch.randn(*read.shape, 2, generator=seeded(0, "noise"))
        held = {0: noise, 1: Ring().embed(read) * 7 + 1, 2: Ring().embed(coming).flip(-1)}
        return super().__call__(context, condition)[0], {layer: held[layer] for layer in tap_layers}


class Ring(Cells):
    """Codes on a circle."""

    def embed(self, tokens):
        angle = tokens * (2 * math.pi / CODES)
        return torch.stack([angle.cos(), angle.sin()], -1)


@pytest.mark.parametrize("memory", [layers.MEMORY, 1])
def test_probes_find_the_layers_that_hold_the_codes(memory: int, monkeypatch) -> None:
    monkeypatch.setattr(layers, "MEMORY", memory)
    tokens = torch.randint(0, CODES, (COUNT, LENGTH), generator=seeded(0, "tokens"))
    subject = subject_of(counts, tokens, Ring())
    found = layers.layer_probe(Subject(**{**vars(subject), "model": Deep(counts)}))
    current, coming = (found.figures[0].curves[i].y for i in (0, 1))
    assert current[1].value > 0.999 and coming[2].value > 0.999
    assert max(current[0].value, current[2].value, coming[0].value, coming[1].value) < 0.4
    assert "--objective.encode-layer 1 --objective.decode-layer 2" in found.summary


def test_hidden_states_are_asked_for_the_right_token() -> None:
    hidden = torch.arange(7.0).view(1, 7, 1)  # three of the condition, then four tokens
    assert layers.probed(hidden, 3, "current").flatten().tolist() == [3, 4, 5, 6]
    assert layers.probed(hidden, 3, "next").flatten().tolist() == [2, 3, 4, 5]


def test_a_decoder_of_cells_has_a_field_of_one_cell() -> None:
    found = decoding.receptive_field(subject_of(tokenizer=Cells())).numbers
    assert near(found["share of the change in the token's own cell"], 1)
    assert near(found["reach: tokens that hold 90% of it"], 0)
    assert near(found["share of pixels that change at all"], 1 / LENGTH)
    assert near(found["effective share of the picture's area"], 1 / LENGTH)


def test_what_is_spilt_to_the_right_is_seen_there() -> None:
    """Half of the grey, so a quarter of the square: 0.2 of all, but for tokens of the last column."""
    found = decoding.receptive_field(subject_of(tokenizer=Cells(spill=0.5)))
    middle = found.maps[0].rows
    half = len(middle) // 2
    assert middle[half][half] == 1 and middle[half][half + 1] > 0.1
    assert middle[half][half - 1] == middle[half - 1][half] == middle[half + 1][half + 1] == 0
    own = found.numbers["share of the change in the token's own cell"]
    assert own.low - 0.03 < 1 / (1 + 0.25 * 3 / 4) < own.high + 0.03


def test_changes_are_laid_over_each_other_at_the_changed_token() -> None:
    change = torch.zeros(2, 6, 6)
    change[0, 0, 2], change[1, 2, 4] = 4.0, 8.0  # cells of 2 px: one to the right of tokens 0 and 4
    found = decoding.mean_by_offset(change, torch.tensor([0, 4]), (3, 3))
    expected = torch.zeros(5, 5).double()
    expected[2, 3] = (1 + 2) / 2
    torch.testing.assert_close(found, expected)


def test_tokens_without_a_place_have_no_distance() -> None:
    loose = Cells()
    loose.grid = None
    found = decoding.receptive_field(subject_of(tokenizer=loose))
    assert not found.maps and near(found.numbers["effective share of the picture's area"], 1 / LENGTH)


def test_change_by_distance_is_that_of_rings_of_cells() -> None:
    change = torch.ones(2, 9, 9)
    found = decoding.change_by_distance(change, torch.tensor([4, 0]), (3, 3))
    torch.testing.assert_close(found, torch.tensor([[1, 8, 0], [1, 3, 5]]).double())
    assert decoding.reach_of(
        torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.2, 0.3]])
    ).tolist() == pytest.approx([0, 0.8, 1 + 2 / 3])


def test_wrong_tokens_cost_and_near_ones_less() -> None:
    found = decoding.forgiveness(subject_of(tokenizer=Cells()))
    assert near(found.numbers["rFD(corners), true tokens"], 0)
    far, close = (
        found.numbers[f"the same above rFD(corners), {kind}"] for kind in ("any code", "one of the 15 nearest")
    )
    assert far.value > 0 and close.value > 0
    curve = found.figures[1].curves[0].y
    assert curve[0].value == LARGEST_PSNR and curve[1].value > curve[-1].value


def test_a_generator_that_knows_the_truth_adds_nothing_to_the_tokenizer() -> None:
    found = decoding.attribution(subject_of(knows)).numbers
    for name in ("added by the tokenizer", "added by single draws under true context", "added by drawing freely"):
        assert near(found[name], 0)
    counted = decoding.attribution(subject_of(counts)).numbers
    assert (
        counted["added by drawing freely"].value > 0.1
        and counted["gFD - rFD: free draws above true tokens"].value > 0.1
    )


def test_intervals_of_a_mean_are_those_of_theory() -> None:
    values = torch.randn(200, 1, generator=seeded(0, "values")).double()
    wide = 1.96 * float(values.std()) / math.sqrt(len(values))
    (drawn,) = statistics.mean_intervals(values, statistics.bootstrap_weights(200, 0, "x"))
    assert drawn.value == pytest.approx(float(values.mean())) and drawn.high - drawn.low == pytest.approx(
        2 * wide, rel=0.1
    )
    (left_out,) = statistics.jackknife(lambda keep: [float(values[keep].mean())], torch.arange(200))
    assert left_out.high - left_out.value == pytest.approx(wide * 2.042 / 1.96, rel=1e-6), "Student's t"
    ten = torch.arange(10)
    (few,) = statistics.jackknife(lambda keep: [float(values[:10][keep].mean())], ten)
    assert few.high - few.value == pytest.approx(2.262 * float(values[:10].std()) / math.sqrt(10), rel=1e-6)
    groups = statistics.groups_of(200, 0)
    assert groups.bincount().tolist() == [20] * 10 and not torch.equal(groups, statistics.groups_of(200, 1))


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 60), rng.integers(0, 9, 60)
    weights = torch.full((1, 20), 1 / 20, dtype=torch.float64)  # of 20 images, which have 3 pairs each
    found = statistics.rank_correlation(torch.from_numpy(x).view(20, 3), torch.from_numpy(y).view(20, 3), weights)
    assert float(found[0]) == pytest.approx(spearmanr(x, y).statistic)


def test_an_interval_is_told_with_the_digits_that_it_has() -> None:
    assert Interval(0.12345, 0.10001, 0.15).text == "0.123 [0.100, 0.150]"
    assert Interval(123.4, 100.0, 150.0).text == "123 [100, 150]" and exactly(0.5).text == "0.5000"
    assert exactly(0.0).text == "0"
    assert [Interval(1, 0.5, 2).sign, Interval(-1, -2, -0.5).sign, Interval(0, -1, 1).sign] == [1, -1, 0]


@dataclass
class Source:
    name: str = "source"
    class_names: tuple[str, ...] | None = None
    read_rows: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return 100

    def __iter__(self):
        return map(self.read, range(len(self)))

    def read(self, index: int) -> ImageRecord:
        self.read_rows.append(index)
        return ImageRecord(None, str(index))  # type: ignore[arg-type]


def test_pictures_that_no_file_orders_are_drawn_evenly_by_the_seed_and_the_others_are_others() -> None:
    measured, others = ([int(record.name) for record in part] for part in choose(Source(), 20, 0, None, BadImages()))
    assert [row // 5 for row in measured] == list(range(20)) and len(set(others)) == 20
    assert not set(measured) & set(others)
    assert (
        choose(Source(), 20, 0, None, BadImages())
        == choose(Source(), 20, 0, None, BadImages())
        != choose(Source(), 20, 1, None, BadImages())
    )
    measured, others = choose(Source(), 80, 0, None, BadImages())
    assert len(measured) == 80 and len(others) == 20
    assert spread(seeded(0, "x"), 9, 3).tolist() == [0, 1, 2]


def test_pictures_are_drawn_by_seed_and_pixels_in_any_order_of_a_file(monkeypatch) -> None:
    made = [picture(index) for index in range(40)]

    class Ordered(Source):
        order: ClassVar[list[int]] = list(range(40))
        damaged: ClassVar[set[int]] = set()

        def __len__(self) -> int:
            return 40

        def read(self, index: int) -> ImageRecord:
            if self.order[index] in self.damaged:
                raise BadImage(f"picture {index}: is no picture")
            return ImageRecord(made[self.order[index]], str(self.order[index]))

    def names(source: Source, wanted: int, seed: int = 0) -> list[list[str]]:
        return [[record.name for record in part] for part in choose(source, wanted, seed, 16, bad)]

    bad, moved = BadImages("skip", limit=1), Ordered()
    moved.order = list(reversed(range(40)))
    measured, others = names(Ordered(), 10)
    assert names(moved, 10) == [measured, others] != names(moved, 10, seed=1)
    assert len({*measured, *others}) == 20
    assert [len(part) for part in names(Ordered(), 30)] == [30, 10]
    assert bad.note == ""
    bad.forget("held-out")
    damaged = Ordered()
    damaged.damaged = {int(measured[0]), int(measured[3])}
    assert names(damaged, 8)[0] == [name for name in measured if int(name) not in damaged.damaged]
    assert bad.note.startswith("2 of 40 pictures cannot be read and are left out: picture ")
    monkeypatch.setattr("consonar.diagnostics.pictures.MOST_READ", 39)
    assert names(moved, 10) != names(Ordered(), 10), "of a larger set by number"
    measured, others = names(Ordered(), 10)
    damaged.damaged = {int(measured[0]), int(measured[9]), int(others[4])}
    bad = BadImages("skip", limit=1)
    found = names(damaged, 10)
    assert found[0][1:9] == measured[1:9] and len({*found[0], *found[1]} - set(map(str, damaged.damaged))) == 20
    tried = len(damaged.damaged & set(bad.found["held-out, drawn"]))
    assert tried >= 2 and bad.note.startswith(f"{tried} of {20 + tried} pictures cannot be read and are left out")
    assert names(damaged, 30)[1] and sum(map(len, names(damaged, 30))) == 37, "no more than there are"


def test_pictures_of_a_stream_that_cannot_be_read_are_left_out() -> None:
    def read(index: int) -> ImageRecord:
        if index in (1, 5):
            raise BadImage(f"picture {index}: is no picture")
        return ImageRecord(picture(index), str(index))

    bad = BadImages("skip", limit=1)
    parts = choose(Stream("stream", None, lambda: map(read, range(40))), 10, 0, 16, bad)
    names = [[int(record.name) for record in part] for part in parts]
    assert sorted(names[0] + names[1]) == sorted(set(range(22)) - {1, 5})
    assert bad.note.startswith("2 of 22 pictures cannot be read and are left out")


def test_a_record_of_findings_is_json_and_says_every_number() -> None:
    subject = subject_of(counts)
    findings = {name: PARTS[name].measure(subject) for name in ("exposure", "positions")}
    content = Diagnosis("x", findings, {}, {}).content()
    stored = json.loads(json.dumps(content, allow_nan=False))
    part = stored["parts"]["exposure"]
    assert part["numbers"].keys() == findings["exposure"].numbers.keys() and "pictures" not in part
    first = part["figures"][0]["curves"][0]
    assert len(first["x"]) == len(first["y"]) == len(exposure.RATIOS)
    assert first["y"][0].keys() == {"value", "low", "high"}
