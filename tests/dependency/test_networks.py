"""Groups of networks of all kinds: the expected ones, and that a model cut by hand along them computes what the masked one does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cutting import Numbers, cut, masked, scrambled, some_units
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from niwaki.dependency import Groups, find_groups


class Net(nn.Module):
    """Modules by name, and what to do with them."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            if isinstance(module, Tensor) and not isinstance(module, nn.Parameter):
                self.register_buffer(name, module)
            else:
                setattr(self, name, module)

    def forward(self, *args: Tensor) -> Any:
        return self.run(self, *args)


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


IMAGE = (2, 3, 8, 8)
VECTOR = (3, 5)
SEQUENCE = (2, 6, 8)


@dataclass(frozen=True)
class Case:
    """A network, the shapes of its inputs, its removable groups as kind and size, and what no shape tells after a cut."""

    build: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    groups: Mapping[str, tuple[str, int]]
    numbers: Numbers = field(default=lambda net, left: {})


def channels(**sizes: int) -> dict[str, tuple[str, int]]:
    return {name.replace("__", "."): ("channel", size) for name, size in sizes.items()}


# ---------------------------------------------------------------- networks


def residual() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = x + net.two(F.relu(net.norm(net.one(x))))
        return net.head((x + net.scale[:, None, None] * net.three(x)).mean((2, 3)))

    return Net(
        run,
        **{"stem": conv(3, 6), "one": conv(6, 8), "norm": nn.BatchNorm2d(8), "two": conv(8, 6), "three": conv(6, 6)},
        **{"scale": nn.Parameter(torch.ones(6)), "head": nn.Linear(6, 2)},
    )


def concatenation() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        b = net.b(torch.cat([x, a], dim=1))
        return net.head(net.norm(torch.cat([b, a], dim=1)).relu().mean((2, 3)))

    return Net(run, a=conv(3, 4), b=conv(7, 6), norm=nn.BatchNorm2d(10), head=nn.Linear(10, 2))


def halves() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        a, b = net.first(x).chunk(2, dim=-1)
        gate, value = net.second(a * torch.tanh(b)).split(len(net.second.bias) // 2, dim=-1)
        return net.head(F.silu(gate) * value)

    return Net(run, first=nn.Linear(5, 8), second=nn.Linear(4, 12), head=nn.Linear(6, 2))


def gated_linear_unit() -> nn.Module:
    return Net(lambda net, x: net.head(F.glu(net.first(x))), first=nn.Linear(5, 8), head=nn.Linear(4, 2))


def flattened() -> nn.Module:
    return nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(24, 2))


def depthwise() -> nn.Module:
    return nn.Sequential(
        conv(3, 6, 1), conv(6, 6, groups=6, dilation=1), nn.BatchNorm2d(6), nn.ReLU6(), conv(6, 12, groups=6), conv(12, 2, 1)
    )


def depthwise_numbers(net: Any, left: Mapping[str, int]) -> dict[str, int]:
    width = net[0].weight.shape[0]
    return {"1.groups": width, "4.groups": width}


def grouped() -> nn.Module:
    return nn.Sequential(conv(3, 8, 1), conv(8, 12, groups=4), nn.ReLU(), conv(12, 2, 1))


def transposed() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 6, 3), nn.ConvTranspose1d(6, 8, 2, stride=2), nn.ReLU(), nn.ConvTranspose1d(8, 2, 3))


def transposed_grouped() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), nn.ReLU(), conv(8, 2))


def normalizations() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), nn.ReLU(), conv(8, 6), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), conv(6, 2))


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6), nn.RMSNorm(6), nn.Linear(6, 2))


def squeeze_and_excite() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        x = net.first(x)
        scale = net.up(net.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return net.last(x * scale)

    return Net(run, first=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), last=conv(8, 2))


