import numpy as np
import pytest
import torch

from niwaki.metrics import forward_flops
from niwaki.tasks.networks import VGG, Convnet, LeNet5, Perceptron, ResNet, Transformer, _Residual


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


def convolve(images: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Cross-correlation without padding, one output pixel at a time."""
    size = weight.shape[-1]
    rows, columns = (length - size + 1 for length in images.shape[-2:])
    out = np.empty((len(images), len(weight), rows, columns))
    for row in range(rows):
        for column in range(columns):
            patch = images[:, None, :, row : row + size, column : column + size]
            out[:, :, row, column] = (patch * weight).sum(axis=(2, 3, 4)) + bias
    return out


def pool(images: np.ndarray) -> np.ndarray:
    return np.maximum.reduce([images[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)])


def test_lenet5_is_the_one_of_the_pruning_literature():
    model = LeNet5().double()
    weights = [p.detach().numpy() for p in model.parameters()]
    assert sum(w.size for w in weights) == 431_080  # Han et al. 2015
    inputs = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    hidden = pool(np.maximum(convolve(inputs.numpy(), *weights[:2]), 0))
    hidden = pool(np.maximum(convolve(hidden, *weights[2:4]), 0)).reshape(2, -1)
    expected = np.maximum(hidden @ weights[4].T + weights[5], 0) @ weights[6].T + weights[7]
    np.testing.assert_allclose(model(inputs).detach().numpy(), expected, rtol=1e-10)
    multiply_adds = 24 * 24 * 25 * 20 + 8 * 8 * 20 * 25 * 50 + 800 * 500 + 500 * 10
    assert forward_flops(LeNet5(), (torch.rand(1, 1, 28, 28),)).dense == 2 * multiply_adds


def test_vgg_small_has_three_pairs_of_convolutions_and_one_linear_layer():
    model = VGG(classes=7, width=4).double().eval()
    channels = [(3, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    assert sum(p.numel() for p in model.parameters()) == sum(9 * i * o + 2 * o for i, o in channels) + 16 * 16 * 7 + 7
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            torch.nn.init.uniform_(buffer, 0.5 if "var" in name else -0.5, 1.5)
    state = [value.numpy() for name, value in model.state_dict().items() if "tracked" not in name]
    inputs = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    hidden = inputs.numpy()
    for layer in range(6):
        weight, scale, shift, mean, variance = state[5 * layer : 5 * layer + 5]
        hidden = convolve(np.pad(hidden, ((0, 0), (0, 0), (1, 1), (1, 1))), weight, np.zeros(1))
        scale, shift, mean, variance = (value.reshape(-1, 1, 1) for value in (scale, shift, mean, variance))
        hidden = np.maximum((hidden - mean) / np.sqrt(variance + 1e-5) * scale + shift, 0)
        hidden = pool(hidden) if layer % 2 else hidden
    expected = hidden.reshape(2, -1) @ state[30].T + state[31]
    np.testing.assert_allclose(model(inputs).detach().numpy(), expected, rtol=1e-9)


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
