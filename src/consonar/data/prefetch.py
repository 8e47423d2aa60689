"""Decoding that runs ahead of its consumer."""

import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from consonar.types import ImageRecord, ImageSource, IndexedSource

T = TypeVar("T")
MAX_THREADS = 16


def prefetch(
    source: ImageSource, prepare: Callable[[ImageRecord], T], *, num_workers: int, depth: int
) -> Generator[T, None, None]:
    """`prepare(record)` for every image of `source`, in its order, computed by threads up to `depth` items ahead.

    Pillow releases the interpreter lock, so threads decode in parallel. An `IndexedSource` is decoded by all
    `num_workers` threads (0: one per CPU core, at most 16); any other source is walked by one more thread, and only
    `prepare` runs in the others. An exception in a thread is raised here, at its item; waiting work is then dropped.
    """
    records = None if isinstance(source, IndexedSource) else iter(source)
    indices = iter(range(len(source))) if isinstance(source, IndexedSource) else None
    reader = ThreadPoolExecutor(1)
    workers = ThreadPoolExecutor(num_workers or min(os.cpu_count() or 1, MAX_THREADS))
    pending: deque[Future[T | None]] = deque()

    def from_stream(record: "Future[ImageRecord | None]") -> T | None:
        result = record.result()
        return None if result is None else prepare(result)

    def from_index(index: int) -> T:
        assert isinstance(source, IndexedSource)
        return prepare(source.read(index))

    def submit() -> None:
        if records is not None:
            pending.append(workers.submit(from_stream, reader.submit(next, records, None)))
        elif indices is not None and (index := next(indices, None)) is not None:
            pending.append(workers.submit(from_index, index))

    try:
        for _ in range(depth):
            submit()
        while pending:
            item = pending.popleft().result()
            if item is None:  # the end of a stream
                return
            submit()
            yield item
    finally:
        workers.shutdown(cancel_futures=True)
        reader.shutdown(cancel_futures=True)
