"""The container file: a safetensors file that stores each tensor in few bytes and tells masked from zero.

``save`` writes one, ``load`` reads one (or any plain safetensors file). docs/format.md specifies what version 1 holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.formats import bitmap
from niwaki.formats.description import (
    MARK,
    PARTS,
    SEPARATOR,
    Description,
    Entry,
    check_name,
    checksum,
    component,
)
from niwaki.formats.files import CODES, FilePath, Reader, raw_bytes, reading, write
from niwaki.masks import Masks, canonical_name, distribute, equals_zero, is_sharded, local, nearest, shard
from niwaki.removed import Removed, replay

HEADER_BYTES = 160
"""About what a second component costs in the header; an unmasked tensor is stored as a bitmap when it saves more than that."""


@dataclass(frozen=True)
class Loaded:
    """What a file holds: dense tensors by canonical name (tied names share one tensor) and the masks, all on the CPU.

    ``removed`` is what had been taken out of the model when it was saved.
    """

    tensors: dict[str, Tensor]
    masks: Masks
    removed: Removed = field(default_factory=Removed)


def save(
    model: nn.Module | Mapping[str, Tensor],
    path: FilePath,
    masks: Mapping[str, Tensor] | None = None,
    removed: Removed | Mapping[str, Any] | None = None,
) -> None:
    """Store a model, or a state dict, in one file.

    A tensor with a mask is stored as packed positions and the values there, so that the mask survives; another one is stored
    without its zeros where that saves bytes, else plainly. Values keep every bit (NaN payloads, -0.0); masked elements come back as
    +0.0. Tensors that share memory wholly are stored once. Names lose wrapper prefixes. With ``removed``, what :func:`niwaki.shrink` took
    out, :func:`load` makes a model of the original shape as small.

    The file appears whole or not at all. With DTensors every rank must call this; the first rank of the mesh writes, the others
    return without waiting for it.

    >>> import tempfile
    >>> weight = torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save({"weight": weight}, f"{folder}/model.safetensors", masks={"weight": torch.tensor([[True, True], [False, False]])})
    ...     print(load(f"{folder}/model.safetensors").masks)
    Masks(1 tensor, 2 of 4 elements active, sparsity 0.5)

    Raises:
        InputError: a path that cannot be written; an entry that is no plain tensor; a mask that does not fit its tensor, or whose
            masked elements are not zero (nothing is pruned silently); a removal that does not end in the model's shapes.
        NiwakiError: the disk is full.
    """
    masks = masks if isinstance(masks, Masks) else Masks(masks)
    removed = Removed.of(removed or {})
    state: object = model.state_dict() if isinstance(model, nn.Module) else model
    if not isinstance(state, Mapping):
        raise InputError(f"{path}: expected a model or a state dict, got {type(model).__name__}")
    tensors = {name: tensor for name, (_, tensor) in _named_tensors(state, str(path)).items()}
    for name in masks:
        if name not in tensors:
            raise InputError(f"{path}: masks: {name!r} is not a tensor of the model; {nearest(name, tensors)}")
    _require_removal(removed, tensors, path)
    tied = _tied(tensors, masks, path)
    components: dict[str, Tensor] = {}
    entries: dict[str, Entry] = {}
    writes = True
    for name, tensor in tensors.items():
        if name in tied:
            continue
        writes = writes and _is_first_rank(tensor)
        active = _whole_mask(masks[name], tensor, f"{path}: {name!r}") if name in masks else None
        encoding, parts = _encode(_whole(tensor), active, f"{path}: {name!r}")
        entries[name] = Entry(
            encoding=encoding,
            dtype=CODES[tensor.dtype],
            shape=list(tensor.shape),
            masked=active is not None,
            crc32={part: checksum(data) for part, data in parts.items()},
        )
        if writes:
            components |= {component(name, encoding, part): data for part, data in parts.items()}
    if writes:
        write(path, components, {"format": "pt", "niwaki": Description(tensors=entries, tied=tied, removed=removed).to_text()})


def load(path: FilePath, model: nn.Module | None = None) -> Loaded:
    """Read a container, or a plain safetensors file (dense, without masks), and return its tensors and masks.

    With a model, the tensors are also loaded into it: every name, shape and dtype must fit, and nothing is changed when one does not.
    A wrapped or sharded model takes the file of a plain one, and the reverse. The file of a model that was made smaller fits a model that
    was made as small, and one of the original shape, from which the same is taken out first (see :func:`niwaki.structured.replay`).
    No code in the file is ever run: it is data only.

    Raises:
        InputError: the file cannot be read, is damaged or is not what the format allows, or does not fit the model.
    """
    with reading(path) as file:
        text = file.metadata.get("niwaki")
        loaded = _load_plain(file) if text is None else _load_described(file, Description.from_text(text, path))
    if model is not None:
        own = _own(model, path)
        if loaded.removed and any(name not in loaded.tensors or t.shape != loaded.tensors[name].shape for name, (_, t) in own.items()):
            _fitting(_smaller(own, loaded.removed), loaded.tensors, f"{path}: after what it says was removed")
            replay(model, loaded.removed)
        _load_into(model, loaded.tensors, path)
    return loaded


# -- saving --------------------------------------------------------------------------------------------------------------------


def _require_removal(removed: Removed, tensors: Mapping[str, Tensor], path: FilePath) -> None:
    """Raise InputError for a removal after which the model's tensors would have other shapes."""
    for name, dimensions in removed.tensors.items():
        after = removed.name_after(name)
        tensor = tensors.get(after or "")
        for dimension, kept in dimensions.items():
            if tensor is not None and (int(dimension) >= tensor.ndim or tensor.shape[int(dimension)] != len(kept)):
                raise InputError(
                    f"{path}: removed: it keeps {len(kept)} entries of {name!r} along dimension {dimension}, and the model's {after!r} has"
                    f" shape {list(tensor.shape)}; give what shrink returned for this model"
                )


