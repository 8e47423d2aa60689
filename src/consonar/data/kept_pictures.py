"""Pictures that a source draws, kept in the cache: in blocks, each a file made when one of its pictures is first read.

The thread that reads draws a block, and of several threads and processes that want it one, while the others wait. A
damaged file is made again. Pictures are compressed each by itself, with a sum that is checked, and mapped from the
disk: none is held in memory.
"""

import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from consonar.data.shard_index import write_table
from consonar.data.store_format import check_buffers
from consonar.errors import UserError, reading
from consonar.files.lock import making
from consonar.files.writers import keep

BLOCK = 256
"""Pictures in a file."""
MOST_MAPPED = 1024
"""Files that stay open."""
SCHEMA = pa.schema({"pixels": pa.binary(), "caption": pa.string()})


class KeptPictures:
    """The pictures of `draw` with their captions, in blocks in `folder`, which belongs to them alone; all are RGB of
    `image_size` px. Where nothing can be kept the blocks that were read last stay in memory, compressed."""

    def __init__(self, folder: Path, image_size: int, draw: Callable[[int], tuple[Image.Image, str]]) -> None:
        self.folder, self.image_size, self.draw = folder, image_size, draw
        self.alone, self.keeps = threading.Lock(), True
        self.block = lru_cache(MOST_MAPPED)(self.find)

    def read(self, index: int) -> tuple[Image.Image, str]:
        """Picture `index` and its caption, from any thread."""
        number, row = divmod(index, BLOCK)
        with self.alone:
            block = self.block(number)
        return Image.fromarray(self.pixels(block, row)), block["caption"][row].as_py()

    def pixels(self, block: pa.Table, row: int) -> np.ndarray:
        found = np.frombuffer(zlib.decompress(block["pixels"][row].as_buffer()), np.uint8)
        return found.reshape(self.image_size, self.image_size, 3)

    def find(self, number: int) -> pa.Table:
        """Block `number`: from its file, or drawn, and kept there."""
        path = self.folder / f"{number:08d}.arrow"
        if (kept := self.kept(path)) is not None:
            return kept
        with making(path):
            if (kept := self.kept(path)) is not None:  # another process has made it meanwhile
                return kept
            # No threads of its own: resvg, which draws most of it, holds the interpreter's lock.
            drawn = [self.drawn(index) for index in range(number * BLOCK, (number + 1) * BLOCK)]
            block = pa.table(list(map(list, zip(*drawn, strict=True))), schema=SCHEMA)
            if self.keeps:
                keep(path, partial(write_table, block))
                self.keeps = path.exists()
        return block

    def drawn(self, index: int) -> tuple[bytes, str]:
        picture, caption = self.draw(index)
        return zlib.compress(picture.tobytes(), 1), caption

    def kept(self, path: Path) -> pa.Table | None:
        """The block in a file; None where there is none, and where it is damaged."""
        if path.exists():
            with suppress(UserError), reading(path, "pictures that were drawn"):
                block = pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()
                check_buffers(block)
                if block.schema.equals(SCHEMA) and len(block) == BLOCK:
                    for row in range(BLOCK):
                        self.pixels(block, row)
                    return block
        return None
