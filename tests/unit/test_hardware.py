"""Choices by measurement: taken only where clearly faster, measured once for a machine, kept, and never fatal."""

import json
import time
from multiprocessing.pool import ThreadPool
from random import Random

import pytest
import torch

from consonar import precision
from consonar.cpu import timing
from consonar.errors import UserError
from consonar.training.optim import adamw_ways


@pytest.fixture(autouse=True)
def measured(tmp_path, monkeypatch):
    """An empty cache folder and nothing remembered."""
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CONSONAR_KERNELS", "measured")
    monkeypatch.setattr(timing, "_known", {})
    return tmp_path / "cache" / "kernels.json"


def ways(ratio: float, calls: list | None = None):
    """PyTorch's way takes `ratio` times as long as ours."""

    def make():
        if calls is not None:
            calls.append(ratio)
        return lambda: time.sleep(2e-3 * ratio), lambda: time.sleep(2e-3)

    return make


def test_ours_is_taken_only_where_it_is_clearly_faster():
    assert timing.ours("much faster", ways(3))
    assert not timing.ours("slower", ways(0.5))
    answers = timing.kept_answers()
    assert answers["much faster"] > 1.5 and answers["slower"] < 0.9
    timing._known[timing.machine_key(torch.get_num_threads())]["hardly"] = timing.CLEARLY - 0.01
    assert not timing.ours("hardly", ways(3))


def test_an_answer_is_measured_once_and_stays(measured, monkeypatch):
    calls = []
    assert all(timing.ours("a", ways(3, calls)) for _ in range(3)) and len(calls) == 1
    monkeypatch.setattr(timing, "_known", {})  # as another process would begin
    assert timing.ours("a", ways(0.2, calls)) and len(calls) == 1
    (machine,) = json.loads(measured.read_text())
    assert torch.__version__ in machine and f"{torch.get_num_threads()} threads" in machine


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"x": 3}', '{"KEY": {"a": "fast"}}', '{"KEY": {"a": -1}}'])
def test_a_damaged_file_of_answers_is_measured_anew(content, measured):
    measured.parent.mkdir()
    measured.write_text(content.replace("KEY", timing.machine_key(torch.get_num_threads())))
    assert timing.ours("a", ways(3)) and timing.kept_answers()["a"] > 1.5


def test_nothing_is_measured_where_it_cannot_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "file" / "below"))
    calls = []
    assert not timing.ours("a", ways(3, calls)) and not calls


def test_nothing_is_measured_in_a_job_over_several_machines(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    calls = []
    assert not timing.ours("a", ways(3, calls)) and not calls


@pytest.mark.parametrize(("mode", "expected"), [("pytorch", False), ("ours", True)])
def test_the_environment_overrides_and_wrong_words_are_refused(mode, expected, monkeypatch):
    monkeypatch.setenv("CONSONAR_KERNELS", mode)
    assert timing.ours("a", ways(1)) is expected
    monkeypatch.setenv("CONSONAR_KERNELS", "fast")
    with pytest.raises(UserError, match=r"CONSONAR_KERNELS: unknown 'fast'.*choices: measured, pytorch, ours"):
        timing.ours("a", ways(1))


def test_processes_that_start_together_agree():
    """Whoever is first measures; the others, that would have found the opposite, take its answer."""
    calls: list = []

    def ask(index: int) -> float:  # nothing in memory is shared here: only the file and its lock
        return timing._measure_and_keep("machine", "shared", ways(3 if index % 2 else 0.3, calls))

    with ThreadPool(4) as pool:
        answers = pool.map(ask, range(8), chunksize=1)
    assert len(set(answers)) == 1 and len(calls) == 1


def test_a_family_can_be_forced_whatever_the_rest_of_the_choice_says():
    with timing.forced("linear", True):
        assert timing.ours("linear, 8 rows", ways(0.2)) and not timing.ours("attention, 8", ways(0.2))
        with timing.forced("linear", False):
            assert not timing.ours("linear, 8 rows", ways(3))
        assert timing.ours("linear, 8 rows", ways(0.2))
    assert timing.ours("linear, 8 rows", ways(3))


def test_both_ways_of_the_optimizer_and_of_autocast_run_and_draw_no_numbers():
    state = torch.get_rng_state()
    for way in (*adamw_ways(), *precision.autocast_ways()):
        way()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `passes(seconds)` moves."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_a_busy_machine_tells_nothing_and_is_asked_again_later(clock, monkeypatch):
    """Not at once: the processes of a job ask one after the other, and the first no longer keeps it busy then."""
    random, now = Random(0), [1e9]
    monkeypatch.setattr(timing.time, "time", lambda: now[0])

    def busy():
        return lambda: clock(random.uniform(0.002, 2)), lambda: clock(random.uniform(0.001, 1))

    def quiet():
        return lambda: clock(0.002), lambda: clock(0.001)

    assert not timing.ours("a", busy) and timing.kept_answers() == {}
    for seconds, expected in ((timing.AGAIN - 1, False), (2, True)):
        timing._known.clear()  # as another process would begin
        now[0] += seconds
        assert timing.ours("a", quiet) is expected
    assert timing.kept_answers() == {"a": 2.0}


@pytest.mark.parametrize("seconds", [0.0, 0.4, 3.0])
def test_ways_of_any_length_are_measured_on_a_quiet_machine(seconds, clock):
    ratio = timing.time_ratio(lambda: clock(2 * seconds), lambda: clock(seconds))
    assert ratio == pytest.approx(2 if seconds else 1)


def test_what_is_not_timed_is_taken_where_all_processes_agree(monkeypatch):
    assert timing.ours("untimed", None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not timing.ours("untimed", None)


def test_the_fastest_calls_count_however_slow_others_were(clock):
    random = Random(0)

    def way(seconds: float):
        return lambda: clock(seconds * (1 if random.random() < 0.2 else random.uniform(1, 20)))

    for seconds in (0.0001, 0.001):
        assert timing.time_ratio(way(3 * seconds), way(seconds)) == pytest.approx(3, rel=0.1)


def test_bf16_is_automatic_only_where_it_is_native_and_faster(monkeypatch):
    cpu = torch.device("cpu")
    for native in (True, False):
        for faster in (True, False):
            monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda native=native: native)
            with timing.forced("bf16", faster):
                expected = "bf16" if native and faster else "fp32"
                assert precision.pick_precision("auto", cpu, "key", "training") == expected
                assert precision.pick_precision("auto", cpu, "key", "sampling") == "fp32"
    assert precision.pick_precision("bf16", cpu, "key", "training") == "bf16"


def test_bf16_waits_longer_for_a_quiet_moment_than_a_kernel_does(clock, monkeypatch):
    """On a busy machine float32 would double a run's steps for as long as the run lasts."""
    random = Random(0)

    def ways():
        start = timing.time.perf_counter()

        def way(seconds: float):
            busy = timing.time.perf_counter() - start < 5
            clock(seconds * random.uniform(1, 20) if busy else seconds)

        return lambda: way(0.06), lambda: way(0.02)

    monkeypatch.setattr(precision, "autocast_ways", ways)
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    assert not timing.ours("a", ways)
    assert precision.pick_precision("auto", torch.device("cpu"), "key", "training") == "bf16"


def test_the_words_for_a_machine_hold_what_changes_speeds(monkeypatch):
    timing.machine_key.cache_clear()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert "ONEDNN_MAX_CPU_ISA=SSE41" in timing.machine_key(3) and "3 threads" in timing.machine_key(3)
    timing.machine_key.cache_clear()
