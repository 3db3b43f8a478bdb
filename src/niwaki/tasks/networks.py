"""The networks of the built-in tasks and benchmarks, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Perceptron(nn.Sequential):
    """LeNet-300-100 (LeCun et al. 1998): two hidden layers of 300 and 100 units.

    Input ``[batch, ...]`` is flattened to ``[batch, inputs]``; output ``[batch, classes]``.
    """

    def __init__(self, inputs: int = 64, classes: int = 10, hidden: tuple[int, int] = (300, 100)) -> None:
        first, second = hidden
        super().__init__(
            nn.Flatten(),
            nn.Linear(inputs, first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, classes),
        )


class Convnet(nn.Module):
    """Three 3×3 convolutions with batch normalization for small images, two poolings, one linear layer.

    Input ``[batch, channels, size, size]``, ``size`` a multiple of 4; output ``[batch, classes]``.
    """

    def __init__(self, channels: int = 1, size: int = 8, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.linear = nn.Linear(4 * width * (size // 4) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for a batch of images."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        out: Tensor = self.linear(x.flatten(1))
        return out


class LeNet5(nn.Module):
    """LeNet-5 as Caffe ships it and the pruning literature counts it (Jia et al. 2014; Han et al. 2015): 431,080 parameters.

    Two 5×5 convolutions of 20 and 50 channels, each followed by a ReLU and a 2×2 max pooling, a layer of 500 units, and the output. Caffe's
    own has no ReLU after the convolutions; LeCun et al.'s of 1998 has 6 and 16 channels and layers of 120 and 84 units.
    Input ``[batch, 1, 28, 28]``; output ``[batch, classes]``.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.linear1 = nn.Linear(50 * 4 * 4, 500)
        self.linear2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for a batch of images."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        out: Tensor = self.linear2(F.relu(self.linear1(x.flatten(1))))
        return out


class VGG(nn.Sequential):
    """VGG-small for CIFAR (Zhang et al. 2018, LQ-Nets): three pairs of 3×3 convolutions with batch normalization, then one linear layer.

    The pairs have ``width``, ``2 · width`` and ``4 · width`` channels and end in a 2×2 max pooling. With the usual width of 128 there are
    4.7 million parameters. Input ``[batch, 3, 32, 32]``; output ``[batch, classes]``.
    """

    def __init__(self, classes: int = 10, width: int = 128) -> None:
        layers: list[nn.Module] = []
        inputs = 3
        for outputs in (width, 2 * width, 4 * width):
            for channels in (inputs, outputs):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
            inputs = outputs
        super().__init__(*layers, nn.Flatten(), nn.Linear(inputs * 4 * 4, classes))


class _Residual(nn.Module):
    """Two 3×3 convolutions around an option-A shortcut: every second pixel, and zeros for the channels that the input lacks."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.pad = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride != 1 or self.pad:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + shortcut)


class ResNet(nn.Module):
    """The residual network for CIFAR (He et al. 2016) with ``6 · blocks + 2`` layers and option-A shortcuts.

    1 block makes ResNet-8, 3 make ResNet-20, 9 make ResNet-56. Input ``[batch, 3, 32, 32]``; output ``[batch, classes]``.
    """

    def __init__(self, blocks: int = 3, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, 1, blocks)
        self.layer2 = self._stage(width, 2 * width, 2, blocks)
        self.layer3 = self._stage(2 * width, 4 * width, 2, blocks)
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(_Residual(inputs, outputs, stride), *(_Residual(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for a batch of images."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.linear(x.mean(dim=(2, 3)))
        return out


class _DecoderBlock(nn.Module):
    """Pre-normalization causal self-attention and a feed-forward network of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        query, key, value = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """A decoder like GPT-2 (Radford et al. 2019) with learned positions and separate linear layers.

    Input ``[batch, tokens]`` of token numbers; output ``[batch, tokens, vocabulary]``. The default has 10.9 million parameters.
    """

    def __init__(self, vocabulary: int = 256, context: int = 256, width: int = 384, layers: int = 6, heads: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_DecoderBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return, for every position, the outputs for the token that follows."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.blocks(self.embedding(tokens) + self.position(positions))
        out: Tensor = self.output(self.norm(x))
        return out
