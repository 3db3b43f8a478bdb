"""What is done to a model's structure: units that it provably does not need are taken out, and the others can be put in another order."""

from niwaki.removed import Removed, compose, replay
from niwaki.structured.permutation import Permuted, permute
from niwaki.structured.removal import Smaller, shrink

__all__ = ["Permuted", "Removed", "Smaller", "compose", "permute", "replay", "shrink"]
