"""``niwaki sweep``: many runs, from a file of axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from niwaki.cli.options import PATH, checkpoint_option, json_option, print_json
from niwaki.cli.training import write_report
from niwaki.errors import InputError, NiwakiError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from niwaki.training.sweep import Outcome
    from niwaki.training.sweep_file import Run
    from niwaki.workers import Event

REPORT = "report.html"
EXAMPLE = """\b
An example of FILE:
  task: digits
  method: [gmp, rigl, my-recipe.yaml]
  sparsity: [0.8, 0.9, 0.95]
  seed: [0, 1, 2]
  epochs: 20
"""


@click.command(
    short_help="Many runs, from a file of axes.",
    epilog=EXAMPLE
    + "\n\b\nExamples:\n  niwaki sweep sweep.yaml --out runs/sweep --dry-run\n  niwaki sweep sweep.yaml --out runs/sweep --jobs 4",
)
@click.argument("file", type=PATH)
@click.option("--out", type=PATH, metavar="DIR", help="Where the runs' folders, sweep.json and report.html go.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Runs at the same time; by default the number of cores / threads that a run uses, at least 1.",
)
@checkpoint_option
@click.option("--dry-run", is_flag=True, help="Show the runs and which of them are done; train and write nothing.")
@json_option
def sweep(file: Path, out: Path | None, jobs: int | None, checkpoint_every: float, dry_run: bool, as_json: bool) -> None:
    """Carry out the runs that FILE describes, several at a time, and compare them.

    FILE is YAML. Its fields are options of `niwaki run`: task, method, model, sparsity, cut, seed, epochs, data, from; and training:
    with settings as --set has them. A list is an axis, any other value is fixed, and the runs are the product. A field runs: is a list
    of such products, each with what differs from the fields around it. Paths are relative to the current folder. All runs are checked
    before the first one begins.

    A sweep that was interrupted, in whatever way, goes on when the same command is given again; finished runs are not repeated, and
    failed ones are tried again. A run without a setting `threads` gets cores / N threads, and its numbers may depend on that in their
    last digits.
    """
    from niwaki.training import sweep as module
    from niwaki.training import sweep_file

    if out is None:
        raise InputError("sweep: --out is missing; give a folder for the runs")
    runs = module.placed(sweep_file.plan(sweep_file.read_points(file), str(file)), out)
    found = module.outcomes(runs, out)
    if dry_run:
        _show(runs, found, out, as_json, file=file)
        return
    processes = jobs or module.default_processes(runs)
    with _progress(runs, found, processes) as told:
        ended = module.carry_out(runs, found, out, processes=processes, every=checkpoint_every, told=told)
    done = [(run, outcome.record) for run, outcome in zip(runs, found, strict=True) if outcome.record is not None]
    if not ended:
        raise NiwakiError(f"interrupted: {len(done)} of {len(runs)} runs are done; give the same command again to go on")
    if done:
        from niwaki import report

        for run, record in done:
            write_report(record, out / run.folder, fresh=False)
        links = {run.folder: f"{quote(run.folder)}/{REPORT}" for run, _ in done}
        report.write(report.comparison_report([(run.folder, record) for run, record in done], links), out / REPORT)
    _show(runs, found, out, as_json)
    if len(done) < len(runs):
        failed = len(runs) - len(done)
        raise NiwakiError(
            f"{failed} of {len(runs)} runs failed; give the same command again to try {'it' if failed == 1 else 'them'} again"
        )


# -- progress --------------------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(runs: Sequence[Run], found: Sequence[Outcome], jobs: int) -> Iterator[Callable[[Event], None]]:
    """Show a line for each run that has ended on standard error; where that is a terminal, also the sweep and each worker as bars."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        def say(line: str) -> None:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

        for run, outcome in zip(runs, found, strict=True):
            if outcome.status == "failed":
                say(f"failed  {run.folder}: {outcome.error}")
        yield _View(runs, found, jobs, bars, say).happened


