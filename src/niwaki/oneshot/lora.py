"""Deltas of low rank, merged into pruned weights without filling what was pruned: LoRA adapters as ``peft`` writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.formats import files
from niwaki.masks import Masks, canonical_name, nearest

PREFIX = "base_model.model."
"""What ``peft`` puts before the names of a model's modules."""

_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")


@dataclass(frozen=True)
class Delta:
    """A change of one weight: ``scale * B A``.

    Attributes:
        a: ``[rank, inputs]``, of a convolution ``[rank, inputs, *kernel]``.
        b: ``[outputs, rank]``, of a convolution ``[outputs, rank, 1, ...]``.
        scale: ``alpha / rank``, or ``alpha / sqrt(rank)``.
        transposed: whether the weight is ``[inputs, outputs]``, as of an embedding or of GPT-2's own layers.
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False


def merge_delta(weight: Tensor, mask: Tensor | None, a: Tensor, b: Tensor, scale: float, *, transposed: bool = False) -> Tensor:
    """Return ``(W + scale B A) * mask``: the weight with the change, and +0.0 where it is masked.

    Source: Hu et al. 2022 (LoRA). The sum is made in float64 and rounded once.

    Args:
        weight: any float dtype, ``[outputs, inputs]`` or that of a convolution, ``[outputs, inputs, *kernel]``.
        mask: bool of the same shape, True = active; None: nothing is masked.
        a: ``[rank, inputs]``; this and what follows as of :class:`Delta`.
        b: ``[outputs, rank]``.
        scale: of the change.
        transposed: whether the weight is ``[inputs, outputs]``.

    Returns:
        a new tensor of the weight's dtype.

    Raises:
        InputError: the shapes do not fit.

    >>> weight, mask = torch.zeros(2, 2), torch.tensor([[True, False], [True, True]])
    >>> merge_delta(weight, mask, a=torch.tensor([[1.0, 2.0]]), b=torch.tensor([[1.0], [10.0]]), scale=0.5)
    tensor([[ 0.5000,  0.0000],
            [ 5.0000, 10.0000]])
    """
    fits = a.ndim >= 2 and b.ndim >= 2 and b.shape[1] == a.shape[0] and all(size == 1 for size in b.shape[2:])
    change = torch.tensordot(b.to(torch.float64).flatten(1), a.to(torch.float64), dims=1) if fits else None
    if change is not None and transposed:
        change = change.transpose(0, 1)
    if change is None or change.shape != weight.shape:
        raise InputError(f"a {list(a.shape)} and b {list(b.shape)} make no change of a weight of shape {list(weight.shape)}")
    if mask is not None and mask.shape != weight.shape:
        raise InputError(f"the mask has shape {list(mask.shape)}, the weight {list(weight.shape)}")
    merged: Tensor = (weight.to(torch.float64) + scale * change.to(weight.device)).to(weight.dtype)
    return merged if mask is None else merged.masked_fill_(~mask.to(weight.device), 0.0)


def read_adapter(folder: str | Path) -> dict[str, Delta]:
    """Read a LoRA adapter (``adapter_config.json``, ``adapter_model.safetensors``): name of a weight in the model -> its change.

    Ranks and alphas of single modules (``rank_pattern``, ``alpha_pattern``) and ``use_rslora`` are taken into account.

    Raises:
        InputError: the files are missing or damaged, or hold what is no change of low rank (trained biases, magnitudes of DoRA, whole
            modules).
    """
    folder = Path(folder)
    config = _config(folder / "adapter_config.json")
    pairs: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    path = folder / "adapter_model.safetensors"
    with files.reading(path) as file:
        for name in file.names:
            if name.endswith(".base_layer.weight"):
                continue  # of an embedding, ``peft`` stores the frozen weight too
            found = _NAME.fullmatch(name.removeprefix(PREFIX))
            if found is None:
                raise InputError(f"{path}: {name!r} is no lora_A or lora_B; what is trained besides cannot be merged under a mask")
            pairs.setdefault(found["module"], {})[found["side"]] = file.read(name)
            if found["embedding"]:
                embeddings.add(found["module"])
    deltas = {}
    for module, sides in pairs.items():
        if set(sides) != {"A", "B"}:
            raise InputError(f"{path}: {module!r} has lora_{next(iter(sides))} and no lora_{'B' if 'A' in sides else 'A'}")
        a, b = sides["A"], sides["B"]
        rank = a.shape[0]
        wanted = _pattern(config["rank_pattern"], module, config["r"])
        if rank != wanted:
            raise InputError(f"{path}: lora_A of {module!r} has rank {rank}, and adapter_config.json says {wanted}")
        alpha = _pattern(config["alpha_pattern"], module, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
        deltas[f"{module}.weight"] = Delta(a, b, scale, bool(config["fan_in_fan_out"]) or module in embeddings)
    if not deltas:
        raise InputError(f"{path}: holds no lora_A and lora_B")
    return deltas


@torch.no_grad()
def merge_adapter(model: nn.Module, adapter: str | Path | Mapping[str, Delta], masks: Mapping[str, Tensor] | None = None) -> list[str]:
    """Merge an adapter into a model in place, and keep masked weights zero; nothing changes when one part does not fit.

    Args:
        model: the model that the adapter was trained for, pruned or not.
        adapter: its folder, or what :func:`read_adapter` returned.
        masks: of the model.

    Returns:
        the names of the weights that changed.

    Raises:
        InputError: the adapter cannot be read, or changes a weight that the model does not have or has in another shape.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> model[0].weight.data = torch.tensor([[3.0, 0.0]])
    >>> delta = Delta(a=torch.ones(1, 2), b=torch.ones(1, 1), scale=2.0)
    >>> merge_adapter(model, {"0.weight": delta}, Masks({"0.weight": torch.tensor([[True, False]])}))
    ['0.weight']
    >>> model[0].weight.data
    tensor([[5., 0.]])
    """
    deltas = adapter if isinstance(adapter, Mapping) else read_adapter(adapter)
    masks = masks if isinstance(masks, Masks) else Masks(masks)
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    first = {id(parameter): name for name, parameter in reversed(parameters.items())}
    merged: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        if name not in parameters:
            raise InputError(f"adapter: changes {name!r}, which this {type(model).__name__} does not have; {nearest(name, parameters)}")
        weight = parameters[name]
        # A tied weight has its mask under one of its names.
        mask = next((masks[n] for n in (name, first[id(weight)]) if n in masks), None)
        try:
            merged[name] = merge_delta(weight.detach(), mask, delta.a, delta.b, delta.scale, transposed=delta.transposed)
        except InputError as error:
            raise InputError(f"adapter: {name}: {error}") from None
    for name, values in merged.items():
        parameters[name].copy_(values)
    return list(merged)


def _config(path: Path) -> dict[str, Any]:
    """Return the settings of an adapter that say how it is merged."""
    try:
        config = files.unique_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{path}: no LoRA adapter (peft_type is {config.get('peft_type') if isinstance(config, dict) else None!r})")
    for unknown in ("use_dora", "use_qalora", "modules_to_save"):
        if config.get(unknown):
            raise InputError(f"{path}: {unknown} is set, and only changes of low rank can be merged under a mask")
    if config.get("bias", "none") != "none":
        raise InputError(f"{path}: bias is {config['bias']!r}, and only changes of low rank can be merged under a mask")
    found: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "fan_in_fan_out": False} | config
    for number in ("r", "lora_alpha"):
        if not isinstance(found.get(number), int | float) or found[number] <= 0:
            raise InputError(f"{path}: {number} must be a positive number, got {found.get(number)!r}")
    return found


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return what the first pattern says that a module's name ends in, as ``peft`` reads them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
