"""Networks of timm (PyTorch Image Models, Wightman 2019), by name, for any task on images; the extra ``vision`` brings it."""

from __future__ import annotations

import difflib
from types import ModuleType

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.tasks.protocol import Data, Model, Training

TRAINING = Training(epochs=50, batch_size=128, optimizer="adamw", learning_rate=1e-3, weight_decay=0.05, clip_norm=1.0, warmup=0.1)
"""One that suits convolutional networks and vision transformers alike."""


def model(name: str) -> Model:
    """Return how timm's network ``name`` is built, with random initial weights, for the channels and classes of the data.

    A network that is made for one image size (most vision transformers) is built for that of the data.

    Raises:
        InputError: timm is not installed, or does not know the name; when building: the data are no images in classes, or of a size
            that the network cannot take.
    """
    timm = _timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or ["resnet18"]
        raise InputError(f"--model timm:{name}: timm has no such model; near: {', '.join(near)}; timm.list_models() names all")
    return Model(lambda data: _build(timm, name, data), TRAINING)


def _timm() -> ModuleType:
    try:
        import timm  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        reason = str(error).partition("\n")[0]
        raise InputError(f"--model timm:NAME: timm cannot be imported ({reason}); pip install 'niwaki[vision]'") from None
    found: ModuleType = timm
    return found


def _build(timm: ModuleType, name: str, data: Data) -> nn.Module:
    inputs = data.test[torch.arange(1)][0]
    if not data.classes or not isinstance(inputs, Tensor) or inputs.ndim != 4:
        raise InputError(f"--model timm:{name}: a task with images [batch, channels, height, width] in classes is needed")
    channels, height, width = inputs.shape[1:]
    config = timm.get_pretrained_cfg(name)
    size = {"img_size": (height, width)} if config is not None and config.fixed_input_size else {}
    try:
        network = timm.create_model(name, pretrained=False, num_classes=len(data.classes), in_chans=channels, **size)
        with torch.no_grad():
            network.eval()(inputs)  # many networks find out only here that the images are too small
    except Exception as error:  # timm and its networks raise what they like
        raise InputError(f"--model timm:{name}: cannot be built for {height}×{width} images: {str(error).partition(chr(10))[0]}") from error
    ready: nn.Module = network.train()
    return ready
