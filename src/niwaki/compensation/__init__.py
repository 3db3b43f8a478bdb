"""What survivors do when others are removed. One file a family."""

from niwaki.compensation.base import Change, Compensation, Removal, Units
from niwaki.compensation.batchnorm import BatchNormRecalibration
from niwaki.compensation.bias_absorb import BiasAbsorb
from niwaki.compensation.coreset import Coreset
from niwaki.compensation.least_squares import LeastSquares
from niwaki.compensation.merge import Merge
from niwaki.compensation.obs import SurgeonUpdate

__all__ = [
    "BatchNormRecalibration",
    "BiasAbsorb",
    "Change",
    "Compensation",
    "Coreset",
    "LeastSquares",
    "Merge",
    "Removal",
    "SurgeonUpdate",
    "Units",
]
