"""Equal but for the order of sums: what holds between batch sizes, numbers of threads, kernels and processors."""

import torch


def assert_rounding(ours: torch.Tensor, theirs: torch.Tensor, summands: int) -> None:
    """Float32 results of the same sums, taken in another order.

    `summands`: how many numbers are added on the way to one entry, over all layers. Adding n numbers errs by n times
    the machine's epsilon of the largest at worst, so that is the tolerance, relative to the largest entry.
    """
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    tolerance = summands * torch.finfo(torch.float32).eps * float(theirs.detach().abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
