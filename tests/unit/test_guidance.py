import math
from typing import get_args

import pytest
import torch

from consonar.sampling.decoder import guided_logits
from consonar.sampling.sample import GuidanceSchedule, power_cosine_scale, scale_at

N = 16


def test_guided_logits():
    conditional, unconditional = torch.tensor([[2.0, -1]]), torch.tensor([[1.0, 1]])
    assert torch.equal(guided_logits(conditional, unconditional, torch.tensor(0.0)), unconditional)
    assert torch.equal(guided_logits(conditional, unconditional, torch.tensor(1.0)), conditional)
    assert torch.equal(guided_logits(conditional, unconditional, torch.tensor(3.0)), torch.tensor([[4.0, -5]]))


def test_power_cosine():
    assert power_cosine_scale(9, 2.75, 0, N) == 1
    assert power_cosine_scale(9, 1, N // 2, N) == pytest.approx(5)  # half way
    assert power_cosine_scale(9, 2, N // 2, N) == pytest.approx(1 + 8 * (1 - math.cos(math.pi / 4)) / 2)
    assert power_cosine_scale(9, 2.75, N, N) == pytest.approx(9)  # one after the last token
    scales = [power_cosine_scale(9, 2.75, i, N) for i in range(N)]
    assert scales == sorted(scales)


def test_other_schedules():
    assert [scale_at("constant", 3, i, N) for i in (0, 15)] == [3, 3]
    assert [scale_at("linear", 4, i, N) for i in (0, 5, 15)] == pytest.approx([1, 2, 4])
    assert scale_at("linear", 4, 0, 1) == 1  # a single token
    assert [scale_at("interval", 3, i, N, interval_end=4) for i in (0, 4, 5)] == [3, 3, 1]
    assert scale_at("interval", 3, 15, N) == 3
    assert scale_at("power_cosine", 4, 3, N, power=2) == power_cosine_scale(4, 2, 3, N)


def test_vapi_counts_from_the_second_token_and_guides_the_first_fully():
    scales = [scale_at("power_cosine_vapi", 4, i, N, power=2) for i in range(N)]
    assert scales[:2] == [4, 1] and scales[1:] == [power_cosine_scale(4, 2, i, N - 1) for i in range(N - 1)]
    assert scale_at("power_cosine_vapi", 4, 0, 1) == 4  # a single token


def test_scale_one_is_the_conditional_model_to_the_last_bit():
    conditional, unconditional = torch.tensor([[0.1, 1e-8]]), torch.tensor([[-1e6, 3.3]])
    assert torch.equal(guided_logits(conditional, unconditional, torch.tensor(1.0)), conditional)


@pytest.mark.parametrize("schedule", get_args(GuidanceSchedule))
def test_scale_one_is_off_everywhere(schedule):
    assert all(scale_at(schedule, 1, i, N, power=2.5, interval_end=3) == 1 for i in range(N))
