import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from niwaki.tasks import Data, Metric, Model, Task, Training


def _examples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    return TensorDataset(inputs, (inputs @ torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0, 1.0]) > 0).long())


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))


@pytest.fixture
def small_task() -> Task:
    """A task that trains in a moment: which side of a plane a point lies on."""
    return Task(
        name="plane",
        models={"small": Model(_network, Training(epochs=4, batch_size=16, learning_rate=0.1, threads=1))},
        data=lambda: Data(train=_examples(200, 0), test=_examples(90, 1)),
        loss=functional.cross_entropy,
        metrics={"accuracy": Metric(lambda outputs, targets: outputs.argmax(1) == targets, "share of right answers")},
    )
