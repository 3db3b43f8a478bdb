"""Masks: which elements of which parameters are active, kept beside the model and never in it.

A mask is a bool tensor, True = active. Everything here is a pure function of masks except ``Masks.apply_``, which zeroes the masked
elements of a model.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from niwaki.errors import InputError

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Path components that ``torch.compile``, activation checkpointing and FSDP put into parameter names, at any depth."""


def canonical_name(name: str) -> str:
    """Return a parameter's name without what wrappers add to it: ``WRAPPERS`` anywhere, ``module`` in front (DDP, DataParallel, EMA).

    All leading ``module`` components go, so that a model and its wrapped self agree even when the model has a child of that name.

    >>> canonical_name("module._orig_mod.layer.weight")
    'layer.weight'
    """
    *path, own = name.split(".")
    path = [part for part in path if part not in WRAPPERS]
    while path and path[0] == "module":
        del path[0]
    return ".".join([*path, own])


def pack_bits(mask: Tensor) -> Tensor:
    """Return a bool tensor as uint8 of length ceil(elements / 8), on the CPU.

    Element *i* in row-major order is bit ``i % 8`` (0 = least significant) of byte ``i // 8``; unused bits of the last byte are 0.

    >>> pack_bits(torch.tensor([[True, False, True], [True, False, False]]))
    tensor([13], dtype=torch.uint8)
    """
    flat = mask.detach().cpu().contiguous().numpy().reshape(-1)
    return torch.from_numpy(np.packbits(flat, bitorder="little"))


def unpack_bits(packed: Tensor, shape: Sequence[int], name: str = "mask") -> Tensor:
    """Return the bool tensor that ``pack_bits`` packed, on the CPU.

    Raises:
        InputError: not uint8, a length that does not fit the shape, or a bit that is set beyond the shape.
    """
    elements = prod(shape)
    expected = (elements + 7) // 8
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (expected,):
        raise InputError(
            f"{name}: shape {list(shape)} needs {expected} bytes of packed bits, got {packed.dtype} of shape {list(packed.shape)}"
        )
    data = packed.detach().cpu().contiguous().numpy()
    if elements % 8 and data[-1] >> (elements % 8):
        raise InputError(f"{name}: packed bits are set beyond the {elements} elements of shape {list(shape)}")
    bits = np.unpackbits(data, count=elements, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).reshape(tuple(shape))


