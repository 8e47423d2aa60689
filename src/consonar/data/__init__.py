"""Images and tokens: sources, transforms, token stores and batches. See docs/data.md."""

from consonar.data.image_folder import ImageFolder
from consonar.data.loader import ImageBatches, TokenBatches, batch_rows
from consonar.data.picture_files import read_image
from consonar.data.sources import open_source
from consonar.data.tokens import TokenStore, write_token_store
from consonar.data.upstream import import_llamagen_npy, import_rar_jsonl

__all__ = [
    "ImageBatches",
    "ImageFolder",
    "TokenBatches",
    "TokenStore",
    "batch_rows",
    "import_llamagen_npy",
    "import_rar_jsonl",
    "open_source",
    "read_image",
    "write_token_store",
]
