"""``niwaki groups``: which parts of a model can be removed, and what goes with them."""

from __future__ import annotations

from pathlib import Path

import click

from niwaki.cli.options import json_option, print_json
from niwaki.errors import InputError


@click.command(
    short_help="List what of a model can be removed as a whole.",
    epilog="\b\nExamples:\n  niwaki groups --task digits --model convnet\n"
    "  niwaki groups --task cifar10 --data DATA --model resnet20 --layers",
)
@click.option("--task", "task_name", metavar="TASK", help="A built-in task, or your own FILE.py:OBJECT.  [required]")
@click.option("--model", metavar="MODEL", help="Which of the task's networks, by default its first; or timm:NAME, hf:FOLDER.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    envvar="NIWAKI_DATA",
    metavar="DIR",
    help="Where the task's files are; by default what the variable NIWAKI_DATA says.",
)
@click.option("--layers", is_flag=True, help="Look for whole residual blocks too; runs the model a few times more.")
@json_option
def groups(task_name: str | None, model: str | None, data: Path | None, layers: bool, as_json: bool) -> None:
    """List the dependency groups of a model: channels, neurons, heads, with the tensors that lose entries together when one is removed.

    Groups of which nothing can be removed say why.
    """
    from niwaki.dependency import find_groups
    from niwaki.tasks import TASKS, find

    if task_name is None:
        raise InputError(f"--task: missing; choices: {', '.join(TASKS)}, or your own: path/to/file.py:object")
    task = find(task_name, model)
    name, _ = task.model(model)
    examples = task.data(data)
    found = find_groups(task.build(name, examples, 0), tuple(task.example(examples)), layers=layers)
    if as_json:
        print_json({"model": name, "groups": [group.to_data() for group in found], "notes": found.notes})
        return
    from niwaki.cli.tables import print_groups

    print_groups(name, found)
