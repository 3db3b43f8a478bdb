"""Which piece matters least: scores of the pieces of one tensor, higher means keep. One file a family."""

from niwaki.saliency.activity import Activity
from niwaki.saliency.base import Observation, Reduce, Saliency
from niwaki.saliency.learned import Score
from niwaki.saliency.magnitude import Magnitude
from niwaki.saliency.norm_scale import NormScale
from niwaki.saliency.position import Position
from niwaki.saliency.random import Random
from niwaki.saliency.similarity import Similarity
from niwaki.saliency.taylor import HeadImportance, Snip, Taylor

__all__ = [
    "Activity",
    "HeadImportance",
    "Magnitude",
    "NormScale",
    "Observation",
    "Position",
    "Random",
    "Reduce",
    "Saliency",
    "Score",
    "Similarity",
    "Snip",
    "Taylor",
]
