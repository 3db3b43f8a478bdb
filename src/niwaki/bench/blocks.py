"""Pretrained transformers pruned block by block, without training: a small language model, and a model of sentence embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from niwaki.bench.oneshot import resident
from niwaki.bench.results import Results
from niwaki.counter import key, uniform
from niwaki.errors import InputError, NiwakiError
from niwaki.huggingface import complaining, quiet, transformers_for
from niwaki.metrics.units import NOTHING, show
from niwaki.oneshot.windows import batched, windows
from niwaki.pruning import prune
from niwaki.recipe import Recipe
from niwaki.tasks.files import required
from niwaki.tasks.sentences import read_tsv

PATTERNS = ("0.5", "2:4")
"""A sparsity of single weights, or N:M."""

METHODS: Mapping[str, tuple[str, Any]] = {
    "magnitude": ("magnitude", "uniform"),
    "wanda": ("wanda", {"uniform": {"per": "row"}}),
    "sparsegpt": ("sparsegpt", "uniform"),
    "obc": ("obc", "uniform"),
}
"""Method -> its saliency, and how single weights are shared out; N:M needs no such rule."""

EXAMPLES = 128
"""Calibration windows."""

DEFINITIONS = (
    "All weights in the blocks are pruned, every layer alike, one block after the other on what the pruned ones before it write; nothing is"
    " trained afterwards. wanda, sparsegpt and obc see 128 windows of text that is not what is measured on.",
    "nats: mean cross-entropy of the next token on TinyStories, in 253 windows of 512 tokens. similarity: mean cosine between embeddings"
    " of the 872 sentences of SST-2's dev set by the pruned model and by the dense one. ranks: Spearman's correlation between the cosines"
    " of all pairs of these sentences by the one and by the other.",
    "seconds: of pruning, capture included. memory: the largest resident memory while pruning, less that before.",
)

KEY = ("network", "method", "pattern", "seed")

METRICS = ("nats", "similarity", "ranks")


@dataclass(frozen=True)
class Pretrained:
    """A model, and all that it takes to measure it.

    Attributes:
        model: dense.
        blocks: path of its blocks.
        calibration: batches of a seed.
        measure: name -> value for a pruned copy.
    """

    model: nn.Module
    blocks: str
    calibration: Callable[[int], list[tuple[Any, Any]]]
    measure: Callable[[nn.Module], dict[str, float]]


def stories(folder: Path | None, examples: int = EXAMPLES) -> Pretrained:
    """Return stories260K (Llama architecture, 260 thousand weights), which measures on every third window and calibrates on others.

    Args:
        folder: with ``models/stories260K.safetensors`` and ``text/tinystories_val_part_tok512.npz``.
        examples: windows of calibration.

    Raises:
        InputError: a file or ``transformers`` is missing.
    """
    weights = required(folder, "models/stories260K.safetensors", task="stories260k", contents="weights of stories260K")
    tokens = required(folder, "text/tinystories_val_part_tok512.npz", task="stories260k", contents="its tokens of TinyStories")
    ids = torch.from_numpy(np.load(tokens)["ids"].astype(np.int64))
    model = llama(load_file(weights))
    targets = ids[: len(ids) // 512 * 512].view(-1, 512)
    inputs = torch.cat([torch.ones(len(targets), 1, dtype=torch.int64), targets[:, :-1]], dim=1)  # 1 begins a text
    measured = torch.arange(len(inputs)) % 3 == 0

    def calibration(seed: int) -> list[tuple[Any, Any]]:
        rest = torch.arange(len(inputs))[~measured]
        chosen = rest[uniform(key(seed, 0, "windows"), 0, len(rest)).argsort()[:examples]]
        return batched(model, inputs[chosen], 16)

    def measure(pruned: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            parts = zip(torch.split(inputs[measured], 16), torch.split(targets[measured], 16), strict=True)
            losses = [F.cross_entropy(pruned(part).logits.flatten(0, 1), wanted.flatten(), reduction="sum") for part, wanted in parts]
        return {"nats": float(sum(losses)) / targets[measured].numel()}

    return Pretrained(model, "model.layers", calibration, measure)


def llama(state: Mapping[str, Tensor], heads: int = 8) -> nn.Module:
    """Return a model of ``transformers`` with the weights of a llama2.c checkpoint (tied embeddings).

    Rotary embeddings turn neighbouring entries of a head there, and entries half a head apart here, so rows of queries and keys move.
    """
    transformers = transformers_for("stories260k")
    vocabulary, width = state["tok_embeddings.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    head = width // heads
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(state["layers.0.feed_forward.w1.weight"]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=len(state["layers.0.attention.wk.weight"]) // head,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )

    def apart(weight: Tensor) -> Tensor:
        return weight.view(-1, head // 2, 2, width).transpose(1, 2).reshape(-1, width)

    parts = {
        "attention.wq": ("self_attn.q_proj", apart),
        "attention.wk": ("self_attn.k_proj", apart),
        "attention.wv": ("self_attn.v_proj", None),
        "attention.wo": ("self_attn.o_proj", None),
        "feed_forward.w1": ("mlp.gate_proj", None),
        "feed_forward.w2": ("mlp.down_proj", None),
        "feed_forward.w3": ("mlp.up_proj", None),
        "attention_norm": ("input_layernorm", None),
        "ffn_norm": ("post_attention_layernorm", None),
    }
    named = {"model.embed_tokens.weight": state["tok_embeddings.weight"], "model.norm.weight": state["norm.weight"]}
    for layer in range(layers):
        for theirs, (ours, change) in parts.items():
            weight = state[f"layers.{layer}.{theirs}.weight"]
            named[f"model.layers.{layer}.{ours}.weight"] = weight if change is None else change(weight)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(named, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise InputError(f"stories260k: the weights do not fit the architecture: {', '.join([*missing, *unexpected])}")
    return model.eval()


def embeddings(folder: Path | None, source: Path, examples: int = EXAMPLES) -> Pretrained:
    """Return a BERT of sentence embeddings (such as all-MiniLM-L6-v2, 22.7 million weights).

    Args:
        folder: with ``sst2/train.tsv`` to calibrate on, ``sst2/dev.tsv`` to measure on.
        source: folder of the model, with its tokenizer.
        examples: windows of calibration, of 128 tokens.

    Raises:
        InputError: a file or ``transformers`` is missing.
    """
    files = [required(folder, f"sst2/{name}.tsv", task="embeddings", contents="sentences") for name in ("train", "dev")]
    learned, tested = ([sentence for sentence, _, _ in read_tsv(path)] for path in files)
    transformers = transformers_for(f"--embeddings: {source}")
    with quiet(transformers), complaining(f"--embeddings: {source}", "it cannot be loaded"):
        loaded = {"local_files_only": True, "trust_remote_code": False}
        model = transformers.AutoModel.from_pretrained(source, **loaded).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **loaded)
    dense = embedded(model, tokenizer, tested)

    def calibration(seed: int) -> list[tuple[Any, Any]]:
        return batched(model, windows(model, source, "\n".join(learned), examples, 128, seed), 16)

    def measure(pruned: nn.Module) -> dict[str, float]:
        found = embedded(pruned, tokenizer, tested)
        return {"similarity": float((found * dense).sum(1).mean()), "ranks": rank_correlation(*map(pairwise, (found, dense)))}

    return Pretrained(model, "encoder.layer", calibration, measure)


@torch.no_grad()
def embedded(model: nn.Module, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """Return the mean of each sentence's last hidden states, of length 1: ``[sentences, width]``."""
    rows = []
    for begin in range(0, len(sentences), 32):
        batch = tokenizer(list(sentences[begin : begin + 32]), padding=True, truncation=True, return_tensors="pt")
        states, seen = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        rows.append(F.normalize((states * seen).sum(1) / seen.sum(1), dim=1))
    return torch.cat(rows)


