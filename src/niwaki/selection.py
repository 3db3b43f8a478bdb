"""Exact selection: the mask of the largest scores of many tensors together, streamed, without concatenation or a full sort.

Floating point numbers are ordered like the integers that their bits spell, once negative ones are mirrored. Among these keys the
smallest kept one is searched. A first pass finds their range and draws a sample, which tells a narrow bracket. A second pass counts
the keys above the bracket and collects those within, which are partitioned; too many to hold (or spread over processes), they are
counted in a histogram of their leading bits, and the digit of the wanted rank is the next bracket. A last pass writes the masks.
Only counts cross process boundaries, and counting is exact, so the result does not depend on the number of processes.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from niwaki.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Scores = Tensor | Callable[[], Tensor]
"""A tensor of scores, or a function that computes it anew for every pass, so that the scores of a model are never all in memory."""

Array = Any
"""A NumPy array for tensors on the CPU, a Tensor for others: comparing and masking in NumPy costs a fraction of torch's time, even
on one thread, and needs no parallel regions, which stall on a busy machine. Only operators that both have are used on it."""

Counts = np.ndarray[Any, np.dtype[np.int64]]

CHUNK_CPU, CHUNK_COPIED, CHUNK_ELSEWHERE = 1 << 17, (1 << 15) - 1, 1 << 24
"""Elements handled at a time: on the CPU the temporaries of a chunk stay in the second-level cache, and where torch has to copy or
convert them first, they are so few that it does so on one thread."""

SAMPLE = 1 << 18
"""At most so many keys are sampled to guess where the smallest kept one is."""

DIGIT_BITS = 17
"""Bits of a key that one histogram resolves (2^17 counts, 1 MiB)."""

CANDIDATES = 1 << 20
"""So many keys or fewer are collected and partitioned at once, in 4 or 8 MiB, instead of counted."""


def kept(sparsity: float, pieces: int) -> int:
    """Return how many of ``pieces`` stay at this sparsity: ``round((1 - sparsity) * pieces)`` in float64, halves to even.

    Raises:
        InputError: sparsity outside [0, 1], or a negative number of pieces.

    >>> kept(0.9, 1005)
    100
    """
    if not 0.0 <= sparsity <= 1.0:
        raise InputError(f"sparsity must be in [0, 1], got {sparsity!r}")
    if pieces < 0:
        raise InputError(f"the number of pieces must be at least 0, got {pieces!r}")
    return round((1 - sparsity) * pieces)


def select(
    scores: Sequence[Scores],
    keep: int,
    *,
    eligible: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
    group: ProcessGroup | None = None,
) -> list[Tensor]:
    """Return the masks of the ``keep`` largest scores of all tensors together.

    The order is total: higher scores first, then the lower tensor, then (in a group) the lower rank, then the lower flat index in
    row-major order. -0.0 equals +0.0; infinities and denormal numbers are ordinary scores.

    Args:
        scores: tensors of any shape, strides, device and floating dtype, or functions that return one. A function is called again
            on every pass (mostly three) and must return the same scores each time; its result is not stored.
        keep: how many elements are kept in all tensors (of all ranks) together.
        eligible: for each tensor a bool tensor of its shape, or None for all; elements that are False are never kept.
        names: names of the tensors for error messages.
        group: when given, ``scores`` are this rank's shards, contiguous in flat order and in rank order, of tensors sharded over
            the group. Every rank must call with as many tensors (some may be empty), and gets the masks of its shards.

    Returns:
        Contiguous bool tensors, one for each tensor of scores, with its shape and device; True = kept. The memory used beside
        them (about 20 MiB on the CPU) does not grow with the number of scores.

    Raises:
        InputError: NaN scores (on every rank, naming the tensor), a dtype that is not floating, an eligible mask that does not
            fit, or fewer eligible scores than ``keep``.

    Source: Floyd, Rivest, "Expected time bounds for selection", 1975 (bracket from a sample); Alabi, Blanchard, Gordon, Steinbach,
    "Fast k-selection algorithms for graphics processing units", 2012 (radix).

    >>> select([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 3.0, 3.0])], keep=2)
    [tensor([ True, False]), tensor([False,  True, False])]
    """
    keep = operator.index(keep)
    count = len(scores)
    eligible = [None] * count if eligible is None else eligible
    names = [f"scores[{index}]" for index in range(count)] if names is None else names
    if not count == len(eligible) == len(names):
        raise InputError(f"scores, eligible and names must be equally many, got {count}, {len(eligible)} and {len(names)}")
    source = _Source(scores, eligible, names, wide=any(isinstance(given, Tensor) and given.dtype == torch.float64 for given in scores))
    survey = _survey(source, group)
    if survey.again:
        source = _Source(scores, eligible, names, wide=True)
        survey = _survey(source, group)
    if not 0 <= keep <= survey.eligible:
        raise InputError(f"keep must be between 0 and the number of eligible scores, {survey.eligible}, got {keep}")
    threshold, wanted, ties = _threshold(source, survey, keep, group)
    if wanted == ties:
        threshold, wanted = threshold - 1, 0  # as all equal ones are kept, none has to be chosen
    shares = _share_ties(source, threshold, wanted, group) if group is not None and wanted else [wanted, *([0] * count)]
    masks, left = [], 0
    for index in range(count):
        mask, left = _mask(source, index, threshold, left + shares[index])
        masks.append(mask)
    if group is not None or any(callable(given) for given in scores):
        _expect(keep, int(_gather([sum(_count(mask) for mask in masks)], group).sum()))
    return masks


@dataclass(frozen=True)
class _Source:
    """The scores of this process, read as sortable integer keys: of their float64 bits when ``wide``, else of their float32 bits."""

    scores: Sequence[Scores]
    eligible: Sequence[Tensor | None]
    names: Sequence[str]
    wide: bool
    dtypes: set[torch.dtype] = field(default_factory=set)

    def __iter__(self) -> Iterator[tuple[int, Array, Array | None]]:
        """Yield the number of the tensor, keys, and the eligibility of the same elements, chunk by chunk in flat order."""
        for index in range(len(self.scores)):
            for keys, allowed in self.chunks(index, self.read(index)):
                yield index, keys, allowed

    def read(self, index: int) -> Tensor:
        given = self.scores[index]
        tensor = (given if isinstance(given, Tensor) else given()).detach().resolve_neg()
        self.dtypes.add(tensor.dtype)
        packed = str(tensor.dtype).endswith("_x2")
        if not tensor.dtype.is_floating_point or packed or tensor.layout is not torch.strided:
            raise InputError(f"{self.names[index]}: scores must be a dense tensor of a floating dtype, got {tensor.dtype}, {tensor.layout}")
        mask = self.eligible[index]
        if mask is not None and (mask.shape != tensor.shape or mask.dtype != torch.bool or mask.device != tensor.device):
            raise InputError(
                f"{self.names[index]}: eligible must be bool {list(tensor.shape)} on {tensor.device} like the scores,"
                f" got {mask.dtype} {list(mask.shape)} on {mask.device}"
            )
        return tensor

    def chunks(self, index: int, tensor: Tensor) -> Iterator[tuple[Array, Array | None]]:
        mask = self.eligible[index]
        as_is = tensor.dtype == (torch.float64 if self.wide else torch.float32) and tensor.is_contiguous()
        as_is &= mask is None or mask.is_contiguous()
        limit = CHUNK_ELSEWHERE if tensor.device.type != "cpu" else CHUNK_CPU if as_is else CHUNK_COPIED
        allowed: Iterator[Tensor | None] = itertools.repeat(None) if mask is None else _pieces(mask, limit)
        for values, part in zip(_pieces(tensor, limit), allowed, strict=False):
            yield _keys(values, self.wide), None if part is None else _array(part)


def _pieces(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """Yield the tensor as flat pieces of at most ``limit`` elements, in row-major order. The cuts depend on its shape alone."""
    count = tensor.numel()
    if 0 < count <= limit:
        yield tensor.reshape(-1)
    elif count:
        rows = tensor.shape[0]
        # The fewest parts of whole rows; a part of a single row is too long for a piece and is cut along the next dimension.
        for part in torch.split(tensor, -(-rows // -(-count // limit))) if rows > 1 else tensor:
            yield from _pieces(part, limit)


def _array(tensor: Tensor) -> Array:
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _host(array: Array) -> Array:
    return array.cpu().numpy() if isinstance(array, Tensor) else array


def _count(chosen: Array) -> int:
    return int(torch.count_nonzero(chosen) if isinstance(chosen, Tensor) else np.count_nonzero(chosen))


def _positions(chosen: Array) -> Array:
    return chosen.nonzero()[:, 0] if isinstance(chosen, Tensor) else np.flatnonzero(chosen)


def _restrict(chosen: Array, allowed: Array | None) -> Array:
    if allowed is not None:
        chosen &= allowed
    return chosen


def _keys(values: Tensor, wide: bool) -> Array:
    """Return integers ordered like the values: the bits of a positive number, minus those of its magnitude for a negative one."""
    bits = _array(values.to(torch.float64).view(torch.int64) if wide else values.to(torch.float32).view(torch.int32))
    if bits.min() >= 0:
        return bits
    sign = bits >> (63 if wide else 31)
    keys = bits & (0x7FFFFFFFFFFFFFFF if wide else 0x7FFFFFFF)
    keys ^= sign
    keys -= sign
    return keys


@dataclass(frozen=True)
class _Survey:
    """What the first pass over the scores of all ranks tells.

    Attributes:
        again: there are float64 scores, and some were read as float32.
        eligible: how many scores are eligible.
        lowest: the lowest key.
        highest: the highest key.
        sample: keys drawn on this rank.
        stride: each of them stands for so many.
    """

    again: bool
    eligible: int
    lowest: int
    highest: int
    sample: Counts
    stride: int

    def bracket(self, keep: int, group: ProcessGroup | None) -> tuple[int, int]:
        """Guess two keys between which the ``keep``-th largest one lies."""
        shift = max(0, (self.highest - self.lowest).bit_length() - DIGIT_BITS)
        start = self.lowest >> shift
        counts = np.bincount((self.sample >> shift) - start, minlength=(self.highest >> shift) - start + 1)
        totals = _sum(np.append(counts * self.stride, [len(self.sample)]), group)
        counts, drawn = totals[:-1], int(totals[-1])
        if not drawn:
            return self.lowest, self.highest
        from_above = counts[::-1].cumsum()
        share = keep / self.eligible
        spread = 5 * (share * (1 - share) / drawn) ** 0.5 + 1 / drawn
        reach = (np.array([share - spread, share + spread]) * from_above[-1]).clip(1, from_above[-1])
        last, first = start + len(counts) - 1 - from_above.searchsorted(reach)
        return max(self.lowest, int(first) << shift), min(self.highest, ((int(last) + 1) << shift) - 1)


def _survey(source: _Source, group: ProcessGroup | None) -> _Survey:
    """Count the eligible scores, find the range of all keys, draw a sample, and raise for NaN."""
    infinity = 0x7FF0000000000000 if source.wide else 0x7F800000
    eligible, lowest, highest = 0, infinity, -infinity
    bad = [False] * len(source.scores)
    # Strides are odd, so that they do not fall into step with the rows of most tensors.
    sample, drawn, seen, stride = [np.empty(0, np.int64)], 0, 0, 1
    for index, keys, allowed in source:
        low, high = int(keys.min()), int(keys.max())
        lowest, highest = min(lowest, low), max(highest, high)
        bad[index] |= low < -infinity or high > infinity
        eligible += len(keys) if allowed is None else _count(allowed)
        every = slice(-seen % stride, None, stride)
        sample.append(np.array(_host(keys[every] if allowed is None else keys[every][allowed[every]])))
        seen += len(keys)
        drawn += len(sample[-1])
        while drawn > SAMPLE:
            sample, stride = [np.concatenate(sample)[::3].copy()], 3 * stride
            drawn = len(sample[0])
    wide = torch.float64 in source.dtypes
    rows = _gather([source.wide, wide, eligible, lowest, highest, *bad], group)
    for number in np.flatnonzero(rows[:, 5:].any(axis=0)):
        raise InputError(f"{source.names[int(number)]}: scores contain NaN, which has no rank; every score must be a number")
    return _Survey(
        again=bool(rows[:, 1].any() and not rows[:, 0].all()),
        eligible=int(rows[:, 2].sum()),
        lowest=int(rows[:, 3].min()),
        highest=int(rows[:, 4].max()),
        sample=np.concatenate(sample),
        stride=stride,
    )


def _threshold(source: _Source, survey: _Survey, keep: int, group: ProcessGroup | None) -> tuple[int, int, int]:
    """Return the key of the smallest kept score, how many scores equal to it are kept, and how many there are."""
    if keep == 0:
        return survey.highest + 1, 0, 0
    # The wanted key is in [low, high]; so many keys are above high, and so many reach low.
    low, high, above, reaching = survey.lowest, survey.highest, 0, survey.eligible
    guess = group is not None or reaching > CANDIDATES
    while low < high:
        first, last = survey.bracket(keep, group) if guess else (low, high)
        guess = False
        shift = max(0, (last - first).bit_length() - DIGIT_BITS)
        found = _count_between(source, survey, first, last, shift, group)
        if keep <= found.beyond:
            low, reaching = last + 1, found.beyond
        elif keep > found.reaching:
            high, above = first - 1, found.reaching
        elif found.keys is not None:
            place = found.reaching - keep
            found.keys.partition(place)
            low = int(found.keys[place])
            return low, keep - found.beyond - _count(found.keys > low), _count(found.keys == low)
        else:
            reaching_digit = found.beyond + found.counts[::-1].cumsum()
            passed = int(reaching_digit.searchsorted(keep))
            digit = (last >> shift) - passed
            low, high = max(first, digit << shift), min(last, ((digit + 1) << shift) - 1)
            above, reaching = int(reaching_digit[passed - 1]) if passed else found.beyond, int(reaching_digit[passed])
    return low, keep - above, reaching - above


@dataclass(frozen=True)
class _Found:
    """What a pass finds about the keys in [first, last].

    Attributes:
        reaching: how many keys are at least ``first``.
        beyond: how many are above ``last``.
        keys: those in between, when they are few and all here.
        counts: else a histogram of their ``key >> shift``.
    """

    reaching: int
    beyond: int
    keys: Array | None
    counts: Counts


def _count_between(source: _Source, survey: _Survey, first: int, last: int, shift: int, group: ProcessGroup | None) -> _Found:
    """Pass over all scores; collect the keys in [first, last], and count them by leading bits once there are too many to hold."""
    start = first >> shift
    digits = (last >> shift) - start + 1
    counts = np.zeros(1, np.int64)
    waiting, size, total, reaching = [np.empty(0, np.int64 if source.wide else np.int32)], 0, 0, 0
    everything = (first, last) == (survey.lowest, survey.highest)
    for _, keys, allowed in source:
        chosen = allowed
        if not everything:
            chosen = _restrict(keys >= first, allowed)
            reaching += _count(chosen)
            chosen &= keys <= last
        waiting.append(_host(keys if chosen is None else keys[chosen]))
        size, total = size + len(waiting[-1]), total + len(waiting[-1])
        if size > CANDIDATES:
            counts = counts + np.bincount((np.concatenate(waiting) >> shift) - start, minlength=digits)
            waiting, size = waiting[:1], 0
    if everything:
        reaching = total
    few = np.concatenate(waiting)
    if group is None and size == total:
        return _Found(reaching, reaching - total, few, counts)
    counts = counts + np.bincount((few >> shift) - start, minlength=digits)
    sums = _sum(np.concatenate([[reaching, total], counts]), group)
    return _Found(int(sums[0]), int(sums[0] - sums[1]), None, sums[2:])


def _share_ties(source: _Source, threshold: int, wanted: int, group: ProcessGroup) -> list[int]:
    """Return how many scores equal to the threshold this rank keeps in each tensor: the first ones by (tensor, rank)."""
    mine = [0] * len(source.scores)
    for index, keys, allowed in source:
        mine[index] += _count(_restrict(keys == threshold, allowed))
    counts = _gather(mine, group).T
    before = counts.cumsum().reshape(counts.shape) - counts
    return [int(share) for share in (wanted - before).clip(0, counts)[:, torch.distributed.get_rank(group)]]


def _mask(source: _Source, index: int, threshold: int, share: int) -> tuple[Tensor, int]:
    """Write the mask of one tensor, keys above the threshold and the first ``share`` equal to it; return what is left of the share."""
    tensor = source.read(index)
    mask = torch.empty(tensor.shape, dtype=torch.bool, device=tensor.device)
    flat, start = _array(mask.view(-1)), 0
    for keys, allowed in source.chunks(index, tensor):
        part = flat[start : start + len(keys)]
        start += len(keys)
        part[:] = _restrict(keys > threshold, allowed)
        if share:
            tied = _positions(_restrict(keys == threshold, allowed))[:share]
            part[tied] = True
            share -= len(tied)
    return mask, share


def _expect(expected: int, found: int) -> None:
    if expected != found:
        raise InputError(f"a function of scores must return the same scores on every pass: {expected} were expected, {found} found")


def _device(group: ProcessGroup) -> torch.device:
    """Return where tensors must lie to be communicated: on the CPU for gloo and MPI, else on the current accelerator."""
    accelerator = torch.accelerator.current_accelerator()
    backends = torch.distributed.get_backend(group)
    return torch.device("cpu") if accelerator is None or backends in ("gloo", "mpi") else accelerator


def _sum(values: Counts, group: ProcessGroup | None) -> Counts:
    """Return the sum of the values over all ranks."""
    if group is None:
        return values
    shared = torch.from_numpy(values).to(_device(group))
    torch.distributed.all_reduce(shared, group=group)
    return shared.cpu().numpy()


def _gather(values: Sequence[int], group: ProcessGroup | None) -> Counts:
    """Return the values of all ranks, one row a rank."""
    if group is None:
        return np.array([values], dtype=np.int64)
    mine = torch.tensor(values, dtype=torch.int64, device=_device(group))
    rows = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(rows, mine, group=group)
    return torch.stack(rows).cpu().numpy()
