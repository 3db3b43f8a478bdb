"""Growth by chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from niwaki.counter import key, uniform
from niwaki.growth.base import ByFraction

if TYPE_CHECKING:
    from niwaki.saliency import Observation


class RandomGrowth(ByFraction):
    """Pruned pieces come back at random, each with the same chance.

    A piece's number is the fractional part of the sum of its elements' uniform numbers, which is again uniform, so that pieces
    that are cut short at an edge have the same chance as whole ones, and shards of a tensor agree with the whole.
    """

    name = "random"
    equation = "G = frac(sum over piece of u), u uniform in [0, 1)"
    source = "Mocanu et al. 2018 (SET)"
    effort = "a random number for each weight, at updates"
    advice = "training that is sparse from the first step and never sees a dense gradient"

    def score(self, seen: Observation, reduce: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: D102
        return random_score(seen, reduce)


def random_score(seen: Observation, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a uniform number in [0, 1) for each piece."""
    weight = seen.weight
    # A stream of its own: the random saliency may draw for the same tensor at the same step.
    numbers = uniform(key(seen.seed, seen.step, f"growth {seen.name}"), seen.start, weight.numel(), weight.device)
    return reduce(numbers.view(weight.shape)).remainder(1.0)