def pairwise(rows: Tensor) -> Tensor:
    """Return the products of all pairs of different rows, each pair once.

    >>> pairwise(torch.tensor([[1.0], [2.0], [3.0]])).tolist()
    [2.0, 3.0, 6.0]
    """
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    return (rows @ rows.T)[first, second]


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's correlation of two vectors without equal values.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([10.0, 30.0, 20.0]))
    0.5
    """
    ranks = torch.stack([values.argsort().argsort().to(torch.float64) for values in (first, second)])
    return round(float(torch.corrcoef(ranks)[0, 1]), 12)


# -- measuring -----------------------------------------------------------------------------------------------------------------


def run(
    networks: Mapping[str, Callable[[], Pretrained]],
    out: Path,
    *,
    methods: Sequence[str] = tuple(METHODS),
    patterns: Sequence[str] = PATTERNS,
    seeds: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Prune every network by every method, and return rows; those of ``out`` are not measured again.

    Args:
        networks: name -> what makes it, such as ``{"stories260k": partial(stories, folder)}``.
        out: a JSON file that grows by one row at a time.
        methods: of ``METHODS``.
        patterns: sparsities, or N:M.
        seeds: draws of calibration windows, for methods that look at data.
        progress: called with the rows done and all rows.

    Raises:
        InputError: data or weights are missing, or ``out`` holds something else.
    """
    results = Results(out, {"benchmark": "blocks"}, DEFINITIONS, KEY)
    cases: list[dict[str, Any]] = [
        {"network": network, "method": method, "pattern": pattern, "seed": seed}
        for network in networks
        for method in ("dense", *methods)
        for pattern in (("",) if method == "dense" else patterns)
        for seed in range(1 if method in ("dense", "magnitude") else seeds)
    ]
    loaded: dict[str, Pretrained] = {}
    for done, case in enumerate(cases):
        if progress:
            progress(done, len(cases))
        if results.find(case) is None:
            name = case["network"]
            if name not in loaded:
                loaded = {name: networks[name]()}
            results.add({**case, **_measured(case, loaded[name])})
    return [row for row in results.rows if any(all(row[name] == case[name] for name in KEY) for case in cases)]


