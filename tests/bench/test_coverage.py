"""Eight architectures that are representative, and what the measurement says of them; the whole table is for ``niwaki bench coverage``."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from niwaki.bench import coverage
from niwaki.bench.architectures import Architecture, architectures
from niwaki.cli.bench import bench
from niwaki.errors import InputError

REPRESENTATIVE = ("resnet-20", "u-net", "lstm, bidirectional", "bert", "llama", "t5", "swin", "efficientnet")
"""Padded shortcuts; concatenation; gates; attention; grouped queries and gated layers; shared tables; windows; squeeze and excite."""


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_architectures_can_be_made_smaller(name: str) -> None:
    known = architectures()
    if name not in known:
        pytest.skip("transformers is not installed")
    [row] = coverage.try_one(name, known[name], (0.5,))
    assert row["failure"] == ""
    assert all(row[check] for check in coverage.CHECKS)
    assert row["left"] == []
    assert row["removed_units"] == row["masked_units"] > 0
    assert row["parameters_after"] < 0.65 * row["parameters"]
    assert row["flops_after"] < 0.65 * row["flops"]


def test_masks_take_the_share_of_every_group_and_leave_one() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(2, 5))
    groups = coverage.find_groups(model, torch.ones(1, 3))
    for sparsity, left in (
        (0.25, {"0.weight": 6, "2.weight": 2}),
        (0.5, {"0.weight": 4, "2.weight": 1}),
        (0.99, {"0.weight": 1, "2.weight": 1}),
    ):
        masks, count = coverage.random_masks(model, groups, sparsity)
        active = {name: int(masks[name].any(dim=1).sum()) for name in left if name in masks}
        assert active == {name: rows for name, rows in left.items() if name in masks}
        assert count == 10 - left["0.weight"] - left["2.weight"]


class _Averages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) - self.linear(x).mean(-1, keepdim=True)


class _Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("it is\nbroken")


def test_failures_are_one_line_and_end_nothing() -> None:
    def row(model: type[nn.Module]) -> dict[str, Any]:
        [found] = coverage.try_one("it", Architecture("niwaki", model, lambda: (torch.randn(2, 3),)), (0.5,))
        return found

    assert row(_Broken)["failure"] == "ValueError: it is broken"
    assert row(_Averages)["failure"].startswith("no unit can be removed: ")
    rows = [row(_Broken), row(_Averages)]
    assert coverage.summary(rows)[0] == "50%: 0 of 2 architectures pass every check"
    assert coverage.table(rows).row_count == 2


def test_command() -> None:
    arguments = ["coverage", "--architecture", "lenet-300-100", "--sparsity", "0.5"]
    done = CliRunner().invoke(bench, [*arguments, "--json"])
    assert done.exit_code == 0
    [row] = json.loads(done.stdout)
    assert row["architecture"] == "lenet-300-100"
    assert row["replays"] is True
    done = CliRunner().invoke(bench, arguments)
    assert "1 of 1 architectures pass every check" in done.stdout
    done = CliRunner().invoke(bench, ["coverage", "--architecture", "lenet"])
    assert isinstance(done.exception, InputError)
    assert "there is no architecture 'lenet'; did you mean" in str(done.exception)
