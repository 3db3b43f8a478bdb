"""Sweeps: many runs, carried out by worker processes.

A run's folder is named by what determines the run, so a sweep that was interrupted goes on where it was, a sweep that grew runs what is
new, and nothing is computed twice.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch

from niwaki import workers
from niwaki.errors import InputError
from niwaki.formats.files import replacing
from niwaki.tasks import Task
from niwaki.training import jobs
from niwaki.training.baseline import Sitting
from niwaki.training.folder import finished_before
from niwaki.training.record import Epoch, Record, read
from niwaki.training.sweep_file import IDENTITY, Point, Run, resolve

SCHEMA = "niwaki.sweep/2"
FILE = "sweep.json"
LOG = "sweep.log"
"""Everything that runs print."""

BASELINES = ".baselines"
LOCKS = ".locks"
SPARSITY = "sparsity of the targets"
FORWARD = "forward FLOPs"
FOUND = {"sparsity": SPARSITY, "active_parameters": "active parameters", "training_flops": "training FLOPs", "forward_flops": FORWARD}
"""Measures of a run that ``sweep.json`` repeats, by the name that they have there."""

SILENCE_SECONDS = 0.2
"""A run tells its steps at most this often."""


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        record: of a ``done`` run.
        error: of a ``failed`` one, in one line.
        traceback: where the error is none that was foreseen.
    """

    status: Literal["waiting", "done", "failed", "interrupted"] = "waiting"
    record: Record | None = None
    error: str = ""
    traceback: str = ""


def placed(runs: Sequence[Run], out: Path) -> list[Run]:
    """Return the runs with the folders that they have in ``out``, where a sweep with other axes may have named them differently."""
    try:
        there = {path.name[-IDENTITY:]: path.name for path in out.iterdir() if path.name[-IDENTITY - 1 : -IDENTITY] == "-"}
    except OSError:  # not there yet, or not usable, which is told when it is made
        return list(runs)
    return [replace(run, folder=there.get(run.choices.identity()[:IDENTITY], run.folder)) for run in runs]


def outcomes(runs: Sequence[Run], out: Path) -> list[Outcome]:
    """Return what is known of the runs from their folders: done, waiting, or (a folder that cannot be used) failed."""
    found = []
    for run in runs:
        try:
            record = finished_before(out / run.folder, run.choices)
            found.append(Outcome() if record is None else Outcome("done", record))
        except InputError as error:
            found.append(Outcome("failed", error=str(error)))
    return found


def carry_out(
    runs: Sequence[Run],
    found: list[Outcome],
    out: Path,
    *,
    processes: int,
    every: float = 30.0,
    told: Callable[[workers.Event], None] = lambda event: None,
) -> bool:
    """Carry out the runs that are waiting, several at a time, and change ``found`` accordingly.

    Each run goes to its own folder in ``out``; ``sweep.json`` there says how far the sweep is. A run that fails stops no other one.

    Args:
        runs: of :func:`plan`.
        found: of :func:`outcomes`.
        out: the sweep's folder; is made.
        processes: how many worker processes.
        every: seconds between checkpoints of a run.
        told: called with every event; ``order`` is the number of the run.

    Returns:
        Whether no signal stopped it.

    Raises:
        InputError: the folder cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {out} cannot be made ({error.strerror}); give another folder") from None
    waiting = _spread([number for number, outcome in enumerate(found) if outcome.status == "waiting"], runs)
    _write(runs, found, out)

    def happened(event: workers.Event) -> None:
        if event.kind != "stopping":
            event = replace(event, order=waiting[event.order])
        if event.kind == "done":
            found[event.order] = Outcome("done", read(out / runs[event.order].folder))
        elif event.kind == "failed":
            found[event.order] = Outcome("failed", error=event.content, traceback=event.detail)
        elif event.kind == "interrupted":
            found[event.order] = Outcome("interrupted")
        if event.kind in ("done", "failed", "interrupted"):
            _write(runs, found, out)
        told(event)

    orders = [_order(runs[number], out, every) for number in waiting]
    threads = {"OMP_NUM_THREADS": str(max(1, min(torch.get_num_threads(), cores() // processes)))}
    return workers.distribute(f"{__name__}:worker", orders, processes, happened, log=out / LOG, environment=threads)


def _order(run: Run, out: Path, every: float) -> dict[str, Any]:
    point = run.point.model_dump(by_alias=True, exclude_unset=True)
    return {"point": point, "identity": run.choices.identity(), "out": str(out), "folder": run.folder, "every": every}


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


def default_processes(runs: Sequence[Run]) -> int:
    """Return as many worker processes as there are cores for the threads that each run uses, at least one."""
    return max(1, cores() // max(run.choices.training.threads or torch.get_num_threads() for run in runs))


def _spread(waiting: list[int], runs: Sequence[Run]) -> list[int]:
    """Let runs with different dense baselines come first: the others would wait for those to be trained."""
    seen: dict[str, int] = {}

    def earlier(number: int) -> int:
        baseline = runs[number].choices.baseline()
        seen[baseline] = seen.get(baseline, -1) + 1
        return min(seen[baseline], 1)

    return sorted(waiting, key=earlier)


def worker() -> workers.CarryOut:
    """Return what carries out the runs of a sweep in a worker process, and keeps the data of their tasks."""
    known: dict[tuple[str | None, ...], Task] = {}

    def carry_out_one(order: Any, tell: Callable[[Any], None], stopped: Callable[[], bool]) -> None:
        out = Path(order["out"])
        with _claimed(out / LOCKS, order["identity"]):
            job = resolve(Point(**order["point"]), known)
            if job.choices.identity() != order["identity"]:
                raise InputError("the task, its data or the method changed since the sweep began; give the same command again")

            said, now = 0.0, ("", 0.0)

            def progress(phase: str, step: int, total: int, epoch: Epoch | None) -> None:
                nonlocal said, now
                if epoch is not None or phase != now[0]:
                    now = phase, 0.0 if epoch is None else epoch.epoch
                if epoch is not None or time.monotonic() - said > SILENCE_SECONDS:
                    tell({"phase": phase, "step": step, "total": total, "epoch": now[1]})
                    said = time.monotonic()

            sitting = Sitting(every=order["every"], stop=stopped, progress=progress)
            jobs.run(job, out / order["folder"], baselines=out / BASELINES, sitting=sitting)

    return carry_out_one


@contextmanager
def _claimed(path: Path, identity: str) -> Iterator[None]:
    """Keep this run from other sweeps in the same folder until the block ends. Raises Busy when one of them has it.

    The lock is one byte of a file, at a place that the identity gives; the system releases it when the process ends, in any way.
    """
    with path.open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(identity[:15], 16))
        except OSError:
            raise workers.Busy from None
        yield


def summary(runs: Sequence[Run], found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the headline metric of the runs that are done: one row for all runs that differ in their seed alone.

    ``sparsity`` is the mean share of the targets' weights that is masked. ``dense`` and ``sparse`` have the value of each seed, their
    ``mean``, and their standard deviation ``sd`` (with n - 1 in the denominator; None for one seed).
    """
    groups: dict[str, list[tuple[Run, Record]]] = {}
    for run, outcome in zip(runs, found, strict=True):
        if outcome.record is not None:
            alike = run.point.model_copy(update={"seed": 0}).model_dump_json()
            groups.setdefault(alike, []).append((run, outcome.record))
    return [_row(members) for members in groups.values()]


