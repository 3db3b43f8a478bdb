"""The structured benchmark on a network and data of a few kilobytes: every case runs, meets the budget, and is not repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from niwaki.bench import structured
from niwaki.cli.bench import bench
from niwaki.errors import InputError
from niwaki.tasks import Data, Model, Task, Training
from niwaki.tasks.classification import METRICS
from niwaki.tasks.networks import ResNet


class Images:
    """256 noisy images of 4 classes."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tensors = (torch.randn(256, 3, 8, 8, generator=generator), torch.arange(256) % 4)
        self.tensors[0][:, 0] += self.tensors[1][:, None, None]

    def __len__(self) -> int:
        return 256

    def __getitem__(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensors[0][indices], self.tensors[1][indices]


@pytest.fixture
def task() -> Task:
    model = Model(lambda data: ResNet(1, classes=4, width=4), Training(epochs=1, batch_size=32))
    return Task("tiny", {"net": model}, lambda folder: Data(Images(0), Images(1)), F.cross_entropy, METRICS)


@pytest.fixture
def folder(tmp_path: Path, task: Task) -> Path:
    (tmp_path / "models").mkdir()
    model = task.build("net", task.data(None), 3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    save_file(model.state_dict(), tmp_path / "models" / "tiny_net.safetensors")
    return tmp_path


def test_all_criteria_meet_the_budget_and_results_are_kept(folder: Path, task: Task) -> None:
    chosen = structured.cases(["net"], list(structured.CRITERIA), structured.ALLOCATIONS, [structured.NIWAKI])
    assert len(chosen) == 12
    out = folder / "results" / "all.json"
    rows = structured.run(chosen, folder, out, epochs=1, rounds=1, task=task)
    assert [(row["criterion"], row["allocation"]) for row in rows] == [(case.criterion, case.allocation) for case in chosen]
    for row in rows:
        assert 0.35 < row["flops_ratio"] <= 0.5
        assert 0 < row["parameters_ratio"] < 1
        assert 0 <= row["accuracy"] <= 1
        assert row["latency_ms_1"] > 0
    uniform = [row for row in rows if row["allocation"] == "uniform"]
    assert len({row["flops"] for row in uniform}) == 1
    content = json.loads(out.read_text())
    assert content["rows"] == rows
    assert content["definitions"]

    def refuse(folder: Path | None) -> Data:
        raise AssertionError("nothing is left to measure")

    again = structured.run(chosen, folder, out, epochs=1, rounds=1, task=Task("tiny", {}, refuse, F.cross_entropy, METRICS))
    assert again == rows
    with pytest.raises(InputError, match="holds results of other settings"):
        structured.run(chosen, folder, out, epochs=2, rounds=1, task=task)
    missing = structured.Case("other", "niwaki", "random", "uniform")
    [anew] = structured.run([chosen[0], missing], folder, out, epochs=1, rounds=1, latencies=True, task=task)
    kept = {key: value for key, value in rows[0].items() if not key.startswith("latency")}
    assert {key: anew[key] for key in kept} == kept
    assert anew["latency_ms_1"] != rows[0]["latency_ms_1"]
    assert structured.stored(out) == [anew, *rows[1:]]
    rows = [anew, *rows[1:]]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(structured.table(rows))
    assert shown.get().count("\nnet ") == 12
    assert structured.stored(out) == rows
    result = CliRunner().invoke(bench, ["structured", "--show", "--json", "--out", str(out)])
    assert json.loads(result.stdout) == rows
    (folder / "other.json").write_text("[]")
    with pytest.raises(InputError, match="something else than results"):
        structured.stored(folder / "other.json")


def test_what_is_missing_is_told(folder: Path, task: Task) -> None:
    case = structured.Case("net", "niwaki", "filter_l1", "uniform")
    with pytest.raises(InputError, match="less than one channel in every layer"):
        structured.run([case], folder, folder / "out.json", budget=0.01, epochs=0, rounds=1, task=task)
    (folder / "models" / "tiny_net.safetensors").unlink()
    with pytest.raises(InputError, match=r"there is no tiny_net.safetensors .*, with trained weights"):
        structured.run([case], folder, folder / "out.json", epochs=0, rounds=1, task=task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--criterion", "filter_l3"], "--criterion: there is no 'filter_l3'; did you mean 'filter_l"),
        (["--model", "resnet21"], "--model: there is no 'resnet21'"),
        (["--by", "nobody"], "--by: there is no 'nobody'"),
    ],
)
def test_unknown_names_are_told(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, ["structured", "--out", str(tmp_path / "out.json"), *options])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
