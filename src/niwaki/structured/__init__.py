"""What is done to a model's structure: units it does not need are taken out, others are added, and they can be put in another order."""

from niwaki.removed import Removed, compose, replay
from niwaki.structured.expansion import uniform
from niwaki.structured.firefly import grow_best
from niwaki.structured.permutation import Permuted, permute
from niwaki.structured.removal import Smaller, shrink
from niwaki.structured.widening import Wider, widen

__all__ = ["Permuted", "Removed", "Smaller", "Wider", "compose", "grow_best", "permute", "replay", "shrink", "uniform", "widen"]
