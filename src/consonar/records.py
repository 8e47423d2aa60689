"""Records row by row: a tensor, or a dataclass or dict of tensors with one first dimension, as one thing.

Batches, conditions (class ids, caption features, prompts) and what an objective has prepared are all such records. Here
they are moved to a device, cut, chosen from and joined; where data lie is decided by `distributed.pick_device`, numbers
are drawn by `consonar.seeding`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

Record = TypeVar("Record")


@dataclasses.dataclass(frozen=True)
class Captions:
    """What pictures show, in words: `texts`, all of a data set, and `rows` (B,) int64, which of them."""

    texts: Sequence[str]
    rows: Tensor

    def read(self) -> list[str]:
        """One for each picture."""
        return [self.texts[row] for row in self.rows.tolist()]


def device_of(model: object) -> torch.device:
    """The device of a model's weights; the CPU for what has none."""
    parameters = getattr(model, "parameters", tuple)
    return next((parameter.device for parameter in parameters()), torch.device("cpu"))


def to_device(record: Record, device: torch.device) -> Record:
    """The record with all tensors in it on `device`; the CPU waits for no copy to an accelerator, which needs pages of
    memory that stay where they are."""
    if device.type == "cpu":  # what is read there has to be there
        return map_tensors(lambda tensor: tensor.to(device), record)
    return map_tensors(lambda tensor: pinned(tensor).to(device, non_blocking=True), record)


def pinned(tensor: Tensor) -> Tensor:
    """A copy in such pages, of a tensor that is on the CPU; one that is elsewhere as it is."""
    # Not `pin_memory`, which fails where numbers share memory, as those of an expanded tensor do.
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor) if tensor.is_cpu else tensor


class Fetched(Generic[Record]):
    """A record on its way to the CPU: asked for when this is made, and waited for, it alone, by `here`."""

    def __init__(self, record: Record) -> None:
        device = first_tensor(record).device
        self.copied = torch.cuda.Event() if device.type == "cuda" else None
        self.record = map_tensors(lambda tensor: tensor.to("cpu", non_blocking=self.copied is not None), record)
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(device))

    def here(self) -> Record:
        """The record on the CPU."""
        if self.copied is None:
            return self.record
        self.copied.synchronize()
        return map_tensors(torch.clone, self.record)  # out of the pinned memory that the next copies go to


def one_ahead(asked: Iterable[Fetched[Record]]) -> Iterator[Record]:
    """The records in turn, each waited for when the next one has been asked for, so that the device is never idle."""
    before: Fetched[Record] | None = None
    for fetched in asked:
        if before is not None:
            yield before.here()
        before = fetched
    if before is not None:
        yield before.here()


def map_tensors(function: Callable[..., Tensor], record: Record, *others: Record) -> Record:
    """The record with `function` applied to every tensor in it and to those at the same place in `others`.

    Dataclasses and dicts go field by field, also inside each other; anything else stays as it is in `record`.
    """
    # The casts: a record goes out as the type that it came in as, which the branches below cannot tell mypy.
    if isinstance(record, Tensor):
        return cast(Record, function(record, *others))
    if isinstance(record, dict):
        tables = cast(tuple[dict[object, object], ...], others)
        return cast(Record, {k: map_tensors(function, v, *(table[k] for table in tables)) for k, v in record.items()})
    if not dataclasses.is_dataclass(record) or isinstance(record, type):
        return record
    return cast(Record, dataclasses.replace(record, **map_tensors(function, vars(record), *map(vars, others))))


def first_tensor(record: object) -> Tensor:
    """The record itself, or the first tensor in its fields: where the number of rows and the device are read."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, record)  # type: ignore[func-returns-value]
    assert found, f"a {type(record).__name__} without a tensor has no rows"
    return found[0]


def num_rows(record: object) -> int:
    """The size of the first dimension."""
    return len(first_tensor(record))


def rows(record: Record, chosen: slice | Tensor) -> Record:
    return map_tensors(lambda tensor: tensor[chosen], record)


def repeat(record: Record, count: int) -> Record:
    """Every row `count` times, one after the other."""
    return map_tensors(lambda tensor: tensor.repeat_interleave(count, 0), record)


def split(record: Record, parts: int) -> list[Record]:
    """Equal slices along the first dimension, so that the mean of their losses is the loss of the whole."""
    if parts == 1:
        return [record]
    return [map_tensors(lambda tensor, i=index: piece(tensor, i, parts), record) for index in range(parts)]


def piece(tensor: Tensor, index: int, parts: int) -> Tensor:
    size = len(tensor) // parts
    return tensor[index * size : (index + 1) * size]


def concatenate(first: Record, *others: Record) -> Record:
    """One record with the rows of all, which are of one kind and length."""
    return map_tensors(lambda *tensors: torch.cat(tensors), first, *others)


def select(keep: Tensor, kept: Record, other: Record) -> Record:
    """Row b of `kept` where keep[b], else of `other`, which is of the same kind; keep (B,) bool."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(keep.view(-1, *[1] * (a.ndim - 1)), a, b)

    return map_tensors(pick, kept, other)
