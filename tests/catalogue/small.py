"""A small network with data and a task, on which every row of the catalogue runs in a moment."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from training.small import ACCURACY

from niwaki.recipe import Recipe
from niwaki.tasks import Data, Model, Task, Training

WEIGHTS = {"conv.weight": (8, 4, 3, 3), "linear.weight": (8, 8)}
"""The targets of the network: all but the first convolution and the last layer."""
ELEMENTS = 8 * 4 * 9 + 8 * 8


class Network(nn.Module):
    """Every target has a normalization behind it, and no residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv, self.conv_norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.linear, self.linear_norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first_norm(self.first(x)).relu()
        x = self.conv_norm(self.conv(x)).relu().mean((2, 3))
        return self.last(self.linear_norm(self.linear(x)).relu())


def examples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 6, 6, generator=generator)
    return images, (images.square().mean((1, 2, 3)) * 4).long().clamp(3, 5) - 3


TASK = Task(
    name="images",
    models={"network": Model(lambda data: Network(), Training(epochs=3, batch_size=8, learning_rate=0.05, threads=1))},
    data=lambda folder: Data(TensorDataset(*examples(64, 0)), TensorDataset(*examples(32, 1))),
    loss=functional.cross_entropy,
    metrics={"accuracy": ACCURACY},
)

SHORTER = {
    "amc": {"episodes": 4, "explore": 2},
    "evolutionary": {"population": 4, "generations": 2},
    "dynamic_programming": {"trials": 4},
    "one_shot": {"rounds": 3},
    "repeat": 2,
}
"""Name of a component, or field of a stage -> values that its numbers do not exceed, which makes it quick."""


def shorter(recipe: Recipe) -> Recipe:
    """Return a recipe with fewer trials and rounds."""

    def less(data):
        if isinstance(data, list):
            return [less(value) for value in data]
        if isinstance(data, dict):
            return {key: capped(key, less(value)) for key, value in data.items()}
        return {data: SHORTER[data]} if data in ("amc", "evolutionary") else data

    def capped(key, value):
        most = SHORTER.get(key)
        if isinstance(most, dict) and isinstance(value, dict):
            return value | {field: min(most[field], value[field]) for field in most.keys() & value.keys()}
        return min(most, value) if isinstance(most, int) and isinstance(value, int) else value

    return Recipe.from_data(less(recipe.to_data()))


def kept(masks):
    """Return how many weights of each target are active."""
    return {name: int(masks[name].sum()) for name in WEIGHTS}


def flops(masks):
    """Of a forward pass of one example; a multiply-add is two."""
    first, last = 4 * 9 * 36, 8 * 3
    return 2 * (first + 36 * int(masks["conv.weight"].sum()) + int(masks["linear.weight"].sum()) + last)
