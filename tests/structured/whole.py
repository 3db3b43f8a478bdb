"""Small models of many kinds, masks of whole units, and what must hold of a smaller model."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from niwaki.dependency import Group
from niwaki.masks import Masks
from niwaki.structured import replay, shrink


def randomized(model, seed=0):
    """Random float64 numbers in every parameter and statistic, so that nothing cancels by luck; positive variances."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return model


def masks_of(model: nn.Module, groups: Sequence[Group], kinds: Sequence[str], share: float = 0.5, seed: int = 1) -> Masks:
    """Mask a share of the units of every removable group of some kinds, in all of its members, whichever units."""
    parameters = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    for group in groups:
        if group.removable and group.kind in kinds:
            gone = torch.randperm(group.size, generator=generator)[: int(group.size * share)]
            for member in group.members:
                if member.name in parameters:
                    parameters[member.name].movedim(member.dim, 0)[torch.isin(member.units, gone)] = False
    return Masks(parameters)


def masked(model, masks):
    other = copy.deepcopy(model).eval()
    masks.apply_(other)
    return other


def outputs(model, inputs):
    found = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return found if isinstance(found, torch.Tensor) else found[0]


def check(model, masks, example, other, **options):
    """Shrink on one input; compare with the masked model on another, and a replayed fresh model with the smaller one."""
    before = copy.deepcopy(model.state_dict())
    smaller = shrink(model, masks, example, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    got = outputs(smaller.model.eval(), other)
    torch.testing.assert_close(got, outputs(masked(model, masks), other), rtol=1e-10, atol=1e-10)
    fresh = replay(randomized(copy.deepcopy(model), seed=5), smaller.removed)
    fresh.load_state_dict(smaller.model.state_dict())
    assert torch.equal(outputs(fresh.eval(), other), got)
    assert repr(fresh) == repr(smaller.model)
    for name, mask in smaller.masks.items():
        assert mask.shape == smaller.model.get_parameter(name).shape
    return smaller


class Attention(nn.Module):
    """Heads by hand, with queries, keys and values in one layer, and groups of queries that share keys and values."""

    def __init__(self, width=12, heads=4, key_heads=2, size=3):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, key_heads, size
        self.qkv = nn.Linear(width, (heads + 2 * key_heads) * size)
        self.proj = nn.Linear(heads * size, width)
        self.scale = size**-0.5

    def forward(self, x):
        batch, tokens, _ = x.shape
        sizes = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        q, k, v = (y.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for y in self.qkv(x).split(sizes, dim=-1))
        k, v = (y.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for y in (k, v))
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


class Block(nn.Module):
    def __init__(self, width=12, key_heads=2):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width, key_heads=key_heads), nn.LayerNorm(width)
        self.up, self.gate, self.down = nn.Linear(width, 10), nn.Linear(width, 10), nn.Linear(10, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Tokens(nn.Module):
    """A transformer."""

    def __init__(self, blocks=3, key_heads=2):
        super().__init__()
        self.depth = blocks
        self.embedding, self.blocks = nn.Embedding(11, 12), nn.ModuleList(Block(key_heads=key_heads) for _ in range(blocks))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.embedding, self.cells = nn.Embedding(11, 8), kind(8, 6, batch_first=True, **options)
        self.head = nn.Linear(6 * (1 + self.cells.bidirectional), 3)

    def forward(self, x):
        return self.head(self.cells(self.embedding(x))[0][:, -1])


class Inverted(nn.Module):
    """A depthwise convolution with squeeze and excitation, in a residual block, as in MobileNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.expand, self.norm1 = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project, self.norm3 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.norm0(self.stem(x)))
        y = F.silu(self.norm2(self.depthwise(F.silu(self.norm1(self.expand(x))))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head((x + self.norm3(self.project(y))).mean((2, 3)))


class Dense(nn.Module):
    """Concatenations, a group normalization, a grouped and a transposed convolution, slopes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.norm, self.grouped = nn.GroupNorm(4, 12), nn.Conv2d(12, 8, 1, groups=4)
        self.up, self.slopes, self.head = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.PReLU(6), nn.Linear(6, 3)

    def forward(self, x):
        y = F.relu(self.a(x))
        y = torch.cat([y, F.relu(self.b(torch.cat([x, y], dim=1)))], dim=1)
        y = self.slopes(self.up(F.relu(self.grouped(self.norm(y)))))
        return self.head(y.mean((2, 3)))
