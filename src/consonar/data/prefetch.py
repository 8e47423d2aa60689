"""Decoding that runs ahead of its consumer."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import TypeVar

from consonar.types import ImageRecord, ImageSource, IndexedSource

T = TypeVar("T")


def decoding_threads(count: int = 0) -> ThreadPoolExecutor:
    """Threads for pictures, since Pillow releases the interpreter lock; 0: one per CPU core, at most 16."""
    return ThreadPoolExecutor(count or min(os.cpu_count() or 1, 16))


def prefetch(
    source: ImageSource, prepare: Callable[[ImageRecord], T], *, num_workers: int, depth: int
) -> Generator[T, None, None]:
    """`prepare(record)` for every image of `source`, in its order, computed by threads up to `depth` items ahead.

    An `IndexedSource` is decoded by all `num_workers` threads (0: one per CPU core, at most 16); any other source is
    walked by one more thread, and only `prepare` runs in the others. An exception in a thread is raised here, at its
    item; waiting work is then dropped.
    """
    reader, workers = ThreadPoolExecutor(1), decoding_threads(num_workers)

    def reads() -> Iterator[Callable[[], ImageRecord | None]]:
        """What gives the next image; of a stream None behind its end."""
        if isinstance(source, IndexedSource):
            yield from (partial(source.read, index) for index in range(len(source)))
            return
        records = iter(source)
        while True:
            yield reader.submit(next, records, None).result

    def prepared(read: Callable[[], ImageRecord | None]) -> T | None:
        record = read()
        return None if record is None else prepare(record)

    try:
        waiting = reads()
        pending = deque(workers.submit(prepared, read) for read in islice(waiting, depth))
        while pending:
            item = pending.popleft().result()
            if item is None:
                return
            pending.extend(workers.submit(prepared, read) for read in islice(waiting, 1))
            yield item
    finally:
        workers.shutdown(cancel_futures=True)
        reader.shutdown(cancel_futures=True)
