"""Images and tokens: sources, transforms, token stores and batches. See docs/data.md."""

from consonar.data.images import ImageFolder, open_source, read_image
from consonar.data.loader import ImageBatches, TokenBatches, batch_rows
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
