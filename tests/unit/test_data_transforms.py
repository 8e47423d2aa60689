"""Colour modes, crops and ranges have closed forms; each is checked against its own."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from consonar.data.transforms import center_crop, from_uint8, make_views, ten_crop, to_rgb, to_uint8
from consonar.errors import UserError


def reopened(image: Image.Image, format: str = "PNG", **options) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return Image.open(io.BytesIO(stream.getvalue()))


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def test_grey_bilevel_and_cmyk_become_rgb():
    assert pixel(to_rgb(reopened(Image.new("L", (2, 2), 77)))) == (77, 77, 77)
    assert pixel(to_rgb(reopened(Image.new("1", (2, 2), 1)))) == (255, 255, 255)
    assert pixel(to_rgb(Image.new("CMYK", (2, 2), (0, 255, 255, 0)))) == (255, 0, 0)
    assert pixel(to_rgb(reopened(Image.new("CMYK", (8, 8), (255, 0, 255, 0)), "TIFF"))) == (0, 255, 0)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_composited_on_white(mode):
    grey, transparent = (0, 128), (0, 0)
    colours = [grey, transparent] if mode == "LA" else [(0, 0, 0, 128), (0, 0, 0, 0)]
    image = Image.new(mode, (2, 1))
    image.putdata(colours)
    result = to_rgb(reopened(image))
    assert pixel(result, 1) == (255, 255, 255)
    assert all(abs(value - 127) <= 1 for value in pixel(result, 0))  # 0 * 128/255 + 255 * 127/255


def test_premultiplied_alpha_is_composited_on_white():
    assert pixel(to_rgb(Image.new("RGBa", (1, 1), (0, 0, 0, 0)))) == (255, 255, 255)
    assert pixel(to_rgb(Image.new("La", (1, 1), (90, 255)))) == (90, 90, 90)


def test_palette_with_a_transparent_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0] + [0] * 762)
    image.putdata([0, 1])
    result = to_rgb(reopened(image, transparency=1))
    assert pixel(result, 0) == (10, 20, 30)
    assert pixel(result, 1) == (255, 255, 255)


def test_key_colours_of_grey_and_rgb_are_transparent():
    assert pixel(to_rgb(reopened(Image.new("L", (1, 1), 5), transparency=5))) == (255, 255, 255)
    assert pixel(to_rgb(reopened(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3)))) == (255, 255, 255)


def test_sixteen_bit_is_scaled_not_clipped():
    values = np.array([[0, 255, 256, 40000, 65535]], dtype=np.uint16)
    expected = [0, 0, 1, 156, 255]
    for image in (reopened(Image.fromarray(values)), Image.fromarray(values.astype(np.int32))):
        assert [pixel(to_rgb(image), x)[0] for x in range(5)] == expected
    keyed = Image.fromarray(values)
    keyed.info["transparency"] = 40000
    assert pixel(to_rgb(keyed), 3) == (255, 255, 255)
    assert pixel(to_rgb(keyed), 2) == (1, 1, 1)


def test_modes_without_a_defined_conversion_are_refused():
    with pytest.raises(UserError, match=r"'F'.*choices: 16-bit grey"):
        to_rgb(Image.new("F", (2, 2)))
    with pytest.raises(UserError, match=r"-1\.\.-1"):
        to_rgb(Image.new("I", (2, 2), -1))


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (4, 2), (0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise: top left goes to top right
    result = to_rgb(reopened(image, exif=exif))
    assert result.size == (2, 4)
    assert pixel(result, 1, 0) == (255, 0, 0)


def test_center_crop_of_an_image_at_size_cuts_without_resampling():
    pixels = np.arange(4 * 9 * 3, dtype=np.uint8).reshape(4, 9, 3)
    cut = np.asarray(center_crop(Image.fromarray(pixels), 4))
    assert np.array_equal(cut, pixels[:, 2:6])  # (9 - 4) // 2 = 2


def test_center_crop_halves_with_a_box_filter():
    checker = (np.indices((16, 16)).sum(0) % 2 * 200).astype(np.uint8)
    image = Image.fromarray(np.repeat(checker[..., None], 3, 2))
    assert set(np.asarray(center_crop(image, 4)).ravel().tolist()) == {100}  # two halvings average 0 and 200
    for size in [(5, 5), (7, 31), (100, 9), (3, 2)]:
        assert center_crop(Image.new("RGB", size), 6).size == (6, 6)


def test_ten_crop_corners_centre_and_flips():
    size, side = 20, 22  # round(1.1 * 20)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    crops = [np.asarray(crop) for crop in ten_crop(Image.fromarray(pixels), size)]
    corners = [(0, 0), (0, 10), (2, 0), (2, 10), (1, 5)]  # (top, left)
    assert len(crops) == 10
    for crop, mirrored, (top, left) in zip(crops[:5], crops[5:], corners, strict=True):
        assert np.array_equal(crop, pixels[top : top + size, left : left + size])
        assert np.array_equal(mirrored, crop[:, ::-1])
    assert {crop.size for crop in ten_crop(Image.new("RGB", (7, 50)), 16)} == {(16, 16)}


def test_shifts_move_the_centre_crop_repeat_its_border_and_are_mirrored():
    size, reach = 32, 2  # round(3/64 * 32)
    pixels = np.random.default_rng(0).integers(0, 256, (size, size + 8, 3), dtype=np.uint8)
    centre = pixels[:, 4 : 4 + size]
    views = [np.asarray(view) for view in make_views(Image.fromarray(pixels), "shift_flip", size)]
    assert len(views) == 18 and np.array_equal(views[4], centre)
    for i, (down, right) in enumerate((d, r) for d in (reach, 0, -reach) for r in (reach, 0, -reach)):
        rows, columns = ((np.arange(size) - move).clip(0, size - 1) for move in (down, right))
        assert np.array_equal(views[i], centre[rows][:, columns])
        assert np.array_equal(views[9 + i], views[i][:, ::-1])


def test_ranges_and_round_trip():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels.T, levels[::-1]], -1))
    (tensor,) = from_uint8(torch.from_numpy(np.array(image))[None])
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert tensor[0, 3, 3].item() == pytest.approx(51 / 127.5 - 1)
    assert np.array_equal(to_uint8(tensor[None])[0].numpy(), np.asarray(image))
    assert torch.equal(from_uint8(to_uint8(tensor[None])), tensor[None])


def test_to_uint8_clamps_rounds_and_refuses_nan():
    values = torch.tensor([-3.0, 3.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 255, 100, 101]
    with pytest.raises(UserError, match="tokenizer: it decodes to NaN"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))
