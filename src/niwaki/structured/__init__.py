"""Physical removal: channels and units that a model provably does not need are taken out of it."""

from niwaki.structured.removal import Removed, Smaller, compose, replay, shrink

__all__ = ["Removed", "Smaller", "compose", "replay", "shrink"]
