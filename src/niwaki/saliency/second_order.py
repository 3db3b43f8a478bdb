"""Second-order scores: how the loss changes, to second order in the weights, when a piece is removed.

*Damage* sets a piece to zero and leaves the rest where it is: with the diagonal of H alone that is ½ Σ H_ii w². *Surgery* lets the rest
move to where the quadratic model of the loss is then smallest: ½ w_Qᵀ ([H⁻¹]_QQ)⁻¹ w_Q for a piece Q. The models differ in what
they know of H: see :mod:`niwaki.curvature`. The compensation ``obs`` moves the rest by the same model.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.curvature import Curvature, DenseCurvature, KroneckerCurvature, LowRankCurvature, RowsCurvature
from niwaki.errors import InputError
from niwaki.layout import Layout, from_matrix
from niwaki.saliency.base import Observation, Reduce, Saliency, Scored
from niwaki.statistics import (
    GradientBank,
    GradientSquare,
    Hessian,
    HessianDiagonal,
    InputGram,
    KroneckerFactors,
    Labels,
    Statistic,
    StepGradients,
)

Damping = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PositiveDamping = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Surgeon(Saliency):
    """Base: the smallest loss that the quadratic model has without a piece, over the smallest that it has with everything.

    With ``v = w - H⁻¹ g`` (g = 0 but for those that count the gradient): ``½ v_Qᵀ ([H⁻¹]_QQ)⁻¹ v_Q``, which is v² / (2 [H⁻¹]_ii) of a
    single weight. All pieces of one tensor must have the same size. Of units the weights that read them are scored: without those it is
    gone.
    """

    scored_on: ClassVar[Scored] = "inputs"

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores; zero where nothing is active.

        Raises:
            InputError: there is no curvature, or pieces of several weights differ in size.
        """
        if seen.curvature is None:
            raise InputError(f"saliency {self.name}: {seen.name!r} has no curvature at step {seen.step}")
        curvature = seen.curvature
        values = seen.weight.to(torch.float64) * mask(seen)
        if curvature.newton is not None:
            values = values - curvature.newton[seen.name].view(values.shape)
        pieces = reduce(values)
        if pieces.numel() == values.numel():
            return reduce(values.square() / (2 * curvature.inverse_diagonal(seen.name).view(values.shape)))
        index = reduce.rows(torch.arange(values.numel(), device=values.device).view(values.shape))
        return curvature.costs(seen.name, index, values.flatten()).view(pieces.shape)


class OptimalBrainSurgeon(Surgeon):
    """Loss after the removal of a piece and the best change of all other weights, by the exact Hessian of the loss over the data.

    For small networks: the Hessian of all targets together is one matrix. Where it is not positive definite, damping is raised until it is,
    which is told.

    Source: Hassibi & Stork 1992 (weights), Kurtic et al. 2022 (pieces).

    >>> import torch
    >>> from niwaki.curvature import DenseCurvature
    >>> from niwaki.saliency import Observation, OptimalBrainSurgeon
    >>> hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    >>> curvature = DenseCurvature(hessian, {"weight": torch.ones(2, dtype=torch.bool)})
    >>> seen = Observation("weight", torch.tensor([2.0, 1.0]), curvature=curvature)
    >>> OptimalBrainSurgeon().score(seen, lambda values: values)
    tensor([3.0000, 0.7500], dtype=torch.float64)
    """

    name = "obs"
    equation = "s = w² / (2 [H⁻¹]_ii), of a piece ½ w_Qᵀ ([H⁻¹]_QQ)⁻¹ w_Q"
    source = "Hassibi & Stork 1992"
    effort = "one backward pass a weight for the Hessian, n² numbers, and n³ operations for its inverse"
    advice = "networks of some thousand weights, and as the measure of what the others approximate"

    damping: Damping = 0.0
    """In shares of the mean diagonal."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The Hessian."""
        return (Hessian(),)

    def curvature(self, seen: Sequence[Observation]) -> Curvature:
        """Return the Hessian of all tensors together."""
        joint = seen[0].of(Hessian())
        rows = torch.cat([torch.arange(joint.matrix.shape[0])[joint.rows(one.name)] for one in seen])
        matrix = joint.matrix
        if rows.tolist() != list(range(len(matrix))):
            matrix = matrix[rows[:, None], rows]
        return DenseCurvature(matrix, masks(seen), self.damping)


