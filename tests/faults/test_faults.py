"""Short forms of `make soak` and `make failing-writes`."""

import errno
import random

import pytest
from faults.server import Server
from faults.sites import UNREACHED, unreached
from faults.soak import JOBS, Soak
from faults.syscalls import NAMES
from faults.world import COMMANDS, MADE, fill, fill_captions, make
from faults.writes import Trials, kinds

SEED = 7


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A server of commands, and the folder they find."""
    if not NAMES:
        pytest.skip("another processor than those whose system calls are listed")
    root = tmp_path_factory.mktemp("faults").resolve()
    (root / "before").mkdir()
    server = Server(root / "scratch", CONSONAR_KERNELS="pytorch", CONSONAR_CACHE="cache")
    try:
        server.run(["recipes"], root)
    except OSError as error:
        server.close()
        pytest.skip(str(error))
    fill(root / "before")
    make(root / "before", server, MADE[:4])
    yield server, root / "before"
    server.close()


@pytest.fixture(scope="module")
def whole(place):
    """The same, where every command has something to do."""
    server, before = place
    fill_captions(before)
    make(before, server, MADE[4:])
    return place


@pytest.mark.parametrize("job", ["training", pytest.param("tokenising", marks=pytest.mark.slow)])
def test_a_job_that_is_killed_twice_ends_as_if_it_had_not_been(job, place):
    server, before = place
    soak = Soak(server, before, JOBS[job], random.Random(SEED))
    soak.kill(2)
    assert soak.wrong == [] and soak.kills == 2 and soak.ends >= 1


@pytest.mark.parametrize("name", ["resume", "convert back"])
def test_a_write_that_fails_is_a_line_and_costs_nothing(name, place):
    server, before = place
    trials = Trials(server, before, COMMANDS[name])
    chosen = random.Random(SEED).sample(kinds(trials.writes), 4)
    assert [fault for at in chosen for fault in trials.fail(at)] == []


@pytest.mark.parametrize(
    "name", ["sample folder", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tokenize", "sweep", "train"))]
)
def test_a_command_that_is_asked_to_end_says_so_and_goes_on(name, place):
    server, before = place
    trials = Trials(server, before, COMMANDS[name])
    chosen = random.Random(SEED).sample(kinds(trials.writes), 1)
    assert [fault for at in chosen for fault in trials.asked(at)] == []


@pytest.mark.slow
def test_every_place_that_writes_is_reached_by_a_command(whole):
    server, before = whole
    lines = set().union(*(Trials(server, before, words).lines for words in COMMANDS.values()))
    assert unreached(lines) == set(UNREACHED)


def test_a_folder_that_becomes_read_only_is_a_line_and_costs_nothing(place):
    server, before = place
    trials = Trials(server, before, COMMANDS["resume"])
    assert trials.fail(len(trials.writes) // 2, errno.EROFS, lasting=True) == []


def test_a_write_that_fails_is_seen(place):
    """A file that is written in its place: the check would find the loss."""
    server, before = place
    trials = Trials(server, before, ["recipes"])
    (trials.folder / "run" / "config.json").write_text("{}")
    (trials.folder / "run" / "metrics.jsonl").unlink()
    (trials.folder / "run" / "model" / "model.safetensors").write_bytes(b"half")
    assert trials.kept() == ["run/metrics.jsonl is lost", "run/model/model.safetensors is lost"]


def test_every_native_write_passes(place):
    """PyTorch writes without Python; of safetensors' file the bytes are not seen, but its making and its name are."""
    server, before = place
    seen = Trials(server, before, COMMANDS["resume"]).writes
    assert any("model.safetensors" in write.path for write in seen)
    for ending in (".pt", "metrics.jsonl", "config.json"):
        assert any(write.call in ("write", "writev", "pwrite64") and ending in write.path for write in seen), ending
