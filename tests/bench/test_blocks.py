"""The block-by-block benchmark on a tiny model: what is measured, and the architecture that stories260K is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from niwaki.bench import blocks
from niwaki.bench.results import stored
from niwaki.errors import InputError


class Tiny(nn.Module):
    """Three blocks between an embedding and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3))
        self.output = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.output(x)
        return out


def pretrained() -> blocks.Pretrained:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tiny().eval()
        x = torch.randn(200, 8) @ torch.randn(8, 8)
    wanted = model(x).detach()
    data = [(x[begin : begin + 50], None) for begin in range(0, 100, 50)]

    def measure(pruned: nn.Module) -> dict[str, float]:
        return {"nats": float(F.mse_loss(pruned(x), wanted).detach())}

    return blocks.Pretrained(model, "layers", lambda seed: data, measure)


def test_every_method_prunes_the_blocks_and_is_measured_once(tmp_path: Path) -> None:
    out = tmp_path / "blocks.json"
    rows = blocks.run({"tiny": pretrained}, out)
    assert [(row["method"], row["pattern"]) for row in rows] == [
        ("dense", ""), *((method, pattern) for method in blocks.METHODS for pattern in blocks.PATTERNS)
    ]  # fmt: skip
    assert not any("error" in row for row in rows)
    assert rows[0]["nats"] == 0
    assert all(row["sparsity"] == 0.5 and row["nats"] > 0 for row in rows[1:])
    loss = {(row["method"], row["pattern"]): row["nats"] for row in rows}
    for pattern in blocks.PATTERNS:
        assert loss["sparsegpt", pattern] < loss["magnitude", pattern]
        assert loss["obc", pattern] < loss["magnitude", pattern]
    assert stored(out)["rows"] == rows

    def refuse() -> blocks.Pretrained:
        raise AssertionError("nothing is left to measure")

    assert blocks.run({"tiny": refuse}, out) == rows
    console = Console(width=160)
    with console.capture() as shown:
        console.print(blocks.table([*rows, {"network": "tiny", "method": "obc", "pattern": "0.9", "seed": 0, "error": "no"}]))
    assert shown.get().count("\ntiny") == 10
    assert "failed: no" in shown.get()


def test_several_draws_are_for_methods_that_look_at_data(tmp_path: Path) -> None:
    rows = blocks.run({"tiny": pretrained}, tmp_path / "rows.json", methods=["magnitude", "wanda"], patterns=["0.5"], seeds=2)
    assert [(row["method"], row["seed"]) for row in rows] == [("dense", 0), ("magnitude", 0), ("wanda", 0), ("wanda", 1)]


def test_ranks_are_those_of_spearman() -> None:
    first, second = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.randn(50, generator=torch.Generator().manual_seed(1))
    difference = [
        sorted(first.tolist()).index(a) - sorted(second.tolist()).index(b) for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]
    expected = 1 - 6 * sum(d * d for d in difference) / (50 * (50**2 - 1))
    assert blocks.rank_correlation(first, second) == pytest.approx(expected, rel=1e-9)
    assert blocks.rank_correlation(first, first**3) == 1
    assert blocks.rank_correlation(first, -first) == -1


