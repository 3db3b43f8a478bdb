"""Where a training is, what it leaves, and copies of what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from niwaki.errors import NiwakiError
from niwaki.masks import Masks
from niwaki.removed import Removed
from niwaki.training.record import Epoch, Stage


class Interrupted(NiwakiError):
    """The training was asked to stop; its state is saved."""


@dataclass(frozen=True)
class Trained:
    """What a training left besides the model.

    Attributes:
        history: epoch by epoch.
        stages: what was done, one after the other.
        masks: the final masks.
        removed: what was taken out of the model (``structured.replay`` takes it).
        notes: sentences for the user.
        seconds: wall time, over all sittings.
        flops_multiplier: FLOPs of the training / those of the dense one of as many steps; 1 when there was no step.
    """

    history: list[Epoch]
    stages: list[Stage]
    masks: Masks
    removed: Removed
    notes: list[str]
    seconds: float
    flops_multiplier: float


@dataclass
class Counters:
    """Where a training is; all of it is in the checkpoint.

    Attributes:
        leaf: index of the stage.
        entered: whether that stage has begun.
        stage_step: steps of it that were taken.
        step: steps of the whole training.
        schedule_step: position in the learning-rate schedule.
        horizon: length of that schedule in steps.
        begin: step at which the stage began.
        seconds: wall time so far.
        flops: forward and backward FLOPs per example so far, added up over the steps.
    """

    horizon: int
    leaf: int = 0
    entered: bool = False
    stage_step: int = 0
    step: int = 0
    schedule_step: int = 0
    begin: int = 0
    seconds: float = 0.0
    flops: float = 0.0


def other_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that the model's own state leaves out."""
    known = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in known}


def copied(state: Any) -> Any:
    """Return a nested state with tensors of its own."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {name: copied(value) for name, value in state.items()}
    return type(state)(copied(value) for value in state) if isinstance(state, list | tuple) else state
