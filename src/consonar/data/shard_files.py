"""Files of many pictures, opened: on this machine, or wherever `fsspec` finds them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from consonar.errors import UserError, reading


def file_system(url: str) -> tuple[Any, str]:
    """Of fsspec, and the path in it; `UserError` where its package is missing."""
    import fsspec  # type: ignore[import-untyped]

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # no such protocol, or a package for it
        raise UserError(f"data: {url}: {error}") from error
    return system, path


@contextmanager
def shard_file(path: str, kind: str) -> Iterator[IO[bytes]]:
    """A shard, open; what reading it raises becomes a `UserError` that begins with its name."""
    system, inner = file_system(path)
    with reading(path, f"a shard ({kind})"):
        try:
            file = system.open(inner, "rb")
        except FileNotFoundError as error:
            raise UserError(f"data: no shard {path}") from error
        with file:
            yield file
