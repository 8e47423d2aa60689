"""Rewards that read what a picture should show: its caption, which every batch of a source with captions brings."""

from collections.abc import Callable, Collection, Sequence

import torch

from consonar.data.captions import NUMBERED, Called
from consonar.errors import UserError
from consonar.networks.likeness import CaptionLikeness
from consonar.networks.scene_claims import degrees, scene_of
from consonar.networks.scene_detector import load_scene_detector, look
from consonar.types import ImageBatch, Reward

READ_BY: dict[str, Callable[[str], object]] = {"compositional": scene_of, "clip": str, "hpsv2": str}
"""The rewards that read captions, with what raises `UserError` for one that they cannot read."""


def check_captions(
    rewards: Collection[str], captions: Sequence[Sequence[str]] | None, where: str, called: Called = NUMBERED
) -> None:
    """Raises `UserError`, with what the item is `called`, where one of these rewards cannot read a caption of the data
    `where`, or there are none (None)."""
    for name in filter(rewards.__contains__, READ_BY):
        if captions is None:
            raise UserError(f"objective.rewards: {name!r} reads captions, and the generator takes classes")
        for number, item in enumerate(captions):
            try:
                list(map(READ_BY[name], item))
            except UserError as error:
                at = f"{where}, {called(number)}"
                raise UserError(f"objective.rewards: {name!r} cannot read {at}: {error}") from error


def words_of(name: str, batch: ImageBatch) -> list[str]:
    """The captions of a batch; `UserError` about the reward `name` where it has none."""
    if batch.captions is None:
        raise UserError(f"reward {name!r}: reads captions; the data have none, or the generator takes classes")
    return batch.captions.read()


def likeness(name: str, place: str | None, device: torch.device) -> Reward:
    """The cosine of picture and caption (`CaptionLikeness`) by the network in `place`."""
    assert place is not None  # refused where the reward is asked for without one
    network = CaptionLikeness(place, f"objective.{name}", device)
    return lambda images, originals, batch: network(images, words_of(name, batch))


def compositional(device: torch.device) -> Reward:
    """0 to 1: how much of what its caption says a picture of a scene shows (`scene_claims.degree`)."""
    detector = load_scene_detector().to(device)
    return lambda images, originals, batch: torch.tensor(
        degrees(words_of("compositional", batch), look(detector, images))
    )
