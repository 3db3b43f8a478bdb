"""What the commands that train share: their options, what they make of them, progress, and what is shown at the end."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import click

from niwaki.cli.options import PATH, Memory, checkpoint_option, data_option, definitions_option, model_option, print_json, task_option
from niwaki.errors import InputError, NiwakiError

if TYPE_CHECKING:
    from niwaki.recipe import Recipe
    from niwaki.tasks import Task
    from niwaki.training.jobs import Job
    from niwaki.training.record import Epoch, Record

Progress = Callable[[str, int, int, "Epoch | None"], None]

PROGRESS_WIDTH = 100
"""Columns of a terminal that progress bars use at most."""


def _seed(context: click.Context, parameter: click.Parameter, value: int) -> int:
    if not 0 <= value < 2**63:
        raise click.BadParameter(f"{value} is not in the range from 0 to 2^63 - 1", context, parameter)
    return value


_OPTIONS = (
    task_option,
    model_option,
    data_option("Where the task's files are"),
    click.option(
        "--sparsity",
        type=float,
        metavar="S",
        help="Share of the targets' weights to mask, in [0, 1); by default the method's own.",
    ),
    click.option(
        "--seed",
        type=int,
        callback=_seed,
        default=0,
        show_default=True,
        metavar="K",
        help="Of weights, order of examples and sparsifier.",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Another setting of the training, such as learning_rate=0.01, batch_size=64 or precision=bfloat16.",
    ),
    click.option(
        "--out",
        type=PATH,
        metavar="DIR",
        help="For run.json, model.safetensors and report.html; by default a folder in runs/ named by what determines the run.",
    ),
    click.option(
        "--memory",
        type=Memory(),
        metavar="BYTES",
        help="Most that METHOD's statistics may take, such as 2GiB; what needs more is refused, and told what would fit.",
    ),
    checkpoint_option,
    definitions_option,
)


def _method(context: click.Context, parameter: click.Parameter, value: str) -> str:
    path = Path(value)
    if len(path.parts) != 1 and not path.is_file():
        raise InputError(f"{value}: there is no such file; METHOD is a name that `niwaki methods` lists, or a YAML file with a recipe")
    return value


method_argument = click.argument("method", callback=_method)


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a training, and join it with the others that torchrun started: their number is one of its choices."""

    @wraps(command)
    def together(**given: Any) -> None:
        from niwaki.training import processes

        with processes.joined():
            command(**given)

    for option in reversed(_OPTIONS):
        together = option(together)
    return together


