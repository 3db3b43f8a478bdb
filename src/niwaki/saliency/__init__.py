"""Which piece matters least: scores of the pieces of one tensor, higher means keep. One file a family."""

from niwaki.saliency.activity import Activity, ActivityVariance, Apoz, Contribution, Entropy, UnitSaliency
from niwaki.saliency.base import Observation, Reduce, Saliency
from niwaki.saliency.coreset import Coreset
from niwaki.saliency.correlation import ConnectionCorrelation, Correlation, SubsetSelection
from niwaki.saliency.flow import SynFlow
from niwaki.saliency.group import GroupObservation, GroupSaliency
from niwaki.saliency.learned import Score, SignalToNoise
from niwaki.saliency.magnitude import FromInit, Magnitude
from niwaki.saliency.movement import AccumulatedMovement, Karnin, TotalChange
from niwaki.saliency.norm_scale import NormScale
from niwaki.saliency.obc import OBC
from niwaki.saliency.position import Position
from niwaki.saliency.random import Random
from niwaki.saliency.reconstruction import LassoChannels, LinearDependence, ThiNet
from niwaki.saliency.second_order import (
    KroneckerDamage,
    KroneckerSurgeon,
    LayerwiseSurgeon,
    MatrixFreeFisher,
    OptimalBrainDamage,
    OptimalBrainSurgeon,
    WoodFisher,
    WoodTaylor,
)
from niwaki.saliency.sensitivity import Nisp, Sensitivity, VarianceNullity
from niwaki.saliency.significance import TStatistic
from niwaki.saliency.similarity import MergeCost, Similarity
from niwaki.saliency.sparsegpt import SparseGPT
from niwaki.saliency.taylor import GateDecorator, Grasp, HeadImportance, Snip, Taylor
from niwaki.saliency.wanda import Wanda

__all__ = [
    "OBC",
    "AccumulatedMovement",
    "Activity",
    "ActivityVariance",
    "Apoz",
    "ConnectionCorrelation",
    "Contribution",
    "Coreset",
    "Correlation",
    "Entropy",
    "FromInit",
    "GateDecorator",
    "Grasp",
    "GroupObservation",
    "GroupSaliency",
    "HeadImportance",
    "Karnin",
    "KroneckerDamage",
    "KroneckerSurgeon",
    "LassoChannels",
    "LayerwiseSurgeon",
    "LinearDependence",
    "Magnitude",
    "MatrixFreeFisher",
    "MergeCost",
    "Nisp",
    "NormScale",
    "Observation",
    "OptimalBrainDamage",
    "OptimalBrainSurgeon",
    "Position",
    "Random",
    "Reduce",
    "Saliency",
    "Score",
    "Sensitivity",
    "SignalToNoise",
    "Similarity",
    "Snip",
    "SparseGPT",
    "SubsetSelection",
    "SynFlow",
    "TStatistic",
    "Taylor",
    "ThiNet",
    "TotalChange",
    "UnitSaliency",
    "VarianceNullity",
    "Wanda",
    "WoodFisher",
    "WoodTaylor",
]
