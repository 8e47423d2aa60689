"""The patch discriminator: trained with a tokenizer, kept as a model folder of its own, read by a reward."""

from itertools import pairwise
from pathlib import Path

from torch import Tensor, nn

from consonar.errors import UserError
from consonar.files.weights import component_config, load_module, save_component


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one realness score per 16-pixel-stride patch, (B, 1, h, w)."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.GroupNorm(8, b, eps=1e-6), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def save_discriminator(discriminator: PatchDiscriminator, folder: Path) -> None:
    state = discriminator.state_dict()
    config = {"component": "discriminator", "kind": "patch", "width": len(state["layers.0.weight"])}
    save_component(folder, config, state)


def load_discriminator(folder: str | Path) -> PatchDiscriminator:
    """A frozen discriminator on the CPU, from its component folder or the run that has one in `discriminator/`.

    Raises `UserError` for a missing or damaged folder, or weights of something else.
    """
    path = Path(folder)
    path = path / "discriminator" if (path / "discriminator").is_dir() else path
    config = component_config(path)
    width = config.pop("width", None)
    if config != {"component": "discriminator", "kind": "patch"}:
        raise UserError(f"{path}: not the folder of a patch discriminator (component and kind in config.json)")
    if not isinstance(width, int) or width < 4 or width % 4:
        raise UserError(f"{path}: width: {width!r} is not a positive multiple of 4")
    return load_module(lambda: PatchDiscriminator(width), path)
