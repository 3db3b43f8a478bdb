"""Scores of units from statistics that were collected on a network, against numpy on what a hook recorded."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from niwaki.calibration import Watched, collect
from niwaki.layout import layout_of
from niwaki.pieces import Slices
from niwaki.saliency import Activity, ActivityVariance, Apoz, Correlation, Entropy, Grasp, Observation, SynFlow


class Network(nn.Module):
    """A convolution that a convolution reads, which is flattened for a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second, self.last = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, 3), nn.Linear(4 * 4, 3)
        self.double()

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        return self.last(F.relu(self.second(x)).flatten(1))


@pytest.fixture(scope="module")
def network():
    return Network()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 2, 10, 10, generator=generator, dtype=torch.float64), torch.arange(n) % 3) for n in (8, 8, 5)]


def watched(network, name):
    weight = network.get_submodule(name).weight
    return Watched(f"{name}.weight", weight, layout_of(network.get_submodule(name), "weight", weight.shape))


def seen_of(component, network, data, name):
    one = watched(network, name)
    values = collect(network, data, F.cross_entropy, [one], component.statistics)[one.name]
    return Observation(one.name, one.parameter.detach().view(one.layout.shape), layout=one.layout, statistics=values)


def recorded(network, data, name):
    """Activations of every unit that a layer reads: ``[examples, units, positions]``."""
    found = []
    handle = network.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    for inputs, _ in data:
        network(inputs)
    handle.remove()
    whole = torch.cat(found)
    return whole.reshape(len(whole), 5 if name == "second" else 4, -1).numpy()


def pieces(network, name):
    shape, units = tuple(network.get_submodule(name).weight.shape), 5 if name == "second" else 4
    return Slices(name, shape, shape, 1, torch.arange(units), torch.arange(shape[1]).view(units, -1))


def entropy(values):
    counts, _ = np.histogram(values, bins=100)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def variance(x):
    """Of each entry that the reader has: a channel, or a position of a flattened one."""
    return [float(np.mean([unit.var()] if x.shape[1] == 5 else unit.var(axis=0))) for unit in x.transpose(1, 0, 2)]


@pytest.mark.parametrize("name", ["second", "last"])
@pytest.mark.parametrize(
    ("component", "expected"),
    [
        (Activity(), lambda x: np.abs(x).mean(axis=(0, 2))),
        (Apoz(), lambda x: 1 - (x == 0).mean(axis=(0, 2))),
        (ActivityVariance(), variance),
        (Entropy(), lambda x: [entropy(unit.mean(axis=1)) for unit in x.transpose(1, 0, 2)]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_scores_of_recorded_activations(component, expected, name, network, data):
    found = component.score(seen_of(component, network, data, name), pieces(network, name))
    assert found.tolist() == pytest.approx([float(v) for v in expected(recorded(network, data, name))], rel=1e-10)


def test_the_most_correlated_channels(network, data):
    found = Correlation().score(seen_of(Correlation(), network, data, "second"), pieces(network, "second"))
    flat = recorded(network, data, "second").transpose(1, 0, 2).reshape(5, -1)
    related = np.abs(np.corrcoef(flat)) - np.eye(5)
    pair = np.unravel_index(related.argmax(), related.shape)
    assert int(found.argmin()) == max(pair, key=lambda u: related[u].sum())


def test_grasp_of_a_network_is_double_backward(network, data):
    component = Grasp(temperature=2.0)
    found = component.score(seen_of(component, network, data, "second"), lambda values: values)
    total = sum(F.cross_entropy(network(x) / 2.0, y, reduction="sum") for x, y in data)
    weights = list(network.parameters())
    gradients = torch.autograd.grad(total / 21, weights, create_graph=True)
    weight = network.second.weight
    [single] = (g for g, w in zip(gradients, weights, strict=True) if w is weight)
    [product] = torch.autograd.grad((single * single.detach()).sum(), weight)  # H of the scored weights alone
    torch.testing.assert_close(found, (weight * product).detach(), rtol=1e-8, atol=1e-14)


def test_synflow_of_a_network_is_what_flows_through_absolute_weights(network, data):
    found = SynFlow().score(seen_of(SynFlow(), network, data, "last"), lambda values: values)
    with torch.no_grad():
        tensors = {name: parameter.abs() for name, parameter in network.named_parameters()}
        made = []
        handle = network.last.register_forward_pre_hook(lambda _, args: made.append(args[0]))
        torch.func.functional_call(network, tensors, (torch.ones(1, 2, 10, 10, dtype=torch.float64),))
        handle.remove()
    torch.testing.assert_close(found, network.last.weight.detach().abs() * made[0][0], rtol=1e-10, atol=0)
