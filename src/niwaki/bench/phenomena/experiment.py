"""What the experiments share: networks with their data, trainings, masks, and what an experiment is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from torch import nn

from niwaki.bench.results import Results
from niwaki.counter import key, uniform
from niwaki.errors import NiwakiError
from niwaki.masks import Masks
from niwaki.metrics.significance import paired_interval
from niwaki.pruning import Pruned, prune
from niwaki.recipe import Recipe
from niwaki.tasks import Data, Model, Task, Training
from niwaki.tasks.digits import DIGITS
from niwaki.tasks.images import CIFAR10, FASHION_MNIST, MNIST_SIZE
from niwaki.tasks.networks import Perceptron
from niwaki.training.loop import batches, steps_per_epoch
from niwaki.training.state import Trained
from niwaki.training.trainer import Progress, Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
"""A measured case: plain data."""

EVERYTHING = {"weights": {"include": ["*"]}}
"""The weights of all layers, first and last too, as the papers on pruning before training prune."""

BATCH = 128
"""Examples of a batch that scores look at."""

COLOURS = ("#1f6fb4", "#d1780f", "#2e8540", "#b3263a", "#7a4fa3", "#8a8a8a")

# -- networks ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network to experiment on: a model of a task."""

    task: Task
    model: str


def deep_vgg(width: int = 16, classes: int = 10) -> nn.Sequential:
    """Return VGG-16 for 32×32 images (Simonyan & Zisserman 2015): 13 convolutions with batch normalization, and one linear layer.

    Its channels are ``width`` times 1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8 (64 is the usual width), its weights those of He et al. 2015.
    """
    layers: list[nn.Module] = []
    inputs = 3
    for size, depth in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, size * width, 3, padding=1, bias=False), nn.BatchNorm2d(size * width), nn.ReLU()]
            inputs = size * width
        layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model