class _View:
    """What a sweep shows while it runs."""

    def __init__(self, runs: Sequence[Run], found: Sequence[Outcome], jobs: int, bars: Any, say: Callable[[str], None]) -> None:
        self.runs, self.found, self.jobs, self.bars, self.say = runs, found, jobs, bars, say
        self.whole: TaskID = bars.add_task("sweep", total=len(runs), note="")
        self.rows: dict[int, TaskID] = {}
        self.shares: dict[int, float] = {}
        self.seconds: list[float] = []
        self._sum_up()

    def happened(self, event: Event) -> None:
        """Show an event."""
        if event.kind == "stopping":
            self.say("stopping: each run saves a checkpoint; a second Ctrl-C stops at once")
            return
        folder = self.runs[event.order].folder
        if event.worker not in self.rows:
            self.rows[event.worker] = self.bars.add_task("", total=None, note="")
        row = self.rows[event.worker]
        if event.kind == "started":
            self.bars.reset(row, total=None, description=f"  {folder}", note="starting")
        elif event.kind == "progress":
            told = event.content
            epoch = f", {told['epoch']:g} epochs" if told["epoch"] else ""
            self.shares[event.worker] = (told["step"] / max(told["total"], 1) + (told["phase"] == "sparse")) / 2
            self.bars.update(row, total=told["total"], completed=told["step"], note=f"{told['phase']}{epoch}")
        else:
            self.shares.pop(event.worker, None)
            if event.kind == "done":
                self.seconds.append(event.seconds)
            self.say(_line(event, folder, self.found[event.order]))
            self.bars.reset(row, total=1, description="  idle", note="")
        self._sum_up()

    def _sum_up(self) -> None:
        status = [outcome.status for outcome in self.found]
        done, failed = status.count("done"), status.count("failed")
        words = [f"{done} of {len(self.runs)} runs", *([f"{failed} failed"] if failed else [])]
        if self.seconds and done + failed < len(self.runs):
            left = max(0.0, len(self.runs) - done - failed - sum(self.shares.values()))
            minutes, seconds = divmod(round(left * sum(self.seconds) / len(self.seconds) / min(self.jobs, len(self.runs))), 60)
            words.append(f"about {minutes // 60}:{minutes % 60:02}:{seconds:02} left")
        self.bars.update(self.whole, completed=done + failed, note=", ".join(words))


def _line(event: Event, folder: str, outcome: Outcome) -> str:
    if outcome.record is not None:
        from niwaki.metrics.units import show

        headline = outcome.record.headline
        values = f"{show(headline.sparse, headline.unit)}, dense {show(headline.dense, headline.unit)}"
        return f"done    {folder}: {headline.name} {values} ({event.seconds:.1f} s)"
    if event.kind == "interrupted":
        return f"stopped {folder}"
    return f"failed  {folder}: {outcome.error}" + (" (the traceback is in sweep.json)" if outcome.traceback else "")


# -- results ---------------------------------------------------------------------------------------------------------------------


def _show(runs: Sequence[Run], found: Sequence[Outcome], out: Path, as_json: bool, file: Path | None = None) -> None:
    """Print the results of a sweep; of a dry run (``file`` is given), its runs."""
    from niwaki.training import sweep as module

    if as_json:
        print_json({"folder": str(out), **module.to_data(runs, found)})
        return
    from niwaki.cli.tables import print_rows, table_of

    done = sum(outcome.status == "done" for outcome in found)
    if file is not None:
        table = table_of("folder", "run", "status", left=(0, 1, 2))
        for run, outcome in zip(runs, found, strict=True):
            table.add_row(run.folder, str(run.point), outcome.status)
        print_rows(str(file), f"dry run · {len(runs)} runs, {done} of them done", table, ["Nothing was trained or written."])
        return
    summary = module.summary(runs, found)
    if not summary:
        return
    headers, rows = _results(summary)
    table = table_of(*headers)
    for row in rows:
        table.add_row(*row)
    notes = [
        "mean ± standard deviation over the seeds, with n - 1 in the denominator; sparsity: masked weights / weights of the targets",
        *(f"failed: {run.folder}: {outcome.error}" for run, outcome in zip(runs, found, strict=True) if outcome.status == "failed"),
        f"Saved {out / REPORT}, {out / module.FILE}, and a folder for each run.",
    ]
    print_rows("sweep", f"{done} of {len(runs)} runs done", table, notes)


def _results(summary: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the headers and the rows of the table of results: what differs between the rows, and the headline metric."""
    described = [{"method": Path(row["method"]).stem, "task": row["task"], "model": row["model"], **row["training"]} for row in summary]
    known = dict.fromkeys(name for one in described for name in one)
    names = [name for name in known if name == "method" or len({repr(one.get(name)) for one in described}) > 1]
    metrics = list(dict.fromkeys(row["metric"] for row in summary))
    metric = metrics[0] if len(metrics) == 1 else "result"
    rows = []
    for one, row in zip(described, summary, strict=True):
        words = [str(one.get(name, "-")) for name in names]
        value, dense = (_mean(row[which], row["unit"]) for which in ("sparse", "dense"))
        named = value if len(metrics) == 1 else f"{row['metric']} {value}"
        rows.append([*words, f"{row['sparsity']:.4g}", str(len(row["seeds"])), named, dense])
    return [*names, "sparsity", "seeds", metric, "dense"], rows


def _mean(over_seeds: dict[str, Any], unit: str) -> str:
    from niwaki.metrics.units import show

    mean = show(over_seeds["mean"], unit)
    return mean if over_seeds["sd"] is None else f"{mean} ± {show(over_seeds['sd'], unit)}"