def attention(x: Tensor, state: dict[str, Tensor], heads: int, key_heads: int) -> Tensor:
    """Causal attention as llama2.c does it: neighbouring entries of a head are the real and imaginary part that a position turns."""
    length, width = x.shape
    head = width // heads

    def turned(values: Tensor) -> Tensor:
        pairs = torch.view_as_complex(values.reshape(length, -1, head // 2, 2).contiguous())
        angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, head, 2) / head)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)

    query = turned(x @ state["attention.wq.weight"].T)
    pressed = turned(x @ state["attention.wk.weight"].T).repeat_interleave(heads // key_heads, dim=1)
    value = (x @ state["attention.wv.weight"].T).view(length, key_heads, head).repeat_interleave(heads // key_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, pressed) / head**0.5 + torch.full((length, length), -torch.inf).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1) @ state["attention.wo.weight"].T


def test_the_weights_of_llama2_c_mean_the_same() -> None:
    pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    width, hidden, vocabulary, heads = 16, 24, 11, 4
    shapes = {
        "attention.wq": (width, width),
        "attention.wk": (width // 2, width),
        "attention.wv": (width // 2, width),
        "attention.wo": (width, width),
        "feed_forward.w1": (hidden, width),
        "feed_forward.w2": (width, hidden),
        "feed_forward.w3": (hidden, width),
        "attention_norm": (width,),
        "ffn_norm": (width,),
    }
    state = {
        f"layers.{i}.{name}.weight": 1 + random(*shape) if len(shape) == 1 else random(*shape)
        for i in range(2)
        for name, shape in shapes.items()
    }
    state |= {"norm.weight": 1 + random(width), "tok_embeddings.weight": 3 * random(vocabulary, width)}
    tokens = torch.tensor([1, 4, 9, 2, 2, 10, 7])

    def normalized(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * state[name]

    x = state["tok_embeddings.weight"][tokens]
    for i in range(2):
        own = {name: state[f"layers.{i}.{name}.weight"] for name in shapes}
        x = x + attention(normalized(x, f"layers.{i}.attention_norm.weight"), {f"{k}.weight": v for k, v in own.items()}, heads, heads // 2)
        y = normalized(x, f"layers.{i}.ffn_norm.weight")
        x = x + (F.silu(y @ own["feed_forward.w1"].T) * (y @ own["feed_forward.w3"].T)) @ own["feed_forward.w2"].T
    expected = normalized(x, "norm.weight") @ state["tok_embeddings.weight"].T
    model = blocks.llama(state, heads)
    with torch.no_grad():
        assert torch.allclose(model(tokens[None]).logits[0], expected, atol=1e-4)


def test_missing_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no stories260K.safetensors"):
        blocks.stories(tmp_path)
    with pytest.raises(InputError, match=r"there is no train.tsv"):
        blocks.embeddings(tmp_path, tmp_path)


def test_the_loss_of_stories_is_that_of_every_third_window(tmp_path: Path) -> None:
    """Against a loop over the windows, with a small network of the same architecture."""
    torch.manual_seed(0)
    state = {"tok_embeddings.weight": torch.randn(40, 64) / 8, "norm.weight": torch.ones(64)}
    shapes = {"attention.wq": (64, 64), "attention.wk": (32, 64), "attention.wv": (32, 64), "attention.wo": (64, 64)}
    shapes |= {"feed_forward.w1": (48, 64), "feed_forward.w2": (64, 48), "feed_forward.w3": (48, 64)}
    for layer in range(2):
        state |= {f"layers.{layer}.{name}.weight": torch.randn(shape) / 8 for name, shape in shapes.items()}
        state |= {f"layers.{layer}.{name}.weight": torch.ones(64) for name in ("attention_norm", "ffn_norm")}
    (tmp_path / "models").mkdir()
    (tmp_path / "text").mkdir()
    save_file(state, tmp_path / "models" / "stories260K.safetensors")
    ids = torch.randint(2, 40, (7 * 512 + 100,))
    np.savez(tmp_path / "text" / "tinystories_val_part_tok512.npz", ids=ids.numpy().astype(np.uint16))
    network = blocks.stories(tmp_path, examples=2)
    losses = []
    with torch.no_grad():
        for window in (0, 3, 6):
            wanted = ids[512 * window : 512 * (window + 1)]
            read = torch.cat([torch.tensor([1]), wanted[:-1]])
            losses.append(float(torch.nn.functional.cross_entropy(network.model(read[None]).logits[0], wanted)))
    assert network.measure(network.model)["nats"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    measured = {tuple(ids[512 * window : 512 * window + 511].tolist()) for window in (0, 3, 6)}
    for inputs, _ in network.calibration(0):
        assert all(tuple(row[1:].tolist()) not in measured for row in inputs.kwargs["input_ids"])