class LayerwiseSurgeon(Surgeon):
    """Error of a layer's own outputs after the removal of a piece and the best change of the other weights of the same row.

    The error E ‖W' x - W x‖² is a quadratic function, so that the score is exact; it does not know what later layers make of it.

    Source: Dong, Chen, Pan 2017 (layer-wise OBS).

    >>> import torch
    >>> from niwaki.curvature import RowsCurvature
    >>> from niwaki.layout import Layout
    >>> from niwaki.saliency import LayerwiseSurgeon, Observation
    >>> layout, gram = Layout(("output", "input"), (1, 2)), torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]).double()
    >>> curvature = RowsCurvature({"weight": gram}, {"weight": layout}, {"weight": torch.ones(1, 2, dtype=torch.bool)})
    >>> LayerwiseSurgeon().score(Observation("weight", torch.tensor([[2.0, 1.0]]), curvature=curvature), lambda values: values)
    tensor([[6.0000, 1.5000]], dtype=torch.float64)
    """

    name = "l_obs"
    equation = "s = w² / (2 [H⁻¹]_ii), H = 2 E[x xᵀ] for each row; of a piece ½ w_Qᵀ ([H⁻¹]_QQ)⁻¹ w_Q"
    source = "Dong et al. 2017"
    effort = "forward passes only; inputs² numbers and inputs³ operations a tensor, for each row where masks differ"
    advice = "a trained network and few examples without labels, pruned layer by layer"

    damping: Damping = 1e-4
    """In shares of the mean diagonal."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Second moments of the inputs."""
        return (InputGram(),)

    def curvature(self, seen: Sequence[Observation]) -> Curvature:
        """Return the Hessians of all layers' own errors."""
        return RowsCurvature({one.name: one.of(InputGram()) for one in seen}, layouts(seen), masks(seen), self.damping)


class WoodFisher(Surgeon):
    """Loss after the removal of a piece and the best change of the rest of its block, by the empirical Fisher matrix.

    ``F = λ I + (1/m) Σ g gᵀ`` over m gradients, in blocks of consecutive weights of a tensor. Scores are comparable over the network.

    Source: Singh & Alistarh 2020.

    >>> import torch
    >>> from niwaki.saliency import Observation, WoodFisher
    >>> fisher = WoodFisher(damping=1.0)
    >>> seen = Observation("weight", torch.tensor([2.0, 1.0]), statistics={fisher.statistics[0]: torch.tensor([[3.0, 4.0]])})
    >>> seen = Observation("weight", seen.weight, curvature=fisher.curvature([seen]))
    >>> fisher.score(seen, lambda values: values)
    tensor([3.0588, 1.3000], dtype=torch.float64)
    """

    name = "woodfisher"
    equation = "s = w² / (2 [F⁻¹]_ii), F = λ I + (1/m) Σ g gᵀ in blocks; of a piece ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q"
    source = "Singh & Alistarh 2020"
    effort = "m gradients, 4 m bytes and m operations² a weight; never more than one matrix of m × m besides"
    advice = "trained networks, with little data: the best compromise of exactness and cost"

    block: Count | None = 2000
    """Weights of a block; None: a whole tensor."""
    gradients: Count = 400
    """How many: m."""
    samples_per_gradient: Count = 1
    """Examples whose mean loss one gradient is of."""
    damping: PositiveDamping = 1e-5
    """λ, as it is added to the diagonal."""
    labels: Labels = "given"
    """Targets of the data (empirical Fisher), or drawn from the model's own prediction (true Fisher)."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The gradients."""
        return (GradientBank(gradients=self.gradients, samples_per_gradient=self.samples_per_gradient, labels=self.labels),)

    def curvature(self, seen: Sequence[Observation]) -> Curvature:
        """Return the Fisher matrix of all tensors, in blocks."""
        banks = {one.name: one.of(self.statistics[0]) for one in seen}
        return LowRankCurvature(banks, masks(seen), self.damping, block=self.block, gradient=self._gradient(seen))

    def _gradient(self, seen: Sequence[Observation]) -> Mapping[str, Tensor] | None:
        return None


class WoodTaylor(WoodFisher):
    """WoodFisher for weights that are at no minimum: the gradient of the loss counts, too.

    The best loss without a piece less the best loss with everything, ``½ v_Qᵀ ([F⁻¹]_QQ)⁻¹ v_Q`` with ``v = w - F⁻¹ g``; the loss's own
    change is this less ``½ gᵀ F⁻¹ g``, which is the same for all pieces of all tensors.

    The step ``-F⁻¹ g`` to the model's minimum, which ``obs`` takes too, is as long as damping lets it: a gradient that few examples do not
    span divided by λ. So λ is much larger than woodfisher's, and with less of it the model is soon left behind.

    Source: Singh & Alistarh 2020.

    >>> import torch
    >>> from niwaki.saliency import Observation, WoodTaylor
    >>> fisher = WoodTaylor(damping=1.0)
    >>> statistics = {fisher.statistics[0]: torch.tensor([[3.0, 4.0]])}
    >>> seen = Observation("weight", torch.tensor([2.0, 1.0]), gradient=torch.tensor([3.0, 4.0]), statistics=statistics)
    >>> seen = Observation("weight", seen.weight, curvature=fisher.curvature([seen]))
    >>> fisher.score(seen, lambda values: values)
    tensor([2.7161, 0.9308], dtype=torch.float64)
    """

    name = "woodtaylor"
    equation = "s = (w - F⁻¹ g)_i² / (2 [F⁻¹]_ii), F as in woodfisher; of a piece ½ v_Qᵀ ([F⁻¹]_QQ)⁻¹ v_Q, v = w - F⁻¹ g"
    source = "Singh & Alistarh 2020"
    needs = frozenset({"gradient"})
    effort = "as woodfisher, and one gradient over all data"
    advice = "networks that are pruned while they still learn, in small steps and with much damping"

    damping: PositiveDamping = 1.0

    def _gradient(self, seen: Sequence[Observation]) -> Mapping[str, Tensor]:
        return {one.name: self._needed(one.gradient, one, "gradient").to(torch.float64) * mask(one) for one in seen}


