import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from consonar.cpu import HUGE_PAGES

SCRIPT = """
import resource, torch
from consonar.cpu import keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    return torch.ones(48 * 2**20 // 4 + 1).sum()  # above the 32 MB from which glibc maps by default
def measure():
    for _ in range(16):
        work()
    before = faults()
    for _ in range(8):
        work()
    print(faults() - before)
measure()
assert keep_freed_memory()
measure()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_a_freed_block_is_used_again_without_new_pages():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    default, kept = map(int, done.stdout.split())
    assert default > 8 * 10  # pages (large ones, where the system gives them) of eight fresh blocks
    assert kept == 0


HUGE = """
import os
from pathlib import Path
from consonar import cli
import torch
try:
    cli.main(["recipes"])
finally:
    block = torch.ones(64 * 2**20)
    found = Path("/proc/self/smaps_rollup").read_text()
    print([line.split()[1] for line in found.splitlines() if line.startswith("AnonHugePages")][0])
"""
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(), reason="Linux that gives huge pages when asked"
)
@pytest.mark.parametrize("variable", [None, "0"])
def test_large_tensors_of_a_command_lie_in_huge_pages_unless_the_variable_says_otherwise(variable):
    environment = {name: value for name, value in os.environ.items() if name != HUGE_PAGES}
    environment |= {"CONSONAR_KERNELS": "measured"} | ({HUGE_PAGES: variable} if variable else {})
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=True, env=environment)
    kilobytes = int(done.stdout.splitlines()[-1])
    assert kilobytes == 0 if variable else kilobytes > 2**10  # of 256 MB, what the system had
