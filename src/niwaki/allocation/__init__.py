"""How many pieces each layer keeps, so that all layers together keep exactly what the sparsity asks for. One file a family.

An allocation gives every layer a quota; pieces are whole, so the quotas become counts by the largest remainder. Numbers are Python
floats (float64) throughout: float32 counts are wrong from 2^24 pieces on, and often before.
"""

from niwaki.allocation.amc import Amc
from niwaki.allocation.base import Allocation, Evidence
from niwaki.allocation.costs import LatencyTable
from niwaki.allocation.dynamic_programming import DynamicProgramming, LatencyBudget
from niwaki.allocation.erdos_renyi import ErdosRenyi, ErdosRenyiKernel
from niwaki.allocation.evolutionary import Evolutionary
from niwaki.allocation.explicit import Explicit
from niwaki.allocation.flops_budget import FlopsBudget
from niwaki.allocation.joint import Global
from niwaki.allocation.layer import Layer
from niwaki.allocation.ratios import SmartRatio, UniformPlus
from niwaki.allocation.redistribution import Redistribution
from niwaki.allocation.scored import ErrorBound, OutlierWeighted, PrincipalFilters
from niwaki.allocation.sensitivity import Sensitivity
from niwaki.allocation.sharing import bounded, capped_proportional, guard, largest_remainder, row_counts, solved
from niwaki.allocation.uniform import Uniform

__all__ = [
    "Allocation",
    "Amc",
    "DynamicProgramming",
    "ErdosRenyi",
    "ErdosRenyiKernel",
    "ErrorBound",
    "Evidence",
    "Evolutionary",
    "Explicit",
    "FlopsBudget",
    "Global",
    "LatencyBudget",
    "LatencyTable",
    "Layer",
    "OutlierWeighted",
    "PrincipalFilters",
    "Redistribution",
    "Sensitivity",
    "SmartRatio",
    "Uniform",
    "UniformPlus",
    "bounded",
    "capped_proportional",
    "guard",
    "largest_remainder",
    "row_counts",
    "solved",
]
