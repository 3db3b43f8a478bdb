"""Networks for text, in plain torch, with separate linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _EncoderBlock(nn.Module):
    """Pre-normalization self-attention and a feed-forward network of four times the width, both with dropout."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        y = self.norm1(x)
        query, key, value = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None, None, :])
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        out: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))
        return out


class Encoder(nn.Module):
    """A transformer encoder (Vaswani et al. 2017) with learned positions that classifies by the mean over a sentence's tokens.

    Input ``[batch, length]`` of token numbers, filled up with ``padding``, which no token attends to and the mean leaves out; every
    sentence has at least one other token. Output ``[batch, classes]``.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        classes: int = 2,
        *,
        padding: int = 0,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=padding)
        self.position = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_EncoderBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of the classes for a batch of sentences."""
        visible = tokens != self.padding
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.embedding(tokens) + self.position(positions))
        for block in self.blocks:
            x = block(x, visible)
        weights = visible.to(x.dtype).unsqueeze(-1)
        mean = (self.norm(x) * weights).sum(dim=1) / weights.sum(dim=1)
        out: Tensor = self.output(mean)
        return out
