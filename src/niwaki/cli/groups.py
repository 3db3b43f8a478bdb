"""``niwaki groups``: which parts of a model can be removed, and what goes with them."""

from __future__ import annotations

from typing import Any

import click

from niwaki.cli import training
from niwaki.cli.options import data_option, json_option, model_option, print_json, task_option


@click.command(
    short_help="List what of a model can be removed as a whole.",
    epilog="\b\nExamples:\n  niwaki groups --task digits --model convnet\n"
    "  niwaki groups --task cifar10 --data DATA --model resnet20 --layers",
)
@task_option
@model_option
@data_option("Where the task's files are")
@click.option("--layers", is_flag=True, help="Look for whole residual blocks too; runs the model a few times more.")
@json_option
def groups(layers: bool, as_json: bool, **options: Any) -> None:
    """List the dependency groups of a model: channels, neurons, heads, with the tensors that lose entries together when one is removed.

    Groups of which nothing can be removed say why.
    """
    from niwaki.dependency import find_groups

    task = training.task(options)
    name, _ = task.model(options["model"])
    examples = task.data(options["data"])
    found = find_groups(task.build(name, examples, 0), tuple(task.example(examples)), layers=layers)
    if as_json:
        print_json({"model": name, "groups": [group.to_data() for group in found], "notes": found.notes})
        return
    from niwaki.cli.tables import print_groups

    print_groups(name, found)
