"""Rewards that read what a picture should show: its caption, which every batch of a source with captions brings."""

import torch
from torch import Tensor

from consonar.errors import UserError
from consonar.networks.likeness import CaptionLikeness
from consonar.networks.scene_claims import degrees
from consonar.networks.scene_detector import load_scene_detector, look
from consonar.types import ImageBatch, Reward


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

    def reward(images: Tensor, originals: Tensor, batch: ImageBatch) -> Tensor:
        words = words_of("compositional", batch)
        try:
            return torch.tensor(degrees(words, look(detector, images)))
        except UserError as error:
            raise UserError(f"objective.rewards: 'compositional' reads captions of scenes alone; {error}") from error

    return reward
