"""A text as what a language model is called with: windows of tokens, as the model's own tokenizer cuts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki import counter
from niwaki.calibration import Arguments
from niwaki.errors import InputError
from niwaki.huggingface import complaining, quiet, transformers_for

LENGTH = 512
"""Tokens of a window, where the model takes as many."""


def windows(model: Any, source: Path, text: str, examples: int, length: int | None, seed: int) -> Tensor:
    """Cut a text into windows that do not overlap, and choose some of them: int64 ``[windows, length]``, in the order of the text.

    Each begins and ends with the special tokens that the tokenizer puts around a text.

    Args:
        model: of ``transformers``.
        source: folder with its tokenizer.
        text: to be cut.
        examples: how many windows are chosen, or all if there are fewer.
        length: tokens of a window, special ones included; None: 512, or what the model can take if that is less.
        seed: of the choice.

    Raises:
        InputError: the model does not read text, there is no tokenizer that fits, or the text is shorter than a window.
    """
    where = f"--model: {source}"
    transformers = transformers_for(where)
    if model.main_input_name != "input_ids":
        raise InputError(f"{where}: the model reads {model.main_input_name}, not text; pass batches of data from Python")
    with quiet(transformers), complaining(where, "its tokenizer cannot be read"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        first, last = _special(tokenizer, text[:100])
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    longest = min(limit for limit in limits if limit is not None)
    length = min(LENGTH, longest) if length is None else length
    inner = length - len(first) - len(last)
    if length > longest or inner < 1:
        raise InputError(f"--length: the model takes windows of {length - inner + 1} to {longest} tokens, got {length}")
    count = len(plain) // inner
    if not count:
        raise InputError(f"--text: too short: it has {len(plain)} tokens, and a window takes {inner}; give more text or a shorter --length")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if max(plain) >= vocabulary:
        raise InputError(f"{where}: its tokenizer has token {max(plain):,}, and its embedding {vocabulary:,} tokens")
    chosen = counter.uniform(counter.key(seed, 0, "windows"), 0, count).argsort()[:examples].sort().values
    cut = torch.tensor(plain[: count * inner]).view(count, inner)[chosen]
    before, after = (torch.tensor(side, dtype=torch.int64).expand(len(cut), -1) for side in (first, last))
    return torch.cat([before, cut, after], dim=1)


def batched(model: Any, tokens: Tensor, size: int) -> list[tuple[Arguments, None]]:
    """Return token numbers ``[windows, length]`` as batches; an encoder-decoder reads them on both sides.

    Raises:
        InputError: they are not whole numbers of that shape.
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        raise InputError(f"data: token numbers have shape [windows, length], got {tokens.dtype} of shape {list(tokens.shape)}")
    names = ["input_ids", *(["decoder_input_ids"] if model.config.is_encoder_decoder else [])]
    return [(Arguments(kwargs=dict.fromkeys(names, part)), None) for part in torch.split(tokens, size)]


def _special(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before and after a text."""
    plain, whole = (list(tokenizer(text, add_special_tokens=special)["input_ids"]) for special in (False, True))
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at], whole[at + len(plain) :]
    return [], []
