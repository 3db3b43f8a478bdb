"""Passes over data that need a model: what components ask to know of its tensors. They leave the model as they found it."""

from niwaki.calibration.batches import examples
from niwaki.calibration.batchnorm import recalibrate_batchnorm
from niwaki.calibration.collection import collect
from niwaki.calibration.passes import (
    Arguments,
    add_gradient,
    first_pair,
    forward,
    loss_gradients,
    mean_loss,
    pairs,
    preserved,
)
from niwaki.calibration.reading import OBSERVED
from niwaki.calibration.run import Replay, Watched

__all__ = [
    "OBSERVED",
    "Arguments",
    "Replay",
    "Watched",
    "add_gradient",
    "collect",
    "examples",
    "first_pair",
    "forward",
    "loss_gradients",
    "mean_loss",
    "pairs",
    "preserved",
    "recalibrate_batchnorm",
]
