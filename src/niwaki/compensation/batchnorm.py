"""Statistics of batch normalizations, taken anew of what is left."""

from typing import ClassVar

from torch import Tensor

from niwaki.compensation.base import Compensation, Removal


class BatchNormRecalibration(Compensation):
    """Takes means and variances of all batch normalizations anew, over the data, after the masks have changed.

    They are exact means over the data, of the pruned network. No weight changes.

    Source: Li, Wu, Yang, Ma, Zhang, Ren 2020 (EagleEye, adaptive batch normalization).

    >>> BatchNormRecalibration().compensate(Removal({}))
    {}
    """

    name = "batchnorm_recalibration"
    equation = "μ, σ² <- mean and variance of the inputs of each normalization over the data"
    source = "Li et al. 2020 (EagleEye)"
    effort = "one forward pass over the data for each cut"
    advice = "any cut of a network with batch normalization, before its accuracy is looked at"

    recalibrates: ClassVar[bool] = True
    """Whether whoever runs it has to recalibrate the model's batch normalizations after the removal."""

    def compensate(self, removal: Removal) -> dict[str, Tensor]:
        """Return nothing: the weights stay as they are."""
        return {}
