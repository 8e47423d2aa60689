"""What is trained on and what is validated on: the splits of a data set, or a part of `train` that is held out.

What is held out is a function of the number of pictures alone, with or without a label, so that a tokenizer, the tokens
and post-training leave out the same ones.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from consonar.data.image_folder import choose_split
from consonar.data.labels import describe
from consonar.data.shard_index import in_any_order
from consonar.data.sources import Part, find_source, labelled, open_source
from consonar.errors import MissingSplit, OnlyInOrder, UserError
from consonar.seeding import generator, permutation
from consonar.types import ImageSource, IndexedSource

HELD_OUT = 0.05
"""Share of `train` that is held out where the data have no other split."""
SEED = 0


@dataclass(frozen=True)
class Splits:
    """Images to train on and to validate on."""

    train: ImageSource
    validation: ImageSource | None
    note: str = ""
    """Where those to validate on come from, when they are a part of `train`."""


def share_of(wanted: str | None, key: str) -> float | None:
    """The share, from 0 to below 1, that `5%` means; None for the name of a split. `UserError` for neither."""
    share = re.fullmatch(r"(\d+\.?\d*)%", wanted or "")
    if share and float(share[1]) < 100:
        return float(share[1]) / 100
    if wanted == "" or "%" in (wanted or ""):
        raise UserError(f"{key}: {wanted!r} is neither the name of a split nor a share such as 5% (0%: none)")
    return None


def open_splits(
    spec: str,
    wanted: str | None = None,
    *,
    key: str,
    image_size: int,
    otherwise: float = HELD_OUT,
    any_order: bool = False,
    **labels: Any,
) -> Splits:
    """The images that `spec` names, opened with the `labels` of `open_source`, to train on and to validate on.

    `wanted` is the name of the split to validate on, or a share of `train` such as 5% (0%: none is held out). None: the
    split validation, else test, else the share `otherwise` of `train`, where that has two pictures and is no stream.
    Shards that have an order of their own are read in any order (`in_any_order`) where a share of them is wanted, and
    for `any_order` if they can be.
    Which splits there are is asked before pictures are read. Raises `UserError` that begins with `key` for a split that
    is not there or is trained on, and where what is wanted cannot be held out; otherwise as `open_source` does.
    """
    kind, target = find_source(spec)
    opened = partial(open_source, spec, image_size=image_size)

    def label(source: ImageSource) -> ImageSource:
        return labelled(source, **labels)

    share, names = share_of(wanted, key), kind.splits(target)
    if share is None:
        try:
            chosen = choose_split(wanted or "validation", names, spec)
        except MissingSplit as error:
            if wanted:
                others = [name for name in names if name.lower() != "train"]
                choices = ", ".join([*others, "a share of train such as 5%"])
                raise UserError(f"{key}: {spec} has no split {wanted!r}; choices: {choices}") from error
        else:
            if chosen == choose_split("train", names, spec):
                raise UserError(f"{key}: {wanted!r} is what is trained on; name another split, or a share such as 5%")
            return Splits(label(opened(split="train")), label(opened(split=wanted or "validation")))
    source = opened(split="train")
    if share is None:
        share = otherwise if isinstance(source, IndexedSource) and len(source) > 1 else 0
    if share:
        return hold_out(in_any_order(source), share, key, label=label)
    if any_order:
        with suppress(OnlyInOrder):
            source = in_any_order(source)
    return Splits(label(source), None)


def hold_out(
    source: ImageSource, share: float, key: str, label: Callable[[ImageSource], ImageSource] = lambda part: part
) -> Splits:
    """The source without a `share` of its pictures, one at least, and that share, drawn by `SEED`. `label` gives both
    their labels, and may leave pictures out: what is held out does not depend on which.

    Raises `UserError` for a stream, whose pictures have no numbers, and where none would be left.
    """
    if not isinstance(source, IndexedSource):
        raise UserError(f"{key}: nothing can be held out of {source.name}; name a split of the data")
    total = len(source)
    count = max(1, round(share * total))
    if count >= total:
        raise UserError(f"{key}: {count} of {total} pictures held out leave none to train on")
    order = permutation(generator(SEED, "held out"), total)
    rows, rest = sorted(order[:count].tolist()), sorted(order[count:].tolist())
    held_out = label(Part(source, rows, f"{source.name}[{count} held out]"))
    note = f"validation: {describe(held_out)}, held out of the split train"
    return Splits(label(Part(source, rest, f"{source.name}[without {count}]")), held_out, note)
