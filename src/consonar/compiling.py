"""Networks compiled by PyTorch for a job of many pictures: it takes about a minute, which a few do not win back.

Training compiles in place (`compile_for_training`), for its graph is that of a pass with a gradient.
"""

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from consonar.errors import UserError, is_out_of_memory, one_line

Model = TypeVar("Model")
LONGEST_REASON = 300
"""Letters of an error that are shown: compilers write pages."""


class Compiled:
    """A function of a batch, compiled for the most rows that it was given so far; fewer run as written.

    So the fewer rows at the end of a job are not compiled for. Where compiling fails, which is said, all run as
    written: what was no fault of the compiler's is raised by that.
    """

    def __init__(self, written: Callable[[Tensor], Tensor], what: str, **settings: Any):
        self.written, self.what, self.rows = written, what, 0
        self.compiled = torch.compile(written, dynamic=False, **settings)

    def __call__(self, batch: Tensor) -> Tensor:
        if len(batch) < self.rows:
            return self.written(batch)
        self.rows = len(batch)
        try:
            return self.compiled(batch)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.rows = sys.maxsize
            reason = one_line(error)[:LONGEST_REASON]
            warnings.warn(f"{self.what} is not compiled, which is slower: {reason}", stacklevel=2)
            return self.written(batch)


def compiled(model: Model, name: str, **settings: Any) -> Model:
    """A copy of the model, of the very same weights, whose method `name` is `Compiled`; `settings` of `torch.compile`.

    Raises `UserError` where there is no such method.
    """
    if not callable(written := getattr(model, name, None)):
        raise UserError(f"compile: a {type(model).__name__} has no method {name!r} that could be compiled")
    copied = copy.copy(model)
    setattr(copied, name, Compiled(written, f"{type(model).__name__}.{name}", **settings))
    return copied


def compile_for_training(part: nn.Module, **settings: Any) -> None:
    """Compiles a module in place, with the `settings` of `torch.compile`; keys of the state dict do not change.

    Its graph is that of a training pass. Without gradient (sampling, validation) it runs as it is written: those passes
    have other shapes and modes, and each would be compiled anew.
    """
    compiled, written = torch.compile(called, **settings), part._call_impl
    part._compiled_call_impl = lambda *given, **named: (
        compiled(part, *given, **named) if torch.is_grad_enabled() else written(*given, **named)
    )


def called(part: nn.Module, *given: object, **named: object) -> object:
    """What is compiled: PyTorch looks into its own functions, such as a `Sequential`'s, only from one that is not."""
    return part._call_impl(*given, **named)
