"""Handwritten digits: 1,797 images of 8×8 pixels in 10 classes, shipped with scikit-learn (Alpaydin & Kaynak 1998)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from niwaki.errors import InputError
from niwaki.tasks.classification import METRICS
from niwaki.tasks.networks import Convnet, Perceptron
from niwaki.tasks.protocol import Data, Model, Task, Training

TEST_EVERY = 5
"""Of each class, in the order of the file, every fifth image is a test image: 80/20, stratified, the same on every machine."""


def load(folder: Path | None = None) -> Data:
    """Return the digits, pixels scaled to [0, 1], as images ``[N, 1, 8, 8]`` and classes ``[N]``; no folder is needed.

    Raises:
        InputError: scikit-learn, which brings the images, is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise InputError("task 'digits': its images come with scikit-learn, which is not installed; pip install 'niwaki[demo]'") from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1) / 16
    classes = torch.from_numpy(bunch.target).to(torch.int64)
    test = is_test(classes)
    train, held_out = (TensorDataset(images[which], classes[which]) for which in (~test, test))
    return Data(train, held_out, classes=tuple(map(str, range(10))))


def is_test(classes: Tensor) -> Tensor:
    """Return which examples are test examples: bool, shape ``[N]``."""
    one_hot = F.one_hot(classes)
    earlier_of_its_class = (one_hot.cumsum(dim=0) * one_hot).sum(dim=1) - 1
    return earlier_of_its_class % TEST_EVERY == TEST_EVERY - 1


DIGITS = Task(
    name="digits",
    summary="scikit-learn's handwritten digits: 1,442 training and 355 test images of 8×8 pixels, 10 classes",
    models={
        "mlp": Model(
            lambda data: Perceptron(classes=len(data.classes)),
            Training(epochs=40, batch_size=32, learning_rate=0.1, warmup=0.05, threads=1),
        ),
        "convnet": Model(
            lambda data: Convnet(classes=len(data.classes)), Training(epochs=20, batch_size=32, learning_rate=0.1, warmup=0.05, threads=1)
        ),
    },
    data=load,
    loss=F.cross_entropy,
    metrics=METRICS,
)
