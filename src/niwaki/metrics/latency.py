"""Wall time of calls, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from niwaki.errors import InputError


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Return the seconds that each call took in each round, where all calls take turns in one process.

    Whatever slows the machine for a while slows all of them, and nobody always comes after the same one: each round starts with the next
    call. The median over the rounds is what to report. The number of threads stays as it is; work on a GPU is waited for.

    Args:
        calls: name -> what to time, without arguments.
        rounds: how often each is timed.
        warmup: how often each is called first, untimed.

    Raises:
        InputError: fewer than one round, or a negative ``warmup``.

    >>> times = interleaved({"a": lambda: sum(range(10)), "b": lambda: sum(range(1000))}, rounds=3)
    >>> {name: len(seconds) for name, seconds in times.items()}
    {'a': 3, 'b': 3}
    """
    if rounds < 1 or warmup < 0:
        raise InputError(f"latency: needs at least 1 round and 0 warm-up calls, got {rounds} and {warmup}")
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-warmup, rounds):
        first = round_ % len(names) if names else 0
        for name in names[first:] + names[:first]:
            seconds = _seconds(calls[name])
            if round_ >= 0:
                times[name].append(seconds)
    return times


def _seconds(call: Callable[[], object]) -> float:
    _wait()
    begin = time.perf_counter()
    result = call()
    _wait()
    elapsed = time.perf_counter() - begin
    del result  # freed outside the measured time
    return elapsed


def _wait() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
