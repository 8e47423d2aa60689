import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from consonar.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    return torch.ones(48 * 2**20 // 4 + 1).sum()  # above the 32 MB from which glibc maps by default
for _ in range(16):
    work()
before = faults()
for _ in range(8):
    work()
print(faults() - before)
"""


def faults(keep: bool) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_a_freed_block_is_used_again_without_new_pages():
    default, kept = faults(keep=False), faults(keep=True)
    assert default > 8 * 10  # pages (large ones, where the system gives them) of eight fresh blocks
    assert kept == 0
