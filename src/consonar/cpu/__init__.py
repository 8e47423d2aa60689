"""What a CPU does faster in another way than PyTorch's own; applied from outside, to models and processes as they are.

`CONSONAR_KERNELS` decides about all of it: `measured` (the default: what was found faster on this machine), `ours`
wherever there is a choice, or `pytorch`, which turns it off.
"""

import os

from consonar.errors import check_choice

MODES = ("measured", "pytorch", "ours")


def kernels_mode() -> str:
    """`CONSONAR_KERNELS`; raises `UserError` for another value than its choices."""
    mode = os.environ.get("CONSONAR_KERNELS") or "measured"
    check_choice("CONSONAR_KERNELS", mode, MODES)
    return mode
