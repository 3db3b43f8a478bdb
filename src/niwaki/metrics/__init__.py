"""What a model costs: sizes and floating-point operations, as pure functions. Every number carries its definition."""

from niwaki.metrics.flops import Flops, LayerFlops, forward_flops, weight_uses
from niwaki.metrics.sizes import Counts, count_parameters, dense_bytes

__all__ = ["Counts", "Flops", "LayerFlops", "count_parameters", "dense_bytes", "forward_flops", "weight_uses"]
