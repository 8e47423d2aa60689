"""Which samples, points and images of a run the report chooses to show."""

import numpy as np
import pytest

from consonar.metrics import METRICS, decides, in_order, meanings, metric_of
from consonar.report.charts import MAX_POINTS, binned, title_of
from consonar.report.images import Sheet, pair_samples, spread_evenly


def test_samples_pair_only_seeds_that_all_runs_have():
    def sheet(labels: list[int], seeds: list[int]) -> Sheet:
        return Sheet(np.zeros((len(labels), 1, 1, 3), np.uint8), np.array(labels), np.array(seeds))

    first, second = sheet([0, 0, 1], [5, 3, 1]), sheet([1, 0, 0], [9, 7, 5])
    rows, paired = pair_samples([first, None, second], 4)
    assert paired and rows == [("class 0", [[0], [], [2]])]
    rows, paired = pair_samples([sheet([0], [1]), sheet([0], [2])], 4)
    assert not paired and rows[0][1] == [[0], [0]]


def test_long_logs_are_averaged_in_equal_bins_and_choices_are_even():
    points = binned([(s, 2.0 * s) for s in range(2 * MAX_POINTS)])
    assert len(points) == MAX_POINTS and points[0] == (0.5, 1.0) and points[-1][1] == 2 * points[-1][0]
    assert spread_evenly(9, 3) == [0, 4, 8] and spread_evenly(2, 3) == [0, 1]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("FD(inception) train", -1), ("sFD(inception)", -1), ("IS(inception)", 1), ("FD(org/net) validation", -1),
     ("copy rate (tokens)", -1), ("recall", 1), ("ISO", 0), ("entropy (teacher-forced)", 0), ("entropy", 0)],
)  # fmt: skip
def test_directions_of_metrics(metric, expected):
    assert metric_of(metric).direction == expected


def test_a_number_is_called_what_its_row_says_and_a_new_one_by_its_own_name():
    assert title_of("validation/psnr") == "Validation PSNR (dB)"
    assert title_of("train/reward_own:bright") == "Training reward: own:bright"
    assert title_of("train/reward_org/net") == "Training reward: org/net"
    assert title_of("train/my_term{}") == "Training my_term{}"
    fd = ["FD(net) train", "FD(net) validation"]
    assert [decides(name) for name in fd] == [False, True] and [*meanings(fd)] == ["FD"]
    assert in_order([*fd, "new", "recall", "train/kl", "validation/kl"]) == [
        fd[1], fd[0], "recall", "validation/kl", "train/kl", "new"
    ]  # fmt: skip
    assert len({row.name for row in METRICS}) == len(METRICS)
