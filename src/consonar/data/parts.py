"""Sources made of others: some rows of one, and what becomes of its labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from consonar.data.labels import DROP, class_id, known_labels
from consonar.errors import unknown
from consonar.origin import same_text
from consonar.types import ImageRecord, ImageSource, IndexedSource


@dataclass(frozen=True)
class Relabelling:
    """What becomes of the labels of a source."""

    class_names: tuple[str, ...] | None
    """What the new labels count."""
    order: tuple[int, ...] | None = None
    """The new label of each class of the source; None: its labels stay."""
    default: int | None = None
    """The label of pictures without one."""
    drops: bool = False
    """Whether pictures without one are left out."""

    def label(self, label: int | None) -> int | None:
        if label is None or self.order is None:
            return self.default if label is None else label
        return self.order[label] if 0 <= label < len(self.order) else label

    def apply(self, record: ImageRecord) -> ImageRecord:
        return replace(record, label=self.label(record.label))

    def keeps(self, record: ImageRecord) -> bool:
        return not (self.drops and record.label is None)


class Part:
    """Some rows of an `IndexedSource`, one itself, called `name`; with other labels where there is a `relabelling`."""

    def __init__(
        self, source: IndexedSource, rows: Sequence[int], name: str, relabelling: Relabelling | None = None
    ) -> None:
        self.source, self.rows, self.name, self.relabelling = source, rows, name, relabelling
        self.class_names = relabelling.class_names if relabelling else source.class_names
        labels = known_labels(source)
        if labels is not None:
            self.labels = [relabelling.label(labels[row]) if relabelling else labels[row] for row in rows]

    @cached_property
    def content_hash(self) -> str | None:
        """Of the source's content and the rows (relabelled: the source's alone); None where the source has none."""
        content: str | None = getattr(self.source, "content_hash", None)
        if self.relabelling or content is None:
            return content
        return hashlib.sha256(f"{content} {self.rows}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> ImageRecord:
        """Picture `index` of the part."""
        record = self.source.read(self.rows[index])
        return self.relabelling.apply(record) if self.relabelling else record

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.read, range(len(self)))


class RelabelledStream:
    """The pictures of a stream that a relabelling keeps, with its labels."""

    def __init__(self, source: ImageSource, relabelling: Relabelling) -> None:
        self.source, self.name, self.relabelling = source, source.name, relabelling
        self.class_names = relabelling.class_names

    def __iter__(self) -> Iterator[ImageRecord]:
        # No generator: these go on behind a picture that could not be read.
        return filter(self.relabelling.keeps, map(self.relabelling.apply, self.source))


def relabelled(
    source: ImageSource,
    class_names: tuple[str, ...] | None,
    default: str | None = None,
    names: Sequence[str] | None = None,
) -> ImageSource:
    """The source with labels that count the classes `class_names`, and with `default` for pictures without one.

    `class_names` None leaves them as they are. `default` is the id or name of a class, `drop` (such pictures are left
    out), or None; where the source names no classes, the default is one of `names`. Raises `UserError` for a class of
    the source that is not among `class_names`, and an unknown default.
    """
    own, order = source.class_names, None
    if own is not None and class_names is not None:
        index = {same_text(name): label for label, name in enumerate(class_names)}
        for name in own:
            if same_text(name) not in index:
                raise unknown(f"--classes: class of {source.name}", name, class_names)
        order = tuple(index[same_text(name)] for name in own)
    given = class_names or own
    label = None if default is None or default == DROP else class_id(default, given or names)
    relabelling = Relabelling(given, order, label, drops=default == DROP)
    if not isinstance(source, IndexedSource):
        return RelabelledStream(source, relabelling)
    known = known_labels(source) if relabelling.drops else None
    rows = [row for row in range(len(source)) if known is None or known[row] is not None]
    return Part(source, rows, source.name, relabelling)