def _named_tensors(state: Mapping[Any, Any], where: str) -> dict[str, tuple[str, Tensor]]:
    """Return the given name and the tensor by canonical name, after checking that a file can hold each of them."""
    tensors: dict[str, tuple[str, Tensor]] = {}
    for given, tensor in state.items():
        if not isinstance(given, str):
            raise InputError(f"{where}: the name {given!r} is not a string")
        name = canonical_name(given)
        check_name(name, where)
        problem = _problem(tensor)
        if problem:
            raise InputError(f"{where}: {given!r} {problem}")
        if name in tensors:
            raise InputError(f"{where}: {tensors[name][0]!r} and {given!r} are both {name!r} without wrapper prefixes; rename one")
        tensors[name] = given, tensor.detach()
    return tensors


def _problem(tensor: Any) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"is of type {type(tensor).__name__}; a file holds tensors only, so keep such state elsewhere"
    if nn.parameter.is_lazy(tensor):
        return "has no shape yet; run the model once before saving it"
    if tensor.layout != torch.strided:
        return f"has the layout {tensor.layout}; save dense tensors, with masks"
    if tensor.device.type == "meta":
        return "is on the meta device and has no values"
    if tensor.dtype not in CODES:
        return f"has the data type {tensor.dtype}, which a safetensors file cannot hold"
    if type(local(tensor.detach())) is not Tensor:
        return f"is of the class {type(tensor).__name__}; convert it to a plain tensor"
    return None


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Return what two tensors have in common if and only if they are the same elements of the same memory."""
    part = local(tensor)
    # The address of the storage object, unlike that of its data, tells empty ones apart: shards may be empty.
    return part.untyped_storage()._cdata, part.storage_offset(), part.dtype, tuple(part.shape), tuple(part.stride())


def _tied(tensors: Mapping[str, Tensor], masks: Masks, path: FilePath) -> dict[str, str]:
    """Map every further name of a tensor to the one that it is stored under: the name with the mask, else the first."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(_memory(tensor), []).append(name)
    tied: dict[str, str] = {}
    for names in groups.values():
        masked = [name for name in names if name in masks]
        if len(masked) > 1:
            raise InputError(f"{path}: masks: {masked[0]!r} and {masked[1]!r} are one tied tensor; give its mask under one name")
        stored = (masked or names)[0]
        tied |= {name: stored for name in names if name != stored}
    return tied


