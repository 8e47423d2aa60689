"""SIGTERM (a scheduler that takes the machine back), Ctrl-C and a closed terminal end training after a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """Inside of `with`, the first signal is remembered, for the loop to ask; a second one acts at once.

    At the end of the block a remembered signal is raised again, so that the process ends as one that was interrupted.
    Signals belong to the main thread: in another one nothing is caught. One that the process was started to ignore
    (nohup; jobs in the background of a script) stays ignored.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.caught: int | None = None
        self.before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.caught is not None

    def remember(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before.clear()

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
        if self.caught is not None and kind is None:
            signal.raise_signal(self.caught)
