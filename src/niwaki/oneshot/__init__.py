"""Pretrained networks, pruned block by block: only the data of one block is in memory at a time."""

from niwaki.oneshot.blocks import Blocks, find_blocks
from niwaki.oneshot.blockwise import Blockwise, prune_blocks
from niwaki.oneshot.folder import prune_folder, read_masks
from niwaki.oneshot.layers import PrunedLayer
from niwaki.oneshot.lora import Delta, merge_adapter, merge_delta, read_adapter

__all__ = [
    "Blocks",
    "Blockwise",
    "Delta",
    "PrunedLayer",
    "find_blocks",
    "merge_adapter",
    "merge_delta",
    "prune_blocks",
    "prune_folder",
    "read_adapter",
    "read_masks",
]
