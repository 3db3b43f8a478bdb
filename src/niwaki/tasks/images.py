"""Images in 10 classes, read from the files in which they are distributed: MNIST, Fashion-MNIST and CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from niwaki.errors import InputError
from niwaki.tasks.classification import METRICS
from niwaki.tasks.files import check_labels, read_cifar10, read_idx, required
from niwaki.tasks.networks import VGG, LeNet5, Perceptron, ResNet
from niwaki.tasks.protocol import Data, Model, Task, Training

MNIST_SIZE = 28
CIFAR_PADDING = 4
"""Pixels by which a random crop may be shifted each way (He et al. 2016)."""


@dataclass(frozen=True)
class Scale:
    """How pixels become inputs: ``(x / 255 - mean) / deviation``, channel by channel."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def of(self, pixels: Tensor) -> Tensor:
        """Return float32 inputs of uint8 pixels ``[..., channels, height, width]``."""
        return (pixels / 255).sub_(_by_channel(self.mean)).div_(_by_channel(self.deviation))

    @property
    def black(self) -> Tensor:
        """What a black pixel becomes: shape ``[channels, 1, 1]``."""
        return -_by_channel(self.mean) / _by_channel(self.deviation)


def _by_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1)


MNIST_SCALE = Scale((0.1307,), (0.3081,))
"""Mean and standard deviation of the pixels of the training images."""

FASHION_SCALE = Scale((0.2860,), (0.3530,))
"""Likewise."""