class Masks(Mapping[str, Tensor]):
    """An immutable mapping from canonical parameter name to bool tensor, True = active.

    The tensors are held, not copied: do not change them in place. With a sharded model each rank holds the masks of its own shards,
    and every number is about those.

    >>> masks = Masks({"weight": torch.tensor([True, False, False, True])})
    >>> masks
    Masks(1 tensor, 2 of 4 elements active, sparsity 0.5)

    Raises:
        InputError: a value that is no bool tensor, or two names that are equal without their wrapper prefixes.
    """

    __slots__ = ("_tensors",)

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self._tensors: dict[str, Tensor] = {}
        for given, mask in (masks or {}).items():
            name = canonical_name(given)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise InputError(f"masks: {name!r} must be a bool tensor (True = active), got {got}")
            if name in self._tensors:
                raise InputError(f"masks: {name!r} is given twice (names are compared without wrapper prefixes)")
            self._tensors[name] = mask.detach()

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        tensors = f"{len(self)} tensor{'' if len(self) == 1 else 's'}"
        return f"Masks({tensors}, {self.active} of {self.total} elements active, sparsity {self.sparsity:.4g})"

    def __eq__(self, other: object) -> bool:
        """Equal names, shapes and bits; order and device do not matter."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(
            mask.shape == other[name].shape and torch.equal(mask, other[name].to(mask.device)) for name, mask in self.items()
        )

    def __hash__(self) -> int:
        return int(self.hash()[:15], 16)

    # -- counts ----------------------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Elements of all masked tensors."""
        return sum(mask.numel() for mask in self.values())

    @property
    def active(self) -> int:
        """Elements that are True."""
        return sum(_count(mask) for mask in self.values())

    @property
    def density(self) -> float:
        """active / total; 1.0 when there are no elements.

        The density of a union over time is the ever-active share, the *in-time over-parameterization rate* of S. Liu et al. 2021
        ("Do We Actually Need Dense Over-Parameterization?"): keep ``ever = ever | masks`` at each mask update.

        >>> first, second = (Masks({"w": torch.tensor(bits)}) for bits in ([True, False, False, False], [False, True, False, False]))
        >>> (first | second).density
        0.5
        """
        total = self.total
        return self.active / total if total else 1.0

    @property
    def sparsity(self) -> float:
        """Masked share of the masked tensors' elements, 1 - active / total; 0.0 when there are no elements."""
        total = self.total
        return (total - self.active) / total if total else 0.0

    # -- set algebra -----------------------------------------------------------------------------------------------------------

    def __and__(self, other: Masks) -> Masks:
        return self._combine(other, torch.logical_and)

    def __or__(self, other: Masks) -> Masks:
        return self._combine(other, torch.logical_or)

    def __xor__(self, other: Masks) -> Masks:
        return self._combine(other, torch.logical_xor)

    def __sub__(self, other: Masks) -> Masks:
        """What is active here and not in ``other``."""
        return self._combine(other, lambda a, b: a & ~b)

    def __invert__(self) -> Masks:
        return Masks({name: ~mask for name, mask in self.items()})

    def iou(self, other: Masks) -> float:
        """Return intersection over union, ``|A and B| / |A or B|``, over all tensors together; 1.0 when both are empty.

        P. Jaccard 1901.
        """
        union = (self | other).active
        return (self & other).active / union if union else 1.0

    def churn(self, other: Masks) -> float:
        """Return the share of positions that differ, ``|A xor B| / total``: the normalized Hamming distance.

        The denominator is **all** positions of the masked tensors, not the active ones: replacing every active element at sparsity S
        (S at least 0.5) is a churn of 2(1 - S), not 1. Used as the stopping distance of early-bird tickets (H. You et al. 2020).
        """
        changed, total = (self ^ other).active, self.total
        return changed / total if total else 0.0

    def _combine(self, other: Masks, operation: Callable[[Tensor, Tensor], Tensor]) -> Masks:
        if not isinstance(other, Masks):
            return NotImplemented
        for name in [*self, *other]:
            if name not in self or name not in other:
                raise InputError(f"masks: {name!r} is in one of the two and not in the other; combine masks of the same tensors")
            if self[name].shape != other[name].shape:
                raise InputError(f"masks: {name!r} has shape {list(self[name].shape)} in one and {list(other[name].shape)} in the other")
        return Masks({name: operation(mask, other[name].to(mask.device)) for name, mask in self.items()})

    # -- storage ---------------------------------------------------------------------------------------------------------------

    def packed(self) -> dict[str, Tensor]:
        """Return each mask as packed bits (``pack_bits``): uint8, one eighth of the elements, on the CPU."""
        return {name: pack_bits(mask) for name, mask in self.items()}

    @classmethod
    def unpack(cls, packed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> Masks:
        """Return the masks that ``packed`` holds, on the CPU; ``shapes`` gives each tensor's shape.

        Raises:
            InputError: a name without a shape, or bits that do not fit the shape.
        """
        for name in packed:
            if name not in shapes:
                raise InputError(f"masks: packed bits of {name!r}, which is not among the shapes; {nearest(name, shapes)}")
        return cls({name: unpack_bits(bits, shapes[name], f"masks: {name!r}") for name, bits in packed.items()})

    def hash(self) -> str:
        """Return the SHA-256 of names, shapes and packed bits in hexadecimal.

        Tensors are taken in the order of their names (Unicode code points), so that the order of insertion does not matter. Each adds
        its UTF-8 name preceded by its length in bytes, the number of dimensions and the dimensions (all numbers as 8-byte
        little-endian integers), and its packed bits. Device and memory format do not matter.
        """
        digest = hashlib.sha256()
        for name in sorted(self):
            mask, text = self[name], name.encode()
            digest.update(np.array([len(text)], dtype="<i8").tobytes() + text)
            digest.update(np.array([mask.dim(), *mask.shape], dtype="<i8").tobytes())
            digest.update(pack_bits(mask).numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Masks:
        """Return these masks on a device."""
        return Masks({name: mask.to(device) for name, mask in self.items()})

    # -- the model -------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set every masked element of the model's parameters to +0.0, in place; nothing changes when a mask does not fit.

        Wrapped models (``torch.compile``, DDP) and sharded ones work: a mask of the whole tensor or of this rank's shard.

        Raises:
            InputError: a mask whose name or shape the model does not have.
        """
        for parameter, mask in self._pairs(model):
            # All zero bits are +0, and integers can be filled whatever the dtype is (float8 and uint16 cannot).
            as_integers(parameter).masked_fill_(~mask.to(parameter.device), 0)

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Pair this rank's part of each masked parameter with the mask of that part."""
        parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
        pairs = []
        for name, mask in self.items():
            if name not in parameters:
                raise InputError(f"masks: {name!r} is not a parameter of this {type(model).__name__}; {nearest(name, parameters)}")
            parameter = parameters[name].detach()
            pairs.append((local(parameter), shard(mask, parameter, f"masks: {name!r}")))
        return pairs


@dataclass(frozen=True)
class Sparsity:
    """The counts from which every definition of sparsity follows; ``sparsity_of`` makes it.

    Attributes:
        targets: elements of the tensors that have a mask.
        masked: elements of these that are masked.
        parameters: elements of all parameters of the model; tied ones once.
        active_zeros: active elements of the targets whose value equals zero.
        zeros: elements of all parameters whose value equals zero, whatever the reason.
    """

    targets: int
    masked: int
    parameters: int
    active_zeros: int
    zeros: int

    @property
    def of_targets(self) -> float:
        """The sparsity of a recipe: masked / targets."""
        return self.masked / self.targets if self.targets else 0.0

    @property
    def of_parameters(self) -> float:
        """Masked share of the whole model: masked / parameters."""
        return self.masked / self.parameters if self.parameters else 0.0

    @property
    def zeros_among_active(self) -> float:
        """Zeros that no mask asks for: active_zeros / (targets - masked)."""
        active = self.targets - self.masked
        return self.active_zeros / active if active else 0.0

    @property
    def zeros_of_parameters(self) -> float:
        """What one sees without masks: zeros / parameters."""
        return self.zeros / self.parameters if self.parameters else 0.0


def sparsity_of(model: nn.Module, masks: Masks) -> Sparsity:
    """Return the sparsity of a model by every definition; of a sharded model, that of this rank's shards.

    Raises:
        InputError: a mask whose name or shape the model does not have.
    """
    pairs = masks._pairs(model)
    parameters = [local(parameter.detach()) for parameter in model.parameters()]
    return Sparsity(
        targets=sum(mask.numel() for _, mask in pairs),
        masked=sum(_count(~mask) for _, mask in pairs),
        parameters=sum(parameter.numel() for parameter in parameters),
        active_zeros=sum(_count(equals_zero(parameter) & mask.to(parameter.device)) for parameter, mask in pairs),
        zeros=sum(_count(equals_zero(parameter)) for parameter in parameters),
    )


# -- tensors of every kind -----------------------------------------------------------------------------------------------------

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def as_integers(tensor: Tensor) -> Tensor:
    """Return a view of the same bits as integers (complex128 stays): what torch can select and fill, whatever the dtype was."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def bits_of(keep: Tensor) -> Tensor:
    """Return a bool mask as int8: all bits set where True, for :func:`clear_`."""
    return keep.to(torch.int8).neg_()


def clear_(values: Tensor, bits: Tensor) -> None:
    """Set values to zero where ``bits`` (see :func:`bits_of`, same shape) are not set, in place.

    The bit patterns are ANDed: +0.0 where the mask is, whatever was there (NaN too), and every bit elsewhere. It does what
    ``masked_fill_`` does in about a third of the time on a CPU, and runs twice in every training step.
    """
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(values.element_size())
    if kind is None:
        values.masked_fill_(bits == 0, 0.0)
    else:
        values.view(kind).bitwise_and_(bits)


def equals_zero(tensor: Tensor) -> Tensor:
    """Return where the value equals zero (-0.0 does), for every dtype."""
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.to(torch.float32)
    return tensor == 0


def is_sharded(tensor: Tensor) -> bool:
    """Return whether the tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, and any other tensor as it is."""
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def distribute(whole: Tensor, like: Any) -> Tensor:
    """Return the whole tensor sharded like the DTensor ``like``; every rank cuts its own shard, nothing is sent."""
    from torch.distributed.tensor import distribute_tensor  # not every build of torch has it

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard(mask: Tensor, like: Tensor, name: str) -> Tensor:
    """Return this rank's part of a mask, which may be given as that part, as a DTensor, or whole; of a plain tensor, the mask.

    Raises:
        InputError: the mask has neither the shape of the whole tensor nor that of this rank's part.
    """
    part = local(like)
    if is_sharded(like) and mask.shape == like.shape:
        return local(distribute(mask, like))
    if local(mask).shape != part.shape:
        raise InputError(f"{name} has a mask of shape {list(mask.shape)}, the tensor has shape {list(part.shape)}")
    return local(mask)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the tail of an error message about an unknown tensor: the most similar name, or how many there are."""
    known = list(names)
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"none of its {len(known)} tensors has a similar name"


def _count(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))