def _encode(tensor: Tensor, active: Tensor | None, name: str) -> tuple[str, dict[str, Tensor]]:
    """Return the encoding that takes fewest bytes, and its parts."""
    if active is not None:
        lost = int(torch.count_nonzero(~active & ~equals_zero(tensor)))
        if lost:
            raise InputError(f"{name}: {lost} masked elements are not zero, and nothing is pruned silently; call masks.apply_(model) first")
        return "bitmap", bitmap.encode(tensor, active)
    if (tensor.numel() + 7) // 8 + HEADER_BYTES < tensor.nbytes:
        bits = bitmap.has_bits(tensor)
        if (tensor.numel() + 7) // 8 + int(torch.count_nonzero(bits)) * tensor.element_size() + HEADER_BYTES < tensor.nbytes:
            return "bitmap", bitmap.encode(tensor, bits)
    return "dense", {"values": tensor}


def _whole(tensor: Any) -> Tensor:
    """Return all elements on the CPU, in row-major order; of a DTensor, gathered from all ranks."""
    if is_sharded(tensor):
        tensor = tensor.full_tensor()
    whole: Tensor = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    return whole


def _whole_mask(mask: Tensor, tensor: Any, name: str) -> Tensor:
    part = shard(mask, tensor, name)
    if not is_sharded(tensor):
        return part.cpu().contiguous()
    # Always gathered, also where this rank has the whole mask: all ranks must make the same calls.
    bits = part.to(device=local(tensor).device, dtype=torch.uint8)
    sharded = type(tensor).from_local(bits, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())
    return _whole(sharded).bool()


def _is_first_rank(tensor: Any) -> bool:
    if not is_sharded(tensor):
        return True
    return bool(tensor.device_mesh.mesh.flatten()[0] == torch.distributed.get_rank())


# -- loading -------------------------------------------------------------------------------------------------------------------


def _load_plain(file: Reader) -> Loaded:
    tensors: dict[str, Tensor] = {}
    if any(text.startswith(MARK) for text in file.metadata.values()):
        raise InputError(f"{file.path}: a niwaki description stands under another name than 'niwaki': the file is damaged")
    for given in file.names:
        name = canonical_name(given)
        if SEPARATOR in given:
            raise InputError(f"{file.path}: {given!r} is part of an encoded tensor, but the file has no niwaki description")
        if name in tensors:
            raise InputError(f"{file.path}: {given!r} and another tensor are both {name!r} without wrapper prefixes")
        tensors[name] = file.read(given)
    return Loaded(tensors, Masks())


def _load_described(file: Reader, description: Description) -> Loaded:
    expected = {
        component(name, entry.encoding, part): name for name, entry in description.tensors.items() for part in PARTS[entry.encoding]
    }
    for stored in file.names:
        if stored not in expected:
            raise InputError(f"{file.path}: {stored!r} is not in the niwaki description")
    for stored in expected.keys() - set(file.names):
        raise InputError(f"{file.path}: {expected[stored]!r}: its component {stored!r} is missing")
    tensors: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name, entry in description.tensors.items():
        tensors[name], active = load_entry(file, name, entry)
        if entry.masked and active is not None:
            masks[name] = active
    tensors |= {alias: tensors[name] for alias, name in description.tied.items()}
    return Loaded(tensors, Masks(masks), description.removed)


