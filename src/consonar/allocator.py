"""The C library's memory allocator on a CPU."""

import ctypes
import platform

# mallopt's parameters (malloc.h): blocks mapped on their own from here on, free memory given back, memory asked for.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


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
