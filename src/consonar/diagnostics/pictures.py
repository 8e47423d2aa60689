"""Which pictures are diagnosed: held-out and training ones of the data; was a generator trained on these?"""

import itertools

import torch
from torch import Tensor

from consonar.data.bad_images import BadImages, leave_out, readable, readable_rows
from consonar.data.sources import Part, at_size, in_order_of
from consonar.data.splits import open_splits
from consonar.errors import BadImage, UserError
from consonar.evaluation.features import drawn_places
from consonar.evaluation.image_sets import source_image_set
from consonar.evaluation.settings import EvaluationSettings
from consonar.origin import Origin
from consonar.seeding import generator, spread
from consonar.types import ImageRecord, ImageSource, IndexedSource

MOST_READ = 50_000
"""Pictures that are all read to draw some of them by their content."""


def open_data(
    data: str, size: int, origin: Origin, validation_split: str | None, label_default: str | None
) -> tuple[ImageSource, ImageSource | None]:
    """Held-out and training images, with labels of the generator's classes; all and None where none are held out."""
    spec, drawn_size = at_size(data)
    if drawn_size not in (None, size):
        raise UserError(f"--data: {data} has {drawn_size} px, the tokenizer reads {size} px; use {spec!r}")
    known = origin.class_names
    splits = open_splits(
        spec, validation_split, key="--validation-split", image_size=size, label_default=label_default,
        model_classes=known or (),
    )  # fmt: skip

    def labelled(source: ImageSource) -> ImageSource:
        found = in_order_of(source, known, "the generator")
        if isinstance(found, str):
            raise UserError(f"--data: {found}; its labels would mean other classes")
        return found

    train = labelled(splits.train)
    return (labelled(splits.validation), train) if splits.validation else (train, None)


def choose(
    source: ImageSource, wanted: int, seed: int, image_size: int | None, bad: BadImages, part: str = "held-out"
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """So many pictures of a source, and as many others, drawn by seed and pixels at `image_size`, in whatever order a
    file has them, of those that can be read: the others are noted in `bad`, as of `part`. With None, and of more than
    `MOST_READ`, evenly by number, and of a stream among its first ones."""
    if isinstance(source, IndexedSource) and image_size is not None and len(source) <= MOST_READ:
        source = Part(source, readable_rows(source.read, len(source), bad, part), source.name)
        places, _ = drawn_places(source_image_set(source, image_size), EvaluationSettings(seed=seed))
        order = places.argsort().tolist()
        drawn = [[source.read(row) for row in order[start : start + wanted]] for start in (0, wanted)]
        return drawn[0], drawn[1]
    rng, some = generator(seed, "diagnosis", "pictures"), f"{part}, drawn"
    first = [] if isinstance(source, IndexedSource) else [*itertools.islice(readable(source, bad, part), 2 * wanted)]
    count = len(source) if isinstance(source, IndexedSource) else len(first)
    used = torch.zeros(count, dtype=torch.bool)

    def read(rows: Tensor) -> list[ImageRecord]:
        used[rows] = True
        found: list[ImageRecord] = []
        for row in rows.tolist():
            later = (place % count for place in range(row + 1, row + count))
            for place in itertools.chain([row], (place for place in later if not used[place])):
                used[place] = True
                try:
                    found.append(source.read(place) if isinstance(source, IndexedSource) else first[place])
                    break
                except BadImage as error:  # the next one instead
                    bad.met(some, place, error, count)
        if some in bad.found:
            bad.totals[some] = int(used.sum())
        return found

    chosen = read(spread(rng, wanted, count))
    rest = (~used).nonzero()[:, 0]
    return chosen, read(rest[spread(rng, wanted, len(rest))] if len(rest) else rest)


def foreign(origin: Origin, seen: ImageSource, bad: BadImages) -> str:
    """Whether the pictures `seen` are others than a generator of this origin was trained on, in a sentence: by content
    where that is known of both, else by name. Empty where they agree."""
    part = leave_out(seen, bad, "training") if "training" in bad.found else seen  # as post-training hashes them
    ours = {getattr(one, "content_hash", None) for one in (seen, part)}
    known = origin.pictures_sha256 is not None and None not in ours
    if origin.pictures_sha256 in ours if known else origin.data == seen.name:
        return ""
    if origin.data is None and not known:
        return "What the generator was trained on is not known: a gap tells of memory only on its own pictures."
    differ = f"these are others ({seen.name})" if known else f"whether {seen.name} are the same is not known"
    return f"The generator was trained on {origin.data}; {differ}: a gap tells of memory only on its own pictures."
