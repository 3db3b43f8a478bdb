"""Which piece matters least: scores of the pieces of one tensor, higher means keep. One file a family."""

from niwaki.saliency.base import Observation, Reduce, Saliency
from niwaki.saliency.learned import Score
from niwaki.saliency.magnitude import Magnitude
from niwaki.saliency.random import Random
from niwaki.saliency.taylor import Snip, Taylor

__all__ = ["Magnitude", "Observation", "Random", "Reduce", "Saliency", "Score", "Snip", "Taylor"]
