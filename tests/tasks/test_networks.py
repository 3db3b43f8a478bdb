import numpy as np
import pytest
import torch

from niwaki.metrics import forward_flops
from niwaki.tasks.networks import Convnet, Perceptron, ResNet, Transformer, _Residual


def test_perceptron_is_lenet_300_100():
    model = Perceptron(inputs=784).double()
    inputs = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    weights = [p.detach().numpy() for p in model.parameters()]
    assert sum(w.size for w in weights) == 266_610  # LeNet-300-100 of the literature
    hidden = inputs.reshape(3, -1).numpy()
    for i in range(0, 6, 2):
        hidden = hidden @ weights[i].T + weights[i + 1]
        hidden = np.maximum(hidden, 0) if i < 4 else hidden
    np.testing.assert_allclose(model(inputs).detach().numpy(), hidden, rtol=1e-10)


def test_convnet_takes_other_image_sizes():
    assert Convnet(channels=3, size=12, classes=5)(torch.rand(2, 3, 12, 12)).shape == (2, 5)


@pytest.mark.parametrize(("blocks", "parameters"), [(3, 269_722), (9, 853_018)])
def test_resnet_has_the_parameters_and_names_of_the_published_one(blocks, parameters):
    model = ResNet(blocks=blocks)
    assert sum(p.numel() for p in model.parameters()) == parameters
    expected = {"conv1.weight", "bn1.weight", "bn1.bias", "linear.weight", "linear.bias"}
    for layer in (1, 2, 3):
        for block in range(blocks):
            for i in (1, 2):
                prefix = f"layer{layer}.{block}"
                expected |= {f"{prefix}.conv{i}.weight", f"{prefix}.bn{i}.weight", f"{prefix}.bn{i}.bias"}
    assert {name for name, _ in model.named_parameters()} == expected


def test_resnet20_has_40_6_million_multiply_adds():
    stages = 1024 * 9 * (6 * 16 * 16) + 256 * 9 * (16 * 32 + 5 * 32 * 32) + 64 * 9 * (32 * 64 + 5 * 64 * 64)
    assert forward_flops(ResNet(), (torch.rand(1, 3, 32, 32),)).dense == 2 * (1024 * 9 * 3 * 16 + stages + 64 * 10)


def test_the_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros():
    block = _Residual(4, 8, stride=2).double().eval()
    torch.nn.init.zeros_(block.conv2.weight)  # only the shortcut is left
    inputs = torch.rand(2, 4, 6, 6, dtype=torch.float64)
    expected = np.zeros((2, 8, 3, 3))
    for channel in range(4):
        for row in range(3):
            for column in range(3):
                expected[:, channel + 2, row, column] = inputs[:, channel, 2 * row, 2 * column].numpy()
    np.testing.assert_array_equal(block(inputs).detach().numpy(), expected)


def test_transformer_predicts_from_the_past_only():
    model = Transformer(vocabulary=11, context=8, width=12, layers=2, heads=3).double()
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % 11
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_transformer_size():
    width, layers = 384, 6
    blocks = layers * (12 * width**2 + 9 * width + 4 * width)  # matrices; their biases; two normalizations
    assert sum(p.numel() for p in Transformer().parameters()) == blocks + 256 * width + 256 * width + 2 * width + 256 * width
