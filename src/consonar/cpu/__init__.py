"""What a CPU does faster in another way than PyTorch's own; applied from outside, to models and processes as they are.

`CONSONAR_KERNELS` decides about all of it: `measured` (the default: what was found faster on this machine), `ours`
wherever there is a choice, or `pytorch`, which turns it off.
"""

import ctypes
import os
import platform

from consonar.errors import check_choice

# mallopt's parameters (malloc.h): blocks mapped on their own from here on, free memory given back, memory asked for.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""PyTorch reads this variable once, at its first large tensor."""
MODES = ("measured", "pytorch", "ours")


def kernels_mode() -> str:
    """`CONSONAR_KERNELS`; raises `UserError` for another value than its choices."""
    mode = os.environ.get("CONSONAR_KERNELS") or "measured"
    check_choice("CONSONAR_KERNELS", mode, MODES)
    return mode


def hold_memory() -> None:
    """How this process asks for memory: both of the below; neither under `CONSONAR_KERNELS=pytorch`."""
    if kernels_mode() != "pytorch":
        keep_freed_memory()
        ask_for_huge_pages()


def keep_freed_memory() -> bool:
    """Lets this process use freed memory again instead of returning it to the system; True where that took effect.

    By default glibc maps every block above 32 MB anew and unmaps it when freed, and the system clears its pages each
    time: on two CPU cores a training step took 1.2 times as long, decoding and a feature network 1.7 times
    (docs/benchmarks.md). Blocks above 1 GiB, such as whole checkpoints, still go back. Does nothing with other C
    libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_THRESHOLD: 2**30, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}
    taken = [mallopt(ctypes.c_int(key), ctypes.c_int(value)) for key, value in settings.items()]
    return taken == [1] * len(settings)


def ask_for_huge_pages() -> None:
    """Lets PyTorch ask for pages of 2 MB instead of 4 kB for tensors of 2 MB and more, from its first such tensor on.

    Linux grants them where `/sys/kernel/mm/transparent_hugepage/enabled` says `madvise`, its default; elsewhere nothing
    changes. A virtual machine looks every page up twice: there reading memory was 2 times as fast on a quiet host and
    20 times on a busy one (benchmarks/allocator.py). A value of the variable that is set already stays.
    """
    os.environ.setdefault(HUGE_PAGES, "1")