def option_a() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        x = net.first(x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return net.last(shortcut + net.second(x))

    return Net(run, first=conv(3, 6), second=conv(6, 10, stride=2), last=conv(10, 2))


def shuffles() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(net.first(x), 2)
        return net.last(F.pixel_unshuffle(net.second(x).relu(), 2))

    return Net(run, first=conv(3, 16), second=conv(4, 6), last=conv(24, 2))


def channel_shuffle() -> nn.Module:
    return nn.Sequential(conv(3, 8, 1), nn.ChannelShuffle(2), nn.ReLU(), conv(8, 2, 1))


def unet() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        skip = net.down(x).relu()
        x = net.bottom(F.max_pool2d(skip, 2)).relu()
        return net.up(torch.cat([F.interpolate(x, scale_factor=2, mode="bilinear"), skip], dim=1))

    return Net(run, down=conv(3, 6), bottom=conv(6, 8), up=conv(14, 2))


def embeddings() -> nn.Module:
    """A tied head after a projection; the position table is sliced."""

    def run(net: Any, tokens: Tensor) -> Tensor:
        x = net.tokens(tokens) + net.positions[: tokens.shape[1]]
        return F.linear(net.middle(net.inner(x).relu()), net.tokens.weight)

    return Net(run, tokens=nn.Embedding(11, 6), positions=nn.Parameter(torch.randn(9, 6)), inner=nn.Linear(6, 8), middle=nn.Linear(8, 6))


class Attention(nn.Module):
    """Attention with any number of key heads; its projections apart, or together in any order."""

    def __init__(self, kind: str, heads: int = 4, keys: int = 4) -> None:
        super().__init__()
        self.kind, self.heads, self.keys, self.key_dim, self.value_dim = kind, heads, keys, 3, 3
        self.scale = 3**-0.5
        if kind == "apart":
            self.q, self.k, self.v = nn.Linear(8, heads * 3), nn.Linear(8, keys * 3), nn.Linear(8, keys * 3)
        else:
            self.qkv = nn.Linear(8, (heads + 2 * keys) * 3)
        self.out = nn.Linear(heads * 3, 2)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.kind == "apart":
            queries, keys = (self.heads, -1), (self.keys, -1)
            return self.q(x).unflatten(-1, queries), self.k(x).unflatten(-1, keys), self.v(x).unflatten(-1, keys)
        x = self.qkv(x)
        if self.kind == "three, heads, dimensions":
            return x.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if self.kind == "queries, keys, values":
            sizes = [self.heads * self.key_dim, self.keys * self.key_dim, self.keys * self.value_dim]
            return tuple(
                part.unflatten(-1, (n, -1)) for n, part in zip((self.heads, self.keys, self.keys), x.split(sizes, -1), strict=True)
            )
        if self.kind == "heads, parts":
            return x.unflatten(-1, (self.heads, -1)).split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        if self.kind == "heads, three, dimensions":
            x = x.unflatten(-1, (self.heads, 3, -1))
            return x[..., 0, :], x[..., 1, :], x[..., 2, :]
        assert self.kind == "queries and one key"
        x = x.unflatten(-1, (self.heads + 2, -1))
        return x[..., :-2, :], x[..., [-2], :], x[..., [-1], :]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.split(x))
        if self.keys not in (1, self.heads):
            k, v = (t[:, :, None].expand(-1, -1, self.heads // self.keys, -1, -1).flatten(1, 2) for t in (k, v))
        y = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def attention(kind: str, keys: int = 4, **groups: int) -> Case:
    """Return a case of which the groups are called after the first projection."""
    first = "q" if kind == "apart" else "qkv"
    found = {name.replace("__", ":"): (name.rpartition("__")[2].partition("[")[0], size) for name, size in groups.items()}

    def numbers(net: Any, left: Mapping[str, int]) -> dict[str, int]:
        heads = left.get(f"{first}:head", 4 if keys in (1, 4) else keys)
        queries = heads if keys in (1, 4) else heads * left.get(f"{first}:query_head", 4 // keys)
        dims = net.out.weight.shape[1] // queries
        return {"heads": queries, "keys": heads if keys > 1 else 1, "key_dim": left.get(f"{first}:head_dim", 3), "value_dim": dims}

    return Case(lambda: Attention(kind, 4, keys), (SEQUENCE,), found, numbers)


def packaged_attention() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        x = net.first(x)
        return net.last(net.attention(x, x, x)[0])

    return Net(run, first=nn.Linear(8, 12), attention=nn.MultiheadAttention(12, 3, batch_first=True), last=nn.Linear(12, 2))


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        width = (options.get("proj_size") or 6) * (2 if options.get("bidirectional") else 1)
        return Net(lambda net, x: net.head(net.rnn(x)[0]), rnn=kind(8, 6, batch_first=True, **options), head=nn.Linear(width, 2))

    return build


def recurrent_numbers(net: Any, left: Mapping[str, int]) -> dict[str, Any]:
    rnn = net.rnn
    rnn._flat_weights = [getattr(rnn, name) for name in rnn._flat_weights_names]
    rows = {"RNN_TANH": 1, "LSTM": 4, "GRU": 3}[rnn.mode]
    projected = {"rnn.proj_size": rnn.weight_hr_l0.shape[0]} if rnn.proj_size else {}
    return {"rnn.hidden_size": rnn.weight_hh_l0.shape[0] // rows, **projected}


def window_attention() -> nn.Module:
    """Windows of two by two, heads, and a table of relative positions that an index buffer looks into (Swin)."""
    index = torch.randint(9, (4, 4))

    def run(net: Any, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, 8).transpose(2, 3).reshape(-1, 4, 8)
        q, k, v = (layer(x).unflatten(-1, (net.heads, -1)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        bias = net.table[net.index.flatten()].view(4, 4, -1).permute(2, 0, 1)
        y = ((q @ k.transpose(-1, -2) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return net.out(y).view(batch, height // 2, width // 2, 2, 2, 2).transpose(2, 3).reshape(batch, height, width, 2)

    tables = {"table": nn.Parameter(torch.randn(9, 4)), "index": index}
    net = Net(run, q=nn.Linear(8, 12), k=nn.Linear(8, 12), v=nn.Linear(8, 12), out=nn.Linear(12, 2), **tables)
    net.heads = 4  # type: ignore[assignment]
    return net


def listed_experts() -> nn.Module:
    """Every expert is a module of its own; which one a row goes to depends on the data."""

    def run(net: Any, x: Tensor) -> Tensor:
        chosen = net.router(x).argmax(-1)
        out = torch.zeros(len(x), 2, dtype=x.dtype)
        for i, expert in enumerate(net.experts):
            rows = (chosen == i).nonzero().flatten()
            if len(rows):
                out.index_add_(0, rows, expert(x[rows]))
        return out

    expert = [nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(2)]
    return Net(run, router=nn.Linear(5, 2), experts=nn.ModuleList(expert))


def fused_experts() -> nn.Module:
    """All experts in three-dimensional parameters, mixed by the router's weights."""

    def run(net: Any, x: Tensor) -> Tensor:
        gate, up = torch.einsum("nd,edf->enf", x, net.gate_up).chunk(2, dim=-1)
        y = torch.bmm(F.silu(gate) * up, net.down)
        return torch.einsum("ne,eno->no", net.router(x).softmax(-1), y)

    return Net(run, router=nn.Linear(5, 3), gate_up=nn.Parameter(torch.randn(3, 5, 12)), down=nn.Parameter(torch.randn(3, 6, 2)))


def einsum() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnd,dhk->bnhk", x, weight) for weight in (net.q, net.k, net.v))
        scores = torch.einsum("bnhk,bmhk->bhnm", q, k).softmax(-1)
        return torch.einsum("bnhk,hko->bno", torch.einsum("bhnm,bmhk->bnhk", scores, v), net.out)

    weights = {name: nn.Parameter(torch.randn(8, 4, 3)) for name in ("q", "k", "v")}
    return Net(run, **weights, out=nn.Parameter(torch.randn(4, 3, 2)))


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.ReLU(), parametrizations.weight_norm(nn.Linear(6, 2)))


def low_rank() -> nn.Module:
    """A weight that is the product of two parameters (LoRA), added to one."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(F.linear(x, net.base.weight + net.b @ net.a, net.base.bias).relu())

    return Net(run, base=nn.Linear(5, 8), a=nn.Parameter(torch.randn(4, 5)), b=nn.Parameter(torch.randn(8, 4)), head=nn.Linear(8, 2))


def layer_scale() -> nn.Module:
    """LayerScale and stochastic depth (ConvNeXt)."""

    class DropPath(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rand(len(x), 1).bernoulli() if self.training else x

    def run(net: Any, x: Tensor) -> Tensor:
        x = net.first(x)
        return net.last(x + net.drop(net.scale * net.down(F.gelu(net.up(x)))))

    layers = {"first": nn.Linear(5, 6), "up": nn.Linear(6, 8), "down": nn.Linear(8, 6), "last": nn.Linear(6, 2)}
    return Net(run, **layers, scale=nn.Parameter(torch.ones(6)), drop=DropPath())


def views() -> nn.Module:
    """Channels as two factors, transposed, flattened together with positions, and back."""

    def run(net: Any, x: Tensor) -> Tensor:
        x = net.first(x).unflatten(1, (net.parts, -1)).transpose(1, 2)
        x = x.reshape(len(x), -1, 8, 8).flatten(2).transpose(1, 2)
        return net.last(x.unsqueeze(1).expand(-1, 2, -1, -1).sum(1))

    net = Net(run, first=conv(3, 8), last=nn.Linear(8, 2))
    net.parts = 2  # type: ignore[assignment]
    return net


def written_in_place() -> nn.Module:
    """A result is written piece by piece into zeros."""

    def run(net: Any, x: Tensor) -> Tensor:
        a, b = net.a(x), net.b(x)
        out = x.new_zeros(len(x), a.shape[1] + b.shape[1])
        out[:, : a.shape[1]] = a
        out[:, a.shape[1] :] = b
        out.relu_()
        return net.head(out)

    return Net(run, a=nn.Linear(5, 4), b=nn.Linear(5, 6), head=nn.Linear(10, 2))


def thrown_away() -> nn.Module:
    """The mean over hidden units would be in the way, if anybody read it."""

    def run(net: Any, x: Tensor) -> Tensor:
        x = net.first(x)
        x.mean(-1)
        return net.last(x)

    return Net(run, first=nn.Linear(5, 6), last=nn.Linear(6, 2))


def mixed_tokens() -> nn.Module:
    """An MLP over positions and one over channels (Mixer)."""

    def run(net: Any, x: Tensor) -> Tensor:
        x = x + net.tokens_out(net.tokens_in(x.transpose(1, 2)).relu()).transpose(1, 2)
        return x + net.channels_out(net.channels_in(x).relu())

    layers = {
        "tokens_in": nn.Linear(6, 4),
        "tokens_out": nn.Linear(4, 6),
        "channels_in": nn.Linear(8, 10),
        "channels_out": nn.Linear(10, 8),
    }
    return Net(run, **layers)


def heads(*names: str) -> dict[str, tuple[str, int]]:
    return {name: (name.rpartition(":")[2], 4 if name.endswith(":head") else 3) for name in names}


CASES: Mapping[str, Case] = {
    "residual sums": Case(residual, (IMAGE,), channels(stem=6, one=8)),
    "concatenation": Case(concatenation, (IMAGE,), channels(a=4, b=6)),
    "chunk and split": Case(halves, (VECTOR,), channels(first=4, second=6)),
    "glu": Case(gated_linear_unit, (VECTOR,), channels(first=4)),
    "flatten": Case(flattened, (IMAGE,), {"0": ("channel", 6)}),
    "depthwise": Case(depthwise, (IMAGE,), {"0": ("channel", 6), "4": ("channel", 2)}, depthwise_numbers),
    "grouped": Case(
        grouped,
        (IMAGE,),
        {"0:channel_group": ("channel_group", 4), "0": ("channel", 2), "1": ("channel", 3)},
        lambda net, left: {"1.groups": net[0].weight.shape[0] // net[1].weight.shape[1]},
    ),
    "transposed 1d": Case(transposed, ((2, 3, 9),), {"0": ("channel", 6), "1": ("channel", 8)}),
    "transposed depthwise": Case(
        transposed_grouped, (IMAGE,), {"0": ("channel", 8)}, lambda net, left: {"1.groups": net[1].weight.shape[0]}
    ),
    "group and instance norm": Case(
        normalizations,
        (IMAGE,),
        {"0": ("channel", 4), "3": ("channel", 6)},
        lambda net, left: {"1.num_groups": len(net[1].weight) // 2, "4.num_features": len(net[4].weight)},
    ),
    "layer and rms norm": Case(layer_norm, (VECTOR,), {"2": ("channel", 8)}),
    "squeeze and excite": Case(squeeze_and_excite, (IMAGE,), channels(first=8, down=4)),
    "option a": Case(option_a, (IMAGE,), channels(first=6)),
    "pixel shuffles": Case(shuffles, (IMAGE,), channels(first=4, second=6)),
    "channel shuffle": Case(
        channel_shuffle, (IMAGE,), {"0": ("channel", 2), "0[0:8]": ("channel", 4)}, lambda net, left: {"1.groups": left.get("0", 2)}
    ),
    "u-net": Case(unet, (IMAGE,), channels(down=6, bottom=8)),
    "embeddings": Case(embeddings, ((2, 7),), channels(tokens=6, inner=8)),
    "mixer": Case(mixed_tokens, (SEQUENCE,), channels(tokens_in=4, channels_in=10)),
    "torch's own attention": Case(packaged_attention, (SEQUENCE,), {}),  # its heads × dimensions must be its inputs
    "attention": attention("apart", q__head=4, q__head_dim=3, v__head_dim=3),
    "grouped-query attention": attention("apart", 2, q__head=2, q__query_head=2, q__head_dim=3, v__head_dim=3),
    "multi-query attention": attention("apart", 1, q__head=4, q__head_dim=3, v__head_dim=3),
    "rnn": Case(recurrent(nn.RNN), (SEQUENCE,), {"rnn.weight_ih_l0": ("channel", 6)}, recurrent_numbers),
    "lstm": Case(recurrent(nn.LSTM), (SEQUENCE,), {"rnn.weight_ih_l0": ("channel", 6)}, recurrent_numbers),
    "gru": Case(recurrent(nn.GRU), (SEQUENCE,), {"rnn.weight_ih_l0": ("channel", 6)}, recurrent_numbers),
    "lstm, two layers, bidirectional, projected": Case(
        recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=4),
        (SEQUENCE,),
        {"rnn.weight_ih_l0": ("channel", 6), "rnn.weight_hr_l0": ("channel", 4)},  # one number is the width of all
        recurrent_numbers,
    ),
    "gru, two layers, bidirectional": Case(
        recurrent(nn.GRU, num_layers=2, bidirectional=True), (SEQUENCE,), {"rnn.weight_ih_l0": ("channel", 6)}, recurrent_numbers
    ),
    **{
        f"fused: {kind}; {keys} keys": attention(kind, keys, **groups)
        for kind, keys, groups in (
            ("three, heads, dimensions", 4, {"qkv__head": 4, "qkv__head_dim": 3}),
            ("queries, keys, values", 4, {"qkv__head": 4, "qkv__head_dim": 3, "qkv__head_dim[24:36]": 3}),
            ("queries, keys, values", 2, {"qkv__head": 2, "qkv__query_head": 2, "qkv__head_dim": 3, "qkv__head_dim[18:24]": 3}),
            ("heads, parts", 4, {"qkv__head": 4, "qkv__head_dim": 3, "qkv__head_dim[6:36]": 3}),
            ("heads, three, dimensions", 4, {"qkv__head": 4, "qkv__head_dim": 3}),
            ("queries and one key", 1, {"qkv__head": 4, "qkv__head_dim": 3}),
        )
    },
    "window attention": Case(
        window_attention,
        ((2, 4, 4, 8),),
        heads("q:head", "q:head_dim", "v:head_dim"),
        lambda net, left: {"heads": left.get("q:head", 4)},
    ),
    "listed experts": Case(listed_experts, (VECTOR,), channels(experts__0__0=6, experts__1__0=6)),
    "fused experts": Case(fused_experts, (VECTOR,), channels(gate_up=6)),
    "einsum": Case(einsum, (SEQUENCE,), heads("q:head", "q:head_dim", "v:head_dim")),
    "weight norm": Case(weight_norm, (VECTOR,), {}),
    "low rank": Case(low_rank, (VECTOR,), channels(a=4, b=8)),
    "layer scale": Case(layer_scale, (VECTOR,), channels(first=6, up=8)),
    "views": Case(
        views, (IMAGE,), {"first": ("channel", 2), "first[0:8]": ("channel", 4)}, lambda net, left: {"parts": left.get("first", 2)}
    ),
    "written in place": Case(written_in_place, (VECTOR,), channels(a=4, b=6)),
    "thrown away": Case(thrown_away, (VECTOR,), channels(first=6)),
}


@pytest.mark.parametrize("name", CASES)
def test_groups(name: str) -> None:
    case = CASES[name]
    model = scrambled(case.build())
    groups = find_groups(model, inputs(case, 0))
    assert {g.name: (g.kind, g.size) for g in groups.removable} == case.groups
    check(model, groups, case)


def test_torchs_own_attention_says_why() -> None:
    groups = find_groups(packaged_attention(), torch.randn(SEQUENCE))
    [heads] = [group for group in groups if group.kind == "head"]
    assert heads.reason == "torch.nn.MultiheadAttention needs heads × dimensions = inputs"
    assert groups["first"].reason == heads.reason  # the width of its inputs


def inputs(case: Case, seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    if case.build is embeddings:
        return tuple(torch.randint(11, shape) for shape in case.inputs)
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in case.inputs)


def check(model: nn.Module, groups: Groups, case: Case) -> None:
    """Compare the cut with the masked model, for every group by itself and for all together."""
    chosen = some_units(groups, 0.5)
    for cuts in [*([one] for one in chosen), chosen]:
        other = inputs(case, 1)
        with torch.no_grad():
            expected, found = masked(model, cuts)(*other), cut(model, cuts, case.numbers)(*other)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
