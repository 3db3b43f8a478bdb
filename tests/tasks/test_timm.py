import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from niwaki.errors import InputError
from niwaki.tasks import Data
from niwaki.tasks.timm import model


def images(channels: int = 3, height: int = 12, width: int = 16, classes: int = 5) -> Data:
    examples = TensorDataset(torch.rand(4, channels, height, width), torch.tensor([0, 1, 2, 3]))
    return Data(examples, examples, classes=tuple(f"class {number}" for number in range(classes)))


@pytest.fixture
def stub(monkeypatch):
    """A timm with two networks that records how they were asked for."""
    timm = ModuleType("timm")
    timm.calls = []
    fixed = {"tiny": False, "tiny_vit": True}

    def create_model(name, *, pretrained, num_classes, in_chans, img_size=None):
        timm.calls.append((name, pretrained, num_classes, in_chans, img_size))
        return nn.Sequential(nn.Conv2d(in_chans, 2, 9), nn.Flatten(), nn.LazyLinear(num_classes))

    timm.create_model = create_model
    timm.is_model = lambda name: name in fixed
    timm.list_models = lambda: list(fixed)
    timm.get_pretrained_cfg = lambda name: SimpleNamespace(fixed_input_size=fixed[name]) if name in fixed else None
    monkeypatch.setitem(sys.modules, "timm", timm)
    return timm


def test_channels_and_classes_are_those_of_the_data_and_weights_are_never_fetched(stub):
    network = model("tiny").build(images(channels=2, classes=7))
    assert stub.calls == [("tiny", False, 7, 2, None)]
    assert network.training
    assert network(torch.rand(3, 2, 12, 16)).shape == (3, 7)


def test_a_network_for_one_image_size_gets_that_of_the_data(stub):
    model("tiny_vit").build(images())
    assert stub.calls == [("tiny_vit", False, 5, 3, (12, 16))]


def test_an_unknown_name_offers_near_ones_in_one_line(stub):
    with pytest.raises(InputError, match=r"^--model timm:tiny_vitt: timm has no such model; near: tiny_vit, tiny") as error:
        model("tiny_vitt")
    assert "\n" not in str(error.value)
    assert not stub.calls


def test_too_small_images_are_refused_with_the_reason_when_it_is_built(stub):
    with pytest.raises(InputError, match=r"^--model timm:tiny: cannot be built for 6×6 images: .*[Kk]ernel size"):
        model("tiny").build(images(height=6, width=6))


@pytest.mark.parametrize(
    "data",
    [
        images(classes=0),
        Data(*2 * (TensorDataset(torch.rand(2, 9), torch.zeros(2)),), classes=("a",)),
        Data(*2 * (TensorDataset(torch.rand(2, 9), torch.zeros(2)),)),
    ],
)
def test_data_that_are_no_images_in_classes_are_refused(stub, data):
    with pytest.raises(InputError, match=r"^--model timm:tiny: a task with images"):
        model("tiny").build(data)


def test_without_timm_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"pip install 'niwaki\[vision\]'") as error:
        model("resnet18")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_real_network_fits_the_data(name):
    try:
        importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    network = model(name).build(images(channels=1, height=32, width=32, classes=3))
    assert network(torch.rand(2, 1, 32, 32)).shape == (2, 3)
    with pytest.raises(InputError, match=r"near: .*resnet"):
        model("resnet20")
