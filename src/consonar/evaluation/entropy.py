"""Teacher-forced entropy, and the temperature at which one model is as sharp as another.

Policy gradient lowers entropy, and so does sampling at a lower temperature; a gain that the start model shows as well
at the temperature of equal entropy is no gain of the method.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consonar.components import load_generator, model_folder, read_origin
from consonar.data.bad_images import BadImages, leave_out
from consonar.data.captions import CaptionFeatures, all_captions
from consonar.data.labels import check_label
from consonar.data.sources import at_size, called_in, in_order_of
from consonar.data.splits import open_splits
from consonar.errors import UserError
from consonar.evaluation.image_sets import cropped
from consonar.evaluation.inputs import as_input
from consonar.origin import Origin, check, of_tokenizer
from consonar.records import device_of, to_device
from consonar.training import losses
from consonar.types import Generator, ImageSource, TextEncoder, TokenBatch, Tokenizer

GRID = tuple(round(0.2 + 0.02 * i, 2) for i in range(91))
"""Temperatures at which entropy is measured to be inverted: 0.2 to 2."""


@torch.inference_mode()
def teacher_forced_entropies(
    generator: Generator, batches: Iterable[TokenBatch], temperatures: Sequence[float]
) -> list[float]:
    """Mean entropy in nats of the next-token distributions under the true context, at each temperature (over 0)."""
    device = device_of(generator)
    sums, count = torch.zeros(len(temperatures), dtype=torch.float64), 0
    for batch in batches:
        logits, _ = generator(to_device(batch.tokens, device), to_device(batch.condition, device))
        for index, temperature in enumerate(temperatures):
            sums[index] += losses.entropy(logits.float() / temperature).mean().double().cpu() * len(logits)
        count += len(logits)
    return (sums / count).tolist()


class Sharpness:
    """Teacher-forced entropy of generators on the validation images of a reference, or why there is none.

    The images are read and encoded once, batch by batch, when the first entropy is asked for; only their tokens (n, N)
    and labels (n,), or captions where `encoder` reads those of the generators, are kept. There is no entropy without
    validation images, nor, for a generator of several classes, without labels. `origin` is that of the generators;
    `bad` says what is done about images that cannot be read.
    """

    def __init__(
        self,
        reference: str,
        tokenizer: Tokenizer,
        batch_size: int,
        origin: Origin | None = None,
        bad: BadImages | None = None,
        validation_split: str | None = None,
        encoder: TextEncoder | None = None,
    ):
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.origin = origin or of_tokenizer(tokenizer)
        self.encoder = encoder
        self.source = self._open(reference, bad, validation_split)

    def _open(self, reference: str, bad: BadImages | None, wanted: str | None) -> ImageSource | str:
        """The validation images, with labels of the generators' classes; or why they cannot serve."""
        spec, _ = at_size(reference)
        source = None
        if not spec.endswith(".npz"):
            size = self.tokenizer.image_size
            source = open_splits(spec, wanted, key="--validation-split", otherwise=0, image_size=size).validation
        if source is None:
            return "the reference has none"
        source = leave_out(source, bad, "reference validation")
        found = in_order_of(source, self.origin.class_names, "the generator")
        return f"of the reference, {found}" if isinstance(found, str) else found

    @cached_property
    @torch.inference_mode()
    def encoded(self) -> tuple[Tensor, list[int | None], list[str | None]]:
        """Tokens (n, N) on the CPU, the n labels, and the n captions."""
        assert not isinstance(self.source, str), "nothing is read of a reference without validation images"
        records, tokens = iter(self.source), []
        labels: list[int | None] = []
        captions: list[str | None] = []
        while chunk := list(itertools.islice(records, self.batch_size)):
            images = np.stack([cropped(record.image, self.tokenizer.image_size) for record in chunk])
            tokens.append(self.tokenizer.encode(as_input(images, self.tokenizer)).cpu())
            labels += [record.label for record in chunk]
            captions += [record.caption for record in chunk]
        return torch.cat(tokens), labels, captions

    @cached_property
    def features(self) -> CaptionFeatures:
        """Of all captions. `UserError` where there are no validation images, or one has no caption."""
        assert self.encoder is not None, "captions are asked of a generator that takes them"
        if isinstance(self.source, str):
            raise UserError(
                f"reference: samples are drawn for the captions of its validation images, and {self.source}; "
                "--validation-split says which they are"
            )
        where, called = f"reference {self.source.name}", partial(called_in, self.source)
        return CaptionFeatures(
            all_captions(self.encoded[2], where, called=called), self.encoder, where=where, called=called
        )

    @torch.inference_mode()
    def batches(self, generator: Generator) -> Iterator[TokenBatch] | str:
        """The validation images as tokens, or why they cannot serve this generator."""
        if isinstance(self.source, str):
            return self.source
        tokens, labels, _ = self.encoded
        if self.encoder is not None:
            pieces = torch.arange(len(tokens)).split(self.batch_size)
            return (TokenBatch(tokens[rows], self.features.read(rows)) for rows in pieces)
        if (num_classes := generator.num_classes) > 1 and None in labels:
            return f"{labels.count(None)} of {len(labels)} have no labels, and the generator has {num_classes} classes"
        # A generator of one class knows no other, whatever the reference calls its pictures.
        given = enumerate(labels if num_classes > 1 else [None] * len(labels))
        try:
            conditions = [check_label(label, num_classes, f"picture {index}") for index, label in given]
        except UserError as error:
            return str(error)
        parts = zip(tokens.split(self.batch_size), torch.tensor(conditions).split(self.batch_size), strict=True)
        return (TokenBatch(part, classes) for part, classes in parts)

    def entropies(self, generator: Generator, temperatures: Sequence[float]) -> dict[float, float] | str:
        """By temperature, without that of greedy sampling (0); or why none can be measured."""
        wanted = [temperature for temperature in temperatures if temperature > 0]
        if not wanted:
            return {}
        batches = self.batches(generator)
        if isinstance(batches, str):
            return batches
        return dict(zip(wanted, teacher_forced_entropies(generator, batches, wanted), strict=True))

    def match(self, generator: Generator, other: Path) -> float:
        """The temperature at which `generator` has the entropy of the run or model `other` at temperature 1.

        Raises `UserError` where there is no entropy, and for a run of another tokenizer or with other classes.
        """
        folder = model_folder(str(other), key="--match")
        theirs = read_origin(folder)
        check(f"--match: {other}", theirs, self.origin, "the run", "entropies compare within one tokenizer and classes")
        if not isinstance(self.source, str):
            classes = Origin(class_names=self.source.class_names)
            check(f"--match: {other}", theirs, classes, "the reference", "its labels would mean other classes")
        model = load_generator(folder).to(device_of(generator))
        own, wanted = self.entropies(generator, GRID), self.entropies(model, [1.0])
        if isinstance(own, str) or isinstance(wanted, str):
            missing = own if isinstance(own, str) else wanted
            raise UserError(f"--match: {other}: entropy is measured on validation images: {missing}")
        return matching_temperature(list(own.values()), wanted[1.0])


def matching_temperature(entropies: Sequence[float], target: float, temperatures: Sequence[float] = GRID) -> float:
    """The temperature of the entropy `target`, by linear interpolation; UserError outside of what was measured."""
    if not entropies[0] <= target <= entropies[-1]:
        raise UserError(
            f"entropy {target:.3f} is not reached at temperatures {temperatures[0]:g} to {temperatures[-1]:g} "
            f"({entropies[0]:.3f} to {entropies[-1]:.3f} nats)"
        )
    return float(np.interp(target, entropies, temperatures))
