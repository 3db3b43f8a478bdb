"""``niwaki run``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from niwaki.cli import training
from niwaki.cli.options import PATH, json_option, print_json
from niwaki.errors import InputError

if TYPE_CHECKING:
    from niwaki.training.jobs import Job


@click.command(
    short_help="Train dense, train sparse, and compare.",
    epilog="\b\nExamples:\n"
    "  niwaki run gmp --task digits --sparsity 0.9 --out runs/gmp\n"
    "  niwaki run rigl --task digits --model convnet --sparsity 0.95 --dry-run\n"
    "  niwaki run my-recipe.yaml --task my_task.py:task --seeds 3\n"
    "  niwaki run gmp --task cifar10 --data DATA --from resnet20.safetensors --sparsity 0.9 --epochs 5 --set learning_rate=0.01",
)
@training.method_argument
@training.options
@click.option("--epochs", type=click.IntRange(min=0), metavar="N", help="Length of each training; by default the task's.")
@click.option(
    "--baselines",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where dense baselines are kept; by default .baselines beside --out.",
)
@click.option("--cut", is_flag=True, help="For methods whose strength decides: a final exact cut to --sparsity by their learned score.")
@click.option("--from", "start", type=PATH, metavar="FILE", help="Start both trainings from the weights in a .safetensors file.")
@click.option(
    "--seeds", type=click.IntRange(min=1), metavar="N", help="Run N times, with seeds --seed, --seed + 1, ...: folders OUT/seed-K."
)
@click.option("--shrink", is_flag=True, help="In the end, take out of the model what is masked as a whole: it is smaller then, and dense.")
@click.option("--dry-run", is_flag=True, help="Show which tensor would lose how much, when and why; train and write nothing.")
@json_option
def run(method: str, cut: bool, seeds: int | None, shrink: bool, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train a dense baseline, train again while METHOD sparsifies, evaluate, save, and compare.

    METHOD is a name that `niwaki methods` lists, or a YAML file with a recipe. Both trainings start from the same weights and see the
    same batches. A run that was interrupted, in whatever way, goes on from its last checkpoint when the same command is given again;
    a finished one shows its result again. Dense baselines are trained once and kept.
    """
    from niwaki import catalogue

    recipe = catalogue.find(method, options["sparsity"], cut)
    if shrink:
        from niwaki.recipe.stages import then_shrink

        recipe = then_shrink(recipe)
    task = training.task(options)
    asked = [training.job(task, recipe, method, {**options, "seed": options["seed"] + i}) for i in range(seeds or 1)]
    if dry_run:
        show_plan(asked[0], method, options["memory"], as_json)
        return
    if options["out"] is not None and seeds is not None:
        from niwaki.training.record import FILE

        if (options["out"] / FILE).exists():
            raise InputError(f"--out: {options['out']} holds a run, and --seeds needs a folder of folders; give another folder")
        folders = [options["out"] / f"seed-{job.seed}" for job in asked]
    else:
        folders = [training.folder(job, options["out"]) for job in asked]
    training.carry_out(list(zip(asked, folders, strict=True)), {**options, "seeds": seeds}, as_json)


def show_plan(job: Job, method: str, memory: int | None, as_json: bool) -> None:
    """Print what a run would do."""
    from niwaki.recipe.stages import unroll

    plans = {leaf.number: plan for leaf, plan in job.plans()}
    stages = [(leaf, plans.get(leaf.number)) for leaf in unroll(job.recipe)]
    if not any(plan is not None or leaf.prune is not None for leaf, plan in stages):
        raise InputError(f"{method}: no stage of this recipe masks anything")
    needed = job.statistics_bytes(memory)
    if as_json:
        said = [{"stage": leaf.number, "says": leaf.says, **({} if plan is None else plan.to_data())} for leaf, plan in stages]
        choices = job.choices.model_dump(mode="json")
        print_json({"choices": choices, "steps_per_epoch": job.steps_per_epoch, "statistics_bytes": needed, "stages": said})
        return
    training.say_statistics(needed)
    from niwaki.cli.tables import print_plan

    print_plan(job, [(leaf, plan) for leaf, plan in stages if plan is not None])