def task(given: Mapping[str, Any]) -> Task:
    """Return the task that the options name."""
    from niwaki.tasks import TASKS, find

    if given["task"] is None:
        raise InputError(f"--task: missing; choices: {', '.join(TASKS)}, or your own: path/to/file.py:object")
    return find(given["task"], given["model"])


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the training that ``--set`` and ``--epochs`` give; what they mean is checked with the job.

    Raises:
        InputError: no KEY=VALUE, or both say how many epochs.
    """
    found: dict[str, Any] = {}
    for text in given["settings"]:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set: {text!r} is no KEY=VALUE, such as learning_rate=0.01")
        found[name.strip()] = None if value.strip().lower() == "none" else value.strip()
    if given["epochs"] is not None:
        if "epochs" in found:
            raise InputError("--set: epochs stands twice, also in --epochs; say it once")
        found["epochs"] = given["epochs"]
    return found


def job(task: Task, recipe: Recipe, method: str, given: Mapping[str, Any], kind: Literal["run", "prune"] = "run") -> Job:
    """Return the job that the options describe."""
    from niwaki.training import jobs

    return jobs.job(
        task,
        recipe,
        method=method,
        data_folder=given["data"],
        model=given["model"],
        seed=given["seed"],
        training=settings(given),
        start=given["start"],
        kind=kind,
    )


def folder(job: Job, out: Path | None) -> Path:
    """Return the folder of a run: the one that was asked for, or one that is named by what determines the run."""
    if out is not None:
        return out
    choices = job.choices
    words = [choices.task, choices.model, choices.method_name]
    name = "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in word) for word in words)
    return Path("runs") / f"{name}-{choices.identity()[:10]}"


def carry_out(jobs: Sequence[tuple[Job, Path]], given: Mapping[str, Any], as_json: bool) -> None:
    """Run jobs one after the other, write their reports, and show the results."""
    from niwaki.cli.interrupts import stop_on_signal
    from niwaki.training import processes
    from niwaki.training.baseline import Sitting
    from niwaki.training.folder import finished_before
    from niwaki.training.jobs import run
    from niwaki.training.state import Interrupted

    done: list[tuple[Path, Record, bool]] = []
    for job, out in jobs:  # what is wrong with any of them is told before the first one trains
        finished_before(out, job.choices)
    with stop_on_signal() as stop:
        for job, out in jobs:
            again = finished_before(out, job.choices) is not None
            try:
                with _progress(job, shown=not again and processes.rank() == 0, several=len(jobs) > 1) as progress:
                    sitting = Sitting(given["checkpoint_every"], stop, progress, given["memory"], say_statistics)
                    record = run(job, out, baselines=given.get("baselines"), sitting=sitting)
            except Interrupted as error:
                if processes.rank() > 0:  # the first process says it
                    raise click.exceptions.Exit(1) from None
                raise NiwakiError(f"{error}; to go on, give the same command again: {_command()}") from None
            done.append((out, record, again))
        if processes.rank() > 0:
            return
        for out, record, again in done:
            write_report(record, out, fresh=not again)
        if as_json:
            data = [{"folder": str(out), **record.model_dump(mode="json", by_alias=True)} for out, record, _ in done]
            print_json(data if given.get("seeds") else data[0])
            return
        from niwaki.cli.tables import print_comparison, print_run

        if len(done) > 1:
            print_comparison([(str(out), record) for out, record, _ in done], given["definitions"])
            click.echo(f"Saved in {', '.join(str(out) for out, _, _ in done)}: run.json, model.safetensors, report.html")
        else:
            out, record, again = done[0]
            print_run(record, out, again, given["definitions"])


def say_statistics(needed: int) -> None:
    """Say on standard error what statistics will take, if there are any."""
    from niwaki.metrics.units import show

    if needed:
        click.echo(f"statistics take {show(needed, 'bytes')} at most", err=True)


def write_report(record: Record, folder: Path, fresh: bool) -> None:
    """Write the report of a finished run beside it, where it is missing or the run is new."""
    from niwaki import report

    path = folder / "report.html"
    if fresh or not path.exists():
        report.write(report.run_report(record), path)


def report_link(folder: Path, page: Path) -> str | None:
    """Return the address of a run's report as seen from a page, or None when it has none."""
    path = (folder if folder.is_dir() else folder.parent) / "report.html"
    return quote(os.path.relpath(path.absolute(), page.absolute().parent).replace(os.sep, "/")) if path.exists() else None


def _command() -> str:
    processes = os.environ.get("WORLD_SIZE", "1")
    launcher = ["niwaki"] if processes == "1" else ["torchrun", "--nproc-per-node", processes, "-m", "niwaki"]
    return shlex.join([*launcher, *sys.argv[1:]])


@contextmanager
def _progress(job: Job, shown: bool, several: bool) -> Iterator[Progress | None]:
    """Show a bar for each of the two trainings on standard error, where it is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield None
        return
    console.width = min(console.width, PROGRESS_WIDTH)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[note]}"),
    )
    bars = Progress(*columns, console=console, transient=True, expand=True)
    rows: dict[str, TaskID] = {}
    headline, metric = next(iter(job.task.metrics.items()))

    def progress(phase: str, step: int, total: int, epoch: Epoch | None) -> None:
        if phase not in rows:
            named = f"seed {job.seed} {phase}" if several else phase
            rows[phase] = bars.add_task(named, total=total, completed=step, note="")  # a training that goes on begins where it was
            bars.start()
        bars.update(rows[phase], completed=step, total=total)  # a stage may end early
        if epoch is not None:
            value = epoch.metrics[headline]
            shown = f"{100 * value:.2f} %" if metric.percent else f"{value:.4f}"
            sparsity = f", sparsity {epoch.sparsity:.3f}" if epoch.sparsity else ""
            bars.update(rows[phase], note=f"{headline} {shown}{sparsity}")

    try:
        yield progress
    finally:
        bars.stop()