def unbiased(model: nn.Module) -> nn.Module:
    """Return a model whose biases are set to zero, in place."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def perceptron(inputs: int, hidden: tuple[int, int], like: Network) -> Network:
    """Return a perceptron with other hidden layers, trained like a network of the same task."""
    training = like.task.model(like.model)[1].training
    model = Model(lambda data: Perceptron(inputs, len(data.classes), hidden), training)
    return Network(replace(like.task, models={"perceptron": model}), "perceptron")


_LENET = Network(FASHION_MNIST, "lenet_300_100")
_DIGITS = Network(DIGITS, "mlp")
_UNBIASED = Model(lambda data: unbiased(Perceptron(MNIST_SIZE**2)), FASHION_MNIST.model("lenet_300_100")[1].training)
_DEEP = Model(lambda data: deep_vgg(classes=len(data.classes)), CIFAR10.model("vgg_small")[1].training)

NETWORKS: Mapping[str, Network] = {
    "lenet_300_100": _LENET,
    "lenet_unbiased": Network(replace(FASHION_MNIST, models={"lenet_unbiased": _UNBIASED}), "lenet_unbiased"),
    "lenet_5": Network(FASHION_MNIST, "lenet_5"),
    "wide": perceptron(MNIST_SIZE**2, (1000, 1000), _LENET),
    "resnet20": Network(CIFAR10, "resnet20"),
    "vgg16": Network(replace(CIFAR10, models={"vgg16": _DEEP}), "vgg16"),
    "digits_mlp": _DIGITS,
    "digits_convnet": Network(DIGITS, "convnet"),
}
"""Networks by the name that ``--network`` knows. ``lenet_unbiased`` is LeNet-300-100 with biases that begin at zero, ``wide`` a perceptron
with two hidden layers of 1000 units, and ``vgg16`` has a quarter of the usual width."""

# -- one case ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What the cases of a network share.

    Attributes:
        network: what is trained.
        data: on what.
        settings: of the experiment.
    """

    network: Network
    data: Data
    settings: Mapping[str, Any]

    def build(self, seed: int) -> nn.Module:
        """Return the network with the initial weights of a seed."""
        return self.network.task.build(self.network.model, self.data, seed)

    def trained(
        self,
        model: nn.Module,
        seed: int,
        *,
        recipe: Recipe | None = None,
        masks: Masks | None = None,
        progress: Progress | None = None,
        **changes: Any,
    ) -> Trained:
        """Train a model in place for the experiment's epochs, by a recipe or with masks that stay.

        ``changes`` replace settings of the task's training. Batches depend on the seed alone.
        """
        training = self.network.task.model(self.network.model)[1].training
        training = Training.model_validate({**training.model_dump(), "epochs": self.settings["epochs"], **changes})
        trainer = Trainer(model, self.network.task, self.data, training, seed, recipe)
        if masks is not None:
            trainer.masks = masks
        return trainer.run(progress=progress)

    def accuracy(self, model: nn.Module, seed: int, recipe: Recipe | None = None, masks: Masks | None = None) -> float:
        """Train a model likewise, and return its accuracy on the test data at the end."""
        return self.trained(model, seed, recipe=recipe, masks=masks).history[-1].metrics["accuracy"]

    def steps(self, epochs: int) -> int:
        """Return the optimizer steps of some epochs."""
        return epochs * steps_per_epoch(self.data, self.network.task.model(self.network.model)[1].training)

    def prune(self, model: nn.Module, recipe: Recipe, seed: int) -> Pruned:
        """Prune a model in place at once; scores that look at data see :meth:`seen`."""
        return prune(model, recipe, data=self.seen(seed), loss=self.network.task.loss, blocks=None, seed=seed)

    def seen(self, seed: int) -> list[tuple[Any, Any]]:
        """Return the experiment's number of training examples, drawn by the seed, in batches."""
        examples = self.settings.get("examples", BATCH)
        size = min(BATCH, examples)
        return list(islice(batches(self.data.train, size, seed, 0), -(-examples // size)))


def shuffled(masks: Masks, seed: int) -> Masks:
    """Return masks with the places of each tensor in another order: as many active in every tensor, anywhere.

    >>> import torch
    >>> masks = Masks({"w": torch.tensor([[True, True, False], [False, False, False]])})
    >>> shuffled(masks, 0)["w"].sum(), shuffled(masks, 0)["w"].shape
    (tensor(2), torch.Size([2, 3]))
    """
    orders = {name: uniform(key(seed, 0, f"shuffle {name}"), 0, mask.numel(), mask.device).argsort() for name, mask in masks.items()}
    return Masks({name: mask.flatten()[orders[name]].reshape(mask.shape) for name, mask in masks.items()})


# -- an experiment -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """A phenomenon, and how it is looked for.

    Attributes:
        statement: what is said to happen, and who says it.
        definitions: what the numbers mean.
        networks: those that are looked at by default, of ``NETWORKS``.
        known: those that can be looked at.
        seeds: how many by default.
        settings: what all rows share, such as ``epochs``.
        cases: networks and number of seeds -> what is measured one by one; each has a ``network``, a ``seed``, and what else tells it
            apart.
        measure: case -> further fields of its row.
        summary: rows -> lines of a table, each a mapping from heading to cell.
        draw: puts rows into an empty figure.
    """

    statement: str
    definitions: tuple[str, ...]
    networks: tuple[str, ...]
    known: tuple[str, ...]
    seeds: int
    settings: Mapping[str, Any]
    cases: Callable[[Sequence[str], int], list[dict[str, Any]]]
    measure: Callable[[Row, Setting], dict[str, Any]]
    summary: Callable[[Sequence[Row]], list[dict[str, str]]]
    draw: Callable[[Sequence[Row], Figure], None]

    def run(
        self,
        folder: Path | None,
        out: Path,
        *,
        networks: Sequence[str] = (),
        seeds: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """Measure the cases that ``out`` does not hold yet, and return the rows of all of them.

        Args:
            folder: with the tasks' data.
            out: a JSON file that grows by one row a case.
            networks: names; by default the experiment's own.
            seeds: how many; by default the experiment's own number.
            progress: called with the cases done and all cases.
            **settings: that replace those of the experiment, such as ``epochs``.

        Raises:
            InputError: data are missing, or ``out`` was made with other settings.
        """
        used = {**self.settings, **settings}
        chosen = self.cases(networks or self.networks, seeds or self.seeds)
        keys = tuple(chosen[0])
        results = Results(out, used, (self.statement, *self.definitions), keys)
        loaded: dict[str, Setting] = {}
        for done, case in enumerate(chosen):
            if progress:
                progress(done, len(chosen))
            if results.find(case) is not None:
                continue
            name = case["network"]
            if name not in loaded:
                data = next((one.data for one in loaded.values() if one.network.task.name == NETWORKS[name].task.name), None)
                loaded[name] = Setting(NETWORKS[name], data or NETWORKS[name].task.data(folder), used)
            try:
                results.add({**case, **self.measure(case, loaded[name])})
            except NiwakiError as error:
                results.add({**case, "error": str(error)})
        return [row for row in results.rows if any(all(row[name] == case[name] for name in keys) for case in chosen)]

    def table(self, rows: Sequence[Row]) -> Table:
        """Return the rows for people."""
        result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        lines = self.summary([row for row in rows if "error" not in row])
        for number, heading in enumerate(lines[0] if lines else ()):
            result.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
        for line in lines:
            result.add_row(*line.values())
        for row in rows:
            if "error" in row:
                result.add_row(f"{row['network']}, seed {row['seed']}: failed: {row['error']}")
        return result

    def markdown(self, rows: Sequence[Row]) -> str:
        """Return the same lines as a table of a page."""
        lines = self.summary([row for row in rows if "error" not in row])
        cells = [list(lines[0]), *(list(line.values()) for line in lines)]
        table = ["| " + " | ".join(line) + " |" for line in cells]
        return "\n".join([table[0], "|---|" + "--:|" * (len(lines[0]) - 1), *table[1:]])

    def picture(self, rows: Sequence[Row], path: Path) -> None:
        """Write the figure to a file whose name says the format (SVG, PNG, PDF); equal rows make an equal SVG."""
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        self.draw([row for row in rows if "error" not in row], figure)
        temporary = path.with_name(f"{path.stem}.partial{path.suffix}")
        with mpl.rc_context({"svg.hashsalt": "niwaki"}):
            figure.savefig(temporary, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        temporary.replace(path)


def crossed(**fields: Iterable[Any]) -> Callable[[Sequence[str], int], list[dict[str, Any]]]:
    """Return the cases of every network with every value of the fields, the first seed of all of them first.

    >>> [tuple(case.values()) for case in crossed(method=["a", "b"])(["net"], 2)]
    [('net', 'a', 0), ('net', 'b', 0), ('net', 'a', 1), ('net', 'b', 1)]
    """
    combined: list[dict[str, Any]] = [{}]
    for name, values in fields.items():
        combined = [{**case, name: value} for case in combined for value in values]

    def cases(networks: Sequence[str], seeds: int) -> list[dict[str, Any]]:
        return [{"network": network, **case, "seed": seed} for seed in range(seeds) for network in networks for case in combined]

    return cases


# -- for people ----------------------------------------------------------------------------------------------------------------


def grouped(rows: Iterable[Row], *fields: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return rows by the values of some fields, in the order in which these come first."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[field] for field in fields), []).append(row)
    return found


def share(values: Sequence[float]) -> str:
    """Return the mean of shares in per cent, ± half their range where there are several."""
    around = f" ± {50 * (max(values) - min(values)):.2f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.2f}{around}"


def difference(first: Sequence[float], second: Sequence[float]) -> str:
    """Return the mean of ``first - second``, pair by pair, in points, with its 95 % confidence interval where there is one."""
    mean, half = paired_interval(first, second)
    return f"{100 * mean:+.2f}" + ("" if half is None else f" ± {100 * half:.2f}")


def panels(figure: Figure, count: int) -> list[Axes]:
    """Return empty panels of a figure, two or three in a line."""
    columns = count if count <= 3 else 2 if count == 4 else 3
    lines = -(-count // columns)
    figure.set_size_inches(1.2 + 4.4 * columns, 3.4 * lines)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for one in axes:
        one.grid(axis="y", linewidth=0.3)
        one.tick_params(labelsize=8)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    for one in axes[count:]:
        one.set_visible(False)
    return axes[:count]
