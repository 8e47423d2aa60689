"""Writing images: single PNG files and grids."""

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from consonar.data.transforms import to_uint8
from consonar.files.writers import write_atomically


def grid(images: Tensor, columns: int = 8, gap: int = 2) -> Image.Image:
    """Images (B, 3, H, W) in [-1, 1] in rows of `columns` on white, `gap` pixels apart."""
    pixels = to_uint8(images)  # (B, H, W, 3)
    count, height, width, _ = pixels.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    canvas = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for index, picture in enumerate(pixels):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return Image.fromarray(canvas.numpy())


def save_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    write_atomically(path, lambda partial: grid(images, columns).save(partial, format="PNG"))