CIFAR_SCALE = Scale((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""The usual one of ImageNet, which published CIFAR-10 models expect too."""


class Images:
    """Images and their classes, kept as bytes; a batch of them is float32 inputs and int64 classes.

    Attributes:
        tensors: images ``[N, channels, height, width]`` and classes ``[N]``, both uint8.
        scale: how pixels become inputs.

    >>> images = Images(torch.full((5, 1, 2, 2), 255, dtype=torch.uint8), torch.arange(5, dtype=torch.uint8), Scale((0.5,), (0.25,)))
    >>> inputs, classes = images[torch.tensor([3, 1])]
    >>> inputs.shape, inputs[0, 0, 0, 0], classes
    (torch.Size([2, 1, 2, 2]), tensor(2.), tensor([3, 1]))
    """

    def __init__(self, images: Tensor, classes: Tensor, scale: Scale) -> None:
        self.tensors = (images, classes)
        self.scale = scale

    def __len__(self) -> int:
        return len(self.tensors[1])

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs ``[batch, channels, height, width]`` and classes ``[batch]`` of some examples."""
        images, classes = self.tensors
        return self.scale.of(images[indices]), classes[indices].to(torch.int64)


def load_mnist(folder: Path | None, *, task: str, inside: str, scale: Scale, classes: tuple[str, ...]) -> Data:
    """Read the four IDX files of MNIST, or of a data set in its form, from a folder or from ``inside`` it.

    Raises:
        InputError: a file is missing or damaged, holds no 28×28 images or too few or wrong labels.
    """

    def part(prefix: str) -> Images:
        images_file = required(folder, f"{inside}/{prefix}-images-idx3-ubyte", task=task, contents="28×28 images in IDX form")
        labels_file = required(folder, f"{inside}/{prefix}-labels-idx1-ubyte", task=task, contents="one label an image in IDX form")
        images, labels = read_idx(images_file), read_idx(labels_file)
        if images.dtype != torch.uint8 or images.ndim != 3 or images.shape[1:] != (MNIST_SIZE, MNIST_SIZE):
            raise InputError(f"{images_file}: N × 28 × 28 uint8 expected, {_kind(images)} found")
        if labels.dtype != torch.uint8 or labels.ndim != 1:
            raise InputError(f"{labels_file}: N uint8 expected, {_kind(labels)} found")
        if len(labels) != len(images):
            raise InputError(f"{labels_file}: {len(labels):,} labels for the {len(images):,} images of {images_file.name}")
        check_labels(labels_file, labels, len(classes))
        return Images(images.unsqueeze(1), labels, scale)

    return Data(part("train"), part("t10k"), classes=classes)


def _kind(tensor: Tensor) -> str:
    return f"{' × '.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"


def load_cifar10(folder: Path | None) -> Data:
    """Read the five training batches and the test batch of CIFAR-10, binary version, from a folder or ``cifar-10-batches-bin`` in it.

    Raises:
        InputError: a file is missing or damaged.
    """

    def part(*names: str) -> Images:
        contents = "10,000 records of 3,073 bytes (CIFAR-10, binary version)"
        files = [required(folder, f"cifar-10-batches-bin/{name}.bin", task="cifar10", contents=contents) for name in names]
        images, labels = (torch.cat(parts) for parts in zip(*map(read_cifar10, files), strict=True))
        return Images(images, labels, CIFAR_SCALE)

    return Data(part(*(f"data_batch_{number}" for number in range(1, 6))), part("test_batch"), classes=CIFAR_CLASSES)


def crop_and_flip(inputs: Tensor, generator: torch.Generator, scale: Scale = CIFAR_SCALE, padding: int = CIFAR_PADDING) -> Tensor:
    """Return the images shifted at random, and half of them mirrored (He et al. 2016).

    Each image is padded with black on all sides, cut out again at a uniformly random place, and flipped left to right with probability 1/2.

    Args:
        inputs: ``[batch, channels, height, width]``, scaled.
        generator: where all randomness comes from.
        scale: that of the inputs: it says what black is.
        padding: pixels on each side.
    """
    batch, channels, height, width = inputs.shape

    def random(below: int) -> Tensor:
        return torch.randint(below, (batch, 1), generator=generator, device=generator.device).to(inputs.device)

    padded = scale.black.to(inputs).expand(channels, height + 2 * padding, width + 2 * padding).repeat(batch, 1, 1, 1)
    padded[:, :, padding : padding + height, padding : padding + width] = inputs
    rows = random(2 * padding + 1) + torch.arange(height, device=inputs.device)
    columns = torch.arange(width, device=inputs.device).expand(batch, width)
    columns = random(2 * padding + 1) + torch.where(random(2) == 1, columns.flip(1), columns)
    which = torch.arange(batch, device=inputs.device)
    cut = padded.movedim(1, 3)[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return cut.movedim(3, 1).contiguous()


DIGIT_CLASSES = tuple(map(str, range(10)))
FASHION_CLASSES = ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

LENETS = {
    "lenet_300_100": Model(
        lambda data: Perceptron(inputs=MNIST_SIZE**2, classes=len(data.classes)),
        Training(epochs=10, batch_size=128, learning_rate=0.05, warmup=0.05, threads=1),
    ),
    "lenet_5": Model(
        lambda data: LeNet5(classes=len(data.classes)),
        Training(epochs=10, batch_size=128, learning_rate=0.05, warmup=0.05),
    ),
}
_FROM_SCRATCH = Training(epochs=160, batch_size=128, learning_rate=0.1, weight_decay=1e-4)

MNIST = Task(
    name="mnist",
    summary="handwritten digits: 60,000 training and 10,000 test images of 28×28 pixels, 10 classes (LeCun et al. 1998)",
    models=LENETS,
    data=partial(load_mnist, task="mnist", inside="mnist", scale=MNIST_SCALE, classes=DIGIT_CLASSES),
    loss=F.cross_entropy,
    metrics=METRICS,
)

FASHION_MNIST = Task(
    name="fashion_mnist",
    summary="pieces of clothing: 60,000 training and 10,000 test images of 28×28 pixels, 10 classes (Xiao et al. 2017)",
    models=LENETS,
    data=partial(load_mnist, task="fashion_mnist", inside="fashion-mnist", scale=FASHION_SCALE, classes=FASHION_CLASSES),
    loss=F.cross_entropy,
    metrics=METRICS,
)

CIFAR10 = Task(
    name="cifar10",
    summary="things and animals: 50,000 training and 10,000 test images of 32×32 pixels in color, 10 classes (Krizhevsky 2009)",
    models={
        "resnet20": Model(lambda data: ResNet(3, classes=len(data.classes)), _FROM_SCRATCH),
        "resnet56": Model(lambda data: ResNet(9, classes=len(data.classes)), _FROM_SCRATCH),
        "resnet8": Model(lambda data: ResNet(1, classes=len(data.classes)), _FROM_SCRATCH),
        "vgg_small": Model(lambda data: VGG(classes=len(data.classes)), _FROM_SCRATCH.model_copy(update={"weight_decay": 5e-4})),
    },
    data=load_cifar10,
    loss=F.cross_entropy,
    metrics=METRICS,
    augment=crop_and_flip,
)
