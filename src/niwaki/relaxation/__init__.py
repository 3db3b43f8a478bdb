"""How a mask acts on a weight, with which trainable parameters of its own.

The model's Parameter holds the *published* weight, so that keys, classes, forward and compiled graphs stay what they are. A relaxation
with ``keeps_dense_weights`` keeps the weight that is trained (the *latent* one) beside it. Around every optimizer step the gradient
of the published weight is pulled back to the latent one and to the relaxation's own parameters, the optimizer updates those, and
the new published weight is copied into the Parameter. A relaxation is pure: tensors in, tensors out.
"""

from niwaki.relaxation.base import Hard, Latent, LearnsOwn, Moment, Relaxation
from niwaki.relaxation.dropout import Dropout
from niwaki.relaxation.factor import Factor, SigmoidAnneal, StepGate
from niwaki.relaxation.gate import Gate
from niwaki.relaxation.hard_concrete import HardConcrete, StochasticGate
from niwaki.relaxation.soft_rewiring import SoftRewiring
from niwaki.relaxation.soft_threshold import SoftThreshold
from niwaki.relaxation.straight_through import StraightThrough
from niwaki.relaxation.thresholds import DynamicThreshold, SigmoidThreshold, SmoothThreshold
from niwaki.relaxation.variational import GaussianGate, HorseshoeGate, LogNormalGate, VariationalNoise

__all__ = [
    "Dropout",
    "DynamicThreshold",
    "Factor",
    "Gate",
    "GaussianGate",
    "Hard",
    "HardConcrete",
    "HorseshoeGate",
    "Latent",
    "LearnsOwn",
    "LogNormalGate",
    "Moment",
    "Relaxation",
    "SigmoidAnneal",
    "SigmoidThreshold",
    "SmoothThreshold",
    "SoftRewiring",
    "SoftThreshold",
    "StepGate",
    "StochasticGate",
    "StraightThrough",
    "VariationalNoise",
]
