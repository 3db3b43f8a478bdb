"""Which pruned pieces come back, and what share of the active ones is exchanged at an update (drop and grow).

An update of a tensor (or, with ``allocation: global``, of all tensors together) with ``n`` active pieces goes in this order, which is
that of RigL (Evci, Gale, Menick, Castro, Elsen 2020):

1. Of the active pieces the ``K = floor(f(t) n)`` with the lowest saliency are dropped; ``n - K`` stay. (With an adaptive threshold those
   below it are dropped, and with ``rewiring`` those whose weight has changed its sign.)
2. The candidates for growth are **all** pieces that do not stay: the dropped ones compete too, and may be regrown at once.
3. The ``K`` candidates with the highest growth score become active, so that the number of active pieces is unchanged.
4. A piece that was inactive before the update starts at its ``initial_value`` (zero), with fresh optimizer state. A piece that was dropped
   and regrown in the same update keeps its value and its state.
5. With ``at_update: skip_step`` the optimizer takes no step: the gradient of that step only chose what grows.

The growth score comes from the weights and gradients before the update. Where the schedule's sparsity falls, more pieces grow than were
dropped; where it rises, fewer do.
"""

from niwaki.growth.base import AdaptiveThreshold, AllGrowth, ByFraction, DropAndGrow, Growth, NoGrowth, dropped
from niwaki.growth.decay import ConstantDecay, CosineDecay, Decay, LinearDecay, PowerDecay
from niwaki.growth.gradients import GradientGrowth, MomentumGrowth
from niwaki.growth.initial_value import FromGradient, FromInitial, FromNormal, FromUniform, InitialValue, Zero
from niwaki.growth.locality import LocalityGrowth
from niwaki.growth.random import RandomGrowth
from niwaki.growth.rewiring import Rewiring

__all__ = [
    "AdaptiveThreshold",
    "AllGrowth",
    "ByFraction",
    "ConstantDecay",
    "CosineDecay",
    "Decay",
    "DropAndGrow",
    "FromGradient",
    "FromInitial",
    "FromNormal",
    "FromUniform",
    "GradientGrowth",
    "Growth",
    "InitialValue",
    "LinearDecay",
    "LocalityGrowth",
    "MomentumGrowth",
    "NoGrowth",
    "PowerDecay",
    "RandomGrowth",
    "Rewiring",
    "Zero",
    "dropped",
]
