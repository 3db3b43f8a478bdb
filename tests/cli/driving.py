"""Driving the command line from outside: in processes of their own, that can be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import niwaki

VARIES = ("latency", "training time", "peak memory of a forward pass")
"""Measures of a machine at a time: no two runs have the same."""

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

from niwaki.tasks import Data, Metric, Model, Task, Training


def data(folder):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(600, 16, generator=generator)
    labels = (inputs[:, :4] * inputs[:, 4:8]).sum(dim=1).gt(0).long()
    return Data(TensorDataset(inputs[:480], labels[:480]), TensorDataset(inputs[480:], labels[480:]), classes=("no", "yes"))


def network(data):
    return nn.Sequential(
        nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 2)
    )


def noise(inputs, generator):
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


task = Task(
    name="sign of a product",
    models={"mlp": Model(network, Training(epochs=16, batch_size=16, learning_rate=0.05, warmup=0.1, threads=1))},
    data=data,
    loss=nn.functional.cross_entropy,
    metrics={"accuracy": Metric(lambda outputs, labels: outputs.argmax(dim=1) == labels, "share of right answers")},
    augment=noise,
)
"""
"""A user's task whose training draws on everything that a checkpoint must bring back: batch norm, dropout, augmentation."""


def environment() -> dict[str, str]:
    """Return the environment of a process that finds this niwaki, in whatever folder it starts."""
    path = [str(Path(niwaki.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def start(folder: Path, *arguments: object, launcher: tuple[str, ...] = ("-m", "niwaki")) -> subprocess.Popen[str]:
    """Start a command in a folder, in a process group of its own."""
    command = [sys.executable, *launcher, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment(), start_new_session=True, **pipes)


def until(happened: Callable[[], object], process: subprocess.Popen[str] | None = None, seconds: float = 120) -> None:
    """Wait for something; fail when the process that should bring it about has ended before."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            if process is not None:
                process.kill()
            raise AssertionError("it did not happen")
        if process is not None and process.poll() is not None and not happened():
            raise AssertionError(f"ended with {process.returncode} before: {process.communicate()}")
        time.sleep(0.005)


def essence(folder: Path) -> dict[str, object]:
    """Return a run's record without what varies from one time to the next."""
    record = json.loads((folder / "run.json").read_text())
    record["results"]["measures"] = [measure for measure in record["results"]["measures"] if measure["name"] not in VARIES]
    return record
