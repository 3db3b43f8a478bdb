"""Worker processes: each imports torch once and carries out many orders, and none outlives the process that gives them.

Parent and worker talk over a pair of sockets, in lines of JSON. It closes by itself when either of them dies, however it dies: a worker
whose parent is gone ends at once, and an order whose worker is gone has failed, which stops no other one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from selectors import EVENT_READ, DefaultSelector
from typing import Any, Literal

from niwaki.errors import NiwakiError

CarryOut = Callable[[Any, Callable[[Any], None], Callable[[], bool]], Any]
"""Does one order (plain data), telling plain data about its progress, and asking whether it should save and stop; returns plain data."""

POLL_SECONDS = 0.2
BUSY_SECONDS = 1.0
"""How long an order rests that another process is at."""

PATIENCE_SECONDS = 5.0
"""How long a worker may take to end when it is idle and its connection is closed, before it is killed."""

_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from niwaki.workers import serve
serve(sys.argv[2], int(sys.argv[3]))
"""


class Busy(Exception):
    """Raised by what carries out an order: another process is at this one; it is given out again later."""


@dataclass(frozen=True)
class Event:
    """Something happened to an order.

    Attributes:
        kind: ``interrupted`` is an order that had begun when a signal came; ``stopping`` is said once, of all of them together.
        worker: number of the worker, from 0.
        order: number of the order, from 0.
        content: what was told (``progress``), returned (``done``), or the error in one line (``failed``).
        detail: the traceback, where it helps: of an error that is no NiwakiError, or of a user's own file.
        seconds: how long the order took.
    """

    kind: Literal["started", "progress", "done", "failed", "stopping", "interrupted"]
    worker: int = -1
    order: int = -1
    content: Any = None
    detail: str = ""
    seconds: float = 0.0


