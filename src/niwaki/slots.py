"""Optimizer state of single weights: what a fresh slot holds, and putting it back.

A slot is any state tensor with the parameter's shape. A pruned or newly grown weight must not carry the history of its position, so
its slots are set to what the optimizer itself would give a new weight: not always zero (Rprop's step size, Adagrad's initial sum).
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from niwaki.masks import local


def fresh_values(optimizer: Optimizer, parameter: Tensor) -> tuple[dict[str, float], str | None]:
    """Return what each slot of a new weight holds after its first step with zero value and zero gradient.

    A copy of the optimizer with a single one-element parameter takes that step, so that any optimizer answers for itself.

    Returns:
        slot name -> value, and None or a sentence that says why the optimizer could not be asked (zero is assumed then).
    """
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    probe: Optimizer = object.__new__(type(optimizer))
    probe.__dict__.update(optimizer.__dict__)
    probe.__dict__.pop("step", None)  # a learning-rate scheduler's wrapper, bound to the original
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        probe.__dict__[hooks] = OrderedDict()
    for scaler in ("grad_scale", "found_inf"):
        probe.__dict__.pop(scaler, None)
    one = torch.zeros((1,) * parameter.ndim, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
    sparse = parameter.grad is not None and parameter.grad.is_sparse
    one.grad = torch.zeros_like(one).to_sparse(1) if sparse else torch.zeros_like(one)
    probe.state = defaultdict(dict)
    rate = group.get("lr")
    probe.param_groups = [{**group, "params": [one], **({"lr": rate.clone()} if isinstance(rate, Tensor) else {})}]
    try:
        probe.step()
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return (
            {},
            f"{type(optimizer).__name__} could not be asked for its fresh state ({reason}); its slots of pruned weights are set to zero",
        )
    state = probe.state[one]
    return {k: float(v.reshape(-1)[0]) for k, v in state.items() if isinstance(v, Tensor) and v.shape == one.shape}, None


def reset_slots(optimizer: Optimizer, parameter: Tensor, where: Tensor) -> list[str]:
    """Set the slots of a parameter to fresh values at the positions ``where`` (bool, the local shape).

    Returns:
        sentences about state that this rule cannot reach, such as factored slots.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return []
    values, told = fresh_values(optimizer, parameter)
    notes = [] if told is None else [told]
    for name, slot in state.items():
        if not isinstance(slot, Tensor):
            continue
        if slot.shape == parameter.shape:
            local(slot).masked_fill_(where, values.get(name, 0.0))
        elif slot.numel() > 1:
            notes.append(
                f"{type(optimizer).__name__} keeps {name!r} in another shape than its parameter: what it remembers of pruned weights cannot"
                " be reset one by one"
            )
    return notes


def forget_history(optimizer: Optimizer) -> None:
    """Drop the history of an LBFGS optimizer, whose directions mix all weights and are wrong under new masks."""
    if isinstance(optimizer, LBFGS):
        optimizer.state.clear()
