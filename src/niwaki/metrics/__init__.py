"""What a model costs: sizes and floating-point operations, as pure functions. Every number carries its definition."""

from niwaki.metrics.flops import Flops, LayerFlops, forward_flops, weight_uses
from niwaki.metrics.sizes import dense_bytes

__all__ = ["Flops", "LayerFlops", "dense_bytes", "forward_flops", "weight_uses"]
