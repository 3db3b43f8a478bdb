"""Draws what a relaxation that samples leaves out of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from niwaki.masked import MaskedTensor
from niwaki.pieces import Ranked
from niwaki.relaxation import Dropout


def leave_out(relaxation: Dropout, ranked: Sequence[Ranked], tensors: Mapping[str, MaskedTensor], seed: int, step: int) -> None:
    """Draw the pieces that are left out of the step after ``step`` steps, and publish the weights without them.

    An element is left out when any of the pieces that it belongs to is. Shards draw what the whole tensor would.
    """
    for tensor in tensors.values():
        tensor.dropped = None
    for one in ranked:
        bound = one.parts[0].bound
        here, whole = prod(bound.here.shape), prod(bound.layout.shape)
        start, count = (one.pieces * n // whole for n in (bound.start, here)) if one.processes is not None else (0, one.pieces)
        gone = relaxation.dropped(one.name, start, count, seed, step, one.device)
        for part in one.parts:
            tensor = tensors[part.bound.name]
            mask = part.expand(gone, elsewhere=False)
            tensor.dropped = mask if tensor.dropped is None else tensor.dropped | mask
    for tensor in tensors.values():
        if tensor.dropped is not None:
            tensor.publish()
