"""Pretrained networks, pruned block by block: only the data of one block is in memory at a time."""
