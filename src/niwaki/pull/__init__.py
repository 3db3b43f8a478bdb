"""Penalties at the step boundary: a gradient before the optimizer's step, or a step of their own after it."""

from niwaki.pull.acting import Pull

__all__ = ["Pull"]