def _measured(case: Mapping[str, Any], network: Pretrained) -> dict[str, Any]:
    model = copy.deepcopy(network.model)
    if case["method"] == "dense":
        return network.measure(model)
    try:
        with resident() as memory:
            recipe = recipe_of(case["method"], case["pattern"], network.blocks)
            done = prune(model, recipe, data=network.calibration(case["seed"]), blocks=network.blocks, seed=case["seed"])
    except NiwakiError as error:
        return {"error": str(error)}
    spent = {"seconds": done.seconds, "memory": memory.peak, "sparsity": done.sparsity, "notes": list(done.notes)}
    return {**network.measure(model), **spent}


def recipe_of(method: str, pattern: str, blocks: str) -> Recipe:
    """Return what is done to the weights in the blocks.

    >>> recipe_of("wanda", "2:4", "model.layers").granularity.to_data()
    {'n_m': {'n': 2, 'm': 4}}
    """
    saliency, allocation = METHODS[method]
    fields = {"granularity": pattern} if ":" in pattern else {"sparsity": float(pattern), "allocation": allocation}
    return Recipe(target={"weights": {"include": [f"{blocks}.*"]}}, saliency=saliency, **fields)


def table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return the rows as a table for people: of several seeds the mean."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for header in ("network", "method", "pattern"):
        result.add_column(header)
    for header in (*METRICS, "seconds", "memory"):
        result.add_column(header, justify="right")
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["method"], row["pattern"]), []).append(row)
    for (network, method, pattern), own in groups.items():
        failed = next((row["error"] for row in own if "error" in row), None)
        if failed is not None:
            result.add_row(network, method, pattern, f"failed: {failed}")
            continue
        means = {name: [row[name] for row in own if row.get(name) is not None] for name in (*METRICS, "seconds", "memory")}
        mean = {name: sum(values) / len(values) if values else None for name, values in means.items()}
        cells = [NOTHING if mean[name] is None else f"{mean[name]:.4f}" for name in METRICS]
        result.add_row(network, method, pattern, *cells, show(mean["seconds"], "seconds"), show(mean["memory"], "bytes"))
    return result
