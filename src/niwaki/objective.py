"""What is learned besides the task: an objective makes a new loss of the task's loss and what it asks for."""

from typing import Annotated, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from niwaki.component import Component
from niwaki.errors import InputError


class Objective(Component):
    """Base of the slot ``objective``."""

    slot = "objective"

    def loss(self, task_loss: Tensor, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return the loss to train on (a scalar).

        Args:
            task_loss: scalar mean over the batch.
            logits: scores of the classes along the last dimension, of any shape before it.
            teacher_logits: the same of the trained dense model, for objectives that need ``teacher``.
        """
        raise NotImplementedError


class Distillation(Objective):
    """Learn the softened outputs of the trained dense model besides the labels.

    The factor ``T^2`` keeps the size of the second term's gradient the same at every temperature. The mean is over all
    positions, which are all dimensions but the last.

    Attributes:
        temperature: ``T``, above 0; the higher, the softer are the teacher's probabilities.
        weight: ``a``, in [0, 1]: share of the teacher's term.

    >>> import torch
    >>> same = torch.tensor([[1.0, 2.0, 3.0]])
    >>> float(Distillation(weight=0.75).loss(torch.tensor(2.0), same, same))
    0.5
    """

    name = "distillation"
    equation = "(1 - a) L + a T^2 mean KL(softmax(z_teacher / T) || softmax(z / T))"
    source = "Hinton, Vinyals, Dean 2015"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})

    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 2.0
    weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9

    def loss(self, task_loss: Tensor, logits: Tensor, teacher_logits: Tensor) -> Tensor:  # noqa: D102
        if logits.shape != teacher_logits.shape:
            shapes = f"the model's have shape {tuple(logits.shape)}, the teacher's {tuple(teacher_logits.shape)}"
            raise InputError(f"objective.distillation: both models must score the same classes, and {shapes}")
        student = F.log_softmax(logits / self.temperature, dim=-1).flatten(0, -2)
        teacher = F.log_softmax(teacher_logits / self.temperature, dim=-1).flatten(0, -2)
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return (1.0 - self.weight) * task_loss + self.weight * self.temperature**2 * divergence
