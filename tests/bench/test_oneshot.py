"""The benchmark of criteria on networks and data of a few kilobytes: what is measured, what is kept, and what is done again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from niwaki.bench import oneshot
from niwaki.bench.results import Results, stored
from niwaki.errors import InputError
from niwaki.recipe import Recipe
from niwaki.tasks import Data, Model, Task, Training
from niwaki.tasks.classification import METRICS
from niwaki.tasks.networks import Perceptron, ResNet


class Images:
    """128 noisy images of 4 classes."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tensors = (torch.randn(128, 3, 8, 8, generator=generator), torch.arange(128) % 4)
        self.tensors[0][torch.arange(128), :, 0, self.tensors[1]] += 4

    def __len__(self) -> int:
        return 128

    def __getitem__(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensors[0][indices], self.tensors[1][indices]


@pytest.fixture
def networks() -> dict[str, oneshot.Network]:
    models = {
        "net": Model(lambda data: ResNet(1, classes=4, width=4), Training(epochs=1, batch_size=32)),
        "flat": Model(lambda data: nn.Sequential(nn.Flatten(), Perceptron(inputs=192, classes=4)), Training(epochs=4, batch_size=32)),
    }
    task = Task("tiny", models, lambda folder: Data(Images(0), Images(1)), F.cross_entropy, METRICS)
    recovery = Training(epochs=1, batch_size=32, learning_rate=0.01)
    return {"net": oneshot.Network(task, "net", recovery), "flat": oneshot.Network(task, "flat", recovery, trains=True)}


@pytest.fixture
def folder(tmp_path: Path, networks: dict[str, oneshot.Network]) -> Path:
    (tmp_path / "models").mkdir()
    task = networks["net"].task
    save_file(task.build("net", task.data(None), 3).state_dict(), tmp_path / "models" / "tiny_net.safetensors")
    return tmp_path


def test_cases_are_measured_once_and_kept(folder: Path, networks: dict[str, oneshot.Network], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = oneshot.cases(["net", "flat"], ["magnitude", "snip"], [0.5], 2)
    assert [(c.network, c.method, c.seed) for c in chosen] == [
        (network, *one) for network in ("net", "flat") for one in (("magnitude", 0), ("snip", 0), ("snip", 1))
    ]
    out = folder / "results" / "all.json"
    told: list[tuple[int, int]] = []
    rows = oneshot.run(
        chosen, folder, out, recover=[0.5], examples=48, networks=networks, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(i, 6) for i in range(6)]
    assert [(row["network"], row["method"], row["seed"]) for row in rows] == [(c.network, c.method, c.seed) for c in chosen]
    for row in rows:
        assert row["sparsity_reached"] == pytest.approx(0.5, abs=0.01)
        assert 0 <= row["accuracy_cut"] <= 1
        assert (row["accuracy_recovered"] is not None) == (row["seed"] == 0)
        assert (row["accuracy_anew"] is not None) == (row["network"] == "net")  # the other has no batch normalization
        assert row["seconds"] > 0
        assert row["loss_after"] != row["loss_before"]
    assert rows[3]["accuracy_dense"] > 0.8  # it was trained, and is kept
    assert rows[3]["accuracy_recovered"] > 0.5
    assert load_file(folder / "results" / "tiny_flat.safetensors")
    assert rows[1]["family"] == "gradients"
    assert rows[1]["loss_before"] != rows[2]["loss_before"]  # other examples were drawn
    assert stored(out)["rows"] == rows
    assert stored(out)["definitions"]

    monkeypatch.setattr(oneshot, "prune", None)  # nothing is left to measure
    assert oneshot.run(chosen, folder, out, recover=[0.5], examples=48, networks=networks) == rows
    with pytest.raises(InputError, match="holds results of other settings"):
        oneshot.run(chosen, folder, out, recover=[0.5], examples=32, networks=networks)

    console = Console(width=250)
    with console.capture() as shown:
        console.print(oneshot.table(rows))
    assert shown.get().count("\nnet ") == 6
    assert shown.get().count("\nflat ") == 4
    assert "statistics anew" in shown.get()
    assert "±" in shown.get()
    shown_curves = oneshot.curves(rows)
    assert shown_curves["net"]["dense"] == {0.0: [rows[0]["accuracy_dense"]]}
    assert shown_curves["net"]["snip"] == {0.5: [rows[1]["accuracy_cut"], rows[2]["accuracy_cut"]]}
    assert oneshot.curves(rows, "accuracy_recovered")["flat"]["snip"] == {0.5: [rows[4]["accuracy_recovered"]]}


def test_what_failed_is_told_and_tried_again(folder: Path, networks: dict[str, oneshot.Network], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = oneshot.cases(["net"], ["magnitude"], [0.5], 1)
    out = folder / "out.json"
    real = oneshot.prune

    def fails(*args: object, **kwargs: object) -> None:
        raise InputError("memory: too small")

    monkeypatch.setattr(oneshot, "prune", fails)
    [row] = oneshot.run(chosen, folder, out, recover=(), examples=64, networks=networks)
    assert row["error"] == "memory: too small"
    console = Console(width=200)
    with console.capture() as shown:
        console.print(oneshot.table([row]))
    assert "failed: memory: too small" in shown.get()
    monkeypatch.setattr(oneshot, "prune", real)
    [row] = oneshot.run(chosen, folder, out, recover=(), examples=64, networks=networks)
    assert "error" not in row
    assert len(stored(out)["rows"]) == 1


def test_missing_weights_are_told(folder: Path, networks: dict[str, oneshot.Network]) -> None:
    (folder / "models" / "tiny_net.safetensors").unlink()
    with pytest.raises(InputError, match=r"there is no tiny_net.safetensors .*, with trained weights"):
        oneshot.run(oneshot.cases(["net"], ["magnitude"], [0.5], 1), folder, folder / "out.json", networks=networks)


@pytest.mark.parametrize("method", oneshot.METHODS)
def test_every_method_is_a_recipe_with_an_exact_sparsity(method: str) -> None:
    recipe = Recipe(sparsity=0.9, **oneshot.METHODS[method].recipe)
    assert recipe.final_sparsity == 0.9
    recipe.require_complete()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with pytest.raises(InputError, match="cannot be read"):
        stored(path)
    for content in ("[]", '{"rows": []}'):
        path.write_text(content)
        with pytest.raises(InputError, match="something else than results"):
            Results(path, {}, (), ("name",))


def test_rows_are_written_one_by_one_and_replaced_by_their_key(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.json"
    results = Results(path, {"a": 1}, ("b",), ("name", "seed"))
    results.add({"name": "x", "seed": 0, "value": 1})
    results.add({"name": "x", "seed": 1, "value": 2})
    results.add({"name": "x", "seed": 0, "value": 3})
    assert [row["value"] for row in json.loads(path.read_text())["rows"]] == [2, 3]
    again = Results(path, {"a": 1}, ("b",), ("name", "seed"))
    assert again.find({"name": "x", "seed": 0}) == {"name": "x", "seed": 0, "value": 3}
    assert again.find({"name": "y", "seed": 0}) is None
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts it")
def test_the_largest_memory_inside_is_told() -> None:
    with oneshot.resident() as small:
        pass
    with oneshot.resident() as large:
        block = torch.ones(16 << 20)
        del block
    if small.peak is not None and large.peak is not None:
        assert 60 << 20 < large.peak < 200 << 20
        assert small.peak < 20 << 20
