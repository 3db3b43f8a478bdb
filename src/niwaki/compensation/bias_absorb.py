"""What removed inputs gave on average goes into the bias."""

from torch import Tensor

from niwaki.compensation.base import Change, Compensation, Removal
from niwaki.errors import InputError
from niwaki.layout import matrix
from niwaki.statistics import InputMean, Statistic


class BiasAbsorb(Compensation):
    """Adds to each bias what the removed weights gave on average: outputs keep their means.

    Exact for inputs that are constant. The mean is over the data, in evaluation mode; where a convolution pads, it is that of the inside.
    Of units, the weights that read them lose entries, and their biases change; those of the units themselves go with them. A layer without
    a bias, often one in front of a normalization, cannot take anything up, and is told; ``batchnorm_recalibration`` then helps.

    Source: Sietsma & Dow 1988, 1991 (constant units).

    >>> import torch
    >>> from niwaki.layout import Layout
    >>> layout, weight = Layout(("output", "input"), (1, 2)), torch.tensor([[3.0, 4.0]])
    >>> means = {InputMean(): torch.tensor([[0.5, 2.0]])}
    >>> change = Change("fc.weight", layout, weight, weight != 0, weight > 3, means, torch.ones(1), "fc.bias")
    >>> BiasAbsorb().compensate(Removal({"fc.weight": change}))
    {'fc.bias': tensor([2.5000], dtype=torch.float64)}
    """

    name = "bias_absorb"
    equation = "b_o <- b_o + Σ_j w_oj E[x_j] over the removed weights"
    source = "Sietsma & Dow 1991"
    effort = "one forward pass over the data; a number for each input"
    advice = "inputs that hardly vary; harmless elsewhere"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The mean of each input."""
        return (InputMean(),)

    def compensate(self, removal: Removal) -> dict[str, Tensor]:
        """Return the biases, float64.

        Raises:
            InputError: the means of a tensor were not collected.
        """
        found: dict[str, Tensor] = {}
        without = []
        for change in removal.changes.values():
            if InputMean() not in change.statistics:
                if removal.units:
                    continue  # it makes units that go, and reads none
                raise InputError(f"compensation {self.name}: the means of what {change.name} reads were not collected")
            lost = _lost(change, of_units=bool(removal.units))
            if not lost.any():
                continue
            if change.bias is None or change.bias_name is None:
                without.append(change.name)
            else:
                found[change.bias_name] = found.get(change.bias_name, change.bias.to(lost)) + lost
        if without:
            removal.notes.append(
                f"compensation {self.name}: {', '.join(without)} {'has' if len(without) == 1 else 'have'} no bias that could take up what"
                " the removed inputs gave on average"
            )
        return found


def _lost(change: Change, of_units: bool) -> Tensor:
    """Return what the removed weights gave on average, float64 ``[outputs]``; of units, 0 for outputs that go themselves."""
    removed = change.active & ~change.keep
    mean = change.statistics[InputMean()].to(change.weight.device)
    lost = matrix(removed * change.weight.double() * mean, change.layout).sum(dim=2).flatten()
    if of_units:
        lost = lost.where(matrix(change.keep, change.layout).any(dim=2).flatten(), 0.0)
    return lost
