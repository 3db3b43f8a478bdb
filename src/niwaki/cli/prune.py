"""``niwaki prune``: a trained model, pruned at once or in a few rounds; or a pretrained one in a folder, block by block."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from niwaki.cli import training
from niwaki.cli.interrupts import terminated_as_interrupted
from niwaki.cli.options import PATH, json_option, print_json
from niwaki.cli.progress import progress_bar
from niwaki.errors import InputError

if TYPE_CHECKING:
    from niwaki.oneshot.blockwise import Blockwise
    from niwaki.recipe import Recipe

OF_TASKS = {"task": "--task", "start": "--from", "epochs": "--epochs", "settings": "--set"}
"""Options for which a folder has no use."""

OF_FOLDERS = {
    "granularity": "--granularity",
    "allocation": "--allocation",
    "blocks": "--blocks",
    "examples": "--examples",
    "length": "--length",
    "together": "--together",
    "outside": "--prune-outside",
}
"""Options for which a task has no use."""


@click.command(
    short_help="Prune a trained model, with or without fine-tuning.",
    epilog="\b\nExamples:\n"
    "  niwaki prune magnitude --task cifar10 --data DATA --from resnet20.safetensors --sparsity 0.5\n"
    "  niwaki prune gmp --task digits --from runs/dense.safetensors --sparsity 0.9 --epochs 5 --rounds 3\n"
    "  niwaki prune woodfisher --task digits --from runs/dense.safetensors --sparsity 0.9 --memory 200MB\n"
    "  niwaki prune sparsegpt --model FOLDER --text corpus.txt --out pruned --granularity 2:4 --memory 4GiB",
)
@training.method_argument
@training.options
@click.option("--epochs", type=click.IntRange(min=0), metavar="N", help="Length of the fine-tuning; by default there is none.")
@click.option("--from", "start", type=PATH, metavar="FILE", help="The trained model of the task, a .safetensors file.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="R",
    help="Prune in R rounds, with fine-tuning before each; needs --epochs.",
)
@click.option(
    "--text",
    type=PATH,
    metavar="FILE",
    help="Prune the Hugging Face model in the folder --model, block by block on windows of this text, into the new folder --out.",
)
@click.option("--granularity", metavar="G", help="Of a folder: in what pieces, such as 2:4; by default the method's own.")
@click.option("--allocation", metavar="A", help="Of a folder: how much from which layer, such as uniform; by default the method's own.")
@click.option("--blocks", metavar="PATH", help="Of a folder: the module whose children are the blocks; by default they are found.")
@click.option("--examples", type=click.IntRange(min=1), metavar="N", help="Of a folder: how many windows of the text; by default 128.")
@click.option("--length", type=click.IntRange(min=1), metavar="N", help="Of a folder: tokens of a window; by default 512, if it can.")
@click.option("--together", is_flag=True, help="Of a folder: rank the weights of all blocks together, by statistics of the dense model.")
@click.option("--prune-outside", "outside", is_flag=True, help="Of a folder: prune targets outside the blocks too, at the end.")
@json_option
def prune(method: str, rounds: int, text: Path | None, as_json: bool, **options: Any) -> None:
    """Prune a trained model by METHOD's criterion, fine-tune it for --epochs (none by default), and compare it with the trained one.

    Of METHOD, what chooses the weights is used (saliency, granularity, allocation, ...). Its schedule and growth are not: all is
    pruned at once before the fine-tuning, or in --rounds during it.

    With --text, a pretrained model in a local folder of Hugging Face transformers is pruned instead, one block after the other, each on
    what the pruned blocks before it make of the text. The new folder loads like the old one, and has the masks beside the weights.
    There --memory is for caught activations too: those for which there is no room go to disk.
    """
    if text is not None:
        _folder(method, rounds, text, as_json, options)
    else:
        _task(method, rounds, as_json, options)


def _task(method: str, rounds: int, as_json: bool, options: dict[str, Any]) -> None:
    """Prune the trained model of a task."""
    from niwaki import catalogue
    from niwaki.recipe.stages import once

    for name, option in OF_FOLDERS.items():
        if options.pop(name):
            raise InputError(f"{option}: is for a folder of a pretrained model; say --text too")
    if options["start"] is None:
        context = click.get_current_context()
        raise click.MissingParameter(ctx=context, param=next(p for p in context.command.params if p.name == "start"))
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
    in_rounds = {"iterative": {"rounds": rounds, "begin": "0 run", "end": f"{rounds / (rounds + 1)} run"}}
    recipe = recipe.replace(schedule=in_rounds if rounds > 1 else once(recipe).schedule, growth=None)
    task = training.task(options)
    job = training.job(task, recipe, method, options, kind="prune")
    training.carry_out([(job, training.folder(job, options["out"]))], options, as_json)


# ---------------------------------------------------------------- folders


def _folder(method: str, rounds: int, text: Path, as_json: bool, options: dict[str, Any]) -> None:
    """Prune the pretrained model in a folder."""
    from niwaki.oneshot.folder import prune_folder
    from niwaki.tasks.tokens import read_text

    unused = [option for name, option in OF_TASKS.items() if options[name]] + ["--rounds"] * (rounds > 1)
    if unused:
        raise InputError(f"{unused[0]}: is for the trained model of a task; drop it, or --text")
    for name in ("model", "out"):
        if options[name] is None:
            raise InputError(f"--{name}: missing; with --text it is {'the folder of the model' if name == 'model' else 'a new folder'}")
    recipe = _recipe(method, options)
    with terminated_as_interrupted(), progress_bar("pruning blocks") as progress:
        done = prune_folder(
            options["model"],
            options["out"],
            recipe,
            read_text(text),
            examples=options["examples"] or 128,
            length=options["length"],
            blocks=options["blocks"] or "auto",
            sequential=not options["together"],
            outside="prune" if options["outside"] else "keep",
            seed=options["seed"],
            memory=options["memory"],
            progress=progress,
        )
    _show(done, recipe, options, as_json)


def _recipe(method: str, options: dict[str, Any]) -> Recipe:
    """Return what to do: the method with what the options say instead."""
    from niwaki import catalogue
    from niwaki.oneshot.blockwise import at_once
    from niwaki.recipe import text
    from niwaki.recipe.stages import StageRecipe

    fields = {name: text.parse(options[name], f"--{name}") for name in ("granularity", "allocation") if options[name] is not None}
    sparsity = options["sparsity"]
    if "granularity" not in fields or StageRecipe(granularity=fields["granularity"]).granularity.sparsity is None:
        return at_once(catalogue.find(method, sparsity)).replace(**fields)
    # N:M says how much goes, from every layer alike.
    return at_once(catalogue.find(method)).replace(**{"allocation": None, "sparsity": sparsity, **fields})


def _show(done: Blockwise, recipe: Recipe, options: dict[str, Any], as_json: bool) -> None:
    """Print what became of the model."""
    from dataclasses import asdict

    if as_json:
        print_json(
            {
                "folder": str(options["out"]),
                "recipe": recipe.to_data(),
                "sparsity": done.masks.sparsity,
                "blocks": [] if done.blocks is None else list(done.blocks.names),
                "layers": [asdict(layer) for layer in done.layers],
                "notes": list(done.notes),
            }
        )
        return
    from niwaki.cli.tables import print_rows, table_of

    table = table_of("layer", "weights", "sparsity", "error")
    for layer in done.layers:
        error = "-" if layer.error is None else f"{layer.error:.4f}"
        table.add_row(layer.name, f"{layer.weights:,}", f"{layer.sparsity:.4f}", error)
    blocks = [] if done.blocks is None else str(done.blocks).splitlines()
    notes = [*blocks, *done.notes, "error: ‖y' - y‖ / ‖y‖ of the layer's outputs on the text, with the new and the old weights"]
    print_rows(str(options["out"]), f"sparsity {done.masks.sparsity:.4f} of {done.masks.total:,} weights", table, notes)
