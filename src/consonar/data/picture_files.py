"""Picture files: which ones a folder holds, what is in one, reading ahead, and grids. All pictures are read here.

A file counts as a picture by its ending. Hidden files (also the `._` files of macOS) are left out, and so are devices,
pipes and folders that are called like pictures. Links are followed, but never in circles.
"""

import io
import itertools
import math
import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from consonar.data.transforms import to_rgb, to_uint8
from consonar.errors import BadImage, UserError, reading
from consonar.files.writers import write_atomically
from consonar.types import ImageRecord, ImageSource, IndexedSource

IMAGE_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jfif", ".jpe", ".jp2", ".avif",
)  # fmt: skip
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is decoded, whatever a file is called. Pillow knows more; one of them runs another program (EPS)."""
END_MARKS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
MAX_BYTES = 2**30
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")
"""Of the system, for captions: the first that is there."""
MOST_LINES = 4
"""Of a caption under a picture."""
# Pillow refuses pictures with a megabyte of text or a profile in one piece, or 64 in all, which change no pixel here.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**24, 2**28
MAX_ASPECT = 100
"""Longer side over shorter side: the shorter side is brought to the crop's size, which enlarges a hair into a wall."""
T = TypeVar("T")


@dataclass(frozen=True)
class Unread:
    """A picture that is not decoded yet."""

    label: int | None
    read: Callable[[], ImageRecord]
    """Decodes it; from any thread."""
    caption: str | None = None


class Row(NamedTuple):
    """Where a picture lies in a shard, and what is said of it."""

    start: int
    stop: int
    """Of a tar its first and last byte; of a table the number of the piece, and of the row in it."""
    label: int | None
    caption: str | None


@dataclass(eq=False)
class ShardStream:
    """An `ImageSource` that is read from its beginning on, in shards that several processes can share."""

    name: str
    class_names: tuple[str, ...] | None
    num_shards: int
    shard: Callable[[int], Iterator[Unread]]
    """The pictures of a shard, 0 <= index < num_shards, anew each time."""
    content_hash: str | None = None
    indexed: Callable[[], IndexedSource] | None = None
    """The same pictures in any order, where that is possible."""

    def __iter__(self) -> Iterator[ImageRecord]:
        unread = itertools.chain.from_iterable(map(self.shard, range(self.num_shards)))
        return map(methodcaller("read"), unread)  # unlike a generator it goes on behind a bad picture


@dataclass
class PictureFiles:
    """The picture files below a folder, and how many other files lie there, by ending."""

    files: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    @property
    def note(self) -> str:
        """ "3 other files (.txt 2, no ending 1)", or "" where there are none."""
        found = ", ".join(f"{ending or 'no ending'} {count}" for ending, count in self.others.most_common(4))
        count = self.others.total()
        return f"{count} other file{'s' if count > 1 else ''} ({found})" if count else ""


def sub_folders(path: Path) -> list[Path]:
    """The visible sub-folders, sorted by name, without links that lead to `path` or above it."""
    around = {path.resolve(), *path.resolve().parents}
    with reading(path, "a folder"):
        children = sorted(path.iterdir())
    return [c for c in children if not c.name.startswith(".") and c.is_dir() and c.resolve() not in around]


def find_pictures(root: Path) -> PictureFiles:
    """Every picture file below `root`, sorted by path.

    A folder that links lead to several times counts once below each first-level sub-folder (each class), so circles of
    links end; a file counts under each of its names. Raises `UserError` for a folder that cannot be read.
    """
    found = PictureFiles()
    around = {root.resolve(), *root.resolve().parents}
    for folder in _scan(root, found):
        waiting, seen = [folder], set(around)
        while waiting:
            current = waiting.pop()
            if (place := current.resolve()) not in seen:
                seen.add(place)
                waiting += reversed(_scan(current, found))
    found.files.sort()
    return found


def _scan(folder: Path, found: PictureFiles) -> list[Path]:
    """Adds the files of one folder to `found`; returns its visible sub-folders, sorted."""
    with reading(folder, "a folder"), os.scandir(folder) as iterator:
        entries = list(iterator)
    folders = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        ending = Path(entry.name).suffix.lower()
        try:
            lost = entry.is_symlink() and not os.path.exists(entry.path)  # named when it is read
            is_folder, is_file = entry.is_dir(), lost or entry.is_file()
        except OSError:  # a link to itself
            is_folder, is_file = False, True
        if is_folder:
            folders.append(Path(entry.path))
        elif is_file and ending in IMAGE_ENDINGS:
            found.files.append(Path(entry.path))
        else:
            found.others[ending] += 1
    return sorted(folders)


def read_image(source: str | Path | bytes, name: str) -> Image.Image:
    """The image in a file or in encoded bytes, completely decoded, as upright RGB (`transforms.to_rgb`), any size.

    Of an animation or a multi-page file the first picture is taken. Raises `BadImage` that starts with `name` when the
    file cannot be read, is not an image, is truncated or damaged, is too large or too long to be decoded, or has a mode
    that does not convert to RGB.
    """
    data = source if isinstance(source, bytes) else _read_bytes(Path(source), name)
    try:
        image = _open(data)
        if END_MARKS.get(image.format or "", b"") not in data:  # Pillow lets a file pass that lost only its last bytes
            raise ValueError(f"no end of {image.format}")
        return to_rgb(image)
    except UserError as error:
        raise BadImage(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise BadImage(f"{name}: not an image ({len(data)} bytes)") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"{name}: too large to be decoded ({error}); make it smaller") from error
    except Exception as error:  # what the bytes happen to spell: see `errors.reading`
        cause = str(error) or type(error).__name__
        raise BadImage(f"{name}: the image is truncated or damaged ({len(data)} bytes): {cause[:200]}") from error


