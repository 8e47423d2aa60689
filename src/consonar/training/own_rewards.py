"""A user's own reward: found by its path, and held to what a reward is, in messages of one line."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from consonar.errors import UserError, unknown
from consonar.types import Reward

KEY = "objective.rewards"
DOTTED_PATH = "package.module:function"


@contextlib.contextmanager
def told_in_one_line(what: str) -> Iterator[None]:
    """Turns whatever the code inside raises, which is not ours, into a `UserError` that says of `what`."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a script that ends itself would end the run without a word
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what}: raised {type(error).__name__}{f': {reason}' if reason else ''}") from error


def import_reward(path: str) -> Reward:
    """A user's own reward, from `package.module:function`. Raises `UserError` when there is no such thing to call."""
    module_name, _, attribute = path.partition(":")
    if not (module_name and attribute):
        raise UserError(f"{KEY}: {path!r} is not of the form {DOTTED_PATH}")
    with told_in_one_line(f"{KEY}: {path!r}"):
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise UserError(f"{KEY}: {path!r}: {error}; is its folder installed, or named in PYTHONPATH?") from error
    if attribute not in vars(module):
        functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise unknown(f"{KEY}: module {module_name}", attribute, functions)
    reward = vars(module)[attribute]
    if not callable(reward):
        raise UserError(
            f"{KEY}: {path!r} is of type {type(reward).__name__}, not a function (images, originals, batch)"
        )
    return reward


def checked(name: str, values: object, count: int) -> Tensor:
    """`values` as float32 (count,); `UserError` names the reward and what it returned instead."""
    if not isinstance(values, Tensor):
        raise UserError(f"reward {name!r}: returned {type(values).__name__}, expected a tensor of shape ({count},)")
    if values.shape != (count,):
        raise UserError(f"reward {name!r}: returned shape {tuple(values.shape)}, expected ({count},), one per image")
    return plain(name, values)


def checked_maps(name: str, maps: object, count: int) -> list[Tensor]:
    """The maps of a reward with a place as float32 (count, h, w); `UserError` names the reward and what it returned."""
    if not isinstance(maps, list | tuple) or not maps or not all(isinstance(layer, Tensor) for layer in maps):
        raise UserError(f"reward {name!r}: returned {type(maps).__name__}, expected a list of one or more error maps")
    for layer in maps:
        if layer.ndim != 3 or len(layer) != count or not layer.numel():
            raise UserError(
                f"reward {name!r}: returned an error map of shape {tuple(layer.shape)}, expected ({count}, h, w)"
            )
    return [plain(name, layer) for layer in maps]


def plain(name: str, values: Tensor) -> Tensor:
    """`values` as float32; `UserError` where they are no real numbers, or not held as such."""
    if values.is_complex() or values.layout != torch.strided or values.device.type == "meta":
        raise UserError(
            f"reward {name!r}: returned a tensor of {values.dtype}, {values.layout}, on {values.device}; expected real "
            "numbers in a dense tensor that holds them"
        )
    return values.detach().float()


def check_finite(values: Mapping[str, Tensor]) -> None:
    """Raises `UserError` that names the first reward of `values` (n,) that is no number, and its image of the batch.

    For all rewards together, because asking waits for the device.
    """
    finite = torch.stack([value.isfinite() for value in values.values()])  # (rewards, n)
    if finite.all():
        return
    for name, of_reward in zip(values, finite, strict=True):
        if wrong := (~of_reward).nonzero().flatten().tolist():
            value = float(values[name][wrong[0]])
            raise UserError(f"reward {name!r}: returned {value} for image {wrong[0]} of the batch")