def distribute(
    target: str,
    orders: Sequence[Any],
    jobs: int,
    told: Callable[[Event], None],
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Let worker processes carry out orders, each order by one of them, in their order.

    A first Ctrl-C (SIGINT; or SIGTERM) is passed on to the workers that are at an order, which may save what they have; a second one
    kills them.

    Args:
        target: ``module:name`` of a function that a worker calls once, and that returns what carries out an order.
        orders: plain data, as JSON has it.
        jobs: how many workers there are at most.
        told: called with every event.
        log: file to which everything is appended that workers print.
        environment: environment variables of the workers, added to those of this process.

    Returns:
        Whether all orders were carried out, successfully or not; False after such a signal.
    """
    waiting = deque((0.0, order) for order in range(len(orders)))
    workers: list[_Worker | None] = [None] * min(jobs, len(orders))
    with _interruptions() as interrupted, DefaultSelector() as selector:
        stopping = False
        try:
            while waiting or any(worker is not None and worker.busy for worker in workers):
                if interrupted() and not stopping:
                    stopping = True
                    told(Event("stopping"))
                    waiting.clear()
                    _signal(workers, signal.SIGINT)
                if interrupted() > 1:
                    _signal(workers, signal.SIGKILL)
                for number, worker in enumerate(workers):
                    if waiting and (worker is None or not worker.busy) and waiting[0][0] <= time.monotonic():
                        if worker is None:
                            worker = workers[number] = _Worker(number, target, log, environment or {})
                            selector.register(worker.connection, EVENT_READ, worker)
                        _, order = waiting.popleft()
                        worker.give(order, orders[order])
                        told(Event("started", number, order))
                readable = {chosen.data for chosen, _ in selector.select(POLL_SECONDS)}
                for number, worker in enumerate(workers):
                    if worker is None or not (worker in readable or worker.ended):
                        continue
                    for event in worker.events(stopping):
                        if event is not None:
                            told(event)
                        elif not stopping:
                            waiting.append((time.monotonic() + BUSY_SECONDS, worker.order))
                    if worker.closed:
                        selector.unregister(worker.connection)
                        worker.connection.close()
                        workers[number] = None
        finally:
            _end([worker for worker in workers if worker is not None])
    return not stopping


class _Worker:
    """A worker as its parent sees it."""

    def __init__(self, number: int, target: str, log: Path, environment: Mapping[str, str]) -> None:
        self.number = number
        self.order = -1
        self.busy = self.closed = False
        self._unread = b""
        self.connection, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), target, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                process_group=0,  # a terminal's Ctrl-C reaches the parent alone, which passes it on once
                env={**os.environ, **environment},
            )

    @property
    def ended(self) -> bool:
        """Whether the process has ended; its connection may stay open for longer, in processes that it started itself."""
        return self.process.poll() is not None

    def give(self, order: int, content: Any) -> None:
        """Hand out an order; when the worker has just died, reading will tell."""
        self.order, self.busy, self._begun = order, True, time.monotonic()
        with suppress(OSError):
            self.connection.sendall(json.dumps(content).encode() + b"\n")

    def events(self, stopping: bool) -> Iterator[Event | None]:
        """Yield what the worker says; None when another process is at its order."""
        try:
            said = self.connection.recv(1 << 16, socket.MSG_DONTWAIT)
        except OSError:
            said = b""  # nothing to read, and yet here: the process has ended
        *lines, self._unread = (self._unread + said).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.busy = self.busy and message["kind"] == "progress"
            if message["kind"] == "busy":
                yield None
                continue
            if message["kind"] == "failed" and stopping:
                message["kind"] = "interrupted"
            yield Event(worker=self.number, order=self.order, **message)
        if not said:
            self.closed = True
            if self.busy:
                self.busy = False
                code = self.process.wait()
                kind: Literal["interrupted", "failed"] = "interrupted" if stopping else "failed"
                yield Event(kind, self.number, self.order, _end_in_words(code), seconds=time.monotonic() - self._begun)


def _end_in_words(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed (SIGKILL), perhaps for want of memory; fewer jobs need less"
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def _signal(workers: Sequence[_Worker | None], number: signal.Signals) -> None:
    for worker in workers:
        if worker is not None and worker.busy:
            worker.process.send_signal(number)


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for worker in workers:
        try:
            worker.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


@contextmanager
def _interruptions() -> Iterator[Callable[[], int]]:
    """Count Ctrl-C and SIGTERM inside the block instead of dying of them; where that is not possible, or they are ignored, do nothing."""
    count = 0

    def another(*_: object) -> None:
        nonlocal count
        count += 1

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, another)
    try:
        yield lambda: count
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- inside a worker -----------------------------------------------------------------------------------------------------------


def serve(target: str, descriptor: int) -> None:
    """Carry out the orders that come over a socket until it closes; then the process ends, whatever it is at."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGINT, stop)
    os.set_inheritable(descriptor, False)
    connection = socket.socket(fileno=descriptor)
    orders: SimpleQueue[Any] = SimpleQueue()

    def listen() -> None:
        with suppress(OSError), connection.makefile("rb") as lines:
            for line in lines:
                orders.put(json.loads(line))
        os._exit(0)  # nobody is left to work for, and there is nothing to clean up: what is on the disk is whole at any moment

    def say(kind: str, content: Any = None, **more: Any) -> None:
        with suppress(OSError):
            connection.sendall(json.dumps({"kind": kind, "content": content, **more}).encode() + b"\n")

    threading.Thread(target=listen, daemon=True).start()
    module, _, name = target.partition(":")
    carry_out: CarryOut = getattr(import_module(module), name)()
    while not stopped:
        order, begin = orders.get(), time.monotonic()
        try:
            result = carry_out(order, lambda content: say("progress", content), lambda: stopped)
        except Busy:
            say("interrupted" if stopped else "busy")
        except NiwakiError as error:
            say("failed", _one_line(str(error)), detail=error.details, seconds=time.monotonic() - begin)
        except (Exception, SystemExit) as error:
            words = _one_line(traceback.format_exception_only(error)[-1])
            say("failed", words, detail=traceback.format_exc(), seconds=time.monotonic() - begin)
        else:
            say("done", result, seconds=time.monotonic() - begin)
    os._exit(0)


def _one_line(text: str) -> str:
    return " ".join(text.split())