def load_entry(file: Reader, name: str, entry: Entry) -> tuple[Tensor, Tensor | None]:
    """Return a tensor of an open file, and its mask if it has one, after checking its components."""
    parts: dict[str, Tensor] = {}
    for part in PARTS[entry.encoding]:
        stored = component(name, entry.encoding, part)
        dtype, shape = file.kind(stored)
        if dtype != ("U8" if part == "positions" else entry.dtype):
            raise InputError(f"{file.path}: {name!r}: its component {stored!r} has data type {dtype}, the description says {entry.dtype}")
        if entry.encoding == "dense" and shape != entry.shape:
            raise InputError(f"{file.path}: {name!r}: stored with shape {shape}, the description says {entry.shape}")
        parts[part] = file.read(stored)
        if checksum(parts[part]) != entry.crc32[part]:
            raise InputError(f"{file.path}: {name!r}: its component {stored!r} is damaged: its check sum does not fit")
    if entry.encoding == "dense":
        return parts["values"], None
    return bitmap.decode(parts["positions"], parts["values"], entry.shape, f"{file.path}: {name!r}")


OPTIONAL = "num_batches_tracked"
"""How the names of the batch counters of normalization layers end: files of other makers may lack them, and they then stay as they are."""


def _own(model: nn.Module, path: FilePath) -> dict[str, tuple[str, Tensor]]:
    return _named_tensors(model.state_dict(), f"{path}: cannot be loaded into this model")


def _smaller(own: Mapping[str, tuple[str, Tensor]], removed: Removed) -> dict[str, tuple[str, Tensor]]:
    """Return what the tensors of a model will be once something is taken out of it, without values; ties stay."""
    cuts = {_memory(own[name][1]): dimensions for name, dimensions in removed.tensors.items() if name in own}
    every = removed.model_copy(update={"tensors": {name: cuts.get(_memory(tensor), {}) for name, (_, tensor) in own.items()}})
    shapes = every.shapes_after({name: list(tensor.shape) for name, (_, tensor) in own.items()})
    made: dict[tuple[object, ...], Tensor] = {}
    found = {}
    for name, shape in shapes.items():
        tensor = own[removed.name_before(name)][1]
        found[name] = name, made.setdefault(_memory(tensor), torch.empty(shape, dtype=tensor.dtype, device="meta"))
    return found


def _load_into(model: nn.Module, tensors: Mapping[str, Tensor], path: FilePath) -> None:
    """Load tensors into a model, after checking that all of them fit."""
    own = _own(model, path)
    known = dict(own.values())
    values = {
        key: distribute(value, known[key]) if is_sharded(known[key]) else value for key, value in _fitting(own, tensors, str(path)).items()
    }
    left = {key: tensor for key, tensor in model.state_dict().items() if key not in values and key.endswith(OPTIONAL)}
    model.load_state_dict({**values, **left})


def _fitting(own: Mapping[str, tuple[str, Tensor]], tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the value of each of a model's tensors by its given name, after checking that all of them fit."""
    by_memory: dict[tuple[object, ...], str] = {}
    values: dict[str, Tensor] = {}
    if unexpected := [name for name in tensors if name not in own]:
        name = unexpected[0]
        raise InputError(f"{where}: {len(unexpected)} of its tensors are not in the model, such as {name!r}; {nearest(name, own)}")
    for name, (_, tensor) in own.items():
        if name in tensors:
            first = by_memory.setdefault(_memory(tensor), name)
            if tensors[name] is not tensors[first] and raw_bytes(tensors[name]) != raw_bytes(tensors[first]):
                raise InputError(f"{where}: {first!r} and {name!r} are one tied tensor in the model, but differ in the file")
    for name, (key, tensor) in own.items():
        source = name if name in tensors else by_memory.get(_memory(tensor))
        if source is None and name.endswith(OPTIONAL):
            continue
        if source is None:
            raise InputError(f"{where}: {name!r} of the model is not in the file; {nearest(name, tensors)}")
        value = tensors[source]
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            have, want = (f"{t.dtype} of shape {list(t.shape)}" for t in (value, tensor))
            raise InputError(f"{where}: {name!r} is {have} in the file and {want} in the model")
        values[key] = value
    return values
