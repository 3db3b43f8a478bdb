"""Fashion-MNIST with dense networks as small as the sparse ones: LeNet-300-100 in its proportions, with as many parameters as are left."""

from dataclasses import replace

from niwaki.tasks import Model, images
from niwaki.tasks.networks import Perceptron

INPUTS, CLASSES, LENET = images.MNIST_SIZE**2, 10, (300, 100)


def parameters(first: int, second: int) -> int:
    """Return how many weights and biases a network with these hidden units has."""
    return (INPUTS + 1) * first + (first + 1) * second + (second + 1) * CLASSES


def left(sparsity: float) -> float:
    """Return how many parameters LeNet-300-100 has left: those that are masked are weights of its first two layers."""
    return parameters(*LENET) - sparsity * (INPUTS * LENET[0] + LENET[0] * LENET[1])


def hidden(sparsity: float) -> tuple[int, int]:
    """Return the hidden units of the network, three in the first layer to one in the second, that has the nearest number of parameters."""
    widths = [(first, round(first / 3)) for first in range(2, LENET[0] + 1)]
    return min(widths, key=lambda width: abs(parameters(*width) - left(sparsity)))


def small(sparsity: float) -> Model:
    """Return the small network, trained as LeNet-300-100 is."""
    like = images.FASHION_MNIST.models["lenet_300_100"]
    return replace(like, build=lambda data: Perceptron(inputs=INPUTS, classes=CLASSES, hidden=hidden(sparsity)))


TASK = replace(images.FASHION_MNIST, models={f"as_many_as_{sparsity}": small(sparsity) for sparsity in (0.8, 0.9, 0.95, 0.98)})
