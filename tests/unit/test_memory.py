"""An error for want of memory says where it went, by part, and what to change: on a CPU that has none, and a GPU."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from forked import call
from torch import nn

from consonar import cli, memory
from consonar.attention import KVCache
from consonar.errors import UserError, is_out_of_memory, reading

CPU, GIB = torch.device("cpu"), 2**30


def test_what_no_part_has_is_activations_and_the_rest():
    parts = {"weights": 2 * GIB, "gradients": 0, "optimizer": 4 * GIB}
    told = memory.account(parts, 10 * GIB)
    assert told == "10.00 GiB in use: weights 2.00, optimizer 4.00, activations and the rest 4.00"
    assert memory.account(parts, 5 * GIB) == "6.00 GiB in use: weights 2.00, optimizer 4.00"


@pytest.mark.parametrize(
    ("line", "top", "name"),
    [("0::/job/step", "", "memory.max"), ("4:cpu,memory:/job/step", "memory", "memory.limit_in_bytes")],
)
def test_the_limits_are_those_of_every_group_the_process_is_in(line, top, name, tmp_path):
    def limit(folder: str, most: str) -> None:
        place = tmp_path / "sys/fs/cgroup" / top / folder
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"{most}\n")

    assert list(memory.limits_of_groups(tmp_path)) == []
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"9:cpuset:/\n{line}\n")
    limit("job/step", "max")
    limit("job", "1000")
    limit("", "5000")
    limit("other", "10")
    assert list(memory.limits_of_groups(tmp_path)) == [1000, 5000]


def test_the_memory_of_this_machine_is_told():
    assert 0 < memory.bytes_of_machine() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_each_tensor_is_counted_once_in_its_part():
    before = memory.parts_in_use(CPU)
    model, frozen = nn.Linear(1000, 100), nn.Linear(500, 100, bias=False).requires_grad_(False)
    tied = nn.ModuleList([model, frozen, model])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 1000)).sum().backward()
    optimizer.step()
    cache = KVCache(torch.zeros(2, 2, 3, 4, 5, 6))
    moved = {name: size - before[name] for name, size in memory.parts_in_use(CPU).items()}
    weights = 4 * 100_100
    assert moved["gradients"] == weights and moved["key-value cache"] == cache.data.nbytes
    assert moved["optimizer"] == 2 * weights + 2 * 4  # and the two counts of steps
    assert sum(moved[name] for name in ("weights", "frozen models")) == weights + 4 * 50_000
    assert memory.parts_in_use(CPU)["weights"] >= weights and len(tied) == 3


def test_errors_for_want_of_memory_are_told_from_others():
    for error in (
        MemoryError(),
        OSError(errno.ENOMEM, "?"),
        RuntimeError("CUDA out of memory. Tried"),
        absurd(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert is_out_of_memory(error)
    for error in (RuntimeError("shapes do not match"), OSError(errno.ENOSPC, "?"), ValueError()):
        assert not is_out_of_memory(error)


def absurd() -> Exception:
    try:
        return RuntimeError(torch.empty(2**46))
    except RuntimeError as error:
        return error


def test_only_an_error_for_want_of_memory_gets_a_note_and_it_stays_what_it_is():
    average = {"moving average": [torch.zeros(2**24)]}
    with pytest.raises(RuntimeError, match="allocate memory") as caught, memory.explained("lower n (5)", CPU, average):
        torch.empty(2**46)
    (note,) = caught.value.__notes__
    assert note.endswith("; lower n (5)") and "moving average 0.06" in note and "GiB in use: " in note
    with pytest.raises(RuntimeError) as caught, memory.explained("lower n (5)", CPU):
        raise RuntimeError("shapes do not match")
    assert not hasattr(caught.value, "__notes__")


def limited(words: list[str]) -> None:
    """The command, with 700 MiB more than this process has already."""
    used = (
        int(
            next(
                line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")
            ).split()[1]
        )
        * 1024
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20,) * 2)
    cli.main(words)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit is set by what /proc says")
def test_a_command_that_has_too_little_memory_ends_in_one_line(tmp_path: Path) -> None:
    words = ["sample", "openmoji", "--num-samples", "30000", "--batch-size", "30000", "--out", str(tmp_path / "s.npz")]
    done = call(limited, words, CONSONAR_KERNELS="pytorch")  # no memory is kept for later
    assert done.code == 2, done.err
    (line,) = done.err.splitlines()
    assert line.startswith("consonar: not enough memory; ") and "GiB in use: weights 0.0" in line
    assert "activations and the rest" in line and line.endswith("; lower --batch-size (30000)")


def test_a_file_that_memory_does_not_suffice_for_is_not_called_damaged() -> None:
    with pytest.raises(UserError, match="as weights: it asks for more memory than there is"), reading("f", "weights"):
        raise RuntimeError("unable to mmap 11519680 bytes from file <f>: Cannot allocate memory (12)")


def test_a_model_that_is_being_made_hides_no_error() -> None:
    unmade = nn.Linear.__new__(nn.Linear)
    with pytest.raises(MemoryError) as caught, memory.explained("make it smaller", torch.device("cpu")):
        raise MemoryError
    assert "make it smaller" in caught.value.__notes__[0] and "_parameters" not in vars(unmade)
