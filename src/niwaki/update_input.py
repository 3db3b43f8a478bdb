"""What one mask update is given, and what it has to tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from niwaki.binding import Bound
from niwaki.pieces import Ranked
from niwaki.saliency import Observation

Scores = Callable[[int], Tensor]
"""Index of what is ranked (a tensor or a group) -> the scores of its pieces on this rank."""


@dataclass
class Update:
    """What one mask update needs besides the tensors, and what it has to tell.

    Attributes:
        sparsity: share of the pieces to mask after the update.
        step: number of optimizer steps taken before it.
        progress: share of the schedule that has passed, in [0, 1] (for decaying growth).
        seed: of the run.
        observe: tensor -> what the saliency may look at.
        observe_growth: the same for growth.
        observe_allocation: the same for the allocation.
        flops: parameter name -> multiply-adds of each of its weights in a forward pass; None when no component needs it.
        dense_flops: FLOPs of a forward pass of the whole dense model, in the same unit as ``flops``; None when no component needs it.
        loss: the mean loss over the data if everything ranked keeps some pieces (bool, one tensor each); None when there are no data.
        averaged: scores that were averaged over batches, or learned by gates, one tensor for each thing ranked; None where the saliency
            sees all it needs.
        first: whether it is the initial selection.
        grows: whether drop-and-grow may exchange pieces (not at the end of the run, where grown ones could not learn).
        from_active: whether only active pieces may be kept (hard masks without growth).
        threshold: what is ranked, its scores and which of its pieces are active -> the value that a score must reach to be kept; None
            where a count decides.
        numbers: what components remember from update to update; they are part of the run's state.
        notes: sentences for the user.
        weights: tensor name -> new weights in its view, of a saliency that chooses them with the mask.
    """

    sparsity: float
    step: int
    progress: float
    seed: int
    observe: Callable[[Bound], Observation]
    observe_growth: Callable[[Bound], Observation]
    observe_allocation: Callable[[Bound], Observation]
    first: bool
    from_active: bool
    flops: Mapping[str, float] | None = None
    dense_flops: float | None = None
    loss: Callable[[Sequence[Tensor]], float] | None = None
    averaged: Sequence[Tensor] | None = None
    grows: bool = True
    threshold: Callable[[Ranked, Tensor, Tensor], float] | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def tell(update: Update, note: str) -> None:
    """Add a sentence for the user, once."""
    if note not in update.notes:
        update.notes.append(note)
