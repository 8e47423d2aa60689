"""Pixels in, pixels out: colour modes, crops and number ranges, on PIL and torch alone.

Sources: the centre crop of ADM (Dhariwal & Nichol, arXiv 2105.05233, released data loader), which LlamaGen, RAR and
reAR use as well; the ten-crop augmentation with which LlamaGen (arXiv 2406.06525) tokenises ImageNet.

Deviations: LlamaGen first centre-crops a square of int(1.1 * size) and takes the ten crops from that; ours come from
the whole image with its shorter side at round(1.1 * size), so that the corners of a long image are seen too.
"""

from typing import Annotated

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from consonar.errors import UserError, check_choice
from consonar.options import Range

MAX_IMAGE_SIZE = 4096
"""Side of the largest square images that are made or read: one of 4096 px is 200 MB as float, before any network."""
IMAGE_SIDE = Range(1, MAX_IMAGE_SIZE)
ImageSize = Annotated[int, IMAGE_SIDE]
TEN_CROP_RANGE = 1.1
"""Shorter side before the ten crops, relative to the crop."""
SHIFT_RANGE = 3 / 64
"""How far `shift_flip` moves an image, relative to its side: of 16 x 16 patches, three quarters of one."""

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_CONVERTIBLE_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")


def _scale_sixteen_bit(image: Image.Image) -> Image.Image:
    """16-bit grey -> 8-bit grey or, where a grey value is declared transparent, grey with alpha: floor(value / 256)."""
    values = np.asarray(image).astype(np.int64)  # (H, W)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"integer pixels {values.min()}..{values.max()}: 16-bit images have 0..65535; convert the file")
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is None:
        return grey
    alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; as it is stored where that is missing or damaged.

    `ImageOps.exif_transpose` also writes the EXIF anew, which fails for entries that have nothing to do with it.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF raises whatever its bytes spell; the picture is whole without it
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any common mode as an upright 8-bit RGB image of the same content.

    * The EXIF orientation is applied first, so width and height can swap; EXIF that cannot be read is ignored.
    * Grey and palette become RGB; CMYK, YCbCr and HSV by Pillow's formulas (colour profiles are not applied).
    * 16-bit grey is scaled by 1/256 (0..65535 -> 0..255, rounded down), never clipped.
    * Transparency, be it an alpha channel, a palette entry or a key colour, is composited on white; Pillow misses the
      key colour of 2- and 4-bit grey and of 16-bit RGB.

    Raises `UserError` for floating point, LAB and other modes whose conversion to RGB is not defined here.
    """
    image = _upright(image)
    if image.mode in _SIXTEEN_BIT_MODES:
        image = _scale_sixteen_bit(image)
    if image.mode not in _CONVERTIBLE_MODES + _ALPHA_MODES:
        choices = ", ".join(("16-bit grey", *_CONVERTIBLE_MODES, *_ALPHA_MODES))
        raise UserError(f"colour mode {image.mode!r} cannot be converted to RGB; choices: {choices}")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        # La and RGBa hold premultiplied colours and convert to their plain sisters only.
        plain = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", plain.size, (255, 255, 255, 255)), plain)
    return image.convert("RGB")


def _resize_shorter_side(image: Image.Image, size: int) -> Image.Image:
    """The whole image, its shorter side `size`, as in ADM: BOX halvings while it is >= 2 * size, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    return image.resize(shape, resample=Image.Resampling.BICUBIC)


def _crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: the shorter side is brought to `size` pixels, then the central size x size square is cut out.

    Smaller images are enlarged (bicubic). `image` is RGB; the result is RGB, size x size.
    """
    resized = _resize_shorter_side(image, size)
    return _crop(resized, (resized.width - size) // 2, (resized.height - size) // 2, size)


def ten_crop(image: Image.Image, size: int) -> list[Image.Image]:
    """Ten views (LlamaGen's ImageNet protocol, see the module docstring): 4 corners and centre, then their mirrors.

    The shorter side is brought to round(1.1 * size) pixels. Order: top left, top right, bottom left, bottom right,
    centre, and the same five flipped left to right. `image` is RGB; all ten results are RGB, size x size.
    """
    resized = _resize_shorter_side(image, round(TEN_CROP_RANGE * size))
    right, bottom = resized.width - size, resized.height - size
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), (round(right / 2), round(bottom / 2))]
    crops = [_crop(resized, left, top, size) for left, top in corners]
    return crops + [ImageOps.mirror(crop) for crop in crops]


def shifts(image: Image.Image, size: int) -> list[Image.Image]:
    """The centre crop, moved by 3/64 of its side (1 px or more) or not at all along each axis: 9 views of one scale.

    Pixels of the border are repeated where it moves in: for drawings on a plain ground, which ten crops would enlarge.
    """
    centre, reach = center_crop(image, size), max(1, round(SHIFT_RANGE * size))
    padded = np.pad(np.asarray(centre), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    corners = [(left, top) for top in (0, reach, 2 * reach) for left in (0, reach, 2 * reach)]
    return [_crop(Image.fromarray(padded), left, top, size) for left, top in corners]


def from_uint8(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]: x / 127.5 - 1. The inverse of `to_uint8`."""
    return images.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def check_pixels(images: Tensor) -> Tensor:
    """The images, which a tokenizer has decoded; `UserError` for NaN or infinity, which has no colour."""
    if not torch.isfinite(images).all():
        raise UserError(
            "tokenizer: it decodes to NaN or infinite pixels; its weights are damaged, or its training diverged"
        )
    return images


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, H, W) float -> uint8 (B, H, W, 3): (x + 1) * 127.5, rounded to nearest, clamped to 0..255 (decoders
    overshoot). Raises `UserError` as `check_pixels`."""
    images = check_pixels(images)
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


VIEWS = {"center": 1, "center_flip": 2, "ten_crop": 10, "shift_flip": 18}
"""The sets of views that can be tokenised, and how many crops of an image each holds."""


def make_views(image: Image.Image, views: str, size: int) -> list[Image.Image]:
    """The VIEWS[views] crops of an RGB image, RGB, size x size ("flip": mirrors follow); `UserError` for others."""
    check_choice("views", views, VIEWS)
    if views == "ten_crop":
        return ten_crop(image, size)
    crops = shifts(image, size) if views == "shift_flip" else [center_crop(image, size)]
    return crops if views == "center" else crops + [ImageOps.mirror(crop) for crop in crops]
