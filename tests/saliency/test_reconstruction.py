"""ThiNet, the lasso and linear dependence on weights of every layout, against the units' explicit contributions."""

import pytest
import torch
import torch.nn.functional as F

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.granularity import Element, InputChannel, Kernel
from niwaki.layerwise.channels import lasso_path, thinet_order
from niwaki.layout import Layout
from niwaki.pieces import Grid, Slices
from niwaki.saliency import LassoChannels, LinearDependence, Observation, ThiNet
from niwaki.statistics import InputGram


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CONVOLUTION = Layout(("output", "input", "kernel", "kernel"), (3, 5, 2, 2))
NAMES = ["thinet", "lasso_channels", "linear_dependence"]


def convolution():
    """A convolution, what it reads, and what each input channel adds to its outputs."""
    images, weight = normal(4, 5, 5, 5, seed=2) * torch.linspace(0.5, 2, 5)[:, None, None], normal(3, 5, 2, 2, seed=3)
    patches = F.unfold(images, (2, 2)).movedim(1, 0).flatten(1)
    parts = torch.stack([F.conv2d(images[:, c : c + 1], weight[:, c : c + 1]).flatten() for c in range(5)])
    positions = patches.shape[1]
    seen = Observation("conv.weight", weight, layout=CONVOLUTION, statistics={InputGram(): (patches @ patches.T / positions)[None]})
    return seen, parts @ parts.T / positions


def test_input_channels_of_a_convolution():
    seen, products = convolution()
    cut, every = Grid(InputChannel(), CONVOLUTION), torch.ones(5, dtype=torch.bool)
    found = ThiNet().score(seen, cut)
    assert found.shape == (1, 5, 1, 1)
    assert found.flatten().tolist() == thinet_order(products, every).tolist()
    torch.testing.assert_close(LassoChannels().score(seen, cut).flatten(), lasso_path(products), rtol=1e-9, atol=0)


def test_linear_dependence_finds_the_channel_that_others_can_replace():
    images, weight = normal(4, 5, 6, 6, seed=2), normal(3, 5, 2, 2, seed=3)
    images[:, 3] = images[:, 0] - 2 * images[:, 4]
    patches = F.unfold(images, (2, 2)).movedim(1, 0).flatten(1)
    seen = Observation("conv.weight", weight, layout=CONVOLUTION, statistics={InputGram(): (patches @ patches.T)[None]})
    order = LinearDependence().score(seen, Grid(InputChannel(), CONVOLUTION)).flatten().argsort().tolist()
    assert order[0] in (0, 3, 4)
    assert not {0, 3, 4} <= set(order[:3])


@pytest.mark.parametrize("name", NAMES)
def test_units_with_several_columns_in_any_order(name):
    """A linear layer that reads three units of a flattened map, two entries each."""
    layout = Layout(("output", "input"), (4, 7))
    data, weight = normal(30, 7) * torch.tensor([1.0, 1.0, 3.0, 9.0, 3.0, 9.0, 1.0]), normal(4, 7, seed=1)
    places = torch.tensor([[5, 3], [0, 1], [2, 4]])
    cut = Slices("fc.weight", layout.shape, layout.shape, 1, torch.tensor([1, 4, 5]), places)
    seen = Observation("fc.weight", weight, layout=layout, statistics={InputGram(): (data.T @ data / 30)[None]})
    found = build("saliency", name).score(seen, cut)
    assert found.shape == (3,)
    assert found.argsort().tolist() == [1, 2, 0]  # by the size of what they read


@pytest.mark.parametrize("name", NAMES)
def test_transposed_weights_are_the_same_layer(name):
    data, weight = normal(30, 6) @ normal(6, 6, seed=5), normal(4, 6, seed=1)
    statistics = {InputGram(): (data.T @ data / 30)[None]}
    straight, turned = Layout(("output", "input"), (4, 6)), Layout(("input", "output"), (6, 4))
    saliency = build("saliency", name)
    a = saliency.score(Observation("w", weight, layout=straight, statistics=statistics), Grid(InputChannel(), straight))
    b = saliency.score(Observation("w", weight.T.contiguous(), layout=turned, statistics=statistics), Grid(InputChannel(), turned))
    assert torch.equal(a.flatten(), b.flatten())


@pytest.mark.parametrize("name", NAMES)
def test_masked_units_are_below_all_others(name):
    seen, _ = convolution()
    active = torch.ones(CONVOLUTION.shape, dtype=torch.bool)
    active[:, [1, 4]] = False
    masked = Observation(seen.name, seen.weight * active, layout=CONVOLUTION, statistics=seen.statistics, active=active)
    found = build("saliency", name).score(masked, Grid(InputChannel(), CONVOLUTION)).flatten()
    assert found[[1, 4]].max() < found[[0, 2, 3]].min()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("granularity", [Element(), Kernel()])
def test_pieces_that_are_no_inputs(name, granularity):
    seen, _ = convolution()
    with pytest.raises(InputError, match="input_channel"):
        build("saliency", name).score(seen, Grid(granularity, CONVOLUTION))


@pytest.mark.parametrize("name", NAMES)
def test_they_are_scores_of_units_by_their_readers(name):
    saliency = build("saliency", name)
    assert saliency.of_units
    assert saliency.scored_on == "inputs"
    assert saliency.statistics == (InputGram(),)
    seen, _ = convolution()
    gram = seen.of(InputGram()).clone()
    gram[0, 2, 3] = float("nan")
    with pytest.raises(InputError, match=r"conv\.weight.*finite"):
        saliency.score(
            Observation(seen.name, seen.weight, layout=CONVOLUTION, statistics={InputGram(): gram}), Grid(InputChannel(), CONVOLUTION)
        )
