"""A relaxation's own trainable parameters: a group of their own in the optimizer, which the learning-rate scheduler drives too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Muon, Optimizer

from niwaki.errors import InputError
from niwaki.gates import Gates
from niwaki.masked import MaskedTensor
from niwaki.relaxation import Relaxation


def add_own_parameters(
    relaxation: Relaxation,
    tensors: Iterable[MaskedTensor],
    gates: Iterable[Gates],
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
) -> None:
    """Add the own parameters of ``tensors`` to the optimizers that hold their weights, a group for each group of those.

    Those of gates go where the first weight that they multiply and that is held is. An optimizer that has them already (a copy of one that
    is attached) is left as it is.

    Muon steps matrices only; own parameters of another shape go to the first optimizer that is not Muon.

    Raises:
        InputError: there is no such optimizer, or an optimizer has a scheduler that was not passed.
    """
    owned: dict[Tensor, dict[str, Tensor]] = {}
    for tensor in tensors:
        owned.setdefault(tensor.bound.parameter, {}).update({f"{tensor.bound.name}::{name}": p for name, p in tensor.own.items()})
    held = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for one in gates:
        first = next((tensor.bound.parameter for tensor, _ in one.acting if tensor.bound.parameter in held), None)
        if first is not None:
            owned.setdefault(first, {}).update({f"{one.name}::gate {name}": p for name, p in one.own.items()})
    for optimizer in optimizers:
        there = {p for group in optimizer.param_groups for p in group["params"]}
        for index, group in enumerate(list(optimizer.param_groups)):
            named = {name: own for p in group["params"] if p in owned for name, own in owned[p].items()}
            if not named or any(p in there for p in named.values()):
                continue
            holder, at = optimizer, index
            if isinstance(optimizer, Muon) and any(p.ndim != 2 for p in named.values()):
                others = [other for other in optimizers if not isinstance(other, Muon)]
                if not others:
                    raise InputError("attach: Muon takes matrices only; attach a second optimizer for the relaxation's own parameters")
                holder, at = others[0], 0
            scheduler = next((s for s in schedulers if s.optimizer is holder), None)
            if scheduler is None and hasattr(holder.step, "_wrapped_by_lr_sched"):
                raise InputError(
                    "attach: the relaxation adds a parameter group, which the optimizer's learning-rate scheduler must know: pass"
                    " scheduler=, or make the scheduler after attach()"
                )
            _add_group(holder, at, named, relaxation.group_options(holder.param_groups[at]), scheduler)


def _add_group(optimizer: Optimizer, index: int, named: Mapping[str, Tensor], options: dict[str, object], scheduler: Any | None) -> None:
    """Add a group for a relaxation's own parameters, with the options of group ``index``, and let the scheduler drive it too.

    A learning rate in ``options`` is the one that the new group has when the base group is at its initial one: schedules scale both.
    """
    base = optimizer.param_groups[index]
    ratio = 1.0
    group: dict[str, Any] = {k: v for k, v in base.items() if k not in ("params", "param_names")}
    if "lr" in options:
        initial = float(base.get("initial_lr", base["lr"]))
        ratio = float(options["lr"]) / initial if initial else 1.0  # type: ignore[arg-type]
        for rate in ("lr", "initial_lr", "max_lr", "min_lr"):
            if rate in group:
                group[rate] = group[rate] * ratio if initial else options["lr"]
    group.update({k: v for k, v in options.items() if k != "lr"})
    group["params"] = list(named.items()) if "param_names" in base else list(named.values())
    groups = len(optimizer.param_groups)
    optimizer.add_param_group(group)
    _extend(scheduler, optimizer, index, groups, ratio)


def _extend(scheduler: Any | None, optimizer: Optimizer, index: int, groups: int, ratio: float) -> None:
    """Append to every list that a scheduler keeps with one entry a group; learning rates are scaled."""
    if scheduler is None:
        return
    for nested in getattr(scheduler, "_schedulers", ()):
        _extend(nested, optimizer, index, groups, ratio)
    if getattr(scheduler, "optimizer", None) is not optimizer:
        return
    for attribute in ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "lr_lambdas", "base_momentums", "max_momentums"):
        values = vars(scheduler).get(attribute)
        if isinstance(values, list) and len(values) == groups:
            values.append(values[index] * ratio if attribute.endswith(("lrs", "_lr")) else values[index])
