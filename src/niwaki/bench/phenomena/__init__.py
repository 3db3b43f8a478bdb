"""Phenomena that the literature on sparsity tells of, each with an experiment that looks for it: seeded, resumable, with table and picture.

What is found is told as it is, also where it is not what was said.
"""

from collections.abc import Mapping

from niwaki.bench.phenomena.dense_sparse_dense import DENSE_SPARSE_DENSE
from niwaki.bench.phenomena.early_structure import EARLY_STRUCTURE
from niwaki.bench.phenomena.experiment import Experiment
from niwaki.bench.phenomena.large_sparse import LARGE_SPARSE
from niwaki.bench.phenomena.layer_collapse import LAYER_COLLAPSE
from niwaki.bench.phenomena.power_law import POWER_LAW
from niwaki.bench.phenomena.random_tickets import RANDOM_TICKETS

EXPERIMENTS: Mapping[str, Experiment] = {
    "early_structure": EARLY_STRUCTURE,
    "layer_collapse": LAYER_COLLAPSE,
    "random_tickets": RANDOM_TICKETS,
    "dense_sparse_dense": DENSE_SPARSE_DENSE,
    "large_sparse": LARGE_SPARSE,
    "power_law": POWER_LAW,
}
"""Phenomenon -> how it is looked for."""

__all__ = ["EXPERIMENTS", "Experiment"]
