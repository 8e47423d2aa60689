"""A patch discriminator as a component of its own: what tokenizer training leaves, and the reward reads."""

from __future__ import annotations

from pathlib import Path

import torch

from consonar import checkpoint
from consonar.errors import UserError
from consonar.training.vq_objective import PatchDiscriminator


def save_discriminator(discriminator: PatchDiscriminator, folder: Path) -> None:
    """Writes a component folder."""
    state = discriminator.state_dict()
    config = {"component": "discriminator", "kind": "patch", "width": len(state["layers.0.weight"])}
    checkpoint.save_component(folder, config, state)


def load_discriminator(folder: str | Path) -> PatchDiscriminator:
    """A frozen discriminator on the CPU, from its component folder or the run that has one in `discriminator/`.

    Raises `UserError` for a missing or damaged folder, or weights of something else.
    """
    path = Path(folder)
    path = path / "discriminator" if (path / "discriminator").is_dir() else path
    config, state = checkpoint.read_component(path)
    width = config.pop("width", None)
    if config != {"component": "discriminator", "kind": "patch"}:
        raise UserError(f"{path}: not the folder of a patch discriminator (component and kind in config.json)")
    if not isinstance(width, int) or width < 4 or width % 4:
        raise UserError(f"{path}: width: {width!r} is not a positive multiple of 4")
    # On the meta device: random weights that are overwritten at once would advance the global random generator.
    with torch.device("meta"):
        discriminator = PatchDiscriminator(width)
    discriminator.to_empty(device="cpu")
    checkpoint.load_weights(discriminator, state, str(path))
    return discriminator.eval().requires_grad_(False)
