"""Ctrl-C and SIGTERM in long work: finish the step, save what is needed to continue, stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """A context in which the first Ctrl-C or SIGTERM is recorded, the second ignored, and the third ends the process.

    A signal that was ignored before stays ignored: a run within a study leaves Ctrl-C to the study.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._count += 1
        if self._count >= 3:
            os._exit(128 + number)
