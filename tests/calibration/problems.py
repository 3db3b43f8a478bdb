"""Small float64 models with data and a loss, and what is watched of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from niwaki.calibration import Watched
from niwaki.layout import layout_of


def watched(model, *names, active=None):
    """Weights by their names."""
    found = []
    for name in names:
        path, _, own = name.rpartition(".")
        parameter = model.get_parameter(name)
        layout = layout_of(model.get_submodule(path), own, parameter.shape)
        found.append(Watched(name, parameter, layout, (active or {}).get(name)))
    return found


def multilayer():
    """A perceptron of smooth activations."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, ("0.weight", "2.weight"), classes(lambda n: torch.randn(n, 4, dtype=torch.float64))


class Convolutional(nn.Module):
    """Convolutions with groups, batch normalization and dropout."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = functional.softplus(self.norm(self.first(x)))
        return self.head(self.drop(torch.tanh(self.second(x)).flatten(1)))


def convolutional():
    torch.manual_seed(0)
    model = Convolutional().double()
    nn.init.uniform_(model.norm.running_mean)
    return model, ("first.weight", "second.weight", "head.weight"), classes(lambda n: torch.randn(n, 2, 5, 5, dtype=torch.float64))


class Attention(nn.Module):
    """A transformer of words, whose embedding is the head too."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.layer(self.words(ids)))


def attention():
    torch.manual_seed(0)
    data = [(torch.randint(7, (n, 3)), torch.randint(7, (n, 3))) for n in (3, 5, 2)]
    names = ("words.weight", "layer.self_attn.in_proj_weight", "layer.linear1.weight")
    return Attention().double(), names, data


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(3, 2, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def recurrent():
    torch.manual_seed(0)
    return Recurrent().double(), ("layer.weight_ih_l0", "head.weight"), classes(lambda n: torch.randn(n, 4, 3, dtype=torch.float64))


def classes(inputs):
    return [(inputs(n), torch.randint(3, (n,))) for n in (3, 5, 2)]


def cross_entropy(outputs, targets):
    """The mean over examples, and over their positions."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


PROBLEMS = {"multilayer": multilayer, "convolutional": convolutional, "attention": attention, "recurrent": recurrent}
