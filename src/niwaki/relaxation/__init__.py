"""How a mask acts on a weight, with which trainable parameters of its own.

The model's Parameter holds the *published* weight, so that keys, classes, forward and compiled graphs stay what they are. A relaxation
with ``keeps_dense_weights`` keeps the weight that is trained (the *latent* one) beside it. Around every optimizer step the gradient
of the published weight is pulled back to the latent one and to the relaxation's own parameters, the optimizer updates those, and
the new published weight is copied into the Parameter. A relaxation is pure: tensors in, tensors out.
"""

from niwaki.relaxation.base import Hard, Latent, Relaxation
from niwaki.relaxation.dropout import Dropout
from niwaki.relaxation.soft_threshold import SoftThreshold
from niwaki.relaxation.straight_through import StraightThrough

__all__ = ["Dropout", "Hard", "Latent", "Relaxation", "SoftThreshold", "StraightThrough"]
