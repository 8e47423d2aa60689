"""What is kept of measured pictures, in small files for reports."""

from pathlib import Path

import numpy as np
import torch

from consonar.data.transforms import to_uint8
from consonar.evaluation.image_sets import ImageSet
from consonar.evaluation.inputs import ReferenceSet, as_input, fitting, load_samples
from consonar.files.readers import read_npz
from consonar.files.writers import write_atomically
from consonar.metrics.copying import CopyRate
from consonar.sampling.job import write_npz
from consonar.types import Tokenizer

KEPT_IMAGES = 80
RECONSTRUCTIONS = 32
"""Images that are kept beside their originals."""


def keep_samples(
    drawn: Path, kept: Path, reference: ReferenceSet, copies: dict[str, CopyRate], class_names: tuple[str, ...] | None
) -> None:
    """Some images of a sample file, with the nearest training image of each, into a small file for reports.

    The first ones, whose classes and seeds are the same for every run; of more classes than that, one of each of so
    many classes, evenly spaced.
    """
    stored, images = read_npz(drawn, ("labels", "seeds", "settings")), load_samples(drawn).images
    count, num_classes = len(stored["labels"]), int(stored["labels"].max()) + 1
    rows = torch.arange(min(KEPT_IMAGES, count))
    if num_classes > KEPT_IMAGES:
        rows = (torch.arange(KEPT_IMAGES) * min(num_classes, count) // KEPT_IMAGES).unique()
    of_rows = {key: stored[key][rows.numpy()] for key in ("labels", "seeds")}
    arrays = {"images": images.pick(rows), **stored, **of_rows}
    # By features, or by tokens where not all of these have features.
    covering = [found for found in copies.values() if torch.isin(rows, found.rows).all()]
    if covering:
        nearest = covering[0].indices[torch.searchsorted(covering[0].rows, rows)]
        arrays["nearest_train"] = reference.images["train"].pick(nearest)
    if class_names is not None:
        arrays["class_names"] = np.array(class_names)
    write_atomically(kept, lambda partial: write_npz(partial, arrays))


def keep_reconstructions(folder: Path, tokenizer: Tokenizer, images: ImageSet, count: int) -> None:
    """Some of `count` images, evenly spaced, and what the tokenizer makes of them, in reconstructions.npz."""
    rows = torch.linspace(0, count - 1, min(RECONSTRUCTIONS, count)).long()
    originals = images.pick(rows)

    def decoded(batch: np.ndarray) -> np.ndarray:
        return to_uint8(tokenizer.decode(tokenizer.encode(as_input(batch, tokenizer))).clamp(-1, 1)).cpu().numpy()

    with torch.inference_mode():
        reconstructions = np.concatenate([decoded(part) for part in fitting([originals], decoded)])
    arrays = {
        "originals": originals,
        "reconstructions": reconstructions,
        "names": np.array([f"{images.name} {i}" for i in rows]),
    }
    write_atomically(folder / "reconstructions.npz", lambda partial: write_npz(partial, arrays))
