"""What a granularity is: how a weight is cut into pieces, and the way back from pieces to elements."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from niwaki.component import Component
from niwaki.errors import InputError
from niwaki.layout import Layout


class Granularity(Component):
    """In what pieces a weight is masked."""

    slot = "granularity"

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the granularity itself fixes (N:M: ``1 - N / M``), or None."""
        return None

    def block(self, layout: Layout) -> tuple[int, ...]:
        """Return the size of a whole piece along each dimension of the layout's view."""
        raise NotImplementedError

    def grid(self, layout: Layout) -> tuple[int, ...]:
        """Return how many pieces there are along each dimension of the layout's view; a smaller last piece counts."""
        return tuple(-(-size // length) for size, length in zip(layout.shape, self.block(layout), strict=True))

    def check(self, layout: Layout, name: str) -> bool:
        """Return whether the tensor can be masked in these pieces; False when it must stay dense (``remainder: skip``).

        Raises:
            InputError: the pieces do not divide a dimension, and ``remainder`` is ``error``.
        """
        return True

    def reduce(self, values: Tensor, layout: Layout) -> Tensor:
        """Return the sum of ``values`` (one for each element) over each piece.

        Shape ``grid(layout)`` and float64, in which the sum is also taken; where pieces are single elements, ``values`` itself.
        """
        block = self.block(layout)
        if prod(block) == 1:
            return values
        return split(values, layout.shape, block).sum(dim=tuple(range(1, 2 * len(block), 2)), dtype=torch.float64)

    def elements(self, values: Tensor, layout: Layout) -> Tensor:
        """Return the elements of each piece: shape ``[pieces, elements of a piece]``, pieces and elements in row-major order.

        Raises:
            InputError: the pieces differ in size.
        """
        block = self.block(layout)
        if any(size % length for size, length in zip(layout.shape, block, strict=True)):
            raise InputError(
                f"granularity {self.name}: pieces of {block} leave a smaller rest of a tensor of shape {layout.shape}, and what compares"
                " pieces needs equal ones; choose a length that divides every dimension"
            )
        axes = range(2 * len(block))
        return split(values, layout.shape, block).permute([*axes[::2], *axes[1::2]]).reshape(-1, prod(block))

    def expand(self, values: Tensor, layout: Layout) -> Tensor:
        """Return for each element the value of its piece (``values``: shape ``grid(layout)``); contiguous, shape ``layout.shape``."""
        block, grid = self.block(layout), self.grid(layout)
        paired = values.reshape([size for pieces in grid for size in (pieces, 1)])
        return join(paired.expand([size for pair in zip(grid, block, strict=True) for size in pair]), layout.shape)

    def protected(self, scores: Tensor, layout: Layout) -> Tensor | None:
        """Return which elements are among the N best of their group of M (bool, shape ``layout.shape``); None for all but N:M."""
        return None


def split(values: Tensor, shape: Sequence[int], block: Sequence[int], fill: float = 0.0) -> Tensor:
    """Pad to whole blocks and split every dimension: shape ``[pieces, block]`` for each dimension in turn."""
    view = values.reshape(tuple(shape))
    padding = [n for size, length in zip(reversed(shape), reversed(block), strict=True) for n in (0, -size % length)]
    if any(padding):
        view = F.pad(view, padding, value=fill)
    return view.reshape([n for size, length in zip(view.shape, block, strict=True) for n in (size // length, length)])


def join(split: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo ``split``: merge the pairs of dimensions and cut the padding off."""
    padded = split.reshape([split.shape[i] * split.shape[i + 1] for i in range(0, split.dim(), 2)])
    return padded[tuple(slice(size) for size in shape)].contiguous()
