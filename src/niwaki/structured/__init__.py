"""Physical removal: units that a model provably does not need are taken out of it."""

from niwaki.removed import Removed, compose, replay
from niwaki.structured.removal import Smaller, shrink

__all__ = ["Removed", "Smaller", "compose", "replay", "shrink"]
