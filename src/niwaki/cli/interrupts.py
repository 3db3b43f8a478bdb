"""Ctrl-C: the first one asks the training to stop after its step and to save; the second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGINT (Ctrl-C) or SIGTERM has come since the block began."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can take signals
        yield lambda: False
        return
    came = False

    def take(number: int, frame: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
