"""Pieces that are no weights: units of a layer in the eigenbasis of its Kronecker-factored Fisher matrix."""

from typing import NoReturn

from pydantic import Field

from niwaki.errors import InputError
from niwaki.granularity.base import Granularity
from niwaki.layout import Layout


class Eigenbasis(Granularity):
    """Rotated input and output units of a layer: directions, and no channels, in which the loss is curved independently.

    No mask can express their removal, as it changes the shape of the network: every layer becomes a bottleneck of a rotation, a smaller
    core and a rotation back. So ``niwaki.prune`` returns a copy of the model, and a sparsifier refuses this granularity.

    Attributes:
        cap: largest share of the rotated inputs, and of the rotated outputs, of one layer that goes. At least one of each stays.

    >>> Eigenbasis(cap=0.5).cap
    0.5
    """

    name = "eigenbasis"
    equation = "piece = one row, or one column, of W* = Q_G^T W Q_A, where A = Q_A diag(λ_A) Q_A^T and G = Q_G diag(λ_G) Q_G^T"
    source = "Wang C., Grosse, Fidler, Zhang 2019 (EigenDamage)"
    single_field = "cap"

    cap: float = Field(default=0.95, ge=0.0, le=1.0, allow_inf_nan=False)

    def block(self, layout: Layout) -> tuple[int, ...]:
        """Refuse: no piece of a tensor is meant.

        Raises:
            InputError: always.
        """
        self._refuse()

    def check(self, layout: Layout, name: str) -> bool:
        """Refuse: no tensor can be masked in these pieces.

        Raises:
            InputError: always.
        """
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise InputError(
            f"granularity {self.name}: rotated units cannot be masked, they are taken out of a copy of the model;"
            ' use niwaki.prune(model, "eigendamage", sparsity=..., data=..., loss=...)'
        )
