"""When masks are updated, and how sparse they are to be by then.

A schedule answers one question before every optimizer step: are the masks to be updated now, and to which sparsity? Step 0 is
before the first optimizer step. Times are resolved to whole steps by the run's clock, and ``every`` counts in whole steps (at least one).
A schedule knows nothing of how long the run is: it answers for any step, also at and beyond the end of the run.
"""

from niwaki.schedule.adaptive import Adaptive, RisingLoss
from niwaki.schedule.base import Schedule, Validation
from niwaki.schedule.listed import Listed, Phases
from niwaki.schedule.ramp import Cosine, Cubic, Exponential, Linear, Polynomial, Ramp, exponential
from niwaki.schedule.rounds import Constant, Iterative, OneShot
from niwaki.schedule.stability import MaskStability
from niwaki.schedule.threshold_ramp import ThresholdRamp

__all__ = [
    "Adaptive",
    "Constant",
    "Cosine",
    "Cubic",
    "Exponential",
    "Iterative",
    "Linear",
    "Listed",
    "MaskStability",
    "OneShot",
    "Phases",
    "Polynomial",
    "Ramp",
    "RisingLoss",
    "Schedule",
    "ThresholdRamp",
    "Validation",
    "exponential",
]
