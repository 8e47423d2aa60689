"""Picture files as the world has them: links, names, metadata and sizes that are legal and rare."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from consonar.data.image_folder import ImageFolder
from consonar.data.picture_files import find_pictures, read_image
from consonar.errors import BadImage, UserError
from consonar.evaluation.inputs import load_samples, open_reference


def picture(level: int = 7, size=(8, 8), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, (level, 0, 0) if mode == "RGB" else level)


def encoded(image: Image.Image, format: str = "PNG", **settings) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **settings)
    return stream.getvalue()


def fill(folder: Path, *names: str) -> Path:
    for level, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(level).save(folder / name, "PNG")
    return folder


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_circle_of_links_adds_no_picture(tmp_path):
    fill(tmp_path, "cat/1.png", "dog/deep/2.png")
    (tmp_path / "cat/self").symlink_to(tmp_path / "cat", target_is_directory=True)
    (tmp_path / "dog/deep/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    source = ImageFolder(tmp_path)
    assert [record.name for record in source] == ["cat/1.png", "dog/deep/2.png"] and source.labels == (0, 1)


def test_many_links_to_each_other_end_and_count_a_folder_once_in_each_class(tmp_path):
    folders = [fill(tmp_path / f"elsewhere/{i}", f"{i}.png") for i in range(12)]
    for folder in folders:
        for other in folders:
            (folder / f"to_{other.name}").symlink_to(other, target_is_directory=True)
    for name in ("cat", "dog"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / f"data/{name}").symlink_to(folders[0], target_is_directory=True)
    source = ImageFolder(tmp_path / "data")
    assert len(source) == 24 and source.labels == (0,) * 12 + (1,) * 12


def test_names_that_are_not_utf8_or_hold_a_line_break_are_read_and_shown(tmp_path, capsys):
    folder = os.fsencode(tmp_path)
    for name in (b"caf\xe9.png", b"two\nlines.png"):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(encoded(picture()))
    names = [record.name for record in ImageFolder(tmp_path)]
    assert len(names) == 2 and all(name.encode() and "\n" not in name for name in names)
    assert load_samples(tmp_path).count == 2
    Path(os.fsdecode(folder + b"/z\xff\n.png")).write_text("no picture")
    with pytest.raises(UserError, match="not an image") as caught:
        list(ImageFolder(tmp_path))
    assert "\n" not in str(caught.value) and str(caught.value).encode()


def test_training_samples_and_references_see_the_same_files(tmp_path):
    fill(tmp_path, "a.png", "B.PNG", "deep/c.webp", "d.gif", "e.tiff", "f.bmp", ".hidden.png", "._a.png", ".no/x.png")
    (tmp_path / "looks.png").mkdir()
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "README").write_text("")
    os.mkfifo(tmp_path / "pipe.png")
    found = find_pictures(tmp_path)
    assert [path.name for path in found.files] == ["B.PNG", "a.png", "d.gif", "c.webp", "e.tiff", "f.bmp"]
    assert "3 other files" in found.note and ".txt 1" in found.note and "no ending 1" in found.note
    assert load_samples(tmp_path).count == 6
    batches = list(load_samples(tmp_path).images.stream(4))
    assert sum(map(len, batches)) == 6
    (tmp_path / "flat").mkdir()
    for path in found.files:
        path.rename(tmp_path / "flat" / path.name)
    assert sum(map(len, open_reference(tmp_path / "flat", 8).images["reference"].stream(4))) == 6
    assert len(ImageFolder(tmp_path / "flat")) == 6


def test_a_folder_without_a_picture_says_what_else_lies_there(tmp_path):
    (tmp_path / "a.heic").write_text("")
    for read in (ImageFolder, load_samples):
        with pytest.raises(UserError, match=r"1 other file \(\.heic 1\)"):
            read(tmp_path)


def test_a_link_to_nowhere_or_to_itself_is_named(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    for index in (0, 1):
        with pytest.raises(BadImage, match=rf"{'ab'[index]}\.png: cannot be read"):
            ImageFolder(tmp_path).read(index)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    fill(tmp_path, "a/1.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match=r": cannot be read: Permission denied"):
        find_pictures(tmp_path)


@pytest.mark.parametrize("kind", ["text", "compressed text", "international text", "profile", "much text"])
def test_metadata_of_megabytes_do_not_make_a_picture_unreadable(kind):
    info = PngImagePlugin.PngInfo()
    noise = np.random.default_rng(0).integers(97, 123, 3_000_000, dtype=np.uint8).tobytes()
    if kind == "compressed text":
        info.add_text("Comment", "a" * 3_000_000, zip=True)
    elif kind == "international text":
        info.add_itxt("Comment", "a" * 3_000_000, zip=True)
    elif kind == "text":
        info.add_text("Comment", noise.decode())
    elif kind == "much text":
        for _ in range(70):
            info.add_text("Comment", "a" * 1_000_000, zip=True)
    profile = {"icc_profile": noise} if kind == "profile" else {}
    whole = encoded(picture(), pnginfo=info, **profile)
    assert read_image(whole, "x").getpixel((0, 0)) == (7, 0, 0)
    with pytest.raises(BadImage, match="truncated or damaged"):
        read_image(whole[: len(whole) - 20], "x")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage!",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\x06\0\0\0\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abcd\0\0\0\0",
    ],
)
def test_damaged_exif_leaves_the_picture_as_it_is_stored(format, exif):
    data = encoded(picture(200, (6, 4)), format, exif=exif)
    assert read_image(data, "x").size == (6, 4)


def test_exif_orientation_is_applied_whatever_else_stands_there():
    # Orientation 6 beside a rational whose denominator is 0, which Pillow cannot write back.
    entries = struct.pack("<HHHIHHHHIHH", 2, 0x112, 3, 1, 6, 0, 0x9999, 99, 1, 0, 0)
    data = encoded(picture(200, (6, 4)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + entries + b"\0\0\0\0")
    assert read_image(data, "x").size == (4, 6)


def test_a_picture_of_too_many_pixels_names_the_way_out():
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 14_000, 14_000, 1, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(14_000 // 8 + 1) * 14_000)) + chunk(b"IEND", b"")
    with pytest.raises(BadImage, match=r"^big\.png: too large to be decoded .*make it smaller"):
        read_image(b"\x89PNG\r\n\x1a\n" + header + body, "big.png")


def test_a_hair_of_a_picture_is_refused_before_it_is_enlarged():
    with pytest.raises(BadImage, match=r"^x: too large to be decoded \(5000 x 1 px"):
        read_image(encoded(picture(size=(5000, 1))), "x")


def test_no_other_program_decodes_a_picture():
    document = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(BadImage, match=r"^x: not an image"):
        read_image(document, "x")


def test_a_very_large_file_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BadImage, match=r"a\.png: 1099511627776 bytes; a picture has at most"):
        read_image(tmp_path / "a.png", "a.png")


@pytest.mark.parametrize("width, height", [(0, 5), (5, 0)])
def test_a_picture_without_pixels_is_refused(width, height):
    with pytest.raises(BadImage, match=r"^x: "):
        read_image(b"P6 %d %d 255\n" % (width, height), "x")


MODES = {
    "palette": ("PNG", lambda: picture().convert("P")),
    "grey": ("PNG", lambda: picture(7, mode="L")),
    "grey with alpha": ("PNG", lambda: picture(7, mode="L").convert("LA")),
    "sixteen bit": ("PNG", lambda: Image.fromarray(np.full((8, 8), 7 << 8, np.uint16))),
    "one bit": ("TIFF", lambda: Image.new("1", (8, 8), 1)),
    "CMYK": ("JPEG", lambda: picture().convert("CMYK")),
    "CMYK TIFF": ("TIFF", lambda: picture().convert("CMYK")),
    "alpha": ("WEBP", lambda: picture().convert("RGBA")),
    "JPEG 2000": ("JPEG2000", picture),
}


@pytest.mark.parametrize("name", MODES)
def test_every_colour_mode_becomes_rgb(name):
    format, make = MODES[name]
    image = read_image(encoded(make(), format), "x")
    assert image.mode == "RGB" and image.size == (8, 8)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_pictures_in_a_file_the_first_is_taken(format):
    data = encoded(picture(200), format, save_all=True, append_images=[picture(0), picture(100)])
    assert abs(read_image(data, "x").getpixel((4, 4))[0] - 200) < 8