def _row(members: Sequence[tuple[Run, Record]]) -> dict[str, Any]:
    point, choices = members[0][0].point, members[0][0].choices
    headlines = [record.headline for _, record in members]
    return {
        "task": choices.task,
        "model": choices.model,
        "method": point.method,
        "training": dict(point.training),
        "sparsity": _over_seeds([record.measure(SPARSITY).sparse for _, record in members])["mean"],
        "seeds": [run.point.seed for run, _ in members],
        "metric": headlines[0].name,
        "unit": headlines[0].unit,
        "dense": _over_seeds([one.dense for one in headlines]),
        "sparse": _over_seeds([one.sparse for one in headlines]),
    }


def _over_seeds(found: Sequence[float | None]) -> dict[str, Any]:
    values = [value for value in found if value is not None]
    return {"values": values, "mean": fmean(values) if values else None, "sd": stdev(values) if len(values) > 1 else None}


def to_data(runs: Sequence[Run], found: Sequence[Outcome]) -> dict[str, Any]:
    """Return the state of a sweep as plain data: what ``sweep.json`` holds.

    Of a run that is done ``found`` has the sparsity of the targets, the parameters that are left, the FLOPs of its training as a multiple
    of those of as many dense steps, the FLOPs of a forward pass of both models, how many epochs it lasted (several runs' worth where a
    recipe's stages say so), and the headline metric epoch by epoch.
    """
    rows = []
    for run, outcome in zip(runs, found, strict=True):
        record = outcome.record
        rows.append(
            {
                "folder": run.folder,
                "status": outcome.status,
                "identity": run.choices.identity(),
                "point": run.point.model_dump(by_alias=True, exclude_unset=True),
                "headline": None if record is None else record.headline.model_dump(include={"name", "unit", "dense", "sparse"}),
                "found": None if record is None else _found(record),
                "error": outcome.error or None,
                "traceback": outcome.traceback or None,
            }
        )
    return {"schema": SCHEMA, "runs": rows, "summary": summary(runs, found)}


def _found(record: Record) -> dict[str, Any]:
    assert record.results is not None
    epochs = record.results.sparse_history
    return {
        **{key: record.measure(name).sparse for key, name in FOUND.items()},
        "dense_forward_flops": record.measure(FORWARD).dense,
        "epochs": epochs[-1].epoch if epochs else 0,
        "history": [epoch.metrics[record.headline.name] for epoch in epochs],
    }


def to_text(data: dict[str, Any]) -> str:
    """Return what :func:`to_data` found as JSON, with a line for each run, so that versions of it can be compared."""
    parts = []
    for field, value in data.items():
        rows = [json.dumps(row, allow_nan=False) for row in value] if isinstance(value, list) else []
        parts.append(f'"{field}": ' + ("[\n" + ",\n".join(rows) + "\n]" if rows else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _write(runs: Sequence[Run], found: Sequence[Outcome], out: Path) -> None:
    with replacing(out / FILE) as file:
        file.write(to_text(to_data(runs, found)).encode())
