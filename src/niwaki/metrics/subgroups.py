"""Who pays for sparsity: classes whose recall changes more than the rest, and examples that sparse models see differently.

Everything takes predicted class numbers of several dense and several sparse models (trained with different seeds) on the same test
examples: one row a model, one column an example.

Source: Hooker, Courville, Clark, Dauphin & Frome 2019, "What do compressed deep neural networks forget?"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from niwaki.errors import InputError
from niwaki.metrics.significance import holm, welch

Classes = npt.NDArray[np.integer[Any]]
"""Class numbers, 0 and up."""

RELATIVE_CHANGE = "change of the class's recall minus change of the overall accuracy, means over the seeds"
P_VALUE = "Welch's t-test of (recall - accuracy) between dense and sparse seeds, Holm's correction over classes; needs two seeds of each"


@dataclass(frozen=True)
class ClassChange:
    """What sparsity did to one class; shares are means over the models.

    Attributes:
        number: of the class.
        examples: test examples that truly belong to it.
        dense_recall: share of these that the dense models recognize.
        sparse_recall: share of these that the sparse models recognize.
        relative_change: ``(sparse_recall - sparse_accuracy) - (dense_recall - dense_accuracy)``: negative when the class lost more than
            the average example did.
        p_value: of Welch's t-test between ``recall - accuracy`` of the dense models and of the sparse ones; None with fewer than two
            models on a side, or when these numbers have no spread.
        adjusted_p_value: the same with Holm's correction for having tested every class.
    """

    number: int
    examples: int
    dense_recall: float
    sparse_recall: float
    relative_change: float
    p_value: float | None
    adjusted_p_value: float | None

    @property
    def change(self) -> float:
        """``sparse_recall - dense_recall``."""
        return self.sparse_recall - self.dense_recall


@dataclass(frozen=True)
class Exemplar:
    """A pruning-identified exemplar: a test example that most sparse models see differently from most dense ones."""

    index: int
    true_class: int
    dense_class: int
    sparse_class: int


def class_changes(true: Classes, dense: Classes, sparse: Classes) -> tuple[ClassChange, ...]:
    """Return how the recall of each class changed, relative to the change of the overall accuracy, and whether that is more than chance.

    Args:
        true: class numbers, shape ``[examples]``.
        dense: predicted by the dense models, shape ``[models, examples]``.
        sparse: predicted by the sparse models, shape ``[models, examples]``; there may be more or fewer of them.

    Returns:
        one entry for each class that has test examples, by class number.

    Raises:
        InputError: shapes that do not fit, no model or no example, or values that are no class numbers.

    >>> true = np.array([0, 0, 1, 1])
    >>> found = class_changes(true, dense=np.array([[0, 0, 1, 1]]), sparse=np.array([[0, 0, 1, 0]]))
    >>> [(one.number, one.change, one.relative_change) for one in found]
    [(0, 0.0, 0.25), (1, -0.5, -0.25)]
    """
    _check(true, dense, sparse)
    numbers, inverse, counts = np.unique(true, return_inverse=True, return_counts=True)
    recalls = []
    relative = []
    for predicted in (dense, sparse):
        right = predicted == true
        recall = np.stack([np.bincount(inverse, weights=row) / counts for row in right])
        recalls.append(recall.mean(axis=0))
        relative.append(recall - right.mean(axis=1, keepdims=True))
    before, after = relative
    p_values = [welch(before[:, i].tolist(), after[:, i].tolist()) for i in range(len(numbers))]
    return tuple(
        ClassChange(
            number=int(number),
            examples=int(counts[i]),
            dense_recall=float(recalls[0][i]),
            sparse_recall=float(recalls[1][i]),
            relative_change=float(after[:, i].mean() - before[:, i].mean()),
            p_value=p,
            adjusted_p_value=adjusted,
        )
        for i, (number, p, adjusted) in enumerate(zip(numbers, p_values, holm(p_values), strict=True))
    )


def exemplars(true: Classes, dense: Classes, sparse: Classes) -> tuple[Exemplar, ...]:
    """Return the pruning-identified exemplars: examples whose modal class over the sparse models is not that over the dense models.

    The modal class is the one that most models predict; of equally frequent ones, the lowest number.

    Args:
        true: class numbers, shape ``[examples]``.
        dense: predicted by the dense models, shape ``[models, examples]``.
        sparse: predicted by the sparse models, shape ``[models, examples]``.

    Raises:
        InputError: shapes that do not fit, no model or no example, or values that are no class numbers.

    >>> true = np.array([0, 1, 1])
    >>> exemplars(true, dense=np.array([[0, 1, 1], [0, 1, 0], [0, 1, 1]]), sparse=np.array([[0, 0, 1], [0, 0, 1]]))
    (Exemplar(index=1, true_class=1, dense_class=1, sparse_class=0),)
    """
    _check(true, dense, sparse)
    before, after = modal_classes(dense), modal_classes(sparse)
    return tuple(Exemplar(int(i), int(true[i]), int(before[i]), int(after[i])) for i in np.flatnonzero(before != after))


def modal_classes(predicted: Classes) -> Classes:
    """Return the class that most models predict for each example; of equally frequent ones, the lowest number.

    Args:
        predicted: class numbers, shape ``[models, examples]``.
    """
    classes, numbered = np.unique(predicted, return_inverse=True)
    numbered = numbered.reshape(predicted.shape)
    most = np.zeros(predicted.shape[1], dtype=np.int64)
    winner = np.zeros(predicted.shape[1], dtype=np.int64)
    for number in range(len(classes)):  # one class at a time: examples × classes would not fit for many classes
        votes = np.count_nonzero(numbered == number, axis=0)
        winner[votes > most] = number
        most = np.maximum(most, votes)
    modal: Classes = classes[winner]
    return modal


def _check(true: Classes, dense: Classes, sparse: Classes) -> None:
    if true.ndim != 1 or true.size == 0:
        raise InputError(f"subgroups: the true classes must be one number for each of at least one example, got shape {list(true.shape)}")
    for name, predicted in (("dense", dense), ("sparse", sparse)):
        if predicted.ndim != 2 or predicted.shape[0] == 0 or predicted.shape[1] != len(true):
            raise InputError(
                f"subgroups: the {name} predictions must have shape [models, {len(true)}] for {len(true)} examples,"
                f" got {list(predicted.shape)}"
            )
    for name, numbers in (("true classes", true), ("dense predictions", dense), ("sparse predictions", sparse)):
        if not np.issubdtype(numbers.dtype, np.integer) or numbers.min() < 0:
            raise InputError(f"subgroups: the {name} must be class numbers, 0 and up, got {numbers.dtype}")
