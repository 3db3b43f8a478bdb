"""What a model costs and what it is worth, as pure functions. Every number carries its definition."""

from niwaki.metrics.flops import Flops, LayerFlops, forward_flops, weight_uses
from niwaki.metrics.sizes import dense_bytes
from niwaki.metrics.storage import Format, storage

__all__ = ["Flops", "Format", "LayerFlops", "dense_bytes", "forward_flops", "storage", "weight_uses"]