def _read_bytes(path: Path, name: str) -> bytes:
    with reading(name, "an image", kind=BadImage):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(f"{name}: not a file")
        if status.st_size > MAX_BYTES:
            raise BadImage(f"{name}: {status.st_size} bytes; a picture has at most {MAX_BYTES}")
        return path.read_bytes()


def _open(data: bytes) -> Image.Image:
    """The first picture, decoded. Raises what Pillow raises."""
    Image.init()
    image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    width, height = image.size
    if min(width, height) < 1:
        raise ValueError(f"{width} x {height} px")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Image.DecompressionBombError(f"{width} x {height} px, a side over {MAX_ASPECT} times the other")
    image.load()
    return image


def decoding_threads() -> ThreadPoolExecutor:
    """Threads for pictures, since Pillow releases the interpreter lock: one per CPU core, at most 16."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, 16))


def prefetch(
    source: ImageSource | Iterator[Unread],
    prepare: Callable[[ImageRecord], T],
    *,
    depth: int,
    rows: Iterable[int] | None = None,
    met: Callable[[int, BadImage], None] | None = None,
) -> Generator[T, None, None]:
    """`prepare(record)` for every image of `source` (of an `IndexedSource`: of `rows`, None for all), in its order,
    computed by threads up to `depth` items ahead.

    The pictures of an `IndexedSource` and those of a shard are decoded by all `decoding_threads`; any other source is
    walked by one more thread, and only `prepare` runs in the others. An exception in a thread is raised here, at its
    item; waiting work is then dropped. With `met` it gets the pictures that cannot be read, by their number, and the
    others follow.
    """

    def prepared(read: Callable[[], ImageRecord | Unread | None]) -> T | None:
        record = read()  # None behind the end of a stream
        record = record.read() if isinstance(record, Unread) else record
        return None if record is None else prepare(record)

    reader, workers = ThreadPoolExecutor(1), decoding_threads()
    reads: Iterator[Callable[[], ImageRecord | Unread | None]]
    if isinstance(source, IndexedSource):
        reads = (partial(source.read, index) for index in (range(len(source)) if rows is None else rows))
    else:
        records: Iterator[ImageRecord | Unread] = iter(source)
        reads = (reader.submit(next, records, None).result for _ in itertools.count())
    jobs = (workers.submit(prepared, read) for read in reads)
    try:
        pending = deque(itertools.islice(jobs, depth))
        for number in itertools.count():
            if not pending:
                return
            try:
                item = pending.popleft().result()
            except BadImage as error:
                if met is None:
                    raise
                met(number, error)
            else:
                if item is None:
                    return
                yield item
            pending.extend(itertools.islice(jobs, 1))
    finally:
        workers.shutdown(cancel_futures=True)
        reader.shutdown(cancel_futures=True)


def save_grid(images: Tensor, path: Path, columns: int = 8, captions: Sequence[str] = ()) -> None:
    """Writes images (B, 3, H, W) in [-1, 1] as a PNG: rows of `columns` on white, two pixels apart; under them the B
    captions, where there are any, cut to what fits."""
    pixels = to_uint8(images).numpy()  # (B, H, W, 3)
    count, height, width, _ = pixels.shape
    font, line = font_of(size := max(9, width // 20)), math.ceil(size * 1.25)
    texts = [wrapped(caption, width, font.getlength) for caption in captions]
    room = max(map(len, texts), default=0) * line
    columns, down, right = min(columns, count), height + 2 + room, width + 2
    canvas = Image.new("RGB", (columns * right - 2, math.ceil(count / columns) * down - 2), "white")
    draw = ImageDraw.Draw(canvas)
    for index, picture in enumerate(pixels):
        left, top = index % columns * right, index // columns * down
        canvas.paste(Image.fromarray(picture), (left, top))
        for number, words in enumerate(texts[index] if texts else ()):
            draw.text((left, top + height + number * line), words, fill="black", font=font)
    write_atomically(path, lambda partial: canvas.save(partial, format="PNG"))


def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """One of `FONTS`, else Pillow's own, which has the letters of English alone."""
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def wrapped(text: str, width: int, length: Callable[[str], float]) -> list[str]:
    """The words in at most `MOST_LINES` lines of this width, where `length` says how long a text is; "…" ends what was
    cut."""
    lines = [""]
    for word in text.split():
        whole = f"{lines[-1]} {word}".lstrip()
        lines[-1:] = [whole] if length(whole) <= width or not lines[-1] else [lines[-1], word]
    shown = lines[:MOST_LINES]
    if len(lines) > MOST_LINES:
        shown[-1] += "…"
    for number, line in enumerate(shown):
        if length(line) > width:
            end = next(end for end in range(len(line), -1, -1) if length(f"{line[:end]}…") <= width or not end)
            shown[number] = f"{line[:end]}…"
    return shown
