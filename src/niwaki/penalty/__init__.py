"""What pushes weights, scales and gates towards zero: a term that is added to the loss, as its gradient or as a step of its own.

``apply`` says how. ``gradient`` adds the penalty's gradient to that of the loss, so that the optimizer's momentum and preconditioner see
it too. ``decoupled`` subtracts the learning rate times that gradient after the optimizer's step. ``proximal`` takes the proximal step
``argmin_v |v - w|^2 / 2 + rate * penalty(v)`` there, which arrives at exact zeros, as a gradient does not. A penalty is pure: it sees
numbers and returns numbers of the same shape; whose numbers they are is decided elsewhere.
"""

from niwaki.penalty.base import Elementwise, Penalized, Penalty, Single, WithStrength, soft_threshold
from niwaki.penalty.clusters import Centripetal
from niwaki.penalty.combined import Sum
from niwaki.penalty.constrained import AugmentedLagrangian, LearningCompression
from niwaki.penalty.directional import Directional
from niwaki.penalty.groups import GroupLasso, Hoyer, HoyerSquare, SparseGroupLasso
from niwaki.penalty.learned import KL, ExpectedL0, LowThreshold
from niwaki.penalty.mixture import SoftWeightSharing
from niwaki.penalty.norms import L1, L2, ExplorationL2, Lp, SrSte
from niwaki.penalty.nuclear import NuclearNorm
from niwaki.penalty.polarization import Polarization
from niwaki.penalty.reweighted import ReweightedL1, Sensitivity
from niwaki.penalty.saturating import Bimodal, Energy, Exponential, Hyperbolic, Log, WeightElimination

__all__ = [
    "KL",
    "L1",
    "L2",
    "AugmentedLagrangian",
    "Bimodal",
    "Centripetal",
    "Directional",
    "Elementwise",
    "Energy",
    "ExpectedL0",
    "ExplorationL2",
    "Exponential",
    "GroupLasso",
    "Hoyer",
    "HoyerSquare",
    "Hyperbolic",
    "LearningCompression",
    "Log",
    "LowThreshold",
    "Lp",
    "NuclearNorm",
    "Penalized",
    "Penalty",
    "Polarization",
    "ReweightedL1",
    "Sensitivity",
    "Single",
    "SoftWeightSharing",
    "SparseGroupLasso",
    "SrSte",
    "Sum",
    "WeightElimination",
    "WithStrength",
    "soft_threshold",
]
