"""Units that stay take over what those that go did, in proportion to how alike they are."""

from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from niwaki.alike import distances, places
from niwaki.compensation.base import Change, Compensation, Removal, Units
from niwaki.errors import InputError
from niwaki.layout import matrix
from niwaki.statistics import InputCovariance, InputMean, Statistic


class Merge(Compensation):
    """The outgoing weights of each unit that goes are added to those of the unit that stays and is most like it.

    ``by: weights``, without data: the unit i whose incoming weights, with biases and normalizations, are nearest; ``a_i <- a_i + a_j``.
    Exact for duplicates. With ``scale``, multiples count as alike: ``a_i <- a_i + c a_j`` with the best ``c ≥ 0``. That is right only where
    a multiple of a unit's input makes the same multiple of its activation, as with ReLU and no normalization; this is not checked.

    ``by: responses``: the unit i on which x_j regresses best over the data, ``x_j ≈ d + c x_i``; ``a_i <- a_i + c a_j`` and
    ``b <- b + d a_j``. Exact for duplicates, opposites (x_j = 1 - x_i) and constants, whatever made them so. A layer that has no bias gets
    the best c alone, and is told. d is that of the inside of a padded map.

    Attributes:
        by: what units are compared by.
        scale: whether multiples count as alike, for ``weights``.

    Source: Srinivas & Babu 2015 (``weights``); Sietsma & Dow 1988, 1991; Babaeizadeh, Smaragdis, Campbell 2016 (``responses``).

    >>> import torch
    >>> from niwaki.layout import Layout
    >>> layout, stay = Layout(("output", "input"), (2, 1)), torch.tensor([True, False])
    >>> makes = Change("0.weight", layout, torch.tensor([[1.0], [1.0]]), torch.ones(2, 1) > 0, stay[:, None])
    >>> layout = Layout(("output", "input"), (1, 2))
    >>> reads = Change("2.weight", layout, torch.tensor([[3.0, 4.0]]), torch.ones(1, 2) > 0, stay[None])
    >>> both = torch.arange(2)
    >>> units = Units("0", stay | True, stay, [("0.weight", 0, (2, 1), both)], [("2.weight", 1, (1, 2), both)])
    >>> Merge().compensate(Removal({"0.weight": makes, "2.weight": reads}, [units]))
    {'2.weight': tensor([[7., 4.]], dtype=torch.float64)}
    """

    name = "merge"
    equation = (
        "a_i <- a_i + c a_j, b <- b + d a_j for each j that goes, i = argmin ‖c w_i - w_j‖² (weights) or E (x_j - d - c x_i)² (responses)"
    )
    source = "Srinivas & Babu 2015; Sietsma & Dow 1991"
    effort = "weights: none; responses: one forward pass, and inputs² numbers a tensor"
    advice = "units that resemble others: after merge_cost or correlation"
    needs_units: ClassVar[bool] = True
    single_field = "by"

    by: Literal["weights", "responses"] = "weights"
    scale: bool = False

    @model_validator(mode="after")
    def _scale_of_weights(self) -> Self:
        if self.scale and self.by != "weights":
            raise InputError("scale: responses are scaled as they need; drop it, or choose by: weights")
        return self

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What is known of the responses, for ``by: responses``."""
        return (InputCovariance(), InputMean()) if self.by == "responses" else ()

    def compensate(self, removal: Removal) -> dict[str, Tensor]:
        """Return the weights that read units, in their views, and for ``by: responses`` their biases; float64.

        Raises:
            InputError: units cannot be compared: they have different numbers of entries, or what makes them reads them too.
        """
        found: dict[str, Tensor] = {}
        for units in removal.units:
            gone, stay = units.active & ~units.keep, units.keep
            if not gone.any() or not stay.any():
                continue
            read = [(name, dim) for name, dim, *_ in units.readers]
            why = "what makes them reads them too" if {(name, dim) for name, dim, *_ in units.makers} & set(read) else ""
            why = why or ("they are multiplied with each other before they are read" if len(set(read)) < len(read) else "")
            if why:
                raise InputError(f"compensation {self.name}: units of {units.name} cannot take over from each other, for {why}")
            if self.by == "weights":
                self._by_weights(removal, units, gone, stay, found)
            else:
                self._by_responses(removal, units, gone, stay, found)
        return found

    def _by_weights(self, removal: Removal, units: Units, gone: Tensor, stay: Tensor, found: dict[str, Tensor]) -> None:
        made = _made(removal, units, plain=self.scale)
        apart, factors = distances(made, self.scale)
        into = apart.masked_fill(~stay[:, None], torch.inf).argmin(dim=0)
        for name, dim, shape, owner in units.readers:
            entries = places(owner, len(gone), f"compensation {self.name}: units of {units.name} in {name}").to(made.device)
            for j in gone.nonzero().flatten().tolist():
                i = int(into[j])
                moved = _weight(removal.changes[name], found).view(shape).movedim(dim, 0)
                moved[entries[i]] += factors[i, j] * moved[entries[j]]

    def _by_responses(self, removal: Removal, units: Units, gone: Tensor, stay: Tensor, found: dict[str, Tensor]) -> None:
        for name, dim, shape, owner in units.readers:
            change = removal.changes[name]
            entries = places(owner, len(gone), f"compensation {self.name}: units of {units.name} in {name}").to(change.weight.device)
            if len(owner) != change.layout.inputs:
                raise InputError(
                    f"compensation {self.name}: {name} is a grouped convolution, whose inputs cannot take over from each other"
                )
            moments, mean = _moments(change)
            constant = change.bias is not None
            if constant:
                moments = moments - mean * mean[:, None]
            weight = _weight(change, found)
            for j in gone.nonzero().flatten().tolist():
                alone, shared = moments.diagonal(), moments[:, entries[j]][entries]  # [units, entries, entries of j]
                own = shared.diagonal(dim1=1, dim2=2)
                square = alone[entries]
                factor = own / torch.where(square > 0, square, torch.inf)
                left = (alone[entries[j]] - factor * own).sum(dim=1)
                i = int(left.masked_fill(~stay, torch.inf).argmin())
                moved = weight.view(shape).movedim(dim, 0)
                across = (-1, *[1] * (moved.ndim - 1))
                taken = moved[entries[j]]
                moved[entries[i]] += factor[i].view(across) * taken
                if constant:
                    lost = torch.zeros_like(weight)
                    offset = mean[entries[j]] - factor[i] * mean[entries[i]]
                    lost.view(shape).movedim(dim, 0)[entries[j]] = offset.view(across) * taken
                    assert change.bias is not None
                    assert change.bias_name is not None
                    bias = found.setdefault(change.bias_name, change.bias.to(weight.device, torch.float64).clone())
                    bias += matrix(lost, change.layout).sum(dim=2).flatten()
            if not constant:
                note = f"compensation {self.name}: {name} has no bias that could take up the constant part of the units that are removed"
                removal.notes.append(note)


def _made(removal: Removal, units: Units, plain: bool) -> Tensor:
    """Return all that makes each unit, float64 ``[units, weights of one]``.

    Raises:
        InputError: units have different numbers of entries in a tensor; or normalizations are among it and ``plain`` allows none.
    """
    parts: list[tuple[str, Tensor, Tensor]] = []
    names = {name for name, *_ in units.along}
    for name, dim, shape, owner in units.makers:
        change = removal.changes[name]
        parts.append((name, change.weight.view(shape).movedim(dim, 0), owner))
        if change.bias is not None and change.bias_name is not None and change.bias_name not in names:
            if change.bias.numel() != len(owner):
                raise InputError(f"compensation merge: {change.bias_name} has another size than {name}, so that units cannot be compared")
            names.add(change.bias_name)
            parts.append((change.bias_name, change.bias, owner))
    biases = {removal.changes[name].bias_name for name, *_ in units.makers}
    others = [name for name, *_ in units.along if name not in biases]
    if plain and others:
        raise InputError(f"compensation merge: {others[0]} changes the units of {units.name} as well, so that multiples differ; drop scale")
    parts += [(name, values.movedim(dim, 0), owner) for name, dim, values, owner in units.along]
    count = len(units.active)
    rows = []
    for name, values, owner in parts:
        entries = places(owner, count, f"compensation merge: units of {units.name} in {name}").to(values.device)
        rows.append(values[entries].to(torch.float64).reshape(count, -1))
    return torch.cat(rows, dim=1)


def _weight(change: Change, found: dict[str, Tensor]) -> Tensor:
    """Return the new weight of a tensor as far as it is known, float64, to be changed in place."""
    return found.setdefault(change.name, change.weight.to(torch.float64, copy=True).contiguous())


def _moments(change: Change) -> tuple[Tensor, Tensor]:
    """Return second moments ``[inputs, inputs]`` and means ``[inputs]`` of what a weight reads.

    Raises:
        InputError: they were not collected, or are not finite.
    """
    missing = [request for request in (InputCovariance(), InputMean()) if request not in change.statistics]
    if missing:
        raise InputError(f"compensation merge: the {type(missing[0]).__name__} of {change.name} was not collected")
    mean = change.statistics[InputMean()].to(change.weight.device, torch.float64).flatten()
    covariance = change.statistics[InputCovariance()].to(change.weight.device, torch.float64)
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise InputError(f"compensation merge: what {change.name} reads is not finite on the data; check the data and the weights")
    return covariance + mean * mean[:, None], mean