class MatrixFreeFisher(Surgeon):
    """Loss after the removal of a piece and the best change of all other weights, by the empirical Fisher matrix of all tensors together.

    As WoodFisher with one single block, which no other method has the memory for: all goes through inner products of gradients.
    ``dynamic``: of the training's own last gradients, without a pass over data.

    Source: Frantar, Kurtic, Alistarh 2021 (M-FAC).

    >>> import torch
    >>> from niwaki.saliency import MatrixFreeFisher, Observation
    >>> fisher = MatrixFreeFisher(damping=1.0)
    >>> seen = Observation("weight", torch.tensor([2.0, 1.0]), statistics={fisher.statistics[0]: torch.tensor([[3.0, 4.0]])})
    >>> seen = Observation("weight", seen.weight, curvature=fisher.curvature([seen]))
    >>> fisher.score(seen, lambda values: values)
    tensor([3.0588, 1.3000], dtype=torch.float64)
    """

    name = "mfac"
    equation = "s = w² / (2 [F⁻¹]_ii), F = λ I + (1/m) Σ g gᵀ of all tensors together; of a piece ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q"
    source = "Frantar et al. 2021"
    effort = "m gradients, 4 m bytes and m operations² a weight"
    advice = "trained networks whose layers depend on each other; dynamic: pruning in the course of a training"

    gradients: Count = 512
    """How many: m."""
    samples_per_gradient: Count = 1
    """Examples whose mean loss one gradient is of."""
    damping: PositiveDamping = 1e-5
    """λ, as it is added to the diagonal."""
    labels: Labels = "given"
    """Targets of the data (empirical Fisher), or drawn from the model's own prediction (true Fisher)."""
    dynamic: bool = False
    """Whether the gradients are those of the last steps of the training."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The gradients."""
        if self.dynamic:
            return (StepGradients(window=self.gradients),)
        return (GradientBank(gradients=self.gradients, samples_per_gradient=self.samples_per_gradient, labels=self.labels),)

    def curvature(self, seen: Sequence[Observation]) -> Curvature:
        """Return the Fisher matrix of all tensors together."""
        return LowRankCurvature({one.name: one.of(self.statistics[0]) for one in seen}, masks(seen), self.damping, joint=True)


class KroneckerSurgeon(Surgeon):
    """Loss after the removal of a piece and the best change of the rest of its tensor, by the Kronecker-factored Fisher matrix.

    Source: Zeng & Urtasun 2019 (MLPrune), Wang, Grosse, Fidler, Zhang 2019.

    >>> import torch
    >>> from niwaki.curvature import KroneckerCurvature
    >>> from niwaki.layout import Layout
    >>> from niwaki.saliency import KroneckerSurgeon, Observation
    >>> layout, factors = Layout(("output", "input"), (1, 2)), (torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), torch.ones(1, 1, 1))
    >>> curvature = KroneckerCurvature({"weight": factors}, {"weight": layout}, {"weight": torch.ones(1, 2, dtype=torch.bool)}, damping=0.0)
    >>> KroneckerSurgeon().score(Observation("weight", torch.tensor([[2.0, 1.0]]), curvature=curvature), lambda values: values)
    tensor([[3.0000, 0.7500]], dtype=torch.float64)
    """

    name = "kfac_obs"
    equation = "s = w² / (2 [A⁻¹]_jj [G⁻¹]_ii), F ≈ A ⊗ G; of a piece ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q"
    source = "Zeng & Urtasun 2019; Wang et al. 2019"
    effort = "one pass over the data; inputs² + outputs² numbers, inputs³ + outputs³ operations a tensor"
    advice = "large layers, where many gradients do not fit"

    damping: Damping = 1e-5
    """λ, split between the two factors as in K-FAC."""
    labels: Labels = "sampled"
    """Targets of the data (empirical Fisher), or drawn from the model's own prediction (true Fisher)."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The Kronecker factors."""
        return (KroneckerFactors(labels=self.labels),)

    def curvature(self, seen: Sequence[Observation]) -> Curvature:
        """Return the Kronecker-factored Fisher matrix of every tensor."""
        return KroneckerCurvature({one.name: one.of(self.statistics[0]) for one in seen}, layouts(seen), masks(seen), self.damping)


