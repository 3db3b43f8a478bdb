"""Quadratic models of the loss: what second-order pruning knows of the Hessian, and of its inverse."""

from niwaki.curvature.base import Curvature, Vector
from niwaki.curvature.dense import DenseCurvature
from niwaki.curvature.kronecker import KroneckerCurvature
from niwaki.curvature.low_rank import LowRankCurvature
from niwaki.curvature.rows import RowsCurvature

__all__ = ["Curvature", "DenseCurvature", "KroneckerCurvature", "LowRankCurvature", "RowsCurvature", "Vector"]
