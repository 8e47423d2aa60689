"""What is asked of a call of the sampler beside its settings: classes, captions, batches."""

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from consonar.errors import UserError
from consonar.types import Condition, Generator, PromptCondition


def class_ids(classes: Sequence[int] | Tensor) -> Tensor:
    """(B,) int64 of whole numbers; `UserError` for anything else, of which a part would be cut off."""
    try:
        given = torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"classes: {error}; give one class id for each image") from error
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if given.ndim != 1 or (len(given) and not whole):
        raise UserError(f"classes: {given.dtype} of shape {tuple(given.shape)}; give one class id for each image")
    return given.long()


def check_batch_size(batch_size: int, key: str = "batch_size") -> None:
    if not (isinstance(batch_size, numbers.Integral) and batch_size >= 1):
        raise UserError(f"{key}: {batch_size!r} is not a number of images, 1 or more")


def check_condition(condition: Condition, generator: Generator) -> None:
    """Raises `UserError` for class ids that the generator does not have, captions where it takes class ids, and prompts
    that are not padded on the left."""
    choices = f"0..{generator.num_classes - 1}"
    if isinstance(condition, PromptCondition):  # here, and not where it is read: a device would be waited for
        mask = condition.mask
        if not (mask[:, -1].all() and (mask.diff(dim=1).sum(1) <= 1).all()):
            raise UserError("condition: prompts are not padded on the left, with the start-of-image token last")
    if not isinstance(condition, Tensor):
        if generator.num_classes:
            raise UserError(f"condition: a {type(condition).__name__}, but this generator takes class ids {choices}")
    elif generator.num_classes == 0:
        raise UserError(
            "classes: this generator has none, it takes captions: give --prompt, or from Python a `TextCondition` or "
            "`PromptCondition`"
        )
    elif len(wrong := condition[(condition < 0) | (condition >= generator.num_classes)]):
        raise UserError(f"classes: {int(wrong[0])} is not a class of this generator; choices: {choices}")
