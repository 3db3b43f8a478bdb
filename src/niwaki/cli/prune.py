"""``niwaki prune``: a trained model, pruned at once or in a few rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from niwaki.cli import training
from niwaki.cli.options import json_option
from niwaki.errors import InputError


@click.command(
    short_help="Prune a trained model, with or without fine-tuning.",
    epilog="\b\nExamples:\n"
    "  niwaki prune magnitude --task cifar10 --data DATA --from resnet20.safetensors --sparsity 0.5\n"
    "  niwaki prune gmp --task digits --from runs/dense.safetensors --sparsity 0.9 --epochs 5 --rounds 3",
)
@training.method_argument
@training.options
@click.option("--epochs", type=click.IntRange(min=0), metavar="N", help="Length of the fine-tuning; by default there is none.")
@click.option(
    "--from", "start", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The trained model, a .safetensors file."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="R",
    help="Prune in R rounds, with fine-tuning before each; needs --epochs.",
)
@json_option
def prune(method: str, rounds: int, as_json: bool, **options: Any) -> None:
    """Prune a trained model by METHOD's criterion, fine-tune it for --epochs (none by default), and compare it with the trained one.

    Of METHOD, what chooses the weights is used (saliency, granularity, allocation, ...). Its schedule and growth are not: all is
    pruned at once before the fine-tuning, or in --rounds during it.
    """
    from niwaki import catalogue
    from niwaki.recipe.stages import once

    if catalogue.find(method).stages is not None:
        try:
            once(catalogue.find(method))
        except InputError as error:
            raise InputError(f"prune: {method} has stages, which are for niwaki run ({error}); choose a method without") from None
    recipe = catalogue.find(method, options["sparsity"])
    if recipe.stages is not None:
        recipe = once(recipe)
    if recipe.final_sparsity is None:
        raise InputError(f"prune: {method} does not rank weights to a given sparsity; choose a method that does, such as magnitude")
    if rounds == 1 and "score" in recipe.saliency.needs:
        raise InputError(f"prune: {method} learns its scores by training, and all is pruned before that; choose another method")
    epochs = training.settings(options).get("epochs")
    if epochs is None:
        options["epochs"] = 0
    if rounds > 1 and epochs in (None, 0, "0"):
        raise InputError("--rounds: there is fine-tuning before each round; say its whole length with --epochs")
    schedule = "one_shot" if rounds == 1 else {"iterative": {"rounds": rounds, "begin": "0 run", "end": f"{rounds / (rounds + 1)} run"}}
    recipe = recipe.replace(schedule=schedule, growth=None)
    task = training.task(options)
    job = training.job(task, recipe, method, options, kind="prune")
    training.carry_out([(job, training.folder(job, options["out"]))], options, as_json)
