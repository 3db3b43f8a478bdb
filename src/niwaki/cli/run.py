"""``niwaki run``: the main job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from niwaki.cli.options import json_option, print_json
from niwaki.errors import InputError

if TYPE_CHECKING:
    from niwaki.recipe import Recipe
    from niwaki.training.jobs import Job
    from niwaki.training.record import Epoch

Progress = Callable[[str, int, int, "Epoch | None"], None]


@click.command(
    short_help="Train dense, train sparse, and compare.",
    epilog="\b\nExamples:\n"
    "  niwaki run gmp --task digits --sparsity 0.9 --out runs/gmp\n"
    "  niwaki run rigl --task digits --model convnet --sparsity 0.95 --dry-run\n"
    "  niwaki run my-recipe.yaml --task digits --out runs/mine",
)
@click.argument("method")
@click.option("--task", metavar="TASK", help="What to train: digits.  [required]")
@click.option("--model", metavar="MODEL", help="Which of the task's networks; digits has mlp (the default) and convnet.")
@click.option("--sparsity", type=float, metavar="S", help="Share of the targets' weights to mask, in [0, 1); by default the method's own.")
@click.option("--cut", is_flag=True, help="For methods whose strength decides: a final exact cut to --sparsity by their learned score.")
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=0,
    show_default=True,
    help="Of weights, order of examples and sparsifier.",
)
@click.option("--epochs", type=click.IntRange(min=1), metavar="N", help="Length of each training, dense and sparse; by default the task's.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="A new or empty folder, for run.json and model.safetensors.")
@click.option("--dry-run", is_flag=True, help="Show which tensor would lose how much, when and why; train and write nothing.")
@json_option
def run(
    method: str,
    task: str | None,
    model: str | None,
    sparsity: float | None,
    cut: bool,
    seed: int,
    epochs: int | None,
    out: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a dense baseline, train again while METHOD sparsifies, evaluate, save, and compare.

    METHOD is a name that `niwaki methods` lists, or a YAML file with a recipe. Both trainings start from the same weights and see the
    same batches. A folder that already holds the same run shows its result again.
    """
    from niwaki.tasks import TASKS
    from niwaki.tasks import task as find_task
    from niwaki.training import job

    if task is None:
        raise InputError(f"run: --task is missing; choices: {', '.join(TASKS)}")
    if out is None and not dry_run:
        raise InputError("run: --out is missing; give a new or empty folder for the result, or --dry-run")
    recipe = _recipe(method, sparsity, cut)
    chosen = job(find_task(task), recipe, method=method, model=model, seed=seed, epochs=epochs)
    if dry_run:
        _show_plan(chosen, as_json)
    else:
        assert out is not None
        _run(chosen, out, as_json)


def _recipe(method: str, sparsity: float | None, cut: bool) -> Recipe:
    import niwaki
    from niwaki.catalogue import CUT

    path = Path(method)
    if path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
        return niwaki.method(method, sparsity=sparsity, cut=cut)
    recipe = niwaki.Recipe.read(path)
    if cut and sparsity is None:
        raise InputError("--cut: needs the --sparsity to cut to")
    fields: dict[str, Any] = {field: value for field, value in CUT.items() if cut and field not in recipe.given}
    try:
        return recipe if sparsity is None else recipe.replace(sparsity=sparsity, **fields)
    except InputError as error:
        raise InputError(f"{method}: {error}") from None


def _run(job: Job, out: Path, as_json: bool) -> None:
    from niwaki import training
    from niwaki.training.folder import finished_before

    again = finished_before(out, job.choices) is not None
    with _progress(job, shown=not again) as progress:
        record = training.run(job, out, progress)
    if as_json:
        print_json({"folder": str(out), **record.model_dump(mode="json", by_alias=True)})
    else:
        from niwaki.cli.tables import print_run

        print_run(record, out, again)


def _show_plan(job: Job, as_json: bool) -> None:
    plan = job.plan()
    if as_json:
        print_json({"choices": job.choices.model_dump(mode="json"), "total_steps": job.total_steps, **plan.to_data()})
    else:
        from niwaki.cli.tables import print_plan

        print_plan(job, plan)


@contextmanager
def _progress(job: Job, shown: bool) -> Iterator[Progress | None]:
    """Show a bar for each of the two trainings on standard error, where it is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description:<7}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        rows: dict[str, TaskID] = {}
        headline = next(iter(job.task.metrics))

        def progress(phase: str, step: int, total: int, epoch: Epoch | None) -> None:
            if phase not in rows:
                rows[phase] = bars.add_task(phase, total=total, note="")
            bars.update(rows[phase], completed=step)
            if epoch is not None:
                bars.update(rows[phase], note=f"{headline} {epoch.metrics[headline]:.4f}  sparsity {epoch.sparsity:.3f}")

        yield progress