class OptimalBrainDamage(Saliency):
    """Change of the loss when a piece is set to zero and nothing else moves, by the diagonal of the Hessian.

    Of units the weights that read them are summed (optimal cell damage). The diagonal and its ``hutchinson`` estimate may be negative where
    the loss is at no minimum; ``gauss_newton`` and ``fisher`` (mean squared gradients of single examples) never are.

    Source: LeCun, Denker, Solla 1989; Cibas et al. 1996 (units); Theis et al. 2018 (Fisher).

    >>> import torch
    >>> from niwaki.saliency import Observation, OptimalBrainDamage
    >>> damage = OptimalBrainDamage(estimate="exact")
    >>> seen = Observation("weight", torch.tensor([2.0, 1.0]), statistics={damage.statistics[0]: torch.tensor([1.0, 3.0])})
    >>> damage.score(seen, lambda values: values)
    tensor([2.0000, 1.5000], dtype=torch.float64)
    """

    name = "obd"
    equation = "s = ½ Σ H_ii w² over the piece"
    source = "LeCun et al. 1989; Cibas et al. 1996"
    scored_on: ClassVar[Scored] = "inputs"
    effort = "one number a weight; exact: a backward pass a weight, estimates: two a probe, fisher: one an example"
    advice = "cheap curvature without compensation"
    single_field: ClassVar[str | None] = "estimate"

    estimate: Literal["exact", "hutchinson", "gauss_newton", "fisher"] = "gauss_newton"
    probes: Count = 32
    """Random vectors of ``hutchinson`` and ``gauss_newton``."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The diagonal."""
        return (GradientSquare(),) if self.estimate == "fisher" else (HessianDiagonal(estimate=self.estimate, probes=self.probes),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores."""
        return reduce(seen.of(self.statistics[0]).to(torch.float64) * seen.weight.to(torch.float64).square() / 2)


class KroneckerDamage(Saliency):
    """Change of the loss when a piece is set to zero and nothing else moves, by the diagonal of the Kronecker-factored Fisher matrix.

    Source: Wang, Grosse, Fidler, Zhang 2019.

    >>> import torch
    >>> from niwaki.layout import Layout
    >>> from niwaki.saliency import KroneckerDamage, Observation
    >>> damage, layout = KroneckerDamage(), Layout(("output", "input"), (1, 2))
    >>> factors = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]]), torch.full((1, 1, 1), 2.0)
    >>> seen = Observation("weight", torch.tensor([[2.0, 1.0]]), layout=layout, statistics={damage.statistics[0]: factors})
    >>> damage.score(seen, lambda values: values)
    tensor([[8., 3.]], dtype=torch.float64)
    """

    name = "kfac_obd"
    equation = "s = ½ Σ A_jj G_ii w² over the piece, F ≈ A ⊗ G"
    source = "Wang et al. 2019"
    scored_on: ClassVar[Scored] = "inputs"
    effort = "one pass over the data; inputs² + outputs² numbers a tensor"
    advice = "beside kfac_obs, to see what its compensation is worth"

    labels: Labels = "sampled"
    """Targets of the data (empirical Fisher), or drawn from the model's own prediction (true Fisher)."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The Kronecker factors."""
        return (KroneckerFactors(labels=self.labels),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores."""
        inputs, outputs = (factor.to(torch.float64).diagonal(dim1=-2, dim2=-1) for factor in seen.of(self.statistics[0]))
        diagonal = from_matrix(outputs[:, :, None] * inputs[:, None, :], layouts([seen])[seen.name])
        return reduce(diagonal * seen.weight.to(torch.float64).square().view(diagonal.shape) / 2)


def mask(seen: Observation) -> Tensor:
    """Return which weights of an observation are active (bool, in its view)."""
    return torch.ones_like(seen.weight, dtype=torch.bool) if seen.active is None else seen.active.view(seen.weight.shape)


def masks(seen: Sequence[Observation]) -> dict[str, Tensor]:
    """Return which weights of each tensor are active."""
    return {one.name: mask(one) for one in seen}


def layouts(seen: Sequence[Observation]) -> dict[str, Layout]:
    """Return the layout of each tensor.

    Raises:
        InputError: one has none.
    """
    for one in seen:
        if one.layout is None:
            raise InputError(f"{one.name}: its layout is needed, to tell its rows from its columns")
    return {one.name: one.layout for one in seen if one.layout is not None}
