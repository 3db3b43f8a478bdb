"""What components ask to know over time or over data: requests, and the accumulators that answer them."""

from niwaki.statistics.accumulators import Covariance, Mean
from niwaki.statistics.base import Labels, Source, Statistic
from niwaki.statistics.gradients import GradientBank, GradientMean, GradientSquare, GradientStatistic
from niwaki.statistics.inputs import (
    Coactivity,
    InputCovariance,
    InputGram,
    InputMean,
    InputResponses,
    InputSize,
    InputSquare,
    InputStatistic,
    InputVariance,
    InputZeros,
)
from niwaki.statistics.passes import (
    Hessian,
    HessianDiagonal,
    HessianGradient,
    JointMatrix,
    KroneckerFactors,
    OutputSensitivity,
    PassStatistic,
    Relevance,
    SynapticFlow,
)
from niwaki.statistics.steps import InitialWeight, Momentum, Movement, PathSensitivity, StepGradients, StepStatistic, WeightChange
from niwaki.statistics.watching import StepAccumulator, accumulator

__all__ = [
    "Coactivity",
    "Covariance",
    "GradientBank",
    "GradientMean",
    "GradientSquare",
    "GradientStatistic",
    "Hessian",
    "HessianDiagonal",
    "HessianGradient",
    "InitialWeight",
    "InputCovariance",
    "InputGram",
    "InputMean",
    "InputResponses",
    "InputSize",
    "InputSquare",
    "InputStatistic",
    "InputVariance",
    "InputZeros",
    "JointMatrix",
    "KroneckerFactors",
    "Labels",
    "Mean",
    "Momentum",
    "Movement",
    "OutputSensitivity",
    "PassStatistic",
    "PathSensitivity",
    "Relevance",
    "Source",
    "Statistic",
    "StepAccumulator",
    "StepGradients",
    "StepStatistic",
    "SynapticFlow",
    "WeightChange",
    "accumulator",
]
