"""Experiments on phenomena: what each measures, against counts by hand and trainings done again; what is kept and shown."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from niwaki.bench.phenomena import EXPERIMENTS, experiment, large_sparse, layer_collapse, power_law, random_tickets
from niwaki.bench.phenomena.experiment import NETWORKS, Network, Setting, crossed, difference, share, shuffled
from niwaki.bench.results import stored
from niwaki.cli import main
from niwaki.errors import InputError, NiwakiError
from niwaki.masks import Masks
from niwaki.tasks import Data, Model, Task, Training
from niwaki.tasks.classification import METRICS
from niwaki.tasks.networks import Perceptron
from niwaki.training.trainer import Trainer


class Examples:
    """Noise with a little of its class in it: 4 classes."""

    def __init__(self, count: int, seed: int) -> None:
        self.classes = torch.arange(count) % 4
        self.inputs = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed)) + F.one_hot(self.classes, 12)

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[indices], self.classes[indices]


def chain(data: Data) -> nn.Module:
    """A deep narrow network without biases."""
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise((12, 30, 20, 8, 4))))


TRAINING = Training(epochs=1, batch_size=32)
MODELS = {"perceptron": Model(lambda data: Perceptron(12, 4, (120, 100)), TRAINING), "chain": Model(chain, TRAINING)}
CLASSES = ("a", "b", "c", "d")
TINY = Task("tiny", MODELS, lambda folder: Data(Examples(96, 0), Examples(64, 1), classes=CLASSES), F.cross_entropy, METRICS)


def setting_of(model: str = "perceptron", **settings: object) -> Setting:
    return Setting(Network(TINY, model), TINY.data(None), {"epochs": 1, **settings})


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "tiny", Network(TINY, "perceptron"))


# ------------------------------------------------------------------ parts


def test_shuffling_keeps_the_counts_of_every_tensor_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (40, 50), "b": (40, 50), "c": (7, 3, 3)}
    masks = Masks({name: torch.rand(shape, generator=generator) < 0.1 for name, shape in shapes.items()})
    other = shuffled(masks, 0)
    for name, mask in masks.items():
        assert other[name].shape == mask.shape
        assert other[name].sum() == mask.sum()
    assert 0 < (masks["a"] & other["a"]).sum() < 0.3 * masks["a"].sum()  # about a tenth, by chance
    assert other == shuffled(masks, 0)
    assert other != shuffled(masks, 1)
    same = Masks({"a": masks["a"], "b": masks["a"]})
    assert not torch.equal(shuffled(same, 0)["a"], shuffled(same, 0)["b"])  # every tensor has an order of its own


def test_shuffled_places_are_uniform() -> None:
    """Chi-square of where one active place of twenty goes."""
    mask = Masks({"a": torch.arange(20).view(4, 5) == 3})
    places = [int(shuffled(mask, seed)["a"].flatten().nonzero()) for seed in range(1000)]
    assert scipy.stats.chisquare(np.bincount(places, minlength=20)).pvalue > 1e-3


def test_cases_come_seed_by_seed() -> None:
    cases = crossed(a=(1, 2), b="xy")(["net", "other"], 2)
    assert len(cases) == 16
    assert cases[1] == {"network": "net", "a": 1, "b": "y", "seed": 0}
    assert [case["seed"] for case in cases] == [0] * 8 + [1] * 8


def test_differences_have_students_interval() -> None:
    first, second = [0.91, 0.93, 0.90, 0.95], [0.90, 0.90, 0.91, 0.91]
    low, high = scipy.stats.ttest_rel(first, second).confidence_interval(0.95)
    assert difference(first, second) == f"{50 * (low + high):+.2f} ± {50 * (high - low):.2f}"
    assert difference([0.5], [0.25]) == "+25.00"
    assert share([0.5, 0.6]) == "55.00 ± 5.00"
    assert share([0.5]) == "50.00"


# ------------------------------------------------------------------ experiments


def test_overlaps_and_distances_are_those_of_a_training_done_again() -> None:
    row = EXPERIMENTS["early_structure"].measure({"seed": 0, "learning_rate": "constant"}, setting_of(epochs=2))
    setting = setting_of()
    model = setting.build(0)
    training = TRAINING.model_copy(update={"epochs": 2, "learning_rate_schedule": "constant"})
    seen = [copy.deepcopy(model.state_dict())]
    Trainer(model, TINY, setting.data, training, 0).run(
        progress=lambda step, total, epoch: seen.append(copy.deepcopy(model.state_dict())) if epoch else None
    )
    assert len(seen) == 3
    for sparsity in ("0.5", "0.98"):
        sets = []
        for state in seen:
            kept = set()
            for name, weight in state.items():
                if name.endswith("weight"):
                    best = weight.abs().flatten().topk(round((1 - float(sparsity)) * weight.numel())).indices.tolist()
                    kept |= {(name, place) for place in best}
            sets.append(kept)
        total = sum(weight.numel() for name, weight in seen[0].items() if name.endswith("weight"))
        assert row["overlap"][sparsity] == pytest.approx([len(kept & sets[-1]) / len(sets[-1]) for kept in sets], abs=1e-12)
        assert row["hamming"][sparsity] == pytest.approx([len(kept ^ sets[-1]) / total for kept in sets], abs=1e-12)
    assert len(row["accuracy"]) == 2


@pytest.mark.parametrize("method", ["magnitude", "snip", "grasp"])
def test_the_critical_compression_is_that_of_the_raw_ranks(method: str) -> None:
    """One layer is empty as soon as its best weight is not among those that stay."""
    chain = setting_of("chain", examples=64, trained={})
    batches = chain.seen(0)
    model = chain.build(0)
    parameters = list(model.parameters())
    [(inputs, targets)] = batches
    assert len(inputs) == 64
    outputs = model(inputs) / (200 if method == "grasp" else 1)
    gradients = torch.autograd.grad(F.cross_entropy(outputs, targets), parameters, create_graph=True)
    if method == "magnitude":
        scores = [weight.detach().abs() for weight in parameters]
    elif method == "snip":
        scores = [(weight * gradient).detach().abs() for weight, gradient in zip(parameters, gradients, strict=True)]
    else:
        along = torch.stack([(gradient * gradient.detach()).sum() for gradient in gradients]).sum()
        scores = [(w * h).detach() for w, h in zip(parameters, torch.autograd.grad(along, parameters), strict=True)]
    flat = torch.cat([score.flatten() for score in scores])
    needed = max(int((flat >= score.max()).sum()) for score in scores)
    row = layer_collapse.measure({"network": "net", "method": method, "seed": 0}, chain)
    exact = flat.numel() / needed
    assert row["weights"] == flat.numel()
    assert row["layers"] == 4
    assert row["critical"] <= exact * (1 + 1e-9)
    assert round(flat.numel() / (row["critical"] * 10 ** (layer_collapse.STEP / 2**layer_collapse.HALVINGS))) <= needed
    assert f"{[int((flat >= score.max()).sum()) for score in scores].index(needed)}.weight" in row["emptied"]
    assert row["accuracy"] == {}


def test_synflow_in_many_rounds_reaches_the_largest_compression_and_in_one_does_not() -> None:
    chain = setting_of("chain", examples=64, trained={"chain": [2, 10_000]})
    methods = ("synflow, 100 rounds", "synflow, 1 round")
    many, once = (layer_collapse.measure({"network": "chain", "method": method, "seed": 0}, chain) for method in methods)
    assert many["critical"] == many["largest"] == many["weights"] / 4
    assert many["emptied"] == []
    assert once["critical"] < 0.5 * once["largest"]
    assert list(many["accuracy"]) == ["2"]  # beyond the largest compression nothing is trained
    assert 0 <= many["accuracy"]["2"] <= 1


def test_random_tickets_are_trained_as_they_are_said_to_be() -> None:
    setting = setting_of(examples=64)
    row = random_tickets.measure({"mask": "snip", "sparsity": 0.9, "seed": 0}, setting)
    masks = random_tickets.found("snip", 0.9, 0, setting)
    assert row["kept"] == {name: int(mask.sum()) for name, mask in masks.items()}
    assert sum(row["kept"].values()) == round(0.1 * masks.total)
    training = TRAINING
    for arm, weights, used in (("found", 0, masks), ("shuffled", 0, shuffled(masks, 0)), ("fresh", random_tickets.FRESH, masks)):
        model = TINY.build("perceptron", setting.data, weights)
        trainer = Trainer(model, TINY, setting.data, training, 0)
        trainer.masks = used
        assert row["accuracy"][arm] == trainer.run().history[-1].metrics["accuracy"]
        assert all(not model.get_parameter(name)[~mask].any() for name, mask in used.items())
    other = shuffled(masks, 0)
    active = sum(int((masks[name] & other[name]).sum()) for name in masks)
    assert row["overlap"] == pytest.approx(active / sum(row["kept"].values()))


def test_masks_of_a_trained_network_are_its_largest_weights() -> None:
    setting = setting_of()
    masks = random_tickets.found("trained", 0.9, 1, setting)
    model = setting.build(1)
    setting.accuracy(model, 1)
    flat = torch.cat([weight.detach().abs().flatten() for name, weight in model.named_parameters() if name.endswith("weight")])
    threshold = flat.sort(descending=True).values[masks.active - 1]
    for name, mask in masks.items():
        assert torch.equal(mask, model.get_parameter(name).detach().abs() >= threshold)


def test_dense_sparse_dense_ends_dense_and_differs_from_the_dense_training_alone() -> None:
    setting = setting_of(epochs=3)
    row = EXPERIMENTS["dense_sparse_dense"].measure({"seed": 0}, setting)
    assert row["accuracy"]["dense"] == setting.accuracy(setting.build(0), 0)
    assert set(row["accuracy"]) == {"dense", "0.3", "0.5"}


@pytest.mark.parametrize("weights", [500, 3000, 14000])
def test_the_narrow_network_is_the_nearest_in_size(weights: int) -> None:
    sizes = {}
    for first in range(1, 301):
        second = max(1, round(first / 3))
        sizes[first, second] = sum(p.numel() for p in Perceptron(64, 10, (first, second)).parameters())
    best = min(abs(size - weights) for size in sizes.values())
    assert abs(sizes[large_sparse.narrower(64, (300, 100), 10, weights)] - weights) == best


def test_large_and_small_networks_have_the_weights_that_are_told() -> None:
    row = large_sparse.measure({"sparsity": 0.8, "seed": 0}, setting_of(epochs=2))
    hidden = 12 * 120 + 120 * 100
    assert row["weights"]["large, sparse"] == 120 + 100 + 404 + round(0.2 * hidden)
    assert abs(row["weights"]["small, dense"] - row["weights"]["large, sparse"]) < 200
    assert row["hidden"]["small, dense"] == list(large_sparse.narrower(12, (120, 100), 4, row["weights"]["large, sparse"]))


@pytest.mark.parametrize("removed", power_law.REMOVED)
def test_rewiring_keeps_the_number_of_connections(removed: str) -> None:
    setting = setting_of(epochs=8, every=4, simulated=3)
    row = power_law.measure({"removed": removed, "seed": 0}, setting)
    assert (row["accuracy"] is None) == (removed != "smallest")
    fits = row["neurons"]
    assert list(fits) == ["hidden 1, in", "hidden 1, out", "hidden 2, in"]  # there are only 12 inputs
    assert 120 * fits["hidden 1, out"]["mean"] == pytest.approx(100 * fits["hidden 2, in"]["mean"])
    active = 120 * fits["hidden 1, in"]["mean"] + 100 * fits["hidden 2, in"]["mean"]
    assert active == pytest.approx(round((1 - power_law.SPARSITY) * (12 * 120 + 120 * 100)))
    for fit in fits.values():
        degrees = np.array([int(d) for pair in fit["degrees"].split() for d in [pair.split(":")[0]] * int(pair.split(":")[1])])
        assert degrees.mean() == pytest.approx(fit["mean"])
        assert degrees.var() / degrees.mean() == pytest.approx(fit["dispersion"])
        assert (degrees >= fit["smallest"]).mean() == pytest.approx(fit["tail"])
        assert degrees.max() == fit["largest"]
        if removed != "smallest":  # by chance: hypergeometric, near Poisson
            assert 0.6 < fit["dispersion"] < 1.4


# ------------------------------------------------------------------ running them


SMALL = {
    "early_structure": {"epochs": 1},
    "layer_collapse": {"epochs": 1, "examples": 32, "trained": {"tiny": [10]}},
    "random_tickets": {"epochs": 1, "examples": 32},
    "dense_sparse_dense": {"epochs": 1},
    "large_sparse": {"epochs": 1},
    "power_law": {"epochs": 3, "every": 2, "simulated": 2},
}
CASES = {
    "early_structure": crossed(learning_rate=("cosine",)),
    "layer_collapse": crossed(method=("magnitude", "snip")),
    "random_tickets": crossed(sparsity=(0.9,), mask=("uniform", "synflow")),
    "dense_sparse_dense": crossed(),
    "large_sparse": crossed(sparsity=(0.8,)),
    "power_law": crossed(removed=("nothing", "random")),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_kept_shown_and_not_repeated(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = replace(EXPERIMENTS[name], cases=CASES[name])
    out = tmp_path / "rows.json"
    told: list[tuple[int, int]] = []
    rows = one.run(None, out, networks=("tiny",), seeds=2, progress=lambda done, total: told.append((done, total)), **SMALL[name])
    assert len(rows) == len(told) == len(one.cases(("tiny",), 2))
    assert stored(out)["rows"] == json.loads(json.dumps(rows))
    assert stored(out)["definitions"][0] == one.statement

    def never(*_: object) -> None:
        raise AssertionError

    again = replace(one, measure=never).run(None, out, networks=("tiny",), seeds=2, **SMALL[name])
    assert again == stored(out)["rows"]
    with pytest.raises(InputError, match="results of other settings"):
        one.run(None, out, networks=("tiny",), seeds=2, **{**SMALL[name], "epochs": 7})

    lines = one.markdown(again).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert all(line.startswith("| tiny |") for line in lines[2:])
    one.picture(again, tmp_path / "a.svg")
    one.picture(again, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert main(["bench", "phenomena", name, "--out", str(out), "--show"]) == 0
    assert "tiny" in capsys.readouterr().out
    assert main(["bench", "phenomena", name, "--out", str(out), "--show", "--json", "--plot", str(tmp_path / "c.png")]) == 0
    assert json.loads(capsys.readouterr().out) == again
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_what_failed_is_told_and_tried_again(tmp_path: Path) -> None:
    one = EXPERIMENTS["dense_sparse_dense"]

    def fails(*_: object) -> None:
        raise NiwakiError("the loss became nan")

    rows = replace(one, measure=fails).run(None, tmp_path / "rows.json", networks=("tiny",), seeds=1, epochs=1)
    assert rows == [{"network": "tiny", "seed": 0, "error": "the loss became nan"}]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(one.table(rows))
    assert "tiny, seed 0: failed: the loss became nan" in shown.get()
    [row] = one.run(None, tmp_path / "rows.json", networks=("tiny",), seeds=1, epochs=1)
    assert "error" not in row


def test_the_command_measures_and_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    command = ["bench", "phenomena", "dense_sparse_dense", "--out", str(out), "--network", "digits_mlp", "--seeds", "1", "--epochs", "1"]
    assert main([*command, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["accuracy"]["dense"] > 0.05
    assert main(["bench", "phenomena", "early", "--out", str(out)]) == 2
    assert "NAME: there is no 'early'; did you mean 'early_structure'?" in capsys.readouterr().err
    assert main(["bench", "phenomena", "power_law", "--out", str(out), "--network", "resnet20"]) == 2
    assert "--network: there is no 'resnet20'; " in capsys.readouterr().err


def test_every_network_of_an_experiment_is_known() -> None:
    for one in EXPERIMENTS.values():
        assert set(one.networks) <= set(one.known) <= set(NETWORKS)


def test_deep_vgg_has_the_layers_of_vgg_16() -> None:
    model = experiment.deep_vgg(width=2)
    widths = [module.out_channels for module in model if isinstance(module, nn.Conv2d)]
    assert widths == [2, 2, 4, 4, 8, 8, 8, 16, 16, 16, 16, 16, 16]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    network = NETWORKS["lenet_unbiased"]
    built = network.task.model("lenet_unbiased")[1].build(Data(None, None))  # type: ignore[arg-type]
    assert not any(parameter.any() for name, parameter in built.named_parameters() if name.endswith("bias"))
