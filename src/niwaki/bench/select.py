"""What exact selection costs, against ``torch.topk`` on the same scores: seconds and peak memory.

The contenders take turns in one process, so that all see the same machine; medians over the rounds are reported. Peak memory is
measured once for each, in a process of its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from niwaki.errors import InputError
from niwaki.selection import kept, select

SIZES = (10**6, 10**7, 10**8)
TENSORS = (1, 50)
MIB = 2**20

DEFINITIONS = (
    "scores: float32, |x| of normally distributed x; in 50 tensors, torch.topk needs torch.cat first, which is timed with it.",
    "seconds: median over the rounds; torch.topk returns values and indices (sorted as by default, or unsorted), niwaki bool masks.",
    "working memory: peak resident memory beyond scores and result, in a process of its own; '-' where /proc cannot tell.",
    "x bound: seconds / (time to read each score once and write its mask once at the bandwidth of torch.sum over 256 MiB).",
    "exact: as many kept as asked for, and the smallest kept score is the smallest of torch.topk.",
)


def _niwaki(tensors: Sequence[Tensor], keep: int) -> list[Tensor]:
    return select(tensors, keep)


def _topk(tensors: Sequence[Tensor], keep: int, ordered: bool) -> list[Tensor]:
    whole = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
    return list(torch.topk(whole, keep, sorted=ordered))


METHODS: Mapping[str, Callable[[Sequence[Tensor], int], list[Tensor]]] = {
    "niwaki": _niwaki,
    "torch.topk": partial(_topk, ordered=True),
    "torch.topk unsorted": partial(_topk, ordered=False),
}


def run(
    sizes: Sequence[int] = SIZES,
    rounds: int = 5,
    *,
    sparsity: float = 0.9,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure the selection of the global top-k and return one row for each size, number of tensors and method.

    Args:
        sizes: numbers of scores.
        rounds: how often each contender runs; one more run warms it up.
        sparsity: the share of scores that is not kept.
        progress: called with the cases (of a size and number of tensors) done and all cases.

    Raises:
        InputError: a size or number of rounds below 1, or a sparsity outside [0, 1) or that keeps nothing.
    """
    if rounds < 1 or min(sizes, default=1) < 1:
        raise InputError(f"sizes and rounds must be at least 1, got {list(sizes)} and {rounds}")
    if not 0 <= sparsity < 1 or any(kept(sparsity, size) < 1 for size in sizes):
        raise InputError(f"sparsity must be in [0, 1) and keep at least one of {list(sizes)} scores, got {sparsity}")
    bandwidth = _bandwidth()
    cases = [(size, tensors) for size in sizes for tensors in TENSORS]
    rows: list[dict[str, Any]] = []
    for number, (size, tensors) in enumerate(cases):
        if progress:
            progress(number, len(cases))
        rows += _measure(size, tensors, kept(sparsity, size), rounds, bandwidth)
    return rows


def _measure(size: int, tensors: int, keep: int, rounds: int, bandwidth: float) -> list[dict[str, Any]]:
    scores = _scores(size)
    parts = list(scores.tensor_split(tensors))
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for round_ in range(rounds + 1):
        names = list(METHODS)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:  # nobody always comes after the same one
            times[name].append(_seconds(partial(METHODS[name], parts, keep)))
    bound = size * (scores.element_size() + 1) / bandwidth
    smallest = scores.topk(keep, sorted=False).values.min()
    mask = torch.cat([part.flatten() for part in select(parts, keep)])
    exact = int(mask.count_nonzero()) == keep and bool(scores.masked_fill(~mask, torch.inf).min() == smallest)
    del scores, parts, mask
    memory = {name: _peak_memory(name, size, tensors, keep) for name in METHODS}
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return [
        {
            "scores": size,
            "tensors": tensors,
            "kept": keep,
            "method": name,
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "seconds": medians[name],
            "fastest_seconds": min(times[name][1:]),
            "speedup_over_topk": medians["torch.topk"] / medians[name],
            "bandwidth_bytes_per_second": bandwidth,
            "bound_seconds": bound,
            "times_bound": medians[name] / bound,
            "working_bytes": memory[name][0],
            "result_bytes": memory[name][1],
            "exact": exact if name == "niwaki" else None,
        }
        for name in METHODS
    ]


def _scores(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).abs_()


def _bandwidth() -> float:
    """Return the bytes that torch.sum reads in a second from a tensor larger than most caches."""
    buffer = torch.ones(2**26)
    return buffer.nbytes / min(_seconds(buffer.sum) for _ in range(20))


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    result = work()
    elapsed = time.perf_counter() - begin
    del result  # freed outside the measured time
    return elapsed


def _peak_memory(name: str, size: int, tensors: int, keep: int) -> tuple[int | None, int]:
    """Return the peak of resident memory beyond scores and result, and the memory of the result, in bytes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_memory_here, name, size, tensors, keep, torch.get_num_threads()).result()


def _peak_memory_here(name: str, size: int, tensors: int, keep: int, threads: int) -> tuple[int | None, int]:
    torch.set_num_threads(threads)
    work = METHODS[name]
    work([torch.rand(10)], 5)  # loads what is loaded once
    parts = list(_scores(size).tensor_split(tensors))
    gc.collect()
    try:
        # Linux: sets the peak (VmHWM) to what is resident now (VmRSS).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None, sum(tensor.nbytes for tensor in work(parts, keep))
    before = _status("VmRSS")
    result = work(parts, keep)
    size_of_result = sum(tensor.nbytes for tensor in result)
    return max(0, _status("VmHWM") - before - size_of_result), size_of_result


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, key
    return 1024 * int(found[1])


def table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return the rows as a table for people."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for header in ("scores", "tensors"):
        result.add_column(header, justify="right")
    result.add_column("method")
    for header in ("seconds", "faster than topk", "x bound", "working memory", "result", "exact"):
        result.add_column(header, justify="right")
    for row in rows:
        working, exact = row["working_bytes"], row["exact"]
        result.add_row(
            f"{row['scores']:,}",
            f"{row['tensors']}",
            row["method"],
            f"{row['seconds']:.4f}",
            f"{row['speedup_over_topk']:.1f}x",
            f"{row['times_bound']:.1f}",
            "-" if working is None else f"{working / MIB:,.0f} MiB",
            f"{row['result_bytes'] / MIB:,.0f} MiB",
            "-" if exact is None else "yes" if exact else "NO",
        )
    return result
